"""The one exception for what a user gave: the launcher prints it without a traceback and exits with code 2."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave (configuration, files, data, settings of the launcher).

    The message says what is wrong, what was given, what is expected and how to fix it, and names the field, tensor,
    file or rank. Every rank raises it at the same point, so that all ranks end and none waits for another.
    """
