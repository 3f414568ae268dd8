"""What benchmarks/bridges.py trains and evaluates on: features of images, computed once, and batches of them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from qformer_captioner import QFormerCaptioner
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource, ShuffledImages
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.splits import load_splits


@dataclass
class Captioned:
    """Images as a frozen vision encoder sees them, and their captions.

    Args:
        features (`[R, views, N, Dv]`, float16): of each image, in several random crops or once as a whole.
        captions: of each image, as text.
        ids: the same as token ids, end-of-sequence included.
    """

    features: torch.Tensor
    captions: list[list[str]]
    ids: list[list[list[int]]]

    def __len__(self) -> int:
        return len(self.captions)


@dataclass
class Batch:
    """Images `[B, N, Dv]`, one caption drawn for each `[B, T]`, and all of its captions `[B, K, T']`."""

    images: torch.Tensor
    labels: torch.Tensor
    all_labels: torch.Tensor


def pad(captions: list[list[list[int]]]) -> torch.Tensor:
    """Captions of several images to labels `[B, K, T]`, padded with -100."""
    shape = len(captions), max(map(len, captions)), max(len(ids) for own in captions for ids in own)
    labels = torch.full(shape, -100)
    for b, own in enumerate(captions):
        for k, ids in enumerate(own):
            labels[b, k, : len(ids)] = torch.tensor(ids)
    return labels


def batches(data: Captioned, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Batches that depend on the seed alone, so that every bridge sees the same ones in the same order.

    Each epoch draws a view and a caption of each image. Captions that meet in a batch are of similar length.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    step = 0
    while step < steps:
        order = torch.randperm(len(data), generator=generator).tolist()
        drawn = [(row, draw(data.features.shape[1]), draw(len(data.ids[row]))) for row in order]
        pools = [drawn[start : start + 8 * batch_size] for start in range(0, len(drawn), 8 * batch_size)]
        drawn = [each for pool in pools for each in sorted(pool, key=lambda each: len(data.ids[each[0]][each[2]]))]
        starts = range(0, len(drawn) - batch_size + 1, batch_size)
        for start in (starts[each] for each in torch.randperm(len(starts), generator=generator)):
            rows, views, captions = zip(*drawn[start : start + batch_size], strict=True)
            yield Batch(
                data.features[list(rows), list(views)].float(),
                pad([[data.ids[row][caption]] for row, caption in zip(rows, captions, strict=True)])[:, 0],
                pad([data.ids[row] for row in rows]),
            )
            step += 1
            if step == steps:
                return


def load_data(
    model: QFormerCaptioner,
    dataset_name: str,
    image_column: str,
    caption_column: str,
    views: int,
    cache: str | os.PathLike,
    random_resized_crop_scale: float = 0.4,
    horizontal_flip_prob: float = 0.5,
) -> tuple[Captioned, Captioned]:
    """The training images in several random crops, half of them mirrored, and the evaluation images as they are.

    Features are kept in the file `cache` and computed anew when anything that they depend on is another.
    """
    train_rows, eval_rows = load_splits(dataset_name)
    augmentation = Augmentation(random_resized_crop_scale, horizontal_flip_prob)
    train_source = CaptionSource("train", train_rows, image_column, caption_column)
    train = CaptionDataset(train_source, SkippedRows(), augmentation).drop_unreadable()
    dev_source = CaptionSource("evaluation", eval_rows, image_column, caption_column)
    dev = CaptionDataset(dev_source, SkippedRows()).drop_unreadable()
    vision = model.vision_model
    key = [
        dataset_name,
        vision.config.name_or_path,
        str(vision.dtype),
        views,
        random_resized_crop_scale,
        horizontal_flip_prob,
    ]
    key += [train.references(), dev.references()]
    kept = torch.load(cache, mmap=True) if Path(cache).is_file() else {"key": None}
    if kept["key"] != key:
        crops = []
        for view in range(views):
            train.set_epoch(view)  # each shows other crops
            crops.append(compute_features(model, train))
        train_features = torch.stack(crops, dim=1)
        kept = {"key": key, "train": train_features, "dev": compute_features(model, dev)[:, None]}
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, f"{cache}.part")
        os.replace(f"{cache}.part", cache)

    def captioned(features: torch.Tensor, captions: list[list[str]]) -> Captioned:
        encode = model.processor.encode_caption
        return Captioned(features, captions, [[encode(text, max_length=64) for text in own] for own in captions])

    return captioned(kept["train"], train.references()), captioned(kept["dev"], dev.references())


@torch.no_grad()
def compute_features(model: QFormerCaptioner, rows: CaptionDataset, batch_size: int = 16) -> torch.Tensor:
    """What the vision encoder makes of each image: `[R, N, Dv]`, float16."""
    features = []
    for start in tqdm(range(0, len(rows), batch_size), "features", leave=False):
        images = [rows[row]["image"] for row in range(start, min(start + batch_size, len(rows)))]
        features.append(model.get_image_features(model.processor(images=images)["pixel_values"]).half())
    return torch.cat(features)


def other_images(data: Captioned) -> list[int]:
    """For each row another one, whose image it gets when images are shuffled."""
    image_of = ShuffledImages(data).image_of
    return [image_of[row] for row in range(len(data))]
