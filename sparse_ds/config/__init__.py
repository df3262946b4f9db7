"""The configuration of a run: reading, checking, and what DeepSpeed and the launchers need of it. Imports no torch."""

from sparse_ds.config.accelerate_settings import (
    check_accelerate_settings,
    clear_accelerate_settings,
    launcher_forces_cpu,
)
from sparse_ds.config.deepspeed_section import build_deepspeed_config
from sparse_ds.config.errors import UserError
from sparse_ds.config.load import find_config, load_config, parse_config
from sparse_ds.config.schema import (
    BatchPlan,
    CheckpointConfig,
    DataConfig,
    ExportConfig,
    MethodConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "BatchPlan",
    "CheckpointConfig",
    "DataConfig",
    "ExportConfig",
    "MethodConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "UserError",
    "build_deepspeed_config",
    "check_accelerate_settings",
    "clear_accelerate_settings",
    "find_config",
    "launcher_forces_cpu",
    "load_config",
    "parse_config",
]
