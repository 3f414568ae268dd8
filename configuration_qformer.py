"""Configurations of a Q-Former, of a captioner, and of a Q-Former in pretraining.

Fields are named as in transformers' `Blip2QFormerConfig` and `Blip2Config` if they have the same meaning. All classes
are ordinary transformers configurations: keyword arguments with checked types, saved as JSON.
"""

import copy
import difflib
import math
import os
from dataclasses import fields
from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .encoders_qformer import PrecomputedFeaturesConfig, image_feature_size, reads_videos, vision_config_of

SPECIAL_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


@strict
class QFormerConfig(PreTrainedConfig):
    r"""Configuration of a [`QFormerModel`] (BLIP-2, arXiv 2301.12597). The defaults are those of BLIP-2.

    Args:
        num_query_tokens (`int`, *optional*, defaults to 32):
            Number of learned query tokens, which is the length of the soft prompt.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the hidden states. Must be a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of transformer layers.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads in each layer.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the feed-forward layers.
        cross_attention_frequency (`int`, *optional*, defaults to 2):
            Add cross-attention to the image features in every n-th layer, beginning with the first.
        encoder_hidden_size (`int`, *optional*, defaults to 1408):
            Width of the image features. A captioner sets it to the width of its vision encoder.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward layers.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout after the embeddings and after each sub-layer.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of the attention weights.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of random weights, including the query tokens.
        attention_initializer_range (`float`, *optional*):
            Standard deviation of the random value and output weights of attention. Defaults to `initializer_range`.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of the layer norms.
        use_qformer_text_input (`bool`, *optional*, defaults to `False`):
            Let the Q-Former read the prompt, as InstructBLIP's does (arXiv 2305.06500). Prompt tokens join the
            self-attention of the queries and have their own feed-forward layers. Only queries attend to the image.
        vocab_size (`int`, *optional*, defaults to 30522):
            Vocabulary size of the Q-Former's tokenizer (BERT's), for `use_qformer_text_input`.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Maximum length of a prompt in tokens, for `use_qformer_text_input`.
        num_frames (`int`, *optional*, defaults to 1):
            Largest number of frames of a video. If it is above 1, the features of each frame get a learned embedding.
        window_size (`int`, *optional*):
            Number of features in a window, as in Granite Speech (arXiv 2505.08699) and SALMONN (arXiv 2310.13289). The
            Q-Former is applied to each window. The soft prompt has `num_query_tokens` vectors for each, so it grows
            with the input. By default all features form one window.
        pooled_grid_size (`int`, *optional*):
            Average the patches of an image to a grid of this many rows and columns, and normalise the features. With
            few training images, a Q-Former generalises better from fewer features. The features must be a square grid
            of patches after `num_prefix_tokens` others. By default all features are kept.
        num_prefix_tokens (`int`, *optional*, defaults to 1):
            Number of features in front of the patches, which `pooled_grid_size` keeps: class token and registers.
        feature_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the image features.

    Raises:
        StrictDataclassClassValidationError: if a size is not positive, or if `hidden_size` is not a multiple of
            `num_attention_heads`. transformers wraps a `ValueError` in this type.

    Example:

    ```python
    >>> from qformer_captioner import QFormerConfig
    >>> QFormerConfig(num_hidden_layers=4, hidden_size=384, num_attention_heads=6).num_query_tokens
    32
    ```
    """

    model_type = "qformer"
    base_config_key = "qformer_config"

    num_query_tokens: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    attention_initializer_range: float | None = None
    layer_norm_eps: float = 1e-12
    use_qformer_text_input: bool = False
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    num_frames: int = 1
    window_size: int | None = None
    pooled_grid_size: int | None = None
    num_prefix_tokens: int = 1
    feature_dropout_prob: float = 0.0

    @classmethod
    def field_names(cls) -> set[str]:
        """Return the names of the fields above, without those that every configuration has."""
        return {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}

    @classmethod
    def from_fields(cls, **values: Any) -> "QFormerConfig":
        """Create a configuration and refuse unknown keywords, which the constructor would keep as extra attributes.

        Raises:
            TypeError: if a keyword is not a field; the message names the nearest field.

        Example:

        ```python
        >>> QFormerConfig.from_fields(num_query_token=16)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: 'num_query_token' is not a field of QFormerConfig: did you mean 'num_query_tokens'?
        ```
        """
        known = cls.field_names()
        for name in set(values) - known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"the fields are {', '.join(sorted(known))}."
            raise TypeError(f"{name!r} is not a field of QFormerConfig: {hint}")
        # JSON and YAML write a probability of 0 without a decimal point.
        floats = {name: float(value) for name, value in values.items() if type(getattr(cls, name)) is float}
        return cls(**{**values, **floats})

    def validate_architecture(self) -> None:
        """Check the sizes. transformers calls this method on construction and on saving.

        Raises:
            ValueError: if a size is less than 1, or `hidden_size` is not a multiple of `num_attention_heads`.
        """
        if self.num_prefix_tokens < 0:
            raise ValueError(f"`num_prefix_tokens` must be at least 0, got {self.num_prefix_tokens}.")
        for field in (
            "num_query_tokens",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "cross_attention_frequency",
            "encoder_hidden_size",
            "num_frames",
            "window_size",
            "pooled_grid_size",
        ):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads})."
            )


@strict
class VisionQFormerConfig(PreTrainedConfig):
    r"""Base class for configurations of a model that has a vision encoder and a Q-Former, and perhaps other parts.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to CLIP ViT-B/32):
            Configuration of a vision encoder of transformers. For a larger model (CLIP, SigLIP, LLaVA) it is the
            configuration of its vision encoder. For a model without a vision encoder it is a
            [`PrecomputedFeaturesConfig`].
        qformer_config (`dict` or [`QFormerConfig`], *optional*):
            Configuration of the Q-Former. Its `encoder_hidden_size` is set to the width of the vision encoder.
        vision_model_name_or_path, vision_model_revision, freeze_vision_model, referenced_backbones, dtypes:
            See the subclasses.
        bos_token_id, eos_token_id, pad_token_id (*optional*): special tokens of captions.

    Attributes:
        auto_classes (`dict[str, str]`): class of this model for each Auto class.
    """

    # Parts of messages. `usage` helps somebody who loads such a model as another one, and `alternative` somebody who
    # loads a model of another package as such a model.
    kind: ClassVar[str]
    usage: ClassVar[str]
    alternative: ClassVar[str]
    auto_classes: ClassVar[dict[str, str]]

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    vision_model_name_or_path: str | None = None
    vision_model_revision: str | None = None
    freeze_vision_model: bool = False
    referenced_backbones: list[str] | None = None
    dtypes: dict[str, str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        vision = self.vision_config
        if isinstance(vision, dict) and vision.get("model_type") == PrecomputedFeaturesConfig.model_type:
            self.vision_config = PrecomputedFeaturesConfig.from_dict(vision)  # `AutoConfig` does not know the class
        for name in self.sub_configs_defaults:
            # A copy, because transformers resets the attention implementation of the parts of a configuration. Models
            # that the caller built would lose theirs, and attend to padding.
            setattr(self, name, copy.deepcopy(getattr(self, name)))
            if name != "qformer_config":  # of this package
                check_model_type(name, getattr(self, name))
        super().__post_init__(**kwargs)  # turns dictionaries into configurations
        self.vision_config = vision_config_of(self.vision_config)
        self.qformer_config.encoder_hidden_size = image_feature_size(self.vision_config)
        if reads_videos(self.vision_config):
            self.qformer_config.num_frames = 1  # the encoder returns one sequence for all frames, which it tells apart
        if getattr(self, "auto_map", None) is None:
            # A class can register itself for a single Auto class. This map lets all of them open a folder in a process
            # that has not imported this package.
            self.auto_map = dict(self.auto_classes)

    @classmethod
    def field_names(cls) -> set[str]:
        """Return the names of the fields of this class, without those that every configuration has."""
        return {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}

    @property
    def has_vision_model(self) -> bool:
        """Return False for a model that reads only features, of an encoder that is not a part of it."""
        return cast(PreTrainedConfig, self.vision_config).model_type != PrecomputedFeaturesConfig.model_type

    @classmethod
    def check_source(cls, source: str | os.PathLike, hub_kwargs: dict[str, Any]) -> None:
        """Check that a folder or Hub repository holds the configuration of this kind of model.

        Raises:
            OSError: if it holds another model; the message names its type.
        """
        model_type = cls.get_config_dict(str(source), **hub_kwargs)[0].get("model_type")
        if model_type in (None, cls.model_type):
            return
        for other in (QFormerCaptionerConfig, QFormerPretrainingConfig):
            if model_type == other.model_type:
                raise OSError(f"{os.fspath(source)!r} holds a {other.kind} and not a {cls.kind}: {other.usage}.")
        if model_type == QFormerConfig.model_type and cls is QFormerPretrainingConfig:
            raise OSError(
                f"{os.fspath(source)!r} holds a Q-Former alone. If an earlier `qformer-captioner convert` wrote it "
                "from a Blip2ForImageTextRetrieval, convert that again; otherwise build a model with "
                "`QFormerForPretraining.from_backbones(..., qformer=...)`."
            )
        raise OSError(
            f"{os.fspath(source)!r} holds a model of the type {model_type!r} and not a {cls.kind}: {cls.alternative}."
        )


@strict
class QFormerCaptionerConfig(VisionQFormerConfig):
    r"""Configuration of a [`QFormerCaptioner`]: its three models, and where its two backbones came from.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to CLIP ViT-B/32):
            Configuration of a vision encoder of transformers. For a larger model (CLIP, SigLIP, LLaVA) it is the
            configuration of its vision encoder. For a captioner without a vision encoder it
            is a [`PrecomputedFeaturesConfig`].
        qformer_config (`dict` or [`QFormerConfig`], *optional*):
            Configuration of the Q-Former. Its `encoder_hidden_size` is set to the width of the vision encoder.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to T5-small):
            Configuration of a language model that `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` can build.
        vision_model_name_or_path, language_model_name_or_path (`str`, *optional*):
            Hub id or folder that the backbone was loaded from. `None` if it was trained from scratch.
        vision_model_revision, language_model_revision (`str`, *optional*):
            Commit of the Hub repository that the backbone was loaded from.
        freeze_vision_model, freeze_language_model (`bool`, *optional*, defaults to `False`):
            Whether the backbone is frozen. A frozen backbone receives no gradients and stays in evaluation mode.
        projection_per_query (`bool`, *optional*, defaults to `False`):
            Whether each query has its own projection into the language model. BLIP-2 has one projection for all.
        referenced_backbones (`list[str]`, *optional*):
            Backbones kept by reference, of `"vision_model"` and `"language_model"`: the folder of this configuration
            does not hold their weights. Written by `save_pretrained`.
        dtypes (`dict[str, str]`, *optional*):
            Dtype of each part, such as `{"qformer": "float32", "language_model": "bfloat16"}`. Written by
            `save_pretrained`, because transformers itself saves one dtype for the whole model.
        bos_token_id, eos_token_id, pad_token_id, decoder_start_token_id, forced_bos_token_id, forced_eos_token_id \
        (`int` or `list[int]`, *optional*):
            Special tokens of captions, for training and wherever a `GenerationConfig` does not set them. Each defaults
            to the language model's.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, GPT2Config
    >>> from qformer_captioner import QFormerCaptionerConfig
    >>> config = QFormerCaptionerConfig(vision_config=CLIPVisionConfig(hidden_size=384), text_config=GPT2Config())
    >>> config.qformer_config.encoder_hidden_size, config.is_encoder_decoder
    (384, False)
    ```
    """

    model_type = "qformer_captioner"
    kind = "captioner"
    usage = "load it with `QFormerCaptioner`"
    alternative = (
        "load it with `AutoModel`, or join a vision encoder and a language model with `QFormerCaptioner.from_backbones`"
    )
    auto_classes = {
        "AutoConfig": "configuration_qformer.QFormerCaptionerConfig",
        "AutoModel": "modeling_qformer.QFormerCaptioner",
        "AutoModelForImageTextToText": "modeling_qformer.QFormerCaptioner",
        "AutoModelForMultimodalLM": "modeling_qformer.QFormerCaptioner",
        "AutoProcessor": "processing_qformer.QFormerCaptionerProcessor",
    }
    # The Trainer leaves these outputs out of its predictions, which are then the logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "losses",
        "soft_prompt",
        "vision_outputs",
        "qformer_outputs",
        "language_model_outputs",
    ]
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "qformer_config": QFormerConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="t5"),
    }

    text_config: dict | PreTrainedConfig | None = None
    language_model_name_or_path: str | None = None
    language_model_revision: str | None = None
    freeze_language_model: bool = False
    projection_per_query: bool = False
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | list[int] | None = None
    forced_eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("tie_word_embeddings", None)  # that of the language model
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = self.text_config.is_encoder_decoder
        for name in SPECIAL_TOKENS:  # the Trainer pads gathered captions with `pad_token_id`
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.text_config, name, None))

    @property
    def tie_word_embeddings(self) -> bool:
        """Return True if the output layer of the language model is its input embedding. peft reads and sets it."""
        if not getattr(self.text_config, "scale_decoder_outputs", True):
            return False  # T5 v1.1 and Flan-T5, whose own field says `True` (`untie_t5_head`)
        return getattr(self.text_config, "tie_word_embeddings", False)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        cast(PreTrainedConfig, self.text_config).tie_word_embeddings = value

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, in which peft looks for `tie_word_embeddings`."""
        return {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    def keep_special_tokens(self, generation_config: GenerationConfig) -> None:
        """Take over the special tokens of decoding defaults, so that they outlive a new `GenerationConfig`."""
        for name, value in special_tokens_of(generation_config).items():
            setattr(self, name, value)


@strict
class QFormerPretrainingConfig(VisionQFormerConfig):
    r"""Configuration of a [`QFormerForPretraining`] (stage 1 of BLIP-2, arXiv 2301.12597, section 3.2).

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to CLIP ViT-B/32):
            Configuration of a vision encoder of transformers. For a larger model (CLIP, SigLIP, LLaVA) it is the
            configuration of its vision encoder. For a model without a vision encoder it is a
            [`PrecomputedFeaturesConfig`].
        qformer_config (`dict` or [`QFormerConfig`], *optional*):
            Configuration of the Q-Former. Its `encoder_hidden_size` is set to the width of the vision encoder, and its
            `use_qformer_text_input` to `True`. It cannot have a `window_size`.
        vision_model_name_or_path (`str`, *optional*):
            Hub id or folder that the vision encoder was loaded from. `None` if it was trained from scratch.
        vision_model_revision (`str`, *optional*):
            Commit of the Hub repository that the vision encoder was loaded from.
        freeze_vision_model (`bool`, *optional*, defaults to `False`):
            Whether the vision encoder is frozen. It then receives no gradients and stays in evaluation mode.
        image_text_hidden_size (`int`, *optional*, defaults to 256):
            Width E of the vectors of images and texts that are compared.
        itc_loss (`str`, *optional*, defaults to `"softmax"`):
            Image-text contrastive loss: `"softmax"` as in BLIP-2, or `"sigmoid"` as in SigLIP (arXiv 2303.15343).
        itc_weight, itm_weight, itg_weight (`float`, *optional*, defaults to 1.0):
            Weights of the image-text contrastive loss, the image-text matching loss and the loss of image-grounded text
            generation. A loss of weight 0 is not computed.
        label_smoothing (`float`, *optional*, defaults to 0.1):
            Label smoothing of the softmax contrastive loss and of text generation, from 0 up to but not including 1.
        logit_scale_init_value (`float`, *optional*):
            Logarithm of the factor of similarities in a new model. Defaults to ln(1/0.07), or to ln(10) with
            `itc_loss="sigmoid"`.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the output layer of text generation is the word embedding of the Q-Former, as in BERT.
        referenced_backbones (`list[str]`, *optional*):
            `["vision_model"]` if the vision encoder is kept by reference: the folder of this configuration does not
            hold its weights. Written by `save_pretrained`.
        dtypes (`dict[str, str]`, *optional*):
            Dtype of each part, such as `{"vision_model": "bfloat16", "qformer": "float32"}`. Written by
            `save_pretrained`, because transformers itself saves one dtype for the whole model.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*):
            Token that starts a caption (`[DEC]` of BLIP-2), the token that ends it (`[SEP]`), and padding.

    Raises:
        StrictDataclassClassValidationError: for another `itc_loss`, a negative weight, three weights of 0, or a
            `label_smoothing` outside its range. Also for a `window_size`, or a width below 1.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig
    >>> from qformer_captioner import QFormerPretrainingConfig
    >>> config = QFormerPretrainingConfig(vision_config=CLIPVisionConfig(hidden_size=384), itc_loss="sigmoid")
    >>> config.qformer_config.use_qformer_text_input, round(config.logit_scale_init_value, 2)
    (True, 2.3)
    ```
    """

    model_type = "qformer_pretraining"
    kind = "Q-Former in pretraining"
    usage = (
        "load it with `QFormerForPretraining`, or train a captioner that begins with its Q-Former "
        "(`--qformer_name_or_path`)"
    )
    alternative = "load it with `AutoModel`, or build a new model with `QFormerForPretraining.from_backbones`"
    auto_classes = {
        "AutoConfig": "configuration_qformer.QFormerPretrainingConfig",
        "AutoModel": "pretraining_qformer.QFormerForPretraining",
        "AutoProcessor": "processing_qformer.QFormerPretrainingProcessor",
    }
    # The Trainer leaves these outputs out of its predictions, which are then the similarities.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "itc_loss",
        "itm_loss",
        "itg_loss",
        "logits_per_text",
        "itm_logits",
        "negative_images",
        "negative_texts",
        "image_vectors",
        "text_vectors",
    ]
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "qformer_config": QFormerConfig,
    }

    image_text_hidden_size: int = 256
    itc_loss: str = "softmax"
    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    itg_weight: float | int = 1.0
    label_smoothing: float | int = 0.1
    logit_scale_init_value: float | int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.qformer_config.use_qformer_text_input = True
        if self.logit_scale_init_value is None:
            self.logit_scale_init_value = math.log(10) if self.itc_loss == "sigmoid" else math.log(1 / 0.07)

    def validate_architecture(self) -> None:
        """Check the fields. transformers calls this method on construction and on saving.

        Raises:
            ValueError: if a field has a value that the class does not accept.
        """
        weights = {name: getattr(self, name) for name in ("itc_weight", "itm_weight", "itg_weight")}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"`{name}` must be a number of at least 0, got {weight}.")
        if not any(weights.values()):
            raise ValueError("All losses have the weight 0: set `itc_weight`, `itm_weight` or `itg_weight` above 0.")
        if self.itc_loss not in ("softmax", "sigmoid"):
            raise ValueError(f'`itc_loss` must be "softmax" or "sigmoid", got {self.itc_loss!r}.')
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be at least 0 and below 1, got {self.label_smoothing}.")
        if self.image_text_hidden_size < 1:
            raise ValueError(f"`image_text_hidden_size` must be at least 1, got {self.image_text_hidden_size}.")
        if cast(QFormerConfig, self.qformer_config).window_size is not None:
            raise ValueError(
                "Pretraining compares the queries of a whole image with a text, so the Q-Former cannot have a "
                "`window_size`: leave it out, and set it when you train the captioner."
            )


def check_model_type(name: str, config: Any) -> None:
    """Check that transformers has the type of model that a dictionary names. Its own error lists hundreds of types.

    Raises:
        ValueError: if it does not; the message names the nearest type.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type is not None and model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(model_type), CONFIG_MAPPING, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "check the name, or update transformers."
        raise ValueError(f"transformers has no model of the type {str(model_type)[:100]!r} (`{name}`): {hint}")


def special_tokens_of(config: PreTrainedConfig | GenerationConfig) -> dict[str, int | list[int]]:
    """Return the special tokens that a configuration sets, such as `{"eos_token_id": 1}`."""
    values = {name: getattr(config, name, None) for name in SPECIAL_TOKENS}
    return {name: value for name, value in values.items() if value is not None}


QFormerCaptionerConfig.register_for_auto_class()
QFormerPretrainingConfig.register_for_auto_class()


def is_hub_id(name: str | None) -> bool:
    """Return True if a name is a valid Hub id and not a local file or folder.

    Example:

    ```python
    >>> from qformer_captioner.configuration_qformer import is_hub_id
    >>> is_hub_id("openai-community/gpt2"), is_hub_id("/data/gpt2")
    (True, False)
    ```
    """
    if name is None or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def without_local_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a JSON configuration, ready to publish, without local paths and their revisions.

    Example:

    ```python
    >>> from qformer_captioner.configuration_qformer import without_local_paths
    >>> without_local_paths({"vision_model_name_or_path": "/home/me/clip", "dtype": "float32"})
    {'vision_model_name_or_path': None, 'dtype': 'float32'}
    ```
    """
    published: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = without_local_paths(value)
        elif isinstance(value, str) and key.endswith("name_or_path") and not is_hub_id(value):
            value = "" if key.startswith("_") else None
        published[key] = value
    for key in config:
        name_key = f"{key.removesuffix('_revision')}_name_or_path"
        if key.endswith("_revision") and name_key in published and published[name_key] is None:
            published[key] = None
    return published


__all__ = ["QFormerCaptionerConfig", "QFormerConfig", "QFormerPretrainingConfig"]
