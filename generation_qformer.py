"""Generation of captions after a prefix.

The KV cache is filled with the prefix once for each image, and the beams of an image share it.

Shapes: B images, S = Q + P positions of a prefix (queries and prompt), T tokens of a caption, D the language model's
width.
"""

import copy
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import ModelOutput

from .configuration_qformer import special_tokens_of
from .language_qformer import accepts, decoder_of, position_ids_of

MAX_NEW_TOKENS = 50  # of a caption, where nothing else sets a length


def resolve_generation_config(
    captioner_config: PreTrainedConfig,
    defaults: GenerationConfig,
    given: GenerationConfig | None,
    options: dict[str, Any],
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Combine decoding options into one configuration that counts only the tokens of the caption.

    Options override the `given` configuration. Unset fields of it fall back to the `defaults` of the captioner, and
    special tokens then to the captioner's configuration. `max_length` and `min_length` mean the length of the caption,
    as `max_new_tokens` and `min_new_tokens` do.

    Returns:
        The configuration, and the remaining options, which are arguments of the language model.
    """
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    defaults, options = copy.deepcopy(defaults), dict(options)
    for length, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        for layer in (config, defaults):
            if getattr(layer, new_tokens) is None:
                setattr(layer, new_tokens, getattr(layer, length))
            setattr(layer, length, None)
        value = options.pop(length, None)
        if options.get(new_tokens) is None:
            options[new_tokens] = value
        if options[new_tokens] is None:
            del options[new_tokens]
    config.update(**defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
    config.update(**special_tokens_of(captioner_config), max_new_tokens=MAX_NEW_TOKENS, defaults_only=True)
    model_kwargs = config.update(**options)
    # `generate` of the language model would replace a special token that the caller set to `None`.
    cleared = {name: None for name in options if name.endswith("_token_id") and options[name] is None}
    return config, {**model_kwargs, **cleared}


def check_generation_options(config: GenerationConfig, kwargs: dict[str, Any], is_encoder_decoder: bool) -> None:
    """Refuse options of `generate` that would be ignored, or that need the token ids of the prefix.

    Raises:
        ValueError: for such an option; the message names it.
    """
    options = {**config.to_dict(), **kwargs}
    neutral = {"guidance_scale": 1, "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0}
    computed = "the captioner computes it from `pixel_values` or `image_embeds` and a prompt in `input_ids`"
    assisted = "assisted generation verifies token ids from the beginning, but the prefix of a caption holds an image"
    guided = "classifier-free guidance needs logits without the image, which a captioner is not trained for"
    encoder = "it reads the token ids of an encoder, but the prefix of a caption holds an image"
    reasons = {
        "inputs": computed,
        "inputs_embeds": computed,
        "encoder_outputs": computed,
        "position_ids": computed,
        "assistant_model": assisted,
        "assistant_tokenizer": assisted,
        "assistant_early_exit": assisted,
        "prompt_lookup_num_tokens": assisted,
        "use_mtp": assisted,
        "guidance_scale": guided,
        "negative_prompt_ids": guided,
        "negative_prompt_attention_mask": guided,
        "encoder_repetition_penalty": encoder,
        "encoder_no_repeat_ngram_size": encoder,
        "token_healing": "it replaces the last token of a prompt, but the prefix of a caption holds an image",
        "prefill_chunk_size": "it splits token ids, but the prefix of a caption holds an image",
    }
    if not is_encoder_decoder:
        reasons["forced_bos_token_id"] = "only the decoder of an encoder-decoder has a start token"
    for name, reason in reasons.items():
        value = options.get(name)
        if not (value is None or value is False or (name in neutral and value == neutral[name])):
            raise ValueError(f"Leave out `{name}`, which a captioner's `generate` does not support: {reason}.")
    if kwargs.get("streamer") is not None and (config.num_beams or 1) > 1:
        raise ValueError(
            "Leave out `streamer`, or set `num_beams=1`: the tokens of a beam are not final until the end."
        )
    check_cache(config, kwargs.get("past_key_values"), is_encoder_decoder)


def check_cache(config: GenerationConfig, cache: Cache | None, is_encoder_decoder: bool) -> None:
    """Refuse a kind of KV cache that cannot hold a prefix, and a cache that holds the prefix of other images.

    Raises:
        ValueError: for such a cache.
    """
    kind = config.cache_implementation
    if kind == "paged":
        raise ValueError(
            "Leave out `cache_implementation='paged'`, which a captioner's `generate` does not support: continuous "
            "batching reads token ids, but the prefix of a caption holds an image."
        )
    if kind in ("offloaded", "offloaded_static") and not torch.accelerator.is_available():
        raise ValueError(
            f"Leave out `cache_implementation={kind!r}`: it moves the cache away from a GPU, which this machine lacks."
        )
    if not isinstance(cache, Cache):
        return
    if is_encoder_decoder and not isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            "`past_key_values` must be an `EncoderDecoderCache(DynamicCache(), DynamicCache())` for an "
            f"encoder-decoder, not a {type(cache).__name__}."
        )
    if cache.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` already holds {cache.get_seq_length()} positions: pass an empty cache, which is "
            "filled with the prefix of these images."
        )


def generate_from_prefix(
    language_model: PreTrainedModel, prefix: torch.Tensor, prefix_mask: torch.Tensor, config: GenerationConfig, **kwargs
) -> Any:
    """Continue a prefix `[B, S, D]` with the language model's `generate`, which encodes the prefix once for each image.

    Returns:
        Token ids of the captions, `[B * num_return_sequences, T]`, or an output object with these as `sequences`.
    """
    is_encoder_decoder = language_model.config.is_encoder_decoder
    if not is_encoder_decoder:
        penalize_repetition(config, kwargs)
    if can_prefill_prefix(language_model, prefix, config, kwargs):
        num_copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        kwargs["past_key_values"] = prefill_shared_prefix(
            language_model, prefix, prefix_mask, num_copies, config.max_new_tokens
        )
    kwargs |= {"inputs_embeds": prefix, "attention_mask": prefix_mask, "generation_config": config}
    generated = language_model.generate(**kwargs)  # type: ignore[operator]
    # The start token of the decoder is not part of the caption.
    if is_encoder_decoder and isinstance(generated, torch.Tensor):
        return generated[:, 1:]
    if is_encoder_decoder and isinstance(generated, ModelOutput):
        generated["sequences"] = generated["sequences"][:, 1:]
    return generated


def penalize_repetition(config: GenerationConfig, kwargs: dict[str, Any], prompt_length: int | None = None) -> None:
    """Move the repetition penalty of a decoder-only model to a logits processor, which exempts the prompt.

    `generate` exempts as many tokens from the penalty as a row has padding. That is right for token ids, which begin
    with the padding. After embeddings the token ids are only the new ones, and the first of them would be exempt.

    `prompt_length` is the number of token ids before the caption. `None` stands for a prefix of embeddings.
    """
    penalty, config.repetition_penalty = config.repetition_penalty, None
    if penalty not in (None, 1.0):
        processors = [RepetitionPenaltyLogitsProcessor(penalty, prompt_length), *(kwargs.get("logits_processor") or ())]
        kwargs["logits_processor"] = LogitsProcessorList(processors)


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
        and kwargs.get("past_key_values") is None
        and kwargs.get("custom_generate") is None  # its own loop begins with an empty cache
        and config.get_generation_mode().value in modes
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
        """Give each beam the new tokens of the beam `beam_idx`. The prefix is the same for all beams of an image.

        Fewer indices than beams leave out the other beams.
        """
        if len(beam_idx) < len(self.keys):
            length, beam_idx = self.get_seq_length(), beam_idx.to(self.keys.device)
            self.key_buffer, self.value_buffer = self.key_buffer[beam_idx], self.value_buffer[beam_idx]
            return self._expose(length)
        for states in (self.keys, self.values):
            new_states = states[:, :, self.prefix_length :]
            new_states.copy_(new_states.index_select(0, beam_idx.to(new_states.device)))

    def _expose(self, length: int) -> None:
        self.keys, self.values = self.key_buffer[:, :, :length], self.value_buffer[:, :, :length]
