"""What is in an adapter, without its base: the report of `inspect_adapter`, as JSON or as a text.

`indices_sha256` is `hash_indices`, the hash of the run's last event; `values_sha256` is the same over the values:

    hash = sha256( digest of each tensor, in the order of the sorted names )
    digest(tensor) = sha256( name, K, the K values as little-endian fp32 )

The histogram counts |value| in octaves: entry e holds 2^e <= |value| < 2^(e + 1), which needs no rounded logarithm. How
many values the rounding of a 16-bit base hides is not known without that base.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.adapter.combining import CombinedAdapter
from sparse_ds.sparse.index_hash import IndexHash

_COLUMNS = 7
"""Kinds of matrix side by side in the text: those of a Llama block."""
_BAR = 40


@dataclass(frozen=True)
class ModuleReport:
    """One module."""

    shape: tuple[int, int]
    num_active: int
    """K."""
    density: float
    """K / weights of the matrix."""
    num_zeros: int
    """Values that are exactly 0."""
    largest_value: float
    """Of the |values|; 0 where K = 0."""
    norm: float
    """Root of the sum of the squared values."""


@dataclass(frozen=True)
class AdapterReport:
    """What `inspect_adapter` found."""

    folder: str
    method: str
    task: str
    labels: tuple[str, ...] | None
    base: dict[str, Any]
    """`AdapterBase`."""
    configured_density: float
    num_active: int
    """K of all modules."""
    num_weights: int
    """Weights of all modules."""
    num_zeros: int
    num_dense: int
    """Numbers in tensors that trained as a whole."""
    dense_shapes: dict[str, tuple[int, ...]]
    size_bytes: int | None
    """Of the adapter's file of weights; None: it is not in such a file."""
    indices_sha256: str
    values_sha256: str
    histogram: dict[int, int]
    """e -> number of values with 2^e <= |value| < 2^(e + 1), ascending."""
    birth_steps: dict[int, int] | None
    """Optimizer step at which the age of a weight began -> how many weights, ascending; None: not known."""
    modules: dict[str, ModuleReport]

    @property
    def density(self) -> float:
        """Active / total weights of all modules."""
        return self.num_active / self.num_weights if self.num_weights else 0.0

    @property
    def bytes_per_delta(self) -> float | None:
        """Of the file, without the tensors that trained as a whole."""
        if self.size_bytes is None or self.num_active == 0:
            return None
        return (self.size_bytes - 4 * self.num_dense) / self.num_active

    def to_dict(self) -> dict[str, Any]:
        """For JSON (whose keys are text: 2^-10 is "-10" in the histogram)."""
        return {**asdict(self), "density": self.density, "bytes_per_delta": self.bytes_per_delta}

    def table(self) -> str:
        """Plain text, at most 100 columns wide."""
        base, size = self.base, "-"
        form = base["dtype"] if base["quantization"] == "none" else f"{base['quantization']} over {base['dtype']}"
        if base["double_quantization"]:
            form = f"{form}, double quantization"
        if self.size_bytes is not None:
            size = f"{self.size_bytes:,} bytes"
            if self.bytes_per_delta is not None:
                size = f"{size}, {self.bytes_per_delta:.2f} per delta"
        rows = [
            ("adapter", self.folder),
            ("method", f"{self.method}, density {self.configured_density:g}"),
            ("base", f"{base['name']}{'' if base['revision'] is None else '@' + base['revision']}, {form}"),
            ("task", self.task if self.labels is None else f"{self.task}: {', '.join(self.labels)}"),
            ("deltas", f"{self.num_active:,} of {self.num_weights:,} ({self.density:.3%}), {self.num_zeros:,} are 0"),
            *((name, f"{list(shape)}, trained as a whole") for name, shape in sorted(self.dense_shapes.items())),
            ("size", size),
            ("sha256 of indices", self.indices_sha256),
            ("sha256 of values", self.values_sha256),
        ]
        width = max(len(label) for label, _ in rows)
        lines = [f"{label:<{width}}  {text}" for label, text in rows]
        return "\n".join([*lines, *self._module_lines(), *self._histogram_lines(), *self._age_lines()])

    def _module_lines(self) -> list[str]:
        """K by layer and kind of matrix, then the modules outside of layers."""
        layers: dict[int, dict[str, int]] = {}
        others = []
        for name, module in self.modules.items():
            layer, kind = _layer_and_kind(name)
            if layer is None:
                others.append(f"{name}  {module.num_active:,} of {math.prod(module.shape):,}")
            else:
                layers.setdefault(layer, {})[kind] = module.num_active
        kinds = list(dict.fromkeys(kind for by_kind in layers.values() for kind in by_kind))
        lines = []
        for begin in range(0, len(kinds), _COLUMNS):
            shown = kinds[begin : begin + _COLUMNS]
            table = [["K in layer", *shown]]
            for layer in sorted(layers):
                cells = [layers[layer].get(kind) for kind in shown]
                table.append([str(layer), *("-" if cell is None else f"{cell:,}" for cell in cells)])
            widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
            lines += ["", *("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in table)]
        return [*lines, *(["", *others] if others else [])]

    def _histogram_lines(self) -> list[str]:
        most = max(self.histogram.values(), default=0)
        lines = ["", "|value| from"] if most else []
        for exponent, count in self.histogram.items():
            bar = "#" * math.ceil(count / most * _BAR)
            lines.append(f"2^{exponent:<4} {2.0**exponent:>9.2e}  {count:>13,}  {bar}")
        return lines

    def _age_lines(self) -> list[str]:
        if self.birth_steps is None:
            return []
        return ["", "trained since step", *(f"{step:>10,}  {count:>13,}" for step, count in self.birth_steps.items())]


def inspect_adapter(adapter: Adapter) -> AdapterReport:
    """Read all deltas once, one module at a time, and say what is in them.

    Args:
        adapter: any; its deltas are taken as valid.
    """
    config = adapter.config
    index_hash, histogram, value_digests = IndexHash(), Counter[int](), hashlib.sha256()
    modules = {}
    for module_name, (indices_K, values_K) in adapter.items():
        index_hash.add(module_name, indices_K)
        value_digests.update(_values_digest(module_name, values_K))
        histogram.update(_octaves(values_K))
        shape = config.shapes[module_name]
        modules[module_name] = ModuleReport(
            shape=shape,
            num_active=indices_K.numel(),
            density=indices_K.numel() / math.prod(shape),
            num_zeros=int((values_K == 0).sum()),
            largest_value=float(values_K.abs().max()) if values_K.numel() else 0.0,
            norm=float(values_K.double().norm()),
        )
    births = config.birth_steps
    return AdapterReport(
        folder=str(adapter.folder),
        method=config.method,
        task=config.task,
        labels=config.labels,
        base=config.base.model_dump(),
        configured_density=config.density,
        num_active=sum(module.num_active for module in modules.values()),
        num_weights=sum(math.prod(shape) for shape in config.shapes.values()),
        num_zeros=sum(module.num_zeros for module in modules.values()),
        num_dense=sum(math.prod(shape) for shape in config.dense_shapes.values()),
        dense_shapes=dict(config.dense_shapes),
        size_bytes=_size_bytes(adapter),
        indices_sha256=index_hash.hexdigest(),
        values_sha256=value_digests.hexdigest(),
        histogram=dict(sorted(histogram.items())),
        birth_steps=None if births is None else dict(sorted(births.items())),
        modules=dict(sorted(modules.items(), key=lambda item: _layer_and_kind(item[0])[0] or 0)),
    )


def _values_digest(name: str, values_K: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name}\0{values_K.numel()}\0".encode())
    digest.update(values_K.contiguous().numpy().astype("<f4", copy=False).data)
    return digest.digest()


def _octaves(values_K: Tensor) -> dict[int, int]:
    """floor(log2 |value|) -> count, of the values that are not 0."""
    # frexp gives m * 2^e with 1/2 <= m < 1, in fp64 for subnormal fp32 too.
    exponents = torch.frexp(values_K[values_K != 0].double()).exponent.long() - 1
    if exponents.numel() == 0:
        return {}
    smallest = int(exponents.min())
    counts = torch.bincount(exponents - smallest).tolist()
    return {smallest + place: count for place, count in enumerate(counts) if count}


def _size_bytes(adapter: Adapter) -> int | None:
    path = Path(adapter.folder) / "adapter_model.safetensors"
    return path.stat().st_size if path.is_file() and not isinstance(adapter, CombinedAdapter) else None


def _layer_and_kind(module_name: str) -> tuple[int | None, str]:
    """`model.layers.3.self_attn.q_proj` is (3, `q_proj`); a bias keeps its module: `q_proj.bias`."""
    parts = module_name.split(".")
    number = next((int(part) for part in parts if part.isdecimal()), None)
    return number, ".".join(parts[-2:] if parts[-1] == "bias" else parts[-1:])
