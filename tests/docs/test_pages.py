"""Commands and Python blocks of the README and of docs, run as they stand.

The blocks of a page run in order in one folder, so that a page is a story. Models are tiny and come from a local Hub. A
block that cannot run here is preceded by a comment `<!-- not run: REASON -->`.
"""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
)

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.fork_server import ForkServer
from ..fixtures.hub_server import files_of
from ..fixtures.markdown import Block, code_blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = ("bash", "python")
DATA_LANGUAGES = ("json", "yaml", "bibtex", "text")  # shown, not run
# Pages that begin with what another page has trained: its command is that of the README.
AFTER_TRAINING = ("README.md", "evaluation.md", "export.md", "publishing.md", "reward.md")
CHECKOUT = ("train_hf.py", "eval_captions.py", "eval_retrieval.py", "precompute_features.py", "recipes", "metrics")
FIRST_TRAINING = "qformer-captioner train --recipe own_images --dataset_name photos/captions.csv"


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_to_run(page: Path) -> list[Block]:
    return [block for block in code_blocks(page.read_text()) if block.language in RUNNABLE and not block.not_run]


# --- Stand-ins --------------------------------------------------------------------------------------------------------


def save_clip(folder: Path) -> None:
    """Save a CLIP with both towers, for CLIPScore."""
    sizes = dict(tiny.LAYERS, hidden_size=tiny.VISION_WIDTH, intermediate_size=40)
    vision, text = sizes | dict(image_size=tiny.SIDE, patch_size=16), sizes | dict(vocab_size=tiny.WORDS)
    torch.manual_seed(4)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).save_pretrained(folder)
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=side)
    CLIPProcessor(images, tiny.tokenizer()).save_pretrained(folder)


def save_blip2(folder: Path, stage_1: bool = False) -> None:
    """Save a BLIP-2 with an OPT, or one of stage 1."""
    vision = dict(tiny.LAYERS, hidden_size=tiny.VISION_WIDTH, intermediate_size=40, image_size=tiny.SIDE, patch_size=16)
    qformer = dict(tiny.QFORMER, encoder_hidden_size=tiny.VISION_WIDTH, vocab_size=50, cross_attention_frequency=2)
    qformer = dict(qformer, use_qformer_text_input=stage_1)
    qformer.pop("num_query_tokens")
    text = tiny.text_config("opt", word_embed_proj_dim=tiny.TEXT_WIDTH).to_dict()
    torch.manual_seed(6)
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=tiny.QUERIES)
    model_class = Blip2ForImageTextRetrieval if stage_1 else Blip2ForConditionalGeneration
    model_class(config).save_pretrained(folder)
    tiny.image_processor().save_pretrained(folder)
    (tiny.text_tokenizer() if stage_1 else tiny.tokenizer()).save_pretrained(folder)


@pytest.fixture(scope="module")
def server(hub, commands, tmp_path_factory) -> Iterator[ForkServer]:
    """Return a server of commands, on whose Hub are tiny models under the ids that the pages name."""
    folder = tmp_path_factory.mktemp("models")
    vision = AutoConfig.for_model("dinov2", hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    AutoModel.from_config(vision).save_pretrained(folder / "facebook/dinov2-small")
    tiny.image_processor(28).save_pretrained(folder / "facebook/dinov2-small")
    tiny.save_language(folder / "HuggingFaceTB/SmolLM2-135M-Instruct", max_position_embeddings=256)
    save_clip(folder / "openai/clip-vit-base-patch32")
    save_blip2(folder / "Salesforce/blip2-opt-2.7b")
    save_blip2(folder / "Salesforce/blip2-itm-vit-g", stage_1=True)
    for path in folder.glob("*/*"):
        hub.files["model", f"{path.parent.name}/{path.name}"] = files_of(path)
    user, hub.tokens["hf_test"] = hub.tokens["hf_test"], "USER"
    yield commands
    hub.tokens["hf_test"] = user


def make_files(folder: Path) -> None:
    """Create in a folder the files that the pages expect: a clone, images, captions, and the output of `make demo`."""
    for name in CHECKOUT:
        (folder / name).symlink_to(ROOT / name)
    names = ["dog.jpg", "cat.jpg", *(f"{number}.jpg" for number in range(10))]
    photos = {name: [tiny.CAPTIONS[place % 3], tiny.CAPTIONS[(place + 1) % 3]] for place, name in enumerate(names)}
    for name in ("dog.jpg", "cat.jpg", "picture.png"):
        tiny.picture(1).save(folder / name)
    for place in ("photos", "my_folder"):
        (folder / place).mkdir()
        for number, name in enumerate(photos):
            tiny.picture(number).save(folder / place / name)
    with (folder / "photos" / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([name, caption] for name in photos for caption in photos[name])
    splits = dict.fromkeys(names, "train") | dict.fromkeys(names[-2:], "dev")
    rows = [{"file_name": name, "split": splits[name], "caption": photos[name]} for name in photos]
    (folder / "my_folder" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [{"id": number, "file_name": name} for number, name in enumerate(photos)]
    captions = [caption for name in photos for caption in photos[name]]
    annotations = [{"id": place, "image_id": place // 2, "caption": text} for place, text in enumerate(captions)]
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    results = [{"image_id": number, "caption": photos[name][0]} for number, name in enumerate(photos)]
    (folder / "results.json").write_text(json.dumps(results))
    tiny.captioner().save_pretrained(folder / "outputs" / "scenes")
    tiny.save_stage1(folder / "outputs" / "stage1")


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory) -> Path:
    """Return a folder in which the command of the README has trained `outputs/own_images`."""
    folder = tmp_path_factory.mktemp("trained")
    make_files(folder)
    done = server.run("bash", FIRST_TRAINING, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The captioner is in outputs/own_images" in done.stdout + done.stderr
    return folder


def anchors(markdown: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", markdown, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- Tests ------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES[2:] if f"]({page.name})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_is_found_and_has_a_known_language(page):
    blocks = code_blocks(page.read_text())
    assert 2 * len(blocks) == page.read_text().count("```")
    for block in blocks:
        assert block.language in RUNNABLE + DATA_LANGUAGES, f"{page_id(page)}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), f"{target}#{anchor}"


@pytest.mark.slow
@pytest.mark.parametrize("page", list(filter(blocks_to_run, PAGES)), ids=page_id)
def test_blocks_run(page, server, tmp_path, request):
    if page.name in AFTER_TRAINING:
        shutil.copytree(request.getfixturevalue("trained"), tmp_path, symlinks=True, dirs_exist_ok=True)
    else:
        make_files(tmp_path)
    for block in blocks_to_run(page):
        done = server.run(block.language, block.source, tmp_path)
        assert done.returncode == 0, f"{page_id(page)}:{block.line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
def test_the_script_with_a_trainer_continues_as_an_unbroken_run(server, tmp_path):
    (script, *_) = blocks_to_run(ROOT / "docs" / "trainer.md")
    losses = {}
    for name, epochs in (("broken", ("1", "2")), ("unbroken", ("2",))):
        folder = tmp_path / name
        folder.mkdir()
        make_files(folder)
        for number in epochs:
            schedule = f'num_train_epochs={number}, lr_scheduler_type="constant", logging_steps=1'
            done = server.run("python", script.source.replace("num_train_epochs=2", schedule), folder)
            assert done.returncode == 0, done.stderr[-4000:]
        (last, *_) = sorted(folder.glob("outputs/mine/checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
    assert losses["broken"] == pytest.approx(losses["unbroken"], rel=1e-4)
    assert len(losses["broken"]) == 6  # two epochs of three batches
