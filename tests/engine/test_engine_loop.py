from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_fakes import FACTORY, TINY, FakeRunner, expected_tokens

from miniserve.config import EngineConfig, SchedulerConfig
from miniserve.core import InvalidRequest, Request, SamplingParams, UserError
from miniserve.engine.build import build_engine
from miniserve.engine.grammar import Matchers
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.models.generation_config import load_generation_defaults
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.step_cost import StepCost, StepShape


def make(overlap: bool, num_blocks: int = 12, **runner: float) -> tuple[EngineLoop, FakeRunner]:
    config = SchedulerConfig(
        num_blocks=num_blocks, block_size=4, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=40
    )
    fake = FakeRunner(block_size=4, **runner)  # type: ignore[arg-type]
    return EngineLoop(Scheduler(config), fake, StepLog(None, 4), overlap=overlap), fake


def request(name: str, prompt: list[int], max_tokens: int) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=max_tokens))


def run(loop: EngineLoop) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while loop.has_work:
        for output in loop.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_every_request_gets_its_tokens_also_when_blocks_run_out(overlap: bool) -> None:
    loop, fake = make(overlap)
    prompts = {f"r{index}": [100 * index + position for position in range(3 + index)] for index in range(6)}
    for name, prompt in prompts.items():
        loop.add(request(name, prompt, 20))
    assert run(loop) == {name: expected_tokens(prompt, 20) for name, prompt in prompts.items()}
    assert loop.stats.num_preemptions > 0
    assert loop.stats.num_running == loop.stats.num_waiting == 0
    assert fake.max_in_flight == (2 if overlap else 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_aborted_request_brings_nothing_more_and_frees_its_blocks(overlap: bool) -> None:
    loop, _ = make(overlap)
    loop.add(request("a", [1, 2, 3], 30))
    loop.add(request("b", [4, 5], 9))
    for _ in range(4):
        loop.step()
    loop.abort(["a", "unknown"])
    assert set(run(loop)) == {"b"}
    assert loop.stats.kv_cache_usage == 0.0
    assert loop.step() == []


def test_a_refusal_leaves_the_loop_as_it_was() -> None:
    loop, _ = make(False)
    with pytest.raises(InvalidRequest, match="maximum context length"):
        loop.add(request("long", [1] * 40, 1))
    assert not loop.has_work


@pytest.mark.parametrize("overlap", [False, True])
def test_errors_of_the_device_propagate(overlap: bool) -> None:
    loop, _ = make(overlap, fail_at_step=3)
    loop.add(request("a", [1, 2, 3], 30))
    with pytest.raises(RuntimeError, match="the fake device broke"):
        run(loop)


def test_a_scheduler_without_a_step_for_its_requests_is_an_error_and_no_endless_loop() -> None:
    class Stuck(Scheduler):
        def schedule(self) -> None:
            return None

    config = SchedulerConfig(num_blocks=4, block_size=4, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=40)
    for overlap in (False, True):
        loop = EngineLoop(Stuck(config), FakeRunner(), StepLog(None, 4), overlap=overlap)
        loop.add(request("a", [1], 1))
        with pytest.raises(RuntimeError, match="no step to run"):
            loop.step()


def test_an_engine_is_built_from_the_configuration_and_knows_all_eos_tokens() -> None:
    stages = []
    loop, info = build_engine(
        EngineConfig(block_size=4, async_scheduling=True),
        TINY,
        "fake",
        lambda *progress: stages.append(progress),
        FACTORY,
    )
    assert info.eos_token_ids == [2045, 2047]
    assert stages == [("weights", 0, 2), ("weights", 1, 2), ("weights", 2, 2)]
    loop.add(request("a", [7, 2047, 8], 10))
    assert run(loop) == {"a": [7, 2047]}


def test_a_large_vocabulary_is_ready_for_grammars_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    prepare = Matchers.prepare
    monkeypatch.setattr(Matchers, "prepare", lambda self: prepared.append(prepare(self)) or prepared[-1])
    for large in (1 << 20, 0):
        monkeypatch.setattr("miniserve.engine.build._LARGE", large)
        build_engine(EngineConfig(block_size=4), TINY, "fake", None, FACTORY)
        assert [future.done() and future.exception() for future in prepared] == ([] if large else [None])


def write(path: Path, **files: object) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{name}.json").write_text(text)
    return path


def test_generation_defaults_come_from_all_of_the_models_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        generation_config={
            "temperature": 0.6,
            "top_k": 20.0,
            "do_sample": False,
            "eos_token_id": [3, 4],
            "max_length": 9,
        },
        config={"eos_token_id": 5, "text_config": {"eos_token_id": 6}},
        tokenizer_config={"eos_token": {"content": "</s>"}},
        tokenizer={"added_tokens": [{"id": 7, "content": "</s>"}, {"id": 8, "content": "<s>"}]},
    )
    defaults = load_generation_defaults(tmp_path, "auto")
    assert defaults.sampling == {"temperature": 0.6, "top_k": 20} and type(defaults.sampling["top_k"]) is int
    assert defaults.eos_token_ids == {3, 4, 5, 6, 7}
    assert load_generation_defaults(tmp_path, "none").sampling == {}
    assert load_generation_defaults(tmp_path, "none").eos_token_ids == {3, 4, 5, 6, 7}


@pytest.mark.parametrize(
    "setting", ['"temperature": "hot"', '"top_p": 7', '"top_k": NaN', '"max_new_tokens": -4', '"min_p": true']
)
def test_generation_defaults_that_no_request_may_have_are_refused(tmp_path: Path, setting: str) -> None:
    write(tmp_path, generation_config="{" + setting + "}")
    with pytest.raises(UserError, match=r"generation_config.json sets .* --generation-config none"):
        load_generation_defaults(tmp_path, "auto")
    assert load_generation_defaults(tmp_path, "none").sampling == {}


def test_the_eos_may_stand_in_the_tokenizers_settings(tmp_path: Path) -> None:
    write(
        tmp_path, tokenizer_config={"eos_token": "<e>", "added_tokens_decoder": {"11": {"content": "<e>"}}}, config={}
    )
    assert load_generation_defaults(tmp_path).eos_token_ids == {11}


@pytest.mark.parametrize("token", ["<e>", {"__type": "AddedToken", "content": "<e>", "lstrip": False}])
@pytest.mark.parametrize(
    ("file", "others"),
    [
        ("tokenizer_config", {}),
        ("special_tokens_map", {}),
        ("special_tokens_map", {"tokenizer_config": {"eos_token": "<not this>"}}),
        ("special_tokens_map", {"tokenizer_config": {"added_tokens_decoder": {}}}),
    ],
)
@pytest.mark.parametrize(
    "vocabulary",
    [
        {"added_tokens": [{"id": 2, "content": "<e>"}]},
        {"model": {"vocab": {"<s>": 1, "<e>": 2}}},
        {"added_tokens": [], "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["<e>", -1.5]]}},
    ],
)
def test_the_eos_is_the_tokenizers_wherever_it_is_named(
    tmp_path: Path, token: object, file: str, others: dict[str, object], vocabulary: object
) -> None:
    write(tmp_path, tokenizer=vocabulary, **{**others, file: {"eos_token": token}})
    assert load_generation_defaults(tmp_path).eos_token_ids == {2}


def test_a_model_that_says_nothing_has_no_defaults(tmp_path: Path) -> None:
    defaults = load_generation_defaults(tmp_path)
    assert not defaults.sampling and not defaults.eos_token_ids


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "JSON object"),
        ({"temperature": "hot"}, "temperature"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
)
def test_broken_generation_configs_are_the_users_error(tmp_path: Path, content: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_generation_defaults(write(tmp_path, generation_config=content))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_scheduler_learns_what_each_step_took(overlap: bool) -> None:
    seen: list[tuple[int, int, float]] = []

    class Noted(StepCost):
        def observe(self, shape: StepShape, seconds: float) -> None:
            seen.append((shape.rows, shape.tokens, seconds))

    config = SchedulerConfig(num_blocks=12, block_size=4, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=40)
    loop = EngineLoop(
        Scheduler(config, Noted(2.0)), FakeRunner(block_size=4, step_seconds=0.002), StepLog(None, 4), overlap=overlap
    )
    loop.add(request("a", [1, 2, 3], 4))
    loop.step()
    loop.add(request("b", [4, 5, 6, 7, 8], 2))
    run(loop)
    assert [(rows, tokens) for rows, tokens, _ in seen] == [(0, 3), (1, 5), (2, 0), (1, 0)]
    assert all(seconds >= 0.002 for *_, seconds in seen)
