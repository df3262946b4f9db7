"""Heartbeats between the ranks, over sockets of their own and in threads of their own: never a collective.

    rank 1 .. R-1   say once a second to rank 0 where they are                    Follower
    rank 0          says so to all of them, looks for a `verdict`, and sends it   Hub

A message is one JSON object a line. A killed process is known at once (the kernel closes its connection), a stopped one
or a cut cable by its silence. Without rank 0 every other rank comes to the verdict about rank 0 by itself.

torch's own store is not used for this: a request to a store whose process is stopped never returns, and a client whose
store has gone away writes errors of the transport to the output.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from sparse_ds.distributed.last_collective import Collective
from sparse_ds.distributed.verdict import Position, RankState, Verdict, find_verdict

BEAT_S = 1.0
"""From one heartbeat to the next."""
TICK_S = 0.25
"""The longest wait for messages at a time."""
LONGEST_TICK_S = 2.0
"""By how much the clock moves at a time at the most: when this very process was stopped (SIGSTOP, a suspended job), the
silence of the others in that time counts for nothing."""
FAREWELL_S = 1.0
"""How long rank 0 stays after a verdict, so that all ranks can read it."""
MAX_LINE_BYTES = 2**16
"""A connection that sends longer lines is none of ours, and closed."""

PositionNow = Callable[[], Position]
OnVerdict = Callable[[Verdict], None]


class _Clock:
    """Seconds in which this process was running."""

    def __init__(self) -> None:
        self.now_s, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        """Move on, and tell the time."""
        last, self._last = self._last, time.monotonic()
        self.now_s += min(self._last - last, LONGEST_TICK_S)
        return self.now_s


class _Connection:
    """JSON lines over one socket, in both directions, never waiting."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.is_closed = False
        """By the other side."""
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send, or drop the message where the other side does not read."""
        try:
            self.socket.send(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            self.is_closed = True
        except OSError:
            # Full (nobody reads), or no way to the host: a silence, which the other side's state shows.
            pass

    def receive(self) -> list[dict[str, Any]]:
        """All whole messages that have come."""
        messages = []
        while not self.is_closed:
            try:
                piece = self.socket.recv(MAX_LINE_BYTES)
            except ConnectionResetError:
                piece = b""
            except OSError:
                break
            *lines, self._received = (self._received + piece).split(b"\n")
            self.is_closed = not piece or len(self._received) > MAX_LINE_BYTES
            for line in lines:
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        messages.append(message)
        return messages

    def close(self) -> None:
        self.is_closed = True
        self.socket.close()


class _Heartbeats(threading.Thread):
    """What both sides have in common: this rank's own words."""

    def __init__(self, position_now: PositionNow, stall_timeout_s: float, on_verdict: OnVerdict) -> None:
        super().__init__(name="sparse_ds heartbeats", daemon=True)
        self._position_now, self._stall_timeout_s, self._on_verdict = position_now, stall_timeout_s, on_verdict
        self._clock = _Clock()
        self._last_beat_s = -BEAT_S
        self.failure: str | None = None
        """To be set when this rank has failed."""
        self._is_leaving = threading.Event()

    def leave(self) -> None:
        """End in good order: this rank is not waited for any more."""
        self._is_leaving.set()
        self.join(4 * TICK_S + FAREWELL_S)

    def _own_words(self) -> dict[str, Any]:
        position = self._position_now()
        return {
            "doing": position.doing,
            "number": position.collective.number,
            "name": position.collective.name,
            "training": position.is_training,
            "failure": self.failure,
            "left": self._is_leaving.is_set(),
        }

    def _is_time_to_beat(self) -> bool:
        if self._clock.now_s - self._last_beat_s < BEAT_S:
            return False
        self._last_beat_s = self._clock.now_s
        return True


class Hub(_Heartbeats):
    """Rank 0's side.

    Args:
        listener: a listening socket.
        token: what a connection must show first.
        place: of rank 0.
        position_now: where this rank is.
        stall_timeout_s: see `find_verdict`.
        on_verdict: called once, in this thread, after the others have been told.
    """

    def __init__(
        self,
        listener: socket.socket,
        token: str,
        place: str,
        position_now: PositionNow,
        stall_timeout_s: float,
        on_verdict: OnVerdict,
    ) -> None:
        super().__init__(position_now, stall_timeout_s, on_verdict)
        listener.setblocking(False)
        self._listener, self._token = listener, token
        self._own = RankState(0, place, heard_s=0.0, moved_s=0.0)
        self._peers: dict[_Connection, RankState | None] = {}
        """Connection -> its rank, None before it has said which."""

    def run(self) -> None:
        with self._listener, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._is_leaving.is_set():
                selector.select(TICK_S)
                now_s = self._clock.tick()
                self._accept(selector)
                for connection in list(self._peers):
                    self._hear(connection, selector, now_s)
                self._look_at_itself(now_s)
                if self._is_time_to_beat():
                    self._tell(self._own_words())
                ranks = [self._own, *(state for state in self._peers.values() if state is not None)]
                verdict = find_verdict(ranks, now_s, self._stall_timeout_s)
                if verdict is not None:
                    self._tell({"verdict": {"ranks": verdict.ranks, "message": verdict.message}})
                    self._say_farewell()
                    self._on_verdict(verdict)
                    return
            self._tell(self._own_words())
            self._say_farewell()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self._listener.accept()
                self._peers[_Connection(connected)] = None
                selector.register(connected, selectors.EVENT_READ)

    def _hear(self, connection: _Connection, selector: selectors.BaseSelector, now_s: float) -> None:
        for message in connection.receive():
            state = self._peers[connection]
            if state is not None:
                _take_words(state, message, now_s)
            elif hmac.compare_digest(str(message.get("token")), self._token):
                self._peers[connection] = RankState(int(message["rank"]), str(message["place"]), now_s, now_s)
            else:
                connection.close()
                break
        if not connection.is_closed:
            return
        if connection.socket.fileno() >= 0:
            selector.unregister(connection.socket)
            connection.close()
        state = self._peers[connection]
        if state is None or state.has_left:
            del self._peers[connection]
        elif not state.is_closed:
            state.is_closed, state.trouble_s = True, min(state.trouble_s or now_s, now_s)

    def _look_at_itself(self, now_s: float) -> None:
        _take_words(self._own, self._own_words(), now_s)

    def _tell(self, message: dict[str, Any]) -> None:
        for connection in self._peers:
            if not connection.is_closed:
                connection.send(message)

    def _say_farewell(self) -> None:
        """End what is sent, then read on for a moment: a connection closed with unread bytes loses its last words."""
        for connection in self._peers:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + FAREWELL_S
        while time.monotonic() < end and any(not connection.is_closed for connection in self._peers):
            time.sleep(TICK_S / 5)
            for connection in self._peers:
                connection.receive()
        for connection in self._peers:
            connection.close()


class Follower(_Heartbeats):
    """The side of every other rank.

    Args:
        connected: to the hub.
        token: as the hub expects it.
        rank: of this process.
        place: of this process.
        hub_place: of rank 0.
        position_now, stall_timeout_s, on_verdict: as for `Hub`.
    """

    def __init__(
        self,
        connected: socket.socket,
        token: str,
        rank: int,
        place: str,
        hub_place: str,
        position_now: PositionNow,
        stall_timeout_s: float,
        on_verdict: OnVerdict,
    ) -> None:
        super().__init__(position_now, stall_timeout_s, on_verdict)
        self._connection = _Connection(connected)
        self._connection.send({"token": token, "rank": rank, "place": place})
        self._hub = RankState(0, hub_place, heard_s=0.0, moved_s=0.0)

    def run(self) -> None:
        connection = self._connection
        with selectors.DefaultSelector() as selector:
            selector.register(connection.socket, selectors.EVENT_READ)
            while not self._is_leaving.is_set() and not self._hub.has_left:
                if connection.is_closed:
                    time.sleep(TICK_S)
                else:
                    selector.select(TICK_S)
                now_s = self._clock.tick()
                for message in connection.receive():
                    if "verdict" in message:
                        told = message["verdict"]
                        self._on_verdict(Verdict(tuple(told["ranks"]), told["message"]))
                        return
                    # Whether rank 0 moves on is for rank 0 itself to judge, which sees all ranks.
                    _take_words(self._hub, {**message, "training": False}, now_s)
                if connection.is_closed and not self._hub.is_closed:
                    self._hub.is_closed, self._hub.trouble_s = True, min(self._hub.trouble_s or now_s, now_s)
                verdict = find_verdict([self._hub], now_s, self._stall_timeout_s)
                if verdict is not None:
                    self._on_verdict(verdict)
                    return
                if self._is_time_to_beat():
                    connection.send(self._own_words())
        connection.send(self._own_words())
        connection.close()


def _take_words(state: RankState, message: dict[str, Any], now_s: float) -> None:
    """What a rank said, into what is known of it."""
    collective = Collective(int(message["number"]), str(message["name"]))
    position = Position(str(message["doing"]), collective, bool(message["training"]))
    if position != state.position:
        state.position, state.moved_s = position, now_s
    state.heard_s = now_s
    state.has_left = bool(message["left"])
    if message["failure"] is not None and state.failure is None:
        state.failure, state.trouble_s = str(message["failure"]), now_s
