"""The grammars and the made-up vocabulary of the benchmark of masked steps."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.masked import GRAMMARS, make_tokenizer
from miniserve.core import SamplingParams
from miniserve.engine.grammar import Matchers, Words
from miniserve.engine.tokenizer import Tokenizer


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_grammar_goes_on_whatever_is_drawn(name: str, tmp_path: Path) -> None:
    make_tokenizer(3000).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 3000 and tokenizer.spells_bytes
    matchers = Matchers(lambda: Words(tokenizer, 3000, [5]))
    params = SamplingParams(grammar=GRAMMARS[name], ignore_eos=True, max_tokens=None)
    matcher, rng = matchers.start(params).result(), random.Random(1)
    for _ in range(200):
        masks = matchers.masks([(0, matcher)])
        assert masks.entries == [0], matcher.error
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(masks.bits, dtype=np.uint8), bitorder="little"))
        assert 5 not in allowed
        matcher.accept(int(rng.choice(allowed)))
    assert not matcher.ended and matcher.error is None
