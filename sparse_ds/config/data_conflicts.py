"""Checks of the `data` section against itself and the sections around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_ds.config.schema import DataConfig, ModelConfig, TrainConfig


def find_idle_data_keys(data: DataConfig, model: ModelConfig | None) -> tuple[str, ...]:
    """Keys of `data` that have no effect on this run."""
    idle = () if data.streaming else ("shuffle_buffer",)
    if model is not None and model.task == "sequence_classification":
        idle = (*idle, "template")
    return idle


def data_sources(data: DataConfig) -> list[tuple[str, str]]:
    """(field, what it names) of all training and held-out data."""
    if isinstance(data.train, str):
        sources = [("data.train", data.train)]
    else:
        sources = [(f"data.train[{number}].source", part.source) for number, part in enumerate(data.train)]
    return sources if data.eval is None else [*sources, ("data.eval", data.eval)]


def find_data_conflicts(data: DataConfig, model: ModelConfig | None, train: TrainConfig | None) -> Iterator[str]:
    """One line per conflict."""
    is_classification = model is not None and model.task == "sequence_classification"
    if "shuffle_buffer" in data.model_fields_set and not data.streaming:
        yield "data.shuffle_buffer: given, but only data.streaming uses it. Remove it, or set data.streaming to true."
    if "template" in data.model_fields_set and is_classification:
        yield "data.template: given, but model.task sequence_classification does not use it. Remove it."
    if not isinstance(data.train, str):
        yield from _mixture_conflicts(data, is_classification)
    if not data.streaming:
        return
    if train is not None and train.max_steps is None:
        yield (
            "train.max_steps: missing, and data.streaming needs it: how many samples a stream has is not known before "
            "its end. Give it."
        )
    if data.packing:
        yield "data.packing: got true with data.streaming: rows are packed before training. Set one of them to false."
    if is_classification:
        yield "data.streaming: got true with model.task sequence_classification, whose data is read before. Remove it."


def _mixture_conflicts(data: DataConfig, is_classification: bool) -> Iterator[str]:
    assert not isinstance(data.train, str)
    if is_classification:
        yield "data.train: got a list, expected one source with model.task sequence_classification. Name one."
    for number, part in enumerate(data.train):
        field = f"data.train[{number}]"
        if part.weight is not None and part.num_samples is not None:
            yield f"{field}: weight and num_samples are both given. Give one of the two."
        if part.num_samples is not None and data.streaming:
            yield f"{field}.num_samples: given, but with data.streaming only weight is used. Give weight."
