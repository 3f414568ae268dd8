"""Checks of predictions and references that every metric makes before it scores them."""

from collections.abc import Callable, Collection, Sequence

from ..common.errors import InputError, one_line


def check_predictions(predictions: Sequence[str], num_images: int | None = None, allow_empty: bool = False) -> None:
    """Check that predictions can be scored.

    Args:
        predictions: one caption for each image.
        num_images: number of images with references, if there are references.
        allow_empty: accept empty captions.

    Raises:
        InputError: for a prediction that is empty or not a string, or a wrong number of predictions. The message names
            the first invalid prediction and counts all of them.
    """
    if isinstance(predictions, str):
        raise InputError("The predictions are one string: give a list of captions, one for each image.")
    if num_images is not None and len(predictions) != num_images:
        raise InputError(
            f"There are {len(predictions)} predictions but {num_images} lists of references: give one list of "
            "references for each prediction."
        )
    if not len(predictions):
        raise InputError("There is nothing to score: the list of predictions is empty.")
    _refuse(
        [i for i, text in enumerate(predictions) if not isinstance(text, str)],
        lambda i: f"Prediction {i} is {predictions[i]!r}, which is not a string",
    )
    if not allow_empty:
        _refuse(
            [i for i, text in enumerate(predictions) if not text.strip()],
            lambda i: f"Prediction {i} is empty (`allow_empty` scores it as 0)",
        )


def check_references(references: Sequence[Sequence[str]]) -> None:
    """Check that every image has references and that all of them are strings.

    Args:
        references: the reference captions of each image.

    Raises:
        InputError: for an image whose references cannot be used. The message names the first such image and counts all
            of them.
    """
    _refuse(
        [i for i, texts in enumerate(references) if isinstance(texts, str) or not isinstance(texts, Collection)],
        lambda i: f"The references of prediction {i} are {references[i]!r}, which is not a list of strings",
    )
    _refuse([i for i, texts in enumerate(references) if len(texts) == 0], lambda i: f"Prediction {i} has no references")
    _refuse(
        [i for i, texts in enumerate(references) if not all(isinstance(text, str) for text in texts)],
        lambda i: f"The references of prediction {i} are {references[i]!r}, and not all of them are strings",
    )


def _refuse(offenders: list[int], describe: Callable[[int], str]) -> None:
    if offenders:
        others = f", and {len(offenders) - 1} more are like it" if len(offenders) > 1 else ""
        raise InputError(f"{one_line(describe(offenders[0]), 300)}{others}.")
