"""Grammars by themselves and, over the built-in models, what is answered under them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine_real import Setup, make_engine, make_matchers, small_model, tokens
from grammar_cases import MODELS, answer_all, fault, regexes, schemas
from llguidance import LLMatcher, LLTokenizer

from miniserve.core import FinishReason, Grammar, InvalidRequest, Request, RequestOutput, SamplingParams
from miniserve.engine.grammar import GrammarError, Matchers, Words, check_grammar, new_matcher
from miniserve.engine.tokenizer import Tokenizer
from miniserve.llm import LLM

TOOL = {
    "begin": '<tool>{"name": "f", "arguments": ',
    "schema": {
        "type": "object",
        "properties": {"q": {"type": "boolean"}},
        "required": ["q"],
        "additionalProperties": False,
    },
    "end": "}</tool>",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODELS[0])


@pytest.fixture(scope="module", params=[0, 1], ids=["qwen3", "deepseek"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # One of them with the loop and the guesses that are not the default on a CPU.
        options = {"speculative": "ngram:3"} if request.param else {"async_scheduling": True}
        yield LLM(MODELS[request.param], dtype="float32", max_num_seqs=64, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_finished_answer_satisfies_its_grammar(llm: LLM, temperature: float) -> None:
    cases = [*schemas(7, 30), *regexes(8, 24)]
    counts, faults = answer_all(llm, cases, temperature=temperature, seed=1, max_tokens=60)
    assert not faults, faults
    assert counts["stop"] > 30


def test_the_judge_of_answers_does_judge() -> None:
    assert fault({"type": "integer", "maximum": 3}, "3") is None
    assert fault({"type": "integer", "maximum": 3}, "4") and fault({"type": "integer"}, "x") and fault("a+", "b")


def accepts(grammar: Grammar, text: str, tokenizer: Tokenizer) -> bool:
    """Whether the text, byte by byte, is all of an output."""
    matcher = new_matcher(grammar, tokenizer, LLTokenizer("byte"))
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("rest", "good", "bad"),
    [
        (
            {},
            ["", "any <tool> text", "{T}", "a{T}b{T}", "<b>"],
            ["{B}x", "{B}{}", '{B}{"q": 1}}', "{T}{B}"],
        ),
        ({"at_least_one": True}, ["{T}", "{T}a{T}"], ["", "a{T}"]),
        ({"stop_after_first": True}, ["", "a{T}"], ["{T}a", "{T}{T}"]),
        ({"at_least_one": True, "stop_after_first": True}, ["{T}"], ["", "{T}{T}", "a{T}"]),
        ({"triggers": ["<too"]}, ["<to b", "{T}x"], ["<too b"]),
    ],
)
def test_tags(rest: dict[str, object], good: list[str], bad: list[str], tokenizer: Tokenizer) -> None:
    begin = str(TOOL["begin"])
    call = f'{begin}{{"q": true}}{TOOL["end"]}'
    grammar = Grammar("structural_tag", json.dumps({"tags": [TOOL], **rest}))
    for text in good:
        assert accepts(grammar, text.replace("{T}", call).replace("{B}", begin), tokenizer), text
    for text in bad:
        assert not accepts(grammar, text.replace("{T}", call).replace("{B}", begin), tokenizer), text


def test_special_tokens_of_tags_are_their_own_tokens(tokenizer: Tokenizer) -> None:
    """A model writes them as one token each, whose text no other tokens may spell."""
    token = tokenizer.special_token_id("<|im_start|>")
    tag = {"begin": "<|im_start|>f ", "schema": {"type": "integer"}, "end": ""}
    text = json.dumps({"tags": [tag], "at_least_one": True, "stop_after_first": True})
    matchers = Matchers(lambda: Words(tokenizer, 2048, [2047]))
    matcher = matchers.start(SamplingParams(grammar=Grammar("structural_tag", text))).result()
    bits = matchers.masks([(0, matcher)]).bits
    assert [i for i in range(2048) if bits[i // 8] >> i % 8 & 1] == [token]


def test_a_grammar_is_compiled_once_for_sequences_that_go_their_own_ways(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Grammar] = []

    def spy(grammar: Grammar, *rest: Any) -> LLMatcher:
        compiled.append(grammar)
        return new_matcher(grammar, *rest)

    monkeypatch.setattr("miniserve.engine.grammar.new_matcher", spy)
    grammar = Grammar("regex", "a*b|c{3}")
    matchers = Matchers(lambda: Words(tokenizer, 2048, [2047]))
    ways = [tokenizer.encode(text, False) for text in ("b", "ccc", "aab")]
    found = [matchers.start(SamplingParams(grammar=grammar)).result() for _ in ways]
    for step in range(4):
        for matcher, way in zip(found, ways, strict=True):
            if step < len(way):
                assert matchers.masks([(0, matcher)]).bits[way[step] // 8] >> way[step] % 8 & 1
                matcher.accept(way[step])
    assert [matcher.ended for matcher in found] == [True] * 3
    fresh = matchers.start(SamplingParams(grammar=grammar, min_tokens=9)).result()
    assert matchers.masks([(0, fresh)]).bits[ways[0][0] // 8] >> ways[0][0] % 8 & 1
    assert compiled == [grammar]


def test_masks_do_not_depend_on_who_makes_them(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, or from the first or the third on llguidance's."""
    times = iter([*[0.0] * 6, 0.0, 9.0, *[0.0] * 3, 9.0])  # the start's, and one before each mask
    monkeypatch.setattr("miniserve.engine.grammar.perf_counter", lambda: next(times))
    matchers = Matchers(lambda: Words(tokenizer, 2048, [2047]))
    regexes = ("[a-z]+", "a|b", "[0-9]{3}", "[a-z]+", ".*")
    found = [matchers.start(SamplingParams(grammar=Grammar("regex", regex))).result() for regex in regexes]
    masks = [matchers.masks(list(enumerate(found))) for _ in range(3)]
    assert masks[0] == masks[1] == masks[2] and next(times, None) is None
    assert len({bytes(masks[0].bits[i * 256 : (i + 1) * 256]) for i in range(5)}) == 4


@pytest.mark.parametrize("text", ["^a|b$", r"\d\s\w", r"[\w/]+", "(?i)ab", ".", "é{2}"])
def test_regexes_mean_what_they_mean_to_python(text: str, tokenizer: Tokenizer) -> None:
    for output in ("a", "b", "ab", "AB", "1 a", "٣ a", "1\x85a", "w/", "é", "éé", "\n", ""):
        assert accepts(Grammar("regex", text), output, tokenizer) == bool(re.fullmatch(text, output, re.ASCII))


def test_white_space_of_json_is_bounded(tokenizer: Tokenizer) -> None:
    grammar = Grammar("json_schema", '{"type": "array", "items": {"type": "integer"}}')
    value = [1, 22]
    for indent in (None, 2, 4):
        assert accepts(grammar, json.dumps(value, indent=indent), tokenizer)
    assert not accepts(grammar, "[1, " + " " * 40 + "22]", tokenizer)


def test_tokens_in_grammars_go_by_their_ids(tokenizer: Tokenizer) -> None:
    matchers = Matchers(lambda: Words(tokenizer, 2048, [2047]))
    for text, allowed in (("<[300]>", [300]), ("<[300-302,9]>", [9, 300, 301, 302]), ("<[9000]>", None)):
        grammar = Grammar("grammar", f"start: {text}")
        check_grammar(grammar, tokenizer)
        future = matchers.start(SamplingParams(grammar=grammar))
        if allowed is None:
            with pytest.raises(GrammarError, match=r"cannot be followed: .*9000"):
                future.result()
        else:
            bits = matchers.masks([(0, future.result())]).bits
            assert [i for i in range(2048) if bits[i // 8] >> i % 8 & 1] == allowed


def test_the_offline_api_refuses_before_it_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="uniqueItems") as caught:
        llm.generate("x", SamplingParams(grammar=Grammar("json_schema", '{"type": "array", "uniqueItems": true}')))
    assert caught.value.param == "grammar"
    with pytest.raises(InvalidRequest, match="grammar"):
        SamplingParams(grammar="a+")  # type: ignore[arg-type]


def test_n_answers_cut_answers_and_tags(llm: LLM) -> None:
    tags = Grammar("structural_tag", json.dumps({"tags": [TOOL], "at_least_one": True, "stop_after_first": True}))
    asked = [SamplingParams(grammar=tags, max_tokens=150, n=3, seed=2), SamplingParams(grammar=tags, max_tokens=4)]
    called, cut = llm.generate(["Once"] * 2, asked)
    for output in called.outputs:
        arguments = output.text.removeprefix(TOOL["begin"]).removesuffix(TOOL["end"])  # type: ignore[arg-type]
        jsonschema.validate(json.loads(arguments), TOOL["schema"])
        assert output.finish_reason is FinishReason.STOP and output.stop_reason is None
    assert cut.outputs[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_that_fails_ends_its_request_alone(tmp_path: Path, overlap: bool) -> None:
    """In the engine nobody has checked it, or it gets beyond its limits on its way."""
    engine, scheduler, _ = make_engine(small_model(tmp_path, "Qwen3ForCausalLM", 4), Setup(overlap=overlap), [7])
    many = Grammar("regex", "((a{0,100}){0,100}){0,100}")
    for name, grammar in (("bad", Grammar("regex", "(")), ("good", None), ("many", many)):
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, grammar=grammar)
        engine.add(Request(request_id=name, prompt_token_ids=[1, 2], params=params))
    ends = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is not None:
                ends[output.request_id] = output
    assert ends["bad"].finish_reason is FinishReason.REFUSED and "unclosed" in (ends["bad"].error or "")
    assert ends["good"].finish_reason is FinishReason.LENGTH
    assert ends["many"].finish_reason in (FinishReason.REFUSED, FinishReason.LENGTH)
    assert scheduler.stats().kv_cache_usage == 0.0


@pytest.mark.parametrize("overlap", [False, True])
def test_what_else_is_asked_for_may_leave_a_grammar_no_token(tmp_path: Path, overlap: bool) -> None:
    """Then it is said, unless the output may end there; a row without one goes on."""
    engine, _, _ = make_engine(small_model(tmp_path, "Qwen3ForCausalLM", 4), Setup(overlap=overlap), [7])
    a, b, c = b"abc"
    cases: dict[str, tuple[str, dict[str, Any], list[int] | None]] = {
        "from the first": ("dd", {"allowed_token_ids": (a,)}, None),
        "on the way": ("aab", {"allowed_token_ids": (a, c)}, None),
        "it may end": ("a{2}b?", {"allowed_token_ids": (a, c)}, [a, a]),
        "a bad word": ("abc", {"bad_words": ((b,),)}, None),
        "a long bad word": ("ab(c|a)", {"bad_words": ((a, b, c), (b, b, a))}, [a, b, a]),
        "a longer one": ("abab", {"bad_words": ((a, b, a),)}, None),
        "an early stop": ("aaa", {"stop_token_ids": (a,), "min_tokens": 2}, None),
        "a bias": ("a", {"logit_bias": {a: -100.0}}, [a]),
    }
    for name, (regex, fields, _) in cases.items():
        params = SamplingParams(temperature=0.0, grammar=Grammar("regex", regex), **fields)
        engine.add(Request(request_id=name, prompt_token_ids=[1, 2], params=params))
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    engine.add(Request(request_id="free", prompt_token_ids=[1, 2], params=params))
    found: dict[str, list[RequestOutput]] = {name: [] for name in [*cases, "free"]}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
    assert len(tokens(found["free"])) == 9
    for name, (_, _, want) in cases.items():
        last = found[name][-1]
        if want is None:
            assert last.finish_reason is FinishReason.REFUSED and "leave none" in (last.error or ""), name
        else:
            assert (tokens(found[name]), last.finish_reason) == (want, FinishReason.STOP), name


@pytest.mark.parametrize(("overlap", "small"), [(False, 8192), (False, 0), (True, 8192), (True, 0)])
def test_when_masks_are_made(overlap: bool, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the launch of their step, or, if they are large and the results before it are in, in a thread beside it.
    They are the same, and so are the tokens."""
    monkeypatch.setattr("miniserve.engine.grammar._SMALL", small)
    engine, _, _ = make_engine(small_model(tmp_path, "Qwen3ForCausalLM", 4), Setup(overlap=overlap), [7])
    seen: list[str] = []

    def spy(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def watched(*args: Any) -> Any:
            is_ours = threading.current_thread() is threading.main_thread()
            seen.append(name if is_ours else f"{name} in a thread")
            return method(*args)

        monkeypatch.setattr(owner, name, watched)

    for name in ("launch", "sample", "collect"):
        spy(engine._runner, name)
    spy(engine._matchers, "masks")
    ticks = count()
    monkeypatch.setattr(engine.log, "clock", lambda: float(next(ticks)))
    params = SamplingParams(temperature=0.0, max_tokens=3, grammar=Grammar("regex", "[a-c]*"), ignore_eos=True)
    for name in "01":
        engine.add(Request(request_id=name, prompt_token_ids=[1, 2], params=params))
    while not all(future.done() for _, future in engine._matched.values()):
        time.sleep(0.001)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    if overlap:
        assert seen == ["launch", "masks", "sample", *["launch", "collect", "masks", "sample"] * 2, "collect"]
    elif small:
        assert seen == ["launch", "masks", "sample", "collect"] * 3
    else:
        assert [name for name in seen if "masks" not in name] == ["launch", "sample", "collect"] * 3
        assert seen.count("masks in a thread") == 3 and "masks" not in seen
    assert [record.launch for record in engine.log.records()] == [2.0] * 3, "a tick each for launch and sample"
    found = [tokens([output for output in outputs if output.request_id == name]) for name in "01"]
    assert found[0] == found[1] and len(found[0]) == 3 and set(found[0]) <= set(b"abc")


def test_without_an_eos_a_grammar_ends_where_nothing_may_follow(tmp_path: Path) -> None:
    engine, _, _ = make_engine(small_model(tmp_path, "Qwen3ForCausalLM", 4), Setup())
    params = SamplingParams(temperature=0.0, max_tokens=60, grammar=Grammar("regex", "[0-9]{3}a?b"))
    engine.add(Request(request_id="0", prompt_token_ids=[1, 2], params=params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert re.fullmatch("[0-9]{3}a?b", bytes(tokens(outputs)).decode()) and outputs[-1].grammar_ended
    assert make_matchers(101, frozenset()) is make_matchers(101, frozenset())


def test_aborted_while_its_matcher_is_made(tmp_path: Path) -> None:
    engine, _, _ = make_engine(small_model(tmp_path, "Qwen3ForCausalLM", 4), Setup(), [7])
    params = SamplingParams(grammar=Grammar("choice", json.dumps([f"{n}" for n in range(9000)])))
    engine.add(Request(request_id="0", prompt_token_ids=[1, 2], params=params))
    assert engine.has_work
    engine.abort(["0"])
    assert not engine.has_work


def test_the_process_that_checks_needs_no_torch() -> None:
    code = "import sys, miniserve.engine.grammar; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
