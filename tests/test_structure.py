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

from .conftest import ROOT

# The rooms, from the lowest to the highest. A module imports from its own room and from lower ones.
# This list is the only place that states the order; CONTRIBUTING.md describes each room.
ROOMS = ("travelling files", "common", "metrics", "data", "hub", "evaluation", "training", "scripts", "cli")
SCRIPTS = ("train_hf", "eval_captions", "precompute_features")
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


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Map each module of the rooms to the modules that it imports, imports inside functions included."""
    modules = {module_of(file): file for file in python_files() if room_of(module_of(file))}
    graph = {module: set() for module in modules}
    for module, file in modules.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name.removeprefix("qformer_captioner.") for alias in node.names]
                graph[module].update(name for name in names if name in modules)
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level:
                parts = package.split(".") if package else []
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            elif (node.module or "").partition(".")[0] == "qformer_captioner":
                base = node.module.partition(".")[2]
            else:
                continue
            for alias in node.names:
                submodule = f"{base}.{alias.name}".lstrip(".")
                graph[module].add(submodule if submodule in modules else base)
    return {module: {name for name in names if name in modules and name != module} for module, names in graph.items()}


def test_every_file_is_in_a_room():
    elsewhere = {"tests", "benchmarks", "demo", "docs"}
    homeless = [str(file) for file in python_files() if file.parts[0] not in elsewhere and not room_of(module_of(file))]
    assert homeless == ["__init__.py"]


def test_no_module_imports_from_a_higher_room():
    upward = [
        f"{module} -> {name}"
        for module, names in import_graph().items()
        for name in names
        if ROOMS.index(room_of(name)) > ROOMS.index(room_of(module))
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
                assert node.level == 0 or node.module.endswith("_qformer"), f"{file}:{node.lineno}"
            for name in names:
                top = name.partition(".")[0]
                assert top in allowed | standard | optional, f"{file}:{node.lineno} imports {name}"


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
