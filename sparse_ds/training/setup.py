"""The parts of a run built from its configuration: model, optimizer, Trainer arguments, events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel, TrainingArguments

from sparse_ds.config import RunConfig, UserError, build_deepspeed_config
from sparse_ds.config.deepspeed_section import BlockSizes, gathers_blocks
from sparse_ds.config.methods import all_methods
from sparse_ds.distributed.block_gather import gather_as_one
from sparse_ds.distributed.born_partitioned import PartitionedParameters
from sparse_ds.distributed.process_group import agreement, rank, world_size
from sparse_ds.distributed.zero3_partitions import MasterWeights, OwnedSlice, full_shape, full_size
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.event import DropAndGrow
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.kernels.crossover import AUTO, PathChoice
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings, check_base, list_base_tensors
from sparse_ds.model.build import (
    SparseSettings,
    build_dense_model,
    build_sparse_model,
    empty_model,
    plan_layouts,
    plan_vector_layouts,
)
from sparse_ds.model.chunked_loss import chunked_head_loss
from sparse_ds.model.classification_head import Classification, initial_head, install_head
from sparse_ds.model.compiled_pieces import compiled_pieces
from sparse_ds.model.kinds import KINDS
from sparse_ds.model.liger_pieces import liger_pieces
from sparse_ds.model.loading import LoadReport, load_base, planned_bytes
from sparse_ds.model.pieces import Pieces, eager_loss, install_pieces
from sparse_ds.model.targets import find_blocks
from sparse_ds.monitor.peak_tflops import known_peak_tflops
from sparse_ds.monitor.progress import ProgressBytes
from sparse_ds.optim.flat_segment import FlatSegment
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.selection.registry import find_growth
from sparse_ds.selection.schedule import is_event, num_to_replace
from sparse_ds.sparse.index_storage import index_parameters, own_indices
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLayer, SparseLinear

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""`optimizer.schedule` -> transformers' name; all begin with the warm-up."""
DEFAULT_EPS = 1e-8
"""AdamW: torch's default. SM3: the value of the public reference of SFT, with which the paper's rates were found."""


@dataclass(frozen=True)
class PreparedModel:
    """A model whose parameters are all partitioned, and its sparse layers by name (none for `full`)."""

    model: PreTrainedModel
    layers: dict[str, SparseLayer]
    num_trained_weights: int
    num_weights: int
    loaded: LoadReport
    classification: Classification | None = None
    gathered_block: BlockSizes | None = None
    """The largest block, where the tensors of a block are gathered together."""

    @property
    def matrices(self) -> dict[str, SparseLinear]:
        """The sparse layers without biases and norms: what events may change."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, SparseLinear)}

    @property
    def frozen_parameters(self) -> dict[str, Parameter]:
        """Name -> parameter of the base, as it was loaded; indices are not among them."""
        indices = {id(each) for layer in self.layers.values() for each in index_parameters(layer).values()}
        named = self.model.named_parameters()
        return {name: each for name, each in named if not each.requires_grad and id(each) not in indices}

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
    *,
    show_progress: bool = False,
) -> PreparedModel:
    """Build the model of the run and load its base.

    Args:
        config: the run.
        checkpoint: the base model.
        device: where tensors are quantized.
        classification: what a run with `model.task` sequence_classification found in its data; else None.
        show_progress: with a bar, on this rank.

    Collectives: agreements on success, those of `load_base`; every rank must call it.
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
    sparse = sparse_settings(config)
    layouts: dict[str, SparseLayout] = {}
    path_choice = AUTO
    with agreement("building the model"):
        model = empty_model(checkpoint, base, classification)
        install_pieces(model, find_pieces(config, model, device))
        num_weights = sum(parameter.numel() for parameter in model.parameters())
        trains_all, num_head_weights = all_methods()[config.method.name].trains_all, 0
        if classification is not None:
            head = initial_head(checkpoint, classification, model, config.train.seed)
            install_head(model, head, base.dtype if trains_all else torch.float32, partitioned)
            num_head_weights = sum(tensor.numel() for tensor in head.values())
        vectors: dict[str, SparseLayout] = {}
        if not trains_all:
            layouts = plan_layouts(model, sparse, world_size())
            check_accumulator_limit(config, layouts, world_size())
            path_choice = choose_path(config, layouts)
            vectors = plan_vector_layouts(model, layouts, sparse)
        tensors = list_base_tensors(model, layouts, base)
        tied_copies = check_base(checkpoint, tensors, model, config.model.unused_tensors)
        num_bytes = planned_bytes(checkpoint, tensors, rank(), world_size())
        made = (
            build_dense_model(model, base, partitioned)
            if trains_all
            else build_sparse_model(model, layouts, base, sparse, partitioned, vectors)
        )
    tensors = [replace(tensor, parameters=made.pop(tensor.name)) for tensor in tensors]
    assert not made, f"parameters that nothing fills: {list(made)}"
    with ProgressBytes("loading the base model", num_bytes, enabled=show_progress) as progress:
        loaded = load_base(checkpoint, tensors, device, tied_copies=tied_copies, on_bytes=progress.add)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    for layer in layers.values():
        if isinstance(layer, SparseLinear):
            layer.path_choice = path_choice
    num_sparse = sum(layer.num_active for layer in layers.values())
    num_trained = num_sparse + num_head_weights if layouts else num_weights
    gathered_block = gather_blocks_if_better(config, model) if layouts else None
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return PreparedModel(model, layers, num_trained, num_weights, loaded, classification, gathered_block)


def sparse_settings(config: RunConfig) -> SparseSettings:
    """Which weights train, of a run with sparse layers."""
    method = config.method
    return SparseSettings(
        method.target_modules,
        method.density,
        config.train.seed,
        bernoulli=method.sampling == "bernoulli",
        block_size=method.block_shape,
        slots_per_active=method.redistribution_factor or 1.0,
        train_biases=method.train_biases,
        train_norms=method.train_norms,
        index_storage=method.index_storage,
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each transformer block, and compute the rest again in backward.

    transformers also lets the output of the embedding require a gradient, which the kind of checkpointing that enters
    autograd anew would need. Here it would only make ZeRO-3 gather a frozen embedding again, at the end of backward.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def gather_blocks_if_better(config: RunConfig, model: nn.Module) -> BlockSizes | None:
    """`gather_blocks` where a run of this configuration does so; else None."""
    return gather_blocks(model) if gathers_blocks(config, world_size(), _largest_block(model)) else None


def gather_blocks(model: nn.Module) -> BlockSizes:
    """Have the tensors of each transformer block gathered together; before the engine is made. The largest block."""
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    for block in blocks:
        gather_as_one(block)
    return _largest_block(model)


def _largest_block(model: nn.Module) -> BlockSizes:
    blocks = [list(model.get_submodule(name).parameters()) for name in find_blocks(model)]
    return BlockSizes(
        num_elements=max(sum(full_size(each) for each in block) for block in blocks),
        num_trained=max(sum(full_size(each) for each in block if each.requires_grad) for block in blocks),
    )


def choose_path(config: RunConfig, layouts: Mapping[str, SparseLayout]) -> PathChoice:
    """How the gradient of the values is computed.

    Raises:
        UserError: a crossover is given for a shape that no target matrix has.
    """
    crossover = config.train.values_gradient_crossover
    if not isinstance(crossover, dict):
        return PathChoice(config.train.values_gradient, crossover)
    shapes = {f"{layout.num_rows}x{layout.num_cols}" for layout in layouts.values()}
    unknown = sorted(set(crossover) - shapes)
    if unknown:
        raise UserError(
            f"train.values_gradient_crossover: got {', '.join(unknown)}, but no target matrix has this shape (output x "
            f"input); expected some of {', '.join(sorted(shapes))}."
        )
    by_shape = {(int(shape.split("x")[0]), int(shape.split("x")[1])): value for shape, value in crossover.items()}
    return PathChoice(config.train.values_gradient, crossover_of=by_shape)


def find_pieces(config: RunConfig, model: PreTrainedModel, device: torch.device) -> Pieces:
    """What the run computes with between the linear layers, where it is not transformers' own: at least the loss.

    Raises:
        UserError: it cannot be had for this architecture, on this device or in this installation.
    """
    if not (config.model.liger_kernels or config.train.compile):
        return Pieces(head_loss=chunked_head_loss(eager_loss))
    field = "model.liger_kernels" if config.model.liger_kernels else "train.compile"
    if KINDS[model.config.model_type].is_encoder:
        raise UserError(
            f"{field}: got true, but {model.config.model_type} models have other norms and activations than those that "
            "are replaced. Set it to false."
        )
    if not config.model.liger_kernels:
        return compiled_pieces(device)
    if device.type != "cuda":
        raise UserError(f"{field}: got true, but these kernels need a GPU, and there is none here. Set it to false.")
    return liger_pieces()


def make_optimizer(config: RunConfig, parameters: list[Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the method: SM3 or AdamW with ages for sparse values, torch's AdamW for `full`."""
    settings, facts = config.optimizer, all_methods()[config.method.name]
    eps = DEFAULT_EPS if settings.eps is None else settings.eps
    common: dict[str, Any] = {"lr": settings.learning_rate, "eps": eps, "weight_decay": settings.weight_decay}
    if facts.trains_all:
        return torch.optim.AdamW(parameters, betas=settings.betas, **common)
    if facts.optimizer == "sm3":
        return SparseSM3(parameters, momentum=settings.momentum, **common)
    return SparseAdamW(
        parameters,
        betas=settings.betas,
        moments=settings.moments,
        age_warmup_steps=settings.age_warmup_steps,
        **common,
    )


def make_training_arguments(
    config: RunConfig,
    world_size: int,
    largest_num_trained: int,
    output_dir: Path,
    device: torch.device,
    gathered_block: BlockSizes | None = None,
) -> TrainingArguments:
    """Trainer's arguments; every value comes from the configuration."""
    plan = config.batch_plan(world_size)
    return TrainingArguments(
        output_dir=str(output_dir),
        deepspeed=build_deepspeed_config(config, world_size, largest_num_trained, gathered_block),
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


def find_peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    """Of one rank's device: as the run says, or as its data sheet does; None where neither is known."""
    if config.monitor.peak_tflops is not None or device.type != "cuda":
        return config.monitor.peak_tflops
    return known_peak_tflops(torch.cuda.get_device_name(device), config.model.dtype)


def bind_optimizer(
    optimizer: SparseSM3 | SparseAdamW,
    layers: Mapping[str, SparseLayer],
    master: MasterWeights,
    dense: Mapping[str, Parameter] | None = None,
) -> None:
    """Tell the optimizer what lies where in DeepSpeed's flat master weights.

    Args:
        optimizer: of the engine.
        layers: the sparse layers by name.
        master: the engine's master weights.
        dense: parameters that train as a whole, by name.

    Collectives: none; every rank must call it (SM3's accumulators must have one layout on all of them).
    """
    name_of = {id(layer.values): name for name, layer in layers.items()}
    name_of |= {id(parameter): name for name, parameter in (dense or {}).items()}
    for sub_group, flat in enumerate(master.flats):
        if isinstance(optimizer, SparseAdamW):
            optimizer.register_flat(flat, master.padding_of(sub_group))
            continue
        segments = []
        for parameter in master.parameters_of(sub_group):
            name, where = name_of[id(parameter)], master.slice_of(parameter)
            if name not in layers:
                segments.append(_dense_segment(name, parameter, where))
                continue
            layer = layers[name]
            segments.append(
                FlatSegment(
                    name=name,
                    offset=where.offset,
                    length=where.num_real,
                    num_rows=layer.layout.num_rows,
                    num_cols=layer.layout.num_cols,
                    indices=own_indices(layer),
                    block_rows=layer.layout.block_rows,
                    block_cols=layer.layout.block_cols,
                )
            )
        optimizer.register_flat(flat, segments)


def _dense_segment(name: str, parameter: Parameter, where: OwnedSlice) -> FlatSegment:
    """Of a fully trained tensor (a head): a matrix, a vector as one of one column."""
    shape = full_shape(parameter)
    num_rows = shape[0] if shape else 1
    return FlatSegment(
        name=name,
        offset=where.offset,
        length=where.num_real,
        num_rows=num_rows,
        num_cols=full_size(parameter) // num_rows,
        start=where.start,
    )


def make_estimation(config: RunConfig, layers: dict[str, SparseLinear], device: torch.device) -> EstimationPhase | None:
    """The estimation phases of a method that looks at the dense gradient, else None."""
    facts, method = all_methods()[config.method.name], config.method
    if facts.statistic == "none":
        return None
    return EstimationPhase(
        layers,
        source="phase" if facts.events == "once" else method.candidate_source,
        squared=facts.statistic == "gradient_square",
        tile_bytes=method.gradient_tile_mib * 2**20,
        device=device,
    )


def check_accumulator_limit(config: RunConfig, layouts: dict[str, SparseLayout], world_size: int) -> None:
    """Raises UserError if a dense gradient accumulator would take more per rank than allowed."""
    facts, method = all_methods()[config.method.name], config.method
    if facts.statistic == "none" or (facts.events == "repeated" and method.candidate_source == "micro_batch"):
        return
    needed_gib = 4 * sum(layout.num_elements for layout in layouts.values()) / world_size / 2**30
    if needed_gib > method.gradient_accumulator_limit_gib:
        remedy = (
            "set method.candidate_source to micro_batch" if facts.events == "repeated" else "train fewer target_modules"
        )
        raise UserError(
            f"method.gradient_accumulator_limit_gib: got {method.gradient_accumulator_limit_gib:g} GiB, but the dense "
            f"gradient accumulator takes {needed_gib:.3g} GiB per rank (4 bytes per target weight / {world_size} "
            f"ranks). Start more ranks, {remedy}, or raise the limit."
        )


def make_drop_and_grow(
    config: RunConfig,
    optimizer: SparseSM3 | SparseAdamW,
    layers: dict[str, SparseLinear],
    master: MasterWeights,
    weight_states: WeightStates,
    estimation: EstimationPhase | None,
    device: torch.device,
) -> DropAndGrow:
    """The method's events."""
    accumulators = None
    if isinstance(optimizer, SparseSM3):
        sm3 = optimizer

        def accumulators(name: str) -> tuple[Tensor, Tensor]:
            return sm3.row_accumulator(name), sm3.col_accumulator(name)

    return DropAndGrow(
        layers,
        master,
        weight_states,
        find_growth(config.method.name),
        estimation=estimation,
        accumulators=accumulators,
        seed=config.train.seed,
        random_growth_fraction=config.method.random_growth_fraction,
        redistributes=config.method.redistribution_factor is not None,
        device=device,
    )


class EventSchedule:
    """When a run's events and estimation phases are, and how much each event replaces.

    Args:
        config: the run.
        layers: the sparse layers, as they are at each event (redistribution changes their numbers of active weights).
        total_steps: T.
    """

    def __init__(self, config: RunConfig, layers: dict[str, SparseLinear], total_steps: int) -> None:
        self._method, self._layers, self._total_steps = config.method, layers, total_steps
        self._facts = all_methods()[config.method.name]

    def is_event(self, step: int) -> bool:
        """Whether an event follows optimizer step `step` (the first is 1)."""
        method = self._method
        if step > self._total_steps or self._facts.events == "none":
            return False
        if self._facts.events == "once":
            return step == method.estimation_steps
        return is_event(step, interval_steps=method.interval_steps, estimation_steps=method.estimation_steps)

    def is_estimation(self, step: int) -> bool:
        """Whether `step` is one of the estimation steps up to and with an event."""
        return any(self.is_event(later) for later in range(step, step + self._method.estimation_steps))

    def is_paused(self, step: int) -> bool:
        """Whether nothing trains in `step`: it only measures, before the one event of the run."""
        return self._facts.events == "once" and step <= self._method.estimation_steps

    def num_to_replace(self, step: int) -> dict[str, int]:
        """Blocks (of one weight by default) of each tensor that the event after `step` replaces."""
        method = self._method
        num_active = {name: layer.num_active // layer.layout.block_elements for name, layer in self._layers.items()}
        if self._facts.events == "once":
            return num_active
        return {
            name: num_to_replace(
                step,
                num_active=number,
                total_steps=self._total_steps,
                interval_steps=method.interval_steps,
                estimation_steps=method.estimation_steps,
                initial_drop_fraction=method.initial_drop_fraction,
                drop_schedule=method.drop_schedule,
                first_drop_fraction=method.first_drop_fraction,
            )
            for name, number in num_active.items()
        }
