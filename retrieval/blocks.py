"""Blocks of results on disk, each written in one piece, so that a killed run continues with the next one."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..common.files import atomic_path
from ..data.feature_shards import remove_unfinished


class Block(NamedTuple):
    """Results for some consecutive rows.

    Attributes:
        tensors: the results by name, on the CPU.
        notes: plain JSON that belongs to them.
    """

    tensors: dict[str, torch.Tensor]
    notes: Any = None


class BlockFolder:
    """Folder of numbered blocks. Each file holds the key of the inputs from which it was computed.

    A file is written under another name and then renamed, so it is complete or does not exist.

    Args:
        folder: the folder; it is created.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from qformer_captioner.retrieval.blocks import Block, BlockFolder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     blocks = BlockFolder(folder)
    ...     blocks.write(0, "inputs", Block({"values": torch.ones(2)}))
    ...     blocks.read(0, "inputs").tensors["values"], blocks.read(0, "other inputs")
    (tensor([1., 1.]), None)
    ```
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        """Return the file of a block."""
        return self.folder / f"{number:05}.safetensors"

    def has(self, number: int, key: str) -> bool:
        """Return True if a block exists and was computed from the inputs of this key."""
        return self._record(number, key) is not None

    def read(self, number: int, key: str) -> Block | None:
        """Return a block, or `None` if it is missing, damaged, or was computed from other inputs."""
        record = self._record(number, key)
        if record is None:
            return None
        with safe_open(self.path(number), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
        return Block(tensors, record["notes"])

    def write(self, number: int, key: str, block: Block) -> None:
        """Write a block in one piece.

        Args:
            number: number of the block.
            key: key of the inputs from which it was computed.
            block: the results.
        """
        tensors = {name: tensor.contiguous() for name, tensor in block.tensors.items()}
        with atomic_path(self.path(number)) as unfinished:
            # One entry, because safetensors writes several in random order.
            save_file(tensors, unfinished, {"block": json.dumps({"key": key, "notes": block.notes})})

    def _record(self, number: int, key: str) -> dict[str, Any] | None:
        """Return key and notes of a block, or `None` if it does not exist or has another key."""
        try:
            with safe_open(self.path(number), "pt") as file:  # compares the size of the file with its header
                record = json.loads((file.metadata() or {}).get("block", "{}"))
        except (OSError, SafetensorError):
            return None
        return record if record.get("key") == key else None


def key_of(*inputs: Any) -> str:
    """Return a key of inputs, which are plain JSON, bytes or tensors of integers."""
    digest = hashlib.sha256()
    for each in inputs:
        if isinstance(each, torch.Tensor):
            each = each.cpu().numpy().tobytes()
        digest.update(each if isinstance(each, bytes) else json.dumps(each).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def compute_blocks(
    folder: BlockFolder,
    keys: Sequence[str],
    sizes: Sequence[int],
    compute: Callable[[list[int]], Iterable[Block]],
    description: str,
) -> Iterator[Block]:
    """Compute the blocks that do not exist yet, shared by all processes, and yield all of them in order.

    Args:
        folder: folder of the blocks, on a disk that all processes share.
        keys: key of the inputs of each block.
        sizes: number of rows of each block, for the progress bar.
        compute: function that yields the blocks of the given numbers in order.
        description: label of the progress bar.
    """
    state = PartialState()
    if state.is_main_process:
        remove_unfinished(folder.folder)
    missing = [number for number, key in enumerate(keys) if not folder.has(number, key)]
    state.wait_for_everyone()  # no process may write before all know which blocks are missing
    share = missing[state.process_index :: state.num_processes]
    finished = sum(sizes) - sum(sizes[number] for number in missing)
    with tqdm(
        total=sum(sizes), initial=finished, desc=description, disable=not state.is_main_process or not missing
    ) as progress:
        for number, block in zip(share, compute(share) if share else (), strict=True):
            folder.write(number, keys[number], block)
            progress.update(min(sizes[number] * state.num_processes, progress.total - progress.n))
    state.wait_for_everyone()
    for number, key in enumerate(keys):
        block_of_number = folder.read(number, key)
        if block_of_number is None:
            raise OSError(f"The file {str(folder.path(number))!r} was removed or damaged while the run used it.")
        yield block_of_number
