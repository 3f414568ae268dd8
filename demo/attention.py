"""Where a captioner looks: the patches that each query of its Q-Former reads, and those that each word comes from.

Per query: the cross-attention of that query, averaged over layers and heads. Per word: gradient x attention (Chefer et
al. 2021, arXiv 2103.15679), `A * d log-odds(word) / dA` where it is positive, averaged over layers and heads and summed
over the queries: how much a weight of cross-attention speaks for the word, and against all that could stand in its
place. It asks the language model for gradients only, so it is the same for every language model.

What the maps do not say: a patch's features know of its neighbours, so the map is of what was read and not of what was
drawn there; gradients hold for small changes; and what speaks against a word is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase

SIDE = 336  # pixels of an overlay's longer side


@dataclass
class Seen:
    """An image as a captioner sees it.

    Args:
        picture: resized and cropped, as it goes into the vision encoder.
        inputs: its features `[1, N, Dv]` and the prompt, for `generate` and `forward`.
        grid: rows and columns of patches; the last `rows * columns` of the N features are theirs. `None` where the
            vision encoder has no such grid.
    """

    picture: Image.Image
    inputs: BatchFeature
    grid: tuple[int, int] | None


@dataclass
class Word:
    """A word of a caption: its probability, where it looks `[rows, columns]`, and each query's share in it `[Q]`."""

    text: str
    probability: float
    patches: np.ndarray
    queries: np.ndarray


@dataclass
class Maps:
    """Where the queries look `[Q, rows, columns]`, what share of their attention that is `[Q]`, and the words."""

    queries: np.ndarray
    on_patches: np.ndarray
    words: list[Word]


@torch.no_grad()
def see(model: PreTrainedModel, image: Image.Image, prompt: str | None = None) -> Seen:
    """Run the vision encoder once, for all that comes behind it."""
    inputs = model.processor(images=image, text=prompt or None).to(model.device)
    pixels = inputs.pop("pixel_values")  # [1, 3, H, W]
    inputs["image_embeds"] = model.get_image_features(pixels)
    grid = patch_grid(pixels.shape[-2:], model.config.vision_config, inputs["image_embeds"].shape[1])
    return Seen(_as_picture(pixels[0], model.processor.image_processor), inputs, grid)


def patch_grid(size: tuple[int, int], vision_config, tokens: int) -> tuple[int, int] | None:
    """Rows and columns of patches among so many tokens.

    Class and register tokens stand in front of the patches (CLIP and ViT have one, DINOv2 up to five, SigLIP none). An
    encoder that merges patches (Swin) keeps a square of them.

    >>> from types import SimpleNamespace
    >>> patch_grid((224, 224), SimpleNamespace(patch_size=14), 257)
    (16, 16)
    >>> patch_grid((224, 224), SimpleNamespace(patch_size=4), 49)
    (7, 7)
    """
    patch = getattr(vision_config, "patch_size", None)
    if patch is not None:
        height, width = (patch, patch) if isinstance(patch, int) else patch
        rows, columns = size[0] // height, size[1] // width
        if 0 < rows * columns <= tokens:
            return rows, columns
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None


def look(model: PreTrainedModel, seen: Seen, ids: list[int]) -> Maps:
    """Where the queries look, and where each word of a caption does.

    Args:
        model: a captioner whose Q-Former has eager attention; not run by two threads at once.
        seen: what [`see`] returns, with a grid.
        ids: tokens of the caption, end-of-sequence included.
    """
    rows, columns = seen.grid
    # Also where nothing trains, there is a graph from here on.
    features = seen.inputs["image_embeds"].detach().requires_grad_()
    labels = torch.tensor([ids], device=features.device)
    with torch.enable_grad(), _cross_attentions(model.qformer) as attentions:  # of each layer [1, heads, Q, N]
        logits = model(**{**seen.inputs, "image_embeds": features}, labels=labels).logits[0].float()  # [T, V]
        own = logits.gather(1, labels.T)[:, 0]
        others = logits.scatter(1, labels.T, -torch.inf).logsumexp(dim=1)
        log_odds = own - others  # its gradient does not vanish where the model is sure, as that of log p does
    log_probabilities = nn.functional.logsigmoid(log_odds.detach())
    attended = torch.stack([weights.detach() for weights in attentions]).mean(dim=(0, 1, 2))  # [Q, N]
    patches = attended[:, -rows * columns :]

    words = []
    for text, places in split_words(model.processor.tokenizer, ids):
        target = log_odds[places].sum()
        gradients = torch.autograd.grad(target, attentions, retain_graph=True)
        spoken = torch.stack([(a * g).clamp(min=0) for a, g in zip(attentions, gradients, strict=True)]).detach()
        relevance = spoken.mean(dim=(0, 1, 2)).float().cpu().numpy()  # [Q, N]
        share = relevance.sum(axis=1)
        words.append(
            Word(
                text,
                log_probabilities[places].sum().exp().item(),
                relevance.sum(axis=0)[-rows * columns :].reshape(rows, columns),
                share / max(share.sum(), np.finfo(np.float32).tiny),
            )
        )
    return Maps(
        patches.reshape(-1, rows, columns).float().cpu().numpy(), patches.sum(dim=1).float().cpu().numpy(), words
    )


@contextmanager
def _cross_attentions(qformer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the weights of cross-attention, with their graph, of every layer that looks at the image.

    `output_attentions=True` would give the same of a Q-Former alone; here they are wanted from within a captioner.
    """
    kept = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: kept.append(output[1]))
        for name, module in qformer.named_modules()
        if name.endswith("crossattention.attention")
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def score(model: PreTrainedModel, seen: Seen, ids: list[int]) -> torch.Tensor:
    """Log-probability of each token of a caption `[T]`, whichever search found it."""
    labels = torch.tensor([ids], device=model.device)
    logits = model(**seen.inputs, labels=labels).logits[0]
    return logits.float().log_softmax(dim=-1).gather(1, labels.T)[:, 0]


def split_words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Words of a caption, each with the places of its tokens; special tokens belong to none."""
    special = set(tokenizer.all_special_ids)
    words: list[tuple[str, list[int]]] = []
    waiting: list[int] = []
    before = ""
    for place, token in enumerate(ids):
        if token in special:
            continue
        waiting.append(place)
        text = tokenizer.decode(ids[: place + 1], skip_special_tokens=True)
        piece = text[len(before) :]
        if not piece.strip() or piece.endswith("\ufffd"):  # a space, or the first bytes of a character
            continue
        if words and not piece[0].isspace() and piece[0] not in ".,;:!?":  # goes on with a word that was begun
            words[-1] = (words[-1][0] + piece, words[-1][1] + waiting)
        else:
            words.append((piece.strip(), waiting))
        before, waiting = text, []
    return words


def overlay(picture: Image.Image, patches: np.ndarray) -> Image.Image:
    """The picture, each patch as bright as it is looked at; the one that is looked at most keeps all of its light."""
    scale = SIDE / max(picture.size)
    size = tuple(round(side * scale) for side in picture.size)
    light = patches / max(patches.max(), np.finfo(np.float32).tiny)
    light = Image.fromarray((255 * (0.12 + 0.88 * light)).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    return Image.composite(picture, Image.new("RGB", size), light)


def _as_picture(pixels: torch.Tensor, image_processor) -> Image.Image:
    """Undo the normalisation of pixel values `[3, H, W]`."""
    pixels = pixels.float().cpu()
    if image_processor.do_normalize:
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
        )
        pixels = pixels * std + mean
    return Image.fromarray((255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy())
