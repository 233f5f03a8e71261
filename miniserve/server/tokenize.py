"""`/tokenize` and `/detokenize`, as vLLM has them; open without a key, since lm_eval calls them without one."""

from __future__ import annotations

from fastapi import FastAPI, Response

from miniserve.core import InvalidRequest
from miniserve.server import responses
from miniserve.server.chat import render
from miniserve.server.errors import json_response
from miniserve.server.protocol import DetokenizeRequest, TokenizeRequest
from miniserve.server.service import Service


def install(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=responses.Tokenized)
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        service.fields.check(body.extras, {"tools": ([],)})
        ids = await _ids(service, body)
        answer: responses.Tokenized = {
            "count": len(ids),
            "max_model_len": service.engine.info.max_model_len,
            "tokens": ids,
            "token_strs": [service.engine.tokenizer.token_piece(i) for i in ids] if body.return_token_strs else None,
        }
        return json_response(answer)

    @app.post("/detokenize", response_model=responses.Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        vocab_size = service.engine.info.vocab_size
        if any(not 0 <= token_id < vocab_size for token_id in body.tokens):
            raise InvalidRequest(f"tokens holds an id outside the vocabulary (0 to {vocab_size - 1}).", "tokens")
        return json_response({"prompt": service.engine.tokenizer.decode(body.tokens, False)})

    if service.config.enable_tokenizer_info:

        @app.get("/tokenizer_info", response_model=responses.TokenizerInfo)
        async def tokenizer_info() -> Response:
            return json_response(service.engine.tokenizer.info())


async def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is None and body.prompt is not None:
        (ids,) = await service.encode([body.prompt], body.add_special_tokens is not False)
        return ids
    if body.messages is None or body.prompt is not None:
        raise InvalidRequest("Exactly one of prompt and messages is needed.", "prompt")
    return await render(service, body.messages, body)
