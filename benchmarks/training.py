r"""A training step of our captioner and of transformers' BLIP-2: `python -m benchmarks.training`.

Both sides have the same weights. The shapes are those of CLIP ViT-B/32, BLIP-2's Q-Former (12 layers, 768 wide, 32
query tokens) and SmolLM2-135M or T5-base. Captions have 10 to 16 tokens, and nothing has dropout. BLIP-2 gets one row
for each image and caption, as in its usual training.

Both sides first compute loss and gradients in float32, which must be equal. Then they are timed in turn. On a CPU our
step is timed inside `onednn_linears`, as our Trainer runs it, and without. Steps with 1 to 10 captions per image and
with 1 to 16 images show at the end how the cost grows.

On a GPU, with the shape of CLIP ViT-L/14:

    python -m benchmarks.training --device cuda --dtype bfloat16 --compile --decoder smollm2-1.7b llama-3.2-3b \
        --images 16 --growth_repetitions 0
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Blip2ForConditionalGeneration

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.onednn import has_relu, onednn_linears

from .blip2 import (
    DECODERS,
    LARGE_DECODERS,
    TITLES,
    VIT_B_32,
    VIT_L_14,
    build_both,
    check_equal,
    make_batch,
    training_step,
)
from .common import (
    count_gflop,
    machine_facts,
    matrix_rate,
    new_figure,
    save_figure,
    summarize,
    time_in_turn,
    time_ratios,
    write_result,
)

# Steps that show how the cost grows, and the fewer ones for which BLIP-2 is timed as well.
GROWTH_CAPTIONS, BLIP2_CAPTIONS = range(1, 11), (1, 5, 10)
GROWTH_IMAGES, BLIP2_IMAGES = (1, 2, 4, 8, 16), (1, 4)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=["llama", "t5"], help="Language models.")
    parser.add_argument("--captions", nargs="+", type=int, default=[5, 1], help="Numbers of captions per image.")
    parser.add_argument("--images", type=int, default=4, help="Number of images in a batch.")
    parser.add_argument("--repetitions", type=int, default=5, help="Number of timed steps of each side.")
    parser.add_argument(
        "--growth_repetitions",
        type=int,
        default=3,
        help="Timed steps for each point of the figure. 0 skips the figure.",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Number of CPU threads.")
    parser.add_argument("--device", default="cpu", help="Device of the models.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Data type of timed steps.")
    parser.add_argument("--compile", action="store_true", help="Time both sides with torch.compile as well.")
    return parser.parse_args()


def features_step(model: QFormerCaptioner, image_embeds: torch.Tensor, labels: torch.Tensor) -> None:
    """Run our training step on precomputed image features `[B, N, Dv]`."""
    model.zero_grad()
    with onednn_linears(model.device, backward_only=has_relu(model)):
        model(image_embeds=image_embeds, labels=labels).loss.backward()


def compiled_steps(
    models: dict[str, torch.nn.Module], pixel_values: torch.Tensor, labels: torch.Tensor
) -> dict[str, Callable[[], float]]:
    """Return the training step of each model with `torch.compile`."""
    torch._dynamo.reset()  # otherwise the second number of captions would be compiled with dynamic shapes
    return {
        f"{name}, compiled": partial(training_step, model, pixel_values, labels, torch.compile(model), onednn=False)
        for name, model in models.items()
    }


def measure_step(
    ours: QFormerCaptioner,
    peer: Blip2ForConditionalGeneration,
    captions: int,
    rate: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Check that both sides are equal in float32, then time their training steps in turn.

    Both models are left in `options.dtype`.

    Args:
        ours: our captioner.
        peer: BLIP-2 with the same weights.
        captions: number of captions per image.
        rate: result of [`matrix_rate`], for the share of it that each side reaches.
        options: options of the command line.
    """
    dtype = getattr(torch, options.dtype)
    pixel_values, labels = (tensor.to(options.device) for tensor in make_batch(options.images, captions))
    equality = check_equal(ours.float(), peer.float(), pixel_values, labels)
    models = {"ours": ours.to(dtype), "blip2": peer.to(dtype)}
    pixel_values = pixel_values.to(dtype)
    steps: dict[str, Callable[[], object]] = {
        name: partial(training_step, model, pixel_values, labels) for name, model in models.items()
    }
    steps["features"] = partial(features_step, ours, ours.encode_images(pixel_values).last_hidden_state, labels)
    if options.device == "cpu":
        steps["ours, no oneDNN"] = partial(training_step, ours, pixel_values, labels, onednn=False)
    gflop = {name: count_gflop(step) for name, step in steps.items()}
    if options.compile:
        steps |= compiled_steps(models, pixel_values, labels)
        gflop |= {f"{name}, compiled": gflop[name] for name in models}

    times = {name: summarize(seconds) for name, seconds in time_in_turn(options.repetitions, **steps).items()}
    ratios = time_ratios(times, "blip2")
    for name, seconds in times.items():
        print(
            f"  {name:<16}{seconds['median']:7.3f} s  ({seconds['min']:.3f} to {seconds['max']:.3f}), "
            f"{ratios[name]:.2f} x BLIP-2's pairs per second; {gflop[name]:.0f} GFLOP, "
            f"{gflop[name] / seconds['median'] / rate:.0%} of the rate of large matrices"
        )
    return {"captions": captions, "gflop": gflop, **equality, "seconds": times, "ratio": ratios}


def measure_vision(model: QFormerCaptioner, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Time the vision encoder, which is the same on both sides, and compare it with the rate of large matrices."""
    pixel_values = make_batch(options.images, 1)[0].to(options.device, model.dtype)
    encode = partial(model.encode_images, pixel_values)
    gflop = count_gflop(encode)
    with onednn_linears(model.device):
        seconds = summarize(time_in_turn(options.repetitions, encode=encode)["encode"])
    print(
        f"features of {options.images} images: {seconds['median']:.3f} s, "
        f"{options.images / seconds['median']:.0f} images per second, "
        f"{gflop / seconds['median'] / rate:.0%} of the rate of large matrices"
    )
    return {"gflop": {"vision": gflop}, "seconds": {"vision": seconds}}


def measure_growth(
    ours: QFormerCaptioner, peer: Blip2ForConditionalGeneration, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time steps with more and more captions per image, and with more and more images of 5 captions."""
    points = [("captions", options.images, captions, captions in BLIP2_CAPTIONS) for captions in GROWTH_CAPTIONS]
    points += [("images", images, 5, images in BLIP2_IMAGES) for images in GROWTH_IMAGES]
    rows = []
    for grows, images, captions, times_blip2 in points:
        pixel_values, labels = (tensor.to(options.device) for tensor in make_batch(images, captions))
        batch = pixel_values.to(getattr(torch, options.dtype)), labels
        steps = {"ours": partial(training_step, ours, *batch)}
        if times_blip2:
            steps["blip2"] = partial(training_step, peer, *batch)
        seconds = time_in_turn(options.growth_repetitions, **steps)
        medians = {name: summarize(values)["median"] for name, values in seconds.items()}
        rows.append({"grows": grows, "images": images, "captions": captions} | medians)
        figures = ", ".join(f"{name} {median:.2f} s" for name, median in medians.items())
        print(f"  {images:>2} images, {captions:>2} captions: {figures}")
    return rows


def plot_growth(rows: list[dict[str, Any]]) -> None:
    """Draw the seconds of a step over captions per image and over images in a batch."""
    figure, axes = new_figure(2, 9, 3.5)
    for axis, grows, label in ((axes[0], "captions", "captions per image"), (axes[1], "images", "images in a batch")):
        for decoder in dict.fromkeys(row["decoder"] for row in rows):
            for side, title, style in (("ours", "ours", "-"), ("blip2", "BLIP-2", "--")):
                points = [
                    (row[grows], row[side])
                    for row in rows
                    if row["decoder"] == decoder and row["grows"] == grows and side in row
                ]
                axis.plot(*zip(*points, strict=True), style, marker=".", label=f"{TITLES[decoder]}, {title}")
        axis.set(xlabel=label, ylabel="seconds of a step", xlim=(0, None), ylim=(0, None))
    axes[0].legend(fontsize=8)
    save_figure(figure, "training")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # convolutions must be float32 where both sides are checked for equality
    rate = matrix_rate(options.device, getattr(torch, options.dtype))
    print(f"large matrices: {rate:.0f} GFLOP/s")
    facts = machine_facts("qformer-captioner", "transformers", "torch")
    facts |= {name: getattr(options, name) for name in ("images", "threads", "device", "dtype")}
    facts["matrix_gflop_per_second"] = rate
    growth: list[dict[str, Any]] = []
    for decoder in options.decoder:
        vision = VIT_L_14 if decoder in LARGE_DECODERS else VIT_B_32
        ours, peer = build_both(DECODERS[decoder], vision, options.device)
        for captions in options.captions:
            print(f"{TITLES[decoder]}, {options.images} images, {captions} captions each")
            write_result("training", facts | {"decoder": decoder} | measure_step(ours, peer, captions, rate, options))
        write_result("training", facts | {"decoder": decoder} | measure_vision(ours, rate, options))
        if options.growth_repetitions:
            growth += [{"decoder": decoder} | row for row in measure_growth(ours, peer, options)]
    if growth:
        plot_growth(growth)
        write_result("training_growth", machine_facts("torch") | {"threads": options.threads, "rows": growth})


if __name__ == "__main__":
    main()
