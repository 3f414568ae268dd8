"""For `evaluate.load`: the metric itself lives in the package `qformer_captioner` (pip install qformer-captioner)."""

from qformer_captioner.metrics import Cider  # noqa: F401
