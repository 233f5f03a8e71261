"""docs/API.md, from the server's own tables: `python -m tools.api_document` writes it, a test holds it to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from miniserve.server.fields import (
    IGNORED,
    REFUSED,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_OF_TOKENIZER,
    Body,
    Refused,
)
from miniserve.server.messages import MessagesRequest
from miniserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationBody,
    RenderOptions,
    SamplingBody,
    StreamOptions,
    TokenizeRequest,
)
from miniserve.server.responses import ResponsesRequest

DOCUMENT = Path(__file__).parents[1] / "docs" / "API.md"

ENDPOINTS = {
    "POST /v1/completions": "Prompts and the texts that continue them; OpenAI's, as a whole or streamed.",
    "POST /v1/chat/completions": "A conversation through the model's chat template; as a whole or streamed.",
    "POST /v1/responses": "OpenAI's API for agents, over the same generation as chat; nothing is stored.",
    "POST /v1/messages": "Anthropic's, over the same generation as chat.",
    "POST /v1/messages/count_tokens": "The tokens of such a request's prompt.",
    "GET /v1/models": "The names that the model is served under, with `max_model_len`.",
    "GET /v1/models/{name}": "One of them; 404 for any other name.",
    "POST /tokenize": "A prompt or a conversation as token ids.",
    "POST /detokenize": "Token ids as text.",
    "GET /tokenizer_info": "Special tokens and chat template, for lm_eval; with `--enable-tokenizer-info`.",
    "GET /health": "200 with what runs and waits; 503 once the engine is dead.",
    "GET /ready": "The same.",
    "GET /ping": "The same; also as POST.",
    "GET /load": "`server_load`: requests that generate or wait for it.",
    "GET /metrics": "Prometheus metrics under vLLM's names, and ours as `miniserve:`; `examples/grafana.json` shows "
    "them.",
    "GET /debug/steps": "The last steps of the engine, as JSON or (`format=chrome`) as a trace.",
    "GET /debug/engine": "What the engine does now, and who holds which blocks of its KV cache; for the page.",
    "GET /version": "The version.",
    "GET /": "The page, for browsers: a chat and a view of the engine. For others where things are, as JSON.",
    "GET /openapi.json": "The API's schema.",
}

# What a field means where its name does not say it all, or where servers differ.
MEANINGS = {
    "model": "One of the served names; left out: the only model there is.",
    "stream": "Answer with server-sent events.",
    "stream_options": "Only with `stream`: `include_usage`, and with it `continuous_usage_stats`.",
    "include_usage": "A last event with the usage and no choices.",
    "continuous_usage_stats": "Usage in every event; needs `include_usage`.",
    "n": "Sequences for each prompt, up to 128. Sequence i draws with `seed` + i.",
    "max_tokens": "Completions: 16 by default, 0 only with `echo` or `prompt_logprobs`. Chat: the model's own default"
    " or else the rest of the context. More than the context holds is a 400.",
    "max_completion_tokens": "`max_tokens` under its newer name, which comes first.",
    "min_tokens": "No EOS or stop token before so many.",
    "temperature": "0 is greedy. Default: the model's generation_config.json, then 1.",
    "top_p": "Default: the model's, then 1.",
    "top_k": "0 and -1 turn it off. Default: the model's, then off.",
    "min_p": "Default: the model's, then 0.",
    "repetition_penalty": "0.01 to 100, over prompt and output. Default: the model's, then 1.",
    "presence_penalty": "-2 to 2, over the output.",
    "frequency_penalty": "-2 to 2, over the output.",
    "logit_bias": "Token ids, as strings, to -100 … 100; at most 1024.",
    "seed": "The tokens then depend on the prompt and the fields alone (in 16 bits but for near-ties). -1 is "
    "none, as in vLLM and llama.cpp.",
    "stop": "Up to 256 strings, not in the answer unless `include_stop_str_in_output`.",
    "stop_token_ids": "Up to 1024.",
    "include_stop_str_in_output": "Show the stop string or token that ended the text.",
    "ignore_eos": "Go on behind an EOS token.",
    "skip_special_tokens": "Leave special tokens out of the text; true by default.",
    "allowed_token_ids": "Draw no other tokens; 1 to 8192 ids.",
    "bad_words": "Up to 256 texts that are not generated: each as its tokens at the start of a text and after a space"
    " (at most 32). The same letters through other tokens are not found, as in vLLM.",
    "prompt_logprobs": "0 to 20 alternatives at each place of the prompt; not with `stream`, and not from the prefix "
    "cache. In chat they stand beside the choices.",
    "logprob_token_ids": "Up to 128 ids: the alternatives of each generated token are these, in this order, and the "
    "token that was drawn. Needs logprobs, whatever their number.",
    "return_token_ids": "`token_ids` in each choice; `prompt_token_ids` in each choice, in chat beside the choices; "
    "in a stream with the first event.",
    "return_tokens_as_token_ids": "Logprobs call tokens `token_id:N`, since several may have one text.",
    "truncate_prompt_tokens": "Keep so many tokens of each prompt; -1: what leaves room for `max_tokens`.",
    "truncation_side": "What is cut off: `left` (the default) or `right`.",
    "echo": "Completions: the prompt before the text, with its logprobs where those are asked for. Chat: the message "
    "that `continue_final_message` continues before the answer.",
    "priority": "Lower numbers start first; 0 by default. It orders those that wait: nobody who runs is stopped, and "
    "high numbers may wait for as long as lower ones come.",
    "cache_salt": "1 to 256 characters: only requests with the same salt share cached prefixes.",
    "prompt": "A text, token ids, or a list of either; ids are used as they are.",
    "logprobs": "Completions: 0 to 20 alternatives. Chat: whether there are any.",
    "top_logprobs": "0 to 20 alternatives; needs `logprobs`.",
    "best_of": "At least `n` (1 says nothing): so many are generated, and the n with the largest sum of log "
    "probabilities returned, the best first. Usage counts all. Not with `stream`.",
    "add_special_tokens": "Put the model's BOS and the like around a text; true for prompts, false for conversations,"
    " whose template writes them.",
    "messages": "Roles and texts; parts of type text alone.",
    "add_generation_prompt": "End with the beginning of an answer; true by default.",
    "continue_final_message": "Continue the last message instead.",
    "chat_template": "Another template; only with `--trust-request-chat-template`.",
    "chat_template_kwargs": "Variables of the template, such as `enable_thinking`. One that the template does not name "
    "is passed over with a warning, as unknown fields are (`--strict-fields` refuses it).",
    "response_format": "`text`, `json_object`, or `json_schema` with its schema. Beside tools that may be called, the "
    "answer is calls alone or text by the schema.",
    "structured_outputs": "vLLM's: one of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`.",
    "guided_json": "`structured_outputs.json` under its older name.",
    "guided_json_object": "`structured_outputs.json_object` under its older name.",
    "guided_regex": "`structured_outputs.regex` under its older name.",
    "guided_choice": "`structured_outputs.choice` under its older name.",
    "guided_grammar": "`structured_outputs.grammar` under its older name.",
    "tools": "Functions that the answer may call, up to 1024; they go through the model's chat template.",
    "tool_choice": "`none`, `auto`, `required`, or a named function.",
    "parallel_tool_calls": "Whether an answer may hold several calls.",
    "reasoning_effort": "For templates that know it. Where there is a switch alone, `none` turns reasoning off and "
    "`minimal` to `max` turn it on; without one, what the model does anyway is accepted, and the rest a 400.",
    "include_reasoning": "Whether reasoning is part of the answer; true by default.",
    "documents": "For templates that use them; refused for others.",
    "tokens": "Token ids.",
    "return_token_strs": "The tokens as the vocabulary writes them, too.",
}

# Of fields that mean something else there, or are not in chat.
MESSAGES_MEANINGS = {
    "messages": "Of `user`, `assistant` and `system`: texts, or blocks `text`, `thinking`, `redacted_thinking` "
    "(left out: it cannot be read), `tool_use`, `tool_result` (whose texts get `Error: ` before them where `is_error` "
    "is true). If the last one is the assistant's, the answer continues it.",
    "system": "A text, or blocks of type `text`; Claude Code's `x-anthropic-billing-header` is left out.",
    "tools": "With an `input_schema`; the tools that Anthropic's servers know (`web_search_…`, `bash_…`) are refused.",
    "tool_choice": "`auto`, `any`, `tool` with its `name`, `none`; `disable_parallel_tool_use`.",
    "thinking": "`enabled`, `disabled` or `adaptive` (as the model is used to, also the default). It sets the chat "
    "template's switch; where there is none, what the model does anyway is accepted and the rest a 400. "
    "`budget_tokens` is a target that nothing enforces; `display: omitted` leaves reasoning out of the answer.",
    "output_config": "`format`: a JSON schema, enforced. `effort`: for templates that know `reasoning_effort`; others "
    "pass over it, and but for `high`, the API's default, with a warning, or a 400 with `--strict-fields`.",
    "cache_control": "Without effect, here and in blocks: the prefix cache is automatic. `cache_read_input_tokens` "
    "says what it had, and `cache_creation_input_tokens` is 0.",
    "max_tokens": "Needed. More than the context holds is a 400.",
    "stop_sequences": "Up to 256 strings.",
}
RESPONSES_MEANINGS = {
    "input": "A text, or items `message`, `function_call`, `function_call_output`, `reasoning`; texts alone. If the "
    "last one is the assistant's, and its `status` is `incomplete`, the answer continues it.",
    "instructions": "A system message before the input.",
    "tools": "Of type `function`, or of type `namespace` with functions in it; the model knows those as "
    "`NAMESPACE__NAME`, and their calls say both. Built-in tools are refused. A function is `strict` only where it "
    "says so.",
    "tool_choice": "`none`, `auto`, `required`, or a named function.",
    "text": "`format`: `text`, `json_object` or `json_schema`, enforced.",
    "reasoning": "`effort`, as chat's `reasoning_effort`. Reasoning is shown as it is, as the content of `reasoning` "
    "items, never as a `summary`: `auto` and `detailed` are accepted.",
    "max_output_tokens": "Default: the model's own or else the rest of the context. More than it holds is a 400.",
    "stream_options": "`include_obfuscation: false`.",
    "store": "Nothing is stored; the answer says `store: false`.",
    "include": "`message.output_text.logprobs`, unless tools may be called: of the tokens behind the reasoning. "
    "With `reasoning.encrypted_content`, `reasoning` items hold their text in that form too, in base64 and no secret, "
    "for clients that send back nothing else. Others are refused.",
    "top_logprobs": "0 to 20 alternatives; needs `include` to have `message.output_text.logprobs`.",
    "truncation": "`disabled`.",
    "metadata": "Up to 16 texts, which come back with the answer.",
}

# vLLM 0.33's cases that a request to this server can repeat, and why the others answer otherwise.
DIFFERENCES = {
    "the last event of a choice": "It has no text, no logprobs, an empty `token_ids` and the usage of the event "
    "before; vLLM puts the end beside the last text.",
    "max_tokens beyond the context": "vLLM cuts it; here it is a 400, as its older versions and OpenAI have it.",
    "n": "Up to 128; vLLM takes 16,384.",
    "best_of": "vLLM ignores it; here it does what OpenAI says, by the sum of log probabilities.",
    "logprobs of -1, `--max-logprobs`": "Not built: at most 20, or 128 ids by `logprob_token_ids`.",
    "top_logprobs of completions": "The likeliest token first; vLLM has the drawn one first.",
    "continuous_usage_stats without include_usage": "vLLM ignores it; here it is a 400.",
    "numbers sent as texts": '`"2"` is read as 2; vLLM refuses it where it counts log probabilities.',
    "fields of answers that were not asked for": "Left out; vLLM sends `prompt_token_ids` and the like as null.",
    "structural_tag": "In its older form, with `structures` and `triggers`; the newer one, with `format`, is a 400.",
    "tools of `[]`": "As none; vLLM refuses it in chat.",
    "a call that must come beside a format": "The call comes; vLLM refuses a named one beside `structured_outputs`.",
    "reasoning and reasoning_content in one message": "The latter counts; in vLLM the former.",
    "echo in chat without a message to continue": "vLLM answers as if it were not there; here it is a 400.",
    "documents without a use, other engines' fields": "vLLM ignores them; here they are a 400.",
    "priority": "vLLM takes it with `--scheduling-policy priority` alone, and then also stops running requests; here "
    "it orders the queue always, and stops nobody.",
    "request_id in the body": "vLLM takes it; here the header `X-Request-Id` is the only way. The answer's own `id` "
    "is always new, so that two requests with one header do not meet.",
    "x-request-id, /load": "vLLM needs `--enable-request-id-headers` and `--enable-server-load-tracking`; here they "
    "are always there, the header on errors and streams, too.",
    "thinking_token_budget, use_beam_search, suffix, watermarking, vllm_xargs, kv_transfer_params": "Not built; "
    "refused by name, as are the others in the tables above, but for the values that ask for nothing.",
    "images, audio, prompt_embeds, LoRA adapters": "Not built; refused by name.",
    "`--enable-force-include-usage`, `--return-tokens-as-token-ids`": "Not built; they are fields of requests.",
    "`--enable-per-request-metrics`, a map of efforts": "Not built; `--log-format json` logs a request's times.",
    "endpoint-load-metrics-format": "A header that is passed over: `/metrics` and `/load` say it.",
    "/invocations, /v1/chat/completions/batch": "Not built: 404.",
    "/v1/responses: store, background, previous_response_id, what is at /v1/responses/ID": "Nothing is stored: 400 and "
    "404.",
    "/v1/responses: tools of type custom, mcp and the like": "There are none but functions; refused.",
    "/v1/responses: an empty input": "A 400; vLLM takes it.",
    "/v1/responses: prompt_cache_key, prompt_cache_retention, safety_identifier": "Accepted, and not sent back.",
    "/v1/messages: usage": "A stream begins with its first token, so `message_start` says how much was cached, and 1 "
    "output token. `cache_creation_input_tokens` is 0, and `input_tokens` does not count what was cached.",
    "/v1/messages: blocks of a system message": "Joined by a line break where the template takes a text; in vLLM by "
    "nothing.",
    "/v1/messages: an empty answer": "No block; vLLM sends an empty one.",
    "/v1/messages: thinking": "Any `budget_tokens`, which vLLM wants between 1024 and `max_tokens`; `display` is not "
    "`updates`.",
    "/v1/messages: system blocks tool_addition and tool_removal": "Not built; refused.",
    "/tokenizer_info": "The tokens with a part to play and the template; vLLM sends all of the tokenizer's settings.",
    "/openapi.json": "Events are described as texts.",
    "errors": "Cases that match vLLM's own words (such as `out of vocabulary`) find others, and `param` is "
    '`messages`, not `body.messages`. Without the API key vLLM answers `{"error": "Unauthorized"}`; here it is the '
    "envelope of all errors.",
    "CORS": "A preflight from an origin that is not allowed is a 405; in vLLM a 400.",
}


# Each was run against a server whose answers are scripted (`tests/clients`).
CLIENTS_SEEN = "2026-12-01"
CLIENTS = {
    "openai 2.54.0, 3.57.0": "Chat, `/v1/responses` and completions: whole, streamed, `parse` with pydantic models, "
    "functions.",
    "anthropic 2.14.0": "Messages: whole, streamed, `parse`, `count_tokens`, `tool_runner`, which asks for a thread "
    "first and, refused, sends the whole conversation.",
    "langchain-openai 1.4.3, langchain-anthropic 1.7.10": "All three APIs, whole and streamed: `bind_tools`, "
    "`with_structured_output` by its methods, errors, `ContextOverflowError` among them. ChatOpenAI drops reasoning, "
    "but of whole answers of `/v1/responses`.",
    "instructor 1.17.0": "TOOLS, TOOLS_STRICT, PARALLEL_TOOLS, JSON, JSON_SCHEMA, MD_JSON, RESPONSES_TOOLS, "
    "ANTHROPIC_TOOLS, ANTHROPIC_PARALLEL_TOOLS, ANTHROPIC_JSON: models, retries, partial answers, iterables.",
    "litellm 1.110.2": "The providers `openai`, `hosted_vllm` and `anthropic`, and `responses`, whole and streamed: "
    "functions, structured output, reasoning, its own exceptions.",
    "AI SDK: ai 6.0.326, @ai-sdk/openai 3.0.141, openai-compatible 2.0.92, anthropic 3.0.140": "`generateText`, "
    "`streamText`, `generateObject`, `streamObject`, outputs beside functions, reasoning, errors. `openai(…)` asks "
    "`/v1/responses` and refers to stored answers in its second request, unless it gets "
    "`providerOptions: {openai: {store: false}}`; `openai.chat(…)` needs nothing.",
    "Claude Code 2.1.197": "`claude -p` with `ANTHROPIC_BASE_URL` and `ANTHROPIC_MODEL`: a command run by its shell. "
    "Where the context is too short for the 32,000 tokens that it asks for, it asks again for what there is room for.",
    "Codex 0.171.0": '`codex exec` with a provider of `wire_api = "responses"`: a command run by its shell. Needs '
    '`web_search = "disabled"` in its config.toml, or it offers the model a search that there is not.',
    "langchain 1.5.2, openai-agents 0.24.0, pydantic-ai 2.68.0, openai 6.49.0 and @anthropic-ai/sdk 1.15.0 for Node": (
        "Agents and runners of functions, structured output, handoffs, streams, over the APIs that they have."
    ),
}

_CHAT_NAMES = {*ChatCompletionRequest.model_fields, *REFUSED, *IGNORED}


def render() -> str:
    """The document's text."""
    shared = _fields(GenerationBody)
    rendering = _fields(RenderOptions)
    return "\n".join([
        "<!-- Written by `python -m tools.api_document`. -->",
        "# The server's API",
        "",
        "OpenAI's, with what other servers have added to it. Every optional field takes null, which means leaving it "
        "out. What cannot be served is refused with a 400 that names the field; nothing that would change the answer "
        "is ignored.",
        "",
        "## Endpoints",
        *_table(("endpoint", "what it is"), ENDPOINTS.items()),
        "",
        "With `--api-key`, `/v1`, `/debug` and the tokenizer's paths ask for it (`Authorization: Bearer KEY` or "
        "`x-api-key`). Every answer has an `x-request-id`: the client's (1 to 128 printable ASCII characters) or a new "
        "one. Errors are OpenAI's `{\"error\": {\"message\", \"type\", \"param\", \"code\"}}`.",
        "",
        "A client of HTTP/1.0 gets streams without chunks, up to the connection's end. One that closes its half of the "
        "connection behind the request (`shutdown(SHUT_WR)`, `nc -N`) gets no answer: a client that has left looks "
        "just the same, and what nobody waits for is not generated. Keep it open until the answer is there.",
        "",
        "## Fields of completions and chat",
        *_field_table(shared),
        "",
        "### Of `/v1/completions` alone",
        *_field_table(_without(_fields(CompletionRequest), shared)),
        "",
        "### Of `/v1/chat/completions` alone",
        *_field_table(_without(_fields(ChatCompletionRequest), shared | rendering)),
        "",
        "### Of chat and `/tokenize`: how a conversation becomes text",
        *_field_table(rendering),
        "",
        "### Of `/v1/messages`",
        "`/v1/messages/count_tokens` takes the same fields, and needs no `max_tokens`. `anthropic-version` and "
        "`anthropic-beta` change nothing. Errors are Anthropic's: `{\"type\": \"error\", \"error\": {\"type\", "
        "\"message\"}, \"request_id\"}`, with a code, if there is one, as the error's `details.error_code`. The "
        "arguments of a call that was cut, or are no JSON, are `{\"INVALID_JSON\": text}`.",
        *_field_table(_fields(MessagesRequest), MEANINGS | MESSAGES_MEANINGS),
        "",
        "### Of `/v1/responses`",
        "What says how to sample is as in chat: " + _names(_fields(SamplingBody)) + ".",
        *_field_table(_without(_fields(ResponsesRequest), _fields(SamplingBody)), MEANINGS | RESPONSES_MEANINGS),
        "",
        "### Of `stream_options`",
        *_field_table(_fields(StreamOptions)),
        "",
        "### Of `/tokenize` and `/detokenize` alone",
        *_field_table(_without(_fields(TokenizeRequest) | _fields(DetokenizeRequest), rendering)),
        "",
        "## Fields without effect",
        "Accepted, as they are hints or for the client's own records: " + _names(IGNORED) + ".",
        "",
        "`do_sample` is compared with `temperature`: false needs 0, true more than 0. Names that nobody here knows are "
        "passed over with one warning each in the log (`--strict-fields` refuses them), unless they are one or two "
        "letters away from a known one.",
        "",
        "## Fields that are refused",
        "Unless null or one of the values that ask for nothing. Other names of `max_tokens` are also taken where "
        "`max_tokens` is given and no larger, as lm_eval sends both.",
        *_refused(REFUSED),
        "",
        "### In `/v1/completions` also",
        *_refused(_without(REFUSED_IN_COMPLETIONS, REFUSED)),
        "",
        "### In `/v1/chat/completions` also",
        *_refused(_without(REFUSED_IN_CHAT, REFUSED)),
        "",
        "### In `/v1/messages`",
        "What chat takes or refuses and the table above has not, and:",
        *_refused(_without(MessagesRequest.refused, _CHAT_NAMES)),
        "",
        "### In `/v1/responses`",
        "What chat takes or refuses and the table above has not, and:",
        *_refused(_without(ResponsesRequest.refused, _CHAT_NAMES)),
        "",
        "### In `/tokenize` and `/detokenize` only",
        *_refused(REFUSED_OF_TOKENIZER),
        "",
        "## Clients",
        f"Seen to work, unmodified, on {CLIENTS_SEEN}: calls, their results and answers in every way to write calls "
        "that the server knows; the last three rows by hand, and the last one in Hermes' way alone. For the others "
        "[CONTRIBUTING.md](../CONTRIBUTING.md) has the command.",
        *_table(("client", "what was seen"), CLIENTS.items()),
        "",
        "## Differences from vLLM",
        "vLLM 0.33.0 has 412 cases, parameters counted, that requests to this server can repeat: of chat, completions, "
        "responses, messages, tools, reasoning, structured outputs, tokenizing and the server itself. 327 answer as "
        "they check, 37 are refused by name, and 48 differ. Those, by what they are about:",
        *_table(("what", "how it differs"), DIFFERENCES.items()),
        "",
    ])  # fmt: skip


def _fields(body: type[Body]) -> dict[str, str]:
    """The type of each field, in words."""
    schema = body.model_json_schema()
    return {name: _type(each, schema.get("$defs", {})) for name, each in schema["properties"].items()}


def _type(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(each, defs) for each in schema["anyOf"] if each.get("type") != "null"))
    if "enum" in schema:
        return " or ".join(f"`{each}`" for each in schema["enum"])
    kind = schema.get("type", "object")
    if kind != "array" or not schema.get("items"):
        return str(kind)
    items = _type(schema["items"], defs)
    plural = items.replace("list ", "lists ", 1) if items.startswith(("list ", "`")) else f"{items}s"
    return f"list of {plural}"


def _without(fields: Mapping[str, Any], others: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in set(others)}


def _field_table(fields: Mapping[str, str], meanings: Mapping[str, str] = MEANINGS) -> list[str]:
    return _table(("field", "type", "meaning"), ((f"`{name}`", kind, meanings[name]) for name, kind in fields.items()))


def _refused(refused: Refused) -> list[str]:
    rows = []
    for name, (neutrals, remedy, _) in refused.items():
        values = " ".join(f"`{msgspec.json.encode(value).decode()}`" for value in neutrals)
        rows.append((f"`{name}`", values, remedy))
    return _table(("field", "asks for nothing", "instead"), rows)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["", _row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
