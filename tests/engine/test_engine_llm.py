"""The offline API, with a runner without a model (and once with the built-in one)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fakes import FACTORY, TINY, expected_tokens

import miniserve
from miniserve.core import FinishReason, InvalidRequest, SamplingParams, UserError
from miniserve.llm import LLM


def make(**config: object) -> LLM:
    return LLM(str(TINY), runner_factory=FACTORY, **config)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "overlapped"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return make(async_scheduling=request.param, block_size=4, max_num_batched_tokens=16)


def test_texts_and_ids_one_or_many(llm: LLM) -> None:
    text = " one two three"
    ids = llm.tokenizer.encode(text)
    params = SamplingParams(max_tokens=7)
    for prompts in (text, [text], ids, [ids], [text, ids]):
        generations = llm.generate(prompts, params)  # type: ignore[arg-type]
        assert len(generations) == (2 if prompts == [text, ids] else 1)
        for generation in generations:
            (output,) = generation.outputs
            assert generation.prompt_token_ids == ids
            assert output.token_ids == expected_tokens(ids, 7)
            assert output.text == llm.tokenizer.decode(output.token_ids)
            assert output.finish_reason is FinishReason.LENGTH and output.stop_reason is None
    assert llm.generate(text, params)[0].prompt == text
    assert llm.generate(ids, params)[0].prompt is None
    assert llm.generate([], params) == []


def test_many_prompts_keep_their_order_and_their_parameters(llm: LLM) -> None:
    prompts = [[300 + index, *range(400, 400 + index % 7)] for index in range(40)]
    params = [SamplingParams(max_tokens=1 + index % 20) for index in range(40)]
    for prompt, each, generation in zip(prompts, params, llm.generate(prompts, params), strict=True):
        assert generation.outputs[0].token_ids == expected_tokens(prompt, each.max_tokens or 0)
    assert llm.stats.num_running == llm.stats.num_waiting == 0
    assert llm.stats.kv_cache_usage == 0.0


def test_n_stop_strings_and_logprobs(llm: LLM) -> None:
    prompt = llm.tokenizer.encode(" one two three")
    params = SamplingParams(n=3, seed=0, max_tokens=20, stop=(" one tw",), logprobs=0, prompt_logprobs=0)
    (generation,) = llm.generate(prompt, params)
    assert [output.index for output in generation.outputs] == [0, 1, 2]
    for output in generation.outputs:
        assert output.token_ids == expected_tokens(prompt, len(output.token_ids), seed=output.index)
        text = llm.tokenizer.decode(output.token_ids)
        assert output.text == text[: text.index(" one tw")]
        assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, " one tw")
        assert [entry.token_id for entry in output.logprobs or ()] == output.token_ids
    assert len(generation.prompt_logprobs or ()) == len(prompt)
    assert llm.generate(prompt, SamplingParams())[0].outputs[0].logprobs is None


def test_the_prompt_alone_can_be_scored(llm: LLM) -> None:
    (generation,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert [entry and entry.token_id for entry in generation.prompt_logprobs or ()] == [None, 6, 7]
    assert generation.outputs[0].token_ids == [] and generation.outputs[0].finish_reason is FinishReason.LENGTH


def test_eos_ends_the_text(llm: LLM) -> None:
    (generation,) = llm.generate([700, 2047, 701], SamplingParams(max_tokens=9))
    assert generation.outputs[0].token_ids == [700, 2047]
    assert generation.outputs[0].text == llm.tokenizer.decode([700])
    assert (generation.outputs[0].finish_reason, generation.outputs[0].stop_reason) == (FinishReason.STOP, None)


def test_the_models_sampling_defaults_are_used_where_none_are_given(llm: LLM) -> None:
    params = llm.default_sampling_params()
    assert (params.temperature, params.top_p, params.max_tokens) == (0.7, 0.95, 16)
    assert llm.default_sampling_params(temperature=0.0).greedy
    assert len(llm.generate([5, 6, 7])[0].outputs[0].token_ids) == 16
    assert make(generation_config="none").default_sampling_params() == SamplingParams()


def test_chats(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = llm.tokenizer.encode(llm.tokenizer.chat_template.render(messages), add_special_tokens=False)
    (generation,) = llm.chat(messages, SamplingParams(max_tokens=4, ignore_eos=True))
    assert generation.prompt_token_ids == ids
    assert generation.prompt == llm.tokenizer.decode(ids, skip_special_tokens=False)
    assert generation.outputs[0].token_ids == expected_tokens(ids, 4)
    assert len(llm.chat([messages, messages], SamplingParams(max_tokens=4))) == 2
    # The fake repeats the prompt, whose end-of-turn token ends the answer long before the context is full.
    eos = ids.index(2047)
    assert llm.chat(messages)[0].outputs[0].token_ids == ids[: eos + 1]
    assert llm.chat([]) == []
    with pytest.raises(InvalidRequest, match="refuses"):
        llm.chat(messages, chat_template="{{ raise_exception('no') }}")
    template = "{{ tools | tojson }}{{ mood }}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": "now", "strict": True}}]
    asked: Any = {"chat_template": template, "tools": tools, "chat_template_kwargs": {"mood": "!"}}
    (generation,) = llm.chat(messages, SamplingParams(max_tokens=1), **asked)
    assert generation.prompt == '[{"type": "function", "function": {"name": "now"}}]!Hi'
    with caplog.at_level("WARNING"):
        llm.chat(messages, SamplingParams(max_tokens=1), chat_template_kwargs={"enable_thinking": False})
    assert "'enable_thinking'" in caplog.text
    with pytest.raises(TypeError):
        llm.chat(messages, temperature=0.0)  # type: ignore[call-arg]
    parts = ({"type": "image_url", "image_url": "x"}, {"type": "text"}, {"type": "text", "text": None}, "x")
    for wrong in (None, messages[0], *([{"role": "user", "content": [part]}] for part in parts)):
        with pytest.raises(InvalidRequest, match="messages"):
            llm.chat(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", "3"), ("temperature", None), ("seed", 1.5),
        ("top_k", 2.5), ("ignore_eos", "yes"), ("stop", [5]), ("stop", None), ("stop_token_ids", 5),
        ("logit_bias", {"5": 1}), ("logprobs", True),
    ],
)  # fmt: skip
def test_sampling_parameters_of_a_wrong_type_are_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: Expected .*, got") as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name


def test_one_stop_string_is_not_its_characters() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "params", "sentence"),
    [
        ([[5], [1] * 200], SamplingParams(), "Prompt 1: This model's maximum context length is 128"),
        ([5000], SamplingParams(), "token id 5000"),
        ([[]], SamplingParams(), "at least one token"),
        ("", SamplingParams(), "at least one token"),
        ([[5], [6]], [SamplingParams()], "2 prompts came with 1 sampling_params"),
        ([[5], [6.5]], SamplingParams(), "prompts must be"),
        ([None], SamplingParams(), "prompts must be"),
        (None, SamplingParams(), "prompts must be"),
        ((text for text in ["a"]), SamplingParams(), "prompts must be"),
        ({"prompt": "a"}, SamplingParams(), "prompts must be"),
        (b"abc", SamplingParams(), "prompts must be"),
        ([True, False], SamplingParams(), "prompts must be"),
        ("a", {"max_tokens": 2}, "sampling_params must be"),
        (["a"], [None], "sampling_params must be"),
    ],
)
def test_nothing_runs_where_one_request_is_refused(llm: LLM, prompts: object, params: object, sentence: str) -> None:
    steps = llm.stats.num_steps
    with pytest.raises(InvalidRequest, match=sentence):
        llm.generate(prompts, params)  # type: ignore[arg-type]
    assert llm.stats.num_steps == steps


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupt_waits_for_the_step_and_leaves_the_engine_usable(overlap: bool) -> None:
    llm = make(async_scheduling=overlap)
    runner = llm._loop._runner
    launch = runner.launch

    def interrupt_in_step_5(plan: object) -> object:
        if llm.stats.num_steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return launch(plan)  # type: ignore[arg-type]

    runner.launch = interrupt_in_step_5  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=100))
    assert llm.stats.num_running == 0 and llm.stats.num_steps == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate([5, 6], SamplingParams(max_tokens=3))[0].outputs[0].token_ids == [5, 6, 5]


def test_it_works_in_another_thread(llm: LLM) -> None:
    results: list[list[int]] = []

    def work() -> None:
        results.append(llm.generate([5, 6], SamplingParams(max_tokens=3))[0].outputs[0].token_ids)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [[5, 6, 5]]


def test_a_broken_device_is_reported_now_and_later() -> None:
    llm = make()
    llm._loop._runner.fail_at_step = 3  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the fake device broke"):
        llm.generate([5, 6], SamplingParams(max_tokens=9))
    with pytest.raises(RuntimeError, match="failed before"):
        llm.generate([5, 6], SamplingParams(max_tokens=9))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="--dtype"):
        make(dtype="float4")
    for option, value in (
        ("max_model_len", "8k"), ("block_size", "16"), ("enable_prefix_caching", "no"), ("max_num_seqs", True),
        ("seed", 2**64), ("log_level", "loud"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=option.replace("_", ".")):
            make(**{option: value})
    with pytest.raises(TypeError, match="no_such_option"):
        make(no_such_option=1)
    with pytest.raises(UserError):
        LLM("no/such-directory/anywhere", runner_factory=FACTORY)


def test_no_bar_where_stderr_is_no_terminal(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([5, 6], SamplingParams(max_tokens=3))
    captured = capfd.readouterr()
    assert captured.err == "" and captured.out == ""


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, miniserve; miniserve.SamplingParams; miniserve.LLM; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = miniserve.nothing_of_that_name


def test_the_built_in_model_generates() -> None:
    torch.set_num_threads(1)
    llm = miniserve.LLM(dtype="float32", device="cpu", max_model_len=64, max_num_seqs=4, kv_cache_memory=8 << 20)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    alone = [llm.generate(prompt, params)[0].outputs[0] for prompt in ("One day", "The cat")]
    together = [generation.outputs[0] for generation in llm.generate(["One day", "The cat"], params)]
    assert [output.token_ids for output in alone] == [output.token_ids for output in together]
    assert all(len(output.token_ids) == 8 and output.logprobs for output in alone)
    assert Path(llm.info.model_path) == TINY
