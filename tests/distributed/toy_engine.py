"""A model of three sparse layers over an fp32 base, in a real ZeRO-3 engine, small enough to follow entry by entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_ds.config.deepspeed_section import build_deepspeed_config
from sparse_ds.config.schema import RunConfig
from sparse_ds.distributed.born_partitioned import PartitionedParameters, slice_of
from sparse_ds.distributed.process_group import world_size
from sparse_ds.distributed.zero3_partitions import (
    MasterWeights,
    all_reduce_max_,
    gather_partitions,
    local_partition,
)
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.selection.random_subset import random_subset
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.training.setup import bind_optimizer

CPU = torch.device("cpu")
LAYOUTS = {"first": SparseLayout(13, 11, 8), "second": SparseLayout(9, 13, 1), "third": SparseLayout(5, 9, 4)}
"""K = 1: every rank but the first owns nothing of it. K = 4 on 3 ranks: partitions of 2, 2 and 0."""


class ToyModel(nn.Module):
    """first -> tanh -> second -> tanh -> third."""

    def __init__(self, layers: dict[str, SparseLinear], use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.layers.items():
            x = layer(x) if self.use_reentrant is None else checkpoint(layer, x, use_reentrant=self.use_reentrant)
            x = x if name == "third" else torch.tanh(x)
        return x


@dataclass
class Toy:
    """The engine and what belongs to it."""

    engine: Any
    model: ToyModel
    layers: dict[str, SparseLinear]
    weights: dict[str, Tensor]
    master: MasterWeights
    optimizer: SparseSM3

    def train_step(self, x: Tensor) -> float:
        loss = self.engine(x).square().mean()
        self.engine.backward(loss)
        self.engine.step()
        all_reduce_max_(self.optimizer.pending_accumulators, CPU)
        self.optimizer.finish_step()
        return float(loss.detach())

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        self.engine.eval()
        output: Tensor = self.engine(x)
        self.engine.train()
        return output

    def gather(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Name -> global (indices, master values, momentum)."""
        momenta = [self.optimizer.state[flat]["exp_avg"] for flat in self.master.flats]
        gathered = {}
        for name, layer in self.layers.items():
            parts = [local_partition(layer.indices), self.master.view(layer.values)]
            parts.append(self.master.view(layer.values, momenta))
            gathered[name] = tuple(gather_partitions([layer.indices, layer.values, layer.values], parts, CPU))
        return gathered

    def dense_predict(self, x: Tensor) -> Tensor:
        """The same model in plain torch: full matrices with the deltas put in."""
        for name, (indices_K, values_K, _) in self.gather().items():
            weight_OI = self.weights[name].clone()
            weight_OI.view(-1)[indices_K.long()] += values_K
            x = F.linear(x, weight_OI)
            x = x if name == "third" else torch.tanh(x)
        return x


def start_toy(*, zero: dict[str, Any] | None = None, momentum: float = 0.5, use_reentrant: bool | None = None) -> Toy:
    """Collectives: those of `deepspeed.initialize`.

    Args:
        zero: settings for DeepSpeed's `zero_optimization` section.
        momentum: of SM3.
        use_reentrant: activation checkpointing of this kind around every layer; None: none.
    """
    partitioned = PartitionedParameters()
    generator = torch.Generator().manual_seed(3)
    weights, layers = {}, {}
    for name, layout in LAYOUTS.items():
        weight_OI = torch.randn(layout.num_rows, layout.num_cols, generator=generator) / 3
        indices_K = random_subset(layout.num_elements, layout.num_active, seed=0, name=name).int()
        shape = tuple(weight_OI.shape)
        tensors = {
            "weight": partitioned.make(shape, weight_OI.dtype, slice_of(weight_OI), requires_grad=False),
            "indices": partitioned.make((layout.num_active,), torch.int32, slice_of(indices_K), requires_grad=False),
            "values": partitioned.make(
                (layout.num_active,), torch.float32, lambda partition, start: None, requires_grad=True
            ),
        }
        weights[name], layers[name] = weight_OI, SparseLinear(layout, torch.float32, tensors)
    model = ToyModel(layers, use_reentrant)
    optimizer = SparseSM3([layer.values for layer in layers.values()], lr=0.05, momentum=momentum)
    config = RunConfig.model_validate(
        {
            "model": {"dtype": "float32", "quantization": "none"},
            "optimizer": {"learning_rate": 0.05, "max_grad_norm": 0.0},
            "train": {"output_dir": "unused"},
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 64, **(zero or {})}},
        }
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=build_deepspeed_config(config, world_size(), 8)
    )
    master = MasterWeights(engine)
    master.zero_padding()
    bind_optimizer(optimizer, layers, master)
    return Toy(engine, model, layers, weights, master, optimizer)
