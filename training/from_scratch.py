"""A captioner with nothing pretrained: the backbones from their configurations, the tokenizer from the captions."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast, ViTImageProcessorPil

from ..configuration_qformer import QFormerCaptionerConfig, QFormerConfig
from ..modeling_qformer import QFormerCaptioner
from ..processing_qformer import QFormerCaptionerProcessor


def train_tokenizer(captions: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the most frequent words, spaces kept, so that decoding gives back the text.

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
    special = ["<pad>", "<eos>", "<unk>"]
    tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>"
    )


def build_from_scratch(
    vision_config: dict, text_config: dict, qformer_config: dict, captions: Iterable[str], prompt: str = ""
) -> QFormerCaptioner:
    """A captioner with random weights, all of them trainable, and its processor.

    Args:
        vision_config, text_config: `model_type` and sizes of the backbones. The vocabulary, the special tokens and the
            size of the images follow from the captions and the vision encoder.
        qformer_config: fields of [`QFormerConfig`].
        captions: to make the tokenizer from.
        prompt: as in [`QFormerCaptionerProcessor`].

    Raises:
        TypeError, ValueError: for a field that the Q-Former does not have, an unknown `model_type`, or sizes that do
            not fit together.
    """
    tokenizer = train_tokenizer(captions)
    language = AutoConfig.for_model(
        **text_config,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if language.is_encoder_decoder:
        language.decoder_start_token_id = tokenizer.pad_token_id
    vision = AutoConfig.for_model(**vision_config)
    model = QFormerCaptioner(
        QFormerCaptionerConfig(
            vision_config=vision, text_config=language, qformer_config=QFormerConfig.from_fields(**qformer_config)
        )
    )
    side = model.vision_model.config.image_size
    model.processor = QFormerCaptionerProcessor(
        # White becomes zero: nothing to see, nothing in the patch but its place.
        ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=[1.0] * 3, image_std=[0.5] * 3),
        tokenizer,
        prompt=prompt,
        is_encoder_decoder=language.is_encoder_decoder,
    )
    return model
