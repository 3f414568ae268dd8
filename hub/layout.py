"""TODO."""

from fnmatch import fnmatch
from pathlib import Path

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME


def pictures_of(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in PICTURES if (folder / name).is_file())


# torch and all else that cards are made with take seconds to import: that is done where the work starts.

CARD = "README.md"
PICTURES = ("captions.png", "loss_curve.png")

# What a repository of ours may hold. A list of what may, not of what may not: beside the model, a folder has optimizers
# and other pickles, records of a run with paths in them, and whatever its owner keeps there.
PUBLISHED = (
    CONFIG_NAME,
    "generation_config.json",
    "model*.safetensors",
    SAFE_WEIGHTS_INDEX_NAME,
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    "*_qformer.py",
    "*processor_config.json",
    "chat_template.jinja",
    "qformer_tokenizer/*.json",
    # Of tokenizers:
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    CARD,
    "LICENSE*",
    *PICTURES,
)


def is_published(name: str) -> bool:
    """Whether a path is one of `PUBLISHED`, folder by folder: `*` stands for no slash."""
    return any(pattern.count("/") == name.count("/") and fnmatch(name, pattern) for pattern in PUBLISHED)
