"""The import hook that registers our classes with transformers, and the reason why it is needed."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..fixtures import tiny

ORDERS = {
    "the package first": "import qformer_captioner; from transformers import AutoConfig, AutoProcessor",
    "transformers first": "from transformers import AutoConfig, AutoProcessor; import qformer_captioner",
}


def run(program: str) -> str:
    """Run a program in a separate process, and return its output."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_cannot_discover_classes_of_other_packages():
    """If this fails, transformers reads entry points: declare one, and remove hub/auto_classes.py."""
    folder = Path(find_spec("transformers").submodule_search_locations[0])
    files = [*folder.glob("*.py"), *folder.glob("utils/*.py"), *folder.glob("models/auto/*.py")]
    assert len(files) > 50
    assert [file.name for file in files if re.search(r"\bentry_points\s*\(", file.read_text())] == []


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_our_model_types_in_any_order_of_imports(order):
    program = f"{ORDERS[order]}; print(AutoConfig.for_model('qformer', num_query_tokens=5).num_query_tokens)"
    assert run(program) == "5"


@pytest.mark.slow
def test_our_classes_are_imported_when_a_placeholder_is_used():
    program = (
        f"import sys; {ORDERS['the package first']}; name = 'qformer_captioner.modeling_qformer'; "
        "before = name in sys.modules; AutoConfig.for_model('qformer_captioner'); print(before, name in sys.modules)"
    )
    assert run(program) == "False True"


@pytest.mark.slow
def test_the_auto_classes_take_our_configuration_objects(tmp_path):
    """Each class is asked before anything else has used our classes."""
    tiny.captioner().save_pretrained(tmp_path)
    program = f"""
from qformer_captioner import QFormerCaptionerConfig, QFormerConfig
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
processor = PROCESSOR_MAPPING[QFormerCaptionerConfig]
config = QFormerCaptionerConfig.from_pretrained({str(tmp_path)!r})
qformer = AutoModel.from_config(QFormerConfig(num_hidden_layers=1))
made = [auto.from_config(config) for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)]
loaded = AutoModel.from_pretrained({str(tmp_path)!r}, config=config)
print(processor.__name__, type(qformer).__name__, *(type(model).__name__ for model in [*made, loaded]))
print(type(loaded).__module__, sum(weight.numel() for weight in loaded.parameters()))
"""
    classes, loaded = run(program).splitlines()
    assert classes == "QFormerCaptionerProcessor QFormerModel" + 4 * " QFormerCaptioner"
    assert loaded == f"qformer_captioner.modeling_qformer {tiny.captioner().num_parameters()}"


@pytest.mark.slow
def test_the_auto_classes_take_our_configuration_objects_if_transformers_comes_first():
    program = (
        "from transformers import AutoModel; from qformer_captioner import QFormerConfig; "
        "print(type(AutoModel.from_config(QFormerConfig(num_hidden_layers=1))).__name__)"
    )
    assert run(program) == "QFormerModel"


@pytest.mark.slow
def test_the_hook_leaves_no_trace_in_the_import_system():
    program = (
        f"import sys; {ORDERS['the package first']}; module = sys.modules[AutoConfig.__module__]; "
        "names = [type(finder).__name__ for finder in sys.meta_path]; "
        "print('AutoModuleFinder' in names, type(module.__spec__.loader).__name__)"
    )
    assert run(program) == "False SourceFileLoader"


@pytest.mark.slow
def test_importing_the_package_imports_neither_torch_nor_transformers():
    assert run("import sys, qformer_captioner; print('torch' in sys.modules, 'transformers' in sys.modules)") == (
        "False False"
    )
