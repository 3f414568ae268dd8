"""Linear layers in float32 on a CPU, multiplied by oneDNN.

torch brings two libraries that multiply matrices on x86 processors, and asks MKL wherever numbers are float32. oneDNN
is the faster one on an AMD EPYC: 1.03 to 1.9 times with many rows, 1.1 to 3.2 times with the few of a caption that is
being written (`python -m benchmarks.linears`). Results differ in the last digits: rounding errors are 1.5 to 2.3 times
MKL's at most. While a captioner with ReLUs (T5, OPT) trains, only gradients are multiplied by it: otherwise rounding
would open and close those ReLUs that are close to zero, and gradients differ from MKL's by up to 8e-4.

`torch.backends.mkldnn.enabled = False` turns it off; do so to recompute activations by other means than transformers'
`activation_checkpointing_enable`, on which it keeps out of the way by itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from platform import machine

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

SMALLEST_WEIGHT = 2**18  # elements: 512 x 512. Below, what it takes to call oneDNN is more than what it saves.


def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN: `[..., I]`, `[O, I]`, `[O]` -> `[..., O]`, without a gradient.

    The operator is the one of torch's own compiler (Inductor); it has no public name.
    """
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """A linear layer (by `product`) with gradients. Those of a weight are MKL's: there oneDNN is no faster."""

    @staticmethod
    def forward(
        ctx, product: Callable, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        _, of_inputs, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if of_weight else None, weight if of_inputs else None)  # a frozen layer keeps none
        outputs = product(inputs, weight, bias)
        # Rows that are seen as [..., O]. If autograd knew, it would not let them be changed in place.
        return torch.ops.aten._unsafe_view(outputs, outputs.shape)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, of_inputs, of_weight, of_bias = ctx.needs_input_grad
        inputs, weight = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # [N, O]
        again = torch.is_grad_enabled()  # with `create_graph` gradients have gradients, which `multiply` has not
        return (
            None,
            (grad_output @ weight if again else multiply(grad_output, weight.t())) if of_inputs else None,
            rows.t() @ inputs.reshape(-1, inputs.shape[-1]) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


class OneDNNLinears(TorchFunctionMode):
    """While it is entered, linear layers of some size are oneDNN's, those of transformers' models included.

    Their results are those of `product`: `multiply`, or torch's own, which leaves oneDNN the gradients.
    """

    def __init__(self, product: Callable = multiply):
        super().__init__()
        self.product = product

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.linear and is_plain():
            inputs, weight, bias = operands(*args, **kwargs)
            if is_for_onednn(inputs, weight, bias):
                if torch.is_grad_enabled():
                    return OneDNNLinear.apply(self.product, inputs, weight, bias)
                return self.product(inputs, weight, bias)
        return function(*args, **kwargs)


def operands(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> tuple:
    """In order, however `torch.nn.functional.linear` was called; the names are its own."""
    return input, weight, bias


def is_plain() -> bool:
    """Whether what is called is what happens: nothing compiles, traces, casts, vectorises or differentiates forward."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_for_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether it takes such tensors, and gains by them. What is wrong with others torch says better."""
    tensors = [inputs, weight] if bias is None else [inputs, weight, bias]
    return (
        weight.numel() >= SMALLEST_WEIGHT
        and all(type(each) in (torch.Tensor, torch.nn.Parameter) for each in tensors)  # none quantised, none fake
        and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)
        and all(each.layout is torch.strided and not each.is_nested for each in tensors)
        and all(each.is_contiguous() for each in tensors[1:])  # it reads a bias without looking at its strides
        and inputs.numel() > 0
        and inputs.dim() > 0
        and weight.dim() == 2
        and inputs.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


def onednn_linears(device: torch.device, product: Callable = multiply) -> AbstractContextManager:
    """While it is entered, linear layers are oneDNN's on a CPU that has it (see [`OneDNNLinears`]).

    Example:

    ```python
    >>> layer = torch.nn.Linear(1024, 512)
    >>> with onednn_linears(torch.device("cpu")):
    ...     layer(torch.randn(5, 1024)).shape
    torch.Size([5, 512])
    ```
    """
    if torch.compiler.is_compiling():  # which chooses by itself
        return nullcontext()
    # Elsewhere than on x86 there is no MKL.
    available = torch.backends.mkldnn.is_available() and machine() in ("x86_64", "AMD64")
    wanted = device.type == "cpu" and available and torch.backends.mkldnn.enabled
    return OneDNNLinears(product) if wanted else nullcontext()


def has_relus(model: PreTrainedModel) -> bool:
    """Whether gradients pass through ReLUs, of which rounding opens and closes those that are close to zero.

    Seen are those that are modules, as in T5 and OPT.
    """
    parts = (model.qformer, model.language_model)
    return any(isinstance(module, torch.nn.ReLU) for part in parts for module in part.modules())


def with_fast_linears(method: Callable) -> Callable:
    """A method of a model, run with [`onednn_linears`]."""

    @wraps(method)
    def run(self: PreTrainedModel, *args, **kwargs):
        trains = torch.is_grad_enabled()
        # Layers that are computed a second time are so when we are gone; torch refuses what then comes by another way.
        recomputed = trains and self.is_activation_checkpointing
        product = torch.nn.functional.linear if trains and has_relus(self) else multiply
        with nullcontext() if recomputed else onednn_linears(self.device, product):
            return method(self, *args, **kwargs)

    return run
