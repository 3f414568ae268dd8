"""Models without pretrained parts: backbones from configurations, and a tokenizer from the captions."""

from collections.abc import Iterable
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from ..backbones_qformer import VisionModelPlaceholder
from ..configuration_qformer import (
    PrecomputedFeaturesConfig,
    QFormerCaptionerConfig,
    QFormerConfig,
    QFormerPretrainingConfig,
)
from ..encoders_qformer import image_size_of, num_frames_of
from ..modeling_qformer import QFormerCaptioner
from ..pretraining_qformer import QFormerForPretraining, new_qformer_config
from ..processing_qformer import QFormerCaptionerProcessor, QFormerPretrainingProcessor


def train_tokenizer(captions: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the most frequent words.

    Tokens include the space in front of a word, so decoding restores the text.

    Args:
        captions: captions whose words are counted.
        vocab_size: largest number of tokens, special tokens included.

    Example:

    ```python
    >>> tokenizer = train_tokenizer(["a red circle, a star", "a blue star"])
    >>> tokenizer.decode(tokenizer("a blue circle").input_ids)
    ' a blue circle'
    ```
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special_tokens)
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>"
    )


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the tokens `[CLS]`, `[SEP]` and `[PAD]` of BERT, for a Q-Former that reads texts.

    Tokens are pairs of bytes that occur together most often (BPE, arXiv 1508.07909), so no text has unknown tokens. The
    result depends only on the texts, so that a run that starts again, and all processes of a run, have the same one.
    WordPiece as in `tokenizers` numbers its first tokens in random order.

    Args:
        texts: texts in which pairs are counted.
        vocab_size: largest number of tokens. Pairs that occur once are not merged, so few texts give fewer tokens.
        lowercase: read all texts in lower case.

    Example:

    ```python
    >>> tokenizer = train_text_tokenizer(["a red circle, a star", "a blue star"])
    >>> tokenizer.decode(tokenizer("A blue circle").input_ids)
    '[CLS] a blue circle[SEP]'
    ```
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["[PAD]", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", padding_side="right"
    )


def build_from_scratch(
    vision_config: dict, text_config: dict, qformer_config: dict, captions: Iterable[str], prompt: str = ""
) -> QFormerCaptioner:
    """Return a captioner with random weights, all of them trainable, and with its processor.

    Args:
        vision_config: `model_type` and sizes of the vision encoder. Images are resized to its `image_size`. The
            `model_type` "precomputed_features" is for features of the width `hidden_size`, without a vision encoder.
        text_config: `model_type` and sizes of the language model. The tokenizer determines its vocabulary size and
            special tokens.
        qformer_config: fields of [`QFormerConfig`].
        captions: training captions, from which the tokenizer is made.
        prompt: text between image and caption, as in [`QFormerCaptionerProcessor`].

    Raises:
        TypeError: if a field is not a field of the Q-Former.
        ValueError: if a `model_type` does not exist, or sizes do not fit together.

    Example:

    ```python
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = build_from_scratch(
    ...     {"model_type": "vit", "image_size": 32, "patch_size": 8, **sizes},
    ...     {"model_type": "llama", **sizes},
    ...     {"num_query_tokens": 4, **sizes},
    ...     ["a red circle", "a blue star"],
    ... )
    >>> model.qformer.query_tokens.shape
    torch.Size([1, 4, 16])
    ```
    """
    tokenizer = train_tokenizer(captions)
    text = AutoConfig.for_model(
        **text_config,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if text.is_encoder_decoder:
        text.decoder_start_token_id = tokenizer.pad_token_id
    reads_features = vision_config.get("model_type") == PrecomputedFeaturesConfig.model_type
    qformer = QFormerConfig.from_fields(**qformer_config)
    config = QFormerCaptionerConfig(
        vision_config=vision_config if reads_features else AutoConfig.for_model(**vision_config),
        text_config=text,
        qformer_config=qformer,
    )
    model = QFormerCaptioner(config)
    model.processor = QFormerCaptionerProcessor(
        new_image_processor(model.vision_model),
        tokenizer,
        prompt=prompt,
        is_encoder_decoder=text.is_encoder_decoder,
        num_frames=num_frames_of(model.vision_model.config) or qformer.num_frames,
    )
    return model


def pretraining_from_scratch(
    vision_config: dict, qformer_config: dict, tokenizer: PreTrainedTokenizerBase, **fields: Any
) -> QFormerForPretraining:
    """Return a model for pretraining with random weights, all of them trainable, and with its processor.

    Args:
        vision_config: `model_type` and sizes of the vision encoder, as in [`build_from_scratch`].
        qformer_config: fields of [`QFormerConfig`]. The tokenizer determines its vocabulary size. By default its
            first weights are those of [`new_qformer_config`].
        tokenizer: tokenizer of the texts, such as [`train_text_tokenizer`] returns.
        fields: further fields of [`QFormerPretrainingConfig`].

    Raises:
        TypeError: if a field is not a field of the Q-Former.
        ValueError: if a `model_type` does not exist, or sizes do not fit together.

    Example:

    ```python
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = pretraining_from_scratch(
    ...     {"model_type": "vit", "image_size": 32, "patch_size": 8, **sizes},
    ...     {"num_query_tokens": 4, **sizes},
    ...     train_text_tokenizer(["a red circle", "a blue star"]),
    ... )
    >>> model.processor(text="a red star").input_ids.shape
    torch.Size([1, 5])
    ```
    """
    reads_features = vision_config.get("model_type") == PrecomputedFeaturesConfig.model_type
    processor = QFormerPretrainingProcessor(ViTImageProcessorPil(), tokenizer)  # adds a token that starts captions
    config = QFormerPretrainingConfig(
        vision_config=vision_config if reads_features else AutoConfig.for_model(**vision_config),
        qformer_config=new_qformer_config(qformer_config, len(tokenizer)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    model = QFormerForPretraining(config)
    processor.image_processor = new_image_processor(model.vision_model)
    processor.num_frames = num_frames_of(model.vision_model.config) or model.qformer.config.num_frames
    model.processor = processor
    return model


def new_image_processor(vision_model: nn.Module) -> ViTImageProcessorPil:
    """Return the image processor of a new vision encoder, or any if there are only features."""
    if isinstance(vision_model, VisionModelPlaceholder):
        return ViTImageProcessorPil()
    height, width = image_size_of(cast(PreTrainedModel, vision_model))
    # Mean 1 maps white to zero, so the embedding of an empty patch contains only its position.
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=[1.0] * 3, image_std=[0.5] * 3)
