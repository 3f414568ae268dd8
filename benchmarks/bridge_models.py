"""The bridges that benchmarks/bridges.py compares: what stands between the frozen vision encoder and language model.

Each one takes the place of `qformer` and `language_projection` in a [`QFormerCaptioner`], so everything behind the soft
prompt (loss, generation, evaluation) is the same code. The functions `put_...` put a fresh one there, where one of ours
begins with statistics of the training images' features `[R, N, Dv]`.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.legacy import LegacyQFormer

# As in recipes/flickr8k.yaml.
OURS = dict(num_query_tokens=8, hidden_size=384, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=6)
OURS |= dict(cross_attention_frequency=1, initializer_range=0.05)
OURS |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class ClipCapMapper(nn.Module):
    """ClipCap's MLP (Mokady et al. 2021, arXiv 2111.09734): one image vector `[B, Dv]` to k prefix tokens `[B, k, D]`.

    The image vector is the first of the features, which is the class token of DINOv2, CLIP and ViT.
    """

    def __init__(self, vision_width: int, width: int, num_prefix_tokens: int = 10):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        hidden = width * num_prefix_tokens // 2
        self.mlp = nn.Sequential(
            nn.Linear(vision_width, hidden), nn.Tanh(), nn.Linear(hidden, width * num_prefix_tokens)
        )

    def forward(self, encoder_hidden_states: torch.Tensor, **prompt) -> BaseModelOutput:
        """As a [`QFormerModel`] is called; it reads no prompt."""
        prefix = self.mlp(encoder_hidden_states[:, 0].float())
        return BaseModelOutput(last_hidden_state=prefix.unflatten(-1, (self.num_prefix_tokens, -1)))


def put_ours(model: QFormerCaptioner, features: torch.Tensor) -> None:
    """The Q-Former and projections that the captioner came with, fitted to the features of the training images."""
    model.qformer.normalize_image_features(features)


def put_old_scripts(
    model: QFormerCaptioner, features: torch.Tensor, num_layers: int = 3, num_attention_heads: int = 16
) -> None:
    """The Q-Former that this package's predecessors trained: no residual connections, queries drawn with variance 1."""
    width, vision_width = _widths(model)
    model.qformer = LegacyQFormer(16, width, num_layers, num_attention_heads, vision_width)
    nn.init.normal_(model.qformer.query_tokens)
    model.language_projection = nn.Linear(width, width)


def put_clipcap(model: QFormerCaptioner, features: torch.Tensor) -> None:
    """ClipCap's MLP, which writes in the language model's width at once."""
    kind = model.config.vision_config.model_type
    if "siglip" in kind:
        raise InputError(f"ClipCap's MLP reads an image's class token, and a {kind!r} has none: take another encoder.")
    width, vision_width = _widths(model)
    model.qformer = ClipCapMapper(vision_width, width)
    model.language_projection = nn.Identity()


def _widths(model: QFormerCaptioner) -> tuple[int, int]:
    return model.get_input_embeddings().weight.shape[1], model.config.vision_config.hidden_size


def trained_parameters(model: QFormerCaptioner) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_bridge(model: QFormerCaptioner, image_embeds: torch.Tensor, labels: torch.Tensor) -> None:
    """See that a comparison would be fair: a finite soft prompt of the right shape, and gradients where they belong.

    Raises:
        RuntimeError: if not.
    """
    output = model.train()(image_embeds=image_embeds, labels=labels)
    images, queries, width = output.soft_prompt.shape
    if (images, width) != (len(image_embeds), _widths(model)[0]) or not queries:
        raise RuntimeError(f"The soft prompt has the shape {tuple(output.soft_prompt.shape)}.")
    if not output.soft_prompt.isfinite().all() or not output.loss.isfinite():
        raise RuntimeError("The soft prompt or the loss is not finite.")
    output.loss.backward()
    bridge = {name for name, _ in model.named_parameters() if name.startswith(("qformer.", "language_projection."))}
    if set(trained_parameters(model)) != bridge:
        raise RuntimeError("What trains is not the bridge.")
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    moved = {name for name, grad in grads.items() if grad is not None and grad.any()}
    # A bias of the keys raises all scores of a softmax alike: its gradient is zero but for rounding.
    if wrong := {name for name in moved ^ bridge if not name.endswith("key.bias")}:
        raise RuntimeError(f"The gradient reaches too much or too little: {sorted(wrong)[0]!r}.")
    model.zero_grad()
