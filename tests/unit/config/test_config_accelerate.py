"""Settings of `accelerate launch` against the configuration, and the files shipped for it."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_ds.config import (
    RunConfig,
    UserError,
    check_accelerate_settings,
    clear_accelerate_settings,
    launcher_forces_cpu,
    load_config,
    parse_config,
)
from sparse_ds.config.load import CONFIGS_DIR

FILES = ["cpu.yaml", "one_node.yaml", "multi_node.yaml"]
# What a launch without any word of the user sets (seen with `accelerate launch --multi_gpu`).
DEFAULTS = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}


def make(deepspeed: dict[str, Any] | None = None, overrides: tuple[str, ...] = ()) -> RunConfig:
    data = {"optimizer": {"learning_rate": 0.001}, "train": {"output_dir": "x"}, "deepspeed": deepspeed or {}}
    return parse_config(data, overrides)


BAD = [
    (
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        (),
        r"MIXED_PRECISION: the launcher says fp16, .* model\.dtype bfloat16\.",
    ),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, (), r"MIXED_PRECISION: the launcher says fp8"),
    (
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        ("model.dtype=float32",),
        r"MIXED_PRECISION: the launcher says bf16, the configuration says model\.dtype float32\.",
    ),
    (
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        (),
        r"ZERO_STAGE: the launcher says 2, the configuration says ZeRO stage 3",
    ),
    (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        ("train.gradient_accumulation_steps=2",),
        r"ACCUMULATION_STEPS: the launcher says 4, the configuration says train\.gradient_accumulation_steps 2",
    ),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, (), r"the launcher says 4, .*gradient_accumulation_steps 1"),
    (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
        ("train.global_batch_size=8",),
        r"the launcher says 8, .*gradient_accumulation_steps 4",
    ),
    ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, (), r"the launcher says 0\.5, .* optimizer\.max_grad_norm 1"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "much"}, (), r"the launcher says much, .* optimizer\.max_grad_norm 1"),
    (
        {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        (),
        r"the launcher says cpu, .*offload_optimizer\.device none",
    ),
    (
        {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
        (),
        r"the launcher says nvme, .*offload_param\.device none",
    ),
    (
        {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/n"},
        (),
        r"the launcher says /n, .*offload_param\.nvme_path none",
    ),
    (
        {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
        (),
        r"CONFIG_FILE: the launcher says ds\.json, .* section deepspeed",
    ),
    (
        {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
        ("export.merged=false",),
        r"says true, .*export\.merged false",
    ),
    ({"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Moe"}, (), r"the launcher says Moe, .* no mixture of experts"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, (), r"DYNAMO_BACKEND: the launcher says INDUCTOR, .* no compilation"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, (), r"ACCELERATE_USE_FSDP: the launcher says true \(FSDP\)"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, (), r"the launcher says true \(Megatron-LM\), .* DeepSpeed ZeRO stage 3"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, (), r"the launcher says true \(a parallelism configuration\)"),
    (
        {"ACCELERATE_USE_CPU": "True"},
        ("train.device=cuda",),
        r"ACCELERATE_USE_CPU: the launcher says True, .* train\.device cuda",
    ),
]


@pytest.mark.parametrize(("environ", "overrides", "expected"), BAD, ids=[f"{env} {extra}" for env, extra, _ in BAD])
def test_a_disagreement_shows_both_values(environ: dict[str, str], overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_accelerate_settings(make(overrides=overrides), {**DEFAULTS, **environ}, world_size=2)


@pytest.mark.parametrize(
    ("environ", "deepspeed", "overrides"),
    [
        ({}, {}, ()),
        ({}, {}, ("model.dtype=float32",)),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, ()),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, ()),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {}, ("train.gradient_accumulation_steps=4",)),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, ("train.global_batch_size=8",)),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {}, ("train.global_batch_size=8",)),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, {}, ()),
        ({"ACCELERATE_GRADIENT_CLIPPING": "none"}, {}, ()),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}, {"offload_optimizer": {"device": "cpu"}}, ()),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {"offload_optimizer": {"device": "cpu"}}, ()),
        ({"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}, {}, ()),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, {}, ()),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}, {}, ()),
        ({"ACCELERATE_USE_FSDP": "false"}, {}, ()),
        ({"ACCELERATE_USE_CPU": "True"}, {}, ()),
    ],
)
def test_agreement_and_defaults_raise_no_alarm(
    environ: dict[str, str], deepspeed: dict[str, Any], overrides: tuple[str, ...]
) -> None:
    config = make({"zero_optimization": deepspeed}, overrides)
    check_accelerate_settings(config, {**DEFAULTS, **environ}, world_size=2)


def test_another_launcher_raises_no_alarm() -> None:
    check_accelerate_settings(make(), {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, world_size=2)


def test_all_disagreements_come_in_one_message() -> None:
    environ = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_USE_FSDP": "1"}
    with pytest.raises(UserError) as raised:
        check_accelerate_settings(make(), environ, world_size=1)
    assert all(name in str(raised.value) for name in environ)


def test_clearing_leaves_what_the_launcher_owns() -> None:
    kept = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_DEBUG_MODE": "true",
        "ACCELERATE_CPU_AFFINITY": "1",
        "PATH": "/bin",
    }
    owned = {
        **DEFAULTS,
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "FSDP_VERSION": "1",
    }
    environ = {**kept, **owned}
    assert clear_accelerate_settings(environ) == sorted(owned)
    assert environ == kept
    assert clear_accelerate_settings(environ) == []


@pytest.mark.parametrize(("value", "expected"), [("True", True), ("1", True), ("False", False), ("", False)])
def test_the_cpu_switch_of_the_launcher(value: str, expected: bool) -> None:
    assert launcher_forces_cpu({"ACCELERATE_USE_CPU": value}) is expected
    assert launcher_forces_cpu({}) is False


def launch_arguments(name: str) -> Any:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(CONFIGS_DIR / "accelerate" / name)
    arguments, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(
            ["--config_file", path, "--main_process_ip", "127.0.0.1", "--machine_rank", "1", "launcher/train.py"]
        )
    )
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return arguments


@pytest.mark.parametrize("name", FILES)
def test_the_shipped_files_parse_and_agree_with_the_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    loaded = load_config_from_file(str(CONFIGS_DIR / "accelerate" / name))
    assert loaded.distributed_type == "DEEPSPEED"
    assert loaded.num_processes % loaded.num_machines == 0
    arguments = launch_arguments(name)
    assert arguments.use_deepspeed
    command, environ = prepare_deepspeed_cmd_env(arguments)
    assert command is None, "processes are to be started by torchrun on this machine, not by ssh"
    assert int(arguments.nproc_per_node) == loaded.num_processes // loaded.num_machines
    for config in ("zero3_sft_ma", "llama2_7b/sft_ma_nf4"):
        check_accelerate_settings(load_config(config), environ, world_size=2)
    owned = {variable for variable in environ if variable.startswith("ACCELERATE_")}
    assert "ACCELERATE_USE_DEEPSPEED" in owned
    assert owned <= set(clear_accelerate_settings(environ))


def test_every_shipped_file_is_tested() -> None:
    assert sorted(path.name for path in (CONFIGS_DIR / "accelerate").iterdir()) == sorted(FILES)


def test_the_variables_are_those_that_the_installed_accelerate_writes() -> None:
    """Each variable is either owned (and cleared) or known to be a setting of the machine."""
    import inspect
    import re

    from accelerate.utils import launch

    written = set(re.findall(r'current_env\["((?:ACCELERATE|FSDP)_\w+)"\]', inspect.getsource(launch)))
    assert len(written) > 30
    machine = {"ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"}
    environ = dict.fromkeys(written, "x")
    clear_accelerate_settings(environ)
    assert set(environ) == machine
