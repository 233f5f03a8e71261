"""What a model's own files say about generating with it: sampling defaults and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miniserve.core import InvalidRequest, SamplingParams, UserError
from miniserve.models.checkpoint import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`sampling`: those of `SAMPLING_FIELDS` that the model sets. `eos_token_ids`: every token that ends a text."""

    sampling: Mapping[str, float | int]
    eos_token_ids: frozenset[int]


def load_generation_defaults(path: str | Path, mode: Literal["auto", "none"] = "auto") -> GenerationDefaults:
    """Read `generation_config.json`, `config.json` and the tokenizer's end-of-text token from a model directory.

    The sampling values are taken as they stand, as vLLM takes them: `do_sample: false` alone does not make greedy the
    default. Mode "none" leaves the sampling defaults out; the EOS tokens count in either mode, since a model that is
    not stopped at one of them talks on. Raises `UserError` for a file that holds something else.
    """
    path = Path(path)
    generation = _read(path / "generation_config.json")
    config = _read(path / "config.json")
    eos: set[int] = set()
    for settings in (generation, config, config.get("text_config")):
        if isinstance(settings, dict):
            eos |= _ids(settings.get("eos_token_id"), path)
    eos |= _tokenizer_eos(path)
    return GenerationDefaults(_sampling(generation, path) if mode == "auto" else {}, frozenset(eos))


def _sampling(generation: Mapping[str, Any], path: Path) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for name in SAMPLING_FIELDS:
        value = generation.get(name)
        if value is None:
            continue
        given: dict[str, Any] = {"max_tokens" if name == "max_new_tokens" else name: value}
        try:
            SamplingParams(**given)
        except InvalidRequest as wrong:
            raise UserError(
                f"{path / 'generation_config.json'} sets {name} to {value!r} ({wrong}) "
                "Correct it or use --generation-config none."
            ) from None
        found[name] = value
    return found


def _tokenizer_eos(path: Path) -> set[int]:
    """The id of the tokenizer's EOS, from the files alone where there is a tokenizer.json: loading it takes seconds."""
    settings = _read(path / "tokenizer_config.json")
    token = settings.get("eos_token")
    added = settings.get("added_tokens_decoder")
    if added is None or token is None:  # as transformers does it
        token = _read(path / "special_tokens_map.json").get("eos_token", token)
    content = token.get("content") if isinstance(token, dict) else token
    for token_id, entry in added.items() if isinstance(added, dict) else ():
        if content is not None and entry.get("content") == content:
            return {int(token_id)}
    if not (path / "tokenizer.json").is_file():
        return _loaded_eos(path)
    if content is None:
        return set()
    tokenizer = _read(path / "tokenizer.json")
    for entry in tokenizer.get("added_tokens") or ():
        if entry.get("content") == content:
            return {int(entry["id"])}
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = vocab if isinstance(vocab, dict) else {piece: token_id for token_id, (piece, _) in enumerate(vocab)}
    return {ids[content]} if content in ids else set()


def _loaded_eos(path: Path) -> set[int]:
    """Of vocabularies in other files: each tokenizer class has an EOS of its own where no file names one."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return set()
    from transformers import AutoTokenizer

    try:
        token_id = AutoTokenizer.from_pretrained(str(path), local_files_only=True).eos_token_id
    except Exception:  # `Tokenizer` has the sentence for it
        return set()
    return set() if token_id is None else {token_id}


def _ids(value: Any, path: Path) -> set[int]:
    if value is None:
        return set()
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
        raise UserError(f"eos_token_id in {path} is {value!r}; it must be a token id or a list of token ids.")
    return set(ids)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
