"""qformer-captioner: a Q-Former that lets a frozen language model see.

The root of the repository is this package and is also what a Hub repository holds, so this file imports lazily: the
files that travel to the Hub (`*_qformer.py`) must work without it. Under its own name it makes our classes known to
transformers' Auto classes; under another (pytest imports a checkout by its folder's name) it must make no second ones.
"""

import importlib

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
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


if __name__ == "qformer_captioner":
    from .captioning import registration  # noqa: F401
