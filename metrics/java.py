"""METEOR and SPICE, which are Java programs. pycocoevalcap runs them (`pip install 'qformer-captioner[java]'`)."""

import contextlib
import io
import shutil
from collections.abc import Sequence
from typing import Any

from ..common.errors import InputError, one_line
from .checks import check_predictions, check_references
from .ptb_tokenizer import tokenize

JAVA_METRICS = ("meteor", "spice")


def java_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = JAVA_METRICS,
    per_image: bool = False,
    allow_empty: bool = False,
) -> dict[str, Any]:
    """Compute METEOR 1.5 (Denkowski and Lavie 2014) and SPICE (Anderson et al. 2016, arXiv 1607.08822).

    The programs and the tokenizer are those of the COCO caption toolkit. SPICE downloads its parser on the first run,
    and works with Java 8 to 15 only.

    Args:
        predictions: one caption for each image.
        references: the reference captions of each image.
        metrics: metrics to compute, of "meteor" and "spice".
        per_image: add `"per_image"`, a dictionary with the same keys and a list of scores for each.
        allow_empty: score an empty prediction instead of refusing it.

    Returns:
        A dictionary with `meteor` and `spice`, between 0 and 1. SPICE is the mean F-score of the images.

    Raises:
        InputError: if Java or pycocoevalcap is missing, if a metric's program fails, or for captions that cannot be
            scored. The message says what to install.

    Example:

    ```python
    >>> from qformer_captioner.metrics import java_scores
    >>> java_scores(["a dog runs"], [["a dog is running"]], metrics=["meteor"])  # doctest: +SKIP
    {'meteor': 0.31239469345701887}
    ```
    """
    check_predictions(predictions, len(references), allow_empty)
    check_references(references)
    scorers = load_java_metrics(metrics)
    prediction_lines = {image: [_line(tokens)] for image, tokens in enumerate(tokenize(predictions))}
    # The references are tokenised in one call, as one file, because the tokenizer may read the first word of the next
    # line.
    tokens_of_references = iter(tokenize([text for texts in references for text in texts]))
    reference_lines = {
        image: [_line(next(tokens_of_references)) for _ in texts] for image, texts in enumerate(references)
    }
    scores: dict[str, Any] = {}
    image_scores: dict[str, list[float]] = {}
    for metric, scorer in scorers.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the toolkit prints its progress
                score, score_of_images = scorer().compute_score(reference_lines, prediction_lines)
        except Exception as error:  # a failed Java program can raise a broken pipe, a missing file or an invalid number
            hint = " It needs Java 8 or 11, and the network when it first runs." if metric == "spice" else ""
            message = f"{metric} could not be computed: its Java program failed ({one_line(error, 300)}).{hint}"
            raise InputError(message) from error
        scores[metric] = float(score)
        image_scores[metric] = [float(each["All"]["f"] if metric == "spice" else each) for each in score_of_images]
    if per_image:
        scores["per_image"] = image_scores
    return scores


def load_java_metrics(metrics: Sequence[str]) -> dict[str, type]:
    """Return the toolkit's class of each metric, after a check that Java and the toolkit are installed.

    Args:
        metrics: names of metrics, "meteor" or "spice".

    Raises:
        InputError: if `metrics` is not empty, and Java or pycocoevalcap is missing. The message says what to install.
    """
    if not metrics:
        return {}
    if shutil.which("java") is None:
        raise InputError(
            f"{' and '.join(metrics)} need Java, but `java` is not on the PATH. Install a Java runtime (Debian: apt "
            "install default-jre-headless), or leave them out."
        )
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.spice.spice import Spice
    except ImportError as error:
        raise InputError(
            f"{' and '.join(metrics)} need pycocoevalcap: pip install 'qformer-captioner[java]' ({error})."
        ) from error
    scorers = {"meteor": Meteor, "spice": Spice}
    return {metric: scorers[metric] for metric in metrics}


def _line(tokens: list[str]) -> str:
    """Join tokens to a line of METEOR's protocol, whose fields are separated by `|||`."""
    return " ".join(token for token in tokens if "|||" not in token)
