"""What one dense weight gradient dW = dY^T X is made of, and the transposes of both, each made once at the most.

    grad_output_TO  [T, O]      grad_output_OT  [O, T] contiguous
    input_TI        [T, I]      input_IT        [I, T] contiguous

Layers that multiply one and the same input (the projections to queries, keys and values; gate and up) share its
transpose. Who shares is settled in the forward pass, where the input can be known to be the same: there every layer
gets an `InputUse`, and the uses of one input belong together. In backward the first of them makes the transpose, and
the last one lets it go. So no address is ever compared between two backwards, nothing outlives the graph, and under
activation checkpointing (where the input is another tensor in backward, with the same contents) it works the same.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_ds.kernels.transposes import transposed


class _SharedInput:
    """An input of one or several layers, and its transpose while some of them still need it."""

    def __init__(self) -> None:
        self.waiting: weakref.WeakSet[InputUse] = weakref.WeakSet()
        """Uses whose backward has not been yet. A use goes with its graph, too."""
        self.transposed_IT: Tensor | None = None


class InputUse:
    """One forward pass of one layer, as far as its input's transpose is concerned.

    Memory: T * I elements, from the first backward of those who share the input until the last.
    """

    def __init__(self, shared: _SharedInput | None = None) -> None:
        self.shared = _SharedInput() if shared is None else shared
        self.shared.waiting.add(self)

    def transposed(self, input_TI: Tensor) -> Tensor:
        """[I, T] contiguous.

        Args:
            input_TI: [T, I], the input as this layer's backward got it; the same contents for all who share it.
        """
        if self.shared.transposed_IT is None:
            self.shared.transposed_IT = transposed(input_TI)
        return self.shared.transposed_IT

    def done(self) -> None:
        """The layer's backward is over. (A second one of the same graph makes its transpose for itself.)"""
        self.shared.waiting.discard(self)
        if not self.shared.waiting:
            self.shared.transposed_IT = None


class _LastInput:
    """The input of the forward pass before this one, known again without being kept alive.

    A tensor is the same as the last one if it is the same stretch of the same storage, unchanged since. The storage is
    held by a weak reference, which keeps its identity (not its memory) from being given to another one.
    """

    def __init__(self) -> None:
        self._storage: StorageWeakRef | None = None
        self._view: tuple[object, ...] = ()
        self._shared: weakref.ref[_SharedInput] | None = None

    def use(self, input: Tensor) -> InputUse:
        if type(input) is not Tensor or input.is_inference():
            # Inference tensors count no versions; subclasses may have no storage.
            return InputUse()
        storage = StorageWeakRef(input.untyped_storage())  # type: ignore[no-untyped-call]
        view = (input.shape, input.stride(), input.storage_offset(), input.dtype, input._version)
        shared = None if self._shared is None else self._shared()
        if shared is not None and self._storage == storage and self._view == view and shared.transposed_IT is None:
            return InputUse(shared)
        # Another input; or the same one again after a backward has begun, which does not wait for newcomers.
        use = InputUse()
        self._storage, self._view, self._shared = storage, view, weakref.ref(use.shared)
        return use


_last_input = _LastInput()


def use_input(input: Tensor) -> InputUse:
    """To be called in the forward pass of each layer, outside of its autograd function.

    Args:
        input: [..., I]. If it is the very input of the call before, unchanged, both share its transpose.
    """
    if not torch.is_grad_enabled():
        return InputUse()
    return _last_input.use(input)


class ProductOperands:
    """Of one backward of one layer. The tensors must not be kept beyond it.

    Args:
        grad_output_TO: [T, O] gradient of the layer's output.
        input_TI: [T, I] the layer's input, same dtype.
        use: of this input in the forward pass; without it the transpose is this object's own.
    """

    def __init__(self, grad_output_TO: Tensor, input_TI: Tensor, use: InputUse | None = None) -> None:
        self.grad_output_TO, self.input_TI = grad_output_TO, input_TI
        self._use = use or InputUse()
        self._grad_output_OT: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_TI.shape[0]

    @property
    def num_rows(self) -> int:
        """O."""
        return self.grad_output_TO.shape[1]

    @property
    def num_cols(self) -> int:
        """I."""
        return self.input_TI.shape[1]

    @property
    def grad_output_OT(self) -> Tensor:
        """[O, T] contiguous; made at the first use and kept as long as this object."""
        if self._grad_output_OT is None:
            self._grad_output_OT = transposed(self.grad_output_TO)
        return self._grad_output_OT

    @property
    def input_IT(self) -> Tensor:
        """[I, T] contiguous; made at the first use by one of the layers with this input."""
        return self._use.transposed(self.input_TI)

    def grad_output_rows(self, first_row: int, num_rows: int) -> Tensor:
        """[B, T], up to `num_rows` rows of dY^T, contiguous on the CPU.

        Memory: the rows; nothing where the whole transpose is there, nor on a GPU, whose product reads dY as it lies.
        """
        if self._grad_output_OT is not None:
            return self._grad_output_OT[first_row : first_row + num_rows]
        if self.grad_output_TO.is_cuda:
            return self.grad_output_TO[:, first_row : first_row + num_rows].t()
        if num_rows >= self.num_rows:
            return transposed(self.grad_output_TO)
        return transposed(self.grad_output_TO[:, first_row : first_row + num_rows])

    def done(self) -> None:
        """The layer's backward ends here: its transposes may go."""
        self._grad_output_OT = None
        self._use.done()
