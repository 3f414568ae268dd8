"""Texts of a row: its captions, and the prompt that they continue."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import datasets

from .captions import captions_of, clean_caption, is_text, why_no_caption
from .columns import missing_column, with_nested_columns
from .conversations import CONVERSATION_NAMES, is_conversation, rounds_of


class Text(NamedTuple):
    """Captions with the prompt that they continue. An empty prompt is that of the captioner.

    Without captions, `reason` says why.
    """

    prompt: str
    captions: list[str]
    reason: str = ""


def caption_columns(option: str, existing: Collection[str]) -> list[str]:
    """Return the columns that `--caption_column` names: one, or several with commas between them.

    Args:
        option: value of the option. Where the column "caption" is missing, a column of conversations takes its place.
        existing: columns of the data set. A column whose name has a comma is taken as one.

    Example:

    ```python
    >>> caption_columns("short, long", ["image", "short", "long"])
    ['short', 'long']
    ```
    """
    if option in existing:
        return [option]
    if option == "caption":
        return [next((name for name in CONVERSATION_NAMES if name in existing), option)]
    return [name.strip() for name in option.split(",") if name.strip()]


def rows_of_texts(
    rows: datasets.Dataset, caption_column: str, prompt_column: str | None = None, option_prefix: str = ""
) -> Iterator[tuple[int, Text]]:
    """Iterate over the texts of all rows, in order, each with the number of its row.

    Args:
        rows: the data set.
        caption_column: value of `--caption_column`.
        prompt_column: column of prompts, if rows have their own.
        option_prefix: prefix of the options that choose the columns ("eval_"), for error messages.

    Raises:
        InputError: if a column does not exist.
    """
    columns = caption_columns(caption_column, rows.column_names)
    asked = [("caption_column", column) for column in columns]
    asked += [] if prompt_column is None else [("prompt_column", prompt_column)]
    rows = with_nested_columns(rows, *(column for _, column in asked))
    for option, column in asked:
        if column not in rows.column_names:
            raise missing_column(column, rows.column_names, f"{option_prefix}{option}")
    cells = zip(*(rows[column] for column in columns), strict=True)
    prompts = itertools.repeat(None, len(rows)) if prompt_column is None else rows[prompt_column]
    return (
        (row, text)
        for row, (own, prompt) in enumerate(zip(cells, prompts, strict=True))
        for text in texts_in_row(own, prompt)
    )


def texts_in_row(cells: Sequence[Any], prompt: Any = None) -> list[Text]:
    """Return the texts of a row: all captions of its cells, or a text for each round of a conversation.

    Args:
        cells: the cell of each caption column.
        prompt: the cell of the prompt column. It replaces the prompts of a conversation.

    Example:

    ```python
    >>> texts_in_row(["a dog", ["a brown dog"]], "Describe it.")
    [Text(prompt='Describe it.', captions=['a dog', 'a brown dog'], reason='')]
    ```
    """
    own = clean_caption(str(prompt)) if prompt is not None and is_text(prompt) else ""
    captions: list[str] = []
    rounds: list[Text] = []
    for cell in cells:
        if is_conversation(cell):
            for asked, answers in rounds_of(cell):
                reason = "" if answers else "no caption: a prompt of the conversation has no answer"
                rounds.append(Text(own or clean_caption(asked), captions_of(answers), reason))
        else:
            captions += captions_of(cell)
    if rounds and not captions:
        return rounds
    reason = "" if captions else why_no_caption(next((cell for cell in cells if cell), None))
    return [Text(own, captions, reason), *rounds]
