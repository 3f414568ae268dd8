"""Features of rows of any lengths, and their masks.

Shapes: B rows, F frames of a video, N features of a row or of a frame, Dv their width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import is_tracing


def feature_mask(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return a mask of features as bool on their device.

    Args:
        features (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos): the features.
        mask (`[B, N]` or `[B, F, N]`): 1 or `True` for a feature, 0 or `False` for padding.

    Raises:
        ValueError: if the mask has another shape, or holds other values.
    """
    mask = torch.as_tensor(mask, device=features.device)
    if mask.shape != features.shape[:-1]:
        raise ValueError(
            f"The mask of the features (`image_attention_mask` of a captioner) has the shape {list(mask.shape)}, "
            f"but the features need {list(features.shape[:-1])}: 1 for each feature, 0 for padding."
        )
    return bool_mask("The mask of the features (`image_attention_mask` of a captioner)", mask, features.device)


def bool_mask(name: str, mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a mask as bool on a device.

    Args:
        name: what messages call the mask.
        mask: 1 or `True` for what is real, 0 or `False` for padding.
        device: the device.

    Raises:
        ValueError: if the mask holds other values.
    """
    if mask.dtype != torch.bool and not is_tracing(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name} holds other values than 1 for what is real and 0 for padding. It is not added to attention scores."
        )
    return mask.to(device).bool()


def pad_features(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return rows of features of any lengths as one batch, padded with zeros.

    Args:
        rows: tensors, arrays or lists `[N, Dv]`. N may differ.

    Returns:
        `image_embeds` (`[B, N, Dv]`) and, only if rows differ in length, `image_attention_mask` (bool `[B, N]`).

    Raises:
        TypeError: if a row does not hold numbers.
        ValueError: if there are no rows, a row has another shape, or rows differ in width.

    Example:

    ```python
    >>> batch = pad_features([torch.ones(2, 3), torch.ones(1, 3)])
    >>> batch["image_attention_mask"].tolist()
    [[True, True], [True, False]]
    ```
    """
    if len(rows) == 0:
        raise ValueError("There are no rows of features in `image_embeds`.")
    tensors = []
    for number, row in enumerate(rows):
        try:
            tensors.append(torch.as_tensor(row))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"Row {number} of the features (`image_embeds`) is a {type(row).__name__!r} that cannot be read "
                "as numbers: give a tensor, an array or lists [N, D]."
            ) from error
        if tensors[-1].ndim != 2 or 0 in tensors[-1].shape:
            raise ValueError(
                f"Row {number} of the features (`image_embeds`) has the shape {list(tensors[-1].shape)}, but must be "
                "[N, D] with at least one feature."
            )
    widths = [row.shape[1] for row in tensors]
    if len(set(widths)) > 1:
        other = next(number for number, width in enumerate(widths) if width != widths[0])
        raise ValueError(
            f"The rows of features (`image_embeds`) differ in width: row 0 has {widths[0]} numbers in each feature, "
            f"and row {other} has {widths[other]}. Use features of one encoder."
        )
    lengths = torch.tensor([len(row) for row in tensors])
    features = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    mask = torch.arange(features.shape[1]) < lengths[:, None]
    return {"image_embeds": features} if mask.all() else {"image_embeds": features, "image_attention_mask": mask}


def check_is_finite(image_embeds: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Check that features `[B, ..., Dv]` without padding (mask bool `[B, ...]`) have no NaN and no infinity.

    Raises:
        ValueError: if a feature is not finite; the message names its row.
    """
    if is_tracing(image_embeds) or image_embeds.sum(dtype=torch.float32).isfinite():
        return
    finite = image_embeds.isfinite().all(dim=-1)
    finite = (finite if mask is None else finite | ~mask).flatten(1).all(dim=1)
    if not finite.all():  # and not only a sum that is too large
        raise ValueError(
            f"The features of row {int(finite.int().argmin())} of the batch (`image_embeds`) hold NaN or infinity. "
            "Compute them again, or leave out the row."
        )


def pool_patches(
    features: torch.Tensor, mask: torch.Tensor | None, grid_size: int, num_prefix_tokens: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Average the patches of images to a grid of G x G features: `[..., N, Dv]` -> `[..., P + G*G, Dv]`.

    Pooled features stay as they are.

    Args:
        features (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos): P other features of each image, then its patches.
        mask (`[B, N]` or `[B, F, N]`, bool, *optional*): `False` for the features of a frame that is padding.
        grid_size: number of rows and columns, G.
        num_prefix_tokens: number of features in front of the patches, P, which are kept.

    Returns:
        The pooled features and their mask.

    Raises:
        ValueError: if the patches are not a square grid of at least G x G, or a part of an image is masked.

    Example:

    ```python
    >>> pool_patches(torch.randn(5, 257, 384), None, grid_size=2, num_prefix_tokens=1)[0].shape
    torch.Size([5, 5, 384])
    ```
    """
    patches = features.shape[-2] - num_prefix_tokens
    side = math.isqrt(max(0, patches))
    if side * side != patches or side < grid_size:
        raise ValueError(
            f"An image has {features.shape[-2]} features. Without the first {num_prefix_tokens} (`num_prefix_tokens`) "
            f"they are not a square grid that can be pooled to {grid_size} x {grid_size} (`pooled_grid_size`)."
        )
    if mask is not None:
        if not is_tracing(mask) and (mask != mask[..., :1]).any():
            raise ValueError(
                "`pooled_grid_size` needs whole images, but some features of an image are masked: pass images of one "
                "size, or build the Q-Former without it."
            )
        mask = mask[..., : num_prefix_tokens + grid_size**2]
    prefix, grid = features.split([num_prefix_tokens, patches], dim=-2)
    maps = grid.flatten(0, -3).transpose(1, 2).unflatten(2, (side, side))  # [B, Dv, rows, columns]
    pooled = nn.functional.adaptive_avg_pool2d(maps, grid_size).flatten(2).transpose(1, 2)
    return torch.cat([prefix, pooled.reshape(*prefix.shape[:-2], grid_size**2, -1)], dim=-2), mask


def mean_features(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of the features of each row, without padding: `[B, ..., Dv]` -> `[B, Dv]` in float32.

    Args:
        features (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos): the features.
        mask (`[B, N]` or `[B, F, N]`, bool or int, *optional*): 1 for a feature, 0 for padding.

    Raises:
        ValueError: if the mask has another shape, or holds other values.
    """
    rows = features.float().reshape(len(features), -1, features.shape[-1])  # [B, N, Dv]
    if mask is None:
        return rows.mean(dim=1)
    real = feature_mask(features, mask).reshape(len(rows), -1, 1)
    return rows.masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1)  # a weight of 0 does not remove a NaN
