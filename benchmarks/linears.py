"""Linear layers by oneDNN and by MKL, which PyTorch uses itself, in float32 on a CPU: `python -m benchmarks.linears`.

The layers are those of SmolLM2-135M, BLIP-2's Q-Former and Llama-3.2-1B, with few and with many input rows. As in a
model, a run multiplies by several weights in turn, which together do not fit into the processor's cache. Both products
must agree before they are timed. The errors of both, relative to a product in float64, are reported as well.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qformer_captioner.common.onednn import multiply_by_mkl, multiply_by_onednn

from .common import machine_facts, summarize, time_in_turn, write_result

LAYERS = {  # inputs, outputs
    "SmolLM2-135M, attention": (576, 576),
    "SmolLM2-135M, feed-forward": (576, 1536),
    "SmolLM2-135M, words": (576, 49152),  # the output layer, under the name that results/linears.jsonl began with
    "Q-Former, attention": (768, 768),
    "Q-Former, feed-forward": (768, 3072),
    "Llama-3.2-1B, feed-forward": (2048, 8192),
}
WEIGHT_ELEMENTS = 2**26  # of the weights that take turns: 256 MiB, more than a processor's cache

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 5, 80, 200, 800], help="Numbers of input rows.")
    parser.add_argument("--repetitions", type=int, default=5, help="Number of timed runs of each side.")
    return parser.parse_args()


def multiply_by_all(multiply: Multiply, inputs: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        multiply(inputs, weight)


def relative_errors(inputs: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Check that oneDNN and MKL agree, and return the error of each relative to the product in float64."""
    products = {"ours": multiply_by_onednn(inputs, weight), "torch": multiply_by_mkl(inputs, weight)}
    torch.testing.assert_close(products["ours"], products["torch"], atol=1e-3, rtol=1e-4)
    exact = inputs.double() @ weight.t().double()
    return {name: ((product - exact).norm() / exact.norm()).item() for name, product in products.items()}


def measure(inputs: torch.Tensor, weights: list[torch.Tensor], repetitions: int) -> dict[str, Any]:
    """Compare the errors of both sides, then time them in turn."""
    errors = relative_errors(inputs, weights[0])
    seconds = time_in_turn(
        repetitions,
        ours=partial(multiply_by_all, multiply_by_onednn, inputs, weights),
        torch=partial(multiply_by_all, multiply_by_mkl, inputs, weights),
    )
    times = {name: summarize(values) for name, values in seconds.items()}
    ratio = times["torch"]["median"] / times["ours"]["median"]
    return {"errors": errors, "seconds": times, "ratio": ratio}


@torch.no_grad()
def main() -> None:
    options = parse_options()
    facts = machine_facts("torch")
    print(f"{'speed of oneDNN / MKL with':<28}" + "".join(f"{rows:>6} rows" for rows in options.rows))
    for title, (in_features, out_features) in LAYERS.items():
        weight_count = max(1, WEIGHT_ELEMENTS // (in_features * out_features))
        weights = [torch.randn(out_features, in_features) for _ in range(weight_count)]
        line, error_ratio = f"{title:<28}", 0.0
        for rows in options.rows:
            result = measure(torch.randn(rows, in_features), weights, options.repetitions)
            shape = {"layer": title, "inputs": in_features, "outputs": out_features, "rows": rows}
            write_result("linears", facts | shape | {"weights": weight_count} | result)
            line += f"{result['ratio']:>11.2f}"
            error_ratio = max(error_ratio, result["errors"]["ours"] / result["errors"]["torch"])
        print(f"{line}   error at most {error_ratio:.1f} x MKL's", flush=True)


if __name__ == "__main__":
    main()
