"""Captioners whose parts are wrapped: compiled, with adapters, in DDP. Results equal those of the plain captioner."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from qformer_captioner import QFormerCaptioner

from ..fixtures import tiny
from ..fixtures.batches import labels_of_several_captions

SEVERAL = {**tiny.batch(), "labels": labels_of_several_captions()}


def wrap(model: QFormerCaptioner, part: str) -> None:
    setattr(model, part, torch.compile(getattr(model, part), backend="eager"))


def compile_in_place(model: QFormerCaptioner, part: str) -> None:
    getattr(model, part).compile(backend="eager")


def results(model, batch: dict) -> dict:
    """Return losses, logits, a gradient and captions."""
    output = model(**batch)
    skipped = model(**batch, skip_logits=True)
    gradient = torch.autograd.grad(skipped.loss, model.qformer.query_tokens)
    ids = model.generate(**batch, max_new_tokens=2)
    return {"loss": output.loss, "skipped": skipped.loss, "logits": output.logits, "gradient": gradient, "ids": ids}


@pytest.fixture(autouse=True)
def without_compiled_code():
    """Forget the code that other tests compiled, which counts towards a limit."""
    torch.compiler.reset()


@pytest.fixture(scope="module", params=["llama", "t5"])
def plain(request):
    """Language, results of one caption, and loss of several captions."""
    model = tiny.captioner(language=request.param)
    return request.param, results(model, tiny.batch()), model(**SEVERAL).loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plain", "part", "how"),
    [
        ("llama", "vision_model", wrap),
        ("t5", "qformer", wrap),
        ("llama", "language_projection", wrap),
        ("llama", "language_model", wrap),
        ("t5", "language_model", wrap),
        ("t5", "language_model", compile_in_place),
    ],
    indirect=["plain"],
)
def test_a_compiled_part_changes_no_result_and_no_name(plain, part, how, tmp_path):
    language, one, several = plain
    model = tiny.captioner(language=language)
    names = list(model.state_dict())
    how(model, part)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(results(model, tiny.batch()), one)
    torch.testing.assert_close(model(**SEVERAL).loss, several)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) <= set(names)
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**tiny.batch()).loss, one["loss"])


@pytest.mark.slow
def test_a_compiled_captioner_has_the_same_loss():
    model = tiny.captioner()
    loss = model(**tiny.batch()).loss
    torch.testing.assert_close(torch.compile(model, backend="eager")(**tiny.batch()).loss, loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plain", "layer"),
    [("llama", "decoder"), ("t5", "decoder"), ("t5", "encoder"), ("llama", "lm_head"), ("t5", "layers")],
    indirect=["plain"],
)
def test_a_compiled_layer_changes_no_result_and_no_name(plain, layer, tmp_path):
    """The layer is inside a part, so the wrapper stays."""
    language, one, several = plain
    model = tiny.captioner(language=language)
    names, language_model = set(model.state_dict()), model.language_model
    if layer == "encoder":
        parent, name = model.qformer, "encoder"
    elif layer == "layers":
        parent, name = next(iter(model.qformer.encoder.layer.children())), "attention"
    elif layer == "decoder":
        parent, name = language_model, "model" if language == "llama" else "decoder"
    else:
        parent, name = language_model, "lm_head"
    setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))
    torch.testing.assert_close(results(model, tiny.batch()), one)
    torch.testing.assert_close(model(**SEVERAL).loss, several)
    assert set(model.state_dict()) == names
    assert not any(model.load_state_dict(tiny.captioner(language=language).state_dict()))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) <= names
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**tiny.batch()).loss, one["loss"])


def test_a_compiled_part_runs_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny.captioner()
    model.qformer = torch.compile(model.qformer, backend=backend)
    model(**tiny.batch())
    assert graphs
    assert type(model.qformer) is type(tiny.captioner().qformer)


def test_adapters_on_the_language_model_alone(plain):
    """New adapters change nothing, trained ones do, and their merged weights give the same loss."""
    language, one, several = plain
    model = tiny.captioner(language=language)
    config = LoraConfig(target_modules=["q_proj", "v_proj"] if language == "llama" else ["q", "v"])
    model.language_model = get_peft_model(model.language_model, config).eval()
    torch.testing.assert_close(results(model, tiny.batch()), one, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(**SEVERAL).loss, several, rtol=1e-4, atol=1e-4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    loss = model(**tiny.batch()).loss
    assert not torch.allclose(loss, one["loss"])
    model.language_model = model.language_model.merge_and_unload()
    torch.testing.assert_close(model(**tiny.batch()).loss, loss, rtol=1e-3, atol=1e-3)


def test_a_captioner_in_ddp_has_the_same_loss_and_gradients(plain):
    language, one, _ = plain
    model = tiny.captioner(language=language)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        output = wrapped(**tiny.batch())
        output.loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(output.logits, one["logits"])
    torch.testing.assert_close((model.qformer.query_tokens.grad,), one["gradient"], rtol=1e-4, atol=1e-4)
