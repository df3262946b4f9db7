"""The deepspeed section: what it takes, what it refuses, what comes out, and that our tables are DeepSpeed's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from sparse_ds.config import RunConfig, UserError, build_deepspeed_config, parse_config
from sparse_ds.config.deepspeed_keys import DEEPSPEED_KEYS, FIXED_KEYS, REFUSED_KEYS, Key
from sparse_ds.config.deepspeed_section import MIN_REDUCE_BUCKET_SIZE
from sparse_ds.config.methods import all_methods

NVME = {"device": "nvme", "nvme_path": "/nvme"}


def make(deepspeed: dict[str, Any] | None = None, overrides: tuple[str, ...] = ()) -> RunConfig:
    data = {"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "x"}, "deepspeed": deepspeed or {}}
    return parse_config(data, overrides)


BAD_SECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"train_batch_size": 8}, r"train_batch_size: cannot be set here: train owns it: set train\.micro_batch_size"),
    ({"train_micro_batch_size_per_gpu": 8}, r"train_micro_batch_size_per_gpu: cannot be set here: train owns it"),
    ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps: cannot be set here: train owns it"),
    ({"gradient_clipping": 0.5}, r"gradient_clipping: cannot be set here: optimizer\.max_grad_norm owns it"),
    ({"optimizer": {"type": "AdamW"}}, r"optimizer: cannot be set here: the section optimizer owns it"),
    ({"scheduler": {"type": "WarmupLR"}}, r"scheduler: cannot be set here: the section optimizer owns it"),
    ({"fp16": {"enabled": True}}, r"fp16: cannot be set here: model\.dtype owns it"),
    ({"bf16": {"enabled": True}}, r"bf16: cannot be set here: model\.dtype owns it"),
    ({"amp": {"enabled": True}}, r"amp: cannot be set here: model\.dtype owns it"),
    ({"torch_autocast": {"enabled": True}}, r"torch_autocast: cannot be set here: model\.dtype owns it"),
    ({"communication_data_type": "bf16"}, r"communication_data_type: cannot be set here: model\.dtype owns it"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, r"data_types: cannot be set here: model\.dtype owns it"),
    ({"elasticity": {"enabled": True}}, r"elasticity: cannot be set here: DeepSpeed has removed it"),
    ({"tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel: cannot be set here: layers are partitioned by ZeRO"),
    ({"checkpoint": {"load_universal": True}}, r"checkpoint: cannot be set here: the section checkpoint owns it"),
    ({"compile": {"deepcompile": True}}, r"compile: cannot be set here"),
    (
        {"gradient_cliping": 5},
        r"gradient_cliping: unknown key; did you mean gradient_clipping\? It cannot be set here: opt",
    ),
    ({"wall_clock_breakdwn": True}, r"wall_clock_breakdwn: unknown key; did you mean wall_clock_breakdown\?"),
    ({"overlap_comm": True}, r"overlap_comm: unknown key; did you mean zero_optimization\.overlap_comm\?"),
    ({"qqqq": 1}, r"qqqq: unknown key; DeepSpeed knows here: activation_checkpointing, aio"),
    ({"wall_clock_breakdown": 1}, r"wall_clock_breakdown: got 1 \(integer\), expected a boolean"),
    ({"steps_per_print": None}, r"steps_per_print: got null, expected an integer >= 1"),
    ({"log_level": "loud"}, r'log_level: got "loud" \(text\), expected debug or info or'),
    ({"prescale_gradients": True}, r"prescale_gradients: got true .* expected false: statistics of the gradient"),
    ({"zero_allow_untested_optimizer": False}, r"zero_allow_untested_optimizer: got false .*, expected true"),
    ({"zero_optimization": 3}, r"zero_optimization: got 3 \(integer\), expected a section"),
    ({"timers": {"throughput": {"enable": True}}}, r"timers\.throughput\.enable: unknown key; did you mean enabled\?"),
]

BAD_ZERO: list[tuple[dict[str, Any], str]] = [
    ({"stage": 2}, r"stage: got 2 \(integer\), expected 3: only stage 3 partitions"),
    ({"stage": "3"}, r'stage: got "3" \(text\), expected an integer >= 0'),
    ({"zero_quantized_weights": True}, r"zero_quantized_weights: got true .* expected false: it would change packed"),
    ({"zero_quantized_nontrainable_weights": True}, r"zero_quantized_nontrainable_weights: got true .* packed"),
    ({"zero_quantized_gradients": True}, r"zero_quantized_gradients: got true .* fp32"),
    ({"zero_hpz_partition_size": 8}, r"zero_hpz_partition_size: got 8 \(integer\), expected 1"),
    ({"zenflow": {}}, r"zenflow: cannot be set here"),
    ({"cpu_offload": True}, r"cpu_offload: cannot be set here: an old name: use zero_optimization\.offload_optimizer"),
    ({"mics_shard_size": 4}, r"mics_shard_size: cannot be set here: DeepSpeed has removed it"),
    ({"reduce_bucket_size": "auto"}, r'reduce_bucket_size: got "auto", expected an integer >= 1\. Leave the key out'),
    ({"reduce_bucket_size": 1.5}, r"reduce_bucket_size: got 1\.5 \(number\), expected an integer >= 1"),
    ({"reduce_bucket_size": True}, r"reduce_bucket_size: got true"),
    ({"prefetch_bucket_size": 5}, r"prefetch_bucket_size: unknown key; did you mean stage3_prefetch_bucket_size\?"),
    (
        {"wall_clock_breakdown": True},
        r"wall_clock_breakdown: unknown key; did you mean deepspeed\.wall_clock_breakdown",
    ),
    ({"leaf_module": {"names": "mlp"}}, r'leaf_module\.names: got "mlp" \(text\), expected a list of text'),
    ({"offload_optimizer": {"device": "gpu"}}, r'offload_optimizer\.device: got "gpu" \(text\), expected none or cpu'),
    ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, r"offload_optimizer\.ratio: got 0\.5 .* CPU Adam"),
    (
        {"offload_optimizer": NVME},
        r"offload_optimizer\.device: got nvme, expected cpu or none: .* keep ages, or maxima",
    ),
    ({"offload_param": NVME}, r"offload_param\.device: got nvme, expected cpu or none: its buffers"),
]


@pytest.mark.parametrize(
    ("section", "expected"), BAD_SECTIONS, ids=[json.dumps(section) for section, _ in BAD_SECTIONS]
)
def test_a_bad_key_is_explained(section: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        make(section)
    assert re.search(rf"deepspeed\.{expected}", str(raised.value))


@pytest.mark.parametrize(("zero", "expected"), BAD_ZERO, ids=[json.dumps(zero) for zero, _ in BAD_ZERO])
def test_a_bad_zero_key_is_explained(zero: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        make({"zero_optimization": zero})
    assert re.search(rf"deepspeed\.zero_optimization\.{expected}", str(raised.value))


@pytest.mark.parametrize("method", [name for name in all_methods() if name != "full"])
def test_no_sparse_method_may_offload_to_nvme(method: str) -> None:
    with pytest.raises(UserError, match=r"2 problems:\n.*offload_optimizer\.device: .*\n.*offload_param\.device: "):
        make({"zero_optimization": {"offload_optimizer": NVME, "offload_param": NVME}}, (f"method.name={method}",))


def test_full_may_offload_to_nvme_with_a_path() -> None:
    full = ("method.name=full", "model.quantization=none")
    make({"zero_optimization": {"offload_optimizer": NVME, "offload_param": NVME}}, full)
    with pytest.raises(UserError, match=r"offload_param\.nvme_path: missing, expected a folder"):
        make({"zero_optimization": {"offload_param": {"device": "nvme"}}}, full)


def test_fixed_values_may_be_written_out() -> None:
    section: dict[str, Any] = {}
    for path, fixed in FIXED_KEYS.items():
        *parents, key = path.split(".")
        node = section
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = fixed.value
    assert make(section).deepspeed == section


def test_the_complete_configuration() -> None:
    config = make(overrides=("train.micro_batch_size=4", "train.global_batch_size=32", "optimizer.max_grad_norm=0.5"))
    built = build_deepspeed_config(config, world_size=2, largest_num_active=100_000)
    assert built["train_batch_size"] == 32
    assert built["train_micro_batch_size_per_gpu"] == 4
    assert built["gradient_accumulation_steps"] == 4
    assert built["gradient_clipping"] == 0.5
    assert built["bf16"] == {"enabled": True}
    assert built["communication_data_type"] == "fp32"
    assert built["data_types"] == {"grad_accum_dtype": "fp32"}
    assert built["zero_allow_untested_optimizer"] is True
    assert built["zero_force_ds_cpu_optimizer"] is False
    zero = built["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (3, 100_000)
    assert zero["stage3_param_persistence_threshold"] == 0
    assert zero["contiguous_gradients"] is True
    assert zero["stage3_gather_16bit_weights_on_model_save"] is False
    assert json.loads(json.dumps(built, allow_nan=False)) == built


def test_fp32_has_no_bf16_section() -> None:
    built = build_deepspeed_config(make(overrides=("model.dtype=float32",)), 1)
    assert "bf16" not in built
    assert "fp16" not in built


def test_the_bucket_has_a_lower_bound_and_the_section_wins() -> None:
    assert build_deepspeed_config(make(), 1, 12)["zero_optimization"]["reduce_bucket_size"] == MIN_REDUCE_BUCKET_SIZE
    given = {"reduce_bucket_size": 77, "stage3_param_persistence_threshold": 5, "overlap_comm": False}
    config = make({"zero_optimization": given, "wall_clock_breakdown": True, "steps_per_print": 10})
    built = build_deepspeed_config(config, 1, 100_000)
    assert {key: built["zero_optimization"][key] for key in given} == given
    assert (built["wall_clock_breakdown"], built["steps_per_print"]) == (True, 10)
    assert built["zero_optimization"]["stage"] == 3


def test_the_result_shares_nothing_with_the_configuration() -> None:
    config = make({"zero_optimization": {"offload_param": {"device": "cpu"}}})
    build_deepspeed_config(config, 1)["zero_optimization"]["offload_param"]["device"] = "none"
    assert config.deepspeed["zero_optimization"]["offload_param"]["device"] == "cpu"


class _RecordingDict(dict[str, Any]):
    """Notes every key that a reader asks for."""

    asked: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        mapping = self

        class Keys:
            def __contains__(self, key: object) -> bool:
                return key in mapping

            def __iter__(self) -> Iterator[str]:
                return iter(dict.keys(mapping))

        return Keys()


def nested_keys(path: str) -> set[str]:
    key = Key("section", keys=DEEPSPEED_KEYS)
    for name in path.split("."):
        assert key.keys is not None
        key = key.keys[name]
    assert key.keys is not None
    return set(key.keys)


def refused_keys(prefix: str) -> set[str]:
    return {path.removeprefix(prefix) for path in REFUSED_KEYS if path.startswith(prefix)}


def test_top_level_keys_are_those_the_installed_deepspeed_reads() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    recorded = _RecordingDict(train_batch_size=1, zero_optimization={"stage": 3})
    recorded.asked = set()
    DeepSpeedConfig(recorded)
    ours = set(DEEPSPEED_KEYS) | refused_keys("")
    assert recorded.asked - ours == set(), "DeepSpeed reads keys that the tables do not know"
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) - refused_keys("") == set()
    assert set(DEEPSPEED_KEYS) - recorded.asked == set(), "the tables allow keys that DeepSpeed does not read"


def test_zero_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    refused = refused_keys("zero_optimization.")
    assert nested_keys("zero_optimization") | refused == known | set(_REMOVED_ZERO_CONFIG_KEYS)
    assert nested_keys("zero_optimization") & refused == set()
    for path, model in (
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
        ("zero_optimization.leaf_module", DeepSpeedZeroLeafModuleConfig),
    ):
        assert nested_keys(path) == set(model.model_fields), path


def test_other_sections_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    for path, model in (
        ("comms_logger", CommsLoggerConfig),
        ("tensorboard", TensorBoardConfig),
        ("wandb", WandbConfig),
        ("csv_monitor", CSVConfig),
        ("comet", CometConfig),
        ("timers.throughput", DeepSpeedThroughputTimerConfig),
    ):
        assert nested_keys(path) == set(model.model_fields), path
    assert nested_keys("activation_checkpointing") == set(ACT_CHKPT_DEFAULT)
    assert nested_keys("aio") == set(AIO_DEFAULT_DICT)
    assert nested_keys("flops_profiler") == set(vars(DeepSpeedFlopsProfilerConfig({})))


def test_log_levels_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.utils.logging import log_levels

    assert set(DEEPSPEED_KEYS["log_level"].choices) == set(log_levels)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_installed_deepspeed_takes_the_complete_configuration(dtype: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = make(
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "flops_profiler": {"enabled": False}},
        (f"model.dtype={dtype}", "train.micro_batch_size=2", "train.gradient_accumulation_steps=3"),
    )
    parsed = DeepSpeedConfig(build_deepspeed_config(config, 1, 1000))
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps) == (6, 3)
    assert parsed.zero_optimization_stage == 3
    assert parsed.bfloat16_config.enabled is (dtype == "bfloat16")
    assert parsed.zero_config.param_persistence_threshold == 0
    assert parsed.zero_config.reduce_bucket_size == MIN_REDUCE_BUCKET_SIZE
    assert parsed.gradient_clipping == 1.0


def test_fixed_and_refused_keys_exist_once() -> None:
    for path in FIXED_KEYS:
        *parents, key = path.split(".")
        assert key in (nested_keys(".".join(parents)) if parents else DEEPSPEED_KEYS), path
        assert path not in REFUSED_KEYS
    assert set(REFUSED_KEYS) & set(DEEPSPEED_KEYS) == set()
