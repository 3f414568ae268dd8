"""Vectors of the images and texts of an evaluation set, computed once and kept on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ..common.errors import InputError, one_line
from ..evaluation.benchmarks import EvaluationSet
from ..evaluation.caption_files import ImageId
from ..evaluation.inference import ImageLoader
from .blocks import Block, BlockFolder, compute_blocks, key_of
from .model import RetrievalModel, batches_by_length

TEXTS_PER_BLOCK = 2048


@dataclass
class Corpus:
    """Images of an evaluation set that can be read, and their texts, as a model compares them.

    Args:
        images: ids of the N images.
        image_vectors: vectors of the images, `[N, Q, E]`.
        texts: the M texts, in the order of their images.
        text_vectors: vectors of the texts, `[M, E]`.
        image_of_text: place of the image of each text, int64 `[M]`.
        unreadable: the reason for each image that cannot be read. Its texts are left out, too.
    """

    images: list[ImageId]
    image_vectors: torch.Tensor
    texts: list[str]
    text_vectors: torch.Tensor
    image_of_text: torch.Tensor
    unreadable: dict[ImageId, str]


def encode_corpus(
    model: RetrievalModel, evaluation_set: EvaluationSet, folder: Path, batch_size: int = 32, num_workers: int = 0
) -> Corpus:
    """Encode the images and texts of an evaluation set, in all processes of the run.

    Finished batches are kept in the folder. After a kill, the same call continues with the others.

    Args:
        model: the model.
        evaluation_set: the images and their texts.
        folder: folder for finished batches, on a disk that all processes share.
        batch_size: number of images in a batch.
        num_workers: number of processes that open images in advance, for each process that encodes.

    Raises:
        InputError: if no image can be read; the message names the first.
    """
    images = list(evaluation_set.row_of)
    vectors: list[torch.Tensor] = []
    unreadable: dict[ImageId, str] = {}
    for block in _image_blocks(model, evaluation_set, folder / "images", batch_size, num_workers):
        vectors += block.tensors.values()
        unreadable |= {images[place]: reason for place, reason in block.notes}
    if len(unreadable) == len(images):
        raise InputError(f"No image can be read; the first of {len(images)}: {unreadable[images[0]]}")
    images = [image for image in images if image not in unreadable]
    captions = evaluation_set.references.captions
    texts = [text for image in images for text in captions[image]]
    places = [place for place, image in enumerate(images) for _ in captions[image]]
    blocks = _text_blocks(model, texts, folder / "texts", batch_size)
    text_vectors = torch.cat([block.tensors["vectors"] for block in blocks])
    return Corpus(images, torch.cat(vectors), texts, text_vectors, torch.tensor(places), unreadable)


def _image_blocks(
    model: RetrievalModel, evaluation_set: EvaluationSet, folder: Path, batch_size: int, num_workers: int
) -> Iterator[Block]:
    """Yield the vectors of each batch of images, with the places and reasons of those that cannot be read."""
    images = list(evaluation_set.row_of)
    fingerprints = evaluation_set.fingerprints()
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    keys = [key_of([[images[place], fingerprints[images[place]]] for place in batch]) for batch in batches]

    def compute(numbers: list[int]) -> Iterator[Block]:
        loader = DataLoader(
            ImageLoader(evaluation_set, images),
            batch_sampler=[list(batches[number]) for number in numbers],
            num_workers=num_workers,
            collate_fn=list,
        )
        for number, batch in zip(numbers, loader, strict=True):
            opened = [content for _, content in batch if not isinstance(content, OSError)]
            errors = [
                [place, one_line(content)]
                for place, (_, content) in zip(batches[number], batch, strict=True)
                if isinstance(content, OSError)
            ]
            yield Block({"vectors": model.encode_images(opened).vectors.cpu()} if opened else {}, errors)

    return compute_blocks(BlockFolder(folder), keys, list(map(len, batches)), compute, "images")


def _text_blocks(model: RetrievalModel, texts: Sequence[str], folder: Path, batch_size: int) -> Iterator[Block]:
    """Yield the vectors of some thousands of texts at once."""
    groups = [texts[start : start + TEXTS_PER_BLOCK] for start in range(0, len(texts), TEXTS_PER_BLOCK)]

    def compute(numbers: list[int]) -> Iterator[Block]:
        for number in numbers:
            yield Block({"vectors": encode_texts(model, groups[number], batch_size).cpu()})

    keys = [key_of(list(group)) for group in groups]
    return compute_blocks(BlockFolder(folder), keys, list(map(len, groups)), compute, "texts")


def encode_texts(model: RetrievalModel, texts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
    """Return the vectors of M texts, `[M, E]`, computed in batches of texts of similar length.

    Args:
        model: the model.
        texts: the texts.
        batch_size: number of texts in a batch.
    """
    lengths = torch.tensor(model.count_tokens(texts))
    batches = batches_by_length(lengths, torch.zeros_like(lengths), batch_size)
    vectors = torch.cat([model.encode_texts([texts[place] for place in batch.tolist()]) for batch in batches])
    return vectors[torch.argsort(torch.cat(batches)).to(vectors.device)]


def similarity_of(image_vectors: torch.Tensor, text_vectors: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the similarity of each image and each text, float32 `[N, M]` on the CPU, from -1 to 1.

    It is the cosine of the text and the nearest query output of the image (arXiv 2301.12597, section 3.2).

    Args:
        image_vectors: vectors of length 1, `[N, Q, E]`.
        text_vectors: vectors of length 1, `[M, E]`.
        device: device to compute on.
    """
    texts = text_vectors.to(device).float()
    rows = image_vectors.split(max(1, 2**24 // max(1, len(texts) * image_vectors.shape[1])))
    parts = [(part.to(device).float() @ texts.t()).amax(dim=1).cpu() for part in rows]
    return torch.cat(parts) if parts else torch.zeros(0, len(texts))
