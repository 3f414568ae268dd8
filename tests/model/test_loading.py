"""Every way to open a captioner. Each test states one property.

Two fresh processes check what this one cannot. `WITH_PACKAGE` has the package and executes no code of a folder.
`WITHOUT_PACKAGE` has neither the package nor a network. Their results are fixtures with one entry for each check.
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
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, pipeline

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig, QFormerConfig, QFormerModel

from ..fixtures import tiny

ROOT = Path(__file__).parents[2]
FORMS = ["referenced", "included", "adapter"]  # backbones by reference, self-contained, LoRA adapter on "referenced"
PARTS = ["vision_model", "qformer", "language_projection", "language_model"]
COMMIT, EARLIER = "a" * 40, "b" * 40  # the commit of everything in the cache, and an earlier one of the adapter
DECODING = dict(max_new_tokens=6, min_new_tokens=6, no_repeat_ngram_size=1)

BEGINNING = """
import json, pathlib, socket, sys, traceback


def refuse(*args):
    raise AssertionError("the network was asked")


socket.socket.connect = socket.getaddrinfo = refuse
findings = {}


def finding(check):
    try:
        findings[check.__name__] = check()
    except Exception:
        findings[check.__name__] = traceback.format_exc()


folder, expected = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
"""

WITH_PACKAGE = (
    BEGINNING
    + """
sys.path.insert(0, sys.argv[3])
if sys.argv[4] == "transformers first":
    from transformers import AutoConfig, AutoProcessor
import tests.conftest  # makes the checkout importable if it is not installed
import qformer_captioner

findings["imports lightly"] = sys.argv[4] == "transformers first" or "transformers" not in sys.modules
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline


@finding
def classes():
    opened = [
        each.from_pretrained(folder / "referenced", **options)
        for each in (AutoProcessor, AutoConfig, AutoModel, AutoModelForImageTextToText)
        for options in ({}, {"trust_remote_code": True})
    ]
    opened.append(pipeline("image-text-to-text", model=str(folder / "included")).model)
    return sorted({type(each).__module__ for each in opened})


@finding
def captions():
    return [
        AutoModel.from_pretrained(folder / form).caption(str(folder / "picture.png"), **expected["decoding"])
        for form in expected["forms"]
    ]


@finding
def a_revision_of_an_adapter():
    if sys.argv[4] == "transformers first":
        return None  # has no cache
    from qformer_captioner.hub.load import load_captioner

    model = load_captioner("tester/adapter", expected["earlier"])
    return model.caption(str(folder / "picture.png"), **expected["decoding"])


@finding
def remote_copies():
    return [name for name in sys.modules if name.startswith("transformers_modules.")]


print(json.dumps(findings))
"""
)

WITHOUT_PACKAGE = (
    BEGINNING
    + """
sys.modules["qformer_captioner"] = None
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

trust = dict(trust_remote_code=True)
picture = str(folder / "picture.png")


@finding
def a_folder():
    return AutoModel.from_pretrained(folder / "included", **trust).caption(picture, **expected["decoding"])


@finding
def from_the_cache():
    return AutoModel.from_pretrained("tester/captioner", **trust).caption(picture, **expected["decoding"])


@finding
def a_revision_from_the_cache():
    model = AutoModel.from_pretrained("tester/captioner", revision=expected["commit"], **trust)
    return model.caption(picture, **expected["decoding"])


@finding
def an_adapter_from_the_cache():
    return AutoModel.from_pretrained("tester/adapter", **trust).caption(picture, **expected["decoding"])


@finding
def a_pipeline_from_the_cache():
    captioner = pipeline("image-text-to-text", model="tester/captioner", **trust)
    answer = captioner(images=picture, text="", return_full_text=False, generate_kwargs=expected["decoding"])
    return answer[0]["generated_text"].strip()


@finding
def a_backbone_that_is_not_in_the_cache():
    AutoModel.from_pretrained("tester/incomplete", **trust)


print(json.dumps(findings))
"""
)

pytestmark = pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`:UserWarning")


def run(program: str, *arguments, **environment) -> dict:
    """Run a program in a fresh process and return the JSON of its last line."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], env=own | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def adapter_of(model: QFormerCaptioner):
    """Return a LoRA adapter with a changed Q-Former, as if both had been trained."""
    layers = LoraConfig(
        r=2, target_modules=r"language_model\..*\.(q|v)_proj", modules_to_save=["qformer", "language_projection"]
    )
    adapter = get_peft_model(model, layers)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if ".lora_B." in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    return adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with all `FORMS`, an image, and a Hub cache that holds the same captioners under `tester/`."""
    folder = tmp_path_factory.mktemp("captioners")
    vision, language = tiny.save_vision(folder / "vision"), tiny.save_language(folder / "language")

    def captioner() -> QFormerCaptioner:
        torch.manual_seed(0)
        return QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER)

    def cached(name: str) -> Path:
        entry = folder / "home" / "hub" / f"models--tester--{name}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text(COMMIT)
        return entry / "snapshots" / COMMIT

    tiny.picture().save(folder / "picture.png")
    captioner().save_pretrained(folder / "referenced")
    captioner().save_pretrained(folder / "included", include_backbones=True)
    adapter = adapter_of(QFormerCaptioner.from_pretrained(folder / "referenced"))
    adapter.save_pretrained(folder / "adapter")

    tiny.save_vision(cached("vision"))
    tiny.save_language(cached("language"))
    for name, missing in {"captioner": "language", "incomplete": "nowhere"}.items():
        model = captioner()
        model.config.vision_model_name_or_path, model.config.vision_model_revision = "tester/vision", COMMIT
        model.config.language_model_name_or_path, model.config.language_model_revision = f"tester/{missing}", COMMIT
        model.save_pretrained(cached(name), include_backbones=False)
    shutil.copytree(folder / "adapter", copy := cached("adapter"))
    settings = json.loads((copy / "adapter_config.json").read_text()) | {"base_model_name_or_path": "tester/captioner"}
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copytree(copy, copy.parent / EARLIER)
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, str]:
    """Map each form to the caption of the image."""
    return {
        form: AutoModel.from_pretrained(folder / form).caption(str(folder / "picture.png"), **DECODING)
        for form in FORMS
    }


def test_the_adapter_changes_the_caption(expected):
    """Otherwise the tests of the adapter could not fail."""
    assert expected["included"] == expected["referenced"] != expected["adapter"]


# --- Installed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["transformers first", "package first"])
def with_package(request, folder) -> dict:
    """Results of a fresh process that has the package."""
    options = json.dumps({"decoding": DECODING, "forms": FORMS, "earlier": EARLIER})
    home = dict(HF_HOME=str(folder / "empty"))  # without HF_HUB_OFFLINE
    if request.param == "package first":
        home = dict(HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="1")
    return run(WITH_PACKAGE, folder, options, ROOT, request.param, **home)


@pytest.mark.slow
def test_importing_the_package_does_not_import_transformers(with_package):
    assert with_package["imports lightly"]


@pytest.mark.slow
def test_the_installed_classes_open_folders_without_executing_their_code(with_package):
    assert with_package["classes"] == [
        "qformer_captioner.configuration_qformer",
        "qformer_captioner.modeling_qformer",
        "qformer_captioner.processing_qformer",
    ]
    assert with_package["remote_copies"] == []


@pytest.mark.slow
def test_a_revision_selects_the_adapter_and_not_its_captioner(with_package, expected):
    assert with_package["a_revision_of_an_adapter"] in (None, expected["adapter"])


@pytest.mark.slow
def test_folders_open_without_a_network(with_package, expected):
    assert with_package["captions"] == [expected[form] for form in FORMS]


def test_a_q_former_without_a_captioner_opens(tmp_path):
    qformer = QFormerModel(QFormerConfig(**tiny.QFORMER, encoder_hidden_size=8)).eval()
    qformer.save_pretrained(tmp_path)
    opened, features = AutoModel.from_pretrained(tmp_path), torch.randn(2, 5, 8)
    assert type(opened) is QFormerModel
    assert torch.equal(opened(features).last_hidden_state, qformer(features).last_hidden_state)


# --- Not installed, no network ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_package(folder) -> dict:
    """Results of a fresh process that has neither the package nor a network."""
    options = json.dumps({"decoding": DECODING, "commit": COMMIT})
    return run(WITHOUT_PACKAGE, folder, options, HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "form"),
    {
        "a_folder": "included",
        "from_the_cache": "referenced",
        "a_revision_from_the_cache": "referenced",
        "an_adapter_from_the_cache": "adapter",
        "a_pipeline_from_the_cache": "referenced",
    }.items(),
)
def test_opens_without_package_and_network(without_package, expected, check, form):
    assert without_package[check] == expected[form]


@pytest.mark.slow
def test_the_error_for_a_backbone_that_is_not_cached_names_the_remedy(without_package):
    message = without_package["a_backbone_that_is_not_in_the_cache"].splitlines()
    message = next(line for line in message if line.startswith("OSError: The language model"))
    assert f"'tester/nowhere' (revision {COMMIT})" in message
    assert f"`hf download tester/nowhere --revision {COMMIT}`" in message


# --- Devices and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "device_map"),
    [
        ("referenced", "auto"),
        ("included", "auto"),
        ("adapter", "auto"),
        ("referenced", "cpu"),
        ("included", torch.device("cpu")),
        ("adapter", {"": "cpu"}),
        *((form, dict.fromkeys(PARTS, "cpu")) for form in FORMS),
    ],
    ids=str,
)
def test_a_device_map_keeps_the_captions(folder, expected, form, device_map):
    model = AutoModel.from_pretrained(folder / form, device_map=device_map)
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert model.caption(folder / "picture.png", **DECODING) == expected[form]


@pytest.mark.parametrize(
    ("form", "offloaded"),
    [
        ("referenced", ["vision_model"]),
        ("included", ["qformer"]),
        ("referenced", ["language_projection"]),
        ("included", ["language_model"]),
        ("referenced", PARTS[:3]),
        ("included", PARTS[:3]),
    ],
    ids=str,
)
def test_offloaded_parts_are_loaded_when_they_are_used(folder, expected, tmp_path, form, offloaded):
    device_map = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
    model = AutoModel.from_pretrained(folder / form, device_map=device_map, offload_folder=tmp_path)
    assert {weight.device.type for weight in model.qformer.parameters()} == {
        "meta" if "qformer" in offloaded else "cpu"
    }
    assert model.caption(folder / "picture.png", **DECODING) == expected[form]


@pytest.mark.parametrize("kilobytes", [10, 120, 180, 250])
def test_a_captioner_runs_with_little_memory(folder, expected, tmp_path, kilobytes):
    """accelerate decides how much fits: nothing, some layers or some parts."""
    memory = {"cpu": f"{kilobytes}KB"}
    model = AutoModel.from_pretrained(
        folder / "referenced", device_map="auto", max_memory=memory, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    assert not [
        name for name in model.hf_device_map if name.startswith("qformer.")
    ]  # it reads its queries outside of its layers
    assert model.caption(folder / "picture.png", **DECODING) == expected["referenced"]


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, "bfloat16") for form in FORMS),
        ("referenced", torch.bfloat16),
        ("included", torch.float16),
        ("adapter", torch.float16),
        ("included", "auto"),
        ("adapter", "auto"),
    ],
    ids=str,
)
def test_a_given_dtype_applies_to_both_backbones(folder, form, dtype):
    model = AutoModel.from_pretrained(folder / form, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else torch.bfloat16 if "bfloat16" in str(dtype) else torch.float16
    for part in ("vision_model", "language_model"):
        weights = {name: weight.dtype for name, weight in getattr(model, part).named_parameters()}
        assert {weights[name] for name in weights if ".lora_" not in name} == {expected}, part
    assert model.caption(folder / "picture.png", **DECODING)


def test_torch_dtype_is_accepted_for_dtype(folder):
    model = AutoModel.from_pretrained(folder / "referenced", torch_dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'qformer-captioner[qlora]'")


@pytest.mark.parametrize(
    ("form", "device_map", "bits"),
    [
        ("referenced", "auto", "load_in_4bit"),
        ("included", "auto", "load_in_8bit"),
        ("adapter", "cpu", "load_in_4bit"),
        ("referenced", "cpu", "load_in_8bit"),
        ("included", {"": "cpu"}, "load_in_4bit"),
        ("adapter", {"": "cpu"}, "load_in_8bit"),
        ("referenced", dict.fromkeys(PARTS, "cpu"), "load_in_8bit"),
        ("adapter", dict.fromkeys(PARTS, "cpu"), "load_in_4bit"),
    ],
    ids=str,
)
def test_quantisation_combines_with_a_device_and_a_dtype(bnb, folder, form, device_map, bits):
    model = AutoModel.from_pretrained(
        folder / form,
        quantization_config=BitsAndBytesConfig(**{bits: True}),
        device_map=device_map,
        dtype=torch.bfloat16,
    )
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert layers and all(name.startswith("language_model.") for name in layers)
    assert model.vision_model.dtype == torch.bfloat16
    assert model.caption(folder / "picture.png", **DECODING)


def test_a_quantised_captioner_is_not_spread_over_devices(bnb, folder):
    with pytest.raises(ValueError, match=r"on one device: give that as `device_map`, such as \"cuda:0\""):
        AutoModel.from_pretrained(
            folder / "referenced",
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
            device_map={"": "cpu", "language_model": 0},
        )


# --- Pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FORMS)
def piped(request, folder):
    """A pipeline, and the captioner with which it must agree."""
    return pipeline("image-text-to-text", model=str(folder / request.param)), AutoModel.from_pretrained(
        folder / request.param
    )


def texts(answers) -> list[str]:
    return [(answer[0] if isinstance(answer, list) else answer)["generated_text"].strip() for answer in answers]


PICTURES = [tiny.picture(number) for number in range(3)]
OPTIONS = dict(return_full_text=False, generate_kwargs=DECODING)


def test_a_pipeline_captions_a_file(piped, folder):
    captioner, model = piped
    answers = captioner(images=str(folder / "picture.png"), text="", **OPTIONS)
    assert texts(answers) == [model.caption(folder / "picture.png", **DECODING)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_pipeline_captions_batches_with_prompts(piped, batch_size):
    captioner, model = piped
    prompts = ["a star", "", "a red circle above"]
    answers = captioner(images=PICTURES, text=prompts, batch_size=batch_size, **OPTIONS)
    assert texts(answers) == [
        model.caption(picture, prompt, **DECODING) for picture, prompt in zip(PICTURES, prompts, strict=True)
    ]


def test_a_pipeline_takes_dictionaries_and_conversations(piped):
    captioner, model = piped
    expected = model.caption(PICTURES[0], "a star", **DECODING)
    said = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "a star"}]
    assert texts(captioner({"images": PICTURES[0], "text": "a star"}, **OPTIONS)) == [expected]
    assert texts(captioner(text=[{"role": "user", "content": said}], **OPTIONS)) == [expected]


def test_options_of_a_pipeline_reach_generate(piped):
    captioner, model = piped
    answers = captioner(
        images=PICTURES[0], text="", return_full_text=False, generate_kwargs=DECODING | {"num_beams": 3}
    )
    assert texts(answers) == [model.caption(PICTURES[0], **DECODING, num_beams=3)]
    answers = captioner(images=PICTURES[0], text="", return_full_text=False, max_new_tokens=2)
    assert texts(answers) == [model.caption(PICTURES[0], max_new_tokens=2)]


def test_a_pipeline_of_model_and_processor_is_the_same(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / "referenced")
    processor = AutoProcessor.from_pretrained(folder / "referenced")
    captioner = pipeline("image-text-to-text", model=model, processor=processor)
    assert isinstance(PICTURES[0], Image.Image)
    assert texts(captioner(images=PICTURES[:1], text=[""], **OPTIONS)) == [model.caption(PICTURES[0], **DECODING)]


# --- Configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_class", [AutoModel, QFormerCaptioner])
def test_fields_of_the_configuration_may_be_keywords(folder, auto_class):
    plain = QFormerCaptioner.from_pretrained(folder / "referenced")
    changed = auto_class.from_pretrained(
        folder / "referenced", pad_token_id=7, freeze_vision_model=False, attn_implementation="eager"
    )
    assert (plain.config.pad_token_id, changed.config.pad_token_id) == (0, 7)
    assert plain.frozen_backbones() == ["vision_model", "language_model"]
    assert changed.frozen_backbones() == ["language_model"]
    assert {part.config._attn_implementation for part in (changed.qformer, changed.language_model)} == {"eager"}


def test_special_tokens_of_a_given_configuration_are_kept(folder):
    config = QFormerCaptionerConfig.from_pretrained(folder / "referenced")
    config.eos_token_id = [1, 9]
    assert QFormerCaptioner.from_pretrained(folder / "referenced", config=config).config.eos_token_id == [1, 9]


def test_another_model_is_named_by_its_type(tmp_path):
    with pytest.raises(OSError, match="holds a model of the type 'clip_vision_model' and not a captioner"):
        QFormerCaptioner.from_pretrained(tiny.save_vision(tmp_path))
