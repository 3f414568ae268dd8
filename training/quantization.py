"""Quantisation of the frozen language model to 4 or 8 bits."""

from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..backbones_qformer import dtype_of, is_frozen
from ..common.errors import InputError
from ..modeling_qformer import QFormerCaptioner
from .arguments import ModelArguments


def quantization_config(
    model: QFormerCaptioner, args: ModelArguments, include_backbones: str
) -> BitsAndBytesConfig | None:
    """Return the quantisation configuration of the language model, or `None` without quantisation.

    Args:
        model: the captioner, whose language model is not quantised yet.
        args: the options of the model.
        include_backbones: the option `--include_backbones`.

    Raises:
        InputError: if bitsandbytes is missing, the language model is trainable, or its weights would have to be saved.
    """
    if not args.load_in_4bit and not args.load_in_8bit:
        return None
    if not is_bitsandbytes_available():
        raise InputError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install 'qformer-captioner[qlora]'.")
    if not is_frozen(model.language_model):
        raise InputError("A quantised language model cannot be trained: leave it frozen, or train --lora_r adapters.")
    has_name = model.config.language_model_name_or_path is not None
    # An adapter refers to its base captioner, which is saved before quantisation.
    if args.lora_r is None and (not has_name or include_backbones == "true"):
        raise InputError(
            "A quantised language model is saved by its name, without weights: leave out --include_backbones true, or "
            "add --lora_r."
        )
    return BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_compute_dtype=dtype_of(model.language_model),
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
    )
