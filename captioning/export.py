"""A captioner that stands by itself: its adapter merged, its backbones included.

python -m qformer_captioner.captioning.export SOURCE OUT
"""

import argparse
import os
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME

from ..modeling_qformer import QFormerCaptioner
from . import UNUSABLE, InputError, cannot_use, printable


def export(source: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write a folder that needs no other: no adapter, no reference to a backbone.

    Args:
        source: folder of a captioner, or of an adapter on one.
        out: folder to write.

    Raises:
        InputError: if `out` is not empty, or the captioner cannot be used.
        OSError: if the captioner, or one that an adapter is on, cannot be fetched; the message names it.
    """
    if Path(out).exists() and any(Path(out).iterdir()):
        raise InputError(f"{str(out)!r} is there already and not empty. Choose another folder.")
    try:
        if (Path(source) / ADAPTER_CONFIG_NAME).is_file():
            base = PeftConfig.from_pretrained(source).base_model_name_or_path
            if not base:
                raise ValueError("its adapter does not say which captioner it is on")
            model = PeftModel.from_pretrained(QFormerCaptioner.from_pretrained(base), source).merge_and_unload()
            model.config.language_model_name_or_path = None  # it is no longer the one of that name
        else:
            model = QFormerCaptioner.from_pretrained(source)
    except UNUSABLE as error:
        raise cannot_use(source, error) from error
    model.save_pretrained(out, include_backbones=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a captioner, or of an adapter on one")
    parser.add_argument("out", help="folder to write")
    options = parser.parse_args()
    try:
        export(options.source, options.out)
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {printable(error)}") from error
    print(f"The captioner is in {options.out}.")


if __name__ == "__main__":
    main()
