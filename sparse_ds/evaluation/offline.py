"""`sparse-ds eval`: a saved model or adapter, and tasks, in one process.

A task is
- a data file, or a JSON object with the fields of an entry of `data.tasks`: asked and graded by this package, with the
  same numbers as in a run;
- a YAML file, or any other name: a task of lm-evaluation-harness.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

from sparse_ds.config.errors import UserError
from sparse_ds.config.tasks import TaskConfig
from sparse_ds.data.reading import KNOWN_SUFFIXES
from sparse_ds.evaluation.harness import YAML_SUFFIXES, HarnessTasks
from sparse_ds.evaluation.questions import read_tasks
from sparse_ds.evaluation.saved_models import open_saved_model
from sparse_ds.evaluation.score_table import TableRow, rows_of_score
from sparse_ds.evaluation.scoring import TaskScorer, longest_input

logger = logging.getLogger("sparse_ds")


@dataclass(frozen=True)
class OfflineScores:
    """The table, and the same with all details in plain JSON types."""

    rows: list[TableRow]
    record: dict[str, Any]


def evaluate_saved(
    model: str,
    tasks: Sequence[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    batch_size: int = 8,
    num_samples: int | None = None,
    num_fewshot: int | None = None,
    data_folder: Path | None = None,
) -> OfflineScores:
    """Score a model on tasks. All tasks are read and checked before the model is loaded.

    Args:
        model: folder, hub name, run or adapter (see `saved_models`).
        tasks: as in the module docstring.
        base: of an adapter, instead of the one that it names.
        revision: of a hub name.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        batch_size: texts or prompts of one forward pass.
        num_samples: at most so many questions of each task; None: all.
        num_fewshot: worked samples before a question, harness tasks only; None: as the task says.
        data_folder: of the data files of YAML tasks; None: beside them.

    Raises:
        UserError: anything wrong with what was given.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size: got {batch_size}, expected 1 or more.")
    if num_samples is not None and num_samples < 1:
        raise UserError(f"--limit: got {num_samples}, expected 1 or more.")
    own, of_harness = _split(tasks)
    if not of_harness:
        for option, value in (("--num-fewshot", num_fewshot), ("--data-folder", data_folder)):
            if value is not None:
                raise UserError(f"{option}: only tasks of lm-evaluation-harness use it, and none is given. Remove it.")
    if num_samples is not None:
        own = [
            task.model_copy(update={"num_samples": min(num_samples, task.num_samples or num_samples)}) for task in own
        ]
    question_sets = read_tasks(own, "--tasks")
    harness = HarnessTasks(of_harness, data_folder) if of_harness else None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: list[TableRow] = []
    with open_saved_model(model, base=base, revision=revision, dtype=dtype, device=device) as saved:
        logger.info("%s: %s, on %s", saved.description, str(saved.model.dtype).removeprefix("torch."), device)
        max_length = longest_input(saved.model.config)
        record: dict[str, Any] = {"model": saved.description, "dtype": str(saved.model.dtype), "tasks": []}
        # All are encoded before the first is asked: a mistake ends the command early.
        for scorer in [TaskScorer(task, saved.tokenizer, max_length) for task in question_sets]:
            score = scorer.score(saved.model, batch_size, torch.device(device))
            if score.num_truncated:
                logger.warning(
                    "task %s: %d texts are longer than the %d tokens that the model takes and lose their beginning",
                    score.task,
                    score.num_truncated,
                    max_length,
                )
            rows += rows_of_score(score)
            record["tasks"].append(score.to_record())
        if harness is not None:
            found, record["lm_eval"] = harness.score(
                saved.model,
                saved.tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                num_samples=num_samples,
                num_fewshot=num_fewshot,
            )
            rows += found
    return OfflineScores(rows, record)


def _split(tasks: Sequence[str]) -> tuple[list[TaskConfig], list[str]]:
    """(tasks of this package, tasks of the harness)"""
    own, of_harness = [], []
    for task in tasks:
        if task.lstrip().startswith("{"):
            own.append(_parse(task))
        elif not task.endswith(YAML_SUFFIXES) and (Path(task).suffix.lower() in KNOWN_SUFFIXES or Path(task).exists()):
            own.append(TaskConfig(source=task))
        else:
            of_harness.append(task)
    return own, of_harness


def _parse(text: str) -> TaskConfig:
    try:
        return TaskConfig.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"--tasks: {text[:60]} is no JSON: {error.msg} (column {error.colno}).") from None
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        known = ", ".join(TaskConfig.model_fields)
        raise UserError(f"--tasks: {text[:60]}: {'; '.join(problems)}. The fields are {known}.") from None
