"""Export of the bridge from image features to soft prompt, to a file that runs without this package."""

import os
from pathlib import Path

import torch
from torch import nn

from ..common.errors import InputError, check_output
from ..modeling_qformer import QFormerCaptioner

BRIDGE_FORMATS = (".pt2", ".onnx")


class Bridge(nn.Module):
    """Q-Former and projection of a captioner as one module.

    Args:
        model: the captioner; the bridge shares its parameters.
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
        """Compute the soft prompt.

        Args:
            image_embeds (`[B, N, Dv]`, float): image features.
            qformer_input_ids, qformer_attention_mask (`[B, P]`, long, *optional*): prompt, for a Q-Former that reads
                text.

        Returns:
            `[B, Q, D]`, float: soft prompt.
        """
        queries = self.qformer(image_embeds, input_ids=qformer_input_ids, attention_mask=qformer_attention_mask)
        return self.language_projection(queries.last_hidden_state)


def export_bridge(model: QFormerCaptioner, path: str | os.PathLike) -> None:
    """Write the Q-Former and the projection of a captioner to one file.

    The exported bridge accepts any number of images and of image features, and keeps its dtype.

    Args:
        model: the captioner.
        path: a file that ends in `.pt2`, to open with `torch.export.load(path).module()`, or in `.onnx`.

    Raises:
        InputError: for another ending, or if the packages that write ONNX are not installed.

    Example:

    ```python
    >>> export_bridge(model, "bridge.onnx")  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession("bridge.onnx")  # doctest: +SKIP
    >>> (soft_prompt,) = session.run(None, {"image_embeds": image_embeds})  # doctest: +SKIP
    ```
    """
    path = Path(path)
    if path.suffix not in BRIDGE_FORMATS:
        raise InputError(f"The bridge is written to a file that ends in .pt2 or .onnx, not to {str(path)!r}.")
    check_output(path)
    bridge = Bridge(model).eval()
    inputs, dynamic_shapes = _example_inputs(model)
    if path.suffix == ".pt2":
        with torch.no_grad():
            program = torch.export.export(bridge, (), inputs, dynamic_shapes=dynamic_shapes)
        torch.export.save(program, path)
        return
    try:
        torch.onnx.export(
            bridge,
            (),
            path,
            kwargs=inputs,
            dynamic_shapes=dynamic_shapes,
            output_names=["soft_prompt"],
            external_data=False,
            verbose=False,
        )
    except ImportError as error:
        raise InputError("Exporting to ONNX needs more packages: pip install 'qformer-captioner[onnx]'.") from error


def _example_inputs(model: QFormerCaptioner) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Return example inputs for tracing, and their dynamic dimensions.

    No dynamic dimension has size 1, because `torch.export` would treat it as a constant.
    """
    config, device = model.qformer.config, model.qformer.query_tokens.device
    images, features = torch.export.Dim("images"), torch.export.Dim("features")
    inputs = {"image_embeds": torch.zeros(2, 3, config.encoder_hidden_size, device=device)}
    dynamic_shapes = {"image_embeds": {0: images, 1: features}}
    if config.use_qformer_text_input:
        tokens = torch.export.Dim("tokens", max=config.max_position_embeddings)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            inputs[name] = torch.ones(2, 4, dtype=torch.long, device=device)
            dynamic_shapes[name] = {0: images, 1: tokens}
    return inputs, dynamic_shapes
