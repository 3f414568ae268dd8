"""Every recipe from YAML to caption, with tiny models of real architectures, and how recipes combine."""

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
from qformer_captioner.training.captioner_setup import load_captioner
from qformer_captioner.training.data_setup import hold_out
from qformer_captioner.training.training_arguments import QFormerTrainingArguments

from ..conftest import ROOT
from ..fixtures import tiny

FILES = {path.stem: path for folder in RECIPE_FOLDERS for path in sorted((RECIPES / folder).glob("*.yaml"))}
DATA = [name for name, path in FILES.items() if path.parent.name == "data"]
MODELS = [name for name in FILES if name not in DATA]
PRETRAINING = [name for name in MODELS if name.startswith("stage1_")]
REWARDS = [name for name in MODELS if name.startswith("reward_")]
CAPTIONERS = [name for name in MODELS if name not in PRETRAINING + REWARDS]
PARSER = OptionParser((ModelArguments, DataArguments, RunArguments, QFormerTrainingArguments), "")


# ----------------------------------------------------------------------------------------------------------------------
# Tiny models and data sets in place of those that recipes name
# ----------------------------------------------------------------------------------------------------------------------


def tokenizer(name: str | None):
    """Return a real tokenizer if it has a name and there is a folder `shared` next to the checkout, else a tiny one."""
    for folder in ROOT.parents:
        if name is not None and (folder / "shared" / "tokenizers" / name).is_dir():
            return AutoTokenizer.from_pretrained(folder / "shared" / "tokenizers" / name)
    return tiny.tokenizer()


def save_language(folder: Path, model_type: str, tokenizer_name: str | None = None) -> None:
    """Save a tiny language model of a real architecture, with the special tokens of its tokenizer."""
    saved = tokenizer(tokenizer_name)
    special_tokens = {
        "eos_token_id": saved.eos_token_id,
        "pad_token_id": saved.pad_token_id or 0,
        "bos_token_id": saved.bos_token_id,
    }
    tiny.save_language(folder, model_type, vocab_size=len(saved), initializer_range=0.02, **special_tokens)
    saved.save_pretrained(folder)


def save_two_towers(folder: Path, model, config, processor) -> None:
    """Save a tiny CLIP or SigLIP with a text tower, as on the Hub."""
    sizes = dict(tiny.LAYERS, hidden_size=tiny.VISION_WIDTH, intermediate_size=40)
    vision = sizes | dict(image_size=tiny.SIDE, patch_size=16)
    torch.manual_seed(4)
    model(config(vision_config=vision, text_config=sizes | dict(vocab_size=60))).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Save tiny models, and return their folders by the names that recipes use."""
    folder = tmp_path_factory.mktemp("models")
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    clip = CLIPImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=side)
    for name in ("clip-vit-base-patch32", "clip-vit-large-patch14"):
        save_two_towers(folder / "openai" / name, CLIPModel, CLIPConfig, clip)
    siglip = SiglipImageProcessorPil(size=side)
    save_two_towers(folder / "google/siglip-base-patch16-224", SiglipModel, SiglipConfig, siglip)
    tiny.save_vision(folder / "facebook/dinov2-small", "dinov2")
    save_language(folder / "google-t5/t5-base", "t5", "t5")
    save_language(folder / "meta-llama/Llama-3.2-3B-Instruct", "llama", "gpt2")
    # Real tokenizers take long to load, and these models have the same kinds.
    save_language(folder / "google/flan-t5-base", "flan-t5")
    for name in ("SmolLM2-360M-Instruct", "SmolLM2-135M-Instruct"):
        save_language(folder / "HuggingFaceTB" / name, "llama")
    bert = dict(tiny.LAYERS, hidden_size=tiny.QFORMER_WIDTH, intermediate_size=40, vocab_size=BERT_WORDS)
    BertModel(BertConfig(**bert)).save_pretrained(folder / "google-bert/bert-base-uncased")
    tiny.text_tokenizer().save_pretrained(folder / "google-bert/bert-base-uncased")
    return {f"{path.parent.name}/{path.name}": str(path) for path in folder.glob("*/*")}


def picture_bytes(seed: int, size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(seed, size=size).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """Save tiny data sets with the columns of the real ones, and return their folders by the names in recipes."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, split: str, rows: int, image: str, more: dict) -> None:
        cells = [{"bytes": picture_bytes(row), "path": f"{row}.jpg"} for row in range(rows)]
        if split == "train":
            cells[2]["bytes"] = cells[2]["bytes"][:300]  # cut off
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
    images = folder / "local" / "flickr8k"
    images.mkdir(parents=True)
    lines = []
    for row in range(8):
        (images / f"{row}.jpg").write_bytes(picture_bytes(row))
        split = "dev" if row < 3 else "train"
        lines.append(json.dumps({"file_name": f"{row}.jpg", "split": split, "captions": [caption(row), "a dog"]}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    table = folder / "local" / "captions.csv"
    lines = ["image,caption"]
    for row in range(8):
        lines += [f'flickr8k/{row}.jpg,"{text}"' for text in (caption(row), "a dog")]
    table.write_text("\n".join(lines))
    names = {f"{path.parent.name}/{path.name}": str(path) for path in folder.glob("*/*")}
    return {**names, "flickr8k": str(images), "captions.csv": str(table), "scenes": "scenes"}


BERT_WORDS = len(tiny.text_tokenizer())
SIZES = {
    "qformer_config": tiny.QFORMER | dict(initializer_range=0.02),
    "train_val_split": 0.25,
    "max_train_samples": None,
    "max_skipped": 1,  # one image of a few is damaged
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0.01,
    "use_cpu": True,
    "disable_tqdm": True,
    "dtype": "bfloat16",  # as on a GPU
    "bf16": True,
}
GENERATION = {"generation_num_beams": 1, "generation_max_length": 6}  # which pretraining does not read


def fields(*names: str) -> dict:
    """Return the fields of one recipe, or of several combined, with those of the recipes they build on."""
    return merge(*(load_recipe(FILES[name], PARSER) for name in names))


def tiny_recipe(folder: Path, names: list[str], models: dict[str, str], data: dict[str, str], **changes) -> list[str]:
    """Return a command line with these recipes, at tiny sizes and with folders instead of names."""
    recipe = fields(*names)
    changes = {**SIZES, "output_dir": str(folder / "run"), **changes}
    if recipe.get("objective") != "pretrain":
        changes = GENERATION | changes
    for part in ("vision_model", "language_model", "qformer", "text_model"):
        if f"{part}_name_or_path" in recipe:
            changes[f"{part}_name_or_path"] = models[recipe[f"{part}_name_or_path"]]
    changes["dataset_name"] = data[recipe["dataset_name"]]
    if "vision_config" in recipe:  # from scratch
        changes |= {"vision_config": {"hidden_size": 16, "intermediate_size": 16}, "dtype": "auto"}
        changes |= {"text_config": {"hidden_size": 16, "intermediate_size": 16}, "max_train_samples": 8}
        changes |= {"max_eval_samples": 4}
    if "qformer_name_or_path" in recipe or "text_model_name_or_path" in recipe:  # the tiny BERT has a small vocabulary
        changes["qformer_config"] = changes["qformer_config"] | dict(vocab_size=BERT_WORDS)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(changes))
    return ["--recipe", *names, str(folder / "tiny.yaml")]


def check_captions(folder: Path) -> None:
    """Check that the folder opens with transformers alone, and captions two images."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    special = model.processor.tokenizer.all_special_ids
    captions = model.caption(
        [tiny.picture(1), tiny.picture(2)], max_new_tokens=4, min_new_tokens=4, suppress_tokens=special
    )
    assert len(captions) == 2 and all(isinstance(caption, str) and caption for caption in captions)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTIONERS)
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
    check_captions(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINING)
def test_a_recipe_of_stage_1_runs_from_yaml_to_similarity(name, models, data, tmp_path):
    train_hf.train(tiny_recipe(tmp_path, [name], models, data))
    model = AutoModel.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert model.similarity([tiny.picture(1), tiny.picture(2)], tiny.CAPTIONS).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_a_data_recipe_combines_with_a_model_recipe(name, models, data, tmp_path):
    train_hf.train(tiny_recipe(tmp_path, ["clip_llama_lora", name], models, data))
    evaluated = (tmp_path / "run" / "captions.jsonl").read_text().splitlines()
    # gcc holds out a quarter of 12 rows, coco has 4 rows for 2 images, and flickr30k has its own split.
    assert len(evaluated) == {"gcc": 3, "coco_karpathy": 2, "flickr30k": 3}[name]
    check_captions(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARDS)
def test_a_recipe_of_rewards_runs_from_yaml_to_caption(name, models, data, tmp_path):
    tiny.captioner().save_pretrained(tmp_path / "captioner")
    argv = tiny_recipe(tmp_path, [name], models, data)
    train_hf.train([*argv, "--model_name_or_path", str(tmp_path / "captioner")])
    assert "Trained by rewards" in (tmp_path / "run" / "README.md").read_text()
    check_captions(tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------------------
# A T5 and CLIP from a recipe: mistakes of the scripts that this package replaced
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_t5(models, data, tmp_path_factory):
    """Return the captioner that `clip_t5` trains, and its collator."""
    argv = tiny_recipe(tmp_path_factory.mktemp("clip_t5"), ["clip_t5"], models, data)
    args = train_hf.parse_options(argv)[0]
    model = load_captioner(args, []).eval()
    return model, CaptionCollator(model.processor)


def rows_of(*captions: str) -> list[dict]:
    return [{"image": tiny.picture(seed), "captions": [caption]} for seed, caption in enumerate(captions)]


def test_the_encoder_reads_soft_prompt_and_text_prompt_but_no_caption(clip_t5):
    model, collate = clip_t5
    inputs = []
    hook = model.language_model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for captions in (("a red circle", "a green heart"), ("two", "a yellow star above a blue square")):
        batch = collate(rows_of(*captions))
        model(**batch)
    hook.remove()
    assert torch.equal(*inputs)
    assert inputs[0].shape[1] == tiny.QUERIES + batch["input_ids"].shape[1]
    tokenizer = model.processor.tokenizer
    prompt = tokenizer.decode(tokenizer("a photo of").input_ids, skip_special_tokens=True)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == prompt


def test_labels_end_with_end_of_sequence_and_padding_is_ignored(clip_t5):
    model, collate = clip_t5
    labels = collate(rows_of("a red circle", "two small squares, one of them yellow"))["labels"][:, 0]
    end = model.processor.tokenizer.eos_token_id
    for caption in labels:
        tokens = caption[caption != -100]
        assert tokens[-1] == end and (tokens == end).sum() == 1
        assert torch.equal(caption[len(tokens) :], torch.full_like(caption[len(tokens) :], -100))
    assert (labels[0] == -100).any() and not (labels[1] == -100).any()


def test_images_are_scaled_once_and_not_stretched(clip_t5):
    model, _ = clip_t5
    wide = Image.new("RGB", (90, 40), "blue")
    wide.paste((200, 40, 0), (20, 0, 70, 40))  # the centre crop, and a little more
    pixels = model.processor(images=[wide])["pixel_values"][0]
    processor = model.processor.image_processor
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    expected = torch.tensor([200.0, 40.0, 0.0])[:, None, None] / 255
    torch.testing.assert_close(pixels * std + mean, expected.expand_as(pixels), atol=1e-3, rtol=0)


def test_t5_in_float16_is_refused(models, data, tmp_path):
    argv = tiny_recipe(tmp_path, ["clip_t5"], models, data, bf16=False, fp16=True)
    with pytest.raises(InputError, match="T5 overflows in float16"):
        train_hf.train(argv)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# How recipes are read
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_describes_itself_and_has_existing_options(name):
    text = FILES[name].read_text()
    header = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    if name in DATA:
        assert header.startswith("Data only: ")
    else:
        assert all(word in header for word in ("Data: ", "Hardware: ", "Time: "))
        assert "(estimated, not measured)" in header or "(measured, see docs/results.md)" in header
    model, data, *_ = train_hf.parse_options(["--recipe", name, "--use_cpu"])
    assert data.dataset_name
    if name not in DATA:
        assert model.vision_config or model.vision_model_name_or_path or model.model_name_or_path
        assert fields(name)["output_dir"].startswith("outputs/")


def test_no_two_recipes_share_a_name_or_an_output_folder():
    paths = [path for folder in RECIPE_FOLDERS for path in (RECIPES / folder).glob("*.yaml")]
    assert len(paths) == len(FILES)
    folders = [fields(name)["output_dir"] for name in MODELS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", DATA)
def test_a_data_recipe_replaces_every_field_of_another(name):
    """Model recipes build on gcc, so the other data recipes must set each field that gcc sets."""
    assert set(fields("gcc")) <= set(fields(name))


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a recipe and returns its path."""

    def write(name: str, **recipe) -> str:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        return str(tmp_path / f"{name}.yaml")

    return write


def options(*argv: str):
    return train_hf.parse_options([*argv, "--use_cpu"])


def test_a_recipe_overrides_the_one_it_builds_on(write):
    write("below", dataset_name="a", caption_column="text", qformer_config={"hidden_size": 16, "num_query_tokens": 4})
    path = write("mine", recipe="below", dataset_name="b", qformer_config={"num_query_tokens": 8}, caption_column=None)
    model, data, *_ = options("--recipe", path)
    assert (data.dataset_name, data.caption_column) == (["b"], None)  # null: the default
    assert json.loads(model.qformer_config) == {"hidden_size": 16, "num_query_tokens": 8}


def test_a_users_recipe_builds_on_several_of_ours(write):
    model, data, *_ = options("--recipe", write("mine", recipe=["clip_llama", "data/flickr30k"], num_train_epochs=2))
    assert "Llama" in model.language_model_name_or_path and "flickr30k" in data.dataset_name[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipe", "clip_llama_lora", "data/coco_karpathy"],
        ["clip_llama_lora.yaml", "coco_karpathy"],
        ["--learning_rate", "0.5", "--recipe", "recipes/clip_llama_lora.yaml", "recipes/data/coco_karpathy.yaml"],
    ],
)
def test_several_recipes_combine_and_later_ones_override(argv):
    model, data, _, training = options(*argv)
    assert (model.lora_r, data.dataset_name, data.image_column) == (16, ["jxie/coco_captions"], ["image"])
    assert data.train_val_split is None and data.eval_split == "validation"
    assert training.learning_rate == (0.5 if "0.5" in argv else 1e-4)


def test_a_misspelt_field_of_an_underlying_recipe_is_answered_with_the_nearest(write):
    write("below", lerning_rate=1e-3)
    with pytest.raises(InputError, match=r"below.yaml' has an unknown field 'lerning_rate'.*'learning_rate'"):
        options("--recipe", "clip_t5", write("mine", recipe="below"))


@pytest.mark.parametrize("name", MODELS)
def test_a_misspelt_field_in_any_recipe_is_answered_with_the_nearest(name, tmp_path):
    (tmp_path / "copy.yaml").write_text(FILES[name].read_text().replace("output_dir:", "ouput_dir:"))
    with pytest.raises(InputError, match="unknown field 'ouput_dir'. Did you mean 'output_dir'"):
        options("--recipe", str(tmp_path / "copy.yaml"))


def test_recipes_that_build_on_each_other_are_refused(write):
    write("one", recipe="other")
    with pytest.raises(InputError, match=r"^Recipes must not begin with themselves: .*other.*one.*other[^\n]*$"):
        options("--recipe", write("other", recipe="one"))


def test_an_unknown_recipe_is_answered_with_the_existing_ones(write):
    with pytest.raises(InputError, match="no recipe 'clip_t6'.* clip_t5,.* coco_karpathy,"):
        options("--recipe", write("mine", recipe="clip_t6"))


def test_the_last_images_are_held_out_with_all_their_captions():
    cell = {"bytes": picture_bytes(0), "path": None}
    columns = {"image": [cell] * 7, "caption": [f"caption {row}" for row in range(7)], "id": [0, 0, 1, 2, 2, 3, 3]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    train_data = CaptionDataset(CaptionSource("train", rows, image_id_column="id"), SkippedRows())
    eval_data = hold_out(train_data, 0.5, max_eval_samples=1)
    assert train_data.references() == [["caption 0", "caption 1"], ["caption 2"]]
    assert eval_data.references() == [["caption 3", "caption 4"]]


@pytest.mark.parametrize(("share", "kind"), [(0.0, "evaluate"), (1.0, "train")])
def test_a_share_that_leaves_no_row_is_refused(models, data, tmp_path, share, kind):
    argv = tiny_recipe(tmp_path, ["clip_t5"], models, data, train_val_split=share)
    with pytest.raises(InputError, match=f"leaves no row to {kind} on"):
        train_hf.train(argv)
