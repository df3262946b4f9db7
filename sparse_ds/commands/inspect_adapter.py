"""`sparse-ds inspect ADAPTER`: what is in an adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of an adapter (of any format), a run or a checkpoint of one")
    parser.add_argument("--base-model", help="of an adapter that PEFT wrote: folder or hub name of the base")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    from sparse_ds.adapter.inspection import inspect_adapter
    from sparse_ds.adapter.opening import open_adapter

    report = inspect_adapter(open_adapter(arguments.adapter, base_model=arguments.base_model))
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.table())
