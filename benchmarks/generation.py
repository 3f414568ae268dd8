"""Captions by beam search beside transformers' BLIP-2: `python -m benchmarks.generation`.

The same weights on both sides, in the shapes of CLIP ViT-B/32, BLIP-2's Q-Former and SmolLM2-135M, float32. Both
write captions of up to 20 tokens with 5 beams for 16 images; the token ids must be identical before anything is timed.
Ours are timed twice: inside `onednn_linears`, as our commands write them, and without.
"""

import argparse
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from transformers import Blip2ForConditionalGeneration

from qformer_captioner import QFormerCaptioner, onednn_linears

from .blip2 import DECODERS, QUERIES, TITLES, image_tokens, load, make_batch, save_both
from .common import alternate, machine, spread, write_result


@torch.no_grad()
def write(
    model: QFormerCaptioner | Blip2ForConditionalGeneration, pixel_values: torch.Tensor, onednn: bool = True, **options
) -> torch.Tensor:
    """Return the token ids of the captions alone. `onednn` runs ours inside `onednn_linears`, BLIP-2's never are."""
    if isinstance(model, QFormerCaptioner):
        with onednn_linears(model.device) if onednn else nullcontext():
            return model.generate(pixel_values=pixel_values, **options)
    ids = model.generate(pixel_values=pixel_values, **image_tokens(len(pixel_values)), **options)
    # A decoder's ids begin with the prompt, an encoder-decoder's with the start token.
    return ids[:, 1:] if model.config.text_config.is_encoder_decoder else ids[:, QUERIES:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=["llama", "t5"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--num_beams", nargs="+", type=int, default=[5, 1])
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for decoder in options.decoder:
        with tempfile.TemporaryDirectory() as folder:
            save_both(DECODERS[decoder], Path(folder))
            ours, peer = load("ours", Path(folder)), load("peer", Path(folder))
        pixel_values, _ = make_batch(options.images, 1)
        for beams in options.num_beams:
            how = dict(num_beams=beams, max_new_tokens=options.max_new_tokens)
            print(f"{TITLES[decoder]}, {options.images} images, {beams} beams, {options.max_new_tokens} tokens")
            if not torch.equal(write(ours, pixel_values, **how), write(peer, pixel_values, **how)):
                raise SystemExit("The two sides do not write the same captions: no timing.")
            sides = {
                "ours": partial(write, ours, pixel_values, **how),
                "blip2": partial(write, peer, pixel_values, **how),
                "ours, no oneDNN": partial(write, ours, pixel_values, onednn=False, **how),
            }
            seconds = alternate(options.repetitions, **sides)
            times = {name: spread(values) for name, values in seconds.items()}
            ratio = {name: times["blip2"]["median"] / own["median"] for name, own in times.items()}
            for name, own in times.items():
                print(
                    f"  {name:<16}{own['median']:7.2f} s  ({own['min']:.2f} to {own['max']:.2f}), {ratio[name]:.2f} x "
                    "BLIP-2's captions per second"
                )
            print("  identical token ids")
            shape = {"decoder": decoder, "images": options.images, "threads": options.threads, **how}
            facts = machine("qformer-captioner", "transformers", "torch")
            write_result("generation", facts | shape | {"seconds": times, "ratio": ratio})


if __name__ == "__main__":
    main()
