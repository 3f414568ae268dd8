"""Access to the common tests of transformers, which only its source archive holds.

`make conformance` unpacks the archive of the installed version into build/. The archive has the common tests
(`tests/test_modeling_common.py` and others) but not the folders below `tests/`. The few names that the common tests
import from there are defined here.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from unittest.mock import patch

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from ..conftest import ROOT
from ..fixtures import tiny

FOLDER = ROOT / "build" / f"transformers-{transformers.__version__}" / "tests"
PACKAGE = "transformers_tests"


class ExportTesterMixin:
    """Placeholder for the tests of exporters, which the archive does not hold."""


class GenerationTesterMixin:
    """Placeholder for the tests of `generate`, which the archive does not hold. tests/model has our own."""


# Values that a configuration has to keep.
COMMON_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["Model"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def local_path(url: str) -> str:
    """Return a picture of noise in place of one of the Hub, and any other URL unchanged."""
    if not url.endswith(".png"):
        return url
    picture = FOLDER / "picture.png"
    tiny.picture().save(picture)
    return str(picture)


MISSING = {
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": COMMON_FIELDS},
    "fetch_hub_objects_for_ci": {"url_to_local_path": local_path},
}


def load(name: str) -> ModuleType:
    """Import a module of the common tests, such as `test_modeling_common`."""
    if PACKAGE not in sys.modules:
        # The tests look up by these names what a model is, such as whether it computes a loss.
        MODEL_MAPPING_NAMES["qformer"] = "QFormerModel"
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["qformer_captioner"] = "QFormerCaptioner"
        spec = importlib.machinery.ModuleSpec(PACKAGE, loader=None, is_package=True)
        spec.submodule_search_locations = [str(FOLDER)]
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        for missing, names in MISSING.items():
            sys.modules[missing] = ModuleType(missing)
            vars(sys.modules[missing]).update(names)
    # The tests of configurations import transformers a second time from a checkout, but do not use it.
    with patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")
