"""Commands import large libraries only where they use them."""

import subprocess
import sys

import pytest

from qformer_captioner.cli.main import COMMANDS

from ..conftest import ROOT

pytestmark = pytest.mark.slow  # each test starts a process

LARGE = ("torch", "peft", "bitsandbytes", "datasets", "evaluate", "accelerate")


def imports_of(*words: str) -> tuple[str, list[str]]:
    """Run the command in a new process, and return what it printed and which large libraries it imported."""
    program = (
        "import sys\n"
        "from qformer_captioner.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stopped:\n"
        "    print(stopped.code)\n"
        f"print(*sorted({{*{LARGE!r}}} & {{*sys.modules}}))"
    )
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, timeout=120)
    assert done.stderr == ""
    *printed, modules = done.stdout.splitlines()
    return "\n".join(printed), modules.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_large_library(command):
    printed, modules = imports_of(command, "--help")
    assert f"usage: qformer-captioner {command}" in printed
    allowed = {"torch", "accelerate"} if command == "convert" else set()  # its function and its command share a file
    assert set(modules) <= allowed


def test_the_list_of_commands_imports_no_large_library():
    assert imports_of("--help")[1] == []


def test_a_folder_that_cannot_be_pushed_is_refused_without_importing_peft(tmp_path):
    printed, modules = imports_of("push", str(tmp_path), "me/captioner")
    assert "holds neither a captioner" in printed
    assert not {"peft", "bitsandbytes", "datasets", "evaluate"} & {*modules}
