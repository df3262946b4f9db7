"""A small Llama on a real ZeRO-3 engine, and a record of what it sends and where it waits: in a micro batch, and in
optimizer steps, estimation steps and events."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import deepspeed
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_ds.config import RunConfig, build_deepspeed_config
from sparse_ds.distributed.born_partitioned import PartitionedParameters
from sparse_ds.distributed.gradient_tiles import clip_coefficient
from sparse_ds.distributed.process_group import world_size
from sparse_ds.distributed.zero3_partitions import MasterWeights, full_size
from sparse_ds.drop_grow.event import Seeds
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.model.base_tensors import BaseSettings
from sparse_ds.model.build import SparseSettings, build_sparse_model, plan_layouts
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.sparse.index_storage import IndexStorage, index_parameters
from sparse_ds.sparse.sparse_linear import SparseLayer
from sparse_ds.training.callbacks import MergeAccumulators
from sparse_ds.training.setup import (
    bind_optimizer,
    checkpoint_activations,
    gather_blocks,
    make_drop_and_grow,
    make_estimation,
    make_optimizer,
)

NUM_BLOCKS, HIDDEN, VOCABULARY, NUM_TOKENS = 6, 64, 2048, 16
"""The embedding and the head have 2.6 times the elements of a block each, as in Llama-3-8B."""
DENSITY = 0.02
NUM_UNRECORDED_STEPS = 3
"""DeepSpeed looks at two steps before it prefetches."""
WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
"""Operators that make the host wait for the device, on a GPU."""


@dataclass(frozen=True)
class Case:
    """One engine."""

    quantization: str
    gradient_checkpointing: bool
    by_block: bool = True
    index_storage: IndexStorage = "int32"
    method: str = "sparta"


class Started(NamedTuple):
    """An engine and what belongs to it."""

    config: RunConfig
    engine: Any
    model: nn.Module
    layers: dict[str, Any]
    optimizer: Any
    master: MasterWeights


@dataclass
class RecordedEvents:
    """Of one rank: the collectives of each part beyond those of a micro batch and `engine.step()`, as (name, bytes of
    the input), and the sizes that say how many there may be."""

    parts: dict[str, list[tuple[str, int]]]
    num_linears: int
    num_elements: int
    """Of all target matrices."""
    num_lines: int
    """Their rows and columns."""
    num_active: int


@dataclass
class Recorded:
    """Of one rank, in one micro batch; bytes are those that it sends at least, over a ring."""

    num_collectives: int = 0
    gathered_bytes: float = 0.0
    reduced_bytes: float = 0.0
    other_bytes: float = 0.0
    base_bytes: float = 0.0
    """To gather the frozen base once."""
    index_bytes: float = 0.0
    """To gather the indices once."""
    block_bytes: float = 0.0
    """To gather all of all blocks once."""
    gathered_in_backward_bytes: float = 0.0
    num_active: int = 0
    num_blocks: int = NUM_BLOCKS
    num_linears: int = 0
    step_collectives: list[str] = field(default_factory=list)
    """In `engine.step()`."""
    waits: dict[str, int] = field(default_factory=dict)
    """Of WAITS in forward and backward, by torch's profiler."""
    reads: list[str] = field(default_factory=list)
    """Where forward and backward read numbers of a tensor in Python."""


class Ledger(TorchDispatchMode):
    """Every collective of this thread: (name, bytes of its input)."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # (output, input, group, ...), or (input, group, ...) where that is the output as well.
            sent = args[1] if isinstance(args[1], Tensor | list) else args[0]
            tensors = [sent] if isinstance(sent, Tensor) else list(sent)
            self.entries.append((func._schema.name.split("::")[1], sum(each.nbytes for each in tensors)))
        return func(*args, **(kwargs or {}))


@contextmanager
def python_reads() -> Iterator[list[str]]:
    """The lines that call `tolist`, `item`, `cpu` or `numpy` of a tensor, or make an `int` or a `bool` of it. To the
    profiler `tolist` and `numpy` are no operators where the tensor is on the host."""
    found: list[str] = []
    originals = {name: getattr(Tensor, name) for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__")}

    def recording(name: str) -> Any:
        def record(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = traceback.extract_stack()[-2]
            found.append(f"{caller.filename}:{caller.lineno} {name}")
            return originals[name](self, *args, **kwargs)

        return record

    for name in originals:
        setattr(Tensor, name, recording(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def start(case: Case) -> Started:
    """The engine over a base of zeros. Collectives: those of `deepspeed.initialize`."""
    # As a 7B model to the defaults: a bucket and limits of a quarter and of two and a half blocks.
    block_elements = 4 * HIDDEN**2 + 3 * HIDDEN * 172
    zero = {
        "stage3_prefetch_bucket_size": block_elements // 4,
        "stage3_max_live_parameters": block_elements * 5 // 2,
        "stage3_max_reuse_distance": block_elements * 5 // 2,
    }
    config = RunConfig.model_validate(
        {
            "model": {"dtype": "bfloat16", "quantization": case.quantization},
            "method": {"name": case.method, "density": DENSITY},
            "optimizer": {"learning_rate": 0.01},
            "train": {"output_dir": "unused"},
            "deepspeed": {"zero_optimization": {**zero, "reduce_bucket_size": 6000}},
        }
    )
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                intermediate_size=172,
                num_hidden_layers=NUM_BLOCKS,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=NUM_TOKENS,
                use_cache=False,
            )
        ).to(torch.bfloat16)
    base = BaseSettings(torch.bfloat16, nf4=case.quantization == "nf4", double_quantization=False, attention="eager")
    sparse = SparseSettings("all-linear", DENSITY, seed=0, index_storage=case.index_storage)
    build_sparse_model(model, plan_layouts(model, sparse), base, sparse, PartitionedParameters())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    block = None
    if case.by_block:
        block = gather_blocks(model)
        config.deepspeed["zero_optimization"]["stage3_prefetch_bucket_size"] = block.num_elements
    if case.gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    optimizer = make_optimizer(config, [layer.values for layer in layers.values()])
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=build_deepspeed_config(config, world_size(), 1, block)
    )
    master = MasterWeights(engine)
    master.zero_padding()
    bind_optimizer(optimizer, layers, master)  # type: ignore[arg-type]
    return Started(config, engine, model, layers, optimizer, master)


def record(case: Case) -> Recorded:
    """Two steps after the first ones: one under the ledger, one under the profiler."""
    started = start(case)
    engine, model, layers = started.engine, started.model, started.layers
    ids = torch.arange(NUM_TOKENS).view(1, -1)

    def micro_batch() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)

    for _ in range(NUM_UNRECORDED_STEPS):
        micro_batch()
        engine.step()
    others = world_size() - 1
    recorded = Recorded(num_linears=len(layers))
    with Ledger() as ledger:
        loss = engine(input_ids=ids, labels=ids).loss
        num_in_forward = len(ledger.entries)
        engine.backward(loss)
        num_in_micro_batch = len(ledger.entries)
        engine.step()
    recorded.num_collectives = num_in_micro_batch
    recorded.step_collectives = [name for name, _ in ledger.entries[num_in_micro_batch:]]
    for position, (name, num_bytes) in enumerate(ledger.entries[:num_in_micro_batch]):
        if "allgather" in name:
            recorded.gathered_bytes += num_bytes * others
            if position >= num_in_forward:
                recorded.gathered_in_backward_bytes += num_bytes * others
        elif "reduce_scatter" in name:
            recorded.reduced_bytes += num_bytes * others / world_size()
        else:
            recorded.other_bytes += 2 * num_bytes * others / world_size()
    indices = [parameter for layer in layers.values() for parameter in index_parameters(layer).values()]
    recorded.index_bytes = sum(p.ds_tensor.nbytes for p in indices) * others
    deltas = {id(parameter) for parameter in [*indices, *(layer.values for layer in layers.values())]}
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in deltas]
    recorded.base_bytes = sum(p.ds_tensor.nbytes for p in frozen) * others
    recorded.block_bytes = sum(p.ds_tensor.nbytes for p in model.get_submodule("model.layers").parameters()) * others
    recorded.num_active = sum(full_size(layer.values) for layer in layers.values())
    with profile(activities=[ProfilerActivity.CPU]) as trace, python_reads() as reads:
        micro_batch()
    recorded.waits = {event.key: event.count for event in trace.key_averages() if event.key in WAITS}
    recorded.reads = reads
    engine.step()
    assert all(math.isfinite(float(value)) for value in engine.get_global_grad_norm().view(-1))
    return recorded


def record_events(case: Case) -> RecordedEvents:
    """An ordinary step, two estimation steps where the method has them, and an event."""
    started = start(case)
    config, engine, layers, optimizer = started.config, started.engine, started.layers, started.optimizer
    ids = torch.arange(NUM_TOKENS).view(1, -1)
    device = torch.device("cpu")
    weight_states = WeightStates(optimizer, started.master.flats, keeps_event_values=False)
    estimation = make_estimation(config, layers, device)
    drop_and_grow = make_drop_and_grow(config, optimizer, layers, started.master, weight_states, estimation, device)
    merge = MergeAccumulators(optimizer, device) if isinstance(optimizer, SparseSM3) else None
    none: Any = SimpleNamespace()

    def engine_step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    def finish_step() -> None:
        if merge is not None:
            merge.on_optimizer_step(none, none, none)

    def estimation_step() -> None:
        assert estimation is not None
        estimation.begin_step()
        engine_step()
        finish_step()
        estimation.end_step(clip_coefficient(engine))

    def event() -> None:
        num_to_replace = {name: layer.num_active // 4 for name, layer in layers.items()}
        drop_and_grow.run(1, num_to_replace, Seeds(None, 1))

    for _ in range(NUM_UNRECORDED_STEPS):
        engine_step()
        finish_step()
    with Ledger() as ledger:
        engine_step()
    ordinary = Counter(ledger.entries)
    parts = {"optimizer step": recorded_beyond(Counter(), finish_step)}
    if estimation is not None:
        parts["first estimation step"] = recorded_beyond(ordinary, estimation_step)
        parts["second estimation step"] = recorded_beyond(ordinary, estimation_step)
        parts["third estimation step"] = recorded_beyond(ordinary, estimation_step)
    parts["event"] = recorded_beyond(Counter(), event)
    layouts = [layer.layout for layer in layers.values()]
    return RecordedEvents(
        parts,
        len(layers),
        sum(layout.num_elements for layout in layouts),
        sum(layout.num_rows + layout.num_cols for layout in layouts),
        sum(full_size(layer.values) for layer in layers.values()),
    )


def recorded_beyond(known: Counter[tuple[str, int]], action: Callable[[], None]) -> list[tuple[str, int]]:
    """The collectives of `action` without the known ones, all of which must be among them."""
    with Ledger() as ledger:
        action()
    found = Counter(ledger.entries)
    assert known <= found, f"not sent: {known - found}"
    return list((found - known).elements())


def record_all(cases: list[Case]) -> list[Recorded]:
    torch.set_num_threads(1)
    return [record(case) for case in cases]


def record_all_events(cases: list[Case]) -> list[RecordedEvents]:
    torch.set_num_threads(1)
    return [record_events(case) for case in cases]
