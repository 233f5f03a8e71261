"""Log probabilities in OpenAI's shapes, and as lm_eval reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import EOS, FakeEngine, RunningServer, bigram_logprobs, greedy, running_server, tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from miniserve.core import SamplingParams, TokenLogprobs
from miniserve.engine.detokenizer import Detokenizer
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.chat import chat_logprobs
from miniserve.server.completions import CompletionLogprobsWriter

TEXT = "Zoë paid 3 € for 😀 smiles."


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


def complete(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    response = httpx.post(f"{server.url}/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["Once upon a time", [11, 12, 13]])
def test_the_four_arrays_are_parallel(server: RunningServer, k: int, echo: bool, prompt: object) -> None:
    (choice,) = complete(server, prompt=prompt, logprobs=k, echo=echo, max_tokens=3)
    ids = tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
    assert isinstance(ids, list)
    generated = greedy(ids, 3)
    listed = (ids if echo else []) + generated
    arrays = choice["logprobs"]
    assert set(arrays) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(array) for array in arrays.values()} == {len(listed)}
    assert arrays["tokens"] == [tokenizer().token_str(token) for token in listed]
    pairs = list(pairwise(ids + generated))[-len(listed) + echo :]
    expected: list[float | None] = [float(bigram_logprobs(a)[b]) for a, b in pairs]
    assert arrays["token_logprobs"] == ([None] if echo else []) + expected
    for position, (logprob, top) in enumerate(zip(arrays["token_logprobs"], arrays["top_logprobs"], strict=True)):
        if echo and position == 0:
            assert logprob is top is None
            continue
        assert top[arrays["tokens"][position]] == logprob  # the very same float
        assert 1 <= len(top) <= k + 1
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_without_logprobs_there_are_none(server: RunningServer) -> None:
    assert complete(server, prompt="a", echo=True, max_tokens=2)[0]["logprobs"] is None
    assert complete(server, prompt="a", logprobs=None, max_tokens=2)[0]["logprobs"] is None


def test_lm_eval_slices_its_continuation(server: RunningServer) -> None:
    """lm_eval sends context + continuation as ids and sums `token_logprobs[len(context):-1]`."""
    contexts = [[5, 6, 7], [8], [EOS, 9, 10, 11]]
    continuations = [[100, 101], [102, 103, 104], greedy([11], 2)]
    body = {
        "model": "tiny/fake",
        "prompt": [a + b for a, b in zip(contexts, continuations, strict=True)],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = complete(server, **body)
    for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        choice = next(choice for choice in choices if choice["index"] == number)
        logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        assert len(logprobs) == len(continuation)
        whole = context + continuation
        expected = [float(bigram_logprobs(a)[b]) for a, b in pairwise(whole)][len(context) - 1 :]
        assert sum(logprobs) == pytest.approx(sum(expected), abs=1e-9)
        is_greedy = all(logprob == max(top.values()) for logprob, top in zip(logprobs, tops, strict=True))
        assert is_greedy == (number == 2)


def test_token_ids_reach_the_engine_verbatim(server: RunningServer) -> None:
    complete(server, prompt=[[EOS, 5, EOS], [6]], max_tokens=1)
    assert [prompt for prompt, _ in server.engine.seen[-2:]] == [[EOS, 5, EOS], [6]]
    complete(server, prompt="Hi<|im_end|>", max_tokens=1)
    assert server.engine.seen[-1][0] == [*tokenizer().encode("Hi"), EOS]


def test_offsets_point_into_the_text(server: RunningServer) -> None:
    ids = tokenizer().encode(TEXT)
    for prompt in (TEXT, ids):
        (choice,) = complete(server, prompt=prompt, logprobs=0, echo=True, max_tokens=4)
        text, arrays = choice["text"], choice["logprobs"]
        assert text.startswith(TEXT)
        check_offsets(text, arrays)
        assert arrays["text_offset"][len(ids)] == len(TEXT)


def check_offsets(text: str, arrays: Any) -> None:
    assert arrays["text_offset"][0] == 0
    assert arrays["text_offset"] == sorted(arrays["text_offset"])
    for token, offset in zip(arrays["tokens"], arrays["text_offset"], strict=True):
        if "\N{REPLACEMENT CHARACTER}" not in token:
            assert text[offset : offset + len(token)] == token


def test_offsets_of_a_stream_go_on_from_event_to_event() -> None:
    script = [*tokenizer().encode(TEXT), EOS]
    with running_server(FakeEngine(script=script)) as server:
        body = {"prompt": "x", "logprobs": 0, "max_tokens": 99}
        (whole,) = complete(server, **body)
        check_offsets(whole["text"], {name: array[:-1] for name, array in whole["logprobs"].items()})
        assert whole["text"] == TEXT
        assert whole["logprobs"]["tokens"][-1] == "<|im_end|>"  # lm_eval counts on the last token's entry
        lines = httpx.post(f"{server.url}/completions", json={**body, "stream": True}).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        arrays = [event["choices"][0]["logprobs"] for event in events]
        assert arrays.pop() is None, "the end has no token"
        offsets = [offset for array in arrays for offset in array["text_offset"]]
        assert offsets == whole["logprobs"]["text_offset"]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2047), min_size=1, max_size=12), st.integers(1, 11))
def test_the_offsets_of_any_ids_are_the_lengths_of_what_is_decoded_before(ids: list[int], cut: int) -> None:
    """Where no character is cut in two, an offset is the length of the text of the tokens before."""
    table = tokenizer()
    text = table.decode(ids, False)
    writer = CompletionLogprobsWriter(table, True, ids)
    arrays = writer.prompt([None] * len(ids), text)
    assert writer.generated([TokenLogprobs(65, -1.0, 1, [], [])])["text_offset"] == [len(text)]
    before = table.decode(ids[:cut], False)
    if cut < len(ids) and "\N{REPLACEMENT CHARACTER}" not in text:
        whole_characters = before.rstrip("\N{REPLACEMENT CHARACTER}")
        assert arrays["text_offset"][cut] == len(whole_characters)


def test_special_tokens_that_the_text_hides_take_no_room() -> None:
    ids = [*tokenizer().encode("ab"), EOS, *tokenizer().encode("cd")]
    entries = [TokenLogprobs(token, -1.0, 1, [], []) for token in ids]
    hidden = CompletionLogprobsWriter(tokenizer(), True, []).generated(entries)
    shown = CompletionLogprobsWriter(tokenizer(), False, []).generated(entries)
    at = ids.index(EOS)
    assert hidden["text_offset"][at] == hidden["text_offset"][at + 1] == 2
    assert shown["text_offset"][at + 1] == 2 + len("<|im_end|>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2's: a BOS before the text and a space before its first word, neither of them shown; and raw bytes."""
    pieces = ["<s>", "▁Hello", "▁you", "<0x0A>", "▁", "▁the"]
    backend = Backend(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>"])
    path = tmp_path_factory.mktemp("llama")
    backend.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


@pytest.mark.parametrize(("text", "offsets"), [("Hello you", [0, 0, 5]), ("<s> Hello you", [0, 3, 9])])
def test_a_hidden_start_takes_no_room(llama: Tokenizer, text: str, offsets: list[int]) -> None:
    assert CompletionLogprobsWriter(llama, True, [0, 1, 2]).prompt([None] * 3, text)["text_offset"] == offsets


@pytest.mark.parametrize(
    ("prompt", "generated", "text"),
    [([0, 1, 3], [4, 5, 3, 5], "  the\n the"), ([0], [5, 5], "the the"), ([], [4, 5], " the")],
)
def test_offsets_are_those_of_the_text_that_is_shown(
    llama: Tokenizer, prompt: list[int], generated: list[int], text: str
) -> None:
    assert Detokenizer(llama, SamplingParams(), prompt).push(generated).text == text
    entries = [TokenLogprobs(token_id, -1.0, 1, [], []) for token_id in generated]
    offsets = CompletionLogprobsWriter(llama, True, prompt).generated(entries)["text_offset"]
    ends = [*offsets[1:], len(text)]
    shown = [text[start:end] for start, end in zip(offsets, ends, strict=True)]
    assert "".join(shown) == text
    assert [piece.lstrip(" ") for piece in shown] == [llama.token_str(i).lstrip(" ") for i in generated]


def test_of_tokens_with_the_same_text_the_likeliest_counts() -> None:
    table = tokenizer()
    halves = [token for token in range(2048) if table.token_str(token) == "\N{REPLACEMENT CHARACTER}"][:3]
    first, second, chosen = halves
    found = TokenLogprobs(chosen, -3.0, 3, [first, second], [-1.0, -2.0])
    arrays = CompletionLogprobsWriter(table, True, []).generated([found])
    assert arrays["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -1.0}]
    assert arrays["token_logprobs"] == [-3.0]
    (entry,) = chat_logprobs(table, [found], table.token_str)["content"]
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-1.0, -2.0]
    assert bytes(entry["bytes"]) == table.token_bytes(chosen)
    assert entry["token"] == "\N{REPLACEMENT CHARACTER}"


def test_chat_logprobs_without_alternatives(server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "logprobs": True}
    (choice,) = httpx.post(f"{server.url}/chat/completions", json=body).json()["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[], []]
    body["logprobs"] = False
    (choice,) = httpx.post(f"{server.url}/chat/completions", json=body).json()["choices"]
    assert choice["logprobs"] is None
