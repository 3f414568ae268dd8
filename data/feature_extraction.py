"""Computation of image features with a vision encoder."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, BaseImageProcessor

from ..backbones_qformer import load_backbone, loading_error
from ..common.errors import UNUSABLE, InputError
from ..common.onednn import onednn_linears
from ..encoders_qformer import image_feature_size, vision_config_of
from ..inputs_qformer import load_image_processor, prepare_images
from ..vision_qformer import encode_images
from .augmentation import Augmentation
from .feature_shards import FeatureBatch, SplitLayout
from .features import PaddedFeatures
from .image_paths import ImageFolder
from .images import ImageCell, file_of_image, open_image_cell
from .skip_limit import SkipLimit, sample_of, try_images
from .skipped_rows import SkippedRow, skipped_row

PHOTOGRAPH, SQUARE = (640, 480), (224, 224)  # sizes of images that show whether the number of features depends on it


class VisionEncoder:
    """Frozen vision encoder that computes the same features as [`QFormerCaptioner.encode_images`].

    Args:
        name_or_path: Hub id or folder of the vision encoder.
        revision: branch, tag or commit on the Hub.
        image_processor: its image processor.
        device: device to run on.
        compute_dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on GPUs that support it, else float32.

    Attributes:
        compute_dtype (`str`): the dtype of the forward pass.
        shape (`tuple[int | None, int]`): `(N, Dv)` of the features of an image. N is `None` if it depends on the size
            of the image.
        photograph_length (`int`): number of features of a photograph in landscape format.

    Raises:
        OSError: if the model cannot be loaded.
        InputError: if the features of an image are not `[N, Dv]`. A model that does not accept images raises one of the
            errors in `UNUSABLE`.
    """

    def __init__(
        self,
        name_or_path: str,
        revision: str | None,
        image_processor: BaseImageProcessor,
        device: torch.device,
        compute_dtype: str = "auto",
    ):
        if compute_dtype == "auto":
            supports_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            compute_dtype = "bfloat16" if supports_bfloat16 else "float32"
        self.compute_dtype = compute_dtype
        self.device = device
        model = load_backbone("vision_model", name_or_path, revision, getattr(torch, compute_dtype))
        self.model = model.eval().to(device)
        images = [prepare_image(Image.new("RGB", size), image_processor) for size in (PHOTOGRAPH, SQUARE)]
        features = [self(image) for image in images]
        if features[0].image_embeds.ndim != 3:
            raise InputError(
                f"The features of an image from {name_or_path!r} have the shape "
                f"{list(features[0].image_embeds.shape[1:])}: a Q-Former reads [N, D]."
            )
        lengths = [lengths_of(each).item() for each in features]
        self.photograph_length = lengths[0]
        self.shape = (lengths[0] if len(set(lengths)) == 1 else None, features[0].image_embeds.shape[2])

    @torch.inference_mode()
    def __call__(self, inputs: dict[str, torch.Tensor]) -> PaddedFeatures:
        """Compute the features of images.

        Args:
            inputs: `pixel_values` (`[B, 3, H, W]`) and those of `ENCODER_INPUTS` that belong to them.
        """
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        with onednn_linears(self.device):
            outputs = encode_images(self.model, **inputs)
        return PaddedFeatures(outputs.last_hidden_state, outputs.attention_mask)


def lengths_of(features: PaddedFeatures) -> np.ndarray:
    """Return the number of features of each row, int64 `[B]`."""
    if features.image_attention_mask is None:
        return np.full(features.image_embeds.shape[0], features.image_embeds.shape[1], np.int64)
    return features.image_attention_mask.sum(dim=1).cpu().numpy()


@dataclass(frozen=True)
class ImageFeatures:
    """Source of features that a vision encoder computes from a column of images.

    Args:
        encoder: the vision encoder.
        image_processor: its image processor.
        rows: undecoded images of each split, as [`undecoded_images`] returns them.
        image_column: the column that holds them.
        image_folders: for each split, where paths of images start, and where they may lead.
        augmentation: random changes that create the additional views of an image.
        batch_size: maximum number of images in a forward pass.
        num_workers: number of processes that open images.
    """

    encoder: VisionEncoder
    image_processor: BaseImageProcessor
    rows: dict[str, datasets.Dataset]
    image_column: str
    image_folders: dict[str, ImageFolder | None]
    augmentation: Augmentation
    batch_size: int
    num_workers: int

    @property
    def shape(self) -> tuple[int | None, int]:
        """Shape `(N, Dv)` of the features of an image."""
        return self.encoder.shape

    @property
    def mean_length(self) -> float:
        """Number of features of a photograph, as an estimate of the mean."""
        return self.encoder.photograph_length

    @property
    def compute_dtype(self) -> str | None:
        """Dtype of the forward pass."""
        return self.encoder.compute_dtype

    def check_images(self, limit: SkipLimit) -> None:
        """Open the images of a sample of each split.

        Raises:
            InputError: if the images of too many rows cannot be read.
        """
        for split, rows in self.rows.items():
            sample = sample_of(range(len(rows)))
            outcomes = try_images(sample, functools.partial(self._open_image, split))
            limit.check(split, len(rows), len(sample), [error for _, error in outcomes if error is not None])

    def _open_image(self, split: str, row: int) -> Image.Image:
        return open_image_cell(self.rows[split][row][self.image_column], self.image_folders[split])

    def batches(self, split: str, layout: SplitLayout, row_batches: Sequence[range]) -> Iterator[FeatureBatch]:
        """Yield the features of each batch of rows.

        Args:
            split: name of the split.
            layout: its layout.
            row_batches: numbers of the rows in each batch.

        Raises:
            InputError: if an image has more features than others and the layout does not allow it, or a feature does
                not fit the dtype.
        """
        images = ImageViews(
            self.rows[split],
            self.image_column,
            self.image_folders[split],
            split,
            layout.views,
            self.augmentation,
            self.image_processor,
        )
        loader = DataLoader(
            images,
            batch_sampler=map(list, row_batches),
            num_workers=self.num_workers,
            collate_fn=collate_views,
            pin_memory=self.encoder.device.type == "cuda",
        )
        for rows, prepared in zip(row_batches, loader, strict=True):
            values, lengths = self._encode(prepared)
            yield FeatureBatch.from_tensor(values, lengths.reshape(-1, layout.views), rows, prepared.skipped, layout)

    def _encode(self, prepared: "PreparedBatch") -> tuple[torch.Tensor, np.ndarray]:
        """Return the features `[F, Dv]` of all images of a batch, one after the other, and the number of each."""
        pieces: dict[int, torch.Tensor] = {}
        for group in prepared.groups:
            for start in range(0, len(group.places), self.batch_size):
                places = group.places[start : start + self.batch_size]
                inputs = {name: value[start : start + self.batch_size] for name, value in group.inputs.items()}
                embeds, mask = features = self.encoder(inputs)
                values = embeds.flatten(0, 1) if mask is None else embeds[mask]
                pieces |= zip(places, values.split(lengths_of(features).tolist()), strict=True)
        if not pieces:
            return torch.zeros(0, self.shape[1]), np.zeros(0, np.int64)
        ordered = [pieces[place] for place in range(len(pieces))]
        return torch.cat(ordered), np.array([len(piece) for piece in ordered])


class ImageViews(Dataset):
    """Prepared views of the images of a split: for each row a list with the encoder's inputs of each view.

    View 0 is the whole image. For an image that cannot be read, its entry in the record of skipped rows is returned.

    Args:
        rows: undecoded images.
        image_column: the column that holds them.
        image_folder: where paths of images start, and where they may lead.
        split: name of the split.
        views: number of views of each image.
        augmentation: random changes that create the additional views of an image.
        image_processor: the image processor.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        image_folder: ImageFolder | None,
        split: str,
        views: int,
        augmentation: Augmentation,
        image_processor: BaseImageProcessor,
    ):
        self.rows = rows
        self.image_column = image_column
        self.image_folder = image_folder
        self.split = split
        self.views = views
        self.augmentation = augmentation
        self.image_processor = image_processor

    def __getitem__(self, row: int) -> list[dict[str, torch.Tensor]] | SkippedRow:
        cell = self.rows[row][self.image_column]
        try:
            image = open_image_cell(cell, self.image_folder)
        except OSError as error:
            return self._skipped(row, cell, error)
        crops = [random_view(image, row, view, self.augmentation) for view in range(1, self.views)]
        try:
            return [prepare_image(view, self.image_processor) for view in (image, *crops)]
        except ValueError as error:  # an image that the processor cannot prepare, for example because of its shape
            return self._skipped(row, cell, error)

    def _skipped(self, row: int, cell: ImageCell | None, error: Exception) -> SkippedRow:
        return skipped_row(self.split, row, file_of_image(cell), error)


def random_view(image: Image.Image, row: int, view: int, augmentation: Augmentation) -> Image.Image:
    """Return a random view of an image, which depends only on the seed, the row and the view."""
    seed = np.random.SeedSequence([augmentation.seed, row, view]).generate_state(1, np.uint64).item()
    return augmentation.augment_image(image, torch.Generator().manual_seed(seed))


def prepare_image(image: Image.Image, image_processor: BaseImageProcessor) -> dict[str, torch.Tensor]:
    """Return the inputs of a vision encoder for one image: `pixel_values` (`[1, ...]`), and those of `ENCODER_INPUTS`.

    Raises:
        ValueError: if the image processor cannot prepare the image.
    """
    inputs = prepare_images(image_processor, [image], return_tensors="pt")
    return {name: torch.as_tensor(value) for name, value in inputs.items()}


class ImageGroup(NamedTuple):
    """Prepared images of one size, which are encoded together.

    Attributes:
        places: numbers of the images among all of their batch.
        inputs: inputs of the vision encoder, `[images, ...]` each.
    """

    places: list[int]
    inputs: dict[str, torch.Tensor]


class PreparedBatch(NamedTuple):
    """Prepared images of a batch of rows.

    Attributes:
        groups: the views of the readable rows, by size.
        skipped: entries of the other rows.
    """

    groups: list[ImageGroup]
    skipped: list[SkippedRow]


def collate_views(rows: list[list[dict[str, torch.Tensor]] | SkippedRow]) -> PreparedBatch:
    """Collate the rows of [`ImageViews`]. Most image processors give all images one size, and then one group."""
    images = [view for row in rows if isinstance(row, list) for view in row]
    by_size: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, image in enumerate(images):
        by_size.setdefault(tuple(value.shape for value in image.values()), []).append(place)
    groups = [
        ImageGroup(places, {name: torch.cat([images[place][name] for place in places]) for name in images[places[0]]})
        for places in by_size.values()
    ]
    return PreparedBatch(groups, [row for row in rows if isinstance(row, dict)])


def image_processor_of(name_or_path: str, revision: str | None) -> BaseImageProcessor:
    """Return the image processor of a vision encoder.

    Raises:
        OSError: if it cannot be loaded; the message names the vision encoder and the remedy.
    """
    try:
        return load_image_processor(name_or_path, revision)
    except (*UNUSABLE, OSError) as error:
        raise loading_error("vision_model", name_or_path, revision, error) from error


def feature_size_of(name_or_path: str, revision: str | None) -> int:
    """Return the width of the features of a vision encoder, from its configuration.

    Raises:
        OSError: if the configuration cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        return image_feature_size(vision_config_of(config))
    except (*UNUSABLE, OSError) as error:
        raise loading_error("vision_model", name_or_path, revision, error) from error
