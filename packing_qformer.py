"""Queries and texts of many lengths in one pass through a Q-Former, without padding and with shared image keys.

Stage 1 of BLIP-2 runs the same layers on queries alone and on texts alone. It also runs them on queries with a text:
either only the text attends to the queries, or both attend to each other. Here all of these are rows of one list of
tokens. Linear layers, layer norms and feed-forward layers run on that list. Only self-attention needs the rows, as a
padded grid with a mask.

An image is in several rows: its keys and values are projected once in each layer, and the queries of all its rows
attend to them together.

Shapes: n tokens in R rows of Q queries and any number of text tokens; B images, N features of an image. Dq is the width
of the Q-Former.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .layers_qformer import QFormerAttention, QFormerEncoder, QFormerLayer


class Rearrange(torch.autograd.Function):
    """Selection of rows of a matrix of which each real row is selected once, so that its gradient is a selection, too.

    `index_select` would add gradients row by row, because a row may be selected many times.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, is_padding: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `rows[index]`. `inverse` selects the gradient of each of `rows`, which is 0 where `is_padding`."""
        ctx.save_for_backward(inverse, is_padding)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inverse, is_padding = ctx.saved_tensors
        grad = grad_outputs[0].index_select(0, inverse)
        return (grad if is_padding is None else grad.masked_fill(is_padding[:, None], 0)), None, None, None


class TokenGroups:
    """Groups of tokens, and the padded grid `[groups, L]` with a group in each row.

    Args:
        group_of_token (`[n]`, long): group of each token. The tokens of a group keep their order.
        num_groups: number of groups. Some may be empty.
    """

    def __init__(self, group_of_token: torch.Tensor, num_groups: int):
        sizes = group_of_token.bincount(minlength=num_groups)
        self.num_groups, self.length = num_groups, int(sizes.max())
        order = group_of_token.argsort(stable=True)  # tokens, group by group
        numbers = torch.arange(len(order), device=order.device)
        starts = sizes.cumsum(0) - sizes
        column = torch.empty_like(order)
        column[order] = numbers - starts[group_of_token[order]]
        self.places = group_of_token * self.length + column  # [n]: place of each token in the grid
        self.tokens = order.new_zeros(num_groups * self.length)  # token at each place, 0 for padding
        self.tokens[self.places] = numbers
        self.is_padding = torch.ones_like(self.tokens, dtype=torch.bool)
        self.is_padding[self.places] = False

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens `[n, D]` as a grid `[groups, L, D]`. Padding repeats a token, and must be masked."""
        grid = Rearrange.apply(tokens, self.tokens, self.places, None)
        return grid.view(self.num_groups, self.length, tokens.shape[-1])

    def unpad(self, grid: torch.Tensor) -> torch.Tensor:
        """Return the tokens `[n, D]` of a grid `[groups, L, D]`."""
        return Rearrange.apply(grid.flatten(0, 1), self.places, self.tokens, self.is_padding)

    def pad_facts(self, facts: torch.Tensor, padding: int) -> torch.Tensor:
        """Return a number of each token, `[n]`, as a grid `[groups, L]`."""
        return facts[self.tokens].masked_fill(self.is_padding, padding).view(self.num_groups, self.length)


@dataclass
class Texts:
    """Texts in the rows of a packed pass, `[m, T]` with padding on the right.

    Args:
        hidden_states (`[m, T, Dq]`): embedded tokens.
        mask (`[m, T]`, bool): `True` for a token.
        rows (`[m]`, long): row of each text.
        causal: whether a token attends only to itself and the tokens before it.
        attend_to_queries: whether the tokens attend to the queries of their row.
        attended_by_queries: whether the queries of the row attend to the tokens.
    """

    hidden_states: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    causal: bool = False
    attend_to_queries: bool = False
    attended_by_queries: bool = False


@dataclass
class ImageKeys:
    """Keys and values of images in each layer with cross-attention, `[B, N, Dq]`, and their mask.

    Args:
        layers: for each layer, key and value, or `None` without cross-attention.
        mask (`[B, 1, 1, N]`, float, *optional*): added to the attention scores: 0 for a feature, large and negative for
            padding.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor] | None]
    mask: torch.Tensor | None

    @classmethod
    def project(cls, encoder: QFormerEncoder, features: torch.Tensor, mask: torch.Tensor | None) -> "ImageKeys":
        """Project the features `[B, N, Dv]` of images. `mask` (bool `[B, N]`) is `False` for padding."""
        layers: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for layer in encoder.layers():
            attention = layer.crossattention.attention if layer.has_cross_attention else None
            layers.append(None if attention is None else (attention.key(features), attention.value(features)))
        return cls(layers, None if mask is None else additive(mask[:, None, None], features.dtype))

    @classmethod
    def none(cls, encoder: QFormerEncoder) -> "ImageKeys":
        """Return the keys and values of rows without queries, which attend to no image."""
        return cls([None] * len(encoder.layer), None)

    def tensors(self) -> list[torch.Tensor]:
        """Return keys and values of all layers in order."""
        return [tensor for keys in self.layers if keys is not None for tensor in keys]

    def select(self, images: slice, tensors: Sequence[torch.Tensor]) -> "ImageKeys":
        """Return the keys and values of some images, which are `tensors` in the order of [`~ImageKeys.tensors`]."""
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        layers = [None if keys is None else next(pairs) for keys in self.layers]
        return ImageKeys(layers, None if self.mask is None else self.mask[images])

    def append(self, other: "ImageKeys", mask: torch.Tensor) -> "ImageKeys":
        """Return the keys and values of these images followed by those of others, which have at least as large an N.

        Args:
            other: keys and values of other images.
            mask (bool `[B, N]`): mask of all images, `False` for padding.
        """

        def join(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return torch.cat([nn.functional.pad(ours, (0, 0, 0, theirs.shape[1] - ours.shape[1])), theirs])

        layers: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            if ours is None or theirs is None:
                layers.append(None)
            else:
                layers.append((join(ours[0], theirs[0]), join(ours[1], theirs[1])))
        dtype = next(keys[0].dtype for keys in layers if keys is not None)
        return ImageKeys(layers, additive(mask[:, None, None], dtype))


class PackedRows:
    """Rows of a packed pass: R rows of Q queries, each with any number of texts.

    Args:
        queries (`[R, Q, Dq]`): embedded query tokens of each row.
        texts: texts of the rows.
        image_of_row (`[R]`, long, *optional*): image of each row; by default row r has image r.
        num_images: number of images.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        texts: Sequence[Texts],
        image_of_row: torch.Tensor | None = None,
        num_images: int | None = None,
    ):
        num_rows, num_queries, _ = queries.shape
        self.num_rows, self.num_queries = num_rows, num_queries
        self.sizes = [num_rows * num_queries, *(int(text.mask.sum()) for text in texts)]
        self.tokens = torch.cat([queries.flatten(0, 1), *(text.hidden_states[text.mask] for text in texts)])
        rows = torch.arange(num_rows, device=queries.device).repeat_interleave(num_queries)
        row_of_token = [rows, *(text.rows[:, None].expand_as(text.mask)[text.mask] for text in texts)]
        self.groups = TokenGroups(torch.cat(row_of_token), num_rows)
        self.mask = self._mask(texts, queries.dtype)
        self.images: TokenGroups | None = None
        if image_of_row is not None:
            assert num_images is not None
            self.images = TokenGroups(image_of_row.repeat_interleave(num_queries), num_images)

    def _mask(self, texts: Sequence[Texts], dtype: torch.dtype) -> torch.Tensor:
        """Return the self-attention mask `[R, 1, L, L]`, which is added to the scores."""
        device = self.tokens.device

        def grid(of_queries: int, of_texts: list[torch.Tensor], padding: int) -> torch.Tensor:
            queries = torch.full((self.sizes[0],), of_queries, device=device)
            return self.groups.pad_facts(torch.cat([queries, *of_texts]), padding)

        def constant(values: Sequence[int]) -> list[torch.Tensor]:
            return [
                torch.full((size,), value, device=device) for size, value in zip(self.sizes[1:], values, strict=True)
            ]

        numbers, positions, first = [], [], 1  # the queries are segment 0, each text is another one
        for text in texts:
            segments = torch.arange(first, first + len(text.rows), device=device)
            numbers.append(segments[:, None].expand_as(text.mask)[text.mask])
            places = (
                torch.arange(text.mask.shape[1], device=device)
                if text.causal
                else text.rows.new_zeros(text.mask.shape[1])
            )
            positions.append(places.expand_as(text.mask)[text.mask])
            first += len(text.rows)
        segment = grid(0, numbers, -1)
        position = grid(0, positions, 0)  # of causal texts, otherwise 0
        attends = grid(0, constant([int(text.attend_to_queries) for text in texts]), 0).bool()
        is_attended = grid(0, constant([int(text.attended_by_queries) for text in texts]), 0).bool()
        is_query = segment == 0
        allowed = (segment[:, :, None] == segment[:, None]) & (position[:, :, None] >= position[:, None])
        allowed |= attends[:, :, None] & is_query[:, None]
        allowed |= is_query[:, :, None] & is_attended[:, None]
        return additive(allowed[:, None], dtype)

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the queries `[R, Q, D]` and the tokens of each of the texts, `[m's tokens, D]`."""
        queries, *texts = tokens.split(self.sizes)
        return queries.view(self.num_rows, self.num_queries, tokens.shape[-1]), texts


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask that is added to attention scores: 0 where attention is allowed, large and negative elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def run_packed(encoder: QFormerEncoder, rows: PackedRows, images: ImageKeys) -> torch.Tensor:
    """Run the layers of a Q-Former on packed rows, and return the output of each token, `[n, Dq]`."""
    tokens = rows.tokens
    for layer, keys in zip(encoder.layers(), images.layers, strict=True):
        arguments = tokens, rows, keys, images.mask
        if layer.gradient_checkpointing and layer.training:
            checkpoint = cast(Callable, layer._gradient_checkpointing_func)  # set by transformers
            tokens = checkpoint(run_packed_layer, layer, *arguments)
        else:
            tokens = run_packed_layer(layer, *arguments)
    return tokens


def run_packed_layer(
    layer: QFormerLayer,
    tokens: torch.Tensor,  # [n, Dq]
    rows: PackedRows,
    image_keys: tuple[torch.Tensor, torch.Tensor] | None,
    image_mask: torch.Tensor | None,
) -> torch.Tensor:
    attention, groups = layer.attention.attention, rows.groups
    query, key, value = (groups.pad(linear(tokens)) for linear in (attention.query, attention.key, attention.value))
    attended, _ = attention.attend(query, key, value, rows.mask)  # [R, L, Dq]
    tokens = layer.attention.output(groups.unpad(attended), tokens)
    queries, texts = tokens.tensor_split([rows.sizes[0]])  # [R*Q, Dq], [n - R*Q, Dq]
    if image_keys is not None:
        queries = attend_to_images(layer.crossattention, queries, rows, *image_keys, image_mask)
    queries = layer.output_query(layer.intermediate_query(queries), queries)
    return torch.cat([queries, layer.output(layer.intermediate(texts), texts)])


def attend_to_images(
    crossattention: QFormerAttention,
    queries: torch.Tensor,  # [R*Q, Dq]
    rows: PackedRows,
    key: torch.Tensor,  # [B, N, Dq]
    value: torch.Tensor,
    mask: torch.Tensor | None,  # [B, 1, 1, N]
) -> torch.Tensor:
    attention = crossattention.attention
    states = attention.query(queries)
    if rows.images is None:
        attended, _ = attention.attend(states.view(len(key), -1, states.shape[-1]), key, value, mask)
        attended = attended.flatten(0, 1)
    else:
        attended, _ = attention.attend(rows.images.pad(states), key, value, mask)
        attended = rows.images.unpad(attended)
    return crossattention.output(attended, queries)
