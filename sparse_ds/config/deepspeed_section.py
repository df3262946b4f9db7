"""The `deepspeed` section: what a run may set there, and the complete DeepSpeed configuration made from a run.

A value has one owner. Batch sizes, clipping, dtypes, optimizer and schedule belong to other sections and are derived
here; the section itself holds what nobody else owns (memory, communication, offload, profiling).
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ds.config.deepspeed_keys import DEEPSPEED_KEYS, FIXED_KEYS, REFUSED_KEYS, Key
from sparse_ds.config.messages import describe_value

if TYPE_CHECKING:
    from sparse_ds.config.schema import RunConfig

MIN_REDUCE_BUCKET_SIZE = 2**16
"""Elements: smaller buckets (tiny models) only cost more calls; 256 KiB in fp32."""
DEFAULT_REDUCE_BUCKET_SIZE = 2**24
"""Elements, where the largest trained tensor is not known: 64 MiB in fp32. DeepSpeed allocates the bucket as a whole,
and its own default of 5e8 elements is 2 GB."""
PREFETCH_BUCKET_SIZE = 50_000_000
"""Elements gathered ahead of use, at least: about the largest matrix of a 7B model (4096 x 11008), 100 MB in bf16.
Where blocks are gathered as one: a block, so that one message brings the next block while this one computes."""
MAX_LIVE_PARAMETERS = 500_000_000
"""Elements gathered at a time, at least: two of the largest matrices of a 70B model (8192 x 28672), 1 GB in bf16. Where
blocks are gathered as one: two blocks, the one at work and the next."""
MAX_REUSE_DISTANCE = 500_000_000
"""Elements: what is used again within this distance stays gathered: the last block of a 7B model (2e8) from its forward
to its backward."""
QUIET_STEPS_PER_PRINT = 2**31 - 1
"""Steps between DeepSpeed's own reports: never, in an integer that JSON can hold."""


class BlockSizes(NamedTuple):
    """Of the largest transformer block."""

    num_elements: int
    """Of all its tensors: the base as it is stored, indices and values."""
    num_trained: int
    """Of those that train."""


def find_deepspeed_problems(section: Mapping[str, Any], method_name: str | None) -> list[str]:
    """One line per mistake in the `deepspeed` section.

    Args:
        section: the section as it was read.
        method_name: `method.name`, or None when it could not be read; some offloads depend on it.
    """
    problems = list(_check_keys(section, DEEPSPEED_KEYS, prefix=""))
    if not problems:
        problems += _check_offload(section, method_name)
    return problems


def gathers_blocks(config: RunConfig, world_size: int, block: BlockSizes) -> bool:
    """Whether the tensors of a transformer block are gathered together: with several ranks, unless the run limits what
    is gathered at a time to less than two blocks."""
    limit = config.deepspeed.get("zero_optimization", {}).get("stage3_max_live_parameters")
    return world_size > 1 and (limit is None or limit >= 2 * block.num_elements)


def build_deepspeed_config(
    config: RunConfig, world_size: int, largest_num_active: int | None = None, block: BlockSizes | None = None
) -> dict[str, Any]:
    """The complete configuration for `deepspeed.initialize` and `TrainingArguments(deepspeed=...)`.

    Values of the `deepspeed` section win over the defaults here; those that other sections own cannot be in it.

    Args:
        config: the run.
        world_size: number of ranks.
        largest_num_active: elements of the largest trained tensor (the largest K, or the largest matrix for `full`);
            sizes the gradient bucket, which DeepSpeed allocates as a whole. None: DEFAULT_REDUCE_BUCKET_SIZE.
        block: given where the tensors of a block are gathered together: one message then brings a block, and one takes
            the gradients of a block away.

    Returns:
        A new dict, all plain JSON types.

    Raises:
        UserError: the batch sizes do not fit to `world_size`.
    """
    plan = config.batch_plan(world_size)
    bucket = DEFAULT_REDUCE_BUCKET_SIZE
    if largest_num_active is not None:
        bucket = max(largest_num_active, MIN_REDUCE_BUCKET_SIZE)
    block_elements = 0
    if block is not None:
        bucket, block_elements = max(bucket, block.num_trained), block.num_elements
    result: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.max_grad_norm,
        # The trained values are fp32 over a base of either dtype; DeepSpeed's defaults would round their gradients.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": max(PREFETCH_BUCKET_SIZE, block_elements),
            "stage3_max_live_parameters": max(MAX_LIVE_PARAMETERS, 2 * block_elements),
            "stage3_max_reuse_distance": MAX_REUSE_DISTANCE,
            # Explicit: otherwise transformers sets 10 * hidden size, and small tensors stay whole on every rank.
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "steps_per_print": QUIET_STEPS_PER_PRINT,
        "wall_clock_breakdown": False,
    }
    if config.model.dtype == "bfloat16":
        result["bf16"] = {"enabled": True}
    _merge(result, config.deepspeed)
    return result


def _check_keys(section: Mapping[str, Any], table: Mapping[str, Key], prefix: str) -> Iterator[str]:
    for name, value in section.items():
        path, field = f"{prefix}{name}", f"deepspeed.{prefix}{name}"
        if path in REFUSED_KEYS:
            yield f"{field}: cannot be set here: {REFUSED_KEYS[path]}."
        elif name not in table:
            yield f"{field}: unknown key{_suggest(name, table, prefix)}"
        elif value == "auto":
            yield f'{field}: got "auto", expected {_describe_key(table[name])}. Leave the key out for the default.'
        elif not _fits(value, table[name]):
            yield f"{field}: got {describe_value(value)}, expected {_describe_key(table[name])}."
        elif path in FIXED_KEYS and value != FIXED_KEYS[path].value:
            fixed = FIXED_KEYS[path]
            yield f"{field}: got {describe_value(value)}, expected {_json(fixed.value)}: {fixed.reason}."
        elif (nested := table[name].keys) is not None:
            yield from _check_keys(value, nested, prefix=f"{path}.")


def _check_offload(section: Mapping[str, Any], method_name: str | None) -> Iterator[str]:
    zero = section.get("zero_optimization") or {}
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) or {}
        if offload.get("device") != "nvme":
            continue
        field = f"deepspeed.zero_optimization.{name}"
        is_sparse = method_name is not None and method_name != "full"
        if name == "offload_optimizer" and is_sparse:
            yield (
                f"{field}.device: got nvme, expected cpu or none: NVMe offload takes only fp32 state of the weights' "
                "own shape, and the sparse optimizers keep ages, or maxima of rows and columns."
            )
        elif name == "offload_param" and is_sparse:
            yield (
                f"{field}.device: got nvme, expected cpu or none: its buffers have the model's dtype, and indices and "
                "packed weights have not."
            )
        elif not offload.get("nvme_path"):
            yield f"{field}.nvme_path: missing, expected a folder on the NVMe device (device is nvme)."


def _suggest(name: str, table: Mapping[str, Key], prefix: str) -> str:
    siblings = [*table, *(path.removeprefix(prefix) for path in REFUSED_KEYS if path.startswith(prefix))]
    close = difflib.get_close_matches(name, [key for key in siblings if "." not in key], n=1)
    if close:
        owner = REFUSED_KEYS.get(f"{prefix}{close[0]}")
        return f"; did you mean {close[0]}?" + (f" It cannot be set here: {owner}." if owner else "")
    for parent, key in DEEPSPEED_KEYS.items():
        if not prefix and key.keys is not None and name in key.keys:
            return f"; did you mean {parent}.{name}?"
    if prefix and name in DEEPSPEED_KEYS:
        return f"; did you mean deepspeed.{name} (one level up)?"
    return f"; DeepSpeed knows here: {', '.join(sorted(table))}."


def _fits(value: Any, key: Key) -> bool:
    if key.kind == "boolean":
        return isinstance(value, bool)
    if key.kind == "section":
        return isinstance(value, dict)
    if key.kind == "list of text":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if key.kind == "text":
        return isinstance(value, str) and (not key.choices or value in key.choices)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    # DeepSpeed itself takes 5e8 as an integer.
    is_whole = isinstance(value, int) or value.is_integer()
    return (key.kind == "number" or is_whole) and (key.minimum is None or value >= key.minimum)


def _describe_key(key: Key) -> str:
    if key.choices:
        return " or ".join(key.choices)
    article = "an" if key.kind == "integer" else "a"
    described = key.kind if key.kind == "text" else f"{article} {key.kind}"
    return described if key.minimum is None else f"{described} >= {key.minimum:g}"


def _json(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _merge(target: dict[str, Any], extra: Mapping[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = copy.deepcopy(value)
