"""Who started this process, and which rank it is: `deepspeed`, `accelerate launch`, `torchrun`, `srun` or `python`.

DeepSpeed wants RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment; without them it looks for
mpi4py. `complete_environment` fills in what a launcher left out. No torch import: it runs before anything heavy.
"""

from __future__ import annotations

import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from sparse_ds.config.errors import UserError

REQUIRED_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_PORT_BASE, SLURM_PORT_RANGE = 20_000, 20_000
"""srun sets no port: one is derived from the job id, the same on every node, below the ephemeral range (32768+)
for most ids and never privileged."""


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher decided."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int


def complete_environment(environ: MutableMapping[str, str]) -> LaunchEnvironment:
    """Fill in the rendezvous variables and say which launcher set them.

    Args:
        environ: `os.environ`, changed in place.

    Raises:
        UserError: some but not all of the variables are set, or one is not a number.
    """
    if "RANK" in environ:
        launcher = _name_of_launcher(environ)
    elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        # SLURM_STEP_ID is set by srun only: `python` typed inside an allocation stays one process.
        launcher = "srun"
        _from_slurm(environ)
    else:
        launcher = "python"
        environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(_free_port()))
    missing = [name for name in REQUIRED_VARIABLES if name not in environ]
    if missing:
        raise UserError(
            f"launcher: {', '.join(missing)} not set although RANK={environ.get('RANK')} is; expected all of "
            f"{', '.join(REQUIRED_VARIABLES)}. Start with `deepspeed`, `torchrun`, `accelerate launch`, `srun` or "
            "plain `python`, or unset RANK."
        )
    rank, world_size, local_rank = (_number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not 0 <= rank < world_size:
        raise UserError(f"launcher: RANK={rank} with WORLD_SIZE={world_size}; expected 0 <= RANK < WORLD_SIZE.")
    return LaunchEnvironment(launcher=launcher, rank=rank, world_size=world_size, local_rank=local_rank)


def _name_of_launcher(environ: MutableMapping[str, str]) -> str:
    if any(name.startswith("ACCELERATE_") for name in environ):
        return "accelerate"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in environ or "LOCAL_WORLD_SIZE" not in environ else "environment"


def _from_slurm(environ: MutableMapping[str, str]) -> None:
    environ.setdefault("RANK", environ["SLURM_PROCID"])
    environ.setdefault("WORLD_SIZE", environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    environ.setdefault("LOCAL_RANK", environ.get("SLURM_LOCALID", "0"))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    environ.setdefault("MASTER_ADDR", first_slurm_host(nodes))
    job_id = _number(environ, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environ else 0
    environ.setdefault("MASTER_PORT", str(SLURM_PORT_BASE + job_id % SLURM_PORT_RANGE))


def first_slurm_host(nodelist: str) -> str:
    """First host of SLURM's compressed list: `gpu[003-005,9],login1` -> `gpu003`, `rack[1-2]n[3-4]` -> `rack1n3`."""
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+(?=,|$)", nodelist)
    if match is None:
        raise UserError(f"srun: cannot read the node list {nodelist!r}; set MASTER_ADDR to the first node's name.")
    return re.sub(r"\[([^\[\]]+)\]", lambda ranges: re.split("[-,]", ranges[1])[0], match[0])


def _number(environ: MutableMapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"launcher: {name}={environ[name]!r}, expected a whole number.") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
