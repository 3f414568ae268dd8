"""Start of a captioning run: the captioner, the processes, and what captions its batches, this process or Ray."""

import argparse
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from transformers.utils.logging import disable_progress_bar

from ..common.ray_workers import map_with_ray
from ..evaluation.captioning_run import start_processes
from ..hub.load import load_captioner
from .arguments import generation_of
from .items import Item
from .loader import ImageLoader
from .outputs import Output, OutputRow
from .run import Captioning, Processes, caption_items

THREADS_OF_A_WORKER = 2  # that open images, in a worker of Ray


def start_captioning(options: argparse.Namespace) -> tuple[Captioning, Processes]:
    """Start the processes, and load the captioner to the device of this process.

    Raises:
        InputError: if the captioner cannot be loaded.
    """
    processes = Processes(start_processes(use_cpu=False))
    disable_progress_bar()
    model = load_captioner(options.model, options.revision, options.dtype, processes.state.device)
    captioning = Captioning(
        model, options.prompt, options.score, options.prefix, options.suffix, options.seed, generation_of(options)
    )
    return captioning, processes


def caption_with(
    options: argparse.Namespace,
    outputs: list[Output],
    items: Iterator[Item] | None,
    write: Callable[[list[OutputRow]], None],
    captioning: Captioning,
    processes: Processes,
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
    keep_content = any(output.keeps_content for output in outputs)
    if options.engine == "ray":
        caption_with_ray(options, keep_content, items or iter(()), write)
    else:
        loader = loader_for(captioning, keep_content, options.num_workers)
        caption_items(items, captioning, loader, processes, options.batch_size, write)
    processes.end()


def loader_for(captioning: Captioning, keep_content: bool, num_workers: int) -> ImageLoader:
    """Return what opens images for a captioner."""
    model = captioning.model
    assert model.processor is not None, "load_captioner checks it"
    image_processor = model.processor.image_processor if model.config.has_vision_model else None
    return ImageLoader(image_processor, keep_content, num_workers)


def caption_with_ray(
    options: argparse.Namespace,
    keep_content: bool,
    items: Iterator[Item],
    write: Callable[[list[OutputRow]], None],
) -> None:
    """Caption batches by workers of Ray, and write them in order.

    Args:
        options: the options.
        keep_content: also return the files of images as they were.
        items: the items.
        write: function that writes a batch.
    """
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
