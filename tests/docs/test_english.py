"""The rules for English in CONTRIBUTING.md that a program can check: word choice and the length of sentences."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import ROOT

MAX_WORDS = 25  # of a sentence
WORD = r"\w(?:[\w'.,-]*\w)?"  # 97.4, 10,000 and 2e-3 are one word each
BANNED = {
    r"\b(is|are) none\b": "say what is missing or not valid",
    r"(?<![Tt]here )\bis no (?!longer\b|more\b|different\b|better\b|faster\b|slower\b|need\b)": "say `is not a ...`",
    r"\bbe it\b": "say `whether`",
    r"\bsuch a one\b": "name the thing",
    r"\bwhat (trains|is trained|follows|comes|goes)\b": "begin with the noun",
    r"^(Of|What|As|Whether) ": "begin with an imperative verb or a noun phrase",
}


def files(*patterns: str) -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [Path(name) for name in names if (ROOT / name).exists()]


def prose_of_markdown(text: str) -> Iterator[str]:
    """Yield paragraphs and list items, without code, tables, headings, pictures and comments."""
    text = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|```.*?```|\{%.*?%\}", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"^ *\|.*$", "", text, flags=re.MULTILINE)  # rows of a table, also between the tags of a template
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if not re.match(r"\s*(#|\||!\[|<)", block):
            block = re.sub(r'"[^"\n]{1,40}"', "QUOTE", block)  # a phrase that the text speaks about
            yield re.sub(r"^\s*(?:[-*]|\d+\.) ", "", block)


def prose_of_python(text: str) -> Iterator[str]:
    """Yield paragraphs of docstrings, runs of comments, help texts and error messages."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            docstring = re.sub(r"```.*?```", "\n\n", docstring, flags=re.DOTALL)
            docstring = re.sub(r"^(Args|Returns|Raises|Yields|Example|Examples):$", "", docstring, flags=re.MULTILINE)
            for block in re.split(r"\n\s*\n|\n(?=\s*(?:-|[\w`*, .()\[\]]{1,60}:) )", docstring):
                if not re.match(r" {4,}(python|qformer|torchrun|\w+ =|--|[\w\[\], ]+ -> )|\s*>>>", block):
                    yield re.sub(r"^\s*[\w`*, ]{1,60}(\([^)]*\))?:\s", "", block)
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            texts = node.args if name.endswith(("Error", "option", "warning", "info")) else []
            texts = [*texts, *(keyword.value for keyword in node.keywords if keyword.arg == "help")]
            for each in texts:
                yield literal(each)
    previous, run = -1, []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not re.match(r"# (---|noqa|fmt|type:)|#!", token.string):
            if token.start[0] != previous + 1:
                yield " ".join(run)
                run = []
            run.append(token.string.lstrip("# "))
            previous = token.start[0]
    yield " ".join(run)


def literal(node: ast.AST) -> str:
    """Return the text of a string, with a word in the place of each value of an f-string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(each.value if isinstance(each, ast.Constant) else "X" for each in node.values)
    return ""


def findings(file: Path) -> list[str]:
    text = (ROOT / file).read_text()
    found = []
    for block in (prose_of_python if file.suffix == ".py" else prose_of_markdown)(text):
        block = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block)
        block = " ".join(re.sub(r"`[^`]*`", "CODE", block).split())
        for pattern, remedy in BANNED.items():
            if match := re.search(pattern, block):
                found.append(f"{match[0]!r} ({remedy}): {block[:120]}")
        for sentence in re.split(r"(?<=[.!?:;])\s+", block):
            if len(re.findall(WORD, sentence)) > MAX_WORDS:
                found.append(f"more than {MAX_WORDS} words: {sentence}")
    return found


@pytest.mark.parametrize("file", files("*.py", "*.md"), ids=str)
def test_plain_english(file):
    assert findings(file) == []
