"""The Q-Former of the script collection that this package grew from, so that its `.pt` files still caption.

    model = LegacyCaptioner.from_state_dict("qformer.pt", "openai/clip-vit-base-patch32", "google-t5/t5-base")
    model.caption("dog.jpg")

Its layers have no residual connections, and norms only inside the feed-forward part, so nothing of a [`QFormerModel`]
fits. This is here to keep old weights usable; whoever starts anew gets much further with a [`QFormerModel`].
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
    """Self-attention, cross-attention, feed-forward, one after the other, nothing added to what went in."""

    def __init__(self, width: int, num_attention_heads: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_attention_heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, num_attention_heads, batch_first=True)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        )

    def forward(self, queries: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        queries, _ = self.self_attn(queries, queries, queries, need_weights=False)
        queries, _ = self.cross_attn(queries, image, image, need_weights=False)
        return self.ffn(queries)


class LegacyQFormer(nn.Module):
    """`[B, N, Dv]` image features to `[B, Q, D]` queries, all as wide as the language model.

    Args:
        num_query_tokens, width, num_layers, num_attention_heads: sizes.
        vision_width: of the image features; where it is another than `width`, `imgproj` comes first.
    """

    def __init__(
        self, num_query_tokens: int, width: int, num_layers: int, num_attention_heads: int, vision_width: int | None
    ):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, width))
        self.imgproj = nn.Identity() if vision_width is None else nn.Linear(vision_width, width)
        self.layers = nn.ModuleList([LegacyLayer(width, num_attention_heads) for _ in range(num_layers)])

    def forward(self, encoder_hidden_states: torch.Tensor, **prompt) -> BaseModelOutput:
        """As a [`QFormerModel`] is called; it reads no prompt."""
        image = self.imgproj(encoder_hidden_states.to(self.query_tokens.dtype))
        queries = self.query_tokens.expand(len(image), -1, -1)
        for layer in self.layers:
            queries = layer(queries, image)
        return BaseModelOutput(last_hidden_state=queries)


class LegacyCaptioner(QFormerCaptioner):
    """A captioner with such a Q-Former. It captions and gives losses like any; keep it by its `old_state_dict()`."""

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
        """Put an old Q-Former between its two backbones.

        Captions are decoded as the scripts did: 4 beams, repetition penalty 1.1, up to 50 tokens.

        Args:
            state_dict: what the scripts saved with `torch.save`, or its path. The sizes follow from it, all but one:
            num_attention_heads: which cannot be told from weights; 16 in the scripts, 8 in one of them.
            vision, language: Hub ids or folders of the backbones that it was trained between.
            prompt: what the language model reads behind the queries, such as "Describe the image.".
            kwargs: as for [`QFormerCaptioner.from_backbones`].

        Raises:
            InputError: for a file that cannot be read, tensors that are missing or left over, or widths that do not fit
                the backbones.
        """
        weights = state_dict if isinstance(state_dict, dict) else _read(state_dict)
        if not isinstance(weights, dict):
            raise InputError(f"What was saved is a {type(weights).__name__} and no state dict.")
        if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()):
            raise InputError("What was saved holds more than named tensors: it is no state dict.")
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}  # of DataParallel
        if "query_tokens" not in weights or "fc.weight" not in weights:
            raise InputError(
                "The state dict has no 'query_tokens' and 'fc.weight': it is no Q-Former of the old scripts."
            )
        queries = weights["query_tokens"]
        weights["query_tokens"] = queries = queries.reshape(1, *queries.shape[-2:])
        if queries.shape[-1] % num_attention_heads:
            raise InputError(
                f"A Q-Former of width {queries.shape[-1]} cannot have {num_attention_heads} attention heads: give the "
                "number that it was trained with as `num_attention_heads`."
            )
        layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
        projected = weights.get("imgproj.weight")
        qformer = LegacyQFormer(
            *queries.shape[-2:], len(layers), num_attention_heads, None if projected is None else projected.shape[1]
        )
        model = super().from_backbones(
            vision, language, prompt=prompt, num_hidden_layers=1, num_query_tokens=queries.shape[1], **kwargs
        )
        model.qformer = qformer
        width = model.get_input_embeddings().weight.shape[1]
        model.language_projection = nn.Linear(*weights["fc.weight"].shape[::-1])
        sees = queries.shape[-1] if projected is None else projected.shape[1]
        if len(weights["fc.weight"]) != width or sees != model.config.vision_config.hidden_size:
            raise InputError(
                f"The old Q-Former reads features of width {sees} and writes {len(weights['fc.weight'])}, but the "
                f"backbones have {model.config.vision_config.hidden_size} and {width}. Give those it was trained with."
            )
        own = model.old_state_dict()
        wrong = sorted(set(own) ^ set(weights)) or [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            raise InputError(
                f"The state dict is no Q-Former of the old scripts: {wrong[0]!r} is missing, left over or of another "
                f"shape ({len(wrong)} tensors are so)."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        model.generation_config.update(num_beams=4, repetition_penalty=1.1, max_new_tokens=50)
        return model.eval()

    def old_state_dict(self) -> dict[str, torch.Tensor]:
        """The trained tensors by the scripts' names, for `torch.save`."""
        projection = {f"fc.{name}": tensor for name, tensor in self.language_projection.state_dict().items()}
        return self.qformer.state_dict() | projection

    def save_pretrained(self, *args, **kwargs) -> None:
        """Not for this one: a folder on the Hub brings only the layers of a [`QFormerModel`] along."""
        raise NotImplementedError(
            "A captioner with the old scripts' Q-Former is kept as torch.save(model.old_state_dict(), 'qformer.pt')."
        )


def _read(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise InputError(f"There is no file {str(path)!r}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each way in which a file can be broken
        reason = "it holds more than data" if isinstance(error, UnpicklingError) else str(error).splitlines()[0]
        raise InputError(f"{str(path)!r} holds no state dict that torch.load can read ({reason}).") from error
