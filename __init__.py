"""qformer-captioner: a Q-Former that lets a frozen language model see.

The root of the repository is this package and is also what a Hub repository holds, so this file imports lazily: the
files that travel to the Hub (`*_qformer.py`) must work without it.
"""

import importlib

_HOME = {
    "QFormerConfig": "configuration_qformer",
    "QFormerCaptionerConfig": "configuration_qformer",
    "QFormerModel": "modeling_qformer",
    "QFormerCaptioner": "modeling_qformer",
    "QFormerCaptionerOutput": "modeling_qformer",
    "QFormerCaptionerProcessor": "processing_qformer",
    "onednn_linears": "common.onednn",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


if __name__ == "qformer_captioner":  # and not the name of the checkout's folder, under which pytest imports this file
    from .hub.auto_classes import register_with_transformers

    register_with_transformers()
