"""Every file of the package with the first sentence of its docstring: writes docs/code.md.

python scripts/list_code.py            writes it
python scripts/list_code.py --check    exit code 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "code.md"
LAYERS = (
    "cli.py",
    "commands",
    "training",
    "evaluation",
    "export",
    "adapter",
    "checkpoint",
    "drop_grow",
    "model",
    "monitor",
    "data",
    "selection",
    "optim",
    "sparse",
    "kernels",
    "distributed",
    "embedded",
    "config",
)
"""From the top: a layer imports only what is below it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look whether docs/code.md is up to date")
    arguments = parser.parse_args()
    page = make_page()
    if arguments.check:
        return 0 if PAGE.read_text(encoding="utf-8") == page else 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


def make_page() -> str:
    """The whole page."""
    package = ROOT / "sparse_ds"
    found = {path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    missing = found - {"__init__.py"} ^ set(LAYERS)
    assert not missing, f"LAYERS and sparse_ds/ differ: {missing}"
    lines = [
        "# The code, file by file",
        "",
        "From the top layer to the lowest; a layer imports only what is below it (import-linter checks it). Made by",
        "`scripts/list_code.py` from the docstrings.",
        "",
    ]
    for name in LAYERS:
        path = package / name
        if path.is_file():
            lines += [f"## `{name}`", "", first_sentence(path), ""]
            continue
        lines += [f"## `{name}/`", "", first_sentence(path / "__init__.py"), "", "| file | |", "|---|---|"]
        files = sorted(file for file in path.rglob("*.py") if file.name != "__init__.py")
        lines += [f"| `{file.relative_to(path)}` | {first_sentence(file)} |" for file in files]
        lines.append("")
    return "\n".join(lines)


def first_sentence(path: Path) -> str:
    """The first paragraph of a module's docstring up to its first full stop, in one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path} has no docstring"
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    # Three dots end no sentence.
    return re.split(r"(?<=[^.]\.)\s", paragraph)[0].replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
