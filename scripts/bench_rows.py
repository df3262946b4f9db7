"""What benchmarks compare, each on one and the same frozen base: the project's methods, peft's, full, and the floor.

A `Row` makes one optimizer step at a time: forward, backward, optimizer. Without ZeRO, in one process.

floor         forward and input gradient of the frozen model, nothing else: what no method can do without
sparta, ...   the project's layers, optimizers, estimation phases and events (`whole_parameters`)
..._compiled  the same with `train.compile`
lora, ...     peft, with as many trained weights as K allows, and torch's fused AdamW
full          weights, gradients and moments in the dtype of the base: the cheapest that full fine-tuning can be
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bench_base import TARGETS, FrozenBase, move_buffers
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.models.llama import modeling_llama
from whole_parameters import FlatValues, WholeParameters, put_base

from sparse_ds.config.schema import RunConfig
from sparse_ds.distributed.born_partitioned import PartitionedParameters
from sparse_ds.distributed.process_group import world_size
from sparse_ds.distributed.zero3_partitions import MasterWeights
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.event import DropAndGrow, Seeds
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.model.base_tensors import BaseSettings
from sparse_ds.model.build import BaseParameters, build_sparse_model, plan_layouts
from sparse_ds.model.pieces import install_pieces
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.sparse.held_deltas import deltas_held, layers_that_can_hold
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.training.setup import (
    EventSchedule,
    bind_optimizer,
    choose_path,
    find_pieces,
    make_drop_and_grow,
    make_estimation,
    make_optimizer,
    sparse_settings,
)

LEARNING_RATE = 1e-5
TOTAL_STEPS = 10**6
"""Of the run whose events are made: long, so that the share of weights that they replace has not fallen yet."""
OURS = ("sparta", "sft_ag", "sft_ma", "sparta_compiled")
PEFT = ("lora_0", "lora_0.1", "dora", "shira", "supertuning")
ROWS = ("floor", *OURS, *PEFT, "full")
NOT_IN_NF4 = {"shira": "peft has none over 4 bits", "supertuning": "peft has none over 4 bits", "full": "not frozen"}

Batch = dict[str, Any]

STEP, FIRST_ESTIMATION, ESTIMATION, EVENT = "step", "first estimation step", "estimation step", "event"
"""What a row measures."""


class Row:
    """One model that makes steps.

    Attributes:
        name: one of ROWS.
        density: of the trained weights, None where it does not matter.
        num_trained: weights that train.
        model: in training mode.
    """

    def __init__(self, name: str, density: float | None, num_trained: int, model: nn.Module) -> None:
        self.name, self.density, self.num_trained, self.model = name, density, num_trained, model
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def step(self, batch: Batch) -> Tensor:
        """One step; returns the loss, not synchronized."""
        with self.autocast():
            loss: Tensor = self.model(**batch).loss
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """The optimizer's part."""

    def measured(self, batch: Batch) -> dict[str, Callable[[], Any]]:
        """What is timed, by name, in this order, each time from the state that the one before has left."""
        return {STEP: lambda: self.step(batch)}


class Floor(Row):
    """Forward and input gradient. The graph begins where it begins for a sparse model and for LoRA: nobody needs the
    input gradient of the first projections, those of the first block."""

    def __init__(self, base: FrozenBase, *, checkpointing: bool) -> None:
        model = base.empty_model(checkpointing=checkpointing)
        base.fill(model)
        super().__init__("floor", None, 0, model)
        self.begin = Parameter(torch.zeros(1, device=base.device))
        begin_graph(model, self.begin)


def begin_graph(model: nn.Module, begin: Parameter) -> None:
    """Make q, k and v of the first block the first that have a gradient."""
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = model.get_submodule(f"model.layers.0.self_attn.{name}")
        projection.register_forward_hook(lambda module, args, output: _BeginGraph.apply(output, begin))


class _BeginGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, begin: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.new_zeros(1, dtype=torch.float32)


class Sparse(Row):
    """One of the project's methods; who makes the model calls `bind`.

    Attributes:
        config: of a run with this method.
        layers: the sparse layers by name.
        estimation, drop_and_grow: None for a method without.
        holding: layers whose deltas stay in for a whole step, as in a run of one rank.
    """

    layers: dict[str, SparseLinear]
    optimizer: SparseSM3 | SparseAdamW
    estimation: EstimationPhase | None
    drop_and_grow: DropAndGrow | None
    rotary: Callable[..., Any]
    holding: list[SparseLinear]

    def build(
        self, name: str, base: FrozenBase, density: float, *, checkpointing: bool, settings: dict[str, Any]
    ) -> BaseParameters:
        """Make the model, with parameters of `make_parameters`; returns those of the base, which are to be filled."""
        model = base.empty_model(checkpointing=checkpointing)
        if name.endswith("_compiled"):
            settings = {**settings, "train.compile": True}
        self.config = run_config(name.removesuffix("_compiled"), base, density, settings)
        self.rotary = install_own_pieces(self.config, model, base.device)
        sparse = sparse_settings(self.config)
        layouts = plan_layouts(model, sparse, world_size())
        made = build_sparse_model(model, layouts, base_settings(base), sparse, self.make_parameters())
        move_buffers(model, base.device)
        self.layers = {name: each for name, each in model.named_modules() if isinstance(each, SparseLinear)}
        path_choice = choose_path(self.config, layouts)
        for layer in self.layers.values():
            layer.path_choice = path_choice
        super().__init__(name, density, sum(layer.num_active for layer in self.layers.values()), model)
        return made

    def make_parameters(self) -> PartitionedParameters:
        raise NotImplementedError

    def step(self, batch: Batch) -> Tensor:
        theirs, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, self.rotary
        try:
            with deltas_held(self.holding):
                return super().step(batch)
        finally:
            modeling_llama.apply_rotary_pos_emb = theirs

    def bind(self, optimizer: torch.optim.Optimizer, master: MasterWeights, device: torch.device) -> None:
        """Once the optimizer and the master weights are there."""
        assert isinstance(optimizer, SparseSM3 | SparseAdamW)
        self.optimizer, self.num_events = optimizer, 0
        bind_optimizer(optimizer, self.layers, master)
        self.holding = layers_that_can_hold(self.layers.values(), device)
        self.estimation, self.drop_and_grow = make_estimation(self.config, self.layers, device), None
        if self.config.method.name != "sparta":
            states = WeightStates(optimizer, master.flats, keeps_event_values=False)
            self.drop_and_grow = make_drop_and_grow(
                self.config, optimizer, self.layers, master, states, self.estimation, device
            )

    def estimation_step(self, batch: Batch) -> None:
        """A step that also measures; the first after an event finds the candidates."""
        assert self.estimation is not None
        self.estimation.begin_step()
        self.step(batch)
        self.estimation.end_step(1.0)

    def event(self) -> None:
        """One that replaces as many weights as the second of a long run: nearly the share `initial_drop_fraction`."""
        assert self.drop_and_grow is not None
        self.num_events += 1
        method = self.config.method
        schedule = EventSchedule(self.config, self.layers, TOTAL_STEPS)
        num_to_replace = schedule.num_to_replace(method.estimation_steps + method.interval_steps)
        seeds = Seeds(None, self.num_events)
        if isinstance(self.optimizer, SparseAdamW):
            seeds = Seeds(self.config.optimizer.betas, self.optimizer.num_applied_steps - 1)
        self.drop_and_grow.run(self.num_events, num_to_replace, seeds)

    def measured(self, batch: Batch) -> dict[str, Callable[[], Any]]:
        found = super().measured(batch)
        if self.estimation is not None:
            found[FIRST_ESTIMATION] = lambda: self.estimation_step(batch)
            found[ESTIMATION] = lambda: self.estimation_step(batch)
        if self.drop_and_grow is not None:
            found[EVENT] = self.event
        return found


def install_own_pieces(config: RunConfig, model: Any, device: torch.device) -> Callable[..., Any]:
    """What a run computes with between the linear layers, the loss among it.

    Returns:
        The rotary embedding. It is a function of transformers' module, which all rows share: put it there for the time
        of a step.
    """
    theirs = modeling_llama.apply_rotary_pos_emb
    install_pieces(model, find_pieces(config, model, device))
    rotary, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, theirs
    return rotary


class WholeSparse(Sparse):
    """Without ZeRO."""

    def __init__(
        self, name: str, base: FrozenBase, density: float, *, checkpointing: bool, settings: dict[str, Any]
    ) -> None:
        put_base(self.build(name, base, density, checkpointing=checkpointing, settings=settings), base.tensors)
        self.values = FlatValues([layer.values for layer in self.layers.values()])
        self.bind(make_optimizer(self.config, [self.values.flat]), self.values.master, base.device)

    def make_parameters(self) -> PartitionedParameters:
        return WholeParameters()

    def update(self) -> None:
        self.values.take_gradients()
        self.optimizer.step()
        if isinstance(self.optimizer, SparseSM3):
            self.optimizer.finish_step()
        self.values.flat.grad = None


class Peft(Row):
    """One of peft's methods, on every linear layer of the blocks.

    Args:
        name: of the row.
        base: the base.
        density: of the sparse row whose number of trained weights this one is to have, as nearly as a rank can.
        checkpointing: of the blocks.
        adapter_dtype: `float32`: peft's own default, with autocast where the base is in 16 bits, as transformers'
            Trainer runs it; `base`: in the dtype of the base.
    """

    def __init__(
        self, name: str, base: FrozenBase, density: float, *, checkpointing: bool, adapter_dtype: str = "float32"
    ) -> None:
        model = base.empty_model(checkpointing=checkpointing)
        shapes = [
            (each.out_features, each.in_features)
            for module_name, each in model.named_modules()
            if isinstance(each, nn.Linear) and module_name.rpartition(".")[2] in TARGETS
        ]
        base.fill(model)
        rank = lora_rank(shapes, density)
        # peft draws and casts with the default generator.
        torch.manual_seed(0)
        wrapped = get_peft_model(
            model, peft_config(name, rank, density), autocast_adapter_dtype=adapter_dtype == "float32"
        )
        if adapter_dtype == "base":
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(base.dtype)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        super().__init__(name, density, sum(parameter.numel() for parameter in trained), wrapped)
        if base.dtype != torch.float32 and adapter_dtype == "float32":
            self.autocast = lambda: torch.autocast(base.device.type, base.dtype)
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Full(Row):
    """Every weight of the blocks, embeddings and head."""

    def __init__(self, base: FrozenBase, *, checkpointing: bool) -> None:
        model = base.empty_model(checkpointing=checkpointing)
        base.fill(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_()
        super().__init__("full", None, sum(parameter.numel() for parameter in model.parameters()), model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def lora_rank(shapes: Sequence[tuple[int, int]], density: float) -> int:
    """The rank, at least 1, whose number of weights is nearest to floor(density * N) summed over the matrices."""
    num_active = sum(math.floor(density * num_rows * num_cols) for num_rows, num_cols in shapes)
    return max(1, round(num_active / sum(num_rows + num_cols for num_rows, num_cols in shapes)))


def peft_config(name: str, rank: int, density: float) -> Any:
    if name == "shira":
        return ShiraConfig(r=rank, target_modules=TARGETS)
    if name == "supertuning":
        return SupertuningConfig(sparsity=1 - density, target_modules=TARGETS)
    dropout = 0.1 if name == "lora_0.1" else 0.0
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=TARGETS, use_dora=name == "dora"
    )


def base_settings(base: FrozenBase) -> BaseSettings:
    return BaseSettings(base.dtype, base.nf4, double_quantization=False, attention="auto")


def run_config(name: str, base: FrozenBase, density: float, settings: dict[str, Any]) -> RunConfig:
    """The configuration of a run with this method; `settings`: more values by `section.key`."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"dtype": str(base.dtype).removeprefix("torch."), "quantization": "nf4" if base.nf4 else "none"},
        "method": {"name": name, **({} if name == "full" else {"density": density})},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "train": {"output_dir": "unused"},
    }
    for path, value in settings.items():
        section, _, key = path.partition(".")
        sections.setdefault(section, {})[key] = value
    return RunConfig.model_validate(sections)


def make_row(
    name: str,
    base: FrozenBase,
    density: float,
    *,
    checkpointing: bool,
    settings: dict[str, Any] | None = None,
    adapter_dtype: str = "float32",
) -> Row:
    """The row of this name; `density` does not matter to `floor` and `full`."""
    if name == "floor":
        return Floor(base, checkpointing=checkpointing)
    if name == "full":
        return Full(base, checkpointing=checkpointing)
    if name in OURS:
        return WholeSparse(name, base, density, checkpointing=checkpointing, settings=settings or {})
    return Peft(name, base, density, checkpointing=checkpointing, adapter_dtype=adapter_dtype)


def release() -> None:
    """Give back what deleted models still hold in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
