"""What must be known before any test module is imported, and what every test needs."""

from __future__ import annotations

import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Tests keep all cores busy as it is; the engines that they start inherit this too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The many processes that tests start keep the package compiled: anew it takes each of them most of a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import httpx
import pytest
import torch

TESTS = Path(__file__).parent
# The files that take longest begin first, or one of them would run alone at the end.
LONGEST = (
    "cli/test_cli_run.py",
    "aiter_contract/test_engine_standin.py",
    "tools/test_compile_check.py",
    "parallel/test_parallel_processes.py",
    "examples/test_lm_eval_tasks.py",
    "bench/test_bench_sweep.py",
    "engine/test_engine_client.py",
)

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which libraries do on their own.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_xdist_auto_num_workers() -> int | None:
    """One more than there are cores: while one waits for a process, another works."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # which is xdist's to read
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    if missing := [str(path) for path in places if not path.exists()]:
        raise pytest.UsageError(f"{missing[0]} does not exist: correct LONGEST in tests/conftest.py.")
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Signals work in what a test starts, and Ctrl-C here, also where a shell's script or nohup had them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # as good as ignored, but not inherited


@pytest.fixture(scope="session", autouse=True)
def one_tls_context() -> Iterator[None]:
    """HTTP clients that were given none share it: to read the machine's certificates takes each of them 40 ms."""
    create, shared = httpx.create_ssl_context, httpx.create_ssl_context()

    def context(verify: Any = True, **options: Any) -> ssl.SSLContext:
        return shared if verify is True else create(verify, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httpx._transports.default.create_ssl_context", context)
        yield
