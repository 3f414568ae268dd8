"""Steps of `precompute_features.py`: resolve the options, claim the folder, write the shards, write the index."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import BaseImageProcessor
from transformers.utils.logging import disable_progress_bar

from ..common.arguments import check_at_least, check_one_of
from ..common.errors import UNUSABLE, InputError, one_line
from ..common.logging import get_logger
from ..common.ray_workers import check_single_process, map_with_ray
from ..common.run_folder import RunFolder
from .augmentation import Augmentation, check_image_augmentation
from .columns import image_column_of, missing_column, with_nested_columns
from .embeddings_column import EmbeddingsColumn
from .feature_arguments import FeatureArguments
from .feature_extraction import ImageFeatures, VisionEncoder, feature_size_of, image_processor_of
from .feature_shards import FeatureBatch, SplitLayout, remove_unfinished
from .feature_store import SKIPPED_NAME, SPLIT_NAME, finish_store
from .image_paths import folder_of_images
from .images import image_keys, undecoded_images
from .loading import load_rows, missing_split
from .row_files import find_files
from .skip_limit import SkipLimit
from .vision_fingerprint import VisionFingerprint

logger = get_logger(__name__)

# Options that change the stored features or their layout. Runs that differ in one of them are different runs.
IDENTIFYING_OPTIONS = (
    "rows_per_shard",
    "dtype",
    "train_split",
    "views",
    "random_resized_crop_scale",
    "horizontal_flip_prob",
    "seed",
)
COLUMN_OPTIONS = "image_column or --embeddings_column"


# ----------------------------------------------------------------------------------------------------------------------
# Options, rows and features
# ----------------------------------------------------------------------------------------------------------------------


def check_arguments(args: FeatureArguments) -> None:
    """Check the options before anything is loaded.

    Raises:
        InputError: for a missing option, a value that is not valid, or options that contradict each other.
    """
    if args.vision_model_name_or_path is None and args.embeddings_column is None:
        raise InputError(
            "Name the vision encoder with --vision_model_name_or_path (a Hub id or a folder), or a column that already "
            "holds features with --embeddings_column."
        )
    if args.dataset_name is None:
        raise InputError("Name the data set with --dataset_name (a Hub id, a folder or files).")
    check_one_of(args, ("float16", "float32"), "dtype")
    check_one_of(args, ("local", "ray"), "engine")
    if args.engine == "ray":
        check_single_process()
    check_one_of(args, ("auto", "float32", "bfloat16", "float16"), "compute_dtype")
    check_at_least(args, 1, "batch_size", "rows_per_shard", "views", "max_samples", "num_workers")
    check_at_least(args, 0, "max_skipped", "dataloader_num_workers", "seed", "gpus_per_worker")
    check_image_augmentation(args.random_resized_crop_scale, args.horizontal_flip_prob)
    is_augmented = args.random_resized_crop_scale is not None or args.horizontal_flip_prob > 0
    if (args.views > 1) != is_augmented:
        raise InputError(
            "--views 2 or more goes together with --random_resized_crop_scale or --horizontal_flip_prob: without them "
            "all views are the same, and they change no single view."
        )
    if args.embeddings_column is not None and args.views > 1:
        raise InputError("Embeddings of a column have one view: leave out --views, or --embeddings_column.")


@dataclass(frozen=True)
class FeatureRun:
    """Options of a run, with the rows, the source of features and the layout that they resolve to.

    Args:
        args: the options.
        state: this process, and the other processes of the run.
        vision: fingerprint of the vision encoder; `None` for a column of features from an unknown encoder.
        dataset: description of the data set for the index.
        source: source of the features: a vision encoder, or a column of embeddings.
        layouts: layout of the shards of each split.
        image_keys: keys that identify the images of each split. Columns of embeddings have no keys.
    """

    args: FeatureArguments
    state: PartialState
    vision: VisionFingerprint | None
    dataset: dict[str, str | None]
    source: ImageFeatures | EmbeddingsColumn
    layouts: dict[str, SplitLayout]
    image_keys: dict[str, np.ndarray]

    @property
    def folder(self) -> Path:
        """Folder of the store."""
        return Path(self.args.output_dir)

    @property
    def num_rows(self) -> int:
        """Number of rows of all splits."""
        return sum(layout.rows for layout in self.layouts.values())

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify the run. A run with other settings cannot continue this one."""
        return {
            "vision_model": None if self.vision is None else asdict(self.vision),
            "dataset": self.dataset,
            "rows": {split: layout.rows for split, layout in self.layouts.items()},
            "images": {split: hashlib.sha256(keys.tobytes()).hexdigest() for split, keys in self.image_keys.items()},
            "compute_dtype": self.source.compute_dtype,
            **{name: getattr(self.args, name) for name in IDENTIFYING_OPTIONS},
        }

    def missing_shards(self) -> list[tuple[str, int]]:
        """Return the incomplete shards, as pairs of split and shard number."""
        return [
            (split, shard)
            for split, layout in self.layouts.items()
            for shard in layout.shards
            if not layout.is_complete(shard)
        ]


def resolve(args: FeatureArguments) -> FeatureRun:
    """Check the options, load the rows and the vision encoder or column, and plan the shards.

    Raises:
        InputError: if options contradict each other, or something that they name cannot be used.
        OSError: if the vision encoder cannot be loaded.
    """
    check_arguments(args)
    state = start_processes(args)
    rows = load_column(args)
    name, revision = args.vision_model_name_or_path, args.vision_model_revision
    vision = image_processor = None
    if name is not None:
        image_processor = image_processor_of(name, revision)
        vision = VisionFingerprint.of(name, revision, image_processor)
    source = load_source(args, rows, image_processor, state.device)
    keys = {}
    if isinstance(source, ImageFeatures):
        keys = {split: image_keys(images, args.image_column) for split, images in rows.items()}
        if state.is_main_process:
            source.check_images(SkipLimit(args.max_skipped))
    return FeatureRun(args, state, vision, describe_dataset(args), source, plan_shards(args, rows, source.shape), keys)


def start_processes(args: FeatureArguments) -> PartialState:
    """Join the processes of a distributed run and choose the device."""
    disable_progress_bar()
    use_cpu = args.use_cpu or not torch.accelerator.is_available()  # accelerate does not choose the CPU automatically
    return PartialState(cpu=use_cpu, timeout=timedelta(hours=2))  # a fast process waits for a slow one


def load_column(args: FeatureArguments) -> dict[str, datasets.Dataset]:
    """Load the column of undecoded images, or of embeddings, of each split.

    Raises:
        InputError: if a split or the column does not exist, or the column cannot hold images.
    """
    only_split = args.splits[0] if args.splits is not None and len(args.splits) == 1 else None
    existing = load_rows(
        args.dataset_name, args.dataset_config_name, args.split_column, only_split, revision=args.dataset_revision
    )
    splits = args.splits or sorted(existing, key=str)
    if args.views > 1 and args.train_split not in splits:
        raise InputError(
            f"There is no split {args.train_split!r} whose images could get {args.views} views: choose one with "
            "--train_split."
        )
    args.image_column = image_column_of(next(iter(existing.values())), args.image_column)
    column = args.embeddings_column or args.image_column
    columns = {}
    for split in splits:
        if split not in existing:
            raise missing_split(args.dataset_name, split, existing, "--splits")
        if not isinstance(split, str) or not re.fullmatch(SPLIT_NAME, split):
            raise InputError(f"The split {split!r} cannot be the name of a folder: choose others with --splits.")
        rows = with_nested_columns(existing[split], column)
        if column not in rows.column_names:
            raise missing_column(column, rows.column_names, COLUMN_OPTIONS)
        rows = rows.select(range(min(len(rows), args.max_samples or len(rows))))
        if args.embeddings_column is None:
            columns[split] = undecoded_images(rows, column, f"--{COLUMN_OPTIONS}")
        else:
            columns[split] = rows.select_columns(column)
    return columns


def load_source(
    args: FeatureArguments,
    rows: dict[str, datasets.Dataset],
    image_processor: BaseImageProcessor | None,
    device: torch.device,
) -> ImageFeatures | EmbeddingsColumn:
    """Load the vision encoder, or check the column of embeddings.

    Args:
        args: the options.
        rows: the column of each split.
        image_processor: image processor of the vision encoder; `None` if the options name no vision encoder.
        device: device of the vision encoder.

    Raises:
        InputError: if the vision encoder or the column cannot be used.
        OSError: if the vision encoder cannot be loaded.
    """
    name, revision = args.vision_model_name_or_path, args.vision_model_revision
    if args.embeddings_column is not None:
        embeddings = EmbeddingsColumn(rows, args.embeddings_column)
        if name is not None:
            check_width(embeddings, name, revision)
        return embeddings
    assert name is not None and image_processor is not None, "check_arguments checks it"
    try:
        encoder = VisionEncoder(name, revision, image_processor, device, args.compute_dtype)
    except UNUSABLE as error:  # for example a model that does not accept images
        raise InputError(one_line(error)) from error
    folders = {
        split: folder_of_images(args.dataset_name, rows[split], args.image_folder, args.allowed_image_folders)
        for split in rows
    }
    augmentation = Augmentation(args.random_resized_crop_scale, args.horizontal_flip_prob, seed=args.seed)
    return ImageFeatures(
        encoder=encoder,
        image_processor=image_processor,
        rows=rows,
        image_column=args.image_column,
        image_folders=folders,
        augmentation=augmentation,
        batch_size=args.batch_size,
        num_workers=args.dataloader_num_workers,
    )


def check_width(embeddings: EmbeddingsColumn, name_or_path: str, revision: str | None) -> None:
    """Check that embeddings have the width of the features of a vision encoder.

    Raises:
        InputError: if they do not.
        OSError: if the configuration of the vision encoder cannot be loaded.
    """
    width, expected = embeddings.shape[1], feature_size_of(name_or_path, revision)
    if width != expected:
        raise InputError(
            f"The embeddings in the column {embeddings.column!r} have {width} numbers, and features of "
            f"{name_or_path!r} have {expected}: name the vision model that computed them, or none."
        )


def describe_dataset(args: FeatureArguments) -> dict[str, str | None]:
    """Return the description of the data set for the index."""
    is_local = bool(find_files(args.dataset_name)) or os.path.exists(args.dataset_name)
    revision = None
    if not is_local:  # the builder's hash is the commit, also for data sets in the cache
        revision = datasets.load_dataset_builder(
            args.dataset_name, args.dataset_config_name, revision=args.dataset_revision
        ).hash
    return {
        "name": os.path.abspath(args.dataset_name) if is_local else args.dataset_name,
        "config_name": args.dataset_config_name,
        "revision": revision,
        "split_column": args.split_column,
        "image_column": None if args.embeddings_column else args.image_column,
        "image_folder": os.path.abspath(args.image_folder) if args.image_folder else args.image_folder,
        "embeddings_column": args.embeddings_column,
    }


def plan_shards(
    args: FeatureArguments, rows: dict[str, datasets.Dataset], shape: tuple[int | None, int]
) -> dict[str, SplitLayout]:
    """Return the layout of the shards of each split."""
    return {
        split: SplitLayout(
            folder=Path(args.output_dir) / split,
            rows=len(split_rows),
            rows_per_shard=args.rows_per_shard,
            views=args.views if split == args.train_split else 1,
            shape=shape,
            dtype=args.dtype,
        )
        for split, split_rows in rows.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------------------


def claim_folder(run: FeatureRun) -> RunFolder | None:
    """Claim the output folder for this run in the main process. Other processes wait and get `None`.

    Raises:
        InputError: if the folder holds another run, or the disk is too small.
    """
    run_folder = None
    if run.state.is_main_process:
        run_folder = RunFolder(run.folder, run.settings(), run.args.overwrite_output_dir)
        check_disk(run)
        run_folder.start()
        for folder in (run.folder, *(layout.folder for layout in run.layouts.values())):
            remove_unfinished(folder)
    run.state.wait_for_everyone()
    return run_folder


def check_disk(run: FeatureRun) -> None:
    """Log the size of the features, and check that they fit on the disk.

    Raises:
        InputError: if the disk has too little free space.
    """
    mean_length = run.source.mean_length
    for split, layout in run.layouts.items():
        length, width = f"{mean_length:.4g}", layout.shape[1]
        length = f"about {length}" if layout.is_ragged else length
        logger.info(
            "%s: %s rows, %s x [%s, %s] %s", split, f"{layout.rows:,}", layout.views, length, width, layout.dtype
        )
    overwrite = run.args.overwrite_output_dir
    total = sum(layout.bytes_of(shard, mean_length) for layout in run.layouts.values() for shard in layout.shards)
    missing = sum(run.layouts[split].bytes_of(shard, mean_length) for split, shard in run.missing_shards())
    needed = total if overwrite else missing
    logger.info("%s in %s, of which %s exist", format_size(total), run.folder, format_size(total - needed))
    existing = next(path for path in (run.folder.absolute(), *run.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if overwrite and run.folder.exists():
        free += sum(path.stat().st_size for path in run.folder.rglob("*.npy"))
    if needed > free:
        raise InputError(
            f"The features need another {format_size(needed)}, and the disk of {str(run.folder)!r} has "
            f"{format_size(free)} free: free some space, choose another --output_dir, or store less with --splits, "
            "--views or --dtype float16."
        )


def format_size(size: int) -> str:
    """Return a number of bytes in megabytes or gigabytes."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def write_shards(run: FeatureRun) -> None:
    """Compute this process's share of the missing shards, and write them."""
    missing = run.missing_shards()
    run.state.wait_for_everyone()  # no process may write a shard before all processes have listed the missing shards
    mine = missing[run.state.process_index :: run.state.num_processes]
    num_missing = sum(len(run.layouts[split].rows_of(shard)) for split, shard in missing)
    with tqdm(
        total=run.num_rows,
        initial=run.num_rows - num_missing,
        desc="features",
        unit="rows",
        disable=not run.state.is_main_process,
    ) as progress_bar:
        if run.args.engine == "ray":
            rows = [{"split": split, "shard": shard} for split, shard in mine]
            workers = run.args.num_workers, run.args.gpus_per_worker
            for row in map_with_ray(rows, ShardWorker(run.args), *workers, batch_size=1):
                progress_bar.update(len(run.layouts[row["split"]].rows_of(row["shard"])))
        else:
            write_some_shards(run, mine, progress_bar)


def write_some_shards(run: FeatureRun, shards: list[tuple[str, int]], progress_bar: tqdm) -> None:
    """Compute and write shards.

    Args:
        run: the run.
        shards: the shards, as pairs of split and number.
        progress_bar: bar to advance by rows.
    """
    for split, layout in run.layouts.items():
        own = [shard for shard_split, shard in shards if shard_split == split]
        rows_per_batch = max(1, run.args.batch_size // layout.views)
        row_batches = {shard: split_rows(layout.rows_of(shard), rows_per_batch) for shard in own}
        # One iterator for all shards, so that the workers of the data loader never wait for the next shard.
        features = run.source.batches(split, layout, list(chain(*row_batches.values())))
        features = count_rows(features, progress_bar, run.state.num_processes)
        for shard in own:
            layout.write(shard, islice(features, len(row_batches[shard])))


class ShardWorker:
    """Function for a worker of Ray that computes and writes a shard.

    Args:
        args: the options of the run.
    """

    def __init__(self, args: FeatureArguments):
        self.args = args
        self.run: FeatureRun | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.run is None:
            self.run = resolve(self.args)
        (split,), (shard,) = batch["split"], batch["shard"]
        with tqdm(disable=True) as progress_bar:
            write_some_shards(self.run, [(str(split), int(shard))], progress_bar)
        return batch


def split_rows(rows: range, size: int) -> list[range]:
    """Cut a range of rows into batches."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def count_rows(batches: Iterable[FeatureBatch], progress_bar: tqdm, num_processes: int) -> Iterator[FeatureBatch]:
    """Yield the batches, and advance the progress bar as if all processes were as fast as this one."""
    for batch in batches:
        progress_bar.update(len(batch.lengths) * num_processes)
        yield batch


def finish(run: FeatureRun, run_folder: RunFolder) -> None:
    """Write the index, which completes the feature store."""
    for split, keys in run.image_keys.items():
        np.save(run.layouts[split].keys_path, keys)
    num_skipped = finish_store(run.folder, run.vision, run.dataset, run.layouts)
    run_folder.finish(rows=run.num_rows, skipped=num_skipped)
    logger.info("The features of %s rows are in %s.", f"{run.num_rows - num_skipped:,}", run.folder)
    if num_skipped:
        logger.info(
            "%s rows have no features; %s lists them with the reasons.", f"{num_skipped:,}", run.folder / SKIPPED_NAME
        )
