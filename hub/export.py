"""A captioner that stands by itself: its adapter merged, its backbones included. Or its bridge as one file.

    qformer-captioner export outputs/mine outputs/merged
    qformer-captioner export outputs/mine bridge.onnx

Where OUT ends in `.onnx` or `.pt2` it becomes the Q-Former and the projection alone, as an ONNX model or a program of
`torch.export`: from `image_embeds` to `soft_prompt`, for any number of images and of image features.
"""

import os
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils.hub import cached_file

from ..common.arguments import CommandParser
from ..common.command import run_command
from ..common.errors import UNUSABLE, InputError, cannot_use
from ..modeling_qformer import QFormerCaptioner
from .export_bridge import BRIDGE_FORMATS, export_bridge


def load_whole(source: str | os.PathLike) -> QFormerCaptioner:
    """A captioner with its adapter, if it has one, merged into it.

    Raises:
        InputError: if it cannot be used.
        OSError: if the captioner, or one that an adapter is on, cannot be fetched; the message names it.
    """
    try:
        if cached_file(source, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is None:
            return QFormerCaptioner.from_pretrained(source)
        base = PeftConfig.from_pretrained(source).base_model_name_or_path
        if not base:
            raise ValueError("its adapter does not say which captioner it is on")
        model = PeftModel.from_pretrained(QFormerCaptioner.from_pretrained(base), source).merge_and_unload()
    except UNUSABLE as error:
        raise cannot_use(source, error) from error
    model.config.language_model_name_or_path = None  # it is no longer the one of that name
    return model


def export(source: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write a folder that needs no other: no adapter, no reference to a backbone. Or the bridge ([`export_bridge`]).

    Args:
        source: folder or Hub id of a captioner, or of an adapter on one.
        out: folder to write, or a file that ends in `.onnx` or `.pt2`.

    Raises:
        InputError: if there is something at `out` already, or the captioner cannot be used.
        OSError: if the captioner, or one that an adapter is on, cannot be fetched; the message names it.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{str(out)!r} is there already and not empty. Choose another name.")
    if out.suffix in BRIDGE_FORMATS:
        export_bridge(load_whole(source), out)
    else:
        load_whole(source).save_pretrained(out, include_backbones=True)


def export_command(words: list[str]) -> None:
    """Export the captioner that a command line names."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("source", help="captioner, or adapter on one: folder or Hub id")
    parser.add_argument("out", help="folder to write, or file that ends in .onnx or .pt2")
    options = parser.parse_args(words)
    export(options.source, options.out)
    print(f"It is in {options.out}.")


def main() -> None:
    run_command(export_command)


if __name__ == "__main__":
    main()
