"""A training step: ours beside transformers' `Blip2ForConditionalGeneration`, same weights, same images and captions.

python -m benchmarks.training [--decoder llama t5] [--captions 5 1] [--images 4] [--repetitions 5] [--threads 1]

Frozen backbones of random weights in the shapes of CLIP ViT-B/32 and SmolLM2-135M or T5-base, BLIP-2's Q-Former (12
layers, 768 wide, 32 queries), captions of 10 to 16 tokens, float32, no dropout. BLIP-2 gets one row per image and
caption, as it is trained everywhere. Both sides first compute loss and gradients, which must be equal; then they are
timed in turn. Last, steps with 1 to 10 captions per image show what each caption more costs.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    T5Config,
)

from qformer_captioner import QFormerCaptioner
from qformer_captioner.captioning.convert import convert

from .common import RESULTS, alternate, machine, spread, write_result

QUERIES, IMAGE_TOKEN = 32, 3
DECODERS = {
    "llama": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "t5": T5Config(
        d_model=768,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        vocab_size=32128,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
}
TITLES = {"llama": "SmolLM2-135M's shape", "t5": "T5-base's shape"}


def build(decoder: str) -> tuple[QFormerCaptioner, Blip2ForConditionalGeneration]:
    """The same weights on both sides, backbones frozen, no dropout."""
    torch.manual_seed(0)
    vision = Blip2VisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, patch_size=32, initializer_range=0.02
    )
    vision.num_attention_heads = 12
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=768).to_dict(),
        text_config=DECODERS[decoder].to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    peer = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(peer.query_tokens, std=0.02)  # transformers' zeros would stay equal
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(f"{folder}/peer")
        convert(f"{folder}/peer", f"{folder}/ours", include_backbones=True)
        ours = QFormerCaptioner.from_pretrained(f"{folder}/ours").eval()
    for model in (ours, peer):
        model.vision_model.requires_grad_(False)
        model.language_model.requires_grad_(False)
    return ours, peer


def make_batch(images: int, captions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[B, 3, 224, 224]` and labels `[B, K, T]` of 10 to 16 tokens each."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(images, 3, 224, 224, generator=generator)
    labels = torch.full((images, captions, 16), -100)
    for own in labels.view(-1, 16):
        length = int(torch.randint(10, 17, (), generator=generator))
        own[:length] = torch.randint(5, 32000, (length,), generator=generator)
    return pixel_values, labels


def our_step(model: QFormerCaptioner, pixel_values: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    def step() -> float:
        model.zero_grad()
        loss = model(pixel_values=pixel_values, labels=labels).loss
        loss.backward()
        return loss.item()

    return step


def peer_step(
    model: Blip2ForConditionalGeneration, pixel_values: torch.Tensor, labels: torch.Tensor
) -> Callable[[], float]:
    """A row for each image and caption: `[image tokens, caption]`, or for an encoder-decoder the image tokens alone."""
    rows = labels.flatten(0, 1)
    images = pixel_values.repeat_interleave(labels.shape[1], dim=0)
    tokens = torch.full((len(rows), QUERIES), IMAGE_TOKEN)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": rows}
    if not model.config.text_config.is_encoder_decoder:
        inputs = {
            "input_ids": torch.cat([tokens, rows.clamp(min=0)], dim=1),
            "attention_mask": torch.cat([torch.ones_like(tokens), (rows != -100).long()], dim=1),
            "labels": torch.cat([torch.full_like(tokens, -100), rows], dim=1),
        }

    def step() -> float:
        model.zero_grad()
        loss = model(pixel_values=images, **inputs).loss
        loss.backward()
        return loss.item()

    return step


def check(ours: QFormerCaptioner, peer: Blip2ForConditionalGeneration, steps: list[Callable[[], float]]) -> dict:
    """See that both sides compute the same thing.

    Raises:
        SystemExit: if they do not.
    """
    losses = [step() for step in steps]
    worst = 0.0
    theirs = dict(peer.qformer.named_parameters())
    for name, weight in ours.qformer.named_parameters():
        expected = peer.query_tokens if name == "query_tokens" else theirs.get(name)
        if expected is not None and expected.grad is not None and expected.grad.norm() > 1e-8:
            worst = max(worst, ((weight.grad - expected.grad).norm() / expected.grad.norm()).item())
    difference = abs(losses[0] - losses[1])
    print(f"  loss {losses[0]:.5f}, difference {difference:.1e}; gradients differ by {worst:.1e} at most (relative)")
    if difference > 1e-5 or worst > 1e-3:
        raise SystemExit("The two sides do not compute the same thing: no timing.")
    return {"loss": losses[0], "loss_difference": difference, "gradient_difference": worst}


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for decoder in dict.fromkeys(row["decoder"] for row in rows):
        own = [row for row in rows if row["decoder"] == decoder]
        axis.plot([row["captions"] for row in own], [row["seconds"] for row in own], marker="o", label=TITLES[decoder])
    axis.set(xlabel="captions per image", ylabel="seconds of our step", xlim=(0, None), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(Path(RESULTS) / "training.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=list(DECODERS))
    parser.add_argument("--captions", nargs="+", type=int, default=[5, 1])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    growth = []
    for decoder in options.decoder:
        ours, peer = build(decoder)
        for captions in options.captions:
            print(f"{TITLES[decoder]}, {options.images} images, {captions} captions each")
            batch = make_batch(options.images, captions)
            steps = [our_step(ours, *batch), peer_step(peer, *batch)]
            equal = check(ours, peer, steps)
            seconds = alternate(options.repetitions, ours=steps[0], blip2=steps[1])
            times = {name: spread(values) for name, values in seconds.items()}
            ratio = times["blip2"]["median"] / times["ours"]["median"]
            for name, own in times.items():
                print(f"  {name:<6} {own['median']:7.2f} s  ({own['min']:.2f} to {own['max']:.2f})")
            print(f"  {ratio:.2f} x BLIP-2's pairs per second")
            shape = {"decoder": decoder, "images": options.images, "captions": captions, "threads": options.threads}
            facts = machine("qformer-captioner", "transformers", "torch")
            write_result("training", facts | shape | equal | {"seconds": times, "ratio": ratio})
        for captions in (1, 2, 5, 10):
            step = our_step(ours, *make_batch(options.images, captions))
            seconds = spread(alternate(3, ours=step)["ours"])["median"]
            growth.append({"decoder": decoder, "captions": captions, "seconds": seconds})
            print(f"  {captions:>2} captions per image: {seconds:6.2f} s a step")
    draw(growth)


if __name__ == "__main__":
    main()
