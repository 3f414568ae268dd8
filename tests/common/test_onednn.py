"""Linear layers by oneDNN: the same numbers and gradients, for all models and nothing that they were not meant for."""

from contextlib import nullcontext
from platform import machine

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.profiler import profile

from qformer_captioner.common import onednn as linear_qformer
from qformer_captioner.common.onednn import SMALLEST_WEIGHT, OneDNNLinears, multiply, onednn_linears
from qformer_captioner.hub.export_bridge import Bridge

from ..fixtures import tiny

LANGUAGES = ["llama", "qwen2", "gemma", "opt", "gpt2", "bloom", "t5", "flan-t5", "bart"]

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or machine() not in ("x86_64", "AMD64"),
    reason="this torch comes without oneDNN, or without MKL beside it",
)


@pytest.fixture
def any_size(monkeypatch):
    """Layers as small as those of a tiny captioner are oneDNN's, too."""
    monkeypatch.setattr(linear_qformer, "SMALLEST_WEIGHT", 0)


def products_of_onednn(run) -> int:
    with profile() as recorded:
        run()
    return sum(each.count for each in recorded.key_averages() if each.key == "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 32), (2, 5, 32), (3, 4, 2, 32), (0, 32)])
def test_numbers_and_gradients_are_those_of_torch(any_size, shape, bias):
    torch.manual_seed(0)
    tensors = [torch.randn(size, requires_grad=True) for size in [shape, (48, 32), (48,)][: 3 if bias else 2]]
    expected = linear(*tensors)
    grad_output = torch.randn_like(expected)
    with OneDNNLinears():
        actual = linear(*tensors)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors, grad_output), torch.autograd.grad(expected, tensors, grad_output)
    )


@pytest.mark.parametrize("product", [multiply, linear])
def test_results_can_be_changed_in_place(any_size, product):
    """As OLMo's `clip_qkv` and AdaLoRA do."""
    inputs, weight, bias = torch.randn(2, 5, 32, requires_grad=True), torch.randn(48, 32), torch.randn(48)
    (expected,) = torch.autograd.grad(linear(inputs, weight, bias).mul_(2).sum(), inputs)
    with OneDNNLinears(product):
        (actual,) = torch.autograd.grad(linear(inputs, weight, bias).mul_(2).sum(), inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.randn(7, 5, 48)[:, 2:4, :32], torch.randn(40, 32), torch.randn(40)),
        (torch.randn(5, 7, 32).transpose(0, 1), torch.randn(40, 32), torch.randn(40)),
        (torch.randn(1, 32).expand(6, -1), torch.randn(40, 32), torch.randn(40)),
        (torch.randn(7, 32), torch.randn(32, 40).t(), torch.randn(40)),
        (torch.randn(7, 32), torch.randn(40, 64)[:, ::2], torch.randn(40)),
        (torch.randn(7, 32), torch.randn(40, 32), torch.randn(80)[::2]),
    ],
    ids=["slice", "transposed", "expanded", "weight transposed", "weight with gaps", "bias with gaps"],
)
def test_it_does_not_matter_how_tensors_lie_in_memory(any_size, tensors):
    expected = linear(*tensors)
    with OneDNNLinears():
        torch.testing.assert_close(linear(*tensors), expected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_loss_and_gradients_of_a_captioner_do_not_change(language, any_size, monkeypatch):
    model, batch, results = tiny.captioner(language=language), tiny.batch(), []
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append({"loss": loss.detach()} | gradients)
    ours, expected = results
    largest = max(each.norm() for each in expected.values())  # some are nothing but rounding: a key's bias
    for name, tensor in expected.items():
        # A T5 does not scale its attention, so its gradients are large: MKL's are 1e-4 from float64's, too.
        bound = 5e-4 if language == "t5" else 5e-5
        assert (ours[name] - tensor).norm() < bound * tensor.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_do_not_change(language, beams, any_size, monkeypatch):
    model, batch, results = tiny.captioner(language=language), tiny.batch(), []
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        results.append(model.generate(**batch, num_beams=beams, max_new_tokens=8))
    assert torch.equal(*results)


def test_layers_of_all_parts_are_onednns(any_size):
    model, batch = tiny.captioner(), tiny.batch()
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    with torch.no_grad():
        assert products_of_onednn(lambda: model(**batch)) == layers
        seen = products_of_onednn(lambda: model.get_image_features(batch["pixel_values"]))
    assert seen == sum(isinstance(module, torch.nn.Linear) for module in model.vision_model.modules())
    assert products_of_onednn(lambda: model.generate(**batch, max_new_tokens=2)) > layers


@pytest.mark.parametrize("language", ["t5", "opt"])
def test_with_relus_only_gradients_are_onednns(language, any_size):
    """Rounding opens and closes a ReLU that is close to zero."""
    model, batch, outputs = tiny.captioner(language=language), tiny.batch(), []
    assert products_of_onednn(lambda: outputs.append(model(**batch))) == 0
    assert products_of_onednn(outputs[0].loss.backward) > 0
    with torch.no_grad():
        assert products_of_onednn(lambda: model(**batch)) > 0


def test_small_layers_stay_torchs_own():
    side = int(SMALLEST_WEIGHT**0.5)
    inputs, large, small = torch.randn(2, side), torch.randn(side, side), torch.randn(side - 1, side)
    with onednn_linears(torch.device("cpu")):
        assert products_of_onednn(lambda: linear(inputs, large)) == 1
        assert products_of_onednn(lambda: linear(inputs, small)) == 0


def test_it_can_be_turned_off(any_size, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    model, batch = tiny.captioner(), tiny.batch()
    assert products_of_onednn(lambda: model(**batch)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_stay_torchs_own(any_size, dtype):
    inputs, weight = torch.randn(2, 32, dtype=dtype), torch.randn(48, 32, dtype=dtype)
    with OneDNNLinears():
        assert products_of_onednn(lambda: linear(inputs, weight)) == 0


def test_autocast_decides_the_precision(any_size):
    inputs, weight = torch.randn(2, 32), torch.randn(48, 32)
    with OneDNNLinears(), torch.autocast("cpu", torch.bfloat16):
        assert linear(inputs, weight).dtype == torch.bfloat16


def test_tensors_of_another_kind_stay_their_own(any_size):
    class Counted(torch.Tensor):
        """As quantised weights are: a tensor that multiplies in its own way."""

    with OneDNNLinears():
        result = linear(torch.randn(2, 32), torch.randn(48, 32).as_subclass(Counted))
    assert type(result) is Counted


def test_a_frozen_layer_keeps_none_of_its_inputs(any_size):
    """With adapters or a Q-Former before them frozen layers pass gradients on, which takes their weights alone."""
    inputs, kept = torch.randn(6, 32, requires_grad=True), []
    with OneDNNLinears(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), id):
        linear(inputs, torch.randn(48, 32))
    assert kept == [(48, 32)]


def test_activations_can_be_recomputed(any_size):
    """In the backward pass, when the fast layers are not there any more."""
    model, batch = tiny.captioner(), tiny.batch()
    model(**batch).loss.backward()
    expected = model.qformer.query_tokens.grad.clone()
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.train()
    model(**batch).loss.backward()
    torch.testing.assert_close(model.qformer.query_tokens.grad, expected, atol=2e-5, rtol=2e-4)


def test_adapters_train(any_size):
    model = tiny.captioner()
    model.language_model = get_peft_model(model.language_model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    model(**tiny.batch()).loss.backward()
    assert all(
        weight.grad is not None and (weight.grad.any() or "lora_A" in name)
        for name, weight in model.named_parameters()
        if "lora_" in name
    )


def test_a_compiled_bridge_is_one_graph_with_the_fast_layers_around(any_size):
    model = tiny.captioner()
    features = model.get_image_features(tiny.images())
    expected = Bridge(model)(features)
    torch.compiler.reset()
    bridge = torch.compile(Bridge(model), fullgraph=True, backend="eager")
    with OneDNNLinears():
        actual = bridge(features)
    torch.testing.assert_close(actual, expected)


def test_a_compiled_captioner_chooses_by_itself(any_size):
    model, batch = tiny.captioner(), tiny.batch()
    expected = model(**batch).loss
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch).loss, expected)
    features = model.get_image_features(batch["pixel_values"])
    one_graph = torch.compile(model.get_image_features, backend="eager", fullgraph=True)
    torch.testing.assert_close(one_graph(batch["pixel_values"]), features)


def test_gradients_have_gradients(any_size):
    inputs, first, second = (torch.randn(size, requires_grad=True) for size in [(5, 32), (16, 32), (20, 16)])
    results = []
    for mode in (OneDNNLinears(), nullcontext()):
        with mode:
            output = linear(linear(inputs, first).tanh(), second)
        (grad_output,) = torch.autograd.grad(output.pow(2).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(grad_output.pow(2).sum(), [inputs, first, second]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_function_transforms_work(any_size):
    inputs, weight = torch.randn(5, 32), torch.randn(48, 32)
    expected = linear(inputs, weight)
    with OneDNNLinears():
        torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight))(inputs), expected)
        _, tangent = torch.func.jvp(lambda x: linear(x, weight), (inputs,), (inputs,))
        torch.testing.assert_close(tangent, expected)
        with forward_ad.dual_level():
            dual = linear(forward_ad.make_dual(inputs, inputs), weight)
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


def test_a_captioner_can_be_traced(any_size):
    model, pixel_values = tiny.captioner().requires_grad_(False), tiny.images()
    traced = torch.jit.trace(lambda images: model.get_image_features(images), pixel_values)
    torch.testing.assert_close(traced(pixel_values), model.get_image_features(pixel_values))


@pytest.mark.parametrize("bias", [torch.tensor(2.0), torch.randn(1), torch.randn(1, 48)], ids=["number", "one", "row"])
def test_a_bias_that_torch_broadcasts_stays_torchs(any_size, bias):
    inputs, weight = torch.randn(5, 32), torch.randn(48, 32)
    with OneDNNLinears():
        torch.testing.assert_close(linear(inputs, weight, bias), linear(inputs, weight) + bias)


def test_what_does_not_fit_torch_names(any_size):
    with OneDNNLinears(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(5, 31), torch.randn(48, 32))
