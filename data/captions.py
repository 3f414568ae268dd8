"""Captions in the cells of a data set."""

import re
from typing import Any

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # except tabs and line ends
MAX_CAPTION_CHARACTERS = 10_000


def captions_of(value: Any) -> list[str]:
    """Return the captions in a cell, without blank ones.

    Numbers count as text, because readers of CSV files turn some captions into numbers. Control characters become
    spaces. Captions longer than 10,000 characters are cut.

    Args:
        value: a string, a list of strings, or a list of COCO-style dicts with the key `"raw"` or `"caption"`. Any other
            value counts as an empty cell.

    Example:

    ```python
    >>> captions_of([{"raw": "a dog"}, {"caption": "a brown dog"}, " "])
    ['a dog', 'a brown dog']
    >>> captions_of(None)
    []
    ```
    """
    values = value if isinstance(value, list) else [value]
    texts = [item.get("raw", item.get("caption")) if isinstance(item, dict) else item for item in values]
    captions = [clean_caption(str(text)) for text in texts if is_text(text)]
    return [caption for caption in captions if caption]


def is_text(value: Any) -> bool:
    """Return whether a value is a string, or a number that is not NaN."""
    if isinstance(value, float):
        return value == value  # NaN marks an empty cell
    return isinstance(value, str | int) and not isinstance(value, bool)


def clean_caption(text: str) -> str:
    """Cut a caption to the allowed length, and replace its control characters."""
    return CONTROL_CHARACTERS.sub(" ", text[:MAX_CAPTION_CHARACTERS]).strip()
