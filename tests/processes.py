"""Processes that a test starts and kills."""

import subprocess

import psutil


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all that it started: torchrun's workers are in sessions of their own and would go on."""
    family = psutil.Process(process.pid)
    family = [*family.children(recursive=True), family]
    for each in family:
        each.kill()
    psutil.wait_procs(family, timeout=20)
    process.wait()
