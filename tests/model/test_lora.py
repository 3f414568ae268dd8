"""LoRA on the language model: trainable parts, saved files, and equal captions in every form."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText

from qformer_captioner import QFormerCaptioner, train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.export import export
from qformer_captioner.training.captioner_setup import load_captioner
from qformer_captioner.training.lora import add_lora

from ..fixtures import tiny
from ..fixtures.processes import command_line


def words(folder, output_dir, language="llama", **options) -> list[str]:
    """Return a command line that trains LoRA adapters between two tiny pretrained backbones for four steps."""
    options = {
        "dataset_name": "scenes",
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "vision_model_name_or_path": folder / "vision",
        "language_model_name_or_path": folder / language,
        "qformer_config": json.dumps(tiny.QFORMER),
        "lora_r": 4,
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.02,
        "generation_num_beams": 1,
        "generation_max_length": 6,
        "use_cpu": "true",
        "disable_tqdm": "true",
    } | options
    return command_line(**options)


@pytest.fixture(scope="module", params=["llama", "t5"])
def run(request, backbones, tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train_hf.train(words(backbones, folder, request.param))
    return folder


def test_gradients_reach_adapters_q_former_and_projection_only(backbones, tmp_path):
    args = train_hf.parse_options(words(backbones, tmp_path / "run"))[0]
    model = add_lora(load_captioner(args, []), args).train()
    batch = tiny.batch()
    for _ in range(2):  # the second half of an adapter starts at zero, so the first learns from the second step on
        model(**batch).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained = {name for name in reached if "modules_to_save.default" in name or ".lora_" in name}
    assert reached == trained
    for part in (
        "language_model.model.layers.0.self_attn.q_proj.lora_A",
        "qformer.modules_to_save",
        "language_projection",
    ):
        assert any(part in name and model.get_parameter(name).grad.abs().max() > 0 for name in trained), part


@pytest.mark.slow
def test_the_folder_holds_the_adapter_with_q_former_and_projection(run):
    weights = load_file(run / "adapter_model.safetensors")
    assert any("lora_A" in name for name in weights)
    assert any(name.endswith("qformer.query_tokens") for name in weights)
    assert any("language_projection" in name for name in weights)
    assert not [name for name in weights if "vision_model" in name]
    assert (run / "base" / "config.json").exists() and not (run / "model.safetensors").exists()


@pytest.mark.slow
def test_adapter_merged_folder_and_live_model_caption_the_same(run, tmp_path):
    batch = tiny.batch()
    live = PeftModel.from_pretrained(QFormerCaptioner.from_pretrained(run / "base"), run).eval()
    expected = live(**batch)
    assert not torch.allclose(
        expected.logits, QFormerCaptioner.from_pretrained(run / "base").eval()(**batch).logits, atol=1e-3
    )
    export(run, tmp_path / "merged")
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    captions = live.generate(**prompt, max_new_tokens=8, num_beams=2)
    for loaded in (
        AutoModel.from_pretrained(run, trust_remote_code=True),
        AutoModelForImageTextToText.from_pretrained(run, trust_remote_code=True),
        AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True),
    ):
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(loaded.generate(**prompt, max_new_tokens=8, num_beams=2), captions)
        assert isinstance(loaded.caption(tiny.picture(), max_new_tokens=4), str)


@pytest.mark.slow
def test_an_adapter_opens_on_a_captioner_that_refers_to_its_backbones(backbones, tmp_path):
    train_hf.train(words(backbones, tmp_path / "run", include_backbones="false", prompt="a"))
    base, fresh = (QFormerCaptioner.from_pretrained(tmp_path / "run" / "base").eval() for _ in range(2))
    assert fresh.config.referenced_backbones == ["vision_model", "language_model"]
    expected = PeftModel.from_pretrained(base, tmp_path / "run").eval()(**tiny.batch()).logits
    loaded = AutoModel.from_pretrained(tmp_path / "run", trust_remote_code=True).eval()
    torch.testing.assert_close(loaded(**tiny.batch()).logits, expected)
    assert not torch.allclose(fresh(**tiny.batch()).logits, expected, atol=1e-3)
    assert loaded.processor.prompt == "a"


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_the_task_type_of_peft_changes_neither_loss_nor_captions(language, task):
    model, batch = tiny.captioner(language=language), tiny.batch()
    loss, written = model(**batch).loss, model.generate(**batch, max_new_tokens=4)
    config = LoraConfig(r=2, task_type=task, target_modules=r"language_model\..*(q_proj|\.q)$")
    adapted = get_peft_model(model, config).eval()
    torch.testing.assert_close(adapted(**batch).loss, loss)
    assert torch.equal(adapted.generate(**batch, max_new_tokens=4), written)


def test_two_adapters_on_one_base_can_be_swapped(run, tmp_path):
    base = QFormerCaptioner.from_pretrained(run / "base")
    model = PeftModel.from_pretrained(base, run, adapter_name="first").eval()
    with torch.no_grad():  # another adapter: the same, and all of it doubled
        other = PeftModel.from_pretrained(QFormerCaptioner.from_pretrained(run / "base"), run)
        for name, parameter in other.named_parameters():
            if ".lora_" in name or "modules_to_save.default" in name:
                parameter *= 2
        other.save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", adapter_name="second")
    logits = {}
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        logits.setdefault(name, []).append(model(**tiny.batch()).logits)
    assert torch.equal(*logits["first"])
    torch.testing.assert_close(logits["second"][0], other.eval()(**tiny.batch()).logits)
    assert not torch.allclose(logits["second"][0], logits["first"][0], atol=1e-3)


@pytest.mark.slow
def test_a_resumed_run_ends_like_an_unbroken_one(backbones, tmp_path):
    train_hf.train(words(backbones, tmp_path / "whole", num_train_epochs=2))
    half = words(backbones, tmp_path / "halves", num_train_epochs=2, max_steps=-1)
    # It stopped half-way, with the schedule of the whole run.
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    train_hf.train([*half, "--resume_from_checkpoint", str(checkpoint)])
    whole, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_target_modules": "no_such_layer"}, "no layers named no_such_layer"),
        ({"lora_target_modules": "q_proj, v_porj"}, "no layers named v_porj"),
        ({"lora_r": 0}, "--lora_r must be at least 1, not 0"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(backbones, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train_hf.train(words(backbones, tmp_path / "run", **options))


def test_names_of_layers_may_have_spaces_between(backbones, tmp_path):
    args = train_hf.parse_options(words(backbones, tmp_path, lora_target_modules="q_proj, v_proj"))[0]
    model = add_lora(load_captioner(args, []), args)
    adapted = {name.split(".lora_A.")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == {"q_proj", "v_proj"}


def test_the_adapter_opens_from_any_folder(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert isinstance(AutoModel.from_pretrained(run, trust_remote_code=True).caption(tiny.picture()), str)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(run / "base")


def test_eval_captions_accepts_an_adapter(run, tmp_path):
    from qformer_captioner import eval_captions

    rows = [{"file_name": f"{number}.png", "caption": "a star"} for number in range(2)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(2):
        tiny.picture(number).save(tmp_path / "data" / f"{number}.png")
    options = dict(model=run, dataset_name=tmp_path / "data", split="train", output_dir=tmp_path / "out")
    eval_captions.evaluate([*command_line(**options, num_beams=1, max_new_tokens=6, use_cpu="true"), "--allow_empty"])
    written = [row["caption"] for row in json.loads((tmp_path / "out" / "captions.json").read_text())]
    pictures = [tiny.picture(number) for number in range(2)]
    assert written == AutoModel.from_pretrained(run).caption(pictures, num_beams=1, max_new_tokens=6)


def test_an_adapter_on_a_captioner_of_a_relative_path_opens_from_any_folder(backbones, monkeypatch, tmp_path):
    """From another folder, `mine/captioner` would be a repository on the Hub with code of a stranger."""
    parts = str(backbones / "vision"), str(backbones / "llama")
    QFormerCaptioner.from_backbones(*parts, **tiny.QFORMER).save_pretrained(tmp_path / "mine" / "captioner")
    monkeypatch.chdir(tmp_path)
    fresh = dict(vision_model_name_or_path=None, language_model_name_or_path=None, qformer_config=None)
    train_hf.train(words(backbones, "run", **fresh, model_name_or_path="mine/captioner"))
    base = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "mine" / "captioner")
