"""qformer-captioner: image captioning with a Q-Former between a frozen vision encoder and a frozen language model.

The root of the repository is this package and is also what a Hub repository holds. This file imports lazily: torch
takes seconds to import, and the files that travel to the Hub (`*_qformer.py`) must work without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captioning.engine import Captions as Captions
    from .common.onednn import onednn_linears as onednn_linears
    from .configuration_qformer import QFormerCaptionerConfig as QFormerCaptionerConfig
    from .configuration_qformer import QFormerConfig as QFormerConfig
    from .configuration_qformer import QFormerPretrainingConfig as QFormerPretrainingConfig
    from .modeling_qformer import QFormerCaptioner as QFormerCaptioner
    from .modeling_qformer import QFormerCaptionerOutput as QFormerCaptionerOutput
    from .pretraining_qformer import QFormerForPretraining as QFormerForPretraining
    from .pretraining_qformer import QFormerPretrainingOutput as QFormerPretrainingOutput
    from .processing_qformer import QFormerCaptionerProcessor as QFormerCaptionerProcessor
    from .processing_qformer import QFormerPretrainingProcessor as QFormerPretrainingProcessor
    from .querying_qformer import QFormerModel as QFormerModel

__version__ = "0.1.0"  # pyproject.toml reads the version from here

_MODULES = {  # public name: the module that defines it
    "Captions": "captioning.engine",
    "QFormerCaptioner": "modeling_qformer",
    "QFormerCaptionerConfig": "configuration_qformer",
    "QFormerCaptionerOutput": "modeling_qformer",
    "QFormerCaptionerProcessor": "processing_qformer",
    "QFormerConfig": "configuration_qformer",
    "QFormerForPretraining": "pretraining_qformer",
    "QFormerModel": "querying_qformer",
    "QFormerPretrainingConfig": "configuration_qformer",
    "QFormerPretrainingOutput": "pretraining_qformer",
    "QFormerPretrainingProcessor": "processing_qformer",
    "onednn_linears": "common.onednn",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


if __name__ == "qformer_captioner":  # pytest also imports this file, under the name of the checkout's folder
    from .hub.auto_classes import register_with_transformers

    register_with_transformers()
