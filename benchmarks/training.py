"""A training step beside that of transformers' BLIP-2: `python -m benchmarks.training`.

The same weights on both sides: the shapes of CLIP ViT-B/32 and SmolLM2-135M or T5-base, BLIP-2's Q-Former (12
layers, 768 wide, 32 queries), captions of 10 to 16 tokens, float32, no dropout. BLIP-2 gets one row per image and
caption, as it is trained everywhere. Both sides first compute loss and gradients, which must be equal; then they are
timed in turn. On a CPU our step is timed twice: inside `onednn_linears`, as our Trainer runs it, and without.
Last, steps with 1 to 10 captions per image, and with 1 to 16 images, show how the cost grows.

On a GPU, with the shape of CLIP ViT-L/14: `--device cuda --dtype bfloat16 --compile --decoder smollm2-1.7b llama-3.2-3b
--images 16 --growth_repetitions 0`. There the two sides must be equal in float32 before they are timed in bfloat16.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.onednn import has_relu, onednn_linears

from .blip2 import DECODERS, LARGE, TITLES, VIT_B_32, VIT_L_14, compare, load, make_batch, save_both, training_step
from .common import RESULTS, alternate, machine, matrix_rate, operations, spread, write_result

CAPTIONS, IMAGES = range(1, 11), (1, 2, 4, 8, 16)  # how the cost grows


def features_step(model: QFormerCaptioner, image_embeds: torch.Tensor, labels: torch.Tensor) -> None:
    """Run our step on precomputed features."""
    model.zero_grad()
    with onednn_linears(model.device, backward_only=has_relu(model)):
        model(image_embeds=image_embeds, labels=labels).loss.backward()


def time_vision(model: QFormerCaptioner, pixel_values: torch.Tensor, repetitions: int, rate: float) -> dict:
    """Time the vision encoder alone, which is the same on both sides: how near it comes to large matrices."""
    see = partial(model.get_image_features, pixel_values)
    work, images = operations(see), len(pixel_values)
    with onednn_linears(model.device):
        seconds = spread(alternate(repetitions, see=see)["see"])
    print(
        f"features of {images} images: {seconds['median']:.3f} s, {images / seconds['median']:.0f} images per second, "
        f"{work / seconds['median'] / rate:.0%} of what the machine multiplies"
    )
    return {"gflop": {"vision": work}, "seconds": {"vision": seconds}}


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, grows, label in ((axes[0], "captions", "captions per image"), (axes[1], "images", "images in a batch")):
        for decoder in dict.fromkeys(row["decoder"] for row in rows):
            own = [row for row in rows if row["decoder"] == decoder and row["grows"] == grows]
            for side, style in (("ours", "-"), ("blip2", "--")):
                axis.plot(
                    [row[grows] for row in own if side in row],
                    [row[side] for row in own if side in row],
                    style,
                    marker=".",
                    label=f"{TITLES[decoder]}, {'ours' if side == 'ours' else 'BLIP-2'}",
                )
        axis.set(xlabel=label, ylabel="seconds of a step", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(Path(RESULTS) / "training.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=["llama", "t5"])
    parser.add_argument("--captions", nargs="+", type=int, default=[5, 1])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--growth_repetitions", type=int, default=3, help="0 leaves out how the cost grows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="time both sides behind torch.compile, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # or convolutions would not be float32 where the two sides are compared
    dtype = getattr(torch, options.dtype)
    rate, growth = matrix_rate(options.device, dtype), []
    facts = machine("qformer-captioner", "transformers", "torch")
    facts |= {name: getattr(options, name) for name in ("images", "threads", "device", "dtype")}
    facts["matrix_gflop_per_second"] = rate
    print(f"large matrices: {rate:.0f} GFLOP/s")
    for decoder in options.decoder:
        with tempfile.TemporaryDirectory() as folder:
            save_both(DECODERS[decoder], Path(folder), VIT_L_14 if decoder in LARGE else VIT_B_32)
            ours, peer = (load(side, Path(folder), options.device) for side in ("ours", "peer"))
        for captions in options.captions:
            print(f"{TITLES[decoder]}, {options.images} images, {captions} captions each")
            pixel_values, labels = (tensor.to(options.device) for tensor in make_batch(options.images, captions))
            equal = compare(ours.float(), peer.float(), pixel_values, labels)
            ours.to(dtype), peer.to(dtype)
            pixel_values = pixel_values.to(dtype)
            features = ours.get_image_features(pixel_values)
            sides = {
                "ours": partial(training_step, ours, pixel_values, labels),
                "blip2": partial(training_step, peer, pixel_values, labels),
                "features": partial(features_step, ours, features, labels),
            }
            if options.device == "cpu":
                sides["ours, no oneDNN"] = partial(training_step, ours, pixel_values, labels, onednn=False)
            work = {name: operations(step) for name, step in sides.items()}
            if options.compile:
                torch._dynamo.reset()  # or another number of captions would be compiled for any number
                for name, model in (("ours", ours), ("blip2", peer)):
                    compiled = torch.compile(model)
                    sides[f"{name}, compiled"] = partial(
                        training_step, model, pixel_values, labels, compiled, onednn=False
                    )
                    work[f"{name}, compiled"] = work[name]
            seconds = alternate(options.repetitions, **sides)
            times = {name: spread(values) for name, values in seconds.items()}
            ratios = {name: times["blip2"]["median"] / own["median"] for name, own in times.items()}
            for name, own in times.items():
                print(
                    f"  {name:<16}{own['median']:7.3f} s  ({own['min']:.3f} to {own['max']:.3f}), {ratios[name]:.2f} x "
                    f"BLIP-2's pairs per second; {work[name]:.0f} GFLOP, {work[name] / own['median'] / rate:.0%} of "
                    "what the machine multiplies"
                )
            write_result(
                "training",
                facts
                | {"decoder": decoder, "captions": captions, "gflop": work}
                | equal
                | {"seconds": times, "ratio": ratios},
            )
        seen = time_vision(ours, pixel_values, options.repetitions, rate)
        write_result("training", facts | {"decoder": decoder} | seen)
        if not options.growth_repetitions:
            continue
        for grows, images, captions in [
            *(("captions", options.images, captions) for captions in CAPTIONS),
            *(("images", images, 5) for images in IMAGES),
        ]:
            pixel_values, labels = (tensor.to(options.device) for tensor in make_batch(images, captions))
            batch = pixel_values.to(dtype), labels
            sides = {"ours": ours}
            if (grows == "captions" and captions in (1, 5, 10)) or (grows == "images" and images in (1, 4)):
                sides["blip2"] = peer
            seconds = alternate(
                options.growth_repetitions,
                **{name: partial(training_step, model, *batch) for name, model in sides.items()},
            )
            medians = {name: spread(values)["median"] for name, values in seconds.items()}
            row = {"decoder": decoder, "grows": grows, "images": images, "captions": captions}
            growth.append(row | medians)
            print(
                f"  {images:>2} images, {captions:>2} captions: " + str({k: f"{v:.2f} s" for k, v in medians.items()})
            )
    if growth:
        draw(growth)
        write_result("training_growth", machine("torch") | {"threads": options.threads, "rows": growth})


if __name__ == "__main__":
    main()
