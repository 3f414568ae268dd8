"""Saved folders: their contents, and that they open anywhere. Each test states one property.

A fresh process without this package (`FRESH_PROCESS`) opens the folders. The fixture `findings` holds its result for
each folder and check.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

import qformer_captioner
from qformer_captioner import QFormerCaptioner, saving_qformer
from qformer_captioner.weights_qformer import BackboneFingerprint

from ..fixtures import tiny
from ..fixtures.travelling_files import files_behind

LANGUAGES = {
    "t5-tied": dict(name="t5"),
    "t5-untied": dict(name="flan-t5"),
    "llama-tied": dict(name="llama", tie_word_embeddings=True),
    "llama-untied": dict(name="llama", tie_word_embeddings=False),
}
PRECISIONS = ["float32", "bfloat16", "mixed"]  # "mixed": backbones in bfloat16, Q-Former in float32
FORMS = ["referenced", "included"]
FOLDERS = [f"{language}-{precision}-{form}" for language in LANGUAGES for precision in PRECISIONS for form in FORMS]
# Every second folder, so that each language, precision and form is combined with each other one.
OPENED = [folder for number, folder in enumerate(FOLDERS) if number % 4 in (0, 3)]
PIPED = ["t5-untied-mixed-included", "llama-tied-mixed-referenced"]
DECODING = dict(num_beams=2, max_new_tokens=6, min_new_tokens=6, no_repeat_ngram_size=1)
PROMPT = "a blue star"

FRESH_PROCESS = """
import importlib.util, json, pathlib, sys, traceback

sys.modules["qformer_captioner"] = None  # hides an installed package
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
decoding, prompt, folders, piped = json.loads(sys.argv[1])
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
for folder in piped:  # few, because each takes longer than all other checks
    findings[folder]["in_a_pipeline"] = attempt(in_a_pipeline, folder)
pathlib.Path("findings.json").write_text(json.dumps(findings))
"""


pytestmark = pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`:UserWarning")
slow = pytest.mark.slow  # builds 24 folders; some tests also start a process


def make_captioner(vision: Path, language: Path, **options) -> QFormerCaptioner:
    torch.manual_seed(0)
    return QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER | options)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    """Folder of pretrained backbones: `clip-float32`, `llama-tied-bfloat16` and so on."""
    folder = tmp_path_factory.mktemp("backbones")
    for dtype in ("float32", "bfloat16"):
        tiny.save_vision(folder / f"clip-{dtype}", dtype=getattr(torch, dtype))
        for name, fields in LANGUAGES.items():
            tiny.save_language(folder / f"{name}-{dtype}", dtype=getattr(torch, dtype), **fields)
    return folder


@pytest.fixture(scope="module")
def folders(backbones, tmp_path_factory) -> Path:
    """Save all of `FOLDERS`, and next to each folder the outputs of its model before it was saved."""
    root = tmp_path_factory.mktemp("folders")
    pictures = [tiny.picture(0), tiny.picture(1)]
    torch.save(tiny.batch(), root / "batch.pt")
    for number, picture in enumerate(pictures):
        picture.save(root / f"{number}.png")
    for language in LANGUAGES:
        for precision in PRECISIONS:
            dtype = "float32" if precision == "float32" else "bfloat16"
            model = make_captioner(backbones / f"clip-{dtype}", backbones / f"{language}-{dtype}")
            if precision == "bfloat16":  # `model.to` would also cast Llama's rotary frequencies, which loading does not
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
    """Return the results of a fresh process without the package: True, False or a traceback."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= dict(HF_HOME=str(home), HF_HUB_OFFLINE="1")
    (home / "fresh_process.py").write_text(FRESH_PROCESS)
    subprocess.run(
        [sys.executable, home / "fresh_process.py", json.dumps([DECODING, PROMPT, OPENED, PIPED])],
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


@slow
@pytest.mark.parametrize("folder", OPENED)
@pytest.mark.parametrize("auto_class", ["auto_config", "auto_processor"])
def test_configuration_and_processor_open_without_the_package(findings, folder, auto_class):
    assert findings[folder][auto_class] is True, findings[folder][auto_class]


@slow
@pytest.mark.parametrize("folder", OPENED)
@pytest.mark.parametrize("auto_class", ["auto_model", "auto_model_for_image_text_to_text"])
def test_a_model_loaded_without_the_package_gives_equal_outputs(findings, folder, auto_class):
    """The outputs are equal bit for bit, and the dtypes are the same."""
    assert findings[folder][auto_class] is True, findings[folder][auto_class]


@slow
@pytest.mark.parametrize("folder", PIPED)
def test_a_pipeline_without_the_package_gives_the_same_captions(findings, folder):
    assert findings[folder]["in_a_pipeline"] is True, findings[folder]["in_a_pipeline"]


@slow
@pytest.mark.parametrize("folder", OPENED)
def test_a_folder_that_is_loaded_and_saved_again_stays_the_same(findings, folders, folder):
    """A fresh process loads and saves it: files, tensors, configurations and outputs are equal."""
    assert findings[folder]["saved_again"] is True, findings[folder]["saved_again"]
    before, after = folders / folder, folders / "again" / folder
    assert contents(after) == contents(before)
    tensors, tensors_again = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(tensors_again[name], tensors[name]) for name in tensors)
    assert all(tensors_again[name].dtype == tensors[name].dtype for name in tensors)
    for name in ("config.json", "generation_config.json", "processor_config.json"):
        configurations = [json.loads((path / name).read_text()) for path in (before, after)]
        for configuration in configurations:  # transformers writes the dtype before a cast here; we read `dtypes`
            configuration.get("qformer_config", {}).pop("dtype", None)
        assert configurations[0] == configurations[1], name


@slow
def test_the_captions_differ_from_image_to_image(folders):
    """Otherwise the tests above could not fail."""
    captions = [torch.load(folders / f"{folder}.pt")["captions"] for folder in FOLDERS]
    assert all(caption for pair in captions for caption in pair)
    assert all(first != second for first, second in captions)


# --- What is in a folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["merged adapter", "trained", "one embedding", "larger vocabulary"])
def test_a_frozen_backbone_with_changed_weights_is_saved(backbones, tmp_path, change):
    model = make_captioner(backbones / "clip-float32", backbones / "llama-tied-float32")
    if change == "merged adapter":
        adapter = LoraConfig(r=2, target_modules=r"language_model\..*q_proj", init_lora_weights=False)
        model = get_peft_model(model, adapter).merge_and_unload()
    elif change == "one embedding":
        with torch.no_grad():
            model.language_model.get_input_embeddings().weight[7] += 1
    elif change == "trained":
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


def test_a_trained_backbone_is_never_kept_by_reference(backbones, tmp_path):
    """It keeps its own weights although it is loaded and frozen later."""
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
def test_adapters_that_loading_would_not_find_are_refused(tmp_path, part):
    model, adapter = tiny.captioner(), LoraConfig(r=2, target_modules=["q_proj"])
    if part == "captioner":
        get_peft_model(model, adapter)
    else:
        model.language_model = get_peft_model(model.language_model, adapter)
    with pytest.raises(ValueError, match="There are adapters on the captioner"):
        model.save_pretrained(tmp_path)


@slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_holds_all_files_that_open_it(folders, folder):
    assert contents(folders / folder) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        *files_behind("modeling_qformer"),
    }


@slow
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_folder_without_backbones_holds_the_other_weights_alone(folders, language, precision):
    folder = folders / f"{language}-{precision}-referenced"
    assert {name.split(".")[0] for name in tensor_names(folder)} == {"qformer", "language_projection"}
    weights = load_file(folder / "model.safetensors")
    own = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    assert (folder / "model.safetensors").stat().st_size < own + 10_000


@slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_an_untied_output_layer_is_saved(folders, language):
    names = tensor_names(folders / f"{language}-float32-included")
    assert ("language_model.lm_head.weight" in names) == language.endswith("untied")
    assert {name.split(".")[0] for name in names} == {
        "vision_model",
        "qformer",
        "language_projection",
        "language_model",
    }


@slow
def test_untied_output_layers_differ_from_the_embedding(folders):
    """Otherwise the tests of these folders could not fail."""
    llama = load_file(folders / "llama-untied-float32-included" / "model.safetensors")
    t5 = load_file(folders / "t5-untied-float32-included" / "model.safetensors")
    for head, words in (
        (llama["language_model.lm_head.weight"], llama["language_model.model.embed_tokens.weight"]),
        (t5["language_model.lm_head.weight"], t5["language_model.shared.weight"]),
    ):
        assert (head - words).abs().mean() > 0.1


# --- Saving and loading in this process -------------------------------------------------------------------------------


def as_dict(config) -> dict:
    """Return all fields of a configuration, including those of its parts."""
    return json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize("included", [None, True, False, ["vision_model"], ["language_model"]], ids=str)
@pytest.mark.parametrize("change", [None, "trained", "merged", "cast"])
def test_saving_leaves_the_model_as_it_is(pair, tmp_path, included, change):
    """The configuration stays the same object with the same values, and so do the keys that the Trainer reads."""
    model = make_captioner(*pair, freeze_language_model=change != "trained")
    if change == "merged":
        adapter = LoraConfig(r=2, target_modules=r"language_model\..*q_proj", init_lora_weights=False)
        model = get_peft_model(model, adapter).merge_and_unload()
    elif change == "cast":
        model.to(torch.bfloat16)
    config, values, keys = model.config, as_dict(model.config), model._keys_to_ignore_on_save
    model.save_pretrained(tmp_path / "captioner", include_backbones=included)
    assert model.config is config
    assert as_dict(config) == values
    assert model._keys_to_ignore_on_save == keys


def test_a_failed_save_leaves_the_model_as_it_is(pair, tmp_path):
    model = make_captioner(*pair)
    config, values = model.config, as_dict(model.config)
    with pytest.raises(ValueError, match="shard"):
        model.save_pretrained(tmp_path / "captioner", include_backbones=True, max_shard_size="many shards")
    assert model.config is config
    assert as_dict(config) == values


def test_publishing_includes_local_backbones_and_leaves_the_model_as_it_is(pair, tmp_path, monkeypatch):
    """transformers saves a folder before it uploads the folder. Here it is not uploaded."""
    model = make_captioner(*pair)
    config, values = model.config, as_dict(model.config)
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda self, name: self.save_pretrained(tmp_path / name))
    model.push_to_hub("upload")
    assert {name.split(".")[0] for name in tensor_names(tmp_path / "upload")} == {
        name for name, _ in model.named_children()
    }
    assert model.config is config
    assert as_dict(config) == values


def test_a_folder_that_is_uploaded_includes_local_backbones(pair, tmp_path, monkeypatch):
    model = make_captioner(*pair)
    model.save_pretrained(tmp_path / "local")
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: MagicMock())
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **kwargs: MagicMock())
    monkeypatch.setattr(QFormerCaptioner, "_upload_modified_files", lambda self, *args, **kwargs: None)
    model.save_pretrained(tmp_path / "uploaded", push_to_hub=True)
    parts = {name.split(".")[0] for name in tensor_names(tmp_path / "uploaded")}
    assert parts == {name for name, _ in model.named_children()}
    assert not {"vision_model", "language_model"} & {name.split(".")[0] for name in tensor_names(tmp_path / "local")}


def test_publishing_keeps_the_keys_of_a_vision_encoder_that_it_fetches(pair, tmp_path, monkeypatch):
    make_captioner(*pair).save_pretrained(tmp_path / "captioner")
    model = QFormerCaptioner.from_pretrained(tmp_path / "captioner", load_vision_model=False)
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda self, name: self.save_pretrained(tmp_path / name))
    model.push_to_hub("upload")
    vision = {f"vision_model.{name}" for name in model.vision_model.state_dict()}
    assert vision and vision <= model._keys_to_ignore_on_save


def test_each_captioner_warns_once_that_a_backbone_has_changed(pair, tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(saving_qformer.logger, "warning", messages.append)
    for _ in range(2):
        model = make_captioner(*pair)
        next(model.language_model.parameters()).data.mul_(2)
        model.save_pretrained(tmp_path / "captioner")
        model.save_pretrained(tmp_path / "captioner")
    assert len(messages) == 2 and all("language_model no longer has the weights" in message for message in messages)


@pytest.mark.parametrize("included", [True, False, ["vision_model"]], ids=str)
def test_keys_left_out_are_the_weights_that_a_folder_lacks(pair, tmp_path, included):
    model = make_captioner(*pair)
    model.save_pretrained(tmp_path / "captioner", include_backbones=included)
    assert model.keys_left_out(included) == set(model.state_dict()) - tensor_names(tmp_path / "captioner")


def test_a_fingerprint_ignores_dtypes_and_offloaded_weights():
    layer = torch.nn.Linear(3, 2)
    fingerprint = BackboneFingerprint.of(layer)
    assert fingerprint.matches({name: weight.bfloat16() for name, weight in layer.state_dict().items()})
    assert fingerprint.matches({name: weight.to("meta") for name, weight in layer.state_dict().items()})
    assert not fingerprint.matches({"weight": torch.cat([layer.weight, layer.weight])})
    assert not BackboneFingerprint.of(layer).matches({"weight": layer.weight + 1})


@pytest.fixture
def pair(backbones, tmp_path) -> tuple[Path, Path]:
    """Copies of two backbones that a test may delete."""
    copies = tmp_path / "vision", tmp_path / "language"
    for name, copy in zip(("clip-float32", "llama-untied-float32"), copies, strict=True):
        shutil.copytree(backbones / name, copy)
    return copies


@pytest.mark.parametrize("part", ["vision", "language"])
def test_the_error_for_a_missing_backbone_names_it(pair, tmp_path, part):
    make_captioner(*pair).save_pretrained(tmp_path / "captioner")
    shutil.rmtree(tmp_path / part)
    with pytest.raises(OSError, match=f"{part} model '{tmp_path / part}'"):
        QFormerCaptioner.from_pretrained(tmp_path / "captioner")


def test_a_self_contained_folder_needs_nothing_else(pair, tmp_path):
    model = make_captioner(*pair)
    model.save_pretrained(tmp_path / "captioner", include_backbones=True)
    for folder in pair:
        shutil.rmtree(folder)
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "captioner")
    assert torch.equal(loaded(**tiny.batch()).logits, model(**tiny.batch()).logits)


@pytest.mark.parametrize("included", [False, True, ["vision_model"], ["language_model"]])
def test_saving_again_keeps_the_form_of_the_folder(pair, tmp_path, included):
    """The included backbones, the frozen parameters, the decoding options and the prompt are the same."""
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


def test_frozen_backbones_are_kept_by_reference_by_default(pair, tmp_path):
    make_captioner(*pair).save_pretrained(tmp_path / "captioner")
    parts = {name.split(".")[0] for name in tensor_names(tmp_path / "captioner")}
    assert parts == {"qformer", "language_projection"}


def test_a_trained_backbone_is_always_saved(pair, tmp_path):
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


def test_backbones_without_a_name_are_always_saved(tmp_path):
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


@slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_dtype_applies_to_every_part(folders, form, dtype):
    model = QFormerCaptioner.from_pretrained(folders / f"llama-untied-mixed-{form}", dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@slow
@pytest.mark.parametrize("form", FORMS)
def test_float16_leaves_the_qformer_in_float32(folders, form):
    """The Q-Former overflows in float16."""
    model = QFormerCaptioner.from_pretrained(folders / f"llama-untied-mixed-{form}", dtype=torch.float16)
    assert {name: next(part.parameters()).dtype for name, part in model.named_children()} == {
        "vision_model": torch.float16,
        "qformer": torch.float32,
        "language_projection": torch.float32,
        "language_model": torch.float16,
    }


def test_a_cast_captioner_keeps_backbones_of_another_dtype_by_reference(pair, tmp_path):
    """The backbones are float32 in their folders and bfloat16 in the captioner, before and after saving."""
    model = make_captioner(*pair).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "captioner", include_backbones=False)
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "captioner")
    for name, weight in model.named_parameters():
        assert weight.dtype == loaded.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(loaded.get_parameter(name), weight), name


def test_a_captioner_can_become_self_contained_and_go_back(pair, tmp_path):
    model = make_captioner(*pair)
    model.save_pretrained(tmp_path / "small")
    QFormerCaptioner.from_pretrained(tmp_path / "small").save_pretrained(tmp_path / "whole", include_backbones=True)
    whole = QFormerCaptioner.from_pretrained(tmp_path / "whole")
    whole.save_pretrained(tmp_path / "small again", include_backbones=False)
    assert tensor_names(tmp_path / "small again") == tensor_names(tmp_path / "small")
    assert torch.equal(whole(**tiny.batch()).logits, model(**tiny.batch()).logits)


# --- The package ------------------------------------------------------------------------------------------------------


def test_every_class_exists_once():
    """pytest also imports the checkout by the name of its folder, so an eager `__init__.py` would import all twice."""
    found = [name for name in sys.modules if name.endswith("modeling_qformer")]
    assert [name for name in found if not name.startswith("transformers_modules.")] == [
        "qformer_captioner.modeling_qformer"
    ]


@pytest.mark.parametrize("name", qformer_captioner.__all__)
def test_the_package_exports_its_classes(name):
    assert getattr(qformer_captioner, name).__name__ == name


def test_the_package_exports_nothing_else():
    with pytest.raises(AttributeError, match="QFormerCaptoner"):
        _ = qformer_captioner.QFormerCaptoner
