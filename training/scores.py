"""Scores of generated captions in the evaluations of a run."""

from collections.abc import Callable

from ..data.dataset import CaptionDataset
from ..data.scenes import Scene, score_facts
from ..metrics import CaptionMetrics

ScoreFunction = Callable[[list[str], CaptionDataset], dict[str, float]]

SCENE_SCORES = ("facts", "complete", "objects", "relations")
CAPTION_SCORES = ("cider", "bleu_4", "rouge_l")


def score_scenes(captions: list[str], rows: CaptionDataset) -> dict[str, float]:
    """Score captions of drawn scenes by the facts that they state, as `SCENE_SCORES`.

    Args:
        captions: one caption for each row, in order.
        rows: the scenes.
    """
    return score_facts(captions, map(Scene.from_json, rows.column("scene")))


class CaptionScorer:
    """Scores of captions against the captions of the data set, as `CAPTION_SCORES`.

    Example:

    ```python
    >>> scorer = CaptionScorer()
    >>> scorer(["a dog"], rows)  # doctest: +SKIP
    {'cider': 0.0, 'bleu_4': 0.0, 'rouge_l': 0.42}
    ```
    """

    def __init__(self) -> None:
        self.metrics = CaptionMetrics(keep_in_memory=True)  # the processes of a run must not share a cache file

    def __call__(self, captions: list[str], rows: CaptionDataset) -> dict[str, float]:
        """Score one caption for each row, in order."""
        scores = self.metrics.compute(predictions=captions, references=rows.references(), allow_empty=True)
        assert scores is not None, "only metrics that several processes share return None"
        return {name: scores[name] for name in CAPTION_SCORES}


def scorer_for(scenes: bool) -> ScoreFunction:
    """Return the score function of drawn scenes or of other data."""
    return score_scenes if scenes else CaptionScorer()
