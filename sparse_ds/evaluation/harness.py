"""Tasks of lm-evaluation-harness (`lm_eval`, an optional package) on a model in this process.

A task is a name that the harness knows (`piqa`), or a local YAML file in the harness's own format. Relative
`data_files` of such a file are looked for in a folder of the user's choice, by default that of the YAML file.
Nothing of the harness is changed: its prompts, few-shot samples, filters and metrics are the published ones.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_ds.config.errors import UserError
from sparse_ds.evaluation.score_table import TableRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

YAML_SUFFIXES = (".yaml", ".yml")
INSTALL = "pip install 'lm_eval>=0.4.13,<0.5'"
BOOTSTRAP_ITERATIONS = 1000
"""Resamples for standard errors of metrics that are no means (perplexity)."""


class HarnessTasks:
    """Tasks found and their data loaded, before any model is.

    Args:
        names: names or paths of YAML files.
        data_folder: where relative `data_files` of YAML files are; None: beside each file.

    Raises:
        UserError: `lm_eval` is not installed, an unknown name (with the nearest), no such file, a task that the
            harness cannot read, data that cannot be loaded.
    """

    def __init__(self, names: Sequence[str], data_folder: Path | None) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            # The index of all its tasks takes seconds, and files need none.
            needs_index = not all(name.endswith(YAML_SUFFIXES) for name in names)
            manager = import_module("lm_eval.tasks").TaskManager(include_defaults=needs_index)
        except ImportError as error:
            raise UserError(
                f"task {names[0]}: no data file, so it is a task of lm-evaluation-harness, which is not installed "
                f"here ({error}). Install it: {INSTALL}; or give a file ({names[0]}.jsonl)."
            ) from None
        self._tasks: list[Any] = []
        for name in names:
            loaded = _load(manager, name, data_folder)
            self._tasks += [*loaded["groups"].values()] or [*loaded["tasks"].values()]
        self._manager = manager

    def score(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        num_samples: int | None,
        num_fewshot: int | None,
    ) -> tuple[list[TableRow], dict[str, Any]]:
        """Ask the model; (rows for the table, the harness's `results`, `versions` and `n-shot`).

        Args:
            model: of transformers, in evaluation mode, on its device.
            tokenizer: the model's.
            batch_size: requests of one forward pass.
            max_length: tokens that the model takes at most.
            num_samples: at most so many of each task; None: all.
            num_fewshot: worked samples in front of each question; None: as the task says.
        """
        # By default the harness forks a process per core to resample, from a process that runs torch's threads.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        generator_state = torch.get_rng_state()
        adapted = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
        )
        found = import_module("lm_eval").simple_evaluate(
            model=adapted,
            tasks=self._tasks,
            num_fewshot=num_fewshot,
            limit=num_samples,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
            task_manager=self._manager,
        )
        torch.set_rng_state(generator_state)
        assert found is not None
        rows = [row for task, metrics in found["results"].items() for row in _rows(task, metrics, found)]
        return rows, {key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found}


def _load(manager: Any, name: str, data_folder: Path | None) -> Any:
    is_file = name.endswith(YAML_SUFFIXES)
    path = Path(name).expanduser().resolve()
    if is_file and not path.is_file():
        raise UserError(f"task {name}: no such file. Give a YAML file of a task, or the name of one.")
    if not is_file and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"task {name}: neither a file nor a task that lm-evaluation-harness knows.{hint} `lm_eval ls tasks` lists "
            "those that it knows."
        )
    folder = Path.cwd() if not is_file else path.parent if data_folder is None else data_folder
    if not folder.is_dir():
        raise UserError(f"--data-folder: {folder} is no folder.")
    try:
        with chdir(folder):
            return manager.load([str(path) if is_file else name])
    except Exception as error:  # datasets, yaml, jinja2 and the harness raise kinds of their own
        reason = " ".join(str(error).split())[:300]
        advice = (
            f"Its data files are looked for in {folder}; --data-folder names another."
            if is_file
            else "Its data comes from the model hub: check the network, or give a YAML file with data of your own."
        )
        raise UserError(f"task {name} cannot be loaded ({type(error).__name__}: {reason}). {advice}") from error


def _rows(task: str, metrics: dict[str, Any], found: dict[str, Any]) -> list[TableRow]:
    """`metric,filter` -> value; the harness puts standard errors beside them as `metric_stderr,filter`."""
    rows = []
    num_samples = found.get("n-samples", {}).get(task, {}).get("effective")
    num_fewshot = found.get("n-shot", {}).get(task)
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        note = f"lm_eval, {num_fewshot}-shot" if num_fewshot is not None else "lm_eval"
        rows.append(
            TableRow(task, name, float(value), stderr if isinstance(stderr, float) else None, num_samples, note)
        )
    return rows
