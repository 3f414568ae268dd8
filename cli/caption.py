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
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..captioning.arguments import parse_options, settings_of
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
    from ..captioning.sources import Source

# torch and the model take seconds to import, so only the functions that use them import them.

logger = get_logger(__name__)


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
        from ..captioning.start import caption_with, start_captioning

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
    from ..captioning.start import caption_with, start_captioning
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


def main() -> None:
    # `generate` raises ValueError for options that contradict each other.
    run_command(caption, expected=(ValueError, OSError))


if __name__ == "__main__":
    main()
