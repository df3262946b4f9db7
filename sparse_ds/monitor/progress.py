"""A bar for work that is counted in bytes."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm


class ProgressBytes:
    """Context with a progress bar.

    Args:
        what: the words before the bar.
        num_bytes: of the whole work.
        enabled: False shows nothing (all ranks but one).
    """

    def __init__(self, what: str, num_bytes: int, *, enabled: bool) -> None:
        self._bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc=what, disable=not enabled, leave=False)

    def add(self, num_bytes: int) -> None:
        """So many more are done."""
        self._bar.update(num_bytes)

    def __enter__(self) -> ProgressBytes:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
