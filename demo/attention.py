"""Maps of the image patches that the queries of a Q-Former attend to, and that each word of a caption depends on.

Map of a query: its cross-attention weights, averaged over layers and heads. Map of a word: gradient x attention
(Chefer et al. 2021, arXiv 2103.15679), the positive part of `A * d log-odds(word) / dA`, averaged over layers and heads
and summed over queries. It shows how much the cross-attention weights `A` increase the probability of the word. It
needs only gradients of the language model, so it works for all language models.

The maps have limits. The features of a patch also describe its neighbours, so a map shows which patches were used, but
not which of their content. Gradients describe small changes only. Evidence against a word is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OVERLAY_SIZE = 336  # pixels of the longer side
DARKEST = 0.12  # brightness of a patch with weight 0


@dataclass
class EncodedImage:
    """Image after the processor and the vision encoder.

    Args:
        picture: the resized and cropped image that the vision encoder reads.
        inputs: image features `[1, N, Dv]` and the tokens of the prompt, for `generate` and `forward`.
        grid: rows and columns of patches; the last `rows * columns` of the N features belong to patches. `None` if the
            features do not form a grid.
    """

    picture: Image.Image
    inputs: BatchFeature
    grid: tuple[int, int] | None


@dataclass
class WordMap:
    """A word of a caption.

    Args:
        text: the word.
        probability: its probability, given the words before it.
        patches: relevance of each patch, `[rows, columns]`.
        queries: share of each query in the relevance, `[Q]`.
    """

    text: str
    probability: float
    patches: np.ndarray
    queries: np.ndarray


@dataclass
class AttentionMaps:
    """Maps of an image and a caption.

    Args:
        queries: cross-attention weight of each patch, `[Q, rows, columns]`.
        patch_share: sum of these weights for each query, `[Q]`. The rest goes to class and register tokens.
        words: the words of the caption.
    """

    queries: np.ndarray
    patch_share: np.ndarray
    words: list[WordMap]


@torch.no_grad()
def encode_image(model: PreTrainedModel, image: Image.Image, prompt: str | None = None) -> EncodedImage:
    """Run the vision encoder once, for all captions and maps of an image.

    Args:
        model: a captioner with a processor.
        image: an RGB image.
        prompt: text that captions continue, by default the captioner's own prompt.
    """
    inputs = model.processor(images=image, text=prompt or None).to(model.device)
    pixel_values = inputs.pop("pixel_values")  # [1, 3, H, W]
    inputs["image_embeds"] = model.encode_images(pixel_values).last_hidden_state
    grid = patch_grid(pixel_values.shape[-2:], model.config.vision_config, inputs["image_embeds"].shape[1])
    return EncodedImage(_to_picture(pixel_values[0], model.processor.image_processor), inputs, grid)


def patch_grid(size: tuple[int, int], vision_config: PreTrainedConfig, num_features: int) -> tuple[int, int] | None:
    """Return the rows and columns of patches among the features of an image, or `None` if there is no grid.

    Class and register tokens come before the patches (CLIP and ViT have 1, DINOv2 up to 5, SigLIP 0). An encoder that
    merges patches (Swin) has no such tokens and keeps a square of patches.

    Args:
        size: height and width of the pixel values.
        vision_config: configuration of the vision encoder.
        num_features: number of image features, N.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> patch_grid((224, 224), SimpleNamespace(patch_size=14), 257)
    (16, 16)
    >>> patch_grid((224, 224), SimpleNamespace(patch_size=4), 49)
    (7, 7)
    ```
    """
    patch_size = getattr(vision_config, "patch_size", None)
    if patch_size is not None:
        height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        rows, columns = size[0] // height, size[1] // width
        if 0 < rows * columns <= num_features:
            return rows, columns
    side = round(num_features**0.5)
    return (side, side) if side * side == num_features else None


def attention_maps(model: PreTrainedModel, image: EncodedImage, token_ids: list[int]) -> AttentionMaps:
    """Compute the maps of the queries and of the words of a caption.

    Args:
        model: a captioner whose Q-Former has eager attention. Two threads must not run it at once.
        image: an image with a grid of patches.
        token_ids: tokens of the caption, end-of-sequence included.

    Raises:
        ValueError: if the features of the image do not form a grid.
    """
    if image.grid is None:
        raise ValueError("The vision encoder has no grid of patches to draw maps on.")
    rows, columns = image.grid
    log_odds, attentions = _log_odds(model, image, token_ids)
    log_probs = nn.functional.logsigmoid(log_odds.detach())
    weights = torch.stack([weights.detach() for weights in attentions]).mean(dim=(0, 1, 2)).float().cpu()  # [Q, N]
    on_patches = weights[:, -rows * columns :]

    words = []
    for text, positions in split_words(model.processor.tokenizer, token_ids):
        relevance = _relevance(log_odds[positions].sum(), attentions)  # [Q, N]
        share = relevance.sum(axis=1)
        words.append(
            WordMap(
                text,
                log_probs[positions].sum().exp().item(),
                relevance.sum(axis=0)[-rows * columns :].reshape(rows, columns),
                share / max(share.sum(), np.finfo(np.float32).tiny),
            )
        )
    return AttentionMaps(on_patches.reshape(-1, rows, columns).numpy(), on_patches.sum(dim=1).numpy(), words)


def _log_odds(
    model: PreTrainedModel, image: EncodedImage, token_ids: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the log-odds of each token `[T]`, and the cross-attention weights `[1, heads, Q, N]` that they depend on.

    The gradient of log-probabilities vanishes where the model is certain. The gradient of log-odds does not.
    """
    # The features require gradients, so that a graph is recorded even if all parameters are frozen.
    features = image.inputs["image_embeds"].detach().requires_grad_()
    labels = torch.tensor([token_ids], device=features.device)
    with torch.enable_grad(), _record_cross_attentions(model.qformer) as attentions:
        logits = model(**{**image.inputs, "image_embeds": features}, labels=labels).logits[0].float()  # [T, V]
        chosen = logits.gather(1, labels.T)[:, 0]
        others = logits.scatter(1, labels.T, -torch.inf).logsumexp(dim=1)
        return chosen - others, attentions


def _relevance(target: torch.Tensor, attentions: list[torch.Tensor]) -> np.ndarray:
    """Return gradient x attention of a scalar, `[Q, N]`: the positive part, averaged over layers and heads."""
    gradients = torch.autograd.grad(target, attentions, retain_graph=True)
    products = [(weights * gradient).clamp(min=0) for weights, gradient in zip(attentions, gradients, strict=True)]
    return torch.stack(products).detach().mean(dim=(0, 1, 2)).float().cpu().numpy()


@contextmanager
def _record_cross_attentions(qformer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the cross-attention weights of each layer, with their graph, during a forward pass.

    `output_attentions=True` returns the same weights, but only when the Q-Former is called without its captioner.
    """
    attentions: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: attentions.append(output[1]))
        for name, module in qformer.named_modules()
        if name.endswith("crossattention.attention")
    ]
    try:
        yield attentions
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, image: EncodedImage, token_ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token of a caption, `[T]`, for any decoding method.

    Args:
        model: the captioner.
        image: the image.
        token_ids: tokens of the caption, end-of-sequence included.
    """
    labels = torch.tensor([token_ids], device=model.device)
    logits = model(**image.inputs, labels=labels).logits[0]
    return logits.float().log_softmax(dim=-1).gather(1, labels.T)[:, 0]


def split_words(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[tuple[str, list[int]]]:
    """Split a caption into words, each with the positions of its tokens. Special tokens belong to no word."""
    special_ids = set(tokenizer.all_special_ids)
    words: list[tuple[str, list[int]]] = []
    pending: list[int] = []  # positions of tokens that are not part of a word yet
    previous_text = ""
    for position, token_id in enumerate(token_ids):
        if token_id in special_ids:
            continue
        pending.append(position)
        text = tokenizer.decode(token_ids[: position + 1], skip_special_tokens=True)
        piece = text[len(previous_text) :]
        if not piece.strip() or piece.endswith("\ufffd"):  # a space, or the first bytes of a character
            continue
        if words and not piece[0].isspace() and piece[0] not in ".,;:!?":  # continues the last word
            words[-1] = (words[-1][0] + piece, words[-1][1] + pending)
        else:
            words.append((piece.strip(), pending))
        previous_text, pending = text, []
    return words


def overlay(picture: Image.Image, patches: np.ndarray) -> Image.Image:
    """Darken a picture so that the brightness of a patch shows its weight.

    Args:
        picture: the image.
        patches: weight of each patch, `[rows, columns]`. The patch with the largest weight keeps its full brightness.
    """
    scale = OVERLAY_SIZE / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    brightness = DARKEST + (1 - DARKEST) * patches / max(patches.max(), np.finfo(np.float32).tiny)
    mask = Image.fromarray((255 * brightness).astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return Image.composite(picture, Image.new("RGB", (width, height)), mask)


def _to_picture(pixel_values: torch.Tensor, image_processor) -> Image.Image:
    """Undo the normalisation of pixel values `[3, H, W]`."""
    pixel_values = pixel_values.float().cpu()
    if image_processor.do_normalize:
        mean = torch.tensor(image_processor.image_mean)[:, None, None]
        std = torch.tensor(image_processor.image_std)[:, None, None]
        pixel_values = pixel_values * std + mean
    return Image.fromarray((255 * pixel_values.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy())
