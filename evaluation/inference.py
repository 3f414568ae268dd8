"""Captions for a whole benchmark: shared by the processes of one run, written down batch by batch, gone on with."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..common.errors import InputError
from ..common.onednn import onednn_linears
from ..modeling_qformer import QFormerCaptioner
from .benchmarks import EvaluationSet
from .caption_files import ImageId


class _Images(Dataset):
    """Opens images in the loader's processes. One that cannot be read comes as its error, and the others still come."""

    def __init__(self, found: EvaluationSet, ids: list[ImageId]):
        self.found, self.ids = found, ids

    def __getitem__(self, place: int) -> tuple[ImageId, Image.Image | OSError]:
        image = self.ids[place]
        try:
            return image, self.found.open(image)
        except OSError as error:
            return image, error


def caption_images(
    model: QFormerCaptioner,
    found: EvaluationSet,
    folder: str | os.PathLike,
    prompt: str = "",
    batch_size: int = 32,
    num_workers: int = 0,
    **generation,
) -> dict[ImageId, str]:
    """Caption every image of an evaluation set.

    The processes of a distributed run share the batches. Each writes what it has to a file of its own in `folder`; when
    the same call is made again after a kill, by as many processes or others, only what is missing is captioned, and
    images that have changed since. The batches are the same whoever works on them, so the captions are too.

    Args:
        model: the captioner, on the device where it should run.
        found: images and their ids.
        folder: for the files of progress (`progress-*.jsonl`), on a disk that all processes see.
        prompt: text that the captions follow; nothing is the captioner's own.
        batch_size: images at a time.
        num_workers: processes that open images ahead, for each process that captions.
        generation: options of the captioner's `generate`.

    Returns:
        The caption of each image, in order, in every process.

    Raises:
        InputError: if images cannot be read, once all others are captioned; the message names the first.
    """
    state = PartialState()
    ids = list(found.row_of)
    fingerprints = found.fingerprints()
    done = _progress(Path(folder), fingerprints)
    state.wait_for_everyone()  # or a slow process would take for done what a fast one has just begun with
    batches = [list(range(start, min(start + batch_size, len(ids)))) for start in range(0, len(ids), batch_size)]
    batches = [batch for batch in batches if not all(ids[place] in done for place in batch)]
    mine = batches[state.process_index :: state.num_processes]
    loader = DataLoader(_Images(found, ids), batch_sampler=mine, num_workers=num_workers, collate_fn=list)
    unreadable: list[tuple[ImageId, str]] = []
    new: dict[ImageId, str] = {}
    progress = tqdm(total=len(ids), initial=len(done), desc="captions", disable=not state.is_main_process)
    with (Path(folder) / f"progress-{state.process_index}.jsonl").open("a") as file:
        file.write("\n")  # behind a line that a kill may have cut off
        for batch in loader:
            readable = [(image, opened) for image, opened in batch if isinstance(opened, Image.Image)]
            unreadable += [(image, str(error)) for image, error in batch if isinstance(error, OSError)]
            if readable:
                with onednn_linears(model.device):
                    captions = model.caption([opened for _, opened in readable], prompt, **generation)
                captions = dict(zip((image for image, _ in readable), captions, strict=True))
                new.update(captions)
                rows = ([image, fingerprints[image], caption] for image, caption in captions.items())
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
            progress.update(len(batch) * state.num_processes)
    progress.close()
    for each in gather_object([new]):
        done.update(each)
    if unreadable := gather_object(unreadable):
        raise InputError(
            f"{unreadable[0][1]} ({len(unreadable)} images cannot be read.) Mend the files and give the same command "
            "again: the captions of all others are kept."
        )
    return {image: done[image] for image in ids}


def _progress(folder: Path, fingerprints: dict[ImageId, str]) -> dict[ImageId, str]:
    """What earlier calls wrote down of the images as they are now; a line that a kill cut off counts as not there."""

    def rows() -> Iterator[tuple[ImageId, str]]:
        for path in sorted(folder.glob("progress-*.jsonl")):
            for line in path.read_text(errors="replace").split("\n"):
                try:
                    image, fingerprint, caption = json.loads(line)
                except (ValueError, TypeError, RecursionError):
                    continue
                known = isinstance(image, ImageId) and fingerprints.get(image) == fingerprint
                if known and isinstance(caption, str):
                    yield image, caption

    return dict(rows())
