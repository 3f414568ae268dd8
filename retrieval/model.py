"""A stage-1 model as retrieval uses it: vectors of images and texts, and matching of pairs."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from transformers import PreTrainedConfig

from ..common.errors import UNUSABLE, InputError, one_line
from ..common.onednn import onednn_linears
from ..data.features import FeatureRef, read_features
from ..data.images import Picture
from ..vision_qformer import encode_images

if TYPE_CHECKING:
    from ..pretraining_qformer import QFormerForPretraining

MAX_LENGTH = 35  # tokens of a text; that of LAVIS' evaluation


class EncodedImages(NamedTuple):
    """Images as a stage-1 model compares them.

    Attributes:
        vectors: one vector of each query, of length 1, `[B, Q, E]`.
        features: output of the vision encoder, `[B, N, Dv]`, or `[B, F, N, Dv]` for videos.
        mask: bool `[B, N]` or `[B, F, N]`, `False` for padding; `None` without padding.
    """

    vectors: torch.Tensor
    features: torch.Tensor
    mask: torch.Tensor | None


class RetrievalModel:
    """Stage-1 model with its processor. Inputs are images and texts, and outputs are on its device.

    Args:
        model: the model, on the device where it should run.
        max_length: largest number of tokens of a text; longer ones are cut. By default that of LAVIS' evaluation.

    Raises:
        InputError: if the model has no processor.

    Example:

    ```python
    >>> model = RetrievalModel(load_stage1("outputs/stage1"))  # doctest: +SKIP
    >>> vectors = model.encode_texts(["a dog in snow"])  # doctest: +SKIP
    >>> vectors.shape  # doctest: +SKIP
    torch.Size([1, 256])
    ```
    """

    def __init__(self, model: "QFormerForPretraining", max_length: int = MAX_LENGTH):
        if model.processor is None:
            raise InputError("The model has no processor for images and texts: save it again with its processor.")
        self.model = model.eval()
        self.processor = model.processor
        self.max_length = min(max_length, model.qformer.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def num_frames(self) -> int:
        """Largest number of frames to read of a video."""
        return self.processor.num_frames

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, before it is cut."""
        return [len(ids) for ids in self.processor.tokenizer(list(texts), verbose=False)["input_ids"]]

    @torch.inference_mode()
    def encode_images(self, inputs: Sequence[Picture | FeatureRef]) -> EncodedImages:
        """Encode images, or precomputed features.

        Args:
            inputs: B images or videos, or references to features of one store.
        """
        pictures = [each for each in inputs if not isinstance(each, FeatureRef)]
        with onednn_linears(self.device):
            if pictures:
                features, mask = self.image_features(pictures)
            else:
                features, mask = read_features([each for each in inputs if isinstance(each, FeatureRef)])
                features, mask = features.to(self.device), None if mask is None else mask.to(self.device)
            outputs = self.model.get_image_features(image_embeds=features, image_attention_mask=mask)
        return EncodedImages(outputs.pooler_output, features, mask)

    @torch.inference_mode()
    def image_features(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the outputs of the vision encoder for B images or videos, and their mask, as in [`EncodedImages`]."""
        batch = self.processor(images=pictures).to(self.device)
        pixel_values = batch.pop("pixel_values")
        with onednn_linears(self.device):
            outputs = encode_images(self.model.vision_model, pixel_values, **batch)
        return outputs.last_hidden_state, outputs.attention_mask

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the vectors of M texts, of length 1, `[M, E]`."""
        with onednn_linears(self.device):
            return self.model.get_text_features(**self._tokens(texts)).pooler_output

    @torch.inference_mode()
    def match(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        image_of_text: torch.Tensor,
        texts: Sequence[str],
    ) -> torch.Tensor:
        """Return the logits of not matching and of matching of R pairs, `[R, 2]`.

        Args:
            features, mask: features of the images and their mask, as in [`EncodedImages`].
            image_of_text: place of the image of each text, int64 `[R]`.
            texts: the text of each pair.
        """
        with onednn_linears(self.device):
            return self.model.get_matching_logits(
                **self._tokens(texts),
                image_embeds=features,
                image_attention_mask=mask,
                image_of_text=image_of_text.to(self.device),
            )

    def _tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        batch = self.processor(text=list(texts), max_length=self.max_length).to(self.device)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


def load_stage1(
    name_or_path: str | os.PathLike, revision: str | None = None, dtype: "str | torch.dtype" = "auto"
) -> "QFormerForPretraining":
    """Load a stage-1 model with its processor, also from a checkpoint of transformers' `Blip2ForImageTextRetrieval`.

    Args:
        name_or_path: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        dtype: dtype of the weights; `"auto"` keeps the dtype in which each part was saved.

    Raises:
        InputError: if the model cannot be loaded, or is a captioner.

    Example:

    ```python
    >>> model = load_stage1("outputs/stage1")  # doctest: +SKIP
    >>> model.similarity(["dog.jpg"], ["a dog in snow"])  # doctest: +SKIP
    tensor([[0.41]])
    ```
    """
    from ..pretraining_qformer import QFormerForPretraining

    name = os.fspath(name_or_path)
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        if config.get("model_type") == "qformer_captioner":
            raise InputError(
                f"{name!r} is a captioner, and retrieval needs a model of stage 1: train one with "
                "`qformer-captioner train --objective pretrain`."
            )
        hub_options: dict[str, Any] = {} if revision is None else {"revision": revision}
        model = QFormerForPretraining.from_pretrained(name, dtype=dtype, **hub_options)
    except InputError:
        raise
    except (OSError, *UNUSABLE) as error:
        raise InputError(f"The model {name!r} cannot be loaded from a folder or the Hub: {one_line(error)}") from error
    return cast("QFormerForPretraining", model)


def batches_by_length(lengths: torch.Tensor, groups: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Return batches of places, sorted by group and then by length, so that texts need little padding.

    Args:
        lengths: number of tokens of each text, int64 `[R]`.
        groups: group of each text, int64 `[R]`, such as its image.
        batch_size: largest number of places in a batch.

    Example:

    ```python
    >>> import torch
    >>> from qformer_captioner.retrieval.model import batches_by_length
    >>> batches_by_length(torch.tensor([9, 3, 4]), torch.tensor([0, 1, 0]), 2)
    [tensor([2, 0]), tensor([1])]
    ```
    """
    order = torch.argsort(groups * (int(lengths.max()) + 1) + lengths, stable=True)
    return list(order.split(batch_size))
