"""Matching logits of the candidate pairs of a corpus, computed in blocks that are kept on disk."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ..common.errors import InputError
from ..evaluation.benchmarks import EvaluationSet
from ..evaluation.inference import ImageLoader
from .blocks import Block, BlockFolder, compute_blocks, key_of
from .encoding import Corpus
from .model import EncodedImages, RetrievalModel, batches_by_length

PAIRS_PER_BLOCK = 4096


def match_pairs(
    model: RetrievalModel,
    corpus: Corpus,
    pairs: torch.Tensor,
    evaluation_set: EvaluationSet,
    folder: Path,
    batch_size: int = 256,
    num_workers: int = 0,
) -> torch.Tensor:
    """Return the matching logits of pairs, float32 `[N, M, 2]`, NaN for all other pairs.

    The pairs are sorted by image. Each image is opened and encoded again, once for all of its pairs. This costs a small
    part of the matching, and the features of a large corpus would fill gigabytes.

    Args:
        model: the model.
        corpus: images and texts.
        pairs: places of image and text of each pair, int64 `[P, 2]`, sorted by image.
        evaluation_set: the images.
        folder: folder for finished blocks, on a disk that all processes share.
        batch_size: number of pairs in a batch.
        num_workers: number of processes that open images in advance, for each process that matches.

    Raises:
        InputError: if an image can no longer be read.
    """
    fingerprints = evaluation_set.fingerprints()
    blocks = _whole_images(pairs)
    lengths = torch.tensor(model.count_tokens(corpus.texts)).clamp(max=model.max_length)
    keys = []
    for block in blocks:
        images = [corpus.images[place] for place in block[:, 0].unique().tolist()]
        texts = [corpus.texts[place] for place in block[:, 1].unique().tolist()]
        keys.append(key_of(block, [[image, fingerprints[image]] for image in images], texts, batch_size))

    def compute(numbers: list[int]) -> Iterator[Block]:
        images = [blocks[number][:, 0].unique().tolist() for number in numbers]
        loader = DataLoader(
            ImageLoader(evaluation_set, corpus.images),
            batch_sampler=images,
            num_workers=num_workers,
            collate_fn=list,
        )
        for number, batch in zip(numbers, loader, strict=True):
            for _, content in batch:
                if isinstance(content, OSError):
                    raise InputError(f"An image can no longer be read: {content}")
            encoded = model.encode_images([content for _, content in batch])
            yield Block({"logits": _match_block(model, encoded, blocks[number], corpus, lengths, batch_size)})

    finished = compute_blocks(BlockFolder(folder), keys, list(map(len, blocks)), compute, "pairs")
    logits = torch.full((len(corpus.images), len(corpus.texts), 2), torch.nan)
    for block, result in zip(blocks, finished, strict=True):
        logits[block[:, 0], block[:, 1]] = result.tensors["logits"]
    return logits


def _match_block(
    model: RetrievalModel,
    encoded: EncodedImages,
    pairs: torch.Tensor,  # [P, 2]
    corpus: Corpus,
    lengths: torch.Tensor,  # [M], tokens of each text
    batch_size: int,
) -> torch.Tensor:
    """Return the logits `[P, 2]` of the pairs of some images, matched in batches of few images and similar lengths."""
    _, image_of_pair = pairs[:, 0].unique(return_inverse=True)
    logits = torch.empty(len(pairs), 2)
    for batch in batches_by_length(lengths[pairs[:, 1]], image_of_pair, batch_size):
        images, image_of_text = image_of_pair[batch].unique(return_inverse=True)
        index = images.to(encoded.features.device)
        part = EncodedImages(
            encoded.vectors[index], encoded.features[index], None if encoded.mask is None else encoded.mask[index]
        )
        texts = [corpus.texts[place] for place in pairs[batch, 1].tolist()]
        logits[batch] = model.match(part.features, part.mask, image_of_text, texts).float().cpu()
    return logits


def _whole_images(pairs: torch.Tensor) -> list[torch.Tensor]:
    """Split sorted pairs `[P, 2]` into blocks that hold all pairs of their images, about `PAIRS_PER_BLOCK` of each."""
    _, counts = pairs[:, 0].unique_consecutive(return_counts=True)
    sizes = [0]
    for count in counts.tolist():
        if sizes[-1] and sizes[-1] + count > PAIRS_PER_BLOCK:
            sizes.append(0)
        sizes[-1] += count
    return list(pairs.split(sizes))
