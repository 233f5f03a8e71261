"""Models are found in each place they may be in, and each way to fail is one sentence with its remedy.

The hub is a small HTTP server on this machine, reached by huggingface_hub itself through HF_ENDPOINT. That variable is
read once at import, so each case is a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from miniserve.core import UserError
from miniserve.models.hub import BUILT_IN, locate
from miniserve.models.names import ALIASES, WELL_KNOWN, resolve_alias, suggest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
LOCATE = """
import json, sys
from miniserve.core import UserError
from miniserve.models.hub import locate
notices = []
model, revision, weights, free = json.loads(sys.argv[1])
if free is not None:
    import shutil
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(free, 0, free)
try:
    source = locate(model, revision, weights=weights, notify=notices.append)
    found = {"name": source.name, "origin": source.origin, "files": sorted(p.name for p in source.path.iterdir())}
except UserError as error:
    found = {"error": str(error)}
print(json.dumps(found | {"notices": notices, "torch": "torch" in sys.modules}))
"""


@dataclass
class FakeHub:
    """Repositories by name; a gated one answers for its listing and refuses its files, as the real hub does."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    reject_token: bool = False
    requests: list[str] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes | dict[str, Any]]) -> None:
        self.files[name] = {
            file: content if isinstance(content, bytes) else json.dumps(content).encode()
            for file, content in files.items()
        }


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} /{path}")
            if hub.reject_token:
                self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
                return
            parts = path.removeprefix("api/models/").split("/")
            name, (what, revision) = "/".join(parts[:2]), parts[2:4] or ("revision", "main")
            rest = "/".join(parts[4:])
            if name not in hub.files:
                self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif what == "revision":
                siblings = [{"rfilename": file} for file in hub.files[name]]
                self._send_json({"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings})
            elif what == "tree":
                entries = hub.files[name].items()
                self._send_json(
                    [
                        {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for file, content in entries
                    ]
                )
            elif name in hub.gated:
                self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            elif rest not in hub.files[name]:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                content = hub.files[name][rest]
                etag = hashlib.sha1(content).hexdigest()
                self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

        def _send_json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


def find(
    cache: Path,
    url: str,
    model: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    free: int | None = None,
    **environment: str,
) -> dict[str, Any]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, json.dumps([model, revision, weights, free])],
        check=False,
        env=kept | {"HF_HOME": str(cache), "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("torch") is False
    return found


def add_qwen(hub: FakeHub, name: str = "Qwen/Qwen3-0.6B") -> None:
    hub.add(
        name,
        {
            "config.json": CONFIG,
            "tokenizer.json": {"version": "1.0"},
            "chat_template.jinja": b"{{ messages }}",
            "model.safetensors": b"w" * 100_000,
            "pytorch_model.bin": b"b" * 1000,
            "original/params.json": {},
            "consolidated.safetensors": b"c" * 1000,
            "README.md": b"# model",
        },
    )


# --- the hub ------------------------------------------------------------------------------------------------------


def test_a_model_is_downloaded_once_and_then_found_offline(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub)
    found = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B")
    assert found["files"] == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert found["origin"].startswith("downloaded from the Hugging Face hub")
    assert found["notices"] == [f"Downloading Qwen/Qwen3-0.6B: 0.1 MiB to {tmp_path / 'hub'}."]
    fetched = [request for request in hub.requests if request.startswith("GET /Qwen")]
    again = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B")
    assert again["origin"].startswith("Hugging Face cache") and again["notices"] == []
    assert [request for request in hub.requests if request.startswith("GET /Qwen")] == fetched
    hub.requests.clear()
    offline = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", HF_HUB_OFFLINE="1")
    assert offline == again and hub.requests == []
    unreachable = find(tmp_path, "http://127.0.0.1:9", "Qwen/Qwen3-0.6B")
    assert unreachable == again


def test_a_revision_is_taken(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub)
    assert "model.safetensors" in find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", COMMIT)["files"]


def test_random_weights_need_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub)
    found = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", weights=False)
    assert found["files"] == ["chat_template.jinja", "config.json", "tokenizer.json"]


def test_weights_missing_from_the_cache_are_told_offline(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub)
    find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", weights=False)
    error = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", HF_HUB_OFFLINE="1")["error"]
    assert "Qwen/Qwen3-0.6B" in error and ("not completely" in error or "no *.safetensors" in error)


def test_an_alias_is_taken_and_said(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub, "Qwen/Qwen3-235B-A22B")
    found = find(tmp_path, hub.url, "Qwen/Qwen3-235B")
    assert found["name"] == "Qwen/Qwen3-235B-A22B"
    said = "Qwen/Qwen3-235B is not a repository on the Hugging Face hub; taking Qwen/Qwen3-235B-A22B."
    assert found["notices"][0] == said
    assert find(tmp_path, hub.url, "Qwen/Qwen3-235B", HF_HUB_OFFLINE="1")["notices"] == [said]


def test_an_unknown_repository_gets_a_guess(hub: FakeHub, tmp_path: Path) -> None:
    error = find(tmp_path, hub.url, "Qwen/Qwen3-0.6")["error"]
    assert "no repository Qwen/Qwen3-0.6 " in error and error.endswith("did you mean Qwen/Qwen3-0.6B?")
    error = find(tmp_path, hub.url, "someone/something-else")["error"]
    assert "no repository someone/something-else" in error and "did you mean" not in error


def test_a_gated_repository_is_told_apart_from_a_missing_one(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub, "meta-llama/Llama-3.1-8B")
    hub.gated.add("meta-llama/Llama-3.1-8B")
    error = find(tmp_path, hub.url, "meta-llama/Llama-3.1-8B")["error"]
    assert "gated" in error and f"{hub.url}/meta-llama/Llama-3.1-8B" in error and "hf auth login" in error
    hub.gated.clear()
    found = find(tmp_path, hub.url, "meta-llama/Llama-3.1-8B")
    hub.gated.add("meta-llama/Llama-3.1-8B")
    assert find(tmp_path, hub.url, "meta-llama/Llama-3.1-8B")["files"] == found["files"]


def test_a_bad_revision_is_named(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub)
    error = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", "nightly")["error"]
    assert "no revision 'nightly'" in error


def test_a_refused_token_is_told(hub: FakeHub, tmp_path: Path) -> None:
    hub.reject_token = True
    error = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", HF_TOKEN="hf_wrong")["error"]
    assert "does not accept your token" in error


def test_no_network(tmp_path: Path) -> None:
    error = find(tmp_path, "http://127.0.0.1:9", "Qwen/Qwen3-0.6B")["error"]
    assert "in the Hugging Face cache" in error and "check the network" in error
    assert "Did you mean" not in error
    error = find(tmp_path, "http://127.0.0.1:9", "Qwen/Qwen3-0.66B")["error"]
    assert "check the network" in error and "Did you mean Qwen/Qwen3-0.6B?" in error


def test_offline(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub)
    error = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", HF_HUB_OFFLINE="1")["error"]
    assert "in the Hugging Face cache" in error and "HF_HUB_OFFLINE" in error
    assert hub.requests == []


def test_the_disk_is_measured_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    add_qwen(hub)
    hub.files["Qwen/Qwen3-0.6B"]["model.safetensors"] = b"w" * (3 << 20)
    error = find(tmp_path, hub.url, "Qwen/Qwen3-0.6B", free=1 << 20)["error"]
    assert "needs 3.0 MiB" in error and "1.0 MiB free" in error and "HF_HOME" in error
    assert not any(request.startswith("GET ") and request.endswith(".safetensors") for request in hub.requests)


def test_pickled_weights_are_refused_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("old/llama", {"config.json": {"architectures": ["LlamaForCausalLM"]}, "pytorch_model.bin": b"b" * 1000})
    error = find(tmp_path, hub.url, "old/llama")["error"]
    assert "*.bin" in error and "safetensors" in error
    assert not any(request.startswith("GET ") and request.endswith(".bin") for request in hub.requests)


def test_an_unsupported_architecture_is_refused_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("google-bert/bert", {"config.json": {"architectures": ["BertForMaskedLM"]}, "model.safetensors": b"w" * 9})
    error = find(tmp_path, hub.url, "google-bert/bert")["error"]
    assert "BertForMaskedLM" in error and "Qwen3ForCausalLM" in error
    quantised = CONFIG | {"quantization_config": {"quant_method": "awq"}}
    hub.add("a/b", {"config.json": quantised, "model.safetensors": b"w"})
    assert "quantised weights (awq)" in find(tmp_path, hub.url, "a/b")["error"]
    assert not any(request.endswith("model.safetensors") for request in hub.requests)


def test_a_repository_without_config(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("Qwen/Qwen3-8B-GGUF", {"qwen.gguf": b"g"})
    error = find(tmp_path, hub.url, "Qwen/Qwen3-8B-GGUF")["error"]
    assert "no config.json" in error and "did you mean Qwen/Qwen3-8B?" in error


# --- without the hub ----------------------------------------------------------------------------------------------


def checkpoint(path: Path, *files: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    for name in files:
        (path / name).write_bytes(b"w")
    return path


def test_the_built_in_model() -> None:
    for name in (None, BUILT_IN):
        source = locate(name)
        assert source.name == BUILT_IN and source.origin.startswith("built in")
        assert (source.path / "config.json").is_file()


def test_a_local_directory(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "my-model", "model.safetensors")
    source = locate(str(path))
    assert (source.name, source.path) == (str(path), path.resolve())
    assert source.origin == f"local directory {path.resolve()}"


def test_a_local_directory_without_weights(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"neither model\.safetensors nor .*--load-format dummy"):
        locate(str(path))
    assert locate(str(path), weights=False).path == path.resolve()
    (path / "pytorch_model.bin").write_bytes(b"b")
    with pytest.raises(UserError, match="pickled"):
        locate(str(path))


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    path = checkpoint(tmp_path, "model-1-of-2.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"lacks 1 of the 2 weight files that .* names: model-2-of-2\.safetensors;"):
        locate(str(path))
    (path / "model.safetensors").write_bytes(b"w")  # which is loaded instead
    assert locate(str(path)).path == path.resolve()


def test_weight_files_of_other_names_are_no_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "consolidated.safetensors")
    with pytest.raises(UserError, match=r"nor model\.safetensors\.index\.json \(it has consolidated\.safetensors\)"):
        locate(str(path))


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"g")
    with pytest.raises(UserError, match=r"no config\.json.*GGUF"):
        locate(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_config(tmp_path: Path, content: str) -> None:
    path = checkpoint(tmp_path, "model.safetensors")
    (path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        locate(str(path))


def test_an_unsupported_local_architecture(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "model.safetensors")
    (path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(UserError, match="MambaForCausalLM"):
        locate(str(path))


@pytest.mark.parametrize(
    "model",
    ["./nowhere", "/nowhere/at/all", "~/nowhere", "~nobody-of-that-name/x", "/" + "a" * 5000, "a/b/c", "nowhere/", ""],
)
def test_a_path_that_leads_nowhere(model: str) -> None:
    with pytest.raises(UserError, match="There is no directory"):
        locate(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"w")
    with pytest.raises(UserError, match="is a file"):
        locate(str(file))


def test_a_name_that_is_no_hub_id() -> None:
    with pytest.raises(UserError, match="neither a local directory nor a hub id"):
        locate("what is this?")


def test_a_revision_needs_a_repository(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--revision"):
        locate(None, "main")
    with pytest.raises(UserError, match="--revision"):
        locate(str(checkpoint(tmp_path, "model.safetensors")), "main")


# --- names --------------------------------------------------------------------------------------------------------


def test_aliases_lead_to_repositories_in_one_step() -> None:
    assert resolve_alias("qwen/qwen3-235b") == "Qwen/Qwen3-235B-A22B"
    assert resolve_alias("Qwen/Qwen3-8B") is None
    assert not set(ALIASES) & set(WELL_KNOWN)
    assert all(resolve_alias(target) is None for target in ALIASES.values())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("meta-llama/Llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("mistral/Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("Qwen/Qwen3-8B", None),
        ("someone/something-else", None),
    ],
)
def test_suggestions(typed: str, meant: str | None) -> None:
    assert suggest(typed) == meant
