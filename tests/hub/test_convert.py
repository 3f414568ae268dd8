"""A converted captioner is the same function as transformers' own: outputs, losses, gradients, captions."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from qformer_captioner import QFormerCaptioner, QFormerConfig, QFormerModel
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub import convert
from qformer_captioner.hub.legacy import LegacyCaptioner

from ..fixtures import tiny
from ..fixtures.hub_server import files_of

QUERIES, IMAGE_TOKEN = 4, tiny.WORDS - 1
VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, patch_size=16)
VISION |= dict(image_size=tiny.SIDE, initializer_range=0.1)
QFORMER = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, vocab_size=50)
QFORMER |= dict(max_position_embeddings=20, initializer_range=0.1, cross_attention_frequency=2)
SIZES = {  # whatever may vary between checkpoints does
    "usual": {},
    "deep": dict(num_hidden_layers=5, cross_attention_frequency=3),
    "sees in every layer": dict(cross_attention_frequency=1, num_hidden_layers=2, hidden_size=16),
    "with text parts": dict(use_qformer_text_input=True),
}
TEXT = {
    "opt": dict(word_embed_proj_dim=tiny.TEXT_WIDTH),  # transformers' BLIP-2 takes no narrower words
    "opt, untied": dict(word_embed_proj_dim=tiny.TEXT_WIDTH, tie_word_embeddings=False),
    "t5": dict(initializer_factor=1.0),
    "flan-t5": dict(initializer_factor=1.0),
    "flan-t5, one tensor": dict(initializer_factor=1.0),  # saved by transformers 5, which ties its output layer
    "llama": {},
    "llama, tied": dict(tie_word_embeddings=True),
}
CASES = [("blip2", text, "usual") for text in TEXT] + [("instructblip", text, "usual") for text in TEXT]
CASES += [("blip2", "opt", size) for size in SIZES if size != "usual"]
CASES += [("instructblip", "llama", "deep"), ("instructblip", "t5", "sees in every layer")]


def source(kind: str, text: str, size: str = "usual", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a BLIP-2 or InstructBLIP with random weights, including biases and queries."""
    torch.manual_seed(6)
    config_class, model_class = {
        "blip2": (Blip2Config, Blip2ForConditionalGeneration),
        "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
    }[kind]
    language = tiny.text_config(text.split(",")[0], **TEXT[text])
    fields = {name: value for name, value in SIZES[size].items() if kind == "blip2" or name != "use_qformer_text_input"}
    config = config_class(
        vision_config=VISION,
        qformer_config=QFORMER | fields,
        text_config=language,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    model = model_class(config).eval()
    if "one tensor" not in text:
        tiny.own_head(model.language_model)
    with torch.no_grad():
        for parameter in (*model.vision_model.parameters(), *model.qformer.parameters(), model.query_tokens):
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.language_projection.weight.normal_(std=0.2)
    return model.to(dtype)


def converted(model: nn.Module, folder, include_backbones: bool = True) -> tuple[nn.Module, QFormerCaptioner]:
    """Return the BLIP-2 and the converted captioner, loaded from their folders."""
    model.save_pretrained(folder / "source")
    convert.convert(folder / "source", folder / "ours", include_backbones)
    loaded = type(model).from_pretrained(folder / "source", dtype=model.dtype).eval()
    return loaded, QFormerCaptioner.from_pretrained(folder / "ours").eval()


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Return three images, each with a prompt and a caption. Prompts for the Q-Former have different lengths."""
    draw = torch.Generator().manual_seed(7)
    batch = {
        "pixel_values": tiny.images(),
        "input_ids": torch.randint(3, IMAGE_TOKEN, (3, 5), generator=draw),
        "labels": torch.randint(3, IMAGE_TOKEN, (3, 6), generator=draw),
    }
    if kind == "instructblip":
        batch["qformer_input_ids"] = torch.randint(1, 50, (3, 7), generator=draw)
        batch["qformer_attention_mask"] = (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()
    return batch


def theirs(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert our batch to that of transformers, with image tokens in front and a decoder's caption in the same
    sequence.
    """
    prefix = torch.cat([torch.full((3, QUERIES), IMAGE_TOKEN), batch["input_ids"]], dim=1)
    if model.language_model.config.is_encoder_decoder:
        return batch | {"input_ids": prefix}
    labels = torch.cat([torch.full_like(prefix, -100), batch["labels"]], dim=1)
    return batch | {"input_ids": torch.cat([prefix, batch["labels"]], dim=1), "labels": labels}


def caption_logits(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    return logits if model.language_model.config.is_encoder_decoder else logits[:, -7:-1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text", "size"), CASES)
def test_a_converted_captioner_computes_the_same_function(kind, text, size, tmp_path):
    model, ours = converted(source(kind, text, size), tmp_path)
    batch = inputs(kind)
    expected, got = model(**theirs(model, batch)), ours(**batch)
    torch.testing.assert_close(got.soft_prompt, soft_prompt(model, batch), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.logits, caption_logits(model, expected.logits), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)

    for parameter in ours.parameters():
        parameter.requires_grad_(True)
    expected.loss.backward()
    ours(**batch).loss.backward()
    for mine, other in (
        (ours.qformer.query_tokens, model.query_tokens),
        (ours.language_projection.weight, model.language_projection.weight),
        (ours.qformer.encoder.layer[0].crossattention.attention.key.weight, first_key(model)),
    ):
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)

    prompt = {name: value for name, value in batch.items() if name != "labels"}
    placeholders = theirs(model, batch)["input_ids"][:, : QUERIES + 5]
    for options in ({"num_beams": 1}, {"num_beams": 5}):
        options |= {"max_new_tokens": 8, "do_sample": False}
        expected = model.generate(**prompt | {"input_ids": placeholders}, **options)
        skip = 1 if model.language_model.config.is_encoder_decoder else placeholders.shape[1]
        assert ours.generate(**prompt, **options).tolist() == expected[:, skip:].tolist()


def first_key(model: nn.Module) -> nn.Parameter:
    return model.qformer.encoder.layer[0].crossattention.attention.key.weight


def soft_prompt(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    names = [name for name in batch if name in ("pixel_values", "qformer_input_ids", "qformer_attention_mask")]
    return model.get_image_features(**{name: batch[name] for name in names}).pooler_output


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_bfloat16_is_kept_and_gives_the_same_outputs(kind, tmp_path):
    model, ours = converted(source(kind, "llama", dtype=torch.bfloat16), tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    batch = inputs(kind)
    expected = caption_logits(model, model(**theirs(model, batch)).logits)
    torch.testing.assert_close(ours(**batch).logits, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("text", ["opt", "flan-t5", "flan-t5, one tensor"])
@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_backbones_by_reference_load_from_the_checkpoint(kind, text, tmp_path):
    model, ours = converted(source(kind, text), tmp_path, include_backbones=False)
    size = sum(tensor.numel() * 4 for part in (ours.qformer, ours.language_projection) for tensor in part.parameters())
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size < size + 20_000
    batch = inputs(kind)
    assert torch.equal(ours(**batch).soft_prompt, soft_prompt(model, batch))
    expected = caption_logits(model, model(**theirs(model, batch)).logits)
    torch.testing.assert_close(ours(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_on_the_hub_is_referred_to_by_its_commit(hub, commands, tmp_path):
    model = source("blip2", "opt")
    model.save_pretrained(tmp_path / "source")
    program = (
        "import torch\n"
        "from qformer_captioner import QFormerCaptioner\n"
        "from qformer_captioner.hub.convert import convert\n"
        "convert('org/blip2', 'ours')\n"
        "model = QFormerCaptioner.from_pretrained('ours')\n"
        "print(model.config.language_model_name_or_path, model.config.vision_model_revision)\n"
        "torch.save(model.state_dict(), 'weights.pt')"
    )
    hub.files["model", "org/blip2"] = files_of(tmp_path / "source")
    done = commands.run("python", program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"org/blip2 {hub.commit_sha(('model', 'org/blip2'))}"
    weights = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(weights[convert.our_name(name)], tensor) for name, tensor in model.state_dict().items())


def test_the_instruction_changes_the_query_outputs(tmp_path):
    _, ours = converted(source("instructblip", "opt"), tmp_path)
    batch = inputs("instructblip")
    other = batch | {"qformer_input_ids": batch["qformer_input_ids"].flip(0)}
    assert not torch.allclose(ours(**batch).soft_prompt, ours(**other).soft_prompt, atol=1e-3)


# --- The Q-Former alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads_text", [False, True])
def test_eager_and_sdpa_agree_padded_features_and_mixed_prompts_included(reads_text):
    torch.manual_seed(8)
    fields = tiny.QFORMER | dict(encoder_hidden_size=24, use_qformer_text_input=reads_text, vocab_size=50)
    qformer = QFormerModel(QFormerConfig(**fields)).eval()
    features, seen = torch.randn(3, 9, 24), (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    prompt = {name: value for name, value in inputs("instructblip").items() if name.startswith("qformer")}
    prompt = {name.removeprefix("qformer_"): value for name, value in prompt.items()} if reads_text else {}
    outputs = {}
    for attention in ("eager", "sdpa"):
        qformer.set_attn_implementation(attention)
        for mask in (None, seen):
            outputs[attention, mask is None] = qformer(features, mask, **prompt).last_hidden_state
    for unmasked in (True, False):
        torch.testing.assert_close(outputs["eager", unmasked], outputs["sdpa", unmasked], atol=1e-5, rtol=0)
    for row, (length, words) in enumerate(zip((9, 4, 6), (7, 4, 5), strict=True)):  # each alone, without padding
        alone = {"input_ids": prompt["input_ids"][row : row + 1, :words]} if reads_text else {}
        single = qformer(features[row : row + 1, :length], **alone).last_hidden_state
        torch.testing.assert_close(outputs["sdpa", False][row : row + 1], single, atol=1e-5, rtol=0)


def test_a_q_former_without_text_refuses_a_prompt(tmp_path):
    model = tiny.captioner()
    with pytest.raises(ValueError, match="does not read prompts.*use_qformer_text_input"):
        model(tiny.images(), qformer_input_ids=torch.ones(3, 2, dtype=torch.long))


# --- Checkpoints that cannot be converted -----------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """Return a checkpoint in several files."""
    source("blip2", "opt").save_pretrained(tmp_path / "source", max_shard_size="50KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    return tmp_path / "source"


def rewrite(folder, change) -> None:
    """Change the weights, and save them in one file."""
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(change(weights), folder / "model.safetensors")


def change_config(folder, **fields) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["qformer_config"] |= fields
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: max(f.glob("*.safetensors")).write_bytes(max(f.glob("*.safetensors")).read_bytes()[:-9]), "cut off"),
        (lambda f: max(f.glob("*.safetensors")).unlink(), "cannot be read"),
        (
            lambda f: rewrite(f, lambda w: {n: w[n] for n in w if "post_layernorm" not in n}),
            r"lacks 'vision_model.post_layernorm.weight' \(2 tensors",
        ),
        (lambda f: rewrite(f, lambda w: w | {"extra.bias": torch.ones(1)}), "has an unknown 'extra.bias'"),
        (
            lambda f: rewrite(f, lambda w: w | {"query_tokens": torch.ones(1, 2, 32)}),
            "has another shape of 'qformer.query_tokens'",
        ),
        (lambda f: (f / "config.json").write_text(json.dumps({"model_type": "gpt2"})), "is a 'gpt2'"),
        (lambda f: change_config(f, hidden_act="nope"), "configuration of .* cannot be used: .*nope"),
        (lambda f: change_config(f, num_attention_heads=7), "configuration of .* cannot be used: .*multiple"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            "is not a valid index of weights .'weight_map'",
        ),
        (lambda f: shutil.rmtree(f), "cannot be read"),
    ],
)
def test_the_error_names_what_cannot_be_converted_and_nothing_is_written(sharded, break_it, message, tmp_path):
    break_it(sharded)
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        convert.convert(sharded, tmp_path / "ours")
    assert not list(tmp_path.glob("ours*"))


def test_a_sharded_checkpoint_converts_into_shards(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "MAX_SHARD_BYTES", 50_000)
    convert.convert(sharded, tmp_path / "ours", include_backbones=True)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    model, ours = (
        Blip2ForConditionalGeneration.from_pretrained(sharded),
        QFormerCaptioner.from_pretrained(tmp_path / "ours"),
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[convert.our_name(name)], tensor)


@pytest.mark.slow
def test_converting_holds_few_tensors_in_memory(commands, tmp_path):
    """Peak memory of a process that converts 200 MB, 20 MB at a time: far below the checkpoint's size."""
    program = f"""
import json, re, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration
from qformer_captioner.hub import convert
language = dict(model_type="opt", hidden_size=512, word_embed_proj_dim=512, num_attention_heads=8, ffn_dim=2048)
language |= dict(num_hidden_layers=16)
config = Blip2Config(vision_config={VISION}, qformer_config={QFORMER}, text_config=language)
with torch.device("meta"):
    shapes = {{n: t.shape for n, t in Blip2ForConditionalGeneration(config).state_dict().items() if "lm_head" not in n}}
source, names = Path("source"), list(shapes)
source.mkdir()
config.architectures = ["Blip2ForConditionalGeneration"]
config.save_pretrained(source)
index = {{}}
for i in range(8):
    own = names[i::8]
    save_file({{n: torch.zeros(shapes[n]) for n in own}}, source / f"part-{{i}}.safetensors")
    index |= dict.fromkeys(own, f"part-{{i}}.safetensors")
(source / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": index}}))
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
convert.MAX_SHARD_BYTES = 20_000_000
Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
before = memory("VmRSS")
convert.convert(source, "ours", include_backbones=True)
print(sum(file.stat().st_size for file in Path("ours").glob("*.safetensors")) / 2**20, memory("VmHWM") - before)
"""
    done = commands.run("python", program, tmp_path)
    size, peak = map(float, done.stdout.split("\n")[-2].split())
    assert size > 190
    assert peak < 120


def test_a_folder_with_something_in_it_is_left_alone(sharded, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").touch()
    with pytest.raises(InputError, match="not empty"):
        convert.convert(sharded, tmp_path / "ours")


# --- The old scripts --------------------------------------------------------------------------------------------------


def old_weights(vision_width: int, width: int, layers: int = 3, queries: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(10)
    shapes = {"query_tokens": (1, queries, width), "fc.weight": (width, width), "fc.bias": (width,)}
    for layer in range(layers):
        for attention in ("self_attn", "cross_attn"):
            name = f"layers.{layer}.{attention}"
            shapes |= {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
            shapes |= {f"{name}.out_proj.weight": (width, width), f"{name}.out_proj.bias": (width,)}
        for place, shape in ((0, (width,)), (1, (width, width)), (3, (width, width)), (4, (width,))):
            shapes |= {f"layers.{layer}.ffn.{place}.weight": shape, f"layers.{layer}.ffn.{place}.bias": (width,)}
    if vision_width != width:
        shapes |= {"imgproj.weight": (width, vision_width), "imgproj.bias": (width,)}
    return {name: 0.15 * torch.randn(shape) for name, shape in shapes.items()}


def old_mathematics(w: dict[str, torch.Tensor], image: torch.Tensor, heads: int) -> torch.Tensor:
    """Compute the soft prompt of the old scripts without their modules."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(q, kv, name):
        (wq, wk, wv), (bq, bk, bv) = w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (
            (x @ m.T + b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, m, b in ((q, wq, bq), (kv, wk, bk), (kv, wv, bv))
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.out_proj")

    x = linear(image, "imgproj") if "imgproj.weight" in w else image
    q = w["query_tokens"].expand(len(x), -1, -1)
    for layer in range(len({name.split(".")[1] for name in w if name.startswith("layers.")})):
        name = f"layers.{layer}"
        q = attend(q, q, f"{name}.self_attn")
        q = attend(q, x, f"{name}.cross_attn")
        q = norm(
            linear(nn.functional.gelu(linear(norm(q, f"{name}.ffn.0"), f"{name}.ffn.1")), f"{name}.ffn.3"),
            f"{name}.ffn.4",
        )
    return linear(q, "fc")


@pytest.mark.parametrize(("language", "layers", "heads"), [("t5", 4, 16), ("llama", 3, 8)])
def test_old_weights_give_the_outputs_of_the_old_scripts(language, layers, heads, tmp_path):
    fields = {"initializer_factor": 1.0} if language == "t5" else {"max_position_embeddings": 128}
    vision, words = tiny.save_vision(tmp_path / "clip"), tiny.save_language(tmp_path / language, language, **fields)
    weights = old_weights(tiny.VISION_WIDTH, tiny.TEXT_WIDTH, layers)
    torch.save(weights, tmp_path / "qformer.pt")
    model = LegacyCaptioner.from_state_dict(
        tmp_path / "qformer.pt", vision, words, num_attention_heads=heads, prompt="a red circle"
    )
    batch = model.processor(images=[tiny.picture(), tiny.picture(1)])
    features = model.encode_images(batch["pixel_values"]).last_hidden_state
    soft_prompt = old_mathematics(weights, features, heads)
    output = model(**batch, labels=torch.tensor([[5, 6, 1], [7, 8, 1]]))
    torch.testing.assert_close(output.soft_prompt, soft_prompt, atol=1e-5, rtol=1e-5)

    prefix = torch.cat([soft_prompt, model.get_input_embeddings()(batch["input_ids"])], dim=1)
    if language == "t5":
        logits = model.language_model(inputs_embeds=prefix, labels=torch.tensor([[5, 6, 1], [7, 8, 1]])).logits
        torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    else:
        lm = AutoModelForCausalLM.from_pretrained(words)
        caption = lm.get_input_embeddings()(torch.tensor([[5, 6], [7, 8]]))
        logits = lm(inputs_embeds=torch.cat([prefix, caption], dim=1)).logits[:, -3:]
        torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    options = dict(num_beams=4, repetition_penalty=1.1, max_new_tokens=50, do_sample=False)
    expected = model.language_model.generate(inputs_embeds=prefix, **options)
    assert model.generate(**batch).tolist() == expected[:, 1 if language == "t5" else 0 :].tolist()


def test_weights_of_the_old_scripts_can_be_trained_and_saved(backbones, tmp_path):
    weights = old_weights(tiny.VISION_WIDTH, tiny.TEXT_WIDTH)
    model = LegacyCaptioner.from_state_dict(weights, *backbones)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.old_state_dict().items())
    assert set(model.old_state_dict()) == set(weights)
    with pytest.raises(NotImplementedError, match="old_state_dict"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: w[n] for n in w if n != "layers.0.ffn.4.bias"}, "'layers.0.ffn.4.bias' is missing, unknown"),
        (lambda w: w | {"extra": torch.ones(1)}, "'extra' is missing, unknown"),
        (lambda w: {"weight": torch.ones(1)}, "has no 'query_tokens'"),
        (lambda w: old_weights(24, 40), "width 40 cannot have 16 attention heads"),
        (
            lambda w: old_weights(30, tiny.TEXT_WIDTH),
            "takes image features of width 30 .* the backbones have widths 24",
        ),
    ],
)
def test_old_weights_that_do_not_fit_are_named(change, message, backbones):
    with pytest.raises(InputError, match=message):
        LegacyCaptioner.from_state_dict(change(old_weights(tiny.VISION_WIDTH, tiny.TEXT_WIDTH)), *backbones)
