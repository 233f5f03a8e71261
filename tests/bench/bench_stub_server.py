"""A small OpenAI-like server over real HTTP, whose faults a test can choose."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


@dataclass
class Stub:
    """`tokens_per_chunk` tokens in every event, `delay` seconds between them. `fail(n)` says what goes wrong with the
    n-th generation request (from 0): "500", "mid-stream", "cut", "short", "no usage", or None."""

    tokens_per_chunk: int = 1
    delay: float = 0.0
    has_tokenize: bool = True
    api_key: str | None = None
    fail: Callable[[int], str | None] = lambda n: None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models(request: Request) -> Any:
            if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
                return JSONResponse({"error": {"message": "wrong key"}}, 401)
            return {"object": "list", "data": [{"id": "stub-model", "object": "model"}]}

        @app.get("/version")
        def version() -> Any:
            return {"version": "stub 1"}

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Any:
            if not self.has_tokenize:
                return JSONResponse({"error": {"message": "Not Found"}}, 404)
            words = (await request.json())["prompt"].split()
            # Two tokens a word, so that a client which calibrates its words is told from one which does not.
            return {"tokens": [7 * n % 500 for n in range(2 * len(words))]}

        @app.post("/v1/completions")
        async def completions(request: Request) -> Any:
            return await self._answer(await request.json(), chat=False)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            return await self._answer(await request.json(), chat=True)

        return app

    async def _answer(self, body: dict[str, Any], chat: bool) -> Any:
        fault = self.fail(len(self.bodies))
        self.bodies.append(body)
        if fault == "500":
            return JSONResponse({"error": {"message": "broken on purpose"}}, 500)
        return StreamingResponse(self._stream(body, chat, fault), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], chat: bool, fault: str | None) -> AsyncIterator[str]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            count = body["max_tokens"] - (fault == "short")
            if chat:
                yield event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            for sent in range(0, count, self.tokens_per_chunk):
                await asyncio.sleep(self.delay)
                text = " x" * min(self.tokens_per_chunk, count - sent)
                yield event({"delta": {"content": text}} if chat else {"text": text})
                if fault == "mid-stream":
                    yield f"data: {json.dumps({'error': {'message': 'lost the engine'}})}\n\n"
                    return
                if fault == "cut":
                    return
            yield event({"delta": {}, "finish_reason": "length"} if chat else {"text": "", "finish_reason": "length"})
            if fault != "no usage":
                prompt = body["messages"][0]["content"] if chat else body["prompt"]
                tokens = 2 * len(prompt.split()) if isinstance(prompt, str) else len(prompt)
                usage = {"prompt_tokens": tokens, "completion_tokens": count}
                yield f": a comment\n\ndata: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.in_flight -= 1

    @contextmanager
    def running(self) -> Iterator[str]:
        """The URL of a server that runs in a thread of its own."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(self.app(), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            listener.close()


def event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None} | choice], 'usage': None})}\n\n"
