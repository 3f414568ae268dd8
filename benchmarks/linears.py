"""Linear layers by oneDNN beside torch's own, float32 on a CPU: `python -m benchmarks.linears`.

Layers of SmolLM2-135M, BLIP-2's Q-Former and a language model of a billion weights, over few and many rows. As many
weights in turn as do not fit into a processor's cache, as in a model. Both sides first multiply, and must agree; how
far each is from float64 is told, too.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from qformer_captioner.common.onednn import multiply_by_mkl, multiply_by_onednn

from .common import alternate, machine, spread, write_result

LAYERS = {  # inputs, outputs
    "SmolLM2-135M, attention": (576, 576),
    "SmolLM2-135M, feed-forward": (576, 1536),
    "SmolLM2-135M, words": (576, 49152),
    "Q-Former, attention": (768, 768),
    "Q-Former, feed-forward": (768, 3072),
    "Llama-3.2-1B, feed-forward": (2048, 8192),
}
CACHE = 2**26  # elements: 256 MiB


def run(linear: Callable, inputs: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        linear(inputs, weight)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 5, 80, 200, 800])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    print(f"{'times as fast with':<28}" + "".join(f"{rows:>6} rows" for rows in options.rows))
    for title, (inputs, outputs) in LAYERS.items():
        weights = [torch.randn(outputs, inputs) for _ in range(max(1, CACHE // (inputs * outputs)))]
        line, rounding = f"{title:<28}", 0.0
        for rows in options.rows:
            batch = torch.randn(rows, inputs)
            products = multiply_by_onednn(batch, weights[0]), multiply_by_mkl(batch, weights[0])
            torch.testing.assert_close(*products, atol=1e-3, rtol=1e-4)
            exact = batch.double() @ weights[0].t().double()
            errors = [((product - exact).norm() / exact.norm()).item() for product in products]
            rounding = max(rounding, errors[0] / errors[1])
            seconds = alternate(
                options.repetitions,
                ours=partial(run, multiply_by_onednn, batch, weights),
                torch=partial(run, multiply_by_mkl, batch, weights),
            )
            times = {name: spread(values) for name, values in seconds.items()}
            ratio = times["torch"]["median"] / times["ours"]["median"]
            line += f"{ratio:>11.2f}"
            shape = {"layer": title, "inputs": inputs, "outputs": outputs, "rows": rows, "weights": len(weights)}
            shape["errors"] = dict(zip(times, errors, strict=True))
            write_result("linears", machine("torch") | shape | {"seconds": times, "ratio": ratio})
        print(f"{line}   rounds {rounding:.1f} x as much at most", flush=True)


if __name__ == "__main__":
    main()
