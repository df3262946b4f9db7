"""How a run ends before its time: the exceptions that the launcher prints without a traceback, and the exit codes.

| code | the run |
|---|---|
| 0 | finished |
| 1 | failed by a defect: a traceback |
| 2 | was given something wrong: one message |
| 75 | was asked to stop by a signal, and has saved itself: go on with `--resume auto` |
| 76 | lost a rank: killed, crashed, stuck or cut off |
| 77 | had too many steps in a row whose loss or gradient was not finite |
| 128 + n | was ended at once by a second signal n |

75 and 76 are EX_TEMPFAIL ("try again later") and EX_PROTOCOL ("the other side did not keep to it") of sysexits.h, 77 is
the next one: none of the numbers to which Python, shells (126 and more) or the launchers give a meaning of their own.
"""

from __future__ import annotations

USER_ERROR_EXIT_CODE = 2
STOPPED_EXIT_CODE = 75
LOST_RANK_EXIT_CODE = 76
NON_FINITE_EXIT_CODE = 77


class UserError(ValueError):
    """A mistake in what the user gave (configuration, files, data, settings of the launcher).

    The message says what is wrong, what was given, what is expected and how to fix it, and names the field, tensor,
    file or rank. Every rank raises it at the same point, so that all ranks end and none waits for another.
    """


class RunStoppedError(Exception):
    """The run ends early, by a decision that all ranks took together.

    Args:
        message: what happened and how to go on.
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
