"""Open an adapter whatever kind it is: the folder says it.

adapter_config.json with `format`       native                  `native.load_adapter`
adapter_config.json with `peft_type`    PEFT                    `supertuning.SupertuningAdapter`, `shira.ShiraAdapter`
adapter/                                folder of a run         what is in there
"""

from __future__ import annotations

import json
from pathlib import Path

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.adapter.native import CONFIG_FILE, FORMAT_NAME, load_adapter
from sparse_ds.adapter.of_checkpoint import CheckpointAdapter
from sparse_ds.adapter.peft_formats.shira import ShiraAdapter
from sparse_ds.adapter.peft_formats.supertuning import SupertuningAdapter
from sparse_ds.checkpoint.index import INDEX_FILE
from sparse_ds.config.errors import UserError

PEFT_ADAPTERS = {kind.peft_type: kind for kind in (SupertuningAdapter, ShiraAdapter)}
RUN_ADAPTER = "adapter"
"""Where a run leaves its adapter."""


def open_adapter(path: Path | str, *, base_model: Path | str | None = None) -> Adapter:
    """The adapter in a folder, checked.

    Args:
        path: folder of an adapter (native or PEFT's), of a checkpoint, or of a finished run.
        base_model: folder or hub name of the base, for a PEFT adapter that this project did not write; None: the one it
            names.

    Raises:
        UserError: no adapter there, one of a kind that cannot be read, or a damaged one.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"Adapter folder '{folder}' {'is a file' if folder.exists() else 'does not exist'}.")
    if (folder / INDEX_FILE).is_file():
        return CheckpointAdapter(folder)
    config_path = folder / CONFIG_FILE
    if config_path.is_file():
        return _open_by_config(folder, config_path, base_model)
    if (folder / RUN_ADAPTER / CONFIG_FILE).is_file():
        return open_adapter(folder / RUN_ADAPTER, base_model=base_model)
    found = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "") if found else "nothing"
    raise UserError(
        f"'{folder}' holds no adapter: found {shown}; expected '{CONFIG_FILE}' (an adapter of sparse_ds or PEFT), "
        f"'{INDEX_FILE}' (a checkpoint) or '{RUN_ADAPTER}/' (a finished run)."
    )


def _open_by_config(folder: Path, config_path: Path, base_model: Path | str | None) -> Adapter:
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Adapter config '{config_path}' is not readable JSON: {error}.") from error
    if not isinstance(content, dict) or not {"format", "peft_type"} & content.keys():
        raise UserError(
            f"Adapter config '{config_path}' has neither 'format' (an adapter of sparse_ds: {FORMAT_NAME!r}) nor "
            "'peft_type' (an adapter of PEFT)."
        )
    peft_type = content.get("peft_type")
    if "format" in content:
        return load_adapter(folder)
    if not isinstance(peft_type, str) or peft_type not in PEFT_ADAPTERS:
        raise UserError(
            f"Adapter '{folder}' has peft_type {peft_type!r}; expected one of {', '.join(PEFT_ADAPTERS)}, which hold "
            "single weights. Merge it with PEFT, and import the difference to the base."
        )
    return PEFT_ADAPTERS[peft_type](folder, base_model)
