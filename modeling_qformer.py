# Long on purpose: the Q-Former and the captioner around it are one model, read from top to bottom in an evening.
"""Q-Former, and captioner that joins a vision encoder and a language model with it.

```
image [B,3,H,W] -> vision_model -> [B,N,Dv] -> qformer -> [B,Q,Dq] -> language_projection -> [B,Q,D] soft prompt
soft prompt + prompt tokens -> language_model -> caption
```

The file defines the Q-Former, then the captioner. The layers of the Q-Former are in layers_qformer.py.
language_qformer.py trains the language model after a prefix, and generation_qformer.py generates captions after it. The
base classes of the captioner are in saving_qformer.py (loading, saving), captioner_qformer.py (language model) and
captioning_qformer.py (`caption`). The Q-Former is BLIP-2's (Li et al. 2023, arXiv 2301.12597); its parameters have the
names of transformers' `Blip2QFormerModel`.

Shapes: B images, K captions of an image, N image tokens, Q queries, P prompt tokens, T tokens of a caption. V is the
size of the vocabulary. D, Dq and Dv are the widths of the language model, the Q-Former and the vision encoder.
"""

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    ModelOutput,
)
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs
from transformers.utils import is_tracing, logging
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbones_qformer import (
    BACKBONES,
    VisionModelPlaceholder,
    commit_of,
    embedding_weights,
    is_frozen,
    language_model_from_config,
    load_backbone,
    placeholder_for,
    untie_t5_head,
    vision_model_or_width,
)
from .captioner_qformer import QFormerCaptionerPreTrainedModel
from .captioning_qformer import QFormerCaptioningModel
from .checkpoint_qformer import arguments_for
from .configuration_qformer import QFormerCaptionerConfig, QFormerConfig, special_tokens_of
from .encoders_qformer import (
    image_feature_size,
    num_frames_of,
    vision_config_of,
    vision_model_from_config,
)
from .features_qformer import feature_mask, mean_features, pool_patches
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
from .layers_qformer import (
    FeatureNorm,
    QFormerAttention,
    QFormerEmbeddings,
    QFormerEncoder,
    QFormerLayer,
    QFormerMultiHeadAttention,
    mask_of_windows,
    split_windows,
)
from .processing_qformer import QFormerCaptionerProcessor
from .vision_qformer import VisionFeaturesOutput, encode_images, features_of_inputs, split_vision_inputs

logger = logging.get_logger(__name__)

# Features after the layer norm of an encoder have a standard deviation near 1. Embeddings with that of other weights,
# 0.02, are lost in them: training on drawn motion took more than twice as many steps to notice the order of frames.
FRAME_EMBEDDING_STD = 0.5

# ----------------------------------------------------------------------------------------------------------------------
# The Q-Former
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class QFormerModelOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """Output of a Q-Former.

    Args:
        last_hidden_state (`[B, Q, Dq]`): outputs of the queries. With `window_size`, of the queries of all windows.
        pooler_output (`[B, Dq]`): output of the first query.
        query_attention_mask (`[B, Q]`, bool, *optional*): `False` for the queries of windows of padding. `None` if
            there are no such windows.
    """

    query_attention_mask: torch.Tensor | None = None


class QFormerModel(PreTrainedModel):
    r"""Q-Former of BLIP-2 (arXiv 2301.12597, section 3.1): learned query tokens that attend to image features.

    With `use_qformer_text_input=True` it is the Q-Former of InstructBLIP (arXiv 2305.06500), whose queries also attend
    to a prompt.

    The query tokens are a parameter of this module, so they are saved with the module.

    Args:
        config ([`QFormerConfig`]): sizes of the Q-Former.

    Example:

    ```python
    >>> import torch
    >>> from qformer_captioner import QFormerConfig, QFormerModel
    >>> qformer = QFormerModel(QFormerConfig(num_hidden_layers=2, num_query_tokens=16, encoder_hidden_size=384))
    >>> qformer(torch.randn(5, 257, 384)).last_hidden_state.shape
    torch.Size([5, 16, 768])
    ```
    """

    config_class = QFormerConfig
    config: QFormerConfig
    base_model_prefix = "qformer"
    main_input_name = "encoder_hidden_states"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["QFormerLayer"]
    _can_record_outputs = {
        "hidden_states": QFormerLayer,
        "attentions": OutputRecorder(QFormerMultiHeadAttention, index=1, layer_name="attention.attention"),
        "cross_attentions": OutputRecorder(QFormerMultiHeadAttention, index=1, layer_name="crossattention.attention"),
    }

    def __init__(self, config: QFormerConfig):
        super().__init__(config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size))
        if config.num_frames > 1:
            self.frame_embeddings = nn.Parameter(torch.empty(config.num_frames, config.encoder_hidden_size))
        if config.pooled_grid_size is not None:
            self.feature_norm = FeatureNorm(config)
        self.feature_dropout = nn.Dropout(config.feature_dropout_prob)
        if config.use_qformer_text_input:
            self.embeddings = QFormerEmbeddings(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = QFormerEncoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # Equal queries would stay equal. LAVIS initialises them at random, transformers' BLIP-2 with zeros.
            init.normal_(self.query_tokens, mean=0.0, std=self.config.initializer_range)
            if self.config.num_frames > 1:
                init.normal_(self.frame_embeddings, mean=0.0, std=FRAME_EMBEDDING_STD)
            if (spread := self.config.attention_initializer_range) is not None:
                for attention in (each for each in self.modules() if isinstance(each, QFormerAttention)):
                    init.normal_(attention.attention.value.weight, mean=0.0, std=spread)
                    init.normal_(attention.output.dense.weight, mean=0.0, std=spread)
        elif isinstance(module, FeatureNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, module_name=None, **kwargs):
        r"""Load a Q-Former from a folder or the Hub, also one inside the checkpoint of another model.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub id of a Q-Former, a captioner or a model of stage 1,
                whose Q-Former is loaded without its text part. Also of a BERT, and of another checkpoint with the
                parameters of a `Blip2QFormerModel`: BLIP-2, InstructBLIP, Granite Speech ...
            module_name (`str`, *optional*): name of the Q-Former's module in a checkpoint with several Q-Formers, such
                as `"model.projectors.0.qformer"`.
            model_args, kwargs: passed to `PreTrainedModel.from_pretrained` (`dtype`, `revision`, `config`, ...). Fields
                of [`QFormerConfig`] override those of the checkpoint.

        Returns:
            The Q-Former in evaluation mode. Weights that a checkpoint lacks, such as the query tokens of a
            `Blip2QFormerModel`, are newly initialised, and a warning says so.

        Raises:
            OSError: if the checkpoint cannot be fetched, or has no Q-Former or several; the message names them.

        Example:

        ```python
        >>> qformer = QFormerModel.from_pretrained("ibm-granite/granite-speech-3.3-2b")  # doctest: +SKIP
        >>> qformer.config.num_query_tokens, qformer.config.window_size  # doctest: +SKIP
        (3, 15)
        ```
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, **kwargs)
        arguments = arguments_for(pretrained_model_name_or_path, module_name, **kwargs)
        return super().from_pretrained(arguments.pop("pretrained_model_name_or_path"), *model_args, **arguments)

    def get_input_embeddings(self) -> nn.Embedding | None:  # type: ignore[override]
        """Return the embeddings of the prompt, or `None` for a Q-Former without text input."""
        return self.embeddings.word_embeddings if self.config.use_qformer_text_input else None

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Replace the embeddings of the prompt.

        Raises:
            ValueError: if the Q-Former reads no prompt.
        """
        if not self.config.use_qformer_text_input:
            raise ValueError(
                "This Q-Former does not read prompts and has no embeddings to replace: build a Q-Former with "
                "`use_qformer_text_input=True`."
            )
        self.embeddings.word_embeddings = value

    @torch.no_grad()
    def normalize_image_features(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> None:
        """Normalise image features with the statistics of images.

        The mean over all images dominates the features and hides the differences between images from a new Q-Former.
        After this call a value in cross-attention is `W ((x - mean) / std) + b`. `mean` and `std` are statistics of the
        mean features of the given images. They are folded into the value weights. With `pooled_grid_size` they are the
        statistics of the pooled features, and normalise keys, too.

        Args:
            encoder_hidden_states (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos, float): features of a few hundred
                images or videos.
            encoder_attention_mask (`[B, N]` or `[B, F, N]`, bool or int, *optional*): 1 for a feature, 0 for padding.

        Raises:
            ValueError: if the mask has another shape, or holds other values.

        Example:

        ```python
        >>> import torch
        >>> from qformer_captioner import QFormerConfig, QFormerModel
        >>> qformer = QFormerModel(QFormerConfig(num_hidden_layers=2, encoder_hidden_size=384))
        >>> qformer.normalize_image_features(torch.randn(100, 257, 384))
        ```
        """
        summary = self.summarize_features(encoder_hidden_states, encoder_attention_mask)
        if self.config.pooled_grid_size is not None:
            self.feature_norm.fit(summary)
            return
        images = summary.squeeze(1)  # [B, Dv]
        for attention in self._cross_attentions():
            value = attention.value
            value.weight.div_(images.std(dim=0).clamp(min=1e-4).to(value.weight))
            value.bias.sub_(value.weight @ images.mean(dim=0).to(value.weight))

    def summarize_features(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the features that `normalize_image_features` needs of each image, which are fewer.

        Args:
            encoder_hidden_states (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos, float): features.
            encoder_attention_mask (`[B, N]` or `[B, F, N]`, bool or int, *optional*): 1 for a feature, 0 for padding.

        Returns:
            Mean features `[B, 1, Dv]` in float32. With `pooled_grid_size`, pooled features `[B, P + G*G, Dv]`, or
            `[B*F, P + G*G, Dv]` of the frames that are not padding.

        Raises:
            ValueError: if the mask has another shape or holds other values, or the features cannot be pooled.
        """
        if self.config.pooled_grid_size is None:
            return mean_features(encoder_hidden_states, encoder_attention_mask)[:, None]
        mask = None if encoder_attention_mask is None else feature_mask(encoder_hidden_states, encoder_attention_mask)
        pooled, mask = self._pool(encoder_hidden_states.float(), mask)
        return pooled.flatten(0, -3) if mask is None else pooled[mask[..., 0]]

    def _pool(self, features: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.config.pooled_grid_size is not None
        return pool_patches(features, mask, self.config.pooled_grid_size, self.config.num_prefix_tokens)

    @torch.no_grad()
    def resize_image_features(self, encoder_hidden_size: int) -> None:
        """Change the width of the image features, with newly initialised key and value weights in cross-attention.

        Args:
            encoder_hidden_size (`int`): width of the features, Dv.
        """
        if encoder_hidden_size == self.config.encoder_hidden_size:
            return
        logger.warning(
            f"The Q-Former attended to features of width {self.config.encoder_hidden_size} and now gets features "
            f"of width {encoder_hidden_size}: {2 * len(self._cross_attentions())} of its weights are newly initialised."
        )
        self.config.encoder_hidden_size = encoder_hidden_size
        if self.config.num_frames > 1:
            embeddings = self.frame_embeddings.new_empty(self.config.num_frames, encoder_hidden_size)
            self.frame_embeddings = nn.Parameter(embeddings.normal_(std=FRAME_EMBEDDING_STD))
        if self.config.pooled_grid_size is not None:
            self.feature_norm = FeatureNorm(self.config).to(self.query_tokens)
        for attention in self._cross_attentions():
            for linear in (attention.key, attention.value):
                weight = linear.weight.new_empty(linear.out_features, encoder_hidden_size)
                linear.weight = nn.Parameter(weight.normal_(std=self.config.initializer_range))
                linear.in_features = encoder_hidden_size

    def _cross_attentions(self) -> list[QFormerMultiHeadAttention]:
        modules = self.encoder.named_modules()
        attentions = [(name, module) for name, module in modules if isinstance(module, QFormerMultiHeadAttention)]
        return [module for name, module in attentions if name.endswith("crossattention.attention")]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> QFormerModelOutput:
        """Compute the query outputs, which attend to image features.

        Args:
            encoder_hidden_states (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos of F frames, float): features; cast to
                the Q-Former's dtype.
            encoder_attention_mask (`[B, N]` or `[B, F, N]`, bool or int, *optional*): 1 for a feature, 0 for padding.
            input_ids (`[B, P]`, long, *optional*): prompt as tokens of the Q-Former's tokenizer, padded on the right.
                Requires `use_qformer_text_input=True`.
            attention_mask (`[B, P]`, long, *optional*): 1 for a token of the prompt, 0 for padding.
            kwargs: `output_hidden_states`, and `output_attentions` with eager attention.

        Returns:
            A [`QFormerModelOutput`].

        Raises:
            ValueError: if the features have another width than `config.encoder_hidden_size`, or if the Q-Former cannot
                read the prompt. Also for a mask of another shape, a row without features, too many frames, or a mask of
                a prompt without its tokens.
        """
        if input_ids is None and attention_mask is not None:
            raise ValueError(
                "The Q-Former was given the mask of a prompt without its tokens: pass `input_ids` "
                "(`qformer_input_ids` of a captioner), or leave out the mask."
            )
        features, mask = self.prepare_features(encoder_hidden_states, encoder_attention_mask)
        batch_size = features.shape[0]  # `len` would be a constant for `torch.export`
        query_attention_mask = None
        if self.config.window_size is not None:  # from here on, a window is a row of the batch
            query_attention_mask = mask_of_windows(mask, self.config.window_size, self.config.num_query_tokens)
            features, mask = split_windows(features, mask, self.config.window_size), None
            windows = features.shape[0] // batch_size
            input_ids = None if input_ids is None else input_ids.repeat_interleave(windows, dim=0)
            attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(windows, dim=0)
        queries = self.query_tokens.expand(features.shape[0], -1, -1)  # [B, Q, Dq]
        hidden_states = queries if input_ids is None else torch.cat([queries, self._embed_prompt(input_ids)], dim=1)
        hidden_states = self.dropout(self.layernorm(hidden_states))  # [B, Q+P, Dq]
        masks: dict[str, Any] = {}  # in the form that the attention implementation expects
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(queries.shape[:2]), attention_mask], dim=1)
            masks["attention_mask"] = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        if mask is not None:
            if is_flash_attention_requested(self.config):  # it would take the end of the mask for that of the queries
                raise ValueError(
                    "Flash attention takes no mask of the features: load the Q-Former with "
                    "`attn_implementation={'qformer_config': 'sdpa'}`, or pass rows of one length."
                )
            masks["encoder_attention_mask"] = create_bidirectional_mask(
                config=self.config, inputs_embeds=queries, attention_mask=mask, encoder_hidden_states=features
            )
        queries = self.encoder(hidden_states, features, **masks, **kwargs)[:, : queries.shape[1]]
        if self.config.window_size is not None:
            queries = queries.reshape(batch_size, -1, queries.shape[-1])  # [B, windows*Q, Dq]
        return QFormerModelOutput(
            last_hidden_state=queries, pooler_output=queries[:, 0], query_attention_mask=query_attention_mask
        )

    def prepare_features(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Check features, and return them as cross-attention reads them, with their mask.

        Args:
            encoder_hidden_states (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos of F frames, float): features.
            encoder_attention_mask (`[B, N]` or `[B, F, N]`, bool or int, *optional*): 1 for a feature, 0 for padding.

        Returns:
            Features `[B, N, Dv]` or `[B, F*N, Dv]` in the dtype of the Q-Former, with 0 for padding. N is smaller with
            `pooled_grid_size`. Their mask, bool, is `None` without padding.

        Raises:
            ValueError: as `forward` does.
        """
        self._check_features(encoder_hidden_states)
        mask = self._check_mask(encoder_hidden_states, encoder_attention_mask)
        features = encoder_hidden_states.to(self.query_tokens.dtype)
        if self.config.pooled_grid_size is not None:
            features, mask = self._pool(features, mask)
            features = self.feature_norm(features)
        features = self.feature_dropout(features)
        if self.config.num_frames > 1:
            features = self._add_frame_embeddings(features)
        if features.ndim == 4:
            features, mask = features.flatten(1, 2), None if mask is None else mask.flatten(1)  # [B, F*N, Dv]
        if mask is not None:  # a weight of 0 does not remove a NaN
            features = features.masked_fill(~mask[..., None], 0)
        return features, mask

    def _check_features(self, features: torch.Tensor) -> None:
        width = features.shape[-1]
        if features.ndim not in (3, 4) or 0 in features.shape:
            raise ValueError(
                "The Q-Former reads features of the shape [B, N, D], or [B, F, N, D] for videos, without empty "
                f"dimensions, not {list(features.shape)}."
            )
        if width != self.config.encoder_hidden_size:
            raise ValueError(
                f"The features have width {width}, but this Q-Former accepts width "
                f"{self.config.encoder_hidden_size}. Compute them with the encoder that it was trained with."
            )
        if features.ndim == 4 and features.shape[1] > self.config.num_frames:
            raise ValueError(
                f"The videos have {features.shape[1]} frames, but this Q-Former tells {self.config.num_frames} apart. "
                f"Pass fewer frames, or train a Q-Former with `num_frames={features.shape[1]}`."
            )

    def _check_mask(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Check a mask, and return it as bool, or `None` if no feature is masked: attention is faster without one."""
        if mask is None:
            return None
        mask = feature_mask(features, mask)
        if is_tracing(mask):  # values are not known
            return mask
        lengths = mask.flatten(1).sum(dim=1)
        if (lengths == 0).any():
            row = int((lengths == 0).int().argmax())
            raise ValueError(
                f"Row {row} of the batch has no features: its mask is 0 everywhere. Leave out rows without features."
            )
        return None if mask.all() else mask

    def _add_frame_embeddings(self, features: torch.Tensor) -> torch.Tensor:
        """Add the embedding of its frame to each feature. Images `[B, N, Dv]` are videos of one frame."""
        if features.ndim == 3:
            return features + self.frame_embeddings[0]
        return features + self.frame_embeddings[: features.shape[1], None]

    def _embed_prompt(self, input_ids: torch.Tensor) -> torch.Tensor:
        if not self.config.use_qformer_text_input:
            raise ValueError(
                "This Q-Former does not read prompts: leave out `qformer_input_ids`, or build a Q-Former with "
                "`use_qformer_text_input=True`."
            )
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens, but the Q-Former reads at most "
                f"{self.config.max_position_embeddings}. Shorten the prompt."
            )
        return self.embeddings(input_ids)


# ----------------------------------------------------------------------------------------------------------------------
# The captioner
# ----------------------------------------------------------------------------------------------------------------------


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

    # --- From two pretrained models -----------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | None,
        language: str | os.PathLike,
        *,
        encoder_hidden_size: int | None = None,
        vision_revision: str | None = None,
        language_revision: str | None = None,
        qformer: QFormerModel | None = None,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        freeze_vision_model: bool = True,
        freeze_language_model: bool = True,
        load_vision_model: bool = True,
        dtype: str | torch.dtype = "auto",
        prompt: str = "",
        projection_per_query: bool = False,
        **qformer_fields,
    ) -> "QFormerCaptioner":
        r"""Join two pretrained models with a new or a given Q-Former and a new projection.

        Args:
            vision, language (`str`): Hub ids or folders of a vision encoder and a language model. `vision` is `None`
                for a captioner that reads only features (`image_embeds`), of any other encoder.
            encoder_hidden_size (`int`, *optional*): width of the features, if `vision` is `None`.
            vision_revision, language_revision (`str`, *optional*): branches, tags or commits on the Hub.
            qformer ([`QFormerModel`], *optional*): pretrained Q-Former, which becomes a part of the captioner. Load one
                with `qformer_captioner.hub.convert.load_qformer`. If it was trained with image features of another
                width, its cross-attention weights are newly initialised and a warning says so.
            qformer_tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer of a Q-Former that reads the prompt
                (`use_qformer_text_input=True`).
            freeze_vision_model, freeze_language_model (`bool`, defaults to `True`): whether to freeze the backbone.
            load_vision_model (`bool`, defaults to `True`): `False` leaves the vision encoder out of memory, to train on
                precomputed features. [`~QFormerCaptioner.load_vision_model`] fetches it later.
            dtype (`str` or `torch.dtype`, defaults to `"auto"`): dtype of frozen backbones; "auto" is the dtype of each
                saved backbone. All trainable parts are float32.
            prompt (`str`, defaults to `""`): default text between the image and the caption.
            projection_per_query (`bool`, defaults to `False`): give each query its own projection.
            qformer_fields: fields of the [`QFormerConfig`] of a new Q-Former, such as `num_query_tokens=16`.

        Returns:
            The captioner in evaluation mode, with its processor.

        Raises:
            OSError: if a backbone cannot be fetched; the message names it.
            TypeError: for a keyword that is not a field of [`QFormerConfig`], fields beside a given `qformer`, or a
                `qformer` that is not a [`QFormerModel`]. Also for neither a vision encoder nor a width, or for both.
            ValueError: if a Q-Former that reads the prompt has no `qformer_tokenizer`.

        Example:

        ```python
        >>> model = QFormerCaptioner.from_backbones(
        ...     "facebook/dinov2-small", "HuggingFaceTB/SmolLM2-135M", num_hidden_layers=4, num_query_tokens=16
        ... )  # doctest: +SKIP
        ```
        """
        check_qformer_arguments(qformer, qformer_fields)
        qformer_config = QFormerConfig.from_fields(**qformer_fields) if qformer is None else qformer.config
        if qformer_config.use_qformer_text_input and qformer_tokenizer is None:
            raise ValueError(
                "The Q-Former reads the prompt: pass its tokenizer as `qformer_tokenizer`, such as "
                '`AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")`.'
            )
        vision_model = vision_model_or_width(vision, encoder_hidden_size, vision_revision, dtype, load_vision_model)
        language_model = load_backbone("language_model", os.fspath(language), language_revision, dtype)
        assert isinstance(language_model, PreTrainedModel)  # and not a placeholder
        if qformer is not None:
            qformer.float().resize_image_features(image_feature_size(vision_model.config))
        config = QFormerCaptionerConfig(
            vision_config=vision_model.config,
            qformer_config=qformer_config,
            text_config=language_model.config,
            vision_model_name_or_path=vision_model.config.name_or_path or None,
            vision_model_revision=None if vision is None else commit_of(vision, vision_revision),
            language_model_name_or_path=language_model.config.name_or_path,
            language_model_revision=commit_of(language, language_revision),
            freeze_vision_model=freeze_vision_model,
            freeze_language_model=freeze_language_model,
            projection_per_query=projection_per_query,
        )
        # Only the special tokens of the language model's decoding defaults are kept. A chat model ends at one of
        # several tokens.
        config.keep_special_tokens(cast(GenerationConfig, language_model.generation_config))
        model = cls(config, vision_model=vision_model, qformer=qformer, language_model=language_model)
        model.processor = QFormerCaptionerProcessor.from_backbones(
            vision,
            language,
            vision_revision,
            language_revision,
            prompt,
            config.is_encoder_decoder,
            num_frames_of(vision_model.config) or qformer_config.num_frames,
        )
        model.processor.qformer_tokenizer = qformer_tokenizer
        model._fit_to_backbones()
        frozen = model.frozen_backbones()
        model._keep_by_reference([part for part in frozen if part != "vision_model" or vision is not None])
        model._take_fingerprints(BACKBONES)
        return model.eval()

    @torch.no_grad()
    def _fit_to_backbones(self) -> None:
        """Convert trainable backbones to float32, and scale the norm of the soft prompt to that of the embeddings."""
        for part in BACKBONES:
            if not is_frozen(getattr(self, part)):
                getattr(self, part).float()  # bfloat16 is too coarse for small weight updates
        # Soft-prompt vectors start with three times the embedding norm. Training increases the norm much further, but
        # random vectors with a large norm would first have to be unlearned.
        embedding_std = embedding_weights(self.language_model).float().std().item()
        nn.init.normal_(self.language_projection.weight, std=3 * embedding_std / self.qformer.config.hidden_size**0.5)


def check_qformer_arguments(qformer: QFormerModel | None, fields: dict[str, Any]) -> None:
    """Check the Q-Former and the other keywords that [`QFormerCaptioner.from_backbones`] was given.

    Raises:
        TypeError: for a Q-Former that is not loaded, and for keywords that other functions accept.
    """
    if qformer is not None and not isinstance(qformer, QFormerModel):
        raise TypeError(
            f"`qformer` must be a `QFormerModel`, not {qformer!r}: load one with "
            "`qformer_captioner.hub.convert.load_qformer`."
        )
    if "quantization_config" in fields:
        raise TypeError(
            "`from_backbones` does not accept `quantization_config`: call `model.quantize_language_model"
            "(quantization_config)` on the captioner that it returns."
        )
    if "qformer_revision" in fields:
        raise TypeError(
            "`from_backbones` does not accept `qformer_revision`: pass `qformer=load_qformer(name, revision)`, where "
            "`load_qformer` is in `qformer_captioner.hub.convert`."
        )
    if qformer is not None and fields:
        raise TypeError(f"`qformer` already has its sizes: pass {sorted(fields)} to `load_qformer`.")


QFormerCaptioner.register_for_auto_class("AutoModel")

__all__ = ["QFormerCaptioner", "QFormerCaptionerOutput", "QFormerModel"]
