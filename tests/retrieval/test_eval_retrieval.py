"""`eval_retrieval.py` as a user runs it: recalls, files of results, broken images and killed runs."""

import json
import subprocess
import time

import pytest
import torch

from qformer_captioner import (
    QFormerForPretraining,
    eval_retrieval,
    precompute_features,
)
from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation.recall import recalls
from qformer_captioner.retrieval.arguments import RetrievalArguments
from qformer_captioner.retrieval.model import RetrievalModel, load_stage1
from qformer_captioner.retrieval.run import resolve_fold_size

from ..conftest import ROOT
from ..fixtures import feature_stores, tiny

NUM_IMAGES = 11


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """Return the folder of a model of stage 1."""
    return tiny.save_stage1(tmp_path_factory.mktemp("stage1") / "model")


@pytest.fixture
def pictures(tmp_path):
    """Return a folder of pictures with two captions each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(NUM_IMAGES):
        tiny.picture(number).save(folder / f"{number}.png")
        texts = [" ".join(tiny.CAPTIONS[(number + k) % 3].split()[: 2 + number % 4]) for k in (0, 1)]
        rows.append({"file_name": f"{number}.png", "caption": texts})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(model, data, output, *more):
    words = ["--model", str(model), "--dataset_name", str(data), "--output_dir", str(output), "--use_cpu"]
    return [*words, "--batch_size", "2", *more]


def scores(folder):
    return json.loads((folder / "scores.json").read_text())["scores"]


def test_a_model_that_was_trained_without_matching_ranks_by_contrast_alone(stage1, pictures, tmp_path):
    model = load_stage1(stage1)
    model.config.itm_weight = 0.0
    model.save_pretrained(tmp_path / "model")
    eval_retrieval.evaluate(command(tmp_path / "model", pictures, tmp_path / "run"))
    assert list(scores(tmp_path / "run")) == ["contrast"]
    eval_retrieval.evaluate(command(tmp_path / "model", pictures, tmp_path / "run", "--rerank_top_k", "3"))
    assert list(scores(tmp_path / "run")) == ["contrast", "reranked"]


def test_a_run_scores_its_model_by_contrast_and_by_matching(stage1, pictures, tmp_path, capsys):
    eval_retrieval.evaluate(command(stage1, pictures, tmp_path / "run", "--rerank_score", "match", "--fold_size", "5"))
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert list(content["scores"]) == ["contrast", "contrast, 2 folds of 5", "reranked", "reranked, 2 folds of 5"]
    assert (content["images"], content["texts"], content["rerank_top_k"]) == (11, 22, 128)
    assert "model.safetensors" in str(content["weights"]) and "note" not in content
    model = load_stage1(stage1)
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    images, texts = (
        [str(pictures / row["file_name"]) for row in rows],
        [text for row in rows for text in row["caption"]],
    )
    owners = torch.arange(22) // 2
    for name, values in {"contrast": model.similarity(images, texts), "reranked": model.match(images, texts)}.items():
        assert content["scores"][name] == recalls(values, owners), name
    printed = [line.split()[0].strip(",") for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [name for name in printed if name in ("contrast", "reranked")] == ["contrast"] * 2 + ["reranked"] * 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "rank 1" in page and "image to text R@10" in page and "mean recall" in page
    assert page.count("data:image/jpeg;base64,") > NUM_IMAGES


def test_texts_that_are_cut_are_counted(stage1, pictures, tmp_path, log):
    eval_retrieval.evaluate(command(stage1, pictures, tmp_path / "run", "--max_length", "5", "--rerank_top_k", "0"))
    assert any("of 22 texts are cut to 5 tokens" in message for message in log.messages)
    assert list(scores(tmp_path / "run")) == ["contrast"]


def test_precomputed_features_score_as_their_images(pictures, tmp_path):
    vision = tiny.save_vision(tmp_path / "vision", "vit")
    model = QFormerForPretraining.from_backbones(
        vision, tokenizer=tiny.text_tokenizer(), **tiny.QFORMER, image_text_hidden_size=20
    )
    model.save_pretrained(tmp_path / "model")
    precompute_features.precompute(
        feature_stores.command(vision, pictures, tmp_path / "features", "--dtype", "float32")
    )
    words = command(tmp_path / "model", pictures, tmp_path / "images")
    eval_retrieval.evaluate(words)
    words = ["--model", str(tmp_path / "model"), "--features", str(tmp_path / "features"), "--use_cpu"]
    eval_retrieval.evaluate([*words, "--output_dir", str(tmp_path / "run"), "--batch_size", "2"])
    assert scores(tmp_path / "run") == scores(tmp_path / "images")


def test_broken_images_are_left_out_and_named(stage1, pictures, tmp_path, log):
    (pictures / "3.png").write_bytes(b"no image")
    words = command(stage1, pictures, tmp_path / "run")
    with pytest.raises(InputError, match="The results are written, but 1 images are not scored"):
        eval_retrieval.evaluate(words)
    assert any("Not scored: '3.png'" in message for message in log.messages)
    eval_retrieval.evaluate([*words, "--allow_missing"])
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (content["images"], content["texts"], len(content["skipped"])) == (10, 20, 1)
    assert content["note"].startswith("Only 10 of 11 images were scored")


def test_another_number_of_candidates_uses_the_vectors_again(stage1, pictures, tmp_path):
    eval_retrieval.evaluate(command(stage1, pictures, tmp_path / "run", "--rerank_top_k", "0"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "images").iterdir()}
    eval_retrieval.evaluate(command(stage1, pictures, tmp_path / "run", "--rerank_top_k", "3"))
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "images").iterdir()}
    assert "reranked" in scores(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_name", "x"], "Say which model of stage 1 retrieves: --model."),
        (["--model", "m"], "Say which images to read"),
        (["--model", "m", "--benchmark", "nocaps_test"], "The texts of nocaps_test are hidden"),
        (["--model", "m", "--benchmark", "flickr8k_test", "--split", "test"], "leave out --split"),
        (["--model", "m", "--dataset_name", "x", "--rerank_top_k", "-1"], "--rerank_top_k must be at least 0"),
        (["--model", "m", "--dataset_name", "x", "--rerank_score", "mean"], "--rerank_score must be sum or match"),
        (["--model", "m", "--dataset_name", "x", "--max_length", "2"], "--max_length must be at least 3"),
    ],
)
def test_options_that_cannot_be_used_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        eval_retrieval.evaluate([*words, "--use_cpu"])


def test_a_captioner_and_folds_that_are_too_large_are_refused(stage1, pictures, tmp_path):
    tiny.captioner().save_pretrained(tmp_path / "captioner")
    with pytest.raises(InputError, match="is a captioner, and retrieval needs a model of stage 1"):
        eval_retrieval.evaluate(command(tmp_path / "captioner", pictures, tmp_path / "run"))
    with pytest.raises(InputError, match="--fold_size 12 is more than the 11 images"):
        eval_retrieval.evaluate(command(stage1, pictures, tmp_path / "run", "--fold_size", "12"))


@pytest.mark.parametrize(
    ("benchmark", "fold_size", "num_images", "expected"),
    [
        ("coco_karpathy_test", None, 5000, 1000),
        ("coco_karpathy_test", None, 200, None),  # --max_samples 200
        ("coco_karpathy_test", 0, 5000, None),
        ("flickr8k_test", None, 1000, None),
        (None, 4, 9, 4),
    ],
)
def test_only_coco_has_folds_by_default(benchmark, fold_size, num_images, expected):
    args = RetrievalArguments(benchmark=benchmark, fold_size=fold_size)
    assert resolve_fold_size(args, num_images) == expected


def test_a_model_of_features_needs_features(pictures, tmp_path):
    tiny.save_stage1(tmp_path / "model", None)
    with pytest.raises(InputError, match="give it --features instead of images"):
        eval_retrieval.evaluate(command(tmp_path / "model", pictures, tmp_path / "run"))


def test_pairs_are_those_of_the_model(stage1, pictures):
    model = load_stage1(stage1)
    retrieval = RetrievalModel(model)
    images = [tiny.picture(number) for number in range(3)]
    texts = ["a green heart", "a red circle above a blue star", "two small squares"]
    logits = retrieval.match(*retrieval.image_features(images), torch.tensor([2, 0, 2]), texts)
    expected = model.match(images, texts)
    torch.testing.assert_close(logits.softmax(dim=1)[:, 1], expected[[2, 0, 2], [0, 1, 2]])
    assert retrieval.count_tokens(texts) == [5, 9, 5]


@pytest.mark.slow
def test_two_processes_that_were_killed_and_continued_score_as_one(commands, stage1, pictures, tmp_path):
    eval_retrieval.evaluate(command(stage1, pictures, tmp_path / "one"))
    run = ["torchrun", "--standalone", "--nproc_per_node", "2", str(ROOT / "eval_retrieval.py")]
    run += command(stage1, pictures, tmp_path / "two")
    environment = commands.environment()
    process = subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not list((tmp_path / "two").glob("images/*.safetensors")):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.time() < deadline, "the run writes no vectors"
        time.sleep(0.01)
    commands.kill()
    process.wait()
    assert not (tmp_path / "two" / "scores.json").exists()
    subprocess.run(run, env=environment, check=True, capture_output=True, timeout=300)
    for name in ("images", "texts", "pairs"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "one" / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "two" / name).iterdir()}
    assert scores(tmp_path / "one") == scores(tmp_path / "two")
