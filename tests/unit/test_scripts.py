"""The scripts still fit to the package: every name that they import is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_every_script_can_be_imported() -> None:
    """In a process of their own, since some set environment variables first. Nothing runs: they have a `main`."""
    names = sorted(path.stem for path in SCRIPTS.glob("*.py"))
    assert "bench_load" in names
    program = (
        f"import importlib, sys; sys.path.insert(0, {str(SCRIPTS)!r}); [importlib.import_module(n) for n in {names!r}]"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_list_of_the_code_is_up_to_date() -> None:
    command = [sys.executable, SCRIPTS / "list_code.py", "--check"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0, "run scripts/list_code.py"
