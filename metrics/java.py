"""METEOR and SPICE, which exist in Java alone: pycocoevalcap runs them (`pip install 'qformer-captioner[java]'`)."""

import contextlib
import io
import shutil
from collections.abc import Sequence

from ..common.errors import InputError
from .corpus import check_predictions, check_references
from .ptb_tokenizer import tokenize

JAVA_METRICS = ("meteor", "spice")


def java_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = JAVA_METRICS,
    per_image: bool = False,
    allow_empty: bool = False,
) -> dict[str, float | dict[str, list[float]]]:
    """METEOR 1.5 (Denkowski and Lavie 2014) and SPICE (Anderson et al. 2016, arXiv 1607.08822), between 0 and 1.

    SPICE downloads its parser when it runs for the first time, and works with Java 8 to 15 only.

    Args:
        predictions: one caption of each image.
        references: the reference captions of each image.
        metrics: which of "meteor" and "spice".
        per_image: add `"per_image"`, a dictionary with the same keys and a list of scores each.
        allow_empty: score an empty prediction instead of refusing it.

    Raises:
        InputError: if Java or pycocoevalcap is missing, if a metric's own program fails, or for captions that cannot be
            scored. The message says what to install.

    Example:

    ```python
    >>> java_scores(["a dog runs"], [["a dog is running"]], metrics=["meteor"])  # doctest: +SKIP
    {'meteor': 0.31239469345701887}
    ```
    """
    check_predictions(predictions, len(references), allow_empty)
    check_references(references)
    scorers = java_scorers(metrics)
    sizes = [len(own) for own in references]
    reference_tokens = iter(tokenize([text for own in references for text in own]))
    theirs = {image: [_line(next(reference_tokens)) for _ in range(size)] for image, size in enumerate(sizes)}
    ours = {image: [_line(tokens)] for image, tokens in enumerate(tokenize(predictions))}
    scores: dict[str, float | dict[str, list[float]]] = {}
    images: dict[str, list[float]] = {}
    for metric, scorer in scorers.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # they print their progress
                scores[metric], each = scorer().compute_score(theirs, ours)
        except Exception as error:  # a Java program that dies shows as a broken pipe, a missing file, a bad number ...
            hint = " It needs Java 8 or 11, and the network when it first runs." if metric == "spice" else ""
            raise InputError(f"{metric} could not be computed: its Java program failed ({error}).{hint}") from error
        scores[metric] = float(scores[metric])
        images[metric] = [float(one["All"]["f"] if metric == "spice" else one) for one in each]
    if per_image:
        scores["per_image"] = images
    return scores


def java_scorers(metrics: Sequence[str]) -> dict[str, type]:
    """The toolkit's class of each metric.

    Raises:
        InputError: if there are some, and Java or pycocoevalcap is missing. The message says what to install.
    """
    if not metrics:
        return {}
    if shutil.which("java") is None:
        raise InputError(
            f"{' and '.join(metrics)} need Java, and there is no `java` on the PATH: install a Java runtime (Debian: "
            "apt install default-jre-headless), or leave them out."
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
    """Tokens in a line, as METEOR's protocol takes them: it parts its fields with `|||`."""
    return " ".join(token for token in tokens if "|||" not in token)
