"""Makes the checkout importable as `qformer_captioner` when it is not installed."""

import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

if importlib.util.find_spec("qformer_captioner") is None:
    spec = importlib.util.spec_from_file_location(
        "qformer_captioner", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["qformer_captioner"] = module
    spec.loader.exec_module(module)
