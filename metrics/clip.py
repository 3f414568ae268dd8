"""CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv 2104.08718): captions held against the image itself."""

import itertools
import os
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel

from ..common.errors import InputError
from ..processing_qformer import ImageInput, open_image
from .corpus import check_predictions, check_references

PREFIX = "A photo depicts "  # stands before every text, references too
WEIGHT = 2.5  # spreads the cosines, which hardly exceed 0.4, over 0 to 1


@torch.no_grad()
def clip_scores(
    images: Iterable[ImageInput],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    model_name_or_path: str | os.PathLike = "openai/clip-vit-base-patch32",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    per_image: bool = False,
    allow_empty: bool = False,
) -> dict[str, float | dict[str, list[float]]]:
    """CLIPScore, `2.5 * max(cos(image, caption), 0)`, and with references RefCLIPScore, its harmonic mean with the
    highest `max(cos(caption, reference), 0)`.

    Args:
        images: PIL images, paths or URLs; a generator will do, they are opened a batch at a time.
        predictions: one caption of each image.
        references (*optional*): the reference captions of each image.
        model_name_or_path: the paper's model, or another CLIP; scores of different models are not comparable.
        batch_size: images or texts that go through the model at a time.
        device: where the model runs. float16 would move the scores, so it runs in float32 everywhere.
        per_image: add `"per_image"`, a dictionary with the same keys and a list of scores each.
        allow_empty: score an empty prediction instead of refusing it.

    Returns:
        `clip_score`, and with references `ref_clip_score`: means over the images.

    Raises:
        InputError: for other numbers of images, captions and references, or a model that cannot be loaded.
        OSError: for an image that cannot be read; the message names it.

    Example:

    ```python
    >>> clip_scores(["dog.jpg"], ["a dog runs"], [["a dog is running"]])  # doctest: +SKIP
    {'clip_score': 0.7616, 'ref_clip_score': 0.8227}
    ```
    """
    check_predictions(predictions, None if references is None else len(references), allow_empty)
    if references is not None:
        check_references(references)
    try:
        model = CLIPModel.from_pretrained(model_name_or_path, dtype=torch.float32).eval().to(device)
        processor = AutoProcessor.from_pretrained(model_name_or_path)
    except OSError as error:
        raise InputError(
            f"The CLIP model {str(model_name_or_path)!r} cannot be loaded: check its name, and make sure that the Hub "
            f"can be reached or the model is in the cache ({str(error).splitlines()[0]})."
        ) from error

    def embed_images(images: list[ImageInput]) -> torch.Tensor:
        opened = [open_image(image) for image in images]
        pixels = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
        return model.get_image_features(pixel_values=pixels.to(device)).pooler_output

    def embed_texts(texts: list[str]) -> torch.Tensor:
        texts = [PREFIX + text for text in texts]
        tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return model.get_text_features(**tokens.to(device)).pooler_output

    def embed(items: Iterable, total: int, by: Callable[[list], torch.Tensor], what: str) -> torch.Tensor:
        items = iter(tqdm(items, f"CLIP: {what}", total, leave=False))
        batches = iter(lambda: list(itertools.islice(items, batch_size)), [])
        return torch.cat([normalize(by(batch), dim=-1).cpu() for batch in batches])

    image = embed(images, len(predictions), embed_images, "images")  # [I, D]
    if len(image) != len(predictions):
        raise InputError(f"There are {len(image)} images but {len(predictions)} captions: CLIPScore takes one of each.")
    text = embed(predictions, len(predictions), embed_texts, "captions")  # [I, D]
    each = {"clip_score": WEIGHT * (image * text).sum(dim=-1).clamp(min=0)}  # [I]
    if references is not None:
        flat = [reference for own in references for reference in own]
        parts = embed(flat, len(flat), embed_texts, "references").split([len(own) for own in references])
        nearest = torch.stack([(own @ one).max() for own, one in zip(parts, text, strict=True)]).clamp(min=0)  # [I]
        seen = each["clip_score"]
        each["ref_clip_score"] = 2 * seen * nearest / (seen + nearest).clamp(min=1e-12)
    scores: dict[str, float | dict[str, list[float]]] = {name: float(values.mean()) for name, values in each.items()}
    if per_image:
        scores["per_image"] = {name: values.tolist() for name, values in each.items()}
    return scores
