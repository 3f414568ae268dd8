"""The order of the rooms, and the size of files and functions."""

import ast
import functools
import io
import subprocess
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from qformer_captioner import _MODULES as PUBLIC_NAMES

from .conftest import ROOT

# The rooms, from the lowest to the highest. A module imports from its own room and from lower ones.
# This list is the only place that states the order; CONTRIBUTING.md describes each room.
ROOMS = (
    "travelling files",
    "common",
    "metrics",
    "data",
    "hub",
    "evaluation",
    "retrieval",
    "captioning",
    "serving",
    "rewards",
    "training",
    "scripts",
    "cli",
)
SCRIPTS = ("train_hf", "eval_captions", "eval_retrieval", "precompute_features")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80  # of code: blank lines, comments and the docstring do not count
WAIVER = "# Long on purpose:"  # a comment that says why, at the top of the file or inside the function


@functools.cache
def python_files() -> tuple[Path, ...]:
    """Return the Python files of the checkout, as git lists them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return tuple(Path(name) for name in names if (ROOT / name).exists())


def module_of(file: Path) -> str:
    """Return the dotted name of a file below the package: `data/loading.py` is `data.loading`."""
    return ".".join(part for part in file.with_suffix("").parts if part != "__init__")


def room_of(module: str) -> str | None:
    """Return the room of a module. The package's own `__init__.py` is in no room: it imports lazily from all."""
    if module.endswith("_qformer") and "." not in module:
        return "travelling files"
    if module in SCRIPTS:
        return "scripts"
    return next((room for room in ROOMS if module.split(".")[0] == room), None)


def rank_of(module: str) -> int:
    """Return the place of a module in the order. Modules outside the rooms, such as benchmarks, are above all rooms."""
    room = room_of(module)
    return len(ROOMS) if room is None else ROOMS.index(room)


def imported_names(source: str, package: str) -> Iterator[str]:
    """Yield what a file imports, as dotted names below the package: `from .a import b` in `data` is `data.a.b`.

    Args:
        source: the text of the file. Imports inside functions count too.
        package: the folder of the file as a dotted name, or an empty string for the root.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("qformer_captioner.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.module is None else node.module.split(".")
            if node.level:
                parts = package.split(".") if package else []
                base = parts[: len(parts) - node.level + 1] + base
            elif base[0] == "qformer_captioner":
                base = base[1:]
            yield from (".".join([*base, alias.name]) for alias in node.names)


@functools.cache
def all_modules() -> frozenset[str]:
    """Return the modules of the checkout, in rooms and outside."""
    return frozenset(map(module_of, python_files()))


def module_that_defines(name: str) -> str | None:
    """Return the module of the checkout that an imported name means, or `None` for another package's name."""
    if name in PUBLIC_NAMES:  # `from qformer_captioner import QFormerCaptioner`
        return PUBLIC_NAMES[name]
    parts = name.split(".")
    beginnings = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if beginning in all_modules()), None)


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Map each module of the rooms to the modules of the checkout that it imports."""
    graph = {}
    for file in python_files():
        module = module_of(file)
        if room_of(module) is None:
            continue
        names = imported_names((ROOT / file).read_text(), ".".join(file.parts[:-1]))
        graph[module] = {module_that_defines(name) for name in names} - {None, module}
    return graph


def test_every_file_is_in_a_room():
    elsewhere = {"tests", "benchmarks", "demo", "docs"}
    homeless = [str(file) for file in python_files() if file.parts[0] not in elsewhere and not room_of(module_of(file))]
    assert homeless == ["__init__.py"]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from benchmarks import memory", "benchmarks.memory"),
        ("import tests.fixtures.tiny", "tests.fixtures.tiny"),
        ("def f():\n    from ..demo import attention", "demo.attention"),
        ("from qformer_captioner import QFormerCaptioner", "modeling_qformer"),
        ("from qformer_captioner.hub.load import load_captioner", "hub.load"),
        ("from .. import eval_captions", "eval_captions"),
        ("from . import loading", "data.loading"),
        ("from .loading import load_rows", "data.loading"),
        ("from datasets import load_dataset", None),
    ],
)
def test_imports_are_resolved_to_modules_of_the_checkout(source, module):
    (name,) = imported_names(source, "data")
    assert module_that_defines(name) == module


@pytest.mark.parametrize("module", ["benchmarks.memory", "demo.attention", "tests.fixtures.tiny"])
def test_modules_outside_the_rooms_are_above_all_rooms(module):
    assert rank_of(module) > max(map(rank_of, import_graph()))


def test_no_module_imports_from_a_higher_room():
    upward = [
        f"{module} -> {name}"
        for module, names in import_graph().items()
        for name in names
        if rank_of(name) > rank_of(module)
    ]
    assert upward == []


def test_no_circle_of_imports():
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_travelling_files_import_each_other_and_what_every_user_of_transformers_has():
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "PIL"}
    standard = set(__import__("sys").stdlib_module_names)
    optional = {"bitsandbytes"}  # imported inside the function that needs it
    for file in python_files():
        if room_of(module_of(file)) != "travelling files":
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file}:{node.lineno}"
                names = [node.module] if node.level == 0 else []
                siblings = [node.module or alias.name for alias in node.names] if node.level else []
                assert all(name.endswith("_qformer") for name in siblings), f"{file}:{node.lineno}"
            for name in names:
                top = name.partition(".")[0]
                assert top in allowed | standard | optional, f"{file}:{node.lineno} imports {name}"


def test_no_test_depends_on_the_name_of_the_folder_of_the_checkout():
    """pytest calls a module `tests.data` or, below a folder whose name is an identifier, `folder.tests.data`.

    Relative imports inside `tests` work in both cases. Others fail in one case, or load a second copy of a module.
    """
    outside = []
    for file in python_files():
        if file.parts[0] != "tests":
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.ImportFrom):
                absolute = node.level == 0 and node.module.partition(".")[0] == "tests"
                if absolute or node.level >= len(file.parts):
                    outside.append(f"{file}:{node.lineno}")
    assert outside == []


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_of_code(source: str, node: ast.FunctionDef) -> int:
    """Count the lines of a function that hold code, its decorators and its docstring left out."""
    first, last = node.lineno, node.end_lineno
    docstring = range(0)
    if ast.get_docstring(node) is not None:
        docstring = range(node.body[0].lineno, node.body[0].end_lineno + 1)
    lines = set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and first <= token.start[0] <= last:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - set(docstring))


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_files_and_functions_stay_short(file):
    source = (ROOT / file).read_text()
    lines = source.splitlines()
    assert len(lines) <= MAX_FILE_LINES or any(WAIVER in line for line in lines[:10])
    for node in functions(ast.parse(source)):
        if node.end_lineno - node.lineno < MAX_FUNCTION_LINES:
            continue
        body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        assert lines_of_code(source, node) <= MAX_FUNCTION_LINES or WAIVER in body, f"{file}:{node.lineno} {node.name}"
