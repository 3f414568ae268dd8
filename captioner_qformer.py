"""Base class of captioners: a model of saving_qformer.py whose second backbone is a language model.

The class joins the backbones, loads and saves them, and quantises the language model. modeling_qformer.py subclasses it
and defines the computation.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbones_qformer import (
    BACKBONES,
    bits_and_bytes_config,
    commit_of,
    embedding_weights,
    is_frozen,
    is_quantized,
    load_backbone,
    quantize,
    single_device,
    vision_model_or_width,
)
from .cards_qformer import PushWithCaptionerCard
from .configuration_qformer import QFormerCaptionerConfig, QFormerConfig
from .encoders_qformer import image_feature_size, num_frames_of
from .processing_qformer import QFormerCaptionerProcessor
from .querying_qformer import QFormerModel, check_qformer_arguments
from .saving_qformer import QFormerPreTrainedModel
from .weights_qformer import ties_of


class QFormerCaptionerPreTrainedModel(PushWithCaptionerCard, QFormerPreTrainedModel):
    """Base class that loads and saves a captioner, and answers for its language model.

    Subclasses set `vision_model` and `language_model`, and their constructor accepts both as keywords.
    """

    config_class = QFormerCaptionerConfig
    processor_class = QFormerCaptionerProcessor
    backbones = BACKBONES
    config: QFormerCaptionerConfig
    qformer: QFormerModel
    language_projection: nn.Module
    language_model: PreTrainedModel
    processor: QFormerCaptionerProcessor | None

    # --- Loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, quantization_config=None, **kwargs):
        """Load a captioner from a folder or the Hub, and fetch the backbones that it keeps by reference.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub id.
            quantization_config (`BitsAndBytesConfig` or `dict`, *optional*): quantise the language model, and freeze it
                ([`~QFormerCaptioner.quantize_language_model`]). `device_map` must then be a single device.
            model_args, kwargs: passed to [`QFormerPreTrainedModel.from_pretrained`] (`config`, `dtype`,
                `load_vision_model`, `device_map`, `revision`, `token`, ...).

        Returns:
            The captioner in evaluation mode. Backbones that were frozen when it was saved are frozen again.

        Raises:
            OSError: if the captioner or one of its backbones cannot be fetched; the message names it. Also for another
                kind of model, and for an adapter that does not name its captioner.
            ValueError: if `load_vision_model=False` and the vision encoder could not be fetched later, or if a
                quantised captioner would be spread over devices.

        Example:

        ```python
        >>> model = QFormerCaptioner.from_pretrained("outputs/scenes")  # doctest: +SKIP
        >>> model.caption("photo.jpg")  # doctest: +SKIP
        'a small red circle to the left of a blue square'
        ```
        """
        if quantization_config is not None:
            device = single_device(kwargs.pop("device_map", None))

            def quantize_loaded(model: QFormerCaptionerPreTrainedModel) -> None:
                model.language_model.requires_grad_(False)
                model.quantize_language_model(quantization_config, device)

            kwargs["before_adapter"] = quantize_loaded
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def quantize_language_model(
        self, quantization_config: BitsAndBytesConfig | dict[str, Any], device: str | int | torch.device | None = None
    ) -> None:
        """Quantise the linear layers of the frozen language model to 4 or 8 bits, to save memory.

        The vision encoder, the Q-Former and the projection keep their dtype. They are small, and a Q-Former in 8 bits
        gave empty captions (huggingface/transformers#30383). Gradients pass through the quantised layers, so the
        Q-Former or LoRA adapters can train. The whole captioner moves to the device of the quantised layers.

        Args:
            quantization_config (`BitsAndBytesConfig` or `dict`): `load_in_4bit=True` or `load_in_8bit=True`, and its
                options.
            device (`str`, `int` or `torch.device`, *optional*): defaults to the GPU, or to the CPU without one.

        Raises:
            ImportError: if bitsandbytes is not installed.
            ValueError: if the language model is trainable, or `quantization_config` is of another kind.

        Example:

        ```python
        >>> from transformers import BitsAndBytesConfig
        >>> model.quantize_language_model(BitsAndBytesConfig(load_in_4bit=True))  # doctest: +SKIP
        ```
        """
        if not is_frozen(self.language_model):
            raise ValueError(
                "A quantised language model cannot train. Save the captioner, load the folder with "
                "`from_pretrained(folder, quantization_config=...)`, and train LoRA adapters on it."
            )
        quantization_config = bits_and_bytes_config(quantization_config)
        if not self._matches_name("language_model", self.state_dict()):  # its rounded weights have no other source
            self.config.language_model_name_or_path = self.config.language_model_revision = None
        self.language_model = quantize(self.language_model, quantization_config, device).requires_grad_(False)
        self._take_fingerprints(["language_model"])  # an adapter may be merged into the quantised weights
        self.config.text_config = self.language_model.config
        # peft chooses the kind of adapter by these attributes of the whole model.
        self.is_loaded_in_4bit = quantization_config.load_in_4bit
        self.is_loaded_in_8bit = quantization_config.load_in_8bit
        referenced = set(self.config.referenced_backbones or [])
        if self.config.language_model_name_or_path is not None:
            referenced.add("language_model")
        self._keep_by_reference(sorted(referenced, key=self.backbones.index))
        self.to(self.language_model.device)  # type: ignore[arg-type]

    def _backbones_to_reference(self, included: Sequence[str], weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the frozen backbones that a folder can keep by reference, because their weights have not changed.

        Raises:
            ValueError: if a quantised language model would have to be saved.
        """
        referenced = super()._backbones_to_reference(included, weights)
        only_adapters = self._hf_peft_config_loaded
        if is_quantized(self.language_model) and "language_model" not in referenced and not only_adapters:
            raise ValueError(
                "A quantised language model has rounded weights, which are not saved: keep it by reference "
                "(`include_backbones=False`), or load the captioner without `quantization_config`, and merge adapters "
                "into it there."
            )
        return referenced

    def _config_to_save(self, included: Sequence[str], referenced: Sequence[str]) -> QFormerCaptionerConfig:
        """Return a copy of the configuration that describes the folder to write."""
        config = cast(QFormerCaptionerConfig, super()._config_to_save(included, referenced))
        # Loading ties the output layer to the embedding by this field, which an adapter or a new layer does not change.
        cast(PreTrainedConfig, config.text_config).tie_word_embeddings = bool(ties_of(self.language_model))
        return config

    # --- From two pretrained models -----------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | None,
        language: str | os.PathLike,
        *,
        encoder_hidden_size: int | None = None,
        vision_revision: str | None = None,
        language_revision: str | None = None,
        qformer: QFormerModel | None = None,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        freeze_vision_model: bool = True,
        freeze_language_model: bool = True,
        load_vision_model: bool = True,
        dtype: str | torch.dtype = "auto",
        prompt: str = "",
        projection_per_query: bool = False,
        **qformer_fields,
    ) -> Self:
        r"""Join two pretrained models with a new or a given Q-Former and a new projection.

        Args:
            vision, language (`str`): Hub ids or folders of a vision encoder and a language model. `vision` is `None`
                for a captioner that reads only features (`image_embeds`), of any other encoder.
            encoder_hidden_size (`int`, *optional*): width of the features, if `vision` is `None`.
            vision_revision, language_revision (`str`, *optional*): branches, tags or commits on the Hub.
            qformer ([`QFormerModel`], *optional*): pretrained Q-Former, which becomes a part of the captioner. Load one
                with `qformer_captioner.hub.convert.load_qformer`. If it was trained with image features of another
                width, its cross-attention weights are newly initialised and a warning says so.
            qformer_tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer of a Q-Former that reads the prompt
                (`use_qformer_text_input=True`).
            freeze_vision_model, freeze_language_model (`bool`, defaults to `True`): whether to freeze the backbone.
            load_vision_model (`bool`, defaults to `True`): `False` leaves the vision encoder out of memory, to train on
                precomputed features. [`~QFormerCaptioner.load_vision_model`] fetches it later.
            dtype (`str` or `torch.dtype`, defaults to `"auto"`): dtype of frozen backbones; "auto" is the dtype of each
                saved backbone. All trainable parts are float32.
            prompt (`str`, defaults to `""`): default text between the image and the caption.
            projection_per_query (`bool`, defaults to `False`): give each query its own projection.
            qformer_fields: fields of the [`QFormerConfig`] of a new Q-Former, such as `num_query_tokens=16`.

        Returns:
            The captioner in evaluation mode, with its processor.

        Raises:
            OSError: if a backbone cannot be fetched; the message names it.
            TypeError: for a keyword that is not a field of [`QFormerConfig`], fields beside a given `qformer`, or a
                `qformer` that is not a [`QFormerModel`]. Also for neither a vision encoder nor a width, or for both.
            ValueError: if a Q-Former that reads the prompt has no `qformer_tokenizer`.

        Example:

        ```python
        >>> model = QFormerCaptioner.from_backbones(
        ...     "facebook/dinov2-small", "HuggingFaceTB/SmolLM2-135M", num_hidden_layers=4, num_query_tokens=16
        ... )  # doctest: +SKIP
        ```
        """
        check_qformer_arguments(qformer, qformer_fields)
        qformer_config = QFormerConfig.from_fields(**qformer_fields) if qformer is None else qformer.config
        if qformer_config.use_qformer_text_input and qformer_tokenizer is None:
            raise ValueError(
                "The Q-Former reads the prompt: pass its tokenizer as `qformer_tokenizer`, such as "
                '`AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")`.'
            )
        vision_model = vision_model_or_width(vision, encoder_hidden_size, vision_revision, dtype, load_vision_model)
        language_model = load_backbone("language_model", os.fspath(language), language_revision, dtype)
        assert isinstance(language_model, PreTrainedModel)  # and not a placeholder
        if qformer is not None:
            qformer.float().resize_image_features(image_feature_size(vision_model.config))
        config = QFormerCaptionerConfig(
            vision_config=vision_model.config,
            qformer_config=qformer_config,
            text_config=language_model.config,
            vision_model_name_or_path=vision_model.config.name_or_path or None,
            vision_model_revision=None if vision is None else commit_of(vision, vision_revision),
            language_model_name_or_path=language_model.config.name_or_path,
            language_model_revision=commit_of(language, language_revision),
            freeze_vision_model=freeze_vision_model,
            freeze_language_model=freeze_language_model,
            projection_per_query=projection_per_query,
        )
        # Only the special tokens of the language model's decoding defaults are kept. A chat model ends at one of
        # several tokens.
        config.keep_special_tokens(cast(GenerationConfig, language_model.generation_config))
        model = cls(config, vision_model=vision_model, qformer=qformer, language_model=language_model)
        model.processor = QFormerCaptionerProcessor.from_backbones(
            vision,
            language,
            vision_revision,
            language_revision,
            prompt,
            config.is_encoder_decoder,
            num_frames_of(vision_model.config) or qformer_config.num_frames,
        )
        model.processor.qformer_tokenizer = qformer_tokenizer
        model._fit_to_backbones()
        frozen = model.frozen_backbones()
        model._keep_by_reference([part for part in frozen if part != "vision_model" or vision is not None])
        model._take_fingerprints(BACKBONES)
        return model.eval()

    @torch.no_grad()
    def _fit_to_backbones(self) -> None:
        """Convert trainable backbones to float32, and scale the norm of the soft prompt to that of the embeddings."""
        for part in BACKBONES:
            if not is_frozen(getattr(self, part)):
                getattr(self, part).float()  # bfloat16 is too coarse for small weight updates
        # Soft-prompt vectors start with three times the embedding norm. Training increases the norm much further, but
        # random vectors with a large norm would first have to be unlearned.
        embedding_std = embedding_weights(self.language_model).float().std().item()
        nn.init.normal_(
            self.language_projection.get_parameter("weight"),
            std=3 * embedding_std / self.qformer.config.hidden_size**0.5,
        )

    # --- The mode -----------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the mode as `nn.Module.train` does, but keep frozen backbones in evaluation mode, without dropout."""
        super().train(mode)
        # NEFTune of the Trainer adds noise to embeddings in training mode. The mode changes nothing else in them.
        self.get_input_embeddings().training = mode
        if self.language_model.is_activation_checkpointing:
            # transformers recomputes the activations of a layer only if the layer is in training mode. The mode changes
            # nothing else, except in layers that apply dropout themselves (OPT, BART), which are left out.
            for layer in self.language_model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    dropouts = [rate for name, rate in vars(layer).items() if "dropout" in name]
                    layer.training = mode and not any(dropouts)
        return self

    # --- The language model's layers ----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embeddings of the language model, `[V, D]`."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer of the language model, which computes the logits."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer of the language model."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder of the language model, or of `modality="image"` the vision encoder.

        A decoder-only language model answers with itself, as in transformers.
        """
        if modality is None:
            return self.language_model.get_encoder()
        return super().get_encoder(modality)

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        """Replace the module that [`~QFormerCaptioner.get_encoder`] returns."""
        if modality is None:
            self.language_model.set_encoder(encoder)
        else:
            super().set_encoder(encoder, modality)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:  # type: ignore[override]
        """Resize the vocabulary of the language model, as `PreTrainedModel.resize_token_embeddings` does."""
        embeddings = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.config.get_text_config().vocab_size
        return embeddings
