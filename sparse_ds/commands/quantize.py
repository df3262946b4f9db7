"""`sparse-ds quantize BASE OUTPUT`: save a base model in NF4, which then loads faster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparse_ds.commands.device import add_device_argument, choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="folder or hub name of a 16-bit checkpoint")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--revision", help="of a hub name: branch, tag or commit")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="as model.dtype of the runs"
    )
    parser.add_argument("--double-quantization", action="store_true", help="quantize the scales too")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file: a number followed by KB, MB or GB")
    add_device_argument(parser, "quantize")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already there")


def run(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
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
    print(f"{written.folder}: {written.size_bytes / 2**30:.2f} GiB in {written.num_shards} file(s)")
