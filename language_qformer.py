"""How a language model, decoder-only or encoder-decoder, reads captions behind a prefix and goes on from one.

Several captions of an image cost what their own words cost: training packs them behind one prefix and makes logits
where there are labels only, a few at a time; beams share what the language model remembers of the prefix. All of it is
exact. The captioner in modeling_qformer.py makes the prefix and puts it together.

In the shapes below B is images, K captions of an image, T tokens of a caption, S of the prefix, L places in a sequence,
N places in all, D the language model's width, V its words.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMode
from transformers.modeling_outputs import MoEModelOutput, MoEModelOutputWithPastAndCrossAttentions
from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_LOGITS_PER_CHUNK = 2**23  # in float32, 32 MiB

# ----------------------------------------------------------------------------------------------------------------------
# Captions behind a prefix
# ----------------------------------------------------------------------------------------------------------------------


def encode_captions(
    language_model: PreTrainedModel,
    prefix: torch.Tensor,
    prefix_mask: torch.Tensor,
    captions: torch.Tensor,
    generation_config: GenerationConfig,
    **kwargs,
) -> torch.Tensor:
    """Read captions `[B, K, T]` of B images behind a prefix `[B, S, D]` with its mask `[B, S]`.

    An encoder-decoder's decoder starts as `generation_config` says.

    What is no label (-100) counts for nothing, be it padding on either side or in the middle of a caption.

    Returns:
        The decoder's hidden states where it predicts the captions' tokens, `[B*K*T, D]`.
    """
    if language_model.config.is_encoder_decoder:
        start = generation_config.decoder_start_token_id
        read = partial(encode_with_encoder_decoder, start=generation_config.bos_token_id if start is None else start)
    elif captions.shape[1] > 1 and shares_prefix(language_model, prefix.shape[1] + captions.shape[2]):
        read = encode_with_shared_prefix
    else:
        read = encode_with_decoder_only
        if captions.shape[1] > 1:
            logger.warning_once(
                f"A {language_model.config.model_type!r} cannot read several captions behind one prefix: it reads the "
                "prefix once for each, which is as exact and takes longer."
            )
    order = (captions == -100).int().argsort(dim=2, stable=True)  # words first, what is no label behind them
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes on all there is
    kwargs["use_cache"] = False  # a caption is read at once, so whatever the caller says, there is nothing to remember
    hidden_states = read(language_model, prefix, prefix_mask, captions.gather(2, order), **kwargs)
    places = order.argsort(dim=2).flatten(0, 1)  # [B*K, T]
    return take(hidden_states.reshape(*places.shape, -1), places).flatten(0, 1)


def encode_with_decoder_only(
    language_model: PreTrainedModel, prefix: torch.Tensor, prefix_mask: torch.Tensor, captions: torch.Tensor, **kwargs
) -> torch.Tensor:
    """`[prefix, caption]` in one sequence, whose last `[B*K, T, D]` predict the caption."""
    number, length = captions.shape[1:]
    inputs = captions.flatten(0, 1)[:, :-1]  # the last token predicts nothing
    words = language_model.get_input_embeddings()(inputs.clamp(min=0))
    mask = torch.cat([prefix_mask.repeat_interleave(number, dim=0), (inputs != -100).long()], dim=1)
    if takes(language_model, "position_ids"):
        kwargs["position_ids"] = positions_of(mask)
    output = decoder_of(language_model)(
        inputs_embeds=torch.cat([prefix.repeat_interleave(number, dim=0), words], dim=1),
        attention_mask=mask,
        **kwargs,
    )
    return output.last_hidden_state[:, -length:]


def encode_with_shared_prefix(
    language_model: PreTrainedModel, prefix: torch.Tensor, prefix_mask: torch.Tensor, captions: torch.Tensor, **kwargs
) -> torch.Tensor:
    """`[prefix, caption 1, ..., caption K]` in one sequence: the prefix is read once.

    Each caption sees the prefix and itself, and its positions go on from the prefix, so nothing else changes. With
    a prefix of three and the captions "a dog." and "the cat sleeps." (whose last token predicts nothing):

        inputs      q  q  q  a  dog  the  cat  sleeps
        owner       0  0  0  1   1    2    2     2
        positions   0  1  2  3   4    3    4     5
    """
    number, length = captions.shape[1:]
    start, device = prefix.shape[1], prefix.device
    needed = (captions[:, :, 1:] != -100).flatten(1)  # what has a label to predict, [B, K*(T-1)]
    order, place = pack(needed)  # [B, W], [B, K*(T-1)]
    inputs = captions[:, :, :-1].flatten(1).gather(1, order)  # [B, W]
    words = language_model.get_input_embeddings()(inputs.clamp(min=0))
    real = torch.cat([prefix_mask, (inputs != -100).to(prefix_mask)], dim=1).bool()  # [B, S+W]
    owner = torch.arange(1, number + 1, device=device).repeat_interleave(length - 1)[order]
    owner = torch.cat([torch.zeros_like(prefix_mask), owner], dim=1)  # 0 is the prefix, k the k-th caption
    sees = ((owner[:, None, :] == 0) | (owner[:, :, None] == owner[:, None, :])).tril() & real[:, None, :]
    # What sees nothing, padding in front, sees itself: a softmax over nothing is no number.
    itself = torch.eye(sees.shape[-1], dtype=torch.bool, device=device)
    sees |= itself & ~sees.any(dim=2, keepdim=True)  # [B, S+W, S+W]
    positions = positions_of(prefix_mask)  # [B, S]
    behind = torch.arange(1, length, device=device).repeat(number)[order]
    kwargs["position_ids"] = torch.cat([positions, positions[:, -1:] + behind], dim=1)
    output = decoder_of(language_model)(
        inputs_embeds=torch.cat([prefix, words], dim=1),
        attention_mask=as_mask(language_model, sees[:, None], prefix.dtype),
        **kwargs,
    )
    # The first word of every caption is predicted by the last position of the prefix.
    before = start + place.unflatten(1, (number, length - 1))  # [B, K, T-1]
    before = torch.cat([before.new_full((len(before), number, 1), start - 1), before], dim=2).flatten(1)
    return take(output.last_hidden_state, before)  # [B, K*T, D]


def encode_with_encoder_decoder(
    language_model: PreTrainedModel,
    prefix: torch.Tensor,
    prefix_mask: torch.Tensor,
    captions: torch.Tensor,
    start: int | None,
    **kwargs,
) -> torch.Tensor:
    """The encoder reads the prefix once per image, the decoder writes each of its captions.

    A T5 writes them in one sequence, each of which sees itself alone, so that the decoder looks at the prefix once:
    its positions count from word to word, so that nothing changes. Other decoders number them from the beginning.
    """
    number, length = captions.shape[1:]
    encoded = language_model.get_encoder()(inputs_embeds=prefix, attention_mask=prefix_mask).last_hidden_state
    # The decoder reads one place to the right, behind its start: the one that `generate` has, too. (mBART's own
    # `prepare_decoder_input_ids_from_labels` would start with the last label, which is another.)
    if start is None:
        raise ValueError("The language model does not say how its decoder starts: set its `decoder_start_token_id`.")
    inputs = captions.clamp(min=0).roll(1, dims=2)  # [B, K, T]
    inputs[:, :, 0] = start
    if number > 1 and language_model.config.model_type in ("t5", "mt5", "umt5"):
        order, place = pack((captions != -100).flatten(1))  # [B, W], [B, K*T]
        inputs = inputs.flatten(1).gather(1, order)
        owner = torch.arange(number, device=inputs.device).repeat_interleave(length)[order]
        sees = (owner[:, :, None] == owner[:, None, :]).tril()  # [B, W, W]
        kwargs["attention_mask"] = as_mask(language_model, sees[:, None], prefix.dtype)
    else:
        place = None
        inputs = inputs.flatten(0, 1)  # [B*K, T]
        encoded = encoded.repeat_interleave(number, dim=0)
        prefix_mask = prefix_mask.repeat_interleave(number, dim=0)
    output = decoder_of(language_model)(
        input_ids=inputs,
        encoder_hidden_states=encoded,
        encoder_attention_mask=prefix_mask,
        **kwargs,
    )
    return output.last_hidden_state if place is None else take(output.last_hidden_state, place)


def shares_prefix(language_model: PreTrainedModel, length: int) -> bool:
    """Whether the language model reads captions of an image behind one prefix as it would read them one by one.

    It must take a mask for every pair of positions, and numbers of positions; and its layers must attend to all of
    `length` positions before, and to nothing else.
    """
    config = language_model.config.get_text_config(decoder=True)  # of a language model with senses of its own
    fields = vars(config)
    window = getattr(config, "sliding_window", None) if fields.get("use_sliding_window", True) else None
    return (
        takes(language_model, "position_ids")
        and config._attn_implementation in ("eager", "sdpa")
        and not (window and window < length)
        and not fields.get("attention_chunk_size")
        and not fields.get("alibi")
        and config.model_type != "gpt_neo"  # whose window counts places in the sequence, whatever the mask
        and set(fields.get("layer_types") or ()) <= {"full_attention", "sliding_attention"}
        and not any(mixer in name for name in fields for mixer in ("mamba", "conv", "ssm", "lru", "linear_attn"))
    )


def embed_prompt(language_model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Words of a prompt `[B, P]` as the language model would embed them by itself: `[B, P, D]`."""
    words = language_model.get_input_embeddings()(input_ids)
    if language_model.config.is_encoder_decoder:  # Pegasus' and Marian's encoders scale words behind their embedding
        words = words * vars(language_model.get_encoder()).get("embed_scale", 1.0)
    return words


def decoder_of(language_model: PreTrainedModel) -> PreTrainedModel:
    """What makes hidden states of words. `get_decoder` is ModernBERT's output layer, and all of Llama 4."""
    decoder = language_model.get_decoder()
    own = isinstance(decoder, PreTrainedModel) and decoder is not language_model
    return decoder if own else language_model.model


def takes(language_model: PreTrainedModel, name: str) -> bool:
    """Whether its decoder has such an input: BLOOM's no `position_ids`, Mamba's and RWKV's no `past_key_values`."""
    return name in inspect.signature(type(decoder_of(language_model)).forward).parameters


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Places in the sequence, counted from the first that is no padding."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def as_mask(language_model: PreTrainedModel, sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What may be seen, in the way that the language model's attention wants to hear it."""
    if language_model.config._attn_implementation == "eager":  # which adds masks to its scores
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return sees


def pack(needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Close the gaps in rows `[B, L]`, bool: which places to keep `[B, W]`, W of the fullest row, and where each went.

    The second, `[B, L]`, says something of the needed places alone.
    """
    order = needed.int().argsort(dim=1, descending=True, stable=True)
    width = min(needed.shape[1], max(1, int(needed.sum(dim=1).max())))
    return order[:, :width], order.argsort(dim=1).clamp(max=max(0, width - 1))


def take(hidden_states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Some places of every row: `[B, L, D]`, `[B, M]` -> `[B, M, D]`."""
    return hidden_states.gather(1, places[..., None].expand(-1, -1, hidden_states.shape[-1]))


# ----------------------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class DecoderOutputStub(MoEModelOutputWithPastAndCrossAttentions):
    """Hidden states, and nothing of all that language models look for beside them in what their decoder returns."""

    cache_params: Cache | None = None  # Mamba, xLSTM
    state: list[torch.Tensor] | None = None  # RWKV
    shared_kv_states: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None  # Gemma 4


def output_layer(language_model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a language model makes of its decoder's hidden states: from `[N, D]` to logits `[N, V]`.

    Between the two stands more than `lm_head`: T5 and Cohere scale, Gemma caps, BART adds a bias. So this is the
    language model itself (its own modules, its own `forward`), but for a decoder that hands on what it is given.
    """

    def shell(module: nn.Module) -> nn.Module:
        """The same module, of which parts can be exchanged; without hooks, which wait for the whole of it."""
        copied = copy.copy(module)
        copied._modules = dict(module._modules)
        copied._forward_hooks, copied._forward_pre_hooks = OrderedDict(), OrderedDict()
        vars(copied).pop("forward", None)  # with a `device_map` accelerate's own, which belongs to the module
        return copied

    def hand_on(*args, inputs_embeds: torch.Tensor, **kwargs) -> DecoderOutputStub:
        return DecoderOutputStub(last_hidden_state=inputs_embeds)

    decoder = decoder_of(language_model)
    *above, last = next(name for name, module in language_model.named_modules() if module is decoder).split(".")
    headed = parent = shell(language_model)
    for name in above:
        parent._modules[name] = shell(parent._modules[name])
        parent = parent._modules[name]
    parent._modules[last] = shell(decoder)
    parent._modules[last].forward = hand_on

    def logits(hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states[None]
        inputs = {"inputs_embeds": hidden_states}
        if language_model.config.is_encoder_decoder:
            inputs = {"decoder_inputs_embeds": hidden_states, "encoder_outputs": MoEModelOutput(hidden_states)}
        return headed(**inputs, use_cache=False).logits[0]

    return logits


def output_weights(language_model: PreTrainedModel) -> list[nn.Parameter]:
    """Those weights of it that train: none of the decoder (or encoder) but words that it shares with them."""
    parts = [decoder_of(language_model)]
    if language_model.config.is_encoder_decoder:
        parts.append(language_model.get_encoder())
    inside = {id(weight) for part in parts for weight in part.parameters()}
    inside -= {id(weight) for weight in language_model.get_output_embeddings().parameters()}
    return [weight for weight in language_model.parameters() if weight.requires_grad and id(weight) not in inside]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over a large vocabulary, a few positions at a time: `[N, D]` -> sum `[]` and each position's `[N]`.

    Logits live until their losses and gradients are known, which is on the way forward already, so nothing is computed
    twice (the idea of Liger Kernel, arXiv 2410.10989, here for any output layer). Only the sum has a gradient.
    """

    @staticmethod
    def forward(
        ctx,
        words: Callable[[torch.Tensor], torch.Tensor],  # the output layer
        positions: int,  # at a time
        hidden_states: torch.Tensor,  # [N, D]
        targets: torch.Tensor,  # [N]
        *weights: torch.Tensor,  # those of the output layer that train
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = hidden_states.new_empty(len(targets), dtype=torch.float32)
        gradients = [torch.zeros_like(each) for each in (hidden_states, *weights)] if any(ctx.needs_input_grad) else []
        for start in range(0, len(targets), positions):
            here = slice(start, start + positions)
            with torch.set_grad_enabled(bool(gradients)):
                inputs = [hidden_states[here].detach().requires_grad_(), *weights]
                logits = words(inputs[0])  # [n, V]
            scores = logits.detach().float().log_softmax(dim=-1)
            losses[here] = -scores.gather(1, targets[here, None]).squeeze(1)
            if gradients:
                grad_output = scores.exp_()  # of the losses over the logits: softmax, less one at the target
                grad_output[torch.arange(len(grad_output), device=grad_output.device), targets[here]] -= 1
                gradients[0][here], *of_weights = torch.autograd.grad(
                    logits, inputs, grad_output.to(logits.dtype), allow_unused=True, materialize_grads=True
                )
                for gradient, part in zip(gradients[1:], of_weights, strict=True):
                    gradient += part
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, of_sum: torch.Tensor, of_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden_states, *of_weights = (of_sum * gradient for gradient in ctx.saved_tensors)
        return None, None, of_hidden_states, None, *of_weights


# ----------------------------------------------------------------------------------------------------------------------
# Beams
# ----------------------------------------------------------------------------------------------------------------------


def can_prefill_prefix(
    language_model: PreTrainedModel, prefix: torch.Tensor, config: GenerationConfig, kwargs: dict
) -> bool:
    """Whether `generate` would begin with the memory of a prefix that we hand it, and none of its own."""
    modes = (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    )
    use_cache = config.use_cache
    if use_cache is None:  # it is up to the language model
        use_cache = language_model.generation_config.use_cache
    return (
        not language_model.config.is_encoder_decoder
        and takes(language_model, "past_key_values")
        and prefix.shape[1] > 1
        and use_cache is not False
        and config.cache_implementation is None
        and not (config.output_attentions or config.output_hidden_states)  # which tell of the prefix, too
        and "past_key_values" not in kwargs
        and config.get_generation_mode(kwargs.get("assistant_model")) in modes
    )


def prefill_shared_prefix(
    language_model: PreTrainedModel, prefix: torch.Tensor, prefix_mask: torch.Tensor, copies: int, room: int
) -> Cache | None:
    """What the language model remembers of all but the last of a prefix, for each beam or sequence.

    Left to itself, `generate` would have it read the same prefix in every beam, as it does where this is `None`:
    for a language model with a memory of its own kind (MiniMax, RecurrentGemma).
    """
    inputs = {"position_ids": positions_of(prefix_mask)[:, :-1]} if takes(language_model, "position_ids") else {}
    read = decoder_of(language_model)(
        inputs_embeds=prefix[:, :-1], attention_mask=prefix_mask[:, :-1], use_cache=True, **inputs
    ).get("past_key_values")
    if type(read) is not DynamicCache:
        return None
    several = torch.arange(len(prefix), device=prefix.device).repeat_interleave(copies)
    for number, layer in enumerate(read.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            read.layers[number] = SharedPrefixLayer(layer, copies, room)
        else:  # of a window, of no single words, or of another layer
            layer.reorder_cache(several)
    return read


class SharedPrefixLayer(DynamicLayer):
    """What a layer of the language model remembers of a prefix that the beams of an image share, and of their words.

    Room for the words is made once, and when beams change places only their words do. transformers' own layer copies
    all that it remembers, prefix included, for every word, and again when beams change places.
    """

    def __init__(self, prefix: DynamicLayer, copies: int, room: int):
        super().__init__()
        self.lazy_initialization(prefix.keys, prefix.values)
        self.prefix_length = prefix.get_seq_length()

        def make_room(states: torch.Tensor) -> torch.Tensor:  # [B, heads, S, d] -> [B*copies, heads, S+room, d]
            images, heads, length, size = states.shape
            roomy = states.new_empty(images, copies, heads, length + room, size)
            roomy[..., :length, :] = states[:, None]
            return roomy.flatten(0, 1)

        self.roomy_keys, self.roomy_values = make_room(prefix.keys), make_room(prefix.values)
        self.keys, self.values = (each[:, :, : self.prefix_length] for each in (self.roomy_keys, self.roomy_values))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        self.roomy_keys[:, :, start:end], self.roomy_values[:, :, start:end] = key_states, value_states
        self.keys, self.values = self.roomy_keys[:, :, :end], self.roomy_values[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for states in (self.keys, self.values):
            words = states[:, :, self.prefix_length :]
            words.copy_(words.index_select(0, beam_idx.to(words.device)))
