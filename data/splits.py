"""Splits of a data set: the rows to train on, and the rows to evaluate on."""

from collections.abc import Iterable

import datasets

from ..common.errors import one_line
from ..common.logging import get_logger
from .caption_forms import VizWizRules
from .columns import Rows
from .loading import iterate_rows, load_rows, missing_split, undecoded
from .scenes import load_scenes
from .skipped_rows import SkippedRows

logger = get_logger(__name__)

VALIDATION_SPLITS = ("validation", "val", "dev")  # the usual names
STREAMED_EVAL_SAMPLES = 500
TRAIN_SCENES, EVAL_SCENES = 10_000, 200


def default_eval_split(splits: Iterable[str], prefer_test: bool = False) -> str | None:
    """Return the default split to evaluate on, the first of the usual names that exists.

    Args:
        splits: names of the existing splits.
        prefer_test: whether "test" comes before "validation", "val" and "dev". For a final evaluation it comes first.
            In training it comes last, because the scores select the best checkpoint.

    Returns:
        The name of the split, or `None` if the data set does not have one of these splits.

    Example:

    ```python
    >>> default_eval_split(["train", "test", "dev"]), default_eval_split(["train", "test", "dev"], prefer_test=True)
    ('dev', 'test')
    ```
    """
    existing = set(splits)
    candidates = ("test", *VALIDATION_SPLITS) if prefer_test else (*VALIDATION_SPLITS, "test")
    return next((split for split in candidates if split in existing), None)


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
    skipped: SkippedRows | None = None,
    rules: VizWizRules | None = None,
) -> tuple[Rows, datasets.Dataset | None]:
    """Load the rows to train on and the rows to evaluate on.

    Args:
        name: name of a data set, as [`load_rows`] takes it, or "scenes" for drawn pictures.
        config_name: name of one of the data set's configurations.
        train_split: name of the split to train on.
        eval_split: name of the split to evaluate on; by default that of [`default_eval_split`].
        split_column: column that holds the name of each row's split, for data sets that keep all rows in one split.
        max_train_samples: largest number of rows to train on, taken from the beginning, or number of scenes to draw. A
            stream is not cut.
        max_eval_samples: largest number of rows to evaluate on, taken from the beginning, or number of scenes to draw.
        seed: random seed of the scenes.
        revision: branch, tag or commit of a data set on the Hub.
        streaming: return the rows to train on as a stream. The rows to evaluate on are read into memory, at most 500 by
            default.
        evaluate: whether to load rows to evaluate on.
        skipped: record of the rows that belong to no split, and of what a folder holds besides its rows.
        rules: rules for the captions of VizWiz.

    Returns:
        The rows to train on, and the rows to evaluate on or `None`.

    Raises:
        InputError: if the data set or a split does not exist, or a file cannot be read.
    """
    if name == "scenes":
        scenes = load_scenes(max_train_samples or TRAIN_SCENES, max_eval_samples or EVAL_SCENES, seed=seed)
        train_scenes = undecoded(scenes["train"].to_iterable_dataset()) if streaming else scenes["train"]
        return train_scenes, scenes["validation"]
    splits = load_rows(
        name, config_name, split_column, revision=revision, streaming=streaming, skipped=skipped, rules=rules
    )
    if eval_split is None:
        eval_split = default_eval_split(splits)
    for split in (train_split, eval_split if evaluate else None):
        if split is not None and split not in splits:
            raise missing_split(name, split, splits, "--train_split and --eval_split")
    if unused := [split for split in splits if split not in (train_split, eval_split)]:
        names = one_line(", ".join(map(repr, unused)), 200)
        logger.info("%s also has %s: --train_split and --eval_split choose the splits.", name, names)
    train_rows = splits[train_split] if streaming else first_rows(splits[train_split], max_train_samples)
    if not evaluate or eval_split is None:
        return train_rows, None
    return train_rows, in_memory(splits[eval_split], f"The split {eval_split!r} of {name!r}", max_eval_samples)


def load_eval_split(
    name: str,
    config_name: str | None = None,
    eval_split: str | None = None,
    split_column: str = "split",
    max_eval_samples: int | None = None,
    revision: str | None = None,
    streaming: bool = False,
    skipped: SkippedRows | None = None,
    rules: VizWizRules | None = None,
) -> datasets.Dataset:
    """Load the rows to evaluate on from a separate data set.

    Args:
        eval_split: name of the split. By default it is the only one, or that of [`default_eval_split`].

    The other arguments are those of [`load_splits`].

    Raises:
        InputError: if the data set or the split does not exist, or a file cannot be read.
    """
    if name == "scenes":
        return load_scenes(1, max_eval_samples or EVAL_SCENES)["validation"]
    splits = load_rows(
        name, config_name, split_column, revision=revision, streaming=streaming, skipped=skipped, rules=rules
    )
    split = eval_split or default_eval_split(splits)
    if eval_split is None and len(splits) == 1:
        (split,) = splits
    if split is None or split not in splits:
        raise missing_split(name, split or "validation", splits, "--eval_split")
    return in_memory(splits[split], f"The split {split!r} of {name!r}", max_eval_samples)


def in_memory(rows: Rows, name: str, max_samples: int | None) -> datasets.Dataset:
    """Return the first `max_samples` rows as a map-style data set.

    A stream is read into memory, at most 500 rows by default.
    """
    if isinstance(rows, datasets.Dataset):
        return first_rows(rows, max_samples)
    content = list(iterate_rows(rows.take(max_samples or STREAMED_EVAL_SAMPLES), name))
    info = datasets.DatasetInfo(features=rows.features, builder_name=rows.info.builder_name)
    return datasets.Dataset.from_list(content, info=info)


def first_rows(rows: datasets.Dataset, max_samples: int | None) -> datasets.Dataset:
    """Return the first `max_samples` rows, or all."""
    return rows.select(range(min(max_samples or len(rows), len(rows))))
