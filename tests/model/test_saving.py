"""Folders: what is in them, and that they open anywhere. Each test states one property.

The folders are opened by one fresh process that does not have this package (`FRESH_PROCESS`); its findings are the
fixture `findings`, one entry per folder and check.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

import qformer_captioner
from qformer_captioner import QFormerCaptioner

from ..fixtures import tiny

LANGUAGES = {
    "t5-tied": dict(name="t5"),
    "t5-untied": dict(name="flan-t5"),
    "llama-tied": dict(name="llama", tie_word_embeddings=True),
    "llama-untied": dict(name="llama", tie_word_embeddings=False),
}
PRECISIONS = ["float32", "bfloat16", "mixed"]  # mixed: backbones in bfloat16, Q-Former in float32
FORMS = ["referenced", "included"]
FOLDERS = [f"{language}-{precision}-{form}" for language in LANGUAGES for precision in PRECISIONS for form in FORMS]
DECODING = dict(num_beams=2, max_new_tokens=6, min_new_tokens=6, no_repeat_ngram_size=1)
PROMPT = "a blue star"

FRESH_PROCESS = """
import importlib.util, json, pathlib, sys, traceback

sys.modules["qformer_captioner"] = None  # not even where it is installed
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
assert importlib.util.find_spec("modeling_qformer") is None
try:
    import qformer_captioner
except ImportError:
    pass
else:
    raise AssertionError("the package can be imported")
decoding, prompt, folders = json.loads(sys.argv[1])
batch = torch.load("batch.pt")
pictures = [Image.open(f"{number}.png") for number in range(2)]


def auto_config(folder, expected):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return type(config).__name__ == "QFormerCaptionerConfig" and config.model_type == "qformer_captioner"


def same_answers(model, expected):
    logits = model(**batch).logits
    return (
        type(model).__module__.startswith("transformers_modules.")
        and {name: str(next(part.parameters()).dtype) for name, part in model.named_children()} == expected["dtypes"]
        and logits.dtype == expected["logits"].dtype
        and torch.equal(logits, expected["logits"])
        and model.caption(pictures, prompt=prompt, **decoding) == expected["captions"]
    )


def auto_model(folder, expected):
    return same_answers(AutoModel.from_pretrained(folder, trust_remote_code=True), expected)


def auto_model_for_image_text_to_text(folder, expected):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return same_answers(model, expected)


def auto_processor(folder, expected):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=pictures, text=prompt)
    return all(torch.equal(inputs[name], tensor) for name, tensor in expected["inputs"].items())


def saved_again(folder, expected):
    again = f"again/{folder}"
    AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    return same_answers(AutoModel.from_pretrained(again, trust_remote_code=True), expected)


def in_a_pipeline(folder, expected):
    caption = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    results = [
        caption(images=picture, text=prompt, return_full_text=False, generate_kwargs=decoding) for picture in pictures
    ]
    return [result[0]["generated_text"].strip() for result in results] == expected["captions"]


def attempt(check, folder):
    try:
        with torch.no_grad():
            return check(folder, torch.load(f"{folder}.pt"))
    except Exception:
        return traceback.format_exc()


checks = (auto_config, auto_model, auto_model_for_image_text_to_text, auto_processor, saved_again)
findings = {folder: {check.__name__: attempt(check, folder) for check in checks} for folder in folders}
for folder in folders:
    if "mixed" in folder:  # slower than the rest together
        findings[folder]["in_a_pipeline"] = attempt(in_a_pipeline, folder)
pathlib.Path("findings.json").write_text(json.dumps(findings))
"""


pytestmark = pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`:UserWarning")


def make_captioner(vision: Path, language: Path, **options) -> QFormerCaptioner:
    torch.manual_seed(0)
    return QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER | options)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    """Pretrained backbones: `clip-float32`, `llama-tied-bfloat16` ..."""
    folder = tmp_path_factory.mktemp("backbones")
    for dtype in ("float32", "bfloat16"):
        tiny.save_vision(folder / f"clip-{dtype}", dtype=getattr(torch, dtype))
        for name, fields in LANGUAGES.items():
            tiny.save_language(folder / f"{name}-{dtype}", dtype=getattr(torch, dtype), **fields)
    return folder


@pytest.fixture(scope="module")
def folders(backbones, tmp_path_factory) -> Path:
    """All of `FOLDERS`, and beside each what the model in it answered before it was saved."""
    root = tmp_path_factory.mktemp("folders")
    pictures = [tiny.picture(0), tiny.picture(1)]
    torch.save(tiny.batch(), root / "batch.pt")
    for number, picture in enumerate(pictures):
        picture.save(root / f"{number}.png")
    for language in LANGUAGES:
        for precision in PRECISIONS:
            dtype = "float32" if precision == "float32" else "bfloat16"
            model = make_captioner(backbones / f"clip-{dtype}", backbones / f"{language}-{dtype}")
            if precision == "bfloat16":  # not the whole model: `to` would cast Llama's rotary frequencies, loading not
                model.qformer.to(torch.bfloat16)
                model.language_projection.to(torch.bfloat16)
            expected = {
                "dtypes": {name: str(next(part.parameters()).dtype) for name, part in model.named_children()},
                "logits": model(**tiny.batch()).logits.detach(),
                "captions": model.caption(pictures, prompt=PROMPT, **DECODING),
                "inputs": dict(model.processor(images=pictures, text=PROMPT)),
            }
            for form in FORMS:
                model.save_pretrained(root / f"{language}-{precision}-{form}", include_backbones=form == "included")
                torch.save(expected, root / f"{language}-{precision}-{form}.pt")
    return root


@pytest.fixture(scope="module")
def findings(folders, tmp_path_factory) -> dict:
    """What a fresh process without the package makes of the folders: True, False or an error."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= dict(HF_HOME=str(home), HF_HUB_OFFLINE="1")
    (home / "fresh_process.py").write_text(FRESH_PROCESS)
    subprocess.run(
        [sys.executable, home / "fresh_process.py", json.dumps([DECODING, PROMPT, FOLDERS])],
        cwd=folders,
        env=environment,
        check=True,
    )
    return json.loads((folders / "findings.json").read_text())


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


# --- Opened by a fresh process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("auto_class", ["auto_config", "auto_processor"])
def test_opens_without_the_package(findings, folder, auto_class):
    assert findings[folder][auto_class] is True, findings[folder][auto_class]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("auto_class", ["auto_model", "auto_model_for_image_text_to_text"])
def test_loaded_without_the_package_it_gives_equal_logits_and_captions(findings, folder, auto_class):
    """Bit for bit, and in the dtypes of before."""
    assert findings[folder][auto_class] is True, findings[folder][auto_class]


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if "mixed" in folder])
def test_a_pipeline_gives_the_same_captions(findings, folder):
    assert findings[folder]["in_a_pipeline"] is True, findings[folder]["in_a_pipeline"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_saved_again_it_is_the_same_folder(findings, folders, folder):
    """Loaded by name and saved in the fresh process: equal files, tensors, configuration and answers."""
    assert findings[folder]["saved_again"] is True, findings[folder]["saved_again"]
    before, after = folders / folder, folders / "again" / folder
    assert contents(after) == contents(before)
    tensors, tensors_again = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(tensors_again[name], tensors[name]) for name in tensors)
    assert all(tensors_again[name].dtype == tensors[name].dtype for name in tensors)
    for name in ("config.json", "generation_config.json", "processor_config.json"):
        configurations = [json.loads((path / name).read_text()) for path in (before, after)]
        for configuration in configurations:  # transformers notes there what it was before a cast; we read `dtypes`
            configuration.get("qformer_config", {}).pop("dtype", None)
        assert configurations[0] == configurations[1], name


def test_the_captions_are_worth_comparing(folders):
    """They differ from picture to picture and hold words."""
    captions = [torch.load(folders / f"{folder}.pt")["captions"] for folder in FOLDERS]
    assert all(caption for pair in captions for caption in pair)
    assert all(first != second for first, second in captions)


# --- What is in a folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["merged adapter", "trained before", "one word", "more words"])
def test_a_frozen_backbone_that_is_no_longer_what_its_name_stands_for_is_saved(backbones, tmp_path, change):
    model = make_captioner(backbones / "clip-float32", backbones / "llama-tied-float32")
    if change == "merged adapter":
        adapter = LoraConfig(r=2, target_modules=r"language_model\..*q_proj", init_lora_weights=False)
        model = get_peft_model(model, adapter).merge_and_unload()
    elif change == "one word":
        with torch.no_grad():
            model.language_model.get_input_embeddings().weight[7] += 1
    elif change == "trained before":
        with torch.no_grad():
            model.language_model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    else:
        model.resize_token_embeddings(tiny.WORDS + 5)
    model.eval().save_pretrained(tmp_path)
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    assert torch.equal(loaded(**tiny.batch()).loss, model(**tiny.batch()).loss)
    assert loaded.config.referenced_backbones == ["vision_model"]
    loaded.save_pretrained(tmp_path / "again", include_backbones=False)
    again = QFormerCaptioner.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**tiny.batch()).loss, loaded(**tiny.batch()).loss)


def test_a_backbone_that_was_trained_is_never_referred_to(backbones, tmp_path):
    """Though somebody loads and freezes it later."""
    model = make_captioner(
        backbones / "clip-float32", backbones / "llama-tied-float32", freeze_language_model=False
    ).eval()
    with torch.no_grad():
        model.language_model.get_input_embeddings().weight[7] += 1
    model.save_pretrained(tmp_path / "trained")
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "trained").requires_grad_(False)
    loaded.save_pretrained(tmp_path / "again", include_backbones=False)
    again = QFormerCaptioner.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**tiny.batch()).loss, model(**tiny.batch()).loss)


@pytest.mark.parametrize("part", ["captioner", "language_model"])
def test_adapters_that_would_not_be_found_again_are_refused(tmp_path, part):
    model, adapter = tiny.captioner(), LoraConfig(r=2, target_modules=["q_proj"])
    if part == "captioner":
        get_peft_model(model, adapter)
    else:
        model.language_model = get_peft_model(model.language_model, adapter)
    with pytest.raises(ValueError, match="There are adapters on the captioner"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_holds_what_opens_it(folders, folder):
    assert contents(folders / folder) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "configuration_qformer.py",
        "backbones_qformer.py",
        "language_qformer.py",
        "modeling_qformer.py",
        "processing_qformer.py",
        "saving_qformer.py",
    }


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_referring_folder_holds_no_weights_of_its_backbones(folders, language, precision):
    folder = folders / f"{language}-{precision}-referenced"
    assert {name.split(".")[0] for name in tensor_names(folder)} == {"qformer", "language_projection"}
    weights = load_file(folder / "model.safetensors")
    own = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    assert (folder / "model.safetensors").stat().st_size < own + 10_000


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_output_layer_is_written_where_it_is_one_of_its_own(folders, language):
    names = tensor_names(folders / f"{language}-float32-included")
    assert ("language_model.lm_head.weight" in names) == language.endswith("untied")
    assert {name.split(".")[0] for name in names} == {
        "vision_model",
        "qformer",
        "language_projection",
        "language_model",
    }


def test_untied_output_layers_differ_from_the_embedding(folders):
    """Else the tests of these folders could not fail."""
    llama = load_file(folders / "llama-untied-float32-included" / "model.safetensors")
    t5 = load_file(folders / "t5-untied-float32-included" / "model.safetensors")
    for head, words in (
        (llama["language_model.lm_head.weight"], llama["language_model.model.embed_tokens.weight"]),
        (t5["language_model.lm_head.weight"], t5["language_model.shared.weight"]),
    ):
        assert (head - words).abs().mean() > 0.1


# --- Saving and loading in this process -------------------------------------------------------------------------------


@pytest.fixture
def pair(backbones, tmp_path) -> tuple[Path, Path]:
    """Backbones that a test may break."""
    copies = tmp_path / "vision", tmp_path / "language"
    for name, copy in zip(("clip-float32", "llama-untied-float32"), copies, strict=True):
        shutil.copytree(backbones / name, copy)
    return copies


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_missing_referenced_backbone_is_named(pair, tmp_path, part):
    make_captioner(*pair).save_pretrained(tmp_path / "captioner")
    shutil.rmtree(tmp_path / part)
    with pytest.raises(OSError, match=f"{part} model '{tmp_path / part}'"):
        QFormerCaptioner.from_pretrained(tmp_path / "captioner")


def test_a_folder_with_its_backbones_needs_nothing_else(pair, tmp_path):
    model = make_captioner(*pair)
    model.save_pretrained(tmp_path / "captioner", include_backbones=True)
    for folder in pair:
        shutil.rmtree(folder)
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "captioner")
    assert torch.equal(loaded(**tiny.batch()).logits, model(**tiny.batch()).logits)


@pytest.mark.parametrize("included", [False, True, ["vision_model"], ["language_model"]])
def test_a_folder_stays_as_it_was_saved(pair, tmp_path, included):
    """Which backbones are in it, how it captions, what is frozen."""
    model = make_captioner(*pair, prompt=PROMPT)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path / "first", include_backbones=included)
    loaded, report = QFormerCaptioner.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not loaded.training
    assert loaded.generation_config.num_beams == 3
    assert loaded.processor.prompt == PROMPT
    frozen = {name for name, weight in loaded.named_parameters() if not weight.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"vision_model", "language_model"}

    loaded.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    assert tensor_names(tmp_path / "second") == tensor_names(tmp_path / "first")
    parts = {name.split(".")[0] for name in tensor_names(tmp_path / "first")} - {"qformer", "language_projection"}
    names = {False: [], True: ["vision_model", "language_model"]}
    assert parts == set(names[included] if isinstance(included, bool) else included)


def test_saving_refers_to_the_frozen_backbones_by_default(pair, tmp_path):
    make_captioner(*pair).save_pretrained(tmp_path / "captioner")
    parts = {name.split(".")[0] for name in tensor_names(tmp_path / "captioner")}
    assert parts == {"qformer", "language_projection"}


def test_a_trained_backbone_is_always_written(pair, tmp_path):
    model = make_captioner(*pair, freeze_language_model=False)
    with torch.no_grad():
        model.language_model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "captioner", include_backbones=False)
    assert {name.split(".")[0] for name in tensor_names(tmp_path / "captioner")} == {
        "qformer",
        "language_projection",
        "language_model",
    }
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "captioner")
    assert torch.equal(loaded(**tiny.batch()).logits, model(**tiny.batch()).logits)
    assert all(weight.requires_grad for weight in loaded.language_model.parameters())
    assert not any(weight.requires_grad for weight in loaded.vision_model.parameters())


def test_backbones_without_a_name_are_always_written(tmp_path):
    model = tiny.captioner()
    model.requires_grad_(False)
    model.save_pretrained(tmp_path, include_backbones=False)
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    assert torch.equal(loaded(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_an_unknown_backbone_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match=r"text_model.*vision_model.*language_model"):
        make_captioner(*pair).save_pretrained(tmp_path / "captioner", include_backbones=["text_model"])


@pytest.mark.parametrize("included", [False, True])
def test_sharded_weights_load(pair, tmp_path, included):
    model = make_captioner(*pair)
    model.save_pretrained(tmp_path / "captioner", include_backbones=included, max_shard_size="30KB")
    assert len(list((tmp_path / "captioner").glob("model-*.safetensors"))) > 1
    loaded, report = QFormerCaptioner.from_pretrained(tmp_path / "captioner", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(**tiny.batch()).logits, model(**tiny.batch()).logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_that_is_asked_for_is_every_parts(folders, form, dtype):
    model = QFormerCaptioner.from_pretrained(folders / f"llama-untied-mixed-{form}", dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.mark.parametrize("form", FORMS)
def test_float16_leaves_the_qformer_in_float32(folders, form):
    """It overflows there."""
    model = QFormerCaptioner.from_pretrained(folders / f"llama-untied-mixed-{form}", dtype=torch.float16)
    assert {name: next(part.parameters()).dtype for name, part in model.named_children()} == {
        "vision_model": torch.float16,
        "qformer": torch.float32,
        "language_projection": torch.float32,
        "language_model": torch.float16,
    }


def test_a_cast_captioner_refers_to_backbones_of_another_dtype(pair, tmp_path):
    """The backbones are float32 in their folders and bfloat16 in the captioner, saved and loaded."""
    model = make_captioner(*pair).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "captioner", include_backbones=False)
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "captioner")
    for name, weight in model.named_parameters():
        assert weight.dtype == loaded.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(loaded.get_parameter(name), weight), name


def test_a_captioner_can_move_from_reference_to_inclusion(pair, tmp_path):
    model = make_captioner(*pair)
    model.save_pretrained(tmp_path / "small")
    QFormerCaptioner.from_pretrained(tmp_path / "small").save_pretrained(tmp_path / "whole", include_backbones=True)
    whole = QFormerCaptioner.from_pretrained(tmp_path / "whole")
    whole.save_pretrained(tmp_path / "small again", include_backbones=False)
    assert tensor_names(tmp_path / "small again") == tensor_names(tmp_path / "small")
    assert torch.equal(whole(**tiny.batch()).logits, model(**tiny.batch()).logits)


# --- The package ------------------------------------------------------------------------------------------------------


def test_every_class_exists_once():
    """The checkout is also a package under its folder's name, so an eager `__init__.py` would import all twice."""
    found = [name for name in sys.modules if name.endswith("modeling_qformer")]
    assert [name for name in found if not name.startswith("transformers_modules.")] == [
        "qformer_captioner.modeling_qformer"
    ]


@pytest.mark.parametrize("name", qformer_captioner.__all__)
def test_the_package_gives_its_classes(name):
    assert getattr(qformer_captioner, name).__name__ == name


def test_the_package_has_nothing_else():
    with pytest.raises(AttributeError, match="QFormerCaptoner"):
        _ = qformer_captioner.QFormerCaptoner
