"""lm_eval, as a user starts it, against `miniserve run` with the built-in model; checked against transformers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "miniserve" / "assets" / "tiny-qwen3"
DOCUMENTS = 24
pytestmark = pytest.mark.timeout(1800)  # seconds; some tens on a machine that is not busy
TASKS = ("miniserve_problems_gen", "miniserve_problems_mc", "miniserve_stories_ppl")
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "miniserve", "serve", "--port", str(port), "--dtype", "float32"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_ready(url):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def samples(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What lm_eval recorded of every document, by task."""
    output = tmp_path_factory.mktemp("lm_eval")
    arguments = {
        "model": MODEL.name,
        "base_url": f"{server_url}/v1/completions",
        "tokenizer": str(MODEL),
        "tokenizer_backend": "huggingface",
        "max_length": 2048,
        "num_concurrent": 16,
        "max_retries": 1,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", "lm_eval", "--tasks", ",".join(TASKS)]
    command += ["--metadata", json.dumps({"count": DOCUMENTS}), "--output_path", str(output), "--log_samples"]
    # From within examples/, where a folder of the same name must not be taken for the package.
    done = subprocess.run(command, cwd=ROOT / "examples", env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    recorded = {}
    for task in TASKS:
        (path,) = output.rglob(f"samples_{task}_*.jsonl")
        recorded[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return recorded


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """The tokenizer and the model as transformers loads them, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(MODEL), model


def loglikelihood(reference: tuple[Any, Any], context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The sum over the continuation, and whether greedy decoding would have chosen it."""
    _, model = reference
    with torch.inference_mode():
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    targets = torch.tensor(continuation)
    chosen = logprobs.gather(1, targets[:, None]).sum().item()
    return chosen, bool((logprobs.argmax(-1) == targets).all())


def test_problems_are_solved_and_texts_are_those_of_transformers(
    samples: dict[str, list[dict[str, Any]]], reference: tuple[Any, Any]
) -> None:
    tokenizer, model = reference
    documents = samples["miniserve_problems_gen"]
    assert len(documents) == DOCUMENTS
    assert sum(document["exact_match"] for document in documents) >= 0.9 * DOCUMENTS
    for document in documents[:4]:
        prompt = tokenizer(document["arguments"]["gen_args_0"]["arg_0"], add_special_tokens=False).input_ids
        with torch.inference_mode():
            output = model.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False)[0, len(prompt) :]
        expected = tokenizer.decode(output, skip_special_tokens=True)
        assert document["resps"][0][0] == expected.split("\n\n")[0].split("Question:")[0]


def test_loglikelihoods_of_choices_are_those_of_transformers(
    samples: dict[str, list[dict[str, Any]]], reference: tuple[Any, Any]
) -> None:
    tokenizer, _ = reference
    documents = samples["miniserve_problems_mc"]
    assert len(documents) == DOCUMENTS
    # A bare result, without the working that the model was taught to write first: better than chance (0.25) by far.
    assert sum(document["acc"] for document in documents) >= 0.8 * DOCUMENTS
    for document in documents:
        requests = list(document["arguments"].values())
        assert len(requests) == len(document["resps"]) == 4
        for request, ((value, greedy),) in zip(requests, document["resps"], strict=True):
            context = tokenizer(request["arg_0"], add_special_tokens=False).input_ids
            whole = tokenizer(request["arg_0"] + request["arg_1"], add_special_tokens=False).input_ids
            expected, expected_greedy = loglikelihood(reference, context, whole[len(context) :])
            assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert greedy == str(expected_greedy)


def test_perplexity_is_that_of_transformers(
    samples: dict[str, list[dict[str, Any]]], reference: tuple[Any, Any]
) -> None:
    tokenizer, _ = reference
    documents = samples["miniserve_stories_ppl"]
    assert len(documents) == DOCUMENTS
    for document in documents:
        text = tokenizer(document["doc"]["text"], add_special_tokens=False).input_ids
        # Without a BOS token lm_eval scores a document after an EOS token.
        expected, _ = loglikelihood(reference, [tokenizer.eos_token_id], text)
        ((value,),) = document["resps"]
        assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_the_openai_client_example_runs(server_url: str) -> None:
    command = [sys.executable, "openai_client.py", "--url", f"{server_url}/v1"]
    done = subprocess.run(command, cwd=ROOT / "examples", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in (
        "model: tiny-qwen3",
        "completion: Once upon a time",
        "chat: ",
        "stream: ",
        " tokens)",
        "logprobs:",
    ):
        assert expected in done.stdout
    assert "a refused request: Error code: 400" in done.stdout
