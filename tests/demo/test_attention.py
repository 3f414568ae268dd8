"""Attention maps of the demo. None of these tests needs a browser."""

import attention
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from ..fixtures import tiny

CAPTION = tiny.CAPTIONS[0]


def captioner(vision: str = "clip", language: str = "llama", **fields):
    """Return a tiny captioner with eager attention, as the demo loads it."""
    model = tiny.captioner(vision, language, **fields)
    model.set_attn_implementation({"qformer_config": "eager"})
    return model


def maps_of(model, text: str = CAPTION) -> tuple[attention.EncodedImage, list[int], attention.AttentionMaps]:
    image = attention.encode_image(model, tiny.picture())
    token_ids = model.processor.encode_caption(text)
    return image, token_ids, attention.attention_maps(model, image, token_ids)


@pytest.mark.parametrize("language", tiny.TEXT)
def test_words_have_the_probabilities_of_the_language_model(language):
    model = captioner(language=language)
    image, token_ids, maps = maps_of(model)
    token_probs = attention.token_log_probs(model, image, token_ids).exp()
    assert [word.text for word in maps.words] == CAPTION.split()
    torch.testing.assert_close(
        torch.tensor([word.probability for word in maps.words]), token_probs[:-1]
    )  # without the end


@pytest.mark.parametrize("language", tiny.TEXT)
def test_each_word_has_a_map_of_its_own_for_all_language_models(language):
    _, _, maps = maps_of(captioner(language=language))
    for word in maps.words:
        assert word.patches.shape == (2, 2) and word.patches.min() >= 0 and word.patches.max() > 0
        assert word.queries.shape == (tiny.QUERIES,) and word.queries.sum() == pytest.approx(1)
    assert len({word.patches.tobytes() for word in maps.words}) == len(maps.words)


def test_the_map_of_a_word_is_zero_if_the_word_does_not_depend_on_the_image():
    model = captioner()
    torch.nn.init.zeros_(model.language_projection.weight)
    _, _, maps = maps_of(model)
    assert all(word.patches.max() == 0 and word.queries.max() == 0 for word in maps.words)
    assert (
        np.array(attention.overlay(tiny.picture(), maps.words[0].patches)).max() < 40
    )  # dark, and no division by zero


def test_the_map_of_a_word_agrees_with_finite_differences():
    """The change of a word's log-odds after a small change of each weight, for one layer with one head."""
    model = captioner(num_hidden_layers=1, num_attention_heads=1)
    image, token_ids, maps = maps_of(model)
    layer = model.qformer.encoder.layer[0].crossattention.attention
    features, step = image.inputs["image_embeds"], 1e-2
    labels = torch.tensor([token_ids])

    def log_odds(more: torch.Tensor) -> torch.Tensor:
        """Return the log-odds of all words with `more` `[Q, N]` added to the weights; the layer is linear in them."""
        values = layer.value(features)[0]  # [N, Dq]
        hook = layer.register_forward_hook(lambda module, inputs, output: (output[0] + more @ values, output[1]))
        with torch.no_grad():
            p = model(**image.inputs, labels=labels).logits[0].double().softmax(dim=-1).gather(1, labels.T)[:, 0]
        hook.remove()
        return (p / (1 - p)).log()

    with attention._record_cross_attentions(model.qformer) as attentions, torch.no_grad():
        model(**image.inputs, labels=labels)
    weights = attentions[0][0, 0]  # [Q, N]
    expected = torch.zeros(len(token_ids), *weights.shape, dtype=torch.double)
    for q in range(weights.shape[0]):
        for n in range(weights.shape[1]):
            more = torch.zeros_like(weights)
            more[q, n] = step
            expected[:, q, n] = (log_odds(more) - log_odds(-more)) / (2 * step) * weights[q, n]
    expected = expected.clamp(min=0).sum(dim=1)[:-1, 1:]  # without the end, and without the class token
    computed = np.stack([word.patches.ravel() for word in maps.words])
    np.testing.assert_allclose(computed, expected.numpy(), rtol=0.05, atol=2e-4)


@pytest.mark.parametrize(("vision", "num_special"), [("clip", 1), ("siglip", 0), ("dinov2", 1), ("vit", 1)])
def test_the_map_of_a_query_is_its_mean_cross_attention(vision, num_special):
    model = captioner(vision, num_hidden_layers=4)
    image, _, maps = maps_of(model)
    with torch.no_grad():
        output = model.qformer(image.inputs["image_embeds"], output_attentions=True)
    weights = torch.stack(output.cross_attentions).mean(dim=(0, 1, 2))  # [Q, N]
    assert len(output.cross_attentions) == 2 and weights.shape[1] == 4 + num_special
    np.testing.assert_allclose(maps.queries.reshape(-1, 4), weights[:, num_special:], rtol=1e-5)
    np.testing.assert_allclose(maps.patch_share, weights[:, num_special:].sum(dim=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "size", "num_features", "grid"),
    [
        (tiny.vision_config("clip"), (32, 32), 5, (2, 2)),
        (tiny.vision_config("siglip"), (32, 64), 8, (2, 4)),
        (tiny.vision_config("dinov2"), (48, 32), 11, (3, 2)),  # four registers
        (AutoModel, (32, 32), 16, (4, 4)),  # no patch size: a square of tokens
        (AutoModel, (32, 32), 15, None),
    ],
)
def test_patches_are_found_among_the_features(config, size, num_features, grid):
    assert attention.patch_grid(size, config, num_features) == grid


def test_the_picture_is_the_input_of_the_vision_encoder():
    image = tiny.picture(size=(tiny.SIDE, tiny.SIDE))
    encoded = attention.encode_image(captioner(), image)
    difference = np.array(encoded.picture).astype(int) - np.array(image).astype(int)
    assert np.abs(difference).max() <= 1


def test_an_overlay_darkens_all_but_the_patch_with_the_largest_weight():
    patches = np.zeros((2, 4), dtype=np.float32)
    patches[1, 3] = 0.01
    drawn = np.array(attention.overlay(Image.new("RGB", (40, 20), "white"), patches)).mean(axis=2)
    rows, columns = drawn.shape
    assert (rows, columns) == (attention.OVERLAY_SIZE // 2, attention.OVERLAY_SIZE)
    assert drawn[rows // 2 :, columns * 3 // 4 :].min() == 255
    assert drawn[: rows // 2].max() < 40 and drawn[:, : columns * 3 // 4].max() < 40


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_mean_log_probabilities_equal_the_scores_of_beam_search(language):
    model = captioner(language=language)
    image = attention.encode_image(model, tiny.picture())
    found = model.generate(
        **image.inputs, num_beams=3, max_new_tokens=6, return_dict_in_generate=True, output_scores=True
    )
    token_ids = found.sequences[0].tolist()
    token_ids = token_ids[: token_ids.index(1) + 1] if 1 in token_ids else token_ids
    assert attention.token_log_probs(model, image, token_ids).mean().item() == pytest.approx(
        found.sequences_scores[0].item(), abs=1e-4
    )


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_each_token_of_a_caption_belongs_to_one_word(name, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    text = "Two unspayed sheepdogs, café-trained, run: 1234!"
    token_ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    words = attention.split_words(tokenizer, token_ids)
    assert [position for _, positions in words for position in positions] == list(range(len(token_ids) - 1))
    assert "".join(word for word, _ in words) == text.replace(" ", "")
    assert {"unspayed", "sheepdogs", ",", "café-trained", "1234"} <= {word for word, _ in words}


def test_the_bytes_of_one_character_are_one_word(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    token_ids = tokenizer("a 🐕 runs").input_ids
    words = attention.split_words(tokenizer, token_ids)
    assert [word for word, _ in words] == ["a", "🐕", "runs"] and len(words[1][1]) > 1


def test_drawing_maps_does_not_change_the_captioner():
    model = captioner()
    before = model.caption(tiny.picture())
    maps_of(model)
    assert model.caption(tiny.picture()) == before
    assert not any(module._forward_hooks for module in model.qformer.modules() if "MultiHead" in type(module).__name__)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_maps_of_an_adapter_are_those_of_its_trained_q_former(tmp_path):
    tiny.captioner().save_pretrained(tmp_path / "base")
    eager = {"trust_remote_code": True, "attn_implementation": {"qformer_config": "eager"}}
    base = AutoModel.from_pretrained(tmp_path / "base", **eager)
    config = LoraConfig(
        target_modules=r"language_model\..*\.q_proj", modules_to_save=["qformer", "language_projection"]
    )
    adapter = get_peft_model(base, config)
    torch.nn.init.normal_(base.qformer.modules_to_save["default"].query_tokens)
    adapter.save_pretrained(tmp_path / "adapter")

    maps = [maps_of(AutoModel.from_pretrained(tmp_path / name, **eager))[2] for name in ("base", "adapter")]
    assert not np.allclose(maps[0].queries, maps[1].queries, atol=1e-2)
    features = attention.encode_image(base, tiny.picture()).inputs["image_embeds"]
    with torch.no_grad():
        trained = base.qformer.modules_to_save["default"](features, output_attentions=True)
    weights = trained.cross_attentions[0].mean(dim=(0, 1))
    np.testing.assert_allclose(maps[1].queries.reshape(-1, 4), weights[:, 1:], rtol=1e-4)
