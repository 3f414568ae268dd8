"""Captioning of an evaluation set by several processes, which can continue after a kill."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..captioning_qformer import QFormerCaptioningModel
from ..common.errors import InputError, one_line
from ..common.files import read_json_lines
from ..common.onednn import onednn_linears
from ..data.features import FeatureRef, read_features
from ..data.images import Picture
from .benchmarks import EvaluationSet
from .caption_files import ImageId


def caption_images(
    model: QFormerCaptioningModel,
    evaluation_set: EvaluationSet,
    folder: str | os.PathLike,
    prompt: str = "",
    batch_size: int = 32,
    num_workers: int = 0,
    **generation: Any,
) -> tuple[dict[ImageId, str], dict[ImageId, str]]:
    """Caption every image of an evaluation set.

    The processes of a distributed run share the batches, and each process writes its own file of captions to `folder`.
    After a kill, the same call captions only the images that have no caption yet or have changed since. The number of
    processes may differ between calls. It does not change the batches, so it does not change the captions.

    Args:
        model: the captioner, on the device where it should run.
        evaluation_set: the images and their ids.
        folder: folder for the finished captions (`progress-*.jsonl`), on a disk that all processes share.
        prompt: text that captions of images without their own prompt continue; an empty prompt is the captioner's own.
        batch_size: number of images in a batch.
        num_workers: number of processes that open images in advance, for each process that captions.
        generation: arguments of the captioner's `generate`.

    Returns:
        The caption of each image that can be read, and the reason for each image that cannot. Both are in order and the
        same in every process.

    Raises:
        InputError: if no image can be read; the message names the first.

    Example:

    ```python
    >>> from qformer_captioner import QFormerCaptioner
    >>> from qformer_captioner.evaluation.benchmarks import load_benchmark
    >>> model = QFormerCaptioner.from_pretrained("outputs/my_captioner")  # doctest: +SKIP
    >>> benchmark = load_benchmark("flickr30k_karpathy_test")  # doctest: +SKIP
    >>> captions, unreadable = caption_images(model, benchmark, "outputs/flickr30k", num_beams=5)  # doctest: +SKIP
    ```
    """
    state = PartialState()
    images = list(evaluation_set.row_of)
    fingerprints = evaluation_set.fingerprints()
    finished = _read_progress(Path(folder), fingerprints)
    # All processes must read the same existing captions, so no process may write before all have read.
    state.wait_for_everyone()
    batches = _unfinished_batches(images, finished, batch_size)[state.process_index :: state.num_processes]
    loader = DataLoader(
        ImageLoader(evaluation_set, images), batch_sampler=batches, num_workers=num_workers, collate_fn=list
    )
    new_captions: dict[ImageId, str] = {}
    unreadable: dict[ImageId, str] = {}
    progress = tqdm(total=len(images), initial=len(finished), desc="captions", disable=not state.is_main_process)
    with progress, (Path(folder) / f"progress-{state.process_index}.jsonl").open("a") as file:
        file.write("\n")  # ends a line that a killed run may have cut off
        for batch in loader:
            opened = {image: content for image, content in batch if not isinstance(content, OSError)}
            unreadable |= {image: one_line(content) for image, content in batch if isinstance(content, OSError)}
            if opened:
                with onednn_linears(model.device):
                    prompts = [evaluation_set.prompts.get(image, prompt) for image in opened]
                    texts = caption_batch(model, list(opened.values()), prompts, **generation)
                batch_captions = dict(zip(opened, texts, strict=True))
                _write_progress(file, batch_captions, fingerprints)
                new_captions |= batch_captions
            progress.update(len(batch) * state.num_processes)
    for captions_of_process, unreadable_of_process in gather_object([(new_captions, unreadable)]):
        finished |= captions_of_process
        unreadable |= unreadable_of_process
    captions = {image: finished[image] for image in images if image in finished}
    if images and not captions:
        raise InputError(f"No image can be read; the first of {len(images)}: {unreadable[images[0]]}")
    return captions, {image: unreadable[image] for image in images if image in unreadable}


def caption_batch(
    model: QFormerCaptioningModel, inputs: Sequence[Picture | FeatureRef], prompts: list[str], **generation: Any
) -> list[str]:
    """Return the captions of images or videos, or of precomputed features.

    Args:
        model: the captioner.
        inputs: images or videos, or references to features.
        prompts: prompt of each; an empty prompt is the captioner's own.
        generation: arguments of the captioner's `generate`.
    """
    images = [each for each in inputs if not isinstance(each, FeatureRef)]
    if images:
        return list(model.caption(images, prompts, **generation))
    features = read_features([each for each in inputs if isinstance(each, FeatureRef)])
    return list(model.caption(prompt=prompts, **features._asdict(), **generation))


class ImageLoader(Dataset):
    """Images, or features, with their ids, opened by the data loader workers.

    For an unreadable image, the error is returned.
    """

    def __init__(self, evaluation_set: EvaluationSet, images: list[ImageId]):
        self.evaluation_set, self.images = evaluation_set, images

    def __getitem__(self, index: int) -> tuple[ImageId, Picture | FeatureRef | OSError]:
        image = self.images[index]
        try:
            return image, self.evaluation_set.read(image)
        except OSError as error:
            return image, error


def _unfinished_batches(images: list[ImageId], finished: dict[ImageId, str], batch_size: int) -> list[list[int]]:
    """Return the batches, as indices into `images`, that contain an image without a caption."""
    indices = list(range(len(images)))
    batches = [indices[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return [batch for batch in batches if not all(images[index] in finished for index in batch)]


def _write_progress(file: TextIO, captions: dict[ImageId, str], fingerprints: dict[ImageId, str]) -> None:
    """Append a line for each caption: image id, fingerprint of the image, caption."""
    rows = ([image, fingerprints[image], caption] for image, caption in captions.items())
    file.write("".join(json.dumps(row) + "\n" for row in rows))
    file.flush()


def _read_progress(folder: Path, fingerprints: dict[ImageId, str]) -> dict[ImageId, str]:
    """Return the captions of earlier calls for images that have not changed. Incomplete lines are ignored."""

    def captions() -> Iterator[tuple[ImageId, str]]:
        for path in sorted(folder.glob("progress-*.jsonl")):
            for row in read_json_lines(path):
                match row:
                    case [int() | str() as image, str(fingerprint), str(caption)] if (
                        fingerprints.get(image) == fingerprint
                    ):
                        yield image, caption

    return dict(captions())
