"""An adapter from two dense checkpoints, base and fine-tuned: the weights that differ, or the largest differences.

    exact      every weight that differs; with M the dtype of the fine-tuned checkpoint (bfloat16, else float32),
               M( fp32(M(w)) + value ) is the tuned weight
    density    of each matrix the floor(density * N) weights of largest |difference| (at least one of a vector), equal
               ones by index

value = fp32(tuned) - fp32(M(w)), or one of its two neighbours in fp32 where only that gives the tuned weight back. Some
weights no fp32 value gives back: the sum has no digits left where the tuned weight is much smaller than the base's (below
2^-16 of it in bf16; in fp32 already below one half of it, unless the digits happen to fit). Of these the value is the
nearest, and they are counted (`num_inexact`). 0.0 and -0.0 are the same here.

Differences are looked for in the linear layers inside the transformer blocks, their biases, and the norms. Embeddings
and the head have no deltas in this project; where they differ, `others` says what to do. Both checkpoints are read one
tensor at a time, once to compare and once more for every `read`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterBase, AdapterConfig, Deltas, tensor_name
from sparse_ds.adapter.valid_deltas import index_dtype
from sparse_ds.config.errors import UserError
from sparse_ds.kernels.apply_deltas import merged_values
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings, check_base, list_base_tensors
from sparse_ds.model.build import empty_model, read_architecture
from sparse_ds.model.classification_head import HEAD_NAME, Classification
from sparse_ds.model.find_base_model import find_base_model
from sparse_ds.model.targets import ALL_LINEAR, find_norms, find_targets
from sparse_ds.monitor.progress import ProgressBytes
from sparse_ds.sparse.layout import num_active_weights

logger = logging.getLogger(__name__)

Others = Literal["refuse", "leave", "dense"]
HEAD = f"{HEAD_NAME}.weight"
VOCABULARY_HEAD = "lm_head.weight"
NOT_ARCHITECTURE = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "problem_type"),
    *("id2label", "label2id", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Entries of config.json that may differ between two forms of one model."""


class DifferenceAdapter(Adapter):
    """The difference of two checkpoints; their comparison is made when it is opened.

    Args:
        base: folder or hub name of the base model, in 16 or 32 bits.
        tuned: folder or hub name of the same model, fine-tuned: a causal language model, or a classifier made of it
            (whose head is kept as a whole).
        revision: of a hub base.
        tuned_revision: of a hub name.
        density: share of each matrix to keep, in (0, 1]; None: all that differ.
        others: of tensors that differ and have no deltas (embeddings, head): "refuse", "leave" them at the base's numbers
            with a warning, or keep them whole ("dense").
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
        classification = _classification_of(self._tuned)
        layout = _compare_layouts(self._base, self._tuned, classification)
        self._dtype = _training_dtype(self._tuned, [*layout.names, *layout.others])
        self.num_inexact, self.num_changed, self.left = 0, 0, list[str]()
        num_active: dict[str, int] = {}
        with ProgressBytes("comparing", self._tuned.size_bytes, enabled=show_progress) as progress:
            differing = [name for name in layout.others if name == HEAD or self._differs(name, progress)]
            dense = self._decide_others(differing, others)
            for module_name, shape in layout.names.items():
                deltas = self._make(module_name, shape, count=True)
                progress.add(self._tuned.stored(tensor_name(module_name)).num_bytes)
                if deltas.values.numel():
                    num_active[module_name] = deltas.values.numel()
        if not num_active:
            raise UserError(
                f"No linear layer, norm or bias of '{self._tuned.folder}' differs from '{self._base.folder}'; expected "
                "a fine-tuned model. Check which two were given."
            )
        shapes = {name: layout.names[name] for name in num_active}
        num_elements = sum(rows * cols for rows, cols in shapes.values())
        task: dict[str, Any] = {}
        if classification is not None:
            labels, pad_token_id = classification.labels, classification.pad_token_id
            task = {"task": "sequence_classification", "labels": labels, "pad_token_id": pad_token_id}
        self.config = AdapterConfig(
            method="difference",
            density=density or sum(num_active.values()) / num_elements,
            base=AdapterBase(
                name=str(base),
                revision=revision,
                quantization="none",
                dtype="bfloat16" if self._dtype == torch.bfloat16 else "float32",
            ),
            shapes=shapes,
            dense_shapes={name: self._tuned.stored(name).shape for name in dense},
            **task,
        )
        if self.num_inexact:
            logger.warning(
                "%s: %d of %d weights are not given back to the last digit by any fp32 value; theirs is the nearest",
                self.folder,
                self.num_inexact,
                self.num_changed,
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
            num_kept = min(
                num_changed, max(1 if shape[1] == 1 else 0, num_active_weights(self._density, base_N.numel()))
            )
        if num_kept < num_changed:
            indices_K = _largest((tuned_N.float() - base_N.float()).abs_(), num_kept)
        else:
            indices_K = differs_N.nonzero().view(-1)
        base_K, tuned_K = base_N[indices_K], tuned_N[indices_K]
        values_K = values_between(base_K, tuned_K)
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


def values_between(base_K: Tensor, tuned_K: Tensor) -> Tensor:
    """[K] fp32 values with round(fp32 base + value) = tuned, where there is such a value; else the nearest.

    Args:
        base_K: [K] bf16 or fp32.
        tuned_K: [K] of the same dtype.
    """
    values_K = tuned_K.float() - base_K.float()
    for direction in (torch.inf, -torch.inf):
        neighbours_K = torch.nextafter(tuned_K.float() - base_K.float(), torch.tensor(direction))
        is_wrong_K = merged_values(base_K, values_K) != tuned_K
        is_better_K = is_wrong_K & (merged_values(base_K, neighbours_K) == tuned_K)
        values_K = torch.where(is_better_K, neighbours_K, values_K)
    return values_K


def _largest(scores_N: Tensor, num_kept: int) -> Tensor:
    """[num_kept] ascending int64 positions of the largest scores, equal ones by index."""
    if num_kept == 0:
        return torch.empty(0, dtype=torch.int64)
    threshold = scores_N.topk(num_kept, sorted=False).values.min()
    above = (scores_N > threshold).nonzero().view(-1)
    equal = (scores_N == threshold).nonzero().view(-1)[: num_kept - above.numel()]
    return torch.cat([above, equal]).sort().values


@dataclass(frozen=True)
class _Layout:
    """What of two checkpoints is compared."""

    names: dict[str, tuple[int, int]]
    """Name as in `AdapterConfig.shapes` -> shape."""
    others: list[str]
    """Tensors that have no deltas."""


def _open(role: str, name: Path | str, revision: str | None) -> BaseCheckpoint:
    try:
        checkpoint = BaseCheckpoint(find_base_model(str(name), revision))
    except UserError as error:
        raise UserError(f"The {role} checkpoint '{name}' cannot be read: {error}") from error
    if "quantization_config" in checkpoint.config:
        raise UserError(f"The {role} checkpoint '{name}' is quantized; give it in 16 or 32 bits.")
    return checkpoint


def _classification_of(tuned: BaseCheckpoint) -> Classification | None:
    if not str((tuned.config.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        return None
    config = read_architecture(tuned)
    if config.pad_token_id is None:
        raise UserError(
            f"'{tuned.folder / 'config.json'}' is of a classifier and has no pad_token_id. Add the number of the token "
            "that it was trained with."
        )
    labels = tuple(config.id2label[row] for row in range(config.num_labels))
    return Classification(labels, config.pad_token_id)


def _compare_layouts(base: BaseCheckpoint, tuned: BaseCheckpoint, classification: Classification | None) -> _Layout:
    settings = BaseSettings(torch.float32, nf4=False, double_quantization=False, attention="eager")
    shapes = []
    for checkpoint, task in ((base, None), (tuned, classification)):
        model = empty_model(checkpoint, settings, task)
        tensors = list_base_tensors(model, (), settings)
        check_base(checkpoint, tensors, model)
        shapes.append({tensor.name: tensor.shape for tensor in tensors})
    base_shapes, tuned_shapes = shapes
    if classification is not None:
        base_shapes.pop(VOCABULARY_HEAD, None)
        base_shapes[HEAD] = tuned_shapes[HEAD]
    for name in sorted(base_shapes.keys() | tuned_shapes.keys()):
        found = [str(list(one[name])) if name in one else "no such tensor" for one in (base_shapes, tuned_shapes)]
        if found[0] != found[1]:
            raise UserError(
                f"The checkpoints are of different models: '{name}' is {found[0]} in '{base.folder}' and {found[1]} in "
                f"'{tuned.folder}'. Give a model and the base that it was tuned from."
            )
    configs = [read_architecture(checkpoint).to_dict() for checkpoint in (base, tuned)]
    differing = sorted(
        key
        for key in configs[0].keys() | configs[1].keys()
        if key not in NOT_ARCHITECTURE and configs[0].get(key) != configs[1].get(key)
    )
    if differing:
        logger.warning(
            "config.json of %s and %s differ in %s; an adapter holds weights only",
            base.folder,
            tuned.folder,
            ", ".join(differing),
        )
    targets = find_targets(model, ALL_LINEAR)
    norms = find_norms(model)
    names: dict[str, tuple[int, int]] = {}
    for name in [*targets, *norms, *(f"{target}.bias" for target in targets)]:
        if tensor_name(name) in tuned_shapes:
            shape = tuned_shapes[tensor_name(name)]
            names[name] = (shape[0], shape[1] if len(shape) > 1 else 1)
    deltas = {tensor_name(name) for name in names}
    return _Layout(names, [name for name in tuned_shapes if name not in deltas])


def _training_dtype(tuned: BaseCheckpoint, names: list[str]) -> torch.dtype:
    dtypes = {tuned.stored(tensor_name(name) if name not in tuned else name).dtype for name in names}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
