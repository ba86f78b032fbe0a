"""bench.py at a tiny size, so that it does not rot: no speed is a failure. Needs TRL.

make test-trl          or          python -m pytest -q assets/test_bench.py
"""

import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
pytest.importorskip("trl")

import bench

TINY = dict(vocabulary=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            head_dim=8)


def test_every_row_is_measured_on_both_sides_and_written(tmp_path, monkeypatch):
    """Guards against a script that only its author could run, and a record that forgets other machines."""
    out = tmp_path / "runs" / "bench.json"
    out.parent.mkdir()
    measured_elsewhere = {"versions": {}, "rows": {"sampling_short": {"ratio": 3.0}}}
    out.write_text(json.dumps({"another processor": measured_elsewhere}))
    monkeypatch.setitem(bench.SIZES, "short", bench.Size(16, 2))
    bench.main(["--only", "short", "--prompts", "4", "--out", str(out)])
    records = json.loads(out.read_text())
    assert records.pop("another processor") == measured_elsewhere
    (record,) = records.values()
    assert set(record["versions"]) == {"torch", "transformers", "trl"}
    against_trl = {f"{what}_short_{kind}" for what in ("grpo", "pipo_vs_one", "pipo_vs_two")
                   for kind in ("alive", "typical")}
    assert set(record["rows"]) == {"sampling_short", "verify_over_explore_short", *against_trl}
    looked_back = record["rows"].pop("verify_over_explore_short")
    assert set(looked_back) == {"verification", "exploration", "ratio", "mean_lengths"}
    assert looked_back["ratio"] > 0
    for row in record["rows"].values():
        assert row["ratio"] == row["theirs"] / row["ours"] > 0
        assert len(row["mean_lengths"]) == 2 and all(1 <= length <= 16 for length in row["mean_lengths"])


def test_log_probabilities_take_less_memory_in_chunks():
    """At a vocabulary of 20,000 the logits of 2,048 tokens are 0.16 GB."""
    assert 0 < bench.logprob_memory("chunked", 20_000) < bench.logprob_memory("plain", 20_000)


def test_the_part_for_a_gpu_runs_on_a_cpu_too(tmp_path):
    """Where there is no GPU nobody would notice that it is broken."""
    report = bench.Report()
    bench.bench_4b(report, tmp_path, "cpu", limit=128, count=2, waves=(8,), **TINY)
    assert report.rows["gpu_tokens_8"]["ratio"] > 0
    assert report.rows["gpu_iteration_logprob_gap"]["ours"] < 1e-3
    assert report.rows["gpu_iteration_verification"]["ours"] > 0


def test_a_greedy_difference_is_found(monkeypatch):
    """What is compared must be the same: the check itself must be able to fail."""
    bench.check_greedy()
    plain = bench.generate
    monkeypatch.setattr(bench, "generate", lambda *args, **options: torch.ones_like(plain(*args, **options)))
    with pytest.raises(AssertionError, match="differ"):
        bench.check_greedy()
