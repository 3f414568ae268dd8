"""Module for `evaluate.load`: the metric itself is in the package (pip install qformer-captioner)."""

from qformer_captioner.metrics.evaluate_metric import CaptionMetrics

__all__ = ["CaptionMetrics"]
