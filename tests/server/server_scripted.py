"""A server whose answers are scripted, in the words of a tool dialect: over the stub engine, with the built-in model's
tokenizer and a small chat template of the dialect's kind.

The stub follows no grammar, so `Scripted.fits` asks whether the grammar of the last request would have let its answer
pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from dialect_texts import TEMPLATES
from llguidance import LLTokenizer
from openai import OpenAI
from server_fakes import EOS, TINY, FakeEngine, RunningServer, running_server

from miniserve.engine.grammar import new_matcher
from miniserve.engine.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How the weather is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS: Any = [WEATHER, NOW]
ASKED = {"role": "user", "content": "How will the weather be?"}
CALLS = [("get_weather", {"city": 'Bad "Ems"\nIII', "days": 2}), ("now", {})]


def tokenizer_with(directory: Path, template: str, special: tuple[str, ...] = ()) -> Tokenizer:
    """The built-in model's tokenizer with another template and more special tokens."""
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "chat_template.jinja").write_text(template)
    file = directory / "tokenizer.json"
    data = json.loads(file.read_text())
    first = max(token["id"] for token in data["added_tokens"]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] += [{"id": first + i, "content": text, **flags} for i, text in enumerate(special)]
    file.write_text(json.dumps(data))
    return Tokenizer(directory)


@dataclass
class Scripted:
    """A server whose next answers are set by `says`."""

    dialect: str
    server: RunningServer
    client: OpenAI

    def says(self, *texts: str) -> None:
        """An answer each, the last one again and again."""
        self.server.engine.scripts = [[*self.server.engine.tokenizer.encode(text, False), EOS] for text in texts]
        self.server.engine.script = self.server.engine.scripts[0]

    @property
    def prompt(self) -> str:
        return self.server.engine.tokenizer.decode(self.server.engine.seen[-1][0], False)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        tokenizer = self.server.engine.tokenizer
        return LLTokenizer(tokenizer.to_json(), tokenizer.vocab_size, [EOS])

    def fits(self) -> bool:
        """Whether the last request has a grammar that lets its answer pass."""
        engine = self.server.engine
        params = engine.seen[-1][1]
        if params.grammar is None:
            return False
        matcher = new_matcher(params.grammar, engine.tokenizer, self._vocabulary, params.reasoning)
        return bool(matcher.consume_tokens(engine.script[:-1]) and matcher.is_accepting())

    def ask(self, messages: list[Any], **options: Any) -> Any:
        return self.client.chat.completions.create(model="tiny/fake", messages=messages, **options)

    def refused(self, messages: list[Any], **options: Any) -> str:
        with pytest.raises(openai.BadRequestError) as caught:
            self.ask(messages, **options)
        return str(caught.value.param)


def scripted(dialect: str, directory: Path, **config: object) -> Iterator[Scripted]:
    special = ("[TOOL_CALLS]", "[ARGS]") if dialect.startswith("mistral") else ()
    engine = FakeEngine(max_model_len=4096, num_blocks=256)
    engine.tokenizer = tokenizer_with(directory, TEMPLATES[dialect], special)
    engine.info = msgspec.structs.replace(engine.info, vocab_size=engine.tokenizer.vocab_size)
    with (
        running_server(engine, **config) as server,
        OpenAI(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        yield Scripted(dialect, server, client)
