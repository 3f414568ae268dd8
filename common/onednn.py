"""Linear layers that use oneDNN instead of MKL, in float32 on an x86 CPU: [`onednn_linears`].

PyTorch ships both libraries. In float32 it calls MKL for linear layers and has no option to change that. On an AMD EPYC
with AVX-512, oneDNN is 1.03 to 1.9 times as fast with many rows. With the few rows of a decoding step it is 1.1 to 3.2
times as fast. With AVX2 it is 0.8 to 1.8 times as fast, depending on the layer, and a training step was 27 % slower.
Measure other processors with `python -m benchmarks.linears`. The results differ from MKL's only by rounding.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from platform import machine
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

MIN_WEIGHT_ELEMENTS = 2**18  # 512 x 512. In smaller layers the call of oneDNN costs more than it saves.


def onednn_linears(device: torch.device | str = "cpu", backward_only: bool = False) -> AbstractContextManager:
    """Return a context in which oneDNN multiplies the linear layers of any model in float32 on a CPU with AVX-512.

    On an AMD EPYC, it makes training steps and captioning 1.4 to 1.7 times as fast. Loading the model with
    `dtype=torch.bfloat16` is simpler and faster still on a processor that supports it, at the cost of precision. The
    commands and [`CaptionTrainer`] enter the context automatically.

    The context changes nothing on other devices, on processors without AVX-512, in other dtypes, under autocast, or in
    compiled code. It also changes nothing while `torch.backends.mkldnn.enabled` is `False`. Contexts can be nested: the
    innermost one applies. A context applies only in the thread that enters it.

    Do not enter it with gradient checkpointing. PyTorch exits such contexts in the backward pass. Recomputed layers
    would then use MKL, and PyTorch raises a `CheckpointError`.

    Args:
        device (`torch.device` or `str`, defaults to `"cpu"`): device of the model. The context costs nothing if it is
            not a CPU.
        backward_only (`bool`, defaults to `False`): use MKL in the forward pass. oneDNN rounds differently and can move
            inputs of ReLUs across zero, which changes gradients by up to 8e-4 (relative). With MKL's forward pass the
            gradients stay within 1e-4. Pass [`has_relu`] of the model when it trains.

    Example:

    ```python
    >>> import torch
    >>> from qformer_captioner import onednn_linears
    >>> layer = torch.nn.Linear(1024, 512)
    >>> with onednn_linears():
    ...     layer(torch.randn(5, 1024)).shape
    torch.Size([5, 512])
    ```
    """
    if torch.compiler.is_compiling() or torch.device(device).type != "cpu":
        return nullcontext()
    if not torch.backends.mkldnn.is_available() or machine() not in ("x86_64", "AMD64"):
        return nullcontext()  # on other processors PyTorch does not use MKL
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return nullcontext()
    return OneDNNLinears(backward_only)


def has_relu(model: torch.nn.Module) -> bool:
    """Return True if the model has ReLU modules, as T5 v1.0 and OPT do.

    Example:

    ```python
    >>> has_relu(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()))
    True
    ```
    """
    return any(isinstance(module, torch.nn.ReLU) for module in model.modules())


class OneDNNLinears(TorchFunctionMode):
    """Context that replaces `torch.nn.functional.linear` where oneDNN can compute it (see [`onednn_linears`])."""

    def __init__(self, backward_only: bool = False):
        super().__init__()
        self.backward_only = backward_only

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.linear and is_plain_call():
            inputs, weight, bias = linear_arguments(*args, **kwargs)
            if is_supported(inputs, weight, bias):
                multiply = multiply_by_mkl if self.backward_only else multiply_by_onednn
                if torch.is_grad_enabled():
                    return OneDNNLinear.apply(multiply, inputs, weight, bias)
                return multiply(inputs, weight, bias)
        return function(*args, **kwargs)


class OneDNNLinear(torch.autograd.Function):
    """Linear layer that computes input gradients with oneDNN. Weight gradients use MKL, which is as fast for them."""

    @staticmethod
    def forward(
        ctx: Any, multiply: Callable, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        _, needs_inputs, needs_weight, _ = ctx.needs_input_grad
        # A frozen layer keeps no inputs.
        ctx.save_for_backward(inputs if needs_weight else None, weight if needs_inputs else None)
        outputs = multiply(inputs, weight, bias)
        # The products are a view of rows [N, O]. Autograd forbids in-place changes of a view, so hide the view from it.
        return torch.ops.aten._unsafe_view(outputs, outputs.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs  # [..., O]
        _, needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        inputs, weight = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # [N, O]
        grad_inputs = None
        if needs_inputs and torch.is_grad_enabled():  # `create_graph`: oneDNN's product is not differentiable
            grad_inputs = grad_output @ weight
        elif needs_inputs:
            grad_inputs = multiply_by_onednn(grad_output, weight.t())
        return (
            None,
            grad_inputs,
            rows.t() @ inputs.reshape(-1, inputs.shape[-1]) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )


def multiply_by_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `torch.nn.functional.linear` with oneDNN: `[..., I]`, `[O, I]`, `[O]` -> `[..., O]`, without a gradient.

    PyTorch's compiler (Inductor) uses this operator; it has no public name.
    """
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def multiply_by_mkl(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `torch.nn.functional.linear` as PyTorch does, without any context that replaces it."""
    return torch.ops.aten.linear(inputs, weight, bias)


def linear_arguments(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the arguments of `torch.nn.functional.linear` in order. The names are its own."""
    return input, weight, bias


def is_plain_call() -> bool:
    """Return True if nothing compiles, traces, casts, vectorises or forward-differentiates the call."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_supported(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return True if oneDNN accepts the tensors and is faster.

    Invalid tensors go to PyTorch, which reports the error.
    """
    tensors = [inputs, weight] if bias is None else [inputs, weight, bias]
    return (
        weight.numel() >= MIN_WEIGHT_ELEMENTS
        and bool(torch.backends.mkldnn.enabled)
        and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)  # not quantised, not fake
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.layout is torch.strided and not tensor.is_nested for tensor in tensors)
        and all(tensor.is_contiguous() for tensor in tensors[1:])  # oneDNN ignores the strides of a bias
        and inputs.numel() > 0
        and inputs.dim() > 0
        and weight.dim() == 2
        and inputs.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )
