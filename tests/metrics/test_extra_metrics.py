"""CLIPScore equals its formula, METEOR equals pycocoevalcap's, and errors say what is missing."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from qformer_captioner.common.errors import InputError
from qformer_captioner.metrics import clip_scores, java_scores

from ..fixtures import tiny

PREDICTIONS = ["a red star", "two cats sleep"]
REFERENCES = [["one red star", "a star"], ["cats asleep"]]


@pytest.fixture(scope="module")
def clip(shared, tmp_path_factory) -> str:
    """Folder of a CLIP with random weights, CLIP's own tokenizer, and images of 32 x 32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "clip")
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=side), tokenizer).save_pretrained(
        folder
    )
    config = CLIPModel.config_class(
        projection_dim=8,
        text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2),
        vision_config=tiny.LAYERS | dict(hidden_size=16, intermediate_size=16, image_size=tiny.SIDE, patch_size=16),
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def test_clip_score_equals_the_formula_of_the_paper(clip):
    images = [tiny.picture(0), tiny.picture(1)]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for i in range(2):
        texts = [f"A photo depicts {text}" for text in (PREDICTIONS[i], *REFERENCES[i])]
        inputs = processor(images=images[i], text=texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        score = 2.5 * max((output.image_embeds[0] @ output.text_embeds[0]).item(), 0)
        nearest = max((output.text_embeds[1:] @ output.text_embeds[0]).max().item(), 0)
        both = 2 * score * nearest / (score + nearest) if score + nearest else 0
        # The same image twice, in batches of one: the batch size does not change a score.
        scores = clip_scores([images[i]] * 2, PREDICTIONS[i : i + 1] * 2, REFERENCES[i : i + 1] * 2, clip, batch_size=1)
        assert scores == pytest.approx({"clip_score": score, "ref_clip_score": both}, abs=1e-5)


def test_clip_score_takes_a_generator_and_scores_each_image(clip):
    images = (tiny.picture(seed) for seed in (0, 1))
    scores = clip_scores(images, PREDICTIONS, model_name_or_path=clip, per_image=True)
    assert scores["clip_score"] == pytest.approx(sum(scores["per_image"]["clip_score"]) / 2)
    assert "ref_clip_score" not in scores


def test_clip_score_takes_empty_captions_only_if_they_are_allowed(clip):
    pictures = [tiny.picture()] * 2
    with pytest.raises(InputError, match="Prediction 0 is empty"):
        clip_scores(pictures, ["", "a"], REFERENCES, clip)
    assert clip_scores(pictures, ["", "a"], REFERENCES, clip, allow_empty=True)["clip_score"] >= 0


def test_clip_score_needs_an_image_for_each_caption_and_a_model(clip):
    with pytest.raises(InputError, match="1 images but 2 captions"):
        clip_scores([tiny.picture()], PREDICTIONS, model_name_or_path=clip)
    with pytest.raises(InputError, match="CLIP model '/nowhere' cannot be loaded"):
        clip_scores([tiny.picture()] * 2, PREDICTIONS, model_name_or_path="/nowhere")


def test_without_java_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="meteor and spice need Java.*Install a Java runtime"):
        java_scores(PREDICTIONS, REFERENCES)


@pytest.mark.slow
def test_meteor_equals_the_toolkits():
    """The expected scores are those of pycocoevalcap 1.2 for the same tokens."""
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap (the extra [java])")
    if shutil.which("java") is None:
        pytest.skip("needs a Java runtime")
    predictions, references = [*PREDICTIONS, ""], [*REFERENCES, ["a dog"]]
    scores = java_scores(predictions, references, ["meteor"], per_image=True, allow_empty=True)
    assert scores["meteor"] == pytest.approx(0.24293759987907376, abs=1e-12)
    expected = [0.409431138876279, 0.19512195121951223, 0]
    assert scores["per_image"]["meteor"] == pytest.approx(expected, abs=1e-12)
