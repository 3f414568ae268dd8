"""Every recipe from YAML to caption, with real architectures and tokenizers at tiny sizes; how recipes combine."""

import io
import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)
from transformers.utils import is_bitsandbytes_available

from qformer_captioner import train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.common.option_parser import OptionParser
from qformer_captioner.common.recipes import RECIPE_FOLDERS, RECIPES, load_recipe, merge
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.training.arguments import DataArguments, ModelArguments, RunArguments
from qformer_captioner.training.data_setup import hold_out
from qformer_captioner.training.model_setup import load_captioner
from qformer_captioner.training.training_arguments import CaptionTrainingArguments

from ..conftest import ROOT
from ..fixtures import tiny

FILES = {path.stem: path for folder in RECIPE_FOLDERS for path in sorted((RECIPES / folder).glob("*.yaml"))}
DATA = [name for name, path in FILES.items() if path.parent.name == "data"]
# Stage 2 goes on from what stage 1 leaves, and is run with it.
RUN = [name for name in FILES if name not in DATA]
PARSER = OptionParser((ModelArguments, DataArguments, RunArguments, CaptionTrainingArguments), "")


# ----------------------------------------------------------------------------------------------------------------------
# Tiny stand-ins under the names that recipes give
# ----------------------------------------------------------------------------------------------------------------------


def tokenizer(name: str):
    """A real tokenizer where there is a folder `shared` beside the repository, else a tiny one."""
    for folder in ROOT.parents:
        if (folder / "shared" / "tokenizers" / name).is_dir():
            return AutoTokenizer.from_pretrained(folder / "shared" / "tokenizers" / name)
    return tiny.tokenizer()


def save_language(folder: Path, name: str, words: str) -> None:
    """A language model of the real architecture, with the special tokens of its tokenizer."""
    own = tokenizer(words)
    special = dict(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id or 0, bos_token_id=own.bos_token_id)
    tiny.save_language(folder, name, vocab_size=len(own), initializer_range=0.02, **special)
    own.save_pretrained(folder)


def save_two_towers(folder: Path, model, config, processor) -> None:
    """CLIP or SigLIP as one finds them on the Hub: a text tower, too."""
    sizes = dict(tiny.LAYERS, hidden_size=tiny.VISION_WIDTH, intermediate_size=40)
    vision = sizes | dict(image_size=tiny.SIDE, patch_size=16)
    torch.manual_seed(4)
    model(config(vision_config=vision, text_config=sizes | dict(vocab_size=60))).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models, by the names that stand in recipes."""
    folder = tmp_path_factory.mktemp("models")
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    clip = CLIPImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=side)
    save_two_towers(folder / "openai/clip-vit-base-patch32", CLIPModel, CLIPConfig, clip)
    siglip = SiglipImageProcessorPil(size=side)
    save_two_towers(folder / "google/siglip-base-patch16-224", SiglipModel, SiglipConfig, siglip)
    tiny.save_vision(folder / "facebook/dinov2-small", "dinov2")
    save_language(folder / "google-t5/t5-base", "t5", "t5")
    save_language(folder / "google/flan-t5-base", "flan-t5", "t5")
    for name in ("meta-llama/Llama-3.2-3B-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"):
        save_language(folder / name, "llama", "gpt2")
    save_language(folder / "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", "gpt2")
    bert = dict(tiny.LAYERS, hidden_size=tiny.QFORMER_WIDTH, intermediate_size=40, vocab_size=tiny.WORDS)
    BertModel(BertConfig(**bert)).save_pretrained(folder / "google-bert/bert-base-uncased")
    tiny.tokenizer().save_pretrained(folder / "google-bert/bert-base-uncased")
    return {f"{path.parent.name}/{path.name}": str(path) for path in folder.glob("*/*")}


def picture_bytes(seed: int, size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(seed, size=size).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny data sets with the columns of the real ones, by the names that stand in recipes."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, split: str, rows: int, image: str, more: dict) -> None:
        cells = [{"bytes": picture_bytes(row), "path": f"{row}.jpg"} for row in range(rows)]
        if split == "train":
            cells[2]["bytes"] = cells[2]["bytes"][:300]  # broken off
        columns = {image: cells, **{key: [value(row) for row in range(rows)] for key, value in more.items()}}
        table = datasets.Dataset.from_dict(columns).cast_column(image, datasets.Image())
        (folder / name / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / name / "data" / f"{split}-00000-of-00001.parquet")

    def caption(row: int) -> str:
        return tiny.CAPTIONS[row % len(tiny.CAPTIONS)]

    gcc = {"caption": caption, "image_embeddings": lambda row: [0.5] * 4}
    write("shirsh10mall/Image_Captioning_GCC_Embeddings", "train", 12, "image_data", gcc)
    coco = {"caption": caption, "cocoid": lambda row: row // 2, "filename": lambda row: f"{row}.jpg"}
    flickr = {"caption": lambda row: [caption(row), "a dog"], "img_id": str, "split": lambda row: "train"}
    write("jxie/coco_captions", "train", 16, "image", coco)
    write("jxie/coco_captions", "validation", 4, "image", coco)
    write("umaru97/flickr30k_train_val_test", "train", 8, "image", flickr)
    write("umaru97/flickr30k_train_val_test", "val", 3, "image", flickr)
    images = folder / "own" / "flickr8k"
    images.mkdir(parents=True)
    lines = []
    for row in range(8):
        (images / f"{row}.jpg").write_bytes(picture_bytes(row))
        split = "dev" if row < 3 else "train"
        lines.append(json.dumps({"file_name": f"{row}.jpg", "split": split, "captions": [caption(row), "a dog"]}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    table = folder / "own" / "captions.csv"
    lines = ["image,caption"]
    for row in range(8):
        lines += [f'flickr8k/{row}.jpg,"{text}"' for text in (caption(row), "a dog")]
    table.write_text("\n".join(lines))
    names = {f"{path.parent.name}/{path.name}": str(path) for path in folder.glob("*/*")}
    return {**names, "flickr8k": str(images), "captions.csv": str(table), "scenes": "scenes"}


SIZES = {
    "qformer_config": tiny.QFORMER | dict(initializer_range=0.02),
    "train_val_split": 0.25,
    "max_train_samples": None,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "generation_num_beams": 1,
    "generation_max_length": 6,
    "learning_rate": 0.01,
    "use_cpu": True,
    "disable_tqdm": True,
    "dtype": "bfloat16",  # what the recipes come to on a GPU
    "bf16": True,
}


def fields(*names: str) -> dict:
    """All that a recipe comes to, or several."""
    return merge(*(load_recipe(FILES[name], PARSER) for name in names))


def tiny_recipe(folder: Path, names: list[str], models: dict[str, str], data: dict[str, str], **changes) -> list[str]:
    """A command line: these recipes, with other sizes, and folders in the place of names."""
    recipe = fields(*names)
    changes = {**SIZES, "output_dir": str(folder / "run"), **changes}
    for option in ("vision_model_name_or_path", "language_model_name_or_path", "qformer_name_or_path"):
        if option in recipe:
            changes[option] = models[recipe[option]]
    changes["dataset_name"] = data[recipe["dataset_name"]]
    if "vision_config" in recipe:  # from scratch
        changes |= {"vision_config": {"hidden_size": 16, "intermediate_size": 16}, "dtype": "auto"}
        changes |= {"text_config": {"hidden_size": 16, "intermediate_size": 16}, "max_train_samples": 8}
        changes |= {"max_eval_samples": 4}
    if "qformer_name_or_path" in recipe:  # the stand-in of BERT knows few words
        changes["qformer_config"] = changes["qformer_config"] | dict(vocab_size=tiny.WORDS)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(changes))
    return ["--recipe", *names, str(folder / "tiny.yaml")]


def check_that_it_captions(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    special = model.processor.tokenizer.all_special_ids
    captions = model.caption(
        [tiny.picture(1), tiny.picture(2)], max_new_tokens=4, min_new_tokens=4, suppress_tokens=special
    )
    assert len(captions) == 2 and all(isinstance(caption, str) and caption for caption in captions)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN)
def test_a_recipe_runs_from_yaml_to_caption(name, models, data, tmp_path):
    if name.endswith("qlora") and not is_bitsandbytes_available():
        pytest.skip("needs bitsandbytes: pip install 'qformer-captioner[qlora]'")
    train_hf.train(tiny_recipe(tmp_path, [name], models, data))
    folder = tmp_path / "run"
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    assert (folder / "adapter_config.json").exists() == ("lora" in name)
    if fields(name)["dataset_name"].startswith("shirsh10mall"):
        skipped = [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()]
        assert {(row["split"], row["row"]) for row in skipped} == {("train", 2)}
    check_that_it_captions(folder)


@pytest.mark.parametrize("name", DATA)
def test_data_is_chosen_apart_from_the_model(name, models, data, tmp_path):
    train_hf.train(tiny_recipe(tmp_path, ["clip_llama_lora", name], models, data))
    evaluated = (tmp_path / "run" / "captions.jsonl").read_text().splitlines()
    # Of gcc a quarter of twelve rows; of coco four rows, which are two images; of flickr30k its own split.
    assert len(evaluated) == {"gcc": 3, "coco_karpathy": 2, "flickr30k": 3}[name]
    check_that_it_captions(tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------------------
# What the old scripts got wrong
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_t5(models, data, tmp_path_factory):
    """The captioner that `clip_t5` trains, and its collator."""
    words = tiny_recipe(tmp_path_factory.mktemp("clip_t5"), ["clip_t5"], models, data)
    args = train_hf.parse_options(words)[0]
    model = load_captioner(args, []).eval()
    return model, CaptionCollator(model.processor)


def rows(*captions: str) -> list[dict]:
    return [{"image": tiny.picture(seed), "captions": [caption]} for seed, caption in enumerate(captions)]


def test_the_encoder_reads_queries_and_prompt_and_no_caption(clip_t5):
    model, collate = clip_t5
    read = []
    hook = model.language_model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for captions in (("a red circle", "a green heart"), ("two", "a yellow star above a blue square")):
        batch = collate(rows(*captions))
        model(**batch)
    hook.remove()
    assert torch.equal(*read)
    assert read[0].shape[1] == tiny.QUERIES + batch["input_ids"].shape[1]
    tokenizer = model.processor.tokenizer
    prompt = tokenizer.decode(tokenizer("a photo of").input_ids, skip_special_tokens=True)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == prompt


def test_labels_end_with_end_of_sequence_and_padding_is_no_label(clip_t5):
    model, collate = clip_t5
    labels = collate(rows("a red circle", "two small squares, one of them yellow"))["labels"][:, 0]
    end = model.processor.tokenizer.eos_token_id
    for caption in labels:
        told = caption[caption != -100]
        assert told[-1] == end and (told == end).sum() == 1
        assert torch.equal(caption[len(told) :], torch.full_like(caption[len(told) :], -100))
    assert (labels[0] == -100).any() and not (labels[1] == -100).any()


def test_images_are_scaled_once_and_not_stretched(clip_t5):
    model, _ = clip_t5
    wide = Image.new("RGB", (90, 40), "blue")
    wide.paste((200, 40, 0), (20, 0, 70, 40))  # the square in the middle, and a little more
    pixels = model.processor(images=[wide])["pixel_values"][0]
    processor = model.processor.image_processor
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    expected = torch.tensor([200.0, 40.0, 0.0])[:, None, None] / 255
    torch.testing.assert_close(pixels * std + mean, expected.expand_as(pixels), atol=1e-3, rtol=0)


def test_t5_in_float16_is_refused(models, data, tmp_path):
    words = tiny_recipe(tmp_path, ["clip_t5"], models, data, bf16=False, fp16=True)
    with pytest.raises(InputError, match="T5 overflows in float16"):
        train_hf.train(words)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# How recipes are read
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_says_what_it_is_and_has_options_that_there_are(name):
    text = FILES[name].read_text()
    header = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    if name in DATA:
        assert header.startswith("Data alone: ")
    else:
        assert all(word in header for word in ("Data: ", "Hardware: ", "Time: "))
        assert "(estimated, not measured)" in header or "(measured, see the README)" in header
    model, data, *_ = train_hf.parse_options(["--recipe", name, "--use_cpu"])
    assert data.dataset_name
    if name not in DATA:
        assert model.vision_config or model.vision_model_name_or_path or model.model_name_or_path
        assert fields(name)["output_dir"].startswith("outputs/")


def test_no_two_recipes_share_a_name_or_an_output_folder():
    paths = [path for folder in RECIPE_FOLDERS for path in (RECIPES / folder).glob("*.yaml")]
    assert len(paths) == len(FILES)
    folders = [fields(name)["output_dir"] for name in FILES if name not in DATA]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", DATA)
def test_data_leaves_nothing_behind_of_other_data(name):
    """Every recipe begins with gcc: what that sets, the others must set, too."""
    assert set(fields("gcc")) <= set(fields(name))


@pytest.fixture
def write(tmp_path):
    """Writes a recipe; returns its path."""

    def write(name: str, **own) -> str:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own))
        return str(tmp_path / f"{name}.yaml")

    return write


def options(*words: str):
    return train_hf.parse_options([*words, "--use_cpu"])


def test_a_recipe_begins_with_another_and_wins_over_it(write):
    write("below", dataset_name="a", caption_column="text", qformer_config={"hidden_size": 16, "num_query_tokens": 4})
    own = write("own", recipe="below", dataset_name="b", qformer_config={"num_query_tokens": 8}, caption_column=None)
    model, data, *_ = options("--recipe", own)
    assert (data.dataset_name, data.caption_column) == (["b"], None)  # nothing: the default again
    assert json.loads(model.qformer_config) == {"hidden_size": 16, "num_query_tokens": 8}


def test_a_recipe_of_ones_own_begins_with_several_of_ours(write):
    model, data, *_ = options("--recipe", write("own", recipe=["clip_llama", "data/flickr30k"], num_train_epochs=2))
    assert "Llama" in model.language_model_name_or_path and "flickr30k" in data.dataset_name[0]


@pytest.mark.parametrize(
    "words",
    [
        ["--recipe", "clip_llama_lora", "data/coco_karpathy"],
        ["clip_llama_lora.yaml", "coco_karpathy"],
        ["--learning_rate", "0.5", "--recipe", "recipes/clip_llama_lora.yaml", "recipes/data/coco_karpathy.yaml"],
    ],
)
def test_several_recipes_combine_and_later_ones_win(words):
    model, data, _, training = options(*words)
    assert (model.lora_r, data.dataset_name, data.image_column) == (16, ["jxie/coco_captions"], ["image"])
    assert data.train_val_split is None and data.eval_split == "validation"
    assert training.learning_rate == (0.5 if "0.5" in words else 1e-4)


def test_a_misspelt_field_is_named_with_the_nearest_one_wherever_it_stands(write):
    write("below", lerning_rate=1e-3)
    with pytest.raises(InputError, match=r"below.yaml' has an unknown field 'lerning_rate'.*'learning_rate'"):
        options("--recipe", "clip_t5", write("own", recipe="below"))


@pytest.mark.parametrize("name", [name for name in FILES if name not in DATA])
def test_a_misspelt_field_in_any_recipe_is_named(name, tmp_path):
    (tmp_path / "copy.yaml").write_text(FILES[name].read_text().replace("output_dir:", "ouput_dir:"))
    with pytest.raises(InputError, match="unknown field 'ouput_dir'. Did you mean 'output_dir'"):
        options("--recipe", str(tmp_path / "copy.yaml"))


def test_recipes_that_begin_with_each_other_are_refused(write):
    write("one", recipe="other")
    with pytest.raises(InputError, match=r"^Recipes must not begin with themselves: .*other.*one.*other[^\n]*$"):
        options("--recipe", write("other", recipe="one"))


def test_an_unknown_recipe_is_named_with_those_that_there_are(write):
    with pytest.raises(InputError, match="no recipe 'clip_t6'.* clip_t5,.* coco_karpathy,"):
        options("--recipe", write("own", recipe="clip_t6"))


def test_the_last_images_are_held_out_with_all_of_their_captions():
    cell = {"bytes": picture_bytes(0), "path": None}
    columns = {"image": [cell] * 7, "caption": [f"caption {row}" for row in range(7)], "id": [0, 0, 1, 2, 2, 3, 3]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    train_data = CaptionDataset(CaptionSource("train", rows, image_id_column="id"), SkippedRows())
    eval_data = hold_out(train_data, 0.5, max_eval_samples=1)
    assert train_data.references() == [["caption 0", "caption 1"], ["caption 2"]]
    assert eval_data.references() == [["caption 3", "caption 4"]]


@pytest.mark.parametrize(("share", "kind"), [(0.0, "evaluate"), (1.0, "train")])
def test_a_share_that_leaves_nothing_is_refused(models, data, tmp_path, share, kind):
    words = tiny_recipe(tmp_path, ["clip_t5"], models, data, train_val_split=share)
    with pytest.raises(InputError, match=f"leaves no row to {kind} on"):
        train_hf.train(words)
