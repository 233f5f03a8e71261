"""The offline API: `LLM("model").generate(prompts, SamplingParams(...))`, with the engine in this process."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from miniserve.config import EngineConfig
from miniserve.core import (
    Completion,
    InvalidRequest,
    Request,
    RequestOutput,
    SamplingParams,
    SchedulerStats,
    StepTotals,
    TokenLogprobs,
    UserError,
)
from miniserve.engine.build import RUNNER_FACTORY, build_engine
from miniserve.engine.chat_template import is_list, names_variable
from miniserve.engine.grammar import check_grammar
from miniserve.engine.output import OutputAssembler, fan_out, join
from miniserve.engine.tokenizer import Tokenizer, load_tokenizer
from miniserve.models.generation_config import load_generation_defaults
from miniserve.models.hub import locate
from miniserve.parallel.child import on_signals
from miniserve.scheduler.limits import check_request

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(slots=True, kw_only=True)
class Generation:
    """What became of one prompt: `SamplingParams.n` completions. `prompt` is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] | None
    num_cached_tokens: int


class LLM:
    """A model loaded into this process, to generate with batches of prompts. Not to be shared between threads.

    `model` is a directory, a hub id or None for the built-in model; `options` are the other fields of `EngineConfig`
    (dtype, max_model_len, block_size, …). Raises `UserError` for what the user can mend. `progress` shows bars while
    loading, where stderr is a terminal.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        progress: bool = True,
        runner_factory: str = RUNNER_FACTORY,
        **options: Any,
    ) -> None:
        config = EngineConfig(model=None if model is None else os.fspath(model), **options)
        if config.data_parallel_size > 1:
            raise UserError("data_parallel_size is for a server; an LLM is one engine, so make several, in processes.")
        with _bars(progress) as bars:
            tasks: dict[str, TaskID] = {}

            def report(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(f"Loading {stage}")
                bars.update(tasks[stage], completed=done, total=total)

            source = locate(
                config.model, config.revision, weights=config.load_format != "dummy", notify=bars.console.print
            )
            self.tokenizer = load_tokenizer(source.path, config.load_format)
            self.generation_defaults = load_generation_defaults(source.path, config.generation_config)
            self._loop, self.info = build_engine(config, source.path, source.name, report, runner_factory)
        self._serial = count()
        self._broken: str | None = None

    @property
    def stats(self) -> SchedulerStats:
        return self._loop.stats

    @property
    def step_totals(self) -> StepTotals:
        """What all steps so far took and read."""
        return copy(self._loop.log.totals)

    def default_sampling_params(self, **values: Any) -> SamplingParams:
        """What `generate` uses where it is given none: the model's own sampling defaults, `values` over them."""
        defaults = dict(self.generation_defaults.sampling)
        if "max_new_tokens" in defaults:
            defaults["max_tokens"] = defaults.pop("max_new_tokens")
        return SamplingParams(**{**defaults, **values})

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Generation]:
        """Generate for each prompt; the results come in the prompts' order.

        A prompt is text or token ids, which are used as they are. `sampling_params` are for all prompts, or one for
        each. `progress` shows a bar where stderr is a terminal. Raises `InvalidRequest` before anything runs. After a
        KeyboardInterrupt the object can be used again.
        """
        tokenized = [
            (prompt, self.tokenizer.encode(prompt)) if isinstance(prompt, str) else (None, list(prompt))
            for prompt in _each_prompt(prompts)
        ]
        if sampling_params is None:
            sampling_params = self.default_sampling_params()
        return self._run(tokenized, sampling_params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """Answer a conversation, or each of several; they are rendered as the server does it. `tools` are functions
        that the template shows to the model, whose answer is text as it writes it, calls too. `chat_template_kwargs`
        are the template's variables, such as `enable_thinking`. Without `sampling_params` an answer may be as long as
        the model's own default or else the context allows. Raises as `generate` does, and `InvalidRequest` where the
        chat template refuses a conversation or leaves out its tools."""
        if not is_list(messages):
            raise InvalidRequest("messages must be a conversation (a list of messages), or a list of them.", "messages")
        if not messages:
            return []
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        rendered = [
            self.tokenizer.chat_template.submit(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                variables=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        template = self.tokenizer.chat_template.source(chat_template, tools or ())
        for name in chat_template_kwargs or ():
            if not names_variable(template, name):
                logger.warning("The chat template does not name the variable %.100r, which changes nothing.", name)
        texts = [future.result() for future in rendered]
        tokenized = [(text, self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        if sampling_params is None:
            longest = self.generation_defaults.sampling.get("max_new_tokens")
            sampling_params = self.default_sampling_params(max_tokens=longest)
        return self._run(tokenized, sampling_params, progress)

    def _run(
        self,
        tokenized: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        progress: bool,
    ) -> list[Generation]:
        if self._broken is not None:
            raise RuntimeError(f"This LLM failed before ({self._broken}); make a new one.")
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(tokenized)
        if not is_list(sampling_params) or not all(isinstance(params, SamplingParams) for params in sampling_params):
            raise InvalidRequest("sampling_params must be SamplingParams, or a list of them.", "sampling_params")
        if len(sampling_params) != len(tokenized):
            raise InvalidRequest(
                f"{len(tokenized)} prompts came with {len(sampling_params)} sampling_params; give one for each, or a "
                "single one for all.",
                "sampling_params",
            )
        jobs = []
        for index, ((text, token_ids), params) in enumerate(zip(tokenized, sampling_params, strict=True)):
            try:
                if params.grammar is not None:
                    check_grammar(params.grammar, self.tokenizer)
                request = Request(request_id=f"{next(self._serial)}", prompt_token_ids=token_ids, params=params)
                jobs.append(_Job(text, check_request(request, self.info), self.tokenizer))
            except InvalidRequest as refused:
                where = f"Prompt {index}: " if len(tokenized) > 1 else ""
                raise InvalidRequest(f"{where}{refused}", refused.param) from None
        self._finish_all(jobs, progress)
        return [job.generation() for job in jobs]

    def _finish_all(self, jobs: list[_Job], progress: bool) -> None:
        unfinished = {request.request_id: (job, i) for job in jobs for i, request in enumerate(job.requests)}
        num_sequences, num_tokens, start = len(unfinished), 0, time.monotonic()
        with (
            _bars(progress, MofNCompleteColumn(), TextColumn("{task.fields[rate]}")) as bars,
            _late_interrupts() as raise_interrupt,
        ):
            bar = bars.add_task("Generating", total=num_sequences, rate="")
            try:
                for job in jobs:
                    for request in job.requests:
                        self._loop.add(request)
                while unfinished:
                    num_tokens += self._step(unfinished)
                    rate = f"{num_tokens / (time.monotonic() - start):,.0f} tokens/s"
                    bars.update(bar, completed=num_sequences - len(unfinished), rate=rate)
                    raise_interrupt()
            finally:
                if self._broken is None:
                    self._loop.abort(unfinished)

    def _step(self, unfinished: dict[str, tuple[_Job, int]]) -> int:
        """One step of the engine; takes what finished out of `unfinished` and returns the number of new tokens."""
        try:
            outputs = self._loop.step()
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise
        num_tokens = 0
        for output in outputs:
            if output.request_id not in unfinished:
                continue  # aborted while its last step was on its way
            job, index = unfinished[output.request_id]
            num_tokens += len(output.new_token_ids)
            if met_stop := job.push(index, output):
                self._loop.abort([output.request_id])
            if met_stop or output.finish_reason is not None:
                del unfinished[output.request_id]
        return num_tokens


class _Job:
    """One prompt on its way to a `Generation`."""

    def __init__(self, prompt: str | None, request: Request, tokenizer: Tokenizer) -> None:
        self.requests = fan_out(request.request_id, request)
        self._prompt = prompt
        self._token_ids = request.prompt_token_ids
        self._assembler = OutputAssembler(tokenizer, request.prompt_token_ids, request.params)
        self._deltas: list[list[Completion]] = [[] for _ in self.requests]

    def push(self, index: int, output: RequestOutput) -> bool:
        """Whether the sequence met a stop string, so that the engine must abort it."""
        deltas, met_stop = self._assembler.push(index, output)
        for delta in deltas:
            self._deltas[delta.index].append(delta)
        return met_stop

    def generation(self) -> Generation:
        outputs = [join(deltas) for deltas in self._deltas]
        return Generation(
            prompt=self._prompt,
            prompt_token_ids=self._token_ids,
            outputs=outputs,
            prompt_logprobs=outputs[0].prompt_logprobs,
            num_cached_tokens=outputs[0].num_cached_tokens,
        )


def _each_prompt(prompts: Prompts) -> list[str | Sequence[int]]:
    """One prompt or several, text or ids, as a list of prompts. Raises `InvalidRequest` for anything else."""
    if isinstance(prompts, str) or (_are_ids(prompts) and prompts):
        return [cast(str | Sequence[int], prompts)]
    if not is_list(prompts) or not all(isinstance(prompt, str) or _are_ids(prompt) for prompt in prompts):
        raise InvalidRequest(
            "prompts must be text, token ids (a list of int), or a list of either; not an iterator, dict, array or "
            "tensor.",
            "prompts",
        )
    return list(cast(Sequence[str | Sequence[int]], prompts))


def _are_ids(value: object) -> bool:
    return is_list(value) and all(type(item) is int for item in value)


def _bars(wanted: bool, *columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    described = TextColumn("{task.description}")
    shown = wanted and console.is_terminal
    return Progress(described, BarColumn(), *columns, TimeRemainingColumn(), console=console, disable=not shown)


@contextmanager
def _late_interrupts() -> Iterator[Callable[[], None]]:
    """Keep a Ctrl-C until the function yielded is called, when the engine has finished its step: a step cut short
    cannot be continued. The second one comes through at once, and costs the engine."""
    pending = False

    def raise_pending() -> None:
        if pending:
            raise KeyboardInterrupt

    def keep(_: int) -> None:
        nonlocal pending
        raise_pending()
        pending = True

    in_main_thread = threading.current_thread() is threading.main_thread()  # alone is reached by Ctrl-C
    with on_signals(keep, (signal.SIGINT,)) if in_main_thread else nullcontext():
        yield raise_pending
