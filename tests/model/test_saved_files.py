"""Names of the files in a saved folder: sharded or not, variants, subfolders, and folders that are written again."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor

from qformer_captioner import QFormerCaptioner
from qformer_captioner.hub.layout import check_folder
from qformer_captioner.weights_qformer import replaced_weights

from ..conftest import ROOT
from ..fixtures import tiny

WHOLE, SHARDED, OTHER_SHARDS = "50GB", "60KB", "150KB"
BATCH = tiny.batch()


def captioner(seed: int) -> QFormerCaptioner:
    """Return a captioner whose loss depends on the seed."""
    model = tiny.captioner()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.language_projection.weight)
    return model


def loss_of(model: QFormerCaptioner) -> float:
    return model(**BATCH).loss.item()


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    ("before", "after"), [(WHOLE, SHARDED), (SHARDED, WHOLE), (SHARDED, OTHER_SHARDS), (OTHER_SHARDS, SHARDED)]
)
def test_a_folder_that_is_written_again_opens_with_its_new_weights(tmp_path, before, after, variant):
    for seed, size in enumerate((before, after)):
        model = captioner(seed)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    names = {path.name for path in tmp_path.glob("*model*.safetensors*")} | {
        path.name for path in tmp_path.glob(".model*")
    }
    middle = f".{variant}" if variant else ""
    if after == WHOLE:
        assert names == {f"model{middle}.safetensors"}
    else:
        index = json.loads((tmp_path / f"model.safetensors.index{middle}.json").read_text())
        assert names == {f"model.safetensors.index{middle}.json", *index["weight_map"].values()}
        assert len(names) > 2
    assert loss_of(QFormerCaptioner.from_pretrained(tmp_path, variant=variant)) == loss_of(model)
    assert loss_of(AutoModel.from_pretrained(tmp_path, variant=variant)) == loss_of(model)


@pytest.mark.parametrize("size", [WHOLE, SHARDED])
def test_variants_in_one_folder_do_not_disturb_each_other(tmp_path, size):
    models = {"fp16": captioner(0), None: captioner(1), "ema": captioner(2)}
    for variant, model in models.items():
        model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    models[None] = captioner(3)
    models[None].save_pretrained(tmp_path, max_shard_size=size)
    for variant, model in models.items():
        assert loss_of(AutoModel.from_pretrained(tmp_path, variant=variant)) == loss_of(model)


def test_a_save_that_fails_leaves_the_earlier_weights(tmp_path):
    model = captioner(0)
    model.save_pretrained(tmp_path, max_shard_size=SHARDED)
    with pytest.raises(ValueError, match="shard"):
        captioner(1).save_pretrained(tmp_path, max_shard_size="many shards")
    assert loss_of(QFormerCaptioner.from_pretrained(tmp_path)) == loss_of(model)


def test_weights_of_a_missing_variant_are_named(tmp_path):
    captioner(0).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.bf16\.safetensors"):
        QFormerCaptioner.from_pretrained(tmp_path, variant="bf16")


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": SHARDED}], ids=str)
@pytest.mark.parametrize("included", [True, False])
def test_a_subfolder_opens_with_its_processor(backbones, tmp_path, options, included):
    model = QFormerCaptioner.from_backbones(
        backbones / "vision",
        backbones / "llama",
        prompt="a star",
        qformer_tokenizer=tiny.tokenizer(),
        **tiny.QFORMER,
        use_qformer_text_input=True,
        vocab_size=tiny.WORDS,
    )
    model.save_pretrained(tmp_path / "inner", include_backbones=included, **options)
    variant = {name: options[name] for name in options if name == "variant"}
    loaded = AutoModel.from_pretrained(tmp_path, subfolder="inner", **variant)
    assert loss_of(loaded) == loss_of(model)
    for processor in (loaded.processor, AutoProcessor.from_pretrained(tmp_path, subfolder="inner")):
        assert processor.prompt == "a star"
        assert type(processor.qformer_tokenizer) is type(model.processor.qformer_tokenizer)


def test_adapters_and_their_captioner_may_be_in_subfolders(backbones, tmp_path):
    QFormerCaptioner.from_backbones(backbones / "vision", backbones / "llama", **tiny.QFORMER).save_pretrained(
        tmp_path / "base"
    )
    base = QFormerCaptioner.from_pretrained(tmp_path, subfolder="base")
    layers = LoraConfig(target_modules=r"language_model.*q_proj", init_lora_weights=False)
    adapted = get_peft_model(base, layers).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    for opened in (
        AutoModel.from_pretrained(tmp_path / "adapter"),
        AutoModel.from_pretrained(tmp_path, adapter_kwargs={"subfolder": "adapter"}),
    ):
        assert loss_of(opened) == loss_of(adapted)


def test_the_tokenizer_of_an_earlier_q_former_is_not_read(tmp_path):
    model = captioner(0)
    model.processor.qformer_tokenizer = tiny.tokenizer()
    model.save_pretrained(tmp_path)
    captioner(1).save_pretrained(tmp_path)
    assert QFormerCaptioner.from_pretrained(tmp_path).processor.qformer_tokenizer is None


def test_a_folder_with_shards_left_over_by_another_program_is_read_as_transformers_does(tmp_path):
    captioner(0).save_pretrained(tmp_path, max_shard_size=SHARDED)
    model = captioner(1)
    model.save_pretrained(tmp_path / "whole")
    os.replace(tmp_path / "whole" / "model.safetensors", tmp_path / "model.safetensors")
    assert loss_of(QFormerCaptioner.from_pretrained(tmp_path)) == loss_of(model)
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("written", "replaced"),
    [
        ({"model.safetensors"}, ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]),
        ({"model.safetensors.index.json", "model-00001-of-00001.safetensors"}, ["model.safetensors"]),
        ({"model.safetensors.index.fp16.json"}, ["model.fp16.safetensors"]),
        ({"config.json"}, []),
    ],
)
def test_an_upload_replaces_the_weights_of_its_variant(written, replaced):
    existing = ["README.md", "model-00001-of-00001.safetensors", "model.fp16.safetensors", "model.safetensors"]
    existing += ["model.safetensors.index.fp16.json", "model.safetensors.index.json", "adapter_model.safetensors"]
    assert replaced_weights(written, existing) == replaced


PUSHES = """
import json, sys
sys.path.insert(0, {root!r})
import tests.conftest
from tests.model.test_saved_files import SHARDED, WHOLE, captioner, loss_of
from huggingface_hub import HfApi
from transformers import AutoModel

results = []
for seed, size in enumerate((WHOLE, SHARDED, WHOLE)):
    model = captioner(seed)
    model.push_to_hub("tester/mine", max_shard_size=size)
    weights = [name for name in HfApi().list_repo_files("tester/mine") if name.startswith(("model.", "model-"))]
    results.append([loss_of(model), loss_of(AutoModel.from_pretrained("tester/mine")), weights])
model.save_pretrained("local/inner", variant="fp16", max_shard_size=SHARDED)
HfApi().upload_folder(repo_id="tester/mine", folder_path="local")
loaded = AutoModel.from_pretrained("tester/mine", subfolder="inner", variant="fp16")
results.append([loss_of(model), loss_of(loaded), [loaded.processor is not None]])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_a_repository_that_is_uploaded_again_opens_with_its_new_weights(commands, tmp_path):
    done = commands.run("python", PUSHES.format(root=str(ROOT)), tmp_path)
    assert done.returncode == 0, done.stderr
    whole, sharded, again, inner = json.loads(done.stdout.splitlines()[-1])
    for before, after, _ in (whole, sharded, again, inner):
        assert before == after
    assert whole[2] == again[2] == ["model.safetensors"]
    assert "model.safetensors" not in sharded[2] and len(sharded[2]) > 2
    assert inner[2] == [True]
