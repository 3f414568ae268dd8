"""Caption scores that equal the COCO toolkit's, without Java.

    from qformer_captioner.metrics import CaptionMetrics
    CaptionMetrics().compute(predictions=["a dog runs"], references=[["a dog runs", "a brown dog"]])

Everything is imported when it is asked for: `evaluate`, which the metric classes need, costs seconds.
"""

import importlib

_HOME = {
    "tokenize": "ptb_tokenizer",
    "References": "corpus",
    "DocumentFrequencies": "cider",
    "CaptionMetrics": "evaluate_metric",
    "Bleu": "evaluate_metric",
    "Cider": "evaluate_metric",
    "RougeL": "evaluate_metric",
    "java_scores": "java",
    "clip_scores": "clip",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
