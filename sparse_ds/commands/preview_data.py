"""`sparse-ds data preview --config CONFIG`: the data as training takes it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sparse_ds.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.set)
    # DeepSpeed, which is imported and not used, would look for a GPU and say that there is none.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from sparse_ds.data.preview_html import preview_html, save_html
    from sparse_ds.data.preview_text import preview_text
    from sparse_ds.training.data_preview import preview_data

    preview = preview_data(config, arguments.samples)
    colour = sys.stdout.isatty() if arguments.colour == "auto" else arguments.colour == "always"
    print(preview_text(preview.sources, preview.findings, colour=colour))
    if arguments.html is not None:
        save_html(preview_html(f"Data of {arguments.config}", preview.sources, preview.findings), arguments.html)
