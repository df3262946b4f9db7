"""Build the model that trains: every parameter born partitioned under ZeRO-3, target layers made sparse.

empty_model         the architecture, without storage (meta device)
plan_layouts        which weights of which layers are active
build_..._model     partitioned parameters in their places; the tensors of the base are still zeros
load_base           fills them (`model.loading`)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from sparse_ds.config.errors import UserError
from sparse_ds.distributed.born_partitioned import PartitionedParameters, slice_of
from sparse_ds.kernels.nf4 import nf4_sizes
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.base_tensors import BaseSettings
from sparse_ds.model.classification_head import Classification
from sparse_ds.model.kinds import KINDS, check_model_type, check_task
from sparse_ds.model.stored_nf4 import is_bitsandbytes_nf4
from sparse_ds.model.targets import find_norms, find_targets
from sparse_ds.selection.bernoulli_subset import bernoulli_subset
from sparse_ds.selection.random_subset import random_subset
from sparse_ds.sparse.index_storage import IndexStorage, new_index_tensors
from sparse_ds.sparse.layout import SparseLayout, num_active_weights
from sparse_ds.sparse.sparse_linear import SparseLinear
from sparse_ds.sparse.sparse_vector import SparseLayerNorm, SparseRMSNorm, SparseVector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseSettings:
    """Which weights train."""

    target_modules: Sequence[str] | str
    density: float
    seed: int
    bernoulli: bool = False
    """Every block is active with probability `density`, instead of exactly floor(density * number) of them."""
    block_size: tuple[int, int] = (1, 1)
    """Rows and columns of the active unit, a block of neighbouring weights of a target matrix."""
    slots_per_active: float = 1.0
    """Room in each matrix: this many times its active weights, at most all its weights."""
    train_biases: bool = False
    """Entries of the target layers' biases train too."""
    train_norms: bool = False
    """Entries of the weights of all norms train too."""
    index_storage: IndexStorage = "int32"
    """How the indices of the target matrices are stored; those of biases and norms are int32."""


def read_architecture(checkpoint: BaseCheckpoint) -> PretrainedConfig:
    """What config.json says of the model.

    Raises:
        UserError: an architecture that is not supported, a quantization other than NF4, or a value that transformers
            refuses.
    """
    check_model_type(checkpoint.config, checkpoint.folder)
    quantization = checkpoint.config.get("quantization_config")
    if quantization is not None and not is_bitsandbytes_nf4(quantization):
        raise UserError(
            f"model.name_or_path: {checkpoint.folder} is quantized by {quantization.get('quant_method')!r} "
            f"({quantization.get('bnb_4bit_quant_type', 'no 4-bit type')}); expected a 16-bit checkpoint, or "
            "bitsandbytes NF4."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.folder)
    except Exception as error:  # whatever transformers finds in it
        raise _refused_config(checkpoint, error) from error
    if quantization is not None:
        # The base is quantized here or read as it is; transformers must not do it as well.
        del config.quantization_config
    return config


def empty_model(
    checkpoint: BaseCheckpoint, base: BaseSettings, classification: Classification | None = None
) -> PreTrainedModel:
    """The architecture with parameters on the meta device and real buffers.

    Args:
        checkpoint: the base model.
        base: dtype and attention.
        classification: makes a classifier of it, with a head that is to be installed; None: a causal language model.

    Raises:
        UserError: as `read_architecture`; an architecture that cannot do the task; an attention implementation that
            cannot be had here, or that the architecture has not; another pad token than an encoder was made with.
    """
    config = read_architecture(checkpoint)
    check_task(
        checkpoint.config, checkpoint.folder, "causal_lm" if classification is None else "sequence_classification"
    )
    config.use_cache = False
    model_class = AutoModelForCausalLM if classification is None else AutoModelForSequenceClassification
    if classification is not None:
        config.num_labels = len(classification.labels)
        _set_pad_token(config, classification.pad_token_id, checkpoint)
    if base.attention == "sdpa" and not model_class._model_mapping[type(config)]._supports_sdpa:
        raise UserError(
            f"model.attention: got sdpa, which {config.model_type} models cannot use (transformers has no sdpa for "
            "them). Set model.attention to auto or eager."
        )
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = model_class.from_config(
                config, dtype=base.dtype, attn_implementation=None if base.attention == "auto" else base.attention
            )
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.attention: got {base.attention}, which cannot be used here ({reason}). Install what it needs, or "
            "set model.attention to auto."
        ) from error
    except Exception as error:  # values that fit together in type only
        raise _refused_config(checkpoint, error) from error
    model.tie_weights()
    if classification is not None:
        # The loss is ours (`training.trainer`), and so is the number of samples that it is divided by.
        model.accepts_loss_kwargs = False
    return model


def _set_pad_token(config: PretrainedConfig, pad_token_id: int, checkpoint: BaseCheckpoint) -> None:
    """A decoder reads the last token that is no pad token; RoBERTa counts its positions from the pad token's id."""
    if KINDS[config.model_type].is_encoder and config.pad_token_id != pad_token_id:
        raise UserError(
            f"model.name_or_path: the tokenizer of {checkpoint.folder} pads with token {pad_token_id}, its config.json "
            f"says {config.pad_token_id} (pad_token_id), and an encoder was made for one of them. Correct the files, "
            "or get them again."
        )
    config.pad_token_id = pad_token_id


def _refused_config(checkpoint: BaseCheckpoint, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"model.name_or_path: transformers cannot make a model from {checkpoint.folder / 'config.json'} "
        f"({type(error).__name__}: {reason}). Correct the value, or get the file again."
    )


def plan_layouts(model: nn.Module, sparse: SparseSettings, num_ranks: int = 1) -> dict[str, SparseLayout]:
    """Layout of every target layer, by module name.

    Args:
        model: from `empty_model`.
        sparse: which weights train.
        num_ranks: that share what is stored; every one is to own whole blocks.

    Raises:
        UserError: no layer matches, the blocks do not divide some matrix, or the density gives no active block in it.
    """
    layouts = {}
    for name in find_targets(model, sparse.target_modules):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layouts[name] = _plan_layout(name, (linear.out_features, linear.in_features), sparse, num_ranks)
    return layouts


def _plan_layout(name: str, shape: tuple[int, int], sparse: SparseSettings, num_ranks: int) -> SparseLayout:
    block_rows, block_cols = sparse.block_size
    unit, size = ("weight", "") if sparse.block_size == (1, 1) else ("block", f" of {block_rows} x {block_cols}")
    if shape[0] % block_rows or shape[1] % block_cols:
        raise UserError(
            f"method.block_size: {name} has {shape[0]} rows and {shape[1]} columns, which blocks of {block_rows} x "
            f"{block_cols} do not divide. Choose sides that divide them ({math.gcd(shape[0], 64)} and "
            f"{math.gcd(shape[1], 64)} do), or leave the matrix out of method.target_modules."
        )
    num_blocks = shape[0] // block_rows * (shape[1] // block_cols)
    num_active = num_active_weights(sparse.density, num_blocks)
    if sparse.bernoulli:
        num_active = bernoulli_subset(num_blocks, sparse.density, seed=sparse.seed, name=name).numel()
    if num_active == 0:
        raise UserError(
            f"method.density: {sparse.density} of the {num_blocks} {unit}s{size} of {name} is less than one {unit}; "
            f"expected a density of at least {1.01 / num_blocks:.3g} for this layer."
        )
    num_slots = min(num_blocks, math.floor(sparse.slots_per_active * num_active))
    elements = block_rows * block_cols
    return SparseLayout(
        shape[0],
        shape[1],
        num_active * elements,
        (num_slots - num_active) * elements,
        block_rows,
        block_cols,
        padding_slots=-num_slots % num_ranks * elements if elements > 1 else 0,
    )


def plan_vector_layouts(
    model: nn.Module, layouts: Mapping[str, SparseLayout], sparse: SparseSettings
) -> dict[str, SparseLayout]:
    """Layout of every vector that trains sparsely: floor(density * D) entries, at least one.

    Args:
        model: from `empty_model`.
        layouts: of the target layers (`plan_layouts`).
        sparse: which weights train.

    Returns:
        By name: `<module>.bias` for the bias of a target layer, the module's name for the weight of a norm.
    """
    sizes: dict[str, int] = {}
    if sparse.train_biases:
        biased = [name for name in layouts if model.get_submodule(name).bias is not None]
        sizes |= {f"{name}.bias": layouts[name].num_rows for name in biased}
        if not biased:
            logger.warning("method.train_biases has no effect: no target layer of this model has a bias")
    if sparse.train_norms:
        sizes |= {name: model.get_parameter(f"{name}.weight").numel() for name in find_norms(model)}
    found = {}
    for name, size in sizes.items():
        num_active = max(1, num_active_weights(sparse.density, size))
        if sparse.bernoulli:
            num_active = max(1, bernoulli_subset(size, sparse.density, seed=sparse.seed, name=name).numel())
        found[name] = SparseLayout(size, 1, num_active)
    return found


def initial_indices(layout: SparseLayout, sparse: SparseSettings, name: str) -> Tensor:
    """[U] int64, the random blocks that are active first: the same on every machine and world size."""
    grid = layout.grid
    if sparse.bernoulli:
        drawn = bernoulli_subset(grid.num_elements, sparse.density, seed=sparse.seed, name=name)
        if drawn.numel() == grid.num_active:
            return drawn
    return random_subset(grid.num_elements, grid.num_active, seed=sparse.seed, name=name)


BaseParameters = dict[str, dict[str, Parameter]]
"""Name of a tensor in the checkpoint -> the parameters that hold it, by role (as in `model.filling.BaseTensor`)."""


def build_sparse_model(
    model: PreTrainedModel,
    layouts: dict[str, SparseLayout],
    base: BaseSettings,
    sparse: SparseSettings,
    partitioned: PartitionedParameters,
    vectors: Mapping[str, SparseLayout] | None = None,
) -> BaseParameters:
    """Give `model` (from `empty_model`) its parameters: target layers become `SparseLinear`, everything is frozen but
    the values.

    Args:
        model: changed in place.
        layouts: of the target layers (`plan_layouts`).
        base: dtype and quantization.
        sparse: which weights train.
        partitioned: makes parameters.
        vectors: layouts of the biases and norms that train sparsely (`plan_vector_layouts`).

    Returns:
        The parameters that are to be loaded, zeros now.

    Memory: the partitions, and the indices of one matrix at a time.
    Collectives: none; every rank must call it with the same arguments.
    """
    vectors = vectors or {}
    made: BaseParameters = {}
    for name, layout in layouts.items():
        make = _SparseMaker(layout, base, sparse, partitioned, made)
        has_bias = model.get_submodule(name).bias is not None
        _replace(model, name, make.layer(name, has_bias=has_bias, bias_layout=vectors.get(f"{name}.bias")))
    for name, layout in vectors.items():
        if not name.endswith(".bias"):
            make = _SparseMaker(layout, base, sparse, partitioned, made)
            _replace(model, name, make.norm(name, model.get_submodule(name)))
    _make_remaining(model, base.dtype, partitioned, made, trainable=False)
    return made


def build_dense_model(model: PreTrainedModel, base: BaseSettings, partitioned: PartitionedParameters) -> BaseParameters:
    """Give `model` parameters that all train (method `full`). Returns, memory, collectives: as `build_sparse_model`."""
    made: BaseParameters = {}
    _make_remaining(model, base.dtype, partitioned, made, trainable=True)
    return made


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class _SparseMaker:
    """Makes one sparse module; what is to be loaded is noted in `made`."""

    def __init__(
        self,
        layout: SparseLayout,
        base: BaseSettings,
        sparse: SparseSettings,
        partitioned: PartitionedParameters,
        made: BaseParameters,
    ) -> None:
        self.layout, self.base, self.sparse = layout, base, sparse
        self.partitioned, self.made = partitioned, made

    def layer(self, name: str, *, has_bias: bool, bias_layout: SparseLayout | None) -> SparseLinear:
        layout = self.layout
        tensors: dict[str, Parameter] = {}
        if self.base.nf4:
            sizes, double = nf4_sizes(layout.num_elements), self.base.double_quantization
            tensors["packed"] = self._empty((sizes.packed,), torch.uint8)
            tensors["absmax"] = self._empty((sizes.absmax,), torch.uint8 if double else torch.float32)
            if double:
                tensors["nested_statistics"] = self._empty((sizes.nested_statistics,), torch.float32)
        else:
            tensors["weight"] = self._empty((layout.num_rows, layout.num_cols), self.base.dtype)
        self.made[f"{name}.weight"] = dict(tensors)
        tensors |= self._deltas(name, self.sparse.index_storage)
        sparse_bias, bias_name = None, f"{name}.bias"
        if bias_layout is not None:
            make = _SparseMaker(bias_layout, self.base, self.sparse, self.partitioned, self.made)
            sparse_bias = SparseVector(bias_layout, make.vector_tensors(bias_name, bias_name))
        elif has_bias:
            tensors["bias"] = self._empty((layout.num_rows,), self.base.dtype)
            self.made[bias_name] = {"weight": tensors["bias"]}
        return SparseLinear(layout, self.base.dtype, tensors, sparse_bias)

    def norm(self, name: str, original: nn.Module) -> SparseVector:
        tensors = self.vector_tensors(name, f"{name}.weight")
        if isinstance(original, nn.LayerNorm):
            bias = self._empty((self.layout.num_rows,), self.base.dtype)
            self.made[f"{name}.bias"] = {"weight": bias}
            return SparseLayerNorm(self.layout, tensors, bias, original.eps)
        if isinstance(original, Gemma2RMSNorm):
            return SparseRMSNorm(self.layout, tensors, original.eps, adds_one=True)
        eps: Any = original.variance_epsilon
        return SparseRMSNorm(self.layout, tensors, eps)

    def vector_tensors(self, name: str, tensor_name: str) -> dict[str, Parameter]:
        """Of a `SparseVector`; its base is in the dtype of the model, also under a quantized one."""
        weight = self._empty((self.layout.num_rows,), self.base.dtype)
        self.made[tensor_name] = {"weight": weight}
        return {"weight": weight, **self._deltas(name, "int32")}

    def _deltas(self, name: str, index_storage: IndexStorage) -> dict[str, Parameter]:
        layout = self.layout
        indices_U = initial_indices(layout, self.sparse, name)
        indices_S = F.pad(indices_U, (0, layout.num_index_slots - indices_U.numel()))
        stored = new_index_tensors(indices_S, layout, indices_U.numel(), index_storage)
        made = {
            tensor_name: self.partitioned.make(tuple(whole.shape), whole.dtype, slice_of(whole), requires_grad=False)
            for tensor_name, whole in stored.items()
        }
        return {**made, "values": self.partitioned.make((layout.num_stored,), torch.float32, requires_grad=True)}

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
        return self.partitioned.make(shape, dtype, requires_grad=False)


def _make_remaining(
    model: PreTrainedModel,
    dtype: torch.dtype,
    partitioned: PartitionedParameters,
    made: BaseParameters,
    *,
    trainable: bool,
) -> None:
    """Replace every parameter that is still on the meta device; tied ones become one parameter again."""
    made_of: dict[int, Parameter] = {}
    keep_alive = []
    for module_name, module in model.named_modules():
        for child, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            keep_alive.append(parameter)
            if id(parameter) not in made_of:
                replaced = partitioned.make(tuple(parameter.shape), dtype, requires_grad=trainable)
                made_of[id(parameter)] = replaced
                made[f"{module_name}.{child}" if module_name else child] = {"weight": replaced}
            module.register_parameter(child, made_of[id(parameter)])
