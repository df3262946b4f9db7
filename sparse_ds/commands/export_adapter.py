"""`sparse-ds export ADAPTER OUTPUT`: a merged dense model, or the adapter in another format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ds.commands.device import add_device_argument, choose_device
from sparse_ds.config.errors import UserError

if TYPE_CHECKING:
    from sparse_ds.adapter.adapter import Adapter
    from sparse_ds.adapter.native import IndexEncoding

FORMATS = ("merged", "supertuning", "shira", "native")
MERGED_ONLY = {
    "revision": None,
    "base": "dequantized",
    "dtype": "bfloat16",
    "max_shard_size": "5GB",
    "tokenizer": None,
    "verify": False,
}
"""Options that only a merged model has, and their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of an adapter (of any format), a run or a checkpoint of one")
    parser.add_argument("output", type=Path, help="folder to make")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What `write_adapter` reads."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="merged",
        help="merged: a dense model (default); supertuning: for PEFT over a 16-bit base; shira: for PEFT over a 4-bit "
        "base or before 0.21; native: indices and values",
    )
    parser.add_argument("--base-model", help="folder or hub name of the base; default: the one the adapter names")
    parser.add_argument("--revision", help="of a hub name: branch, tag or commit")
    parser.add_argument(
        "--base",
        choices=["dequantized", "original"],
        default=MERGED_ONLY["base"],
        help="merged, of a training over NF4: into the weights that were trained on, or into the original ones",
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default=MERGED_ONLY["dtype"], help="of a merged model"
    )
    parser.add_argument(
        "--max-shard-size", default=MERGED_ONLY["max_shard_size"], help="merged: a number followed by KB, MB or GB"
    )
    parser.add_argument("--tokenizer", type=Path, help="merged: its folder; default: the run's, or the base")
    parser.add_argument("--verify", action="store_true", help="merged: compare with base + adapter on the same tokens")
    parser.add_argument(
        "--index-encoding",
        choices=["plain", "delta"],
        default="plain",
        help="native: int32, or about one byte an index",
    )
    parser.add_argument("--allow-other-base", action="store_true", help="use a base with other weights than trained on")
    add_device_argument(parser, "quantize, merge and verify")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export has left there")


def run(arguments: argparse.Namespace) -> None:
    from sparse_ds.adapter.opening import open_adapter

    check_options(arguments)
    write_adapter(open_adapter(arguments.adapter, base_model=arguments.base_model), arguments)


def check_options(arguments: argparse.Namespace) -> None:
    """Options without effect are mistakes."""
    given = [name for name, default in MERGED_ONLY.items() if getattr(arguments, name) != default]
    if given and arguments.format != "merged":
        option = given[0].replace("_", "-")
        raise UserError(f"--{option} has no effect with --format {arguments.format}; leave it out, or export merged.")
    if arguments.index_encoding != "plain" and arguments.format != "native":
        raise UserError(f"--index-encoding has no effect with --format {arguments.format}; leave it out.")


def write_adapter(adapter: Adapter, arguments: argparse.Namespace) -> None:
    """Write `adapter` as the options say, and print what was written."""
    if arguments.format == "merged":
        _write_merged(adapter, arguments)
    elif arguments.format == "native":
        write_native(adapter, arguments.output, arguments.index_encoding, overwrite=arguments.overwrite)
    else:
        _write_peft(adapter, arguments)


def _write_merged(adapter: Adapter, arguments: argparse.Namespace) -> None:
    from sparse_ds.export.merged import merge_adapter

    device = choose_device(arguments.device)
    base = adapter.config.base.name if arguments.base_model is None else arguments.base_model
    report = merge_adapter(
        base,
        adapter,
        arguments.output,
        revision=arguments.revision,
        base_weights=arguments.base,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        tokenizer=arguments.tokenizer or _tokenizer_of_run(adapter.folder),
        device=device,
        allow_other_base=arguments.allow_other_base,
        overwrite=arguments.overwrite,
        show_progress=sys.stderr.isatty(),
    )
    written = report.checkpoint
    print(
        f"{written.folder}: {written.size_bytes / 2**30:.2f} GiB in {written.num_shards} file(s); "
        f"{report.num_deltas:,} deltas, {report.num_nonzero_deltas:,} not zero, {report.num_hidden_deltas:,} of these "
        f"hidden by rounding to {adapter.config.base.dtype}"
    )
    if report.error:
        print(f"{'warning: ' if arguments.base == 'original' else ''}{report.error}")
    if arguments.verify:
        from sparse_ds.export.verify import verify_merged

        revision = arguments.revision or (adapter.config.base.revision if arguments.base_model is None else None)
        print(verify_merged(written.folder, base, adapter, revision=revision, device=device).describe())


def _tokenizer_of_run(adapter_folder: Path) -> Path | None:
    """Beside the adapter or checkpoint of a run that has named its chat template; None: the base's will do."""
    run = adapter_folder.resolve().parent
    tokenizer = run / "tokenizer"
    return tokenizer if tokenizer.is_dir() and (run / "resolved_config.json").is_file() else None


def _write_peft(adapter: Adapter, arguments: argparse.Namespace) -> None:
    from sparse_ds.adapter.peft_formats.shira import save_shira
    from sparse_ds.adapter.peft_formats.supertuning import save_supertuning

    save = save_supertuning if arguments.format == "supertuning" else save_shira
    written = save(adapter, arguments.output, base_name=arguments.base_model, overwrite=arguments.overwrite)
    print(
        f"{written.folder}: {written.size_bytes / 2**20:.1f} MiB, {written.num_deltas:,} deltas and "
        f"{written.num_padding:,} entries of padding"
    )


def write_native(adapter: Adapter, output: Path, index_encoding: IndexEncoding, *, overwrite: bool) -> None:
    """Write `adapter` as this project does, and print what was written."""
    from sparse_ds.adapter.native import WEIGHTS_FILE, save_adapter
    from sparse_ds.checkpoint.atomic_folder import check_output_apart

    config = adapter.config
    check_output_apart(output, *adapter.sources)
    stored = save_adapter(
        output,
        ((name, deltas.indices, deltas.values) for name, deltas in adapter.items()),
        config=config,
        dense={name: adapter.read_dense(name) for name in config.dense_shapes},
        index_encoding=index_encoding,
        overwrite=overwrite,
    )
    size_bytes = (output / WEIGHTS_FILE).stat().st_size
    print(f"{output}: {size_bytes / 2**20:.1f} MiB, {len(config.shapes)} modules, indices {stored.index_hash[:12]}")
