"""Q-Former of the script collection that preceded this package, to caption images with its `.pt` files.

    model = LegacyCaptioner.from_state_dict("qformer.pt", "openai/clip-vit-base-patch32", "google-t5/t5-base")
    model.caption("dog.jpg")

Its layers have no residual connections, and layer norms only in the feed-forward part, so its weights do not fit a
[`QFormerModel`]. New captioners should use a [`QFormerModel`], which reaches much higher scores.
"""

import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from ..common.errors import InputError
from ..modeling_qformer import QFormerCaptioner


class LegacyLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward part in sequence, without residual connections."""

    def __init__(self, width: int, num_attention_heads: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_attention_heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, num_attention_heads, batch_first=True)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        )

    def forward(self, queries: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        queries, _ = self.self_attn(queries, queries, queries, need_weights=False)  # [B, Q, D]
        queries, _ = self.cross_attn(queries, image, image, need_weights=False)
        return self.ffn(queries)


class LegacyQFormer(nn.Module):
    """Q-Former of the old scripts, whose width is that of the language model.

    Args:
        num_query_tokens: number of queries.
        width: width of the queries, D.
        num_layers: number of layers.
        num_attention_heads: attention heads of a layer.
        vision_width: width of the image features, which `imgproj` projects to `width`; `None` if they already have that
            width.
    """

    def __init__(
        self, num_query_tokens: int, width: int, num_layers: int, num_attention_heads: int, vision_width: int | None
    ):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, width))
        self.imgproj = nn.Identity() if vision_width is None else nn.Linear(vision_width, width)
        self.layers = nn.ModuleList([LegacyLayer(width, num_attention_heads) for _ in range(num_layers)])

    @classmethod
    def from_state_dict(cls, weights: dict[str, torch.Tensor], num_attention_heads: int) -> "LegacyQFormer":
        """Build a Q-Former with the sizes of a state dict. The weights are not loaded yet.

        Raises:
            InputError: if the width of the queries is not a multiple of `num_attention_heads`.
        """
        _, num_query_tokens, width = weights["query_tokens"].shape
        if width % num_attention_heads:
            raise InputError(
                f"A Q-Former of width {width} cannot have {num_attention_heads} attention heads: give the number that "
                "it was trained with as `num_attention_heads`."
            )
        layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
        vision_width = weights["imgproj.weight"].shape[1] if "imgproj.weight" in weights else None
        return cls(num_query_tokens, width, len(layers), num_attention_heads, vision_width)

    @property
    def vision_width(self) -> int:
        """Width of the image features that the Q-Former accepts."""
        if isinstance(self.imgproj, nn.Linear):
            return self.imgproj.in_features
        return self.query_tokens.shape[-1]

    def forward(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None, **prompt
    ) -> BaseModelOutput:
        """Compute the queries for images.

        Args:
            encoder_hidden_states (`[B, N, Dv]`, float): image features.
            encoder_attention_mask: must be `None`, because the old Q-Former read images of one size only.
            prompt: ignored; a [`QFormerModel`] takes a prompt here.

        Returns:
            `last_hidden_state` (`[B, Q, D]`, float).

        Raises:
            ValueError: if there is a mask.
        """
        if encoder_attention_mask is not None:
            raise ValueError("The Q-Former of the old scripts takes no mask of features: pass rows of one length.")
        image = self.imgproj(encoder_hidden_states.to(self.query_tokens.dtype))  # [B, N, D]
        queries = self.query_tokens.expand(len(image), -1, -1)  # [B, Q, D]
        for layer in self.layers:
            queries = layer(queries, image)
        return BaseModelOutput(last_hidden_state=queries)


class LegacyCaptioner(QFormerCaptioner):
    """Captioner with a [`LegacyQFormer`].

    It trains and captions like others, but is saved by its `old_state_dict()`.
    """

    @classmethod
    def from_state_dict(
        cls,
        state_dict: str | os.PathLike | dict[str, torch.Tensor],
        vision: str | os.PathLike,
        language: str | os.PathLike,
        num_attention_heads: int = 16,
        prompt: str = "",
        **kwargs,
    ) -> "LegacyCaptioner":
        """Put a Q-Former of the old scripts between its two backbones.

        Captions are generated as in the scripts: 4 beams, repetition penalty 1.1, at most 50 new tokens.

        Args:
            state_dict: state dict of the scripts, or the path of a file that they wrote with `torch.save`.
            vision, language: Hub ids or folders of the backbones that the Q-Former was trained with.
            num_attention_heads: attention heads of a layer, which the weights do not show. Most scripts used 16, one
                script used 8.
            prompt: text that the language model reads after the queries, such as "Describe the image.".
            kwargs: as for [`QFormerCaptioner.from_backbones`].

        Raises:
            InputError: for a file that cannot be read, unknown or missing tensors, or backbones of other widths.

        Example:

        ```python
        >>> backbones = "openai/clip-vit-base-patch32", "google-t5/t5-base"
        >>> model = LegacyCaptioner.from_state_dict("qformer.pt", *backbones)  # doctest: +SKIP
        ```
        """
        weights = _normalize(state_dict if isinstance(state_dict, dict) else _read(state_dict))
        qformer = LegacyQFormer.from_state_dict(weights, num_attention_heads)
        # `from_backbones` creates a `QFormerModel`, which is as small as possible because it is replaced.
        num_query_tokens = qformer.query_tokens.shape[1]
        model = super().from_backbones(
            vision, language, prompt=prompt, num_hidden_layers=1, num_query_tokens=num_query_tokens, **kwargs
        )
        out_features, in_features = weights["fc.weight"].shape
        projection = nn.Linear(in_features, out_features)
        _check_widths(qformer, projection, model)
        _load_weights(qformer, projection, weights)
        model.qformer, model.language_projection = qformer, projection  # type: ignore[assignment]
        model.generation_config.update(num_beams=4, repetition_penalty=1.1, max_new_tokens=50)
        return model.eval()

    def old_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors under the names of the scripts, for `torch.save`."""
        return _old_state_dict(self.qformer, self.language_projection)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Raise an error, because the code in a saved folder has no [`LegacyQFormer`].

        Raises:
            NotImplementedError: always; the message says how to keep the weights.
        """
        raise NotImplementedError(
            "A captioner with a Q-Former of the old scripts cannot be saved as a folder. Keep its weights with "
            "torch.save(model.old_state_dict(), 'qformer.pt')."
        )


def _read(path: str | os.PathLike) -> object:
    """Load a file of `torch.save` without running code from it."""
    if not Path(path).is_file():
        raise InputError(f"The file {str(path)!r} does not exist.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each kind of damage
        reason = "it holds more than data" if isinstance(error, UnpicklingError) else str(error).splitlines()[0]
        raise InputError(f"{str(path)!r} is not a state dict that torch.load can read ({reason}).") from error


def _normalize(state_dict: object) -> dict[str, torch.Tensor]:
    """Return a state dict of the old scripts without prefixes of `DataParallel`, and with queries `[1, Q, D]`.

    Raises:
        InputError: if the object is not a state dict of the old scripts.
    """
    if not isinstance(state_dict, dict):
        raise InputError(f"The file holds a {type(state_dict).__name__}, not a state dict.")
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items()):
        raise InputError("The file is not a state dict: it holds more than named tensors.")
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    if "query_tokens" not in weights or "fc.weight" not in weights:
        raise InputError("The state dict is not one of the old scripts: it has no 'query_tokens' or no 'fc.weight'.")
    queries = weights["query_tokens"]
    weights["query_tokens"] = queries.reshape(1, *queries.shape[-2:])
    return weights


def _check_widths(qformer: LegacyQFormer, projection: nn.Linear, model: QFormerCaptioner) -> None:
    """Check that a Q-Former and its projection fit between the backbones of a captioner."""
    widths = qformer.vision_width, projection.out_features
    expected = model.qformer.config.encoder_hidden_size, model.language_projection.bias.shape[-1]
    if widths != expected:
        raise InputError(
            f"The old Q-Former takes image features of width {widths[0]} and returns a soft prompt of width "
            f"{widths[1]}, but the backbones have widths {expected[0]} and {expected[1]}. Give the backbones that it "
            "was trained with."
        )


def _load_weights(qformer: LegacyQFormer, projection: nn.Linear, weights: dict[str, torch.Tensor]) -> None:
    """Copy a state dict of the old scripts into its modules."""
    parameters = _old_state_dict(qformer, projection)
    wrong = sorted(set(parameters) ^ set(weights))
    wrong = wrong or [name for name in parameters if parameters[name].shape != weights[name].shape]
    if wrong:
        raise InputError(
            f"The state dict is not one of the old scripts: {wrong[0]!r} is missing, unknown or of another shape "
            f"({len(wrong)} tensors in all)."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _old_state_dict(qformer: nn.Module, projection: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a Q-Former and its projection under the names of the scripts."""
    return qformer.state_dict() | {f"fc.{name}": tensor for name, tensor in projection.state_dict().items()}
