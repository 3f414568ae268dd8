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


def right_pairs(num_images: int, image_of_text: torch.Tensor) -> torch.Tensor:
    """Return which texts belong to which image, bool `[N, M]`.

    Args:
        num_images: number of images, N.
        image_of_text (`[M]`, long): image of each text.

    Example:

    ```python
    >>> right_pairs(2, torch.tensor([0, 1, 1])).tolist()
    [[True, False, False], [False, True, True]]
    ```
    """
    return image_of_text == torch.arange(num_images, device=image_of_text.device)[:, None]


def softmax_contrast(logits: torch.Tensor, image_of_text: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Return the mean cross-entropy of choosing a text for each image, and the image for each text.

    All texts of an image are equally right, as in LAVIS' fine-tuning on COCO.

    Args:
        logits (`[N, M]`): similarities of images and texts, divided by the temperature.
        image_of_text (`[M]`, long): image of each text. Each image has a text.
        label_smoothing: share of the target probability that is spread over all candidates.

    Example:

    ```python
    >>> softmax_contrast(torch.eye(2) * 100, torch.tensor([0, 1]), 0.0)
    tensor(0.)
    ```
    """
    is_right = right_pairs(len(logits), image_of_text).to(logits.dtype)  # [N, M]
    losses = []
    for scores, right in ((logits, is_right), (logits.t(), is_right.t())):
        targets = (1 - label_smoothing) * right / right.sum(dim=1, keepdim=True) + label_smoothing / right.shape[1]
        losses.append(-(targets * scores.log_softmax(dim=1)).sum(dim=1).mean())
    return (losses[0] + losses[1]) / 2


def sigmoid_contrast(logits: torch.Tensor, image_of_text: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of all pairs of image and text, summed over images, mean over texts (SigLIP).

    Args:
        logits (`[N, M]`): scaled similarities of images and texts plus the bias.
        image_of_text (`[M]`, long): image of each text.

    Example:

    ```python
    >>> sigmoid_contrast(torch.tensor([[100.0, -100.0], [-100.0, 100.0]]), torch.tensor([0, 1])).item() == 0
    True
    ```
    """
    is_right = right_pairs(len(logits), image_of_text)
    signs = torch.where(is_right, 1.0, -1.0).to(logits.dtype)
    return -nn.functional.logsigmoid(signs * logits).sum() / len(image_of_text)


def draw_negatives(logits: torch.Tensor, image_of_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a wrong image for each text, and for each text another text that is wrong for its image.

    The probability is the softmax of the logits, so hard negatives are drawn more often. Other texts of the same image
    are never drawn.

    Args:
        logits (`[N, M]`): similarities of images and texts, divided by the temperature.
        image_of_text (`[M]`, long): image of each text.

    Returns:
        Indices of images and of texts, each `[M]`.

    Raises:
        ValueError: if there is only one image with texts.

    Example:

    ```python
    >>> draw_negatives(torch.zeros(2, 2), torch.tensor([0, 1]))
    (tensor([1, 0]), tensor([1, 0]))
    ```
    """
    is_right = right_pairs(len(logits), image_of_text)
    if bool(is_right.all(dim=1).any()):
        raise ValueError(
            "Matching needs texts of at least two images in a batch, to choose wrong pairs: use larger batches, or "
            "`itm_weight=0`."
        )
    wrong = logits.detach().float().masked_fill(is_right, -torch.inf)
    images = wrong.t().softmax(dim=1).multinomial(1).squeeze(1)
    texts = wrong.softmax(dim=1)[image_of_text].multinomial(1).squeeze(1)
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


def first_of_process(count: int, device: torch.device) -> int:
    """Return the number of the first row of this process among the rows of all processes, of which this has `count`."""
    if num_processes() == 1:
        return 0
    counts = gather_rows(torch.tensor([count], device=device))
    return int(sum(counts[: dist.get_rank()], start=torch.zeros(1, device=device)))


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
