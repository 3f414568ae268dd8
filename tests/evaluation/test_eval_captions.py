"""`eval_captions.py` as a user runs it: it scores files, captions benchmarks and continues killed runs."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import datasets
import pytest
import torch

from qformer_captioner import QFormerCaptioner, QFormerForPretraining, eval_captions, precompute_features
from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation import benchmarks
from qformer_captioner.evaluation.benchmarks import load_benchmark
from qformer_captioner.evaluation.caption_files import read_predictions

from ..conftest import ROOT
from ..fixtures import feature_stores, tiny
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
    """Options `--predictions` and `--references` for five images in two domains."""
    (tmp_path / "predictions.json").write_text(json.dumps(PREDICTIONS))
    (tmp_path / "references.json").write_text(json.dumps(REFERENCES))
    return ["--predictions", f"{tmp_path}/predictions.json", "--references", f"{tmp_path}/references.json"]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """Folder of a tiny captioner."""
    folder = tmp_path_factory.mktemp("captioner")
    tiny.captioner().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of eleven images with two captions each, in a split "dev"."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(11):
        tiny.picture(seed=i).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "split": "dev", "caption": [tiny.CAPTIONS[i % 3], f"a star {i}"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def command(captioner, pictures, output_dir, *more: str) -> list[str]:
    """Return the options of a run that captions the images."""
    options = ["--model", captioner, "--dataset_name", str(pictures), "--batch_size", "2", "--max_new_tokens", "5"]
    return [*options, "--num_beams", "2", "--allow_empty", "--use_cpu", "--output_dir", str(output_dir), *more]


def scores(folder) -> dict:
    return json.loads((folder / "scores.json").read_text())["scores"]


# --- Scoring files ----------------------------------------------------------------------------------------------------


def test_the_file_of_scores_holds_what_makes_them_reproducible(files, tmp_path, capsys):
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/scores.json", "--per_image"])
    content = json.loads((tmp_path / "scores.json").read_text())
    assert set(content["scores"]) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    assert (content["images"], content["references"], content["df"]) == (5, 10, "corpus")
    assert len(content["references_sha256"]) == len(content["predictions_sha256"]) == 64
    assert {"tokenizer", "scale", "version"} < set(content)
    assert content["per_image"]["0"]["rouge_l"] == 1.0
    assert f"{100 * content['scores']['cider']:.2f}" in capsys.readouterr().out


def test_every_domain_is_scored_by_itself(files, tmp_path):
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/scores.json"])
    parts = json.loads((tmp_path / "scores.json").read_text())["parts"]
    assert {name: part["images"] for name, part in parts.items()} == {"entire": 5, "in-domain": 3, "near-domain": 2}
    in_domain = {key: [row for row in REFERENCES[key] if row.get("image_id", row.get("id")) < 3] for key in REFERENCES}
    (tmp_path / "predictions.json").write_text(json.dumps(PREDICTIONS[:3]))
    (tmp_path / "references.json").write_text(json.dumps(in_domain))
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/scores.json"])
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == parts["in-domain"]["scores"]


def test_the_report_holds_and_escapes_captions_and_images(files, tmp_path):
    for i in range(4):  # the fifth image is missing, and the report does without it
        tiny.picture(i).save(tmp_path / f"{i}.png")
    eval_captions.evaluate([*files, "--report", f"{tmp_path}/report.html", "--image_folder", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "&lt;i&gt;" in page and "<i>" not in page
    assert "a &lt;b&gt;&amp; star" in page
    assert page.count("data:image/jpeg;base64") == 2 * 4  # among the best and among the worst
    assert page.count("data:image/png;base64") == 1  # the histogram
    assert "http" not in page  # the page fetches nothing


def test_saved_document_frequencies_give_the_same_scores(files, tmp_path):
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/a.json", "--save_df", f"{tmp_path}/df.json.gz"])
    eval_captions.evaluate([*files, "--output", f"{tmp_path}/b.json", "--df", f"{tmp_path}/df.json.gz"])
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["scores"] == pytest.approx(b["scores"])
    assert "sha256" in b["df"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Say what to score"),
        (["--predictions", "a.json"], "Say what to score"),
        (["--predictions", "a.json", "--references", "b.json"], "There is no file 'b.json'"),
        (["--prediction", "a.json"], "Unknown option '--prediction'. Did you mean '--predictions'"),
        (["--model", "m"], "Say which images to read"),
        (["--model", "m", "--dtype", "half"], "--dtype must be auto, float32, bfloat16 or float16, not 'half'"),
        (
            ["--model", "m", "--output", "/no/such/folder/scores.json"],
            "There is no folder for '/no/such/folder/scores.json'",
        ),
        (["--model", "m", "--report", "."], "'.' is a folder: name a file in it"),
        (["--model", "m", "--max_samples", "-2"], "--max_samples must be at least 1, not -2"),
        (["--model", "m", "--num_beams", "0"], "--num_beams must be at least 1, not 0"),
        (["--model", "m", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, not 0"),
        (["--model", "m", "--num_workers", "-1"], "--num_workers must be at least 0, not -1"),
        (
            ["--model", "m", "--extra_metrics", "meteor", "b"],
            "--extra_metrics must be meteor, spice or clip_score, not 'b'",
        ),
        (
            ["--predictions", "a.json", "--references", "b.json", "--extra_metrics", "clip_score"],
            "clip_score needs the images: give their folder with --image_folder",
        ),
        (
            ["--predictions", "a.json", "--references", "b.json", "--num_beams", "3", "--prompt", "a"],
            "--predictions holds finished captions: leave out --prompt, --num_beams",
        ),
        (
            ["--model", "m", "--benchmark", "coco_karpathy_test", "--split", "dev", "--image_id_column", "id"],
            "--benchmark defines its split and columns: leave out --split, --image_id_column",
        ),
        (["--model", "m", "--benchmark", "coco"], "Unknown benchmark 'coco': choose from coco_karpathy_test, "),
    ],
)
def test_a_bad_command_line_raises_an_error_of_one_line(options, message):
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        eval_captions.evaluate(options)


def test_missing_java_is_found_before_captioning_starts(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="meteor need Java"):
        eval_captions.evaluate(["--model", "/nope", "--dataset_name", "/no/data", "--extra_metrics", "meteor"])


@pytest.mark.slow
def test_the_script_ends_an_error_in_one_line_without_a_traceback(commands, files, tmp_path):
    (tmp_path / "predictions.json").write_text(json.dumps(PREDICTIONS[:3]))
    script = ["python", str(ROOT / "eval_captions.py"), *files]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=commands.environment())
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no prediction for image 3 (2 of 5 images")
    assert done.stderr.count("\n") == 1


# --- Captioning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(captioner, pictures, tmp_path_factory):
    """Output folder of a run in one process that was not killed."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    eval_captions.evaluate(command(captioner, pictures, folder))
    return folder


def test_a_run_writes_captions_references_scores_and_report(one_process):
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


def test_scores_of_some_of_the_images_have_a_note(captioner, pictures, tmp_path, capsys):
    eval_captions.evaluate(command(captioner, pictures, tmp_path / "run", "--max_samples", "3"))
    note = f"Only 3 of 11 images were scored, so this is not a score of {pictures}."
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (content["images"], content["max_samples"], content["note"]) == (3, 3, note)
    assert note in (tmp_path / "run" / "report.html").read_text()
    assert f"{note}\n{'':<12}  images" in capsys.readouterr().out


def test_captions_longer_than_the_context_raise_an_error_of_one_line(captioner, pictures, tmp_path, monkeypatch):
    options = command(captioner, pictures, tmp_path / "run", "--max_new_tokens", "99999")
    monkeypatch.setattr(sys, "argv", ["eval_captions.py", *options])
    with pytest.raises(SystemExit, match="^error: [^\n]*99999"):
        eval_captions.main()


def test_the_files_of_a_run_have_the_scores_of_the_run(one_process, tmp_path):
    files = ["--predictions", f"{one_process}/captions.json", "--references", f"{one_process}/references.json"]
    eval_captions.evaluate([*files, "--allow_empty", "--output", f"{tmp_path}/scores.json"])
    assert scores(tmp_path) == scores(one_process)


@pytest.mark.slow
def test_two_processes_that_were_killed_and_continued_give_the_captions_of_one(
    commands, one_process, captioner, pictures, tmp_path
):
    run = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    run += [str(ROOT / "eval_captions.py"), *command(captioner, pictures, tmp_path / "two")]
    environment = commands.environment()
    process = subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not any("[" in path.read_text() for path in (tmp_path / "two").glob("progress-*.jsonl")):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.time() < deadline, "the run writes no captions"
        time.sleep(0.01)
    commands.kill()
    process.wait()
    assert not (tmp_path / "two" / "captions.json").exists()
    subprocess.run(run, env=environment, check=True, capture_output=True, timeout=300)
    assert len(list((tmp_path / "two").glob("progress-*.jsonl"))) == 2
    assert (tmp_path / "two" / "captions.json").read_text() == (one_process / "captions.json").read_text()
    assert scores(tmp_path / "two") == scores(one_process)


@pytest.mark.slow
def test_a_process_that_starts_late_captions_its_share(commands, captioner, pictures, tmp_path):
    """The captions that an early process has finished by then must not change how the batches are shared."""
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
    run = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    run += [str(tmp_path / "late.py"), *command(captioner, pictures, tmp_path / "run")]
    environment = commands.environment()
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads((tmp_path / "run" / "captions.json").read_text())) == 11


def test_finished_captions_are_kept(one_process, captioner, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(one_process / "run.json", tmp_path / "run")
    lines = (one_process / "progress-0.jsonl").read_text().split("\n")
    lines[1] = lines[1][:-3]  # as if a kill had cut it off
    lines[-2] = json.dumps([*json.loads(lines[-2])[:2], "from before"])
    (tmp_path / "run" / "progress-0.jsonl").write_text("\n".join(lines))
    eval_captions.evaluate(command(captioner, pictures, tmp_path / "run"))
    captions = [row["caption"] for row in json.loads((tmp_path / "run" / "captions.json").read_text())]
    assert captions[-1] == "from before"


@pytest.mark.parametrize(
    "changed", ["captioner", "adapter", "captioner below an adapter", "backbone kept by reference"]
)
def test_a_run_does_not_continue_with_other_weights(changed, captioner, pictures, tmp_path):
    if changed == "backbone kept by reference":
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
    options = command(str(model), pictures, tmp_path / "run")
    eval_captions.evaluate(options)
    (file,) = weights.glob("*.safetensors")
    file.write_bytes(file.read_bytes())  # a new time of change
    with pytest.raises(InputError, match="holds another run: it differs in weights"):
        eval_captions.evaluate(options)


def test_only_images_that_have_changed_get_a_new_caption(captioner, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    options = command(captioner, folder, tmp_path / "run")
    eval_captions.evaluate(options)
    progress = tmp_path / "run" / "progress-0.jsonl"
    rows = [json.loads(line) for line in progress.read_text().split("\n") if line]
    progress.write_text("".join(json.dumps([*row[:2], "from before"]) + "\n" for row in rows))
    tiny.picture(seed=99).save(folder / "10.png")
    eval_captions.evaluate(options)
    captions = [row["caption"] for row in json.loads((tmp_path / "run" / "captions.json").read_text())]
    assert captions[:-1] == ["from before"] * 10
    assert captions[-1] != "from before"


def test_the_error_names_a_captioner_that_does_not_exist():
    with pytest.raises(InputError, match="^The captioner '/nope' cannot be loaded"):
        eval_captions.evaluate(["--model", "/nope", "--dataset_name", "/no/data", "--use_cpu"])


def test_an_image_that_could_not_be_read_gets_its_caption_when_it_is_replaced(captioner, pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "4.png").write_bytes(b"not an image")
    options = command(captioner, folder, tmp_path / "run")
    with pytest.raises(InputError, match="The results are written, but 1 images are not scored"):
        eval_captions.evaluate(options)
    assert len(json.loads((tmp_path / "run" / "captions.json").read_text())) == 10
    (folder / "4.png").write_bytes((pictures / "4.png").read_bytes())
    eval_captions.evaluate(options)
    assert len(json.loads((tmp_path / "run" / "captions.json").read_text())) == 11


def test_a_model_of_stage_1_is_scored_on_images_and_on_their_features(pictures, tmp_path):
    vision = tiny.save_vision(tmp_path / "vision", "vit")
    torch.manual_seed(0)
    model = QFormerForPretraining.from_backbones(vision, tiny.text_tokenizer(), **tiny.QFORMER)
    model.save_pretrained(tmp_path / "stage1")
    precompute_features.precompute(
        feature_stores.command(vision, pictures, tmp_path / "features", "--dtype", "float32")
    )
    options = [
        "--num_beams",
        "2",
        "--max_new_tokens",
        "8",
        "--allow_empty",
        "--use_cpu",
        "--model",
        f"{tmp_path}/stage1",
    ]
    eval_captions.evaluate([*options, "--dataset_name", str(pictures), "--output_dir", f"{tmp_path}/images"])
    eval_captions.evaluate([*options, "--features", f"{tmp_path}/features", "--output_dir", f"{tmp_path}/run"])
    captions = read_predictions(tmp_path / "run" / "captions.json")
    assert captions == read_predictions(tmp_path / "images" / "captions.json")
    assert list(captions.values())[:2] == model.caption(
        [pictures / f"{i}.png" for i in (0, 1)], num_beams=2, max_new_tokens=8
    )
    assert len(set(captions.values())) > 1 and scores(tmp_path / "run") == scores(tmp_path / "images")


# --- Benchmarks, from a local Hub -------------------------------------------------------------------------------------


def parquet(rows: list[dict], image_column: str = "image") -> bytes:
    file = io.BytesIO()
    datasets.Dataset.from_list(rows).cast_column(image_column, datasets.Image()).to_parquet(file)
    return file.getvalue()


def picture_bytes(seed: int) -> dict:
    file = io.BytesIO()
    tiny.picture(seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


@pytest.mark.slow
def test_only_the_split_of_a_benchmark_is_fetched_from_the_hub(hub, commands, captioner, tmp_path):
    """Three images with one row for each caption. The training split is not fetched."""
    rows = [{"image": picture_bytes(i), "caption": text, "cocoid": 100 + i} for i in range(3) for text in ("a", "b c")]
    program = (
        "import dataclasses, sys\n"
        "from qformer_captioner import eval_captions\n"
        "from qformer_captioner.evaluation import benchmarks\n"
        "table = benchmarks.BENCHMARKS\n"
        "table['coco_karpathy_test'] = dataclasses.replace(table['coco_karpathy_test'], images=3, captions=6)\n"
        "eval_captions.evaluate(sys.argv[1:])"
    )
    options = ["--model", captioner, "--benchmark", "coco_karpathy_test"]
    options += ["--max_new_tokens", "4", "--min_new_tokens", "1"]
    options += ["--allow_empty", "--use_cpu", "--output_dir", str(tmp_path / "run")]
    hub.files["dataset", "jxie/coco_captions"] = {
        "data/test-00000-of-00001.parquet": parquet(rows),
        "data/train-00000-of-00001.parquet": parquet(rows[:2]),
    }
    run = ["python", "-c", program, *options]
    done = subprocess.run(run, env=commands.environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = [request for request in hub.requests if re.match("GET .*/jxie/coco_captions/.*parquet", request)]
    assert fetched and not any("train" in request for request in fetched)
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (content["images"], content["references"]) == (3, 6)
    assert content["prompt"] == "a photo of"
    assert content["generation"] == {"num_beams": 5, "max_new_tokens": 4, "min_new_tokens": 1}
    captions = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert [row["image_id"] for row in captions] == [100, 101, 102]


@pytest.fixture
def nocaps(tmp_path, monkeypatch):
    """Folder of a copy of NoCaps with three images. The table of benchmarks is changed to expect three."""
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
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, replace(benchmarks.BENCHMARKS[name], **fields))

    change("nocaps_validation", images=3, captions=6, domains=domains.as_uri())
    change("nocaps_test", images=3)
    return folder


def test_the_domains_of_nocaps_come_from_the_official_file(nocaps):
    evaluation_set = load_benchmark("nocaps_validation", str(nocaps))
    assert evaluation_set.references.domains == {0: "in-domain", 1: "out-domain", 2: "in-domain"}
    assert str(evaluation_set) == "3 images, 6 captions, 2 in-domain, 1 out-domain"


def test_the_images_of_a_copy_may_be_in_another_folder(nocaps, tmp_path):
    (tmp_path / "photos").mkdir()
    rows = []
    for i in range(3):
        tiny.picture(seed=i).save(tmp_path / "photos" / f"{i}.png")
        rows.append({"image": f"{i}.png", "annotations_captions": ["a", "b"], "image_id": i})
        rows[-1]["image_open_images_id"] = f"id{i}"
    datasets.Dataset.from_list(rows).to_parquet(nocaps / "validation-00000.parquet")
    evaluation_set = load_benchmark("nocaps_validation", str(nocaps), tmp_path / "photos")
    assert evaluation_set.open(2).size == tiny.picture(seed=2).size


def test_an_incomplete_copy_of_a_benchmark_is_refused(nocaps):
    rows = [{"image": picture_bytes(0), "annotations_captions": ["a"], "image_id": 0, "image_open_images_id": "id0"}]
    (nocaps / "validation-00000.parquet").write_bytes(parquet(rows))
    with pytest.raises(InputError, match="nocaps_validation has 3 images and 6 captions, but .* has 1 and 1"):
        load_benchmark("nocaps_validation", str(nocaps))


def test_captions_without_references_are_written_and_not_scored(nocaps, captioner, tmp_path):
    options = [
        "--model",
        captioner,
        "--benchmark",
        "nocaps_test",
        "--dataset_name",
        str(nocaps),
        "--max_new_tokens",
        "4",
    ]
    options += ["--min_new_tokens", "1", "--use_cpu", "--output_dir", str(tmp_path / "run")]
    eval_captions.evaluate(options)
    assert len(json.loads((tmp_path / "run" / "captions.json").read_text())) == 3
    assert not (tmp_path / "run" / "scores.json").exists()


def test_the_benchmarks_have_the_sizes_that_papers_report():
    sizes = {name: (benchmark.images, benchmark.captions) for name, benchmark in benchmarks.BENCHMARKS.items()}
    assert sizes == {
        "coco_karpathy_test": (5_000, 25_010),
        "coco_karpathy_validation": (5_000, 25_010),
        "nocaps_validation": (4_500, 45_000),
        "nocaps_test": (10_600, 0),
        "flickr30k_karpathy_test": (1_000, 5_000),
        "flickr8k_test": (1_000, 5_000),
    }
