"""TODO."""

import datasets

from ..common.errors import InputError
from .loading import load_rows, rows_of, undecoded
from .readers import Rows
from .scenes import load_scenes

EVAL_SPLITS = ("validation", "val", "dev", "test")  # the first there is


STREAMED_EVAL_SAMPLES = 500


def load_splits(
    name: str,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    split_column: str = "split",
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    streaming: bool = False,
    evaluate: bool = True,
) -> tuple[Rows, datasets.Dataset | None]:
    """Load the rows to train on and the rows to evaluate on.

    Args:
        name: as [`load_rows`] takes it, or "scenes" for pictures drawn on the spot.
        config_name: which of a data set's configurations.
        train_split, eval_split: names of splits. By default the evaluation split is the first there is of "validation",
            "val", "dev" and "test".
        split_column: where one split holds all rows and has a column of this name, the column tells the splits.
        max_train_samples, max_eval_samples: keep so many rows, the first ones (of scenes: draw so many).
        seed: of the scenes.
        revision: which branch, tag or commit of a data set on the Hub.
        streaming: give all rows to train on as a stream. Those to evaluate on are read into memory, 500 unless
            `max_eval_samples` says otherwise.
        evaluate: load rows to evaluate on, where there are any.

    Raises:
        InputError: for a data set or split that is not there, or a file that cannot be read.
    """
    if name == "scenes":
        rows = load_scenes(max_train_samples or 10_000, max_eval_samples or 200, seed=seed)
        return undecoded(rows["train"].to_iterable_dataset()) if streaming else rows["train"], rows["validation"]
    rows = load_rows(name, config_name, split_column, revision=revision, streaming=streaming)
    if eval_split is None:
        eval_split = next((split for split in EVAL_SPLITS if split in rows), None)
    for split in (train_split, eval_split if evaluate else None):
        if split is not None and split not in rows:
            raise InputError(f"The data set {name!r} has no split {split!r}; it has {', '.join(map(repr, rows))}.")
    train = rows[train_split] if streaming else first_rows(rows[train_split], max_train_samples)
    if not evaluate or eval_split is None:
        return train, None
    return train, held_out(rows[eval_split], f"The split {eval_split!r} of {name!r}", max_eval_samples)


def load_held_out(
    name: str,
    config_name: str | None = None,
    eval_split: str | None = None,
    split_column: str = "split",
    max_eval_samples: int | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset:
    """Load rows to evaluate on from a data set of their own; where it has one split only, that.

    Args are those of [`load_splits`].

    Raises:
        InputError: for a data set or split that is not there, or a file that cannot be read.
    """
    if name == "scenes":
        return load_scenes(1, max_eval_samples or 200)["validation"]
    rows = load_rows(name, config_name, split_column, revision=revision, streaming=streaming)
    split = eval_split or next((each for each in EVAL_SPLITS if each in rows), None)
    if eval_split is None and len(rows) == 1:
        (split,) = rows
    if split not in rows:
        raise InputError(
            f"The data set {name!r} has no split {split or 'validation'!r}; it has {', '.join(map(repr, rows))}. "
            "Choose with --eval_split."
        )
    return held_out(rows[split], f"The split {split!r} of {name!r}", max_eval_samples)


def held_out(rows: Rows, name: str, number: int | None) -> datasets.Dataset:
    """The first so many rows; those of a stream are read into memory."""
    if isinstance(rows, datasets.Dataset):
        return first_rows(rows, number)
    content = list(rows_of(rows.take(number or STREAMED_EVAL_SAMPLES), name))
    info = datasets.DatasetInfo(features=rows.features, builder_name=rows.info.builder_name)
    return datasets.Dataset.from_list(content, info=info)


def first_rows(rows: datasets.Dataset, number: int | None) -> datasets.Dataset:
    """The first so many rows, or all."""
    return rows.select(range(min(number or len(rows), len(rows))))
