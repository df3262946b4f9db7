"""An adapter from two dense checkpoints, base and fine-tuned: the weights that differ, or the largest differences.

    exact      every weight that differs; with M the dtype of the fine-tuned checkpoint (bfloat16, else float32),
               M( fp32(M(w)) + value ) is the tuned weight
    density    of each matrix the floor(density * N) weights of largest |difference| (at least one of a vector), equal
               ones by index

value = fp32(tuned) - fp32(M(w)), rounded to fp32: of all values the one whose sum comes nearest to the tuned weight. In
bf16 the sum is the tuned weight, but where this is below about 2^-15 of the base's; in fp32 it is where both are within
a factor of two, and beyond that where the digits happen to fit. What is not given back to the last digit is counted
(`num_inexact`). 0.0 and -0.0 are the same here.

Differences are looked for in the linear layers inside the transformer blocks, their biases, and the norms. Embeddings
and the head have no deltas in this project; where they differ, `others` says what to do. Both checkpoints are read one
tensor at a time, once to compare and once more for every `read`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterBase, AdapterConfig, Deltas, tensor_name
from sparse_ds.adapter.same_architecture import HEAD, compare_architectures
from sparse_ds.adapter.valid_deltas import index_dtype
from sparse_ds.config.errors import UserError
from sparse_ds.kernels.apply_deltas import merged_values
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.weights_hash import weights_hash
from sparse_ds.monitor.progress import ProgressBytes
from sparse_ds.sparse.layout import num_active_weights

logger = logging.getLogger(__name__)

Others = Literal["refuse", "leave", "dense"]


class DifferenceAdapter(Adapter):
    """The difference of two checkpoints; their comparison is made when it is opened.

    Args:
        base: folder or hub name of the base model, in 16 or 32 bits.
        tuned: folder or hub name of the same model, fine-tuned: a causal language model, or a classifier made of it
            (whose head is kept as a whole).
        revision: of a hub base.
        tuned_revision: of a hub name.
        density: share of each matrix to keep, in (0, 1]; None: all that differ.
        others: of tensors that differ and have no deltas (embeddings, head): "refuse", "leave" them at the base's
            numbers with a warning, or keep them whole ("dense").
        show_progress: with a bar.

    Attributes:
        num_inexact: values that give the tuned weight back to within rounding only.
        num_changed: weights of `config.shapes` that differ.
        left: names of tensors that differ and were left.

    Memory: a few copies of one tensor.

    Raises:
        UserError: a checkpoint is missing, damaged, quantized or of another architecture; NaN or Inf; a difference that
            is refused; no difference at all.
    """

    def __init__(
        self,
        base: Path | str,
        tuned: Path | str,
        *,
        revision: str | None = None,
        tuned_revision: str | None = None,
        density: float | None = None,
        others: Others = "refuse",
        show_progress: bool = False,
    ) -> None:
        if density is not None and not 0 < density <= 1:
            raise UserError(f"density is {density}; expected a share above 0, at most 1.")
        self._density = density
        self._base, self._tuned = _open("base", base, revision), _open("fine-tuned", tuned, tuned_revision)
        self.folder = self._tuned.folder
        compared = compare_architectures(self._base, self._tuned)
        self._dtype = _training_dtype(self._tuned, [*map(tensor_name, compared.shapes), *compared.others])
        self.num_inexact, self.num_changed, self.left = 0, 0, list[str]()
        num_active: dict[str, int] = {}
        with ProgressBytes("comparing", self._tuned.size_bytes, enabled=show_progress) as progress:
            differing = [name for name in compared.others if name == HEAD or self._differs(name, progress)]
            dense = self._decide_others(differing, others)
            for module_name, shape in compared.shapes.items():
                deltas = self._make(module_name, shape, count=True)
                progress.add(self._tuned.stored(tensor_name(module_name)).num_bytes)
                if deltas.values.numel():
                    num_active[module_name] = deltas.values.numel()
        if not num_active:
            raise UserError(
                f"No linear layer, norm or bias of '{self._tuned.folder}' differs from '{self._base.folder}'; expected "
                "a fine-tuned model. Check which two were given."
            )
        shapes = {name: compared.shapes[name] for name in num_active}
        num_elements = sum(rows * cols for rows, cols in shapes.values())
        task: dict[str, Any] = {}
        if (classes := compared.classification) is not None:
            task = {"task": "sequence_classification", "labels": classes.labels, "pad_token_id": classes.pad_token_id}
        self.config = AdapterConfig(
            method="difference",
            density=density or sum(num_active.values()) / num_elements,
            base=AdapterBase(
                name=str(base),
                revision=revision,
                quantization="none",
                dtype="bfloat16" if self._dtype == torch.bfloat16 else "float32",
                weights_hash=weights_hash(
                    self._base, {tensor_name(name): shape for name, shape in shapes.items()}, self._dtype
                ),
            ),
            shapes=shapes,
            dense_shapes={name: self._tuned.stored(name).shape for name in dense},
            **task,
        )
        if self.num_inexact:
            logger.warning(
                "%s: of %d weights that differ, no fp32 value gives %d back to the last digit; theirs is the nearest",
                self.folder,
                self.num_changed,
                self.num_inexact,
            )

    def read(self, module_name: str) -> Deltas:
        return self._make(module_name, self.config.shapes[module_name])

    def read_dense(self, name: str) -> Tensor:
        assert name in self.config.dense_shapes, name
        return self._read(self._tuned, name).float()

    def _make(self, module_name: str, shape: tuple[int, int], *, count: bool = False) -> Deltas:
        base_N, tuned_N = self._read_pair(tensor_name(module_name))
        differs_N = base_N != tuned_N
        num_changed = num_kept = int(differs_N.sum())
        if self._density is not None:
            num_wanted = num_active_weights(self._density, base_N.numel())
            num_kept = min(num_changed, max(1 if shape[1] == 1 else 0, num_wanted))
        if num_kept < num_changed:
            indices_K = _largest((tuned_N.float() - base_N.float()).abs_(), num_kept)
        else:
            indices_K = differs_N.nonzero().view(-1)
        base_K, tuned_K = base_N[indices_K], tuned_N[indices_K]
        values_K = tuned_K.float() - base_K.float()
        if count:
            self.num_changed += num_changed
            self.num_inexact += int((merged_values(base_K, values_K) != tuned_K).sum())
        return Deltas(indices_K.to(index_dtype(shape)), values_K)

    def _read_pair(self, name: str) -> tuple[Tensor, Tensor]:
        """[N] of both, in the dtype of the training."""
        base, tuned = (self._read(checkpoint, name).view(-1) for checkpoint in (self._base, self._tuned))
        return base.to(self._dtype), tuned.to(self._dtype)

    def _read(self, checkpoint: BaseCheckpoint, name: str) -> Tensor:
        tensor = checkpoint.read(name)
        if not bool(tensor.isfinite().all()):
            num_bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"Tensor '{name}' of '{checkpoint.folder}' holds {num_bad} numbers that are NaN or infinite; the "
                "checkpoint is damaged. Get it again."
            )
        return tensor

    def _differs(self, name: str, progress: ProgressBytes) -> bool:
        progress.add(self._tuned.stored(name).num_bytes)
        return not torch.equal(*self._read_pair(name))

    def _decide_others(self, differing: list[str], others: Others) -> list[str]:
        """Names of what is kept whole."""
        unexpected = [name for name in differing if name != HEAD]
        if not unexpected or others == "dense":
            return differing
        found = f"{len(unexpected)} tensor(s) that hold no deltas differ: {', '.join(unexpected)}"
        if others == "refuse":
            raise UserError(
                f"'{self._tuned.folder}' and '{self._base.folder}': {found}. Leave them at the base's numbers "
                "(others: leave), or keep them whole (others: dense)."
            )
        logger.warning("%s: %s; they are left at the base's numbers", self.folder, found)
        self.left = unexpected
        return [name for name in differing if name == HEAD]


def _largest(scores_N: Tensor, num_kept: int) -> Tensor:
    """[num_kept] ascending int64 positions of the largest scores, equal ones by index."""
    if num_kept == 0:
        return torch.empty(0, dtype=torch.int64)
    threshold = scores_N.topk(num_kept, sorted=False).values.min()
    above = (scores_N > threshold).nonzero().view(-1)
    equal = (scores_N == threshold).nonzero().view(-1)[: num_kept - above.numel()]
    return torch.cat([above, equal]).sort().values


def _open(role: str, name: Path | str, revision: str | None) -> BaseCheckpoint:
    try:
        checkpoint = BaseCheckpoint(find_base_model(str(name), revision))
    except UserError as error:
        raise UserError(f"The {role} checkpoint '{name}' cannot be read: {error}") from error
    if "quantization_config" in checkpoint.config:
        raise UserError(f"The {role} checkpoint '{name}' is quantized; give it in 16 or 32 bits.")
    return checkpoint


def _training_dtype(tuned: BaseCheckpoint, names: list[str]) -> torch.dtype:
    dtypes = {tuned.stored(name).dtype for name in names}
    if torch.float64 in dtypes:
        raise UserError(f"'{tuned.folder}' holds weights in float64; give it in 16 or 32 bits.")
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
