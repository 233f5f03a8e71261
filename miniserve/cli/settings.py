"""The settings of engine, server and loads as options of commands, each declared once; and how numbers are written:
`8k` tokens, `4G` bytes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, get_origin

import typer

from miniserve.bench.workload import ServeConfig, Shape
from miniserve.config import LOG_LEVELS, EngineConfig
from miniserve.core import UserError
from miniserve.engine.reasoning import REASONING_DIALECTS
from miniserve.engine.tool_dialects import TOOL_DIALECTS
from miniserve.server.config import ServerConfig, check_api_key

_COUNTS = {"": 1, "k": 10**3, "K": 2**10, "Ki": 2**10, "m": 10**6, "M": 2**20, "Mi": 2**20}
_BYTES = {"": 1, "b": 1} | {
    prefix + ending: 2 ** (10 * power) for power, prefix in enumerate("kmgt", 1) for ending in ("", "b", "i", "ib")
}


def parse_count(text: str, flag: str) -> int:
    """A number of tokens or sequences: `8192`, `8k` (8,000), `8K` or `8Ki` (8,192). Raises `UserError`."""
    return _scaled(text, _COUNTS, f"{flag} must be a whole number such as 8192, 8k (8000) or 8K (8192), not {text!r}.")


def parse_bytes(text: str, flag: str) -> int:
    """A size, its suffixes powers of 1024 in either case: `4294967296`, `4G`, `4GiB`, `512m`. Raises `UserError`."""
    return _scaled(text.lower(), _BYTES, f"{flag} must be a size in bytes such as 512M or 4G, not {text!r}.")


def _scaled(text: str, units: Mapping[str, int], message: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip(), flags=re.ASCII)
    if match is None or match[2] not in units:
        raise UserError(message)
    number = Fraction(match[1]) * units[match[2]]
    if number.denominator != 1:
        raise UserError(message)
    return int(number)


def _option(*names: str, panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


_model = functools.partial(_option, panel="Model")
_http = functools.partial(_option, panel="Server")
_sched = functools.partial(_option, panel="Scheduling and memory")
_parallel = functools.partial(_option, panel="Several GPUs")
_switch = functools.partial(_option, panel="Switches")


def count(flag: str) -> Callable[[object], int]:
    """A parser of numbers such as 8k for an option."""
    return lambda value: parse_count(str(value), flag)


def _parse_ranks(value: object) -> int | None:
    if value in (None, "auto"):
        return None
    if re.fullmatch(r"-?[0-9]{1,9}", str(value)) is None:
        raise UserError(f"--tensor-parallel-size must be a number of GPUs or auto, not {str(value)[:50]!r}.")
    return int(str(value))


def _note_debug(ctx: typer.Context, level: str) -> str:
    ctx.obj.debug = ctx.obj.debug or level == "debug"
    return level


_OPTIONS: dict[type, dict[str, Any]] = {
    EngineConfig: {
        "model": typer.Argument(help="Hugging Face id or local directory.", show_default="the built-in model"),
        "revision": _model(help="Branch, tag or commit on the hub."),
        "dtype": _model(help="auto (the model's own), bfloat16, float16 or float32."),
        "device": _model(help="auto, cpu or cuda (which is ROCm, too)."),
        "load_format": _model(help="auto, or dummy: random weights, none are loaded."),
        "max_model_len": _model(
            help="Longest prompt and answer together; 8k is 8000, 8K 8192.",
            show_default="the model's",
            metavar="TOKENS",
            parser=count("--max-model-len"),
        ),
        "generation_config": _model(help="auto: sampling defaults of the model's file; none: neutral ones."),
        "seed": _model(help="Seed of random weights, of requests without one, of a benchmark's prompts."),
        "log_level": _http(help=f"{', '.join(LOG_LEVELS)}.", callback=_note_debug),
        "log_format": _http(help="text, or json: an object on each line of the log."),
        "max_num_seqs": _sched(help="Most requests that run at once.", metavar="N", parser=count("--max-num-seqs")),
        "max_num_batched_tokens": _sched(
            help="Most tokens in one step. Fewer make gaps between tokens shorter while prompts arrive, and prefill "
            "slower.",
            show_default="4096 on a GPU, 2048 on a CPU",
            metavar="TOKENS",
            parser=count("--max-num-batched-tokens"),
        ),
        "max_itl_ratio": _sched(
            help="Slow decode steps by at most this factor to run prefill beside them (2 = twice as long). Costs "
            "throughput and TTFT: with long prompts up to 3.6 and 18 times. 0 = no limit.",
            metavar="RATIO",
        ),
        "block_size": _sched(help="Tokens in one KV block."),
        "kv_layout": _sched(help="linear, shuffled, latent or auto."),
        "kv_cache_dtype": _sched(help="auto (the model's), bfloat16, float16, float32 or fp8."),
        "attention_backend": _sched(help="auto, or the name of one."),
        "kv_cache_memory": _sched(
            help="Size of the KV cache, such as 512M or 4G; with ranks, on each of them.",
            show_default="computed",
            metavar="BYTES",
            parser=lambda value: parse_bytes(str(value), "--kv-cache-memory"),
        ),
        "gpu_memory_utilization": _sched(help="Share of a GPU's memory to use.", show_default="0.9"),
        "enable_prefix_caching": _switch(
            "--enable-prefix-caching/--no-prefix-caching",
            help="Reuse the KV blocks of prompts seen before.",
            show_default="on",
        ),
        "async_scheduling": _switch(help="Plan a step while the device computes the one before.", show_default="auto"),
        "speculative": _sched(
            help="ngram:K guesses up to K tokens from the text so far and verifies them in one step; same tokens.",
            show_default="off",
            metavar="ngram:K",
        ),
        "tensor_parallel_size": _parallel(
            "--tensor-parallel-size",
            "--tp",
            help="Ranks that share the model: GPUs, or processes on a CPU. auto: 1, or the fewest GPUs that it fits.",
            show_default="auto",
            metavar="N|auto",
            parser=_parse_ranks,
        ),
        "enable_expert_parallel": _parallel(
            "--enable-expert-parallel", help="Each rank has whole experts instead of a part of each."
        ),
        "data_parallel_size": _parallel(
            help="Engines behind this address, each with a copy of the model on GPUs of its own; requests go to the "
            "least busy.",
            metavar="N",
        ),
        "nnodes": _parallel(help="Hosts over which the ranks are spread; start the same command on each."),
        "node_rank": _parallel(help="Which of them this is; 0 is the one that serves."),
        "master_addr": _parallel(help="Address of host 0 that all hosts reach, in a network that you trust."),
        "master_port": _parallel(help="Port of it at which the ranks meet.", show_default="29500"),
        "enforce_eager": _switch("--enforce-eager", help="Launch every kernel from Python, without graphs."),
        "aiter": _switch(help="Use AMD's aiter where it is installed.", show_default="on"),
        "fp8_activations": _switch(
            help="Where a checkpoint has weights and activations in 8 bits, multiply in 8 bits in steps of more than "
            "64 tokens (experts: 256; on AMD always); off: activations keep their 16 bits, and large steps are slower.",
            show_default="on",
        ),
        "self_check": _switch(
            help="Try the attention path on problems with known answers before serving from it.", show_default="on"
        ),
    },
    ServerConfig: {
        "host": _http(help="Address to listen on; 0.0.0.0 is every network."),
        "port": _http(help="0 takes a free one."),
        "api_keys": _http(
            "--api-key",
            help="Key that clients must send; may be given several times. The process list shows it: prefer "
            "--api-key-file or the variable MINISERVE_API_KEY, which add to it.",
        ),
        "served_model_names": _http(
            "--served-model-name", help="Name clients use; may be given several times.", show_default="MODEL"
        ),
        "allowed_origins": _http(
            "--allowed-origin", help="Origin whose web pages may call the server (CORS); may be given several times."
        ),
        "tool_call_parser": _http(
            help=f"How the model writes calls of functions: auto (as its chat template tells), none, or one of "
            f"{', '.join(TOOL_DIALECTS)}."
        ),
        "reasoning_parser": _http(
            help=f"How it marks reasoning: auto, none, or one of {', '.join(REASONING_DIALECTS)}."
        ),
        "max_body_bytes": _http(
            help="Largest request body, such as 4M.",
            show_default="4M",
            metavar="BYTES",
            parser=lambda value: parse_bytes(str(value), "--max-body-bytes"),
        ),
        "max_queue": _http(help="Most sequences that run or wait; requests beyond it are answered 429."),
        "allowed_hosts": _http(
            "--allowed-host",
            help="Name that clients may call the server by (Host header), or *; may be given several times.",
            show_default="localhost without --api-key on this machine's own addresses, else any",
        ),
        "step_timeout": _http(
            help="How long a step may last before the engine counts as dead; the first steps get 600 at least.",
            show_default="60, on a CPU 600",
            metavar="SECONDS",
        ),
        "drain_timeout": _http(
            help="How long running requests may go on after the first Ctrl-C, SIGTERM or SIGHUP; a second one ends at "
            "once. SIGINT and SIGHUP that are ignored at the start (nohup, & in a script) stay ignored.",
            metavar="SECONDS",
        ),
        "enable_tokenizer_info": _http(
            "--enable-tokenizer-info",
            help="Serve /tokenizer_info, for lm_eval's remote tokenizer (with --api-key: its auth_token=KEY).",
        ),
        "trust_request_chat_template": _http(
            "--trust-request-chat-template", help="Accept chat templates, which are programs, from requests."
        ),
        "root_path": _http(
            help="Path that a proxy puts before all others; requests may come with it or without.",
            show_default="none",
            metavar="PATH",
        ),
        "uds": _http(help="Unix socket to listen on instead of host and port.", metavar="PATH"),
        "ssl_keyfile": _http(help="Private key (PEM) for TLS; with --ssl-certfile.", metavar="FILE"),
        "ssl_certfile": _http(help="Certificate chain (PEM) for TLS; with --ssl-keyfile.", metavar="FILE"),
        "log_requests": _http(
            help="Log a line for each request: tokens in, cached and out, TTFT, TPOT, how it finished.",
            show_default="on",
        ),
        "log_prompts": _http("--log-prompts", help="Add the beginning of each prompt to that line."),
        "strict_fields": _http(
            "--strict-fields", help="Refuse unknown fields of requests, which are otherwise ignored with a warning."
        ),
    },
    Shape: {
        "input_len": typer.Option(help="Prompt length in tokens."),
        "output_len": typer.Option(help="Tokens to generate for each prompt."),
        "range_ratio": typer.Option(help="Draw each length from len*(1-r) to len*(1+r); 0 fixes it."),
    },
    ServeConfig: {
        "url": typer.Option(help="Root URL of an OpenAI-compatible server."),
        "model": typer.Option(help="Model name; default: the first that the server lists."),
        "endpoint": typer.Option(help="Which API to use."),
        "api_key": typer.Option(help="API key of the server.", callback=check_api_key, envvar="OPENAI_API_KEY"),
        "num_prompts": typer.Option(help="Requests to measure."),
        "concurrency": typer.Option(help="Requests kept in flight; default 16."),
        "request_rate": typer.Option(help="Requests per second (Poisson) instead."),
        "ignore_eos": typer.Option("--ignore-eos", help="Generate exactly --output-len tokens."),
        "temperature": typer.Option(help="0 is greedy."),
        "warmup": typer.Option(help="Unmeasured requests sent at once before the others."),
        "prompt_type": typer.Option(help="auto: token ids for completions, text for chat."),
        "vocab_size": typer.Option(help="Draw token ids below this; default: ask /tokenize."),
        "timeout": typer.Option(help="Fail a request after so many seconds without a byte."),
        "seed": typer.Option(help="Seed of prompts, lengths and arrival times."),
    },
}


def refuse_given(ctx: typer.Context, settings: Collection[str], why: str) -> None:
    """Raises `UserError` where the command line or the file says something for one of these settings, which has no
    effect in this use of the command: also where that is what it would be anyway."""
    flags = [
        each.opts[0] if each.opts[0].startswith("-") else each.opts[0].upper()
        for each in ctx.command.params
        if each.name in settings and ctx.get_parameter_source(each.name).name != "DEFAULT"  # type: ignore[union-attr]
    ]
    if flags:
        raise UserError(f"{', '.join(flags)}: {why}")


Command = Callable[..., None]


def with_settings(*, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Give a command options instead of its `EngineConfig`, `ServerConfig`, `Shape` and `ServeConfig`: for all their
    settings, or `only` for some, or for all `without` some."""

    def decorate(command: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        configs: dict[str, tuple[type, list[str]]] = {}
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            config = parameter.annotation
            if config not in _OPTIONS:
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
                continue
            names = [name for name in _OPTIONS[config] if (name in only if only else name not in without)]
            configs[parameter.name] = config, names
            settings = inspect.signature(config, eval_str=True).parameters
            parameters += [_with_option(settings[name], config) for name in names]

        def wrapper(**given: Any) -> None:
            given = {parameter.name: parameter.default for parameter in parameters} | given
            for parameter, (config, names) in configs.items():
                values = {name: given.pop(name) for name in names}
                given[parameter] = config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
            command(**given)

        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        return wrapper

    return decorate


def _with_option(setting: inspect.Parameter, config: type) -> inspect.Parameter:
    kind = setting.annotation
    if get_origin(kind) is tuple:
        kind = list[str]
    elif get_origin(kind) is Literal and config is EngineConfig:  # which refuses a word in a sentence itself
        kind = str
    return setting.replace(annotation=Annotated[kind, _OPTIONS[config][setting.name]])
