"""`miniserve run` and `miniserve serve`: load a model and serve it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from miniserve.cli.options import parse_bytes, parse_count
from miniserve.config import LOG_LEVELS, EngineConfig
from miniserve.server.config import ServerConfig

_ENGINE = EngineConfig()
_SERVER = ServerConfig()


def _count(flag: str) -> Callable[[object], int]:
    return lambda value: parse_count(str(value), flag)


def _bytes(flag: str) -> Callable[[object], int]:
    return lambda value: parse_bytes(str(value), flag)


def _option(*names: str, panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


_model = functools.partial(_option, panel="Model")
_http = functools.partial(_option, panel="Server")
_sched = functools.partial(_option, panel="Scheduling and memory")
_switch = functools.partial(_option, panel="Switches")
_chat = functools.partial(_option, panel="Chat")


def run(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Hugging Face id or local directory.", show_default="the built-in model"),
    ] = None,
    revision: Annotated[str | None, _model("--revision", help="Branch, tag or commit on the hub.")] = None,
    dtype: Annotated[
        str, _model("--dtype", help="auto (the model's own), bfloat16, float16 or float32.")
    ] = _ENGINE.dtype,
    device: Annotated[
        str,
        _model(
            "--device",
            help="auto, cpu or cuda (which is ROCm, too); gfx942 and gfx950 are emulated, for tests with a stand-in "
            "for aiter.",
        ),
    ] = _ENGINE.device,
    load_format: Annotated[
        str, _model("--load-format", help="auto, or dummy: random weights, none are loaded.")
    ] = _ENGINE.load_format,
    max_model_len: Annotated[
        int | None,
        _model(
            "--max-model-len",
            help="Longest prompt and answer together; 8k is 8000, 8K 8192.",
            show_default="the model's",
            metavar="TOKENS",
            parser=_count("--max-model-len"),
        ),
    ] = None,
    generation_config: Annotated[
        str, _model("--generation-config", help="auto: sampling defaults of the model's file; none: neutral ones.")
    ] = _ENGINE.generation_config,
    seed: Annotated[int, _model("--seed", help="Seed of random weights and of requests without one.")] = _ENGINE.seed,
    host: Annotated[str, _http("--host", help="Address to listen on; 0.0.0.0 is every network.")] = _SERVER.host,
    port: Annotated[int, _http("--port", help="0 takes a free one.")] = _SERVER.port,
    api_key: Annotated[
        list[str] | None, _http("--api-key", help="Key that clients must send; may be given several times.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        _http("--served-model-name", help="Name clients use; may be given several times.", show_default="MODEL"),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        _http(
            "--allowed-origin", help="Origin whose web pages may call the server (CORS); may be given several times."
        ),
    ] = None,
    drain_timeout: Annotated[
        float,
        _http("--drain-timeout", help="How long running requests may go on after the first Ctrl-C.", metavar="SECONDS"),
    ] = _SERVER.drain_timeout,
    enable_tokenizer_info: Annotated[
        bool, _http("--enable-tokenizer-info", help="Serve /tokenizer_info, for lm_eval's remote tokenizer.")
    ] = False,
    trust_request_chat_template: Annotated[
        bool, _http("--trust-request-chat-template", help="Accept chat templates, which are programs, from requests.")
    ] = False,
    log_level: Annotated[str, _http("--log-level", help=f"{', '.join(LOG_LEVELS)}.")] = _ENGINE.log_level,
    max_num_seqs: Annotated[
        int,
        _sched("--max-num-seqs", help="Most requests that run at once.", metavar="N", parser=_count("--max-num-seqs")),
    ] = _ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int,
        _sched(
            "--max-num-batched-tokens",
            help="Most tokens in one step.",
            metavar="TOKENS",
            parser=_count("--max-num-batched-tokens"),
        ),
    ] = _ENGINE.max_num_batched_tokens,
    max_itl_ratio: Annotated[
        float,
        _sched(
            "--max-itl-ratio",
            help="How many times as long as without prefill beside it a step that decodes may take; 0: any number.",
            metavar="RATIO",
        ),
    ] = _ENGINE.max_itl_ratio,
    block_size: Annotated[int, _sched("--block-size", help="Tokens in one KV block.")] = _ENGINE.block_size,
    kv_layout: Annotated[str, _sched("--kv-layout", help="linear, shuffled, latent or auto.")] = _ENGINE.kv_layout,
    kv_cache_dtype: Annotated[
        str, _sched("--kv-cache-dtype", help="auto (the model's), bfloat16, float16, float32 or fp8.")
    ] = _ENGINE.kv_cache_dtype,
    attention_backend: Annotated[
        str, _sched("--attention-backend", help="auto, or the name of one.")
    ] = _ENGINE.attention_backend,
    kv_cache_memory: Annotated[
        int | None,
        _sched(
            "--kv-cache-memory",
            help="Size of the KV cache, such as 512M or 4G.",
            show_default="computed",
            metavar="BYTES",
            parser=_bytes("--kv-cache-memory"),
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, _sched("--gpu-memory-utilization", help="Share of the device's memory to use.")
    ] = _ENGINE.gpu_memory_utilization,
    enable_prefix_caching: Annotated[
        bool,
        _switch(
            "--enable-prefix-caching/--no-prefix-caching",
            help="Reuse the KV blocks of prompts seen before.",
            show_default="on",
        ),
    ] = _ENGINE.enable_prefix_caching,
    async_scheduling: Annotated[
        bool | None,
        _switch(
            "--async-scheduling/--no-async-scheduling",
            help="Plan a step while the device computes the one before.",
            show_default="auto",
        ),
    ] = None,
    speculative: Annotated[
        str | None,
        _sched(
            "--speculative",
            help="ngram:K guesses up to K tokens from the text so far and verifies them in one step; same tokens.",
            show_default="off",
            metavar="ngram:K",
        ),
    ] = None,
    enforce_eager: Annotated[
        bool, _switch("--enforce-eager", help="Launch every kernel of a decode step from Python, without graphs.")
    ] = False,
    aiter: Annotated[
        bool, _switch("--aiter/--no-aiter", help="Use AMD's aiter where it is installed.", show_default="on")
    ] = _ENGINE.aiter,
    self_check: Annotated[
        bool,
        _switch(
            "--self-check/--no-self-check",
            help="Try the attention path on problems with known answers before serving from it.",
            show_default="on",
        ),
    ] = _ENGINE.self_check,
    no_chat: Annotated[bool, _chat("--no-chat", help="Serve only, also at a terminal.")] = False,
    prompt: Annotated[
        str | None,
        _chat("--prompt", "-p", help="Answer this on stdout and exit, without a server. `-` reads standard input."),
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API; at a terminal, also chat with it.

    Text that is piped in is answered once, as with -p.
    """
    ctx.obj.debug = ctx.obj.debug or log_level == "debug"
    engine = EngineConfig(
        model=model,
        revision=revision,
        dtype=dtype,
        device=device,
        load_format=load_format,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_itl_ratio=max_itl_ratio,
        block_size=block_size,
        kv_layout=kv_layout,
        kv_cache_dtype=kv_cache_dtype,
        attention_backend=attention_backend,
        kv_cache_memory=kv_cache_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=enable_prefix_caching,
        async_scheduling=async_scheduling,
        speculative=speculative,
        enforce_eager=enforce_eager,
        aiter=aiter,
        self_check=self_check,
        generation_config=generation_config,  # type: ignore[arg-type]  # EngineConfig checks it
        seed=seed,
        log_level=log_level,
    )
    server = ServerConfig(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        served_model_names=tuple(served_model_name or ()),
        allowed_origins=tuple(allowed_origin or ()),
        drain_timeout=drain_timeout,
        enable_tokenizer_info=enable_tokenizer_info,
        trust_request_chat_template=trust_request_chat_template,
    )
    # Here and not above: what serves would slow down `miniserve --help`.
    from miniserve.cli.start import start

    raise typer.Exit(start(engine, server, prompt=prompt, chat=not no_chat))


def _without(command: Callable[..., None], *names: str, **fixed: Any) -> Callable[..., None]:
    """`command` as a command that lacks some of its options, which are `fixed`."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def wrapper(**options: Any) -> None:
        command(**options, **fixed)

    kept = [parameter for name, parameter in signature.parameters.items() if name not in names]
    wrapper.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    wrapper.__doc__ = "Serve a model over an OpenAI-compatible HTTP API, and nothing else."
    return wrapper


serve = _without(run, "no_chat", "prompt", no_chat=True)
