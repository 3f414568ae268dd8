#!/usr/bin/env python
r"""Run a vision encoder once over a data set, and keep what it says of each image on disk.

    python precompute_features.py --vision_model_name_or_path facebook/dinov2-small --dataset_name my_folder \
        --output_dir outputs/features
    torchrun --nproc_per_node 8 precompute_features.py --vision_model_name_or_path google/siglip-base-patch16-224 \
        --dataset_name coco --views 4 --random_resized_crop_scale 0.4 --output_dir outputs/features
    python precompute_features.py --vision_model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name shirsh10mall/Image_Captioning_GCC_Embeddings --embeddings_column image_embeddings

`train_hf.py --features outputs/features` then trains without the vision encoder. A killed run goes on when the same
command is given again. Embeddings that a data set has already go the same way, and no vision encoder is run.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor
from transformers.utils.logging import disable_progress_bar

from qformer_captioner.backbones_qformer import dtype_of, load_backbone, loading_error, vision_config_of
from qformer_captioner.common.arguments import option
from qformer_captioner.common.command import run_command
from qformer_captioner.common.errors import UNUSABLE, InputError
from qformer_captioner.common.onednn import onednn_linears
from qformer_captioner.common.option_parser import OptionParser
from qformer_captioner.common.run_folder import RunFolder
from qformer_captioner.data.augmentation import Augmentation, check_image_augmentation
from qformer_captioner.data.feature_shards import SplitLayout, remove_unfinished
from qformer_captioner.data.feature_store import SPLIT_NAME, finish_store
from qformer_captioner.data.images import folder_of_images, image_keys, open_cell
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.row_files import find_files
from qformer_captioner.data.vision_fingerprint import VisionFingerprint

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class FeatureArguments:
    """Which features of which images, and where they go."""

    vision_model_name_or_path: str | None = option(None, "The vision encoder (Hub id or folder).")
    vision_model_revision: str | None = option(None, "Its branch, tag or commit.")
    dataset_name: str | None = option(None, "The data set (Hub id or local folder).")
    dataset_config_name: str | None = option(None, "Which of its configurations.")
    dataset_revision: str | None = option(None, "Its branch, tag or commit on the Hub.")
    splits: list[str] | None = field(default=None, metadata={"help": "Which of its splits; by default all."})
    split_column: str = option("split", "Where one split holds all rows: the column that tells the splits.")
    image_column: str = option("image", "The column of images, or of paths.")
    image_folder: str | None = option(None, "Where paths in the image column start; by default where the file lies.")
    embeddings_column: str | None = option(
        None, "A column of embeddings to take instead: lists [D], [N, D] or [1, N, D] in every row."
    )
    max_samples: int | None = option(None, "Only so many rows of each split, the first ones.")
    train_split: str = option("train", "The split that gets several views of each image; all others get one.")
    views: int = option(1, "Of each image to train on: the whole image first, then random parts of it.")
    random_resized_crop_scale: float | None = option(None, "Random parts keep at least this share of an image's area.")
    horizontal_flip_prob: float = option(0.0, "Random parts are mirrored left to right with this probability.")
    seed: int = option(0, "Of the random parts.")
    dtype: str = option("float16", "Of the numbers on disk: float16, or float32 in twice the room.")
    compute_dtype: str = option("auto", "Of the vision encoder. auto: bfloat16 where the GPU has it, else float32.")
    batch_size: int = option(64, "Images at a time.")
    rows_per_shard: int = option(2048, "Rows of a file; what a killed run has not finished of one is done again.")
    dataloader_num_workers: int = option(0, "Processes that open images ahead, for each process that computes.")
    use_cpu: bool = option(False, "Leave the GPU alone.")
    output_dir: str = option("outputs/features", "The folder of features.")
    overwrite_output_dir: bool = option(False, "Throw away the features that are in that folder.")


def check_arguments(args: FeatureArguments) -> None:
    """Find what cannot work before anything is loaded."""
    if args.vision_model_name_or_path is None:
        raise InputError("Say whose features: --vision_model_name_or_path (a Hub id or a folder).")
    if args.dataset_name is None:
        raise InputError("Say what to compute features of: --dataset_name (a Hub id or a local folder).")
    if args.dtype not in ("float16", "float32"):
        raise InputError(f"--dtype is float16 or float32, not {args.dtype!r}.")
    if args.compute_dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"--compute_dtype is auto, float32, bfloat16 or float16, not {args.compute_dtype!r}.")
    for name in ("batch_size", "rows_per_shard", "views", "max_samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} is at least 1, not {value}.")
    for name in ("dataloader_num_workers", "seed"):
        if (value := getattr(args, name)) < 0:
            raise InputError(f"--{name} is at least 0, not {value}.")
    check_image_augmentation(args.random_resized_crop_scale, args.horizontal_flip_prob)
    varied = args.random_resized_crop_scale is not None or args.horizontal_flip_prob > 0
    if (args.views > 1) != varied:
        raise InputError(
            "--views 2 or more goes with --random_resized_crop_scale or --horizontal_flip_prob, or "
            "all views would be the same."
        )
    if args.embeddings_column is not None and args.views > 1:
        raise InputError("Ready-made embeddings have one view: leave out --views, or --embeddings_column.")


# ----------------------------------------------------------------------------------------------------------------------
# Features of images
# ----------------------------------------------------------------------------------------------------------------------

Skipped = dict[str, object]  # split, row, file and reason, as `captioning.data.SkippedRows` has them
Batch = tuple[np.ndarray, list[Skipped]]  # features [rows, views, N, Dv], and why there are none where they are zeros


class VisionEncoder:
    """Computes features as a captioner does, see `QFormerCaptioner.get_image_features`.

    Raises:
        OSError: if the model or its image processor cannot be fetched.
    """

    def __init__(self, args: FeatureArguments, image_processor: BaseImageProcessor, device: torch.device):
        self.dtype = args.compute_dtype
        if self.dtype == "auto":
            self.dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        self.args, self.image_processor, self.device = args, image_processor, device
        model = load_backbone(
            "vision_model", args.vision_model_name_or_path, args.vision_model_revision, getattr(torch, self.dtype)
        )
        self.model = model.eval().to(device)
        pixel_values = image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
        self.size = pixel_values.shape[1:]
        self.shape = tuple(self(pixel_values).shape[1:])
        if len(self.shape) != 2:
            name = args.vision_model_name_or_path
            raise InputError(f"The features of {name!r} are {list(self.shape)} of an image: a Q-Former reads [N, D].")

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` -> `[B, N, Dv]`."""
        pixel_values = pixel_values.to(self.device, dtype_of(self.model), non_blocking=True)
        with onednn_linears(self.device):
            return self.model(pixel_values).last_hidden_state

    def features(self, rows: datasets.Dataset, split: str, views: int, batches: list[range]) -> Iterator[Batch]:
        """Of each batch of rows."""
        loader = DataLoader(
            Pictures(rows, split, views, self.image_processor, self.size, self.args),
            batch_sampler=batches,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )
        for batch, (pixel_values, skipped) in zip(batches, loader, strict=True):
            if isinstance(pixel_values, InputError):
                raise pixel_values
            found = None
            if pixel_values is not None:
                found = torch.cat([self(images) for images in pixel_values.split(self.args.batch_size)])
                found = found.unflatten(0, (-1, views))
            yield as_stored(found, split, batch, skipped, (views, *self.shape), self.args.dtype)


class Pictures(Dataset):
    """Opens the image of a row and prepares its views `[views, 3, H, W]`. One that cannot be read comes as an entry."""

    def __init__(
        self,
        rows: datasets.Dataset,
        split: str,
        views: int,
        image_processor: BaseImageProcessor,
        size: torch.Size,
        args: FeatureArguments,
    ):
        self.rows = rows
        self.folder = folder_of_images(args.dataset_name, rows, args.image_folder)
        self.split, self.views, self.size, self.args = split, views, size, args
        self.image_processor = image_processor

    def __getitem__(self, row: int) -> torch.Tensor | Skipped | InputError:
        cell = self.rows[row][self.args.image_column]
        try:
            image = open_cell(cell, self.folder)
        except OSError as error:
            return self._skipped(row, cell, error)
        pictures = [random_view(image, row, view, self.args) if view else image for view in range(self.views)]
        try:
            pixel_values = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        except ValueError as error:  # it can make nothing of the image's shape
            return self._skipped(row, cell, error)
        if pixel_values.shape[1:] != self.size:
            return InputError(
                f"The image processor of {self.args.vision_model_name_or_path!r} makes row {row} of {self.split!r} "
                f"{list(pixel_values.shape[1:])} and another {list(self.size)}: features need images of one size."
            )
        return pixel_values

    def _skipped(self, row: int, cell: dict | None, error: Exception) -> Skipped:
        reason = " ".join(str(error).split())
        return {"split": self.split, "row": row, "file": cell and cell["path"], "reason": reason}


def random_view(image: Image.Image, row: int, view: int, args: FeatureArguments) -> Image.Image:
    """A random part of an image, the same one whenever and by whomever it is drawn."""
    augmentation = Augmentation(
        random_resized_crop_scale=args.random_resized_crop_scale, horizontal_flip_prob=args.horizontal_flip_prob
    )
    seed = np.random.SeedSequence([args.seed, row, view]).generate_state(1, np.uint64).item()
    return augmentation.augment_image(image, torch.Generator().manual_seed(seed))


def collate(rows: list[torch.Tensor | Skipped | InputError]) -> tuple[torch.Tensor | InputError | None, list[Skipped]]:
    """Pixel values of the rows that can be read, `None` if there are none, and the entries of the others."""
    # An error is handed on: raised in a process of the loader, it would reach the user as a page.
    if errors := [row for row in rows if isinstance(row, InputError)]:
        return errors[0], []
    found = [row for row in rows if torch.is_tensor(row)]
    return torch.cat(found) if found else None, [row for row in rows if not torch.is_tensor(row)]


def as_stored(
    found: torch.Tensor | None, split: str, batch: range, skipped: list[Skipped], shape: tuple[int, ...], dtype: str
) -> Batch:
    """The features of the rows that are not skipped, as all of a batch's rows are stored.

    Raises:
        InputError: if numbers are too large for the dtype.
    """
    array = np.zeros((len(batch), *shape), dtype)
    if found is None:
        return array, skipped
    without = {entry["row"] for entry in skipped}
    rows = [row for row in batch if row not in without]
    finite = found.isfinite().flatten(1).all(1).tolist()
    stored = found.to(getattr(torch, dtype)).cpu().numpy()
    reason = "Its features are not finite."
    for row, good, features in zip(rows, finite, stored, strict=True):
        if not good:
            skipped = [*skipped, {"split": split, "row": row, "file": None, "reason": reason}]
        elif not np.isfinite(features).all():
            raise InputError(f"Features of row {row} of {split!r} do not fit {dtype}: give --dtype float32.")
        else:
            array[row - batch.start] = features
    return array, sorted(skipped, key=lambda entry: entry["row"])


# ----------------------------------------------------------------------------------------------------------------------
# Features that a data set comes with
# ----------------------------------------------------------------------------------------------------------------------


class ReadyEmbeddings:
    """Takes features out of a column.

    Args:
        rows: the splits.
        args: which column, and whose features they are said to be.

    Raises:
        InputError: if there is nothing in the column, or what is there is no features of that vision encoder.
    """

    dtype = None  # nothing is computed

    def __init__(self, rows: dict[str, datasets.Dataset], args: FeatureArguments):
        self.args = args
        split, own = next(iter(rows.items()))
        cells = (cell for row in range(len(own)) for cell in self._cells(own, split, range(row, row + 1)))
        first = next((cell for cell in cells if cell is not None), None)
        if first is None:
            raise InputError(f"The column {args.embeddings_column!r} of the split {split!r} is empty.")
        self.shape = tuple(first.shape)
        name = args.vision_model_name_or_path
        try:
            config = vision_config_of(
                AutoConfig.from_pretrained(name, revision=args.vision_model_revision, trust_remote_code=False)
            )
        except (*UNUSABLE, OSError) as error:
            raise loading_error("vision_model", name, args.vision_model_revision, error) from error
        if config.hidden_size != self.shape[1]:
            raise InputError(
                f"The embeddings in the column {args.embeddings_column!r} are {self.shape[1]} wide, and features of "
                f"{name!r} are {config.hidden_size}: name the model that they are of."
            )

    def features(self, rows: datasets.Dataset, split: str, views: int, batches: list[range]) -> Iterator[Batch]:
        """Of each batch of rows."""
        for batch in batches:
            skipped, found = [], []
            for row, cell in zip(batch, self._cells(rows, split, batch), strict=True):
                if cell is None:
                    skipped.append({"split": split, "row": row, "file": None, "reason": "The row has no embeddings."})
                elif tuple(cell.shape) != self.shape:
                    raise InputError(
                        f"The embeddings in the column {self.args.embeddings_column!r} differ in shape: those of row "
                        f"{row} of {split!r} are {list(cell.shape)}, others {list(self.shape)}."
                    )
                else:
                    found.append(cell)
            found = torch.stack(found)[:, None] if found else None
            yield as_stored(found, split, batch, skipped, (views, *self.shape), self.args.dtype)

    def _cells(self, rows: datasets.Dataset, split: str, batch: range) -> list[torch.Tensor | None]:
        """Cells of the column as `[N, Dv]` in float32, `None` for an empty one."""
        column = rows.with_format("arrow")[batch.start : batch.stop][self.args.embeddings_column]
        return [self._as_features(cell, split, row) for row, cell in zip(batch, column, strict=True)]

    def _as_features(self, cell: pa.Scalar, split: str, row: int) -> torch.Tensor | None:
        if isinstance(cell, pa.ExtensionScalar):  # `datasets.Array2D`
            cell = cell.value
        if cell is None or not cell.is_valid:
            return None
        kind, shape = cell.type, []
        if isinstance(cell, pa.ListScalar):
            values = cell.values
            shape.append(len(values))
            while is_list(values.type):
                lengths = values.value_lengths().unique().to_pylist()
                shape.append(lengths[0] if len(lengths) == 1 else None)  # lists of several lengths, or none
                values = values.flatten()
            kind = values.type
        if len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]
        number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
        if not number or len(shape) not in (1, 2) or not all(shape):
            raise InputError(
                f"The column {self.args.embeddings_column!r} must hold numbers in lists [D], [N, D] or [1, N, D], but "
                f"row {row} of {split!r} is {cell.type}, {'lists of lengths ' + str(shape) if shape else 'no list'}."
            )
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).astype(np.float32)).view(-1, shape[-1])


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def load_column(args: FeatureArguments) -> dict[str, datasets.Dataset]:
    """The column of images or embeddings, of the splits that were asked for. Images are undecoded.

    Raises:
        InputError: if a split or the column is not there, or cannot hold images.
    """
    wanted = args.splits[0] if args.splits is not None and len(args.splits) == 1 else None
    found = load_rows(
        args.dataset_name, args.dataset_config_name, args.split_column, wanted, revision=args.dataset_revision
    )
    splits = args.splits or sorted(found, key=str)
    if args.views > 1 and args.train_split not in splits:
        raise InputError(f"There is no split {args.train_split!r} to have {args.views} views: choose by --train_split.")
    column = args.embeddings_column or args.image_column
    choose = "Choose with --image_column or --embeddings_column."
    columns = {}
    for split in splits:
        if split not in found:
            there = ", ".join(map(repr, found))
            raise InputError(f"The data set {args.dataset_name!r} has no split {split!r}; it has {there}.")
        if not isinstance(split, str) or not re.fullmatch(SPLIT_NAME, split):
            raise InputError(f"The split {split!r} has a name that no folder can have: choose others with --splits.")
        rows = found[split]
        if column not in rows.column_names:
            there = ", ".join(map(repr, rows.column_names))
            raise InputError(f"The data set has no column {column!r}; its columns are {there}. {choose}")
        rows = rows.select_columns(column).select(range(min(len(rows), args.max_samples or len(rows))))
        if args.embeddings_column is None:
            try:  # undecoded: a damaged image must fail one by one, and not inside the library, batch by batch
                rows = rows.cast_column(column, datasets.Image(decode=False))
            except (TypeError, ValueError, pa.ArrowException) as error:
                kind = rows.features[column]
                raise InputError(f"The column {column!r} holds {kind}, and no images or paths. {choose}") from error
        columns[split] = rows
    return columns


def about_data(args: FeatureArguments) -> dict[str, str | None]:
    """What the index says of the data set."""
    local = bool(find_files(args.dataset_name)) or os.path.exists(args.dataset_name)
    revision = None
    if not local:  # the builder tells data sets in the cache by the commit that they are of
        revision = datasets.load_dataset_builder(
            args.dataset_name, args.dataset_config_name, revision=args.dataset_revision
        ).hash
    return {
        "name": os.path.abspath(args.dataset_name) if local else args.dataset_name,
        "config_name": args.dataset_config_name,
        "revision": revision,
        "split_column": args.split_column,
        "image_column": None if args.embeddings_column else args.image_column,
        "image_folder": args.image_folder and os.path.abspath(args.image_folder),
        "embeddings_column": args.embeddings_column,
    }


def missing_shards(layouts: dict[str, SplitLayout]) -> list[tuple[str, int]]:
    return [(split, own) for split, layout in layouts.items() for own in layout.shards if not layout.is_complete(own)]


def announce(layouts: dict[str, SplitLayout], folder: Path, overwrite: bool) -> None:
    """Say how much room the features take.

    Raises:
        InputError: if the disk has not the room.
    """
    total = sum(layout.bytes_of(shard) for layout in layouts.values() for shard in layout.shards)
    needed = total if overwrite else sum(layouts[split].bytes_of(shard) for split, shard in missing_shards(layouts))
    for split, layout in layouts.items():
        tokens, width = layout.shape
        print(f"{split}: {layout.rows:,} rows, {layout.views} x [{tokens} x {width}] {layout.dtype} of each")
    print(f"{in_words(total)} in {folder}, {in_words(total - needed)} of it there already")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if overwrite and folder.exists():
        free += sum(path.stat().st_size for path in folder.rglob("*.npy"))
    if needed > free:
        raise InputError(
            f"The features need {in_words(needed)} more, and the disk of {str(folder)!r} has {in_words(free)} free: "
            "make room, choose another --output_dir, or ask for less with --splits, --views or --dtype float16."
        )


def in_words(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def batches_of(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def counted(batches: Iterator[Batch], bar: tqdm, processes: int) -> Iterator[Batch]:
    """The same batches, and a bar that moves as if all processes were as fast as this one."""
    for batch in batches:
        bar.update(len(batch[0]) * processes)
        yield batch


def precompute(words: list[str]) -> None:
    """Compute the features that a command line asks for, and leave a store of them (`data/features.py`).

    First come the options, then rows and vision encoder, and whether the folder is free for this run and the disk has
    room. Then the processes of a distributed run share the shards that are missing: each is written whole or not at
    all, so a killed run goes on with the next. The index, which makes a folder of shards a store, is written last.

    Args:
        words: the command line.

    Raises:
        InputError: if options do not go together, something that they name cannot be loaded or used, the folder holds
            another run, the disk has not the room, or not one row of a split can be used.
        OSError: if the folder cannot be written.

    Example:

    ```python
    >>> words = ["--vision_model_name_or_path", "facebook/dinov2-small", "--dataset_name", "my_folder"]
    >>> precompute(words)  # doctest: +SKIP
    ```
    """
    # 1. Options, and the processes. accelerate finds out by itself about every kind of processor but this one.
    (args,) = OptionParser((FeatureArguments,), __doc__).parse(words)
    check_arguments(args)
    cpu = args.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(hours=2))  # a fast process waits for a slow one
    disable_progress_bar()

    # 2. Rows, and who knows their features.
    rows = load_column(args)
    name, revision = args.vision_model_name_or_path, args.vision_model_revision
    try:
        image_processor = AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (*UNUSABLE, OSError) as error:
        raise loading_error("vision_model", name, revision, error) from error
    vision = VisionFingerprint.of(name, revision, image_processor)
    try:
        if args.embeddings_column is not None:
            source = ReadyEmbeddings(rows, args)
        else:
            source = VisionEncoder(args, image_processor, state.device)
    except UNUSABLE as error:  # also of a model that sees nothing
        raise InputError(" ".join(str(error).split())) from error

    # 3. The folder.
    folder = Path(args.output_dir)
    layouts = {
        split: SplitLayout(
            folder=folder / split,
            rows=len(own),
            rows_per_shard=args.rows_per_shard,
            views=args.views if split == args.train_split else 1,
            shape=source.shape,
            dtype=args.dtype,
        )
        for split, own in rows.items()
    }
    dataset = about_data(args)
    keys = {}
    if args.embeddings_column is None:
        keys = {split: image_keys(own, args.image_column) for split, own in rows.items()}
    settings = {
        "vision_model": asdict(vision),
        "dataset": dataset,
        "rows": {split: len(own) for split, own in rows.items()},
        "images": {split: hashlib.sha256(own.tobytes()).hexdigest() for split, own in keys.items()},
        "compute_dtype": source.dtype,
    }
    for each in (
        "rows_per_shard",
        "dtype",
        "train_split",
        "views",
        "random_resized_crop_scale",
        "horizontal_flip_prob",
        "seed",
    ):
        settings[each] = getattr(args, each)
    if state.is_main_process:
        run = RunFolder(folder, settings, args.overwrite_output_dir)
        announce(layouts, folder, args.overwrite_output_dir)
        run.start()
        for place in (folder, *(layout.folder for layout in layouts.values())):
            remove_unfinished(place)
    state.wait_for_everyone()

    # 4. Shards.
    todo = missing_shards(layouts)
    state.wait_for_everyone()  # or a slow process would take for done what a fast one has just written
    mine = todo[state.process_index :: state.num_processes]
    total = sum(layout.rows for layout in layouts.values())
    left = sum(len(layouts[split].rows_of(shard)) for split, shard in todo)
    with tqdm(
        total=total, initial=total - left, desc="features", unit="rows", disable=not state.is_main_process
    ) as bar:
        for split, layout in layouts.items():
            shards = [shard for own, shard in mine if own == split]
            step = max(1, args.batch_size // layout.views)
            batches = {shard: batches_of(layout.rows_of(shard), step) for shard in shards}
            features = source.features(
                rows[split], split, layout.views, [each for own in batches.values() for each in own]
            )
            features = counted(features, bar, state.num_processes)
            for shard in shards:
                layout.write(shard, islice(features, len(batches[shard])))

    # 5. The store.
    state.wait_for_everyone()
    state.destroy_process_group()  # the others end here, and should not be missed
    if not state.is_main_process:
        return
    for split, own in keys.items():
        np.save(layouts[split].keys_path, own)
    skipped = finish_store(folder, vision, dataset, layouts)
    run.finish(rows=total, skipped=skipped)
    print(f"The features of {total - skipped:,} rows are in {folder}.")
    if skipped:
        print(f"{skipped:,} rows have none; {folder / 'skipped_rows.jsonl'} says which and why.")


def main() -> None:
    run_command(precompute)


if __name__ == "__main__":
    main()
