"""Metrics for the library `evaluate`: one class for all scores, and one class for each score."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate

from ..common.errors import InputError
from .checks import check_predictions, check_references
from .cider import DocumentFrequencies
from .corpus import METRICS, References
from .tokenizers import Tokenize

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
    predictions (list of str): one caption for each image.
    references (list of lists of str): the reference captions of each image. Images may have different numbers of them.
    df ("corpus", a DocumentFrequencies or the path of one): source of CIDEr's document frequencies.
    tokenize ("ptb", "characters", the name of a tokenizer or a function): what counts as a word. The default is "ptb",
        which refuses languages without spaces between words.
    per_image (bool): add "per_image", a dictionary of lists.
    allow_empty (bool): score an empty prediction as 0 instead of refusing it.
Returns:
    bleu_1 ... bleu_4 and rouge_l between 0 and 1, cider between 0 and 10, equal to those of the COCO caption toolkit.
"""


class CaptionMetrics(evaluate.Metric):
    r"""BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of captions, equal to the COCO caption toolkit's to 1e-12.

    The prepared references are kept between calls, so that scoring every epoch on the same images is fast. Corpus
    scores are not means over parts of the corpus, so several processes should gather their captions before scoring.

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
    _prepared: tuple[tuple, References] | None = None  # arguments of the last `References`, and that object

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Scores of image captions in pure Python, equal to those of the COCO caption toolkit.",
            citation="\n".join(_CITATIONS[metric] for metric in self.metrics),
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def compute(
        self,
        *,
        predictions: Iterable[str] | None = None,
        references: Iterable[Sequence[str]] | None = None,
        **options: Any,
    ) -> dict[str, Any] | None:
        """Score captions, or those that `add` and `add_batch` have collected.

        Args:
            predictions: one caption for each image.
            references: the reference captions of each image.
            options: `df` and `tokenize`, arguments of [`References`]; `per_image` and `allow_empty`, arguments of
                [`References.score`].

        Returns:
            The scores, as [`References.score`] returns them. In a distributed run, `None` in processes other than the
            main one.

        Raises:
            InputError: for predictions or references that cannot be scored; the message names the first.
        """
        if predictions is None and references is None:
            return super().compute(**options)
        if predictions is None or references is None:
            raise InputError("Give both predictions and references, or neither after `add` or `add_batch`.")
        # Checked here, because the error of evaluate prints all captions without naming the invalid one.
        predictions = predictions if isinstance(predictions, str) else list(predictions)
        references = list(references)
        check_predictions(predictions, len(references), options.get("allow_empty", False))
        check_references(references)
        predictions = [_storable(text) for text in predictions]
        references = [[_storable(text) for text in texts] for texts in references]
        return super().compute(predictions=predictions, references=references, **options)

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        df: str | os.PathLike | DocumentFrequencies = "corpus",
        tokenize: str | Tokenize | None = None,
        per_image: bool = False,
        allow_empty: bool = False,
    ) -> dict[str, Any]:
        if self._prepared is None or self._prepared[0] != (references, df, tokenize):
            self._prepared = (references, df, tokenize), References(references, df, tokenize)
        return self._prepared[1].score(predictions, self.metrics, per_image, allow_empty)


def _storable(text: str) -> str:
    """Remove unpaired surrogates, which Arrow cannot store and the tokenizer ignores."""
    return text if text.isascii() else text.encode("utf-8", "ignore").decode()


class Bleu(CaptionMetrics):
    """BLEU-1 to BLEU-4 alone; see [`CaptionMetrics`]."""

    metrics = ("bleu",)


class RougeL(CaptionMetrics):
    """ROUGE-L alone; see [`CaptionMetrics`]."""

    metrics = ("rouge_l",)


class Cider(CaptionMetrics):
    """CIDEr-D alone, which papers call CIDEr; see [`CaptionMetrics`]."""

    metrics = ("cider",)
