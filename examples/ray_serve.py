"""Copies of a model behind one address that come and go with the load, by Ray Serve (pip install 'miniserve[ray]').

    serve run examples.ray_serve:app model=Qwen/Qwen3-8B max_replicas=4
    serve run examples.ray_serve:app model=Qwen/Qwen3-32B tensor_parallel_size=2 max_num_seqs=64

Each replica is a whole server without its port: an engine with GPUs of its own beneath the same HTTP API. Ray starts
another when those that run have more than `target_ongoing_requests` each, and replaces one whose engine has died.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import AutoscalingConfig

from miniserve.config import EngineConfig
from miniserve.engine.client import AsyncEngine
from miniserve.models.hub import locate
from miniserve.server.app import create_app
from miniserve.server.config import ServerConfig, read_api_keys
from miniserve.server.gate import RequestIdMiddleware


class Settings(BaseModel):
    """What stands behind `examples.ray_serve:app`; an unknown name is refused. The last four are Ray's."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 256
    kv_cache_memory: int | None = None  # bytes
    api_key_file: str | None = None  # on each host
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 64
    upscale_delay_s: float = 30
    num_cpus: float = 4  # for a replica; its server and its engine take one each


@serve.deployment
@serve.ingress()
class Replica:
    """An engine and the app over it. Ray has set which GPUs this process, and so its engine, sees."""

    async def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:
        source = locate(engine.model, engine.revision, weights=True, notify=print)
        self._engine = AsyncEngine(engine, source.path, source.name)
        self._server = server
        await self._engine.start()

    def __serve_build_asgi_app__(self) -> Any:
        return RequestIdMiddleware(create_app(self._engine, self._server))

    def check_health(self) -> None:
        """Ray replaces the replica where this raises."""
        if self._engine.dead:
            raise RuntimeError(self._engine.dead)

    async def __del__(self) -> None:
        await self._engine.shutdown(drain=False, timeout=5.0)


def app(settings: Settings) -> serve.Application:
    engine = EngineConfig(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        kv_cache_memory=settings.kv_cache_memory,
    )
    server = ServerConfig(api_keys=read_api_keys(Path(settings.api_key_file)) if settings.api_key_file else ())
    gpus = 0 if settings.device == "cpu" else settings.tensor_parallel_size
    return Replica.options(
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": gpus},
        # Beyond what runs at once, requests wait in the engine, which may begin with their prompts.
        max_ongoing_requests=2 * settings.max_num_seqs,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing_requests,
            upscale_delay_s=settings.upscale_delay_s,
        ),
    ).bind(engine, server)
