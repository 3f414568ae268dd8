"""What every benchmark needs: alternating repetitions, facts of the machine, a line of JSON per result."""

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"


def alternate(repetitions: int, **sides: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each side, measured in turn (A B A B ...) behind a warm-up each: a slow spell hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if torch.accelerator.is_available():  # which goes on by itself
                torch.accelerator.synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def machine(*packages: str) -> dict[str, object]:
    """Processor, cores, Python, and the versions of the packages that were measured."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processor = next(
            (line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")),
            processor,
        )
    facts = {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {package: version(package) for package in packages}


def write_result(name: str, result: dict[str, object]) -> None:
    """Append a result to `benchmarks/results/<name>.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as lines:
        lines.write(json.dumps(result) + "\n")


def memory(kind: str) -> float:
    """Of this process, in MB (Linux): what it has (`VmRSS`), or has had at the most (`VmHWM`)."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def operations(run: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products in a run, forward and backward, in units of 1e9."""
    of_linear = {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]}
    with FlopCounterMode(display=False, custom_mapping=of_linear) as counter:
        run()
    return counter.get_total_flops() / 1e9


def matrix_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """The most that this machine multiplies, in 1e9 operations per second: large square matrices, the best of 5."""
    size = 2048 if device == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    best = min(alternate(5, product=lambda: left @ right)["product"])
    return 2 * size**3 / best / 1e9
