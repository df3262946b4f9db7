"""Checkpoints of Llama shape with random weights, on disk: what `bench_load.py` loads and `plan_load.py` looks at."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from sparse_ds.embedded import resolve_model
from sparse_ds.export.checkpoint_writer import plan_shards
from sparse_ds.model.base_checkpoint import SAFETENSORS, TOKENIZER_FILES

INDEX_FILE = f"{SAFETENSORS}.index.json"
STANDARD_DEVIATION = 0.02
CHUNK_ELEMENTS = 2**22
"""Numbers drawn and written at a time."""


class LlamaShape(NamedTuple):
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self) -> LlamaConfig:
        """As transformers describes it; untied, bf16."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )

    def empty_tensors(self) -> dict[str, Tensor]:
        """Name -> bf16 tensor on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.bfloat16)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


def shape_of_size(size_gb: float) -> LlamaShape:
    """A Llama of about so many GB (1e9 bytes), rounded up to whole layers: TinyLlama's widths, half of them below 1 GB.

    Raises:
        SystemExit: too small for one layer.
    """
    widths = LlamaShape(2048, 5632, 1, 32, 4, 32_000) if size_gb >= 1 else LlamaShape(1024, 2816, 1, 16, 2, 16_000)
    one, two = (
        sum(tensor.nbytes for tensor in widths._replace(layers=layers).empty_tensors().values()) for layers in (1, 2)
    )
    num_layers = 1 + math.ceil((size_gb * 1e9 - one) / (two - one))
    if num_layers < 1:
        raise SystemExit(f"--size-gb: got {size_gb}, expected at least {one / 1e9:.2g}")
    return widths._replace(layers=num_layers)


def write_llama(folder: Path, shape: LlamaShape, *, shard_bytes: int, holes: bool = False) -> None:
    """Write a sharded bf16 checkpoint whose weights are N(0, 0.02), the same for the same shape.

    Memory: `CHUNK_ELEMENTS` numbers.

    Args:
        folder: made, with config.json and the tokenizer of the embedded model (so that the folder is complete).
        shape: of the model.
        shard_bytes: largest payload of a file.
        holes: weights that are holes of the files: the right size and headers, all zeros, no room on the disk.
    """
    tensors = shape.empty_tensors()
    shards = plan_shards(tensors, dtype="bfloat16", max_shard_size=shard_bytes)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if not holes and free_bytes < size_bytes:
        raise SystemExit(
            f"--folder: {folder} has {free_bytes / 1e9:.2f} GB free, the checkpoint takes {size_bytes / 1e9:.2f}"
        )
    for file_name, names in shards.items():
        _write_shard(folder / file_name, {name: tensors[name] for name in names}, holes=holes)
    weight_map = {name: file_name for file_name, names in shards.items() for name in names}
    index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    if len(shards) > 1:
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    tokenizer_folder = Path(resolve_model("embedded"))
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    # Last: a folder with a config.json is a whole one.
    shape.config().save_pretrained(folder)


def _write_shard(path: Path, tensors: dict[str, Tensor], *, holes: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    with path.open("wb") as file:
        file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        if holes:
            file.truncate(8 + len(header_bytes) + end)
            return
        for name, tensor in tensors.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            for start in range(0, tensor.numel(), CHUNK_ELEMENTS):
                chunk = torch.empty(min(CHUNK_ELEMENTS, tensor.numel() - start))
                chunk.normal_(0, STANDARD_DEVIATION, generator=generator)
                chunk.to(torch.bfloat16).view(torch.uint8).numpy().tofile(file)
        # Only clean pages can be dropped from the page cache.
        os.fsync(file.fileno())


def has_llama(folder: Path, shape: LlamaShape) -> bool:
    """Whether the whole checkpoint is there.

    Raises:
        SystemExit: the folder holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if (folder / "config.json").is_file():
        config, wanted = LlamaConfig.from_pretrained(folder), shape.config()
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
        if all(getattr(config, key) == getattr(wanted, key) for key in keys):
            return True
    raise SystemExit(f"--folder: {folder} holds something else than {shape}; give another folder, or empty it")
