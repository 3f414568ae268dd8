"""`qformer-captioner search` as a user runs it: ranked paths, a page, broken images and killed runs."""

import subprocess
import time

import pytest

from qformer_captioner.cli.search import search
from qformer_captioner.common.errors import InputError
from qformer_captioner.retrieval.model import load_stage1

from ..fixtures import tiny

TEXTS = ["a green heart", "a red circle above a blue star"]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """Return the folder of a model of stage 1."""
    return tiny.save_stage1(tmp_path_factory.mktemp("stage1") / "model")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        tiny.picture(number).save(folder / f"{number}.png")
    return folder


def ranked(output: str) -> list[tuple[str, float]]:
    """Return the paths and scores of printed lines."""
    return [(path, float(score)) for score, path in (line.split("  ") for line in output.splitlines())]


def test_images_are_printed_in_the_order_of_their_similarity(stage1, photos, capsys):
    search([TEXTS[0], str(photos), "--model", stage1, "--top_k", "4"])
    paths = [str(photos / f"{number}.png") for number in range(7)]
    expected = sorted(zip(load_stage1(stage1).similarity(paths, TEXTS[0])[:, 0].tolist(), paths, strict=True))[::-1]
    found = ranked(capsys.readouterr().out)
    assert [path for path, _ in found] == [path for _, path in expected[:4]]
    assert [score for _, score in found] == pytest.approx([score for score, _ in expected[:4]], abs=2e-3)  # float16


def test_matching_prints_probabilities(stage1, photos, capsys):
    search([TEXTS[0], str(photos), "--model", stage1, "--rerank_top_k", "7", "--top_k", "3"])
    paths = [str(photos / f"{number}.png") for number in range(7)]
    expected = sorted(zip(load_stage1(stage1).match(paths, TEXTS[0])[:, 0].tolist(), paths, strict=True))[::-1]
    assert ranked(capsys.readouterr().out) == [(path, pytest.approx(score, abs=1e-3)) for score, path in expected[:3]]


def test_a_model_that_was_trained_without_matching_does_not_rank_again(stage1, photos, tmp_path):
    model = load_stage1(stage1)
    model.config.itm_weight = 0.0
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="trained without matching"):
        search([TEXTS[0], str(photos), "--model", str(tmp_path / "model"), "--rerank_top_k", "20"])


def test_each_text_has_a_heading_and_a_part_of_the_page(stage1, photos, capsys, tmp_path):
    words = [*TEXTS, str(photos), "--model", stage1, "--top_k", "2", "--output", str(tmp_path / "page.html")]
    search([*words, "--index", str(tmp_path / "index")])
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[3], len(lines)) == (*TEXTS, 6)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h1>") == 2 and page.count("data:image/jpeg;base64,") == 4
    assert (tmp_path / "index" / "index.json").is_file()


def test_broken_images_are_counted_and_named(stage1, photos, log):
    for number in range(1, 7):
        (photos / f"{number}.png").write_bytes(b"no image")
    search([TEXTS[0], str(photos), "--model", stage1])
    assert sum(message.startswith("Not searched: '") for message in log.messages) == 5
    assert "Not searched: 6 images in all cannot be read." in log.messages


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a dog", "nowhere", "--model", "m"], "There is no folder 'nowhere'"),
        (["a dog", ".", "--model", "m", "--top_k", "0"], "--top_k must be at least 1"),
        (["a dog", ".", "--model", "m", "--rerank_top_k", "4"], "is less than the 12 images of --top_k"),
        (["a dog", ".", "--model", "m", "--output", "nowhere/page.html"], "There is no folder for"),
        (["a dog", ".", "--model", "./nowhere"], r"The model './nowhere' cannot be loaded from a folder or the Hub"),
        (["a dog"], "The following arguments are required: FOLDER."),
    ],
)
def test_options_that_cannot_be_used_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        search(words)


def test_texts_and_models_that_cannot_be_used_are_refused(stage1, photos, tmp_path):
    with pytest.raises(InputError, match="has 32 tokens, and the model reads at most 31: shorten it"):
        search(["a red " * 15, str(photos), "--model", stage1])
    tiny.captioner().save_pretrained(tmp_path / "captioner")
    with pytest.raises(InputError, match="is a captioner, and retrieval needs a model of stage 1"):
        search(["a dog", str(photos), "--model", str(tmp_path / "captioner")])
    tiny.save_stage1(tmp_path / "features", None)
    with pytest.raises(InputError, match="has no vision encoder for images"):
        search(["a dog", str(photos), "--model", str(tmp_path / "features")])


@pytest.mark.slow
def test_a_killed_search_ends_with_the_index_of_an_unbroken_one(commands, stage1, photos, tmp_path):
    for number in range(7, 30):
        tiny.picture(number).save(photos / f"{number}.png")
    words = ["qformer-captioner", "search", TEXTS[0], str(photos), "--model", stage1, "--batch_size", "1", "--index"]
    options = {"env": commands.environment(), "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*words, str(tmp_path / "broken")], **options)
    deadline = time.time() + 300
    while len(list((tmp_path / "broken").glob("*.safetensors"))) < 3:
        assert process.poll() is None, "the search ended before it was killed"
        assert time.time() < deadline, "the search writes no index"
        time.sleep(0.005)
    commands.kill()
    process.wait()
    assert len(list((tmp_path / "broken").glob("*.safetensors"))) < 30
    done = {}
    for name in ("broken", "unbroken"):
        run = subprocess.run([*words, str(tmp_path / name)], check=True, stdout=subprocess.PIPE, timeout=300, **options)
        done[name] = run.stdout, {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert done["broken"] == done["unbroken"]
