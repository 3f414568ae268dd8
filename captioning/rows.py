"""Captions of a batch of rows, where a row that cannot be read does not fail the others.

Shapes: B rows that can be read, K captions of a row, T tokens of a caption, N features of width Dv.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BatchFeature, GenerationConfig

from ..common.errors import one_line
from ..common.onednn import onednn_linears
from ..data.features import check_features, load_features
from ..decoding_qformer import QFormerDecodingModel
from ..generation_qformer import resolve_generation_config
from ..images_qformer import open_image, sample_frames
from ..pretraining_qformer import QFormerForPretraining
from ..vision_qformer import VISION_INPUTS, encode_images

if TYPE_CHECKING:
    from ..captioning_qformer import QFormerCaptioningModel

FEATURES_SUFFIX = ".npy"


@dataclass
class CaptionedRow:
    """Captions of a row.

    Args:
        captions: the captions, none if the row cannot be read.
        scores: mean log-likelihood of the tokens of each caption in nats. Empty unless scores were asked for.
        matching_scores: probability that each caption describes the image, between 0 and 1. Empty unless scores were
            asked for and the model is one of stage 1 that was trained to match.
        error: why the row cannot be read, as one line.
    """

    captions: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    matching_scores: list[float] = field(default_factory=list)
    error: str | None = None


def caption_rows(
    model: "QFormerCaptioningModel",
    images: Sequence[Any],
    prompt: str | Sequence[str | None] | None = None,
    *,
    score: bool = False,
    **generation: Any,
) -> list[CaptionedRow]:
    """Caption the rows of a batch that can be read, and say of the others why they cannot.

    Args:
        model: a captioner or a model of stage 1, in evaluation mode.
        images: what each row holds:

            - an image in any form that [`open_image`] takes: a PIL image, bytes, a path, a URL, a dict with `bytes` or
              `path` ... ;
            - a list of images, which are the frames of a video;
            - features `[N, Dv]`: the path of a file of numpy (.npy), a dict `{"image_embeds": array}`, or an array for
              a captioner without vision encoder;
            - an exception, which becomes the error of the row.
        prompt: text that the captions continue, or one for each row; by default the captioner's own.
        score: compute the scores, too. The vision encoder still runs once for each image.
        generation: options of the captioner's `generate`. With `num_return_sequences` a row has several captions.

    Returns:
        One [`CaptionedRow`] for each row, in order. A score is computed from the logits of the model without the
        decoding options, and counts the token that ends the caption.

    Raises:
        ValueError: if the model has no processor, if the number of prompts is not that of the rows, or for options that
            contradict each other.

    Example:

    ```python
    >>> model = load_captioner("outputs/own_images")  # doctest: +SKIP
    >>> caption_rows(model, ["dog.jpg", b"damaged"], score=True)  # doctest: +SKIP
    [CaptionedRow(captions=['a dog in the snow'], scores=[-0.81], matching_scores=[], error=None),
     CaptionedRow(captions=[], scores=[], matching_scores=[], error='The image content of 7 bytes cannot be read ...')]
    ```
    """
    prompts = [prompt] * len(images) if prompt is None or isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(images):
        raise ValueError(f"There are {len(images)} rows but {len(prompts)} prompts: give one prompt, or one for each.")
    rows = [CaptionedRow() for _ in images]
    opened: dict[str, dict[int, Any]] = {"images": {}, "image_embeds": {}}  # by name of the processor's argument
    for number, image in enumerate(images):
        try:
            name, content = open_row(model, image)
            opened[name][number] = content
        except (OSError, TypeError, ValueError) as error:
            rows[number].error = one_line(error)
    with onednn_linears(model.device), torch.no_grad():
        for name, contents in opened.items():
            if contents:
                texts = [prompts[number] or "" for number in contents]
                captioned = caption_opened(model, {name: list(contents.values())}, texts, score, **generation)
                for number, row in zip(contents, captioned, strict=True):
                    rows[number] = row
    return rows


def open_row(model: "QFormerCaptioningModel", image: Any) -> tuple[str, Any]:
    """Open what a row holds, as described in [`caption_rows`].

    Returns:
        The name of the processor's argument (`"images"` or `"image_embeds"`), and an upright RGB image, the frames of a
        video, or features float32 `[N, Dv]`.

    Raises:
        OSError, TypeError, ValueError: if the row cannot be read; the message says why.
    """
    if isinstance(image, Exception):
        raise image
    width = model.qformer.config.encoder_hidden_size
    if isinstance(image, str) and image.lower().endswith(FEATURES_SUFFIX):
        return "image_embeds", load_features(image, width)
    if isinstance(image, Mapping) and "image_embeds" in image:
        return "image_embeds", check_features(np.asarray(image["image_embeds"]), width, "of the row")
    if not model.config.has_vision_model:
        if isinstance(image, np.ndarray | torch.Tensor):
            return "image_embeds", check_features(np.asarray(image), width, "of the row")
        raise OSError(
            f"The captioner was trained on features and has no vision encoder for {reprlib.repr(image)}: give "
            f"features, as arrays or files of numpy ({FEATURES_SUFFIX})."
        )
    if not isinstance(image, list | tuple):
        return "images", open_image(image)
    num_frames = model.required_processor().num_frames
    if not image or (len(image) > 1 and num_frames == 1):
        raise OSError(f"The row has {len(image)} images, and the captioner reads one.")
    frames = [open_image(frame) for frame in sample_frames(image, num_frames)]
    return "images", frames[0] if len(frames) == 1 else frames


def caption_opened(
    model: "QFormerCaptioningModel",
    contents: dict[str, list[Any]],
    prompts: list[str],
    score: bool,
    **generation: Any,
) -> list[CaptionedRow]:
    """Caption images or features that can be read.

    Args:
        model: the captioner.
        contents: the images or features by name of the processor's argument.
        prompts: prompt of each; an empty prompt is the captioner's own.
        score: compute scores, too.
        generation: options of the captioner's `generate`.
    """
    processor = model.required_processor()
    inputs = processor(**contents, text=prompts).to(model.input_device)
    if score:  # `generate` and the scores share the features
        inputs = with_features(model, inputs)
    ids = model.generate(**inputs, **{**generation, "return_dict_in_generate": False})  # type: ignore[misc]
    assert isinstance(ids, torch.Tensor)
    texts = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    count = len(texts) // len(prompts)  # K
    rows = [CaptionedRow(texts[start : start + count]) for start in range(0, len(texts), count)]
    if score:
        scores = score_captions(model, inputs, ids.view(len(prompts), count, -1), **generation)
        matches = match_captions(model, inputs, rows, prompts)
        for row, own_scores, own_matches in zip(rows, scores, matches, strict=True):
            row.scores, row.matching_scores = own_scores, own_matches
    return rows


def with_features(model: "QFormerCaptioningModel", inputs: BatchFeature) -> dict[str, Any]:
    """Return inputs of a model with the features of the images in place of the images.

    Args:
        model: the captioner.
        inputs: what its processor returns.
    """
    if "image_embeds" in inputs:
        return dict(inputs)
    of_images = {name: inputs[name] for name in ("pixel_values", *VISION_INPUTS) if name in inputs}
    outputs = encode_images(model.vision_model, **of_images)
    features = {"image_embeds": outputs.last_hidden_state, "image_attention_mask": outputs.attention_mask}
    return {**{name: value for name, value in inputs.items() if name not in of_images}, **features}


def score_captions(
    model: "QFormerCaptioningModel", inputs: dict[str, Any], ids: torch.Tensor, **generation: Any
) -> list[list[float]]:
    """Return the mean log-likelihood of the tokens of captions, in nats.

    Args:
        model: the captioner.
        inputs: features and prompts that the captions belong to.
        ids (`[B, K, T]`): what `generate` returned for them.
        generation: options of `generate`.
    """
    config = generation_config_of(model, generation)
    ends = ids.new_tensor([] if config.eos_token_id is None else config.eos_token_id).flatten()
    is_end = torch.isin(ids, ends)
    is_padding = (ids == config.pad_token_id).flip(-1).cumprod(dim=-1).flip(-1).bool() & ~is_end  # after stop strings
    has_ended = is_end.cumsum(dim=-1) > is_end.long()  # before this token
    labels = ids.masked_fill(has_ended | is_padding, -100)
    if isinstance(model, QFormerDecodingModel):
        losses = model.caption_losses(labels, **inputs)
    else:
        losses = model(**inputs, labels=labels, skip_logits=True).losses  # [B, K]
    return (-losses / (labels != -100).sum(dim=-1).clamp(min=1)).tolist()


def match_captions(
    model: "QFormerCaptioningModel", inputs: dict[str, Any], rows: Sequence[CaptionedRow], prompts: Sequence[str]
) -> list[list[float]]:
    """Return the probability that each caption, after its prompt, describes its image, or empty lists.

    Args:
        model: the captioner. Only one of stage 1 that was trained to match gives probabilities.
        inputs: features of the images.
        rows: their captions.
        prompts: what the captions of each row continue.
    """
    if not gives_matching_scores(model):
        return [[] for _ in rows]
    assert isinstance(model, QFormerForPretraining)
    texts = [f"{prompt} {text}".strip() for row, prompt in zip(rows, prompts, strict=True) for text in row.captions]
    tokens = model.required_processor()(text=texts, max_length=model.qformer.config.max_position_embeddings)
    count = len(texts) // len(rows)
    logits = model.get_matching_logits(
        **tokens.to(model.input_device),
        image_embeds=inputs["image_embeds"],
        image_attention_mask=inputs.get("image_attention_mask"),
        image_of_text=torch.arange(len(rows), device=model.input_device).repeat_interleave(count),
    )
    return logits.float().softmax(dim=1)[:, 1].view(len(rows), count).tolist()


def gives_matching_scores(model: "QFormerCaptioningModel") -> bool:
    """Return True if the model has a head that was trained to match images and texts."""
    return isinstance(model, QFormerForPretraining) and bool(model.config.itm_weight)


def captions_of_a_row(model: "QFormerCaptioningModel", generation: dict[str, Any]) -> int:
    """Return the number of captions of each row.

    Args:
        model: the captioner.
        generation: options of its `generate`.
    """
    return generation_config_of(model, generation).num_return_sequences or 1


def generation_config_of(model: "QFormerCaptioningModel", generation: dict[str, Any]) -> GenerationConfig:
    """Return all decoding options, with those of the captioner that `generation` does not set."""
    options = {name: value for name, value in generation.items() if name != "generation_config"}
    defaults, given = model.generation_config, generation.get("generation_config")
    assert defaults is not None
    config, _ = resolve_generation_config(model.config, defaults, given, options)
    return config
