"""Weights in memory and in files: fingerprints and ties of a model, and the safetensors files of a folder.

saving_qformer.py decides with them what a captioner saves.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationDelete, HfApi
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)
from transformers.utils.hub import cached_file

logger = logging.get_logger(__name__)

ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)

# ----------------------------------------------------------------------------------------------------------------------
# Weights in memory: fingerprints and ties
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BackboneFingerprint:
    """Fingerprint of the weights of a backbone: the shape, first row and first column of each weight.

    Training, merging an adapter or resizing the vocabulary changes at least one of these values.

    Args:
        rows_and_columns (`dict[str, tuple[torch.Size, torch.Tensor]]`): by the name of the weight inside the backbone.

    Example:

    ```python
    >>> import torch
    >>> from qformer_captioner.weights_qformer import BackboneFingerprint
    >>> layer = torch.nn.Linear(3, 2)
    >>> fingerprint = BackboneFingerprint.of(layer)
    >>> fingerprint.matches(layer.state_dict())
    True
    >>> fingerprint.matches({"weight": layer.weight * 2})
    False
    ```
    """

    rows_and_columns: dict[str, tuple[torch.Size, torch.Tensor]]

    @classmethod
    def of(cls, module: nn.Module) -> "BackboneFingerprint":
        """Take the fingerprint of a module. Weights that are offloaded to disk are left out."""
        weights = {name: weight for name, weight in module.state_dict().items() if not weight.is_meta}
        return cls({name: (weight.shape, first_row_and_column(weight)) for name, weight in weights.items()})

    def matches(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Return True if the given weights have the values of the fingerprint, whatever their dtype is.

        Args:
            weights: weights by their name inside the backbone. Missing and offloaded weights are not compared. A weight
                that the fingerprint lacks, such as the bias of a new output layer, does not match.
        """
        if any(name not in self.rows_and_columns and not weight.is_meta for name, weight in weights.items()):
            return False
        return all(
            weights[name].shape == shape and equal_in_lower_precision(first_row_and_column(weights[name]), values)
            for name, (shape, values) in self.rows_and_columns.items()
            if name in weights and not weights[name].is_meta
        )


def first_row_and_column(weight: torch.Tensor) -> torch.Tensor:
    """Return the first column and the first row of a weight `[R, ...]` as one vector on the CPU.

    Weights in 4 bits are packed in a single column of bytes, of which the sum is returned.
    """
    if weight.dtype == torch.uint8:
        return weight.detach().sum(dtype=torch.int64).cpu()
    rows = weight.detach().flatten(1) if weight.dim() > 1 else weight.detach().flatten()[None]
    return torch.cat([rows[:, :1].flatten(), rows[:1].flatten()]).cpu()


def equal_in_lower_precision(own: torch.Tensor, values: torch.Tensor) -> bool:
    """Return True if `values` are those of `own` after a cast to its dtype."""
    return torch.equal(own, values.to(own.dtype))


def plain_name(name: str) -> str:
    """Return the name of a weight as it is without the wrappers of `torch.compile`."""
    return name.replace("_orig_mod.", "")


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return the weights that share their memory with another weight, mapped to the name of that weight.

    Only weights that transformers can tie are listed. The configuration is not asked, because the output layer may have
    been replaced, trained or tied after the model was built.

    Args:
        model (`nn.Module`): language model, or captioner that contains one.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from qformer_captioner.weights_qformer import ties_of
    >>> ties_of(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=12)))
    {'lm_head.weight': 'transformer.wte.weight'}
    ```
    """
    weights = {plain_name(name): weight for name, weight in model.named_parameters(remove_duplicate=False)}
    ties = {}
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for target, source in (module._tied_weights_keys or {}).items():
                names = [plain_name(f"{prefix}.{name}" if prefix else name) for name in (target, source)]
                if all(name in weights for name in names) and share_memory(*(weights[name] for name in names)):
                    ties[names[0]] = names[1]
    return ties


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return True if two weights are the same values in memory.

    Weights that are offloaded or sharded have no address, and are compared by identity.
    """
    return first is second or (first.data_ptr() == second.data_ptr() != 0 and first.shape == second.shape)


def forget_broken_ties(model: nn.Module) -> None:
    """Make `tie_weights()` tie only the weights that are tied now.

    The Trainer, FSDP and `resize_token_embeddings` call it. In an encoder-decoder model the configuration cannot say
    that the output layer is not tied, because the embeddings of encoder and decoder still are.
    """
    ties = ties_of(model)
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for name in module.get_expanded_tied_weights_keys():  # none if the configuration does not tie them
                if plain_name(f"{prefix}.{name}" if prefix else name) not in ties:
                    forget_tie(module, name)


def forget_tie(model: PreTrainedModel, name: str) -> None:
    """Make `tie_weights()` leave one weight of a model alone."""
    model._tied_weights_keys = {
        target: source for target, source in (model._tied_weights_keys or {}).items() if target != name
    }
    model.all_tied_weights_keys.pop(name, None)


# ----------------------------------------------------------------------------------------------------------------------
# Weights in safetensors files
# ----------------------------------------------------------------------------------------------------------------------


def weights_name(variant: str | None = None, index: bool = False) -> str:
    """Return the name of the file with all weights, or of the index of a sharded file.

    Example:

    ```python
    >>> from qformer_captioner.weights_qformer import weights_name
    >>> weights_name(), weights_name("fp16", index=True)
    ('model.safetensors', 'model.safetensors.index.fp16.json')
    ```
    """
    name = SAFE_WEIGHTS_INDEX_NAME if index else SAFE_WEIGHTS_NAME
    start, end = name.rsplit(".", 1)
    return name if variant is None else f"{start}.{variant}.{end}"


def weight_files(path: str | os.PathLike, variant: str | None = None, **hub_kwargs: Any) -> list[str]:
    """Return the paths of the safetensors files of a folder or Hub repository, sharded or not.

    A file with all weights precedes an index, as in transformers.

    Raises:
        OSError: if no file exists, or if the index is damaged or names files outside its folder.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    whole = cached_file(path, weights_name(variant), **optional)
    if whole is not None:
        return [whole]
    index = cached_file(path, weights_name(variant, index=True), **optional)
    if index is None:
        return [fetch_file(path, weights_name(variant), **hub_kwargs)]
    try:
        with open(index, encoding="utf-8") as file:
            names = set(json.load(file)["weight_map"].values())
        outside = [name for name in names if name != os.path.basename(name) or not name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{index!r} is not a valid index of weights ({error}). Fetch it again.") from error
    if outside or not names:
        wrong = outside[0] if outside else "nothing"
        raise OSError(f"{index!r} is not a valid index of weights: it names {wrong!r}. Fetch it again.")
    return [fetch_file(path, name, **hub_kwargs) for name in sorted(names)]


@contextmanager
def replacing_weights(folder: str | os.PathLike, variant: str | None = None) -> Iterator[None]:
    """Leave a folder with one reading after a `with` block in which transformers saves a model there.

    transformers keeps the index of earlier shards and an earlier file with all weights, so that old weights could be
    read. It also deletes the shards of other variants.

    Args:
        folder: folder to which the model is saved.
        variant: variant of the weights that is saved.
    """
    whole, index = (Path(folder, weights_name(variant, index)) for index in (False, True))
    others = Path(folder).glob("model.*-?????-of-?????.safetensors") if variant is None else ()
    # transformers does not touch hidden files.
    aside = {file: file.with_name(f".{file.name}") for file in (index, *others) if file.is_file()}
    for file, hidden in aside.items():
        file.replace(hidden)
    try:
        yield
        if index.exists():
            whole.unlink(missing_ok=True)
        if index in aside and (index.exists() or whole.exists()):  # and not only an adapter was saved
            aside.pop(index).unlink()
    finally:
        for file, hidden in aside.items():
            hidden.replace(file)


def put_adapter_aside(folder: str | os.PathLike) -> None:
    """Move an adapter in the folder of a captioner into a subfolder.

    transformers would load it on the captioner, for example a second time if it was merged into its weights.
    """
    files = [file for file in (Path(folder, name) for name in ADAPTER_FILES) if file.is_file()]
    if files:
        aside = Path(folder, "earlier_adapter")
        aside.mkdir(exist_ok=True)
        for file in files:
            file.replace(aside / file.name)
        logger.warning(
            f"The adapter that {os.fspath(folder)!r} held would be loaded on the captioner that was saved there, so it "
            f"was moved to {str(aside)!r}."
        )


def replaced_weights(written: Collection[str], existing: Iterable[str]) -> list[str]:
    """Return the files of a repository whose weights were replaced by an upload, and of an adapter beside them.

    Args:
        written: names of the files that were uploaded.
        existing: names of the files that the repository has.
    """
    existing = set(existing)
    pattern = re.compile(
        r"model(?:\.(.+?))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.(.+))?\.json"
    )
    variant_of = {name: match[1] or match[2] for name in sorted(existing) if (match := pattern.fullmatch(name))}
    replaced = [
        name
        for name, variant in variant_of.items()
        if {weights_name(variant), weights_name(variant, index=True)} & set(written)
    ]
    if ADAPTER_CONFIG_NAME in existing and any(pattern.fullmatch(name) for name in written):
        replaced += existing.intersection(ADAPTER_FILES)
    return [name for name in replaced if name not in written]


def delete_replaced_weights(repo_id: str, written: Collection[str], revision: str | None, token: Any) -> None:
    """Delete the weights that an upload replaced, in a second commit, because transformers makes the first."""
    api = HfApi(token=token)
    if replaced := replaced_weights(written, api.list_repo_files(repo_id, revision=revision)):
        deletions = [CommitOperationDelete(name) for name in replaced]
        api.create_commit(repo_id, deletions, commit_message="Delete replaced weights", revision=revision)


def fetch_file(path: str | os.PathLike, name: str, **hub_kwargs: Any) -> str:
    """Return the local path of one file of a folder or Hub repository.

    Raises:
        OSError: if the file does not exist or cannot be fetched.
    """
    file = cached_file(path, name, **hub_kwargs)
    if file is None:
        raise OSError(f"{os.fspath(path)!r} has no file {name!r}. Fetch it again.")
    return file


def open_weights(file: str) -> safe_open:
    """Open a safetensors file.

    Raises:
        OSError: if the file is damaged or not in this format.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"{file!r} is not a complete safetensors file, it may have been cut off ({error}). Fetch it again."
        ) from error


def read_weights(
    path: str | os.PathLike, prefix: str = "", names: Collection[str] | None = None, **hub_kwargs: Any
) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder or Hub repository, sharded or not, whose names begin with `prefix`.

    Args:
        path: folder or Hub id.
        prefix: beginning of the names.
        names: names of the tensors; by default all.
        hub_kwargs: options of the download, and `variant`.

    Raises:
        OSError: if a file is missing or damaged.
    """
    weights = {}
    for file in weight_files(path, **hub_kwargs):
        with open_weights(file) as tensors:
            found = [name for name in tensors.keys() if name.startswith(prefix) and (names is None or name in names)]  # noqa: SIM118
            weights.update({name: tensors.get_tensor(name) for name in found})
    return weights


def read_shapes(path: str | os.PathLike, **hub_kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a folder or Hub repository, read from the headers of the safetensors files.

    Raises:
        OSError: if a file is missing or damaged.
    """
    shapes = {}
    for file in weight_files(path, **hub_kwargs):
        with open_weights(file) as tensors:
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    return shapes


def read_dora_magnitudes(adapter: str | os.PathLike, **hub_kwargs: Any) -> dict[str, torch.Tensor]:
    """Return the magnitudes of a DoRA adapter by the names of a captioner's parameters.

    transformers does not find them by the names under which peft saves them.
    """
    with open_weights(fetch_file(adapter, ADAPTER_SAFE_WEIGHTS_NAME, **hub_kwargs)) as tensors:
        return {
            name.removeprefix("base_model.model.") + ".default.weight": tensors.get_tensor(name)
            for name in tensors.keys()  # noqa: SIM118
            if name.endswith(".lora_magnitude_vector")
        }


def count_weights(path: str | os.PathLike, **hub_kwargs: Any) -> int:
    """Return the number of elements of all tensors, read from the headers of the safetensors files.

    Raises:
        OSError: if a file is missing or damaged.
    """
    return sum(map(math.prod, read_shapes(path, **hub_kwargs).values()))
