"""Incremental text is exactly the text of all ids, and stop strings end it at the right character."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from engine_fakes import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from miniserve.core import SamplingParams
from miniserve.engine.detokenizer import Detokenizer, StopStrings
from miniserve.engine.tokenizer import Tokenizer

exact = settings(derandomize=True, deadline=None, max_examples=200)
TEXT = ["the quick brown fox héllo wörld", "日本語のテキスト 😀🎉 naïve", "1 + 2 = 3\n\nDone. <tag>"] * 4


@cache
def tiny() -> Tokenizer:
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level with added tokens inside, outside and across the byte alphabet, special and not."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>", "<é>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("é"), AddedToken("two words"), AddedToken("日本")])
    return _saved(backend, tmp_path_factory.mktemp("odd"))


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.fixture(scope="module", params=["llama", "metaspace", "none"])
def sentencepiece(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tokenizer:
    """As Llama 2's: metaspace, raw bytes for what the vocabulary lacks, the first space stripped; and simpler ones."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁a", "b", "c", "▁▁", "é", ".", "�"]
    backend = Backend(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    if request.param != "none":
        backend.decoder = decoders.Sequence(LLAMA) if request.param == "llama" else decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _saved(backend, tmp_path_factory.mktemp("sentencepiece"))


def _saved(backend: Backend, path: Path) -> Tokenizer:
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return Tokenizer(path)


def incremental(tokenizer: Tokenizer, ids: list[int], skip: bool = True, prompt: tuple[int, ...] = ()) -> str:
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip), prompt)
    pieces = [detokenizer.push([token_id]).text for token_id in ids]
    return "".join(pieces) + detokenizer.finish().text


@exact
@given(st.lists(st.integers(0, 2100), max_size=40), st.booleans())
def test_pieces_make_the_whole_text_for_any_ids(ids: list[int], skip: bool) -> None:
    assert incremental(tiny(), ids, skip) == tiny().decode(ids, skip_special_tokens=skip)


@exact
@given(data=st.data(), skip=st.booleans())
def test_pieces_make_the_whole_text_with_odd_added_tokens(odd: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, odd.vocab_size + 3), max_size=40))
    assert odd.byte_level
    assert incremental(odd, ids, skip) == odd.decode(ids, skip_special_tokens=skip)


@exact
@given(data=st.data(), skip=st.booleans())
def test_pieces_make_the_whole_text_with_sentencepiece(
    sentencepiece: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    any_id = st.integers(0, sentencepiece.vocab_size + 3)
    broken = st.sampled_from([3 + byte for byte in "é日😀".encode()])
    words = st.integers(259, sentencepiece.vocab_size - 1)
    ids = data.draw(st.lists(st.one_of(any_id, broken, words), max_size=40))
    assert not sentencepiece.byte_level
    assert incremental(sentencepiece, ids, skip) == sentencepiece.decode(ids, skip_special_tokens=skip)


@exact
@given(st.lists(st.integers(0, 2047), max_size=40), st.integers(1, 7))
def test_pieces_do_not_depend_on_how_many_ids_come_at_once(ids: list[int], size: int) -> None:
    detokenizer = Detokenizer(tiny(), SamplingParams())
    pieces = [detokenizer.push(ids[start : start + size]).text for start in range(0, len(ids), size)]
    assert "".join(pieces) + detokenizer.finish().text == tiny().decode(ids)


@pytest.mark.parametrize("sentencepiece", ["llama", "metaspace"], indirect=True)
def test_a_sentence_goes_on_after_its_prompt(sentencepiece: Tokenizer) -> None:
    the, a = (sentencepiece._backend.token_to_id(piece) for piece in ("▁the", "▁a"))
    assert incremental(sentencepiece, [a, the], prompt=(the,)) == " a the"
    assert incremental(sentencepiece, [a, the]) == "a the"


def test_half_a_character_is_held_back_and_flushed_as_the_replacement() -> None:
    tokenizer = tiny()
    by_byte = {tokenizer.token_bytes(token_id): token_id for token_id in range(2048)}
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    emoji = "😀".encode()
    assert [detokenizer.push([by_byte[bytes([byte])]]).text for byte in emoji] == ["", "", "", "😀"]
    assert detokenizer.push([by_byte[emoji[:1]], by_byte[emoji[1:2]]]).text == ""
    assert detokenizer.finish().text == "\N{REPLACEMENT CHARACTER}"


def find_stop(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The definition: append character by character; the first stop string that the text ends with wins, the longest
    where there are several."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(
    text=st.text("ab\n", max_size=24),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=24, max_size=24),
    include=st.booleans(),
)
def test_stop_strings_are_found_as_defined_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopStrings(stops, include)
    expected_text, expected_stop = find_stop(text, tuple(stops), include)
    shown, start = "", 0
    for cut in cuts:
        piece, stop = matcher.push(text[start : start + cut])
        shown, start = shown + piece, start + cut
        if stop is None:
            assert expected_text.startswith(shown), "text was shown that a stop string took back"
        else:
            assert (shown, stop) == (expected_text, expected_stop)
            return
    assert expected_stop is None
    assert shown + matcher.flush() == expected_text


def run(text: str, **params: object) -> tuple[str, int, str | None]:
    tokenizer = tiny()
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params))  # type: ignore[arg-type]
    shown, used = "", 0
    for token_id in tokenizer.encode(text):
        piece, count, stop = detokenizer.push([token_id])
        shown, used = shown + piece, used + count
        if stop is not None:
            return shown, used, stop
    piece, _, stop = detokenizer.finish()
    return shown + piece, used, stop


def test_a_stop_string_is_cut_or_kept() -> None:
    assert run("one two three four", stop=("three",))[::2] == ("one two ", "three")
    assert run("one two three four", stop=("three",), include_stop_str_in_output=True)[::2] == (
        "one two three",
        "three",
    )


def test_a_beginning_of_a_stop_string_that_comes_to_nothing_is_shown_in_the_end() -> None:
    assert run("one two thre", stop=("three",))[::2] == ("one two thre", None)


def test_a_stop_string_does_not_fire_before_min_tokens() -> None:
    tokenizer = tiny()
    text = "stop, and stop, and stop, and"
    num_first = len(tokenizer.encode("stop, and"))
    shown, used, stop = run(text, stop=("stop",), min_tokens=num_first, max_tokens=100)
    assert (shown, stop) == ("stop, and ", "stop")
    assert used > num_first
    assert run(text, stop=("stop",), min_tokens=99, max_tokens=100)[::2] == (text, None)


def test_tokens_behind_the_stop_string_are_not_used() -> None:
    tokenizer = tiny()
    ids = tokenizer.encode("one two three four five six")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("three",)))
    decoded = detokenizer.push(ids)
    assert decoded.text == "one two " and decoded.stop == "three"
    assert tokenizer.decode(ids[: decoded.num_tokens]).rstrip() == "one two three"
