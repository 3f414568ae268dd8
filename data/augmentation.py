"""TODO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from ..common.errors import InputError


def check_crop(random_resized_crop_scale: float | None) -> None:
    """See that it is a share.

    Raises:
        InputError: if not.
    """
    if random_resized_crop_scale is not None and not 0 < random_resized_crop_scale <= 1:
        raise InputError(
            f"--random_resized_crop_scale is a share of an image's area, from 0 to 1, not "
            f"{random_resized_crop_scale:g}."
        )


def check_horizontal_flip_prob(horizontal_flip_prob: float) -> None:
    """See that it is a probability.

    Raises:
        InputError: if not.
    """
    if not 0 <= horizontal_flip_prob <= 1:
        raise InputError(f"--horizontal_flip_prob is a probability, from 0 to 1, not {horizontal_flip_prob:g}.")


@dataclass
class Augmentation:
    """What training shows differently each time it comes to a row.

    All of it follows from the seed, the epoch and the row, and from nothing else: so it does not matter how many
    processes and workers load the data, nor where a killed run goes on.

    Args:
        random_resized_crop_scale: show random parts of the images, with at least this share of their area.
        horizontal_flip_prob: mirror an image, left to right, with this probability.
        captions_per_image: draw so many of an image's captions each time; by default give all.
        prompts: draw one of these.
        any_view: draw one of the views that precomputed features have; by default show the whole image.
        seed: of all that.
    """

    random_resized_crop_scale: float | None = None
    horizontal_flip_prob: float = 0.0
    captions_per_image: int | None = None
    prompts: Sequence[str] = ()
    any_view: bool = False
    seed: int = 0

    def random(self, epoch: int, row: int) -> torch.Generator:
        """The source of the random numbers of one row in one epoch."""
        # Of whole numbers `hash` is the same in every process, and the README's figures came from it.
        return torch.Generator().manual_seed(hash((self.seed, epoch, row)) % 2**63)

    def vary_image(self, image: Image.Image, random: torch.Generator) -> Image.Image:
        """A crop of an image, perhaps mirrored."""
        if self.random_resized_crop_scale is not None:
            image = random_resized_crop(image, self.random_resized_crop_scale, random)
        if self.horizontal_flip_prob and torch.rand((), generator=random) < self.horizontal_flip_prob:
            image = ImageOps.mirror(image)
        return image

    def vary_text(self, captions: list[str], random: torch.Generator) -> dict:
        """Some of the captions, and a prompt where there are any."""
        if self.captions_per_image is not None:
            drawn = torch.randperm(len(captions), generator=random)[: self.captions_per_image]
            captions = [captions[each] for each in drawn]
        if not self.prompts:
            return {"captions": captions}
        return {
            "captions": captions,
            "prompt": self.prompts[int(torch.randint(len(self.prompts), (), generator=random))],
        }


def random_resized_crop(image: Image.Image, smallest: float, random: torch.Generator) -> Image.Image:
    """A random part of an image: `smallest` to all of its area, width to height 3:4 to 4:3 (Szegedy et al. 2014).

    An image from which no such part can be cut stays whole.
    """
    width, height = image.size
    for _ in range(10):
        share, shape, x, y = torch.rand(4, generator=random).tolist()
        area = width * height * (smallest + (1 - smallest) * share)
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = round(x * (width - w)), round(y * (height - h))
            return image.crop((left, top, left + w, top + h))
    return image
