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


def test_the_part_for_a_gpu_runs_on_a_cpu_too(tmp_path, capsys):
    """Where there is no GPU nobody would notice that it is broken."""
    out = tmp_path / "runs" / "gpu.json"
    bench.main(["--gpu", "--tiny", "--out", str(out)])
    (record,) = json.loads(out.read_text()).values()
    rows, phases = record["rows"], ("sampling", "verification", "exploration")
    assert set(rows) == {
        "gpu_tokens_16", "gpu_tokens_32", "gpu_cache", "gpu_out_of_memory", "gpu_step1_grpo", "gpu_step1_gspo",
        "gpu_save", "gpu_resume",
        *(f"gpu_{what}_{phase}" for what in ("seconds", "memory") for phase in phases)}
    assert all(rows[f"gpu_seconds_{phase}"]["ours"] > 0 for phase in phases)
    assert rows["gpu_cache"]["taken"] == 4 * 8 * (128 + 64) and rows["gpu_out_of_memory"]["times"] == 0
    for base in ("grpo", "gspo"):  # in fp32 sampler and trainer agree
        assert rows[f"gpu_step1_{base}"]["gap"] < 1e-4 and rows[f"gpu_step1_{base}"]["clipped"] == 0
    assert not list(out.parent.glob("tmp*"))  # the checkpoint of 4B would be 45 GiB
    with pytest.raises(SystemExit):
        bench.torch.cuda.is_available() and sys.exit()  # where there is one, it would run
        bench.main(["--gpu", "--out", str(out)])
    assert "needs a GPU" in capsys.readouterr().err or bench.torch.cuda.is_available()


def test_costs_are_those_of_a_napkin():
    """4B: 2 FLOPs a weight and token forward, 8 with the backward pass and what it computes again."""
    sizes = dict(bench.TINY, hidden_size=256, intermediate_size=1024)
    with bench.torch.device("meta"):
        shapes = bench.Qwen3ForCausalLM(bench.bench_config(4096, **sizes))
    weights = sum(p.numel() for p in shapes.parameters() if p.ndim == 2)  # the head is the embedding
    attention = 4 * 8**2 * 2 * 8  # at 8 tokens: scores and sums over values, of 2 heads of 8
    assert bench.flops(8, False, **sizes) == 2 * 8 * weights + attention
    stops_before = 2 * 8 * 256 * 1024  # a layer is computed again only up to its last product
    assert bench.flops(8, True, **sizes) == 4 * (2 * 8 * weights + attention) - stops_before
    waves = list(bench.schedule([100] * 7 + [300], prompt=10, room=10**6))
    assert waves[0] == (10, 0) and waves[1] == (8, 11)
    assert waves[-1] == (1, 10 + 3 * 128) and len(waves) == 1 + 3 * 128
    narrow = list(bench.schedule([100] * 8, prompt=10, room=2 * 138))
    assert sum(columns > 0 for _, columns in narrow) == 4 * 128 and max(n for n, c in narrow if c) == 2


def test_a_greedy_difference_is_found(monkeypatch):
    """What is compared must be the same: the check itself must be able to fail."""
    bench.check_greedy()
    plain = bench.generate
    monkeypatch.setattr(bench, "generate", lambda *args, **options: torch.ones_like(plain(*args, **options)))
    with pytest.raises(AssertionError, match="differ"):
        bench.check_greedy()
