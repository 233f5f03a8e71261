"""What the API process and the engine process say to each other: msgspec structs, as msgpack, over two ZMQ sockets."""

from __future__ import annotations

import msgspec

from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, PoolView, Request, RequestOutput, SchedulerStats, StepRecord, StepTotals

START_FILE = "start"  # in the sockets' directory, read once by the engine process
COMMANDS_SOCKET = "commands"
OUTPUTS_SOCKET = "outputs"


class Start(msgspec.Struct, kw_only=True, frozen=True):
    """What the engine process is to build. `runner_factory` is "module:function", called as
    `runner.ranks.build_ranks` is."""

    config: EngineConfig
    source_path: str
    model_name: str
    runner_factory: str
    parent_pid: int


# --- API process -> engine ----------------------------------------------------------------------------------------


class Add(msgspec.Struct, tag=True, frozen=True):
    """Requests that have passed `limits.check_request`: the scheduler refuses none of them."""

    requests: list[Request]


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_ids: list[str]


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """`drain`: finish what is running first. A second one without it ends a drain at once."""

    drain: bool


class AskStats(msgspec.Struct, tag=True, frozen=True):
    """Answered by a `StepOutputs` without outputs."""


class AskSteps(msgspec.Struct, tag=True, frozen=True):
    """For the last `limit` steps; each is answered by one `Answer`, in order."""

    limit: int


class AskPool(msgspec.Struct, tag=True, frozen=True):
    """For at most `max_blocks` of the KV cache's blocks; each is answered by one `Answer`, in order."""

    max_blocks: int


Command = Add | Abort | Shutdown | AskStats | AskSteps | AskPool


# --- engine -> API process ----------------------------------------------------------------------------------------


class Progress(msgspec.Struct, tag=True, frozen=True):
    """Start-up: `done` of `total` of what `stage` names."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine ends. `user_error`: `message` is a sentence with its remedy; otherwise it is a bug or a broken device,
    and the traceback went to stderr."""

    message: str
    user_error: bool


class StepOutputs(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Sent after every step, and without outputs whenever commands changed the stats of an engine at rest.

    `stats.num_steps` counts the steps; `totals` sums up those that are done.
    """

    outputs: list[RequestOutput]
    stats: SchedulerStats
    totals: StepTotals


class Answer(msgspec.Struct, tag=True, frozen=True):
    """Of steps the oldest first."""

    found: list[StepRecord] | PoolView


Event = Progress | Ready | Failed | StepOutputs | Answer
