"""Cost of the border between vision encoder and Q-Former: `python -m benchmarks.encoders`.

One side calls a vision transformer itself, the other `encode_images`, which turns the output of any encoder into
features and a mask. Both must return the same features before they are timed. The times are those of the processor,
because the difference is smaller than the noise of a machine that does other work, too.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import ModelOutput

from qformer_captioner.vision_qformer import encode_images

from .common import machine_facts, summarize, write_result

ENCODERS = {
    "DINOv2-small": dict(model_type="dinov2", hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
    "CLIP ViT-B/32": dict(model_type="clip_vision_model"),
}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=2, help="Number of images in a batch.")
    parser.add_argument("--repetitions", type=int, default=30, help="Number of timed runs of each side.")
    return parser.parse_args()


def processor_seconds(run: Callable[[torch.Tensor], ModelOutput], images: torch.Tensor) -> float:
    start = time.process_time()
    run(images)
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    facts = machine_facts("torch", "transformers") | {"images": options.images}
    for title, fields in ENCODERS.items():
        torch.manual_seed(0)
        encoder = AutoModel.from_config(AutoConfig.for_model(**fields)).eval().requires_grad_(False)
        images = torch.randn(options.images, 3, 224, 224)
        sides: dict[str, Callable[[torch.Tensor], ModelOutput]] = {
            "encoder": encoder,
            "ours": functools.partial(encode_images, encoder),
        }
        assert torch.equal(*(run(images).last_hidden_state for run in sides.values()))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.repetitions):
            for name, run in sides.items():
                seconds[name].append(processor_seconds(run, images))
        ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["encoder"])
        times = {name: summarize(values) for name, values in seconds.items()}
        write_result("encoders", facts | {"encoder": title, "ratio": ratio, "seconds": times})
        print(f"{title:<16} {ratio:.3f} times the time of the encoder", flush=True)


if __name__ == "__main__":
    main()
