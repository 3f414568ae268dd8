"""Stage 1 of BLIP-2: a Q-Former that learns from pairs of images and texts, without a language model.

```
contrast (ITC):   image -> queries [B,Q,Dq] -> vision_projection -> [B,Q,E]; text -> [CLS] -> text_projection -> [M,E]
matching (ITM):   image and text, which attend to each other -> queries [R,Q,Dq] -> itm_head -> [R,2]
generation (ITG): image -> text, which attends to the queries -> lm_head -> [M,T,V]
```

The objectives are those of Li et al. 2023 (arXiv 2301.12597, section 3.2). packing_qformer.py runs all passes over the
same layers without repeated work, and objectives_qformer.py has the losses. Names of modules are those of transformers'
`Blip2ForImageTextRetrieval`.

Shapes: B images, K texts of an image, M texts in all, T tokens of a text, N image tokens, Q queries. V is the size of
the vocabulary. E is the width of the vectors that are compared. Dq and Dv are those of the Q-Former and the features.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbones_qformer import commit_of, is_frozen, vision_model_or_width
from .configuration_qformer import QFormerConfig, QFormerPretrainingConfig
from .decoding_qformer import QFormerDecodingModel
from .encoders_qformer import image_feature_size, num_frames_of
from .language_qformer import MAX_LOGITS_PER_CHUNK, ChunkedCrossEntropy
from .objectives_qformer import (
    ChunkedMatching,
    broadcast,
    draw_negatives,
    gather_features,
    gather_rows,
    num_processes,
    place_in_batch,
    scale_gradient,
    sigmoid_contrast,
    softmax_contrast,
)
from .packing_qformer import ImageKeys, PackedRows, run_packed
from .processing_qformer import QFormerPretrainingProcessor
from .querying_qformer import QFormerModel, check_qformer_arguments
from .texts_qformer import TextBatch, check_texts
from .vision_qformer import split_vision_inputs

PAIRS_OF_A_CHUNK = 64  # of image and text in the matching loss
MAX_LOGIT_SCALE = math.log(100)  # CLIP's bound. A temperature near 0 makes training unstable.


def trainable_weights(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the weights of modules that receive gradients, none inside `torch.no_grad`."""
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    return weights if torch.is_grad_enabled() else []


def new_qformer_config(fields: Mapping[str, Any], vocab_size: int) -> QFormerConfig:
    """Return the configuration of a new Q-Former that reads texts.

    Unless the fields set `initializer_range` or `attention_initializer_range`, values and outputs of attention begin
    with the standard deviation `1.5 / sqrt(hidden_size)`, and all other weights with 0.01. Then [CLS] begins as a mean
    of the words, queries as a mean of the image features, and word embeddings change fast. With 0.02 for all weights,
    narrow Q-Formers learn stage 1 slowly or not at all.

    Args:
        fields: fields of the [`QFormerConfig`].
        vocab_size: number of tokens of the tokenizer.

    Raises:
        TypeError: for the name of a field that does not exist.

    Example:

    ```python
    >>> new_qformer_config({"hidden_size": 64, "num_attention_heads": 4}, 100).attention_initializer_range
    0.1875
    ```
    """
    config = QFormerConfig.from_fields(**{**fields, "use_qformer_text_input": True, "vocab_size": vocab_size})
    if not {"initializer_range", "attention_initializer_range"} & set(fields):
        config.initializer_range = 0.01
        config.attention_initializer_range = 1.5 * config.hidden_size**-0.5
    return config


@dataclass
class QFormerPretrainingOutput(ModelOutput):
    """Output of a [`QFormerForPretraining`]. With several processes, N images and M texts are those of all processes.

    Args:
        loss (`[]`, float32): weighted sum of the losses.
        itc_loss, itm_loss, itg_loss (`[]`, float32, *optional*): losses of contrast, matching and generation, in nats.
            `None` for a weight of 0, and with `return_loss=False`.
        logits_per_image (`[N, M]`, float32, *optional*): similarities of images and texts, scaled. They and the vectors
            are `None` in training with `itc_weight=0`, which does not use them.
        logits_per_text (`[M, N]`, float32, *optional*): the same, transposed.
        itm_logits (`[3m, 2]`, float32, *optional*): logits of not matching and matching of the m texts of this process:
            each with its image, with a wrong image, and its image with another text.
        negative_images, negative_texts (`[M]`, long, *optional*): the wrong image for each text, and the other text. If
            all images are right for a text, or all texts for its image, a right one, which does not count.
        image_vectors (`[B, Q, E]`), text_vectors (`[m, E]`), *optional*: what is compared, of the images and texts of
            this process.
    """

    loss: torch.Tensor | None = None
    itc_loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None
    itg_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    negative_images: torch.Tensor | None = None
    negative_texts: torch.Tensor | None = None
    image_vectors: torch.Tensor | None = None
    text_vectors: torch.Tensor | None = None


class QFormerForPretraining(QFormerDecodingModel):
    r"""Q-Former with the objectives of stage 1, and retrieval and captioning with it.

    Args:
        config ([`QFormerPretrainingConfig`]): configuration of all parts.
        vision_model (`PreTrainedModel`, *optional*): vision encoder; by default with random weights.
        qformer ([`QFormerModel`], *optional*): Q-Former that reads texts; by default with random weights.

    Example:

    ```python
    >>> from transformers import AutoModel
    >>> model = AutoModel.from_pretrained("outputs/stage1", trust_remote_code=True)  # doctest: +SKIP
    >>> model.similarity(["dog.jpg", "cat.jpg"], ["a dog in the snow"])  # doctest: +SKIP
    tensor([[0.41],
            [0.12]])
    ```
    """

    # --- Training -----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        frame_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_loss: bool = True,
    ) -> QFormerPretrainingOutput:
        """Compute the losses of contrast, matching and generation for images and their texts.

        The processes of a run share the batch: negatives come from all of them, and the average of their gradients is
        the gradient of the whole batch.

        A text is right for its own image, and for every image that has an equal text. A text without a wrong image, or
        whose image has no wrong text, is matched without it.

        Args:
            pixel_values (`[B, 3, H, W]`, or `[B, F, 3, H, W]` for videos, float): images; or
            image_embeds (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos, float): their precomputed features.
            input_ids (`[B, T]` or `[B, K, T]`, long): one text or K texts of each image as tokens, `[CLS] text [SEP]`,
                padded on the right.
            attention_mask (same shape, *optional*): 1 for a token, 0 for padding. An image with fewer than K texts has
                texts of padding only.
            image_attention_mask (`[B, N]` or `[B, F, N]`, bool or int, *optional*): 1 for a feature, 0 for padding.
            pixel_mask, pixel_attention_mask, spatial_shapes, image_sizes (`torch.Tensor`, *optional*): what the vision
                encoder reads beside the images. The processor returns it.
            frame_attention_mask (`[B, F]`, *optional*): 1 for a frame of a video, 0 for padding.
            interpolate_pos_encoding (`bool`, *optional*): let the vision encoder adapt its position embeddings to the
                size of the images.
            return_loss (`bool`, defaults to `True`): `False` computes only similarities. The Trainer evaluates the loss
                of models with this argument.

        Returns:
            A [`QFormerPretrainingOutput`].

        Raises:
            TypeError: if `image_embeds` are not a tensor.
            ValueError: if the images or features have another shape or width, or there is an image without a text. Also
                for texts that are empty or too long, and for a batch of one image, which has no wrong pairs.
        """
        # Arguments with names, because the Trainer drops columns that have the name of none.
        vision_inputs, _ = split_vision_inputs(
            {
                "pixel_mask": pixel_mask,
                "pixel_attention_mask": pixel_attention_mask,
                "spatial_shapes": spatial_shapes,
                "image_sizes": image_sizes,
                "frame_attention_mask": frame_attention_mask,
                "interpolate_pos_encoding": interpolate_pos_encoding,
            }
        )
        features, mask = self._features(pixel_values, image_embeds, image_attention_mask, **vision_inputs)
        if input_ids is None:
            raise ValueError("There are no texts: pass `input_ids`, or call `get_image_features` for images alone.")
        texts = check_texts(input_ids, attention_mask, len(features), self.qformer.config)
        keys = ImageKeys.project(self.qformer.encoder, features, mask)
        weights = {
            "itc_loss": self.config.itc_weight,
            "itm_loss": self.config.itm_weight,
            "itg_loss": self.config.itg_weight,
        }
        weights = {name: weight for name, weight in weights.items() if weight and return_loss}
        # In training without contrast, nothing uses similarities.
        compares = "itc_loss" in weights or not (self.training and return_loss)
        passes = {"contrast": self._embed(texts)} if compares else {}
        if "itg_loss" in weights:
            if self.config.bos_token_id is None:
                raise ValueError(
                    "Text generation needs the token that starts a caption: set `config.bos_token_id`, such as "
                    "`processor.tokenizer.bos_token_id`, or `itg_weight=0`."
                )
            inputs = texts.decoder_inputs(self.config.bos_token_id)
            passes["generation"] = self._embed(inputs, causal=True, attend_to_queries=True)
        rows = PackedRows(self._queries(len(features)), [*passes.values()])
        states, parts = rows.split(run_packed(self.qformer.encoder, rows, keys))  # [B, Q, Dq], [tokens, Dq] of each
        tokens = dict(zip(passes, parts, strict=True))
        output = QFormerPretrainingOutput()
        first_image, num_images = place_in_batch(len(features), features.device)
        all_texts = texts.gather(first_image)
        is_right = all_texts.right_pairs(num_images)  # [N, M], used by contrast and matching
        if compares:
            lengths = texts.mask.sum(dim=1)
            first_tokens = tokens["contrast"][lengths.cumsum(0) - lengths]  # [m, Dq]
            vectors = self._image_vectors(states), self._text_vectors(first_tokens)
            output.image_vectors, output.text_vectors = vectors
            self._contrast(output, *vectors, is_right, with_loss="itc_loss" in weights)
        if "itm_loss" in weights:
            self._match_negatives(output, len(texts.ids), all_texts, is_right, keys, features, mask)
        if "itg_loss" in weights:
            output.itg_loss = self._generation_loss(tokens["generation"], texts)
        if weights:
            output.loss = torch.stack([weight * output[name] for name, weight in weights.items()]).sum()
        return output

    def _contrast(
        self,
        output: QFormerPretrainingOutput,
        image_vectors: torch.Tensor,  # [B, Q, E]
        text_vectors: torch.Tensor,  # [m, E], of this process
        is_right: torch.Tensor,  # [N, M], of all processes
        with_loss: bool,
    ) -> None:
        """Compute similarities and the contrastive loss."""
        images, text_vectors = gather_features(image_vectors), gather_features(text_vectors)  # [N, Q, E], [M, E]
        similarity = (images @ text_vectors.t()).amax(dim=1).float()  # [N, M]
        if self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        # Each process computes the loss of all. The average of their gradients is right for the temperature, which all
        # share. It is too small for features, of which each process has its own.
        processes = num_processes()
        logits = similarity * scale_gradient(self.logit_scale.clamp(max=MAX_LOGIT_SCALE), 1 / processes).exp()
        if self.config.itc_loss == "sigmoid":
            logits = logits + scale_gradient(self.logit_bias, 1 / processes)
        if with_loss:
            if self.config.itc_loss == "sigmoid":
                loss = sigmoid_contrast(logits, is_right)
            else:
                loss = softmax_contrast(logits, is_right, self.config.label_smoothing)
            output.itc_loss = scale_gradient(loss, processes)
        output.logits_per_image, output.logits_per_text = logits, logits.t()

    def _match_negatives(
        self,
        output: QFormerPretrainingOutput,
        count: int,  # m
        texts: TextBatch,  # M, of all processes
        is_right: torch.Tensor,  # [N, M], of all processes
        keys: ImageKeys,
        features: torch.Tensor,  # [B, N, Dv]
        mask: torch.Tensor | None,
    ) -> None:
        """Match each of the m texts of this process with its image, with a wrong image, and its image with another."""
        image_of_text, num_texts = texts.image_of_text, len(texts.ids)
        # Without contrast all wrong pairs are equally hard, because nothing trains the vectors.
        logits = output.logits_per_image if self.config.itc_weight else None
        if logits is None:
            logits = features.new_zeros(is_right.shape)
        negative_images, negative_texts = map(broadcast, draw_negatives(logits, is_right, image_of_text))
        output.negative_images, output.negative_texts = negative_images, negative_texts
        numbers = torch.arange(num_texts, device=features.device)
        image_of_row = torch.stack([image_of_text, negative_images, image_of_text])  # [3, M]
        text_of_row = torch.stack([numbers, numbers, negative_texts])
        is_match = is_right[image_of_row, text_of_row]
        is_counted = ~is_match  # a right pair was drawn where there is no wrong one
        is_counted[0] = True
        total = is_counted.sum()
        first, _ = place_in_batch(count, features.device)
        own = slice(first, first + count)
        image_of_row, text_of_row = image_of_row[:, own].flatten(), text_of_row[:, own].flatten()
        keys, image_of_row = self._keys_of_images(image_of_row, keys, features, mask)
        # A wrong pair may be drawn several times. Each pair is computed once, those of an image side by side.
        numbers, pair_of_row = (image_of_row * num_texts + text_of_row).unique(return_inverse=True)
        image_of_pair, text_of_pair = numbers // num_texts, numbers % num_texts
        is_match_of_pair = torch.zeros_like(numbers, dtype=torch.bool)
        is_match_of_pair[pair_of_row] = is_match[:, own].flatten()
        counts = torch.zeros_like(numbers).index_add_(0, pair_of_row, is_counted[:, own].flatten().long())
        pairs = texts.select(text_of_pair, image_of_pair)
        loss, logits = self._matching_loss(pairs, is_match_of_pair, counts, keys)
        output.itm_logits = logits[pair_of_row]
        output.itm_loss = loss * num_processes() / total

    def _matching_loss(
        self, pairs: TextBatch, is_match: torch.Tensor, counts: torch.Tensor, keys: ImageKeys
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the matching losses of pairs, and their logits `[R, 2]`.

        Args:
            pairs: the text of each pair and its image, sorted by image.
            is_match (`[R]`, bool): whether text and image belong together.
            counts (`[R]`, long): how often each pair counts.
            keys: keys and values of images.
        """

        def match(rows: slice, images: slice, own_keys: Sequence[torch.Tensor]) -> torch.Tensor:
            image_of_row = pairs.image_of_text[rows] - images.start
            chunk = TextBatch(pairs.ids[rows], pairs.mask[rows], image_of_row)
            return self._matching_logits(chunk, keys.select(images, own_keys), images.stop - images.start)

        num_chunks = math.ceil(len(counts) / PAIRS_OF_A_CHUNK)
        chunks = []
        for part in torch.arange(len(counts)).tensor_split(num_chunks):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            images = pairs.image_of_text[rows]
            chunks.append((rows, slice(int(images[0]), int(images[-1]) + 1)))
        tensors, weights = keys.tensors(), trainable_weights(self.qformer, self.itm_head)
        return ChunkedMatching.apply(match, chunks, is_match, counts, len(tensors), *tensors, *weights)

    def _keys_of_images(
        self, image_of_row: torch.Tensor, keys: ImageKeys, features: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[ImageKeys, torch.Tensor]:
        """Return keys and values with those of images of other processes, and the place of the image of each row.

        Args:
            image_of_row (`[R]`): numbers of images of all processes.
            keys, features, mask: of the images of this process.
        """
        count = len(features)
        if num_processes() == 1:
            return keys, image_of_row
        first, _ = place_in_batch(count, features.device)
        is_own = (image_of_row >= first) & (image_of_row < first + count)
        others = image_of_row[~is_own].unique()  # sorted
        if mask is None:
            mask = features.new_ones(features.shape[:2], dtype=torch.bool)
        all_features = torch.cat(gather_rows(features, with_gradient=features.requires_grad))
        all_masks = torch.cat(gather_rows(mask.long())).bool()
        images = torch.cat([torch.arange(first, first + count, device=others.device), others])
        other_keys = ImageKeys.project(self.qformer.encoder, all_features[others], None)
        keys = keys.append(other_keys, all_masks[images])
        place = torch.where(is_own, image_of_row - first, count + torch.searchsorted(others, image_of_row))
        return keys, place

    def _generation_loss(self, hidden_states: torch.Tensor, texts: TextBatch) -> torch.Tensor:
        """Return the mean cross-entropy of all tokens of the texts but their first.

        Args:
            hidden_states (`[tokens, Dq]`): outputs of the decoder inputs.
            texts: the texts of this process.
        """
        targets = texts.decoder_targets()
        weights = trainable_weights(self.lm_head)
        chunk_size = max(1, MAX_LOGITS_PER_CHUNK // self.qformer.config.vocab_size)
        loss, _ = ChunkedCrossEntropy.apply(
            self.lm_head, chunk_size, hidden_states, targets, self.config.label_smoothing, None, *weights
        )
        count = torch.cat(gather_rows(torch.tensor([len(targets)], device=loss.device))).sum().clamp(min=1)
        return loss * num_processes() / count

    # --- From a pretrained encoder ------------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | None,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase,
        *,
        encoder_hidden_size: int | None = None,
        vision_revision: str | None = None,
        qformer: QFormerModel | None = None,
        freeze_vision_model: bool = True,
        load_vision_model: bool = True,
        dtype: str | torch.dtype = "auto",
        image_text_hidden_size: int = 256,
        itc_loss: str = "softmax",
        itc_weight: float = 1.0,
        itm_weight: float = 1.0,
        itg_weight: float = 1.0,
        label_smoothing: float = 0.1,
        **qformer_fields: Any,
    ) -> "QFormerForPretraining":
        r"""Put a new or a given Q-Former behind a pretrained vision encoder.

        Args:
            vision (`str`, *optional*): Hub id or folder of a vision encoder. `None` for a model that reads only
                features (`image_embeds`), of any other encoder.
            tokenizer (`str` or `PreTrainedTokenizerBase`): tokenizer of the texts, or its Hub id or folder, such as
                `"google-bert/bert-base-uncased"`. The Q-Former gets a word embedding for each of its tokens.
            encoder_hidden_size (`int`, *optional*): width of the features, if `vision` is `None`.
            vision_revision (`str`, *optional*): branch, tag or commit on the Hub.
            qformer ([`QFormerModel`], *optional*): pretrained Q-Former that reads texts, such as
                `load_qformer("google-bert/bert-base-uncased")` of `qformer_captioner.hub.convert` returns.
            freeze_vision_model (`bool`, defaults to `True`): whether to freeze the vision encoder.
            load_vision_model (`bool`, defaults to `True`): `False` leaves the vision encoder out of memory, to train on
                precomputed features.
            dtype (`str` or `torch.dtype`, defaults to `"auto"`): dtype of a frozen vision encoder; "auto" is that of
                the saved one. All trainable parts are float32.
            image_text_hidden_size, itc_loss, itc_weight, itm_weight, itg_weight, label_smoothing: fields of
                [`QFormerPretrainingConfig`].
            qformer_fields: fields of the [`QFormerConfig`] of a new Q-Former, such as `num_query_tokens=16`. By default
                its first weights are those of [`new_qformer_config`].

        Returns:
            The model in evaluation mode, with its processor.

        Raises:
            OSError: if the encoder or the tokenizer cannot be fetched; the message names it.
            TypeError: for a keyword that is not a field of [`QFormerConfig`], fields beside a given `qformer`, or a
                `qformer` that is not a [`QFormerModel`]. Also for neither a vision encoder nor a width, or for both.
            ValueError: if the given Q-Former reads no texts, or the tokenizer lacks a special token.

        Example:

        ```python
        >>> model = QFormerForPretraining.from_backbones(
        ...     "facebook/dinov2-small", "google-bert/bert-base-uncased", num_hidden_layers=4, num_query_tokens=16
        ... )  # doctest: +SKIP
        ```
        """
        check_qformer_arguments(qformer, qformer_fields)
        vision_model = vision_model_or_width(vision, encoder_hidden_size, vision_revision, dtype, load_vision_model)
        frames = num_frames_of(vision_model.config)
        if frames is None:
            frames = qformer_fields.get("num_frames", 1) if qformer is None else qformer.config.num_frames
        processor = QFormerPretrainingProcessor.from_backbones(vision, tokenizer, vision_revision, num_frames=frames)
        num_tokens = len(processor.tokenizer)
        if qformer is None:
            qformer_config = new_qformer_config(qformer_fields, num_tokens)
        else:
            qformer.float().resize_image_features(image_feature_size(vision_model.config))
            if qformer.config.use_qformer_text_input and qformer.config.vocab_size < num_tokens:
                qformer.resize_token_embeddings(num_tokens)
            qformer_config = qformer.config
        config = QFormerPretrainingConfig(
            vision_config=vision_model.config,
            qformer_config=qformer_config,
            vision_model_name_or_path=vision_model.config.name_or_path or None,
            vision_model_revision=None if vision is None else commit_of(vision, vision_revision),
            freeze_vision_model=freeze_vision_model,
            image_text_hidden_size=image_text_hidden_size,
            itc_loss=itc_loss,
            itc_weight=itc_weight,
            itm_weight=itm_weight,
            itg_weight=itg_weight,
            label_smoothing=label_smoothing,
            bos_token_id=processor.tokenizer.bos_token_id,
            eos_token_id=processor.tokenizer.sep_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        model = cls(config, vision_model=vision_model, qformer=qformer)
        model.processor = processor
        if not is_frozen(vision_model):
            vision_model.float()  # bfloat16 is too coarse for small weight updates
        model._keep_by_reference([part for part in model.frozen_backbones() if vision is not None])
        model._take_fingerprints(cls.backbones)
        return model.eval()


QFormerForPretraining.register_for_auto_class("AutoModel")

__all__ = ["QFormerForPretraining", "QFormerPretrainingOutput"]
