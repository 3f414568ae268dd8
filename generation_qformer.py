"""Generation of captions after a prefix.

The KV cache is filled with the prefix once for each image, and the beams of an image share it.

Shapes: B images, S = Q + P positions of a prefix (queries and prompt), T tokens of a caption, D the language model's
width.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .language_qformer import accepts, decoder_of, position_ids_of


def resolve_generation_config(
    defaults: GenerationConfig, given: GenerationConfig | None, options: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Combine decoding options into one configuration that counts only the tokens of the caption.

    `max_length` and `min_length` mean the length of the caption, as `max_new_tokens` and `min_new_tokens` do. Options
    override the `given` configuration. Only the length falls back to the `defaults` of the captioner.

    Returns:
        The configuration, and the remaining options, which are arguments of the language model.
    """
    config, options = copy.deepcopy(defaults if given is None else given), dict(options)
    for length, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = options.pop(length, None)
        if value is not None:
            options.setdefault(new_tokens, value)
    model_kwargs = config.update(**options)
    config.max_new_tokens = config.max_new_tokens or config.max_length or defaults.max_new_tokens
    config.min_new_tokens = config.min_new_tokens or config.min_length
    config.max_length = config.min_length = None
    return config, model_kwargs


def generate_from_prefix(
    language_model: PreTrainedModel, prefix: torch.Tensor, prefix_mask: torch.Tensor, config: GenerationConfig, **kwargs
) -> Any:
    """Continue a prefix `[B, S, D]` with the language model's `generate`, which encodes the prefix once for each image.

    Returns:
        Token ids of the captions, `[B * num_return_sequences, T]`, or an output object with these as `sequences`.
    """
    if can_prefill_prefix(language_model, prefix, config, kwargs):
        num_copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        kwargs["past_key_values"] = prefill_shared_prefix(
            language_model, prefix, prefix_mask, num_copies, config.max_new_tokens
        )
    kwargs |= {"inputs_embeds": prefix, "attention_mask": prefix_mask, "generation_config": config}
    generated = language_model.generate(**kwargs)  # type: ignore[operator]
    if not language_model.config.is_encoder_decoder:
        return generated
    if isinstance(generated, torch.Tensor):  # the start token of the decoder is not part of the caption
        return generated[:, 1:]
    generated.sequences = generated.sequences[:, 1:]
    return generated


def can_prefill_prefix(
    language_model: PreTrainedModel, prefix: torch.Tensor, config: GenerationConfig, kwargs: dict[str, Any]
) -> bool:
    """Return True if `generate` can start from a KV cache that holds the prefix."""
    modes = ("greedy_search", "sample", "beam_search", "beam_sample")
    use_cache = language_model.generation_config.use_cache if config.use_cache is None else config.use_cache
    return (
        not language_model.config.is_encoder_decoder
        and accepts(language_model, "past_key_values")
        and prefix.shape[1] > 1
        and use_cache is not False
        and config.cache_implementation is None
        and not (config.output_attentions or config.output_hidden_states)  # also requested for the prefix
        and "past_key_values" not in kwargs
        and config.get_generation_mode(kwargs.get("assistant_model")).value in modes
    )


def prefill_shared_prefix(
    language_model: PreTrainedModel,
    prefix: torch.Tensor,
    prefix_mask: torch.Tensor,
    num_copies: int,
    max_new_tokens: int,
) -> Cache | None:
    """Encode all but the last position of the prefix once, and return a KV cache that the beams of an image share.

    `num_copies` is the number of beams or sequences of an image. The result is `None` for a language model with another
    kind of cache (MiniMax, RecurrentGemma). `generate` then encodes the prefix for every beam.
    """
    inputs = {"position_ids": position_ids_of(prefix_mask)[:, :-1]} if accepts(language_model, "position_ids") else {}
    cache = decoder_of(language_model)(
        inputs_embeds=prefix[:, :-1], attention_mask=prefix_mask[:, :-1], use_cache=True, **inputs
    ).get("past_key_values")
    if type(cache) is not DynamicCache:
        return None
    repeated = torch.arange(len(prefix), device=prefix.device).repeat_interleave(num_copies)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = SharedPrefixLayer(layer.keys, layer.values, num_copies, max_new_tokens)
        else:  # a sliding window, a recurrent state, or the cache of another layer
            layer.reorder_cache(repeated)  # type: ignore[arg-type]
    return cache


class SharedPrefixLayer(DynamicLayer):
    """Cache layer of a prefix that the beams of an image share, with room for the tokens that each beam adds.

    The buffers for new tokens are allocated once, and reordering beams moves only their new tokens. `DynamicLayer`
    copies the whole cache, including the prefix, for every token and every reordering of beams.

    Args:
        keys, values: keys and values of the prefix, `[B, heads, S, head_size]`.
        num_copies: number of beams or sequences of each image.
        max_new_tokens: largest number of tokens that a beam adds.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_copies: int, max_new_tokens: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.prefix_length = keys.shape[-2]

        def allocate(states: torch.Tensor) -> torch.Tensor:
            batch_size, heads, length, head_size = states.shape
            buffer = states.new_empty(batch_size, num_copies, heads, length + max_new_tokens, head_size)
            buffer[..., :length, :] = states[:, None]
            return buffer.flatten(0, 1)  # [B*num_copies, heads, S+max_new_tokens, head_size]

        self.key_buffer, self.value_buffer = allocate(keys), allocate(values)
        self._expose(self.prefix_length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `[B*num_copies, heads, n, head_size]`, and return all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self.key_buffer[:, :, start:end], self.value_buffer[:, :, start:end] = key_states, value_states
        self._expose(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each beam the new tokens of the beam `beam_idx`. The prefix is the same for all beams of an image."""
        for states in (self.keys, self.values):
            new_states = states[:, :, self.prefix_length :]
            new_states.copy_(new_states.index_select(0, beam_idx.to(new_states.device)))

    def _expose(self, length: int) -> None:
        self.keys, self.values = self.key_buffer[:, :, :length], self.value_buffer[:, :, :length]
