"""Checkpoints made from docs/checkpoints.md alone: by the safetensors library, json and hashlib, not by the writer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TENSORS = {
    "q_proj.indices": torch.arange(7, dtype=torch.int32) * 3,
    "q_proj.values": torch.linspace(-1, 1, 7),
    "q_proj.row_accumulator": torch.rand(5, generator=torch.Generator().manual_seed(0)),
    "wide.indices": torch.tensor([2**31, 2**40]),
    "nothing.values": torch.zeros(0),
    "ranks/torch_generator": torch.arange(12, dtype=torch.uint8),
}
IDENTITY = {"seed": 0, "base": {"dtype": "bfloat16"}, "active_weights": {"q_proj": 7, "k_proj": 3}}
RUN_STATE = {"report": {"heldout_before": 2.5, "index_hash": "ab"}, "scheduler": {"last_epoch": 5}}
DTYPE_NAMES = {torch.int32: "I32", torch.int64: "I64", torch.float32: "F32", torch.uint8: "U8"}


def make_checkpoint(run: Path, step: int = 5, num_files: int = 2, **changed: Any) -> Path:
    """`run/checkpoint-<step>` with the tensors above, sliced evenly over some files; `changed` goes into the index."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    entries = {}
    for name, tensor in TENSORS.items():
        size = max(1, -(-tensor.numel() // num_files))
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "num_elements": tensor.numel(),
            "slice_elements": size,
        }
    for number in range(num_files):
        slices = {}
        for name, tensor in TENSORS.items():
            size = entries[name]["slice_elements"]
            assert isinstance(size, int)
            piece = tensor[number * size : (number + 1) * size]
            if piece.numel():
                slices[name] = piece.clone()
        save_file(slices, folder / f"state-{number + 1:05d}-of-{num_files:05d}.safetensors")
    (folder / "trainer_state.json").write_text('{"global_step": 5}', encoding="utf-8")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    content = {
        "format": "sparse_ds.checkpoint",
        "format_version": 2,
        "step": step,
        "identity": IDENTITY,
        "run_state": RUN_STATE,
        "num_state_files": num_files,
        "tensors": entries,
        "files": hashes,
    }
    write_content(folder, {**content, **changed})
    return folder


def write_content(folder: Path, content: dict[str, Any]) -> None:
    """Write an index with a right hash of itself."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps({**content, "sha256": digest}), encoding="utf-8")


def change_index(folder: Path, **changed: Any) -> None:
    """Changes of somebody who knows the format: the hashes are those of the new content."""
    content = json.loads((folder / "checkpoint.json").read_text())
    content.pop("sha256")
    for path in folder.iterdir():
        if path.name in content["files"] and not path.is_symlink():
            content["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_content(folder, {**content, **changed})
