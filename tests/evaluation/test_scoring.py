"""Scores of captions from Python: extra metrics, names of scores, and the modules that scoring needs."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation.caption_files import ReferenceSet
from qformer_captioner.evaluation.scoring import SCORE_NAMES, score_captions
from qformer_captioner.metrics import DocumentFrequencies, clip

REFERENCES = ReferenceSet({7: ["a dog runs", "a dog"], 5: ["a cat sleeps"]})
CAPTIONS = {5: "a cat", 7: "a dog runs"}


def open_image(image: int) -> Image.Image:
    """Return an image whose width is its id."""
    return Image.new("RGB", (image, 1))


@pytest.fixture
def clip_score_of_width(monkeypatch):
    """CLIPScore replaced by the width of the image in units of 100 pixels."""

    def clip_scores(images, predictions, references, model_name_or_path, per_image, allow_empty):
        widths = [image.width / 100 for image in images]
        return {"clip_score": sum(widths) / len(widths), "per_image": {"clip_score": widths}}

    monkeypatch.setattr(clip, "clip_scores", clip_scores)


def test_scores_of_an_extra_metric_are_in_the_table_and_in_the_json_of_each_image(clip_score_of_width):
    scored = score_captions(CAPTIONS, REFERENCES, open_image, extra_metrics=["clip_score"])
    assert scored.scores["clip_score"] == pytest.approx(0.06)
    assert scored.table().splitlines()[0].endswith("CLIPScore")
    assert scored.table().splitlines()[1].endswith("6.00")
    per_image = scored.to_json({}, per_image=True)["per_image"]
    assert {image: scores["clip_score"] for image, scores in per_image.items()} == {"7": 0.07, "5": 0.05}


def test_every_score_has_a_name():
    scored = score_captions(CAPTIONS, REFERENCES)
    assert set(scored.scores) <= set(SCORE_NAMES)


def test_document_frequencies_are_saved_even_if_an_extra_metric_fails(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("CLIPScore stopped")

    monkeypatch.setattr(clip, "clip_scores", fail)
    path = str(tmp_path / "df.json.gz")
    with pytest.raises(OSError, match="CLIPScore stopped"):
        score_captions(CAPTIONS, REFERENCES, open_image, save_df=path, extra_metrics=["clip_score"])
    assert DocumentFrequencies.load(path).images == len(REFERENCES.captions)


def test_clip_score_without_images_is_refused():
    with pytest.raises(InputError, match="clip_score needs the images"):
        score_captions(CAPTIONS, REFERENCES, extra_metrics=["clip_score"])


@pytest.mark.slow
def test_scoring_files_imports_neither_torch_nor_datasets(tmp_path):
    (tmp_path / "predictions.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    (tmp_path / "references.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    program = (
        "import sys\n"
        "from qformer_captioner import eval_captions\n"
        "eval_captions.evaluate(['--predictions', 'predictions.json', '--references', 'references.json'])\n"
        "print([name for name in ('torch', 'datasets', 'accelerate', 'evaluate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
