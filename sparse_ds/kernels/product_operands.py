"""What one dense weight gradient dW = dY^T X is made of, and the transposes of both, each made once at the most.

    grad_output_TO  [T, O]      grad_output_OT  [O, T] contiguous
    input_TI        [T, I]      input_IT        [I, T] contiguous

Layers that multiply one and the same input (the projections to queries, keys and values; gate and up) share its
transpose. Who shares is settled in the forward pass, where the input is known to be the same: every layer gets a
`SharedInput` there, and layers with the same input get the same one. In backward the first of them makes the
transpose and the last one lets it go; so nothing is compared by address between two backwards, and nothing outlives the
graph. Under activation checkpointing the input is another tensor in backward, with the same contents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class SharedInput:
    """The transpose of an input of several layers, between the first backward that asks for it and the last.

    Memory: T * I elements for that time.
    """

    def __init__(self) -> None:
        self.num_users = 0
        """Layers whose forward pass had this input."""
        self._num_done = 0
        self._transposed_IT: Tensor | None = None

    def transposed(self, input_TI: Tensor) -> Tensor:
        """[I, T] contiguous.

        Args:
            input_TI: [T, I], the input as this layer's backward got it; the same contents for all users.
        """
        if self._transposed_IT is None:
            self._transposed_IT = input_TI.t().contiguous()
        return self._transposed_IT

    def done(self) -> None:
        """One layer has finished its backward; after the last one (also of a second backward) the transpose goes."""
        self._num_done += 1
        if self._num_done % max(self.num_users, 1) == 0:
            self._transposed_IT = None


class _LastInput:
    """The input of the forward pass before this one, known again without being kept alive.

    A tensor is the same as the last one if it is the same stretch of the same storage, unchanged since. The storage is
    held by a weak reference, which keeps its identity (not its memory) from being given to another one.
    """

    def __init__(self) -> None:
        self._storage: StorageWeakRef | None = None
        self._view: tuple[object, ...] = ()
        self._shared = SharedInput()

    def shared_with(self, input: Tensor) -> SharedInput:
        if not _can_be_known_again(input):
            return SharedInput()
        storage = StorageWeakRef(input.untyped_storage())  # type: ignore[no-untyped-call]
        view = (input.shape, input.stride(), input.storage_offset(), input.dtype, input._version)
        # A dead storage is never equal to a living one: its identity is not given away while the reference is held.
        if self._storage is None or self._storage != storage or self._view != view:
            self._storage, self._view, self._shared = storage, view, SharedInput()
        return self._shared


def _can_be_known_again(input: Tensor) -> bool:
    """Inference tensors count no versions; subclasses may have no storage."""
    return type(input) in (Tensor, torch.nn.Parameter) and not input.is_inference()


_last_input = _LastInput()


def share_input(input: Tensor) -> SharedInput:
    """To be called in the forward pass of each layer that will need a gradient.

    Args:
        input: [..., I]. If it is the very input of the call before, unchanged, the same object is returned.
    """
    shared = _last_input.shared_with(input)
    shared.num_users += 1
    return shared


class ProductOperands:
    """Of one backward of one layer. The tensors must not be kept beyond it.

    Args:
        grad_output_TO: [T, O] gradient of the layer's output.
        input_TI: [T, I] the layer's input, same dtype.
        shared: of this input; without it the transpose is this object's own.
    """

    def __init__(self, grad_output_TO: Tensor, input_TI: Tensor, shared: SharedInput | None = None) -> None:
        self.grad_output_TO, self.input_TI = grad_output_TO, input_TI
        self._shared = shared or SharedInput()
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
            self._grad_output_OT = self.grad_output_TO.t().contiguous()
        return self._grad_output_OT

    @property
    def input_IT(self) -> Tensor:
        """[I, T] contiguous; made at the first use by one of the layers with this input."""
        return self._shared.transposed(self.input_TI)

    def done(self) -> None:
        """The layer's backward ends here: its transposes may go."""
        self._grad_output_OT = None
        self._shared.done()
