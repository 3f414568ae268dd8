"""Features of different lengths: a padded batch gives the losses, gradients and captions of single rows."""

import inspect

import pytest
import torch
from transformers import AutoModel, GraniteSpeechConfig
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector

from qformer_captioner import QFormerCaptioner, QFormerConfig, QFormerModel
from qformer_captioner.vision_qformer import VISION_INPUTS

from ..fixtures import tiny

LENGTHS = (7, 2, 12)  # features of each row
WINDOWS = dict(window_size=5)


def rows_of_features(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(length, *shape, tiny.VISION_WIDTH, generator=generator) for length in LENGTHS]


def padded(rows: list[torch.Tensor], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows in one batch, padded with values that would spoil the result, and their mask."""
    features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan, padding_side=side)
    ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return features, tiny.pad(ones, 0, side)


def loss_and_gradients(model: QFormerCaptioner, **batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**batch)
    (output.loss * (batch["labels"] != -100).sum()).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return output.losses, gradients


@pytest.mark.parametrize(
    ("language", "fields", "attention", "side"),
    [
        ("llama", {}, "eager", "right"),
        ("llama", WINDOWS, "sdpa", "left"),
        ("t5", {}, "sdpa", "left"),
        ("t5", WINDOWS, "eager", "right"),
    ],
    ids=["llama", "llama-windows", "t5", "t5-windows"],
)
def test_a_padded_batch_equals_its_rows(language, fields, attention, side):
    """In float64, because rounding in float32 opens and closes ReLUs of T5."""
    model = tiny.captioner(language=language, projection_per_query=bool(fields), **fields).double()
    model.set_attn_implementation({"qformer_config": attention})
    text = {name: value for name, value in tiny.batch().items() if name != "pixel_values"}
    rows = rows_of_features()
    features, mask = padded(rows, side)
    losses, gradients = loss_and_gradients(model, image_embeds=features, image_attention_mask=mask, **text)
    captions = model.generate(
        image_embeds=features, image_attention_mask=mask, num_beams=2, max_new_tokens=6, eos_token_id=None, **text
    )
    summed: dict[str, torch.Tensor] = {}
    for index, row in enumerate(rows):
        single = {name: value[index : index + 1] for name, value in text.items()}
        single_losses, single_gradients = loss_and_gradients(model, image_embeds=row[None], **single)
        torch.testing.assert_close(losses[index], single_losses[0])
        summed = {name: summed.get(name, 0) + value for name, value in single_gradients.items()}
        caption = model.generate(image_embeds=row[None], num_beams=2, max_new_tokens=6, eos_token_id=None, **single)
        assert captions[index].tolist() == caption[0].tolist()
    torch.testing.assert_close(gradients, summed)


def test_a_full_mask_costs_nothing(monkeypatch):
    """It is dropped, so attention runs without a mask."""
    model = tiny.captioner()
    features = torch.randn(2, 5, tiny.VISION_WIDTH)
    seen = []
    hook = model.qformer.encoder.layer[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("encoder_attention_mask")), with_kwargs=True
    )
    model.get_soft_prompt(image_embeds=features, image_attention_mask=torch.ones(2, 5))
    hook.remove()
    assert seen == [None]


@pytest.mark.parametrize("length", [1, 14, 15, 40])
def test_windows_equal_the_projector_of_granite_speech(length):
    """transformers' own module, with the same weights; its last window is filled with zeros, too."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    sizes |= dict(encoder_hidden_size=24, cross_attention_frequency=1, initializer_range=0.2)
    config = GraniteSpeechConfig(
        projector_config=dict(model_type="blip_2_qformer", **sizes), window_size=15, downsample_rate=5
    )
    config.text_config.hidden_size = 48
    theirs = GraniteSpeechEncoderProjector(config).eval()
    ours = QFormerModel(QFormerConfig(**sizes, num_query_tokens=3, window_size=15)).eval()
    weights = {"query_tokens": theirs.query, **theirs.qformer.state_dict()}
    ours.load_state_dict(weights)
    features = torch.randn(2, length, 24)
    expected = theirs(features)
    torch.testing.assert_close(theirs.linear(ours(features).last_hidden_state), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (2, -(-length // 15) * 3, 48)


def test_a_video_is_the_sequence_of_its_frames_with_their_embeddings():
    model = tiny.captioner(num_frames=4)
    frames = torch.randn(2, 3, 3, tiny.SIDE, tiny.SIDE)
    features = model.encode_images(frames.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 3))
    with_embeddings = features + model.qformer.frame_embeddings[:3, None]
    plain = tiny.captioner()
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = plain.get_soft_prompt(image_embeds=with_embeddings.flatten(1, 2))
    torch.testing.assert_close(model.get_soft_prompt(frames), expected)
    torch.testing.assert_close(model.get_soft_prompt(image_embeds=features), expected)


@pytest.mark.parametrize("fields", [{}, dict(window_size=3)], ids=["frames", "windows"])
def test_videos_of_different_lengths_equal_single_ones(fields):
    model = tiny.captioner(num_frames=4, **fields)
    frames = torch.randn(2, 4, 3, tiny.SIDE, tiny.SIDE)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    together = model.get_soft_prompt(frames, frame_attention_mask=mask)
    single = model.get_soft_prompt(frames[1:, :2])
    torch.testing.assert_close(together[1:, : single.shape[1]], single, rtol=1e-5, atol=1e-5)
    assert model.generate(frames, frame_attention_mask=mask, max_new_tokens=3).shape == (2, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(image_attention_mask=torch.ones(2, 4)), r"has the shape \[2, 4\], but the features need \[2, 5\]"),
        (dict(image_attention_mask=torch.tensor([[0.0] * 5, [-torch.inf] * 5])), "holds other values than 1"),
        (dict(image_attention_mask=torch.tensor([[1] * 5, [0] * 5])), "Row 1 of the batch has no features"),
        (dict(image_embeds=torch.zeros(2, 0, tiny.VISION_WIDTH)), r"without empty dimensions, not \[2, 0, 24\]"),
        (dict(image_embeds=torch.full((2, 5, tiny.VISION_WIDTH), torch.nan)), "of row 0 of the batch"),
        (dict(image_embeds=torch.zeros(2, 3, 5, tiny.VISION_WIDTH)), "have 3 frames, but this Q-Former tells 1 apart"),
        (dict(frame_attention_mask=torch.ones(2, 5)), "must have one entry for each frame"),
        (
            dict(
                image_embeds=torch.ones(2, 3, 5, tiny.VISION_WIDTH),
                frame_attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]),
                image_attention_mask=torch.ones(2, 1, 5),
            ),
            r"has the shape \[2, 1, 5\], but the features need \[2, 3, 5\]",
        ),
        (
            dict(
                image_embeds=torch.ones(2, 3, 5, tiny.VISION_WIDTH), frame_attention_mask=torch.full((2, 3), -torch.inf)
            ),
            "`frame_attention_mask` holds other values than 1",
        ),
        (dict(image_embeds=None, pixel_values=torch.ones(2, 0, 3, 32, 32)), "There are no images or frames in"),
        (
            dict(image_embeds=None, pixel_values=torch.ones(3, 32, 32)),
            r"for videos, not \[3, 32, 32\]",
        ),
        (dict(image_sizes=torch.ones(2, 2)), "`image_sizes` belongs to `pixel_values`"),
    ],
    ids=[
        "shape",
        "additive",
        "empty row",
        "no features",
        "NaN",
        "frames",
        "mask of frames",
        "two masks",
        "additive frames",
        "no frames",
        "one image",
        "sizes beside features",
    ],
)
def test_wrong_features_are_named(inputs, message):
    model = tiny.captioner()
    with pytest.raises(ValueError, match=message) as error:
        model.get_soft_prompt(**{"image_embeds": torch.ones(2, 5, tiny.VISION_WIDTH), **inputs})
    assert len(str(error.value)) < 500


def test_the_length_of_a_soft_prompt_is_that_of_windows_with_features():
    """The padded batch has 90 queries, and the row 60: with a prompt of 4 tokens, it leaves no room for a caption."""
    model = tiny.captioner(language="gpt2", window_size=2)
    features, mask = torch.ones(1, 60, tiny.VISION_WIDTH), torch.arange(60)[None] < 40
    with pytest.raises(ValueError, match="at most 64 tokens, but there are 60 queries, a prompt of 4 and a caption"):
        model.generate(image_embeds=features, image_attention_mask=mask, input_ids=torch.full((1, 4), 5))


def test_normalisation_ignores_padding():
    rows, (features, mask) = rows_of_features(), padded(rows_of_features())
    means = torch.stack([row.mean(dim=0) for row in rows])
    torch.manual_seed(0)
    expected, model = tiny.captioner().qformer, tiny.captioner().qformer
    model.load_state_dict(expected.state_dict())
    expected.normalize_image_features(means[:, None])
    model.normalize_image_features(features, mask)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    with pytest.raises(ValueError, match=r"has the shape \[3, 1\], but the features need \[3, 12\]"):
        model.normalize_image_features(features, mask[:, :1])


def test_the_number_of_prompts_is_checked():
    model = tiny.captioner()
    with pytest.raises(ValueError, match="There are 2 images but 3 prompts"):
        model.generate(image_embeds=torch.ones(2, 5, tiny.VISION_WIDTH), input_ids=torch.full((3, 4), 5))


def test_the_trainer_keeps_all_columns_that_belong_to_images():
    """It drops those that are not arguments of `forward`, so that padding would be read as images."""
    assert set(VISION_INPUTS) < set(inspect.signature(QFormerCaptioner.forward).parameters)


def test_auto_model_builds_a_qformer_from_its_configuration():
    assert type(AutoModel.from_config(QFormerConfig(**tiny.QFORMER, num_frames=2))) is QFormerModel


def test_the_queries_of_each_window_read_the_prompt():
    model = tiny.captioner(use_qformer_text_input=True, window_size=5).qformer
    prompt = dict(input_ids=torch.tensor([[3, 4, 5], [6, 7, 0]]), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    features = torch.randn(2, 10, tiny.VISION_WIDTH)
    windows = [model(features[:, start : start + 5], **prompt).last_hidden_state for start in (0, 5)]
    torch.testing.assert_close(model(features, **prompt).last_hidden_state, torch.cat(windows, dim=1))
