"""Text to token ids and back: one model's tokenizer, safe to use from several threads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniserve.core import InvalidRequest, UserError
from miniserve.engine.chat_template import ChatTemplate
from miniserve.models.generation_config import TOKENIZER_FILES

if TYPE_CHECKING:
    import tokenizers

# The classes that put BOS and EOS around a text as tokenizer_config.json says, whatever tokenizer.json has for it, and
# whether they add a BOS where it says nothing (as transformers 4.57 does). Without a class it is Llama's.
_ADDS_BOS = {"": True, "Llama": True, "CodeLlama": True, "Gemma": True, "Cohere": True, "GPTNeoX": False}
_LONG = 4096  # ids whose decoding takes about a millisecond


class Tokenizer:
    """The tokenizer in a model directory, as transformers loads it.

    Encoding and decoding go to the Rust tokenizer directly: transformers' own `__call__` writes truncation and padding
    settings into that shared object, which two threads must not do. Nothing is ever truncated or padded here.
    Raises `UserError` where the directory has no tokenizer, unless `stand_in_vocab_size` is given: then text becomes
    its UTF-8 bytes (ids 0..255) and every further id up to that size a made-up word, for models with random weights.
    """

    def __init__(self, path: str | Path, *, stand_in_vocab_size: int | None = None) -> None:
        path = Path(path)
        if any((path / name).is_file() for name in TOKENIZER_FILES):
            self._hf = _load(path)
        elif stand_in_vocab_size is not None:
            self._hf = _stand_in(stand_in_vocab_size)
        else:
            raise UserError(
                f"{path} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); "
                "copy the model's tokenizer files there, or use --load-format dummy to run without one."
            )
        backend: tokenizers.Tokenizer = self._hf.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.chat_template = ChatTemplate(self._hf)
        decoder = json.loads(backend.to_str())["decoder"] or {}
        steps = {step["type"] for step in decoder.get("decoders", [decoder] if decoder else [])}
        self.byte_level = steps - {"Fuse"} == {"ByteLevel"}
        # The tokens of a sentencepiece vocabulary that are one raw byte each (`<0xE4>`).
        self.fallback_bytes = _fallback_bytes(backend) if "ByteFallback" in steps else {}
        self._token_bytes = dict(self.fallback_bytes)
        self._token_texts: dict[int, str | None] = {}
        # No token stands for more characters of a text.
        self.longest_token = max(map(len, backend.get_vocab(with_added_tokens=True)))
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @property
    def spells_bytes(self) -> bool:
        """Whether each byte of a text can be told from the tokens."""
        return self.byte_level or bool(self.fallback_bytes)

    def to_json(self) -> str:
        """As a tokenizer.json has it."""
        text: str = self._backend.to_str()
        return text

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows; the model's own vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def info(self) -> dict[str, str | None]:
        """The tokens that have a part to play and the chat template; None where there is none, or several templates."""
        tokens = {name: getattr(self._hf, name) for name in ("eos_token", "bos_token", "pad_token")}
        template = self._hf.chat_template
        return {
            **{name: None if token is None else str(token) for name, token in tokens.items()},
            "chat_template": template if isinstance(template, str) else None,
        }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written in `text` become their ids; `add_special_tokens` adds those of the model (a BOS).
        Raises `InvalidRequest` for text that is no Unicode (lone surrogates)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("The text is not valid Unicode: it holds a lone surrogate.", "prompt") from error
        # `encode` would hold the interpreter's lock all the while, seconds for a long text.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Exactly what the tokens spell: no cleaning up of spaces. Ids without a token spell nothing; bytes that are no
        UTF-8 become U+FFFD."""
        text: str
        if len(token_ids) < _LONG:
            text = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        else:  # which does not hold the interpreter's lock all the while
            (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return text

    def token_str(self, token_id: int) -> str:
        """One token's text, special or not, as it stands inside a sentence (a leading space is kept)."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for: a byte-level token may be a part of a character. Empty for ids without one."""
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._find_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str | None:
        """The token's bytes as text, or None where they are not whole characters."""
        try:
            return self._token_texts[token_id]
        except KeyError:
            pass
        try:
            text = self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self._token_texts[token_id] = text
        return text

    def token_piece(self, token_id: int) -> str:
        """The token as the vocabulary has it (`Ġthe`, `▁the`, `<0xE4>`). Empty for ids without one."""
        return self._backend.id_to_token(token_id) or ""

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token with this text, or None."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id if token_id in self.special_token_ids else None

    @cached_property
    def _byte_of_char(self) -> dict[str, int]:
        return _byte_level_alphabet()

    def _find_bytes(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            values = [self._byte_of_char.get(char) for char in token]
            # As the library's decoder does it: a token with a character outside the alphabet stands for itself.
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if token_id in self.special_token_ids:
            return token.encode()
        # These decoders treat the first token of a text apart, so its text is what a second one adds.
        once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
        return (twice.removeprefix(once) or token).encode()


def _load(path: Path) -> Any:
    try:
        if (path / "tokenizer.json").is_file():
            # Complete in itself. AutoTokenizer would take its content over into a class of the model's own, and import
            # torch for it: seconds and 200 MB in a process that needs neither.
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        _set_bos_and_eos(tokenizer, path)
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"The tokenizer in {path} cannot be loaded: {first_line.rstrip('.')}. Check that its files are complete."
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"The tokenizer in {path} has no fast form; add a tokenizer.json to the model's directory.")
    return tokenizer


def _set_bos_and_eos(tokenizer: Any, path: Path) -> None:
    """transformers 5 reads `add_bos_token` and `add_eos_token` of tokenizer_config.json only where there is no
    tokenizer.json, and without its classes' defaults. What it saved itself has neither, but all in tokenizer.json."""
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    adds_bos = _ADDS_BOS.get((settings.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer"))
    names = ("add_bos_token", "add_eos_token")
    flags = {name: settings[name] for name in names if isinstance(settings.get(name), bool)}
    is_alone = (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file()
    if adds_bos is not None and (flags or is_alone):
        tokenizer.add_bos_token = flags.get("add_bos_token", adds_bos)
        tokenizer.add_eos_token = flags.get("add_eos_token", False)


def _stand_in(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: byte for char, byte in _byte_level_alphabet().items() if byte < vocab_size}
    vocab |= {f"Ġw{token_id}": token_id for token_id in range(256, vocab_size)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


def _fallback_bytes(backend: tokenizers.Tokenizer) -> dict[int, bytes]:
    spellings = ((byte, f"<0x{byte:{form}}>") for byte in range(256) for form in ("02X", "02x"))
    ids = ((backend.token_to_id(token), byte) for byte, token in spellings)
    return {token_id: bytes([byte]) for token_id, byte in ids if token_id is not None}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the rest follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return alphabet


def load_tokenizer(path: str | Path, load_format: str) -> Tokenizer:
    """As `open_tokenizer`. Raises `UserError`, also for a chat template that cannot be used."""
    tokenizer = open_tokenizer(path, load_format)
    tokenizer.chat_template.check()
    return tokenizer


def open_tokenizer(path: str | Path, load_format: str) -> Tokenizer:
    """The tokenizer of a model directory; with load format "dummy" a stand-in where the directory has none. Raises
    `UserError`."""
    stand_in_vocab_size = None
    config_file = Path(path) / "config.json"
    if load_format == "dummy" and config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        stand_in_vocab_size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return Tokenizer(path, stand_in_vocab_size=stand_in_vocab_size)
