"""What `miniserve run` reports on stderr while a model starts."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from miniserve.core import EngineInfo

if TYPE_CHECKING:
    from miniserve.engine.build import ProgressCallback

logger = logging.getLogger(__name__)

_LINE_INTERVAL = 5.0  # seconds


class Report:
    """Writes to stderr. `quiet` leaves out everything but notes and, at a terminal, the bars of a load. `logs`: each
    line goes to the log, whose format is not that of people."""

    def __init__(self, *, quiet: bool = False, logs: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._logs = logs

    def line(self, text: str) -> None:
        """Print one line without wrapping: it may hold something to copy."""
        if not self._quiet:
            self.note(text)

    def note(self, text: str) -> None:
        """Print a line even when quiet."""
        if self._logs:
            logger.info("%s", text)
        else:
            self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def loading(self) -> Iterator[ProgressCallback]:
        """Progress of loading weights (in bytes) and capturing graphs: bars if stderr is a terminal, else lines."""
        if self._logs or not self._console.is_terminal:
            yield self._report_tenths()
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[of]}"), TimeElapsedColumn())
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, console=self._console, transient=True) as progress:

            def update(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = progress.add_task(stage, total=total, of=_amount(stage, total))
                progress.update(tasks[stage], completed=done, total=total)

            yield update

    def _report_tenths(self) -> ProgressCallback:
        shown: dict[str, int] = {}
        last: dict[str, float] = {}

        def update(stage: str, done: int, total: int) -> None:
            tenths = 10 * done // total if total else 10
            now = time.monotonic()
            # A load of a few seconds is one line.
            if tenths > shown.get(stage, 0) and (tenths == 10 or now - last.setdefault(stage, now) > _LINE_INTERVAL):
                shown[stage], last[stage] = tenths, now
                self.line(f"loading {stage}: {10 * tenths}% of {_amount(stage, total)}")

        return update

    def engine(self, info: EngineInfo, count: int = 1) -> None:
        """The memory plan as a table, then the attention path and why; of one of `count` engines."""
        if self._quiet:
            return
        tokens = info.num_blocks * info.block_size
        sizes = [(what, human_bytes(size)) for what, size in info.memory]
        counts = [
            ("tokens in the KV cache", f"{tokens:,}"),
            (f"max concurrency at {info.max_model_len:,} tokens", f"{tokens / info.max_model_len:,.1f}x"),
        ]
        if self._logs:
            for what, size in sizes + counts:
                self.line(f"{what}: {size}")
        else:
            self._console.print(_memory_table(sizes, counts))
        self.line(f"{info.architecture} in {info.dtype} on {info.device}, KV layout {info.kv_layout}")
        if info.tensor_parallel_size > 1:
            experts = ", each of which has whole experts" if info.enable_expert_parallel else ""
            self.line(f"{info.tensor_parallel_size} ranks share the model{experts}; the memory is that of one")
        if count > 1:
            self.line(f"{count} engines like this share out the requests")
        for sentence in info.attention:
            self.line(sentence)
        if info.speculative is not None:
            self.line(f"speculation {info.speculative}, in batch rows that no running request needs")

    def ready(self, url: str, model: str, *, with_key: bool, uds: str | None = None) -> None:
        """The URL, or the unix socket, and a request to copy into a shell."""
        self.line(f"Serving {model} at {uds or url}")
        self.line(curl_line(url, model, with_key=with_key, uds=uds))


def _memory_table(sizes: Sequence[tuple[str, str]], counts: Sequence[tuple[str, str]]) -> Table:
    table = Table(title="Memory plan", title_justify="left", show_header=False, title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    for row in sizes:
        table.add_row(*row)
    table.add_section()
    for row in counts:
        table.add_row(*row)
    return table


def _amount(stage: str, total: int) -> str:
    return human_bytes(total) if stage == "weights" else str(total)


def human_bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if abs(size) >= 2**30 else f"{size / 2**20:,.1f} MiB"


def client_url(host: str, port: int) -> str:
    """Where a client on this machine reaches a server bound to `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def curl_line(url: str, model: str, *, with_key: bool, uds: str | None = None) -> str:
    """A completion request. The key is a shell variable, so that no log contains it."""
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 64})
    key = ' -H "Authorization: Bearer $API_KEY"' if with_key else ""
    socket = "" if uds is None else f"--unix-socket {shlex.quote(uds)} "
    return f"curl {socket}{url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
