"""`eval_captions.py` as a user runs it: files scored, benchmarks captioned, runs killed and gone on with."""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import datasets
import pytest

from qformer_captioner import QFormerCaptioner, eval_captions
from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation import benchmarks
from qformer_captioner.evaluation.benchmarks import load_benchmark

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.hub_server import Hub
from ..fixtures.processes import kill
from ..model.test_loading import adapter_of

REFERENCES = {
    "images": [{"id": i, "file_name": f"{i}.png", "domain": "in-domain" if i < 3 else "near-domain"} for i in range(5)],
    "annotations": [
        {"image_id": i, "caption": f"{a} {colour} star"}
        for i, colour in enumerate(["red", "blue", "green", "pink", "<b>&"])
        for a in ("a", "one large")
    ],
}
PREDICTIONS = [
    {"image_id": i, "caption": text} for i, text in enumerate(["a red star", "a cat", "b", "pink star", "<i>"])
]


@pytest.fixture
def files(tmp_path):
    """`--predictions` and `--references` of a benchmark of five images in two domains."""
    (tmp_path / "predictions.json").write_text(json.dumps(PREDICTIONS))
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))
    return ["--predictions", f"{tmp_path}/predictions.json", "--references", f"{tmp_path}/references.json"]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A folder with a tiny captioner."""
    folder = tmp_path_factory.mktemp("captioner")
    tiny.captioner().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set of eleven pictures with two captions each, in a split "dev"."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(11):
        tiny.picture(seed=i).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "split": "dev", "caption": [tiny.CAPTIONS[i % 3], f"a star {i}"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def command(captioner, pictures, output_dir, *more: str) -> list[str]:
    words = ["--model", captioner, "--dataset_name", str(pictures), "--batch_size", "2", "--max_new_tokens", "5"]
    return [*words, "--num_beams", "2", "--allow_empty", "--use_cpu", "--output_dir", str(output_dir), *more]


def scores(folder) -> dict:
    return json.loads((folder / "scores.json").read_text())["scores"]


# --- Scoring files ----------------------------------------------------------------------------------------------------


def test_the_file_of_scores_says_how_they_came_about(files, tmp_path, capsys):
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/scores.json", "--per_image"])
    content = json.loads((tmp_path / "scores.json").read_text())
    assert set(content["scores"]) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    assert (content["images"], content["references"], content["df"]) == (5, 10, "corpus")
    assert len(content["references_sha256"]) == len(content["predictions_sha256"]) == 64
    assert {"tokenizer", "scale", "version"} < set(content)
    assert content["per_image"]["0"]["rouge_l"] == 1.0
    assert f"{100 * content['scores']['cider']:.2f}" in capsys.readouterr().out


def test_every_domain_is_scored_on_its_own_images(files, tmp_path):
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/scores.json"])
    parts = json.loads((tmp_path / "scores.json").read_text())["parts"]
    assert {name: part["images"] for name, part in parts.items()} == {"entire": 5, "in-domain": 3, "near-domain": 2}
    inside = {key: [row for row in REFERENCES[key] if row.get("image_id", row.get("id")) < 3] for key in REFERENCES}
    (tmp_path / "predictions.json").write_text(json.dumps(PREDICTIONS[:3]))
    (tmp_path / "references.json").write_text(json.dumps(inside))
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/scores.json"])
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == parts["in-domain"]["scores"]


def test_the_report_holds_everything_and_escapes_it(files, tmp_path):
    for i in range(4):  # the fifth is missing, which is no reason to go without a report
        tiny.picture(i).save(tmp_path / f"{i}.png")
    eval_captions.evaluate([*files, "--report", f"{tmp_path}/report.html", "--image_folder", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "&lt;i&gt;" in page and "<i>" not in page
    assert "a &lt;b&gt;&amp; star" in page
    assert page.count("data:image/jpeg;base64") == 2 * 4  # among the best, and among the worst
    assert page.count("data:image/png;base64") == 1  # the histogram
    assert "http" not in page  # fetches nothing


def test_saved_document_frequencies_give_the_same_scores(files, tmp_path):
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/a.json", "--save_df", f"{tmp_path}/df.json.gz"])
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/b.json", "--df", f"{tmp_path}/df.json.gz"])
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["scores"] == pytest.approx(b["scores"])
    assert "sha256" in b["df"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Say what to score"),
        (["--predictions", "a.json"], "Say what to score"),
        (["--predictions", "a.json", "--references", "b.json"], "There is no file 'b.json'"),
        (["--prediction", "a.json"], "Unknown option '--prediction'. Did you mean '--predictions'"),
        (["--model", "m"], "Say what to caption"),
        (["--model", "m", "--dtype", "half"], "--dtype is auto, float32, bfloat16 or float16, not 'half'"),
        (
            ["--model", "m", "--output", "/no/such/folder/scores.json"],
            "There is no folder for '/no/such/folder/scores.json'",
        ),
        (["--model", "m", "--report", "."], "'.' is a folder: name a file in it"),
        (["--model", "m", "--max_samples", "-2"], "--max_samples is at least 1, not -2"),
        (["--model", "m", "--num_beams", "0"], "--num_beams is at least 1, not 0"),
        (["--model", "m", "--max_new_tokens", "0"], "--max_new_tokens is at least 1, not 0"),
        (["--model", "m", "--num_workers", "-1"], "--num_workers is at least 0, not -1"),
        (
            ["--model", "m", "--extra_metrics", "meteor", "b"],
            "--extra_metrics takes meteor, spice and clip_score, not b",
        ),
        (
            ["--predictions", "a.json", "--references", "b.json", "--extra_metrics", "clip_score"],
            "say with --image_folder where they are",
        ),
        (
            ["--predictions", "a.json", "--references", "b.json", "--num_beams", "3", "--prompt", "a"],
            "--predictions are captions already: leave out --prompt, --num_beams",
        ),
        (
            ["--model", "m", "--benchmark", "coco_karpathy_test", "--split", "dev", "--id_column", "id"],
            "--benchmark knows its own split and columns: leave out --split, --id_column",
        ),
        (["--model", "m", "--benchmark", "coco"], "There is no benchmark 'coco'; there are coco_karpathy_test, "),
    ],
)
def test_bad_command_lines_end_in_one_sentence(words, message):
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        eval_captions.evaluate(words)


def test_java_is_missed_before_anything_is_captioned(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="meteor need Java"):
        eval_captions.evaluate(["--model", "/nope", "--dataset_name", "/no/data", "--extra_metrics", "meteor"])


def test_an_error_is_a_line_and_no_traceback(files, tmp_path):
    (tmp_path / "predictions.json").write_text(json.dumps(PREDICTIONS[:3]))
    script = [sys.executable, str(ROOT / "eval_captions.py"), *files]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no prediction for image 3 (2 of 5 images")
    assert done.stderr.count("\n") == 1


# --- Captioning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(captioner, pictures, tmp_path_factory):
    """The folder of an unbroken run in one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    eval_captions.evaluate(command(captioner, pictures, folder))
    return folder


def test_a_run_leaves_captions_references_scores_and_report(one_process):
    captions = json.loads((one_process / "captions.json").read_text())
    assert [row["image_id"] for row in captions] == list(range(11))
    content = json.loads((one_process / "scores.json").read_text())
    assert content["generation"] == {"num_beams": 2, "max_new_tokens": 5}
    assert (content["images"], content["references"]) == (11, 22)
    assert {name: content[name] for name in ("split", "dtype", "batch_size", "max_samples", "revision")} == {
        "split": "dev",
        "dtype": "auto",
        "batch_size": 2,
        "max_samples": None,
        "revision": None,
    }
    assert "model.safetensors" in str(content["weights"])
    assert "note" not in content
    assert (one_process / "report.html").stat().st_size > 0


def test_scores_of_some_images_only_say_so(captioner, pictures, tmp_path, capsys):
    eval_captions.evaluate(command(captioner, pictures, tmp_path / "run", "--max_samples", "3"))
    note = f"Of 3 of 11 images only: no score of {pictures}."
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (content["images"], content["max_samples"], content["note"]) == (3, 3, note)
    assert note in (tmp_path / "run" / "report.html").read_text()
    assert f"{note}\n{'':<12}  images" in capsys.readouterr().out


def test_captions_longer_than_the_language_model_can_write_are_an_error_of_one_line(
    captioner, pictures, tmp_path, monkeypatch
):
    words = command(captioner, pictures, tmp_path / "run", "--max_new_tokens", "99999")
    monkeypatch.setattr(sys, "argv", ["eval_captions.py", *words])
    with pytest.raises(SystemExit, match="^error: [^\n]*99999"):
        eval_captions.main()


def test_its_files_score_the_same_by_themselves(one_process, tmp_path):
    files = ["--predictions", f"{one_process}/captions.json", "--references", f"{one_process}/references.json"]
    eval_captions.evaluate([*files, "--allow_empty", "--output", f"{tmp_path}/scores.json"])
    assert scores(tmp_path) == scores(one_process)


def test_two_processes_killed_and_gone_on_give_the_same(one_process, captioner, pictures, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run += [str(ROOT / "eval_captions.py"), *command(captioner, pictures, tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL)
    give_up = time.time() + 100
    while not any("[" in path.read_text() for path in (tmp_path / "two").glob("progress-*.jsonl")):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.time() < give_up, "the run captions nothing"
        time.sleep(0.01)
    kill(process)
    assert not (tmp_path / "two" / "captions.json").exists()
    subprocess.run(run, env=environment, check=True, capture_output=True, timeout=100)
    assert len(list((tmp_path / "two").glob("progress-*.jsonl"))) == 2
    assert (tmp_path / "two" / "captions.json").read_text() == (one_process / "captions.json").read_text()
    assert scores(tmp_path / "two") == scores(one_process)


def test_a_process_that_starts_late_takes_its_share_all_the_same(captioner, pictures, tmp_path):
    """What the early one has captioned by then must not change how the batches are shared."""
    program = (
        "import sys, time\n"
        "from accelerate import PartialState\n"
        "from qformer_captioner import eval_captions\n"
        "from qformer_captioner.evaluation import inference\n"
        "caption_images = inference.caption_images\n"
        "def late(*args, **kwargs):\n"
        "    time.sleep(4 * PartialState().process_index)\n"
        "    return caption_images(*args, **kwargs)\n"
        "inference.caption_images = late\n"
        "eval_captions.evaluate(sys.argv[1:])"
    )
    (tmp_path / "late.py").write_text(program)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run += [str(tmp_path / "late.py"), *command(captioner, pictures, tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads((tmp_path / "run" / "captions.json").read_text())) == 11


def test_what_is_captioned_already_is_not_captioned_again(one_process, captioner, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(one_process / "run.json", tmp_path / "run")
    lines = (one_process / "progress-0.jsonl").read_text().split("\n")
    lines[1] = lines[1][:-3]  # cut off by a kill
    lines[-2] = json.dumps([*json.loads(lines[-2])[:2], "from before"])
    (tmp_path / "run" / "progress-0.jsonl").write_text("\n".join(lines))
    eval_captions.evaluate(command(captioner, pictures, tmp_path / "run"))
    captions = [row["caption"] for row in json.loads((tmp_path / "run" / "captions.json").read_text())]
    assert captions[-1] == "from before"


@pytest.mark.parametrize("changed", ["captioner", "adapter", "captioner below an adapter", "backbone referred to"])
def test_captions_of_weights_that_have_changed_are_not_gone_on_with(changed, captioner, pictures, tmp_path):
    if changed == "backbone referred to":
        model, weights = tmp_path / "captioner", tmp_path / "vision"
        vision, language = tiny.save_vision(weights), tiny.save_language(tmp_path / "language")
        QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER).save_pretrained(model)
    else:
        model = weights = tmp_path / "captioner"
        shutil.copytree(captioner, model)
    if "adapter" in changed:
        model = tmp_path / "adapter"
        adapter_of(QFormerCaptioner.from_pretrained(weights)).save_pretrained(model)
        weights = model if changed == "adapter" else weights
    words = command(str(model), pictures, tmp_path / "run")
    eval_captions.evaluate(words)
    (file,) = weights.glob("*.safetensors")
    file.write_bytes(file.read_bytes())  # saved anew
    with pytest.raises(InputError, match="holds another run: it differs in weights"):
        eval_captions.evaluate(words)


def test_an_image_that_has_changed_is_captioned_anew_and_no_other(captioner, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    words = command(captioner, folder, tmp_path / "run")
    eval_captions.evaluate(words)
    progress = tmp_path / "run" / "progress-0.jsonl"
    rows = [json.loads(line) for line in progress.read_text().split("\n") if line]
    progress.write_text("".join(json.dumps([*row[:2], "from before"]) + "\n" for row in rows))
    tiny.picture(seed=99).save(folder / "10.png")
    eval_captions.evaluate(words)
    captions = [row["caption"] for row in json.loads((tmp_path / "run" / "captions.json").read_text())]
    assert captions[:-1] == ["from before"] * 10
    assert captions[-1] != "from before"


def test_a_captioner_that_is_not_there_is_named():
    with pytest.raises(InputError, match="^The captioner '/nope' cannot be loaded"):
        eval_captions.evaluate(["--model", "/nope", "--dataset_name", "/no/data", "--use_cpu"])


def test_an_image_that_cannot_be_read_is_named_and_costs_the_others_nothing(captioner, pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "4.png").write_bytes(b"no picture")
    words = command(captioner, folder, tmp_path / "run")
    with pytest.raises(InputError, match=r"4\.png' cannot be read.*1 images cannot be read"):
        eval_captions.evaluate(words)
    (folder / "4.png").write_bytes((pictures / "4.png").read_bytes())
    eval_captions.evaluate(words)
    assert len(json.loads((tmp_path / "run" / "captions.json").read_text())) == 11


# --- Benchmarks, from a Hub of our own --------------------------------------------------------------------------------


def parquet(rows: list[dict], image_column: str = "image") -> bytes:
    file = io.BytesIO()
    datasets.Dataset.from_list(rows).cast_column(image_column, datasets.Image()).to_parquet(file)
    return file.getvalue()


def picture_bytes(seed: int) -> dict:
    file = io.BytesIO()
    tiny.picture(seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


def test_a_benchmark_comes_from_the_hub_and_nothing_but_its_split_is_fetched(captioner, tmp_path):
    """Three images in a row for each of their captions; the training split is not touched."""
    rows = [{"image": picture_bytes(i), "caption": text, "cocoid": 100 + i} for i in range(3) for text in ("a", "b c")]
    program = (
        "import dataclasses, sys\n"
        "from qformer_captioner import eval_captions\n"
        "from qformer_captioner.evaluation import benchmarks\n"
        "table = benchmarks.BENCHMARKS\n"
        "table['coco_karpathy_test'] = dataclasses.replace(table['coco_karpathy_test'], images=3, captions=6)\n"
        "eval_captions.evaluate(sys.argv[1:])"
    )
    words = [
        "--model",
        captioner,
        "--benchmark",
        "coco_karpathy_test",
        "--max_new_tokens",
        "4",
        "--min_new_tokens",
        "1",
    ]
    words += ["--allow_empty", "--use_cpu", "--output_dir", str(tmp_path / "run")]
    with Hub() as hub:
        files = {
            "data/test-00000-of-00001.parquet": parquet(rows),
            "data/train-00000-of-00001.parquet": parquet(rows[:2]),
        }
        hub.files["dataset", "jxie/coco_captions"] = files
        run = [sys.executable, "-c", program, *words]
        done = subprocess.run(
            run, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, cwd=ROOT.parent
        )
    assert done.returncode == 0, done.stderr
    assert not [asked for asked in hub.asked if asked.startswith("GET") and "train" in asked]
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (content["images"], content["references"]) == (3, 6)
    assert content["prompt"] == "a photo of"
    assert content["generation"] == {"num_beams": 5, "max_new_tokens": 4, "min_new_tokens": 1}
    captions = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert [row["image_id"] for row in captions] == [100, 101, 102]


@pytest.fixture
def nocaps(tmp_path, monkeypatch):
    """A copy of NoCaps with three images and the file of their domains; the table expects no more."""
    folder = tmp_path / "nocaps"
    folder.mkdir()
    rows = [
        {"image": picture_bytes(i), "annotations_captions": ["a", "b"], "image_id": i, "image_open_images_id": f"id{i}"}
        for i in range(3)
    ]
    (folder / "validation-00000.parquet").write_bytes(parquet(rows))
    (folder / "test-00000.parquet").write_bytes(parquet([row | {"annotations_captions": []} for row in rows]))
    domains = tmp_path / "domains.json"
    images = [
        {"open_images_id": f"id{i}", "domain": name} for i, name in enumerate(["in-domain", "out-domain", "in-domain"])
    ]
    domains.write_text(json.dumps({"images": images}))

    def change(name, **fields):
        from dataclasses import replace

        monkeypatch.setitem(benchmarks.BENCHMARKS, name, replace(benchmarks.BENCHMARKS[name], **fields))

    change("nocaps_validation", images=3, captions=6, domains=domains.as_uri())
    change("nocaps_test", images=3)
    return folder


def test_nocaps_takes_its_domains_from_the_official_file(nocaps):
    found = load_benchmark("nocaps_validation", str(nocaps))
    assert found.references.domains == {0: "in-domain", 1: "out-domain", 2: "in-domain"}
    assert str(found) == "3 images, 6 captions, 2 in-domain, 1 out-domain"


def test_the_images_of_a_copy_may_lie_elsewhere(nocaps, tmp_path):
    (tmp_path / "photos").mkdir()
    rows = []
    for i in range(3):
        tiny.picture(seed=i).save(tmp_path / "photos" / f"{i}.png")
        rows.append({"image": f"{i}.png", "annotations_captions": ["a", "b"], "image_id": i})
        rows[-1]["image_open_images_id"] = f"id{i}"
    datasets.Dataset.from_list(rows).to_parquet(nocaps / "validation-00000.parquet")
    found = load_benchmark("nocaps_validation", str(nocaps), tmp_path / "photos")
    assert found.open(2).size == tiny.picture(seed=2).size


def test_a_benchmark_of_another_size_is_refused(nocaps):
    rows = [{"image": picture_bytes(0), "annotations_captions": ["a"], "image_id": 0, "image_open_images_id": "id0"}]
    (nocaps / "validation-00000.parquet").write_bytes(parquet(rows))
    with pytest.raises(InputError, match="nocaps_validation has 3 images and 6 captions, but .* has 1 and 1"):
        load_benchmark("nocaps_validation", str(nocaps))


def test_where_the_server_has_the_references_the_captions_are_written_and_nothing_scored(nocaps, captioner, tmp_path):
    words = ["--model", captioner, "--benchmark", "nocaps_test", "--dataset_name", str(nocaps), "--max_new_tokens", "4"]
    words += ["--min_new_tokens", "1", "--use_cpu", "--output_dir", str(tmp_path / "run")]
    eval_captions.evaluate(words)
    assert len(json.loads((tmp_path / "run" / "captions.json").read_text())) == 3
    assert not (tmp_path / "run" / "scores.json").exists()


def test_the_table_of_benchmarks_is_the_papers():
    sizes = {name: (each.images, each.captions) for name, each in benchmarks.BENCHMARKS.items()}
    assert sizes == {
        "coco_karpathy_test": (5_000, 25_010),
        "coco_karpathy_validation": (5_000, 25_010),
        "nocaps_validation": (4_500, 45_000),
        "nocaps_test": (10_600, 0),
        "flickr30k_karpathy_test": (1_000, 5_000),
    }


# --- Publishing the metrics -------------------------------------------------------------------------------------------


def test_a_published_metric_is_found_by_its_name_on_the_hub(tmp_path):
    program = (
        "import sys; sys.argv[1:] = ['org', '--metrics', 'cider']\n"
        "from qformer_captioner.metrics.publish import main\n"
        "main()\n"
        "import evaluate\n"
        "print(evaluate.load('org/cider').compute(predictions=['a dog', 'b'], references=[['a dog'], ['c']]))"
    )
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT.parent
        )
    assert done.stdout.splitlines()[-1:] == ["{'cider': 2.5}"], done.stderr
    assert set(hub.files["space", "org/cider"]) == {"README.md", "app.py", "requirements.txt", "cider.py"}
