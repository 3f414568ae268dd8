r"""Caption images, or features of a captioner that was trained on features.

    qformer-captioner caption dog.jpg cat.jpg --model outputs/scenes
    qformer-captioner caption photos "more/**/*.png" --model USER/CAPTIONER --prompt "a photo of" --num_beams 5 \
        --output captions.jsonl
    qformer-captioner caption photos --model outputs/scenes --sidecar .txt --existing skip
    find photos -name "*.jpg" | qformer-captioner caption - --model outputs/scenes --output captions.csv
    qformer-captioner caption "shards/*.tar" --model outputs/scenes --output captions.parquet
    torchrun --nproc_per_node 8 -m qformer_captioner.cli.caption photos --model outputs/scenes --output captions.jsonl
    qformer-captioner caption photos --model outputs/scenes --output captions.jsonl --engine ray --num_workers 4
    qformer-captioner caption "proteins/*.npy" --model outputs/proteins

IMAGE is a file, a folder (all images in it and below it), a pattern, a URL, a tar of webdataset, or a parquet file. A
file of numpy (.npy) holds features `[N, D]`, of which N may differ. Without --output or --sidecar, each caption is
printed as a line `file: caption`. With them, captions are written batch by batch, and after any kill the same command
continues. For an image that cannot be read, an error is printed, and the other images are captioned.
"""

import argparse
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..captioning.arguments import generation_of, parse_options, settings_of
from ..captioning.outputs import Output, OutputRow, output_for
from ..captioning.progress import SUFFIX, Progress
from ..captioning.reporting import Reporter
from ..captioning.sidecars import Sidecars
from ..captioning.writer import Writer
from ..common.command import run_command
from ..common.errors import InputError
from ..common.logging import get_logger, is_main_process
from ..common.machine_faults import explain_faults

if TYPE_CHECKING:
    from ..captioning.items import Item
    from ..captioning.loader import ImageLoader
    from ..captioning.run import Captioning, Processes
    from ..captioning.sources import Source

# torch and the model take seconds to import, so only the functions that use them import them.

logger = get_logger(__name__)

THREADS_OF_A_WORKER = 2  # that open images, in a worker of Ray


def open_source(options: argparse.Namespace) -> "Source":
    """Return the images that a command line names.

    Raises:
        InputError: if a data set or a list of files cannot be read, or an input is the output.
    """
    from ..captioning.sources import ChainSource, NamesSource, RowsSource, Source, names_in, without_output

    column, output = options.image_column, options.output
    sources: list[Source] = []
    names = list(without_output((name for name in options.images if name != "-"), output))
    if names:
        sources.append(NamesSource(names, image_column=column))
    for file in ["-" for name in options.images if name == "-"] + [options.filelist] * (options.filelist is not None):
        total = None
        if os.path.isfile(file):  # a pipe can be read only once
            total = sum(1 for _ in without_output(names_in(*without_output([file], output)), output))
        sources.append(NamesSource(without_output(names_in(file), output), total, column))
    if options.dataset_name is not None:
        check_data_set(options)
        rows = RowsSource(
            options.dataset_name,
            options.dataset_config_name,
            options.dataset_revision,
            options.split,
            column,
            options.image_id_column,
            options.image_folder,
            options.allowed_image_folders,
            options.streaming,
        )
        sources.append(rows)
    return ChainSource(sources)


def check_data_set(options: argparse.Namespace) -> None:
    """Check that the output is not a file of the data set, and not in its folder.

    Raises:
        InputError: if it is, because the next run would read it as data.
    """
    from ..captioning.sources import without_output
    from ..data.row_files import find_files

    if options.output is None:
        return
    folder = Path(options.dataset_name)
    if folder.is_dir() and Path(options.output).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"The output {options.output!r} is inside the data set: choose an --output outside of it.")
    for _ in without_output(find_files(options.dataset_name), options.output):
        pass


def first_item(items: "Iterator[Item]", options: argparse.Namespace) -> "tuple[Item, Iterator[Item]]":
    """Return the first item, and an iterator of all items.

    Raises:
        InputError: if the source is empty.
    """
    first = next(items, None)
    if first is None:
        names = [*options.images, options.filelist, options.dataset_name]
        shown = " or ".join(repr(name[-100:]) for name in names if name)
        raise InputError(f"There are no images in {shown}.")
    return first, chain([first], items)


def open_outputs(options: argparse.Namespace) -> list[Output]:
    """Return the outputs that a command line names, the sidecars last."""
    outputs: list[Output] = []
    if options.output is not None:
        scores = ("score", "matching_score") if options.score else ()
        outputs.append(output_for(options.output, (options.num_return_sequences or 1) > 1, scores))
    if options.sidecar is not None:
        outputs.append(Sidecars(options.sidecar, options.existing, options.separator))
    return outputs


def open_progress(options: argparse.Namespace, first: "Item") -> Progress | None:
    """Open and lock the record of the run, or return `None` if captions are only printed.

    For sidecars alone it is a hidden file in the first folder that the command line names, or that of the first image.

    Raises:
        InputError: if another process uses it, or there is an output without a record.
    """
    if options.output is not None:
        record = Path(f"{options.output}{SUFFIX}")
        if Path(options.output).exists() and not record.exists() and not options.overwrite_output:
            raise InputError(
                f"{options.output!r} exists, and has no record {record.name!r} to continue it: choose another "
                "--output, or replace it with --overwrite_output."
            )
        return Progress(record, options.output)
    if options.sidecar is not None:
        folder = next((name for name in options.images if os.path.isdir(name)), os.path.dirname(first.path or ""))
        return Progress(Path(folder, f".captions{options.sidecar}{SUFFIX}"), None)
    return None


def start_captioning(options: argparse.Namespace) -> "tuple[Captioning, Processes]":
    """Start the processes, and load the captioner to the device of this process.

    Raises:
        InputError: if the captioner cannot be loaded.
    """
    from transformers.utils.logging import disable_progress_bar

    from ..captioning.run import Captioning, Processes
    from ..evaluation.captioning_run import start_processes
    from ..hub.load import load_captioner

    processes = Processes(start_processes(use_cpu=False))
    disable_progress_bar()
    model = load_captioner(options.model, options.revision, options.dtype, processes.state.device)
    captioning = Captioning(
        model, options.prompt, options.score, options.prefix, options.suffix, options.seed, generation_of(options)
    )
    return captioning, processes


def caption(words: Sequence[str]) -> None:
    """Caption the images that a command line names.

    Args:
        words: the command line.

    Raises:
        InputError: if an option, the captioner or an image cannot be used. For an image, the other captions are written
            first.
        ValueError: if options of `generate` contradict each other.
    """
    options = parse_options(words, __doc__ or "")
    outputs = open_outputs(options)
    if not is_main_process():
        caption_with(options, outputs, None, lambda rows: None, *start_captioning(options))
        return
    source = open_source(options)
    first, items = first_item(iter(source), options)
    progress = open_progress(options, first)
    writer = Writer(outputs, progress)
    folder = Path(options.output or first.path or first.key).absolute().parent
    try:
        with explain_faults(folder, "Finished captions are kept, and the same command continues."):
            caption_source(options, source, items, writer)
    finally:
        writer.close()


def caption_source(options: argparse.Namespace, source: "Source", items: "Iterator[Item]", writer: Writer) -> None:
    """Caption the images of a source in the main process.

    Args:
        options: the options.
        source: the images.
        items: its items.
        writer: the outputs with their record.

    Raises:
        InputError: if the output is of another run, or images have no caption.
    """
    from ..captioning.run import Wanted
    from ..evaluation.captioning_run import versions_of_weights

    captioning, processes = start_captioning(options)
    settings = {
        **settings_of(options),
        "weights": versions_of_weights(captioning.model, options.model, options.revision),
    }
    writer.begin(settings, options.overwrite_output)
    wanted = Wanted(items, writer)
    with Reporter(source, wanted, not writer.outputs, writer.num_captioned, writer.num_failed) as reporter:

        def write(rows: list[OutputRow]) -> None:
            writer.write(rows)
            reporter.tell(rows)

        caption_with(options, writer.outputs, iter(wanted), write, captioning, processes)
    writer.finish()
    num_captioned = reporter.num_captioned - wanted.num_lost
    if writer.outputs:
        left_out = "".join(f", {number:,} {kind} left out" for kind, number in source.left_out.items())
        logger.info(
            "%s images have captions%s%s.",
            f"{num_captioned:,}",
            f", {wanted.num_skipped:,} had them before" if wanted.num_skipped else "",
            left_out,
        )
    if reporter.num_failed:
        total = num_captioned + reporter.num_failed + wanted.num_skipped
        raise InputError(f"{reporter.num_failed} of {total} images have no caption.")


def caption_with(
    options: argparse.Namespace,
    outputs: list[Output],
    items: "Iterator[Item] | None",
    write: "Callable[[list[OutputRow]], None]",
    captioning: "Captioning",
    processes: "Processes",
) -> None:
    """Caption the batches of this process, and end the group of processes.

    Args:
        options: the options.
        outputs: the outputs, which say what is kept of an image.
        items: the items, in the main process; `None` in the others.
        write: function that writes a batch, in the main process.
        captioning: what makes captions.
        processes: this process and the others.
    """
    from ..captioning.run import caption_items

    keep_content = any(output.keeps_content for output in outputs)
    if options.engine == "ray":
        caption_with_ray(options, keep_content, items or iter(()), write)
    else:
        loader = loader_for(captioning, keep_content, options.num_workers)
        caption_items(items, captioning, loader, processes, options.batch_size, write)
    processes.end()


def loader_for(captioning: "Captioning", keep_content: bool, num_workers: int) -> "ImageLoader":
    """Return what opens images for a captioner."""
    from ..captioning.loader import ImageLoader

    model = captioning.model
    assert model.processor is not None, "load_captioner checks it"
    image_processor = model.processor.image_processor if model.config.has_vision_model else None
    return ImageLoader(image_processor, keep_content, num_workers)


def caption_with_ray(
    options: argparse.Namespace,
    keep_content: bool,
    items: "Iterator[Item]",
    write: "Callable[[list[OutputRow]], None]",
) -> None:
    """Caption batches by workers of Ray, and write them in order.

    Args:
        options: the options.
        keep_content: also return the files of images as they were.
        items: the items.
        write: function that writes a batch.
    """
    from ..common.ray_workers import map_with_ray

    batches = iter(lambda: list(islice(items, options.batch_size)), [])
    rows = ({"items": pickle.dumps(batch)} for batch in batches)
    worker = BatchWorker(options, keep_content)
    for row in map_with_ray(rows, worker, options.num_workers, options.gpus_per_worker, batch_size=1):
        write(pickle.loads(row["rows"]))


class BatchWorker:
    """Function for a worker of Ray, from a pickled batch of items to its pickled captions.

    Args:
        options: the options of the command.
        keep_content: also return the files of images as they were.
    """

    def __init__(self, options: argparse.Namespace, keep_content: bool):
        self.options, self.keep_content = options, keep_content
        self.parts: tuple[Captioning, ImageLoader] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        if self.parts is None:
            captioning, _ = start_captioning(self.options)
            self.parts = captioning, loader_for(captioning, self.keep_content, num_workers=THREADS_OF_A_WORKER)
        captioning, loader = self.parts
        rows = [loading.result() for loading in loader.submit(pickle.loads(batch["items"][0]))]
        return {"rows": [pickle.dumps(captioning.caption(rows))]}


def main() -> None:
    # `generate` raises ValueError for options that contradict each other.
    run_command(caption, expected=(ValueError, OSError))


if __name__ == "__main__":
    main()
