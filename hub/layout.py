"""Files of a published captioner: their names, and checks that a folder is complete."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from ..common.errors import InputError

PICTURES = ("captions.png", "samples.png", "retrieval.png", "loss_curve.png")

# The file that holds the class of a model, by the type of the model
CODE_OF_MODELS = {"qformer_captioner": "modeling_qformer.py", "qformer_pretraining": "pretraining_qformer.py"}

# Glob patterns of the files that a repository may hold. This is an allow-list, because the folder of a run can also
# hold optimizer states and other pickles, records with local paths, and private files.
PUBLISHED_FILES = (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    "model*.safetensors",
    "model.safetensors.index*.json",
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    "*_qformer.py",
    "*processor_config.json",
    "chat_template.jinja",
    "qformer_tokenizer/*.json",
    # Tokenizers
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    # Documentation
    REPOCARD_NAME,
    "LICENSE*",
    *PICTURES,
)


def is_published(path: str) -> bool:
    """Return True if a path, relative to the folder, matches one of `PUBLISHED_FILES`. `*` does not match a slash.

    Example:

    ```python
    >>> is_published("model-00001-of-00002.safetensors"), is_published("checkpoint-1/model.safetensors")
    (True, False)
    ```
    """
    return any(pattern.count("/") == path.count("/") and fnmatch(path, pattern) for pattern in PUBLISHED_FILES)


def pictures_of(folder: Path) -> tuple[str, ...]:
    """Return the names among `PICTURES` that exist in a folder."""
    return tuple(name for name in PICTURES if (folder / name).is_file())


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. A file that is missing or holds another kind of value gives an empty object.

    Raises:
        InputError: if the file is not valid JSON.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(file)!r} is not valid JSON: {error}.") from error
    return content if isinstance(content, dict) else {}


def check_folder(folder: Path) -> str | None:
    """Check that a folder holds everything that others need to load it and caption images.

    Args:
        folder: a folder that a run or `save_pretrained` wrote, with a captioner or an adapter.

    Returns:
        Folder or Hub id of the captioner that an adapter belongs to; `None` if the folder holds a captioner.

    Raises:
        InputError: if a run has not finished, a file is missing or damaged, or a backbone is kept by reference to a
            local folder.
    """
    if not folder.is_dir():
        raise InputError(f"The folder {str(folder)!r} does not exist.")
    run_record = folder / "run.json"
    if run_record.is_file() and read_json(run_record).get("finished") is None:
        raise InputError(f"The run in {str(folder)!r} has not finished: repeat its command to resume it, then push.")
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return _check_adapter(folder)
    _check_captioner(folder)
    return None


def _check_adapter(folder: Path) -> str:
    """Check an adapter and the captioner that it belongs to; return the folder or Hub id of that captioner."""
    from ..configuration_qformer import is_hub_id  # imports torch

    _check_weights(folder / ADAPTER_SAFE_WEIGHTS_NAME)
    base = str(read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path"))
    if Path(base).is_dir():
        check_folder(Path(base))
    elif not is_hub_id(base):
        raise InputError(f"The adapter in {str(folder)!r} belongs to the captioner {base!r}, which does not exist.")
    return base


def _check_captioner(folder: Path) -> None:
    """Check the configuration, weights, code, processor and referenced backbones of a captioner."""
    config = read_json(folder / CONFIG_NAME)
    code = CODE_OF_MODELS.get(str(config.get("model_type")))
    if code is None:
        raise InputError(
            f"The folder {str(folder)!r} holds neither a captioner nor a pretrained Q-Former ({CONFIG_NAME} with "
            f"model_type {' or '.join(CODE_OF_MODELS)}) nor an adapter ({ADAPTER_CONFIG_NAME}): push the folder that "
            "training or `save_pretrained` wrote."
        )
    for file in _weight_files(folder):
        _check_weights(file)
    for name in (code, PROCESSOR_NAME):
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing in {str(folder)!r}, so nobody could use it: save it again.")
    _check_referenced_backbones(folder, config)


def _check_referenced_backbones(folder: Path, config: dict[str, Any]) -> None:
    from ..configuration_qformer import is_hub_id  # imports torch

    for backbone in config.get("referenced_backbones") or []:
        name = config.get(f"{backbone}_name_or_path")
        if not is_hub_id(name):
            raise InputError(
                f"The captioner in {str(folder)!r} refers to the {backbone.replace('_', ' ')} {name!r}, which only "
                "this machine has: include it with `qformer-captioner export`, or train with --include_backbones true."
            )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a captioner, sharded or not."""
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [whole]
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and is_published(name) for name in names):
        raise InputError(f"{SAFE_WEIGHTS_INDEX_NAME} in {str(folder)!r} is not an index of weights: save it again.")
    if whole.is_file():  # transformers reads it first
        return [whole]
    return [folder / name for name in sorted(set(names))]


def _check_weights(file: Path) -> None:
    """Open a safetensors file, which checks its size against its header."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"The weights {str(file)!r} are missing or damaged ({error}).") from error
