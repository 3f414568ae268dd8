"""Memory of a training step of our captioner and of transformers' BLIP-2: `python -m benchmarks.memory` (Linux).

Both sides have the same weights. The shapes are those of CLIP ViT-B/32, BLIP-2's Q-Former and SmolLM2-135M with the
vocabulary of Llama 3 (128,256 tokens). Each side runs its step in a separate process, and the losses must be equal.

The kernel reports the peak of the process (`VmHWM`). It includes Python, the libraries, and memory that the allocator
could not reuse. A second step, under the profiler, gives the peak of what torch requested from its allocator, weights
included. On a GPU that is `torch.cuda.max_memory_allocated`. The second step also gives the largest float32 array of
logits.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from .blip2 import DECODERS, TITLES, load, make_batch, save_both, training_step
from .common import machine_facts, peak_memory, resident_memory, run_worker, summarize, write_result

DECODER = "llama-128k"
MB = 2**20


class LargestLogits(TorchDispatchMode):
    """Context that records the size in MB of the largest float32 array of logits, in `mb`.

    Logits are arrays whose last dimension is the vocabulary. The transposed embeddings, `[D, V]`, are left out.
    """

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.vocab_size, self.hidden_size, self.mb = vocab_size, hidden_size, 0.0

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            is_weight = result.shape == (self.hidden_size, self.vocab_size)
            if result.shape[-1:] == (self.vocab_size,) and not is_weight:
                self.mb = max(self.mb, result.nbytes / MB)
        return result


def measure(side: str, folder: Path, images: int, captions: int) -> dict[str, float]:
    """Run a training step of one side in this process.

    Args:
        side: `"ours"` or `"peer"`.
        folder: folder of [`save_both`].
        images: number of images in the batch.
        captions: number of captions per image.

    Returns:
        `loss`, and in MB: `before_mb` (resident memory before the step), `peak_mb` (peak resident memory), `asked_mb`
        (peak of the allocator, weights included) and `logits_mb` (largest float32 array of logits).
    """
    model, batch = load(side, folder), make_batch(images, captions)
    for parameter in model.parameters():
        parameter.sum()  # reads the weights from their file, which must happen before the step
    before = resident_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    loss = training_step(model, *batch)
    peak = peak_memory()
    language = model.language_model.config
    model.zero_grad()
    with LargestLogits(language.vocab_size, language.hidden_size) as logits, profile(profile_memory=True) as profiler:
        training_step(model, *batch)
    return {
        "loss": loss,
        "before_mb": before,
        "peak_mb": peak,
        "asked_mb": allocator_peak(profiler) + sum(parameter.nbytes for parameter in model.parameters()) / MB,
        "logits_mb": logits.mb,
    }


def allocator_peak(profiler: profile) -> float:
    """Return the most memory in MB that torch held from its allocator at any time since the profile began."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / MB  # freed memory counts as negative


def compare(folder: Path, images: int, captions: int, repetitions: int) -> dict[str, Any]:
    """Measure both sides in turn, each time in fresh processes.

    Raises:
        SystemExit: if the losses differ by more than 1e-5.
    """
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(repetitions):
        for side, measurements in runs.items():
            measurements.append(run_worker("memory", side, folder, images, captions))
    difference = abs(runs["ours"][0]["loss"] - runs["peer"][0]["loss"])
    if difference > 1e-5:
        raise SystemExit("Both sides must compute the same loss, and they do not. Nothing was measured.")
    summaries = {
        side: {name: summarize([run[name] for run in measurements]) for name in measurements[0] if name != "loss"}
        for side, measurements in runs.items()
    }
    return {"loss_difference": difference, "mb": summaries, "ratio": memory_ratios(summaries)}


def memory_ratios(summaries: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return ours divided by BLIP-2's: of the peak, of what the step adds to `before_mb`, and of the allocator."""
    medians = {side: {name: values["median"] for name, values in mb.items()} for side, mb in summaries.items()}
    ours, peer = medians["ours"], medians["peer"]
    return {
        "peak": ours["peak_mb"] / peer["peak_mb"],
        "above": (ours["peak_mb"] - ours["before_mb"]) / (peer["peak_mb"] - peer["before_mb"]),
        "asked": ours["asked_mb"] / peer["asked_mb"],
    }


def print_comparison(result: dict[str, Any]) -> None:
    for side, mb in result["mb"].items():
        print(
            f"  {side:<5} peak {mb['peak_mb']['median']:6.0f} MB, before the step {mb['before_mb']['median']:6.0f} MB, "
            f"allocator {mb['asked_mb']['median']:6.0f} MB, largest logits {mb['logits_mb']['median']:6.0f} MB"
        )
    ratio = result["ratio"]
    print(
        f"  of BLIP-2's: peak {ratio['peak']:.2f} x, step without the memory before it {ratio['above']:.2f} x, "
        f"allocator {ratio['asked']:.2f} x"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", nargs="+", type=int, default=[4, 8], help="Numbers of images in a batch.")
    parser.add_argument("--captions", type=int, default=5, help="Number of captions per image.")
    parser.add_argument("--repetitions", type=int, default=5, help="Number of processes of each side.")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)  # side, folder, images, captions: see run_worker
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.worker:
        side, folder, images, captions = options.worker
        print(json.dumps(measure(side, Path(folder), int(images), int(captions))))
        return
    facts = machine_facts("qformer-captioner", "transformers", "torch")
    with tempfile.TemporaryDirectory() as folder:
        save_both(DECODERS[DECODER], Path(folder))
        for images in options.images:
            print(f"{TITLES[DECODER]}, {images} images, {options.captions} captions each")
            result = compare(Path(folder), images, options.captions, options.repetitions)
            print_comparison(result)
            shape = {"images": images, "captions": options.captions, "vocabulary": DECODERS[DECODER].vocab_size}
            write_result("memory", facts | shape | result)


if __name__ == "__main__":
    main()
