"""Layers of the Q-Former: BERT layers in which the queries also attend to the features of an image.

querying_qformer.py joins them to a [`QFormerModel`]. Parameters have the names of transformers' `Blip2QFormerModel`.

Shapes: B images, N features of an image, Q queries, P prompt tokens. Dq is the width of the Q-Former, and Dv that of
the features.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_qformer import QFormerConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention step by step, and return the output and the attention weights.

    `attention_mask` is added to the scores.
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class QFormerMultiHeadAttention(nn.Module):
    """Multi-head attention of the queries to themselves or, with `encoder_hidden_states`, to the image."""

    def __init__(self, config: QFormerConfig, key_value_size: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = False  # the attention interface reads it
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_value_size, config.hidden_size)
        self.value = nn.Linear(key_value_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, Q, Dq]
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,  # [B, N, Dv]
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        key_value_states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return self.attend(
            self.query(hidden_states),
            self.key(key_value_states),
            self.value(key_value_states),
            attention_mask,
            **kwargs,
        )

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Split queries, keys or values into heads: `[B, L, Dq]` -> `[B, heads, L, head_size]`."""
        return states.view(*states.shape[:-1], self.num_heads, self.head_size).transpose(1, 2)

    def attend(
        self,
        query: torch.Tensor,  # [B, Q, Dq]
        key: torch.Tensor,  # [B, N, Dq]
        value: torch.Tensor,  # [B, N, Dq]
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended values `[B, Q, Dq]`, and with eager attention the weights."""
        return self.attend_heads(
            self.split_heads(query), self.split_heads(key), self.split_heads(value), attention_mask, **kwargs
        )

    def attend_heads(
        self,
        query: torch.Tensor,  # [B, heads, Q, head_size]
        key: torch.Tensor,  # [B, heads, N, head_size]
        value: torch.Tensor,  # [B, heads, N, head_size]
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended values as `attend` does, for queries, keys and values that are split into heads."""
        compute: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = compute(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # [B, Q, heads, head_size]
        return attended.flatten(2), weights


class QFormerOutput(nn.Module):
    """End of every sub-layer: projection, dropout, residual, layer norm (post-norm, as in BERT)."""

    def __init__(self, config: QFormerConfig, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class QFormerAttention(nn.Module):
    def __init__(self, config: QFormerConfig, key_value_size: int):
        super().__init__()
        self.attention = QFormerMultiHeadAttention(config, key_value_size)
        self.output = QFormerOutput(config, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.attention(hidden_states, **kwargs)
        return self.output(attended, hidden_states)


class QFormerIntermediate(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states))


class QFormerLayer(GradientCheckpointingLayer):
    """Self-attention, in every `cross_attention_frequency`-th layer cross-attention to the image, and feed-forward.

    If the Q-Former reads a prompt, the prompt tokens follow the queries. They take part in self-attention, do not
    attend to the image, and have their own feed-forward layers.
    """

    def __init__(self, config: QFormerConfig, layer_index: int):
        super().__init__()
        self.has_cross_attention = layer_index % config.cross_attention_frequency == 0
        self.attention = QFormerAttention(config, config.hidden_size)
        if self.has_cross_attention:
            self.crossattention = QFormerAttention(config, config.encoder_hidden_size)
        self.intermediate_query = QFormerIntermediate(config)
        self.output_query = QFormerOutput(config, config.intermediate_size)
        if config.use_qformer_text_input:
            self.intermediate = QFormerIntermediate(config)
            self.output = QFormerOutput(config, config.intermediate_size)
        self.num_query_tokens = config.num_query_tokens

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, Q+P, Dq]
        encoder_hidden_states: torch.Tensor,  # [B, N, Dv]
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        queries, prompt = hidden_states.tensor_split([self.num_query_tokens], dim=1)  # [B, Q, Dq], [B, P, Dq]
        if self.has_cross_attention:
            queries = self.crossattention(
                queries,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **kwargs,
            )
        queries = self.output_query(self.intermediate_query(queries), queries)
        if prompt.shape[1] == 0:
            return queries
        return torch.cat([queries, self.output(self.intermediate(prompt), prompt)], dim=1)


class QFormerEncoder(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList([QFormerLayer(config, index) for index in range(config.num_hidden_layers)])

    def layers(self) -> list[QFormerLayer]:
        """Return the layers in order."""
        return [cast(QFormerLayer, layer) for layer in self.layer]

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, encoder_hidden_states, **kwargs)
        return hidden_states


class QFormerEmbeddings(nn.Module):
    """Token and position embeddings of a prompt or another text."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)  # [B, P, Dq]


class FeatureNorm(nn.Module):
    """Normalisation of pooled features `[..., P + G*G, Dv]`: scale and shift of each prefix token, and of all patches.

    Their initial values come from statistics of images ([`QFormerModel.normalize_image_features`]).
    """

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.num_prefix_tokens = config.num_prefix_tokens
        self.weight = nn.Parameter(torch.ones(config.num_prefix_tokens + 1, config.encoder_hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_prefix_tokens + 1, config.encoder_hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        kind = torch.arange(features.shape[-2], device=features.device).clamp(max=self.num_prefix_tokens)
        return features * self.weight[kind] + self.bias[kind]

    @torch.no_grad()
    def fit(self, features: torch.Tensor) -> None:
        """Let the given features `[..., P + G*G, Dv]` have mean 0 and standard deviation 1 in each kind and channel."""
        features = features.float().flatten(0, -3)  # [B, n, Dv]
        for kind in range(self.num_prefix_tokens + 1):
            stop = kind + 1 if kind < self.num_prefix_tokens else None
            own = features[:, kind:stop].flatten(0, 1)
            std = own.std(dim=0).clamp(min=1e-4)
            self.weight[kind], self.bias[kind] = 1 / std, -own.mean(dim=0) / std


def split_windows(features: torch.Tensor, mask: torch.Tensor | None, window_size: int) -> torch.Tensor:
    """Cut sequences of features into windows, as the projector of Granite Speech does (transformers' `granite_speech`).

    The last window is filled with zeros, to which the queries attend. Padding (`mask`, `[B, N]`, bool) may be anywhere.
    It must be zeros, too.

    Returns:
        `[B*W, window_size, Dv]`: the W windows of each sequence.
    """
    if mask is not None:
        order = mask.int().argsort(dim=1, descending=True, stable=True)  # padding goes to the end
        features = features.gather(1, order[..., None].expand_as(features))
    features = nn.functional.pad(features, (0, 0, 0, -features.shape[1] % window_size))
    return features.reshape(-1, window_size, features.shape[-1])


def mask_of_windows(mask: torch.Tensor | None, window_size: int, num_query_tokens: int) -> torch.Tensor | None:
    """Return which queries belong to windows with features, `[B, N]` -> `[B, W*Q]`, or `None` if all of them do."""
    if mask is None:
        return None
    starts = torch.arange(0, mask.shape[1], window_size, device=mask.device)  # [W]
    of_windows = starts < mask.sum(dim=1, keepdim=True)  # [B, W]
    return None if of_windows.all() else of_windows.repeat_interleave(num_query_tokens, dim=1)
