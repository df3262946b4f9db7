"""`sparse-ds merge ADAPTER... --output OUTPUT`: several adapters as one, or as one model with several heads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sparse_ds.commands.export_adapter import add_output_arguments, check_options, write_adapter
from sparse_ds.config.errors import UserError

METHODS = ("sum", "linear", "ties", "dare_linear", "dare_ties")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", type=Path, metavar="adapter", help="two or more, of one base")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--method", choices=METHODS, default="sum", help="docs/merging.md says what each does")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each adapter")
    parser.add_argument("--density", type=float, help="ties: share of each adapter's deltas that stays")
    parser.add_argument("--drop-rate", type=float, help="dare: probability that a delta is dropped")
    parser.add_argument("--seed", type=int, help="dare: of the drops")
    parser.add_argument(
        "--tasks",
        nargs="+",
        help="of classifications: one name for each adapter; makes one dense model with the head of each",
    )
    parser.add_argument("--overlap-json", type=Path, metavar="FILE", help="write what the adapters have in common")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from sparse_ds.adapter.adapter import Adapter
    from sparse_ds.adapter.combining import Combination, CombinedAdapter
    from sparse_ds.adapter.opening import open_adapter
    from sparse_ds.adapter.overlap import overlap

    check_options(arguments)
    combination = Combination(
        arguments.method,
        weights=None if arguments.weights is None else tuple(arguments.weights),
        density=arguments.density,
        drop_rate=arguments.drop_rate,
        seed=arguments.seed,
    )
    _check_tasks(arguments)
    adapters = [open_adapter(path, base_model=arguments.base_model) for path in arguments.adapters]
    merged: Adapter
    compared: Sequence[Adapter] = adapters
    if arguments.tasks is None:
        merged = CombinedAdapter(adapters, combination, allow_other_names=arguments.allow_other_base)
    else:
        from sparse_ds.export.multi_head import MultiHeadAdapter

        tasks = dict(zip(arguments.tasks, adapters, strict=True))
        multi_head = MultiHeadAdapter(tasks, combination, allow_other_names=arguments.allow_other_base)
        merged, compared = multi_head, multi_head.bodies
    shared = overlap(compared, names=arguments.tasks, allow_other_names=arguments.allow_other_base)
    print(shared.table())
    if arguments.overlap_json is not None:
        try:
            arguments.overlap_json.write_text(json.dumps(shared.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--overlap-json: '{arguments.overlap_json}' cannot be written ({error.strerror})."
            ) from error
    write_adapter(merged, arguments)


def _check_tasks(arguments: argparse.Namespace) -> None:
    tasks = arguments.tasks
    if tasks is None:
        return
    if len(tasks) != len(arguments.adapters) or len(set(tasks)) != len(tasks):
        raise UserError(f"--tasks: got {', '.join(tasks)}; expected a name of its own for each of the adapters.")
    if arguments.format != "merged":
        raise UserError(f"--tasks makes a dense model; it cannot be written as --format {arguments.format}.")
