"""Store of precomputed features: the folder that `precompute_features.py` writes and `train_hf.py --features` reads.

A store is a folder of plain files:

```text
index.json                  the vision encoder, the data set and the layout of each split; written last
skipped_rows.jsonl          the rows without features, and the reasons
train/rows.npy              keys that identify the images of the rows
train/00000.npy             features of the first rows
train/00000.offsets.npy     where the views of this file begin, if they differ in length
train/00000.skipped.jsonl   the rows of this file without features, if it has such rows
run.json                    the settings of the run that wrote the store
```

If all rows of a split are equally long, the features of a file are an array `[rows, views, N, Dv]`. Otherwise they are
`[F, Dv]`, all views of all rows one after the other. The offsets are int64 `[rows * views + 1]`: view `v` of row `r` is
`features[offsets[r * views + v] : offsets[r * views + v + 1]]`. The `shape` of such a split is `[null, Dv]` in the
index.
"""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor

from ..common.errors import InputError
from ..common.files import write_atomically
from ..configuration_qformer import VisionQFormerConfig
from .feature_shards import SplitLayout, damaged_file
from .features import SplitFeatures
from .vision_fingerprint import VisionFingerprint

INDEX_NAME, SKIPPED_NAME = "index.json", "skipped_rows.jsonl"
FORMAT = 2
READABLE_FORMATS = (1, 2)  # in format 1, all rows are equally long and the vision encoder is known
SPLIT_NAME = r"\w[\w.-]*"  # names of splits are also names of folders
DATASET_FIELDS = (
    "name",
    "config_name",
    "revision",
    "split_column",
    "image_column",
    "image_folder",
    "embeddings_column",
)
LAYOUT_FIELDS = ("rows", "rows_per_shard", "views", "shape", "dtype")
REMEDY = "Choose other features, or compute these with precompute_features.py."


class FeatureStore:
    """Precomputed features of the rows of a data set, by split.

    Args:
        folder: folder that `precompute_features.py` wrote.

    Attributes:
        vision (`VisionFingerprint`, *optional*): vision encoder that computed the features; `None` for features of a
            column whose encoder is unknown, or does not encode images.
        dataset (`dict[str, str | None]`): data set of the rows, by the names of `DATASET_FIELDS`.
        layouts (`dict[str, SplitLayout]`): the layout of each split.

    Raises:
        InputError: if the folder is not a store, or the store is incomplete or damaged.

    Example:

    ```python
    >>> store = FeatureStore("features")  # doctest: +SKIP
    >>> train = store.split("train")  # doctest: +SKIP
    >>> train.read([5, 0, 17]).image_embeds.shape  # doctest: +SKIP
    torch.Size([3, 50, 768])
    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / INDEX_NAME
        if not path.is_file():
            raise self._missing_index()
        try:
            index = json.loads(path.read_text())
            version = index["format"]
            if version in READABLE_FORMATS:
                vision = index["vision_model"]
                self.vision = None if vision is None else VisionFingerprint(**vision)
                self.dataset = {field: index["dataset"].get(field) for field in DATASET_FIELDS}
                self.layouts = self._read_layouts(index["splits"])
                names = filter(None, (self.vision_model_name_or_path, *self.dataset.values()))
                if not all(isinstance(name, str) for name in names):
                    raise TypeError("a name in it is not a string")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged_file(path, error) from error
        if version not in READABLE_FORMATS:
            raise InputError(
                f"The features in {str(folder)!r} have format {version}, and this version reads formats up to "
                f"{FORMAT}: compute them again with precompute_features.py --overwrite_output_dir."
            )

    def _missing_index(self) -> InputError:
        if (self.folder / "run.json").is_file():
            return InputError(
                f"The features in {str(self.folder)!r} are not complete: give the same command of "
                "precompute_features.py again to finish them."
            )
        return InputError(f"There are no features in {str(self.folder)!r}: compute them with precompute_features.py.")

    def _read_layouts(self, splits: dict[str, dict[str, Any]]) -> dict[str, SplitLayout]:
        layouts = {}
        for name, fields in splits.items():
            if not re.fullmatch(SPLIT_NAME, name):
                raise ValueError(f"{name!r} is not a valid name of a folder")
            layouts[name] = SplitLayout(self.folder / name, **{**fields, "shape": tuple(fields["shape"])})
        return layouts

    @property
    def vision_model_name_or_path(self) -> str | None:
        """Id on the Hub, or folder, of the vision encoder."""
        return None if self.vision is None else self.vision.name_or_path

    @property
    def vision_model_revision(self) -> str | None:
        """Commit of the vision encoder on the Hub; `None` for a folder."""
        return None if self.vision is None else self.vision.revision

    @property
    def dataset_options(self) -> dict[str, str]:
        """Options of the commands that name the data set, such as `dataset_name`, without those that are not set."""
        options = {
            "dataset_name": self.dataset["name"],
            "dataset_config_name": self.dataset["config_name"],
            "dataset_revision": self.dataset["revision"],
            "split_column": self.dataset["split_column"],
            "image_column": self.dataset["image_column"],
            "image_folder": self.dataset["image_folder"],
        }
        return {option: value for option, value in options.items() if value is not None}

    @property
    def width(self) -> int:
        """Width of the features, Dv."""
        return next(iter(self.layouts.values())).shape[1]

    def check_model(self, config: VisionQFormerConfig, image_processor: BaseImageProcessor) -> None:
        """Check that the features are those that a model reads. One without a vision encoder reads any features.

        Args:
            config: configuration of the model.
            image_processor: its image processor.

        Raises:
            InputError: if its vision encoder did not compute the features, or has no name by which this can be known.
            OSError: if its vision encoder does not exist.
        """
        name = config.vision_model_name_or_path
        if config.has_vision_model and name is None:
            raise InputError(
                f"The model has a vision encoder of its own, which did not compute the features in "
                f"{str(self.folder)!r}: give it images instead of --features."
            )
        if name is not None:
            self.check(name, config.vision_model_revision, image_processor)

    def check(self, name_or_path: str, revision: str | None, image_processor: BaseImageProcessor) -> None:
        """Check that the features were computed by a vision encoder and its image processor.

        Args:
            name_or_path: id on the Hub, or a folder.
            revision: branch, tag or commit on the Hub.
            image_processor: its image processor.

        Raises:
            InputError: if other weights computed the features, or if the images were preprocessed in another way.
            OSError: if the model does not exist.
        """
        if self.vision is None:
            raise InputError(
                f"The features in {str(self.folder)!r} do not say which encoder computed them, and the model has "
                f"the vision encoder {name_or_path!r}: leave out --vision_model_name_or_path, or give it to "
                "precompute_features.py."
            )
        expected = VisionFingerprint.of(name_or_path, revision, image_processor)
        if not self.vision.has_same_weights(expected):
            raise InputError(
                f"The features in {str(self.folder)!r} are those of the vision model {self.vision}, not of {expected}. "
                f"{REMEDY}"
            )
        stored, current = self.vision.image_processor, expected.image_processor
        if different := [field for field in {**stored, **current} if stored.get(field) != current.get(field)]:
            field = different[0]
            raise InputError(
                f"The images of the features in {str(self.folder)!r} were prepared by another image processor. It "
                f"differs in {', '.join(different)} ({field} was {stored.get(field)!r}, now {current.get(field)!r}). "
                f"{REMEDY}"
            )

    def split(self, name: str) -> SplitFeatures:
        """Return the features of a split.

        Raises:
            InputError: if the split does not exist, or its files are missing or damaged.
        """
        if name not in self.layouts:
            existing = ", ".join(map(repr, self.layouts))
            raise InputError(f"The features in {str(self.folder)!r} have no split {name!r}; they have {existing}.")
        return SplitFeatures(self.layouts[name], self._skip_reasons(name))

    def _skip_reasons(self, split: str) -> dict[int, str]:
        """Return why rows of a split have no features. Unlike a run's record, this file must be complete."""
        path = self.folder / SKIPPED_NAME
        try:
            entries = map(json.loads, path.read_text().splitlines())
            reasons = {entry["row"]: entry["reason"] for entry in entries if entry["split"] == split}
            for row in reasons:
                if type(row) is not int or not 0 <= row < self.layouts[split].rows:
                    raise ValueError(f"the split has no row {row!r}")
            return reasons
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged_file(path, error) from error


def finish_store(
    folder: Path, vision: VisionFingerprint | None, dataset: dict[str, str | None], layouts: dict[str, SplitLayout]
) -> int:
    """Write the files that complete a store after all shards. The index is written last.

    Args:
        folder: the folder.
        vision: vision encoder that computed the features, if it is known.
        dataset: the data set, by the names of `DATASET_FIELDS`.
        layouts: the layout of each split.

    Returns:
        The number of rows without features.

    Raises:
        InputError: if no row of a split has features.
    """
    skipped: list[str] = []
    for name, layout in layouts.items():
        lines = list(layout.skipped_lines())
        if 0 < layout.rows == len(lines):
            raise InputError(
                f"No row of the split {name!r} can be used ({json.loads(lines[0])['reason']}): check the column or the "
                "files, and give the command with --overwrite_output_dir."
            )
        skipped += lines
    write_atomically(folder / SKIPPED_NAME, "".join(f"{line}\n" for line in skipped))
    index = {
        "format": FORMAT,
        "vision_model": None if vision is None else asdict(vision),
        "dataset": dataset,
        "splits": {
            name: {field: getattr(layout, field) for field in LAYOUT_FIELDS} for name, layout in layouts.items()
        },
    }
    write_atomically(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return len(skipped)
