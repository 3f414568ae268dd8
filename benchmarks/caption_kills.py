"""Captions of many images, killed at random moments and resumed, against a run without a stop.

    python -m benchmarks.caption_kills [--images 20000] [--kills 10] [--outputs jsonl sidecars parquet tar csv] \
        [--processes 1 2]

The images are small JPEGs in nested folders, and one of them is broken. Each kill is a SIGKILL of all processes at a
random moment after at least one more batch. At the end the output must be the same, byte for byte, as without a stop.
"""

import argparse
import hashlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from qformer_captioner.cli.caption import caption
from qformer_captioner.common.errors import InputError

BROKEN = "1/2/broken.jpg"
MAX_WAIT = 0.05  # Seconds between a batch and a kill.
SHARES = 0.1, 0.6  # Parts of an equal share of the batches that are written before a kill.
OUTPUTS = ("jsonl", "sidecars", "parquet", "tar", "csv")


def make_images(folder: Path, number: int, seed: int = 0) -> None:
    """Write small images in nested folders, one of which is broken.

    Args:
        folder: the folder.
        number: number of images that can be read.
        seed: seed of their pixels.
    """
    generator = np.random.default_rng(seed)
    for place in range(number):
        path = folder / str(place % 7) / str(place % 3) / f"{place}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8)).resize((40, 36)).save(path)
    (folder / BROKEN).parent.mkdir(parents=True, exist_ok=True)
    (folder / BROKEN).write_bytes((folder / "0" / "0" / "0.jpg").read_bytes()[:200])


def start(words: list[str], processes: int) -> list[int]:
    """Start the command in forks of this process, and return their ids.

    Args:
        words: command line.
        processes: number of processes that share the images.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            status = 70
            try:
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
                AcceleratorState._reset_state(reset_partial_state=True)
                if processes > 1:
                    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                    os.environ |= {name: str(value) for name, value in world.items()}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
                PartialState._reset_state()
                caption(words)
                status = 0
            except InputError:
                status = 1
            finally:
                os._exit(status)
        ids.append(child)
    return ids


def size(file: Path) -> int:
    """Return the size of a file, 0 if it does not exist."""
    return file.stat().st_size if file.exists() else 0


def run_and_kill(words: list[str], record: Path, growth: float, processes: int, draw: random.Random) -> bool:
    """Run the command, kill it at a random moment, and return whether it was killed before its end.

    Args:
        words: command line.
        record: file that grows with each batch.
        growth: bytes by which it has grown before the kill.
        processes: number of processes.
        draw: source of random moments.
    """
    ids = start(words, processes)
    before = size(record)
    while size(record) <= before + growth:
        if os.waitpid(ids[0], os.WNOHANG)[0]:
            for other in ids[1:]:
                os.waitpid(other, 0)
            return False
        time.sleep(0.001)
    time.sleep(draw.uniform(0, MAX_WAIT))
    for each in ids:
        os.kill(each, signal.SIGKILL)
    statuses = [os.waitpid(each, 0)[1] for each in ids]
    return os.WIFSIGNALED(statuses[0])


def run_to_the_end(words: list[str], record: Path, processes: int) -> tuple[int, int]:
    """Run the command, and return the exit status of its main process and the largest size of the record."""
    main, *others = start(words, processes)
    largest = 0
    while not (ended := os.waitpid(main, os.WNOHANG))[0]:
        largest = max(largest, size(record))
        time.sleep(0.001)
    for each in others:
        os.waitpid(each, 0)
    return os.waitstatus_to_exitcode(ended[1]), largest


def digest(images: Path, output: Path | None) -> tuple[int, str]:
    """Return the number of written files and a hash of them: an output, or all texts beside the images."""
    files = [output] if output is not None else sorted(filter(is_text, images.rglob("*")))
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0".encode() if output is None else b"")
        total.update(file.read_bytes())
    return len(files), total.hexdigest()


def is_text(file: Path) -> bool:
    """Return whether a file is a text beside an image, or an unfinished one."""
    return file.suffix in (".txt", ".tmp")


def check(
    model: Path, images: Path, kind: str, processes: int, kills: int, batch_size: int = 8, seed: int = 0
) -> dict[str, object]:
    """Compare a run that is killed and resumed with a run without a stop.

    Args:
        model: captioner.
        images: folder of [`make_images`].
        kind: one of `OUTPUTS`.
        processes: number of processes of the killed run. The other run has one.
        kills: number of kills.
        batch_size: number of images in a batch.
        seed: seed of the moments.

    Returns:
        The figures. `equal` says whether the outputs are the same.
    """
    draw = random.Random(seed)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        results, statuses, killed, record_size = [], [], 0, 0
        for run in ("unbroken", "broken"):
            words = [str(images), "--model", str(model), "--max_new_tokens", "5"]
            words += ["--batch_size", str(batch_size), "--num_workers", "1"]
            if kind == "sidecars":
                output, record = None, images / ".captions.txt.progress"
                words += ["--sidecar", ".txt"]
            else:
                output = Path(name, f"{run}.{kind}")
                record = Path(f"{output}.progress")
                words += ["--output", str(output)]
            if run == "broken":
                steps = [draw.uniform(*SHARES) * record_size / (kills + 1) for _ in range(kills)]
                while killed < kills and run_and_kill(words, record, steps[killed], processes, draw):
                    killed += 1
            status, record_size = run_to_the_end(words, record, 1 if run == "unbroken" else processes)
            statuses.append(status)
            results.append(digest(images, output))
            if kind == "sidecars":
                for text in images.rglob("*.txt"):
                    text.unlink()
    return {
        "output": kind,
        "processes": processes,
        "kills": killed,
        "equal": results[0] == results[1],
        "files": results[0][0],
        "exit": statuses,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="Captioner; by default a tiny one of random weights.")
    parser.add_argument("--images", type=int, default=20_000, help="Number of images.")
    parser.add_argument("--batch_size", type=int, default=8, help="Number of images per batch.")
    parser.add_argument("--kills", type=int, default=10, help="Number of kills of each run.")
    parser.add_argument("--outputs", nargs="+", default=OUTPUTS, choices=OUTPUTS, help="Forms of output.")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2), help="Numbers of processes.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), options.model
        if model is None:
            from tests.fixtures import tiny

            model = folder / "model"
            tiny.captioner().save_pretrained(model)
        make_images(folder / "images", options.images)
        for kind in options.outputs:
            for processes in options.processes:
                figures = check(model, folder / "images", kind, processes, options.kills, options.batch_size)
                print(figures, flush=True)
                if not figures["equal"] or figures["exit"] != [1, 1] or figures["kills"] < options.kills:
                    sys.exit("The run that was killed differs from the run without a stop, or was not killed.")


if __name__ == "__main__":
    main()
