"""What `accelerate launch` says in its environment variables, held against the configuration of the run.

`accelerate launch` passes its own settings (precision, ZeRO stage, accumulation, clipping, offload, ...) in variables
`ACCELERATE_*`, and transformers would quietly follow them. The run's configuration is the only source here: a setting
that disagrees is an error that shows both values, and those that agree are removed before transformers is imported.

A value that `accelerate launch` also writes without the user's word is no disagreement, because the two cannot be told
apart: mixed precision `no`, offload device `none`, CPU `False`, dynamo backend `NO`, and accumulation `1`, which
`accelerate config` writes for whoever presses Enter. Everything else was chosen. Settings of the machine (addresses,
ports, threads, affinity, debugging) belong to the launcher and are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from sparse_ds.config.errors import UserError

if TYPE_CHECKING:
    from sparse_ds.config.schema import RunConfig

_PREFIX = "ACCELERATE_"
_UNSET = ("", "none", "auto")
_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
_OWNED_PREFIXES = (
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
)
_OWNED_NAMES = (
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED",
    *_OTHER_ENGINES,
)


def check_accelerate_settings(config: RunConfig, environ: Mapping[str, str], world_size: int) -> None:
    """Compares the launcher's settings with the configuration.

    Args:
        config: the run.
        environ: the environment of this rank, normally `os.environ`.
        world_size: number of ranks, from which the accumulation steps follow when a global batch size is given.

    Raises:
        UserError: one or more settings disagree; one message with both values of each.
    """
    disagreements = [
        f"{variable}: the launcher says {said}, the configuration says {configured}"
        for variable, said, configured in _find_disagreements(config, environ, world_size)
    ]
    if disagreements:
        raise UserError(
            "Settings of `accelerate launch` disagree with the configuration of the run, which owns them:\n"
            + "\n".join(f"  {line}." for line in disagreements)
            + "\nRemove them from the accelerate configuration or command line, or change the run's configuration."
        )


def clear_accelerate_settings(environ: MutableMapping[str, str]) -> list[str]:
    """Removes the launcher's settings that the configuration owns; after the check, before transformers is imported.

    Returns:
        The names of the removed variables, sorted.
    """
    owned = sorted(name for name in environ if name in _OWNED_NAMES or name.startswith(_OWNED_PREFIXES))
    for name in owned:
        del environ[name]
    return owned


def launcher_forces_cpu(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch --cpu` (or `use_cpu: true`) was asked for; decides `train.device: auto`."""
    return _is_true(environ.get("ACCELERATE_USE_CPU", ""))


def _find_disagreements(config: RunConfig, environ: Mapping[str, str], world_size: int) -> list[tuple[str, str, str]]:
    zero: dict[str, Any] = config.deepspeed.get("zero_optimization") or {}
    found: list[tuple[str, str, str]] = []

    def compare(name: str, configured: object, agreeing: tuple[str, ...]) -> None:
        said = environ.get(_PREFIX + name, "").strip()
        if said.lower() not in (*_UNSET, *agreeing):
            found.append((_PREFIX + name, said, str(configured)))

    def compare_number(name: str, field: str, configured: float, agreeing: tuple[str, ...] = ()) -> None:
        said = environ.get(_PREFIX + name, "").strip()
        try:
            agrees = said.lower() in (*_UNSET, *agreeing) or float(said) == configured
        except ValueError:
            agrees = False
        if not agrees:
            found.append((_PREFIX + name, said, f"{field} {configured:g}"))

    for variable, engine in _OTHER_ENGINES.items():
        if _is_true(environ.get(variable, "")):
            found.append((variable, f"{environ[variable]} ({engine})", "DeepSpeed ZeRO stage 3, always"))
    precision = "bf16" if config.model.dtype == "bfloat16" else "no"
    compare("MIXED_PRECISION", f"model.dtype {config.model.dtype}", ("no", precision))
    if config.train.device == "cuda":
        compare("USE_CPU", "train.device cuda", ("false", "0", "no"))
    compare_number("DEEPSPEED_ZERO_STAGE", "ZeRO stage", 3)
    accumulation = config.batch_plan(world_size).gradient_accumulation_steps
    compare_number("GRADIENT_ACCUMULATION_STEPS", "train.gradient_accumulation_steps", accumulation, ("1",))
    compare_number("GRADIENT_CLIPPING", "optimizer.max_grad_norm", config.optimizer.max_grad_norm)
    for what in ("optimizer", "param"):
        offload = zero.get(f"offload_{what}") or {}
        device = str(offload.get("device") or "none")
        field = f"deepspeed.zero_optimization.offload_{what}"
        compare(f"DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", f"{field}.device {device}", (device,))
        path = str(offload.get("nvme_path") or "none")
        compare(f"DEEPSPEED_OFFLOAD_{what.upper()}_NVME_PATH", f"{field}.nvme_path {path}", (path.lower(),))
    if not config.export.merged:
        compare("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "export.merged false", ("false",))
    compare("DEEPSPEED_CONFIG_FILE", "the section deepspeed of the run's configuration, only", ())
    compare("DEEPSPEED_MOE_LAYER_CLS_NAMES", "no mixture of experts", ())
    compare("DYNAMO_BACKEND", "no compilation", ("no",))
    return found


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on", "y", "t")
