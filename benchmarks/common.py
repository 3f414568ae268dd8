"""Shared parts of the benchmarks: timing in turn, facts about the machine, memory, result files and figures."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

RESULTS_DIR = Path(__file__).parent / "results"


def time_in_turn(repetitions: int, **sides: Callable[[], object]) -> dict[str, list[float]]:
    """Time all sides in turn (A B A B ...), after one warm-up run of each.

    A slow spell of the machine then affects every side alike.

    Args:
        repetitions: number of timed runs of each side.
        sides: the function to time, by name of the side.

    Returns:
        The seconds of each timed run, by name of the side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if torch.accelerator.is_available():  # its kernels run asynchronously
                torch.accelerator.synchronize()
            if repetition > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(values: list[float]) -> dict[str, float]:
    """Return the smallest, the median and the largest value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def time_ratios(times: dict[str, dict[str, float]], baseline: str) -> dict[str, float]:
    """Return how many times as fast as the baseline each side is, from summaries of seconds."""
    return {name: times[baseline]["median"] / summary["median"] for name, summary in times.items()}


def machine_facts(*packages: str) -> dict[str, Any]:
    """Return processor, number of cores, GPU, Python version and the versions of the measured packages."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model_name = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        processor = model_name[1] if model_name else processor
    facts: dict[str, Any] = {
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {package: version(package) for package in packages}


def resident_memory() -> float:
    """Return the resident memory of this process in MB (Linux)."""
    return _process_status_mb("VmRSS")


def peak_memory() -> float:
    """Return the largest resident memory that this process has had, in MB (Linux)."""
    return _process_status_mb("VmHWM")


def _process_status_mb(field: str) -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].removesuffix("kB")) / 1024


class CountFlop(TorchDispatchMode):
    """Context that counts the floating-point operations of matrix products, in `total`.

    `FlopCounterMode` cannot count a step that computes gradients in its forward pass, because it follows modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        operation = function._overloadpacket
        if operation is torch.ops.mkldnn._linear_pointwise:
            inputs, weight = args[:2]
            self.total += 2 * inputs.numel() * len(weight)
        elif operation in flop_registry:
            self.total += flop_registry[operation](*args, **(kwargs or {}), out_val=result)
        return result


def count_gflop(run: Callable[[], object]) -> float:
    """Return the floating-point operations of the matrix products in a run, forward and backward, in units of 1e9."""
    with CountFlop() as counter:
        run()
    return counter.total / 1e9


def matrix_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return the GFLOP/s at which this machine multiplies large square matrices, the best of 5 runs."""
    size = 2048 if device == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = time_in_turn(5, product=lambda: left @ right)["product"]
    return 2 * size**3 / min(seconds) / 1e9


def run_worker(benchmark: str, *arguments: object) -> dict[str, float]:
    """Take one measurement in a fresh process, with `python -m benchmarks.<benchmark> --worker <arguments>`.

    Returns:
        The JSON object in the last line that the process prints.
    """
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--worker", *map(str, arguments)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout.splitlines()[-1])


def write_result(name: str, result: dict[str, Any]) -> None:
    """Append a result to `benchmarks/results/<name>.jsonl`."""
    RESULTS_DIR.mkdir(exist_ok=True)
    with (RESULTS_DIR / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def new_figure(columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a matplotlib figure of `width` x `height` inches, which needs no display, and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", **options)


def save_figure(figure: Any, name: str) -> None:
    """Draw a grid on all axes of a matplotlib figure and write it to `benchmarks/results/<name>.png`."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    RESULTS_DIR.mkdir(exist_ok=True)
    figure.savefig(RESULTS_DIR / f"{name}.png", dpi=110)
