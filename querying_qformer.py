"""Q-Former (Querying Transformer): learned queries that attend to image features, and may read text.

The Q-Former is BLIP-2's (Li et al. 2023, arXiv 2301.12597); its parameters have the names of transformers'
`Blip2QFormerModel`. Its layers are in layers_qformer.py, and masks and pooling of features in features_qformer.py.
modeling_qformer.py joins it to two backbones, and pretraining_qformer.py trains it without a language model.

Shapes: B images, N image tokens, Q queries. Dq and Dv are the widths of the Q-Former and the vision encoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.utils import is_tracing, logging
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .checkpoint_qformer import arguments_for
from .configuration_qformer import QFormerConfig
from .features_qformer import feature_mask, mean_features, pool_patches
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

logger = logging.get_logger(__name__)

# Features after the layer norm of an encoder have a standard deviation near 1. Embeddings with that of other weights,
# 0.02, are lost in them: training on drawn motion took more than twice as many steps to notice the order of frames.
FRAME_EMBEDDING_STD = 0.5


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
