"""Switch an adapter on and off in a loaded transformers model, in place and exactly.

    adapter = InPlaceAdapter(model, open_adapter("runs/my_7b/adapter"))
    adapter.apply()      # the model is the fine-tuned one
    adapter.remove()     # every bit of it is as before

    16-bit, fp32    weight[indices] = round(fp32 w + fp32 value); the old weights at the indices are kept
    NF4             bitsandbytes' packed weights stay; the layer's forward dequantizes them, puts the deltas in and
                    multiplies, as in training: for few tokens slower than bitsandbytes' own kernel
    heads           tensors that trained as a whole take the place of the model's

Memory while it exists: 8 bytes per trained weight on the model's devices; while it is applied also the old weights.
The model is the merged one, number for number, if it was loaded in the dtype of the training.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_ds.adapter.adapter import Adapter, Deltas, tensor_name
from sparse_ds.config.errors import UserError
from sparse_ds.kernels.apply_deltas import apply_deltas_, merged_values
from sparse_ds.model.weights_hash import hash_pieces

APPLIED = "_sparse_ds_applied"
"""Attribute of a model: its applied adapters, the last one last."""


class InPlaceAdapter:
    """An adapter that can be applied to one model; also a context in which it is applied.

    Args:
        model: a loaded transformers model: the base that the adapter was trained on, with or without 4-bit layers.
        adapter: its deltas are read now.
        allow_other_base: apply it to other weights of the same shapes too.

    Attributes:
        apply_s, remove_s: seconds that the last call took.

    Raises:
        UserError: the adapter does not fit the model (names, shapes, weights).
    """

    def __init__(self, model: nn.Module, adapter: Adapter, *, allow_other_base: bool = False) -> None:
        self._model, self._adapter = model, adapter
        self._changes: list[_Change] = []
        self.apply_s = self.remove_s = 0.0
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._on_gpu = any(parameter.is_cuda for parameter in parameters.values())
        for module_name, shape in adapter.config.shapes.items():
            parameter = self._find(parameters, tensor_name(module_name), shape)
            deltas = Deltas(*(part.to(parameter.device) for part in adapter.read(module_name)))
            if _quant_state(parameter) is None:
                self._changes.append(_SparseChange(tensor_name(module_name), parameter, deltas))
            else:
                self._changes.append(_Forward4bit(module_name, model.get_submodule(module_name), deltas))
        if not allow_other_base:
            self._check_weights(parameters)
        for name, dense_shape in adapter.config.dense_shapes.items():
            parameter = self._find(parameters, name, dense_shape)
            self._changes.append(_WholeChange(name, parameter, adapter.read_dense(name)))

    @property
    def is_applied(self) -> bool:
        return self in getattr(self._model, APPLIED, [])

    @torch.no_grad()
    def apply(self) -> None:
        """Make the model the fine-tuned one, or leave it as it is when that fails.

        Raises:
            RuntimeError: it is applied already.
        """
        if self.is_applied:
            raise RuntimeError(f"Adapter '{self._adapter.folder}' is applied already; remove it first.")
        begin = self._now()
        done: list[_Change] = []
        try:
            for change in self._changes:
                change.put()
                done.append(change)
        except BaseException:
            for change in reversed(done):
                change.take_out()
            raise
        setattr(self._model, APPLIED, [*getattr(self._model, APPLIED, []), self])
        self.apply_s = self._now() - begin

    @torch.no_grad()
    def remove(self) -> None:
        """Make every bit of the model what it was before `apply`.

        Raises:
            RuntimeError: it is not applied, another one was applied after it, or somebody else changed the weights.
                Nothing is done then.
        """
        applied = getattr(self._model, APPLIED, [])
        if not applied or applied[-1] is not self:
            state = "is not applied" if self not in applied else "is below another one, which has to be removed first"
            raise RuntimeError(f"Adapter '{self._adapter.folder}' {state}.")
        begin = self._now()
        if changed := [change.name for change in self._changes if not change.is_intact()]:
            raise RuntimeError(
                f"'{changed[0]}' was changed since adapter '{self._adapter.folder}' was applied ({len(changed)} of "
                f"{len(self._changes)} tensors): taking it out would not give the base back. Load the model anew."
            )
        for change in self._changes:
            change.take_out()
        setattr(self._model, APPLIED, applied[:-1])
        self.remove_s = self._now() - begin

    def __enter__(self) -> InPlaceAdapter:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _find(self, parameters: dict[str, nn.Parameter], name: str, shape: tuple[int, ...]) -> nn.Parameter:
        parameter = parameters.get(name)
        state = _quant_state(parameter)
        found: tuple[int, ...] = () if parameter is None else tuple((parameter if state is None else state).shape)
        if len(found) == 1 and len(shape) == 2:
            found = (*found, 1)
        if parameter is None or found != shape:
            has = "is missing" if parameter is None else f"has shape {list(found)}"
            raise UserError(
                f"Adapter '{self._adapter.folder}' was trained on '{self._adapter.config.base.name}', where '{name}' "
                f"has shape {list(shape)}; in this model it {has}. Load the base that it was trained on."
            )
        if not parameter.is_contiguous() or not (parameter.dtype.is_floating_point or state is not None):
            raise UserError(
                f"'{name}' of the model is {parameter.dtype}{'' if parameter.is_contiguous() else ', not contiguous'}; "
                "expected contiguous bf16, fp16 or fp32, or bitsandbytes NF4. Load the model so."
            )
        return parameter

    def _check_weights(self, parameters: dict[str, nn.Parameter]) -> None:
        base = self._adapter.config.base
        trained_dtype = getattr(torch, base.dtype)
        shapes = {tensor_name(name): shape for name, shape in self._adapter.config.shapes.items()}

        def read_range(name: str, start: int, stop: int) -> Tensor:
            return parameters[name].detach().view(-1)[start:stop]

        # Weights in fewer bits than those of the training, or in NF4, cannot be compared.
        if base.weights_hash is None or any(parameters[n].dtype not in (trained_dtype, torch.float32) for n in shapes):
            return
        found = hash_pieces(shapes, trained_dtype, read_range)
        if found != base.weights_hash:
            raise UserError(
                f"Adapter '{self._adapter.folder}' was trained on '{base.name}', whose weights have the hash "
                f"{base.weights_hash}; those of the model have {found}. Load the base that it was trained on, or set "
                "allow_other_base."
            )

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


class _Change(ABC):
    """One tensor or layer of the model: `put`, then `take_out`, which undoes it exactly."""

    name: str

    @abstractmethod
    def put(self) -> None: ...

    @abstractmethod
    def is_intact(self) -> bool:
        """Nobody has changed since what `put` did."""

    @abstractmethod
    def take_out(self) -> None: ...


class _SparseChange(_Change):
    """The weight at the indices."""

    def __init__(self, name: str, parameter: nn.Parameter, deltas: Deltas) -> None:
        self.name, self._parameter, self._deltas = name, parameter, deltas
        self._old_K: Tensor | None = None

    def put(self) -> None:
        self._old_K = self._read()
        self._write(merged_values(self._old_K, self._deltas.values))

    def is_intact(self) -> bool:
        return self._old_K is not None and torch.equal(self._read(), merged_values(self._old_K, self._deltas.values))

    def take_out(self) -> None:
        assert self._old_K is not None
        self._write(self._old_K)
        self._old_K = None

    def _read(self) -> Tensor:
        return self._parameter.data.view(-1).index_select(0, self._deltas.indices)

    def _write(self, weights_K: Tensor) -> None:
        self._parameter.data.view(-1).index_copy_(0, self._deltas.indices.long(), weights_K)


class _WholeChange(_Change):
    """A tensor that trained as a whole."""

    def __init__(self, name: str, parameter: nn.Parameter, trained: Tensor) -> None:
        self.name, self._parameter = name, parameter
        self._other = trained.to(parameter.device, parameter.dtype)
        self._trained = self._other

    def put(self) -> None:
        self._swap()

    def is_intact(self) -> bool:
        return torch.equal(self._parameter.data, self._trained)

    def take_out(self) -> None:
        self._swap()

    def _swap(self) -> None:
        before = self._parameter.data.clone()
        self._parameter.data.copy_(self._other)
        self._other = before


class _Forward4bit(_Change):
    """The forward of a bitsandbytes layer, whose weights stay as they are."""

    def __init__(self, name: str, module: nn.Module, deltas: Deltas) -> None:
        self.name, self._module, self._deltas = name, module, deltas
        self._own_forward: Callable[..., Any] | None = None
        self._packed: tuple[Tensor, Any] | None = None

    def put(self) -> None:
        self._packed = _as_quantized(self._module.weight)
        self._own_forward = vars(self._module).get("forward")
        self._module.forward = self._forward

    def is_intact(self) -> bool:
        return vars(self._module).get("forward") == self._forward

    def take_out(self) -> None:
        del self._module.forward
        self._packed = None
        if self._own_forward is not None:
            self._module.forward = self._own_forward

    def _forward(self, inputs: Tensor) -> Tensor:
        assert self._packed is not None
        weight_OI = bnb.dequantize_4bit(*self._packed)
        apply_deltas_(weight_OI, *self._deltas)
        bias: Any = self._module.bias
        bias_O = None if bias is None else bias.to(weight_OI.dtype)
        return F.linear(inputs.to(weight_OI.dtype), weight_OI, bias_O).to(inputs.dtype)


def _as_quantized(weight: Any) -> tuple[Tensor, Any]:
    """Packed bytes and their description as `dequantize_4bit` reads them.

    On CPUs with bf16 instructions the first forward of a bitsandbytes layer reorders its bytes and rounds its scales to
    bf16, for good. Then these are copies, of the weights as they are now: half a byte per weight more.
    """
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    # Its inverse changes the description that it is given, and leaves the scales as they are.
    packed, _ = bnb._convert_weight_packed_for_cpu_inverse(weight.data, copy.copy(state))
    plain = bnb.QuantState(
        absmax=state.absmax.T.reshape(-1).float(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.original_dtype,
    )
    return packed, plain


def _quant_state(parameter: nn.Parameter | None) -> Any:
    """bitsandbytes' description of a 4-bit weight; None for any other."""
    return getattr(parameter, "quant_state", None)
