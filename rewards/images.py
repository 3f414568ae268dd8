"""Rewards that compare a caption with its image: CLIPScore, and the probability of matching of a stage-1 model."""

from collections.abc import Sequence
from typing import Any

import torch

from ..common.errors import InputError
from ..data.images import Picture, middle_frame
from ..metrics.clip import ClipEncoder, clip_score_of
from ..retrieval.model import RetrievalModel, load_stage1

BATCH_SIZE = 64  # images or texts in one forward pass of CLIP


def distinct(entries: Sequence[Any]) -> tuple[list[Any], torch.Tensor]:
    """Return the distinct objects among entries, and the place of each entry's object among them, int64 `[n]`.

    The samples of one image share one object, which is encoded once.
    """
    entries = list(entries)  # a tensor makes a new object of each row, which must live as long as its id is used
    places: dict[int, int] = {}
    index = [places.setdefault(id(entry), len(places)) for entry in entries]
    objects = dict(zip(index, entries, strict=True))
    return [objects[place] for place in range(len(places))], torch.tensor(index)


class ClipReward:
    """CLIPScore of each completion and its image, which reads the column `image`.

    A video is scored by its middle frame.

    Args:
        name_or_path: Hub id or folder of the CLIP.
        device: device of the model.

    Raises:
        InputError: if the model cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: torch.device | str):
        self.encoder = ClipEncoder(name_or_path, BATCH_SIZE, device, show_progress=False)

    def __call__(
        self, prompts: list[str], completions: list[str], image: Sequence[Picture], **columns: Any
    ) -> list[float]:
        """Return scores between 0 and 2.5, rarely above 1.

        Args:
            prompts: prompts, which are not read.
            completions: n captions.
            image: the image of each completion.
            columns: further columns, which are not read.
        """
        pictures, place = distinct(image)
        image_embeds = self.encoder.encode_images(map(middle_frame, pictures), len(pictures))
        text_embeds = self.encoder.encode_texts(completions, "completions")
        return clip_score_of(image_embeds[place], text_embeds).tolist()


class MatchReward:
    """Probability that a completion describes its image, by a stage-1 model.

    It reads the column `image`, or `image_embeds` in a run on precomputed features. Features must be those of the
    vision encoder of the stage-1 model.

    Args:
        name_or_path: folder or Hub id of the stage-1 model.
        device: device of the model.

    Raises:
        InputError: if the model cannot be loaded, or was trained without matching.
    """

    def __init__(self, name_or_path: str, device: torch.device | str):
        self.name = name_or_path
        stage1 = load_stage1(name_or_path)
        if stage1.config.itm_weight == 0:
            raise InputError(
                f"The model {name_or_path!r} was trained without matching (`itm_weight` is 0), which the reward "
                "'match' needs: pretrain it with --itm_weight 1."
            )
        self.model = RetrievalModel(stage1.to(torch.device(device)))  # type: ignore[arg-type]  # the stub's `self`

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        image: Sequence[Picture] | None = None,
        image_embeds: Sequence[torch.Tensor] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return probabilities between 0 and 1.

        Args:
            prompts: prompts, which are not read.
            completions: n captions.
            image: the image of each completion, or
            image_embeds: its features (`[N, Dv]`).
            columns: further columns, which are not read.

        Raises:
            InputError: if there are neither images nor features, or features of another width.
        """
        features, mask, place = self._features(image, image_embeds)
        logits = self.model.match(features, mask, place, completions)
        return logits.float().softmax(dim=1)[:, 1].tolist()

    def _features(
        self, image: Sequence[Picture] | None, image_embeds: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the features of the distinct images, their mask, and the place of each completion's image."""
        if image_embeds is not None:
            rows, place = distinct(image_embeds)
            width = self.model.model.qformer.config.encoder_hidden_size
            if rows[0].shape[-1] != width:
                raise InputError(
                    f"The reward match:{self.name} reads features of width {width}, and those of this run have width "
                    f"{rows[0].shape[-1]}: use a stage-1 model with the same vision encoder."
                )
            batch = self.model.processor(image_embeds=rows).to(self.model.device)
            return batch["image_embeds"], batch.get("image_attention_mask"), place
        if image is None:
            raise InputError(f"The reward match:{self.name} needs the images or their features.")
        pictures, place = distinct(image)
        return *self.model.image_features(pictures), place
