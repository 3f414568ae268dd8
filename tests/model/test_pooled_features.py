"""Pooled image features: class tokens stay, patches are averaged to a grid, and all are normalised."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from qformer_captioner import QFormerCaptioner, QFormerConfig, QFormerModel
from qformer_captioner.features_qformer import pool_patches

from ..fixtures import tiny

POOLED = dict(pooled_grid_size=1)


def qformer(**fields) -> QFormerModel:
    torch.manual_seed(0)
    fields = tiny.QFORMER | dict(encoder_hidden_size=tiny.VISION_WIDTH, pooled_grid_size=2) | fields
    return QFormerModel(QFormerConfig(**fields)).eval()


def features(*shape: int) -> torch.Tensor:
    """Return features whose channels and kinds differ in mean and scale, as those of a vision encoder do."""
    values = torch.randn(*shape, tiny.VISION_WIDTH, generator=torch.Generator().manual_seed(1))
    return values * torch.linspace(0.1, 5, tiny.VISION_WIDTH) + torch.arange(shape[-1])[:, None].clamp(max=1) + 3


def test_a_cell_of_the_grid_is_the_mean_of_its_patches():
    images = features(3, 1 + 16)
    pooled, _ = pool_patches(images, None, grid_size=2, num_prefix_tokens=1)
    torch.testing.assert_close(pooled[:, 0], images[:, 0])
    maps = images[:, 1:].view(3, 4, 4, -1)
    cells = [maps[:, rows : rows + 2, columns : columns + 2].mean(dim=(1, 2)) for rows in (0, 2) for columns in (0, 2)]
    torch.testing.assert_close(pooled[:, 1:], torch.stack(cells, dim=1))


def test_pooled_features_stay_as_they_are():
    pooled, _ = pool_patches(features(3, 2 + 9), None, grid_size=3, num_prefix_tokens=2)
    torch.testing.assert_close(pooled, features(3, 2 + 9))


def test_normalised_features_have_mean_0_and_deviation_1_for_class_tokens_and_for_patches():
    model, images = qformer(), features(50, 1 + 16)
    model.normalize_image_features(images)
    normal, _ = model.prepare_features(images)
    for kind in (normal[:, :1], normal[:, 1:]):
        torch.testing.assert_close(kind.mean(dim=(0, 1)), torch.zeros(tiny.VISION_WIDTH), atol=1e-4, rtol=0)
        torch.testing.assert_close(kind.flatten(0, 1).std(dim=0), torch.ones(tiny.VISION_WIDTH), atol=1e-4, rtol=0)


def test_summaries_normalise_as_the_features_do():
    models, images = (qformer(), qformer()), features(50, 1 + 16)
    models[0].normalize_image_features(images)
    models[1].normalize_image_features(models[1].summarize_features(images))
    torch.testing.assert_close(models[0].feature_norm.weight, models[1].feature_norm.weight)


def test_images_and_their_features_give_one_loss():
    model = tiny.captioner(**POOLED)
    text = {name: value for name, value in tiny.batch().items() if name != "pixel_values"}
    encoded = model.encode_images(tiny.images()).last_hidden_state
    assert encoded.shape[1] == 5  # a class token and 2 x 2 patches
    expected = model(image_embeds=encoded, **text).loss
    torch.testing.assert_close(model(pixel_values=tiny.images(), **text).loss, expected)
    pooled, _ = pool_patches(encoded, None, grid_size=1, num_prefix_tokens=1)
    torch.testing.assert_close(model(image_embeds=pooled, **text).loss, expected)


def test_saved_equals_loaded(tmp_path):
    model = tiny.captioner(**POOLED)
    model.qformer.normalize_image_features(features(20, 5))
    model.save_pretrained(tmp_path)
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**tiny.batch()).loss, model(**tiny.batch()).loss)


def test_the_frames_of_a_video_are_pooled_one_by_one_and_padding_is_ignored():
    model = qformer(num_frames=3)
    video = features(1, 3, 5)
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    mask[:, 2] = False
    padded = video.clone()
    padded[:, 2] = torch.nan
    expected = model(video[:, :2]).last_hidden_state
    torch.testing.assert_close(model(padded, mask).last_hidden_state, expected)


def test_dropout_of_features_acts_in_training_only():
    model = qformer(feature_dropout_prob=0.5)
    images = features(2, 5)
    assert torch.equal(model(images).last_hidden_state, model(images).last_hidden_state)
    model.train()
    dropped, _ = model.prepare_features(images)
    assert 0.3 < (dropped == 0).float().mean() < 0.7


def test_a_pretraining_model_reads_pooled_features():
    model = tiny.pretraining_model(text=POOLED)
    encoded = model.vision_model(tiny.images()).last_hidden_state
    pooled, _ = pool_patches(encoded, None, grid_size=1, num_prefix_tokens=1)
    expected = model.get_image_features(pixel_values=tiny.images()).pooler_output
    torch.testing.assert_close(model.get_image_features(image_embeds=pooled).pooler_output, expected)


def test_the_second_stage_begins_with_the_normalisation_of_the_first(tmp_path):
    model = tiny.pretraining_model(text=POOLED)
    model.qformer.normalize_image_features(features(20, 5))
    model.save_pretrained(tmp_path)
    loaded = QFormerModel.from_pretrained(tmp_path)
    expected = model.get_image_features(image_embeds=features(3, 5)).last_hidden_state
    torch.testing.assert_close(loaded(features(3, 5)).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ((2, 6), {}, "has 6 features. Without the first 1"),
        ((2, 4), dict(num_prefix_tokens=0, pooled_grid_size=3), "a square grid that can be pooled to 3 x 3"),
    ],
    ids=["no square", "grid too large"],
)
def test_features_that_are_no_grid_are_refused(shape, fields, message):
    with pytest.raises(ValueError, match=message):
        qformer(**fields)(features(*shape))


def test_parts_of_images_cannot_be_pooled():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="some features of an image are masked"):
        qformer()(features(2, 5), mask)


def test_a_grid_has_at_least_one_cell():
    with pytest.raises(StrictDataclassClassValidationError, match="`pooled_grid_size` must be at least 1, got 0"):
        QFormerConfig(pooled_grid_size=0)
