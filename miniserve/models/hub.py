"""From a model's name to a directory with its files: built in, local, in the Hugging Face cache, or downloaded.

The environment variables of huggingface_hub (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, …) are honoured by that
library itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniserve.core import UserError
from miniserve.models.checkpoint import INDEX, SINGLE, other_formats, read_json, require_weights
from miniserve.models.config import check_config
from miniserve.models.names import resolve_alias, suggest

BUILT_IN = "tiny-qwen3"

CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.tiktoken", "tokenizer.model"]
# Subfolders hold other formats of the same weights (original/, onnx/, …), and Mistral's consolidated.safetensors is a
# second copy of the shards beside it.
IGNORED_FILES = ["*/*", "consolidated*"]
_HUB_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are. `name` is what the user calls it; `origin` says in a few words where it came from."""

    name: str
    path: Path
    origin: str


def locate(
    model: str | None,
    revision: str | None = None,
    *,
    weights: bool = True,
    notify: Callable[[str], None] = lambda sentence: None,
) -> ModelSource:
    """Find the files of `model`, downloading them where they are on the Hugging Face hub only.

    model: None or `tiny-qwen3` for the built-in model, a local directory, or a hub id (`owner/name`). weights False
    looks for the configuration and the tokenizer alone. `notify` is told what the user should know (an alias was taken,
    a download starts), a sentence each. Raises `UserError`, one sentence with its remedy, for every way to fail.
    """
    if model is None or (model == BUILT_IN and not os.path.isdir(model)):
        _refuse_revision(revision, "the built-in model")
        path = Path(__file__).resolve().parent.parent / "assets" / BUILT_IN
        return ModelSource(BUILT_IN, path, f"built in ({path})")
    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):
        _refuse_revision(revision, f"the local directory {model}")
        return _checked(model, path.resolve(), f"local directory {path.resolve()}", weights=weights)
    return _locate_on_hub(_hub_id(model, path, notify), revision, weights, notify)


def locate_config(
    model: str | None, revision: str | None = None, *, notify: Callable[[str], None] = lambda sentence: None
) -> tuple[str, Path]:
    """The model's name and a directory with its config.json, whatever its architecture; nothing else is fetched.

    Arguments and errors as of `locate`.
    """
    path = Path(os.path.expanduser(model or ""))
    if model and os.path.isdir(path):
        _refuse_revision(revision, f"the local directory {model}")
        require_files(path, model, weights=False)
        return path.resolve().name, path
    if model is None or model == BUILT_IN:
        source = locate(model, revision, weights=False)
        return source.name, source.path
    model = _hub_id(model, path, notify)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    with _hub_errors(model, revision):
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        found = cached if isinstance(cached, str) else hf_hub_download(model, "config.json", revision=revision)
    return model, Path(found).parent


def require_files(path: Path, name: str, *, weights: bool) -> None:
    """Raise `UserError` naming what is missing in a model's directory: config.json and, with `weights`, safetensors."""
    if not (path / "config.json").is_file():
        raise UserError(
            f"{name} has no config.json: give a directory of a Hugging Face checkpoint.{other_formats(path)}"
        )
    if weights:
        require_weights(path, name)


def _checked(name: str, path: Path, origin: str, *, weights: bool) -> ModelSource:
    require_files(path, name, weights=weights)
    check_config(read_json(path / "config.json"), name)
    return ModelSource(name, path, origin)


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise UserError(f"--revision {revision} means nothing for {what}: leave it out, or name a hub repository.")


def _hub_id(model: str, path: Path, notify: Callable[[str], None]) -> str:
    """The repository that is meant by `model`, which is no directory."""
    if os.path.isfile(path):
        raise UserError(f"{model} is a file: give the directory that holds config.json and the safetensors files.")
    looks_like_path = model.startswith((".", "/", "~", "\\")) or model.endswith("/") or model.count("/") > 1
    if looks_like_path or not model:
        raise UserError(f"There is no directory {model!r}: give an existing directory or a hub id such as owner/name.")
    if (target := resolve_alias(model)) is None:
        return model
    notify(f"{model} is not a repository on the Hugging Face hub; taking {target}.")
    return target


# --- the Hugging Face hub -----------------------------------------------------------------------------------------


def _locate_on_hub(model: str, revision: str | None, weights: bool, notify: Callable[[str], None]) -> ModelSource:
    from huggingface_hub import hf_hub_download

    patterns = [*CONFIG_FILES, "*.safetensors"] if weights else CONFIG_FILES
    try:
        names = _list_files(model, revision)
    except UserError:
        path = _find_in_cache(model, revision, patterns)
        if path is None:
            raise
        return _checked(model, path, f"Hugging Face cache ({path})", weights=weights)
    with _hub_errors(model, revision):
        # config.json first: it is small, and a model that cannot be had or served is told before its weights move.
        check_config(read_json(Path(hf_hub_download(model, "config.json", revision=revision))), model)
        if weights and not {SINGLE, INDEX} & set(names):
            raise UserError(f"{model} {_no_safetensors(names)}")
        missing = [file for file in _snapshot(model, revision, patterns, dry_run=True) if file.will_download]
        if missing:
            size = sum(file.file_size or 0 for file in missing)
            _require_space(model, size)
            notify(f"Downloading {model}: {_human_bytes(size)} to {_cache_dir()}.")
        path = Path(_snapshot(model, revision, patterns))
    origin = "downloaded from the Hugging Face hub" if missing else "Hugging Face cache"
    return _checked(model, path, f"{origin} ({path})", weights=weights)


def _list_files(model: str, revision: str | None) -> list[str]:
    """The files of a repository. One short question without retries, so that a machine without network comes to its
    cache (or its error) at once."""
    from huggingface_hub import HfApi

    with _hub_errors(model, revision):
        info = HfApi().model_info(model, revision=revision, timeout=_HUB_TIMEOUT)
    return [sibling.rfilename for sibling in info.siblings or []]


def _find_in_cache(model: str, revision: str | None, patterns: list[str]) -> Path | None:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(_snapshot(model, revision, patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _snapshot(model: str, revision: str | None, patterns: list[str], **how: Any) -> Any:
    from huggingface_hub import snapshot_download

    return snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED_FILES, **how)


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Each failure of huggingface_hub becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_sentence(error, model, revision)) from error


def _sentence(error: BaseException, model: str, revision: str | None) -> str:
    """What went wrong on the hub, and the remedy."""
    from huggingface_hub import errors

    guess = suggest(model)
    look = f"; did you mean {guess}?" if guess else "; look for its exact name at https://huggingface.co/models."
    did_you_mean = f" Did you mean {guess}?" if guess else ""
    match error:
        case errors.LocalEntryNotFoundError():  # the connection broke
            error = error.__cause__ or error
        case errors.GatedRepoError():  # a subclass of RepositoryNotFoundError, therefore first
            return f"{model} is gated: accept its licence at {_url(model)}, then run `hf auth login` or set HF_TOKEN."
        case errors.RepositoryNotFoundError():
            return (
                f"There is no repository {model} on the Hugging Face hub (or it is private and needs "
                f"`hf auth login`){look}"
            )
        case errors.RevisionNotFoundError():
            return f"{model} has no revision {revision!r}: see {_url(model)}/commits/main, or leave --revision out."
        case errors.EntryNotFoundError():
            return (
                f"{model} has no config.json, so it is no checkpoint in Hugging Face format (GGUF files are not "
                f"supported){look}"
            )
        case errors.OfflineModeIsEnabled():
            return (
                f"{model} is not (or not completely) in the Hugging Face cache ({_cache_dir()}): "
                f"unset HF_HUB_OFFLINE to download it.{did_you_mean}"
            )
        case errors.HFValidationError():
            return f"{model!r} is neither a local directory nor a hub id such as owner/name."
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return "The Hugging Face hub does not accept your token: run `hf auth login`, or correct or unset HF_TOKEN."
        case errors.HfHubHTTPError():
            return f"The Hugging Face hub refused {model} ({_first_line(error)}): try again later."
    # Errors of the HTTP library come here too; it is another one in other versions of huggingface_hub.
    return (
        f"{model} is not (or not completely) in the Hugging Face cache and the hub cannot be reached "
        f"({type(error).__name__}: {_first_line(error)}): check the network or HF_ENDPOINT, or give a local directory."
        f"{did_you_mean}"
    )


def _no_safetensors(filenames: list[str]) -> str:
    if any(name.endswith(".bin") for name in filenames):
        return (
            "has its weights as pickled *.bin files only, which are not loaded because they can run code: "
            "choose a repository (or --revision) with safetensors."
        )
    return f"has neither {SINGLE} nor {INDEX}: choose another repository."


def _require_space(model: str, size: int) -> None:
    directory = _cache_dir()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UserError(
            f"{model} needs {_human_bytes(size)} on the disk of {_cache_dir()}, which has {_human_bytes(free)} free: "
            "make room, or set HF_HOME to a bigger disk."
        )


def _cache_dir() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _url(model: str) -> str:
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{model}"


def _human_bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
