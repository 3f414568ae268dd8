"""Augmentation of training rows: random crops and flips of images, and random choice of captions, prompts and views."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from PIL import Image, ImageOps

from ..common.errors import InputError
from .images import Picture

MAX_ASPECT_RATIO = 4 / 3  # of a random crop; the smallest is its inverse
CROP_ATTEMPTS = 10


class RowText(TypedDict):
    """Text of a training row: its captions, and its prompt if it has its own or prompts are drawn at random."""

    captions: list[str]
    prompt: NotRequired[str]


@dataclass
class Augmentation:
    """Random changes to a training row, drawn again each time the row is read.

    Every draw depends only on the seed, the epoch and the row. It does not depend on the number of processes and
    workers, and an interrupted run resumes with the same draws.

    Args:
        random_resized_crop_scale (`float`, *optional*): lower bound of the share of an image's area that a random crop
            keeps, as in the `scale` of torchvision's `RandomResizedCrop`. By default images are not cropped.
        horizontal_flip_prob (`float`, defaults to 0.0): probability that an image is mirrored left to right.
        captions_per_image (`int`, *optional*): number of captions of an image to draw. By default all are used.
        prompts (`Sequence[str]`): prompts from which one is drawn for each row without its own. By default, such rows
            have the prompt of the processor.
        sample_view (`bool`, defaults to `False`): whether to draw one of the views of precomputed features. By default
            view 0 is used, which is the whole image.
        seed (`int`, defaults to 0): random seed of all draws.

    Example:

    ```python
    >>> augmentation = Augmentation(random_resized_crop_scale=0.5, captions_per_image=1)
    >>> generator = augmentation.generator(epoch=0, row=3)
    >>> augmentation.augment_image(Image.new("RGB", (100, 80)), generator).size
    (64, 72)
    >>> augmentation.draw_text(["a dog", "a brown dog"], generator)
    {'captions': ['a brown dog']}
    ```
    """

    random_resized_crop_scale: float | None = None
    horizontal_flip_prob: float = 0.0
    captions_per_image: int | None = None
    prompts: Sequence[str] = ()
    sample_view: bool = False
    seed: int = 0

    def generator(self, epoch: int, row: int) -> torch.Generator:
        """Return the random generator of one row in one epoch."""
        # The hash of a tuple of integers is the same in every process. `numpy.random.SeedSequence` would be the usual
        # choice, but it draws other numbers, so all published results would have to be measured again.
        return torch.Generator().manual_seed(hash((self.seed, epoch, row)) % 2**63)

    def augment(self, picture: Picture, generator: torch.Generator) -> Picture:
        """Augment an image, or all frames of a video in the same way."""
        if isinstance(picture, Image.Image):
            return self.augment_image(picture, generator)
        state = generator.get_state()
        return [self.augment_image(frame, generator.set_state(state)) for frame in picture]

    def augment_image(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Crop an image at random, and mirror it with the probability `horizontal_flip_prob`."""
        if self.random_resized_crop_scale is not None:
            image = random_crop(image, self.random_resized_crop_scale, generator)
        if self.horizontal_flip_prob and torch.rand((), generator=generator) < self.horizontal_flip_prob:
            image = ImageOps.mirror(image)
        return image

    def draw_view(self, num_views: int, generator: torch.Generator) -> int:
        """Return the index of the view to train on, out of `num_views` precomputed views."""
        if not self.sample_view or num_views == 1:
            return 0
        return int(torch.randint(num_views, (), generator=generator))

    def draw_text(self, captions: list[str], generator: torch.Generator, prompt: str = "") -> RowText:
        """Return the `"captions"` to train on, and the `"prompt"` of the row or one of several prompts.

        Args:
            captions: the captions of the row.
            generator: source of the random numbers.
            prompt: the row's own prompt. If it is empty, one of `prompts` is drawn.
        """
        if self.captions_per_image is not None:
            drawn = torch.randperm(len(captions), generator=generator)[: self.captions_per_image]
            captions = [captions[number] for number in drawn]
        if prompt:
            return {"captions": captions, "prompt": prompt}
        if not self.prompts:
            return {"captions": captions}
        prompt = self.prompts[int(torch.randint(len(self.prompts), (), generator=generator))]
        return {"captions": captions, "prompt": prompt}


def random_crop(image: Image.Image, min_scale: float, generator: torch.Generator) -> Image.Image:
    """Crop a random part of an image: "random resized crop" without the resizing (Szegedy et al. 2014).

    The part keeps a share of the area between `min_scale` and 1, and its aspect ratio is between 3:4 and 4:3. The whole
    image is returned if no such part fits into it.

    Args:
        image: the image.
        min_scale: smallest share of the area to keep, above 0 and at most 1.
        generator: source of the random numbers.
    """
    width, height = image.size
    for _ in range(CROP_ATTEMPTS):
        u_area, u_ratio, u_x, u_y = torch.rand(4, generator=generator).tolist()
        area = width * height * (min_scale + (1 - min_scale) * u_area)
        ratio = math.exp((2 * u_ratio - 1) * math.log(MAX_ASPECT_RATIO))  # uniform in log space
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = round(u_x * (width - crop_width)), round(u_y * (height - crop_height))
            return image.crop((left, top, left + crop_width, top + crop_height))
    return image


def check_image_augmentation(random_resized_crop_scale: float | None, horizontal_flip_prob: float) -> None:
    """Check the two options that change images.

    Raises:
        InputError: if the scale is not above 0 and at most 1, or the probability is not between 0 and 1.
    """
    if random_resized_crop_scale is not None and not 0 < random_resized_crop_scale <= 1:
        raise InputError(
            "--random_resized_crop_scale is a share of an image's area, above 0 and at most 1, not "
            f"{random_resized_crop_scale:g}."
        )
    if not 0 <= horizontal_flip_prob <= 1:
        raise InputError(f"--horizontal_flip_prob is a probability between 0 and 1, not {horizontal_flip_prob:g}.")
