"""Captions by the head of a Q-Former in stage 1, without a language model.

```
image -> queries [B,Q,Dq], whose keys and values of each layer the caption attends to
[DEC] token token ... -> Q-Former layers, causal -> lm_head -> next token ... [SEP]
```

This is image-grounded text generation of BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.2), one token at a time.
The queries of an image are encoded once. The search is that of transformers' `generate`.

Shapes: B images, R rows of captions (beams or samples of the images), P tokens before a caption, T tokens so far, Q
queries. Dq is the width of the Q-Former, and V the size of the vocabulary.
"""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .captioning_qformer import QFormerCaptioningModel
from .configuration_qformer import QFormerConfig
from .generation_qformer import (
    MAX_NEW_TOKENS,
    SharedPrefixLayer,
    check_generation_options,
    penalize_repetition,
    resolve_generation_config,
)
from .layers_qformer import QFormerLayer
from .packing_qformer import additive
from .querying_qformer import QFormerModel
from .retrieval_qformer import QFormerRetrievalModel
from .texts_qformer import QFormerLMHead, TextBatch, check_texts
from .vision_qformer import split_vision_inputs

logger = logging.get_logger(__name__)

KeysAndValues = tuple[torch.Tensor, torch.Tensor]  # of a layer, each `[rows, heads, tokens, head_size]`


class QFormerDecodingModel(QFormerRetrievalModel, QFormerCaptioningModel):
    """Base class of [`QFormerForPretraining`], which captions images.

    pretraining_qformer.py subclasses it for training.
    """

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate the token ids of captions, with the decoding options of transformers' `generate`.

        An option that the caller does not set keeps its value in `self.generation_config`. Special tokens that are not
        set there either are those of `self.config`. By default a caption has at most 50 tokens, or as many as the
        Q-Former reads.

        Args:
            pixel_values (`[B, 3, H, W]`, or `[B, F, 3, H, W]` for videos, float): images; or
            image_embeds (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos, float): their features.
            image_attention_mask (`[B, N]` or `[B, F, N]`, *optional*): 1 for a feature, 0 for padding.
            input_ids (`[B, P]`, long, *optional*): texts that the captions continue, as the processor returns them:
                `[CLS] text [SEP]`, padded on the right.
            attention_mask (`[B, P]`, *optional*): 1 for a token of these texts, 0 for padding.
            generation_config (`GenerationConfig`, *optional*): decoding options; arguments override it.
            kwargs: further inputs that the processor returns for the images (`VISION_INPUTS`), and options such as
                `num_beams` and `do_sample`. `max_length` and `min_length` count the tokens of the caption, as
                `max_new_tokens` and `min_new_tokens` do.

        Returns:
            Token ids of the captions without the texts that they continue, `[B * num_return_sequences, T]`. With
            `return_dict_in_generate=True`, an output object of transformers with these as `sequences`.

        Raises:
            ValueError: as `forward` does, for captions that are longer than the Q-Former reads, and for an option that
                is not supported; the message names it.

        Example:

        ```python
        >>> inputs = model.processor(images=["dog.jpg"], text="a photo of")  # doctest: +SKIP
        >>> model.processor.batch_decode(model.generate(**inputs, num_beams=5))  # doctest: +SKIP
        ['a dog in the snow [SEP]']
        ```
        """
        if not self.config.itg_weight:
            logger.warning_once(
                "This model was trained without the loss of text generation (`itg_weight=0`), so its captions have no "
                "meaning: train with `itg_weight=1`, or caption with a captioner."
            )
        vision_inputs, options = split_vision_inputs(kwargs)
        limit = self.qformer.config.max_position_embeddings
        defaults = copy.deepcopy(self.generation_config)
        if defaults.max_new_tokens is None and defaults.max_length is None:
            prompt_length = 0 if input_ids is None else input_ids.shape[1] - 2
            defaults.max_new_tokens = max(1, min(MAX_NEW_TOKENS, limit - prompt_length))
        config, options = resolve_generation_config(self.config, defaults, generation_config, options)
        check_decoding_options(config, options)
        if config.stop_strings is not None and self.processor is not None:
            options.setdefault("tokenizer", self.processor.tokenizer)
        features, mask = self._features(pixel_values, image_embeds, image_attention_mask, **vision_inputs)
        prompts, prompt_mask = self._prompts(len(features), input_ids, attention_mask, config)
        length = prompts.shape[1]
        room = limit - length + 1  # the last token of a caption is never an input
        if config.max_new_tokens > room:
            raise ValueError(
                f"The Q-Former reads at most {limit} tokens, so a caption after {length - 1} tokens of a prompt has at "
                f"most {room}, not {config.max_new_tokens}: set `max_new_tokens={room}`, or shorten the prompt."
            )
        decoder = QFormerDecoder(self.qformer, self.lm_head, self._encode_queries(features, mask))
        if config.use_cache is not False:
            rows_of_image = max(config.num_beams or 1, config.num_return_sequences or 1)
            options["past_key_values"] = decoder.new_cache(rows_of_image, length + config.max_new_tokens)
        penalize_repetition(config, options, length)
        generated = decoder.generate(  # type: ignore[misc]
            input_ids=prompts, attention_mask=decoder.with_queries(prompt_mask), generation_config=config, **options
        )
        if isinstance(generated, ModelOutput):
            generated["sequences"] = generated["sequences"][:, length:]
            return generated
        return generated[:, length:]

    @torch.no_grad()
    def caption_losses(
        self,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        **vision_inputs: Any,
    ) -> torch.Tensor:
        """Return the cross-entropy of captions of images, in nats, summed over the tokens of each caption.

        Args:
            labels (`[B, K, T]`, long): K captions of each image as [`~QFormerForPretraining.generate`] returns their
                tokens. Positions of -100 are ignored.
            pixel_values, input_ids, attention_mask, image_embeds, image_attention_mask, vision_inputs: images or their
                features, and the texts that the captions continue, as in [`~QFormerForPretraining.generate`].

        Returns:
            `[B, K]`, float32.

        Raises:
            ValueError: as `generate` does for the images and the texts.

        Example:

        ```python
        >>> inputs = model.processor(images=["dog.jpg"], text="a photo of")  # doctest: +SKIP
        >>> captions = model.generate(**inputs)  # doctest: +SKIP
        >>> model.caption_losses(captions[:, None], **inputs)  # doctest: +SKIP
        tensor([[9.31]])
        ```
        """
        features, mask = self._features(pixel_values, image_embeds, image_attention_mask, **vision_inputs)
        config, _ = resolve_generation_config(self.config, self.generation_config, None, {})
        prompts, prompt_mask = self._prompts(len(features), input_ids, attention_mask, config)
        decoder = QFormerDecoder(self.qformer, self.lm_head, self._encode_queries(features, mask))
        num_captions, length = labels.shape[1:]
        targets = labels.flatten(0, 1)  # [B*K, T]
        prompts, prompt_mask = (each.repeat_interleave(num_captions, dim=0) for each in (prompts, prompt_mask))
        inputs = torch.cat([prompts, targets[:, :-1].clamp(min=0)], dim=1)
        input_mask = nn.functional.pad(prompt_mask, (0, length - 1), value=1)
        logits = decoder(inputs, attention_mask=decoder.with_queries(input_mask), logits_to_keep=length).logits
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(labels.shape).sum(dim=-1)

    def _encode_queries(self, features: torch.Tensor, mask: torch.Tensor | None) -> list[KeysAndValues]:
        """Encode the queries of images `[B, N, Dv]`, and return their keys and values in self-attention."""
        queries, of_layers = self._queries(len(features)), []
        feature_mask = None if mask is None else additive(mask[:, None, None], features.dtype)
        for layer in self.qformer.encoder.layers():
            key, value = keys_and_values(layer, queries)
            of_layers.append((key, value))
            queries = attend(layer, queries, key, value)
            if layer.has_cross_attention:
                queries = layer.crossattention(queries, encoder_hidden_states=features, attention_mask=feature_mask)
            queries = layer.output_query(layer.intermediate_query(queries), queries)
        return of_layers

    def _prompts(
        self,
        num_images: int,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        config: GenerationConfig,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens before the caption of each image, `[DEC] text` padded on the left, and their mask `[B, P]`.

        Raises:
            ValueError: if there is no start token, or the texts have another shape or do not end with `[SEP]`.
        """
        start = config.bos_token_id
        if start is None:
            raise ValueError(
                "The model does not know the token that starts a caption: set `model.config.bos_token_id` (`[DEC]` of "
                "its tokenizer)."
            )
        if input_ids is None:
            prompts = torch.full((num_images, 1), start, device=self.qformer.query_tokens.device)
            return prompts, torch.ones_like(prompts)
        if input_ids.ndim != 2:
            raise ValueError(
                f"`input_ids` of `generate` are one text for each image to continue ([B, P]), not a tensor of shape "
                f"{list(input_ids.shape)}. Leave them out for captions from the beginning."
            )
        texts = check_texts(input_ids, attention_mask, num_images, self.qformer.config)
        last = texts.mask.sum(dim=1, keepdim=True) - 1
        has_end = texts.ids.gather(1, last) == cast(int, self.config.eos_token_id)
        if not has_end.all():
            raise ValueError(
                "The texts to continue must be `[CLS] text [SEP]`: make them with `model.processor(text=...)`, which "
                "adds the special tokens."
            )
        return align_right(texts.decoder_inputs(start))


class QFormerDecoder(PreTrainedModel, GenerationMixin):
    """Causal language model over the modules of a Q-Former, whose tokens attend to the queries of images.

    It has no weights of its own, and lives for one call of [`~QFormerForPretraining.generate`]. The KV cache of a row
    begins with the keys and values of the queries of its image.

    Args:
        qformer ([`QFormerModel`]): Q-Former that reads texts.
        lm_head ([`QFormerLMHead`]): head that predicts the next token.
        queries (list of pairs of tensors): keys and values of the queries of B images in each layer,
            `[B, heads, Q, head_size]`.

    Example:

    ```python
    >>> decoder = QFormerDecoder(model.qformer, model.lm_head, queries)  # doctest: +SKIP
    >>> decoder(torch.tensor([[3, 17, 25]])).logits.shape  # doctest: +SKIP
    torch.Size([1, 3, 30523])
    ```
    """

    config_class = QFormerConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, qformer: QFormerModel, lm_head: QFormerLMHead, queries: list[KeysAndValues]):
        super().__init__(qformer.config)  # without `post_init`, which would initialise the weights
        self.generation_config = GenerationConfig()
        self.qformer, self.lm_head, self.queries = qformer, lm_head, queries
        self.num_images, _, self.num_queries, _ = queries[0][0].shape

    def new_cache(self, rows_of_image: int, max_tokens: int) -> DynamicCache:
        """Return a KV cache that begins with the queries, for some rows of each image.

        Args:
            rows_of_image: number of beams or samples of each image, whose rows follow each other.
            max_tokens: largest number of tokens of a row.
        """
        cache = DynamicCache()
        cache.layers = [SharedPrefixLayer(key, value, rows_of_image, max_tokens) for key, value in self.queries]
        return cache

    def with_queries(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the mask of tokens `[B, T]` with ones for the queries before them, `[B, Q+T]`."""
        return nn.functional.pad(mask, (self.num_queries, 0), value=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the token after each token.

        Args:
            input_ids (`[R, n]`, long): the tokens after those in the cache. Row r belongs to image `r // (R / B)`.
            attention_mask (`[R, Q+T]`, *optional*): 1 for a query or token, 0 for padding on the left of the tokens,
                with those in the cache.
            past_key_values (`DynamicCache`, *optional*): KV cache of [`~QFormerDecoder.new_cache`]. Without it, the
                tokens are all of the row.
            use_cache (`bool`, *optional*): whether to return the cache.
            logits_to_keep (`int`, defaults to 0): number of tokens at the end to compute logits for; 0 for all tokens.

        Returns:
            An output with `logits` (`[R, n, V]`).
        """
        rows, length = input_ids.shape
        cache = past_key_values
        if cache is None:
            cache = self.new_cache(rows // self.num_images, length)
        total = cache.get_seq_length() - self.num_queries + length  # T
        columns = torch.arange(total, device=input_ids.device)
        positions = columns[-length:]
        allowed = self.with_queries(columns <= positions[:, None])  # [n, Q+T]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None].bool()  # [R, n, Q+T]
            tokens = attention_mask[:, self.num_queries :]
            positions = (tokens.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        states = self.qformer.dropout(self.qformer.layernorm(self.qformer.embeddings(input_ids, positions)))
        mask = None if length == 1 and attention_mask is None else additive(allowed, states.dtype)
        if mask is not None:
            mask = mask.view(-1, 1, *allowed.shape[-2:])
        for index, layer in enumerate(self.qformer.encoder.layers()):
            key, value = cache.update(*keys_and_values(layer, states), index)
            states = attend(layer, states, key, value, mask)
            states = layer.output(layer.intermediate(states), states)
        logits = self.lm_head(states[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)


def keys_and_values(layer: QFormerLayer, states: torch.Tensor) -> KeysAndValues:
    """Return keys and values of tokens `[R, n, Dq]` in self-attention, `[R, heads, n, head_size]`."""
    attention = layer.attention.attention
    return attention.split_heads(attention.key(states)), attention.split_heads(attention.value(states))


def attend(
    layer: QFormerLayer,
    states: torch.Tensor,  # [R, n, Dq]
    key: torch.Tensor,  # [R, heads, L, head_size]
    value: torch.Tensor,
    mask: torch.Tensor | None = None,  # [R or 1, 1, n, L]
) -> torch.Tensor:
    """Run self-attention of a layer on tokens, with keys and values of the L tokens that they attend to."""
    attention = layer.attention.attention
    attended, _ = attention.attend_heads(attention.split_heads(attention.query(states)), key, value, mask)
    return layer.attention.output(attended, states)


def align_right(texts: TextBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of texts with their padding on the left, `[B, P]`, and their mask, long."""
    lengths = texts.mask.sum(dim=1, keepdim=True)
    width = int(lengths.max())
    places = torch.arange(width, device=lengths.device) - (width - lengths)  # [B, P], negative for padding
    return texts.ids.gather(1, places.clamp(min=0)), (places >= 0).long()


def check_decoding_options(config: GenerationConfig, options: dict[str, Any]) -> None:
    """Refuse options of `generate` that a Q-Former does not support.

    Raises:
        ValueError: for such an option; the message names it.
    """
    check_generation_options(config, options, is_encoder_decoder=False)
    values = {**config.to_dict(), **options}
    own_cache = "the KV cache begins with the queries of the images"
    no_outputs = "the Q-Former returns only the logits of a caption"
    reasons = {
        "past_key_values": own_cache,
        "cache_implementation": own_cache,
        "output_attentions": no_outputs,
        "output_hidden_states": no_outputs,
    }
    for name, reason in reasons.items():
        if values.get(name):
            raise ValueError(f"Leave out `{name}`, which `generate` of a Q-Former does not support: {reason}.")
