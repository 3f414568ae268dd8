"""The exported and the compiled bridge equal the bridge of the captioner."""

import sys

import pytest
import torch

from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.export import export, main
from qformer_captioner.hub.export_bridge import Bridge, export_bridge

from ..fixtures import tiny

KINDS = {
    "plain": {},
    "reads text": dict(use_qformer_text_input=True, vocab_size=tiny.WORDS, max_position_embeddings=20)
    | dict(projection_per_query=True),
}
SIZES = [(2, 3), (1, 1), (5, 17)]  # number of images, features of each image


def inputs(kind: str, images: int, features: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    batch = {"image_embeds": torch.randn(images, features, tiny.VISION_WIDTH, generator=generator)}
    if kind == "reads text":
        batch["qformer_input_ids"] = torch.randint(0, tiny.WORDS, (images, 7), generator=generator)
        batch["qformer_attention_mask"] = torch.ones(images, 7, dtype=torch.long)
        batch["qformer_attention_mask"][0, 4:] = 0
    return batch


def soft_prompt(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.get_soft_prompt(**batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_of_torch_export_computes_the_same_soft_prompt(kind, tmp_path):
    model = tiny.captioner(**KINDS[kind])
    export_bridge(model, tmp_path / "bridge.pt2")
    program = torch.export.load(tmp_path / "bridge.pt2").module()
    for size in SIZES:
        batch = inputs(kind, *size)
        torch.testing.assert_close(program(**batch), soft_prompt(model, batch), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*axis name.*:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_onnx_model_computes_the_same_soft_prompt(kind, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'qformer-captioner[onnx]'")
    import onnxruntime

    model = tiny.captioner(**KINDS[kind])
    export_bridge(model, tmp_path / "bridge.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "bridge.onnx")
    for size in SIZES:
        batch = inputs(kind, *size)
        (computed,) = session.run(["soft_prompt"], {name: tensor.numpy() for name, tensor in batch.items()})
        torch.testing.assert_close(torch.from_numpy(computed), soft_prompt(model, batch), atol=1e-5, rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["bridge.onnx"]  # it includes the weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_bridge_compiles_to_one_graph(kind):
    """`fullgraph` refuses graph breaks."""
    torch.compiler.reset()
    model = tiny.captioner(**KINDS[kind])
    bridge = torch.compile(Bridge(model), fullgraph=True, backend="eager", dynamic=True)
    for size in SIZES[::2]:
        batch = inputs(kind, *size)
        torch.testing.assert_close(bridge(**batch), soft_prompt(model, batch), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_compiled_bridge_has_the_same_gradients():
    torch.compiler.reset()
    model = tiny.captioner()
    batch = inputs("plain", 2, 3)
    bridges = Bridge(model), torch.compile(Bridge(model), fullgraph=True, backend="aot_eager")
    gradients = []
    for bridge in bridges:
        model.zero_grad()
        bridge(**batch).square().mean().backward()
        gradients.append(model.qformer.query_tokens.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_export_writes_the_bridge_if_out_is_a_file(tmp_path):
    model = tiny.captioner()
    model.save_pretrained(tmp_path / "captioner")
    export(tmp_path / "captioner", tmp_path / "bridge.pt2")
    batch = inputs("plain", 2, 3)
    computed = torch.export.load(tmp_path / "bridge.pt2").module()(**batch)
    torch.testing.assert_close(computed, soft_prompt(model, batch))
    with pytest.raises(InputError, match=r"bridge\.pt2' exists already"):
        export(tmp_path / "captioner", tmp_path / "bridge.pt2")


def test_the_command_says_where_the_export_is(tmp_path, monkeypatch, capsys):
    tiny.captioner().save_pretrained(tmp_path / "captioner")
    bridge = tmp_path / "bridge.pt2"
    monkeypatch.setattr(sys, "argv", ["qformer-captioner export", str(tmp_path / "captioner"), str(bridge)])
    main()
    assert capsys.readouterr().out.splitlines()[-1] == f"Exported to {bridge}."


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.pt2 or \.onnx, not to '.*bridge\.pt'"):
        export_bridge(tiny.captioner(), tmp_path / "bridge.pt")
