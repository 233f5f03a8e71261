"""Run as a program: `miniserve` with these arguments, whose engine process emulates an AMD GPU."""

from __future__ import annotations

from functools import partialmethod

from miniserve.cli.main import main
from miniserve.engine.client import AsyncEngine

if __name__ == "__main__":
    factory = partialmethod(AsyncEngine.__init__, runner_factory="emulation:build_runner")
    AsyncEngine.__init__ = factory  # type: ignore[assignment,method-assign]
    main()
