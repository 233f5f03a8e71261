"""Vercel's AI SDK (the npm packages ai, @ai-sdk/openai, @ai-sdk/openai-compatible and @ai-sdk/anthropic)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dialect_texts import WRITERS
from server_fakes import running_server
from server_scripted import CALLS, TOOLS, Scripted

HERE = Path(__file__).parent
if shutil.which("node") is None or not (HERE / "node_modules" / "ai").is_dir():
    pytest.skip("needs node and the AI SDK: npm install --prefix tests/clients", allow_module_level=True)

PROVIDERS = ("chat", "responses", "compatible", "anthropic")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
VALUES = {"city": 'Bad "Ems"', "days": 2}
ASKED = "How will the weather be?"
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with subprocess.Popen(
        ["node", str(HERE / "ai_sdk.mjs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(model: Scripted, provider: str, task: str, prompt: str = ASKED, **options: Any) -> Any:
            body = {"root": model.server.root, "provider": provider, "task": task, "prompt": prompt, **options}
            if provider == "anthropic":
                body["maxOutputTokens"] = 500  # or 4096, the model's whole context
            process.stdin.write(json.dumps(body) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("task", ["generate", "stream"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_calls_and_their_results(each: Scripted, ask: Ask, provider: str, task: str) -> None:
    """The SDK runs the functions and asks again, by itself."""
    each.says(WRITERS[each.dialect](CALLS), "It will be warm.")
    found = ask(each, provider, task, tools=TOOLS, steps=3)
    assert found.pop("pieces", 9) > 5
    assert found == {
        "text": "It will be warm.",
        "reasoning": None,
        "finish": "stop",
        "calls": [[[name, arguments] for name, arguments in CALLS], []],
        "tokens": len(each.server.engine.script),
    }
    assert "the result of now" in each.prompt


@pytest.mark.parametrize("choice", ["required", {"type": "tool", "toolName": "get_weather"}])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_call_that_must_come(each: Scripted, ask: Ask, provider: str, choice: Any) -> None:
    each.says(WRITERS[each.dialect](CALLS[:1]))
    for task in ("generate", "stream"):
        found = ask(each, provider, task, tools=TOOLS, toolChoice=choice)
        assert (found["calls"], found["finish"]) == ([[list(CALLS[0])]], "tool-calls")
        assert each.fits()


OUTPUT_FORMAT = {"providerOptions": {"anthropic": {"structuredOutputMode": "outputFormat"}}}


@pytest.mark.parametrize("task", ["object", "objects", "output", "outputs"])
@pytest.mark.parametrize("provider", [*PROVIDERS, "plain"])
def test_structured_output(each: Scripted, ask: Ask, provider: str, task: str) -> None:
    each.says(json.dumps(VALUES))
    found = ask(each, provider, task, schema=SCHEMA, **OUTPUT_FORMAT)
    assert found.pop("pieces", 9) > 1
    assert found == {"object": VALUES}
    assert each.fits()


@pytest.mark.parametrize("task", ["object", "objects", "output", "outputs"])
def test_structured_output_by_a_call(each: Scripted, ask: Ask, task: str) -> None:
    """As the SDK has it by default from Anthropic's API, of models that it does not know."""
    each.says(WRITERS[each.dialect]([("json", VALUES)]))
    found = ask(each, "anthropic", task, schema=SCHEMA)
    assert found.pop("pieces", 9) > 1
    assert found == {"object": VALUES}
    assert each.fits()


@pytest.mark.parametrize("task", ["output", "outputs"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_calls_and_then_structured_output(each: Scripted, ask: Ask, provider: str, task: str) -> None:
    each.says(WRITERS[each.dialect](CALLS[:1]), json.dumps(VALUES))
    found = ask(each, provider, task, schema=SCHEMA, tools=TOOLS, steps=3, **OUTPUT_FORMAT)
    assert found.pop("pieces", 9) > 1
    assert found == {"object": VALUES}
    assert each.fits()


@pytest.mark.parametrize("task", ["generate", "stream"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_reasoning(qwen: Scripted, ask: Ask, provider: str, task: str) -> None:
    """It goes into the next step's prompt. Of /v1/responses the SDK shows summaries alone."""
    qwen.says("<think>\nI look.\n</think>\n\n" + WRITERS["hermes"](CALLS[:1]), "<think>\nWarm.\n</think>\n\nFour.")
    own = {"openai": {"store": False, "include": ["reasoning.encrypted_content"]}}
    found = ask(qwen, provider, task, tools=TOOLS, steps=3, providerOptions=own)
    assert (found["text"], found["calls"]) == ("Four.", [[list(CALLS[0])], []])
    assert found["reasoning"] == {"compatible": "Warm.", "anthropic": "Warm.", "responses": ""}.get(provider)
    assert ("<think>\nI look.\n</think>" in qwen.prompt) == (provider != "chat")


def test_what_is_not_stored_cannot_be_referred_to(qwen: Scripted, ask: Ask) -> None:
    """Which the SDK does by default in its second request to /v1/responses."""
    qwen.says("<think>\nI look.\n</think>\n\n" + WRITERS["hermes"](CALLS[:1]))
    error = ask(qwen, "responses", "generate", tools=TOOLS, steps=3)["error"]
    assert (error["name"], error["status"], "store: false" in error["message"]) == ("AI_APICallError", 400, True)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_errors_are_the_sdks(qwen: Scripted, ask: Ask, provider: str) -> None:
    for options, status in (({"topP": 2}, 400), ({"prompt": "word " * 9000}, 400)):
        for task in ("generate", "stream"):
            error = ask(qwen, provider, task, **options)["error"]
            assert (error["name"], error["status"], error["retries"]) == ("AI_APICallError", status, False), error
            print(error["message"])
    qwen.says("One, two, three.")
    qwen.server.engine.fail_after = 2
    try:
        for task in ("generate", "stream"):
            error = ask(qwen, provider, task)["error"]
            print(task, error)
            assert "The fake device broke" in error["message"]
    finally:
        qwen.server.engine.fail_after = None
    with running_server(api_keys=("secret",)) as server:
        error = ask(Scripted("", server, qwen.client), provider, "generate")["error"]
        assert (error["status"], error["retries"]) == (401, False)
