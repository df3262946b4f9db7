"""Command line: arguments -> one call.

Nothing heavy is imported before the arguments and the configuration are known to be right.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

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


def main(argv: Sequence[str] | None = None) -> int:
    """`sparse-ds COMMAND ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sparse-ds", description="Sparse fine-tuning on DeepSpeed ZeRO-3.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train_arguments(commands.add_parser("train", help="fine-tune (under any launcher, or one process)"))
    _add_quantize_arguments(commands.add_parser("quantize", help="save a base model in NF4, which then loads faster"))
    _add_eval_arguments(commands.add_parser("eval", help="score a saved model or adapter on tasks"))
    _add_data_arguments(commands.add_parser("data", help="look at the data of a run"))
    report = commands.add_parser("report", help="compare finished runs in one table")
    report.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        return _train(arguments)
    if arguments.command == "quantize":
        return _quantize(arguments)
    if arguments.command == "eval":
        return _eval(arguments)
    if arguments.command == "data":
        return _preview_data(arguments)
    return _report(arguments.runs)


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


def _add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="folder or hub name of a 16-bit checkpoint")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--revision", help="of a hub name: branch, tag or commit")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="as model.dtype of the runs"
    )
    parser.add_argument("--double-quantization", action="store_true", help="quantize the scales too")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file: a number followed by KB, MB or GB")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to quantize")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already there")


def _quantize(arguments: argparse.Namespace) -> int:
    _set_up_logging(rank=0, local_rank=0)
    try:
        device = _choose_device(arguments.device, forced_cpu=False)
        from sparse_ds.export.quantized import write_nf4_checkpoint

        written = write_nf4_checkpoint(
            arguments.base,
            arguments.output,
            revision=arguments.revision,
            dtype=arguments.dtype,
            double_quantization=arguments.double_quantization,
            max_shard_size=arguments.max_shard_size,
            device=device,
            overwrite=arguments.overwrite,
            show_progress=sys.stderr.isatty(),
        )
    except (UserError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    print(f"{written.folder}: {written.size_bytes / 2**30:.2f} GiB in {written.num_shards} file(s)")
    return 0


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    preview = parser.add_subparsers(dest="data_command", required=True).add_parser(
        "preview", help="what training takes: samples token by token, lengths, shares, and what is wrong with them"
    )
    preview.add_argument("--config", required=True, help="path of a configuration, or a name in configs/")
    preview.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; repeatable"
    )
    preview.add_argument("--samples", type=int, default=3, metavar="N", help="samples to show of each source")
    preview.add_argument("--html", type=Path, metavar="FILE", help="write it as an HTML file too")
    preview.add_argument("--colour", choices=["auto", "always", "never"], default="auto", help="of the text")


def _preview_data(arguments: argparse.Namespace) -> int:
    _set_up_logging(rank=0, local_rank=0)
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        config = load_config(arguments.config, arguments.set)
        from sparse_ds.data.preview_html import preview_html, save_html
        from sparse_ds.data.preview_text import preview_text
        from sparse_ds.training.data_preview import preview_data

        preview = preview_data(config, arguments.samples)
        colour = sys.stdout.isatty() if arguments.colour == "auto" else arguments.colour == "always"
        print(preview_text(preview.sources, preview.findings, colour=colour))
        if arguments.html is not None:
            save_html(preview_html(f"Data of {arguments.config}", preview.sources, preview.findings), arguments.html)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a model, an adapter or a run, or a hub name")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="data files, JSON objects like the entries of data.tasks, YAML files or names of lm-evaluation-harness",
    )
    parser.add_argument("--base", help="of an adapter, instead of the base that it names")
    parser.add_argument("--revision", help="of a hub name: branch, tag or commit")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: as saved or trained"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts of one forward pass")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many questions of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="worked samples first; harness tasks only")
    parser.add_argument("--data-folder", type=Path, help="of the data files of YAML tasks; else beside each")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all scores as JSON")


def _eval(arguments: argparse.Namespace) -> int:
    _set_up_logging(rank=0, local_rank=0)
    try:
        device = _choose_device(arguments.device, forced_cpu=False)
        if device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        from sparse_ds.evaluation.offline import evaluate_saved
        from sparse_ds.evaluation.score_table import save_record, score_table

        scores = evaluate_saved(
            arguments.model,
            arguments.tasks,
            base=arguments.base,
            revision=arguments.revision,
            dtype=arguments.dtype,
            device=device,
            batch_size=arguments.batch_size,
            num_samples=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            data_folder=arguments.data_folder,
        )
        print(score_table(scores.rows))
        if arguments.output is not None:
            save_record(scores.record, arguments.output)
    except (UserError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0


def _report(runs: list[Path]) -> int:
    from sparse_ds.monitor.report import compare_runs

    try:
        print(compare_runs(runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0


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


def _set_up_logging(rank: int, local_rank: int) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    ours = logging.getLogger("sparse_ds")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # Every machine downloads the base model, and says so once.
    download = logging.getLogger("sparse_ds.model.find_base_model")
    download.setLevel(logging.INFO if local_rank == 0 else logging.ERROR)
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
