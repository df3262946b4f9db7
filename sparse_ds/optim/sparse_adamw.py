r"""AdamW with one age per weight: weights that grow in the middle of training get the bias correction of their own age.

For a weight w with gradient g, age a (this step included), learning rate :math:`\eta`, decoupled decay :math:`\lambda`

.. math::
    w &\leftarrow w - \eta \lambda w \\
    m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
    w &\leftarrow w - \eta \frac{m / (1 - \beta_1^a)}{\sqrt{v / (1 - \beta_2^a)} + \epsilon}

`w` is a delta, so the decay pulls towards the pretrained weight. With all ages equal this is `torch.optim.AdamW`, in
the same order of operations: bit for bit on the CPU. A grown weight whose gradient was watched for n steps starts
with :math:`m = (1 - \beta_1^n) \bar g`, :math:`v = (1 - \beta_2^n) \overline{g^2}` and age n, which is what AdamW would
hold had the gradient been constant; its first step is therefore as long as that of an old weight, not longer.

With `age_warmup_steps` n the learning rate of a weight is :math:`\eta \min(1, a / n)`: a warm-up of its own for every
weight. Many grown weights that take their first step together, all in the direction of their gradient and at the full
learning rate, can throw the model back (Differs from the paper, which has no such thing; 0 turns it off).

Ages are not stored. `birth_step` is the number of applied steps at which the age was 0, and age = step - birth_step:
nothing has to be advanced, so nothing can freeze (a bfloat16 counter stops at 256).

The moments may be stored in 16 or 8 bits; the update itself is always fp32. Rounding them to nearest freezes v:
with beta2 = 0.999 a step moves v by 0.1 % of its distance to g^2, less than half a code step, and is rounded away.
Measured after 3000 steps of constant g^2, v divided by what it should be: mean and standard deviation

============ ========= ===================== =====================
                       bfloat16              int8, v of 1 in block
v to begin   g^2       nearest   stochastic  nearest   stochastic
============ ========= ========= =========== ========= ===========
1            0.25      3.48      1.00, 0.03  3.48      1.00, 0.06
0.01         0.5       0.26      1.00, 0.01  0.02      1.00, 0.03
0.01         0.0001    16.9      1.00, 0.10  16.7      0.99, 0.49
============ ========= ========= =========== ========= ===========

So rounding is stochastic: up with the probability of the fraction that is cut off, right on average. The random bits
are a hash of (step, flat tensor, position in it): the same on every device, however the work is cut, and after a
resume. The price is noise: with gaussian gradients v has a standard deviation of 5 % with bfloat16 and, with int8,
of 12, 18, 36 or 75 % where v is 0.25, 0.01, 1e-4 or 1e-6 of the largest in its block.

int8 is the dynamic map of bitsandbytes' 8-bit Adam (signed for m, unsigned for v), blocks of 256 with one fp32
maximum each. Differs from bitsandbytes, besides the rounding, in two codes. The signed map ends at -0.993 there, so
that the most negative m of a block shrinks at every step; here it ends at -1. And a v > 0 is never rounded to 0, which
would make the step m / eps; the smallest is 3.25e-7 of the block's maximum (gradients below 0.06 % of the block's
largest take smaller steps than in fp32).

References: Decoupled Weight Decay Regularization (Loshchilov & Hutter 2019, arXiv 1711.05101), Algorithm 2; ages:
Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al. 2024, arXiv 2401.16405), section 3; 8 bits: 8-bit
Optimizers via Block-wise Quantization (Dettmers et al. 2022, arXiv 2110.02861); zeros in v: Memory Efficient
Optimizers with 4-bit States (Li et al. 2023, arXiv 2309.01507).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args, overload

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.nn.functional import pad

Moments = Literal["float32", "bfloat16", "int8"]

# Values that share one fp32 maximum; the block size of bitsandbytes' 8-bit optimizers.
_BLOCK_ELEMENTS = 256
# Elements updated at a time, a multiple of the block. It bounds the transient memory (measured: 53 bytes an element
# with int8 moments, 30 with bfloat16, 16 with float32) at 60 MB.
_CHUNK_ELEMENTS = 1 << 20
# The table of bias corrections has 17.3 / (1 - beta) entries of 12 bytes: 0.2 MB for 0.999, 21 MB for this.
_LARGEST_BETA = 0.99999
# As `noise` of `_round_bfloat16` and `_quantize`: half of the 16 bits, which rounds to nearest.
_TO_NEAREST = 1 << 15


@dataclass(frozen=True, eq=False)
class AgeCorrections:
    """Bias corrections by age, computed in fp64: in fp32, 1 - 0.999 is wrong by 6e-5.

    Entry a belongs to age a. The last one stands for all older ages: there both corrections are 1 in fp32. Entry 0
    is never used.

    Attributes:
        bias1: [cap + 1] fp64, 1 - beta1^age, divided by min(1, age / age_warmup_steps).
        root_bias2: [cap + 1] fp32, sqrt(1 - beta2^age).
    """

    bias1: Tensor
    root_bias2: Tensor


@lru_cache(maxsize=8)
def age_bias_corrections(betas: tuple[float, float], device: torch.device, age_warmup_steps: int = 0) -> AgeCorrections:
    """The table for these betas, on `device`. Memory: 12 bytes x 17.3 / (1 - the larger beta), or x the warm-up."""
    largest = max(betas)
    # fp32(1 - x) is 1 from x = 2^-25 on.
    cap = math.ceil(25 * math.log(2) / -math.log(largest)) if largest > 0 else 1
    ages = torch.arange(max(cap, age_warmup_steps) + 1, dtype=torch.float64)
    bias1, bias2 = (1 - beta**ages for beta in betas)
    if age_warmup_steps:
        bias1 = bias1 / (ages / age_warmup_steps).clamp_(max=1)
    return AgeCorrections(bias1.to(device), bias2.sqrt().float().to(device))


def adamw_update_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    corrections: AgeCorrections,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of some weights, each with its own age; equations at the top of this file.

    Args:
        values: [n] fp32, updated in place.
        grad: [n] fp32, left as it is.
        exp_avg, exp_avg_sq: [n] fp32 moments, updated in place.
        age: [n] int32, at least 1: this step included. Overwritten.
        corrections: of these betas.
        lr, betas, eps, weight_decay: as in the equations.
    """
    beta1, beta2 = betas
    if weight_decay:
        values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    index = age.clamp_(1, corrections.bias1.numel() - 1)
    denominator = exp_avg_sq.sqrt().div_(corrections.root_bias2.index_select(0, index)).add_(eps)
    # One rounding of -lr / (1 - beta1^age), as in torch's AdamW.
    update = (-lr / corrections.bias1).float().index_select(0, index)
    values.add_(update.mul_(exp_avg).div_(denominator))


class SparseAdamW(torch.optim.Optimizer):
    """AdamW with ages for flat fp32 tensors that join pieces of many tensors; it never communicates.

    `params` at construction are those of the param groups; what is trained is what `register_flat` was told
    (DeepSpeed replaces the params of a group by one registered flat tensor before each `step`, and every flat tensor
    comes once per step of the engine).

    State of a flat tensor with n elements, `state[flat]`:

    ===================================================== ================================= =================
    entry                                                 dtype                             bytes a weight
    ===================================================== ================================= =================
    `step`: steps applied to this tensor                  Python int
    `birth_step`: `step` when the age was 0               int32 like `flat`                 4
    `exp_avg`, `exp_avg_sq`                               float32 or bfloat16 like `flat`   8 or 4
    the same with int8 moments: codes                     uint8 like `flat`                 2
    `exp_avg_absmax`, `exp_avg_sq_absmax` (int8 only)     float32, [ceil(n / 256)]          0.03125
    ===================================================== ================================= =================

    Memory: 12 bytes a weight with float32 moments, 8 with bfloat16, 6.03125 with int8; transient at most 60 MB.

    Args:
        params: as for every torch optimizer.
        lr: learning rate; read at each step from the param group, so schedulers work.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second moment; > 0, so that a weight without any gradient stays.
        weight_decay: decoupled, times lr, acts on the values (the deltas).
        moments: how both running means are stored between steps.
        age_warmup_steps: the learning rate of a weight rises over its first so many steps of age; 0: it does not.

    Attributes:
        paused: while True, `step` changes nothing, not even `step` and so no age.

    Example:
        >>> values = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = SparseAdamW([values], lr=0.1)
        >>> optimizer.register_flat(values)
        >>> values.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> values.data
        tensor([-0.1000,  0.1000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: Moments = "float32",
        age_warmup_steps: int = 0,
    ) -> None:
        for key, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{key}: got {value}, expected a number >= 0")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps: got {eps}, expected a number > 0")
        if len(betas) != 2 or not all(0 <= beta <= _LARGEST_BETA for beta in betas):
            raise ValueError(f"betas: got {betas}, expected two numbers from 0 to {_LARGEST_BETA}")
        if age_warmup_steps < 0:
            raise ValueError(f"age_warmup_steps: got {age_warmup_steps}, expected 0 or more")
        if moments not in get_args(Moments):
            raise ValueError(f"moments: got {moments!r}, expected one of {', '.join(get_args(Moments))}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.paused = False
        self._moments, self._age_warmup_steps = moments, age_warmup_steps
        self._flats: dict[Tensor, _Flat] = {}

    @property
    def num_applied_steps(self) -> int:
        """Steps that were applied so far; the same for every flat tensor between two steps of the engine."""
        return next((int(self.state[flat]["step"]) for flat in self._flats), 0)

    @num_applied_steps.setter
    def num_applied_steps(self, num_steps: int) -> None:
        for flat in self._flats:
            self.state[flat]["step"] = num_steps

    def register_flat(self, flat: Tensor, padding: Sequence[tuple[int, int]] = ()) -> None:
        """Make the state of `flat`; once per flat tensor, before its first step.

        Args:
            flat: contiguous fp32 tensor of any shape, the very object that `step` will find in a param group.
            padding: (begin, end) of the elements that are no weights, in any order. Their gradients are never used
                (they may be uninitialised memory), and their values are never changed.

        Memory: the state, and 8 bytes per element of padding.
        """
        assert flat.dtype == torch.float32 and flat.is_contiguous(), (
            f"flat tensor: {flat.dtype}, expected contiguous fp32"
        )
        assert flat not in self._flats, "this flat tensor is registered already"
        for begin, end in padding:
            assert 0 <= begin <= end <= flat.numel(), (
                f"padding [{begin}, {end}) is outside of a flat tensor of {flat.numel()}"
            )
        self._flats[flat] = _Flat(len(self._flats), _chunks_with_padding(padding, flat.device))
        self.state[flat].update(step=0, birth_step=torch.zeros_like(flat, dtype=torch.int32))
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = torch.uint8 if self._moments == "int8" else getattr(torch, self._moments)
            self.state[flat][name] = torch.zeros_like(flat, dtype=dtype, requires_grad=False)
            if self._moments == "int8":
                num_blocks = math.ceil(flat.numel() / _BLOCK_ELEMENTS)
                self.state[flat][f"{name}_absmax"] = torch.zeros(num_blocks, device=flat.device)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the flat tensors that are in the param groups now and have a gradient; nothing while `paused`.

        Raises:
            RuntimeError: a flat tensor is not registered.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.paused:
            return loss
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step_flat(flat, group)
        return loss

    def _step_flat(self, flat: Tensor, group: dict[str, Any]) -> None:
        if flat not in self._flats:
            raise RuntimeError(
                f"AdamW got an unregistered tensor of {flat.numel()} elements: call register_flat before training"
            )
        assert flat.grad is not None
        state = self.state[flat]
        state["step"] += 1
        corrections = age_bias_corrections(tuple(group["betas"]), flat.device, self._age_warmup_steps)
        values, grad, birth_step = flat.detach().view(-1), flat.grad.reshape(-1), state["birth_step"].view(-1)
        for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
            chunk = slice(begin, min(begin + _CHUNK_ELEMENTS, flat.numel()))
            chunk_values, chunk_grad = values[chunk], grad[chunk].float()
            padding = self._flats[flat].padding.get(begin)
            if padding is not None:
                chunk_grad = chunk_grad.index_fill(0, padding, 0.0)
                untouched = chunk_values[padding]
            exp_avg, exp_avg_sq = (self._read_moment(state, name, chunk) for name in ("exp_avg", "exp_avg_sq"))
            adamw_update_(
                chunk_values,
                chunk_grad,
                exp_avg,
                exp_avg_sq,
                state["step"] - birth_step[chunk],
                corrections,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            if padding is not None:
                chunk_values[padding] = untouched
            if self._moments != "float32":
                bits = _random_bits(chunk, state["step"], self._flats[flat].number, flat.device)
                self._write_moment(state, "exp_avg", chunk, exp_avg, bits & 0xFFFF)
                self._write_moment(state, "exp_avg_sq", chunk, exp_avg_sq, (bits >> 16) & 0xFFFF)

    def _read_moment(self, state: dict[str, Any], name: str, chunk: slice) -> Tensor:
        """[n] fp32 of one chunk: the state itself with float32 moments, otherwise a copy."""
        stored: Tensor = state[name].view(-1)[chunk]
        if self._moments != "int8":
            return stored.float()
        absmax = state[f"{name}_absmax"][_blocks(chunk)]
        code = _dynamic_map(name == "exp_avg", stored.device)
        decoded: Tensor = bnb.dequantize_blockwise(stored, absmax=absmax, code=code, blocksize=_BLOCK_ELEMENTS)
        return decoded

    def _write_moment(
        self, state: dict[str, Any], name: str, chunk: slice, moment: Tensor, noise: Tensor | int
    ) -> None:
        """Store [n] fp32 `moment` of one chunk; `noise` from 0 to 2^16 - 1 decides how it is rounded."""
        stored = state[name].view(-1)[chunk]
        if self._moments == "float32":
            stored.copy_(moment)
        elif self._moments == "bfloat16":
            stored.copy_(_round_bfloat16(moment, noise))
        else:
            codes, absmax = _quantize(moment, name == "exp_avg", noise)
            stored.copy_(codes)
            state[f"{name}_absmax"][_blocks(chunk)] = absmax

    def read_weight_states(self) -> dict[str, list[Tensor]]:
        """All state per weight, for events and checkpoints.

        With float32 moments these are the state tensors themselves. Otherwise the moments are fp32 copies: 8 bytes
        a weight. `birth_step` is the state tensor itself always.

        Returns:
            `exp_avg`, `exp_avg_sq` (fp32) and `birth_step` (int32): one tensor per registered flat tensor, of its
            shape, in the order of registration.
        """
        states: dict[str, list[Tensor]] = {"exp_avg": [], "exp_avg_sq": [], "birth_step": []}
        for flat in self._flats:
            state = self.state[flat]
            states["birth_step"].append(state["birth_step"])
            for name in ("exp_avg", "exp_avg_sq"):
                moment = self._read_moment(state, name, slice(0, flat.numel()))
                states[name].append(moment.view_as(flat))
        return states

    @torch.no_grad()
    def write_weight_states(self, states: Mapping[str, Sequence[Tensor]]) -> None:
        """Take over what `read_weight_states` returned, changed or not.

        Moments are rounded to nearest; what was not changed comes back bit for bit (int8: in the blocks in which no
        weight changed, and codes in the others only move if the block's maximum did). Padding becomes 0.

        Args:
            states: as `read_weight_states` returns it.
        """
        for number, (flat, registered) in enumerate(self._flats.items()):
            state = self.state[flat]
            for name in ("exp_avg", "exp_avg_sq", "birth_step"):
                given = states[name][number].view(-1)
                assert given.numel() == flat.numel(), f"{name} of flat tensor {number}: {given.numel()} elements"
                for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
                    chunk = slice(begin, min(begin + _CHUNK_ELEMENTS, flat.numel()))
                    padding = registered.padding.get(begin)
                    piece = given[chunk] if padding is None else given[chunk].index_fill(0, padding, 0)
                    if name == "birth_step":
                        state[name].view(-1)[chunk].copy_(piece)
                    else:
                        self._write_moment(state, name, chunk, piece, _TO_NEAREST)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; the flat tensors must be registered and in the param groups.

        Raises:
            RuntimeError: a tensor is not registered, or its state was saved with other moments.
        """
        expected = {flat: dict(self.state[flat]) for flat in self._flats}
        super().load_state_dict(state_dict)
        for flat, state in self.state.items():
            if flat not in expected or state.keys() != expected[flat].keys():
                raise RuntimeError(
                    f"AdamW state with {', '.join(state)} does not fit: register the flat tensors before loading, and "
                    f"keep optimizer.moments (now {self._moments})"
                )
            # torch has made everything fp32, like the parameter. That is exact (integers: below 2^24).
            for name, tensor in expected[flat].items():
                if isinstance(tensor, Tensor):
                    state[name] = state[name].to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class _Flat:
    """What is known of a registered flat tensor.

    Attributes:
        number: of registrations before it.
        padding: first element of a chunk -> int64 positions, within that chunk, of its padding.
    """

    number: int
    padding: dict[int, Tensor]


def _chunks_with_padding(ranges: Sequence[tuple[int, int]], device: torch.device) -> dict[int, Tensor]:
    pieces: dict[int, list[Tensor]] = {}
    for begin, end in ranges:
        for chunk in range(begin - begin % _CHUNK_ELEMENTS, end, _CHUNK_ELEMENTS):
            inside = torch.arange(max(begin, chunk) - chunk, min(end, chunk + _CHUNK_ELEMENTS) - chunk)
            pieces.setdefault(chunk, []).append(inside)
    return {chunk: torch.cat(positions).to(device) for chunk, positions in pieces.items()}


def _blocks(chunk: slice) -> slice:
    return slice(chunk.start // _BLOCK_ELEMENTS, math.ceil(chunk.stop / _BLOCK_ELEMENTS))


@lru_cache(maxsize=8)
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """[256] fp32, ascending: the code values of bitsandbytes, but from -1 instead of -0.993 on if signed."""
    code: Tensor = bnb.create_dynamic_map(signed=signed).clone()
    if signed:
        code[0] = -1.0
    return code.to(device)


def _quantize(moment: Tensor, signed: bool, noise: Tensor | int) -> tuple[Tensor, Tensor]:
    """Blockwise 8-bit codes of a moment.

    Args:
        moment: [n] fp32.
        signed: which map; without, the moment is >= 0 and stays > 0 where it is.
        noise: [n] int32 uniform in 0 .. 2^16 - 1 rounds stochastically, `_TO_NEAREST` to nearest.

    Returns:
        [n] uint8 codes and [ceil(n / 256)] fp32 maxima of the blocks.
    """
    num_elements, code = moment.numel(), _dynamic_map(signed, moment.device)
    blocks = pad(moment, (0, -num_elements % _BLOCK_ELEMENTS)).view(-1, _BLOCK_ELEMENTS)
    absmax = blocks.abs().amax(1)
    scaled = blocks.div(absmax.masked_fill(absmax == 0, 1.0)[:, None]).view(-1)[:num_elements]
    upper = torch.bucketize(scaled, code, out_int32=True).clamp_(1, 255)
    lower = upper - 1
    below, above = code.index_select(0, lower), code.index_select(0, upper)
    fraction = scaled.sub_(below).div_(above.sub_(below))
    codes = lower.add_(fraction.mul_(1 << 16) > noise + 0.5)
    if not signed:
        codes = torch.where(moment > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8), absmax


def _round_bfloat16(moment: Tensor, noise: Tensor | int) -> Tensor:
    """[n] fp32 -> bf16: `noise` (int32 in 0 .. 2^16 - 1) is added to the 16 bits that are cut off."""
    rounded = moment.view(torch.int32).add(noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    # A NaN must not overflow to a number.
    return torch.where(moment.isnan(), moment, rounded).bfloat16()


def _random_bits(chunk: slice, step: int, number: int, device: torch.device) -> Tensor:
    """[n] int32, 32 random bits per element: a hash of step, number of the flat tensor and position in it.

    The hash is `lowbias32` of Wellons' hash-prospector (github.com/skeeto/hash-prospector), of position + key.
    """
    key = _lowbias32(_lowbias32(number) + step)
    start = (chunk.start + key) % (1 << 32)
    bits = torch.arange(chunk.stop - chunk.start, dtype=torch.int32, device=device)
    bits.add_(_as_int32(start))
    # `>>` keeps the sign, the masks cut it off.
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(_as_int32(0x846CA68B))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _lowbias32(number: int) -> int:
    number %= 1 << 32
    number = (number ^ number >> 16) * 0x7FEB352D % (1 << 32)
    number = (number ^ number >> 15) * 0x846CA68B % (1 << 32)
    return number ^ number >> 16


def _as_int32(number: int) -> int:
    """The signed integer with the same 32 bits."""
    return number - (1 << 32) if number >= 1 << 31 else number
