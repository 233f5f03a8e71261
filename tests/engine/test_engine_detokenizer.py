"""Incremental text is exactly the text of all ids, and stop strings end it at the right character."""

from __future__ import annotations

import codecs
import json
from functools import cache
from itertools import groupby
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


_SPACES = decoders.Replace("▁", " ")
_STRIP = decoders.Strip(" ", 1, 0)
OTHER_DECODERS = {
    "llama": decoders.Sequence([_SPACES, decoders.ByteFallback(), decoders.Fuse(), _STRIP]),
    "gemma": decoders.Sequence([_SPACES, decoders.ByteFallback(), decoders.Fuse()]),
    "fuse": decoders.Sequence([_SPACES, decoders.Fuse(), _STRIP]),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(),
    "suffix": decoders.BPEDecoder(),
    "none": None,
}
PIECES = ["▁", "▁the", "▁a", "b", "c", "▁▁", "é", ".", "�", "##ing", "low</w>", " "]
BREAK = "\ue000"  # stands between parts of a text that the library must not decode together; no answer has it
FIRST_PIECE = 3 + 256


@pytest.fixture(scope="module", params=OTHER_DECODERS)
def sentencepiece(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tokenizer:
    """As Llama 2's: metaspace, raw bytes for what the vocabulary lacks, the first space stripped; and simpler ones."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, BREAK]
    backend = Backend(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    if (decoder := OTHER_DECODERS[request.param]) is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _saved(backend, tmp_path_factory.mktemp("sentencepiece"))


def piece(tokenizer: Tokenizer, text: str) -> int:
    token_id = tokenizer._backend.token_to_id(text)
    assert token_id is not None
    return int(token_id)


def raw(text: str) -> list[int]:
    """The text in raw bytes of the sentencepiece vocabularies."""
    return [3 + byte for byte in text.encode()]


def whole_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> tuple[str, int]:
    """The library's decoding, but that whole characters before a break in a run of bytes stay; and how many U+FFFD at
    its end stand for bytes that may become a character yet."""
    if tokenizer.byte_level:
        kept = [i for i in ids if not (skip and i in tokenizer.special_token_ids)]
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(b"".join(map(tokenizer.token_bytes, kept)))
        return tokenizer.decode(ids, skip), len(utf8.getstate()[0].decode(errors="replace"))
    known = [i for i in ids if i < tokenizer.vocab_size and not (skip and i in tokenizer.special_token_ids)]
    separated: list[int] = []
    num_begun = 0
    for is_raw, group in groupby(known, tokenizer.fallback_bytes.__contains__):
        run, num_begun = list(group), 0
        if is_raw:
            data = b"".join(map(tokenizer.token_bytes, run))
            num_whole = _num_whole(data)
            num_begun = len(run) - num_whole
            if num_begun:
                run.insert(num_whole, piece(tokenizer, BREAK))
        separated += run
    return tokenizer.decode(separated, skip).replace(BREAK, ""), num_begun


def _num_whole(data: bytes) -> int:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


def check_every_cut(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Wherever the prompt ends, the answer is the decoding of all without that of the prompt; a character that the
    prompt begins and the answer completes belongs to the answer."""
    whole, _ = whole_text(tokenizer, ids, skip)
    for cut in range(len(ids) + 1):
        before, num_begun = whole_text(tokenizer, ids[:cut], skip)
        if not whole.startswith(before):
            before = before[: len(before) - num_begun]
        assert whole.startswith(before)
        assert incremental(tokenizer, ids[cut:], skip, tuple(ids[:cut])) == whole[len(before) :], cut


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
    ids = data.draw(st.lists(st.integers(0, odd.vocab_size + 3), max_size=20))
    assert odd.byte_level
    check_every_cut(odd, ids, skip)


@exact
@given(data=st.data(), skip=st.booleans())
def test_pieces_make_the_whole_text_with_sentencepiece(
    sentencepiece: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    words = st.integers(FIRST_PIECE, FIRST_PIECE + len(PIECES) - 1).map(lambda word: [word])
    special_or_unknown = st.sampled_from([[0], [1], [2], [sentencepiece.vocab_size + 3]])
    characters = st.sampled_from("é日😀\n").map(raw)
    any_byte = st.one_of(st.sampled_from(raw("é日😀")), st.integers(4, 258)).map(lambda byte: [byte])
    parts = data.draw(st.lists(st.one_of(words, words, special_or_unknown, characters, any_byte), max_size=12))
    ids = [token_id for part in parts for token_id in part if token_id not in raw(" ")]
    assert not sentencepiece.byte_level
    check_every_cut(sentencepiece, ids, skip)


@pytest.mark.parametrize("sentencepiece", ["llama"], indirect=True)
@pytest.mark.parametrize("last", ["\n", "\t", "é"])
def test_the_answers_first_space_stays_after_a_prompt_that_ends_in_raw_bytes(
    sentencepiece: Tokenizer, last: str
) -> None:
    prompt = (piece(sentencepiece, "▁the"), *raw(last))
    assert incremental(sentencepiece, [piece(sentencepiece, "▁▁"), piece(sentencepiece, "▁a")], prompt=prompt) == "   a"


@pytest.mark.parametrize("sentencepiece", ["llama"], indirect=True)
def test_the_answers_first_space_stays_after_a_prompt_that_ends_in_a_hidden_token(sentencepiece: Tokenizer) -> None:
    the, a = piece(sentencepiece, "▁the"), piece(sentencepiece, "▁a")
    assert incremental(sentencepiece, [a], prompt=(1, the, 2)) == " a"
    assert incremental(sentencepiece, [a], prompt=(1,)) == "a", "there is no text before it"


@pytest.mark.parametrize("sentencepiece", ["llama", "gemma"], indirect=True)
def test_raw_bytes_are_shown_with_the_token_that_makes_them_a_character(sentencepiece: Tokenizer) -> None:
    detokenizer = Detokenizer(sentencepiece, SamplingParams(), [piece(sentencepiece, "▁the")])
    ids = [*raw("\né"), *raw("日")[:2], piece(sentencepiece, "▁a")]
    assert [detokenizer.push([token_id]).text for token_id in ids] == ["\n", "", "é", "", "", "�� a"]


@pytest.mark.parametrize("sentencepiece", ["llama"], indirect=True)
def test_a_stop_string_ends_with_the_raw_byte_that_completes_it(sentencepiece: Tokenizer) -> None:
    the, a = piece(sentencepiece, "▁the"), piece(sentencepiece, "▁a")
    detokenizer = Detokenizer(sentencepiece, SamplingParams(stop=("\n",)), [a])
    assert detokenizer.push([the, *raw("\n"), a]) == (" the", 2, "\n")


def test_a_character_that_the_prompt_begins_is_whole_in_the_answer() -> None:
    tokenizer = tiny()
    ids = [piece(tokenizer, char) for char in "ðŁĺĢ"]
    a, b = piece(tokenizer, "a"), piece(tokenizer, "b")
    assert incremental(tokenizer, [*ids[2:], a], prompt=(b, *ids[:2])) == "😀a"
    assert incremental(tokenizer, [a], prompt=(b, *ids[:2])) == "a", "the prompt's text has the replacement"


@exact
@given(st.lists(st.integers(0, 2047), max_size=40), st.integers(1, 7))
def test_pieces_do_not_depend_on_how_many_ids_come_at_once(ids: list[int], size: int) -> None:
    detokenizer = Detokenizer(tiny(), SamplingParams())
    pieces = [detokenizer.push(ids[start : start + size]).text for start in range(0, len(ids), size)]
    assert "".join(pieces) + detokenizer.finish().text == tiny().decode(ids)


@pytest.mark.parametrize("sentencepiece", ["llama", "metaspace"], indirect=True)
def test_a_sentence_goes_on_after_its_prompt(sentencepiece: Tokenizer) -> None:
    the, a = piece(sentencepiece, "▁the"), piece(sentencepiece, "▁a")
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


def test_long_stop_strings_cost_what_the_text_comes_to_of_them() -> None:
    text = "".join(f"line {index}\n" for index in range(100))
    stops = [text + "end" * 2000 + str(index) for index in range(256)]
    matcher = StopStrings(stops, False)
    assert [matcher.push(char) for char in text] == [("", None)] * len(text)
    assert len(matcher._depth) == len(text) + 1, "one state for each character of the text, and the empty one"
    assert matcher.push("end" * 2000 + "255") == ("", stops[2]), "complete before number 255"


def test_a_hidden_special_token_ends_the_text_where_its_text_is_a_stop_string() -> None:
    tokenizer = tiny()
    ids = [*tokenizer.encode("one two<|im_end|>"), *tokenizer.encode(" three")]
    end = len(tokenizer.encode("one two<|im_end|>"))
    for skip in (True, False):
        for include in (True, False):
            params = SamplingParams(
                stop=("two!", "<|im_end|>"), skip_special_tokens=skip, include_stop_str_in_output=include
            )
            decoded = Detokenizer(tokenizer, params).push(ids)
            assert decoded == ("one two" + "<|im_end|>" * include, end, "<|im_end|>")
    late = SamplingParams(stop=("<|im_end|>",), min_tokens=end, max_tokens=99)
    assert Detokenizer(tokenizer, late).push(ids) == ("one two three", len(ids), None)


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
