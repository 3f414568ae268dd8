"""The import hook that registers our classes with transformers, and the reason why it is needed."""

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..fixtures import tiny
from ..fixtures.fork_server import ForkServer

# Modules of transformers that hold the Auto classes.
AUTO_MODULES = ("transformers.models.auto.processing_auto", "transformers.models.auto.modeling_auto")
ORDERS = {
    "the package first": ("qformer_captioner", *AUTO_MODULES),
    "transformers first": (*AUTO_MODULES, "qformer_captioner"),
}


@pytest.fixture(scope="module", params=ORDERS)
def in_any_order(request):
    """Return a function that runs a program after these imports alone, and returns its output."""
    with tempfile.TemporaryDirectory() as folder, ForkServer(Path(folder), os.environ, ORDERS[request.param]) as server:

        def run(program: str) -> str:
            done = server.run("python", program, Path(folder))
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        yield run


def test_transformers_cannot_discover_classes_of_other_packages():
    """If this fails, transformers reads entry points: declare one, and remove hub/auto_classes.py."""
    folder = Path(find_spec("transformers").submodule_search_locations[0])
    files = [*folder.glob("*.py"), *folder.glob("utils/*.py"), *folder.glob("models/auto/*.py")]
    assert len(files) > 50
    assert [file.name for file in files if re.search(r"\bentry_points\s*\(", file.read_text())] == []


@pytest.mark.slow
def test_the_auto_classes_know_our_model_types(in_any_order):
    program = (
        "from transformers import AutoConfig; "
        "print(AutoConfig.for_model('qformer', num_query_tokens=5).num_query_tokens)"
    )
    assert in_any_order(program) == "5"


@pytest.mark.slow
def test_our_classes_are_imported_when_a_placeholder_is_used(in_any_order):
    program = (
        "import sys; from transformers import AutoConfig; name = 'qformer_captioner.modeling_qformer'; "
        "before = name in sys.modules; AutoConfig.for_model('qformer_captioner'); print(before, name in sys.modules)"
    )
    assert in_any_order(program) == "False True"


@pytest.mark.slow
def test_the_auto_classes_take_our_configuration_objects(in_any_order, tmp_path):
    """Each class is asked before anything else has used our classes."""
    tiny.captioner().save_pretrained(tmp_path)
    program = f"""
from qformer_captioner import QFormerCaptionerConfig
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
processor = PROCESSOR_MAPPING[QFormerCaptionerConfig]
config = QFormerCaptionerConfig.from_pretrained({str(tmp_path)!r})
made = [auto.from_config(config) for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)]
loaded = AutoModel.from_pretrained({str(tmp_path)!r}, config=config)
print(processor.__name__, *(type(model).__name__ for model in [*made, loaded]))
print(type(loaded).__module__, sum(weight.numel() for weight in loaded.parameters()))
"""
    classes, loaded = in_any_order(program).splitlines()
    assert classes == "QFormerCaptionerProcessor" + 4 * " QFormerCaptioner"
    assert loaded == f"qformer_captioner.modeling_qformer {tiny.captioner().num_parameters()}"


@pytest.mark.slow
def test_the_auto_classes_take_the_configuration_of_a_q_former(in_any_order):
    program = (
        "from transformers import AutoModel; from qformer_captioner import QFormerConfig; "
        "print(type(AutoModel.from_config(QFormerConfig(num_hidden_layers=1))).__name__)"
    )
    assert in_any_order(program) == "QFormerModel"


@pytest.mark.slow
def test_the_hook_leaves_no_trace_in_the_import_system(in_any_order):
    program = (
        "import sys; from transformers import AutoConfig; module = sys.modules[AutoConfig.__module__]; "
        "names = [type(finder).__name__ for finder in sys.meta_path]; "
        "print('AutoModuleFinder' in names, type(module.__spec__.loader).__name__)"
    )
    assert in_any_order(program) == "False SourceFileLoader"


@pytest.mark.slow
def test_importing_the_package_imports_neither_torch_nor_transformers():
    program = "import sys, qformer_captioner; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr
