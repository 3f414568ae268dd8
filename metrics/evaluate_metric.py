"""The scores as `evaluate` metrics: one class that computes all of them in one pass, and one for each alone."""

import os
from collections.abc import Iterable, Sequence

import datasets
import evaluate

from ..common.errors import InputError
from .cider import DocumentFrequencies
from .corpus import METRICS, References, check_predictions, check_references

_CITATIONS = {
    "bleu": """@inproceedings{papineni2002bleu,
    title={BLEU: a method for automatic evaluation of machine translation},
    author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
    booktitle={ACL}, year={2002}}""",
    "rouge_l": """@inproceedings{lin2004rouge,
    title={ROUGE: A package for automatic evaluation of summaries},
    author={Lin, Chin-Yew}, booktitle={Text Summarization Branches Out}, year={2004}}""",
    "cider": """@inproceedings{vedantam2015cider,
    title={CIDEr: Consensus-based image description evaluation},
    author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
    booktitle={CVPR}, year={2015}}""",
}
_INPUTS = """
Args:
    predictions (list of str): one caption of each image.
    references (list of lists of str): the reference captions of each image; their numbers may differ.
    df ("corpus", or a table of document frequencies): what CIDEr takes the frequencies of n-grams from.
    per_image (bool): add "per_image", a dictionary of lists.
    allow_empty (bool): score an empty prediction as 0 instead of refusing it.
Returns:
    bleu_1 ... bleu_4 and rouge_l between 0 and 1, cider between 0 and 10, as the COCO caption toolkit has them.
"""


class CaptionMetrics(evaluate.Metric):
    r"""BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of captions, equal to the COCO caption toolkit's to 1e-12.

    The references' share of the work is kept from one call to the next, so that scoring every epoch on the same images
    costs only the predictions. Several processes should gather their captions and score on one: these are scores of a
    corpus, and no mean of the scores of its parts.

    `compute` takes `predictions`, `references` and the options of [`References`] and [`References.score`]: `df`,
    `per_image`, `allow_empty`.

    Example:

    ```python
    >>> from qformer_captioner.metrics import CaptionMetrics
    >>> references = [["a dog runs", "a brown dog runs on grass"], ["a cat sleeps", "a cat"]]
    >>> scores = CaptionMetrics().compute(predictions=["a dog runs", "a black cat"], references=references)
    >>> sorted(scores)
    ['bleu_1', 'bleu_2', 'bleu_3', 'bleu_4', 'cider', 'rouge_l']
    ```
    """

    metrics: Sequence[str] = METRICS
    _scored: tuple[tuple, References] | None = None  # the references of the last call, ready for the next

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Scores of image captions, equal to those of the COCO caption toolkit, in Python alone.",
            citation="\n".join(_CITATIONS[metric] for metric in self.metrics),
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def compute(
        self,
        *,
        predictions: Iterable[str] | None = None,
        references: Iterable[Sequence[str]] | None = None,
        **options,
    ) -> dict[str, float | dict[str, list[float]]] | None:
        """Score captions, or those that `add` and `add_batch` have collected.

        Args:
            predictions: one caption of each image.
            references: the reference captions of each image.
            options: `df` ("corpus", a [`DocumentFrequencies`] or the path of one), `per_image` and `allow_empty`.

        Raises:
            InputError: for predictions or references that cannot be scored; the message names the first.
        """
        if (predictions is None) != (references is None):
            raise InputError("Give predictions and references, or neither behind `add` and `add_batch`.")
        if predictions is None:
            return super().compute(**options)
        # evaluate would print all of them, and say nothing of which is wrong.
        predictions = predictions if isinstance(predictions, str) else list(predictions)
        references = list(references)
        check_predictions(predictions, len(references), options.get("allow_empty", False))
        check_references(references)
        predictions = [_storable(text) for text in predictions]
        references = [[_storable(text) for text in own] for own in references]
        return super().compute(predictions=predictions, references=references, **options)

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        df: str | os.PathLike | DocumentFrequencies = "corpus",
        per_image: bool = False,
        allow_empty: bool = False,
    ) -> dict[str, float | dict[str, list[float]]]:
        if self._scored is None or self._scored[0] != (references, df):
            self._scored = (references, df), References(references, df)
        return self._scored[1].score(predictions, self.metrics, per_image, allow_empty)


def _storable(text: str) -> str:
    """Without halves of characters, which Arrow cannot store and the tokenizer drops."""
    return text if text.isascii() else text.encode("utf-8", "ignore").decode()


class Bleu(CaptionMetrics):
    """BLEU-1 to BLEU-4 alone. As [`CaptionMetrics`]."""

    metrics = ("bleu",)


class RougeL(CaptionMetrics):
    """ROUGE-L alone. As [`CaptionMetrics`]."""

    metrics = ("rouge_l",)


class Cider(CaptionMetrics):
    """CIDEr-D, which every table calls CIDEr, alone. As [`CaptionMetrics`]."""

    metrics = ("cider",)
