"""The memory of a training step beside that of transformers' BLIP-2: `python -m benchmarks.memory` (Linux).

The same weights on both sides, in the shapes of CLIP ViT-B/32, BLIP-2's Q-Former and SmolLM2-135M with Llama 3's
vocabulary of 128,256 words. Each side takes its step in a process of its own, of which the kernel tells the peak
(`VmHWM`); the losses must be equal. A second step, untold, notes the largest float32 array of logits, and what torch
asked its allocator for at the most, weights included: what `torch.cuda.max_memory_allocated` is on a GPU. The kernel's
figure has Python and libraries in it, and what the allocator could not give out a second time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from .blip2 import DECODERS, TITLES, load, make_batch, save_both, training_step
from .common import machine, memory, spread, write_result


class LargestLogits(TorchDispatchMode):
    """Notes the largest float32 array whose last dimension is the vocabulary and which is no weight."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.vocabulary, self.width, self.mb = vocabulary, width, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) and result.dtype == torch.float32 else ()
        if shape[-1:] == (self.vocabulary,) and shape != (self.width, self.vocabulary):
            self.mb = max(self.mb, result.numel() * 4 / 2**20)
        return result


def measure(side: str, folder: Path, images: int, captions: int) -> dict[str, float]:
    """One step of one side in this process: loss, memory before, at the peak, asked for, largest array of logits."""
    model, batch = load(side, folder), make_batch(images, captions)
    for weight in model.parameters():
        weight.sum()  # a file of weights takes memory when they are first looked at, which is before the step
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    loss = training_step(model, *batch)
    peak = memory("VmHWM")
    language = model.language_model.config
    model.zero_grad()
    with LargestLogits(language.vocab_size, language.hidden_size) as largest, profile(profile_memory=True) as recorded:
        training_step(model, *batch)
    return {
        "loss": loss,
        "before_mb": before,
        "peak_mb": peak,
        "asked_mb": most_asked(recorded) + sum(weight.nbytes for weight in model.parameters()) / 2**20,
        "logits_mb": largest.mb,
    }


def most_asked(recorded: profile) -> float:
    """The most memory that torch had at any time from its allocator since the profile began, in MB."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # freed ones are negative
    return max(accumulate(sizes)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # side, folder, images, captions
    options = parser.parse_args()
    if options.one:
        side, folder, images, captions = options.one
        print(json.dumps(measure(side, Path(folder), int(images), int(captions))))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_both(DECODERS["llama-128k"], Path(folder))
        for images in options.images:
            print(f"{TITLES['llama-128k']}, {images} images, {options.captions} captions each")
            results: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
            for _ in range(options.repetitions):
                for side, own in results.items():
                    command = [sys.executable, "-m", "benchmarks.memory", "--one", side, folder]
                    run = subprocess.run(
                        [*command, str(images), str(options.captions)], check=True, stdout=subprocess.PIPE
                    )
                    own.append(json.loads(run.stdout.splitlines()[-1]))
            difference = abs(results["ours"][0]["loss"] - results["peer"][0]["loss"])
            if difference > 1e-5:
                raise SystemExit("The two sides do not compute the same thing: no measurement.")
            figures = {
                side: {name: spread([run[name] for run in own]) for name in own[0] if name != "loss"}
                for side, own in results.items()
            }
            for side, own in figures.items():
                print(
                    f"  {side:<5} {own['peak_mb']['median']:6.0f} MB at the peak, {own['before_mb']['median']:6.0f} MB "
                    f"before; asked for {own['asked_mb']['median']:6.0f} MB; largest array of logits "
                    f"{own['logits_mb']['median']:6.0f} MB"
                )
            peak = {side: own["peak_mb"]["median"] for side, own in figures.items()}
            above = {side: peak[side] - own["before_mb"]["median"] for side, own in figures.items()}
            asked = {side: own["asked_mb"]["median"] for side, own in figures.items()}
            ratios = {
                name: values["ours"] / values["peer"]
                for name, values in {"peak": peak, "above": above, "asked": asked}.items()
            }
            print(
                f"  {ratios['peak']:.2f} x BLIP-2's peak; {ratios['above']:.2f} x what its step adds to the weights; "
                f"{ratios['asked']:.2f} x what it asks for, weights included"
            )
            shape = {"images": images, "captions": options.captions, "vocabulary": 128256}
            facts = machine("qformer-captioner", "transformers", "torch")
            write_result("memory", facts | shape | {"loss_difference": difference, "mb": figures, "ratio": ratios})


if __name__ == "__main__":
    main()
