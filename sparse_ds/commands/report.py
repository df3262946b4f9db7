"""`sparse-ds report RUN...`: compare finished runs in one table."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")


def run(arguments: argparse.Namespace) -> None:
    from sparse_ds.monitor.report import compare_runs

    print(compare_runs(arguments.runs))
