"""`sparse-ds eval MODEL --tasks TASK ...`: score a saved model or adapter."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sparse_ds.commands.device import add_device_argument, choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    add_device_argument(parser, "compute")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts of one forward pass")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many questions of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="worked samples first; harness tasks only")
    parser.add_argument("--data-folder", type=Path, help="of the data files of YAML tasks; else beside each")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all scores as JSON")


def run(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    if device == "cpu":
        # DeepSpeed, which is imported and not used, would look for a GPU and say that there is none.
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
