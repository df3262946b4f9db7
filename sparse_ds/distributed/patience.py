"""Waiting for the other ranks without a collective, as long as it takes.

A collective that one rank enters an hour after the others has long timed out on them. Here every rank leaves a note in
the key-value store of the process group when it has come, and looks for those of the others now and then. A rank that
dies meanwhile is the watchdog's business, which runs in a thread of its own.
"""

from __future__ import annotations

import logging
import time

import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

logger = logging.getLogger("sparse_ds")

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 2.0
"""Between two looks: each is a short message to the store."""
QUIET_S = 20.0
"""So long nothing is said; then who is missing, once."""

_num_waits = 0


def wait_for_all(what: str) -> None:
    """Return when every rank has called this.

    Every rank must call it, in the same order of calls. Collectives: none; some messages to the store of the group.

    Args:
        what: what the ranks do before they come, for the message ("reading the data").
    """
    global _num_waits
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    _num_waits += 1
    store, rank = _get_default_store(), torch.distributed.get_rank()
    keys = [f"sparse_ds/wait/{_num_waits}/{other}" for other in range(torch.distributed.get_world_size())]
    store.set(keys[rank], "here")
    missing = [other for other in range(len(keys)) if other != rank]
    began, pause_s, is_said = time.monotonic(), SHORTEST_PAUSE_S, False
    while missing := [other for other in missing if not store.check([keys[other]])]:
        if not is_said and time.monotonic() - began > QUIET_S:
            is_said = True
            logger.info("%s: done here; rank(s) %s are still at it", what, ", ".join(map(str, missing)))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
