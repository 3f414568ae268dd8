"""Image features and captions for benchmarks/bridges.py, and batches of them.

The features are computed once, so that all bridges train on the same ones.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qformer_captioner import QFormerCaptioner
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource, ShuffledImages
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.splits import load_splits


@dataclass
class CaptionedFeatures:
    """Features of images from a frozen vision encoder, and the captions of these images.

    Args:
        features (`[R, views, N, Dv]`, float16): features of each image, from several random crops or from the whole.
        captions: captions of each image, as text.
        token_ids: tokens of each of these captions, end-of-sequence included.
    """

    features: torch.Tensor
    captions: list[list[str]]
    token_ids: list[list[list[int]]]

    def __len__(self) -> int:
        return len(self.captions)


@dataclass
class Batch:
    """Batch of image features and labels, which are padded with -100.

    Args:
        image_embeds (`[B, N, Dv]`, float32): features of one view of each image.
        labels (`[B, T]`): one caption of each image.
        all_labels (`[B, K, T']`): all captions of each image.
    """

    image_embeds: torch.Tensor
    labels: torch.Tensor
    all_labels: torch.Tensor


def pad_labels(token_ids: list[list[list[int]]]) -> torch.Tensor:
    """Return labels `[B, K, T]` for the captions of several images, padded with -100."""
    longest = max(len(caption) for captions in token_ids for caption in captions)
    labels = torch.full((len(token_ids), max(map(len, token_ids)), longest), -100)
    for image, captions in enumerate(token_ids):
        for number, caption in enumerate(captions):
            labels[image, number, : len(caption)] = torch.tensor(caption)
    return labels


def draw_batches(data: CaptionedFeatures, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Yield batches that depend only on the seed, so that every bridge trains on the same batches in the same order.

    Each epoch draws one view and one caption of each image. The captions of a batch have similar lengths.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw_below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def caption_length(example: tuple[int, int, int]) -> int:
        row, _, caption = example
        return len(data.token_ids[row][caption])

    step = 0
    while step < steps:
        order = torch.randperm(len(data), generator=generator).tolist()
        views = data.features.shape[1]
        examples = [(row, draw_below(views), draw_below(len(data.token_ids[row]))) for row in order]
        pools = [examples[start : start + 8 * batch_size] for start in range(0, len(examples), 8 * batch_size)]
        examples = [example for pool in pools for example in sorted(pool, key=caption_length)]
        starts = range(0, len(examples) - batch_size + 1, batch_size)
        for position in torch.randperm(len(starts), generator=generator).tolist():
            yield _make_batch(data, examples[starts[position] : starts[position] + batch_size])
            step += 1
            if step == steps:
                return


def _make_batch(data: CaptionedFeatures, examples: list[tuple[int, int, int]]) -> Batch:
    """Return the batch of examples, which are numbers of a row, a view and a caption."""
    rows, views, _ = zip(*examples, strict=True)
    return Batch(
        image_embeds=data.features[list(rows), list(views)].float(),
        labels=pad_labels([[data.token_ids[row][caption]] for row, _, caption in examples])[:, 0],
        all_labels=pad_labels([data.token_ids[row] for row in rows]),
    )


def load_data(
    model: QFormerCaptioner,
    dataset_name: str,
    image_column: str,
    caption_column: str,
    views: int,
    cache: str | os.PathLike,
    random_resized_crop_scale: float = 0.4,
    horizontal_flip_prob: float = 0.5,
) -> tuple[CaptionedFeatures, CaptionedFeatures]:
    """Load the training images, in several random crops, and the evaluation images, which are not augmented.

    Args:
        model: captioner whose vision encoder computes the features.
        dataset_name: folder or Hub id of captioned images.
        image_column: name of the column of images.
        caption_column: name of the column of captions.
        views: number of random crops of each training image.
        cache: file for the features. It is written again when anything changes that they depend on.
        random_resized_crop_scale: smallest share of the image that a crop covers.
        horizontal_flip_prob: probability that a crop is mirrored.
    """
    train_rows, eval_rows = load_splits(dataset_name)
    augmentation = Augmentation(random_resized_crop_scale, horizontal_flip_prob)
    train_source = CaptionSource("train", train_rows, image_column, caption_column)
    train = CaptionDataset(train_source, SkippedRows(), augmentation).drop_unreadable()
    eval_source = CaptionSource("evaluation", eval_rows, image_column, caption_column)
    evaluation = CaptionDataset(eval_source, SkippedRows()).drop_unreadable()
    vision = model.vision_model
    key = [dataset_name, vision.config.name_or_path, str(vision.dtype), views]
    key += [random_resized_crop_scale, horizontal_flip_prob, train.references(), evaluation.references()]

    features = torch.load(cache, mmap=True) if Path(cache).is_file() else {"key": None}
    if features["key"] != key:
        features = {"key": key, **compute_both(model, train, evaluation, views)}
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        torch.save(features, f"{cache}.part")
        os.replace(f"{cache}.part", cache)  # a killed run leaves no incomplete cache

    def with_captions(features: torch.Tensor, captions: list[list[str]]) -> CaptionedFeatures:
        encode = model.processor.encode_caption
        token_ids = [[encode(caption, max_length=64) for caption in image_captions] for image_captions in captions]
        return CaptionedFeatures(features, captions, token_ids)

    return (
        with_captions(features["train"], train.references()),
        with_captions(features["dev"], evaluation.references()),
    )


def compute_both(
    model: QFormerCaptioner, train: CaptionDataset, evaluation: CaptionDataset, views: int
) -> dict[str, Any]:
    """Return the features of both splits under the names of the cache: `train`, with several views, and `dev`."""
    crops = []
    for view in range(views):
        train.set_epoch(view)  # every epoch has other random crops
        crops.append(compute_features(model, train))
    return {"train": torch.stack(crops, dim=1), "dev": compute_features(model, evaluation)[:, None]}


@torch.no_grad()
def compute_features(model: QFormerCaptioner, dataset: CaptionDataset, batch_size: int = 16) -> torch.Tensor:
    """Return the features `[R, N, Dv]` of all images of a data set, in float16."""
    features = []
    for start in tqdm(range(0, len(dataset), batch_size), "features", leave=False):
        images = [dataset[row]["image"] for row in range(start, min(start + batch_size, len(dataset)))]
        pixel_values = model.processor(images=images)["pixel_values"]
        features.append(model.encode_images(pixel_values).last_hidden_state.half())
    return torch.cat(features)


def shuffled_rows(data: CaptionedFeatures) -> list[int]:
    """Return for each row another row, whose image it gets when images are shuffled."""
    image_of = ShuffledImages(data).image_of
    return [image_of[row] for row in range(len(data))]
