"""The bridge alone, from image features to soft prompt, as a file that runs without this package.

`.pt2` is a program of `torch.export`, `.onnx` an ONNX model. Both take any number of images and of image features.
"""

import os
from pathlib import Path

import torch
from torch import nn

from ..common.errors import InputError, check_output
from ..modeling_qformer import QFormerCaptioner

BRIDGE_FORMATS = (".pt2", ".onnx")


class Bridge(nn.Module):
    """Q-Former and projection: `image_embeds` `[B, N, Dv]` -> `soft_prompt` `[B, Q, D]`.

    Where the Q-Former reads the prompt, too, so does this: `qformer_input_ids` and `qformer_attention_mask` `[B, P]`.
    """

    def __init__(self, model: QFormerCaptioner):
        super().__init__()
        self.qformer, self.language_projection = model.qformer, model.language_projection

    def forward(
        self,
        image_embeds: torch.Tensor,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries = self.qformer(image_embeds, input_ids=qformer_input_ids, attention_mask=qformer_attention_mask)
        return self.language_projection(queries.last_hidden_state)


def export_bridge(model: QFormerCaptioner, path: str | os.PathLike) -> None:
    """Write the Q-Former and the projection of a captioner to one file.

    Args:
        model: the captioner; its bridge is written in the dtype that it has.
        path: a file that ends in `.pt2` (opened with `torch.export.load(path).module()`) or in `.onnx`.

    Raises:
        InputError: for another ending, or where what writes ONNX is not installed.

    Example:

    ```python
    >>> export_bridge(model, "bridge.onnx")  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession("bridge.onnx")  # doctest: +SKIP
    >>> (soft_prompt,) = session.run(None, {"image_embeds": image_embeds})  # doctest: +SKIP
    ```
    """
    path = Path(path)
    if path.suffix not in BRIDGE_FORMATS:
        raise InputError(f"A bridge is written to a file that ends in .pt2 or .onnx, not to {str(path)!r}.")
    check_output(path)
    bridge = Bridge(model).eval()
    config, device = model.config.qformer_config, model.qformer.query_tokens.device
    # Two of everything: torch.export takes a 1 for a number that is always 1.
    example = {"image_embeds": torch.zeros(2, 3, config.encoder_hidden_size, device=device)}
    sizes = {"image_embeds": {0: torch.export.Dim("images"), 1: torch.export.Dim("features")}}
    if config.use_qformer_text_input:
        prompt = {0: sizes["image_embeds"][0], 1: torch.export.Dim("words", max=config.max_position_embeddings)}
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            example[name], sizes[name] = torch.ones(2, 4, dtype=torch.long, device=device), prompt
    if path.suffix == ".pt2":
        with torch.no_grad():
            torch.export.save(torch.export.export(bridge, (), example, dynamic_shapes=sizes), path)
        return
    try:
        torch.onnx.export(
            bridge,
            (),
            path,
            kwargs=example,
            dynamic_shapes=sizes,
            output_names=["soft_prompt"],
            external_data=False,
            verbose=False,
        )
    except ImportError as error:
        raise InputError("An ONNX file needs more packages: pip install 'qformer-captioner[onnx]'.") from error
