"""Linear layers by oneDNN compute the same numbers and gradients in every model, and leave all other calls alone."""

from contextlib import nullcontext
from platform import machine
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.overrides import _get_current_function_mode_stack
from torch.profiler import profile
from torch.utils.checkpoint import CheckpointError

import qformer_captioner
from qformer_captioner.common import onednn
from qformer_captioner.common.onednn import MIN_WEIGHT_ELEMENTS, has_relu, onednn_linears
from qformer_captioner.hub.export_bridge import Bridge
from qformer_captioner.training.shared_setup import normalize_image_features
from qformer_captioner.training.trainer import CaptionTrainer
from qformer_captioner.training.training_arguments import QFormerTrainingArguments

from ..fixtures import tiny

LANGUAGES = ["llama", "qwen2", "gemma", "opt", "gpt2", "bloom", "t5", "flan-t5", "bart"]

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or machine() not in ("x86_64", "AMD64"),
    reason="this build of PyTorch has no oneDNN, or no MKL beside it",
)


@pytest.fixture(autouse=True)
def processor_with_avx512(monkeypatch):
    """Let every processor pass for one on which oneDNN is faster. The numbers do not depend on it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.fixture
def any_size(monkeypatch):
    """Let oneDNN multiply layers as small as those of a tiny captioner."""
    monkeypatch.setattr(onednn, "MIN_WEIGHT_ELEMENTS", 0)


def products_of_onednn(run) -> int:
    """Count the matrix products that oneDNN computes during a call."""
    with profile() as recorded:
        run()
    return sum(event.count for event in recorded.key_averages() if event.key == "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 32), (2, 5, 32), (3, 4, 2, 32), (0, 32)])
def test_numbers_and_gradients_are_those_of_torch(any_size, shape, bias):
    torch.manual_seed(0)
    tensors = [torch.randn(size, requires_grad=True) for size in [shape, (48, 32), (48,)][: 3 if bias else 2]]
    expected = linear(*tensors)
    grad_output = torch.randn_like(expected)
    with onednn_linears():
        actual = linear(*tensors)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors, grad_output), torch.autograd.grad(expected, tensors, grad_output)
    )


@pytest.mark.parametrize("backward_only", [False, True])
def test_results_can_be_changed_in_place(any_size, backward_only):
    """OLMo's `clip_qkv` and AdaLoRA change them."""
    inputs, weight, bias = torch.randn(2, 5, 32, requires_grad=True), torch.randn(48, 32), torch.randn(48)
    (expected,) = torch.autograd.grad(linear(inputs, weight, bias).mul_(2).sum(), inputs)
    with onednn_linears(backward_only=backward_only):
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
def test_the_memory_layout_of_tensors_changes_nothing(any_size, tensors):
    expected = linear(*tensors)
    with onednn_linears():
        torch.testing.assert_close(linear(*tensors), expected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_loss_and_gradients_of_a_captioner_do_not_change(language, any_size):
    model, batch, results = tiny.captioner(language=language), tiny.batch(), []
    for context in (onednn_linears(backward_only=has_relu(model)), nullcontext()):
        model.zero_grad()
        with context:
            loss = model(**batch).loss
            loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append({"loss": loss.detach()} | gradients)
    actual, expected = results
    largest = max(tensor.norm() for tensor in expected.values())  # a gradient may be rounding alone: the bias of a key
    for name, tensor in expected.items():
        # T5 does not scale its attention scores, so its gradients are large: MKL's differ by 1e-4 from float64's.
        bound = 5e-4 if language == "t5" else 5e-5
        assert (actual[name] - tensor).norm() < bound * tensor.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_do_not_change(language, beams, any_size):
    model, batch = tiny.captioner(language=language), tiny.batch()
    expected = model.generate(**batch, num_beams=beams, max_new_tokens=8)
    with onednn_linears():
        assert torch.equal(model.generate(**batch, num_beams=beams, max_new_tokens=8), expected)


def test_onednn_multiplies_the_linear_layers_of_all_parts(any_size):
    model, batch = tiny.captioner(), tiny.batch()
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    with torch.no_grad(), onednn_linears():
        assert products_of_onednn(lambda: model(**batch)) == layers
        in_vision_model = products_of_onednn(lambda: model.encode_images(batch["pixel_values"]))
        assert products_of_onednn(lambda: model.generate(**batch, max_new_tokens=2)) > layers
    assert in_vision_model == sum(isinstance(module, torch.nn.Linear) for module in model.vision_model.modules())


@pytest.mark.parametrize("language", ["t5", "opt"])
def test_backward_only_leaves_the_forward_pass_to_mkl(language, any_size):
    """Models with ReLUs train like this, because rounding in the forward pass moves ReLU inputs across zero."""
    model, batch, outputs = tiny.captioner(language=language), tiny.batch(), []
    expected = model(**batch).logits
    with onednn_linears(backward_only=True):
        assert products_of_onednn(lambda: outputs.append(model(**batch))) == 0
        assert torch.equal(outputs[0].logits, expected)
        assert products_of_onednn(outputs[0].loss.backward) > 0


@pytest.mark.parametrize(("language", "expected"), [("t5", True), ("opt", True), ("llama", False), ("flan-t5", False)])
def test_relu_modules_are_found(language, expected):
    assert has_relu(tiny.captioner(language=language)) == expected


def test_the_innermost_context_decides(any_size):
    inputs, weight = torch.randn(2, 32), torch.randn(48, 32)
    with onednn_linears():
        with onednn_linears(backward_only=True):
            assert products_of_onednn(lambda: linear(inputs, weight)) == 0
            with onednn_linears():
                assert products_of_onednn(lambda: linear(inputs, weight)) == 1
        assert products_of_onednn(lambda: linear(inputs, weight)) == 1
    assert products_of_onednn(lambda: linear(inputs, weight)) == 0


def test_one_context_can_be_entered_again_and_inside_itself(any_size):
    inputs, weight, context = torch.randn(2, 32), torch.randn(48, 32), onednn_linears()
    for _ in range(2):
        with context, context:
            assert products_of_onednn(lambda: linear(inputs, weight)) == 1
        assert products_of_onednn(lambda: linear(inputs, weight)) == 0


def test_an_error_ends_the_context(any_size):
    inputs, weight = torch.randn(2, 32), torch.randn(48, 32)
    with pytest.raises(KeyError), onednn_linears():
        raise KeyError
    assert products_of_onednn(lambda: linear(inputs, weight)) == 0


def test_users_import_it_from_the_package():
    assert qformer_captioner.onednn_linears is onednn_linears


def test_small_layers_use_mkl():
    side = int(MIN_WEIGHT_ELEMENTS**0.5)
    inputs, large, small = torch.randn(2, side), torch.randn(side, side), torch.randn(side - 1, side)
    with onednn_linears():
        assert products_of_onednn(lambda: linear(inputs, large)) == 1
        assert products_of_onednn(lambda: linear(inputs, small)) == 0


@pytest.mark.parametrize("inside", [False, True])
def test_the_switch_of_torch_turns_it_off(any_size, monkeypatch, inside):
    model, batch = tiny.captioner(), tiny.batch()
    if not inside:
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with onednn_linears():
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert products_of_onednn(lambda: model(**batch)) == 0


@pytest.mark.parametrize("reason", ["device", "processor", "instructions", "build"])
def test_it_does_nothing_on_another_device_or_processor_or_build(any_size, monkeypatch, reason):
    if reason == "processor":
        monkeypatch.setattr(onednn, "machine", lambda: "arm64")
    if reason == "instructions":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    if reason == "build":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert isinstance(onednn_linears("cuda" if reason == "device" else "cpu"), nullcontext)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_use_mkl(any_size, dtype):
    inputs, weight = torch.randn(2, 32, dtype=dtype), torch.randn(48, 32, dtype=dtype)
    with onednn_linears():
        assert products_of_onednn(lambda: linear(inputs, weight)) == 0


def test_autocast_decides_the_precision(any_size):
    inputs, weight = torch.randn(2, 32), torch.randn(48, 32)
    with onednn_linears(), torch.autocast("cpu", torch.bfloat16):
        assert linear(inputs, weight).dtype == torch.bfloat16


def test_tensor_subclasses_keep_their_own_product(any_size):
    class Counted(torch.Tensor):
        """Tensor subclass with its own product, like quantised weights."""

    with onednn_linears():
        result = linear(torch.randn(2, 32), torch.randn(48, 32).as_subclass(Counted))
    assert type(result) is Counted


def test_a_frozen_layer_keeps_none_of_its_inputs(any_size):
    """Frozen layers after adapters or a Q-Former only pass gradients on, and need only their weights to do so."""
    inputs, kept = torch.randn(6, 32, requires_grad=True), []
    with onednn_linears(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), id):
        linear(inputs, torch.randn(48, 32))
    assert kept == [(48, 32)]


def test_torch_still_leaves_the_context_where_activations_are_recomputed(any_size):
    """If this fails, PyTorch stays in the context, and the Trainer may enter it with gradient checkpointing."""
    model = tiny.captioner()
    model.activation_checkpointing_enable()
    with onednn_linears():
        loss = model.train()(**tiny.batch()).loss
        with pytest.raises(CheckpointError, match="Recomputed values"):
            loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, "trainer", "model"])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_the_trainer_enters_it_except_with_gradient_checkpointing(language, checkpointing, any_size, tmp_path):
    options = dict(eval_strategy="no", save_strategy="no", load_best_model_at_end=False, use_cpu=True)
    args = QFormerTrainingArguments(str(tmp_path), gradient_checkpointing=checkpointing == "trainer", **options)
    model, batch = tiny.captioner(language=language), tiny.batch()
    model(**batch).loss.backward()
    expected = model.qformer.query_tokens.grad.clone()
    model.zero_grad()
    trainer = CaptionTrainer(model=model, args=args, score=None, train_dataset=[], data_collator=None)
    if checkpointing:
        model.activation_checkpointing_enable()
    items = (batch["labels"] != -100).sum()
    products = products_of_onednn(lambda: trainer.training_step(model, batch, num_items_in_batch=items))
    assert (products == 0) == bool(checkpointing)
    torch.testing.assert_close(model.qformer.query_tokens.grad, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.slow
def test_the_trainer_captions_and_predicts_in_it(any_size, tmp_path):
    options = dict(eval_strategy="no", save_strategy="no", load_best_model_at_end=False, use_cpu=True)
    model = tiny.captioner()
    trainer = CaptionTrainer(
        model=model,
        args=QFormerTrainingArguments(str(tmp_path), **options),
        score=None,
        train_dataset=[],
        data_collator=SimpleNamespace(processor=model.processor),
    )
    trainer.get_eval_dataloader = lambda rows: [tiny.batch()]
    assert products_of_onednn(lambda: trainer.generate_captions([])) > 0
    assert products_of_onednn(lambda: trainer.prediction_step(model, tiny.batch(), prediction_loss_only=True)) > 0


def test_the_normalisation_of_image_features_computes_them_in_it(any_size):
    model = tiny.captioner()

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": tiny.images(len(rows))}

    assert products_of_onednn(lambda: normalize_image_features(model, range(4), collate, num_samples=4)) > 0


def test_a_context_applies_only_in_the_thread_that_enters_it(any_size):
    inputs, weight = torch.randn(2, 32), torch.randn(48, 32)
    modes: list[bool] = []
    with onednn_linears():
        thread = Thread(target=lambda: modes.append(bool(_get_current_function_mode_stack())))
        thread.start()
        thread.join()
        assert products_of_onednn(lambda: linear(inputs, weight)) == 1
    assert modes == [False]


def test_adapters_train(any_size):
    model = tiny.captioner()
    model.language_model = get_peft_model(model.language_model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    with onednn_linears():
        model(**tiny.batch()).loss.backward()
    assert all(
        weight.grad is not None and (weight.grad.any() or "lora_A" in name)
        for name, weight in model.named_parameters()
        if "lora_" in name
    )


def test_a_compiled_bridge_is_one_graph_inside_the_context(any_size):
    model = tiny.captioner()
    features = model.encode_images(tiny.images()).last_hidden_state
    expected = Bridge(model)(features)
    torch.compiler.reset()
    bridge = torch.compile(Bridge(model), fullgraph=True, backend="eager")
    with onednn_linears():
        actual = bridge(features)
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_a_compiled_captioner_computes_the_same_inside_the_context(any_size):
    model, batch = tiny.captioner(), tiny.batch()
    expected, features = model(**batch).loss, model.encode_images(batch["pixel_values"]).last_hidden_state
    torch.compiler.reset()
    with onednn_linears():
        torch.testing.assert_close(torch.compile(model, backend="eager")(**batch).loss, expected)
        one_graph = torch.compile(model.encode_images, backend="eager", fullgraph=True)
        torch.testing.assert_close(one_graph(batch["pixel_values"]).last_hidden_state, features)


def test_compiled_code_may_enter_the_context(any_size):
    inputs, weight = torch.randn(2, 32), torch.randn(48, 32)

    def multiply(inputs: torch.Tensor) -> torch.Tensor:
        with onednn_linears():
            return linear(inputs, weight)

    torch.compiler.reset()
    compiled = torch.compile(multiply, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), linear(inputs, weight))


def test_gradients_have_gradients(any_size):
    inputs, first, second = (torch.randn(size, requires_grad=True) for size in [(5, 32), (16, 32), (20, 16)])
    results = []
    for context in (onednn_linears(), nullcontext()):
        with context:
            output = linear(linear(inputs, first).tanh(), second)
        (grad_output,) = torch.autograd.grad(output.pow(2).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(grad_output.pow(2).sum(), [inputs, first, second]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_function_transforms_work(any_size):
    inputs, weight = torch.randn(5, 32), torch.randn(48, 32)
    expected = linear(inputs, weight)
    with onednn_linears():
        torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight))(inputs), expected)
        _, tangent = torch.func.jvp(lambda x: linear(x, weight), (inputs,), (inputs,))
        torch.testing.assert_close(tangent, expected)
        with forward_ad.dual_level():
            dual = linear(forward_ad.make_dual(inputs, inputs), weight)
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


def test_a_captioner_can_be_traced(any_size):
    model, pixel_values = tiny.captioner().requires_grad_(False), tiny.images()
    with onednn_linears():
        traced = torch.jit.trace(lambda images: model.encode_images(images).last_hidden_state, pixel_values)
    torch.testing.assert_close(traced(pixel_values), model.encode_images(pixel_values).last_hidden_state)


@pytest.mark.parametrize("bias", [torch.tensor(2.0), torch.randn(1), torch.randn(1, 48)], ids=["number", "one", "row"])
def test_a_broadcast_bias_uses_mkl(any_size, bias):
    inputs, weight = torch.randn(5, 32), torch.randn(48, 32)
    with onednn_linears():
        torch.testing.assert_close(linear(inputs, weight, bias), linear(inputs, weight) + bias)


def test_torch_reports_shapes_that_do_not_fit(any_size):
    with onednn_linears(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(5, 31), torch.randn(48, 32))
