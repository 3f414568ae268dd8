"""qformer-captioner: a Q-Former that lets a frozen language model see.

The root of the repository is this package and is also what a Hub repository holds, so this file imports lazily: the
files that travel to the Hub (`*_qformer.py`) must work without it, and scoring needs no torch. Our classes become known
to transformers' Auto classes when one of them is asked for, or at once where transformers is in memory already; not
under another name, as which pytest imports the folder of a checkout: there must be no second ones.
"""

import importlib
import sys

_HOME = {
    "QFormerConfig": "configuration_qformer",
    "QFormerCaptionerConfig": "configuration_qformer",
    "QFormerModel": "modeling_qformer",
    "QFormerCaptioner": "modeling_qformer",
    "QFormerCaptionerOutput": "modeling_qformer",
    "QFormerCaptionerProcessor": "processing_qformer",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def _register() -> None:
    if __name__ == "qformer_captioner":
        importlib.import_module(".captioning.registration", __name__)


if "transformers" in sys.modules:
    _register()
