from __future__ import annotations

import pytest
from engine_fakes import TINY, fake_info

from miniserve.config import EngineConfig
from miniserve.core import (
    Completion,
    FinishReason,
    InvalidRequest,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from miniserve.engine.output import CompletionStream, OutputAssembler, extend, fan_out, join
from miniserve.engine.tokenizer import Tokenizer
from miniserve.scheduler.limits import check_request

TOKENIZER = Tokenizer(TINY)
LOGPROBS = [None, TokenLogprobs(1, -0.5, 1, [1], [-0.5])]


def request(prompt: list[int], params: SamplingParams) -> Request:
    return Request(request_id="", prompt_token_ids=prompt, params=params)


def push(assembler: OutputAssembler, index: int = 0, **fields: object) -> tuple[list[Completion], bool]:
    return assembler.push(index, RequestOutput(request_id="r", **fields))  # type: ignore[arg-type]


def test_n_sequences_become_n_requests_with_their_own_seeds() -> None:
    params = SamplingParams(n=3, seed=2**63 - 2, prompt_logprobs=1, stop=("x",))
    requests = fan_out("r", request([1, 2], params))
    assert len({request.request_id for request in requests}) == 3
    assert [request.params.seed for request in requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [request.params.prompt_logprobs for request in requests] == [1, None, None]
    assert all(request.params.n == 1 and request.params.stop == ("x",) for request in requests)
    assert all(request.prompt_token_ids == [1, 2] for request in requests)


def test_one_sequence_keeps_the_requests_id_and_no_seed_stays_none() -> None:
    assert [request.request_id for request in fan_out("r", request([1], SamplingParams()))] == ["r"]
    assert [request.params.seed for request in fan_out("r", request([1], SamplingParams(n=2)))] == [None, None]


def test_the_last_delta_has_the_engines_finish_reason() -> None:
    ids = TOKENIZER.encode("one two")
    assembler = OutputAssembler(TOKENIZER, [1], SamplingParams())
    deltas, met_stop = push(assembler, new_token_ids=ids, finish_reason=FinishReason.LENGTH, num_cached_tokens=16)
    assert not met_stop and assembler.finished
    (delta,) = deltas
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("one two", ids, FinishReason.LENGTH)
    assert delta.num_cached_tokens == 16 and delta.stop_reason is None


@pytest.mark.parametrize("include", [False, True])
def test_the_token_that_stops_is_in_the_ids_but_not_in_the_text_unless_asked_for(include: bool) -> None:
    ids = TOKENIZER.encode("one two")
    params = SamplingParams(stop_token_ids=(ids[-1],), include_stop_str_in_output=include)
    assembler = OutputAssembler(TOKENIZER, [1], params)
    (delta,), _ = push(assembler, new_token_ids=ids, finish_reason=FinishReason.STOP, stop_token_id=ids[-1])
    assert delta.token_ids == ids
    assert delta.text == (TOKENIZER.decode(ids) if include else TOKENIZER.decode(ids[:-1]))
    assert delta.stop_reason == ids[-1] and delta.finish_reason is FinishReason.STOP


def test_eos_is_not_shown_even_where_special_tokens_are() -> None:
    ids = [*TOKENIZER.encode("one"), *TOKENIZER.encode("<|im_end|>")]
    assembler = OutputAssembler(TOKENIZER, [1], SamplingParams(skip_special_tokens=False))
    (delta,), _ = push(assembler, new_token_ids=ids, finish_reason=FinishReason.STOP)
    assert (delta.text, delta.stop_reason) == ("one", None)


def test_a_stop_string_ends_the_sequence_and_asks_for_an_abort() -> None:
    ids = TOKENIZER.encode("one two three four")
    assembler = OutputAssembler(TOKENIZER, [1], SamplingParams(stop=("two",), logprobs=0))
    logprobs = [TokenLogprobs(token_id, -1.0, 1, [], []) for token_id in ids]
    (delta,), met_stop = push(assembler, new_token_ids=ids, logprobs=logprobs)
    assert met_stop and assembler.finished
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("one ", FinishReason.STOP, "two")
    assert len(delta.token_ids) == len(delta.logprobs or ()) < len(ids)
    assert push(assembler, new_token_ids=[1]) == ([], False)


def test_a_stop_string_at_the_very_last_token_wins_over_length() -> None:
    assembler = OutputAssembler(TOKENIZER, [1], SamplingParams(stop=("two",)))
    ids = TOKENIZER.encode("one two")
    (delta,), met_stop = push(assembler, new_token_ids=ids, finish_reason=FinishReason.LENGTH)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("one ", FinishReason.STOP, "two")
    assert not met_stop, "the engine has ended it already"


def test_text_held_back_comes_with_the_last_delta() -> None:
    assembler = OutputAssembler(TOKENIZER, [1], SamplingParams(stop=("two!",)))
    (first,), _ = push(assembler, new_token_ids=TOKENIZER.encode("one two"))
    (last,), _ = push(assembler, finish_reason=FinishReason.LENGTH)
    assert (first.text, last.text) == ("one ", "two")


def test_prompt_logprobs_reach_every_sequences_first_delta_whatever_comes_first() -> None:
    assembler = OutputAssembler(TOKENIZER, [1, 2], SamplingParams(n=3, prompt_logprobs=0))
    one, two = TOKENIZER.encode("one two")[0], TOKENIZER.encode("one two")[1]
    assert push(assembler, 1, new_token_ids=[one]) == ([], False)
    assert push(assembler, 1, new_token_ids=[two]) == ([], False)
    deltas, _ = push(assembler, 0, new_token_ids=[one], prompt_logprobs=LOGPROBS)
    assert [(delta.index, delta.token_ids, delta.prompt_logprobs) for delta in deltas] == [
        (0, [one], LOGPROBS),
        (1, [one, two], LOGPROBS),
    ]
    (delta,), _ = push(assembler, 2, new_token_ids=[one])
    assert delta.prompt_logprobs == LOGPROBS
    (delta,), _ = push(assembler, 2, new_token_ids=[one])
    assert delta.prompt_logprobs is None
    (delta,), _ = push(assembler, 1, new_token_ids=[one])
    assert delta.prompt_logprobs is None


def test_an_end_from_outside_reaches_every_unfinished_sequence_once() -> None:
    assembler = OutputAssembler(TOKENIZER, [1], SamplingParams(n=3))
    push(assembler, 1, new_token_ids=[5], finish_reason=FinishReason.LENGTH)
    deltas = assembler.fail("it broke")
    assert [(delta.index, delta.finish_reason, delta.error) for delta in deltas] == [
        (0, FinishReason.ERROR, "it broke"),
        (2, FinishReason.ERROR, "it broke"),
    ]
    assert assembler.finished and assembler.fail("again") == []


def test_merging_keeps_everything_in_order() -> None:
    entry = LOGPROBS[1]
    assert entry is not None
    first = Completion(index=0, text="a", token_ids=[1], logprobs=[entry], prompt_logprobs=LOGPROBS)
    second = Completion(
        index=0, text="b", token_ids=[2], logprobs=[entry], finish_reason=FinishReason.STOP, stop_reason="x"
    )
    merged = join((first, second))
    assert (merged.text, merged.token_ids, merged.logprobs) == ("ab", [1, 2], [entry, entry])
    assert merged.prompt_logprobs == LOGPROBS
    assert (merged.finish_reason, merged.stop_reason) == (FinishReason.STOP, "x")
    assert first.token_ids == [1] and second.token_ids == [2]


@pytest.mark.parametrize(
    ("stop", "last"),
    [
        ((), {"finish_reason": FinishReason.LENGTH}),
        ((), {"finish_reason": FinishReason.STOP, "stop_token_id": 7}),
        ((), {"finish_reason": FinishReason.STOP, "grammar_ended": True}),
        ((), {"finish_reason": FinishReason.ERROR, "error": "it broke", "new_token_ids": [], "logprobs": None}),
        (("ee f",), {"finish_reason": FinishReason.LENGTH}),
        (("not there", "five"), {"finish_reason": FinishReason.LENGTH}),
    ],
)
def test_outputs_taken_together_say_what_they_say_one_by_one(stop: tuple[str, ...], last: dict[str, object]) -> None:
    ids = TOKENIZER.encode("one two three four é five")

    def said() -> list[RequestOutput]:
        each = [{"new_token_ids": [i], "logprobs": [TokenLogprobs(i, -i / 8, 1, [], [])]} for i in ids]
        each[0] |= {"prompt_logprobs": LOGPROBS}
        each[-1] |= {**last, "num_cached_tokens": 16, "num_preemptions": 2}
        return [RequestOutput(request_id="r", first_scheduled_time=1.5, **fields) for fields in each]  # type: ignore[arg-type]

    def read(outputs: list[RequestOutput]) -> tuple[Completion, bool]:
        assembler = OutputAssembler(TOKENIZER, [1], SamplingParams(stop=stop, logprobs=0, prompt_logprobs=0))
        pushed = [assembler.push(0, output) for output in outputs]
        return join([delta for deltas, _ in pushed for delta in deltas]), any(met for _, met in pushed)

    expected, met_stop = read(said())
    for cut in range(1, len(ids) + 1):
        first, *others = said()
        outputs = [first]
        for number, output in enumerate(others, 1):
            if number == cut:
                outputs.append(output)
            else:
                extend(outputs[-1], output)
        got, met = read(outputs)
        assert met <= met_stop, "one that ended by itself meanwhile is not aborted"
        if got.stop_reason == "ee f":  # the figures are those of the last output that was read
            got.num_cached_tokens, got.num_preemptions = expected.num_cached_tokens, expected.num_preemptions
        assert got == expected


INFO = fake_info(EngineConfig(max_model_len=20), num_blocks=64)


def test_max_tokens_is_settled_to_what_fits() -> None:
    assert check_request(request([1] * 5, SamplingParams(max_tokens=None)), INFO).params.max_tokens == 15
    assert check_request(request([1] * 5, SamplingParams(max_tokens=99)), INFO).params.max_tokens == 15
    assert check_request(request([1] * 19, SamplingParams(max_tokens=1)), INFO).params.max_tokens == 1
    assert check_request(request([1] * 20, SamplingParams(max_tokens=0)), INFO).params.max_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "params", "param", "sentence"),
    [
        ([], {}, "prompt", "at least one token"),
        (
            [1] * 20,
            {},
            "input_tokens",
            "length is 20 tokens. However, your prompt contains 20 input tokens",
        ),
        ([1] * 21, {"max_tokens": 0}, "input_tokens", "maximum context length is 20 tokens"),
        ([1, 2048], {}, "prompt", "token id 2048"),
        ([-1], {}, "prompt", "token id -1"),
        ([1], {"stop_token_ids": (4000,)}, "stop_token_ids", "token id 4000"),
        ([1], {"logit_bias": {4000: 1.0}}, "logit_bias", "token id 4000"),
        ([1], {"logprobs": 21}, "logprobs", "between 0 and 20, not 21"),
        ([1], {"prompt_logprobs": 21}, "prompt_logprobs", "between 0 and 20, not 21"),
        ([1] * 15, {"min_tokens": 6, "max_tokens": 9}, "min_tokens", "at most 5 tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    prompt: list[int], params: dict[str, object], param: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as refused:
        check_request(request(prompt, SamplingParams(**params)), INFO)  # type: ignore[arg-type]
    assert refused.value.param == param


def test_a_stream_joins_what_nobody_takes_and_keeps_each_sequences_order() -> None:
    taken: list[Completion] = []
    stream = CompletionStream(lambda: None)

    def offer(delta: Completion) -> bool:
        taken.append(delta)
        return len(taken) <= 2

    stream.offer = offer
    deltas = [Completion(index=number % 2, text=f"{number} ", token_ids=[number]) for number in range(400)]
    for delta in deltas:
        stream.put(delta)
    assert taken == deltas[:3], "behind one that waits, none is offered"
    for index in (0, 1):
        joined = stream.get()
        assert joined is not None and joined.index == index
        assert joined.token_ids == list(range(index + 2, 400, 2))
        assert joined.text == "".join(f"{number} " for number in joined.token_ids)
    assert stream.get() is None
    stream.put(deltas[5])
    assert taken[3:] == [deltas[5]] and stream.get() is deltas[5]
