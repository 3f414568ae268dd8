"""Images per second from JPEGs on disk to lines on disk: `python -m benchmarks.captioning --model FOLDER ...`.

`memory` compares the command `qformer-captioner caption` with `generate` on batches that are tensors in memory. `peer`
compares it with the loops that caption images with transformers' BLIP-2: one image at a time, as kohya_ss and
data-juicer do, and in batches. Both sides then have the same weights, in the shapes of DINOv2-small, BLIP-2's Q-Former
and SmolLM2-135M, and the same token ids. `ended` measures how much of greedy decoding goes to rows that have ended: the
other side is a loop from which such rows leave. At least 98 % of its captions must be the same, because products of
other sizes round differently.

The command runs in this process with a model that is already loaded.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BlipImageProcessorPil,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from qformer_captioner import QFormerCaptionerProcessor, onednn_linears
from qformer_captioner.cli.caption import caption
from qformer_captioner.hub.load import load_captioner
from qformer_captioner.training.sampling import SamplingLoop, end_tokens

from .blip2 import image_token_inputs, load, save_both
from .common import machine_facts, summarize, time_in_turn, time_ratios, write_result
from .generation import generate

VIT_S_14 = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, patch_size=14)
VIT_S_14 |= dict(image_size=224)
PARTS = ("memory", "peer", "ended")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="Trained captioner of the parts `memory` and `ended`.")
    parser.add_argument("--language", required=True, help="Language model of the part `peer`, such as SmolLM2-135M.")
    parser.add_argument("--photographs", required=True, help="Parquet file with a column `image`.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="Parts to run.")
    parser.add_argument("--images", type=int, default=1000, help="Number of photographs of the part `memory`.")
    parser.add_argument("--peer_images", type=int, default=100, help="Number of photographs of the part `peer`.")
    parser.add_argument("--ended_images", type=int, default=192, help="Number of photographs of the part `ended`.")
    parser.add_argument("--batch_size", type=int, default=8, help="Number of images in a batch.")
    parser.add_argument("--num_beams", nargs="+", type=int, default=[1, 3], help="Numbers of beams.")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="Dtypes of the part `memory`.")
    parser.add_argument("--max_new_tokens", type=int, default=20, help="Largest number of tokens of a caption.")
    parser.add_argument("--repetitions", type=int, default=3, help="Number of timed runs of each side.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Number of CPU threads.")
    return parser.parse_args()


def write_photographs(parquet: str, number: int, folder: Path) -> list[Path]:
    """Write the first photographs of a parquet file as JPEGs, and return their paths."""
    column = pq.ParquetFile(parquet).iter_batches(batch_size=number, columns=["image"])
    paths = []
    for place, cell in enumerate(next(column)["image"].to_pylist()):
        paths.append(folder / f"{place:05d}.jpg")
        paths[-1].write_bytes(cell["bytes"])
    return paths


def run_command(model: Any, names: Path, output: Path, batch_size: int, **generation: int) -> None:
    """Caption the files that a list names by the command, and write JSON lines."""
    options = [word for name, value in generation.items() for word in (f"--{name}", str(value))]
    words = ["--filelist", str(names), "--model", "loaded", "--output", str(output), "--overwrite_output"]
    with (
        patch("qformer_captioner.hub.load.load_captioner", lambda *arguments: model),
        patch("qformer_captioner.evaluation.captioning_run.versions_of_weights", lambda *arguments: {}),
    ):
        caption([*words, "--batch_size", str(batch_size), *options])


@torch.no_grad()
def run_in_memory(model: Any, batches: list[torch.Tensor], **generation: Any) -> list[torch.Tensor]:
    """Generate the token ids of batches of pixel values `[B, 3, H, W]`."""
    with onednn_linears(model.device):
        return [model.generate(pixel_values=batch, **generation) for batch in batches]


def pixels_of(model: Any, paths: list[Path], batch_size: int) -> list[torch.Tensor]:
    """Return the pixel values of files in batches."""
    batches = (paths[start : start + batch_size] for start in range(0, len(paths), batch_size))
    return [model.processor(images=list(map(str, batch))).pixel_values for batch in batches]


@torch.no_grad()
def run_peer(
    peer: Any,
    image_processor: BlipImageProcessorPil,
    tokenizer: PreTrainedTokenizerBase,
    paths: list[Path],
    batch_size: int,
    **generation: int,
) -> None:
    """Caption files with BLIP-2 as the scripts do, and write a text beside each."""
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        images = [Image.open(path).convert("RGB") for path in batch]
        pixel_values = image_processor(images=images, return_tensors="pt").pixel_values
        ids = peer.generate(pixel_values=pixel_values, **image_token_inputs(len(batch)), **generation)
        for path, text in zip(batch, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            path.with_suffix(".txt").write_text(text.strip())


def compare(sides: dict[str, Callable[[], object]], images: int, repetitions: int, baseline: str) -> dict[str, Any]:
    """Time sides in turn, and print and return images per second and the ratios to the baseline."""
    times = {name: summarize(seconds) for name, seconds in time_in_turn(repetitions, **sides).items()}
    ratios = time_ratios(times, baseline)
    for name, seconds in times.items():
        rate = images / seconds["median"]
        print(f"  {name:<20}{rate:8.2f} images/s, {ratios[name]:.3f} x {baseline}", flush=True)
    return {"seconds": times, "ratio": ratios, "baseline": baseline, "images": images}


def measure_memory(options: argparse.Namespace, folder: Path, dtype: str, num_beams: int) -> dict[str, Any]:
    """Compare the command with `generate` on tensors in memory."""
    model = load_captioner(options.model, None, getattr(torch, dtype)).eval()
    paths = write_photographs(options.photographs, options.images, folder)
    (folder / "names.txt").write_text("".join(f"{path}\n" for path in paths))
    generation = {"num_beams": num_beams, "max_new_tokens": options.max_new_tokens}
    batches = pixels_of(model, paths, options.batch_size)
    output = folder / "captions.jsonl"
    sides = {
        "memory": partial(run_in_memory, model, batches, **generation),
        "command": partial(run_command, model, folder / "names.txt", output, options.batch_size, **generation),
    }
    print(f"{len(paths)} photographs, {dtype}, {num_beams} beams, batch {options.batch_size}")
    result = compare(sides, len(paths), options.repetitions, "memory")
    if len(output.read_text().splitlines()) != len(paths):
        raise SystemExit("The command has not captioned every photograph.")
    return {"dtype": dtype, "num_beams": num_beams, **result}


def measure_peer(options: argparse.Namespace, folder: Path, num_beams: int) -> dict[str, Any]:
    """Compare the command with the loops of BLIP-2 in float32.

    Raises:
        SystemExit: if both sides do not generate the same token ids.
    """
    language = AutoModelForCausalLM.from_pretrained(options.language, dtype=torch.float32)
    save_both(language.config, folder, VIT_S_14, language)
    ours, peer = load("ours", folder), load("peer", folder)
    for model in (ours, peer):
        model.generation_config = GenerationConfig()
    tokenizer = AutoTokenizer.from_pretrained(options.language)
    image_processor = BlipImageProcessorPil(size={"height": 224, "width": 224})
    ours.processor = QFormerCaptionerProcessor(image_processor, tokenizer)
    paths = write_photographs(options.photographs, options.peer_images, folder)
    (folder / "names.txt").write_text("".join(f"{path}\n" for path in paths))
    # Captions of random weights do not end, and all have the same length.
    length = options.max_new_tokens
    generation = {"num_beams": num_beams, "max_new_tokens": length, "min_new_tokens": length}
    batch = pixels_of(ours, paths, options.batch_size)[0]
    if not torch.equal(*(generate(model, batch, **generation) for model in (ours, peer))):
        raise SystemExit("Both sides must generate the same captions, and they do not. Nothing was measured.")
    peer_side = partial(run_peer, peer, image_processor, tokenizer, paths, **generation)
    output = folder / "captions.jsonl"
    sides = {
        "peer": partial(peer_side, batch_size=1),
        "peer in batches": partial(peer_side, batch_size=options.batch_size),
        "command": partial(run_command, ours, folder / "names.txt", output, options.batch_size, **generation),
    }
    print(f"{len(paths)} photographs and BLIP-2, {num_beams} beams, {length} tokens, batch {options.batch_size}")
    return {"num_beams": num_beams, **compare(sides, len(paths), options.repetitions, "peer")}


def measure_ended(options: argparse.Namespace, folder: Path, batch_size: int) -> dict[str, Any]:
    """Compare greedy decoding with a loop that rows leave when they have ended.

    Raises:
        SystemExit: if less than 98 % of the captions of both are equal.
    """
    model = load_captioner(options.model, None, torch.float32).eval()
    paths = write_photographs(options.photographs, options.ended_images, folder)
    batches = pixels_of(model, paths, batch_size)
    ends, length = end_tokens(model), options.max_new_tokens  # type: ignore[arg-type]

    def shrinking() -> list[torch.Tensor]:
        ids = []
        for batch in batches:
            loop = SamplingLoop(torch.zeros(len(batch), length), 1, 1.0, ends)
            ids += run_in_memory(model, [batch], custom_generate=loop, max_new_tokens=length)
        return ids

    def texts(ids: list[torch.Tensor]) -> list[str]:
        padding = model.processor.tokenizer.pad_token_id
        rows = [row.masked_fill(row == -100, padding) for batch in ids for row in batch]
        return model.processor.batch_decode(rows, skip_special_tokens=True)

    # The loop of training draws from a distribution. Here the largest logit is enough.
    with patch("qformer_captioner.training.sampling.pick_tokens", lambda logits, *_: logits.argmax(dim=-1)):
        plain, ended = run_in_memory(model, batches, max_new_tokens=length), shrinking()
        same = sum(one == other for one, other in zip(texts(plain), texts(ended), strict=True)) / len(paths)
        if same < 0.98:  # products of other sizes round differently
            raise SystemExit(f"Only {same:.0%} of the captions of both loops are equal. Nothing was measured.")
        steps = sum(batch.numel() for batch in ended)
        share = 1 - sum(int((batch != -100).sum()) for batch in ended) / steps
        print(f"{len(paths)} photographs, greedy, batch {batch_size}: {share:.1%} of steps are of rows that have ended")
        sides = {
            "generate": partial(run_in_memory, model, batches, max_new_tokens=length),
            "rows leave": shrinking,
        }
        result = compare(sides, len(paths), options.repetitions, "generate")
    return {"batch_size": batch_size, "share_of_ended_steps": share, "equal_captions": same, **result}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    facts = machine_facts("qformer-captioner", "transformers", "torch") | {"threads": options.threads}
    runs: list[tuple[str, Callable[[Path], dict[str, Any]]]] = []
    for beams in options.num_beams:
        memory = [partial(measure_memory, options, dtype=dtype, num_beams=beams) for dtype in options.dtype]
        runs += [("memory", run) for run in memory]
        runs.append(("peer", partial(measure_peer, options, num_beams=beams)))
    runs += [("ended", partial(measure_ended, options, batch_size=size)) for size in (8, 16, 32)]
    for part, run in runs:
        if part in options.parts:
            with tempfile.TemporaryDirectory() as folder:
                shape = {"part": part, "max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
                write_result("captioning", facts | shape | run(Path(folder)))


if __name__ == "__main__":
    main()
