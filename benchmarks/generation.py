"""Captions from our captioner and from transformers' BLIP-2: `python -m benchmarks.generation`.

Both sides have the same weights in float32. The shapes are those of CLIP ViT-B/32, BLIP-2's Q-Former and SmolLM2-135M
or T5-base. Both sides generate captions of up to 20 tokens for 16 images, by beam search and by greedy decoding. The
token ids must be identical before anything is timed. Our side is timed inside `onednn_linears`, as our commands run it,
and without.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import Blip2ForConditionalGeneration

from qformer_captioner import QFormerCaptioner, onednn_linears

from .blip2 import DECODERS, NUM_QUERY_TOKENS, TITLES, build_both, image_token_inputs, make_batch
from .common import machine_facts, summarize, time_in_turn, time_ratios, write_result


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=["llama", "t5"], help="Language models.")
    parser.add_argument("--images", type=int, default=16, help="Number of images in a batch.")
    parser.add_argument("--num_beams", nargs="+", type=int, default=[5, 1], help="Numbers of beams.")
    parser.add_argument("--max_new_tokens", type=int, default=20, help="Largest number of tokens of a caption.")
    parser.add_argument("--repetitions", type=int, default=5, help="Number of timed batches of each side.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Number of CPU threads.")
    return parser.parse_args()


@torch.no_grad()
def generate(
    model: QFormerCaptioner | Blip2ForConditionalGeneration,
    pixel_values: torch.Tensor,
    onednn: bool = True,
    **generation_options: int,
) -> torch.Tensor:
    """Return the token ids `[B, T]` of the captions, without prompt and start token.

    Args:
        model: our captioner or BLIP-2.
        pixel_values: images `[B, 3, 224, 224]`.
        onednn: run our side inside [`onednn_linears`], as our commands do. BLIP-2 always runs without.
        generation_options: options of `generate`.
    """
    if isinstance(model, QFormerCaptioner):
        with onednn_linears(model.device) if onednn else nullcontext():
            return model.generate(pixel_values=pixel_values, **generation_options)
    inputs = image_token_inputs(len(pixel_values))
    token_ids = model.generate(pixel_values=pixel_values, **inputs, **generation_options)
    # The ids of a decoder-only model begin with the prompt, those of an encoder-decoder with the start token.
    return token_ids[:, 1:] if model.config.text_config.is_encoder_decoder else token_ids[:, NUM_QUERY_TOKENS:]


def measure(
    ours: QFormerCaptioner,
    peer: Blip2ForConditionalGeneration,
    images: int,
    repetitions: int,
    generation_options: dict[str, int],
) -> dict[str, Any]:
    """Check that both sides generate the same captions, then time them in turn.

    Raises:
        SystemExit: if the token ids differ.
    """
    pixel_values, _ = make_batch(images, 1)
    sides = {
        "ours": partial(generate, ours, pixel_values, **generation_options),
        "blip2": partial(generate, peer, pixel_values, **generation_options),
        "ours, no oneDNN": partial(generate, ours, pixel_values, onednn=False, **generation_options),
    }
    if not torch.equal(sides["ours"](), sides["blip2"]()):
        raise SystemExit("Both sides must generate the same captions, and they do not. Nothing was measured.")
    times = {name: summarize(seconds) for name, seconds in time_in_turn(repetitions, **sides).items()}
    ratios = time_ratios(times, "blip2")
    for name, seconds in times.items():
        print(
            f"  {name:<16}{seconds['median']:7.2f} s  ({seconds['min']:.2f} to {seconds['max']:.2f}), "
            f"{ratios[name]:.2f} x BLIP-2's captions per second"
        )
    print("  identical token ids")
    return {"seconds": times, "ratio": ratios}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    facts = machine_facts("qformer-captioner", "transformers", "torch")
    for decoder in options.decoder:
        ours, peer = build_both(DECODERS[decoder])
        for num_beams in options.num_beams:
            print(f"{TITLES[decoder]}, {options.images} images, {num_beams} beams, {options.max_new_tokens} tokens")
            generation_options = {"num_beams": num_beams, "max_new_tokens": options.max_new_tokens}
            result = measure(ours, peer, options.images, options.repetitions, generation_options)
            shape = {"decoder": decoder, "images": options.images, "threads": options.threads, **generation_options}
            write_result("generation", facts | shape | result)


if __name__ == "__main__":
    main()
