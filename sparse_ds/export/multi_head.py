"""Several classifications in one model: a shared merged body and one head for each task, one forward pass for all.

    body                the deltas of all tasks put together (by default their sum)
    score.weight        the heads one below the other: rows [0, n_1) of the first task, [n_1, n_1 + n_2) of the second
    logits [B, sum n]   `task_logits` cuts them into one tensor for each task

It is a plain `AutoModelForSequenceClassification` folder. Its labels are `task/label`, and config.json says which rows
are whose: `"sparse_ds_heads": {task: [first row, row behind the last]}`. A softmax has to be taken over the rows of one
task, never over all.

Method: SpaRTA, Rios et al. 2025, arXiv 2502.15975, on merging: the adapters of several tasks are merged into one body,
and every task keeps the head that was trained with its own adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, Deltas
from sparse_ds.adapter.combining import Combination, CombinedAdapter
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import MergeReport, merge_adapter

HEADS_KEY = "sparse_ds_heads"
HEAD = "score.weight"


class MultiHeadAdapter(Adapter):
    """The adapters of several classifications as one, with all their heads as one.

    Args:
        adapters: task -> its adapter, whose only tensor that trained as a whole is the head. Task names have no `/`.
        combination: how the bodies are put together.
        allow_other_names: the base may have another name in each of them.

    Raises:
        UserError: an adapter that is no classification or trained more than a head as a whole, an unusable task name,
            different pad tokens, or adapters that cannot be combined (`CombinedAdapter`).

    Attributes:
        bodies: the adapters without their heads.
        heads: task -> (its first row, the row behind its last) of the head.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        combination: Combination | None = None,
        *,
        allow_other_names: bool = False,
    ) -> None:
        _check_tasks(adapters)
        bodies = self.bodies = [_Body(adapter) for adapter in adapters.values()]
        self._adapters = dict(adapters)
        self._body = CombinedAdapter(bodies, combination, allow_other_names=allow_other_names)
        self.folder = self._body.folder
        self.heads: dict[str, tuple[int, int]] = {}
        labels: list[str] = []
        for task, adapter in adapters.items():
            first = len(labels)
            labels += [f"{task}/{label}" for label in adapter.config.labels or ()]
            self.heads[task] = (first, len(labels))
        num_cols = bodies[0].head_shape[1]
        self.config = self._body.config.model_copy(
            update={
                "method": f"multi_head_{self._body.config.method}",
                "dense_shapes": {HEAD: (len(labels), num_cols)},
                "labels": tuple(labels),
                "pad_token_id": next(iter(adapters.values())).config.pad_token_id,
            }
        )

    @property
    def sources(self) -> tuple[Path, ...]:
        return self._body.sources

    @property
    def model_config(self) -> Mapping[str, Any]:
        # Labels of several tasks at once are no single label.
        return {HEADS_KEY: {task: list(rows) for task, rows in self.heads.items()}, "problem_type": None}

    @property
    def model_card_section(self) -> str:
        return "\n".join(
            [
                "## Heads",
                "",
                "One forward pass gives the logits of all tasks. Take a softmax over the rows of one task, never over "
                "all:",
                "",
                "| task | rows |",
                "|---|---|",
                *(f"| {task} | {first} to {end - 1} |" for task, (first, end) in self.heads.items()),
                "",
                "```python",
                "logits = model(**inputs).logits",
                f"by_task = {{task: logits[:, first:end] for task, (first, end) in model.config.{HEADS_KEY}.items()}}",
                "```",
            ]
        )

    def read(self, module_name: str) -> Deltas:
        return self._body.read(module_name)

    def read_dense(self, name: str) -> Tensor:
        """All heads, one below the other: fp32 [sum of the labels, hidden size]."""
        return torch.cat([adapter.read_dense(name) for adapter in self._adapters.values()])


def write_multi_head(
    adapters: Mapping[str, Adapter],
    output: str | Path,
    *,
    base: str | Path | None = None,
    combination: Combination | None = None,
    allow_other_names: bool = False,
    dtype: str = "bfloat16",
    max_shard_size: str | int = "5GB",
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> MergeReport:
    """Write the base with the merged body and all heads as a dense checkpoint folder; all of it or nothing.

    Memory: that of `merge_adapter`, and one module of every adapter.

    Args:
        adapters: task -> adapter, as for `MultiHeadAdapter`.
        output: folder to make.
        base: folder or hub name of the checkpoint. None: the one that the first adapter names.
        combination: how the bodies are put together. None: their sum.
        allow_other_names: the base may have another name in each adapter.
        dtype, max_shard_size, tokenizer, device, overwrite: as of `merge_adapter`. The heads trained in fp32 and are
            rounded to `dtype`.

    Raises:
        UserError: as of `MultiHeadAdapter` and `merge_adapter`. Raised before anything is written.
        RuntimeError: not enough room on the disk, or writing failed; nothing is left behind.
    """
    adapter = MultiHeadAdapter(adapters, combination, allow_other_names=allow_other_names)
    return merge_adapter(
        adapter.config.base.name if base is None else base,
        adapter,
        output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        device=device,
        overwrite=overwrite,
    )


def task_logits(logits: Tensor, config: Any) -> dict[str, Tensor]:
    """Cut the logits of a multi-head model into one tensor for each task.

    Args:
        logits: [..., rows of all heads], as the model gives them.
        config: `model.config`, or the content of config.json.

    Returns:
        task -> [..., its labels], views of `logits`, in the order of the heads.

    Raises:
        UserError: the model has no heads by task, or their rows are not those of the logits.
    """
    heads = config.get(HEADS_KEY) if isinstance(config, Mapping) else getattr(config, HEADS_KEY, None)
    if not heads:
        raise UserError(f"config.json has no '{HEADS_KEY}'; expected the folder of a multi-head model.")
    num_rows = max(end for _, end in heads.values())
    if logits.shape[-1] != num_rows:
        raise UserError(
            f"The logits have {logits.shape[-1]} columns, expected {num_rows}, one for each row of the heads."
        )
    # config.json has its keys in the order of the alphabet.
    in_order = sorted(heads.items(), key=lambda item: item[1][0])
    return {task: logits[..., first:end] for task, (first, end) in in_order}


class _Body(Adapter):
    """An adapter without its head, and without what belongs to the head."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self.folder = adapter.folder
        self.head_shape = adapter.config.dense_shapes[HEAD]
        self.config = adapter.config.model_copy(update={"dense_shapes": {}, "labels": None, "pad_token_id": None})

    @property
    def sources(self) -> tuple[Path, ...]:
        return self._adapter.sources

    def read(self, module_name: str) -> Deltas:
        return self._adapter.read(module_name)

    def read_dense(self, name: str) -> Tensor:
        raise KeyError(name)


def _check_tasks(adapters: Mapping[str, Adapter]) -> None:
    if not adapters:
        raise UserError("No adapter was given for a multi-head model; expected one for each task.")
    for task, adapter in adapters.items():
        _check_task(task, adapter)
    pad_tokens = {task: adapter.config.pad_token_id for task, adapter in adapters.items()}
    if len(set(pad_tokens.values())) > 1:
        found = ", ".join(f"{pad} of '{task}'" for task, pad in pad_tokens.items())
        raise UserError(
            f"The adapters were trained with different pad tokens ({found}), but one model has one. Train them with "
            "one tokenizer."
        )


def _check_task(task: str, adapter: Adapter) -> None:
    config = adapter.config
    if not task or "/" in task:
        raise UserError(f"A task is named '{task}'; expected a name without '/', since labels become 'task/label'.")
    if config.task != "sequence_classification" or config.labels is None or config.pad_token_id is None:
        raise UserError(
            f"Adapter '{adapter.folder}' of task '{task}' is of '{config.task}', which has no head of its own; "
            "expected one of a run with model.task=sequence_classification. Merge such adapters into one without heads."
        )
    shape = config.dense_shapes.get(HEAD)
    if set(config.dense_shapes) != {HEAD} or shape is None or len(shape) != 2 or shape[0] != len(config.labels):
        raise UserError(
            f"Adapter '{adapter.folder}' of task '{task}' trained {dict(config.dense_shapes)} as a whole, expected "
            f"'{HEAD}' alone, with {len(config.labels)} rows for its labels."
        )
