"""The rows of a benchmark as real DeepSpeed ZeRO-3 engines: the same base, partitioned once and shared by all of them.

Every engine has the configuration that a run of this project makes. The rows of peft have their weights in the dtype of
the base and fp32 master weights, as ZeRO-3 keeps them; over NF4, which peft cannot partition, there are none.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from bench_base import TARGETS, FrozenBase
from bench_rows import (
    LEARNING_RATE,
    OURS,
    Batch,
    Row,
    Sparse,
    begin_graph,
    lora_rank,
    peft_config,
    run_config,
)
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import Parameter
from whole_parameters import give_partition

from sparse_ds.config import RunConfig, build_deepspeed_config
from sparse_ds.distributed.born_partitioned import PartitionedParameters, slice_of
from sparse_ds.distributed.process_group import world_size
from sparse_ds.distributed.zero3_partitions import MasterWeights, all_reduce_max_, full_size, release_gathered
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.training.setup import gather_blocks_if_better, make_optimizer

ZERO3_ROWS = ("floor", *OURS, "lora_0", "lora_0.1", "full")

_partitions: dict[int, dict[str, dict[str, Tensor]]] = {}
"""By the id of a base: its partitions on this rank, made once."""


class EngineRow(Row):
    """A row whose step is an engine's."""

    engine: Any

    def start_engine(
        self, optimizer: torch.optim.Optimizer, largest_num_trained: int, config: RunConfig, *, as_a_run: bool
    ) -> None:
        """`as_a_run`: gather as the project's runs do, the tensors of a block together."""
        block = gather_blocks_if_better(config, self.model) if as_a_run else None
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            config=build_deepspeed_config(config, world_size(), largest_num_trained, block),
        )

    def step(self, batch: Batch) -> Tensor:
        loss: Tensor = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


class EngineSparse(EngineRow, Sparse):
    """One of the project's methods."""

    def __init__(
        self, name: str, base: FrozenBase, density: float, *, checkpointing: bool, settings: dict[str, Any]
    ) -> None:
        made = self.build(name, base, density, checkpointing=checkpointing, settings=settings)
        for tensor_name, parameters in made.items():
            for role, parameter in parameters.items():
                give_partition(parameter, partitions_of(base)[tensor_name][role])
        values = [layer.values for layer in self.layers.values()]
        optimizer = make_optimizer(self.config, values)
        self.start_engine(optimizer, max(full_size(each) for each in values), self.config, as_a_run=True)
        master = MasterWeights(self.engine)
        master.zero_padding()
        self.bind(optimizer, master, base.device)
        self.device = base.device

    def make_parameters(self) -> PartitionedParameters:
        return PartitionedParameters()

    def step(self, batch: Batch) -> Tensor:
        loss = super().step(batch)
        if isinstance(self.optimizer, SparseSM3):
            all_reduce_max_(self.optimizer.pending_accumulators, self.device)
            self.optimizer.finish_step()
        return loss

    def event(self) -> None:
        super().event()
        release_gathered(self.engine)


class EngineFloor(EngineRow):
    """Forward and input gradient; one number trains, since an engine needs something to train."""

    def __init__(self, base: FrozenBase, *, checkpointing: bool) -> None:
        model = base.empty_model(checkpointing=checkpointing)
        config = run_config("sparta", base, 0.01, {})
        put_partitions(model, base, trainable=False)
        begin = PartitionedParameters().make((1,), torch.float32, requires_grad=True)
        model.register_parameter("begin", begin)
        super().__init__("floor", None, 0, model)
        begin_graph(model, begin)
        self.start_engine(torch.optim.AdamW([begin], lr=LEARNING_RATE), 1, config, as_a_run=True)


class EngineLora(EngineRow):
    """peft's LoRA."""

    def __init__(self, name: str, base: FrozenBase, density: float, *, checkpointing: bool) -> None:
        model = base.empty_model(checkpointing=checkpointing)
        shapes = [
            (each.out_features, each.in_features)
            for module_name, each in model.named_modules()
            if isinstance(each, nn.Linear) and module_name.rpartition(".")[2] in TARGETS
        ]
        put_partitions(model, base, trainable=False)
        torch.manual_seed(0)
        rank = lora_rank(shapes, density)
        wrapped = get_peft_model(model, peft_config(name, rank, density), autocast_adapter_dtype=False)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.to(base.dtype)
        super().__init__(name, density, sum(parameter.numel() for parameter in trained), wrapped)
        largest = max(parameter.numel() for parameter in trained)
        # Small tensors are partitioned too (transformers' Trainer keeps them whole): measured, that is faster here.
        config = run_config("sparta", base, density, {})
        self.start_engine(
            torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True), largest, config, as_a_run=False
        )


class EngineFull(EngineRow):
    """All weights."""

    def __init__(self, base: FrozenBase, *, checkpointing: bool) -> None:
        model = base.empty_model(checkpointing=checkpointing)
        put_partitions(model, base, trainable=True)
        parameters = list(model.parameters())
        super().__init__("full", None, sum(full_size(parameter) for parameter in parameters), model)
        config = run_config("full", base, 0.01, {})
        self.start_engine(
            make_optimizer(config, parameters), max(full_size(each) for each in parameters), config, as_a_run=False
        )


def make_engine_row(
    name: str,
    base: FrozenBase,
    density: float,
    *,
    checkpointing: bool,
    settings: dict[str, Any] | None = None,
    adapter_dtype: str = "base",
) -> Row:
    """The row of this name. Collectives: those of `deepspeed.initialize`; every rank must call it."""
    if name == "floor":
        return EngineFloor(base, checkpointing=checkpointing)
    if name == "full":
        return EngineFull(base, checkpointing=checkpointing)
    if name in OURS:
        return EngineSparse(name, base, density, checkpointing=checkpointing, settings=settings or {})
    return EngineLora(name, base, density, checkpointing=checkpointing)


def partitions_of(base: FrozenBase) -> dict[str, dict[str, Tensor]]:
    """This rank's slices of the base, padded as ZeRO-3 has them."""
    if id(base) not in _partitions:
        made = PartitionedParameters()
        _partitions[id(base)] = {
            name: {
                role: made.make(tuple(tensor.shape), tensor.dtype, slice_of(tensor), requires_grad=False).ds_tensor
                for role, tensor in roles.items()
            }
            for name, roles in base.tensors.items()
        }
    return _partitions[id(base)]


def put_partitions(model: nn.Module, base: FrozenBase, *, trainable: bool) -> None:
    """Parameters over the partitions of the base; copies of them where they train."""
    partitioned = PartitionedParameters()
    for name, roles in partitions_of(base).items():
        module_name, _, child = name.rpartition(".")
        shape = tuple(base.tensors[name]["weight"].shape)
        parameter: Parameter = partitioned.make(shape, base.dtype, requires_grad=trainable)
        give_partition(parameter, roles["weight"].clone() if trainable else roles["weight"])
        model.get_submodule(module_name).register_parameter(child, parameter)
