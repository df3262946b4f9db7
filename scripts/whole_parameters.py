"""The project's sparse model in one process without partitioning: ZeRO-3 parameters that are gathered all the time.

With one rank the partition of a ZeRO-3 parameter is the whole tensor. Here `parameter.data` is that partition, and no
engine gathers or releases anything: layers, optimizers, estimation phases and events are the project's own, and what is
measured is their own cost. All values lie in one flat fp32 tensor; so do their gradients, but only for the optimizer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.distributed.born_partitioned import FillPartition, PartitionedParameters
from sparse_ds.distributed.zero3_partitions import MasterWeights


class WholeParameters(PartitionedParameters):
    """Makes parameters that are there as a whole. Needs a process group of one rank."""

    def make(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: FillPartition | None = None, *, requires_grad: bool
    ) -> Parameter:
        """As of the base class; `data` is the partition."""
        parameter = super().make(shape, dtype, fill, requires_grad=requires_grad)
        hold(parameter, parameter.ds_tensor)
        return parameter


def give_partition(parameter: Parameter, partition: Tensor) -> None:
    """Make `partition` (flat, of the size and dtype of the one before) this rank's slice of a ZeRO-3 parameter."""
    given = partition.detach().view(-1)
    for name in ("ds_numel", "status", "final_location"):
        setattr(given, name, getattr(parameter.ds_tensor, name))
    parameter.ds_tensor = given


def hold(parameter: Parameter, content: Tensor) -> None:
    """Make `content` (as many elements, same dtype) both the partition and the data of a parameter."""
    give_partition(parameter, content)
    parameter.data = parameter.ds_tensor.view(parameter.ds_shape)


class FlatValues:
    """One flat fp32 tensor for the values of all layers.

    Attributes:
        flat: the parameter that the optimizer steps on.
        master: what lies where, as the project's optimizers and events ask for it.
    """

    def __init__(self, parameters: list[Parameter]) -> None:
        num_elements = sum(parameter.numel() for parameter in parameters)
        device = parameters[0].device
        self.flat = Parameter(torch.zeros(num_elements, device=device))
        self._parameters = parameters
        self._positions: dict[int, tuple[int, int, int]] = {}
        begin = 0
        for parameter in parameters:
            end = begin + parameter.numel()
            self.flat.data[begin:end] = parameter.data
            hold(parameter, self.flat.data[begin:end])
            self._positions[id(parameter)] = 0, begin, end - begin
            begin = end
        zero = SimpleNamespace(
            fp16_groups=[parameters],
            fp32_partitioned_groups_flat=[self.flat],
            grad_position=self._positions,
            get_param_id=id,
        )
        self.master = MasterWeights(SimpleNamespace(optimizer=zero))

    def take_gradients(self) -> None:
        """Move the layers' gradients into that of `flat`; there is nothing else then."""
        self.flat.grad = torch.cat([parameter.grad for parameter in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None


def put_base(made: dict[str, dict[str, Parameter]], tensors: dict[str, dict[str, Any]]) -> None:
    """Have the parameters of a base (from `build_sparse_model`) hold shared tensors."""
    for name, parameters in made.items():
        for role, parameter in parameters.items():
            hold(parameter, tensors[name][role])
