"""Real ranks: processes over gloo that give the tokens of one process, behind `LLM` and HTTP, and end together."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from dialect_texts import TEMPLATES
from kill_points import left_over

import miniserve
from miniserve.core import Grammar, SamplingParams
from miniserve.llm import LLM

ASSETS = Path(miniserve.__file__).parent / "assets"
PROMPTS = ["Once upon a time", "The capital of France is", "def f(x):", "Say"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, logprobs=1),
    SamplingParams(temperature=0.8, seed=3, max_tokens=12, repetition_penalty=1.2),
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(temperature=0.8, seed=3, max_tokens=12, grammar=Grammar("regex", "[a-z ]{8,30}")),
]
SLACK = 60.0  # seconds, for a busy machine


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def tokens(name: str, **options: Any) -> list[list[int]]:
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 128, "kv_cache_memory": 16 << 20}
    llm = LLM(ASSETS / name, progress=False, **settings, **options)
    found = [answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, PARAMS, progress=False)]
    assert llm.info.tensor_parallel_size == (options.get("tensor_parallel_size") or 1)
    del llm
    gc.collect()
    return found


@cache
def alone(name: str) -> list[list[int]]:
    return tokens(name)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("tiny-qwen3", 3, {}),  # 4 heads and 2 KV heads on 3 ranks
        ("tiny-deepseek", 2, {"enable_expert_parallel": True, "speculative": "ngram:2"}),
    ],
)
def test_ranks_give_the_tokens_of_one_process_and_leave_nothing(name: str, size: int, options: dict[str, Any]) -> None:
    assert tokens(name, tensor_parallel_size=size, **options) == alone(name)
    assert not left_over()


def test_two_hosts_give_the_tokens_of_one_process() -> None:
    """Hosts are two addresses of this machine's loopback; each has a rank."""
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = free.getsockname()[1]
    hosts = {"tensor_parallel_size": 2, "nnodes": 2, "master_addr": "127.0.0.2", "master_port": port}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in hosts.items()]
    settings = ["--device=cpu", "--dtype=float32", "--max-model-len=128", "--kv-cache-memory=16M"]
    command = [sys.executable, "-m", "miniserve", "serve", str(ASSETS / "tiny-qwen3"), *settings, *flags]
    with subprocess.Popen([*command, "--node-rank=1"], stderr=subprocess.PIPE, text=True) as other:
        try:
            assert tokens("tiny-qwen3", **hosts) == alone("tiny-qwen3")
            assert other.wait(SLACK) == 0
            assert other.stderr is not None and "Running rank 1 of 2" in other.stderr.read()
        finally:
            other.kill()  # or the end of this block would wait for it, where something failed


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [
        "--device=cpu",
        "--dtype=float32",
        "--max-model-len=2048",
        "--kv-cache-memory=64M",
        "--tensor-parallel-size=2",
        "--data-parallel-size=2",
        "--max-num-seqs=4",
        "--trust-request-chat-template",
    ]
    command = [sys.executable, "-m", "miniserve", "serve", f"--port={port}", *flags]
    with subprocess.Popen(command) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 480  # a machine at work loads slowly
            while True:
                try:
                    httpx.get(f"{url}/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    assert time.monotonic() < deadline and process.poll() is None
                    time.sleep(0.1)
            yield process, url
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """All below a process."""
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [each for child in map(int, text.split()) for each in (child, *children(child))]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_ranks_serve_enforced_calls_and_one_that_is_stopped_ends_its_requests_and_the_server(
    server: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, url = server
    cities = {"city": {"enum": ["Bonn", "Bad Ems"]}}
    schema = {"type": "object", "properties": cities, "required": ["city"], "additionalProperties": False}
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "chat_template": TEMPLATES["hermes"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (choice,) = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Bonn", "Bad Ems")
    body = {"prompt": PROMPTS[2], "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    (choice,) = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"]
    assert choice["token_ids"] == alone("tiny-qwen3")[2]
    assert httpx.get(f"{url}/metrics").text.count("miniserve:tensor_parallel_size{") == 2
    below = children(process.pid)
    rank, _ = [pid for pid in below if b"runner.worker" in command_line(pid)]
    answers: list[httpx.Response] = []
    body |= {"max_tokens": 1900, "ignore_eos": True}
    asking = [
        threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120)))
        for _ in range(2)
    ]
    for number, thread in enumerate(asking, 1):  # one goes to each engine
        thread.start()
        while httpx.get(f"{url}/health").json()["running"] < number:
            time.sleep(0.05)
    os.kill(rank, signal.SIGSTOP)
    begin = time.monotonic()
    while not answers:
        assert time.monotonic() - begin < 5.0 + SLACK
        time.sleep(0.05)
    for thread in asking:
        thread.join(2 * SLACK)
    failed, finished = answers
    assert failed.status_code == 503 and "rank 1 was stopped (SIGSTOP), in step" in failed.text
    assert finished.json()["usage"]["completion_tokens"] == 1900
    assert process.wait(SLACK) == 1
    assert not [pid for pid in below if b"miniserve" in command_line(pid)], "an orphan"
