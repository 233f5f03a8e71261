"""`miniserve doctor`: what this machine can run and what it lacks."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Say what this machine can run, what is missing, and the command that installs it.

    Exits 1 if something is missing without which the best that is here cannot be used, else 0.
    """
    # Here and not above: torch would slow down `miniserve --help`.
    from miniserve.checks.doctor import examine

    lacks = False
    for finding in examine():
        print(finding, flush=True)
        lacks = lacks or finding.state == "lack"
    raise typer.Exit(1 if lacks else 0)
