r"""Caption images, or features of a captioner that was trained on features.

    qformer-captioner caption dog.jpg cat.jpg --model outputs/scenes
    qformer-captioner caption photos "more/**/*.png" --model USER/CAPTIONER --prompt "a photo of" --num_beams 5 \
        --output captions.jsonl
    qformer-captioner caption "proteins/*.npy" --model outputs/proteins

IMAGE is a file, a folder (all images in it and below it), a pattern or a URL. A file of numpy (.npy) holds features
`[N, D]`, of which N may differ. Each caption is printed as a line
`file: caption` as soon as it exists. For an image that cannot be read, an error is printed, and the other images are
captioned.
"""

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from ..common.arguments import CommandParser, check_at_least
from ..common.command import run_command
from ..common.errors import InputError, check_output, printable
from ..common.files import write_atomically
from ..common.machine_faults import explain_faults
from ..data.names import IMAGE_SUFFIXES
from ..evaluation.caption_files import ImageId, write_predictions
from ..hub.load import load_captioner

if TYPE_CHECKING:
    import numpy as np

    from ..captioning_qformer import QFormerCaptioningModel

# torch and the model take seconds to import, so only the functions that use them import them.


FEATURES_SUFFIX = ".npy"
MAX_PATTERN = 4096  # characters; longer text is an image in base64 or a mistake, and `glob` would fail on it


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line.

    Raises:
        InputError: if an option does not exist or has a value that is not valid.
    """
    parser = CommandParser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="File, folder, pattern or URL; .npy for features.")
    parser.add_argument("--model", required=True, help="Captioner, adapter or model of stage 1, as a Hub id or folder.")
    parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
    parser.add_argument("--prompt", help="Text that the captions continue; by default the captioner's own prompt.")
    parser.add_argument("--num_beams", type=int, help="Number of beams; by default the captioner's own.")
    parser.add_argument(
        "--max_new_tokens", type=int, help="Largest number of tokens of a caption; by default the captioner's own."
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Number of images per batch.")
    parser.add_argument("--output", help="Also write the captions to this file: .json for COCO's format, or .jsonl.")
    options = parser.parse_args(words)
    check_at_least(options, 1, "num_beams", "max_new_tokens", "batch_size")
    if options.output is not None:
        check_output(options.output)
    return options


def find_images(patterns: Sequence[str]) -> list[str]:
    """Return the files that paths, folders and patterns name, each file once.

    A pattern without a match is returned unchanged. Opening it later raises an error that names it.

    Args:
        patterns: paths of files, paths of folders, and patterns as in a shell. `**` matches any folders.
    """

    def files_of(pattern: str) -> list[str]:
        if os.path.isdir(pattern):
            return sorted(str(path) for path in Path(pattern).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if os.path.exists(pattern) or len(pattern) > MAX_PATTERN:  # the name of a file may itself have brackets
            return [pattern]
        return sorted(glob.glob(pattern, recursive=True)) or [pattern]

    return list(dict.fromkeys(file for pattern in patterns for file in files_of(pattern)))


def load_on_device(model: str, revision: str | None) -> "QFormerCaptioningModel":
    """Load a captioner to the accelerator, or to the CPU if there is no accelerator.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: if the captioner cannot be loaded.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return load_captioner(model, revision).to(device)  # type: ignore[arg-type]


def caption_files(
    model: "QFormerCaptioningModel",
    files: Sequence[str],
    prompt: str | None = None,
    batch_size: int = 8,
    **generation: Any,
) -> Iterator[tuple[str, str | OSError]]:
    """Caption files, batch by batch.

    Args:
        model: the captioner.
        files: paths of images, or of features.
        prompt: text that the captions continue; by default the captioner's own prompt.
        batch_size: number of images per batch.
        generation: options of the captioner's `generate`.

    Yields:
        Each file with its caption, or with the error for an image or features that cannot be read.
    """
    from ..common.onednn import onednn_linears
    from ..data.features import load_features
    from ..images_qformer import open_image

    width = model.qformer.config.encoder_hidden_size
    for start in range(0, len(files), batch_size):
        images: dict[str, Image.Image] = {}
        features: dict[str, np.ndarray] = {}
        for file in files[start : start + batch_size]:
            try:
                if file.lower().endswith(FEATURES_SUFFIX):
                    features[file] = load_features(file, width)
                elif model.config.has_vision_model:
                    images[file] = open_image(file)
                else:
                    raise OSError(
                        f"The captioner was trained on features and has no vision encoder for {file!r}: name files of "
                        f"features ({FEATURES_SUFFIX})."
                    )
            except OSError as error:
                yield file, error
        with onednn_linears(model.device):
            if images:
                yield from zip(images, model.caption(list(images.values()), prompt, **generation), strict=True)
            if features:
                captions = model.caption(prompt=prompt, image_embeds=list(features.values()), **generation)
                yield from zip(features, captions, strict=True)


def print_captions(results: Iterable[tuple[str, str | OSError]], bar: tqdm) -> Iterator[tuple[str, str]]:
    """Print captions to stdout and errors to stderr, and yield the captions.

    Args:
        results: the files, each with a caption or an error.
        bar: progress bar to print above and to advance.
    """
    for file, result in results:
        if isinstance(result, str):
            bar.write(printable_line(f"{file}: {result}"))
            yield file, result
        else:
            bar.write(printable_line(f"error: {result}"), file=sys.stderr)
        bar.update()


def printable_line(text: str) -> str:
    """Return a text as one line in which every control character is escaped."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def save_captions(captions: dict[ImageId, str], path: str | os.PathLike) -> None:
    """Write captions as JSON lines if the file ends in `.jsonl`, otherwise as COCO results JSON.

    Args:
        captions: the caption of each file.
        path: the file to write.
    """
    if Path(path).suffix != ".jsonl":
        write_predictions(captions, path)
        return
    rows = ({"image_id": file, "caption": caption} for file, caption in captions.items())
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def caption(words: Sequence[str]) -> None:
    """Caption the images that a command line names.

    Args:
        words: the command line.

    Raises:
        InputError: if an option, the captioner or an image cannot be used. For an image, the other captions are printed
            and saved first.
        ValueError: if options of `generate` contradict each other.
    """
    options = parse_options(words)
    files = find_images(options.images)
    if not files:
        raise InputError(f"There are no images in {' or '.join(map(repr, options.images))}.")
    model = load_on_device(options.model, options.revision)
    generation = {name: getattr(options, name) for name in ("num_beams", "max_new_tokens")}
    generation = {name: value for name, value in generation.items() if value is not None}

    captions: dict[ImageId, str] = {}
    hide_bar = len(files) <= options.batch_size or None  # `None` shows the bar only on a terminal
    try:
        with tqdm(total=len(files), unit="images", disable=hide_bar) as bar:
            results = caption_files(model, files, options.prompt, options.batch_size, **generation)
            for file, text in print_captions(results, bar):
                captions[file] = text
    finally:  # keep the captions so far after Ctrl-C
        if options.output is not None:
            with explain_faults(Path(options.output).parent, "The captions are printed above."):
                save_captions(captions, options.output)
    if len(captions) < len(files):
        raise InputError(f"{len(files) - len(captions)} of {len(files)} images have no caption.")


def main() -> None:
    # `generate` raises ValueError for options that contradict each other.
    run_command(caption, expected=(ValueError, OSError))


if __name__ == "__main__":
    main()
