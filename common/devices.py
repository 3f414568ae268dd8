"""The accelerator of a process: [`device_of`]."""

import torch


def device_of(rank: int | None = None) -> torch.device:
    """Return the accelerator of a process, or the CPU on a machine without accelerator.

    Args:
        rank: number of the process. Processes share the accelerators evenly. By default, the current accelerator.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    if rank is None:
        return accelerator
    return torch.device(accelerator.type, rank % torch.accelerator.device_count())
