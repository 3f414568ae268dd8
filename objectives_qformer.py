"""Objectives of stage 1: contrast of images and texts, hard negatives for matching, and features of other processes.

The losses are those of BLIP-2 (arXiv 2301.12597, section 3.2) as LAVIS computes them, and SigLIP's (arXiv 2303.15343).

Shapes: N images and M texts of a batch, of all processes. Text j belongs to image `image_of_text[j]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient

# ----------------------------------------------------------------------------------------------------------------------
# Contrast and negatives
# ----------------------------------------------------------------------------------------------------------------------


def right_pairs(num_images: int, image_of_text: torch.Tensor, text_numbers: torch.Tensor) -> torch.Tensor:
    """Return which texts are right for which image, bool `[N, M]`: its own texts, and all texts equal to one of them.

    Args:
        num_images: number of images, N.
        image_of_text (`[M]`, long): image of each text.
        text_numbers (`[M]`, long): numbers from 0 to M - 1, the same one for equal texts.

    Example:

    ```python
    >>> right_pairs(3, torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 0])).tolist()
    [[True, False, False, True], [False, True, True, False], [True, False, False, True]]
    ```
    """
    has_text = torch.zeros(num_images, len(text_numbers), dtype=torch.bool, device=text_numbers.device)
    has_text[image_of_text, text_numbers] = True
    return has_text[:, text_numbers]


def softmax_contrast(logits: torch.Tensor, is_right: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Return the mean cross-entropy of choosing a text for each image, and an image for each text.

    All texts that are right for an image are equally right, as in LAVIS' fine-tuning on COCO.

    Args:
        logits (`[N, M]`): similarities of images and texts, divided by the temperature.
        is_right (`[N, M]`, bool): which texts are right for which image, as [`right_pairs`] returns it.
        label_smoothing: share of the target probability that is spread over all candidates.

    Example:

    ```python
    >>> softmax_contrast(torch.eye(2) * 100, torch.eye(2).bool(), 0.0)
    tensor(0.)
    ```
    """
    losses = []
    for scores, right in ((logits, is_right), (logits.t(), is_right.t())):
        right = right.to(logits.dtype)
        targets = (1 - label_smoothing) * right / right.sum(dim=1, keepdim=True) + label_smoothing / right.shape[1]
        losses.append(-(targets * scores.log_softmax(dim=1)).sum(dim=1).mean())
    return (losses[0] + losses[1]) / 2


def sigmoid_contrast(logits: torch.Tensor, is_right: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of all pairs of image and text, summed over images, mean over texts (SigLIP).

    Args:
        logits (`[N, M]`): scaled similarities of images and texts plus the bias.
        is_right (`[N, M]`, bool): which texts are right for which image, as [`right_pairs`] returns it.

    Example:

    ```python
    >>> sigmoid_contrast(torch.tensor([[100.0, -100.0], [-100.0, 100.0]]), torch.eye(2).bool()).item() == 0
    True
    ```
    """
    signs = torch.where(is_right, 1.0, -1.0).to(logits.dtype)
    return -nn.functional.logsigmoid(signs * logits).sum() / logits.shape[1]


def draw_negatives(
    logits: torch.Tensor, is_right: torch.Tensor, image_of_text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a wrong image for each text, and for each text another text that is wrong for its image.

    The probability is the softmax of the logits, so hard negatives are drawn more often. A right pair is drawn only for
    a text or an image that is right with all others, and must then not count.

    Args:
        logits (`[N, M]`): similarities of images and texts, divided by the temperature.
        is_right (`[N, M]`, bool): which texts are right for which image, as [`right_pairs`] returns it.
        image_of_text (`[M]`, long): image of each text.

    Returns:
        Indices of images and of texts, each `[M]`.

    Raises:
        ValueError: if there is only one image.

    Example:

    ```python
    >>> draw_negatives(torch.zeros(2, 2), torch.eye(2).bool(), torch.tensor([0, 1]))
    (tensor([1, 0]), tensor([1, 0]))
    ```
    """
    if len(is_right) < 2:
        raise ValueError(
            "Matching needs texts of at least two images in a batch, to choose wrong pairs: use larger batches, or "
            "`itm_weight=0`."
        )
    wrong = logits.detach().float().masked_fill(is_right, -torch.inf)

    def probabilities(scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(scores.isneginf().all(dim=1, keepdim=True), 0).softmax(dim=1)

    images = probabilities(wrong.t()).multinomial(1).squeeze(1)
    texts = probabilities(wrong)[image_of_text].multinomial(1).squeeze(1)
    return images, texts


class ChunkedMatching(torch.autograd.Function):
    """Matching loss of many pairs, in chunks: its sum `[]`, and the logits of each pair `[R, 2]`.

    The forward pass runs a chunk forward and backward, keeps the gradients of inputs and weights, and frees all else.
    Nothing is computed twice, and the memory depends on the size of a chunk. Only the sum has a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        match: Callable[[slice, slice, Sequence[torch.Tensor]], torch.Tensor],  # pairs, images, their keys -> logits
        chunks: Sequence[tuple[slice, slice]],  # pairs and their images
        is_match: torch.Tensor,  # [R], bool
        counts: torch.Tensor,  # [R], how often each pair counts
        num_keys: int,
        *inputs: torch.Tensor,  # keys and values of images, then trainable weights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, weights = inputs[:num_keys], inputs[num_keys:]
        needs_gradients = any(ctx.needs_input_grad)
        key_gradients = [torch.zeros_like(key) for key in keys] if needs_gradients else []
        weight_gradients: list[torch.Tensor] = []
        losses, logits = [], []
        for pairs, images in chunks:
            with torch.set_grad_enabled(needs_gradients):
                own_keys = [key[images].detach().requires_grad_() for key in keys]
                logits.append(match(pairs, images, own_keys).float())
                each = nn.functional.cross_entropy(logits[-1], is_match[pairs].long(), reduction="none")
                losses.append((each * counts[pairs]).sum())
            if needs_gradients:
                gradients = torch.autograd.grad(
                    losses[-1], [*own_keys, *weights], allow_unused=True, materialize_grads=True
                )
                for total, gradient in zip(key_gradients, gradients[:num_keys], strict=True):
                    total[images] += gradient
                of_weights = gradients[num_keys:]
                weight_gradients = [*map(torch.Tensor.add_, weight_gradients, of_weights)] or [*of_weights]
        ctx.save_for_backward(*key_gradients, *weight_gradients)
        all_logits = torch.cat(logits).detach()
        ctx.mark_non_differentiable(all_logits)
        return torch.stack(losses).detach().sum(), all_logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place, to save the memory of another copy. A second backward pass raises an error.
        gradients = (gradient.mul_(grad_outputs[0]) for gradient in ctx.saved_tensors)
        return None, None, None, None, None, *gradients


# ----------------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------------


def num_processes() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place_in_batch(count: int, device: torch.device) -> tuple[int, int]:
    """Return the place of the first row of this process among those of all processes, and the number of all rows.

    Args:
        count: number of rows of this process.
        device: device of the process group.
    """
    if num_processes() == 1:
        return 0, count
    counts = torch.cat(gather_rows(torch.tensor([count], device=device))).tolist()
    return sum(counts[: dist.get_rank()]), sum(counts)


def gather_rows(rows: torch.Tensor, with_gradient: bool = False) -> list[torch.Tensor]:
    """Return the rows of each process. Rows of another length are padded with zeros.

    Args:
        rows (`[n, ...]`): rows of this process. n may differ, and other sizes may, too.
        with_gradient: send gradients back to the process of each row.
    """
    if num_processes() == 1:
        return [rows]
    shape = torch.tensor(rows.shape, device=rows.device)
    shapes = [torch.empty_like(shape) for _ in range(num_processes())]
    dist.all_gather(shapes, shape)
    largest = torch.stack(shapes).amax(dim=0).tolist()
    missing = [total - own for own, total in zip(rows.shape, largest, strict=True)]
    padded = nn.functional.pad(rows, [side for count in reversed(missing) for side in (0, count)]).contiguous()
    if with_gradient:
        gathered = all_gather_with_gradient(padded)
    else:
        gathered = [torch.empty_like(padded) for _ in range(num_processes())]
        dist.all_gather(gathered, padded.detach())
    return [part[: int(shape[0])] for part, shape in zip(gathered, shapes, strict=True)]


def gather_features(features: torch.Tensor) -> torch.Tensor:
    """Return features of all processes, `[n, ...]` -> `[sum of n, ...]`. Only those of this process have a gradient.

    Each process can then compute the loss of the whole batch. Its gradient with respect to the features of this process
    is exact, and no gradients have to be sent.
    """
    if num_processes() == 1:
        return features
    parts = gather_rows(features)
    parts[dist.get_rank()] = features
    return torch.cat(parts)


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor of the main process."""
    if num_processes() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the tensor with its gradient multiplied by `factor`.

    Example:

    ```python
    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> scale_gradient(x, 3.0).backward()
    >>> x.grad
    tensor(3.)
    ```
    """
    return tensor if factor == 1 else tensor.detach() + factor * (tensor - tensor.detach())
