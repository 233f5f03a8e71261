"""examples/ray_serve.py on a local Ray: the same answers over HTTP, more replicas under load, a new one for a dead."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install -e '.[ray]')")
pytest.importorskip("ray.serve", reason="Ray is installed without Serve (pip install -e '.[ray]')")

from pydantic import ValidationError  # noqa: E402
from ray import serve  # noqa: E402

from examples.ray_serve import Settings, app  # noqa: E402
from miniserve import LLM, SamplingParams  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # seconds; about one minute on a machine that is not busy
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(
    device="cpu",
    dtype="float32",
    max_model_len=512,
    kv_cache_memory=16 * 2**20,
    max_replicas=2,
    target_ongoing_requests=1,
    upscale_delay_s=0.5,
    num_cpus=1,
)
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # of this machine's own network alone
    "RAY_gcs_server_request_timeout_seconds": "150",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start_node(log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A Ray of this machine, and its port. It waits 30 s for its own parts, which a busy machine may exceed."""
    port, *agents = free_ports(5)
    # A node's agents have ports that it knows beforehand: for others it waits 15 s, which is little on a busy machine.
    names = (
        "dashboard-agent-grpc-port",
        "dashboard-agent-listen-port",
        "metrics-export-port",
        "runtime-env-agent-port",
    )
    flags = [f"--{name}={number}" for name, number in zip(names, agents, strict=True)]
    ray_command = [sys.executable, "-m", "ray.scripts.scripts"]
    start = [*ray_command, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"]
    start += ["--num-cpus=4", f"--object-store-memory={80 * 2**20}", "--include-dashboard=false", *flags]
    with log.open("wb") as output:
        node = subprocess.Popen(start, stdout=output, stderr=output)
    wait_until(lambda: b"To terminate the Ray runtime" in log.read_bytes() or node.poll() is not None)
    return node, port


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def url(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log, (http,) = tmp_path_factory.mktemp("ray") / "log", free_ports(1)
    for _ in range(4):
        node, port = start_node(log)
        if node.poll() is None or "The current node timed out during startup" not in log.read_text():
            break
    assert node.poll() is None, log.read_text()
    try:
        ray.init(address=f"127.0.0.1:{port}", runtime_env={"env_vars": ENVIRONMENT}, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": http})
        serve.run(app(SETTINGS), route_prefix="/")
        yield f"http://127.0.0.1:{http}"
        serve.shutdown()
        ray.shutdown()
    finally:
        node.terminate()
        node.wait(60)


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)


def complete(url: str, **body: Any) -> httpx.Response:
    body = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=300)


def engines() -> set[int]:
    """The engine processes below Ray's replicas."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if b"miniserve.engine.process" in (path / "cmdline").read_bytes():
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                if (Path("/proc") / parent / "cmdline").read_bytes().startswith(b"ray::"):
                    found.add(int(path.name))
    return found


def num_running() -> int:
    states = serve.status().applications["default"].deployments["Replica"].replica_states
    return int(states.get("RUNNING", 0))


def test_it_answers_grows_and_heals(url: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    llm = LLM(device="cpu", dtype="float32", progress=False)
    expected = llm.generate(["Once upon a time"], params, progress=False)[0].outputs[0].text
    answer = complete(url, max_tokens=20)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected
    lines = complete(url, max_tokens=20, stream=True).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert len(events) > 1 and "".join(event["choices"][0]["text"] for event in events) == expected
    refused = complete(url, max_tokens=-1)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"

    assert num_running() == 1
    with ThreadPoolExecutor(6) as pool:
        stop = False

        def keep_asking() -> set[int]:
            codes = set()
            while not stop:
                codes.add(complete(url, max_tokens=100).status_code)
            return codes

        asking = [pool.submit(keep_asking) for _ in range(6)]
        try:
            wait_until(lambda: num_running() == 2)
        finally:
            stop = True
        assert {code for each in asking for code in each.result()} == {200}

    killed = engines()
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: bool(engines() - killed))
    wait_until(lambda: all(complete(url, max_tokens=1).status_code == 200 for _ in range(8)))


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_replica"):
        Settings.model_validate({"max_replica": 2})
