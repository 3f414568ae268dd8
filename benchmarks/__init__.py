"""How fast ours is beside what a user would run instead: `python -m benchmarks.metrics`, and so on."""
