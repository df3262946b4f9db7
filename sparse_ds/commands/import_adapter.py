"""`sparse-ds import SOURCE OUTPUT`: a native adapter from PEFT's formats, or from two dense checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ds.commands.export_adapter import write_native
from sparse_ds.config.errors import UserError

if TYPE_CHECKING:
    from sparse_ds.adapter.adapter import Adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder of a supertuning or shira adapter, or of a fine-tuned dense checkpoint")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--base-model", help="folder or hub name of the base; an adapter names its own")
    parser.add_argument("--revision", help="of a hub name: branch, tag or commit")
    parser.add_argument(
        "--density", type=float, help="of a dense checkpoint: keep this share of each matrix, the largest differences"
    )
    parser.add_argument(
        "--others",
        choices=["refuse", "leave", "dense"],
        default="refuse",
        help="of a dense checkpoint: what to do with embeddings and heads that differ",
    )
    parser.add_argument(
        "--index-encoding", choices=["plain", "delta"], default="plain", help="int32, or about one byte an index"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is already there")


def run(arguments: argparse.Namespace) -> None:
    write_native(_open(arguments), arguments.output, arguments.index_encoding, overwrite=arguments.overwrite)


def _open(arguments: argparse.Namespace) -> Adapter:
    from sparse_ds.adapter.difference import DifferenceAdapter
    from sparse_ds.adapter.native import CONFIG_FILE
    from sparse_ds.adapter.opening import open_adapter

    folder = Path(arguments.source)
    is_checkpoint = (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file()
    if not is_checkpoint and folder.is_dir():
        for option in ("density", "others", "revision"):
            if getattr(arguments, option) not in (None, "refuse"):
                raise UserError(f"--{option} is of dense checkpoints, and '{folder}' holds an adapter. Leave it out.")
        return open_adapter(folder, base_model=arguments.base_model)
    if arguments.base_model is None:
        raise UserError(f"'{arguments.source}' is no adapter: name the base that it was made from with --base-model.")
    difference = DifferenceAdapter(
        arguments.base_model,
        arguments.source,
        revision=arguments.revision,
        density=arguments.density,
        others=arguments.others,
        show_progress=sys.stderr.isatty(),
    )
    kept = sum(difference.read(name).values.numel() for name in difference.config.shapes)
    print(
        f"{difference.num_changed:,} weights differ, {kept:,} kept; {difference.num_inexact:,} of these come back "
        "within rounding only"
    )
    return difference
