"""Command lines of tests, and processes that they start and kill."""

import subprocess

import psutil


def command_line(**options) -> list[str]:
    """`--name value` for every option that has a value."""
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all that it started: torchrun's workers are in sessions of their own and would go on."""
    family = psutil.Process(process.pid)
    family = [*family.children(recursive=True), family]
    for each in family:
        each.kill()
    psutil.wait_procs(family, timeout=20)
    process.wait()
