"""Broken images and blank captions are counted and listed, and all other captions are scored."""

import errno
import json

import pytest
from PIL import Image

from qformer_captioner import eval_captions
from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation.caption_files import ReferenceSet
from qformer_captioner.evaluation.scoring import score_captions
from qformer_captioner.metrics import clip
from qformer_captioner.modeling_qformer import QFormerCaptioner

from ..fixtures import tiny

REFERENCES = {1: ["a dog runs", "a brown dog"], 2: ["a cat sleeps"], 3: ["two red stars"]}
PREDICTIONS = {1: "a dog runs", 2: "a cat", 3: "red stars"}


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """Folder of a tiny captioner."""
    folder = tmp_path_factory.mktemp("captioner")
    tiny.captioner().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def captions_of_images(monkeypatch):
    """A captioner that captions every image with its width, and an image of width 9 with an empty text."""

    def caption(self, images, prompt=None, **generation):
        return ["" if image.width == 9 else f"a star {image.width}" for image in images]

    monkeypatch.setattr(QFormerCaptioner, "caption", caption)


def write_rows(folder, rows: dict[str, str], widths: dict[str, int]):
    """Write a table of images and captions; images without a width are text files."""
    for name in rows:
        if name in widths:
            Image.new("RGB", (widths[name], 8), "red").save(folder / name)
        else:
            (folder / name).write_text("not an image")
    (folder / "rows.csv").write_text("image,caption\n" + "".join(f'{name},"{text}"\n' for name, text in rows.items()))
    return folder / "rows.csv"


def run(captioner, table, output_dir, *more):
    words = ["--model", captioner, "--dataset_name", str(table), "--output_dir", str(output_dir), "--use_cpu", *more]
    eval_captions.evaluate(words)


def scores_of(folder) -> dict:
    return json.loads((folder / "scores.json").read_text())


def write_files(folder, predictions, references) -> list[str]:
    """Write files of predictions and references, and return the options that name them and the file of scores."""
    (folder / "predictions.json").write_text(
        json.dumps([{"image_id": image, "caption": text} for image, text in predictions.items()])
    )
    ReferenceSet(references).write(folder / "references.json")
    files = ["--predictions", f"{folder}/predictions.json", "--references", f"{folder}/references.json"]
    return [*files, "--output", f"{folder}/scores.json"]


# --- Captioning -------------------------------------------------------------------------------------------------------


def test_a_broken_image_is_listed_and_the_other_images_are_scored(captioner, captions_of_images, tmp_path, capfd):
    rows = {"1.png": "a star 7", "broken.png": "a cat", "2.png": "a star 8"}
    table = write_rows(tmp_path, rows, {"1.png": 7, "2.png": 8})
    with pytest.raises(InputError, match="The results are written, but 1 images are not scored"):
        run(captioner, table, tmp_path / "run")
    content = scores_of(tmp_path / "run")
    assert [(row["image_id"], row["file_name"]) for row in content["skipped"]] == [(1, "broken.png")]
    assert "broken.png' cannot be read" in content["skipped"][0]["reason"]
    assert (content["images"], content["references"], content["scores"]["bleu_1"]) == (2, 2, pytest.approx(1))
    assert content["note"] == f"Only 2 of 3 images were scored, so this is not a score of {table}."
    captions = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert captions == [{"image_id": 0, "caption": "a star 7"}, {"image_id": 2, "caption": "a star 8"}]
    assert "broken.png" in (tmp_path / "run" / "report.html").read_text()


def test_the_faults_of_a_run_are_shown_on_the_terminal_and_in_the_exit_status(
    captioner, captions_of_images, tmp_path, log, monkeypatch
):
    table = write_rows(
        tmp_path, {"1.png": "a star 7", "broken.png": "a cat", "9.png": "a dog"}, {"1.png": 7, "9.png": 9}
    )
    words = ["--model", captioner, "--dataset_name", str(table), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    monkeypatch.setattr("sys.argv", ["eval", *words])
    with pytest.raises(
        SystemExit, match="^error: The results are written, but 1 images are not scored .*1 images have"
    ):
        eval_captions.main()
    assert "Not scored: 'broken.png'" in log.text
    assert "Blank caption: '9.png': the prediction is empty and scores 0" in log.text
    monkeypatch.setattr("sys.argv", ["eval", *words, "--allow_missing", "--allow_empty"])
    eval_captions.main()  # no exit status other than 0


@pytest.mark.parametrize("has_file", [True, False])
def test_every_blank_caption_is_listed_in_a_file_or_on_the_terminal(has_file, tmp_path, log):
    rows = [{"image_id": image, "caption": "" if image < 7 else "a dog"} for image in range(9)]
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    (tmp_path / "references.json").write_text(json.dumps([{**row, "caption": "a dog"} for row in rows]))
    words = ["--predictions", str(tmp_path / "predictions.json"), "--references", str(tmp_path / "references.json")]
    output = tmp_path / "scores.json"
    eval_captions.evaluate([*words, "--allow_empty", *(["--output", str(output)] if has_file else [])])
    listed = log.text.count("the prediction is empty")
    if has_file:
        assert listed == 5 and f"2 more, which are listed in {output}" in log.text
        assert len(json.loads(output.read_text())["blank"]) == 7
    else:
        assert listed == 7


def test_an_empty_generated_caption_scores_0_and_is_listed(captioner, captions_of_images, tmp_path):
    table = write_rows(tmp_path, {"1.png": "a star 7", "9.png": "a dog"}, {"1.png": 7, "9.png": 9})
    with pytest.raises(InputError, match="1 images have a blank caption"):
        run(captioner, table, tmp_path / "run", "--per_image")
    content = scores_of(tmp_path / "run")
    assert [row["file_name"] for row in content["blank"]] == ["9.png"]
    assert [scores["rouge_l"] for scores in content["per_image"].values()] == [pytest.approx(1), 0]


def test_a_row_without_a_caption_is_listed_and_not_captioned(captioner, captions_of_images, tmp_path):
    table = write_rows(
        tmp_path, {"1.png": "a star 7", "8.png": " ", "2.png": "a cat"}, {"1.png": 7, "8.png": 8, "2.png": 2}
    )
    run(captioner, table, tmp_path / "run", "--allow_missing")
    content = scores_of(tmp_path / "run")
    assert [(row["file_name"], row["reason"]) for row in content["skipped"]] == [("8.png", "no caption")]
    assert content["images"] == 2


def test_captions_that_the_benchmark_rejects_are_counted_and_listed(captioner, captions_of_images, tmp_path, log):
    Image.new("RGB", (7, 8)).save(tmp_path / "1.png")
    annotations = [
        {"id": 1, "image_id": 1, "caption": "a star 7", "is_rejected": False},
        {"id": 2, "image_id": 1, "caption": "asdf", "is_rejected": True},
    ]
    content = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": annotations}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    run(captioner, tmp_path / "captions.json", tmp_path / "run")
    assert scores_of(tmp_path / "run")["references"] == 1
    assert "is_rejected" in (tmp_path / "run" / "skipped_rows.jsonl").read_text()
    assert f"1 rows could not be used; {tmp_path / 'run' / 'skipped_rows.jsonl'} lists them." in log.messages


def test_a_data_set_of_broken_images_is_an_error_that_names_the_first(captioner, captions_of_images, tmp_path):
    table = write_rows(tmp_path, {"a.png": "a star", "b.png": "a cat"}, {})
    with pytest.raises(InputError, match=r"No image can be read; the first of 2: .*a\.png"):
        run(captioner, table, tmp_path / "run")


def test_the_only_split_of_a_file_is_scored_whatever_its_name(captioner, captions_of_images, tmp_path):
    run(captioner, write_rows(tmp_path, {"1.png": "a star 7"}, {"1.png": 7}), tmp_path / "run")
    assert scores_of(tmp_path / "run")["split"] == "train"


def test_columns_have_the_options_of_training(captioner, captions_of_images, tmp_path):
    for name, width in {"a.png": 7, "b.png": 7, "c.png": 8}.items():
        Image.new("RGB", (width, 8)).save(tmp_path / name)
    rows = ["photo,text,photo_id,part", "a.png,a star 7,x,held", "b.png,a cat,x,held", "c.png,a dog,y,rest"]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    options = ["--image_column", "photo", "--caption_column", "text", "--image_id_column", "photo_id"]
    run(captioner, tmp_path / "rows.csv", tmp_path / "run", *options, "--split_column", "part", "--split", "held")
    content = scores_of(tmp_path / "run")
    assert (content["images"], content["references"], content["scores"]["rouge_l"]) == (1, 2, pytest.approx(1))


def test_the_former_name_of_the_id_column_is_named():
    with pytest.raises(InputError, match="it is now called --image_id_column"):
        eval_captions.evaluate(["--model", "m", "--dataset_name", "d", "--id_column", "id"])


# --- Files of captions ------------------------------------------------------------------------------------------------


def test_a_blank_prediction_in_a_file_scores_0_and_is_listed(tmp_path):
    files = write_files(tmp_path, {**PREDICTIONS, 2: " \n"}, REFERENCES)
    with pytest.raises(InputError, match="1 images have a blank caption"):
        eval_captions.evaluate(files)
    content = scores_of(tmp_path)
    assert content["blank"] == [{"image_id": 2, "file_name": "2", "reason": "the prediction is empty and scores 0"}]
    assert content["images"] == 3
    eval_captions.evaluate([*files, "--allow_empty"])
    assert scores_of(tmp_path)["scores"] == content["scores"]


def test_an_image_whose_references_are_blank_is_left_out(tmp_path):
    files = write_files(tmp_path, PREDICTIONS, {**REFERENCES, 2: ["", " "]})
    with pytest.raises(InputError, match="1 images are not scored"):
        eval_captions.evaluate(files)
    content = scores_of(tmp_path)
    assert content["skipped"] == [{"image_id": 2, "file_name": "2", "reason": "it has no reference"}]
    others = {image: PREDICTIONS[image] for image in (1, 3)}
    expected = score_captions(others, ReferenceSet({image: REFERENCES[image] for image in (1, 3)}))
    assert content["scores"] == expected.scores


def test_a_blank_reference_beside_others_is_left_out():
    blank = score_captions(PREDICTIONS, ReferenceSet({**REFERENCES, 1: ["a dog runs", " ", "a brown dog"]}))
    assert blank.scores == score_captions(PREDICTIONS, ReferenceSet(REFERENCES)).scores
    assert [(each.image_id, each.reason) for each in blank.blank] == [(1, "1 of 3 references are blank")]


def test_a_broken_image_is_left_out_of_the_scores_with_clip_score(tmp_path, monkeypatch):
    def clip_scores(images, predictions, *args, **kwargs):
        widths = [image.width for image in images]
        return {"clip_score": sum(widths) / len(widths), "per_image": {"clip_score": widths}}

    monkeypatch.setattr(clip, "clip_scores", clip_scores)
    for image in (1, 3):
        Image.new("RGB", (image, 8)).save(tmp_path / f"{image}.png")
    (tmp_path / "2.png").write_bytes(b"")
    references = ReferenceSet(REFERENCES, files={image: f"{image}.png" for image in REFERENCES})
    open_image = eval_captions.open_in_folder(references, tmp_path)
    scored = score_captions(PREDICTIONS, references, open_image, extra_metrics=["clip_score"])
    assert scored.images == [1, 3] and scored.scores["clip_score"] == 2
    assert [(each.image_id, each.file_name) for each in scored.skipped] == [(2, "2.png")]


# --- Faults of the machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["eval_captions.write_predictions", "eval_captions.write_atomically"])
def test_a_full_disk_is_named_and_no_caption_is_computed_again(
    written, captioner, captions_of_images, tmp_path, monkeypatch
):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    table = write_rows(tmp_path, {"1.png": "a star 7", "2.png": "a cat"}, {"1.png": 7, "2.png": 8})
    with monkeypatch.context() as patch:
        patch.setattr(f"qformer_captioner.{written}", no_space)
        message = f"the disk of '{tmp_path / 'run'}' .No space left on device.* the same command continues"
        with pytest.raises(InputError, match=message):
            run(captioner, table, tmp_path / "run")
    assert not (tmp_path / "run" / "scores.json").exists()
    monkeypatch.setattr(QFormerCaptioner, "caption", lambda *args, **kwargs: pytest.fail("captions an image again"))
    run(captioner, table, tmp_path / "run")
    assert scores_of(tmp_path / "run")["images"] == 2
