"""The step log by a device's own clock: marked `gpu`, run by hand with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from miniserve import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_a_gpus_steps_have_its_own_times() -> None:
    llm = LLM(device="cuda", max_num_seqs=8, kv_cache_memory=64 << 20, progress=False)
    assert llm.info.traffic is not None and llm.info.traffic.bandwidth is not None
    assert 1e11 < llm.info.traffic.bandwidth < 2e13
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    llm.generate([[5, 6, 7]] * 5, params, progress=False)
    records = [record for record in llm._loop.log.records() if record.kind == "decode"]
    assert len(records) == 99
    for record in records:
        assert record.device is not None and record.idle is not None
        assert 0 < record.device < 1 and 0 <= record.idle < 1
        assert record.bucket == 0 or record.bucket >= record.rows == 5
    # What the device says together is what the host saw pass.
    passed = records[-1].start - records[0].start
    assert sum((record.device or 0) + (record.idle or 0) for record in records[:-1]) == pytest.approx(passed, rel=0.2)
    assert llm.step_totals.timed_host > 0
