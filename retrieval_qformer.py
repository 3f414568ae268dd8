"""Retrieval with a Q-Former of stage 1: vectors of images and texts, and the probability that they match.

decoding_qformer.py subclasses the class of this file and captions with it, and pretraining_qformer.py trains it.

Shapes: B images, M texts, T tokens of a text, N image tokens, Q queries, E width of the vectors that are compared. Dq
and Dv are the widths of the Q-Former and of the features.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .backbones_qformer import VisionModelPlaceholder, dtype_of, placeholder_for
from .cards_qformer import PushWithPretrainingCard
from .checkpoint_qformer import is_retrieval_model, retrieval_arguments
from .configuration_qformer import QFormerConfig, QFormerPretrainingConfig
from .encoders_qformer import vision_config_of, vision_model_from_config
from .images_qformer import ImageInput, flatten_images
from .inputs_qformer import load_image_processor
from .packing_qformer import ImageKeys, PackedRows, Texts, run_packed
from .processing_qformer import HUB_KWARGS, QFormerPretrainingProcessor
from .querying_qformer import QFormerModel
from .saving_qformer import QFormerPreTrainedModel
from .texts_qformer import QFormerLMHead, TextBatch, check_texts
from .vision_qformer import features_of_inputs

logger = logging.get_logger(__name__)

# Sizes of the blocks of `similarity` and `match`. Beside texts and results, only one block is in memory.
IMAGES_OF_A_PASS = 32
TEXTS_OF_A_PASS = 256
PAIRS_OF_A_PASS = 128  # of image and text
MAX_SIMILARITIES = 2**24  # of queries and texts

SIGMOID_LOGIT_BIAS = -10.0  # SigLIP's. At first, nearly all pairs are wrong.


class QFormerRetrievalModel(PushWithPretrainingCard, QFormerPreTrainedModel):
    """Base class of [`QFormerForPretraining`], with its parts and all that it does without training.

    Args:
        config ([`QFormerPretrainingConfig`]): configuration of all parts.
        vision_model (`PreTrainedModel`, *optional*): vision encoder; by default with random weights.
        qformer ([`QFormerModel`], *optional*): Q-Former that reads texts; by default with random weights.
    """

    config_class = QFormerPretrainingConfig
    config: QFormerPretrainingConfig
    backbones = ("vision_model",)
    processor_class = QFormerPretrainingProcessor
    processor: QFormerPretrainingProcessor | None
    base_model_prefix = "pretraining"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = False  # no kernel for the masks of packed rows
    _no_split_modules = ["QFormerModel"]
    _keep_in_fp32_modules = ["qformer", "vision_projection", "text_projection", "itm_head", "lm_head"]
    _keep_in_fp32_modules_strict = ["logit_scale"]  # bfloat16 is too coarse for their updates
    _tied_weights_keys = {"lm_head.decoder.weight": "qformer.embeddings.word_embeddings.weight"}

    def __init__(
        self,
        config: QFormerPretrainingConfig,
        vision_model: PreTrainedModel | VisionModelPlaceholder | None = None,
        qformer: QFormerModel | None = None,
    ):
        super().__init__(config)

        def dtype(part: str) -> torch.dtype:
            return getattr(torch, config.dtypes[part]) if config.dtypes else torch.get_default_dtype()

        if vision_model is None:
            build = vision_model_from_config if config.has_vision_model else placeholder_for
            vision_model = build(cast(PreTrainedConfig, config.vision_config), dtype("vision_model"))
        if qformer is None:
            qformer = QFormerModel._from_config(cast(QFormerConfig, config.qformer_config), dtype=dtype("qformer"))
        if not qformer.config.use_qformer_text_input:
            raise ValueError(
                "The Q-Former does not read texts, so it cannot be pretrained with them: build it with "
                "`use_qformer_text_input=True`, or load one that was pretrained with texts."
            )
        config.vision_config, config.qformer_config = vision_config_of(vision_model.config), qformer.config
        self.vision_model = vision_model
        self.qformer = qformer
        sizes = qformer.config.hidden_size, config.image_text_hidden_size
        self.vision_projection = nn.Linear(*sizes, dtype=dtype("vision_projection"))
        self.text_projection = nn.Linear(*sizes, dtype=dtype("text_projection"))
        self.itm_head = nn.Linear(qformer.config.hidden_size, 2, dtype=dtype("itm_head"))
        self.lm_head = QFormerLMHead(qformer.config).to(dtype("lm_head"))
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value, dtype=torch.float32))
        if config.itc_loss == "sigmoid":
            self._keep_in_fp32_modules_strict = ["logit_scale", "logit_bias"]
            self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_LOGIT_BIAS, dtype=torch.float32))
        self.post_init()
        self.loss_type = None  # type: ignore[assignment]
        self._freeze()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings of the texts, `[V, Dq]`."""
        return self.qformer.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Replace the embeddings of the texts."""
        self.qformer.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output layer of text generation, whose weights are the embeddings of the texts."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer of text generation."""
        self.lm_head.decoder = cast(nn.Linear, new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the size of the vocabulary as `PreTrainedModel.resize_token_embeddings` does."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        vars(self.config).pop("vocab_size", None)  # where transformers notes it
        self.qformer.config.vocab_size = embeddings.num_embeddings
        return embeddings

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the first part, as in captioners. The temperature is float32 whatever the parts are."""
        return dtype_of(self.vision_model)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, cast(float, self.config.logit_scale_init_value))
            if self.config.itc_loss == "sigmoid":
                init.constant_(self.logit_bias, SIGMOID_LOGIT_BIAS)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a model from a folder or the Hub, also a `Blip2ForImageTextRetrieval` of transformers.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub id.
            model_args, kwargs: as in [`~QFormerPreTrainedModel.from_pretrained`]. For a `Blip2ForImageTextRetrieval`
                also fields of the [`QFormerPretrainingConfig`].

        Returns:
            The model in evaluation mode. The vision encoder of a `Blip2ForImageTextRetrieval` is frozen. What such a
            checkpoint lacks, the output layer for texts and the temperature, is newly initialised, and a warning says
            so. Its `itg_weight` is therefore 0, unless the fields set it.

        Raises:
            OSError, TypeError, ValueError: as in [`~QFormerPreTrainedModel.from_pretrained`].

        Example:

        ```python
        >>> model = QFormerForPretraining.from_pretrained("Salesforce/blip2-itm-vit-g")  # doctest: +SKIP
        >>> model.match("photo.jpg", ["a dog", "a red car"])  # doctest: +SKIP
        tensor([[0.97, 0.02]])
        ```
        """
        source = pretrained_model_name_or_path
        hub_kwargs = {name: kwargs[name] for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
        if source is None or not is_retrieval_model(PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0]):
            return super().from_pretrained(source, *model_args, **kwargs)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub_kwargs)
            processor = QFormerPretrainingProcessor(load_image_processor(source, **hub_kwargs), tokenizer)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            logger.warning(f"The model gets no processor, because {source!s} has none ({reason}).")
            processor = None
        arguments = retrieval_arguments(source, processor and processor.tokenizer, **kwargs)
        loaded = super().from_pretrained(None, *model_args, **arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info=True`
        model.processor, model.name_or_path = processor, str(source)
        return loaded

    def card_facts(self) -> dict[str, Any]:
        """Return what the model card says: also whether the model has learned to caption."""
        return {**super().card_facts(), "writes_captions": bool(self.config.itg_weight)}

    # --- Features -----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        **vision_inputs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the vectors of images that are compared with those of texts, Q of each image.

        Args:
            pixel_values (`[B, 3, H, W]`, or `[B, F, 3, H, W]` for videos, float): images; or
            image_embeds (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos, float): their features.
            image_attention_mask (`[B, N]` or `[B, F, N]`, *optional*): 1 for a feature, 0 for padding.
            vision_inputs: further inputs that the processor returns for the images (`VISION_INPUTS`).

        Returns:
            An output with the vectors as `pooler_output` (`[B, Q, E]`, of length 1), and the query outputs as
            `last_hidden_state` (`[B, Q, Dq]`).

        Raises:
            ValueError: as `forward` does.
        """
        features, mask = self._features(pixel_values, image_embeds, image_attention_mask, **vision_inputs)
        rows = PackedRows(self._queries(len(features)), [])
        tokens = run_packed(self.qformer.encoder, rows, ImageKeys.project(self.qformer.encoder, features, mask))
        states, _ = rows.split(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self._image_vectors(states))

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Return the vectors of texts that are compared with those of images.

        Args:
            input_ids (`[M, T]`, long): texts as tokens, `[CLS] text [SEP]`, padded on the right.
            attention_mask (`[M, T]`, *optional*): 1 for a token, 0 for padding.

        Returns:
            An output with the vectors as `pooler_output` (`[M, E]`, of length 1), and the outputs of the tokens as
            `last_hidden_state` (`[M, T, Dq]`, 0 for padding).

        Raises:
            ValueError: if a text is empty or longer than the Q-Former reads.
        """
        texts = check_texts(input_ids, attention_mask, len(input_ids), self.qformer.config)
        rows = PackedRows(self._queries(len(input_ids))[:, :0], [self._embed(texts)])  # no queries
        _, (tokens,) = rows.split(run_packed(self.qformer.encoder, rows, ImageKeys.none(self.qformer.encoder)))
        states = tokens.new_zeros(*texts.mask.shape, tokens.shape[-1])
        states[texts.mask] = tokens
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self._text_vectors(states[:, 0]))

    def get_matching_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        image_of_text: torch.Tensor | None = None,
        **vision_inputs: Any,
    ) -> torch.Tensor:
        """Return the logits of not matching and of matching of pairs of a text and an image, `[R, 2]`.

        Args:
            input_ids, attention_mask (`[R, T]`, long): the text of each pair, `[CLS] text [SEP]`, padded on the right.
            pixel_values, image_embeds, image_attention_mask, vision_inputs: B images or their features, as in
                [`~QFormerForPretraining.get_image_features`].
            image_of_text (`[R]`, long, *optional*): the image of each text. By default text r belongs to image r. The
                keys and values of an image are computed once for all of its texts.

        Raises:
            ValueError: as `forward` does.
        """
        features, mask = self._features(pixel_values, image_embeds, image_attention_mask, **vision_inputs)
        keys = ImageKeys.project(self.qformer.encoder, features, mask)
        texts = check_texts(input_ids, attention_mask, len(input_ids), self.qformer.config)
        if image_of_text is None and len(features) == len(texts.ids):
            image_of_text = texts.image_of_text
        if image_of_text is None or image_of_text.shape != texts.image_of_text.shape:
            raise ValueError(
                f"There are {len(texts.ids)} texts and {len(features)} images: give the image of each text as "
                "`image_of_text`."
            )
        if not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < len(features):
            raise ValueError(f"`image_of_text` must be numbers of images from 0 to {len(features) - 1}.")
        return self._matching_logits(TextBatch(texts.ids, texts.mask, image_of_text), keys, len(features))

    # --- Retrieval ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def similarity(
        self,
        images: ImageInput | Iterable[ImageInput] | None = None,
        texts: str | Sequence[str] = (),
        *,
        image_embeds: torch.Tensor | Sequence[Any] | None = None,
    ) -> torch.Tensor:
        """Return how similar images and texts are by their vectors, between -1 and 1.

        Args:
            images: an image, or several, as in [`~QFormerCaptioner.caption`].
            texts (`str` or list of `str`): texts.
            image_embeds (*optional*): features in place of images: one row (`[N, Dv]`), a list of rows, or a batch.

        Returns:
            `[images, texts]`, float32: the cosine of the angle between the text and the nearest query of the image.

        Raises:
            OSError: if an image cannot be read; the message names it.
            TypeError: if an image or a text has another type.
            ValueError: if the model has no processor, there are no images or texts, or a text is too long.

        Example:

        ```python
        >>> model.similarity(["dog.jpg", "cat.jpg"], "a dog in the snow")  # doctest: +SKIP
        tensor([[0.41],
                [0.12]])
        ```
        """
        image_inputs, text_inputs = self._inputs(images, texts, image_embeds)
        ids, mask = (text_inputs[name].split(TEXTS_OF_A_PASS) for name in ("input_ids", "attention_mask"))
        blocks = zip(ids, mask, strict=True)
        text_vectors = torch.cat([self.get_text_features(*block).pooler_output for block in blocks])  # [M, E]
        rows = []
        for inputs in image_inputs:
            vectors = self.get_image_features(**inputs).pooler_output  # [b, Q, E]
            parts = text_vectors.split(max(1, MAX_SIMILARITIES // vectors.shape[:2].numel()))
            rows.append(torch.cat([(vectors @ part.t()).amax(dim=1) for part in parts], dim=1).float())
        return torch.cat(rows)

    @torch.no_grad()
    def match(
        self,
        images: ImageInput | Iterable[ImageInput] | None = None,
        texts: str | Sequence[str] = (),
        *,
        image_embeds: torch.Tensor | Sequence[Any] | None = None,
    ) -> torch.Tensor:
        """Return the probability that each text describes each image, between 0 and 1.

        The Q-Former reads every pair of an image and a text, so this is more exact and much slower than
        [`~QFormerForPretraining.similarity`].

        Args:
            images, texts, image_embeds: as in [`~QFormerForPretraining.similarity`].

        Returns:
            `[images, texts]`, float32.

        Raises:
            OSError, TypeError, ValueError: as in [`~QFormerForPretraining.similarity`].

        Example:

        ```python
        >>> model.match("dog.jpg", ["a dog in the snow", "a cat on a bed"])  # doctest: +SKIP
        tensor([[0.98, 0.01]])
        ```
        """
        image_inputs, text_inputs = self._inputs(images, texts, image_embeds)
        count = len(text_inputs["input_ids"])
        texts_of_batch = check_texts(**text_inputs, num_images=count, config=self.qformer.config)
        rows = []
        for inputs in image_inputs:
            features, mask = self._features(**inputs)
            keys = ImageKeys.project(self.qformer.encoder, features, mask)
            num_pairs, logits = len(features) * count, []
            for start in range(0, num_pairs, PAIRS_OF_A_PASS):
                pairs = torch.arange(start, min(start + PAIRS_OF_A_PASS, num_pairs), device=features.device)
                image_of_pair = pairs // count
                own = slice(start // count, int(image_of_pair[-1]) + 1)
                own_keys = keys.select(own, [tensor[own] for tensor in keys.tensors()])
                chunk = texts_of_batch.select(pairs % count, image_of_pair - own.start)
                logits.append(self._matching_logits(chunk, own_keys, own.stop - own.start))
            rows.append(torch.cat(logits).float().softmax(dim=1)[:, 1].view(len(features), count))
        return torch.cat(rows)

    def _inputs(
        self,
        images: ImageInput | Iterable[ImageInput] | None,
        texts: str | Sequence[str],
        image_embeds: torch.Tensor | Sequence[Any] | None,
    ) -> tuple[Iterator[dict[str, Any]], dict[str, torch.Tensor]]:
        """Return images or features in blocks, which are opened one after another, and all texts, as inputs."""
        if self.processor is None:
            raise ValueError(
                "This model has no processor. Set `model.processor = QFormerPretrainingProcessor(image_processor, "
                "tokenizer)`, or load the model from a folder with a processor."
            )
        if images is None and image_embeds is None:
            raise ValueError("There are no images: pass `images`, or features as `image_embeds`.")
        if images is not None and image_embeds is not None:
            raise ValueError("Pass either `images` or their features (`image_embeds`), not both.")
        if not texts:
            raise ValueError("There are no texts: pass at least one as `texts`.")
        name, rows = "images", cast(Any, flatten_images(images))
        if image_embeds is not None:
            is_one = getattr(image_embeds, "ndim", None) == 2  # an array
            name, rows = "image_embeds", [image_embeds] if is_one else image_embeds
        if len(rows) == 0:
            raise ValueError(f"There are no images: `{name}` is empty.")
        device = self.qformer.query_tokens.device
        nothing = {"pixel_values": None, "image_embeds": None, "image_attention_mask": None}
        blocks = (rows[start : start + IMAGES_OF_A_PASS] for start in range(0, len(rows), IMAGES_OF_A_PASS))
        image_inputs = ({**nothing, **self.processor(**{name: block}).to(device)} for block in blocks)
        return image_inputs, dict(self.processor(text=texts).to(device))

    # --- Parts of the passes ------------------------------------------------------------------------------------------

    def _features(
        self,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        image_attention_mask: torch.Tensor | None,
        **vision_inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the features of images `[B, N, Dv]`, and their mask, bool `[B, N]` or `None`."""
        outputs = features_of_inputs(
            self.vision_model, pixel_values, image_embeds, image_attention_mask, **vision_inputs
        )
        return self.qformer.prepare_features(outputs.last_hidden_state, outputs.attention_mask)

    def _queries(self, num_rows: int) -> torch.Tensor:
        """Return the embedded query tokens of rows, `[R, Q, Dq]`."""
        queries = self.qformer.layernorm(self.qformer.query_tokens)
        return self.qformer.dropout(queries.expand(num_rows, -1, -1))

    def _embed(self, texts: TextBatch, rows: torch.Tensor | None = None, **attention: bool) -> Texts:
        """Embed texts, and say which tokens they attend to. By default the texts of an image are in its row."""
        states = self.qformer.dropout(self.qformer.layernorm(self.qformer.embeddings(texts.ids)))
        return Texts(states, texts.mask, texts.image_of_text if rows is None else rows, **attention)

    def _matching_logits(self, pairs: TextBatch, keys: ImageKeys, num_images: int) -> torch.Tensor:
        """Return the matching logits `[R, 2]` of texts and their images, of which there are keys and values."""
        numbers = torch.arange(len(pairs.ids), device=pairs.ids.device)
        texts = self._embed(pairs, rows=numbers, attend_to_queries=True, attended_by_queries=True)
        rows = PackedRows(self._queries(len(numbers)), [texts], pairs.image_of_text, num_images)
        states, _ = rows.split(run_packed(self.qformer.encoder, rows, keys))
        return self.itm_head(states.mean(dim=1))  # LAVIS takes the mean of the logits of all queries

    def _image_vectors(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.vision_projection(states), dim=-1)

    def _text_vectors(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.text_projection(states), dim=-1)
