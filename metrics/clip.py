"""CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv 2104.08718), which compare a caption with the image itself."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel

from ..common.errors import InputError, one_line
from ..images_qformer import ImageInput, open_image
from .checks import check_predictions, check_references

PREFIX = "A photo depicts "  # the paper puts it before every caption and every reference
WEIGHT = 2.5  # w in equation 1: scales cosines, which rarely exceed 0.4, to the range 0 to 1


def clip_scores(
    images: Iterable[ImageInput],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    model_name_or_path: str | os.PathLike = "openai/clip-vit-base-patch32",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    per_image: bool = False,
    allow_empty: bool = False,
) -> dict[str, Any]:
    """Compute CLIPScore and, with references, RefCLIPScore.

    CLIPScore is `2.5 * max(cos(image, caption), 0)`, equation 1 of the paper. RefCLIPScore is the harmonic mean of
    CLIPScore and the highest `max(cos(caption, reference), 0)`, equation 2. Every text follows "A photo depicts".

    Args:
        images: PIL images, paths or URLs. A generator works too, because images are opened one batch at a time.
        predictions: one caption for each image.
        references (*optional*): the reference captions of each image.
        model_name_or_path: the paper's model, or another CLIP. Scores of different models are not comparable.
        batch_size: number of images or texts in one forward pass.
        device: device of the model. It always runs in float32, because float16 changes the scores.
        per_image: add `"per_image"`, a dictionary with the same keys and a list of scores for each.
        allow_empty: score an empty prediction instead of refusing it.

    Returns:
        A dictionary with `clip_score` and, with references, `ref_clip_score`: means over the images.

    Raises:
        InputError: for numbers of images, captions and references that differ, or a model that cannot be loaded.
        OSError: for an image that cannot be read; the message names it.

    Example:

    ```python
    >>> from qformer_captioner.metrics import clip_scores
    >>> clip_scores(["dog.jpg"], ["a dog runs"], [["a dog is running"]])  # doctest: +SKIP
    {'clip_score': 0.7616, 'ref_clip_score': 0.8227}
    ```
    """
    check_predictions(predictions, None if references is None else len(references), allow_empty)
    if references is not None:
        check_references(references)
    encoder = ClipEncoder(model_name_or_path, batch_size, device)
    image_embeds = encoder.encode_images(images, len(predictions))  # [I, D]
    if len(image_embeds) != len(predictions):
        raise InputError(
            f"There are {len(image_embeds)} images but {len(predictions)} captions: CLIPScore needs one of each."
        )
    text_embeds = encoder.encode_texts(predictions, "captions")  # [I, D]
    clip_score = clip_score_of(image_embeds, text_embeds)  # [I]
    image_scores = {"clip_score": clip_score}
    if references is not None:
        all_references = [reference for texts in references for reference in texts]
        sizes = [len(texts) for texts in references]
        reference_embeds = encoder.encode_texts(all_references, "references").split(sizes)  # I of [R of the image, D]
        best = [(own @ text).max() for own, text in zip(reference_embeds, text_embeds, strict=True)]
        nearest = torch.stack(best).clamp(min=0)  # [I]
        image_scores["ref_clip_score"] = 2 * clip_score * nearest / (clip_score + nearest).clamp(min=1e-12)
    scores: dict[str, Any] = {name: float(values.mean()) for name, values in image_scores.items()}
    if per_image:
        scores["per_image"] = {name: values.tolist() for name, values in image_scores.items()}
    return scores


def clip_score_of(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Return CLIPScore of pairs, equation 1 of the paper, `[I]`.

    Args:
        image_embeds, text_embeds: the vectors of the pairs by [`ClipEncoder`], `[I, D]` each.
    """
    return WEIGHT * (image_embeds * text_embeds).sum(dim=-1).clamp(min=0)


class ClipEncoder:
    """CLIP and its processor, which encode images and texts as unit vectors.

    Args:
        name_or_path: Hub id or folder of the CLIP.
        batch_size: number of images or texts in one forward pass.
        device: device of the model. It always runs in float32, because float16 changes the scores.
        show_progress: show a progress bar.

    Raises:
        InputError: if the model cannot be loaded.
    """

    def __init__(
        self, name_or_path: str | os.PathLike, batch_size: int, device: str | torch.device, show_progress: bool = True
    ):
        try:
            self.model = CLIPModel.from_pretrained(name_or_path, dtype=torch.float32).eval().to(device)
            self.processor = AutoProcessor.from_pretrained(name_or_path)
        except OSError as error:
            raise InputError(
                f"The CLIP model {str(name_or_path)!r} cannot be loaded. Check its name, and that the Hub can be "
                f"reached or the model is in the cache ({one_line(error, 200)})."
            ) from error
        self.batch_size, self.device, self.show_progress = batch_size, device, show_progress

    @torch.no_grad()
    def encode_images(self, images: Iterable[ImageInput], total: int) -> torch.Tensor:
        """Return a unit vector for each image (`[I, D]`)."""

        def encode(batch: list[ImageInput]) -> torch.Tensor:
            opened = [open_image(image) for image in batch]
            pixel_values = self.processor.image_processor(opened, return_tensors="pt")["pixel_values"]
            return self.model.get_image_features(pixel_values=pixel_values.to(self.device)).pooler_output

        return self._encode(images, total, encode, "images")

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], description: str) -> torch.Tensor:
        """Return a unit vector for each text (`[T, D]`)."""

        def encode(batch: list[str]) -> torch.Tensor:
            prefixed = [PREFIX + text for text in batch]
            tokens = self.processor.tokenizer(prefixed, padding=True, truncation=True, return_tensors="pt")
            return self.model.get_text_features(**tokens.to(self.device)).pooler_output

        return self._encode(texts, len(texts), encode, description)

    def _encode(
        self, items: Iterable[Any], total: int, encode: Callable[[list[Any]], torch.Tensor], description: str
    ) -> torch.Tensor:
        items = iter(tqdm(items, f"CLIP: {description}", total, leave=False, disable=not self.show_progress))
        batches: Iterator[list[Any]] = iter(lambda: list(itertools.islice(items, self.batch_size)), [])
        return torch.cat([normalize(encode(batch), dim=-1).cpu() for batch in batches])
