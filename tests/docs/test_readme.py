"""What the README tells a newcomer to type, typed."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.hub_server import Hub


def block(heading: str) -> str:
    """The first block of shell commands under a heading of the README."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_a_file_of_captions_to_a_captioner(tmp_path):
    """Verbatim but for `pip install`, with tiny models in the place of the Hub's."""
    command = Path(sys.executable).with_name("qformer-captioner")
    if not command.exists():
        pytest.skip("needs the package installed")
    lines = block("Train on your own images")
    assert len(lines.splitlines()) <= 15
    script = "\n".join(line for line in lines.splitlines() if not line.startswith("pip install"))

    photos = tmp_path / "photos"
    photos.mkdir()
    with (photos / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number in range(20):
            name = "dog.jpg" if number == 0 else f"{number}.jpg"
            tiny.picture(number).save(photos / name)
            rows.writerows([[name, tiny.CAPTIONS[number % 3]], [name, f"{tiny.CAPTIONS[0]}, seen again"]])
    with Hub() as hub:
        config = AutoConfig.for_model("dinov2", hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
        AutoModel.from_config(config).save_pretrained(tmp_path / "vision")
        tiny.image_processor(28).save_pretrained(tmp_path / "vision")
        tiny.save_language(tmp_path / "language", max_position_embeddings=256)
        hub.files["model", "facebook/dinov2-small"] = files_of(tmp_path / "vision")
        hub.files["model", "HuggingFaceTB/SmolLM2-135M-Instruct"] = files_of(tmp_path / "language")
        environment = hub.environment(tmp_path / "home")
        environment["PATH"] = f"{command.parent}:{environment['PATH']}"
        environment["OMP_NUM_THREADS"] = "1"
        bash = [shutil.which("bash"), "-e", "-c", script]
        done = subprocess.run(bash, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "outputs" / "own_images"
    assert (folder / "captions.png").exists() and (folder / "loss_curve.png").exists()
    assert "The captioner is in outputs/own_images" in done.stdout
