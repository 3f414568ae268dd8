"""A model of stage 1 with inputs of every kind: bad ones, videos, lower precision, and rows alone or in a batch."""

import pytest
import torch

from qformer_captioner import QFormerForPretraining, QFormerModel, QFormerPretrainingProcessor, retrieval_qformer

from ..fixtures import tiny

NEAR = dict(rtol=1e-5, atol=1e-5)


def texts_of(*lengths: list[int]) -> dict[str, torch.Tensor]:
    """Return random texts `[B, K, T]` of these lengths, with their mask. A length of 0 is padding."""
    sizes = torch.tensor(lengths)
    mask = (torch.arange(int(sizes.max())) < sizes[..., None]).long()
    return {"input_ids": torch.randint(4, tiny.WORDS, mask.shape) * mask, "attention_mask": mask}


def batch() -> dict[str, torch.Tensor]:
    """Return features of three images, with one to two texts of each."""
    torch.manual_seed(1)
    return {"image_embeds": torch.randn(3, 6, tiny.VISION_WIDTH), **texts_of([5, 4], [9, 0], [3, 0])}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = tiny.pretraining_model(vision=None)
    model.processor = QFormerPretrainingProcessor(tiny.image_processor(), tiny.text_tokenizer())
    return model


@pytest.fixture(scope="module")
def of_images():
    torch.manual_seed(0)
    return tiny.pretraining_model("vit")


# --- Refused inputs ---------------------------------------------------------------------------------------------------


def without_a_number() -> torch.Tensor:
    features = torch.randn(3, 6, tiny.VISION_WIDTH)
    features[1, 2, 3] = torch.nan
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_embeds": torch.randn(1, 6, tiny.VISION_WIDTH), **texts_of([5, 4])}, "at least two images in a batch"),
        (texts_of([5], [0], [3]), "Row 1 of the batch has no text"),
        (texts_of([5], [3]), "do not fit 3 images: give one text of each image"),
        (texts_of([5], [17], [3]), "A text has 17 tokens, but the Q-Former reads at most 16: shorten it"),
        (texts_of([5], [1], [3]), "A text has a single token"),
        ({name: part.flip(-1) for name, part in texts_of([5], [9], [3]).items()}, "must be padded on the right"),
        ({"input_ids": torch.full((3, 2, 9), tiny.WORDS)}, "has the token 100, but the vocabulary .* has 100"),
        ({"input_ids": torch.full((3, 2, 9), -1)}, "has the token -1, but the vocabulary"),
        ({"input_ids": torch.ones(3, 2, 9)}, "are not texts as tokens"),
        ({"input_ids": torch.ones(3, 2, 9).long(), "attention_mask": torch.ones(3, 2, 8)}, "do not fit 3 images"),
        ({"input_ids": None}, "There are no texts: pass `input_ids`, or call `get_image_features`"),
        ({"image_embeds": None}, "Pass either `pixel_values` .* or `image_embeds`"),
        ({"image_embeds": without_a_number()}, "features of row 1 of the batch .* hold NaN or infinity"),
        ({"image_embeds": torch.randn(3, 6, 5)}, "have width 5, but this Q-Former accepts width 24"),
        ({"image_attention_mask": torch.ones(3, 5)}, r"has the shape \[3, 5\], but the features need \[3, 6\]"),
        ({"image_attention_mask": torch.tensor([[1] * 6, [0] * 6, [1] * 6])}, "Row 1 of the batch has no features"),
    ],
)
def test_a_batch_that_cannot_be_learned_is_refused_in_one_sentence(model, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        model(**{**batch(), **change})
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "There are no images: pass `images`"),
        ({"images": [], "texts": "a star"}, "There are no images: `images` is empty"),
        ({"image_embeds": [], "texts": "a star"}, "There are no images: `image_embeds` is empty"),
        ({"images": "a.png", "image_embeds": torch.ones(1, 2, 24), "texts": "a star"}, "not both"),
        ({"image_embeds": torch.ones(1, 2, 24)}, "There are no texts"),
        ({"image_embeds": torch.ones(1, 2, 24), "texts": "a " * 20}, "A text has 22 tokens"),
        ({"images": tiny.picture(), "texts": "a star"}, "trained on features and has no vision encoder"),
    ],
)
@pytest.mark.parametrize("method", ["similarity", "match"])
def test_images_and_texts_that_cannot_be_compared_are_refused(model, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(**arguments)


@pytest.mark.parametrize(
    ("images", "image_of_text", "message"),
    [
        (2, None, "There are 3 texts and 2 images: give the image of each text"),
        (2, torch.tensor([0, 1]), "There are 3 texts and 2 images: give the image of each text"),
        (2, torch.tensor([0, 1, 2]), "must be numbers of images from 0 to 1"),
        (2, torch.tensor([0, -1, 1]), "must be numbers of images from 0 to 1"),
    ],
)
def test_each_pair_of_matching_needs_an_image(model, images, image_of_text, message):
    features = torch.randn(images, 6, tiny.VISION_WIDTH)
    with pytest.raises(ValueError, match=message):
        model.get_matching_logits(torch.ones(3, 4).long(), image_embeds=features, image_of_text=image_of_text)


def test_no_texts_have_no_features(model):
    with pytest.raises(ValueError, match="are not texts as tokens"):
        model.get_text_features(torch.ones(0, 4).long())


def test_a_q_former_without_text_is_refused(model):
    config = model.qformer.config.from_dict({**model.qformer.config.to_dict(), "use_qformer_text_input": False})
    with pytest.raises(ValueError, match="does not read texts, so it cannot be pretrained with them"):
        QFormerForPretraining(model.config, qformer=QFormerModel(config))


def test_text_generation_needs_a_token_that_starts_captions():
    with pytest.raises(ValueError, match=r"needs the token that starts a caption: set `config.bos_token_id`"):
        tiny.pretraining_model(vision=None, bos_token_id=None)(**batch())


def test_one_image_is_enough_without_matching():
    model = tiny.pretraining_model(vision=None, itm_weight=0.0)
    assert model(**{name: part[:1] for name, part in batch().items()}).loss.isfinite()


# --- Rows alone and in a batch ----------------------------------------------------------------------------------------


def test_vectors_of_an_image_and_of_a_text_do_not_depend_on_the_batch(model):
    inputs, sizes = batch(), [6, 2, 4]
    mask = torch.arange(6) < torch.tensor(sizes)[:, None]
    together = model.get_image_features(image_embeds=inputs["image_embeds"], image_attention_mask=mask).pooler_output
    ids, text_mask = (inputs[name].flatten(0, 1)[[0, 1, 2, 4]] for name in ("input_ids", "attention_mask"))
    texts = model.get_text_features(ids, text_mask).pooler_output
    for row, size in enumerate(sizes):
        alone = model.get_image_features(image_embeds=inputs["image_embeds"][row : row + 1, :size]).pooler_output
        torch.testing.assert_close(together[row : row + 1], alone, **NEAR)
    for row, length in enumerate(text_mask.sum(dim=1).tolist()):
        torch.testing.assert_close(
            texts[row], model.get_text_features(ids[row : row + 1, :length]).pooler_output[0], **NEAR
        )
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3, tiny.QUERIES))


def test_matching_of_a_pair_does_not_depend_on_the_batch(model):
    inputs, mask = batch(), torch.arange(6) < torch.tensor([[6], [2], [4]])
    ids, text_mask = (inputs[name].flatten(0, 1)[[0, 1, 2, 4]] for name in ("input_ids", "attention_mask"))
    images = torch.tensor([2, 0, 1, 0])
    features = {"image_embeds": inputs["image_embeds"], "image_attention_mask": mask}
    together = model.get_matching_logits(ids, text_mask, image_of_text=images, **features)
    for row, image in enumerate(images.tolist()):
        length, size = int(text_mask[row].sum()), int(mask[image].sum())
        own = inputs["image_embeds"][image : image + 1, :size]
        alone = model.get_matching_logits(ids[row : row + 1, :length], image_embeds=own)
        torch.testing.assert_close(together[row : row + 1], alone, **NEAR)


def test_similarity_and_match_are_the_scores_of_the_vectors_and_the_pairs(model, monkeypatch):
    # Blocks that begin within the images, the texts and the pairs of an image
    for name, size in (
        ("IMAGES_OF_A_PASS", 2),
        ("TEXTS_OF_A_PASS", 1),
        ("PAIRS_OF_A_PASS", 3),
        ("MAX_SIMILARITIES", 1),
    ):
        monkeypatch.setattr(retrieval_qformer, name, size)
    features = batch()["image_embeds"]
    inputs = model.processor(text=tiny.CAPTIONS[:2])
    similarity, match = (
        method(image_embeds=features, texts=tiny.CAPTIONS[:2]) for method in (model.similarity, model.match)
    )
    images = model.get_image_features(image_embeds=features).pooler_output
    texts = model.get_text_features(**inputs).pooler_output
    torch.testing.assert_close(similarity, torch.einsum("bqe,me->bqm", images, texts).amax(dim=1), **NEAR)
    for image in range(3):
        pairs = torch.full((2,), image)
        logits = model.get_matching_logits(**inputs, image_embeds=features, image_of_text=pairs)
        torch.testing.assert_close(match[image], logits.softmax(dim=1)[:, 1], **NEAR)


def test_images_are_opened_and_compared_in_blocks(of_images, monkeypatch):
    of_images.processor = QFormerPretrainingProcessor(tiny.image_processor(), tiny.text_tokenizer())
    pictures, sizes = [tiny.picture(seed) for seed in range(5)], []
    monkeypatch.setattr(retrieval_qformer, "IMAGES_OF_A_PASS", 2)
    hook = of_images.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    blocks = [method(pictures, tiny.CAPTIONS) for method in (of_images.similarity, of_images.match)]
    hook.remove()
    assert sizes == [2, 2, 1] * 2
    monkeypatch.undo()
    torch.testing.assert_close(
        blocks, [method(pictures, tiny.CAPTIONS) for method in (of_images.similarity, of_images.match)], **NEAR
    )


# --- Training ---------------------------------------------------------------------------------------------------------


def gradients(model: QFormerForPretraining, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = tiny.pretraining_model("vit", {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}).train()
    inputs = {"pixel_values": tiny.images(), **texts_of([5, 4], [9, 0], [3, 0])}
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable()
    assert any(layer.gradient_checkpointing for layer in model.qformer.encoder.layer)
    torch.testing.assert_close(gradients(model, **inputs), expected, **NEAR)


def test_a_frozen_encoder_stays_in_evaluation_mode_and_without_gradients(of_images):
    of_images.vision_model.requires_grad_(False)
    of_images.train()
    assert of_images.qformer.training and not of_images.vision_model.training
    reached = gradients(of_images, pixel_values=tiny.images(), **texts_of([5], [9], [3]))
    assert reached.keys() == {name for name, weight in of_images.named_parameters() if weight.requires_grad}
    of_images.eval().vision_model.requires_grad_(True)


@pytest.mark.parametrize(
    ("weights", "unused"),
    [
        ({"itc_weight": 0.0}, ("vision_projection", "text_projection", "logit_scale")),
        ({"itm_weight": 0.0}, ("itm_head",)),
        ({"itg_weight": 0.0}, ("lm_head",)),
    ],
)
def test_a_loss_of_weight_0_trains_nothing(weights, unused):
    torch.manual_seed(0)
    model = tiny.pretraining_model(vision=None, **weights)
    reached = gradients(model, **batch())
    missing = {name for name, weight in model.named_parameters() if weight.requires_grad} - reached.keys()
    assert missing and all(name.startswith(unused) for name in missing)


def test_training_without_contrast_runs_no_text_alone():
    torch.manual_seed(0)
    model = tiny.pretraining_model(vision=None, itc_weight=0.0)
    images, texts = (batch()[name] for name in ("image_embeds", "attention_mask"))
    tokens = []
    model.qformer.encoder.layer[0].attention.attention.query.register_forward_hook(
        lambda module, inputs, output: tokens.append(len(inputs[0]))
    )
    training = model.train()(**batch())
    evaluation = model.eval()(**batch())
    queries = len(images) * tiny.QUERIES
    of_generation = int(texts.sum() - texts.any(dim=-1).sum())
    assert tokens[0] == queries + of_generation
    assert queries + of_generation + int(texts.sum()) in tokens[1:]
    assert training.logits_per_image is None and evaluation.logits_per_image.shape == (3, 4)
    assert training.negative_images.shape == (4,)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_to_bfloat16_gives_about_the_same_losses(model, attention):
    model.set_attn_implementation({"qformer_config": attention})
    torch.manual_seed(0)
    expected = model(**batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        output = model(**batch())
    output.loss.backward()
    model.zero_grad()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.itc_loss, expected.itc_loss, rtol=0.05, atol=0.05)
    torch.testing.assert_close(output.itg_loss, expected.itg_loss, rtol=0.05, atol=0.05)


# --- Videos and vocabularies ------------------------------------------------------------------------------------------


def test_videos_are_read_frame_by_frame():
    torch.manual_seed(0)
    model = tiny.pretraining_model("vit", {"num_frames": 3})
    videos, texts = tiny.images(9).view(3, 3, 3, tiny.SIDE, tiny.SIDE), texts_of([5], [9], [3])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    features = model.vision_model(videos.flatten(0, 1)).last_hidden_state.unflatten(0, (3, 3))
    losses = []
    for inputs in ({"pixel_values": videos}, {"image_embeds": features}):
        torch.manual_seed(0)
        losses.append(model(**inputs, **texts, frame_attention_mask=mask).loss)
    torch.testing.assert_close(*losses, **NEAR)
    swapped = model.get_image_features(pixel_values=videos[:1].flip(1)).pooler_output
    assert not torch.allclose(model.get_image_features(pixel_values=videos[:1]).pooler_output, swapped, atol=1e-3)


def test_the_vocabulary_can_be_resized(tmp_path):
    model = tiny.pretraining_model(vision=None)
    model.resize_token_embeddings(120, mean_resizing=False)
    assert model.lm_head.decoder.weight is model.qformer.embeddings.word_embeddings.weight
    assert (model.qformer.config.vocab_size, *model.lm_head.decoder.bias.shape) == (120, 120)
    assert model(**{**batch(), "input_ids": torch.full((3, 2, 9), 119)}).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = QFormerForPretraining.from_pretrained(tmp_path)
    assert loaded.qformer.config.vocab_size == 120 and "vocab_size" not in vars(loaded.config)
    assert torch.equal(loaded.lm_head.decoder.bias, model.lm_head.decoder.bias)
