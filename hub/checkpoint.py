"""Reader of single tensors of a checkpoint in a folder or on the Hub."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..backbones_qformer import check_number_of_layers
from ..common.errors import UNUSABLE, InputError
from ..configuration_qformer import QFormerCaptionerConfig, QFormerConfig
from ..weights_qformer import open_weights, weight_files

TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """Location, shape and dtype of a tensor in a safetensors file.

    Args:
        file: path of the file.
        shape: shape of the tensor.
        dtype: dtype as safetensors writes it, such as `"BF16"`.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)


class Checkpoint:
    """Configuration and tensors of a folder or Hub repository. Tensors are read when they are needed.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: if the checkpoint does not exist, or one of its files is missing or cut off.

    Example:

    ```python
    >>> checkpoint = Checkpoint("Salesforce/blip2-opt-2.7b")  # doctest: +SKIP
    >>> checkpoint.tensors["query_tokens"].shape  # doctest: +SKIP
    (1, 32, 768)
    ```
    """

    def __init__(self, source: str | os.PathLike, revision: str | None = None):
        self.source, self.revision = os.fspath(source), revision
        try:
            self.config = read_config(self.source, revision)
            files = weight_files(self.source, revision=revision)
        except (*UNUSABLE, OSError) as error:
            raise InputError(
                f"The checkpoint {self.source!r} cannot be read: {str(error).splitlines()[0]} Give a folder or Hub id "
                "with a config.json and safetensors files."
            ) from error
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            try:
                self.tensors |= read_header(file)
            except OSError as error:
                raise InputError(f"The checkpoint {self.source!r} cannot be read: {error}") from error

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors into memory.

        Each file is opened for every call, because the pages that were read stay mapped until the file is closed.
        """
        names_of_file: dict[str, list[str]] = {}
        for name in names:
            names_of_file.setdefault(self.tensors[name].file, []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for file, names_in_file in names_of_file.items():
            with open_weights(file) as weights:
                tensors |= {name: weights.get_tensor(name) for name in names_in_file}
        return tensors

    def most_common_dtype(self, names: Iterable[str]) -> str:
        """Return the name of the most common torch dtype of tensors, such as `"bfloat16"`."""
        dtypes = [self.tensors[name].dtype for name in names]
        most_common = max(sorted(set(dtypes)), key=dtypes.count)
        return TORCH_DTYPES.get(most_common, "float32")


def read_config(source: str, revision: str | None) -> PreTrainedConfig:
    """Read a configuration without running any code of its repository.

    Raises:
        OSError: if the configuration is missing, or asks for too many layers.
    """
    model_type = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
    config: PreTrainedConfig
    if model_type == QFormerConfig.model_type:
        config = QFormerConfig.from_pretrained(source, revision=revision or "main")
    elif model_type == QFormerCaptionerConfig.model_type:
        config = QFormerCaptionerConfig.from_pretrained(source, revision=revision or "main")
    elif model_type in CONFIG_MAPPING or model_type is None:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    else:  # a model that transformers does not know may hold a Q-Former
        config = PreTrainedConfig.from_pretrained(source, revision=revision or "main")
        config.model_type = model_type  # type: ignore[misc]  # the generic class has none
    check_number_of_layers(config)
    return config


def read_header(file: str) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        OSError: if the file is missing or cut off.
    """
    stored = {}
    with open_weights(file) as weights:
        for name in weights.keys():  # noqa: SIM118, safe_open is not a dictionary
            tensor = weights.get_slice(name)
            stored[name] = StoredTensor(file, tuple(tensor.get_shape()), str(tensor.get_dtype()))
    return stored
