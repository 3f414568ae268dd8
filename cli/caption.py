r"""Caption images.

    qformer-captioner caption dog.jpg cat.jpg --model outputs/scenes
    qformer-captioner caption photos "more/**/*.png" --model USER/CAPTIONER --prompt "a photo of" --num_beams 5 \
        --output captions.jsonl

IMAGE is a file, a folder (all images in and below it) or a pattern. Each image gets a line `file: caption` as soon as
it is captioned. Images that cannot be read get a message, the others their captions all the same.
"""

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm import tqdm

from ..common.errors import InputError, check_output, printable
from ..evaluation.caption_files import write_predictions
from ..hub.load import load_captioner

if TYPE_CHECKING:
    from ..modeling_qformer import QFormerCaptioner

# torch and the model take seconds to import: whoever asks for --help does not wait for them.


def find_images(words: Sequence[str]) -> list[str]:
    """The files that words of a command line mean, each once.

    A word that means none stays as it is: there is no such file, and whoever opens it will say so.
    """
    kinds = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def files(word: str) -> list[str]:
        if Path(word).is_dir():
            return sorted(str(path) for path in Path(word).rglob("*") if path.suffix.lower() in kinds)
        if Path(word).exists():  # brackets are a pattern's, too
            return [word]
        return sorted(glob.glob(word, recursive=True)) or [word]

    return list(dict.fromkeys(file for word in words for file in files(word)))


def caption_files(
    model: "QFormerCaptioner", files: Sequence[str], prompt: str | None = None, batch_size: int = 8, **generation
) -> Iterator[tuple[str, str | OSError]]:
    """Caption files, batch by batch.

    Args:
        model: the captioner.
        files: paths of images.
        prompt: text that captions follow; by default the captioner's own.
        batch_size: images at a time.
        generation: options of the captioner's `generate`.

    Yields:
        Each file and its caption, or the error that it has none for.
    """
    from ..common.onednn import onednn_linears
    from ..processing_qformer import open_image

    for start in range(0, len(files), batch_size):
        pictures: dict[str, Image.Image] = {}
        for file in files[start : start + batch_size]:
            try:
                pictures[file] = open_image(Path(file))
            except OSError as error:
                yield file, error
        if pictures:
            with onednn_linears(model.device):
                captions = model.caption(list(pictures.values()), prompt, **generation)
            yield from zip(pictures, captions, strict=True)


def printable_line(text: str) -> str:
    """A text in one line, with everything that a terminal would obey written out."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def save_captions(captions: dict[str, str], path: str | os.PathLike) -> None:
    """COCO results JSON, or the same rows as JSON lines for a name that ends in `.jsonl`."""
    if Path(path).suffix != ".jsonl":
        return write_predictions(captions, path)
    lines = [json.dumps({"image_id": file, "caption": caption}) + "\n" for file, caption in captions.items()]
    Path(path).write_text("".join(lines))


def caption(words: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or pattern")
    parser.add_argument("--model", required=True, help="captioner, or adapter on one: folder or Hub id")
    parser.add_argument("--revision", help="its branch, tag or commit on the Hub")
    parser.add_argument("--prompt", help="text that captions follow; by default the captioner's own")
    parser.add_argument("--num_beams", type=int, help="beams; by default the captioner's own number")
    parser.add_argument(
        "--max_new_tokens", type=int, help="tokens of a caption at most; by default the captioner's own"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time (default: 8)")
    parser.add_argument("--output", help="write the captions to this file, too: COCO's .json, or .jsonl")
    options = parser.parse_args(words)
    for name in ("num_beams", "max_new_tokens", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name} is at least 1, not {value}.")
    if options.output is not None:
        check_output(options.output)

    files = find_images(options.images)
    if not files:
        raise InputError(f"There are no images in {' or '.join(map(repr, options.images))}.")
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = load_captioner(options.model, options.revision).to(device)
    generation = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    generation = {name: value for name, value in generation.items() if value is not None}
    captions: dict[str, str] = {}
    # On a terminal, and only if there is something to wait for.
    bar = tqdm(total=len(files), unit="images", disable=None if len(files) > options.batch_size else True)
    try:
        for file, said in caption_files(model, files, options.prompt, options.batch_size, **generation):
            if isinstance(said, str):
                captions[file] = said
                bar.write(printable_line(f"{file}: {said}"))
            else:
                bar.write(printable_line(f"error: {said}"), file=sys.stderr)
            bar.update()
    finally:  # what was captioned before it was stopped counts
        bar.close()
        if options.output is not None:
            save_captions(captions, options.output)
    if len(captions) < len(files):
        raise InputError(f"{len(files) - len(captions)} of {len(files)} images have no caption.")


def main() -> None:
    try:
        caption(sys.argv[1:])
    except (OSError, ValueError) as error:  # of ours, and what generate says of options that do not go together
        raise SystemExit(f"error: {printable(error)}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
