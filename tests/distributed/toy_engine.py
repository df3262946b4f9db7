"""A model of three sparse layers over an fp32 base, in a real ZeRO-3 engine, small enough to follow entry by entry."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
)
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.selection.random_subset import random_subset
from sparse_ds.sparse.index_storage import own_indices
from sparse_ds.sparse.layout import SparseLayout
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.training.setup import bind_optimizer, make_optimizer

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


def forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same model in plain torch, of full matrices."""
    for name, weight_OI in weights.items():
        x = F.linear(x, weight_OI)
        x = x if name == "third" else torch.tanh(x)
    return x


@dataclass
class Toy:
    """The engine and what belongs to it."""

    config: RunConfig
    engine: Any
    model: ToyModel
    layers: dict[str, SparseLinear]
    base: dict[str, Tensor]
    master: MasterWeights
    optimizer: SparseSM3 | SparseAdamW
    weight_states: WeightStates

    def train_step(self, x: Tensor) -> float:
        loss = self.engine(x).square().mean()
        self.engine.backward(loss)
        self.engine.step()
        if isinstance(self.optimizer, SparseSM3):
            all_reduce_max_(self.optimizer.pending_accumulators, CPU)
            self.optimizer.finish_step()
        return float(loss.detach())

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        self.engine.eval()
        output: Tensor = self.engine(x)
        self.engine.train()
        return output

    def gather_slots(self) -> dict[str, dict[str, Tensor]]:
        """Name -> global indices, values (of the master) and all states per weight, spare slots included."""
        states = self.weight_states.read()
        gathered = {}
        for name, layer in self.layers.items():
            parts = {"indices": own_indices(layer), "values": self.master.view(layer.values)}
            parts |= {state: self.master.view(layer.values, flats) for state, flats in states.items()}
            whole = gather_partitions([layer.values] * len(parts), list(parts.values()), CPU)
            gathered[name] = dict(zip(parts, whole, strict=True))
        return gathered

    def gather(self) -> dict[str, dict[str, Tensor]]:
        """`gather_slots` of the active weights only."""
        return {
            name: {part: whole[: self.layers[name].num_active] for part, whole in parts.items()}
            for name, parts in self.gather_slots().items()
        }

    def dense_weights(self) -> dict[str, Tensor]:
        """Full matrices with the deltas put in."""
        weights = {}
        for name, parts in self.gather().items():
            weights[name] = self.base[name].clone()
            weights[name].view(-1)[parts["indices"].long()] += parts["values"]
        return weights

    def dense_predict(self, x: Tensor) -> Tensor:
        return forward(self.dense_weights(), x)

    def dense_gradients(self, x: Tensor) -> dict[str, Tensor]:
        """Flat gradients of the loss of `train_step` for every weight of every matrix."""
        weights = {name: weight_OI.requires_grad_() for name, weight_OI in self.dense_weights().items()}
        found = torch.autograd.grad(forward(weights, x).square().mean(), list(weights.values()))
        return {name: gradient_OI.view(-1) for name, gradient_OI in zip(weights, found, strict=True)}


def start_toy(
    *,
    zero: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    use_reentrant: bool | None = None,
) -> Toy:
    """Collectives: those of `deepspeed.initialize`.

    Args:
        zero: settings for DeepSpeed's `zero_optimization` section.
        method: the section `method`; None: SFT-MA.
        use_reentrant: activation checkpointing of this kind around every layer; None: none.
    """
    method = method or {"name": "sft_ma"}
    config = RunConfig.model_validate(
        {
            "model": {"dtype": "float32", "quantization": "none"},
            "method": method,
            "optimizer": {
                "learning_rate": 0.05,
                "max_grad_norm": 0.0,
                **({"momentum": 0.5} if method["name"] == "sft_ma" else {}),
            },
            "train": {"output_dir": "unused"},
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 64, **(zero or {})}},
        }
    )
    partitioned = PartitionedParameters()
    generator = torch.Generator().manual_seed(3)
    base, layers = {}, {}
    for name, layout in LAYOUTS.items():
        if config.method.redistribution_factor is not None:
            layout = replace(layout, spare_slots=int((config.method.redistribution_factor - 1) * layout.num_active))
        weight_OI = torch.randn(layout.num_rows, layout.num_cols, generator=generator) / 3
        indices_K = random_subset(layout.num_elements, layout.num_active, seed=0, name=name).int()
        indices_S = F.pad(indices_K, (0, layout.spare_slots))
        shape, num_slots = tuple(weight_OI.shape), (layout.num_slots,)
        tensors = {
            "weight": partitioned.make(shape, weight_OI.dtype, slice_of(weight_OI), requires_grad=False),
            "indices": partitioned.make(num_slots, torch.int32, slice_of(indices_S), requires_grad=False),
            "values": partitioned.make(num_slots, torch.float32, lambda partition, start: None, requires_grad=True),
        }
        base[name], layers[name] = weight_OI, SparseLinear(layout, torch.float32, tensors)
    model = ToyModel(layers, use_reentrant)
    optimizer = make_optimizer(config, [layer.values for layer in layers.values()])
    assert isinstance(optimizer, SparseSM3 | SparseAdamW)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=build_deepspeed_config(config, world_size(), 8)
    )
    master = MasterWeights(engine)
    master.zero_padding()
    bind_optimizer(optimizer, layers, master)
    weight_states = WeightStates(optimizer, master.flats, keeps_event_values=config.method.drop_criterion == "change")
    return Toy(config, engine, model, layers, base, master, optimizer, weight_states)
