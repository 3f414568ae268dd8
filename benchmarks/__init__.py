"""Speed and memory of this package next to its alternatives: `python -m benchmarks.metrics`, and so on."""
