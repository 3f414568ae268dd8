"""A Q-Former, and the captioner that it makes of a vision encoder and a language model.

    image [B,3,H,W] -> vision_model -> [B,N,Dv] -> qformer -> [B,Q,Dq] -> language_projection -> [B,Q,D] soft prompt
    soft prompt + prompt tokens -> language_model -> caption

Read from top to bottom: the layers of the Q-Former, the Q-Former, the captioner (what it computes, what of it trains,
how it is made of two pretrained models). How the language model reads is in language_qformer.py, how a captioner is
loaded and saved in saving_qformer.py, how a CPU multiplies in linear_qformer.py. The Q-Former is BLIP-2's (Li et al.
2023, arXiv 2301.12597); its parameters carry the names of transformers' `Blip2QFormerModel`.

In the shapes below B is images, K captions of an image, N image tokens, Q queries, P prompt tokens, T caption tokens,
V words of the vocabulary, and D, Dq, Dv the widths of the language model, the Q-Former and the vision encoder.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbones_qformer import (
    BACKBONES,
    VisionModelPlaceholder,
    commit_of,
    dtype_of,
    is_frozen,
    is_quantized,
    language_model_from_config,
    load_backbone,
    untie_t5_head,
    vision_model_from_config,
)
from .configuration_qformer import QFormerCaptionerConfig, QFormerConfig
from .language_qformer import (
    MAX_LOGITS_PER_CHUNK,
    ChunkedCrossEntropy,
    can_prefill_prefix,
    embed_prompt,
    encode_captions,
    output_layer,
    output_weights,
    prefill_shared_prefix,
)
from .processing_qformer import ImageInput, QFormerCaptionerProcessor, load_qformer_tokenizer
from .saving_qformer import QFormerCaptionerPreTrainedModel

logger = logging.get_logger(__name__)

# ----------------------------------------------------------------------------------------------------------------------
# The Q-Former: BERT layers in which the queries also look at the image
# ----------------------------------------------------------------------------------------------------------------------


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
    """Attention written out, the only one that also returns its weights. `attention_mask` is added to the scores."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class QFormerMultiHeadAttention(nn.Module):
    """The queries attend to themselves or, given `encoder_hidden_states`, to the image."""

    def __init__(self, config: QFormerConfig, key_value_size: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = False  # the attention interface asks
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
        def split_heads(x: torch.Tensor) -> torch.Tensor:  # -> [B, heads, length, head_size]
            return x.view(*x.shape[:-1], self.num_heads, self.head_size).transpose(1, 2)

        key_value_states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            split_heads(self.query(hidden_states)),
            split_heads(self.key(key_value_states)),
            split_heads(self.value(key_value_states)),
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # [B, Q, heads, head_size]
        return attended.flatten(2), weights


class QFormerOutput(nn.Module):
    """What closes every sub-layer: projection, dropout, residual, layer norm (post-norm, as in BERT)."""

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
    """Self-attention, every `cross_attention_frequency` layers cross-attention to the image, feed-forward.

    Words of a prompt, where the Q-Former reads any, stand behind the queries. They meet them in the self-attention, do
    not look at the image, and have a feed-forward part of their own.
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
        queries, words = hidden_states.tensor_split([self.num_query_tokens], dim=1)  # [B, Q, Dq], [B, P, Dq]
        if self.has_cross_attention:
            queries = self.crossattention(
                queries,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **kwargs,
            )
        queries = self.output_query(self.intermediate_query(queries), queries)
        if words.shape[1] == 0:
            return queries
        return torch.cat([queries, self.output(self.intermediate(words), words)], dim=1)


class QFormerEncoder(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList([QFormerLayer(config, index) for index in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, encoder_hidden_states, **kwargs)
        return hidden_states


class QFormerEmbeddings(nn.Module):
    """Words of a prompt, and their places in it."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)  # [B, P, Dq]


class QFormerModel(PreTrainedModel):
    r"""The Q-Former of BLIP-2 (arXiv 2301.12597, section 3.1): learned queries that read an image.

    With `use_qformer_text_input` it is InstructBLIP's (arXiv 2305.06500): what the queries take from the image then
    depends on a prompt.

    The queries are a parameter of this module, so whatever saves the module (an adapter's `modules_to_save`, say)
    saves them too.

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
    input_modalities = ("image",)
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
            # Queries that start equal stay equal: transformers' BLIP-2 starts them at zero, LAVIS at this.
            init.normal_(self.query_tokens, mean=0.0, std=self.config.initializer_range)

    @torch.no_grad()
    def standardize(self, encoder_hidden_states: torch.Tensor) -> None:
        """Let a fresh Q-Former see how images differ from the mean image: what they share is most of their features.

        A value of cross-attention is `W ((x - mean) / std) + b` from then on, folded into its weights, with mean and
        standard deviation of images' mean features.

        Args:
            encoder_hidden_states (`[B, N, Dv]`, float): features of some hundred images.
        """
        images = encoder_hidden_states.float().mean(dim=1)  # [B, Dv]
        for layer in self.encoder.layer:
            if layer.has_cross_attention:
                value = layer.crossattention.attention.value
                value.weight.div_(images.std(dim=0).clamp(min=1e-4).to(value.weight))
                value.bias.sub_(value.weight @ images.mean(dim=0).to(value.weight))

    def get_input_embeddings(self) -> nn.Embedding | None:
        """Of the prompt's words. Without text there are none: the queries are the input."""
        return self.embeddings.word_embeddings if self.config.use_qformer_text_input else None

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Read images.

        Args:
            encoder_hidden_states (`[B, N, Dv]`, float): features of the images; cast to the Q-Former's dtype.
            encoder_attention_mask (`[B, N]`, bool or int, *optional*): 1 for a feature to look at, 0 for padding.
            input_ids, attention_mask (`[B, P]`, long, *optional*): a prompt in the Q-Former's own words, where it reads
                text; 1 for a word, 0 for padding, which stands behind the words.
            kwargs: `output_hidden_states` and `output_attentions` (the latter with eager attention) as everywhere.

        Returns:
            `last_hidden_state` (`[B, Q, Dq]`) and `pooler_output` (`[B, Dq]`, the first query's).

        Raises:
            ValueError: if the features do not have the width that the Q-Former was made for, or for a prompt that it
                cannot read.
        """
        width = encoder_hidden_states.shape[-1]
        if width != self.config.encoder_hidden_size:
            raise ValueError(
                f"The image features are {width} wide, but this Q-Former was made for width "
                f"{self.config.encoder_hidden_size}. Compute them with the vision encoder that it was trained on."
            )
        encoder_hidden_states = encoder_hidden_states.to(self.query_tokens.dtype)
        queries = self.query_tokens.expand(encoder_hidden_states.shape[0], -1, -1)  # [B, Q, Dq]
        hidden_states = queries if input_ids is None else torch.cat([queries, self._embed_prompt(input_ids)], dim=1)
        hidden_states = self.dropout(self.layernorm(hidden_states))  # [B, Q+P, Dq]
        if attention_mask is not None:
            seen = torch.cat([attention_mask.new_ones(queries.shape[:2]), attention_mask], dim=1)
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=seen
            )
        if encoder_attention_mask is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=queries,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        queries = self.encoder(
            hidden_states,
            encoder_hidden_states,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )[:, : queries.shape[1]]
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=queries, pooler_output=queries[:, 0])

    def load_pretrained(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over the weights of another Q-Former, and warn of all that it cannot give.

        Raises:
            ValueError: for a tensor of another shape, other than what looks at the features of another vision encoder.
        """
        own = self.state_dict()
        looks = "crossattention.attention.key.weight", "crossattention.attention.value.weight"
        fits = {name: tensor for name, tensor in weights.items() if name in own and tensor.shape == own[name].shape}
        wrong = [name for name in weights if name in own and name not in fits and not name.endswith(looks)]
        if wrong:
            raise ValueError(
                f"The pretrained Q-Former has {wrong[0]!r} of shape {tuple(weights[wrong[0]].shape)}, but "
                f"{tuple(own[wrong[0]].shape)} was asked for ({len(wrong)} tensors differ). Leave out the fields that "
                "the checkpoint decides."
            )
        self.load_state_dict(fits, strict=False)
        if fresh := [name for name in own if name not in fits]:
            logger.warning(
                f"{len(fresh)} of {len(own)} tensors of the Q-Former start fresh, from {fresh[0]!r} on: the pretrained "
                "one has none that fit."
            )
        if dropped := [name for name in weights if name not in own]:
            logger.warning(
                f"{len(dropped)} of {len(weights)} tensors of the pretrained Q-Former are left out, from "
                f"{dropped[0]!r} on: this one has no such part."
            )

    def _embed_prompt(self, input_ids: torch.Tensor) -> torch.Tensor:
        if not self.config.use_qformer_text_input:
            raise ValueError(
                "This Q-Former reads no text: leave out `qformer_input_ids`, or make a Q-Former with "
                "`use_qformer_text_input=True`."
            )
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"The prompt is {input_ids.shape[1]} tokens long, but the Q-Former reads at most "
                f"{self.config.max_position_embeddings}. Shorten it."
            )
        return self.embeddings(input_ids)


# ----------------------------------------------------------------------------------------------------------------------
# The captioner
# ----------------------------------------------------------------------------------------------------------------------


class ProjectionPerQuery(nn.Module):
    """From queries `[B, Q, Dq]` to a soft prompt `[B, Q, D]`, each query by weights of its own.

    With one projection for all of them, whatever a frozen language model asks of one token of its prompt the others
    learn, too: after a few dozen steps they are nearly the same token, in which the image drowns.
    """

    def __init__(self, num_query_tokens: int, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_query_tokens, in_features, out_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_query_tokens, out_features, dtype=dtype))

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bqi,qio->bqo", queries, self.weight) + self.bias


@dataclass
class QFormerCaptionerOutput(ModelOutput):
    """What a captioner returns.

    Args:
        loss (`[]`, float32, *optional*): mean cross-entropy in nats over the caption tokens, if there were labels.
        losses (`[B]` or `[B, K]`, float32, *optional*): nats of each caption, summed over its tokens; no gradient.
        logits (`[B, T, V]` or `[B, K, T, V]`, *optional*): scores of the word at each label; without labels, of the
            first word. `None` if they were skipped (`skip_logits`).
        soft_prompt (`[B, Q, D]`): what the language model read in place of the image.
    """

    loss: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    soft_prompt: torch.FloatTensor | None = None


class QFormerCaptioner(QFormerCaptionerPreTrainedModel, GenerationMixin):
    r"""A vision encoder, a Q-Former and a language model that captions what the encoder sees.

    Built from two pretrained models with [`~QFormerCaptioner.from_backbones`], from a folder or the Hub with
    `from_pretrained`, or with random weights from a [`QFormerCaptionerConfig`].

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
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["QFormerModel"]  # small; of the backbones theirs count
    _keep_in_fp32_modules = ["qformer", "language_projection"]  # float16 overflows there (LAVIS issue 267)

    def __init__(
        self,
        config: QFormerCaptionerConfig,
        vision_model: PreTrainedModel | VisionModelPlaceholder | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)

        def dtype(part: str) -> torch.dtype:
            return getattr(torch, config.dtypes[part]) if config.dtypes else torch.get_default_dtype()

        if vision_model is None:
            vision_model = vision_model_from_config(config.vision_config, dtype("vision_model"))
        if language_model is None:
            language_model = language_model_from_config(config.text_config, dtype("language_model"))
        untie_t5_head(language_model)
        config.vision_config, config.text_config = vision_model.config, language_model.config
        self.vision_model = vision_model
        self.qformer = QFormerModel._from_config(config.qformer_config, dtype=dtype("qformer"))
        # The words' width is not always `hidden_size`: OPT-350m reads words of 512 into a model of 1024.
        word_size = language_model.get_input_embeddings().weight.shape[-1]
        sizes = (config.qformer_config.hidden_size, word_size)
        if config.projection_per_query:
            queries = config.qformer_config.num_query_tokens
            self.language_projection = ProjectionPerQuery(queries, *sizes, dtype=dtype("language_projection"))
        else:
            self.language_projection = nn.Linear(*sizes, dtype=dtype("language_projection"))
        self.language_model = language_model
        self.post_init()
        self.loss_type = None  # the Trainer must count all labels: ours are not shifted
        # One set of decoding defaults, ours: those of a chat model would sample.
        self.generation_config.max_new_tokens = 50
        self.language_model.generation_config = GenerationConfig.from_model_config(language_model.config)
        self._freeze()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProjectionPerQuery):
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)

    # --- From image to soft prompt ------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the vision encoder: `[B, 3, H, W]` -> `[B, N, Dv]`, without a graph where it is frozen."""
        # requires_grad_(False) is not enough: gradient checkpointing makes the input of the encoder require gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.vision_model)):
            return self.vision_model(pixel_values.to(dtype_of(self.vision_model))).last_hidden_state

    def get_soft_prompt(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Turn images `[B, 3, H, W]`, or their features `[B, N, Dv]`, into what the language model reads: `[B, Q, D]`.

        Raises:
            ValueError: if not exactly one of the two is given, if the features have another width, or if the Q-Former
                gets a prompt (`qformer_input_ids`, `[B, P']`) and reads no text.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError(
                "Give either `pixel_values` (images) or `image_embeds` (features of images), and not both."
            )
        if image_embeds is None:
            image_embeds = self.get_image_features(pixel_values)
        queries = self.qformer(image_embeds, input_ids=qformer_input_ids, attention_mask=qformer_attention_mask)
        return self.language_projection(queries.last_hidden_state)

    def get_prefix(
        self,
        soft_prompt: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        room_for: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands in front of the caption: soft prompt and prompt, embedded `[B, Q+P, D]`, and its mask `[B, Q+P]`.

        Prompts may be padded on either side. Padding ends up where it cannot make a batch differ from single images:
        in front of everything for a decoder, which writes on at the end, and behind it for an encoder.

        Raises:
            ValueError: if the prefix, with `room_for` more words of caption, is longer than the language model allows.
        """
        words = self.language_model.get_input_embeddings()
        # Under a `device_map` the words may be on another device; offloaded ones come to the soft prompt.
        device = soft_prompt.device if words.weight.is_meta else words.weight.device
        prefix = soft_prompt.to(device, words.weight.dtype)  # [B, Q, D]
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        if input_ids is not None and input_ids.shape[1] > 0:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            prompt = embed_prompt(self.language_model, input_ids).to(device)
            prefix = torch.cat([prefix, prompt], dim=1)
            mask = torch.cat([mask, attention_mask.to(mask)], dim=1)
            order = mask.argsort(dim=1, stable=True, descending=self.config.is_encoder_decoder)
            prefix = prefix.gather(1, order[..., None].expand_as(prefix))
            mask = mask.gather(1, order)

        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        needed = max(prefix.shape[1], room_for) if self.config.is_encoder_decoder else prefix.shape[1] + room_for
        if limit is not None and needed > limit:
            queries = self.config.qformer_config.num_query_tokens
            raise ValueError(
                f"The language model reads at most {limit} tokens, but {queries} queries, a prompt of "
                f"{prefix.shape[1] - queries} and a caption of up to {room_for} tokens were asked for. Shorten the "
                "prompt or the caption."
            )
        return prefix, mask

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
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> QFormerCaptionerOutput:
        """Score captions. The batch is the same whatever the language model.

        Args:
            pixel_values (`[B, 3, H, W]`, float): images; or
            image_embeds (`[B, N, Dv]`, float): features of images, computed before.
            input_ids, attention_mask (`[B, P]`, long, *optional*): the prompt only.
            qformer_input_ids, qformer_attention_mask (`[B, P']`, long, *optional*): the prompt in the Q-Former's own
                words, where it reads text.
            labels (`[B, T]` or `[B, K, T]`, long, *optional*): one caption or K captions of each image,
                end-of-sequence included, padded with -100. The image is encoded once for all of them.
            num_items_in_batch (*optional*): divide the summed loss by this instead of by the number of caption tokens,
                so that gradient accumulation weighs every token alike. The Trainer passes it.
            skip_logits (`bool`, *optional*): return no logits, and compute the loss without ever holding those of all
                tokens. By default where there are labels and the logits would take more than 32 MiB in float32.
            kwargs: `return_dict` as everywhere in transformers; the rest is passed on to the language model's decoder.

        Raises:
            ValueError: for features of the wrong width, or more tokens than the language model allows.
        """
        room_for = 1 if labels is None else labels.shape[-1]
        soft_prompt = self.get_soft_prompt(
            pixel_values, image_embeds, qformer_input_ids, qformer_attention_mask
        )  # [B, Q, D]
        prefix, prefix_mask = self.get_prefix(soft_prompt, input_ids, attention_mask, room_for)  # [B, Q+P, D]
        targets = prefix_mask.new_full((len(prefix), 1), -100) if labels is None else labels
        captions = targets.reshape(len(prefix), -1, targets.shape[-1])  # [B, K, T]
        hidden_states = encode_captions(
            self.language_model, prefix, prefix_mask, captions, self.generation_config, **kwargs
        )  # [B*K*T, D]

        words = output_layer(self.language_model)
        vocabulary = self.language_model.config.vocab_size
        if skip_logits is None:
            skip_logits = labels is not None and targets.numel() * vocabulary > MAX_LOGITS_PER_CHUNK
        if not skip_logits:
            logits = words(hidden_states)
        if labels is None:
            return QFormerCaptionerOutput(logits=logits.view(*targets.shape, -1), soft_prompt=soft_prompt)

        real = targets.flatten() != -100
        if skip_logits:
            weights = output_weights(self.language_model) if torch.is_grad_enabled() else []
            loss, own = ChunkedCrossEntropy.apply(
                words,
                max(1, MAX_LOGITS_PER_CHUNK // vocabulary),
                hidden_states[real],
                targets.flatten()[real],
                *weights,
            )
            losses = own.new_zeros(len(real)).masked_scatter(real, own)
        else:
            losses = nn.functional.cross_entropy(logits.float(), targets.flatten(), reduction="none")
            loss = losses.sum()
        return QFormerCaptionerOutput(
            loss=loss / (real.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch),
            losses=losses.detach().view(targets.shape).sum(dim=-1),
            logits=None if skip_logits else logits.view(*targets.shape, -1),
            soft_prompt=soft_prompt,
        )

    # --- Captioning ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ):
        """Write captions, with every decoding option of transformers' `generate`.

        Args:
            pixel_values, input_ids, attention_mask, image_embeds, qformer_input_ids, qformer_attention_mask: as in
                `forward`.
            labels: ignored, so that a training batch can be passed as it is.
            generation_config, kwargs: as everywhere in transformers (`num_beams`, `do_sample`, ...). `max_length` and
                `min_length` count the tokens of the caption, like `max_new_tokens` and `min_new_tokens`.

        Returns:
            `[B * num_return_sequences, T]` token ids of the captions alone, or with `return_dict_in_generate` the usual
            output object, whose `sequences` are these.
        """
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        if kwargs.get("max_length") is not None:
            config.max_new_tokens = kwargs.pop("max_length")
        if kwargs.get("min_length") is not None:
            config.min_new_tokens = kwargs.pop("min_length")
        kwargs = config.update(**kwargs)  # what is left is for the language model
        config.max_new_tokens = config.max_new_tokens or config.max_length or self.generation_config.max_new_tokens
        config.max_length = None
        config.min_new_tokens, config.min_length = config.min_new_tokens or config.min_length, None
        soft_prompt = self.get_soft_prompt(pixel_values, image_embeds, qformer_input_ids, qformer_attention_mask)
        prefix, prefix_mask = self.get_prefix(soft_prompt, input_ids, attention_mask, config.max_new_tokens)
        if can_prefill_prefix(self.language_model, prefix, config, kwargs):
            copies = max(config.num_beams or 1, config.num_return_sequences or 1)
            kwargs["past_key_values"] = prefill_shared_prefix(
                self.language_model, prefix, prefix_mask, copies, config.max_new_tokens
            )
        generated = self.language_model.generate(
            inputs_embeds=prefix, attention_mask=prefix_mask, generation_config=config, **kwargs
        )
        if self.config.is_encoder_decoder:  # its decoder's start token is no part of the caption
            if isinstance(generated, torch.Tensor):
                return generated[:, 1:]
            generated.sequences = generated.sequences[:, 1:]
        return generated

    def caption(
        self, images: ImageInput | Sequence[ImageInput], prompt: str | Sequence[str] | None = None, **generation
    ) -> str | list[str]:
        r"""Caption one image or several.

        Args:
            images: a PIL image, a path or a URL, or a list of these.
            prompt (`str` or list of `str`, *optional*): text that the caption follows; by default the processor's own.
            generation: options of `generate`, such as `num_beams=5`.

        Returns:
            A string for one image, a list of strings for a list (and for several `num_return_sequences`).

        Raises:
            OSError: for an image that is missing or cannot be read; the message names it.
            ValueError: if the model was built without a processor.

        Example:

        ```python
        >>> model.caption(["dog.jpg", "cat.jpg"], num_beams=5, max_new_tokens=20)  # doctest: +SKIP
        ['A dog runs over the grass.', 'A cat sleeps on a bed.']
        ```
        """
        if self.processor is None:
            raise ValueError(
                "This captioner has no processor. Set `model.processor = QFormerCaptionerProcessor(image_processor, "
                "tokenizer)`, or load the model from a folder that holds one."
            )
        several = isinstance(images, (list, tuple))
        if several and not images:
            return []
        # Where a part is offloaded, whatever reads the inputs fetches them from anywhere.
        device = next((weight.device for weight in self.parameters() if not weight.is_meta), torch.device("cpu"))
        inputs = self.processor(images=images, text=prompt).to(device)
        captions = self.processor.batch_decode(self.generate(**inputs, **generation), skip_special_tokens=True)
        captions = [caption.strip() for caption in captions]
        return captions if several or len(captions) > 1 else captions[0]

    # --- What trains --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "QFormerCaptioner":
        """As `nn.Module.train`, but frozen backbones stay in evaluation mode: no dropout where nothing learns."""
        super().train(mode)
        for part in self.frozen_backbones():
            getattr(self, part).eval()
        if self.language_model.is_activation_checkpointing:
            # transformers recomputes activations of layers in training mode only. A layer's own flag does nothing else,
            # its children stay in evaluation mode; but some layers drop out by themselves (OPT, BART): not those.
            for layer in self.language_model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    own = [rate for name, rate in vars(layer).items() if "dropout" in name]
                    layer.training = mode and not any(own)
        return self

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As everywhere in transformers, on the language model: words and output layer are all its own."""
        return self.language_model.resize_token_embeddings(*args, **kwargs)

    def print_trainable_parameters(self) -> None:
        """Print one line per part: parameters, how many of them train, dtype."""
        for name, part in self.named_children():
            total = sum(parameter.numel() for parameter in part.parameters())
            if is_quantized(part):  # several to the byte
                total = part.num_parameters()
            trainable = sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
            dtype = str(dtype_of(part)).removeprefix("torch.")
            print(f"{name:<20} {total:>15,} parameters {trainable:>15,} trainable  {dtype}")

    # --- From two pretrained models -----------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike,
        language: str | os.PathLike,
        vision_revision: str | None = None,
        language_revision: str | None = None,
        freeze_vision_model: bool = True,
        freeze_language_model: bool = True,
        dtype: str | torch.dtype = "auto",
        prompt: str = "",
        qformer: str | os.PathLike | None = None,
        qformer_revision: str | None = None,
        qformer_tokenizer: str | os.PathLike | None = None,
        load_vision_model: bool = True,
        projection_per_query: bool = False,
        quantization_config: BitsAndBytesConfig | None = None,
        **qformer_fields,
    ) -> "QFormerCaptioner":
        r"""Put a Q-Former between two pretrained models: a fresh one, or a pretrained one with a fresh projection.

        Args:
            vision, language (`str`): Hub ids or folders of a vision encoder and a language model.
            vision_revision, language_revision (`str`, *optional*): branch, tag or commit on the Hub.
            freeze_vision_model, freeze_language_model (`bool`, defaults to `True`): train only the Q-Former.
            dtype (`str` or `torch.dtype`, defaults to `"auto"`): of the backbones; "auto" is each one's own. The
                Q-Former and the projection are always float32.
            prompt (`str`, defaults to `""`): text between the queries and the caption, where a call gives none.
            qformer (`str`, *optional*): Hub id or folder of a checkpoint to take the Q-Former out of: a BLIP-2, an
                InstructBLIP, a captioner or Q-Former of ours, or a BERT (whose layers then begin with BERT's weights).
                What does not fit, such as the sight of another vision encoder, starts fresh; a warning says so.
            qformer_revision (`str`, *optional*): its branch, tag or commit.
            qformer_tokenizer (`str`, *optional*): Hub id or folder of the tokenizer of a Q-Former that reads text
                (`use_qformer_text_input=True`); by default the one that came with `qformer`, else BERT's.
            load_vision_model (`bool`, defaults to `True`): `False` leaves the vision encoder out of memory, to train on
                its precomputed features; [`~QFormerCaptioner.load_vision_model`] fetches it later.
            projection_per_query (`bool`, defaults to `False`): give each query a projection of its own.
            quantization_config (`BitsAndBytesConfig`, *optional*): put the frozen language model into 4 or 8 bits
                ([`~QFormerCaptioner.quantize_language_model`]).
            qformer_fields: fields of [`QFormerConfig`], such as `num_query_tokens=16`.

        Raises:
            OSError: if a backbone cannot be fetched.
            ValueError: if the pretrained Q-Former cannot be read, or has other sizes than the fields say.
            TypeError: for a keyword that is not a field of [`QFormerConfig`].

        Example:

        ```python
        >>> model = QFormerCaptioner.from_backbones(
        ...     "facebook/dinov2-small", "HuggingFaceTB/SmolLM2-135M", num_hidden_layers=4, num_query_tokens=16
        ... )  # doctest: +SKIP
        ```
        """
        weights = None
        if qformer is not None:
            try:
                from qformer_captioner.hub.convert import load_qformer  # does not travel to the Hub
            except ImportError as error:
                raise ImportError("To begin with a pretrained Q-Former, pip install qformer-captioner.") from error
            pretrained_fields, weights = load_qformer(qformer, qformer_revision)
            qformer_fields = {**pretrained_fields, **qformer_fields}
        qformer_config = QFormerConfig.from_fields(**qformer_fields)
        vision_model = load_backbone(
            "vision_model", os.fspath(vision), vision_revision, dtype, load_weights=load_vision_model
        )
        language_model = load_backbone("language_model", os.fspath(language), language_revision, dtype)
        config = QFormerCaptionerConfig(
            # Copies: a composite config resets the attention implementation of the configs that it is made of.
            vision_config=copy.deepcopy(vision_model.config),
            qformer_config=qformer_config,
            text_config=copy.deepcopy(language_model.config),
            vision_model_name_or_path=vision_model.config.name_or_path,
            vision_model_revision=commit_of(vision, vision_revision),
            language_model_name_or_path=language_model.config.name_or_path,
            language_model_revision=commit_of(language, language_revision),
            freeze_vision_model=freeze_vision_model,
            freeze_language_model=freeze_language_model,
            projection_per_query=projection_per_query,
        )
        # Of the language model's decoding defaults we take over the special tokens: a chat model ends on several.
        own = language_model.generation_config.to_dict()
        special_tokens = {name: own[name] for name in own if name.endswith("_token_id") and own[name] is not None}
        model = cls(config, vision_model=vision_model, language_model=language_model)
        for part in BACKBONES:
            if not is_frozen(getattr(model, part)):
                getattr(model, part).float()  # what trains needs more digits than bfloat16 has
        model.generation_config.update(**special_tokens)
        # Queries start three times as loud as words. A frozen language model listens to much louder ones, too, and
        # training makes them so; but from random ones it would first have to recover.
        words = model.language_model.get_input_embeddings().weight
        std = 3 * words.float().std().item() / config.qformer_config.hidden_size**0.5
        nn.init.normal_(model.language_projection.weight, std=std)
        if weights is not None:
            model.qformer.load_pretrained(weights)
        model.processor = QFormerCaptionerProcessor.from_backbones(
            vision, language, vision_revision, language_revision, prompt, config.is_encoder_decoder
        )
        if qformer_config.use_qformer_text_input:
            model.processor.qformer_tokenizer = load_qformer_tokenizer(
                qformer_tokenizer, qformer, qformer_revision, qformer_config.vocab_size
            )
        model._keep_by_reference(model.frozen_backbones())
        model._take_fingerprints(BACKBONES)
        if quantization_config is not None:
            model.quantize_language_model(quantization_config)
        model.eval()
        model.print_trainable_parameters()
        return model


QFormerCaptioner.register_for_auto_class("AutoModel")

__all__ = ["QFormerCaptioner", "QFormerCaptionerOutput", "QFormerModel"]
