"""Scores in the evaluations of a run: those of generated captions, and the names of those of retrieval."""

from collections.abc import Callable

from ..common.logging import get_logger
from ..data.dataset import CaptionDataset
from ..data.scenes import Scene, score_facts
from ..evaluation.recall import DIRECTIONS
from ..metrics import CaptionMetrics
from ..metrics.tokenizers import Tokenize, first_without_spaces, resolve_tokenizer

logger = get_logger(__name__)

ScoreFunction = Callable[[list[str], CaptionDataset], dict[str, float]]

SCENE_SCORES = ("facts", "complete", "objects", "relations")
CAPTION_SCORES = ("cider", "bleu_4", "rouge_l")
RECALL_NAMES = {f"{way}_r{k}": f"R@{k}, {way.replace('_', ' ')}" for way in DIRECTIONS for k in (1, 5, 10)}
RECALL_NAMES["mean_recall"] = "mean recall"


def score_scenes(captions: list[str], rows: CaptionDataset) -> dict[str, float]:
    """Score captions of drawn scenes by the facts that they state, as `SCENE_SCORES`.

    Args:
        captions: one caption for each row, in order.
        rows: the scenes.
    """
    return score_facts(captions, map(Scene.from_json, rows.column("scene")))


class CaptionScorer:
    """Scores of captions against the captions of the data set, as `CAPTION_SCORES`.

    Args:
        tokenize: tokenizer of the scores, as [`References`] takes it. By default it is that of the COCO caption
            toolkit, or characters if the captions of the first call have no spaces between words.

    Example:

    ```python
    >>> scorer = CaptionScorer()
    >>> scorer(["a dog"], rows)  # doctest: +SKIP
    {'cider': 0.0, 'bleu_4': 0.0, 'rouge_l': 0.42}
    ```
    """

    def __init__(self, tokenize: str | Tokenize | None = None) -> None:
        self.metrics = CaptionMetrics(keep_in_memory=True)  # the processes of a run must not share a cache file
        self.tokenize = tokenize

    def __call__(self, captions: list[str], rows: CaptionDataset) -> dict[str, float]:
        """Score one caption for each row, in order."""
        references = rows.references()
        self.tokenize = self.tokenize or choose_tokenizer(references)
        scores = self.metrics.compute(
            predictions=captions, references=references, tokenize=self.tokenize, allow_empty=True
        )
        assert scores is not None, "only metrics that several processes share return None"
        return {name: scores[name] for name in CAPTION_SCORES}


def choose_tokenizer(references: list[list[str]]) -> str:
    """Return the tokenizer of the COCO caption toolkit, or characters for captions without spaces between words.

    Args:
        references: the captions of each image.
    """
    if first_without_spaces([text for texts in references for text in texts]) is None:
        return "ptb"
    logger.warning(
        "The captions have no spaces between words, so the scores count characters. --tokenize names another tokenizer."
    )
    return "characters"


def scorer_for(scenes: bool, tokenize: str | None, rows: CaptionDataset | None) -> ScoreFunction:
    """Return the score function of drawn scenes or of other data.

    Args:
        scenes: whether the data are drawn scenes.
        tokenize: tokenizer of the scores; `None` to choose one for the rows.
        rows: the rows to evaluate on, if there are any.

    Raises:
        InputError: if the tokenizer cannot be loaded.
    """
    if scenes:
        return score_scenes
    if tokenize is not None:
        resolve_tokenizer(tokenize, [])  # raise an error now, not in the first evaluation
    elif rows is not None:
        tokenize = choose_tokenizer(rows.references())
    return CaptionScorer(tokenize)
