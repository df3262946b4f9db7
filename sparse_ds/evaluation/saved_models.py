"""What a run, a merge or anybody else has saved, as a model of plain transformers in this process.

| given | what is loaded |
|---|---|
| a folder with config.json, or a hub name | this model |
| the folder of a run | its `merged/`, else its `adapter/` |
| an adapter of this project | its base with the adapter merged in, as `merged/` of the run would be |
| an adapter of peft | its base with the adapter merged in, by peft |

An adapter of this project is merged into a temporary folder (one copy of the base on the disk, `TMPDIR` says where),
because the merged model is then the one that was trained, number for number, over an NF4 base too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from sparse_ds.adapter.native import CONFIG_FILE, FORMAT_NAME, load_adapter
from sparse_ds.config.errors import UserError
from sparse_ds.export.merged import merge_adapter
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SavedModel:
    """A causal language model in evaluation mode, its tokenizer, and what was loaded, for messages."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    description: str


@contextmanager
def open_saved_model(
    name: str, *, base: str | None, revision: str | None, dtype: str, device: str
) -> Iterator[SavedModel]:
    """Load a model; what was made for it on the disk is gone after the context.

    Args:
        name: from the table above.
        base: of an adapter of this project, instead of the one that it names.
        revision: of a hub name: of the model, or of an adapter's base.
        dtype: "auto" (as saved; of an adapter: as trained), "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".

    Raises:
        UserError: nothing there, or no causal language model; an adapter that does not fit its base.
        RuntimeError: no room for the merged copy.
    """
    folder = _find_in_run(Path(name).expanduser())
    config = _adapter_config(folder)
    if base is not None and (config is None or config.get("format") != FORMAT_NAME):
        raise UserError(f"--base: given, but {name} is no adapter of this project, which has one. Remove it.")
    if config is None:
        found = folder if folder.is_dir() else _find_model(name, revision)
        yield SavedModel(_load(found, dtype, device), load_tokenizer(found), str(found))
    elif config.get("format") == FORMAT_NAME:
        with tempfile.TemporaryDirectory(prefix="sparse_ds_eval_") as scratch:
            merged = Path(scratch) / "merged"
            tokenizer, description = _merge(folder, merged, base, revision, dtype, device)
            yield SavedModel(_load(merged, dtype, device), tokenizer, description)
    else:
        yield _load_peft(folder, config, dtype, device)


def _find_in_run(folder: Path) -> Path:
    """Of a run's folder: what it left."""
    if (folder / "resolved_config.json").is_file():
        for part in ("merged", "adapter"):
            if (folder / part).is_dir():
                return folder / part
        raise UserError(f"{folder} is a run that has left neither merged/ nor adapter/. Let it finish first.")
    return folder


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Get the adapter again.") from None
    return config if isinstance(config, dict) else {}


def _find_model(name: str, revision: str | None) -> Path:
    try:
        return find_base_model(name, revision)
    except UserError as error:
        raise UserError(str(error).replace("model.name_or_path: ", "")) from None


def _merge(
    folder: Path, merged: Path, base: str | None, revision: str | None, dtype: str, device: str
) -> tuple[PreTrainedTokenizerBase, str]:
    adapter = load_adapter(folder)
    if adapter.config.task != "causal_lm":
        raise UserError(f"{folder} is the adapter of a {adapter.config.task}; expected one of a causal_lm.")
    trained = adapter.config.base
    wanted = trained.name if base is None else base
    merge_adapter(
        wanted,
        adapter,
        merged,
        revision=revision,
        dtype=trained.dtype if dtype == "auto" else dtype,
        device=device,
    )
    return load_tokenizer(merged), f"{folder}, merged into {wanted}"


def _load_peft(folder: Path, config: dict[str, Any], dtype: str, device: str) -> SavedModel:
    base = str(config.get("base_model_name_or_path"))
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=dtype, device_map=device)
        model = model.merge_and_unload()
    except Exception as error:  # peft and transformers raise kinds of their own
        raise UserError(
            f"{folder} cannot be loaded by peft ({type(error).__name__}: {' '.join(str(error).split())[:300]}). "
            f"Expected an adapter over a base that is there; it names {base}."
        ) from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else _find_model(base, config.get("revision")))
    return SavedModel(model.eval(), tokenizer, f"{folder}, merged into {base}")


def _load(folder: Path, dtype: str, device: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers finds in it
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} is no model ({reason}). Expected config.json and the weights.") from None
    kinds = config.architectures or []
    if kinds and not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise UserError(
            f"{folder} is a {kinds[0]}; expected a causal language model, which alone answers questions. The run that "
            "trained a classifier reports its held-out accuracy."
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=device, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and torch raise kinds of their own
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} cannot be loaded by transformers ({type(error).__name__}: {reason}).") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{folder} has no tensor {missing[0]} ({len(missing)} are missing). Get the model again.")
    return model.eval()
