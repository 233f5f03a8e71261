"""What the user asked of the server: frozen, validated with sentences."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from miniserve.core import InvalidRequest, UserError
from miniserve.engine.reasoning import REASONING_DIALECTS, ReasoningDialect, reasoning_dialect
from miniserve.engine.tool_dialects import TOOL_DIALECTS, ToolDialect, tool_dialect

_MAX_SOCKET_PATH = 107  # bytes, the system's limit
_HOST, _PORT = "127.0.0.1", 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Times are in seconds, `max_body_bytes` in bytes. Raises `UserError` for a value out of range.

    api_keys: any of them opens `/v1`; none leaves it open. served_model_names: what clients may call the model, the
    first is echoed in answers; none means the model's own name. max_prompts bounds the sequences (prompts times n) of
    one request, max_queue those of all requests that run or wait. step_timeout: how long a step may last before the
    engine counts as dead; None: by the device. drain_timeout: how long running requests may go on after the first
    signal. allowed_hosts: names that requests may have in their Host header; see `serve` for those that need not be
    named. allowed_origins: browsers' origins that may call the server (CORS); none by default. strict_fields: refuse
    unknown fields of requests, which are otherwise warned about. root_path: what paths may begin with, as behind a
    proxy. uds: a unix socket to listen on instead of host and port. ssl_keyfile, ssl_certfile: PEM files, for TLS.
    log_requests: a line for each request that has ended, with its prompt where log_prompts says so. log_interval: while
    requests run, how often a line says how it goes; 0 for never. tool_call_parser, reasoning_parser: how the model
    writes calls and reasoning; auto: as its chat template tells.
    """

    host: str = _HOST
    port: int = _PORT
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 1024 * 1024
    max_prompts: int = 1024
    max_queue: int = 8192
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    enable_tokenizer_info: bool = False
    trust_request_chat_template: bool = False
    strict_fields: bool = False
    root_path: str = ""
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    log_requests: bool = True
    log_prompts: bool = False
    step_timeout: float | None = None
    drain_timeout: float = 60.0
    log_interval: float = 10.0
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port must be between 0 and 65535, not {self.port}.")
        if not all(self.api_keys):
            raise UserError("--api-key and MINISERVE_API_KEY must not be empty; leave them out to serve without a key.")
        for key in self.api_keys:
            check_api_key(key)
        if not all(self.served_model_names):
            raise UserError("--served-model-name must not be empty.")
        for origin in self.allowed_origins:
            if re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin) is None:
                raise UserError(
                    f"--allowed-origin {origin!r} is none that a browser sends; it looks like https://example.com, "
                    "without a path or a slash at its end, or is * for all."
                )
        for host in self.allowed_hosts:
            if re.fullmatch(r"\*|[A-Za-z0-9._-]+", host) is None:
                raise UserError(
                    f"--allowed-host {host!r} is no host name; it looks like gpu.example.com, without http:// and "
                    "port, or is * for all."
                )
        for name in ("--max-body-bytes", "max_prompts", "--max-queue"):
            value = getattr(self, name.removeprefix("--").replace("-", "_"))
            if value <= 0:
                raise UserError(f"{name} must be a positive number, not {value}.")
        if re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", self.root_path) is None:
            raise UserError(
                f"--root-path {self.root_path!r} is no path; it looks like /models/small, without a slash behind."
            )
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise UserError("--ssl-keyfile and --ssl-certfile belong together; give both, for TLS, or none.")
        if self.uds is not None and not 0 < len(os.fsencode(self.uds)) <= _MAX_SOCKET_PATH:
            raise UserError(f"--uds must be a path of 1 to {_MAX_SOCKET_PATH} bytes.")
        if self.uds is not None and (self.host, self.port) != (_HOST, _PORT):
            raise UserError("--uds listens on that socket alone, on no --host and --port; leave these out, or --uds.")
        if self.log_prompts and not self.log_requests:
            raise UserError("--log-prompts adds prompts to the lines of --log-requests; leave --no-log-requests out.")
        _check_choice("--tool-call-parser", self.tool_call_parser, TOOL_DIALECTS)
        _check_choice("--reasoning-parser", self.reasoning_parser, REASONING_DIALECTS)
        if self.step_timeout is not None and not 0 < self.step_timeout < math.inf:
            raise UserError(f"--step-timeout must be a number of seconds above 0, not {self.step_timeout}.")
        if not 0 <= self.drain_timeout < math.inf:
            raise UserError(f"--drain-timeout must be a number of seconds, 0 or more, not {self.drain_timeout}.")
        if self.log_interval < 0:
            raise UserError(f"log_interval must be 0 or more, not {self.log_interval}.")

    def tool_dialect(self, template: str) -> ToolDialect:
        """How the model writes calls, by its chat template. Raises `InvalidRequest` where that is not known."""
        name = self.tool_call_parser
        dialect = tool_dialect(template) if name == "auto" else TOOL_DIALECTS.get(name)
        if dialect is None:
            raise InvalidRequest(
                "tools are not supported here: "
                + (
                    "the model's chat template does not say how it writes calls in a way that is known; the server's "
                    "operator may name it with --tool-call-parser."
                    if name == "auto"
                    else "the server runs with --tool-call-parser none."
                ),
                "tools",
            )
        return dialect

    def reasoning_dialect(self, template: str) -> ReasoningDialect | None:
        """How the model marks its reasoning, by its chat template; None where it does not reason."""
        name = self.reasoning_parser
        return reasoning_dialect(template) if name == "auto" else REASONING_DIALECTS.get(name)


def _check_choice(flag: str, name: str, known: Iterable[str]) -> None:
    names = ("auto", "none", *known)
    if name not in names:
        raise UserError(f"{flag} must be one of {', '.join(names)}, not {name!r}.")


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one on a line. Raises `UserError` with the reason where there are none."""
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"--api-key-file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--api-key-file {path} is not a text: write one key on a line.") from error
    if not keys:
        raise UserError(f"--api-key-file {path} is empty: write one key on a line.")
    return keys


def check_api_key(key: str | None) -> str | None:
    """The key. Raises `UserError` for one that no HTTP header carries unchanged."""
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UserError("--api-key must be made of printable ASCII characters, without spaces around them.")
    return key
