"""Adapters can only be put together when they change the same model: checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from sparse_ds.adapter.adapter import Adapter
from sparse_ds.config.errors import UserError

_BASE_FIELDS = ("quantization", "double_quantization", "dtype")
_CONFIG_FIELDS = ("task", "labels", "pad_token_id")


def check_same_base(adapters: Sequence[Adapter], *, allow_other_names: bool = False) -> None:
    """Refuse adapters whose deltas do not belong to one and the same base.

    Compared are the name and revision of the base, its quantization and dtype, task, labels and pad token, the shapes
    of the modules that two adapters have in common, and the hash of the base's target matrices where two adapters have
    the same matrices and both hashes are known.

    Args:
        adapters: at least one.
        allow_other_names: names and revisions may differ: one model that lies in several places.

    Raises:
        UserError: no adapter, or two that do not belong together; the message names both and what differs.
    """
    if not adapters:
        raise UserError("No adapter was given; expected at least one.")
    for first, second in combinations(adapters, 2):
        for what, ours, theirs in _compared(first, second, allow_other_names):
            if ours == theirs:
                continue
            hint = " If both names mean the same model, allow other base names." if what == "base" else ""
            raise UserError(
                f"Adapters '{first.folder}' and '{second.folder}' do not belong together: {what} is {ours} of the "
                f"first and {theirs} of the second. Give adapters that were trained over one base, in one form.{hint}"
            )


def _compared(first: Adapter, second: Adapter, allow_other_names: bool) -> Iterator[tuple[str, str, str]]:
    """(what, of the first, of the second) for everything that has to be equal."""
    if not allow_other_names:
        yield "base", _name(first), _name(second)
    for field in _BASE_FIELDS:
        yield f"base.{field}", str(getattr(first.config.base, field)), str(getattr(second.config.base, field))
    for field in _CONFIG_FIELDS:
        yield field, str(getattr(first.config, field)), str(getattr(second.config, field))
    ours, theirs = first.config.shapes, second.config.shapes
    for module_name in sorted(ours.keys() & theirs.keys()):
        yield f"the shape of '{module_name}'", str(list(ours[module_name])), str(list(theirs[module_name]))
    # It is the hash of all target matrices together, so it says nothing where these are not the same.
    hashes = first.config.base.weights_hash, second.config.base.weights_hash
    if ours.keys() == theirs.keys() and hashes[0] is not None and hashes[1] is not None:
        yield "base.weights_hash", hashes[0], hashes[1]


def _name(adapter: Adapter) -> str:
    base = adapter.config.base
    return f"'{base.name}'" if base.revision is None else f"'{base.name}' (revision {base.revision})"
