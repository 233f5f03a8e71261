"""Health that is true, and the small endpoints."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
from server_fakes import EOS, RunningServer, running_server, tokenizer

import miniserve
from miniserve.server import serve
from miniserve.server.config import ServerConfig


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready"])
def test_health_is_that_of_the_engine(server: RunningServer, path: str) -> None:
    url = server.root + path
    assert httpx.get(url).json() == {"status": "ok", "running": 0, "waiting": 0, "last_step_age": 0.0}
    assert httpx.head(url).status_code == 200
    server.engine.age = None
    assert httpx.get(url).status_code == 200


def test_a_dead_engine_is_a_503_everywhere(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_LAST_WORDS", 60.0)
    server.call(server.engine.kill, "The engine died: killed by signal 9.")
    for answer in (
        httpx.get(f"{server.root}/health"),
        httpx.get(f"{server.root}/debug/steps"),
        httpx.post(f"{server.url}/completions", json={"prompt": "x"}),
    ):
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "ServiceUnavailableError"
        assert "killed by signal 9" in answer.json()["error"]["message"]
    assert server.stop() == 1


def test_sagemaker_pings_with_post(server: RunningServer) -> None:
    assert httpx.post(f"{server.root}/ping").status_code == 200


def test_version_and_root(server: RunningServer) -> None:
    assert httpx.get(f"{server.root}/version").json() == {"version": miniserve.__version__}
    assert httpx.get(server.root).json()["api"] == "/v1"
    assert httpx.get(f"{server.root}/openapi.json").json()["info"]["title"] == "miniserve"
    for page in ("/docs", "/redoc"):  # FastAPI's load scripts from servers of others
        assert httpx.get(server.root + page).status_code == 404


def test_tokenize_and_detokenize(server: RunningServer) -> None:
    def tokenize(**body: object) -> dict[str, object]:
        response = httpx.post(f"{server.root}/tokenize", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, object] = response.json()
        return answer

    ids = tokenizer().encode("Hello, Zoë")
    assert tokenize(prompt="Hello, Zoë") == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    assert tokenize(prompt="é🤗", return_token_strs=True)["token_strs"] == ["Ã", "©", "ð", "Ł", "¤", "Ĺ"]
    # lm_eval asks for the id of the EOS like this
    assert tokenize(prompt="<|im_end|>", add_special_tokens=False)["tokens"] == [EOS]
    assert tokenize(prompt="") == {"count": 0, "max_model_len": 256, "tokens": [], "token_strs": None}
    chat = tokenize(messages=[{"role": "user", "content": "Hi"}])
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    answer = httpx.post(f"{server.root}/detokenize", json={"tokens": chat["tokens"]})
    assert answer.json() == {"prompt": expected}
    assert httpx.post(f"{server.root}/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    bare = tokenize(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    assert tokenizer().decode(bare["tokens"], False) == "<|im_start|>user\nHi<|im_end|>\n"  # type: ignore[arg-type]
    long = "word " * 10_000
    assert tokenize(prompt=long)["tokens"] == tokenizer().encode(long)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools[0].type"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2048]}, "tokens"),
        ("/detokenize", {"tokens": "5"}, "tokens"),
    ],
)
def test_what_cannot_be_tokenized_is_named(server: RunningServer, path: str, body: object, param: str) -> None:
    response = httpx.post(server.root + path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_pieces_of_a_long_text_are_not_looked_up_on_the_event_loop(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    piece = server.engine.tokenizer.token_piece

    def noted(token_id: int) -> str:
        threads.add(threading.current_thread().name)
        return piece(token_id)

    monkeypatch.setattr(server.engine.tokenizer, "token_piece", noted)
    body = {"prompt": "日" * 10_000, "return_token_strs": True}
    answer = httpx.post(f"{server.root}/tokenize", json=body).json()
    assert len(answer["token_strs"]) == answer["count"] > 16_384
    assert all(name.startswith("long-text") for name in threads)


def test_the_tokenizers_description_is_behind_a_flag() -> None:
    with running_server(enable_tokenizer_info=True) as server:
        info = httpx.get(f"{server.root}/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert info["bos_token"] is None
    assert "im_start" in info["chat_template"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1}, {"port": 65_536}, {"api_keys": ("",)}, {"served_model_names": ("a", "")}, {"max_body_bytes": 0},
        {"max_prompts": 0}, {"max_queue": 0}, {"step_timeout": 0}, {"log_interval": -1}, {"drain_timeout": -1},
        {"drain_timeout": float("nan")}, {"api_keys": ("schlüssel",)}, {"api_keys": ("a", " b")},
        {"api_keys": ("a\n",)}, {"allowed_origins": ("",)}, {"allowed_origins": ("https://a.example/",)},
        {"allowed_origins": ("a.example",)}, {"allowed_hosts": ("",)}, {"allowed_hosts": ("http://a",)},
        {"step_timeout": float("inf")},
    ],
)  # fmt: skip
def test_a_configuration_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(miniserve.core.UserError, match="^--max-queue" if "max_queue" in wrong else None):
        ServerConfig(**wrong)  # type: ignore[arg-type]
