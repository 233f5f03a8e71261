"""`/tokenize` and `/detokenize`, as vLLM has them. Texts need not fit into the context, but have limits, too."""

from __future__ import annotations

from fastapi import FastAPI, Response

from miniserve.core import InvalidRequest
from miniserve.engine.validation import check_vocabulary
from miniserve.server import responses
from miniserve.server.chat import render
from miniserve.server.errors import json_response
from miniserve.server.protocol import DetokenizeRequest, TokenizeRequest
from miniserve.server.service import Service

_MAX_CHARS = 1_048_576
_MAX_IDS = 262_144


def install(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=responses.Tokenized)
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        service.fields.check(body, {"tools": ([],)})
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
        service.fields.check(body, {})
        if len(body.tokens) > _MAX_IDS:
            raise InvalidRequest(f"tokens holds {len(body.tokens)} ids; at most {_MAX_IDS} are taken.", "tokens")
        check_vocabulary(body.tokens, "tokens", service.engine.info.vocab_size)
        decode = service.engine.tokenizer.decode
        text = await service.off_loop(len(body.tokens), lambda: decode(body.tokens, False))
        return json_response({"prompt": text})

    if service.config.enable_tokenizer_info:

        @app.get("/tokenizer_info", response_model=responses.TokenizerInfo)
        async def tokenizer_info() -> Response:
            return json_response(service.engine.tokenizer.info())


async def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is None and body.prompt is not None:
        (ids,) = await service.encode([body.prompt], body.add_special_tokens is not False, _MAX_CHARS)
        return ids
    if body.messages is None or body.prompt is not None:
        raise InvalidRequest("Exactly one of prompt and messages is needed.", "prompt")
    return await render(service, body.messages, body, _MAX_CHARS)
