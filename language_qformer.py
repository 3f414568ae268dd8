"""Several captions of an image with one language model, each at no more than its own cost.

Training packs them behind one prefix and makes logits where there are labels only, a few at a time; beams share what
the language model remembers of the prefix. All of it is exact. The captioner in modeling_qformer.py puts it together.

In the shapes below B is images, L places in a sequence, N places in all, D the language model's width, V its words.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import MoEModelOutput, MoEModelOutputWithPastAndCrossAttentions

LOGITS_AT_A_TIME = 2**23  # in float32, 32 MiB

# ----------------------------------------------------------------------------------------------------------------------
# Packing
# ----------------------------------------------------------------------------------------------------------------------


def still_to_come(labels: torch.Tensor) -> torch.Tensor:
    """Whether there is a label here or behind: `[..., T]` -> `[..., T]`, bool."""
    return (labels != -100).flip(-1).cumsum(dim=-1).flip(-1) > 0


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


def decoder_of(language_model: PreTrainedModel) -> PreTrainedModel:
    """What makes hidden states of words. `get_decoder` is ModernBERT's output layer, and all of Llama 4."""
    decoder = language_model.get_decoder()
    own = isinstance(decoder, PreTrainedModel) and decoder is not language_model
    return decoder if own else language_model.model


@dataclass
class HandedOn(MoEModelOutputWithPastAndCrossAttentions):
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

    def hand_on(*args, inputs_embeds: torch.Tensor, **kwargs) -> HandedOn:
        return HandedOn(last_hidden_state=inputs_embeds)

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
                slopes = scores.exp_()  # of the losses over the logits: softmax, less one at the target
                slopes[torch.arange(len(slopes), device=slopes.device), targets[here]] -= 1
                gradients[0][here], *of_weights = torch.autograd.grad(
                    logits, inputs, slopes.to(logits.dtype), allow_unused=True, materialize_grads=True
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
