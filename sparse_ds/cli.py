"""Command line: arguments -> one call.

Nothing heavy is imported before the arguments and the configuration are known to be right.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from sparse_ds.config import (
    RunConfig,
    UserError,
    check_accelerate_settings,
    clear_accelerate_settings,
    launcher_forces_cpu,
    load_config,
)
from sparse_ds.config.errors import STOPPED_EXIT_CODE, USER_ERROR_EXIT_CODE, RunStoppedError

SECONDS_FOR_RANK_0_TO_SPEAK = 20.0
"""A rank other than 0 that finds a mistake before the ranks know each other waits so long: rank 0, which most likely
finds the same, prints it and ends, and the launcher then ends the others. Only a mistake of its own makes it speak."""


COMMANDS = {
    "export": ("export_adapter", "a merged dense model from an adapter, or the adapter in another format"),
    "import": ("import_adapter", "an adapter from PEFT's formats, or from the difference of two checkpoints"),
    "merge": ("merge_adapters", "several adapters as one, or as one model with several heads"),
    "inspect": ("inspect_adapter", "what is in an adapter"),
    "quantize": ("quantize", "save a base model in NF4, which then loads faster"),
    "eval": ("evaluate", "score a saved model or adapter on tasks"),
    "data": ("preview_data", "look at the data of a run"),
    "report": ("report", "compare finished runs in one table"),
}
"""Name -> file of `sparse_ds.commands`, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """`sparse-ds COMMAND ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sparse-ds", description="Sparse fine-tuning on DeepSpeed ZeRO-3.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train_arguments(commands.add_parser("train", help="fine-tune (under any launcher, or one process)"))
    for name, (_, purpose) in COMMANDS.items():
        _command(name).add_arguments(commands.add_parser(name, help=purpose))
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        return _train(arguments)
    _set_up_logging(rank=0, local_rank=0, stream=sys.stderr)
    try:
        _command(arguments.command).run(arguments)
    except (UserError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0


def _command(name: str) -> Any:
    return importlib.import_module(f"sparse_ds.commands.{COMMANDS[name][0]}")


def train(argv: Sequence[str] | None = None) -> int:
    """`launcher/train.py ...`: the `train` command alone; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Sparse fine-tuning on DeepSpeed ZeRO-3. One configuration file is one run."
    )
    _add_train_arguments(parser)
    return _train(parser.parse_args(argv))


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="path of a configuration, or a name in configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; repeatable"
    )
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the newest checkpoint of the run, or from this one"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _train(arguments: argparse.Namespace) -> int:
    rank_text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    # A rank that is no number is an error of its own, which `complete_environment` explains.
    rank = int(rank_text) if rank_text.isdecimal() else 0
    try:
        resume = [] if arguments.resume is None else [f"checkpoint.resume={json.dumps(arguments.resume)}"]
        config = load_config(arguments.config, [*arguments.set, *resume])
        _carry_out(config)
    except UserError as error:
        return _end_with(error, rank)
    except RunStoppedError as stopped:
        return _end_with(stopped, rank)
    return 0


def _carry_out(config: RunConfig) -> None:
    from sparse_ds.distributed.launch_environment import complete_environment

    launch = complete_environment(os.environ)
    # Read when torch is imported. By default waiting threads spin, and take the cores from the other ranks on a CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    forced_cpu = launcher_forces_cpu(os.environ)
    check_accelerate_settings(config, os.environ, launch.world_size)
    clear_accelerate_settings(os.environ)
    config.batch_plan(launch.world_size)
    _set_up_logging(launch.rank, launch.local_rank)
    device_type = _choose_device(config.train.device, forced_cpu)
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if launch.rank == 0:
        for warning in config.warnings():
            logging.getLogger("sparse_ds").warning("%s", warning)
        if launch.world_size == 1 and launch.launcher == "deepspeed" and device_type == "cpu":
            typed = [word for word in sys.argv if not word.startswith("--local_rank")]
            print(
                "sparse_ds: no GPU here, so `deepspeed` started 1 rank on the CPU; for two ranks: "
                f"deepspeed --num_accelerators 2 {shlex.join(typed)}",
                flush=True,
            )

    from sparse_ds.training.run import run

    run(config, launch, device_type)


def _choose_device(wanted: str, forced_cpu: bool) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            'train.device: got "cuda", but torch finds no GPU here; expected a machine with one, a torch build for '
            'CUDA, or train.device "auto" or "cpu".'
        )
    if wanted == "cuda" and forced_cpu:
        raise UserError(
            'train.device: got "cuda", but `accelerate launch` was told to use the CPU; make both the same.'
        )
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and not forced_cpu else "cpu"
    return wanted


def _set_up_logging(rank: int, local_rank: int, stream: TextIO | None = None) -> None:
    """`stream`: by default stdout; commands whose output may be read by programs log to stderr."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    ours = logging.getLogger("sparse_ds")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # Every machine downloads the base model and tokenizes the data, and says so once.
    for name in ("sparse_ds.model.find_base_model", "sparse_ds.data.token_cache"):
        logging.getLogger(name).setLevel(logging.INFO if local_rank == 0 else logging.ERROR)
    # DeepSpeed calls collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    # Libraries speak only when something is wrong. accelerate's warnings are about settings that the run
    # configuration owns, bitsandbytes' about optional kernels.
    for name in ("DeepSpeed", "deepspeed", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _end_with(error: UserError | RunStoppedError, rank: int) -> int:
    """Print the mistake, or why the run has stopped, once, by rank 0, and end all ranks; returns the exit code."""
    exit_code = error.exit_code if isinstance(error, RunStoppedError) else USER_ERROR_EXIT_CODE
    kind = "sparse_ds" if exit_code == STOPPED_EXIT_CODE else "error"
    distributed = sys.modules.get("torch.distributed")
    in_group = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if rank == 0:
        print(f"{kind}: {error}", file=sys.stderr, flush=True)
    if in_group:
        from sparse_ds.distributed import process_group

        # All ranks raised together (`agreement`), so all come here; rank 0 has printed before any of them ends.
        process_group.stop()
    elif rank != 0:
        time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
