"""Rewards that compare captions with images: CLIPScore, and the probability of matching of a stage-1 model."""

import pytest
import torch

from qformer_captioner import QFormerForPretraining
from qformer_captioner.common.errors import InputError
from qformer_captioner.metrics import clip_scores
from qformer_captioner.rewards import RewardContext, load_rewards

from ..fixtures import tiny
from ..metrics.test_extra_metrics import clip

__all__ = ["clip"]  # a fixture

COMPLETIONS = ["a red circle", "a green heart", "two small squares", ""]
OF_IMAGE = [0, 0, 1, 1]  # two samples of each image


def load(name: str):
    context = RewardContext(run_folder=None, train_references=list, eos_token_id=[1])
    return load_rewards([name], None, context)


@pytest.fixture(scope="module")
def pictures():
    return [tiny.picture(0), tiny.picture(1)]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> str:
    return tiny.save_stage1(tmp_path_factory.mktemp("stage1") / "model")


def test_clip_score_is_that_of_the_metrics(clip, pictures):
    images = [pictures[index] for index in OF_IMAGE]
    rewards = load(f"clip_score:{clip}")
    expected = clip_scores(images, COMPLETIONS, model_name_or_path=clip, per_image=True, allow_empty=True)
    scores = rewards([""] * 4, COMPLETIONS, image=images)
    assert scores.by_name["clip_score"].tolist() == pytest.approx(expected["per_image"]["clip_score"], abs=1e-5)
    assert rewards.columns == {"image"}


def test_match_is_that_of_the_stage_1_model(stage1, pictures):
    model = QFormerForPretraining.from_pretrained(stage1)
    expected = model.match(pictures, COMPLETIONS)[OF_IMAGE, range(4)]
    rewards = load(f"match:{stage1}")
    scores = rewards([""] * 4, COMPLETIONS, image=[pictures[index] for index in OF_IMAGE])
    torch.testing.assert_close(scores.total, expected)
    features = model.vision_model(model.processor(images=pictures)["pixel_values"]).last_hidden_state.detach()
    scores = rewards([""] * 4, COMPLETIONS, image_embeds=[list(features)[index] for index in OF_IMAGE])
    torch.testing.assert_close(scores.total, expected)


def test_match_needs_a_model_that_was_trained_to_match(stage1, tmp_path):
    model = QFormerForPretraining.from_pretrained(stage1)
    model.config.itm_weight = 0.0
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="trained without matching"):
        load(f"match:{tmp_path / 'model'}")


def test_match_reads_features_of_different_lengths_in_a_tensor_or_a_list(stage1):
    model = QFormerForPretraining.from_pretrained(stage1)
    features = [torch.randn(size, tiny.VISION_WIDTH) for size in (3, 5, 4, 4)]
    expected = model.match(image_embeds=features, texts=COMPLETIONS).diagonal()
    rewards = load(f"match:{stage1}")
    torch.testing.assert_close(rewards([""] * 4, COMPLETIONS, image_embeds=features).total, expected)
    rows = torch.stack(features[2:])
    torch.testing.assert_close(rewards([""] * 2, COMPLETIONS[2:], image_embeds=rows).total, expected[2:])


def test_samples_of_an_image_encode_it_once(stage1, pictures, monkeypatch):
    rewards = load(f"match:{stage1}")
    batches = []
    read = rewards.functions["match"].model.image_features
    monkeypatch.setattr(
        rewards.functions["match"].model, "image_features", lambda images: batches.append(images) or read(images)
    )
    rewards([""] * 4, COMPLETIONS, image=[pictures[index] for index in OF_IMAGE])
    assert batches == [pictures]


def test_what_a_reward_of_images_needs_is_named(stage1, clip):
    with pytest.raises(InputError, match="'clip_score' needs the column 'image', which this run lacks"):
        load(f"clip_score:{clip}")([""], ["a"], references=[["a"]])
    with pytest.raises(InputError, match="needs the images or their features"):
        load(f"match:{stage1}")([""], ["a"], references=[["a"]])
    with pytest.raises(InputError, match="features of width 24, and those of this run have width 7"):
        load(f"match:{stage1}")([""], ["a"], image_embeds=[torch.zeros(3, 7)])
