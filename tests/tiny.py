"""Tiny models with random weights: every part of a captioner, small enough to build in a test.

The three widths differ, so that no part fits where another belongs. Weights are drawn wide (0.2): with the usual 0.02 a
random model gives nearly the same answer to everything, and a test of it could not fail.
"""

import os

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig, QFormerCaptionerProcessor
from qformer_captioner.captioning.scratch import train_tokenizer

torch.set_num_threads(1)  # threads only cost where tensors are this small

VISION_WIDTH, QFORMER_WIDTH, TEXT_WIDTH = 24, 32, 48
WORDS = 100  # of the vocabulary; 0 is padding, 1 ends a sequence
SIDE = 32  # of an image, in pixels
QUERIES = 3
CAPTIONS = ["a red circle above a blue star", "a green heart", "two small squares, one of them yellow"]

LAYERS = dict(num_hidden_layers=2, num_attention_heads=4)
VISION = {
    "clip": dict(model_type="clip_vision_model", intermediate_size=40),
    "siglip": dict(model_type="siglip_vision_model", intermediate_size=40),
    "dinov2": dict(model_type="dinov2", mlp_ratio=2),
    "vit": dict(model_type="vit", intermediate_size=40),
}

LLAMA = LAYERS | dict(hidden_size=TEXT_WIDTH, num_key_value_heads=2, intermediate_size=64)
LLAMA |= dict(max_position_embeddings=64, initializer_range=0.2)
T5 = dict(d_model=TEXT_WIDTH, num_layers=2, num_heads=4, d_kv=8, d_ff=64, dropout_rate=0.0, decoder_start_token_id=0)
BART = dict(d_model=TEXT_WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64)
BART |= dict(decoder_attention_heads=4, decoder_ffn_dim=64, dropout=0.0, init_std=0.3, max_position_embeddings=64)
TEXT = {
    "t5": dict(model_type="t5", **T5, initializer_factor=2.0),
    # Flan-T5 and T5 v1.1 have an output layer of their own; transformers 5 turns that into scale_decoder_outputs=False.
    "flan-t5": dict(model_type="t5", **T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "bart": dict(model_type="bart", **BART, decoder_start_token_id=1, forced_eos_token_id=None),
    "llama": dict(model_type="llama", **LLAMA),
    "qwen2": dict(model_type="qwen2", **LLAMA),
    "gemma": dict(model_type="gemma", **LLAMA, head_dim=12),  # multiplies its inputs by the root of its width
    "gpt2": dict(model_type="gpt2", n_embd=TEXT_WIDTH, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    # As in OPT-350m, words are narrower than the model.
    "opt": LAYERS
    | dict(model_type="opt", hidden_size=TEXT_WIDTH, word_embed_proj_dim=20, do_layer_norm_before=False)
    | dict(ffn_dim=64, max_position_embeddings=64, init_std=0.2),
    "bloom": dict(model_type="bloom", hidden_size=TEXT_WIDTH, n_layer=2, n_head=4, initializer_range=0.2),  # ALiBi
}
QFORMER = LAYERS | dict(num_query_tokens=QUERIES, hidden_size=QFORMER_WIDTH, intermediate_size=40)
QFORMER |= dict(initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
NO_DROPOUT = {  # the others have none by default
    "gpt2": dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "opt": dict(dropout=0.0),
}


def vision_config(name: str) -> PreTrainedConfig:
    """Of "clip", "siglip", "dinov2" or "vit"."""
    sizes = dict(hidden_size=VISION_WIDTH, image_size=SIDE, patch_size=16)
    return AutoConfig.for_model(**VISION[name], **LAYERS, **sizes, initializer_range=0.2)


def text_config(name: str, **fields) -> PreTrainedConfig:
    """Of a key of `TEXT`; all have the same vocabulary and special tokens."""
    special_tokens = dict(vocab_size=WORDS, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    return AutoConfig.for_model(**TEXT[name] | NO_DROPOUT.get(name, {}) | special_tokens | fields)


def captioner(
    vision: str = "clip", language: str = "llama", projection_per_query: bool = False, **qformer_fields
) -> QFormerCaptioner:
    """A captioner with random weights, always the same ones, in evaluation mode and without dropout."""
    torch.manual_seed(0)
    config = QFormerCaptionerConfig(
        vision_config=vision_config(vision),
        text_config=text_config(language),
        qformer_config=QFORMER | qformer_fields,
        projection_per_query=projection_per_query,
    )
    model = QFormerCaptioner(config).eval()
    torch.nn.init.normal_(model.language_projection.weight, std=0.2)  # so that the image matters
    own_head(model.language_model)
    model.processor = processor(is_encoder_decoder=config.is_encoder_decoder)
    return model


def own_head(model: PreTrainedModel) -> None:
    """Give Flan-T5 its own output layer: a fresh one starts as a copy of the input embedding."""
    if not getattr(model.config, "scale_decoder_outputs", True):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))


def save_vision(folder: str | os.PathLike, name: str = "clip", dtype: torch.dtype = torch.float32) -> str:
    """Save a vision encoder and its image processor, as one finds them on the Hub; returns the folder."""
    torch.manual_seed(4)
    AutoModel.from_config(vision_config(name), dtype=dtype).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return str(folder)


def save_language(folder: str | os.PathLike, name: str = "llama", dtype: torch.dtype = torch.float32, **fields) -> str:
    """Save a language model and its tokenizer; returns the folder."""
    torch.manual_seed(5)
    config = text_config(name, **fields)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=dtype)
    own_head(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def images(number: int = 3) -> torch.Tensor:
    """Pixel values `[number, 3, SIDE, SIDE]`, the same ones every time."""
    return torch.randn(number, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def pad(rows: list[torch.Tensor], value: int, side: str = "right") -> torch.Tensor:
    """Stack rows of unequal length."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def batch(prompts=(4, 0, 2), captions=(5, 3, 2), side: str = "left") -> dict[str, torch.Tensor]:
    """Images, prompts and captions of so many random words each; the captions end with end-of-sequence.

    Prompts are padded on `side` with a real word, so that whoever tells padding by its id and not by the mask errs.
    """
    generator = torch.Generator().manual_seed(2)

    def words(length: int) -> torch.Tensor:
        return torch.randint(3, WORDS, (length,), generator=generator)

    prompt_rows = [words(length) for length in prompts]
    caption_rows = [torch.cat([words(length - 1), torch.tensor([1])]) for length in captions]
    return {
        "pixel_values": images(len(prompts)),
        "input_ids": pad(prompt_rows, WORDS - 1, side),
        "attention_mask": pad([torch.ones_like(row) for row in prompt_rows], 0, side),
        "labels": pad(caption_rows, -100),
    }


def image_processor(side: int = SIDE) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, of all `CAPTIONS` and as many syllables as make up a vocabulary of `WORDS`."""
    syllables = " ".join(consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou")
    return train_tokenizer([*CAPTIONS, *CAPTIONS, syllables], vocab_size=WORDS)


def processor(prompt: str = "", is_encoder_decoder: bool = False) -> QFormerCaptionerProcessor:
    return QFormerCaptionerProcessor(
        image_processor(), tokenizer(), prompt=prompt, is_encoder_decoder=is_encoder_decoder
    )


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (40, 50)) -> Image.Image:
    """A PIL image of noise, `size` being width and height."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy()).convert(mode)
