"""Captions of images as strings, for every model that generates them.

modeling_qformer.py and decoding_qformer.py subclass the class of this file, and define `generate`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationMixin

from .images_qformer import ImageInput, flatten_images, is_batch
from .saving_qformer import QFormerPreTrainedModel


# transformers looks for `GenerationMixin` among the bases of a class, but passes over bases named `PreTrainedModel`.
class QFormerCaptioningModel(QFormerPreTrainedModel, GenerationMixin):
    """Base class of models that generate captions, which makes strings of images."""

    qformer: Any

    @property
    def input_device(self) -> torch.device:
        """Device of the first weights that are in memory. Offloaded modules move their inputs themselves."""
        return next((weight.device for weight in self.parameters() if not weight.is_meta), torch.device("cpu"))

    def required_processor(self) -> Any:
        """Return the processor.

        Raises:
            ValueError: if the model has no processor.
        """
        if self.processor is None:
            raise ValueError(
                f"This model has no processor. Set `model.processor = {self.processor_class.__name__}(image_processor, "
                "tokenizer)`, or load the model from a folder with a processor."
            )
        return self.processor

    def caption(
        self,
        images: ImageInput | Iterable[ImageInput | Iterable[ImageInput]] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        image_embeds: torch.Tensor | Sequence[Any] | None = None,
        image_attention_mask: torch.Tensor | None = None,
        **generation,
    ) -> str | list[str]:
        r"""Caption one image, a list of images and videos, or features of them.

        Args:
            images: an image as [`open_image`] takes it (a PIL image, an array, a tensor, a path, a URL, bytes ...), or
                several: a list, a column of `datasets`, or an array `[B, H, W, C]`. A video is a list of frames or an
                array `[F, H, W, C]` inside the list: `caption([[frame_1, frame_2]])`. `processor.num_frames` frames of
                it are read.
            prompt (`str` or list of `str`, *optional*): text that the caption continues; defaults to the processor's.
            image_embeds (*optional*): features in place of images: of one row (`[N, Dv]`), or of several in a list,
                whose N may differ, or in a batch `[B, N, Dv]`.
            image_attention_mask (`[B, N]`, *optional*): mask of a batch of features, or of those that the vision
                encoder returns for images: 0 for features that the Q-Former ignores.
            generation: options of `generate`, such as `num_beams=5`.

        Returns:
            A string for one image or row, and a list of strings for several or with `num_return_sequences` above 1.

        Raises:
            OSError: if an image is missing or cannot be read; the message names it.
            TypeError: if an image is of a type that does not hold images, or features are not numbers.
            ValueError: if the model has no processor, or for `return_dict_in_generate=True`. Also if an array does not
                have the shape or the values of an image, or for a video if the model reads only images. Also if there
                are neither images nor features, or both, or if features have another shape.

        Example:

        ```python
        >>> model.caption(["dog.jpg", "cat.jpg"], num_beams=5, max_new_tokens=20)  # doctest: +SKIP
        ['A dog runs over the grass.', 'A cat sleeps on a bed.']
        >>> model.caption(image_embeds=[torch.randn(50, 384), torch.randn(70, 384)])  # doctest: +SKIP
        ['A dog runs over the grass.', 'A cat sleeps on a bed.']
        ```
        """
        processor = self.required_processor()
        if images is None and image_embeds is None:
            raise ValueError("There is nothing to caption: pass `images`, or features as `image_embeds`.")
        given = generation.get("generation_config")
        if {**(vars(given) if given else {}), **generation}.get("return_dict_in_generate"):
            raise ValueError(
                "`caption` returns strings: for scores and other outputs, call "
                "`model.generate(**model.processor(images, prompt), return_dict_in_generate=True)`."
            )
        if image_embeds is None:
            is_one, images = not is_batch(images), flatten_images(images)
            number = len(images)
        else:
            is_one = getattr(image_embeds, "ndim", None) == 2  # an array
            number = 1 if is_one else len(image_embeds)
        if number == 0:
            return []
        inputs = processor(
            images=images,
            text=[prompt] * number if isinstance(prompt, str) else prompt,
            image_embeds=image_embeds,
            image_attention_mask=image_attention_mask,
        ).to(self.input_device)
        token_ids = self.generate(**inputs, **{**generation, "return_dict_in_generate": False})  # type: ignore[misc]
        captions = [caption.strip() for caption in processor.batch_decode(token_ids, skip_special_tokens=True)]
        return captions[0] if is_one and len(captions) == 1 else captions
