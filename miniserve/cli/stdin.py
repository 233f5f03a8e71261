"""What standard input and output are connected to, which decides what `miniserve run` does."""

from __future__ import annotations

import os
import select
import stat
import sys

from miniserve.core import UserError

_PATIENCE = 2.0  # seconds without data after which nobody is expected to write to a pipe


def can_chat() -> bool:
    """Whether a user sits at a terminal: stdin and stdout are one, and this process is not in the background (`… &`),
    where reading from the terminal would stop it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        return False


def read_text() -> str:
    """All of standard input. Raises `UserError` if it is not UTF-8."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UserError("Standard input is not valid UTF-8: pipe in UTF-8 text.") from None


def read_piped_text() -> str | None:
    """The text piped in or redirected from a file; None if there is none.

    Servers are started with all kinds of standard input: a terminal, /dev/null, nothing at all, an empty pipe, a pipe
    that is held open and never written to. All of these give None, the last one after `_PATIENCE`.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed
        return None
    if stat.S_ISREG(mode):
        return read_text() or None
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return None
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], _PATIENCE)
    return (read_text() or None) if readable else None
