"""The official client against a real server: what a user's program sees."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from server_fakes import EOS, FakeEngine, RunningServer, greedy, running_server, tokenizer

from miniserve.core import Completion, SamplingParams
from miniserve.server.completions import CompletionAnswer
from miniserve.server.protocol import CompletionRequest

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def text_after(prompt: list[int], num_tokens: int, rank: int = 0) -> str:
    return tokenizer().decode(greedy(prompt, num_tokens, rank))


def test_a_completion_of_a_text(client: OpenAI) -> None:
    ids = tokenizer().encode(PROMPT)
    answer = client.completions.create(model="tiny/fake", prompt=PROMPT, max_tokens=5, temperature=0)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "tiny/fake"
    assert answer.choices[0].text == text_after(ids, 5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        len(ids), 5, len(ids) + 5,
    )  # fmt: skip


def test_sixteen_tokens_are_the_default_of_completions_and_the_rest_of_the_context_that_of_chat(
    client: OpenAI, server: RunningServer
) -> None:
    answer = client.completions.create(model="tiny/fake", prompt=PROMPT)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    chat = client.chat.completions.create(model="tiny/fake", messages=MESSAGES)  # type: ignore[arg-type]
    assert chat.usage is not None
    assert chat.usage.total_tokens == server.engine.info.max_model_len
    assert chat.choices[0].finish_reason == "length"


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_choices_are_ordered_prompt_by_prompt(client: OpenAI, num_prompts: int) -> None:
    prompts = ["one", "two and more", "three"][:num_prompts]
    answer = client.completions.create(model="tiny/fake", prompt=prompts, n=3, max_tokens=4)
    assert [choice.index for choice in answer.choices] == list(range(3 * num_prompts))
    ids = [tokenizer().encode(prompt) for prompt in prompts]
    expected = [text_after(prompt, 4, rank) for prompt in ids for rank in range(3)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert answer.usage.completion_tokens == 12 * num_prompts


def test_choices_are_ordered_whatever_comes_first() -> None:
    body = CompletionRequest(prompt=["a", "b"], n=2)
    answer = CompletionAnswer("m", tokenizer(), body.prompt, [[1], [2]], SamplingParams(n=2), body)
    for number, index in ((1, 1), (0, 1), (1, 0), (0, 0)):
        answer.add(number, Completion(index=index, text=f"{number}{index}", token_ids=[1]))
    assert [choice["text"] for choice in answer.whole()["choices"]] == ["00", "01", "10", "11"]


def test_cached_tokens_are_reported_once_for_each_prompt(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny/fake", prompt=[[5] * 20, [5] * 3], n=2, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


def test_a_stream_adds_up_to_the_whole(client: OpenAI) -> None:
    events = client.completions.create(model="tiny/fake", prompt=[PROMPT, "and"], n=2, max_tokens=6, stream=True)
    texts, reasons = [""] * 4, [0] * 4
    for event in events:
        (choice,) = event.choices
        texts[choice.index] += choice.text
        reasons[choice.index] += choice.finish_reason is not None
    whole = client.completions.create(model="tiny/fake", prompt=[PROMPT, "and"], n=2, max_tokens=6)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [1] * 4


def test_chat_goes_through_the_template_once(client: OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(model="tiny/fake", messages=MESSAGES, max_completion_tokens=4)  # type: ignore[arg-type]
    prompt, _ = server.engine.seen[-1]
    assert tokenizer().decode(prompt, False) == "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n"
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == text_after(prompt, 4)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_chat_streams_role_text_and_usage(client: OpenAI) -> None:
    events = list(
        client.chat.completions.create(
            model="tiny/fake",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert events[0].choices[0].delta.role == "assistant"
    assert events[0].choices[0].delta.content == ""
    assert all(event.usage is None for event in events[:-1])
    assert events[-1].choices == []
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 4
    reasons = [choice.finish_reason for event in events for choice in event.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    whole = client.chat.completions.create(model="tiny/fake", messages=MESSAGES, max_tokens=4)  # type: ignore[arg-type]
    text = "".join(choice.delta.content or "" for event in events for choice in event.choices)
    assert text == whole.choices[0].message.content


def test_chat_logprobs_hold_the_chosen_token_and_its_bytes(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny/fake",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 3
    for token in content:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob == max(top.logprob for top in token.top_logprobs)
        assert bytes(token.bytes or []).decode() == token.token


def test_the_chat_helper_of_the_client_streams(client: OpenAI) -> None:
    with (
        pytest.raises(openai.LengthFinishReasonError),
        client.chat.completions.stream(model="tiny/fake", messages=MESSAGES, max_tokens=3) as stream,  # type: ignore[arg-type]
    ):
        stream.get_final_completion()


def test_the_async_client_runs_many_at_once(server: RunningServer) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=server.url, api_key="x") as client:
            answers = await asyncio.gather(
                *(client.completions.create(model="tiny/fake", prompt=f"{i} apples", max_tokens=5) for i in range(20))
            )
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [text_after(tokenizer().encode(f"{i} apples"), 5) for i in range(20)]


def test_eos_and_stop_words_and_stop_tokens_end_a_text() -> None:
    script = [*tokenizer().encode("Hello there. Question: no"), EOS]
    with running_server(FakeEngine(script=script)) as server:
        client = OpenAI(base_url=server.url, api_key="x")
        whole = client.completions.create(model="tiny/fake", prompt="x", max_tokens=200).choices[0]
        assert (whole.text, whole.finish_reason) == ("Hello there. Question: no", "stop")
        assert whole.model_dump()["stop_reason"] is None
        word = client.completions.create(model="tiny/fake", prompt="x", max_tokens=200, stop=["\n", "Question:"])
        assert (word.choices[0].text, word.choices[0].finish_reason) == ("Hello there. ", "stop")
        assert word.choices[0].model_dump()["stop_reason"] == "Question:"
        one = client.completions.create(model="tiny/fake", prompt="x", max_tokens=200, stop="there")
        assert one.choices[0].text == "Hello "
        token = client.completions.create(
            model="tiny/fake", prompt="x", max_tokens=200, extra_body={"stop_token_ids": [script[1]]}
        )
        assert token.choices[0].text == tokenizer().decode(script[:1])
        assert token.choices[0].model_dump()["stop_reason"] == script[1]
        many = client.completions.create(
            model="tiny/fake", prompt="x", max_tokens=200, stop=["a1", "b2", "c3", "d4", "e5", "there"]
        )
        assert many.choices[0].text == "Hello "


def test_errors_are_the_clients_typed_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.completions.create(model="tiny/fake", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is 256 tokens.* 300 input"):
        client.completions.create(model="tiny/fake", prompt=[7] * 300)


def test_a_key_is_asked_for() -> None:
    with running_server(api_keys=("secret", "other")) as server:
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=server.url, api_key="wrong").models.list()
        for key in ("secret", "other"):
            assert [m.id for m in OpenAI(base_url=server.url, api_key=key).models.list()] == ["tiny/fake"]


def test_models_are_listed_and_found(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny/fake"
    assert model.model_dump()["max_model_len"] == 256
    assert client.models.retrieve("tiny/fake").id == "tiny/fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tiny/other")


def test_every_served_name_works_and_the_first_is_echoed() -> None:
    with running_server(served_model_names=("first", "second")) as server:
        client = OpenAI(base_url=server.url, api_key="x")
        assert [model.id for model in client.models.list()] == ["first", "second"]
        assert client.completions.create(model="second", prompt="x", max_tokens=1).model == "first"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="tiny/fake", prompt="x")
