"""Export of a captioner to a self-contained folder with a merged adapter, or of its bridge to one file.

    qformer-captioner export outputs/mine outputs/merged
    qformer-captioner export outputs/mine bridge.onnx

If OUT ends in `.onnx` or `.pt2`, only the bridge is exported, which is the Q-Former and the projection. It maps
`image_embeds` to `soft_prompt`, as an ONNX model or a program of `torch.export`. It accepts any number of images and of
image features.
"""

import os
from pathlib import Path

from ..common.arguments import CommandParser
from ..common.command import run_command
from ..common.errors import InputError
from ..common.logging import get_logger
from .load import load_merged_captioner

logger = get_logger(__name__)


def export(source: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write a self-contained folder, or the bridge as one file ([`~hub.export_bridge.export_bridge`]).

    Args:
        source: folder or Hub id of a captioner, or of an adapter on one.
        out: folder to write, or a file that ends in `.onnx` or `.pt2`.

    Raises:
        InputError: if `out` exists and is not empty, or the captioner cannot be used.
        OSError: if the captioner or the base captioner of an adapter cannot be fetched; the message names it.

    Example:

    ```python
    >>> export("outputs/mine", "outputs/merged")  # doctest: +SKIP
    ```
    """
    from .export_bridge import BRIDGE_FORMATS, export_bridge  # imports torch

    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{str(out)!r} exists already and is not empty: choose another name.")
    captioner = load_merged_captioner(source)
    if out.suffix in BRIDGE_FORMATS:
        export_bridge(captioner, out)
    else:
        captioner.save_pretrained(out, include_backbones=True)


def export_command(words: list[str]) -> None:
    """Export the captioner that a command line names."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("source", help="Folder or Hub id of a captioner, or of an adapter on one.")
    parser.add_argument("out", help="Folder to write, or file that ends in .onnx or .pt2.")
    options = parser.parse_args(words)
    export(options.source, options.out)
    logger.info("Exported to %s.", options.out)


def main() -> None:
    """Run the command `qformer-captioner export`."""
    run_command(export_command)


if __name__ == "__main__":
    main()
