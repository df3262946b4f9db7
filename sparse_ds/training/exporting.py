"""What is left when a run is over: made by rank 0 alone, while nobody waits in a collective.

adapter/               is there already (`saving`)
adapter_supertuning/   for PEFT, `export.adapters`
adapter_shira/
merged/                the dense model, `export.merged`
metrics.jsonl          the summary
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.adapter.native import load_adapter
from sparse_ds.adapter.peft_formats.shira import save_shira
from sparse_ds.adapter.peft_formats.supertuning import save_supertuning
from sparse_ds.config import RunConfig
from sparse_ds.export.merged import merge_adapter
from sparse_ds.export.verify import verify_merged
from sparse_ds.monitor.metrics_log import MetricsLog
from sparse_ds.monitor.report import run_table
from sparse_ds.monitor.summary import RunSummary
from sparse_ds.training.output_folder import OutputFolder

logger = logging.getLogger("sparse_ds")


def export_and_report(
    config: RunConfig, output: OutputFolder, base_folder: Path, summary: RunSummary, device: torch.device
) -> None:
    """Write what section `export` asks for, then the summary, and print the table. Collectives: none."""
    if summary.adapter_dir is not None:
        adapter = load_adapter(output.adapter)
        if config.export.merged:
            _merge(config, output, base_folder, adapter, device)
    if config.export.merged:
        summary = replace(summary, merged_dir=str(output.merged))
    with MetricsLog(output.metrics) as log:
        log.write("summary", summary.to_record())
    print(run_table(summary), flush=True)
    # Last: what PEFT cannot hold is a mistake, and all the rest is there.
    if summary.adapter_dir is not None:
        for peft_format in config.export.adapters:
            save = save_supertuning if peft_format == "supertuning" else save_shira
            save(adapter, output.peft_adapter(peft_format), overwrite=True)


def _merge(config: RunConfig, output: OutputFolder, base_folder: Path, adapter: Adapter, device: torch.device) -> None:
    report = merge_adapter(
        base_folder,
        adapter,
        output.merged,
        base_weights=config.export.base_weights,
        dtype=config.export.merged_dtype,
        max_shard_size=config.export.max_shard_size,
        device=device.type,
        overwrite=True,
    )
    if report.error:
        is_other_model = config.export.base_weights == "original"
        logger.log(logging.WARNING if is_other_model else logging.INFO, "%s", report.error)
    if config.export.verify:
        logger.info("%s", verify_merged(output.merged, base_folder, adapter, device=device.type).describe())
