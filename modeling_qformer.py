"""Captioner that joins a vision encoder and a language model with a Q-Former.

```
image [B,3,H,W] -> vision_model -> [B,N,Dv] -> qformer -> [B,Q,Dq] -> language_projection -> [B,Q,D] soft prompt
soft prompt + prompt tokens -> language_model -> caption
```

The steps are in files of their own: vision_qformer.py runs the vision encoder and querying_qformer.py the Q-Former.
language_qformer.py trains the language model after a prefix, and generation_qformer.py generates captions after it. The
base classes of the captioner are in saving_qformer.py (loading, saving), captioner_qformer.py (the two backbones) and
captioning_qformer.py (`caption`). The architecture is that of BLIP-2 (Li et al. 2023, arXiv 2301.12597), whose modules
have the same names in transformers.

Shapes: B images, K captions of an image, N image tokens, Q queries, P prompt tokens, T tokens of a caption. V is the
size of the vocabulary. D, Dq and Dv are the widths of the language model, the Q-Former and the vision encoder.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    ModelOutput,
)
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs
from transformers.utils.generic import can_return_tuple

from .backbones_qformer import (
    VisionModelPlaceholder,
    embedding_weights,
    language_model_from_config,
    placeholder_for,
    untie_t5_head,
)
from .captioner_qformer import QFormerCaptionerPreTrainedModel
from .captioning_qformer import QFormerCaptioningModel
from .configuration_qformer import QFormerCaptionerConfig, QFormerConfig, special_tokens_of
from .encoders_qformer import (
    vision_config_of,
    vision_model_from_config,
)
from .generation_qformer import (
    MAX_NEW_TOKENS,
    check_generation_options,
    generate_from_prefix,
    resolve_generation_config,
)
from .language_qformer import (
    build_prefix,
    caption_loss,
    check_labels,
    encode_captions,
    requested_outputs,
    weights_of_labels,
)
from .querying_qformer import QFormerModel
from .vision_qformer import VisionFeaturesOutput, encode_images, features_of_inputs, split_vision_inputs


class ProjectionPerQuery(nn.Module):
    """Linear projection of queries `[B, Q, Dq]` to a soft prompt `[B, Q, D]`, with separate weights for each query.

    If all queries share one projection, they also share its gradients. With a frozen language model, all soft-prompt
    vectors become nearly equal after a few dozen steps, and the soft prompt hardly depends on the image.
    """

    def __init__(self, num_query_tokens: int, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_query_tokens, in_features, out_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_query_tokens, out_features, dtype=dtype))

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        windows = queries.unflatten(1, (-1, len(self.weight)))  # [B, W, Q, Dq]; one window unless the config sets more
        return (torch.einsum("bwqi,qio->bwqo", windows, self.weight) + self.bias).flatten(1, 2)


@dataclass
class QFormerCaptionerOutput(ModelOutput):
    """Output of a captioner.

    Args:
        loss (`[]`, float32, *optional*): mean cross-entropy of the caption tokens in nats, with labels. With
            `label_weights`, the cross-entropy of each caption is multiplied by its weight.
        logits (`[B, T, V]` or `[B, K, T, V]`, *optional*): logits at each label; without labels, at the first token of
            a caption (T = 1). `None` if they were skipped (`skip_logits`).
        losses (`[B]` or `[B, K]`, float32, *optional*): cross-entropy of each caption in nats, summed over its tokens;
            without gradient and without weights.
        soft_prompt (`[B, Q, D]`): representation of the image that the language model attends to.
        vision_outputs, qformer_outputs, language_model_outputs (`ModelOutput`, *optional*): outputs of the three models
            with `output_hidden_states=True` or `output_attentions=True`. The sequence of a decoder-only language model
            is the soft prompt, the prompt and the caption, without padding between them. With several captions of an
            image, each has a row (`[B*K, ...]`).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    soft_prompt: torch.Tensor | None = None
    vision_outputs: ModelOutput | None = None
    qformer_outputs: ModelOutput | None = None
    language_model_outputs: ModelOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not `None`, with the outputs of the three models as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class QFormerCaptioner(QFormerCaptionerPreTrainedModel, QFormerCaptioningModel):
    r"""Image captioner: a vision encoder, a Q-Former and a language model.

    [`~QFormerCaptioner.from_backbones`] joins two pretrained models. `from_pretrained` loads a captioner from a folder
    or the Hub. The constructor creates a captioner from a [`QFormerCaptionerConfig`].

    Args:
        config ([`QFormerCaptionerConfig`]): configuration of all parts.
        vision_model (`PreTrainedModel`, *optional*): vision encoder; by default with random weights.
        qformer ([`QFormerModel`], *optional*): Q-Former; by default with random weights.
        language_model (`PreTrainedModel`, *optional*): language model; by default with random weights.

    Example:

    ```python
    >>> from transformers import AutoModel
    >>> model = AutoModel.from_pretrained("outputs/scenes", trust_remote_code=True)  # doctest: +SKIP
    >>> model.caption("photo.jpg")  # doctest: +SKIP
    'a small red circle to the left of a blue square'
    ```
    """

    config_class = QFormerCaptionerConfig
    config: QFormerCaptionerConfig
    base_model_prefix = "captioner"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["QFormerModel"]  # those of the backbones are added
    _keep_in_fp32_modules = ["qformer", "language_projection"]  # float16 overflows there (LAVIS issue 267)
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys: dict[str, str] = {}  # none of its own; peft looks for those of the parts only beside a dict

    def __init__(
        self,
        config: QFormerCaptionerConfig,
        vision_model: PreTrainedModel | VisionModelPlaceholder | None = None,
        qformer: QFormerModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)

        def dtype(part: str) -> torch.dtype:
            return getattr(torch, config.dtypes[part]) if config.dtypes else torch.get_default_dtype()

        if vision_model is None:
            vision_config = cast(PreTrainedConfig, config.vision_config)
            build = vision_model_from_config if config.has_vision_model else placeholder_for
            vision_model = build(vision_config, dtype("vision_model"))
        if language_model is None:
            text_config = cast(PreTrainedConfig, config.text_config)
            language_model = language_model_from_config(text_config, dtype("language_model"))
        untie_t5_head(language_model)
        if qformer is None:
            qformer_config = cast(QFormerConfig, config.qformer_config)  # a dict before the configuration is complete
            qformer = QFormerModel._from_config(qformer_config, dtype=dtype("qformer"))
        config.vision_config, config.text_config = vision_config_of(vision_model.config), language_model.config
        config.qformer_config = qformer.config
        self.vision_model = vision_model
        self.qformer = qformer
        # The embeddings may be narrower than `hidden_size`: OPT-350m has embeddings of 512 and a width of 1024.
        sizes = (qformer.config.hidden_size, embedding_weights(language_model).shape[-1])
        self.language_projection: nn.Linear | ProjectionPerQuery
        if config.projection_per_query:
            queries = qformer.config.num_query_tokens
            self.language_projection = ProjectionPerQuery(queries, *sizes, dtype=dtype("language_projection"))
        else:
            self.language_projection = nn.Linear(*sizes, dtype=dtype("language_projection"))
        self.language_model = language_model
        self.post_init()
        # post_init adds the names of the backbones. FSDP refuses a name that no module has, such as CLIP's text layers.
        self._no_split_modules = sorted(
            set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}
        )
        self.loss_type = None  # type: ignore[assignment]  # the Trainer would count shifted labels
        # The captioner has its own decoding defaults: those of a chat model would sample, and those of Blenderbot read
        # the token ids of its encoder, which gets embeddings.
        tokens, text_tokens = (
            special_tokens_of(GenerationConfig.from_model_config(own)) for own in (config, language_model.config)
        )
        self.generation_config = GenerationConfig(**tokens, max_new_tokens=MAX_NEW_TOKENS)
        self.language_model.generation_config = GenerationConfig(**text_tokens)
        self._freeze()

    def _decoder_start_token_id(self) -> int | None:
        """Return the token that `generate` starts the decoder of an encoder-decoder with."""
        tokens: dict[str, Any] = {**special_tokens_of(self.config), **special_tokens_of(self.generation_config)}
        return tokens.get("decoder_start_token_id", tokens.get("bos_token_id"))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProjectionPerQuery):
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)

    # --- From image to soft prompt ------------------------------------------------------------------------------------

    def encode_images(self, pixel_values: torch.Tensor, **kwargs: Any) -> VisionFeaturesOutput:
        """Run the vision encoder on images. A frozen encoder records no graph.

        Args:
            pixel_values (`[B, 3, H, W]`, or `[B, F, 3, H, W]` for videos, float): images; cast to the dtype of the
                vision encoder.
            kwargs: further inputs of the vision encoder that the processor returns (`VISION_INPUTS`), and its
                arguments, such as `output_hidden_states` and `interpolate_pos_encoding`.

        Returns:
            The output of the vision encoder, whose `last_hidden_state` are the image features `[B, N, Dv]` or
            `[B, F, N, Dv]`. Its `attention_mask` is `None`, or `False` for padding (`[B, N]` or `[B, F, N]`).

        Raises:
            ValueError: if the captioner was loaded without its vision encoder, or cannot read the images.
        """
        return encode_images(self.vision_model, pixel_values, **kwargs)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithVisionQformerOutputs:
        """Run vision encoder, Q-Former and projection, as `Blip2ForConditionalGeneration.get_image_features` does.

        Args:
            pixel_values (`[B, 3, H, W]`, or `[B, F, 3, H, W]` for videos, float): images.
            qformer_input_ids, qformer_attention_mask (`[B, P']`, long, *optional*): prompt in tokens of the Q-Former.
            image_attention_mask (`[B, N]` or `[B, F, N]`, *optional*): 0 for features that the Q-Former ignores.
            kwargs: `return_dict`, and those of [`~QFormerCaptioner.encode_images`]. The Q-Former also gets
                `output_hidden_states` and `output_attentions`.

        Returns:
            An output with the image features as `last_hidden_state` (`[B, N, Dv]`) and the soft prompt as
            `pooler_output` (`[B, Q, D]`). The outputs of both models are `vision_outputs` and `qformer_outputs`.

        Raises:
            ValueError: if the captioner was loaded without its vision encoder, or the Q-Former cannot read the prompt.

        Example:

        ```python
        >>> features = model.get_image_features(pixel_values)  # doctest: +SKIP
        >>> features.last_hidden_state.shape, features.pooler_output.shape  # doctest: +SKIP
        (torch.Size([2, 257, 384]), torch.Size([2, 32, 576]))
        ```
        """
        outputs, _, _ = self._encode(
            pixel_values=pixel_values,
            image_attention_mask=image_attention_mask,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            **kwargs,
        )
        return outputs

    def get_soft_prompt(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        **vision_inputs: Any,
    ) -> torch.Tensor:
        """Return the soft prompt `[B, Q, D]` of images `[B, 3, H, W]` or of their features `[B, N, Dv]`.

        Args:
            pixel_values (`[B, 3, H, W]`, or `[B, F, 3, H, W]` for videos, float): images; or
            image_embeds (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos, float): their features.
            qformer_input_ids, qformer_attention_mask (`[B, P']`, long, *optional*): prompt in tokens of the Q-Former.
            image_attention_mask (`[B, N]` or `[B, F, N]`, *optional*): 1 for a feature, 0 for padding.
            vision_inputs: further inputs that the processor returns for the images (`VISION_INPUTS`).

        Returns:
            `[B, Q, D]`, in the dtype of the projection. With `window_size`, Q is the number of queries of all windows,
            and the vectors of windows of padding have no meaning. [`QFormerModelOutput`] tells which these are.

        Raises:
            TypeError: if `image_embeds` are not a tensor.
            ValueError: if both or neither of `pixel_values` and `image_embeds` are given, or the Q-Former does not
                accept the features, their mask or the prompt.
        """
        _, soft_prompt, _ = self._encode(
            pixel_values=pixel_values,
            image_embeds=image_embeds,
            image_attention_mask=image_attention_mask,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            **vision_inputs,
        )
        return soft_prompt

    def _encode(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        frame_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithVisionQformerOutputs, torch.Tensor, torch.Tensor | None]:
        """Run the vision encoder, unless there are features, the Q-Former and the projection.

        Returns:
            The output of [`~QFormerCaptioner.get_image_features`], the soft prompt `[B, Q, D]`, and its mask, bool
            `[B, Q]`, or `None` without padding.
        """
        vision_outputs = features_of_inputs(
            self.vision_model,
            pixel_values,
            image_embeds,
            image_attention_mask,
            frame_attention_mask=frame_attention_mask,
            **kwargs,
        )
        features, mask = vision_outputs.last_hidden_state, vision_outputs.attention_mask
        qformer_outputs = self.qformer(
            features,
            encoder_attention_mask=mask,
            input_ids=qformer_input_ids,
            attention_mask=qformer_attention_mask,
            return_dict=True,
            **requested_outputs(kwargs),
        )
        soft_prompt = self.language_projection(qformer_outputs.last_hidden_state)
        outputs = BaseModelOutputWithVisionQformerOutputs(
            last_hidden_state=features,
            pooler_output=soft_prompt,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
            vision_outputs=None if pixel_values is None else vision_outputs,
            qformer_outputs=qformer_outputs,
        )
        # Other bridges, such as the Q-Former of the old scripts, have no windows.
        return outputs, soft_prompt, qformer_outputs.get("query_attention_mask")

    def get_prefix(
        self,
        soft_prompt: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 0,
        soft_prompt_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prefix `[B, Q+P, D]`, which is the soft prompt followed by the embedded prompt, and its mask.

        Args:
            soft_prompt (`[B, Q, D]`): soft prompt of the images.
            input_ids, attention_mask (`[B, P]`, long, *optional*): prompts, padded on either side.
            max_new_tokens (`int`, defaults to 0): tokens of the caption, to check the total length.
            soft_prompt_mask (`[B, Q]`, bool, *optional*): `False` for vectors of windows of padding.

        Raises:
            ValueError: if the prefix with `max_new_tokens` tokens is longer than the language model accepts.
        """
        return build_prefix(
            self.language_model, soft_prompt, input_ids, attention_mask, max_new_tokens, soft_prompt_mask
        )

    # --- Training -----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        frame_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> QFormerCaptionerOutput:
        """Compute the loss of captions. The batch is the same for decoder-only and encoder-decoder language models.

        Args:
            pixel_values (`[B, 3, H, W]`, or `[B, F, 3, H, W]` for videos, float): images; or
            image_embeds (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos, float): their precomputed features.
            input_ids, attention_mask (`[B, P]`, long, *optional*): the prompt without the caption.
            qformer_input_ids, qformer_attention_mask (`[B, P']`, long, *optional*): the prompt in tokens of the
                Q-Former, if it reads prompts.
            image_attention_mask (`[B, N]` or `[B, F, N]`, bool or int, *optional*): 1 for a feature, 0 for padding.
            labels (`[B, T]`, `[B, K, T]` or `[B*K, T]`, long, *optional*): one caption or K captions of each image with
                end-of-sequence tokens, without the prompt. Positions labelled -100 are ignored. The image is encoded
                once for all captions.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): divisor of the summed loss, by default the number
                of caption tokens. The Trainer passes it, so that gradient accumulation weighs all tokens equally.
            skip_logits (`bool`, *optional*): return no logits, and compute the loss without storing all of them.
                Defaults to `False` in evaluation mode, and in training mode to `True` if they would take more than 32
                MiB in float32. Ignored without labels.
            output_attentions, output_hidden_states (`bool`, *optional*): return the outputs of the three models with
                their attention weights (of eager attention) or hidden states.
            pixel_mask, pixel_attention_mask, spatial_shapes, image_sizes (`torch.Tensor`, *optional*): what the vision
                encoder reads beside the images. The processor returns it.
            frame_attention_mask (`[B, F]`, *optional*): 1 for a frame of a video, 0 for padding.
            interpolate_pos_encoding (`bool`, *optional*): let the vision encoder adapt its position embeddings to the
                size of the images.
            label_weights (`[B]`, `[B, K]` or `[B*K]`, float, *optional*): factor of the loss of each caption, of any
                sign. With the advantages of sampled captions as weights, the gradient is that of REINFORCE (Williams
                1992). The divisor of the loss does not change. Weights get no gradient.
            kwargs: `label_weights`, `return_dict`, and arguments of the language model's decoder.

        Returns:
            A [`QFormerCaptionerOutput`].

        Raises:
            ValueError: if the features have the wrong width, prefix and caption are too long, `labels` repeat
                `input_ids`, or the Trainer has removed the labels. Also for weights that do not fit the labels or are
                not finite.
        """
        # Not an argument with a name, because the Trainer expects every argument named "label..." in each batch.
        label_weights = kwargs.pop("label_weights", None)
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        requested = requested_outputs({"output_attentions": attentions, "output_hidden_states": states})
        # Arguments with names, because the Trainer drops columns that have the name of none.
        vision_inputs, _ = split_vision_inputs(
            {
                "pixel_mask": pixel_mask,
                "pixel_attention_mask": pixel_attention_mask,
                "spatial_shapes": spatial_shapes,
                "image_sizes": image_sizes,
                "frame_attention_mask": frame_attention_mask,
                "interpolate_pos_encoding": interpolate_pos_encoding,
            }
        )
        image_outputs, soft_prompt, soft_prompt_mask = self._encode(
            pixel_values,
            image_embeds,
            image_attention_mask,
            qformer_input_ids,
            qformer_attention_mask,
            **vision_inputs,
            **requested,
        )
        check_labels(labels, len(soft_prompt), input_ids, num_items_in_batch)
        weights = weights_of_labels(label_weights, labels, len(soft_prompt))
        max_new_tokens = 1 if labels is None else labels.shape[-1]
        prefix, prefix_mask = self.get_prefix(
            soft_prompt, input_ids, attention_mask, max_new_tokens, soft_prompt_mask
        )  # [B, Q+P, D]
        targets = prefix_mask.new_full((len(prefix), 1), -100) if labels is None else labels
        captions = targets.reshape(len(prefix), -1, targets.shape[-1])  # [B, K, T]
        hidden_states, language_model_outputs = encode_captions(
            self.language_model,
            prefix,
            prefix_mask,
            captions,
            self._decoder_start_token_id(),
            **requested,
            **kwargs,
        )  # [B*K*T, D]
        if labels is None or (skip_logits is None and not self.training):
            skip_logits = False
        loss, losses, logits = caption_loss(self.language_model, hidden_states, targets, skip_logits, weights)
        if labels is not None:
            loss = loss / ((labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return QFormerCaptionerOutput(
            loss=None if labels is None else loss,
            logits=logits,
            losses=None if labels is None else losses.sum(dim=-1),
            soft_prompt=soft_prompt,
            vision_outputs=image_outputs.vision_outputs if requested else None,
            qformer_outputs=image_outputs.qformer_outputs if requested else None,
            language_model_outputs=language_model_outputs if requested else None,
        )

    # --- Captioning ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ):
        """Generate the token ids of captions, with the decoding options of transformers' `generate`.

        An option that the caller does not set keeps its value in `self.generation_config`. Special tokens that are not
        set there either are those of `self.config`. Options that need the token ids of the whole prefix are refused:
        assisted generation, classifier-free guidance, token healing, and penalties on the tokens of an encoder.

        Args:
            pixel_values, input_ids, attention_mask, image_embeds, qformer_input_ids, qformer_attention_mask, \
            image_attention_mask: as in `forward`.
            labels: ignored, so that a training batch can be passed unchanged.
            generation_config (`GenerationConfig`, *optional*): decoding options; arguments override it.
            kwargs: further inputs that the processor returns for the images (`VISION_INPUTS`), and options such as
                `num_beams` and `do_sample`. `max_length` and `min_length` count the tokens of the
                caption, as `max_new_tokens` and `min_new_tokens` do.

        Returns:
            Token ids of the captions without the prompt, `[B * num_return_sequences, T]`. With
            `return_dict_in_generate=True`, an output object of transformers with these as `sequences`.

        Raises:
            ValueError: as `forward` does, and for an option that is not supported; the message names it.
        """
        vision_inputs, kwargs = split_vision_inputs(kwargs)
        config, model_kwargs = resolve_generation_config(self.config, self.generation_config, generation_config, kwargs)
        check_generation_options(config, model_kwargs, self.config.is_encoder_decoder)
        if config.stop_strings is not None and self.processor is not None:
            model_kwargs.setdefault("tokenizer", self.processor.tokenizer)
        _, soft_prompt, soft_prompt_mask = self._encode(
            pixel_values,
            image_embeds,
            image_attention_mask,
            qformer_input_ids,
            qformer_attention_mask,
            **vision_inputs,
        )
        prefix, prefix_mask = self.get_prefix(
            soft_prompt, input_ids, attention_mask, config.max_new_tokens, soft_prompt_mask
        )
        return generate_from_prefix(self.language_model, prefix, prefix_mask, config, **model_kwargs)


QFormerCaptioner.register_for_auto_class("AutoModel")

__all__ = ["QFormerCaptioner", "QFormerCaptionerOutput", "QFormerModel"]
