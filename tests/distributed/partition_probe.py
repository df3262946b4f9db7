"""Looks into a real run from the inside: what every rank holds between steps, and what it gathers within them."""

from __future__ import annotations

import gc
import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.config.schema import RunConfig
from sparse_ds.distributed import process_group
from sparse_ds.distributed.launch_environment import complete_environment
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.training import run as run_module
from sparse_ds.training.trainer import SparseTrainer

WEIGHT_STATES = ("exp_avg", "birth_step")
SMALLEST_COMPARED_BYTES = 256
"""A full tensor of fewer bytes (a second-level statistic of two numbers) is as large as many a scalar."""


@dataclass
class ProbeReport:
    """What one rank saw. Broken contracts are raised on the spot; these are the proofs that it looked."""

    checks: list[str] = field(default_factory=list)
    """Where the between-steps contract was checked: "step 1", "evaluation after step 2", ..."""
    noticed: list[str] = field(default_factory=list)
    """Breaches of the contract that were staged before the first step and found by the same check."""
    num_samples: int = 0
    """Moments within steps at which the gathered parameters were counted."""
    num_backward_samples: int = 0
    max_gathered_elements: int = 0
    largest_tensor_elements: int = 0
    largest_layer_elements: int = 0
    """All parameters of one module, which DeepSpeed gathers together."""
    block_elements: int = 0
    """All parameters of one transformer block."""
    base_before: str = ""
    base_after: str = ""
    num_changed_values: int = 0
    checkpointed: bool = False


def probe_run(settings: dict[str, Any]) -> ProbeReport:
    """One whole `run(...)` of this rank, probed."""
    report = ProbeReport()
    weight_states: list[WeightStates] = []

    class ProbedStates(WeightStates):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            weight_states.append(self)

    class ProbedTrainer(SparseTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            report.base_before = hash_base(self.model)
            self.add_callback(_InstallLast(self, report, weight_states))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "WeightStates", ProbedStates)
        patch.setattr(run_module, "SparseTrainer", ProbedTrainer)
        run_module.run(RunConfig.model_validate(settings), complete_environment(os.environ), "cpu")
    return report


class _InstallLast(TrainerCallback):
    """Installs the probe behind every callback of the run, so that it sees what is left after all of them."""

    def __init__(self, trainer: SparseTrainer, report: ProbeReport, weight_states: list[WeightStates]) -> None:
        self._trainer, self._report, self._weight_states = trainer, report, weight_states

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        (weight_states,) = self._weight_states
        probe = PartitionProbe(self._trainer, self._report, weight_states)
        probe.check("start")
        probe.stage_breaches()
        self._trainer.add_callback(probe)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self._trainer.model
        self._report.base_after = hash_base(model)
        values = [parameter.ds_tensor for parameter in model.parameters() if parameter.requires_grad]
        self._report.num_changed_values = sum(int(value.count_nonzero()) for value in values)


class PartitionProbe(TrainerCallback):
    """Checks the contract at the end of every step and evaluation; counts gathered elements within."""

    def __init__(self, trainer: SparseTrainer, report: ProbeReport, weight_states: WeightStates) -> None:
        self._trainer, self._report, self._weight_states = trainer, report, weight_states
        self._model = trainer.model
        self._zero = trainer.deepspeed.optimizer
        self._names = {parameter: name for name, parameter in self._model.named_parameters()}
        self._world_size = process_group.world_size()
        modules = [_num_elements(module.parameters(recurse=False)) for module in self._model.modules()]
        report.largest_tensor_elements = max(p.ds_numel for p in self._names)
        report.largest_layer_elements = max(modules)
        report.block_elements = _num_elements(self._model.model.layers[0].parameters())
        report.checkpointed = self._model.is_gradient_checkpointing
        for module in self._model.modules():
            module.register_forward_pre_hook(self._count_gathered)
            if isinstance(module, SparseLinear):
                self._count_at_products(module)

    def _count_at_products(self, layer: SparseLinear) -> None:
        """The dense weight is built where the parameters are gathered: in forward, recomputation and backward."""
        merged_weight = layer.merged_weight

        def counted(active_indices: Tensor | None = None) -> Any:
            self._count_gathered()
            self._report.num_backward_samples += torch._C._current_graph_task_id() != -1
            return merged_weight(active_indices)

        layer.merged_weight = counted  # type: ignore[method-assign]

    def _count_gathered(self, *hook_arguments: Any) -> None:
        # A tensor on its way has its buffer already.
        gathered = _num_elements(p for p in self._names if p.ds_status.name != "NOT_AVAILABLE")
        self._report.max_gathered_elements = max(self._report.max_gathered_elements, gathered)
        self._report.num_samples += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.check(f"step {state.global_step}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.check(f"evaluation after step {state.global_step}")

    def check(self, where: str) -> None:
        for parameter, name in self._names.items():
            assert parameter.ds_status.name == "NOT_AVAILABLE", f"{where}: {name} is {parameter.ds_status.name}"
            assert parameter.data.numel() == 0, f"{where}: {name} holds {parameter.data.numel()} gathered elements"
            assert parameter.grad is None, f"{where}: {name} holds a gradient"
            size = self._partition_size(parameter)
            assert parameter.ds_tensor.numel() == size, f"{where}: {name}: {parameter.ds_tensor.numel()} of {size}"
        known = self._known_storages(where)
        full_sizes, smallest_matrix = self._full_sizes()
        for tensor in _live_tensors():
            storage = tensor.untyped_storage()
            if storage.data_ptr() in known:
                continue
            described = f"{where}: an unknown {tensor.dtype} tensor {tuple(tensor.shape)} of {storage.nbytes()} bytes"
            assert storage.nbytes() < smallest_matrix, f"{described} is as large as a full matrix"
            is_like_full = storage.nbytes() >= SMALLEST_COMPARED_BYTES and storage.nbytes() in full_sizes
            assert not is_like_full, f"{described} has the size of a full tensor"
        self._report.checks.append(where)

    def stage_breaches(self) -> None:
        """Break the contract on purpose, one way at a time: a check that finds nothing would prove nothing."""
        layers = [module for module in self._model.modules() if isinstance(module, SparseLinear)]
        layer = min(layers, key=lambda layer: layer.layout.num_elements)
        matrix = layer.weight if layer.packed is None else layer.packed
        layer.values.grad = torch.zeros(0)
        self._expect_breach("gradient", "holds a gradient")
        layer.values.grad = None
        for what, parameter, message in (
            ("copy of a matrix", matrix, "is as large as a full matrix"),
            ("copy of the values", layer.values, "has the size of a full tensor"),
        ):
            copy = torch.zeros(parameter.ds_numel, dtype=parameter.dtype)
            self._expect_breach(what, message)
            del copy
        # Last: the gathered buffer, a full tensor, may outlive its context for a moment.
        with deepspeed.zero.GatheredParameters([layer.indices]):
            self._expect_breach("gathered", "is AVAILABLE")

    def _expect_breach(self, what: str, message: str) -> None:
        num_checks = len(self._report.checks)
        try:
            self.check(what)
        except AssertionError as error:
            if message in str(error):
                self._report.noticed.append(what)
        del self._report.checks[num_checks:]

    def _known_storages(self, where: str) -> set[int]:
        """Data pointers of everything that may be there, each checked to be no larger than partitions are."""
        trained = [parameter for parameter in self._names if parameter.requires_grad]
        trained_elements = sum(self._partition_size(parameter) for parameter in trained)
        storages = {p.ds_tensor.untyped_storage().data_ptr(): p.ds_tensor.untyped_storage() for p in self._names}
        partition_bytes = sum(self._partition_size(p) * p.ds_tensor.element_size() for p in self._names)
        held_bytes = sum(storage.nbytes() for storage in storages.values())
        assert held_bytes == partition_bytes, f"{where}: partitions take {held_bytes} bytes, expected {partition_bytes}"

        flats = list(self._zero.fp32_partitioned_groups_flat)
        assert sum(flat.numel() for flat in flats) == trained_elements, f"{where}: master weights"
        optimizer = self._zero.optimizer
        by_name = self._weight_states.read()
        assert tuple(by_name) == WEIGHT_STATES, f"{where}: {tuple(by_name)}"
        states = [tensor for tensors in by_name.values() for tensor in tensors]
        assert all(tensor.element_size() == 4 for tensor in states), f"{where}: state"
        assert sum(tensor.numel() for tensor in states) == len(WEIGHT_STATES) * trained_elements, f"{where}: state"
        known = {id(tensor) for tensor in states}
        assert all(id(tensor) in known for flat in flats for tensor in optimizer.state[flat].values()), (
            f"{where}: state"
        )
        gradients = self._zero.grad_partitions_flat_buffer
        assert gradients.numel() == trained_elements, f"{where}: gradients"
        assert isinstance(optimizer, SparseSM3)
        layouts = [module.layout for module in self._model.modules() if isinstance(module, SparseLinear)]
        num_accumulators = sum(layout.num_rows + layout.num_cols for layout in layouts)
        assert optimizer.accumulators.numel() == optimizer.pending_accumulators.numel() == num_accumulators
        cohorts = [births.cohorts for births in self._weight_states._births if births.cohorts is not None]
        assert sum(each.nbytes for each in cohorts) in (0, trained_elements), f"{where}: birth steps"
        buckets = [bucket.buffer for bucket in self._zero.ipg_buckets.values() if bucket.buffer is not None]
        assert sum(bucket.numel() for bucket in buckets) == self._zero.reduce_bucket_size
        others = [
            *flats,
            *states,
            *cohorts,
            gradients,
            optimizer.accumulators,
            optimizer.pending_accumulators,
            *buckets,
        ]
        return {*storages, *(tensor.untyped_storage().data_ptr() for tensor in others)}

    def _full_sizes(self) -> tuple[set[int], int]:
        """Bytes of the full tensors of the sparse layers, and of the smallest full base matrix among them."""
        sizes, matrices = set(), []
        for module in self._model.modules():
            if isinstance(module, SparseLinear):
                sizes |= {p.ds_numel * p.ds_tensor.element_size() for p in module.parameters()}
                base = module.weight if module.packed is None else module.packed
                matrices.append(base.ds_numel * base.ds_tensor.element_size())
        return sizes, min(matrices)

    def _partition_size(self, parameter: nn.Parameter) -> int:
        return math.ceil(parameter.ds_numel / self._world_size)


def _num_elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.ds_numel for parameter in parameters)


def hash_base(model: nn.Module) -> str:
    """sha256 over every byte of this rank's partitions of the frozen base (all but indices and values)."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad and not name.endswith(".indices"):
            digest.update(name.encode())
            digest.update(parameter.ds_tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _live_tensors() -> list[torch.Tensor]:
    # What only a reference cycle keeps is nobody's any more; whether it was collected already is chance.
    gc.collect()
    # By exact type: an isinstance would run the properties of proxy objects. A FakeTensor has no storage.
    kinds = _with_subclasses(torch.Tensor) - _with_subclasses(FakeTensor)
    return [found for found in gc.get_objects() if type(found) in kinds]


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*(_with_subclasses(subclass) for subclass in type.__subclasses__(kind)))
