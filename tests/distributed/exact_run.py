"""A run whose reductions are exact: linear layers, a loss that is linear in the weights, small integers as data.

The dense gradient of a layer is then sum_t c_t x_t^T with integers c and x, whatever the weights are: a sum that fp32
holds exactly in every order. Divisions are by powers of 2, or by the number of ranks, of which every summand is a
multiple. So not a bit of what the events decide by depends on how many ranks there are, and every number of ranks must
end with the same indices, values and optimizer state. (Softmax and norms could not be exact.) Everything else is the
real thing: engine, optimizer, estimation, events, callbacks.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_ds.config import RunConfig, build_deepspeed_config
from sparse_ds.distributed.born_partitioned import PartitionedParameters, slice_of
from sparse_ds.distributed.process_group import rank, world_size
from sparse_ds.distributed.zero3_partitions import MasterWeights, gather_partitions, release_gathered
from sparse_ds.drop_grow.event import EventRecord
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.selection.random_subset import random_subset
from sparse_ds.sparse.index_storage import IndexStorage, new_index_tensors, own_indices
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.training.callbacks import MergeAccumulators, RunEvents
from sparse_ds.training.setup import (
    EventSchedule,
    bind_optimizer,
    make_drop_and_grow,
    make_estimation,
    make_optimizer,
)

CPU = torch.device("cpu")
SHAPES = {"wide": (12, 40), "tall": (37, 9), "tiny": (3, 5)}
SHAPES_OF_BLOCKS = {"wide": (12, 40), "tall": (36, 8), "tiny": (4, 8)}
"""Where the active unit is a block."""
NUM_SAMPLES = 12
"""Of a micro batch over all ranks: 1, 2, 3 or 4 ranks can share them."""


class ParallelLinears(nn.Module):
    """Every layer sees the first columns of the same input; the loss is the sum of outputs times integers."""

    def __init__(self, layers: dict[str, SparseLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        total = x.new_zeros(())
        for name, layer in self.layers.items():
            total = total + (layer(x[:, : layer.in_features]) * weights[name]).sum()
        return total


def run_config(method: dict[str, Any], *, num_ranks: int, accumulation: int, steps: int, density: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"dtype": "float32", "quantization": "none"},
            "method": {"density": density, **method},
            "optimizer": {"learning_rate": 2**-6, "max_grad_norm": 0.0, "weight_decay": 0.25},
            "train": {
                "output_dir": "unused",
                "max_steps": steps,
                "micro_batch_size": NUM_SAMPLES // num_ranks,
                "gradient_accumulation_steps": accumulation,
                "seed": 3,
            },
        }
    )


class ExactRun:
    """The engine and what belongs to it; collectives: those of `deepspeed.initialize`."""

    def __init__(self, config: RunConfig, shapes: dict[str, tuple[int, int]] | None = None) -> None:
        self.config, self.steps = config, config.train.max_steps or 0
        partitioned = PartitionedParameters()
        factor = config.method.redistribution_factor or 1.0
        self.layers: dict[str, SparseLinear] = {}
        block_rows, block_cols = config.method.block_shape
        size = block_rows * block_cols
        shapes = shapes or (SHAPES if size == 1 else SHAPES_OF_BLOCKS)
        for name, (num_rows, num_cols) in shapes.items():
            num_blocks = num_rows * num_cols // size
            num_active = max(1, int(config.method.density * num_blocks))
            num_slots = min(num_blocks, int(factor * num_active))
            layout = SparseLayout(
                num_rows,
                num_cols,
                num_active * size,
                (num_slots - num_active) * size,
                block_rows,
                block_cols,
                padding_slots=-num_slots % world_size() * size if size > 1 else 0,
            )
            self.layers[name] = make_layer(partitioned, layout, name, config.method.index_storage)
        model = ParallelLinears(self.layers)
        trained = [layer.values for layer in self.layers.values()]
        optimizer = make_optimizer(config, trained)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=build_deepspeed_config(
                config, world_size(), max(layer.layout.num_stored for layer in self.layers.values())
            ),
        )
        self.optimizer: Any = optimizer
        self.master = MasterWeights(self.engine)
        self.master.zero_padding()
        bind_optimizer(self.optimizer, self.layers, self.master)
        self.weight_states = WeightStates(
            self.optimizer, self.master.flats, keeps_event_values=config.method.drop_criterion == "change"
        )
        self.estimation = make_estimation(config, self.layers, CPU)
        drop_and_grow = make_drop_and_grow(
            config, self.optimizer, self.layers, self.master, self.weight_states, self.estimation, CPU
        )
        self.records: list[EventRecord] = []
        self.losses: list[float] = []
        """Of this rank, by micro batch."""
        schedule = EventSchedule(config, self.layers, self.steps)
        self.callbacks: list[Any] = [
            RunEvents(
                schedule,
                self.estimation,
                drop_and_grow,
                self.optimizer,
                self.engine,
                partial(release_gathered, self.engine),
                self.records.append,
            )
        ]
        if isinstance(optimizer, SparseSM3):
            self.callbacks.insert(0, MergeAccumulators(optimizer, CPU))

    def train(self) -> None:
        for step in range(1, self.steps + 1):
            self.train_step(step)

    def train_step(self, step: int) -> None:
        self._call("on_step_begin", step - 1)
        accumulation = self.config.train.gradient_accumulation_steps or 1
        for micro_step in range(accumulation):
            x, weights = self.batch(step * accumulation + micro_step)
            loss = self.engine(x, weights)
            self.losses.append(float(loss.detach()))
            self.engine.backward(loss)
            self.engine.step()
        self._call("on_optimizer_step", step - 1)
        self._call("on_step_end", step)

    def batch(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of a micro batch: integers; the same samples in all for every number of ranks."""
        generator = torch.Generator().manual_seed(number)
        num_local = NUM_SAMPLES // world_size()
        own = slice(rank() * num_local, (rank() + 1) * num_local)
        columns = max(layer.in_features for layer in self.layers.values())
        x = torch.randint(-9, 10, (NUM_SAMPLES, columns), generator=generator).float()
        weights = {
            # Times the number of ranks: the engine divides by it.
            name: torch.randint(-9, 10, (NUM_SAMPLES, layer.out_features), generator=generator).float()[own]
            * world_size()
            for name, layer in self.layers.items()
        }
        return x[own], weights

    def outcome(self) -> dict[str, Any]:
        """All that must not depend on the number of ranks."""
        tensors = {}
        states = self.weight_states.read()
        for name, layer in self.layers.items():
            parts = [own_indices(layer), self.master.view(layer.values)]
            parts += [self.master.view(layer.values, flats) for flats in states.values()]
            units = [layer.layout.block_elements] + [1] * (len(parts) - 1)
            indices, *rest = gather_partitions([layer.values] * len(parts), parts, CPU, units)
            numbers = [tensor[: layer.num_active] for tensor in rest]
            indices = indices[: layer.num_active // layer.layout.block_elements]
            tensors[name] = [tensor.tolist() for tensor in layer.layout.sorted_weights(indices, *numbers)]
        return {
            "hashes": [record.index_hash for record in self.records],
            "replaced": [record.num_dropped for record in self.records],
            "active": [[record.tensors[name].num_active for name in self.layers] for record in self.records],
            "births": [record.birth_steps for record in self.records],
            "tensors": tensors,
        }

    def _call(self, event: str, global_step: int) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(None, SimpleNamespace(global_step=global_step), None)


def make_layer(
    partitioned: PartitionedParameters, layout: SparseLayout, name: str, storage: IndexStorage = "int32"
) -> SparseLinear:
    """Over a base of zeros (the loss is linear: the base has no effect on any gradient)."""
    indices = random_subset(layout.grid.num_elements, layout.grid.num_active, seed=0, name=name).int()
    indices = F.pad(indices, (0, layout.num_index_slots - indices.numel()))
    tensors = {
        "weight": partitioned.make(
            (layout.num_rows, layout.num_cols), torch.float32, lambda partition, start: None, requires_grad=False
        ),
        "values": partitioned.make(
            (layout.num_stored,), torch.float32, lambda partition, start: None, requires_grad=True
        ),
    }
    for tensor_name, whole in new_index_tensors(indices, layout, layout.grid.num_active, storage).items():
        tensors[tensor_name] = partitioned.make(tuple(whole.shape), whole.dtype, slice_of(whole), requires_grad=False)
    return SparseLinear(layout, torch.float32, tensors)
