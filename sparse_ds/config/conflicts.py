"""Checks over several fields. They are collected, so that one message names all conflicts of a file.

The checks take the sections that could be read, by name: a section with a mistake of its own is missing, and only the
checks that need it are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sparse_ds.config.data_conflicts import data_sources, find_data_conflicts
from sparse_ds.config.deepspeed_section import find_deepspeed_problems
from sparse_ds.config.methods import all_methods

if TYPE_CHECKING:
    from sparse_ds.config.schema import CheckpointConfig, DataConfig, MethodConfig, ModelConfig, TrainConfig

OPTIMIZER_KEYS: Mapping[str, tuple[str, ...]] = {
    "momentum": ("sm3",),
    "betas": ("adamw",),
    "moments": ("adamw",),
    "age_warmup_steps": ("adamw",),
}
"""Keys of `optimizer` that only one optimizer uses."""
METHOD_KEYS = (
    "density",
    "target_modules",
    "block_size",
    "index_storage",
    "interval_steps",
    "estimation_steps",
    "initial_drop_fraction",
    "first_drop_fraction",
    "drop_schedule",
    "drop_criterion",
    "redistribution_factor",
    "candidate_source",
    "gradient_tile_mib",
    "gradient_accumulator_limit_gib",
    "random_growth_fraction",
    "sampling",
    "train_biases",
    "train_norms",
)


ADAPTER_KEYS = ("adapters", "base_weights", "verify", "index_encoding")
"""Of `export`: what is about an adapter, which a run that trains every weight does not have."""

TRAIN_KEYS = ("values_gradient", "values_gradient_crossover")
"""Of `train`: what is about sparse weights, which a run that trains every weight does not have."""


def idle_keys(method_name: str) -> dict[str, tuple[str, ...]]:
    """Section -> keys that this method does not use; nothing for a name that is no method."""
    facts = all_methods().get(method_name)
    if facts is None:
        return {}
    optimizer = tuple(key for key, users in OPTIMIZER_KEYS.items() if facts.optimizer not in users)
    if facts.trains_all:
        optimizer = (*optimizer, "moments", "age_warmup_steps")
    return {
        "method": tuple(key for key in METHOD_KEYS if key not in facts.used_keys),
        "optimizer": optimizer,
        "train": TRAIN_KEYS if facts.trains_all else (),
        "export": ADAPTER_KEYS if facts.trains_all else (),
    }


def find_conflicts(sections: Mapping[str, Any]) -> list[str]:
    """One line per conflict between fields, in the order of the sections.

    Args:
        sections: section name -> its model (the plain dict for `deepspeed`), those that could be read.
    """
    found: list[str] = []
    model, data, method = sections.get("model"), sections.get("data"), sections.get("method")
    train, checkpoint = sections.get("train"), sections.get("checkpoint")
    if method is not None:
        found += _method_conflicts(method, sections)
    if model is not None:
        found += _model_conflicts(model, method, train)
        found += _task_conflicts(model, data)
    if data is not None:
        found += find_data_conflicts(data, model, train)
    if train is not None:
        found += _train_conflicts(train, checkpoint)
        found += _best_conflicts(train, checkpoint, data)
    found += _path_conflicts(model, data, train, checkpoint)
    if "deepspeed" in sections:
        found += find_deepspeed_problems(sections["deepspeed"], None if method is None else method.name)
    return found


def find_warnings(sections: Mapping[str, Any]) -> list[str]:
    """One sentence per setting that is allowed but has no effect. All sections must be there."""
    model, data, method, train = sections["model"], sections["data"], sections["method"], sections["train"]
    found = []
    if model.double_quantization and model.quantization == "none":
        found.append("model.double_quantization has no effect: model.quantization is none.")
    has_events = all_methods()[method.name].events != "none"
    if has_events and train.max_steps is not None and train.max_steps < method.estimation_steps:
        found.append(
            f"No drop-and-grow event will happen: the first is at step {method.estimation_steps} "
            f"(method.estimation_steps) and train.max_steps is {train.max_steps}."
        )
    export = sections["export"]
    if export.base_weights == "original" and model.quantization == "none":
        found.append("export.base_weights original has no effect: model.quantization is none.")
    if not export.merged:
        for key, default in (("base_weights", "dequantized"), ("verify", False)):
            if getattr(export, key) != default:
                found.append(f"export.{key} has no effect: export.merged is false.")
    if not data.cache and data.cache_dir is not None:
        found.append("data.cache_dir has no effect: data.cache is false.")
    if data.eval is None:
        if train.eval_interval_steps is not None:
            found.append("train.eval_interval_steps has no effect: data.eval is null.")
        if train.early_stopping_patience is not None:
            found.append("train.early_stopping_patience has no effect: data.eval is null.")
        if data.num_eval_samples is not None:
            found.append("data.num_eval_samples has no effect: data.eval is null.")
    return found


def _method_conflicts(method: MethodConfig, sections: Mapping[str, Any]) -> Iterator[str]:
    facts = all_methods()[method.name]
    export = sections.get("export")
    if export is not None and export.adapters:
        for key in ("train_biases", "train_norms"):
            if getattr(method, key):
                yield (
                    f"export.adapters: got {export.adapters}, but PEFT's formats hold no deltas of biases or norms "
                    f"(method.{key}). Leave one of the two out; the merged model has them."
                )
    if method.index_storage == "compact" and method.block_shape != (1, 1):
        yield (
            f"method.index_storage: got compact, expected int32 with method.block_size {method.block_size}: a whole "
            "block has one position, which takes next to nothing. Leave one of the two out."
        )
    if facts.events == "repeated" and method.interval_steps <= method.estimation_steps:
        yield (
            f"method.interval_steps: got {method.interval_steps}, expected more than method.estimation_steps "
            f"({method.estimation_steps}): the estimation before an event must fit between two events."
        )
    for section, keys in idle_keys(method.name).items():
        given = sections.get(section)
        for key in keys:
            if given is not None and key in given.model_fields_set:
                users = [name for name in all_methods() if key not in idle_keys(name)[section]]
                yield (
                    f"{section}.{key}: given, but method.name {method.name} does not use it. Remove it, or choose a "
                    f"method that does ({', '.join(users)})."
                )


def _model_conflicts(model: ModelConfig, method: MethodConfig | None, train: TrainConfig | None) -> Iterator[str]:
    if method is not None and method.name == "full" and model.quantization != "none":
        yield (
            f"model.quantization: got {model.quantization}, expected none with method.name full: 4-bit weights cannot "
            "be trained themselves. Set model.quantization to none, or choose a sparse method."
        )
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield (
            "model.attention: got flash_attention_2, which computes in 16 bits only, with model.dtype float32. Set "
            "model.dtype to bfloat16 or model.attention to auto."
        )
    if model.attention == "flash_attention_2" and train is not None and train.device == "cpu":
        yield (
            "model.attention: got flash_attention_2, which needs a GPU, with train.device cpu. Set model.attention to "
            "auto."
        )

    if model.liger_kernels and train is not None and train.device == "cpu":
        yield "model.liger_kernels: got true, but these kernels need a GPU, and train.device is cpu. Set it to false."
    if model.liger_kernels and train is not None and train.compile:
        yield (
            "train.compile: got true together with model.liger_kernels, which replaces the same functions. Choose one "
            "of the two."
        )


def find_idle_task_keys(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Section -> keys that only another task, or another initialization of its head, uses."""
    if model.task == "causal_lm":
        return {"model": ("head_initialization", "label_words"), "data": ("labels", "instruction")}
    return {} if model.head_initialization == "label_words" else {"model": ("label_words",)}


def _task_conflicts(model: ModelConfig, data: DataConfig | None) -> Iterator[str]:
    sections = {"model": model, "data": data}
    for section, keys in find_idle_task_keys(model).items():
        for key in keys:
            given = sections[section]
            if given is None or key not in given.model_fields_set or getattr(given, key) is None:
                continue
            wanted = "task sequence_classification" if model.task == "causal_lm" else "head_initialization label_words"
            yield f"{section}.{key}: given, but only model.{wanted} uses it. Remove it, or set model.{wanted}."
    is_classification = model.task == "sequence_classification"
    if data is not None and data.format != "auto" and is_classification != (data.format == "classification"):
        expected = "auto or classification" if is_classification else "another one"
        yield f"data.format: got {data.format}, expected {expected} with model.task {model.task}."
    if data is not None and data.packing and is_classification:
        yield (
            "data.packing: got true, expected false with model.task sequence_classification, which reads the last "
            "token of a row."
        )
    if model.head_initialization == "label_words" and is_classification and model.label_words is None:
        yield "model.label_words: missing, and model.head_initialization label_words needs a word per label. Give them."
    instruction = None if data is None else data.instruction
    if instruction is not None and "{text}" not in instruction:
        yield (
            f"data.instruction: got {instruction!r}, expected a text with {{text}} in it, where the sample goes. Add "
            "it."
        )
    if data is not None and data.tasks and is_classification:
        yield "data.tasks: given, but only model.task causal_lm answers questions. Remove it."
    labels = None if data is None else data.labels
    if labels is not None and len(set(labels)) < len(labels):
        repeated = next(label for label in labels if labels.count(label) > 1)
        yield f"data.labels: holds {repeated!r} more than once. Name every label once."
    if labels is not None and model.label_words is not None and len(model.label_words) != len(labels):
        yield (
            f"model.label_words: got {len(model.label_words)} words for the {len(labels)} labels of data.labels. Give "
            "one word per label, in the same order."
        )


def _train_conflicts(train: TrainConfig, checkpoint: CheckpointConfig | None) -> Iterator[str]:
    if train.max_steps is not None and "num_epochs" in train.model_fields_set:
        yield (
            f"train.num_epochs: got {train.num_epochs} together with train.max_steps {train.max_steps}. Give one of "
            "the two (max_steps null: the epochs count)."
        )
    if train.global_batch_size is not None:
        per_rank = train.micro_batch_size * (train.gradient_accumulation_steps or 1)
        if train.global_batch_size % per_rank != 0:
            accumulation = (
                ""
                if train.gradient_accumulation_steps is None
                else f" x train.gradient_accumulation_steps ({train.gradient_accumulation_steps})"
            )
            yield (
                f"train.global_batch_size: got {train.global_batch_size}, expected a multiple of "
                f"train.micro_batch_size ({train.micro_batch_size}){accumulation}."
            )
    if train.early_stopping_patience is not None and train.eval_interval_steps is None:
        yield (
            f"train.early_stopping_patience: got {train.early_stopping_patience}, but train.eval_interval_steps is "
            "null: there are no evaluations to count. Set it, or remove train.early_stopping_patience."
        )
    if train.values_gradient != "auto" and train.values_gradient_crossover is not None:
        yield (
            f"train.values_gradient_crossover: got {train.values_gradient_crossover}, but train.values_gradient is "
            f"{train.values_gradient}: nothing is chosen by the density. Leave one of the two out."
        )
    if train.overwrite and checkpoint is not None and checkpoint.resume == "auto":
        yield (
            "train.overwrite: got true (begin anew) together with checkpoint.resume auto (go on from the latest "
            "checkpoint). Choose one of the two."
        )


def _best_conflicts(train: TrainConfig, checkpoint: CheckpointConfig | None, data: DataConfig | None) -> Iterator[str]:
    if checkpoint is None or not checkpoint.best:
        return
    missing = []
    if data is not None and data.eval is None:
        missing.append("data.eval")
    if train.eval_interval_steps is None:
        missing.append("train.eval_interval_steps")
    if checkpoint.interval_steps is None:
        missing.append("checkpoint.interval_steps")
    if missing:
        yield (
            f"checkpoint.best: got true, but {' and '.join(missing)} is null: no checkpoint would have a held-out "
            "loss. Give a value, or set checkpoint.best to false."
        )
    elif train.eval_interval_steps and (checkpoint.interval_steps or 0) % train.eval_interval_steps:
        yield (
            f"checkpoint.interval_steps: got {checkpoint.interval_steps}, expected with checkpoint.best a multiple of "
            f"train.eval_interval_steps ({train.eval_interval_steps}), so that every checkpoint has a held-out loss."
        )


def _path_conflicts(
    model: ModelConfig | None, data: DataConfig | None, train: TrainConfig | None, checkpoint: CheckpointConfig | None
) -> Iterator[str]:
    places = {
        "model.name_or_path": model and model.name_or_path,
        **(dict(data_sources(data)) if data is not None else {}),
        "data.template": data and data.template,
        "data.cache_dir": data and data.cache_dir,
        "train.output_dir": train and train.output_dir,
        "checkpoint.resume": checkpoint and checkpoint.resume,
    }
    for field, place in places.items():
        if place is not None and str(place).startswith("~"):
            yield f"{field}: got {place}, expected a path written out: ~ is not expanded."
