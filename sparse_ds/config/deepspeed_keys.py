"""The keys that DeepSpeed reads, as tables: which of them a run may set, and who owns the others.

DeepSpeed takes an unknown top-level key without a word (`gradient_cliping: 5` leaves the clipping at its default), so
every key of the `deepspeed` section is looked up here. The tables are those of DeepSpeed 0.19.8; a test compares them
with the installed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Key:
    """One key: the JSON type of its value and what it may be."""

    kind: Literal["boolean", "integer", "number", "text", "list of text", "section"]
    minimum: float | None = None
    """Smallest number allowed."""
    choices: tuple[str, ...] = ()
    """The only texts allowed; none: any."""
    keys: Mapping[str, Key] | None = None
    """What a section may contain."""


@dataclass(frozen=True)
class Fixed:
    """A key that has only one value here; giving that value is allowed and changes nothing."""

    value: Any
    reason: str


BOOLEAN, TEXT = Key("boolean"), Key("text")
COUNT, POSITIVE = Key("integer", minimum=0), Key("integer", minimum=1)


def _section(**keys: Key) -> Key:
    return Key("section", keys=keys)


_OFFLOAD_OPTIMIZER = _section(
    device=Key("text", choices=("none", "cpu", "nvme")),
    nvme_path=TEXT,
    buffer_count=COUNT,
    pin_memory=BOOLEAN,
    pipeline_read=BOOLEAN,
    pipeline_write=BOOLEAN,
    fast_init=BOOLEAN,
    ratio=Key("number", minimum=0),
    super_offload=BOOLEAN,
    cpuadam_cores_perc=Key("number", minimum=0),
)
_OFFLOAD_PARAM = _section(
    device=Key("text", choices=("none", "cpu", "nvme")),
    nvme_path=TEXT,
    buffer_count=COUNT,
    buffer_size=COUNT,
    max_in_cpu=COUNT,
    pin_memory=BOOLEAN,
)
_ZERO_OPTIMIZATION = _section(
    stage=COUNT,
    contiguous_gradients=BOOLEAN,
    reduce_scatter=BOOLEAN,
    reduce_bucket_size=POSITIVE,
    use_multi_rank_bucket_allreduce=BOOLEAN,
    allgather_partitions=BOOLEAN,
    allgather_bucket_size=COUNT,
    overlap_comm=BOOLEAN,
    compute_grad_norm=BOOLEAN,
    load_from_fp32_weights=BOOLEAN,
    elastic_checkpoint=BOOLEAN,
    offload_param=_OFFLOAD_PARAM,
    offload_optimizer=_OFFLOAD_OPTIMIZER,
    sub_group_size=POSITIVE,
    stage3_prefetch_bucket_size=COUNT,
    stage3_param_persistence_threshold=COUNT,
    stage3_model_persistence_threshold=COUNT,
    stage3_max_live_parameters=COUNT,
    stage3_max_reuse_distance=COUNT,
    stage3_gather_16bit_weights_on_model_save=BOOLEAN,
    stage3_module_granularity_threshold=COUNT,
    stage3_use_all_reduce_for_fetch_params=BOOLEAN,
    stage3_allgather_sequential=BOOLEAN,
    ignore_unused_parameters=BOOLEAN,
    legacy_stage1=BOOLEAN,
    round_robin_gradients=BOOLEAN,
    parameter_alignment=BOOLEAN,
    zero_hpz_partition_size=COUNT,
    zero_quantized_weights=BOOLEAN,
    zero_quantized_nontrainable_weights=BOOLEAN,
    zero_quantized_gradients=BOOLEAN,
    memory_efficient_linear=BOOLEAN,
    pipeline_loading_checkpoint=BOOLEAN,
    override_module_apply=BOOLEAN,
    log_trace_cache_warnings=BOOLEAN,
    enable_sanity_checks=BOOLEAN,
    save_muon_momentum_buffer_in_memory=BOOLEAN,
    leaf_module=_section(classes=Key("list of text"), names=Key("list of text"), name_suffixes=Key("list of text")),
)
DEEPSPEED_KEYS: Mapping[str, Key] = {
    "zero_optimization": _ZERO_OPTIMIZATION,
    "zero_allow_untested_optimizer": BOOLEAN,
    "zero_force_ds_cpu_optimizer": BOOLEAN,
    "managed_gradient_accumulation": BOOLEAN,
    "prescale_gradients": BOOLEAN,
    "gradient_predivide_factor": Key("number", minimum=0),
    "gradient_allreduce_op": Key("text", choices=("mean", "sum")),
    "disable_allgather": BOOLEAN,
    "steps_per_print": POSITIVE,
    "wall_clock_breakdown": BOOLEAN,
    "memory_breakdown": BOOLEAN,
    "dump_state": BOOLEAN,
    "disable_python_gc": BOOLEAN,
    "log_level": Key("text", choices=("debug", "info", "warning", "error", "critical")),
    "vocabulary_size": POSITIVE,
    "activation_checkpointing": _section(
        partition_activations=BOOLEAN,
        number_checkpoints=POSITIVE,
        contiguous_memory_optimization=BOOLEAN,
        cpu_checkpointing=BOOLEAN,
        profile=BOOLEAN,
        synchronize_checkpoint_boundary=BOOLEAN,
    ),
    "aio": _section(
        block_size=POSITIVE,
        queue_depth=POSITIVE,
        intra_op_parallelism=POSITIVE,
        single_submit=BOOLEAN,
        overlap_events=BOOLEAN,
        use_gds=BOOLEAN,
    ),
    "comms_logger": _section(
        enabled=BOOLEAN, prof_all=BOOLEAN, prof_ops=Key("list of text"), verbose=BOOLEAN, debug=BOOLEAN
    ),
    "flops_profiler": _section(
        enabled=BOOLEAN,
        recompute_fwd_factor=Key("number", minimum=0),
        profile_step=POSITIVE,
        module_depth=Key("integer", minimum=-1),
        top_modules=POSITIVE,
        detailed=BOOLEAN,
        output_file=TEXT,
    ),
    "timers": _section(throughput=_section(enabled=BOOLEAN, synchronized=BOOLEAN)),
    "tensorboard": _section(enabled=BOOLEAN, output_path=TEXT, job_name=TEXT),
    "csv_monitor": _section(enabled=BOOLEAN, output_path=TEXT, job_name=TEXT),
    "wandb": _section(enabled=BOOLEAN, group=TEXT, team=TEXT, project=TEXT),
    "comet": _section(
        enabled=BOOLEAN,
        samples_log_interval=POSITIVE,
        project=TEXT,
        workspace=TEXT,
        api_key=TEXT,
        experiment_name=TEXT,
        experiment_key=TEXT,
        online=BOOLEAN,
        mode=Key("text", choices=("get", "create", "get_or_create")),
    ),
}
"""Keys that may be in the section, nested as in DeepSpeed."""

_UNTESTED_OPTIMIZER = "the optimizers of this package are its own"
_PACKED = "it would change packed 4-bit weights and indices, which are bytes and integers"
FIXED_KEYS: Mapping[str, Fixed] = {
    "zero_allow_untested_optimizer": Fixed(True, _UNTESTED_OPTIMIZER),
    "zero_force_ds_cpu_optimizer": Fixed(False, _UNTESTED_OPTIMIZER),
    "managed_gradient_accumulation": Fixed(True, "train.gradient_accumulation_steps says when a step is done"),
    "prescale_gradients": Fixed(False, "statistics of the gradient need its true scale"),
    "gradient_predivide_factor": Fixed(1.0, "statistics of the gradient need its true scale"),
    "gradient_allreduce_op": Fixed("mean", "ZeRO stage 3 averages"),
    "disable_allgather": Fixed(False, "ZeRO stage 3 gathers every parameter"),
    "zero_optimization.stage": Fixed(3, "only stage 3 partitions the base, the indices and the values"),
    "zero_optimization.zero_quantized_weights": Fixed(False, _PACKED),
    "zero_optimization.zero_quantized_nontrainable_weights": Fixed(False, _PACKED),
    "zero_optimization.zero_quantized_gradients": Fixed(False, "gradients are reduced in fp32"),
    "zero_optimization.zero_hpz_partition_size": Fixed(1, "the second copy of a partition would keep old indices"),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": Fixed(False, _PACKED),
    "zero_optimization.compute_grad_norm": Fixed(True, "clipping needs the norm of the gradient"),
    "zero_optimization.elastic_checkpoint": Fixed(False, "ZeRO stage 3 no longer supports it"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": Fixed(
        False, "export.merged owns the dense model at the end"
    ),
    "zero_optimization.pipeline_loading_checkpoint": Fixed(False, "there are no pipeline stages"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": Fixed(False, "there is no Muon optimizer"),
    "zero_optimization.offload_optimizer.ratio": Fixed(1.0, "a part needs DeepSpeed's CPU Adam"),
    "zero_optimization.offload_optimizer.super_offload": Fixed(False, "it needs DeepSpeed's CPU Adam"),
}
"""Keys with one value only."""

_BATCH = (
    "train owns it: set train.micro_batch_size and one of train.gradient_accumulation_steps, train.global_batch_size"
)
_DTYPE = "model.dtype owns it (trained values, their gradients and their reduction are fp32 with either dtype)"
_OPTIMIZER = "the section optimizer owns it"
_CHECKPOINT = "the section checkpoint owns it"
_DATA = "the section data owns it"
_NO_MODEL_PARALLEL = "layers are partitioned by ZeRO only; it would split quantized and sparse layers wrongly"
_GONE = "DeepSpeed has removed it"
_NOT_SUPPORTED = "it replaces parts of the ZeRO stage 3 optimizer or engine that sparse training relies on"
_OFFLOAD_OLD = "an old name: use zero_optimization.offload_optimizer or zero_optimization.offload_param"
REFUSED_KEYS: Mapping[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "gradient_clipping": "optimizer.max_grad_norm owns it",
    "optimizer": _OPTIMIZER,
    "scheduler": _OPTIMIZER,
    "fp16": _DTYPE,
    "bf16": _DTYPE,
    "bfloat16": _DTYPE,
    "ddp_bf16": _DTYPE,
    "amp": _DTYPE,
    "torch_autocast": _DTYPE,
    "communication_data_type": _DTYPE,
    "data_types": _DTYPE,
    "fp16_master_weights_and_grads": _DTYPE,
    "fp16_master_weights_and_gradients": _DTYPE,
    "bf16_master_weights_and_grads": _DTYPE,
    "bf16_optimizer_states": _DTYPE,
    "check_overflow": _DTYPE,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "data_efficiency": _DATA,
    "dataloader_drop_last": _DATA,
    "tensor_parallel": _NO_MODEL_PARALLEL,
    "autotp_size": _NO_MODEL_PARALLEL,
    "expert_parallel": _NO_MODEL_PARALLEL,
    "use_data_before_expert_parallelism": _NO_MODEL_PARALLEL,
    "seq_parallel_communication_data_type": _NO_MODEL_PARALLEL,
    "pipeline": _NO_MODEL_PARALLEL,
    "compile": _NOT_SUPPORTED,
    "hybrid_engine": _NOT_SUPPORTED,
    "autotuning": _NOT_SUPPORTED,
    "weight_quantization": "model.quantization owns it",
    "quantize_training": "model.quantization owns it",
    "elasticity": _GONE,
    "sparse_gradients": _GONE,
    "sparse_attention": _GONE,
    "eigenvalue": _GONE,
    "graph_harvesting": _GONE,
    "curriculum_learning": _GONE,
    "progressive_layer_drop": _GONE,
    "compression_training": _GONE,
    "nebula": _GONE,
    "zero_optimization.mics_shard_size": _GONE,
    "zero_optimization.mics_hierarchical_params_gather": _GONE,
    "zero_optimization.zeropp_loco_param": _GONE,
    "zero_optimization.zenflow": _NOT_SUPPORTED,
    "zero_optimization.cpu_offload": _OFFLOAD_OLD,
    "zero_optimization.cpu_offload_param": _OFFLOAD_OLD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD_OLD,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "export.merged owns the dense model at the end",
}
"""Keys that DeepSpeed knows or knew and that do not belong into the section: who owns them, or why not."""
