"""What a captioner is made of: the Q-Former's sizes, and the two backbones on either side of it.

Field names follow transformers' `Blip2QFormerConfig` and `Blip2Config`, so that what is known about one carries over
to the other. Both classes are plain transformers configurations: keyword-only, checked for their types, JSON on disk.
"""

import difflib
import os
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class QFormerConfig(PreTrainedConfig):
    r"""Sizes of a Q-Former (BLIP-2, arXiv 2301.12597). The defaults are BLIP-2's: BERT-base with 32 queries.

    Args:
        num_query_tokens (`int`, *optional*, defaults to 32):
            Learned queries, and so the length of the soft prompt that the language model reads.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the queries. Must be a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Transformer layers.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads of a layer.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the feed-forward part.
        cross_attention_frequency (`int`, *optional*, defaults to 2):
            Every how many layers the queries look at the image, beginning with the first.
        encoder_hidden_size (`int`, *optional*, defaults to 1408):
            Width of the image features. A captioner fills it in from its vision encoder.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward part.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout behind the queries and behind every sub-layer.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout on the attention weights.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of fresh weights, the queries' included.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of the layer norms.
        use_qformer_text_input (`bool`, *optional*, defaults to `False`):
            Let the Q-Former read the prompt beside the image, as InstructBLIP's does (arXiv 2305.06500): words join the
            queries' self-attention and have a feed-forward part of their own; only queries look at the image.
        vocab_size (`int`, *optional*, defaults to 30522):
            Words of the Q-Former's own tokenizer (BERT's), where it reads text.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            The longest text that it reads, in tokens.

    Raises:
        StrictDataclassClassValidationError: if a size is not positive or `hidden_size` is no multiple of
            `num_attention_heads`. transformers wraps our `ValueError` so.

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
    layer_norm_eps: float = 1e-12
    use_qformer_text_input: bool = False
    vocab_size: int = 30522
    max_position_embeddings: int = 512

    @classmethod
    def field_names(cls) -> set[str]:
        """The fields above, without those that every configuration has."""
        return {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}

    @classmethod
    def from_fields(cls, **sizes) -> "QFormerConfig":
        """As the constructor, but a keyword that is no field above is an error and not kept as an extra.

        Raises:
            TypeError: for an unknown field; the message has the nearest one there is.
        """
        known = cls.field_names()
        for name in set(sizes) - known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(sorted(known))}."
            raise TypeError(f"{name!r} is not a field of QFormerConfig: {hint}")
        # JSON and YAML write a share of 0 without a point.
        shares = {name: float(size) for name, size in sizes.items() if type(getattr(cls, name)) is float}
        return cls(**{**sizes, **shares})

    def validate_architecture(self) -> None:
        """Called by transformers on construction and on save."""
        for field in (
            "num_query_tokens",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "cross_attention_frequency",
            "encoder_hidden_size",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads})."
            )


@strict
class QFormerCaptionerConfig(PreTrainedConfig):
    r"""A vision encoder, a Q-Former and a language model, and where the two backbones came from.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Any vision encoder that `AutoModel` builds and whose output is `[batch, tokens, hidden_size]`. Of a
            two-tower configuration (CLIP, SigLIP) the vision tower is taken. Defaults to CLIP ViT-B/32.
        qformer_config (`dict` or [`QFormerConfig`], *optional*):
            The Q-Former. Its `encoder_hidden_size` is set to the vision encoder's width.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any language model of `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`. Defaults to T5-small.
        vision_model_name_or_path, language_model_name_or_path (`str`, *optional*):
            Hub id or folder that a backbone was loaded from; `None` for one that was trained from scratch.
        vision_model_revision, language_model_revision (`str`, *optional*):
            Commit of the Hub repository it was loaded from.
        freeze_vision_model, freeze_language_model (`bool`, *optional*, defaults to `False`):
            A frozen backbone has no gradients and stays in evaluation mode whenever the captioner trains.
        projection_per_query (`bool`, *optional*, defaults to `False`):
            Whether each query has a projection of its own into the language model, instead of one for all as in BLIP-2.
        referenced_backbones (`list[str]`, *optional*):
            The parts, of `"vision_model"` and `"language_model"`, whose weights are not in the folder beside this
            configuration but are fetched from `..._name_or_path`. Written by `save_pretrained`.
        dtypes (`dict[str, str]`, *optional*):
            The dtype that each part was saved in, such as `{"qformer": "float32", "language_model": "bfloat16"}`.
            Written by `save_pretrained`, since transformers itself keeps one dtype per model.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, GPT2Config
    >>> from qformer_captioner import QFormerCaptionerConfig
    >>> config = QFormerCaptionerConfig(vision_config=CLIPVisionConfig(hidden_size=256), text_config=GPT2Config())
    >>> config.qformer_config.encoder_hidden_size, config.is_encoder_decoder
    (256, False)
    ```
    """

    model_type = "qformer_captioner"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "qformer_config": QFormerConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="t5"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_model_name_or_path: str | None = None
    vision_model_revision: str | None = None
    language_model_name_or_path: str | None = None
    language_model_revision: str | None = None
    freeze_vision_model: bool = False
    freeze_language_model: bool = False
    projection_per_query: bool = False
    referenced_backbones: list[str] | None = None
    dtypes: dict[str, str] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # turns the dicts into configurations
        if "vision_config" in self.vision_config.sub_configs:  # CLIP, SigLIP: two towers, of which we need one
            self.vision_config = self.vision_config.vision_config
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.is_encoder_decoder = self.text_config.is_encoder_decoder
        if self.pad_token_id is None:  # the Trainer pads gathered captions with it
            self.pad_token_id = getattr(self.text_config, "pad_token_id", None)
        if getattr(self, "auto_map", None) is None:
            # One class may register itself for one Auto class only. The rest must stand here, so that a folder of ours
            # opens with each of them in a process that does not have this package.
            self.auto_map = {
                "AutoConfig": "configuration_qformer.QFormerCaptionerConfig",
                "AutoModel": "modeling_qformer.QFormerCaptioner",
                "AutoModelForImageTextToText": "modeling_qformer.QFormerCaptioner",
                "AutoProcessor": "processing_qformer.QFormerCaptionerProcessor",
            }


QFormerCaptionerConfig.register_for_auto_class()


def is_hub_id(name: str | None) -> bool:
    """Whether others can fetch it by this name: a Hub id, and no file or folder of this machine."""
    if name is None or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def without_local_paths(config: dict) -> dict:
    """A configuration as JSON has it, but with no file or folder of this machine in it: to publish."""
    kept = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = without_local_paths(value)
        elif isinstance(value, str) and key.endswith("name_or_path") and not is_hub_id(value):
            value = "" if key.startswith("_") else None
        kept[key] = value
    for key in config:
        named = f"{key.removesuffix('_revision')}_name_or_path"
        if key.endswith("_revision") and named in kept and kept[named] is None:
            kept[key] = None
    return kept


__all__ = ["QFormerCaptionerConfig", "QFormerConfig"]
