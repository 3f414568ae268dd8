"""Training of language models, decoder-only or encoder-decoder, after a prefix.

The captions of an image share its prefix. They are packed into one sequence after the prefix, and logits are computed
at labels only, in chunks. Losses and gradients equal those of one row per caption, up to rounding.

Shapes: B images, K captions of an image, T tokens of a caption, S = Q + P positions of a prefix (queries and prompt). L
is the length of a sequence, N the total number of positions, D the language model's width, V its vocabulary size.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    ModelOutput,
    MoEModelOutput,
    MoEModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
)
from transformers.utils import logging

from .backbones_qformer import embedding_weights, without_compiler

logger = logging.get_logger(__name__)

MAX_LOGITS_PER_CHUNK = 2**23  # 32 MiB in float32
# Decoder-only model types whose captions may share a prefix. tests/model/test_prefix.py checks each of them.
PREFIX_SHARING_MODELS = (
    "afmoe", "apertus", "arcee", "biogpt", "bitnet", "codegen", "cohere", "cohere2", "cwm", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "falcon", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe",
    "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "gptj", "granite", "granitemoe", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jais2", "llama", "minimax_m2", "ministral", "ministral3",
    "mistral", "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# The prefix
# ----------------------------------------------------------------------------------------------------------------------


def build_prefix(
    language_model: PreTrainedModel,
    soft_prompt: torch.Tensor,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 0,
    soft_prompt_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate a soft prompt `[B, Q, D]` and a text prompt `[B, P]`, and return the prefix `[B, S, D]` and its mask.

    Prompts may be padded on either side, and soft prompts anywhere (`soft_prompt_mask`, `[B, Q]`). The padding is
    moved, so that a batch gives the same results as single images. It goes to the beginning for a decoder-only model,
    which continues at the end, and to the end for an encoder.

    Raises:
        ValueError: if the prefix with `max_new_tokens` tokens is longer than the language model accepts, or the number
            of prompts is not that of soft prompts.
    """
    embeddings = embedding_weights(language_model)
    # With a `device_map` the embeddings may be on another device. If they are offloaded, use that of the soft prompt.
    device = soft_prompt.device if embeddings.is_meta else embeddings.device
    prefix = soft_prompt.to(device, embeddings.dtype)  # [B, Q, D]
    mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
    if soft_prompt_mask is not None:
        mask = soft_prompt_mask.to(mask)
    if input_ids is not None and input_ids.shape[1] > 0:
        if len(input_ids) != len(prefix):
            raise ValueError(f"There are {len(prefix)} images but {len(input_ids)} prompts: give one prompt for each.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        prefix = torch.cat([prefix, embed_prompt(language_model, input_ids).to(device)], dim=1)  # [B, S, D]
        mask = torch.cat([mask, attention_mask.to(mask)], dim=1)
    if prefix.shape[1] > soft_prompt.shape[1] or soft_prompt_mask is not None:
        order = mask.argsort(dim=1, stable=True, descending=language_model.config.is_encoder_decoder)
        if soft_prompt_mask is not None:  # a short soft prompt may have a long prompt, and the other way round
            width = int(mask.sum(dim=1).max())
            order = order[:, :width] if language_model.config.is_encoder_decoder else order[:, -width:]
        prefix, mask = select_positions(prefix, order), mask.gather(1, order)
    queries = soft_prompt.shape[1] if soft_prompt_mask is None else int(soft_prompt_mask.sum(dim=1).max())
    length = prefix.shape[1]
    limit = getattr(language_model.config, "max_position_embeddings", None)
    needed = max(length, max_new_tokens) if language_model.config.is_encoder_decoder else length + max_new_tokens
    if limit is not None and needed > limit:
        raise ValueError(
            f"The language model accepts at most {limit} tokens, but there are {queries} queries, a prompt of "
            f"{length - queries} and a caption of up to {max_new_tokens} tokens. Shorten the prompt or the caption."
        )
    return prefix, mask


def embed_prompt(language_model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Embed the tokens of a prompt `[B, P]` as the language model does: `[B, P, D]`."""
    embedded = language_model.get_input_embeddings()(input_ids)
    if language_model.config.is_encoder_decoder:  # the encoders of Pegasus and Marian scale their embeddings
        embedded = embedded * vars(language_model.get_encoder()).get("embed_scale", 1.0)
    return embedded


# ----------------------------------------------------------------------------------------------------------------------
# Captions after a prefix
# ----------------------------------------------------------------------------------------------------------------------


def encode_captions(
    language_model: PreTrainedModel,
    prefix: torch.Tensor,
    prefix_mask: torch.Tensor,
    captions: torch.Tensor,
    decoder_start_token_id: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, ModelOutput]:
    """Run the language model on captions `[B, K, T]` after a prefix `[B, S, D]` with mask `[B, S]`.

    Positions labelled -100 are ignored anywhere in a caption. The decoder of an encoder-decoder needs a start token.
    `kwargs` are passed to the decoder. With `output_hidden_states` or `output_attentions`, captions do not share a
    sequence, so that each has a row in the output.

    Returns:
        Hidden states of the decoder that predict the tokens of the captions, `[B*K*T, D]`, and the output of the
        language model without its output layer.

    Raises:
        ValueError: if the start token of an encoder-decoder is not known.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT also passes `None`
    kwargs["use_cache"] = False  # each caption needs only one pass
    order = (captions == -100).int().argsort(dim=2, stable=True)  # [B, K, T], ignored positions last
    packed = captions.gather(2, order)
    may_share = captions.shape[1] > 1 and not requested_outputs(kwargs)
    output: ModelOutput
    if language_model.config.is_encoder_decoder:
        hidden_states, output = encode_with_encoder_decoder(
            language_model, prefix, prefix_mask, packed, decoder_start_token_id, may_share, **kwargs
        )
    elif may_share and shares_prefix(language_model, prefix.shape[1] + captions.shape[2]):
        hidden_states, output = encode_with_shared_prefix(language_model, prefix, prefix_mask, packed, **kwargs)
    else:
        if may_share:
            logger.warning_once(
                f"A {language_model.config.model_type!r} language model cannot share a prefix among the captions of an "
                "image. The prefix is repeated for each caption, which gives the same results but takes longer."
            )
        hidden_states, output = encode_with_decoder_only(language_model, prefix, prefix_mask, packed, **kwargs)
    original = order.argsort(dim=2).flatten(0, 1)  # [B*K, T]
    hidden_states = select_positions(hidden_states.reshape(*original.shape, -1), original)
    return hidden_states.flatten(0, 1), output


def requested_outputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that ask each part of a captioner for its hidden states or its attention weights."""
    return {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)}


def encode_with_decoder_only(
    language_model: PreTrainedModel, prefix: torch.Tensor, prefix_mask: torch.Tensor, captions: torch.Tensor, **kwargs
) -> tuple[torch.Tensor, ModelOutput]:
    """Run one row `[prefix, caption]` for each caption `[B, K, T]`, and return the hidden states `[B*K, T, D]`."""
    number, length = captions.shape[1:]
    inputs = captions.flatten(0, 1)[:, :-1]  # [B*K, T-1]; the last token predicts nothing
    embedded = language_model.get_input_embeddings()(inputs.clamp(min=0))
    mask = torch.cat([prefix_mask.repeat_interleave(number, dim=0), (inputs != -100).long()], dim=1)
    if accepts(language_model, "position_ids"):
        kwargs["position_ids"] = position_ids_of(mask)
    embedded = torch.cat([prefix.repeat_interleave(number, dim=0), embedded], dim=1)
    output = decoder_of(language_model)(inputs_embeds=embedded, attention_mask=mask, **kwargs)
    return output.last_hidden_state[:, -length:], output


def encode_with_shared_prefix(
    language_model: PreTrainedModel, prefix: torch.Tensor, prefix_mask: torch.Tensor, captions: torch.Tensor, **kwargs
) -> tuple[torch.Tensor, ModelOutput]:
    """Run one row `[prefix, caption 1, ..., caption K]` for each image, and return the hidden states `[B, K*T, D]`.

    Each caption attends to the prefix and to itself, and its positions continue those of the prefix. The last token of
    a caption predicts nothing. With a prefix of three positions and the captions "a dog." and "the cat sleeps.":

    ```
    inputs      q  q  q  a  dog  the  cat  sleeps
    caption     0  0  0  1   1    2    2     2
    positions   0  1  2  3   4    3    4     5
    ```
    """
    number, length = captions.shape[1:]
    prefix_length, device = prefix.shape[1], prefix.device
    has_target = (captions[:, :, 1:] != -100).flatten(1)  # [B, K*(T-1)]
    order, packed_position = pack(has_target)  # [B, W], [B, K*(T-1)]
    inputs = captions[:, :, :-1].flatten(1).gather(1, order)  # [B, W]
    embedded = language_model.get_input_embeddings()(inputs.clamp(min=0))

    is_token = torch.cat([prefix_mask, (inputs != -100).to(prefix_mask)], dim=1).bool()  # [B, S+W]
    caption = torch.arange(1, number + 1, device=device).repeat_interleave(length - 1)[order]
    caption = torch.cat([torch.zeros_like(prefix_mask), caption], dim=1)  # [B, S+W]; 0 is the prefix
    visible = (caption[:, None, :] == 0) | (caption[:, :, None] == caption[:, None, :])
    visible = visible.tril() & is_token[:, None, :]  # [B, S+W, S+W]
    # Padding at the beginning attends to itself, because a softmax over no positions is NaN.
    diagonal = torch.eye(visible.shape[-1], dtype=torch.bool, device=device)
    visible |= diagonal & ~visible.any(dim=2, keepdim=True)

    prefix_positions = position_ids_of(prefix_mask)  # [B, S]
    offset = torch.arange(1, length, device=device).repeat(number)[order]
    kwargs["position_ids"] = torch.cat([prefix_positions, prefix_positions[:, -1:] + offset], dim=1)
    mask = attention_mask_of(language_model, visible[:, None], prefix.dtype)
    embedded = torch.cat([prefix, embedded], dim=1)  # [B, S+W, D]
    output = decoder_of(language_model)(inputs_embeds=embedded, attention_mask=mask, **kwargs)
    # The last position of the prefix predicts the first token of every caption.
    predicting = prefix_length + packed_position.unflatten(1, (number, length - 1))  # [B, K, T-1]
    first = predicting.new_full((len(predicting), number, 1), prefix_length - 1)
    return select_positions(output.last_hidden_state, torch.cat([first, predicting], dim=2).flatten(1)), output


def encode_with_encoder_decoder(
    language_model: PreTrainedModel,
    prefix: torch.Tensor,
    prefix_mask: torch.Tensor,
    captions: torch.Tensor,
    start: int | None,
    may_share: bool,
    **kwargs: Any,
) -> tuple[torch.Tensor, Seq2SeqModelOutput]:
    """Run the encoder once per image and the decoder on its captions, and return `[B, K*T, D]` or `[B*K, T, D]`.

    If they may, the captions of an image share one sequence of a T5 decoder, in which each attends to itself. T5 has
    relative positions, so they need no change. Other decoders have absolute positions, so each caption gets a row.
    """
    if start is None:
        raise ValueError(
            "The start token of the language model's decoder is not known: set `model.config.decoder_start_token_id`."
        )
    number, length = captions.shape[1:]
    encoder_output = language_model.get_encoder()(
        inputs_embeds=prefix, attention_mask=prefix_mask, **requested_outputs(kwargs)
    )
    encoded = encoder_output.last_hidden_state
    # Inputs are the labels shifted right by one position, after the start token that `generate` uses. (mBART's own
    # `prepare_decoder_input_ids_from_labels` would start with the last label.)
    inputs = captions.clamp(min=0).roll(1, dims=2)  # [B, K, T]
    inputs[:, :, 0] = start
    packed_position = None
    if may_share and language_model.config.model_type in ("t5", "mt5", "umt5"):
        order, packed_position = pack((captions != -100).flatten(1))  # [B, W], [B, K*T]
        inputs = inputs.flatten(1).gather(1, order)  # [B, W]
        caption = torch.arange(number, device=inputs.device).repeat_interleave(length)[order]
        visible = (caption[:, :, None] == caption[:, None, :]).tril()  # [B, W, W]
        kwargs["attention_mask"] = attention_mask_of(language_model, visible[:, None], prefix.dtype)
    else:
        inputs = inputs.flatten(0, 1)  # [B*K, T]
        encoded = encoded.repeat_interleave(number, dim=0)
        prefix_mask = prefix_mask.repeat_interleave(number, dim=0)
    output = decoder_of(language_model)(
        input_ids=inputs, encoder_hidden_states=encoded, encoder_attention_mask=prefix_mask, **kwargs
    )
    hidden_states = output.last_hidden_state
    if packed_position is not None:
        hidden_states = select_positions(hidden_states, packed_position)
    return hidden_states, Seq2SeqModelOutput(
        last_hidden_state=output.last_hidden_state,
        decoder_hidden_states=output.get("hidden_states"),
        decoder_attentions=output.get("attentions"),
        cross_attentions=output.get("cross_attentions"),
        encoder_last_hidden_state=encoder_output.last_hidden_state,
        encoder_hidden_states=encoder_output.get("hidden_states"),
        encoder_attentions=encoder_output.get("attentions"),
    )


def shares_prefix(language_model: PreTrainedModel, length: int) -> bool:
    """Return True if the captions of an image may share one sequence of `length` positions after one prefix.

    The model must accept position ids and a mask for each pair of positions, and each layer must attend to all earlier
    positions. The tested model types do, unless their configuration asks for a sliding window, ALiBi or another
    attention. The reason for False is logged at the level `DEBUG`.
    """
    config = language_model.config.get_text_config(decoder=True)  # of a multimodal language model
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    attention, layer_types = config._attn_implementation, set(getattr(config, "layer_types", None) or ())
    reasons = {
        f"the model type {config.model_type!r} is not tested": config.model_type not in PREFIX_SHARING_MODELS,
        "ALiBi counts the positions of the other captions": bool(getattr(config, "alibi", False)),  # Falcon
        f"{attention!r} attention takes no mask of pairs": attention not in ("eager", "sdpa"),
        f"the sliding window {window} is shorter than {length} positions": window is not None and 0 < window < length,
        f"there are layers of the types {layer_types}": bool(layer_types - {"full_attention", "sliding_attention"}),
    }
    for reason, applies in reasons.items():
        if applies:
            logger.debug(f"The captions of an image do not share a prefix: {reason}.")
            return False
    return True


def decoder_of(language_model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that maps embeddings to hidden states.

    `get_decoder` returns the output layer of a ModernBERT and the whole of a Llama 4.
    """
    decoder = language_model.get_decoder()
    is_decoder = isinstance(without_compiler(decoder), PreTrainedModel) and decoder is not language_model
    return decoder if is_decoder else language_model.model


def accepts(language_model: PreTrainedModel, name: str) -> bool:
    """Return True if the decoder has this argument. BLOOM has no `position_ids`, Mamba no `past_key_values`."""
    return name in inspect.signature(type(without_compiler(decoder_of(language_model))).forward).parameters


def position_ids_of(mask: torch.Tensor) -> torch.Tensor:
    """Number the positions of each row `[B, L]` from its first token that is not padding."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def attention_mask_of(language_model: PreTrainedModel, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a boolean mask `[B, 1, L, L]` to the form that the attention of the language model takes."""
    if language_model.config._attn_implementation == "eager":  # adds masks to the attention scores
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return visible


def pack(needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions that remain when each row `[B, L]`, bool, is packed to its needed positions.

    Return the positions to keep, `[B, W]`, and the new index of each needed position, `[B, L]`.
    """
    order = needed.int().argsort(dim=1, descending=True, stable=True)
    width = min(needed.shape[1], max(1, int(needed.sum(dim=1).max())))
    return order[:, :width], order.argsort(dim=1).clamp(max=max(0, width - 1))


def select_positions(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Select positions of each row: `[B, L, D]`, `[B, M]` -> `[B, M, D]`."""
    return hidden_states.gather(1, positions[..., None].expand(-1, -1, hidden_states.shape[-1]))


# ----------------------------------------------------------------------------------------------------------------------
# Logits and loss
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class DecoderOutputStub(MoEModelOutputWithPastAndCrossAttentions):
    """Output of a decoder that holds only hidden states, but has all fields that language models read."""

    cache_params: Cache | None = None  # Mamba, xLSTM
    state: list[torch.Tensor] | None = None  # RWKV
    shared_kv_states: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None  # Gemma 4


class LogitsHead:
    """Map from hidden states of the decoder to logits, as the language model computes it: `[N, D]` -> `[N, V]`.

    Training needs logits at labels only, in chunks, so it cannot get hidden states and logits from one call of the
    language model. `lm_head` alone is not enough: T5 and Cohere scale, Gemma 2 caps, and BART adds a bias. The head is
    therefore a shallow clone of the language model, with the same modules and the same `forward`. The decoder of the
    clone returns its inputs, so that only the steps after the decoder are left.

    Args:
        language_model: any model of `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`.

    Example:

    ```python
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from qformer_captioner.language_qformer import LogitsHead
    >>> model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=100))
    >>> LogitsHead(model)(torch.randn(5, 48)).shape
    torch.Size([5, 100])
    ```
    """

    def __init__(self, language_model: PreTrainedModel):
        self.language_model = language_model
        decoder = decoder_of(language_model)
        path = next(name for name, module in language_model.named_modules() if module is decoder)
        self.clone = parent = shallow_clone(language_model)
        *parents, last = (name for name in path.split(".") if name != "_orig_mod")
        for name in parents:
            parent._modules[name] = shallow_clone(parent.get_submodule(name))
            parent = parent.get_submodule(name)
        parent._modules[last] = shallow_clone(decoder)
        vars(parent._modules[last])["forward"] = return_inputs

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states[None]
        inputs: dict[str, Any] = {"inputs_embeds": hidden_states}
        if self.language_model.config.is_encoder_decoder:
            inputs = {"decoder_inputs_embeds": hidden_states, "encoder_outputs": MoEModelOutput(hidden_states)}
        return self.clone(**inputs, use_cache=False).logits[0]

    def trainable_weights(self) -> list[nn.Parameter]:
        """Return the trainable weights of the head, including those that it shares with the input embeddings."""
        below = [decoder_of(self.language_model)]
        if self.language_model.config.is_encoder_decoder:
            below.append(self.language_model.get_encoder())
        inside = {id(weight) for module in below for weight in module.parameters()}
        inside -= {id(weight) for weight in self.language_model.get_output_embeddings().parameters()}
        weights = self.language_model.parameters()
        return [weight for weight in weights if weight.requires_grad and id(weight) not in inside]


def shallow_clone(module: nn.Module) -> nn.Module:
    """Return a copy of a module without hooks. It shares its submodules with the original until they are replaced."""
    module = without_compiler(module)  # setting an attribute of the wrapper would change the original
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._forward_hooks, clone._forward_pre_hooks = OrderedDict(), OrderedDict()
    vars(clone).pop("forward", None)  # set by accelerate with a `device_map`; it runs the hooks of the whole module
    return clone


def return_inputs(*args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> DecoderOutputStub:
    """Replace the `forward` of a decoder, and return its inputs as hidden states."""
    return DecoderOutputStub(last_hidden_state=inputs_embeds)


def check_labels(
    labels: torch.Tensor | None,
    num_images: int,
    input_ids: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> None:
    """Check the labels of a batch, which other models take in other forms.

    Raises:
        ValueError: if the Trainer removed the labels, if their number is not that of the images, or if they repeat the
            prompt.
    """
    if labels is None:
        if num_items_in_batch is not None:
            raise ValueError(
                "The Trainer has removed the labels, which a captioner reads: leave out `label_smoothing_factor` and "
                "`compute_loss_func`. For a loss of your own, override `compute_loss` of the Trainer and use the "
                "logits of `model(**inputs, skip_logits=False)`, which are those of the labels."
            )
        return
    if labels.shape[0] != num_images and (labels.dim() != 2 or labels.shape[0] % num_images):
        raise ValueError(
            f"`labels` of shape {tuple(labels.shape)} do not fit {num_images} images: give one caption of each image "
            "(`[B, T]`) or K captions of each image (`[B, K, T]` or `[B*K, T]`)."
        )
    # A caption of one token is an empty caption, and its end-of-sequence token may also be the whole prompt.
    if input_ids is not None and labels.shape == input_ids.shape and labels.shape[1] > 1:
        is_label = labels != -100
        if is_label.any() and torch.equal(labels[is_label], input_ids[is_label]):
            raise ValueError(
                "`labels` repeat `input_ids`, so the captioner would read the caption before it predicts it: pass only "
                "the prompt as `input_ids`, and only the caption with its end-of-sequence token as `labels`."
            )


def weights_of_labels(
    label_weights: torch.Tensor | None, labels: torch.Tensor | None, num_images: int
) -> torch.Tensor | None:
    """Check the weights of captions, and return them for each label of `[..., T]`, float32, or `None` without weights.

    Raises:
        ValueError: for weights without labels, one weight too many or too few, or a weight that is not finite.
    """
    if label_weights is None:
        return None
    if labels is None:
        raise ValueError("`label_weights` weigh the losses of `labels`: pass both, or neither.")
    shapes = [labels.shape[:-1], (num_images, labels.shape[0] // num_images)]  # `[B*K, T]` also takes `[B, K]`
    if label_weights.shape not in shapes[: 4 - labels.dim()]:
        raise ValueError(
            f"`label_weights` of shape {tuple(label_weights.shape)} do not fit `labels` of shape "
            f"{tuple(labels.shape)}: give one weight for each caption, `[B]` for `[B, T]` and `[B, K]` for `[B, K, T]`."
        )
    if not label_weights.isfinite().all():
        raise ValueError("`label_weights` must be finite numbers, but some are NaN or infinite.")
    weights = label_weights.detach().to(labels.device, torch.float32).reshape(labels.shape[:-1])
    return weights[..., None].expand(labels.shape)


def caption_loss(
    language_model: PreTrainedModel,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    skip_logits: bool | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute the cross-entropy of tokens from the hidden states that predict them.

    Args:
        language_model: its head computes the logits.
        hidden_states (`[N, D]`): output of [`encode_captions`].
        targets (`[...]` with N elements, long): token ids; positions labelled -100 are ignored.
        skip_logits: compute the loss in chunks, without storing the logits of all positions. Defaults to `True` for
            more than `MAX_LOGITS_PER_CHUNK` logits.
        weights (`[...]`, float32): factor of the loss of each position in the sum; by default 1.

    Returns:
        Weighted sum of the losses in nats `[]`, loss of each position `[...]` (no gradient, without weights), and
        logits `[..., V]` or `None`. The sum is a function of these logits.
    """
    head, vocab_size = LogitsHead(language_model), language_model.config.vocab_size
    if skip_logits is None:
        skip_logits = targets.numel() * vocab_size > MAX_LOGITS_PER_CHUNK
    if not skip_logits:
        logits = head(hidden_states).view(*targets.shape, -1)
        losses = nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
        loss = losses.sum() if weights is None else (losses * weights.to(losses).flatten()).sum()
        return loss, losses.detach().view(targets.shape), logits
    is_target = targets != -100
    chunk_size = max(1, MAX_LOGITS_PER_CHUNK // vocab_size)
    of_head = head.trainable_weights() if torch.is_grad_enabled() else []
    inputs = hidden_states[is_target.flatten()], targets[is_target]
    factors = None if weights is None else weights.to(hidden_states.device)[is_target]
    loss, losses = ChunkedCrossEntropy.apply(head, chunk_size, *inputs, 0.0, factors, *of_head)
    return loss, losses.new_zeros(targets.shape).masked_scatter(is_target, losses), None


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over a large vocabulary, in chunks: `[N, D]` -> sum `[]` and the loss of each position `[N]`.

    The forward pass computes the logits of a chunk, reduces them to losses and gradients, and frees them. Nothing is
    computed twice, as in Liger Kernel (arXiv 2410.10989), but for any head. Only the sum has a gradient. With label
    smoothing, that share of the target probability is spread evenly over the vocabulary. Factors weigh the losses in
    the sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[torch.Tensor], torch.Tensor],
        chunk_size: int,  # positions
        hidden_states: torch.Tensor,  # [N, D]
        targets: torch.Tensor,  # [N]
        label_smoothing: float,
        factors: torch.Tensor | None,  # [N], float32; `None` stands for 1
        *weights: torch.Tensor,  # trainable weights of the head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = hidden_states.new_empty(len(targets), dtype=torch.float32)
        needs_gradients = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden_states, *weights)] if needs_gradients else []
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            with torch.set_grad_enabled(needs_gradients):
                inputs = [hidden_states[chunk].detach().requires_grad_(), *weights]
                logits = head(inputs[0])  # [n, V]
            log_probs = logits.detach().float().log_softmax(dim=-1)
            losses[chunk] = -log_probs.gather(1, targets[chunk, None]).squeeze(1)
            if label_smoothing:
                losses[chunk] -= label_smoothing * (losses[chunk] + log_probs.mean(dim=1))
            if needs_gradients:
                # The gradient of a loss with respect to its logits is the softmax minus the target probabilities.
                grad_logits = log_probs.exp_()
                if label_smoothing:
                    grad_logits -= label_smoothing / grad_logits.shape[1]
                rows = torch.arange(len(grad_logits), device=grad_logits.device)
                grad_logits[rows, targets[chunk]] -= 1 - label_smoothing
                if factors is not None:
                    grad_logits *= factors[chunk, None]
                gradients[0][chunk], *grad_weights = torch.autograd.grad(
                    logits, inputs, grad_logits.to(logits.dtype), allow_unused=True, materialize_grads=True
                )
                for total, gradient in zip(gradients[1:], grad_weights, strict=True):
                    total += gradient
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses)
        return losses.sum() if factors is None else (losses * factors).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_sum, _ = grad_outputs
        grad_hidden_states, *grad_weights = (grad_sum * gradient for gradient in ctx.saved_tensors)
        return None, None, grad_hidden_states, None, None, None, *grad_weights
