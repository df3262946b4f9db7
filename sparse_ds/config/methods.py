"""Which methods there are, and what each needs of a run: plain facts, known before torch is imported.

A sparse method is one file in `sparse_ds/selection/methods/`; its name is `method.name`. At the top of the file stands
a literal dictionary `FACTS` with the fields of `MethodFacts`, which is read here without importing the file. So a new
method is one new file, and the configuration knows it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

METHOD_FOLDER = files("sparse_ds").joinpath("selection", "methods")


@dataclass(frozen=True)
class MethodFacts:
    """What one method is."""

    summary: str
    """One line."""
    optimizer: Literal["adamw", "sm3"] = "adamw"
    events: Literal["none", "once", "repeated"] = "none"
    """`once`: the first `method.estimation_steps` steps only measure, then the active weights are chosen for good."""
    statistic: Literal["none", "gradient", "gradient_square"] = "none"
    """Of the dense gradient, by which candidates are found: its absolute value, or the sum of the squares of the micro
    batches' shares."""
    keys: tuple[str, ...] = ()
    """Keys of `method` that it uses beside those that follow from the other facts."""
    trains_all: bool = False
    """Every weight trains: no sparse layers at all."""

    @property
    def used_keys(self) -> frozenset[str]:
        """All keys of `method` that have an effect."""
        used = {"name", *self.keys}
        if not self.trains_all:
            used |= {"density", "target_modules", "block_size"}
        if not self.trains_all and self.optimizer == "adamw":
            # SM3 reads the plain indices in every step: it would keep them besides.
            used |= {"index_storage"}
        if self.events != "none":
            used |= {"estimation_steps"}
        if self.events == "repeated":
            used |= {
                "interval_steps",
                "initial_drop_fraction",
                "first_drop_fraction",
                "drop_schedule",
                "drop_criterion",
                "redistribution_factor",
            }
        if self.statistic != "none":
            used |= {"gradient_tile_mib", "gradient_accumulator_limit_gib"}
        return frozenset(used)


FULL = MethodFacts("every weight, trained by AdamW (the dense baseline)", trains_all=True)


@cache
def all_methods() -> dict[str, MethodFacts]:
    """Facts by `method.name`: those of the files in alphabetical order, then `full`."""
    found = {}
    for path in sorted(METHOD_FOLDER.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".py") and not path.name.startswith("_"):
            found[path.name.removesuffix(".py")] = _read_facts(path.read_text(encoding="utf-8"), path.name)
    return {**found, "full": FULL}


def _read_facts(source: str, file_name: str) -> MethodFacts:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["FACTS"]:
            return MethodFacts(**ast.literal_eval(node.value))
    raise AssertionError(f"selection/methods/{file_name} has no literal FACTS")
