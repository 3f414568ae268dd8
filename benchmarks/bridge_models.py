"""The bridges of benchmarks/bridges.py, each between the same frozen vision encoder and language model.

A bridge takes the place of `qformer` and `language_projection` in a [`QFormerCaptioner`]. Loss, generation and
evaluation are therefore the same code for all. Each function `install_...` puts a new bridge into a captioner. It gets
the features of the training images, `[R, N, Dv]`, whose mean and variance initialise our Q-Former.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.legacy import LegacyQFormer

OUR_QFORMER = dict(  # as in recipes/flickr8k.yaml
    num_query_tokens=8,
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=1,
    num_attention_heads=6,
    cross_attention_frequency=1,
    initializer_range=0.05,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


class ClipCapMapper(nn.Module):
    """ClipCap's MLP, from one image vector `[B, Dv]` to k prefix tokens `[B, k, D]`.

    The image vector is the first of the image features: the class token of DINOv2, CLIP and ViT.

    Source: Mokady et al. 2021, arXiv 2111.09734.

    Args:
        vision_size: width Dv of the image features.
        text_size: width D of the language model.
        num_prefix_tokens: number k of prefix tokens.
    """

    def __init__(self, vision_size: int, text_size: int, num_prefix_tokens: int = 10):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        hidden_size = text_size * num_prefix_tokens // 2
        self.mlp = nn.Sequential(
            nn.Linear(vision_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, text_size * num_prefix_tokens)
        )

    def forward(self, encoder_hidden_states: torch.Tensor, **prompt) -> BaseModelOutput:
        """Return the prefix tokens, in the output of a [`QFormerModel`]. The prompt is ignored."""
        prefix = self.mlp(encoder_hidden_states[:, 0].float())
        return BaseModelOutput(last_hidden_state=prefix.unflatten(-1, (self.num_prefix_tokens, -1)))


def install_our_qformer(model: QFormerCaptioner, features: torch.Tensor) -> None:
    """Keep the Q-Former that the captioner has, and normalise the features of the training images in it."""
    model.qformer.normalize_image_features(features)


def install_legacy_qformer(
    model: QFormerCaptioner, features: torch.Tensor, num_layers: int = 3, num_attention_heads: int = 16
) -> None:
    """Install the Q-Former of this package's old scripts: no residual connections, query tokens of variance 1."""
    text_size, vision_size = backbone_sizes(model)
    model.qformer = LegacyQFormer(16, text_size, num_layers, num_attention_heads, vision_size)
    nn.init.normal_(model.qformer.query_tokens)
    model.language_projection = nn.Linear(text_size, text_size)


def install_clipcap(model: QFormerCaptioner, features: torch.Tensor) -> None:
    """Install ClipCap's MLP, whose output already has the width of the language model.

    Raises:
        InputError: if the vision encoder has no class token.
    """
    model_type = model.config.vision_config.model_type
    if "siglip" in model_type:
        raise InputError(
            f"ClipCap's MLP reads a class token, which {model_type!r} lacks: choose another --vision_model."
        )
    text_size, vision_size = backbone_sizes(model)
    model.qformer = ClipCapMapper(vision_size, text_size)
    model.language_projection = nn.Identity()


def backbone_sizes(model: QFormerCaptioner) -> tuple[int, int]:
    """Return the width D of the language model and the width Dv of the image features."""
    return model.get_input_embeddings().weight.shape[1], model.config.qformer_config.encoder_hidden_size


def trainable_parameters(model: QFormerCaptioner) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_bridge(model: QFormerCaptioner, image_embeds: torch.Tensor, labels: torch.Tensor) -> None:
    """Check that a comparison is fair: the soft prompt has the right shape and is finite, and only the bridge trains.

    Args:
        model: captioner with a bridge.
        image_embeds: image features `[B, N, Dv]`.
        labels: captions `[B, T]`.

    Raises:
        RuntimeError: if one of these does not hold.
    """
    output = model.train()(image_embeds=image_embeds, labels=labels)
    images, queries, width = output.soft_prompt.shape
    if (images, width) != (len(image_embeds), backbone_sizes(model)[0]) or not queries:
        raise RuntimeError(f"The soft prompt must be [B, Q, D], but its shape is {tuple(output.soft_prompt.shape)}.")
    if not output.soft_prompt.isfinite().all() or not output.loss.isfinite():
        raise RuntimeError("The soft prompt or the loss is not finite.")
    output.loss.backward()
    bridge = {name for name, _ in model.named_parameters() if name.startswith(("qformer.", "language_projection."))}
    if set(trainable_parameters(model)) != bridge:
        raise RuntimeError("The trainable parameters are not those of the bridge.")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    reached = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    # The bias of the keys does not change the softmax, so its gradient is zero or rounding.
    if wrong := sorted(name for name in reached ^ bridge if not name.endswith("key.bias")):
        raise RuntimeError(f"The gradient must reach all of the bridge and nothing else: {wrong[0]!r} is different.")
    model.zero_grad()
