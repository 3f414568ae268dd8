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
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor

from ..backbones_qformer import load_backbone, loading_error
from ..common.errors import UNUSABLE, InputError
from ..common.onednn import onednn_linears
from ..encoders_qformer import image_feature_size, vision_config_of
from ..vision_qformer import encode_images
from .augmentation import Augmentation
from .feature_shards import FeatureBatch, SplitLayout
from .image_paths import ImageFolder
from .images import ImageCell, file_of_image, open_image_cell
from .skip_limit import SkipLimit, sample_of, try_images
from .skipped_rows import SkippedRow, skipped_row


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
        pixel_shape (`torch.Size`): `[3, H, W]` of a prepared image.
        shape (`tuple[int, int]`): `(N, Dv)` of the features of an image.

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
        pixel_values = image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
        features = self(pixel_values)
        if features.ndim != 3:
            raise InputError(
                f"The features of an image from {name_or_path!r} have the shape {list(features.shape[1:])}: a Q-Former "
                "reads [N, D]."
            )
        self.pixel_shape = pixel_values.shape[1:]
        self.shape = (features.shape[1], features.shape[2])

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute features: `[B, 3, H, W]` -> `[B, N, Dv]`."""
        with onednn_linears(self.device):
            return encode_images(self.model, pixel_values.to(self.device, non_blocking=True)).last_hidden_state


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
        """Mean number of features of an image."""
        return self.encoder.shape[0]

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
            InputError: if the image processor returns images of several sizes, or a feature does not fit the dtype.
        """
        images = ImageViews(
            self.rows[split],
            self.image_column,
            self.image_folders[split],
            split,
            layout.views,
            self.augmentation,
            self.image_processor,
            self.encoder.pixel_shape,
        )
        loader = DataLoader(
            images,
            batch_sampler=map(list, row_batches),
            num_workers=self.num_workers,
            collate_fn=collate_views,
            pin_memory=self.encoder.device.type == "cuda",
        )
        for rows, prepared in zip(row_batches, loader, strict=True):
            if prepared.error is not None:
                raise prepared.error
            values, lengths = torch.zeros(0, self.shape[1]), np.zeros((0, layout.views), np.int64)
            if prepared.pixel_values is not None:
                chunks = prepared.pixel_values.split(self.batch_size)
                features = torch.cat([self.encoder(chunk) for chunk in chunks])
                values = features.flatten(0, 1)
                lengths = np.full((len(features) // layout.views, layout.views), features.shape[1])
            yield FeatureBatch.from_tensor(values, lengths, rows, prepared.skipped, layout)


class ImageViews(Dataset):
    """Prepared views of the images of a split, `[views, 3, H, W]` for each row.

    View 0 is the whole image. For an image that cannot be read, its entry in the record of skipped rows is returned. An
    `InputError` is returned instead of raised, because an error raised in a worker shows the worker's traceback to the
    user.

    Args:
        rows: undecoded images.
        image_column: the column that holds them.
        image_folder: where paths of images start, and where they may lead.
        split: name of the split.
        views: number of views of each image.
        augmentation: random changes that create the additional views of an image.
        image_processor: the image processor.
        pixel_shape: shape `[3, H, W]` that all prepared images must have.
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
        pixel_shape: torch.Size,
    ):
        self.rows = rows
        self.image_column = image_column
        self.image_folder = image_folder
        self.split = split
        self.views = views
        self.augmentation = augmentation
        self.image_processor = image_processor
        self.pixel_shape = pixel_shape

    def __getitem__(self, row: int) -> torch.Tensor | SkippedRow | InputError:
        cell = self.rows[row][self.image_column]
        try:
            image = open_image_cell(cell, self.image_folder)
        except OSError as error:
            return self._skipped(row, cell, error)
        crops = [random_view(image, row, view, self.augmentation) for view in range(1, self.views)]
        try:
            pixel_values = self.image_processor([image, *crops], return_tensors="pt")["pixel_values"]
        except ValueError as error:  # an image that the processor cannot prepare, for example because of its shape
            return self._skipped(row, cell, error)
        if pixel_values.shape[1:] != self.pixel_shape:
            return InputError(
                f"The image processor prepares row {row} of {self.split!r} as {list(pixel_values.shape[1:])} and other "
                f"images as {list(self.pixel_shape)}: precomputed features need images of one size."
            )
        return pixel_values

    def _skipped(self, row: int, cell: ImageCell | None, error: Exception) -> SkippedRow:
        return skipped_row(self.split, row, file_of_image(cell), error)


def random_view(image: Image.Image, row: int, view: int, augmentation: Augmentation) -> Image.Image:
    """Return a random view of an image, which depends only on the seed, the row and the view."""
    seed = np.random.SeedSequence([augmentation.seed, row, view]).generate_state(1, np.uint64).item()
    return augmentation.augment_image(image, torch.Generator().manual_seed(seed))


class PreparedBatch(NamedTuple):
    """Prepared images of a batch of rows.

    Attributes:
        pixel_values: `[rows x views, 3, H, W]` of the readable rows; `None` if no row is readable.
        skipped: entries of the other rows.
        error: error that ends the run.
    """

    pixel_values: torch.Tensor | None
    skipped: list[SkippedRow]
    error: InputError | None


def collate_views(rows: list[torch.Tensor | SkippedRow | InputError]) -> PreparedBatch:
    """Collate the rows of [`ImageViews`]."""
    tensors = [row for row in rows if isinstance(row, torch.Tensor)]
    skipped = [row for row in rows if isinstance(row, dict)]
    error = next((row for row in rows if isinstance(row, InputError)), None)
    return PreparedBatch(torch.cat(tensors) if tensors else None, skipped, error)


def load_image_processor(name_or_path: str, revision: str | None) -> BaseImageProcessor:
    """Load the image processor of a vision encoder. No code from the Hub is executed.

    Raises:
        OSError: if the image processor cannot be loaded.
    """
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
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
