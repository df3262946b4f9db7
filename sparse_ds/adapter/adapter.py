"""What an adapter is: the deltas of every target module of one base model, whatever file or sum they come from.

    native      a folder that this project wrote               `native.load_adapter`
    checkpoint  `checkpoint-<step>` of a run                   `of_checkpoint.CheckpointAdapter`
    PEFT        a folder in one of PEFT's formats              `supertuning.SupertuningAdapter`, `shira.ShiraAdapter`
    difference  two dense checkpoints                          `difference.DifferenceAdapter`

All are an `Adapter`, so whatever reads one (merging into the base, other file formats, sums of adapters) reads all.
One module is in memory at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from sparse_ds.sparse.index_hash import hash_indices


class AdapterBase(BaseModel):
    """The frozen model under the deltas, and the form it had during training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Hub name or folder, as in `model.name_or_path`."""
    revision: str | None = None
    quantization: Literal["nf4", "none"]
    double_quantization: bool = False
    dtype: Literal["bfloat16", "float32"]
    """The dtype of the weights that the deltas were added to."""
    weights_hash: str | None = None
    """`model.weights_hash` of the target matrices; None: not known (a base that is stored in NF4)."""


class AdapterConfig(BaseModel):
    """What is known of an adapter besides its numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    density: float = Field(gt=0, le=1)
    """Active / total weights of each target matrix, as configured."""
    base: AdapterBase
    shapes: dict[str, tuple[PositiveInt, PositiveInt]]
    """Module name -> shape of its weight, [out, in]; [D, 1] for the weight of a norm and for `<module>.bias`."""
    dense_shapes: dict[str, tuple[PositiveInt, ...]] = {}
    """Name -> shape of tensors that trained as a whole: stored themselves, not as deltas."""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    labels: tuple[str, ...] | None = None
    """Of a classification, in the order of the head's rows."""
    pad_token_id: int | None = None
    """Of a classification: transformers reads the last token that is another one."""
    birth_steps: dict[int, int] | None = None
    """Optimizer step at which the age of a weight began -> how many weights; None: not known."""


class Deltas(NamedTuple):
    """The trained changes of one matrix."""

    indices: Tensor
    """[K] int32 or int64, flat row-major, unique, ascending."""
    values: Tensor
    """[K] fp32."""


class Adapter(ABC):
    """Deltas that are read one module at a time.

    Attributes:
        folder: where it comes from, for messages and so that no output overwrites it.
        config: what is known besides the numbers.
    """

    folder: Path
    config: AdapterConfig

    @abstractmethod
    def read(self, module_name: str) -> Deltas:
        """The deltas of one module of `config.shapes`, valid (`find_problem` of `valid_deltas`), made or read now."""

    @abstractmethod
    def read_dense(self, name: str) -> Tensor:
        """A tensor of `config.dense_shapes`, fp32, read now."""

    def items(self) -> Iterator[tuple[str, Deltas]]:
        """(module name, deltas) in the order of the sorted names, one module in memory at a time."""
        for module_name in sorted(self.config.shapes):
            yield module_name, self.read(module_name)

    @property
    def sources(self) -> tuple[Path, ...]:
        """All folders that are read."""
        return (self.folder,)

    @property
    def model_config(self) -> Mapping[str, Any]:
        """Entries of config.json that a merged model has because of the adapter, beyond those of its task."""
        return {}

    @property
    def model_card_section(self) -> str:
        """Markdown for README.md of a merged model; empty for most."""
        return ""

    @cached_property
    def index_hash(self) -> str:
        """`hash_indices` of all modules: equal to that of the run's last event."""
        return hash_indices((module_name, deltas.indices) for module_name, deltas in self.items())


def tensor_name(module_name: str) -> str:
    """The tensor of the base that the deltas of a name of `shapes` belong to."""
    return module_name if module_name.endswith(".bias") else f"{module_name}.weight"
