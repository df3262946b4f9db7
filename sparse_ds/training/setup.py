"""The parts of a run built from its configuration: model, optimizer, Trainer arguments, events."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel, TrainingArguments

from sparse_ds.config import RunConfig, build_deepspeed_config
from sparse_ds.distributed.born_partitioned import PartitionedParameters
from sparse_ds.distributed.process_group import agreement
from sparse_ds.distributed.zero3_partitions import MasterWeights, full_shape, local_partition
from sparse_ds.drop_grow.event import DropAndGrow
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.build import (
    BaseSettings,
    SparseSettings,
    build_dense_model,
    build_sparse_model,
    empty_model,
    plan_layouts,
)
from sparse_ds.model.classification_head import Classification, initial_head, install_head
from sparse_ds.optim.flat_segment import FlatSegment
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.selection.apply_event import EventResult
from sparse_ds.selection.schedule import is_event, num_to_replace
from sparse_ds.selection.sft_ma import select_sft_ma
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""`optimizer.schedule` -> transformers' name; all begin with the warm-up."""
DEFAULT_EPS = 1e-8
"""AdamW: torch's default. SM3: the value of the public reference of SFT, with which the paper's rates were found."""


@dataclass(frozen=True)
class PreparedModel:
    """A model whose parameters are all partitioned, and its sparse layers by name (none for `full`)."""

    model: PreTrainedModel
    layers: dict[str, SparseLinear]
    num_trained_weights: int
    num_weights: int
    classification: Classification | None = None

    @property
    def dense_parameters(self) -> dict[str, Parameter]:
        """Name -> parameter that trains as a whole: the head of a classification, everything for `full`."""
        sparse = {id(layer.values) for layer in self.layers.values()}
        named = self.model.named_parameters()
        return {name: each for name, each in named if each.requires_grad and id(each) not in sparse}


def prepare_model(
    config: RunConfig,
    checkpoint: BaseCheckpoint,
    device: torch.device,
    classification: Classification | None = None,
) -> PreparedModel:
    """Build the model of the run.

    Args:
        config: the run.
        checkpoint: the base model.
        device: where tensors are quantized.
        classification: what a run with `model.task` sequence_classification found in its data; else None.

    Collectives: agreements on success; every rank must call it.
    """
    base = BaseSettings(
        dtype=getattr(torch, config.model.dtype),
        nf4=config.model.quantization == "nf4",
        double_quantization=config.model.double_quantization,
        attention=config.model.attention,
    )
    offload: dict[str, Any] = config.deepspeed.get("zero_optimization", {}).get("offload_param") or {}
    partitioned = PartitionedParameters(
        offload_device=offload.get("device", "none"), pin_memory=offload.get("pin_memory", False)
    )
    layouts: dict[str, SparseLayout] = {}
    with agreement("building the model"):
        model = empty_model(checkpoint, base, classification)
        num_weights = sum(parameter.numel() for parameter in model.parameters())
        num_head_weights = 0
        if classification is not None:
            head_LD = initial_head(checkpoint, classification, model.config.hidden_size, config.train.seed)
            dtype = base.dtype if config.method.name == "full" else torch.float32
            install_head(model, head_LD, dtype, partitioned)
            num_head_weights = head_LD.numel()
        if config.method.name == "full":
            build_dense_model(checkpoint, model, base, partitioned)
        else:
            sparse = SparseSettings(config.method.target_modules, config.method.density, config.train.seed)
            layouts = plan_layouts(model, sparse)
            build_sparse_model(checkpoint, model, layouts, base, config.train.seed, partitioned, device)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    num_sparse = sum(layout.num_active for layout in layouts.values())
    num_trained = num_sparse + num_head_weights if layouts else num_weights
    return PreparedModel(model, layers, num_trained, num_weights, classification)


def make_optimizer(config: RunConfig, parameters: list[Parameter]) -> torch.optim.Optimizer:
    """SM3 for `sft_ma`, AdamW for `full`."""
    settings = config.optimizer
    eps = DEFAULT_EPS if settings.eps is None else settings.eps
    if config.method.name == "full":
        return torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=settings.betas, eps=eps, weight_decay=settings.weight_decay
        )
    return SparseSM3(
        parameters,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        eps=eps,
    )


def make_training_arguments(
    config: RunConfig, world_size: int, largest_num_trained: int, output_dir: Path, device: torch.device
) -> TrainingArguments:
    """Trainer's arguments; every value comes from the configuration."""
    plan = config.batch_plan(world_size)
    return TrainingArguments(
        output_dir=str(output_dir),
        deepspeed=build_deepspeed_config(config, world_size, largest_num_trained),
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        per_device_eval_batch_size=config.train.eval_micro_batch_size or plan.micro_batch_size,
        max_steps=-1 if config.train.max_steps is None else config.train.max_steps,
        num_train_epochs=config.train.num_epochs,
        learning_rate=config.optimizer.learning_rate,
        lr_scheduler_type=SCHEDULES[config.optimizer.schedule],
        # Trainer reads a number below 1 as a share of all steps.
        warmup_steps=config.optimizer.warmup_fraction,
        max_grad_norm=config.optimizer.max_grad_norm,
        bf16=config.model.dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        seed=config.train.seed,
        data_seed=config.train.seed,
        activation_checkpointing=config.train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.train.gradient_checkpointing else None,
        logging_steps=config.monitor.log_interval_steps,
        logging_nan_inf_filter=False,
        eval_strategy="no" if config.train.eval_interval_steps is None or config.data.eval is None else "steps",
        eval_steps=config.train.eval_interval_steps,
        save_strategy="no" if config.checkpoint.interval_steps is None else "steps",
        save_steps=config.checkpoint.interval_steps or 0,
        report_to=list(config.monitor.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=True,
    )


def bind_optimizer(
    optimizer: SparseSM3,
    layers: dict[str, SparseLinear],
    master: MasterWeights,
    dense: Mapping[str, Parameter] | None = None,
) -> None:
    """Tell SM3 which entries of which matrix lie where in DeepSpeed's flat master weights.

    Args:
        optimizer: SM3.
        layers: the sparse layers by name.
        master: the engine's master weights.
        dense: parameters that train as a whole, by name.

    Collectives: none; every rank must call it (the accumulators must have one layout on all of them).
    """
    name_of = {id(layer.values): name for name, layer in layers.items()}
    name_of |= {id(parameter): name for name, parameter in (dense or {}).items()}
    for sub_group, flat in enumerate(master.flats):
        segments = []
        for parameter in master.parameters_of(sub_group):
            name = name_of[id(parameter)]
            where = master.slice_of(parameter)
            if name in layers:
                layer = layers[name]
                segments.append(
                    FlatSegment(
                        name=name,
                        offset=where.offset,
                        length=where.num_real,
                        num_rows=layer.layout.num_rows,
                        num_cols=layer.layout.num_cols,
                        indices=local_partition(layer.indices),
                    )
                )
            else:
                num_rows, *others = full_shape(parameter)
                segments.append(
                    FlatSegment(
                        name=name,
                        offset=where.offset,
                        length=where.num_real,
                        num_rows=num_rows,
                        num_cols=math.prod(others),
                        start=where.start,
                    )
                )
        optimizer.register_flat(flat, segments)


def make_drop_and_grow(
    optimizer: SparseSM3, layers: dict[str, SparseLinear], master: MasterWeights, device: torch.device
) -> DropAndGrow:
    """SFT-MA's events."""

    def select(
        name: str, layout: SparseLayout, indices_K: torch.Tensor, values_K: torch.Tensor, num_to_replace: int
    ) -> EventResult:
        row_acc_O, col_acc_I = optimizer.row_accumulator(name), optimizer.col_accumulator(name)
        return select_sft_ma(indices_K, values_K, row_acc_O.to(device), col_acc_I.to(device), num_to_replace)

    momenta = [optimizer.state[flat]["exp_avg"] for flat in master.flats if "exp_avg" in optimizer.state[flat]]
    return DropAndGrow(layers, master, [momenta] if momenta else [], select, device)


def replacement_schedule(
    config: RunConfig, layers: dict[str, SparseLinear], total_steps: int
) -> Callable[[int], dict[str, int] | None]:
    """step -> how many weights of each tensor are replaced after it, or None without an event."""
    method = config.method

    def schedule(step: int) -> dict[str, int] | None:
        if not is_event(step, interval_steps=method.interval_steps, estimation_steps=method.estimation_steps):
            return None
        return {
            name: num_to_replace(
                step,
                num_active=layer.layout.num_active,
                total_steps=total_steps,
                interval_steps=method.interval_steps,
                estimation_steps=method.estimation_steps,
                initial_drop_fraction=method.initial_drop_fraction,
            )
            for name, layer in layers.items()
        }

    return schedule
