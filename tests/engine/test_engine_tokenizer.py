from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_fakes import TINY
from transformers import AutoTokenizer

from miniserve.core import InvalidRequest, UserError
from miniserve.engine.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


TEXTS = ["", "Hello, world!", "  two  spaces ", "naïve 日本語 😀", "a<|im_end|>b", "x\n\n\ny\t1234567890"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_and_texts_are_those_of_transformers(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> None:
    reference = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer.encode(text, add_special_tokens)
    assert ids == reference(text, add_special_tokens=add_special_tokens)["input_ids"]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == reference.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def test_token_bytes_put_together_are_the_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_str(tokenizer.encode("a b")[-1]) == " b"
    assert tokenizer.token_bytes(10**6) == b""


def test_it_knows_its_special_tokens(tokenizer: Tokenizer) -> None:
    info = tokenizer.info()
    assert (info["eos_token"], info["pad_token"], info["bos_token"]) == ("<|im_end|>", "<|endoftext|>", None)
    assert tokenizer.encode("<|im_end|>")[0] in tokenizer.special_token_ids
    assert tokenizer.vocab_size == 2048


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        tokenizer.encode("\ud83d")


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    encoded, turns = threading.Event(), []

    def encode() -> None:
        tokenizer.encode("a " * 200_000)
        encoded.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not encoded.wait(0.001):
        turns.append(None)
    thread.join()
    assert len(turns) > 10


def test_a_directory_without_a_tokenizer_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 1000}))
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path, "auto")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path, "auto")


def test_dummy_weights_get_a_stand_in_that_spells_every_id(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 1000}))
    tokenizer = load_tokenizer(tmp_path, "dummy")
    assert tokenizer.vocab_size == 1000
    assert tokenizer.encode("hé") == list("hé".encode())
    assert tokenizer.decode([*b"ok", 256, 999]) == "ok w256 w999"


def test_threads_may_share_it(tokenizer: Tokenizer) -> None:
    texts = [f"{text} {index}" for index in range(50) for text in TEXTS]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected
