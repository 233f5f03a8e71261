from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from engine_fakes import TINY
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from miniserve.core import InvalidRequest, UserError
from miniserve.engine.tokenizer import Tokenizer, load_tokenizer
from miniserve.models.generation_config import load_generation_defaults


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


BOS, EOS = 256, 257
ADDED = processors.TemplateProcessing(single="<s>:0 $A:0", pair="<s>:0 $A:0 $B:0", special_tokens=[("<s>", BOS)])
PLAIN = processors.ByteLevel(trim_offsets=False)
BOTH = processors.Sequence([PLAIN, ADDED])


@pytest.mark.parametrize(
    ("post_processor", "settings", "around"),
    [
        (PLAIN, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False}, ([BOS], [])),
        (PLAIN, {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, ([BOS], [EOS])),
        (PLAIN, {"tokenizer_class": "GPTNeoXTokenizer", "add_eos_token": True}, ([], [EOS])),
        (PLAIN, {"add_bos_token": True}, ([BOS], [])),
        (PLAIN, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": None}, ([], [])),
        (None, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, ([BOS], [])),
        (ADDED, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, ([BOS], [])),
        (BOTH, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, ([BOS], [])),
        (ADDED, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, ([], [])),
        # What transformers 5 saves has no flags, but all in tokenizer.json.
        (ADDED, {"tokenizer_class": "LlamaTokenizer"}, ([BOS], [])),
        (PLAIN, {"tokenizer_class": "LlamaTokenizer"}, ([], [])),
        # Classes that never took the flags; training scripts leave them there.
        (PLAIN, {"tokenizer_class": "Qwen2Tokenizer", "add_eos_token": True}, ([], [])),
        (ADDED, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, ([BOS], [])),
    ],
)
def test_bos_and_eos_are_added_as_transformers_4_57_does(
    tmp_path: Path, post_processor: Any, settings: dict[str, object], around: tuple[list[int], list[int]]
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    text = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [*around[0], *text, *around[1]]
    assert text == [alphabet.index("h"), alphabet.index("i")]


@pytest.mark.parametrize(
    ("settings", "add_bos", "add_eos"),
    [({}, True, False), ({"add_bos_token": False, "add_eos_token": True}, False, True)],
)
def test_a_sentencepiece_model_alone_is_a_tokenizer(
    tmp_path: Path, settings: dict[str, bool], add_bos: bool, add_eos: bool
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox", "one two three"] * 20),
        model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer(tmp_path)
    for text in ("the fox", "two\n\ttwo  日 ", "three"):
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
        assert tokenizer.encode(text) == reference.encode(text, add_bos=add_bos, add_eos=add_eos)
        assert tokenizer.decode(reference.encode(text)) == text
    assert load_generation_defaults(tmp_path).eos_token_ids == {reference.eos_id()}


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
