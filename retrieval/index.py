"""Index of the images of a folder, which finds the images that a text describes."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..common.devices import device_of
from ..common.errors import InputError, one_line
from ..common.files import write_atomically
from ..common.logging import get_logger
from ..data.feature_shards import remove_unfinished
from ..data.names import IMAGE_SUFFIXES
from ..evaluation.captioning_run import versions_of_weights
from ..images_qformer import open_image
from .blocks import Block, BlockFolder, key_of
from .encoding import encode_texts, similarity_of
from .model import RetrievalModel, load_stage1

logger = get_logger(__name__)

INDEX_NAME = "index.json"
Stamp = tuple[int, int]  # size of a file, and the time of its last change in nanoseconds


class Found(NamedTuple):
    """Image that was found for a text.

    Attributes:
        path: the file, relative to the folder of the index.
        score: similarity from -1 to 1, or the probability of matching from 0 to 1.
    """

    path: str
    score: float


@dataclass(frozen=True)
class Entry:
    """File of an index.

    Args:
        stamp: size and time of the file when it was encoded.
        vectors: vectors of the image, float16 `[Q, E]`; `None` for a file that could not be read.
        reason: why it could not be read.
    """

    stamp: Stamp
    vectors: torch.Tensor | None
    reason: str = ""


class ImageIndex:
    """Vectors of all images in a folder and below it, kept on disk. [`open_index`] makes one, and shows its use.

    Files are encoded in batches, and each batch is written in one piece, so that a killed call continues. A file that
    has changed is encoded again, and a file that was deleted is forgotten. An index of other weights is replaced.

    Args:
        images: folder of the images.
        model: the model.
        weights: version of the model's weights in each folder or Hub repository, as [`versions_of_weights`] returns it.
        folder: folder of the index. By default, it is in the cache folder of Hugging Face.

    Raises:
        InputError: if the folder of images does not exist, or the folder of the index holds something else.
    """

    def __init__(
        self,
        images: str | os.PathLike,
        model: RetrievalModel,
        weights: dict[str, Any],
        folder: str | os.PathLike | None = None,
    ):
        self.images, self.model = Path(images), model
        if not self.images.is_dir():
            raise InputError(f"There is no folder {os.fspath(images)!r}: give the folder of the images.")
        self.folder = default_folder(self.images, weights) if folder is None else Path(folder)
        if self.folder.exists() and not (self.folder / INDEX_NAME).is_file() and any(self.folder.iterdir()):
            raise InputError(f"The folder {str(self.folder)!r} is not empty and holds no index: name another --index.")
        self.key = key_of(weights)
        self.entries: dict[str, Entry] = {}
        self._blocks = BlockFolder(self.folder)
        record = {"images": str(self.images.resolve()), "weights": weights}
        write_atomically(self.folder / INDEX_NAME, json.dumps(record, indent=2) + "\n")

    @property
    def paths(self) -> list[str]:
        """Names of the images that can be found, relative to the folder."""
        return [path for path, entry in self.entries.items() if entry.vectors is not None]

    @property
    def unreadable(self) -> dict[str, str]:
        """The reason for each file that cannot be read."""
        return {path: entry.reason for path, entry in self.entries.items() if entry.vectors is None}

    def refresh(self, batch_size: int = 32, num_workers: int = 0) -> int:
        """Bring the index up to date with the folder.

        Args:
            batch_size: number of images in a batch.
            num_workers: number of processes that open images in advance.

        Returns:
            The number of files that were encoded.

        Raises:
            InputError: if there are no images, or none can be read.
        """
        stamps = stamps_of(self.images)
        if not stamps:
            raise InputError(f"There are no images in {str(self.images)!r}: name a folder of JPEG or PNG files.")
        known = self._read(stamps)
        missing = [path for path in stamps if path not in known]
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        files = _Files(self.images, missing)
        loader = DataLoader(files, batch_size, num_workers=num_workers, collate_fn=list)
        number = max([-1, *self._numbers()]) + 1
        with tqdm(total=len(stamps), initial=len(known), desc="images", disable=not missing or None) as progress:
            for paths, opened in zip(batches, loader, strict=True):
                block = self._encode(paths, opened, stamps)
                self._blocks.write(number, self.key, block)
                known |= _entries(block)
                progress.update(len(paths))
                number += 1
        self.entries = {path: known[path] for path in stamps}
        if not self.paths:
            first, reason = next(iter(self.unreadable.items()))
            raise InputError(f"None of the {len(stamps)} images can be read; the first is {first!r}: {reason}")
        return len(missing)

    def search(self, texts: Sequence[str], top_k: int = 12, rerank_top_k: int = 0) -> list[list[Found]]:
        """Return the images that fit each text best, the best first.

        Args:
            texts: the texts.
            top_k: number of images for each text.
            rerank_top_k: number of first images that matching ranks again; their scores are probabilities of matching.

        Raises:
            InputError: if a text is empty, or longer than the model reads.
        """
        self._check_texts(texts)
        paths = self.paths
        vectors = torch.stack([each.vectors for each in self.entries.values() if each.vectors is not None])
        similarity = similarity_of(vectors, encode_texts(self.model, texts), self.model.device)  # [I, texts]
        scores, places = similarity.topk(min(max(top_k, rerank_top_k), len(paths)), dim=0)
        results = []
        for text, own_scores, own_places in zip(texts, scores.t().tolist(), places.t().tolist(), strict=True):
            found = [Found(paths[place], score) for place, score in zip(own_places, own_scores, strict=True)]
            results.append((self._match(text, found[:rerank_top_k]) if rerank_top_k else found)[:top_k])
        return results

    def open(self, path: str) -> Image.Image:
        """Open an image of the index.

        Raises:
            OSError: if it cannot be read; the message names it.
        """
        return open_image(self.images / path)

    def _match(self, text: str, found: list[Found], batch_size: int = 32) -> list[Found]:
        """Return images in the order of their probability of matching a text."""
        results = []
        for start in range(0, len(found), batch_size):
            opened = {}
            for path, _ in found[start : start + batch_size]:
                try:
                    opened[path] = self.open(path)
                except OSError as error:
                    logger.warning("%r is left out: %s", path, one_line(error))
            if opened:
                features = self.model.image_features(list(opened.values()))
                logits = self.model.match(*features, torch.arange(len(opened)), [text] * len(opened))
                probabilities = logits.float().softmax(dim=1)[:, 1].tolist()
                results += [Found(path, score) for path, score in zip(opened, probabilities, strict=True)]
        return sorted(results, key=lambda each: -each.score)

    def _check_texts(self, texts: Sequence[str]) -> None:
        """Refuse texts that the model cannot read as a whole."""
        for text, length in zip(texts, self.model.count_tokens(texts) if texts else (), strict=True):
            if not text.strip():
                raise InputError("A text is empty: say what the images should show.")
            if length > self.model.max_length:
                raise InputError(
                    f"The text {one_line(text, 60)!r} has {length} tokens, and the model reads at most "
                    f"{self.model.max_length}: shorten it."
                )

    def _numbers(self) -> list[int]:
        """Return the numbers of the blocks on disk."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors") if path.stem.isdecimal())

    def _read(self, stamps: dict[str, Stamp]) -> dict[str, Entry]:
        """Return the entries of the files that have not changed, and delete blocks that hold no others."""
        remove_unfinished(self.folder)
        known: dict[str, Entry] = {}
        for number in self._numbers():
            block = self._blocks.read(number, self.key)
            entries = {} if block is None else _entries(block)
            entries = {path: entry for path, entry in entries.items() if stamps.get(path) == entry.stamp}
            if not entries:  # damaged, of other weights, or of files that have changed
                self._blocks.path(number).unlink()
            known |= entries
        return known

    def _encode(self, paths: Sequence[str], opened: Sequence[Image.Image | OSError], stamps: dict[str, Stamp]) -> Block:
        """Return the block of a batch of files: vectors of the images, and names, stamps and errors of all files."""
        images = [each for each in opened if not isinstance(each, OSError)]
        errors = [one_line(each) if isinstance(each, OSError) else "" for each in opened]
        notes = [[path, *stamps[path], error] for path, error in zip(paths, errors, strict=True)]
        tensors = {"vectors": self.model.encode_images(images).vectors.half().cpu()} if images else {}
        return Block(tensors, notes)


def open_index(
    images: str | os.PathLike,
    model: str | os.PathLike,
    revision: str | None = None,
    folder: str | os.PathLike | None = None,
) -> ImageIndex:
    """Return the index of a folder of images, with its model on the accelerator, or on the CPU without one.

    Args:
        images: folder of the images.
        model: model of stage 1 (Hub id or folder).
        revision: branch, tag or commit of the model.
        folder: folder of the index. By default, it is in the cache folder of Hugging Face.

    Raises:
        InputError: if the model cannot be loaded or has no vision encoder. Also if the folder of images does not exist,
            or the folder of the index holds something else.

    Example:

    ```python
    >>> index = open_index("photos", "outputs/stage1")  # doctest: +SKIP
    >>> index.refresh()  # doctest: +SKIP
    1200
    >>> index.search(["a dog in snow"], top_k=1)  # doctest: +SKIP
    [[Found(path='2024/dog.jpg', score=0.41)]]
    ```
    """
    name = os.fspath(model)
    stage1 = load_stage1(name, revision)
    if not stage1.config.has_vision_model:
        raise InputError(f"The model {name!r} was trained on features and has no vision encoder for images.")
    stage1 = stage1.to(device_of())  # type: ignore[arg-type]  # the stub asks for a model
    retrieval_model = RetrievalModel(stage1, stage1.qformer.config.max_position_embeddings)
    return ImageIndex(images, retrieval_model, versions_of_weights(stage1, name, revision), folder)


def _entries(block: Block) -> dict[str, Entry]:
    """Return the entries of the files of a block."""
    vectors: Iterator[torch.Tensor] = iter(block.tensors.get("vectors", ()))
    return {
        path: Entry((size, time), None if reason else next(vectors), reason) for path, size, time, reason in block.notes
    }


class _Files(Dataset):
    """Images of files, opened by the data loader workers. For an unreadable file, the error is returned."""

    def __init__(self, folder: Path, paths: Sequence[str]):
        self.folder, self.paths = folder, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image | OSError:
        try:
            return open_image(self.folder / self.paths[index])
        except OSError as error:
            return error


def stamps_of(folder: Path) -> dict[str, Stamp]:
    """Return size and time of each image file in a folder and below it, by its path relative to the folder, sorted."""
    stamps = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            status = path.stat()
            stamps[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return stamps


def default_folder(images: Path, weights: dict[str, Any]) -> Path:
    """Return the folder of an index in the cache folder of Hugging Face, one for each folder of images and model."""
    return Path(HF_HOME) / "qformer-captioner" / "search" / key_of(str(images.resolve()), list(weights))[:32]
