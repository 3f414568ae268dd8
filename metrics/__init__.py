"""Caption scores in pure Python that equal those of the COCO caption toolkit.

```python
from qformer_captioner.metrics import CaptionMetrics

CaptionMetrics().compute(predictions=["a dog runs"], references=[["a dog runs", "a brown dog"]])
```

Names whose modules import `evaluate`, torch or transformers are imported on first use, because that takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .cider import DocumentFrequencies
from .corpus import References
from .ptb_tokenizer import tokenize

if TYPE_CHECKING:
    from .clip import clip_scores
    from .evaluate_metric import Bleu, CaptionMetrics, Cider, RougeL
    from .java import java_scores

__all__ = [
    "Bleu",
    "CaptionMetrics",
    "Cider",
    "DocumentFrequencies",
    "References",
    "RougeL",
    "clip_scores",
    "java_scores",
    "tokenize",
]

_MODULES = {
    "Bleu": "evaluate_metric",
    "CaptionMetrics": "evaluate_metric",
    "Cider": "evaluate_metric",
    "RougeL": "evaluate_metric",
    "clip_scores": "clip",
    "java_scores": "java",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
