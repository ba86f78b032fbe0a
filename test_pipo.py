"""What must hold in pipo.py, in the order of its sections. Read `test_start_here` first, three iterations of
PIPO by hand; every other docstring names the bug that its test guards against.

    make test                                                       # all: on the CPU, offline, in a minute
    .venv/bin/python -m pytest -q test_pipo.py -k start_here        # some, by a part of their names

    section         what is proven there
    Start here      the order of an iteration, window, xi, phi and rewards, on numbers that fit a napkin
    Settings        every number has a bound and is held to it; randomness depends on its key alone
    Mathematics     advantages, tracker and rewards by hand; the four losses against scalar loops, and their
                    gradients against finite differences; xi on noise and on a trend by Monte Carlo
    Update          log-probabilities against the plain softmax; a gradient that does not depend on how the
                    batch is split; no step without a signal, nor on numbers that are not finite
    Iteration       what both steps get under every base, feedback and setting, and when there is none to take
    Training        without feedback it is GRPO written out, bit for bit; the loop, data order, evaluation
    Sampling        greedy tokens are those of transformers' generate, whatever waited, was dropped or ran out
                    of room; draws follow the distribution
    Verifying       what is paid, what is not, and what hostile answers cost
    Data, models    layouts and file types, what is left out, chat templates, no dropout
    Memory          masters against plain AdamW; bf16 and LoRA resume exactly; the plan for 4B on a GPU
    Demo            its problems, and the README's first command from nothing
    Files           a resumed run equals an unbroken one; kills, Ctrl-C and breakdowns; nothing is overwritten
    Command line    what the user can put right is one sentence and exit code 2; --help says everything
    README          its commands, its tables, and the pieces to copy

Tests with `gpu` in their names run where there is one.
"""

import ast
import copy
import functools
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import fields, replace
from decimal import getcontext
from pathlib import Path
from types import SimpleNamespace
from typing import get_origin, get_type_hints

import datasets
import mpmath
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, Gemma3Config, Gemma3ForConditionalGeneration, GPT2Config,
    GPT2LMHeadModel, LlamaConfig, MistralConfig, Phi3Config, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

import pipo
from pipo import (
    BASES, Config, ImprovementTracker, UserError, extract_answer, grade, group_advantages,
    improvement_rewards, policy_loss, readable, sample, token_logprobs, verify)

HERE = Path(__file__).parent
README = HERE / "README.md"
CPU = torch.device("cpu")
torch.set_num_threads(1)  # tiny tensors gain nothing from a second, and lose much beside another process
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# ------------------------------------------------------------------------------------------------------------
# Start here. Three iterations of PIPO by hand, through the real `iteration`.
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def iterate(monkeypatch):
    """iterate(run, rewards, cfg): a real iteration -> (batch, row of metrics, what each `update` was given).

    Two things are not real: the sampler, which hands out answers that earn `rewards` (Q, G) from the
    verifier (and is not checked), and `update`, which only notes down what it was called with.
    """
    signature, calls = inspect.signature(pipo.update), []

    def noted(*args, **options):
        call = signature.bind(*args, **options)
        call.apply_defaults()
        calls.append(SimpleNamespace(**call.arguments))
        return {}

    def one_iteration(run, rewards, cfg):
        texts = [rf"\boxed{{{reward}}}" for group in rewards for reward in group]  # 1 is right
        N = len(texts)
        tokens, mask = torch.full((N, 1), 3), torch.ones(N, 1)
        batch = pipo.Batch([[7]] * N, tokens, mask, -mask, torch.zeros(N), texts)
        monkeypatch.setattr(pipo, "sample", lambda *_, **__: batch)
        monkeypatch.setattr(pipo, "update", noted)
        monkeypatch.setattr(pipo, "settle_behavior", lambda *_: None)
        calls.clear()
        _, row = pipo.iteration(run, [pipo.Problem("What is 1?", [7], "1", ("1",), {})] * len(rewards), cfg)
        return batch, row, list(calls)

    return one_iteration


def start(cfg, *past_means):
    """A run whose window holds these mean rewards."""
    tracker = ImprovementTracker(cfg.window, cfg.lam, cfg.xi_clip)
    for mu in past_means:
        tracker.push(mu)
    return pipo.Run(SimpleNamespace(device=CPU), None, None, tracker)


def close(x, expected):
    return torch.allclose(x, torch.tensor(expected), atol=1e-5)


def test_start_here(iterate):
    """PIPO on a napkin: Q = 2 prompts, G = 4 samples each, a window of K = 3 mean rewards, lambda = 0.1."""
    cfg = Config(window=3, lam=0.1, lr=1e-3, pi_lr=5e-4)
    run = start(cfg, 1/8, 2/8)  # the mean rewards of two batches before; the window has room for a third

    # Iteration 1 draws batch B1: of the first prompt's four answers one is right, of the second's two.
    b1, row, updates = iterate(run, [[1, 0, 0, 0], [1, 1, 0, 0]], cfg)
    assert row["mu"] == 3/8
    # The window held two means, not three: there is no xi, and no verification.
    assert row["feedback"] == "warmup" and row["xi"] is None
    # So there is one step only, exploration. What a sample is trained with is its advantage A: its reward
    # less its group's mean, in (sample) standard deviations of its group. 1000 has mean 1/4 and std 1/2, 1100
    # has mean 1/2 and std 1/sqrt 3.
    exploration, = updates
    s = 3**0.5 / 2
    assert exploration.batch is b1 and exploration.lr == 1e-3
    assert close(exploration.coefficients, [[1.5, -0.5, -0.5, -0.5], [s, s, -s, -s]])

    # Iteration 2 draws B2 from the policy which that step made, and more is right. Did the step on B1 help?
    b2, row, updates = iterate(run, [[1, 1, 1, 0], [1, 0, 0, 0]], cfg)
    assert row["mu"] == 4/8
    # The window is 1/8, 2/8, 3/8: mean 2/8, std 1/8. B2 stands two standard deviations above: xi = 2.
    # A rise counts in full: phi = 2.
    assert (row["mu_his"], row["sigma_his"], row["xi"], row["phi"]) == (2/8, 1/8, 2.0, 2.0)
    # Verification comes first: a second step on B1, further the same way. Each advantage is divided by the
    # mean size in its group, which leaves a = 1/(2p) for right answers and -1/(2(1-p)) for wrong ones, where
    # p is the share of right ones: 2 and -2/3 in the first group, 1 and -1 in the second. r is phi times a.
    verification, exploration = updates
    assert verification.batch is b1 and verification.lr == 5e-4 and row["coefficient"] == 2.0
    assert close(verification.coefficients, [[4, -4/3, -4/3, -4/3], [2.0, 2.0, -2.0, -2.0]])
    # Then exploration, on B2. 1110 has mean 3/4 and std 1/2.
    assert exploration.batch is b2 and exploration.lr == 1e-3
    assert close(exploration.coefficients, [[0.5, 0.5, 0.5, -1.5], [1.5, -0.5, -0.5, -0.5]])

    # Iteration 3: the reward falls. The first prompt is not solved at all: no answer stands out there.
    b3, row, updates = iterate(run, [[0, 0, 0, 0], [1, 1, 0, 0]], cfg)
    assert row["mu"] == 2/8
    # 1/8 has left the window, which is 2/8, 3/8, 4/8 now, each pushed once: mean 3/8, std 1/8, xi = -1.
    # A fall counts lambda times: phi = -0.1.
    assert (row["mu_his"], row["sigma_his"], row["xi"], row["phi"]) == (3/8, 1/8, -1.0, -0.1)
    # Verification takes a little of the step on B2 back: what was right (p = 3/4 and 1/4) is pushed down.
    verification, exploration = updates
    assert verification.batch is b2 and row["feedback"] == "negative"
    assert close(verification.coefficients, [[-0.2/3, -0.2/3, -0.2/3, 0.2], [-0.2, 0.2/3, 0.2/3, 0.2/3]])
    # Exploration learns from the second prompt alone.
    assert exploration.batch is b3
    assert close(exploration.coefficients, [[0.0, 0.0, 0.0, 0.0], [s, s, -s, -s]])


# ------------------------------------------------------------------------------------------------------------
# Shared. A tiny model, and runs of the training loop in which rewards vary.
# ------------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = [[3, 4, 5], [7], [8, 9, 10, 11, 12, 13], [2, 2]]


def tiny_model(seed=0, spread=0.3):
    """A random Qwen3 with three EOS ids among 28 tokens, so that its completions end at different lengths."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=spread, pad_token_id=0, eos_token_id=[1, 5, 9])).eval()


def letter_tokenizer(letters=LETTERS):
    """Tokens 0 and 1 are <pad> and <eos>, then a to z, or other letters."""
    characters = Tokenizer(models.BPE({c: i for i, c in enumerate(["<pad>", "<eos>", *letters])}, merges=[]))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model():
    """With the attention that load_model chooses."""
    model = tiny_model()
    model.set_attn_implementation("shared_heads")
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder and a dataset, as a user would have them."""
    where = tmp_path_factory.mktemp("start")
    tiny_model(spread=0.05).save_pretrained(where / "model")  # close to uniform: no two completions alike
    letter_tokenizer().save_pretrained(where / "model")
    rows = [{"problem": LETTERS[i % 20:i % 20 + 2 + i % 4], "answer": "1"} for i in range(40)]
    (where / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return where


def settings(folder, out, **changes):
    """A short run on them."""
    given = dict(
        model=str(folder / "model"), dataset=str(folder / "train.jsonl"), eval_every=0, steps=6, window=2,
        lr=1e-3, prompts_per_step=4, group_size=4, max_new_tokens=8, temperature=1.0, save_every=1,
        show_every=0, device="cpu", out=str(out))
    return Config(**given | changes)


def coin(completion, answer, thinking=False):
    """A grade that looks like chance and depends on the text alone."""
    return float(zlib.crc32(completion.encode()) % 3 == 0), None


@pytest.fixture
def graded_by_coin(monkeypatch):
    monkeypatch.setattr(pipo, "grade", coin)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


def batch_of(model, tokenizer, group_size=4, max_new_tokens=16):
    """A sampled batch with made-up rewards in which every group but the last is mixed."""
    batch = sample(model, tokenizer, PROMPTS, group_size, max_new_tokens, generator=pipo.rng("cpu", 0))
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    batch.advantages = group_advantages(rewards)
    return batch


def weights(model):
    """All weights of a model, or of the one in a folder, as one vector."""
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def saved(out):
    """The checkpoint of a run."""
    return torch.load(out / "checkpoint" / "state.pt")


def without_times(rows):
    return [{name: value for name, value in row.items() if not name.startswith(("seconds_", "memory_"))}
            for row in rows]


def own_process(*arguments):
    """Arguments of subprocess: `python ...`, offline, on one thread: another number rounds otherwise."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # as in this process
    return dict(args=[sys.executable, *map(str, arguments)], cwd=HERE, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ------------------------------------------------------------------------------------------------------------
# Settings. Every number has a bound and is held to it, and randomness depends on its key alone.
# ------------------------------------------------------------------------------------------------------------

TYPES = get_type_hints(Config)
OUTSIDE_AND_INSIDE = {  # what a bound says, values just beyond it, and values just within
    "above 0": ((0, -1), (1, 1e-9)),
    "0 or more": ((-1, -1e-9), (0, 1)),
    "at least 2": ((1, 0, -2), (2, 3)),
    "in [0, 1]": ((-1e-9, 1.001), (0, 0.5, 1)),
    "in [0, 1)": ((-1e-9, 1, 1.5), (0, 0.999)),
    "in (0, 1]": ((0, -1, 1.001), (1e-9, 1)),
    "finite": ((), (0, -1, 1e300)),
}


@pytest.mark.parametrize("f", [f for f in fields(Config) if TYPES[f.name] in (int, float)],
                         ids=lambda f: f.name)
def test_every_number_is_held_to_its_bound(f, monkeypatch):
    """A setting out of its range, or nan, must be named at once, not fail (or train) an hour later."""
    monkeypatch.setattr(pipo, "find_spec", lambda _: True)  # as if peft were there
    outside, inside = OUTSIDE_AND_INSIDE[f.metadata["bound"]]
    for value in (*outside, math.nan, math.inf, -math.inf):
        sentence = f"{pipo.flag(f.name)} is {value!r}: it must be {f.metadata['bound']}"
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
            pipo.validate(Config(model="any", **{f.name: value}))
    for value in inside:
        if TYPES[f.name] is float or type(value) is int:
            pipo.validate(Config(model="any", **{f.name: value}))


@pytest.mark.parametrize("f", [f for f in fields(Config) if f.metadata["choices"]], ids=lambda f: f.name)
def test_every_choice_is_one_of_those_named(f, monkeypatch):
    """From Python too: argparse guards only the command line."""
    monkeypatch.setattr(pipo, "find_spec", lambda package: True)  # as if every tracker were installed
    sentence = f"^{pipo.flag(f.name)} is 'other': it must be one of .*" + ".*".join(f.metadata["choices"])
    with pytest.raises(UserError, match=sentence):
        pipo.validate(Config(model="any", **{f.name: "other"}))
    for choice in f.metadata["choices"]:
        if choice != "cuda":
            pipo.validate(Config(model="any", device="cpu", **{f.name: choice}))


def test_a_generator_depends_on_its_key_alone():
    """Guards against draws that change with what was drawn before, or that two purposes or steps share."""
    def draw(*key):
        return tuple(torch.randint(10**9, (4,), generator=pipo.rng("cpu", *key)).tolist())

    keys = [(seed, what, step) for seed in (0, 1) for what in ("sample", "order") for step in (1, 2, 11)]
    first = [draw(*key) for key in keys]
    torch.manual_seed(5)
    assert [draw(*key) for key in reversed(keys)] == first[::-1] and len(set(first)) == len(keys)


# ------------------------------------------------------------------------------------------------------------
# The mathematics. By hand, against slow obvious versions, by finite differences and by Monte Carlo.
# ------------------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    """[1, 0, 0, 1]: mean 0.5, sample std 0.5774. Guards against ddof 0, and noise where rewards are equal."""
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [0, 0, 0, 1]]))
    assert torch.allclose(advantages[0], torch.tensor([1, -1, -1, 1]) * 0.5 / 0.57735, atol=1e-4)
    assert (advantages[1] == 0).all()
    assert torch.allclose(advantages[2], torch.tensor([-0.5, -0.5, -0.5, 1.5]), atol=1e-4)
    without_std = group_advantages(torch.tensor([[1.0, 0, 0, 0]]), normalize_std=False)
    assert torch.equal(without_std, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))
    for bad in (torch.ones(3, 1), torch.tensor([[1.0, math.nan]])):  # one sample a group; no number
        with pytest.raises(ValueError):
            group_advantages(bad)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_attribution_identities(normalize_std):
    """a_i = 1/(2p) on right answers, -1/(2(1-p)) on wrong ones, mean size 1, however A is made; else 0."""
    G = 8
    for k in range(G + 1):
        advantages = group_advantages(torch.tensor([[1.0] * k + [0.0] * (G - k)]), normalize_std)
        a = improvement_rewards(advantages, 1.0)[0]
        if k in (0, G):
            assert (a == 0).all()
            continue
        assert torch.allclose(a[:k], torch.tensor(G / (2 * k)))
        assert torch.allclose(a[k:], torch.tensor(-G / (2 * (G - k))))
        assert math.isclose(a.abs().mean(), 1, rel_tol=1e-6)
        assert torch.allclose(improvement_rewards(advantages, -0.3)[0], -0.3 * a)


def test_tracker_by_hand():
    """Window [0.1, 0.2, 0.3]: mean 0.2, sample std 0.1.

    Guards against ddof 0, against a window that holds the present (xi could then not reach 3), against a push
    too many, and against a warm-up of the wrong length.
    """
    tracker = ImprovementTracker(window=3, lam=0.1)
    for mu in (0.1, 0.2, 0.3):
        assert tracker.feedback(mu) is None
        tracker.push(mu)
    for _ in range(3):  # reading changes nothing; xi, phi, mu_his, sigma_his
        assert [round(x, 9) for x in tracker.feedback(0.5)] == [3.0, 3.0, 0.2, 0.1]
    fall = tracker.feedback(0.1)
    assert math.isclose(fall.xi, -1) and math.isclose(fall.phi, -0.1)
    tracker.push(0.5)  # the oldest leaves: [0.2, 0.3, 0.5]
    assert math.isclose(tracker.feedback(0.4).mu_his, 1 / 3)


def test_tracker_without_spread_and_with_a_cut():
    """sigma = 0 makes xi undefined, also where rounding would leave 1e-17; a cut xi; bad settings."""
    tracker = ImprovementTracker(window=8)
    for _ in range(8):
        tracker.push(0.1)
    assert tracker.full and tracker.feedback(0.9) is None
    cut = ImprovementTracker(window=2, lam=0.5, xi_clip=2.0)
    for mu in (0.50, 0.51):
        cut.push(mu)
    assert (cut.feedback(0.9).xi, cut.feedback(0.1).xi, cut.feedback(0.1).phi) == (2.0, -2.0, -1.0)
    assert list(cut.history) == [0.50, 0.51]
    for window, lam in ((1, 0.1), (8, 1.5), (8, -0.1)):
        with pytest.raises(ValueError):
            ImprovementTracker(window, lam)


def test_xi_on_a_plateau_and_on_a_trend():
    """On a plateau E[phi_0.1] is +0.43, not 0 (hence the controls); a trend of s a step reads as s(K+1)/2."""
    noise, phis = random.Random(0), []
    for _ in range(4000):
        tracker = ImprovementTracker(8, 0.1)
        for _ in range(8):
            tracker.push(noise.gauss(0, 1))
        phis.append(tracker.feedback(noise.gauss(0, 1)).phi)
    assert abs(statistics.mean(phis) - 0.43) < 0.04
    tracker = ImprovementTracker(8)
    for t in range(8):
        tracker.push(0.01 * t)
    assert math.isclose(0.08 - tracker.feedback(0.08).mu_his, 0.01 * 9 / 2)


def random_rows():
    """Log-probabilities, those of the behavior policy, advantages and mask of 6 rows of up to 5 tokens."""
    g, lengths = torch.Generator().manual_seed(0), [1, 5, 3, 2, 5, 4]
    logprobs = (-torch.rand(6, 5, generator=g, dtype=torch.float64) * 2).requires_grad_()
    behavior = logprobs.detach() + 0.4 * torch.randn(6, 5, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1.0] * n + [0.0] * (5 - n) for n in lengths], dtype=torch.float64)
    return logprobs, behavior, torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5], dtype=torch.float64), mask


def loss_by_hand(logprobs, behavior, advantages, mask, base, max_new_tokens):
    """The table of the four objectives, written as loops over Python floats."""
    low, high = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}[base]
    sequences = []
    for lp, old, A, m in zip(logprobs.tolist(), behavior.tolist(), advantages.tolist(), mask.tolist()):
        n = int(sum(m))
        ratios = [math.exp(lp[t] - old[t]) for t in range(n)]
        if base == "gspo":
            ratios = [math.exp(sum(lp[t] - old[t] for t in range(n)) / n)] * n
        sequences.append([-min(r * A, min(max(r, 1 - low), 1 + high) * A) for r in ratios])
    tokens = [x for sequence in sequences for x in sequence]
    if base in ("grpo", "gspo"):
        return sum(sum(s) / len(s) for s in sequences) / len(sequences)
    return sum(tokens) / (len(tokens) if base == "dapo" else len(sequences) * max_new_tokens)


@pytest.mark.parametrize("base", BASES)
def test_loss_against_scalar_loops_and_finite_differences(base):
    """Guards against the wrong average, the wrong ratio, and a gradient that is not that of the loss."""
    logprobs, *given = random_rows()
    objective = BASES[base]._replace(max_new_tokens=9)
    loss, metrics = policy_loss(logprobs, *given, objective)
    assert math.isclose(loss.item(), loss_by_hand(logprobs, *given, base, 9), rel_tol=1e-12)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, *given, objective)[0], logprobs)
    assert 0 < metrics["clip_fraction"] < 1


@pytest.mark.parametrize("base", BASES)
def test_losses_of_parts_add_up(base):
    """Guards against a denominator that is the part's own: with the whole's counts, they sum to the whole."""
    rows, objective = random_rows(), BASES[base]._replace(max_new_tokens=9)
    whole, _ = policy_loss(*rows, objective)
    parts = [policy_loss(*(x[part] for x in rows), objective, None, 6, rows[-1].sum())[0]
             for part in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert math.isclose(sum(parts).item(), whole.item(), rel_tol=1e-12)
    with pytest.raises(ValueError):  # (Q, G) advantages would broadcast into nonsense
        policy_loss(rows[0], rows[1], rows[2].view(2, 3), rows[3], objective)


@pytest.mark.parametrize("coefficient", [1.0, -1.0])
def test_clip_on_both_signs(coefficient):
    """The released code takes min(ratio, clip(ratio)) * r: for r < 0 that goes on pushing down what is down.

    With the coefficient inside the min, the gradient stops exactly where the ratio has moved far enough.
    """
    behavior, advantage, mask = torch.tensor([[-1.0]]), torch.tensor([coefficient]), torch.ones(1, 1)
    for ratio in (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0):
        logprob = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
        loss, metrics = policy_loss(logprob, behavior, advantage, mask)
        loss.backward()
        moved_enough = ratio > 1.2 if coefficient > 0 else ratio < 0.8
        assert (logprob.grad.item() == 0) == moved_enough == (metrics["clip_fraction"] == 1)
        if not moved_enough:
            assert math.isclose(logprob.grad.item(), -coefficient * ratio, rel_tol=1e-5)


def test_kl_is_k3_and_averaged_like_the_loss():
    """k3 = e^d - d - 1, d = log pi_ref - log pi, by hand on one token; advantages of 0 leave the KL alone."""
    logprobs, reference = torch.tensor([[-1.0, -9.0]]), torch.tensor([[-1.5, -2.0]])
    loss, metrics = policy_loss(logprobs, logprobs, torch.zeros(1), torch.tensor([[1.0, 0.0]]),
                                BASES["grpo"]._replace(kl_coef=0.5), reference)
    k3 = math.exp(-0.5) + 0.5 - 1
    assert math.isclose(loss.item(), 0.5 * k3, rel_tol=1e-6) and math.isclose(metrics["kl"], k3, rel_tol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# The update. Log-probabilities of the plain softmax, and a gradient that does not depend on how it is split.
# ------------------------------------------------------------------------------------------------------------


def test_token_logprobs_equal_the_plain_full_softmax(model, tokenizer):
    """The slow obvious version: one row at a time, all logits at once. Guards against the shift by one."""
    batch = batch_of(model, tokenizer)
    ours = token_logprobs(model, batch.prompts, batch.tokens, batch.mask, 0.7, chunk=3)
    for i, prompt in enumerate(batch.prompts):
        row = batch.tokens[i, :int(batch.mask[i].sum())]
        logits = model(torch.cat([torch.tensor(prompt), row])[None]).logits[0] / 0.7
        plain = logits.log_softmax(-1)[len(prompt) - 1:-1].gather(-1, row[:, None]).squeeze(-1)
        assert torch.allclose(ours[i, :len(row)], plain, atol=1e-5) and (ours[i, len(row):] == 0).all()
    whole = token_logprobs(model, batch.prompts, batch.tokens, batch.mask.long(), 0.7, chunk=3)  # any 0/1 mask
    assert torch.equal(whole, ours)


class Recorder(torch.optim.SGD):
    """An optimizer that only looks at gradients."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.seen = []

    def step(self):
        self.seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))


def gradient_of(update_of, model):
    """What update_of(optimizer) returns, and the gradient that the optimizer gets to see."""
    recorder = Recorder(model)
    return update_of(recorder), recorder.seen[-1]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_splitting_the_batch_does_not_change_the_gradient(model, tokenizer, base, kl_coef):
    """Guards against a denominator per micro-batch, and against dropped rows missing from it.

    Also against the last one's loss standing for the batch's. The oracle is one padded pass over all rows.
    """
    batch, results = batch_of(model, tokenizer), []
    model, reference = moved(model), tiny_model(seed=3) if kl_coef else None
    objective = BASES[base]._replace(max_new_tokens=16, kl_coef=kl_coef)
    for budget in (1, 60, 10**9):
        results.append(gradient_of(lambda optimizer: pipo.update(
            model, optimizer, batch, batch.advantages, objective, 0.0, microbatch_tokens=budget,
            max_grad_norm=1e9, reference=reference), model))
    rows = batch.prompts, batch.tokens, batch.mask
    ref_logprobs = token_logprobs(reference, *rows).detach() if kl_coef else None
    loss, means = policy_loss(token_logprobs(model, *rows), batch.behavior_logprobs,
                              batch.advantages.flatten(), batch.mask, objective, ref_logprobs)
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    for metrics, gradient in results:
        assert torch.allclose(gradient, plain, atol=1e-5 * plain.abs().max()) and plain.abs().max() > 0
        assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-3, abs_tol=1e-6)
        assert math.isclose(metrics["grad_norm"], plain.norm().item(), rel_tol=1e-4)
        if kl_coef:
            assert math.isclose(metrics["kl"], means["kl"], rel_tol=1e-4)


def moved(model):
    """A copy whose weights are a little elsewhere, so that ratios are not 1."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("base", BASES)
def test_a_minibatch_is_trained_as_a_batch_of_its_own(model, tokenizer, base):
    """Guards against groups torn apart, and denominators or a gradient that reach beyond the minibatch."""
    batch, model = batch_of(model, tokenizer), moved(model)
    options = dict(objective=BASES[base]._replace(max_new_tokens=16), lr=0.0, max_grad_norm=1e9)
    recorder = Recorder(model)
    pipo.update(model, recorder, batch, batch.advantages, minibatches=2, **options)
    assert len(recorder.seen) == 2
    for half, seen in zip((slice(0, 8), slice(8, 16)), recorder.seen):
        part = replace(batch, prompts=batch.prompts[half], tokens=batch.tokens[half], mask=batch.mask[half],
                       behavior_logprobs=batch.behavior_logprobs[half])
        _, alone = gradient_of(lambda o: pipo.update(
            model, o, part, batch.advantages.flatten()[half].view(2, 4), **options), model)
        assert torch.allclose(seen, alone, atol=1e-6 * alone.abs().max()) and alone.abs().max() > 0


def test_microbatches_cover_every_row_once_within_budget():
    """Guards against a row lost or trained twice, and a budget that counts tokens without their padding."""
    lengths = torch.tensor([5, 50, 7, 7, 31, 2, 90, 12])
    for rows in (list(range(8)), [1, 3, 4, 7]):
        parts = pipo.microbatches(torch.tensor(rows), lengths, 64)
        assert sorted(i for part in parts for i in part.tolist()) == rows
        assert all(len(part) == 1 or len(part) * lengths[part].max() <= 64 for part in parts)


@pytest.mark.parametrize("phi, direction", [(2.0, 1), (-0.2, -1)])
def test_feedback_reinforces_or_suppresses_the_previous_batch(tokenizer, phi, direction):
    """xi < 0 must make the previous batch's right answers less likely, and its wrong ones more."""
    model = tiny_model()
    batch = batch_of(model, tokenizer)
    rows = batch.prompts, batch.tokens, batch.mask
    before = token_logprobs(model, *rows).sum(1).detach()
    pipo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), batch,
                improvement_rewards(batch.advantages, phi), BASES["grpo"], 0.1)
    change = token_logprobs(model, *rows).sum(1).detach() - before
    right, wrong = batch.advantages.flatten() > 0, batch.advantages.flatten() < 0
    assert (change[right].mean() - change[wrong].mean()) * direction > 0


def test_the_learning_rate_is_the_one_of_the_call(tokenizer):
    """Guards against the rate that the optimizer was made with: pi_lr would be ignored."""
    moves = []
    for lr in (0.01, 0.02):
        model = tiny_model()
        batch, before = batch_of(model, tokenizer), weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        pipo.update(model, optimizer, batch, batch.advantages, BASES["grpo"], lr)
        moves.append(weights(model) - before)
    assert torch.allclose(2 * moves[0], moves[1], atol=1e-6) and 0 < moves[0].norm() < 0.011


def test_no_step_without_signal(tokenizer):
    """AdamW moves weights on momentum and decay even when the gradient is zero: no signal, no step at all."""
    model = tiny_model()
    batch = batch_of(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pipo.update(model, optimizer, batch, batch.advantages, BASES["grpo"], 1e-2)  # momentum to move on
    before = weights(model)
    metrics = pipo.update(model, optimizer, batch, torch.zeros_like(batch.advantages), BASES["grpo"], 1e-2)
    assert torch.equal(weights(model), before) and metrics["skipped_steps"] == 1


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_numbers_that_are_not_finite_take_no_step_and_leave_no_gradient(tokenizer, broken, masters):
    """A nan in AdamW's moments stays there for good, and a gradient left behind is part of the next step."""
    model = tiny_model()
    batch, parameters = batch_of(model, tokenizer), list(model.parameters())
    optimizer = pipo.MasterAdamW(parameters, "cpu") if masters else torch.optim.AdamW(parameters)
    pipo.update(model, optimizer, batch, batch.advantages, BASES["grpo"], 1e-2)
    before, moments = weights(model), copy.deepcopy(list(optimizer.state.values()))
    if broken == "loss":
        batch.behavior_logprobs[0, 0] = math.nan
    else:
        parameters[-1].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="loss .*gradient norm"):
        pipo.update(model, optimizer, batch, batch.advantages, BASES["grpo"], 1e-2)
    assert all(p.grad is None for p in parameters) and torch.equal(weights(model), before)
    torch.testing.assert_close(list(optimizer.state.values()), moments, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# One iteration. What both steps are given under every base, feedback and setting, and when one is not taken.
# ------------------------------------------------------------------------------------------------------------

HALF_AND_HALF, ALL_WRONG = [[1, 1, 0, 0]], [[0, 0, 0, 0]]


@pytest.mark.parametrize("base", BASES)
def test_both_steps_get_the_objective_and_the_settings(iterate, base):
    """Guards against advantages of another base (Dr. GRPO's are not divided by the std), and a lost setting.

    Also against a KL in the verification step, and a rate or a number of passes that are the other step's.
    """
    cfg = Config(base=base, window=2, kl_coef=0.01, clip_high=0.5, lr=1e-3, pi_lr=5e-4, temperature=0.9,
                 minibatches=2, microbatch_tokens=77, max_grad_norm=3.0, max_new_tokens=9, epochs=2)
    run = start(cfg, 0)
    run.reference, run.model, run.optimizer = object(), SimpleNamespace(device=CPU), object()
    b1, _, _ = iterate(run, [[1, 0, 0, 0], [1, 1, 1, 1]], cfg)
    b2, row, (verification, *exploration) = iterate(run, [[1, 1, 1, 0], [0, 0, 0, 0]], cfg)
    size = 1.0 if base == "dr_grpo" else 0.5  # of the std that is divided by
    assert close(b1.advantages, [[0.75 / size, *[-0.25 / size] * 3], [0.0] * 4])
    assert close(b2.advantages, [[*[0.25 / size] * 3, -0.75 / size], [0.0] * 4])
    phi = 2**0.5 / 10  # of 3/8 against the window 0, 5/8; the attribution is the same whatever the base
    assert close(verification.coefficients, [[2 * phi, *[-2/3 * phi] * 3], [0.0] * 4])
    assert verification.batch is b1 and verification.lr == 5e-4 and verification.reference is None
    assert len(exploration) == 2
    for step in exploration:
        assert step.batch is b2 and torch.equal(step.coefficients, b2.advantages)
        assert step.lr == 1e-3 and step.reference is run.reference
    for step in (verification, *exploration):
        assert step.model is run.model and step.optimizer is run.optimizer
        assert step.objective == BASES[base]._replace(clip_high=0.5, max_new_tokens=9, kl_coef=0.01)
        assert (step.temperature, step.minibatches) == (0.9, 2)
        assert (step.microbatch_tokens, step.max_grad_norm) == (77, 3.0)


@pytest.mark.parametrize("verdict, changes, past_mean, previous, fresh", [
    ("off", dict(feedback="none"), 1/8, HALF_AND_HALF, HALF_AND_HALF),
    ("warmup", dict(window=3), 1/8, HALF_AND_HALF, HALF_AND_HALF),
    ("sigma_zero", {}, 1/2, HALF_AND_HALF, HALF_AND_HALF),
    ("zero", {}, 3/4, [[1, 0, 0, 0]], HALF_AND_HALF),  # the window is 3/4 and 1/4, the fresh mean 1/2
    ("zero", dict(lam=0.0), 1/4, [[1, 1, 1, 0]], [[1, 0, 0, 0]]),  # a fall, and falls do not count
    ("zero_signal", {}, 1/8, ALL_WRONG, HALF_AND_HALF)], ids=lambda x: x if type(x) is str else "")
def test_where_there_is_no_verification_step(iterate, verdict, changes, past_mean, previous, fresh):
    """No xi, phi = 0, or a batch without a mixed group: a step would move weights by momentum alone."""
    cfg = Config(**dict(window=2) | changes)
    run = start(cfg, past_mean)
    iterate(run, previous, cfg)
    batch, row, updates = iterate(run, fresh, cfg)
    assert row["feedback"] == verdict and row["coefficient"] == 0
    assert [update.batch for update in updates] == [batch]


def test_the_window_takes_every_mean_once_and_first_verifies_at_step_k_plus_1(iterate):
    """Guards against a batch judged by a window with itself in it, and a mean that is not pushed."""
    cfg, means = Config(window=3), []
    run = start(cfg)
    for step, right in enumerate((1, 3, 2, 4, 0, 2, 3, 1), 1):
        _, row, _ = iterate(run, [[1] * right + [0] * (4 - right)], cfg)
        assert row["step"] == step and row["mu"] == right / 4 and (row["feedback"] == "warmup") == (step <= 3)
        if step > 3:
            xi = (row["mu"] - statistics.mean(means[-3:])) / statistics.stdev(means[-3:])
            assert math.isclose(row["xi"], xi, abs_tol=1e-12)
        means.append(row["mu"])


@pytest.fixture
def shuffled(iterate, monkeypatch):
    """shuffled(seed): of each verified step its number, how many xi came before, and which it took."""
    monkeypatch.setattr(pipo, "grade", lambda text, *_: (float(text[7:-1]), None))  # what stands in the box

    def all_steps(seed):
        cfg = Config(feedback="shuffled", window=2, lam=0.5, seed=seed)
        run, noise, xis, picks = start(cfg), random.Random(0), [], []
        for step in range(1, 121):
            torch.manual_seed(random.randrange(10**6))  # somebody else's draws must not matter
            _, row, _ = iterate(run, [[noise.random(), 0.0]], cfg)
            if row["feedback"] in ("positive", "negative"):
                phis = [xi if xi >= 0 else 0.5 * xi for xi in xis]
                picks.append((step, len(xis), phis.index(row["coefficient"])))
            xis += [] if row["xi"] is None else [row["xi"]]
        return picks

    return all_steps


def test_shuffled_draws_any_earlier_xi_by_seed_and_step(shuffled):
    """Guards against a draw of always the last xi (nearly the true one), of the present one, or of luck."""
    picks = shuffled(seed=0)
    assert picks == shuffled(seed=0) and [step for step, _, _ in picks] == list(range(4, 121))
    assert all(0 <= drawn < known == step - 3 for step, known, drawn in picks)
    ages = [known - drawn for _, known, drawn in picks]  # 1: the last
    assert Counter(ages).most_common(1)[0][1] < 20 and len(set(ages)) > 40
    places = [drawn / (known - 1) for _, known, drawn in picks[1:]]
    assert 0.4 < statistics.mean(places) < 0.6 and min(places) < 0.1 and max(places) > 0.9  # evenly
    assert [drawn for _, _, drawn in shuffled(seed=1)] != [drawn for _, _, drawn in picks]


def test_shuffled_draws_anew_at_every_step():
    """Guards against one place in the past for a whole run: here the past is the same, the step is not."""
    cfg = Config(feedback="shuffled", window=2)
    run, seen, now = start(cfg, 1/8, 2/8), set(), pipo.Feedback(0.5, 0.5, 3/16, 1/8)
    run.past_xi = [float(i) for i in range(1, 1001)]
    for run.step in range(20):
        value, verdict = pipo.feedback_coefficient(now, run, cfg)
        assert (value, verdict) == pipo.feedback_coefficient(now, run, cfg) and value in run.past_xi
        seen.add(value)
    assert len(seen) > 15


def test_constant_replaces_phi_and_nothing_else(iterate):
    """Guards against a control that verifies at other times than PIPO, and a xi missing from its log."""
    cfg = Config(feedback="constant", constant=0.43, window=2)
    run = start(cfg, 1/8)
    b1, row, _ = iterate(run, HALF_AND_HALF, cfg)
    assert row["feedback"] == "warmup"
    _, row, (verification, _) = iterate(run, [[1, 0, 0, 0]], cfg)
    assert row["coefficient"] == 0.43 and row["xi"] < 0 and row["feedback"] == "positive"
    assert verification.batch is b1
    assert close(verification.coefficients, [[0.43, 0.43, -0.43, -0.43]])


# ------------------------------------------------------------------------------------------------------------
# Training. The loop as a whole: against GRPO written out, and from what the two updates are called with.
# ------------------------------------------------------------------------------------------------------------


def test_feedback_none_is_plain_grpo_bit_for_bit(folder, tmp_path, graded_by_coin):
    """Against GRPO written out: no tracker, one optimizer step a batch, one pass over all rows."""
    cfg = settings(folder, tmp_path / "run", feedback="none", steps=4)
    rows = pipo.train(cfg)
    model, tokenizer = pipo.load_model(cfg.model, CPU), AutoTokenizer.from_pretrained(cfg.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    problems = pipo.read_problems(pipo.load_rows(cfg.dataset, "train"), tokenizer, cfg, "")
    for step in range(1, 5):
        prompts = [problem.prompt for problem in pipo.pick_problems(problems, step, cfg)]
        batch = sample(model, tokenizer, prompts, 4, 8, generator=pipo.rng("cpu", cfg.seed, "sample", step))
        A = group_advantages(torch.tensor([coin(text, "")[0] for text in batch.texts]).view(4, 4)).flatten()
        lengths = torch.tensor([len(p) for p in batch.prompts]) + batch.mask.sum(1)
        order = (A != 0).nonzero().squeeze(1)
        order = order[lengths[order].argsort(stable=True)]
        width = int(batch.mask[order].sum(1).max())
        mask = batch.mask[order, :width]
        logprobs = token_logprobs(model, [batch.prompts[i] for i in order], batch.tokens[order, :width], mask)
        ratio = (logprobs - batch.behavior_logprobs[order, :width]).exp()
        surrogate = -torch.min(ratio * A[order, None], ratio.clamp(0.8, 1.2) * A[order, None])
        ((surrogate * mask / mask.sum(1, keepdim=True)).sum() / 16).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(model), weights(tmp_path / "run" / "model"))
    assert {row["feedback"] for row in rows} == {"off"} and not any("pi_loss" in row for row in rows)


def test_loop_follows_the_algorithm(folder, tmp_path, graded_by_coin, monkeypatch):
    """The order of one iteration in a real run, from what `update` is called with.

    Verification comes first, on the previous batch, from step K + 1 on, with a_i * phi; exploration is on the
    fresh one; mu counts every sample; xi is read from the K values before it.
    """
    calls, plain_update = [], pipo.update

    def recorded(model, optimizer, batch, coefficients, **options):
        calls.append((batch, coefficients.clone(), options["lr"]))
        return plain_update(model, optimizer, batch, coefficients, **options)

    monkeypatch.setattr(pipo, "update", recorded)
    rows = pipo.train(settings(folder, tmp_path / "run", window=3, pi_lr=5e-4, steps=8))
    assert [row["feedback"] for row in rows[:3]] == ["warmup"] * 3
    assert rows[3]["feedback"] in ("positive", "negative")
    mus, previous, made = [row["mu"] for row in rows], None, iter(calls)
    for t, row in enumerate(rows):
        if t >= 3:
            window = mus[t - 3:t]
            xi = (mus[t] - statistics.mean(window)) / statistics.stdev(window)
            assert math.isclose(row["xi"], xi, rel_tol=1e-9)
            assert math.isclose(row["phi"], row["xi"] if row["xi"] >= 0 else 0.1 * row["xi"])
            assert (row["feedback"] == "zero") == (row["xi"] == 0)  # neither up nor down: no step
        if row["coefficient"]:
            batch, coefficients, lr = next(made)
            assert batch is previous and lr == 5e-4 and "pi_loss" in row
            assert torch.allclose(coefficients, improvement_rewards(previous.advantages, row["phi"]))
        batch, coefficients, lr = next(made)
        assert batch is not previous and lr == 1e-3 and torch.equal(coefficients, batch.advantages)
        rewards = torch.tensor([coin(text, "")[0] for text in batch.texts])
        assert math.isclose(row["mu"], rewards.mean(), rel_tol=1e-6) and len(rewards) == 16
        previous = batch
    assert next(made, None) is None and len(calls) > len(rows) + 3


@pytest.mark.parametrize("feedback", ["constant", "shuffled"])
def test_controls_take_the_same_steps_with_another_coefficient(folder, tmp_path, graded_by_coin, feedback):
    """A gain of PIPO must be told from that of one more step, scaled by a constant or an earlier xi's phi."""
    rows = pipo.train(settings(folder, tmp_path / "run", feedback=feedback, steps=8, lam=0.5))
    verified = ("positive", "negative")
    used = [(t, row["coefficient"]) for t, row in enumerate(rows) if row["feedback"] in verified]
    assert len(used) >= 4
    for t, coefficient in used:
        earlier = [row["xi"] for row in rows[:t] if row["xi"] is not None]
        allowed = [0.43] if feedback == "constant" else [xi if xi >= 0 else 0.5 * xi for xi in earlier]
        assert any(math.isclose(coefficient, value) for value in allowed)


def test_minibatches_take_that_many_steps_in_both_updates(folder, tmp_path, graded_by_coin, monkeypatch):
    """Guards against a verification of one step where exploration takes two, and steps not counted."""
    steps = []

    class Counting(torch.optim.AdamW):
        def step(self):
            steps.append(1)
            super().step()

    monkeypatch.setattr(pipo, "make_optimizer", lambda model, cfg: Counting(model.parameters(), lr=cfg.lr))
    rows = pipo.train(settings(folder, tmp_path / "run", minibatches=2, steps=5))
    taken = sum(2 - row["skipped_steps"] for row in rows)
    taken += sum(2 - row["pi_skipped_steps"] for row in rows if "pi_loss" in row)
    assert len(steps) == taken > 10


def test_the_ratio_can_be_against_the_trainers_own_logprobs(tokenizer):
    """In bf16 sampler and trainer differ by more than GSPO's clip: noise alone clips, before any update."""
    clipped = {}
    for behavior in ("sampler", "trainer", "auto"):
        model = tiny_model().to(torch.bfloat16)
        cfg = Config(base="gspo", behavior=behavior, max_new_tokens=24)
        run = pipo.Run(model, tokenizer, Recorder(model), ImprovementTracker(2), step=1)
        batch = pipo.ask(run, [pipo.Problem("", prompt, "1", ("1",), {}) for prompt in PROMPTS], cfg)
        coefficients = torch.tensor([[1.0, -1.0] * 4] * 4)
        clipped[behavior] = pipo.update(model, Recorder(model), batch, coefficients, BASES["gspo"], 0.0, 0.7)
    assert clipped["sampler"]["clip_fraction"] > 0.1 and clipped["sampler"]["logprob_gap"] > 1e-4
    assert clipped["trainer"]["clip_fraction"] == 0 and clipped["auto"] == clipped["trainer"]


def test_dynamic_sampling_fills_up_with_mixed_groups_and_mu_counts_them_all(folder, tmp_path, monkeypatch):
    """The released code takes mu over the kept groups: with one right in four it would read 1/2, not 1/8."""
    asked = []

    def rewards_of(batch, problems, reward=None):
        asked.append([problem.text for problem in problems])
        return torch.tensor([[1.0, 0, 0, 0] if problem.text in "bd" else [0.0] * 4 for problem in problems]), {}

    monkeypatch.setattr(pipo, "grade_all", rewards_of)
    problems = [pipo.Problem(letter, [3 + i], "", ("",), {}) for i, letter in enumerate("abcdef")]
    cfg = Config(prompts_per_step=2, group_size=4, dynamic_sampling=2, max_new_tokens=8, temperature=1.0)
    model, tokenizer = tiny_model(), letter_tokenizer()
    run = pipo.Run(model, tokenizer, Recorder(model), ImprovementTracker(2))
    batch, row = pipo.iteration(run, problems, cfg)
    assert asked == [["a", "b"], ["c", "d"]] and [p.text for p in batch.problems] == ["b", "d"]
    assert row["mu"] == 1/8 and row["zero_signal"] == 0 and batch.rewards.tolist() == [[1, 0, 0, 0]] * 2
    again = token_logprobs(model, batch.prompts, batch.tokens, batch.mask)
    assert (again - batch.behavior_logprobs).abs().max() < 1e-4  # rows and their log-probabilities stay together
    changes = dict(dynamic_sampling=1, steps=3, feedback="constant")
    monkeypatch.undo()
    assert len(pipo.train(settings(folder, tmp_path / "run", **changes))) == 3


def test_a_second_epoch_takes_a_second_step(folder, tmp_path, graded_by_coin):
    """Guards against one epoch too few, and one whose ratio is taken against the policy after the first."""
    runs = {n: pipo.train(settings(folder, tmp_path / str(n), steps=3, feedback="none", epochs=n))
            for n in (1, 2)}
    assert runs[1][0]["mu"] == runs[2][0]["mu"]
    assert runs[1][0]["ratio"] == pytest.approx(1, abs=1e-5) and abs(runs[2][0]["ratio"] - 1) > 1e-5
    for epochs in (1, 2):
        assert next(iter(saved(tmp_path / str(epochs))["optimizer"]["state"].values()))["step"] == 3 * epochs


@pytest.mark.parametrize("Q, n", [(5, 10), (3, 7), (10, 10), (25, 10), (3, 1)])
def test_every_epoch_shows_every_problem_once(Q, n):
    """Guards against an order that starts over on resume, and problems lost or doubled where an epoch ends.

    Q does not divide n, or is larger than it: a step then takes from two epochs, or from several.
    """
    problems, cfg = list(range(n)), Config(prompts_per_step=Q)
    steps = [pipo.pick_problems(problems, step, cfg) for step in range(1, 4 * n + 1)]
    assert all(len(step) == Q for step in steps)
    shown = sum(steps, [])
    epochs = [shown[i:i + n] for i in range(0, len(shown), n)]
    assert all(sorted(epoch) == problems for epoch in epochs) and len(epochs) == 4 * Q
    assert n == 1 or sum(a == b for a, b in zip(epochs, epochs[1:])) == 0  # in a new order
    assert pipo.pick_problems(problems, 3, cfg) == steps[2]  # from the step alone
    other = sum((pipo.pick_problems(problems, step, replace(cfg, seed=1)) for step in (1, 2, 3)), [])
    assert n == 1 or other != shown[:3 * Q]


def test_evaluation_is_the_mean_grade_with_its_standard_error(model, tokenizer, graded_by_coin):
    """Guards against groups where one answer a problem is meant, and sampling that is not training's."""
    cfg = Config(max_new_tokens=16, temperature=0.8, top_p=0.9)
    problems = [pipo.Problem("", prompt, "", ("",), {}) for prompt in PROMPTS * 8]
    run = pipo.Run(model, tokenizer, None, None)
    scores = pipo.evaluate(run, {"set": problems}, cfg, pipo.rng("cpu", 3))
    batch = sample(model, tokenizer, [p.prompt for p in problems], 1, 16, 0.8, 0.9, pipo.rng("cpu", 3))
    p = statistics.mean(coin(text, "")[0] for text in batch.texts)
    assert scores["eval_pass@1"] == pytest.approx(p) and 0 < p < 1
    assert scores["eval_stderr"] == pytest.approx((p * (1 - p) / 32) ** 0.5)
    assert scores["eval_truncated"] == pytest.approx(batch.truncated.float().mean().item())


def test_noise_in_the_rewards_depends_on_seed_and_step_alone(folder, tmp_path, graded_by_coin, monkeypatch):
    """Guards against noise that changes with the arm, comes after mu or the advantages, or is in evaluations."""
    plain_advantages, seen, evaluated = pipo.group_advantages, {}, {}
    for name, changes in [("plain", {}), ("noisy", dict(reward_noise=0.25)),
                          ("other arm", dict(reward_noise=0.25, feedback="pipo"))]:
        seen[name] = []
        monkeypatch.setattr(pipo, "group_advantages", lambda rewards, *a: (
            seen[name].append(rewards.clone()), plain_advantages(rewards, *a))[1])
        cfg = settings(folder, tmp_path / name, steps=3, lr=1e-12, eval_every=1,  # all runs sample the same
                       eval_dataset=str(folder / "train.jsonl"), **{"feedback": "none", **changes})
        evaluated[name] = [row["eval_pass@1"] for row in pipo.train(cfg)]
    for step, (before, after, other) in enumerate(zip(*seen.values(), strict=True), 1):
        flipped = torch.rand(4, 4, generator=pipo.rng("cpu", 0, "noise", step)) < 0.25
        assert flipped.any() and torch.equal(after, torch.where(flipped, 1 - before, before))
        assert torch.equal(after, other)
    assert len(set(evaluated["plain"] + evaluated["noisy"])) == 1  # and each time drawn alike


def test_training_off_the_main_thread(folder, tmp_path, graded_by_coin):
    """Signals can only be caught on the main thread; the loop must not need them."""
    results, cfg = [], settings(folder, tmp_path / "run", steps=2)
    thread = threading.Thread(target=lambda: results.append(pipo.train(cfg)))
    thread.start()
    thread.join()
    assert len(results[0]) == 2


# ------------------------------------------------------------------------------------------------------------
# Sampling. What makes it fast (groups that share a cache, rows that are dropped or wait) changes no token.
# ------------------------------------------------------------------------------------------------------------


def check_greedy(ours, plain, prompts, limit):
    """A batch sampled greedily holds the tokens of transformers' generate, one prompt at a time, unpadded."""
    for prompt, tokens, mask in zip(prompts, ours.tokens, ours.mask):
        ids = torch.tensor([prompt], device=plain.device)
        seen = torch.ones_like(ids)
        theirs = plain.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=limit)[0]
        assert tokens[mask == 1].tolist() == theirs[len(prompt):].tolist()


def test_greedy_sampling_equals_generate(model, tokenizer):
    """Guards against cache, position, padding and attention errors; prompts differ in length, rows drop out.

    Chance cannot pass it: the rows end at different lengths, some by EOS and some by the limit.
    """
    plain = tiny_model()
    prompts = [[random.Random(i).randrange(2, 28) for _ in range(1 + i % 7)] for i in range(24)]
    assert plain.config._attn_implementation == "sdpa"
    ours = sample(model, tokenizer, prompts, 1, 24, temperature=0)
    check_greedy(ours, plain, prompts, 24)
    lengths = ours.mask.sum(1).tolist()
    assert len(set(lengths)) > 3 and ours.truncated.any() and not ours.truncated.all()


@on_gpu
def test_greedy_sampling_on_a_gpu_equals_generate(tokenizer):
    """Other attention kernels, the same tokens (fp32: rounding must not decide between near equals)."""
    model, plain = tiny_model().cuda(), tiny_model().cuda()
    model.set_attn_implementation("shared_heads")
    ours = sample(model, tokenizer, PROMPTS, 1, 24, temperature=0, cache_tokens=60)
    check_greedy(ours, plain, PROMPTS, 24)


@pytest.mark.parametrize("temperature, top_p, cache_tokens", [
    (1.0, 1.0, 10**6), (0.7, 1.0, 100), (1.3, 0.8, 100)])
def test_sampler_logprobs_are_the_training_logprobs(model, tokenizer, temperature, top_p, cache_tokens):
    """Guards against a ratio that is not 1 before any update: a temperature, or top-p, on one side only."""
    batch = sample(model, tokenizer, PROMPTS, 8, 16, temperature, top_p, pipo.rng("cpu", 1), cache_tokens)
    again = token_logprobs(model, batch.prompts, batch.tokens, batch.mask, temperature, chunk=5)
    assert (again - batch.behavior_logprobs).abs().max() < 1e-4
    assert batch.mask.sum(1).unique().numel() > 3 and (batch.behavior_logprobs[batch.mask == 1] < 0).all()


def test_sliding_windows_keep_their_own_masks(tokenizer):
    """A ready mask that shows every token would let a layer with a window see past it: greedy tokens tell."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, eos_token_id=1)
    plain = AutoModelForCausalLM.from_config(MistralConfig(**sizes, sliding_window=4)).eval()
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("shared_heads")
    check_greedy(sample(ours, tokenizer, PROMPTS, 1, 24, temperature=0), plain, PROMPTS, 24)


def test_running_out_of_memory_is_tried_again_before_the_room_shrinks(model, tokenizer, monkeypatch):
    """One fragmented allocation left room for a row at a time, for the rest of the run."""
    plain, calls = model.forward, []

    @functools.wraps(plain)
    def fails_once(ids, **options):
        calls.append(len(ids))
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return plain(ids, **options)

    monkeypatch.setattr(model, "forward", fails_once)
    batch = sample(model, tokenizer, PROMPTS, 4, 24, temperature=0, cache_tokens=10_000)
    assert batch.out_of_memory == 1 and batch.cache_tokens == 10_000
    monkeypatch.setattr(model, "forward", plain)
    assert torch.equal(batch.tokens, sample(model, tokenizer, PROMPTS, 4, 24, temperature=0).tokens)


def test_a_thought_stays_in_the_text_and_unfinished_it_is_no_answer(folder, tmp_path):
    """Where <think> is a special token it went with the others, and `so 5? wait` was paid for 5."""
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    ids = tokenizer("<think>ab</think>c<eos>").input_ids
    assert pipo.decode(tokenizer, [ids], set()) == ["<think>ab</think>c"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
    opened, = pipo.read_problems([{"problem": "a", "answer": "5"}], tokenizer, Config(instruction=""), "rows")
    assert opened.thinking
    batch = SimpleNamespace(texts=[r"so \boxed{5}? wait", r"so</think>\boxed{5}"], tokens=torch.zeros(1))
    assert pipo.grade_all(batch, [opened])[0].tolist() == [[0.0, 1.0]]


def test_every_eos_ends_a_completion_and_is_trained(model, tokenizer):
    """A stop token outside the loss is never learned; a model with several EOS ids must stop at each."""
    assert pipo.eos_ids(model, tokenizer) == [1, 5, 9]
    batch, ended_by = batch_of(model, tokenizer, group_size=32, max_new_tokens=40), set()
    for tokens, mask, cut in zip(batch.tokens, batch.mask, batch.truncated):
        row = tokens[mask == 1].tolist()
        assert not {1, 5, 9} & set(row[:-1]) and (row[-1] in (1, 5, 9)) != bool(cut)
        assert mask[:len(row)].all() and not mask[len(row):].any()
        ended_by.add(row[-1])
    assert {1, 5, 9} <= ended_by
    logprobs = token_logprobs(model, batch.prompts, batch.tokens, batch.mask)
    last = batch.mask.sum(1).long() - 1
    loss, _ = policy_loss(logprobs, batch.behavior_logprobs, torch.ones(len(last)), batch.mask)
    assert (torch.autograd.grad(loss, logprobs)[0].gather(1, last[:, None]) < 0).all()


def test_groups_are_independent_draws_and_seeds_repeat(model, tokenizer):
    """Guards against copies of a prompt sharing their first token (one draw for G rows), and hidden state."""
    def drawn(seed):
        return sample(model, tokenizer, [[3]], 64, 4, generator=pipo.rng("cpu", seed)).tokens

    first = drawn(5)
    torch.rand(7)  # somebody else draws in between
    assert first[:, 0].unique().numel() > 5
    assert torch.equal(first, drawn(5)) and not torch.equal(first, drawn(6))


def test_draws_follow_the_distribution():
    """40,000 draws: the frequencies of softmax(logits / T); top-p keeps the smallest set with its mass."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(40000, 4)
    for temperature, top_p, expected in [
            (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]), (1.0, 0.7, [0.625, 0.375, 0, 0]),
            (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])]:
        tokens, logprobs = pipo.draw(logits, temperature, top_p, pipo.rng("cpu", 0))
        assert torch.allclose(tokens.bincount(minlength=4) / 40000, torch.tensor(expected), atol=0.01)
        if top_p < 1:  # of the full distribution all the same
            assert torch.allclose(logprobs.exp().unique(), torch.tensor([0.3, 0.5]))


@pytest.mark.parametrize("trouble", ["little room", "out of memory"])
def test_rows_that_had_to_wait_go_on_as_if_they_had_not(model, tokenizer, monkeypatch, trouble):
    """Guards against a token lost, drawn twice or put in the wrong place when a wave is cut short.

    Chance cannot pass it: greedy completions of several lengths, most of which are interrupted at least once.
    """
    whole = sample(model, tokenizer, PROMPTS, 4, 24, temperature=0)
    plain, sizes, room = model.forward, [], 100 if trouble == "little room" else None

    @functools.wraps(plain)
    def forward(ids, **options):
        sizes.append(len(ids))
        if trouble == "out of memory" and ids.shape[0] * options["attention_mask"].shape[-1] > 100:
            raise torch.OutOfMemoryError
        return plain(ids, **options)

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(model, "forward", forward)
    cut = sample(model, tokenizer, PROMPTS, 4, 24, temperature=0, cache_tokens=room, prefill_tokens=30)
    assert torch.equal(whole.tokens, cut.tokens) and torch.equal(whole.mask, cut.mask)
    assert (whole.behavior_logprobs - cut.behavior_logprobs).abs().max() < 1e-5
    assert max(sizes[10:]) < 16  # no wave held all rows for long
    assert cut.cache_tokens == 100 if room else cut.cache_tokens <= 100  # what ran out is not asked for again
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):  # where not even one row fits, there is no going on
        sample(model, tokenizer, PROMPTS, 4, 24)


def test_the_cache_writes_in_place_and_drops_rows(model):
    """Against transformers' own cache, token by token, with a row dropped and the others in another order."""
    ids = torch.randint(2, 28, (3, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs, rows = pipo.DynamicCache(), pipo.DynamicCache(), torch.tensor([2, 0])
    name = pipo.cache_name(model)
    for cache in (ours, theirs):
        model(ids[:, :4], use_cache=True, **{name: cache})
    theirs.batch_select_indices(rows)
    ours = pipo.move_rows([ours], rows, room=5)
    storage = ours.layers[0].all_keys.data_ptr()
    for t in range(4, 9):
        logits = [model(ids[rows, t:t + 1], use_cache=True, **{name: cache}).logits
                  for cache in (ours, theirs)]
        assert torch.allclose(*logits, atol=1e-5)
    assert ours.get_seq_length() == 9 and ours.layers[0].all_keys.data_ptr() == storage


# ------------------------------------------------------------------------------------------------------------
# The verifier. Each line of the two tables is a kind of answer and its pairs, both ways round.
# ------------------------------------------------------------------------------------------------------------

EQUAL = r"""
integers, decimals: 42 = 42.0 | -7 = −7 | 12345 = 12{,}345 | 12345 = 12,\!345 | 1234567 = 1\,234\,567
    | 004 = 4 | 0.5 = .50 | 0.000001 = 10^{-6} | 4.5e33 = 45\times10^{32} | 3 \cdot 10^8 = 3e8 \text{ m/s}
fractions: \frac34 = \dfrac{6}{8} | 3/4 = 0.75 | \frac{-1}{2} = -\frac12 | \frac72 = 3\frac12
    | -\frac72 = -3 1/2 | ½ = \tfrac 12
dress: 40\% = 40 percent | \$1,000 = 1000.00 dollars | 45^\circ = 45 | 5\text{ cm}^2 = 5 square centimeters
    | 5 = \mathbf{5}. | 12 = 12^{\text{th}} | 10 \mbox{ inches} = 10 \text{ in}
    | 7 = 7 \text{ different ways} | 4:30\text{ p.m.} = 4:30 PM
radicals, powers: 2\sqrt3 = \sqrt{12} | \frac{\sqrt2}2 = \frac1{\sqrt2} | \sqrt[3]{-8} = -2
    | 1+\sqrt5 = \sqrt{6+2\sqrt5} | \frac{100!}{2^{50}} = 100!\cdot2^{-50} | 2^6 3^5 = 3^5 \cdot 2^6
    | \pi^2 = \pi\cdot\pi | \ln 2 = -\ln\frac12 | e^2 = \exp(2)
expressions: x^2-1 = (x-1)(x+1) | |x| = \sqrt{x^2} | 2\sin x\cos x = \sin 2x | \tan 15^\circ = 2-\sqrt3
    | \frac12x = x/2 | \sin^{-1} x = \arcsin x | \binom n2 = \frac{n(n-1)}2 | \binom{10}3 = 120
    | n! = n(n-1)! | \log_2 8 = 3 | a_{1}+b = b+a_1 | \sqrt[3]{\sin x} = (\sin x)^{1/3}
    | \sum_k k = \sum_k k
equations: x=5 = 5 | f(x)=2x+1 = 1+2x | y=2x+3 = 2x-y+3=0 | x^2+y^2=1 = 2y^2=2-2x^2 | 25 = 5^2=25
    | \frac13 = \frac13\approx0.333 | (1,2) = (x,y)=(1,2) | \text{Area} = 5 = 5
inequalities: x>5 = 5<x | x>\frac52 = (2.5,\infty) | 0<x<12.5 = (0,12.5) | [2,7] = x\in[2,7]
    | x<2\text{ or }x>3 = (3,\infty)\cup(-\infty,2) | \mathbb{R} = (-\infty,\infty)
collections: 1,2,3 = \{3,2,1\} | 1,2 = 2 \text{ and } 1 | \pm2 = 2,-2 | 1\pm\sqrt2 = 1-\sqrt2,1+\sqrt2
    | (1,2),(3,4) = (3,4),(1,2) | x=2,x=3 = 3\text{ or }2 | \emptyset = \{\} | (0;1) = (0,1) | 3:4 = 3:4
    | (1,234) = (1, 234)
matrices: \begin{pmatrix}1&2\\3&4\end{pmatrix} = \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
complex: 3+4i = 4i+3 | e^{i\pi/4} = \frac{\sqrt2}2+\frac{\sqrt2}2i | i^2 = -1 | |3+4i| = 5
bases, choices, words: 204_5 = 204_{5} | \text{(C)} = C | C = \textbf{(C)}\ 12 | C = C. | \text{even} = Even
    | \text{B, C} = C and B | \overline{CD} = \overline{CD} | \infty = +\infty
counted things, units: 18 = 18 dollars per day | 18 = 18 miles per hour | 18 = 18 years old | 18 = 18 km/h
    | 18 = 18 per day | 18 = 18 apples in total | 18 = 18 minutes in an hour
    | 18 = 18\text{ cookies left over} | 7 = 7 red marbles | 48 = 48 students in the class.
    | 120 = 120\ \mathrm{km}\cdot\mathrm{h}^{-1} | 12 = 12 in | 15 = \$15 per ticket | 5 = 5\text{ N/m}
    | 5 = 5\ \text{J/K} | 5 = 5\text{ K} | 1.6e-19 = 1.6\times10^{-19}\ \text{C}
    | 5\text{ sq. ft} = 5 square feet | 5\text{ cubic feet} = 5\text{ ft}^3
    | 5 = 5 \frac{\text{m}}{\text{s}^2} | 5\text{ L} = 5 liters | 20^\circ\text{C} = 20 degrees Celsius
    | -\$5 = -5
labels: f^{-1}(x)=2x = 2x | f(g(x))=x^2 = x^2 | (f\circ g)(x)=x^2 = x^2 | \frac{dy}{dx}=3x^2 = 3x^2
    | m\angle A=60^\circ = 60 | m\angle ABC=60^\circ = \angle ABC=60 | \overline{AB}=4 = 4
    | P(A\cap B)=\frac15 = 0.2 | \text{Area of the triangle: }12 = 12 | y''=2 = 2
choices: BCD = B, C, D | BCD = B、C、D | BCD = D, C and B | BCD = (B), (C), (D) | C = C) | A = \text{Option A}
    | A = Choice (A) | D = \textbf{(D)}\ 17
sets of reals: \{x \mid x>2\} = (2,\infty) | \{x : x>2\} = x>2 | \{x \in \mathbb{R}|-1\le x<3\} = [-1,3)
    | \{x : |x|>2\} = |x|>2 | (0,1+\sqrt5)\cup(7,8) = (7,8)\cup(0,\sqrt{6+2\sqrt5})
zeros: 0 = \sin\pi | 0 = \ln 1 | 0 = \sqrt2-\sqrt2 | 0 = \tan0 | 1 = e^0 | \cos x = \cos x+\sin\pi
wording: \text{parabola} = a parabola | \text{No solution} = No solutions | 495 = \text{The answer is }495
    | 5 = 5\ \blacksquare | 5 = \text{There are }5\text{ ways} | 5 = \text{exactly }5
notation: 3 x 10^8 = 3e8 | \sqrt2\approx1.41 = \sqrt2 | x\approx3.2 = 3.2
seldom met: \sin^2x+\cos^2x = 1 | \sin(x)^2 = (\sin x)^2 | \sin(x)y = y\sin x | \ln(x/y) = \ln x-\ln y
    | 1, 2, and 3 = 1,2,3 | A=(1,2), B=(3,4) = B=(3,4), A=(1,2) | x² = x^2
    | \textbf{(B)}\ \pi-\frac{\alpha}{2} = B | \sqrt{1/n} = 1/\sqrt n
    | \cot x = 1/\tan x
"""
UNEQUAL = r"""
near numbers: 28801 = 28800 | 1/3 = 0.333 | 0.000001 = 0.0000011 | \pi = 3.14159265358979
    | 10000001 = 10000000 | 13.1 = 1.31 | 123456789012345678 = 123456789012345679 | \sqrt2 = \sqrt2+10^{-40}
    | 2.7e-6 = 2.7 | \frac34 = 3 | 0 = 10^{-300} | 0 = \sin(10^{-200})
signs, elements, order: 5 = -5 | 2-\sqrt3 = 2+\sqrt3 | 3-4i = 3+4i | (1,2) = (2,1) | 1,2,3 = 1,2 | 5 = 5,6
    | \pm2 = 2 | 3:4 = 4:3 | (1,2) = \{1,2\}
    | \begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}2\\1\end{pmatrix} | 2^{10} = 10^2
    | [-36,104] = -36104
hedges: 41 = 41 \text{ or } 43 | 41 = 41 or 43 | 41 = 41\text{ (or 43)} | 41 = 41\text{ not }43 | 41 = 41=43
    | 43 = 41=43 | 41 = 41|43 | 41 = 41\text{ possibly forty} | 41 = 41\lor43 | 41 = \{41,43\} | 41 = 41\pm2
    | 41 = 41;43 | 41 = 41\quad43 | 41 = 41 \\ 43 | A = (A) 5 or (B) 6
brackets: (0,9) = [0,9) | [0,1] = [0,1]\cup[2,3] | x>5 = x\ge5 | (2,3) = x>2\text{ or }x<3 | x>5 = y>5
    | x>1 = x<1
functions: |x| = x | \ln|x| = \ln x | \sin^{-1}x = \frac1{\sin x} | \tan 2x = 2\tan x
    | (x^2-1)^3 = (x^3-1)(x^3+1) | x = X | f(2)<f(1) = f(1)<f(4) | \lfloor n/2\rfloor = \lceil n/2\rceil
    | 1 = \sin^2x
equations: 2x+z=1 = 1 | x=5 = y=5 | y^2=4x = y^2=-4x | 5 = x>5 | 5 = x=6 | e=5 = e=6
dress: 5\text{ cm} = 5\text{ m} | 5\text{ cm} = 5\text{ cm}^2 | \$5 = 5 cents | 50\% = 0.5
    | 2 = 2\text{ million} | 1,234 = 1.234 | 2 = 2lwh | 6 = 6xyzw | 5\text{ m} = 5\text{ ms}
    | x<1\text{ or }x>2 = x<1\text{ or }y>2
bases, words: 204_5 = 204 | 204_5 = 54 | 204_5 = 204_6 | seat = east | \text{no} = on | C = D
    | \text{even} = \text{even or odd} | \overline{CD} = \overline{DC} | \angle ABC = \angle ACB | HHT = THH
    | 21\text{st} = 22\text{nd}
never equal: nan = nan | 1/0 = 1/0 | \frac00 = 0 | \log 0 = \log 0 | \tan 90^\circ = \tan 90^\circ
    | \infty-\infty = 0 | 5,7 = 5,1/0 | 7?8 = 7 | 5^ = 5 | \zoo = 5
no zeros: 0 = e^{-1000} | 0 = \exp(-1000) | 0 = 2^{-\sqrt{10^6}} | 0 = e^{-\sqrt{10^6}}
    | 0 = (\sqrt2\cdot10^{-80})^2
changed values: 2 = 2\text{ fifths} | 5 = 5\text{ tenths} | 5 = 5\text{ halves} | 5 = 5\text{ thirds}
    | 5 = 5\text{ quarters} | 5 = 5\text{ squared} | 5 = 5\text{ cubed} | 5 = 5\text{ factorial}
    | 5 = 5\text{ point five} | 3 = 3\text{k} | 3 = 3\text{ lakh} | 3 = 3\text{ crore} | 3 = 3\text{ score}
    | 3 = 3\text{ gross} | 3 = 3\text{ ten} | 3 = 3 degrees below zero | 3 = 3\text{ dozen}
    | 3 = 3\text{ per thousand} | 3 = 3\text{ and a half} | 3 = 3\text{ to the fifth} | 3 = 3\text{ doubled}
    | 3 = 3\text{ thirteenths} | 3 = \text{half of }3 | 3 = \text{at least }3 | 3 = 3\text{ minus one}
    | 2\text{ million} = 2\text{ billion}
approximations: 5 = 5\approx6 | 6 = 5\approx6 | 3.14 = \pi\approx3.14 | 5 = 5.2\approx5 | 5 = \text{about }5
more units: 20^\circ\mathrm{C} = 20^\circ\mathrm{F} | 5\text{ N} = 5\text{ J} | 5\text{ N} = 5\text{ N/m}
    | 5\text{ m/s} = 5\text{ m/s}^2 | 5\text{ sq ft} = 5\text{ ft}
    | 5\text{ dollars per day} = 5\text{ dollars per hour} | 5 = 5x | 5k = 5 | x^2 = x^{2}C
more hedges: 18 = 18 or 19 apples | 18 = 18 apples or 19 | 18 = 18 apples or more | 5 = 5\text{ but not }6
    | 5 = \text{The answer is not }5 | 5 = \text{The answer is either }5\text{ or }6
    | 5 = 5, or 6 since both work | 1,2,3 = 1,2,3,\ldots | 5 = \text{between }4\text{ and }5 | 5 = 5\to6
labels, names: f^{-1}(x)=2x = f^{-1}(x)=3x | \angle A=60 = \angle B=60 | \overline{AB}=4 = \overline{CD}=4
    | \frac{dy}{dx}=3 = \frac{dx}{dy}=3 | (x,y)=(3,4) = x=4, y=3 | (x,y)=(3,4) = (4,3) | (x,y)=(3,4) = x=3
    | (x,y)=(3,4) = x=3, z=4 | x_{1}=2, x_{2}=3 = x_1=2 | x_{1}=2, x_{2}=3 = x=2, y=3
more choices: BCD = B, C | BCD = B, C, D, E | BCD = BCE | A = Option B | ①③ = ①② | A = \text{not A}
    | A = A or B | A = A: yes, B: no
more sets: \{x \mid x>2\} = [2,\infty) | \mathbb R\setminus\{1\} = \mathbb{R}
    | \mathbb R\setminus\{1\} = \mathbb R\setminus\{2\} | |x|>2 = |x|\ge2 | |x|>2 = x>2 | |x-1|<3 = |x+1|<3
    | (-1,2) = 1+|x|<2 | ]1,2[ = [1,2] | (0,1)\cup(1,2) = (0,2) | 0<x<2, x\ne1 = 0<x<2
    | (0,1)\cup(1,2) = (0,1]\cup(1,2) | x<-2\text{ and }x>2 = |x|>2
    | (0,\sqrt2)\cup(3,4) = (0,1.41421356237)\cup(3,4)
more withdrawn: x=k\pi, k\in\mathbb Z = x=2k\pi, k\in\mathbb Z
    | x\equiv 3\pmod 7 = x\equiv 3\pmod 5 | x\equiv 3\pmod 7 = x\equiv 4\pmod 7 | 9 = 8\pmod{11}
more words: \text{a parabola} = \text{an ellipse} | \text{No solutions} = \text{two solutions}
    | \text{June 20} = 20 July | \text{June 20} = 20 | \text{convergent} = \text{divergent}
more notation: {10\choose 3} = {10\choose 4} | 7!! = 5040 | 0.\dot{3} = 0.3 | 45^\circ30' = 45.3^\circ
    | 1001_{\text{two}} = 1001 | A5_{16} = A6_{16} | 11{:}00 = 11 | 3 x 10^8 = 3 | {-}7 = 7
    | \operatorname{cis}60^\circ = \operatorname{cis}30^\circ
seldom met: (1,2) = (1,2,3) | \sqrt{-4} = -2 | [3,\infty) = [3,5] | 2 3 = 6
once wrong: 2 \to 3 = 3 \to 2 | 1,2,\ldots,n = 1,2,n,\ldots | I(0)e^{t/RC} = I(0)e^{-t/RC} | |y| = y
    | A = \text{A Circular Sign.} | \frac{dx}{dt} = x/t | 2=3 = 4=5 | x:2 = 2 | 1234 = (1,234) | 5 = 5 < 6
withdrawn: \frac13 = 0.\overline{3}1 | 0.3 = 0.\overline{3} | \lfloor2.5\rfloor = 2.5 | 20 = 20 June
    | 2 = \gcd(2,4) | x>2\text{ and }x<3 = x>2\text{ or }x<3 | |x|<2 = |x|\le2 | 5 = \operatorname{cis}5
    | \begin{vmatrix}1&2\\3&4\end{vmatrix} = \begin{pmatrix}1&2\\3&4\end{pmatrix} | x\ne1 = x=1 | 1 = ①
    | x = \overline{x} | 3 = x\equiv3\pmod7 | 18 = 18\text{ thousand, since }9
"""


def cases(table):
    """The pairs of a table; the last " = " divides a pair."""
    lines = table.strip().replace("\n    | ", " | ").splitlines()
    pairs = [pair for line in lines for pair in line.split(": ", 1)[1].split(" | ")]
    return [pytest.param(*pair.rsplit(" = ", 1), id=pair) for pair in pairs]


def score(given, gold):
    return verify(r"So it is $\boxed{%s}$." % given, gold)


@pytest.mark.parametrize("a, b", cases(EQUAL))
def test_equal_answers(a, b):
    """A right answer in another dress has to be paid, whichever side it stands on."""
    assert score(a, b) == score(b, a) == 1.0


@pytest.mark.parametrize("a, b", cases(UNEQUAL))
def test_unequal_answers(a, b):
    """Graders in use pay most of these: tolerances, stripped brackets, units, bases, anagrams, hedges."""
    assert score(a, b) == score(b, a) == 0.0


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"First \boxed{1}, no: \boxed{2}.", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"), (r"$\boxed 5$", "5"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{5} and then \boxed{12", None), ("", None), (r"\boxed{5} or \boxed{}", None),
        (r"\boxed{5\}", None), ("\\boxed", None), ("The answer is \\boxed{", None),
        (r"<think>\boxed{5}</think>\boxed{6}", "6"), (r"<think>\boxed{5}</think> Yes.", None),
        (r"<think>\boxed{5}", None), (r"Hm, \boxed{5}? No.</think> The answer is 6.", "6"),
        ("1+1=2\n#### 72", "72"), ("#### 72\nThe answer is 5", "72"),
        ("#### Step 3: add\nThe answer is 5", "5"), ("So, the answer is $\\frac12$. Good.", r"\frac12"),
        ("**Answer:** 12", "12"), ("The answer is 3.5. I hope it is correct.", "3.5"),
        ("the answer is $45", "$45"), ("**Final Answer**\n\n12", "12"), ("The final answer is: 12", "12"),
        ("The answer is C<|im_end|>", "C"), ("It is 5. We get 7", None), ("<answer>18</answer>", "18"),
        ("<answer>17</answer>, no: <answer> 18 </answer>", "18"), (r"<answer>17</answer> \boxed{18}", "18"),
        ("#### 17\n<answer>18</answer>", "18"), ("<think><answer>17</answer></think>", None),
    ],
)
def test_extraction(text, answer):
    """Paying for an earlier box, for a thought, or for the last number in the text teaches not to answer."""
    assert extract_answer(text) == answer


def test_a_thought_that_the_prompt_opened():
    """Where the chat template opens the thought, a completion that never closes it was paid for a draft."""
    assert extract_answer(r"Perhaps \boxed{5}", thinking=True) is None
    assert grade(r"Perhaps \boxed{5}", "5", thinking=True) == (0.0, "no_answer")
    assert verify(r"Perhaps \boxed{5}", "5") == 1.0
    assert verify(r"Perhaps \boxed{5}</think> It is \boxed{6}.", "6", thinking=True) == 1.0
    assert extract_answer(r"</think> \boxed{6} <think> or \boxed{7}", thinking=True) == "6"


def test_units_that_are_letters():
    """Behind a number a letter is a unit, but 2N is no 2 where N is a variable of the answer."""
    assert score("200 K", "200") == score("5 N", r"5\text{ newtons}") == 1.0
    assert score(r"3\times10^8 m/s", "3e8") == score(r"3\times10^8 m/s", r"3\times10^8\text{ m/s}") == 1.0
    assert score("2N", "2N") == 1.0
    assert score("2", "2N") == score("2N", "3N") == score("2x", "2") == score("2N^2+N", "2") == 0.0


SENTENCES = "18 apples in total", "18 dollars per day.", "18 km/h", "$18$ cookies", "18 years old", "18 kg"


@pytest.mark.parametrize("text", SENTENCES)
def test_prose_without_a_box(text):
    """Base models answer in sentences; a sentence that changes the number is no answer."""
    assert verify(f"The answer is {text}", "18") == verify(f"**Answer:** {text}", "18") == 1.0
    assert verify(f"The answer is {text}", "19") == 0.0
    for hedge in ("or 19", "tenths", "squared", "thousand", "and a half", "to 20", "point five"):
        assert verify(f"The answer is 18 {hedge}", "18") == verify(f"Answer: 18 {hedge} apples", "18") == 0.0
        assert verify(f"The answer is $18$ {hedge}.", "18") == 0.0
    assert verify("The answer is $18$, or $19$.", "18") == 0.0
    assert verify("The answer is $18$, which is even.\nGood.", "18") == 1.0
    assert verify("The answer is\n$$\n18\n$$\nor so I hope.", "18") == 1.0


def test_gold_forms_and_causes():
    """The gold may be a whole solution; failures are told apart so that a training run can count them."""
    assert verify(r"\boxed{72}", "48+24 = <<48+24=72>>72\n#### 72") == 1.0
    assert verify("#### 1,234", r"First \boxed{5}. Thus $\boxed{1234}$ ways.") == 1.0
    texts = "", r"\boxed{5}", r"\boxed{6}", r"\boxed{5+}", r"\boxed{%s}" % ("7" * 2000)
    causes = "no_answer", None, None, "unparsed", "too_big"
    assert [grade(text, "5") for text in texts] == list(zip((0.0, 1.0, 0.0, 0.0, 0.0), causes))


def test_golds_that_cannot_be_read_are_told():
    """A data set whose golds cannot be read trains on text comparison, unnoticed."""
    for gold in ("5", r"\frac12", "x=2,3", r"\text{even}", r"so $\boxed{7}$", "#### 7", r"x\in[1,2)"):
        assert readable(gold), gold
    for gold in ("", "???", "5+", r"\sqrt{", "#### ", r"\boxed{}", "9" * 2000):
        assert not readable(gold), gold
    assert score("???", "???") == 1.0 and score("7", "???") == 0.0


HOSTILE = [
    "9^{9^{9^{9^9}}}", "(100000)!", "((99!)!)!", r"\binom{10^9}{5\cdot10^8}", "(x+1)^{99999}", "2^{2^{64}}",
    "1e999999999", "10^{-10^{10}}", r"\sin(10^{10^8})", r"e^{e^{e^{e^e}}}", "1/0", "0^{-1}", "nan",
    "7" * 100_000, "(" * 5000, "{" * 100_000, r"\sqrt{" * 400 + "}" * 400, "√" * 1400 + "4",
    r"\log_" * 290 + "2", r"\frac" * 300, "-" * 1400 + "5", "!" * 1400, "|" * 1400, "x" + "^2" * 700,
    r"\sin" * 400 + "x", "+".join([r"\sin x"] * 200), "+".join([r"\sqrt{x^{99}+1}"] * 90),
    ",".join("x" * 700), r"\pm1," * 300 + "1", r"\{\pm" * 200, '"' * 1400, " " * 1400 + "5", r"\!" * 700,
    "$" * 1400, "½" * 700, "1" + " 000" * 300, "\x00", "\ud800", "Ⅴ", "٣", "\\", "_", "'", "{}" * 700, "5^",
    r"\sin(\emptyset)", r"\log_{}", r"\begin{pmatrix}", "__import__('os').system('touch pwned')",
    r"\input{/etc/passwd}", "x.__class__", "lambda: 0", r"\{x|" * 300, "|x|" * 400, r"\text{a} " * 180,
    r"\text{million} " * 90, "A B " * 24 + "!", "B " * 700, "x'" * 700, "f(x)=" * 250 + "1",
    "x<" * 500 + "1", r"(0,1)\cup" * 150 + "(1,2)", r"1\approx" * 180 + "1", r"\begin{pmatrix}" * 90,
    r"\$1" * 400, r"\log_2" * 160 + "2", "(-x)^{1/3}+" * 80 + "1", "ab cdefg " * 110, "1±" * 300, "a_" * 400,
    "1," * 400 + "2", "\\text{" * 180,
]


def hammer():
    """All hostile inputs as answer, as gold and as both; the longest call in seconds of this thread."""
    longest = 0.0
    for text in HOSTILE:
        box = r"\boxed{%s}" % text
        pairs = (box, "55"), (r"\boxed{55}", text), (text * 9, "55"), (box, text)
        for completion, gold in pairs:
            start = time.thread_time()
            assert grade(completion, gold)[0] in ((0.0, 1.0) if gold == text else (0.0,)), text
            longest = max(longest, time.thread_time() - start)
        readable(text)
    return longest


def test_hostile_inputs():
    """A tower of powers must not stop the run, nor may anything be executed, raised, or left changed.

    CPU time is bounded, not the clock on the wall: a busy machine is no bug.
    """

    def state():
        limits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
        return mpmath.mp.dps, getcontext().prec, limits, random.getstate(), threading.active_count()

    before, times = state(), []
    threads = [threading.Thread(target=lambda: times.append(hammer())) for _ in range(2)]  # no signals there
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 2 and max(times) < 1.0  # a fifth of that on an idle machine
    assert before == state()


def test_the_work_is_bounded_by_its_count(monkeypatch):
    """Without the budget a list of 400 items would be compared in minutes, a sum of 90 roots in seconds."""
    pairs = [(",".join("x" * 400), ",".join("x" * 399) + ",y"),
             (r"\sin x+" * 90 + "2", r"\sin x+" * 90 + "3")]
    for a, b in pairs:
        assert grade(r"\boxed{%s}" % a, b) == (0.0, "too_big")
    assert score(",".join(map(str, range(60))), ",".join(map(str, range(59, -1, -1)))) == 1.0
    monkeypatch.setattr(pipo, "MAX_WORK", 10)
    assert grade(r"\boxed{x^2+1}", "1+x^2") == (0.0, "too_big")


def test_random_texts():
    """Nothing raises, whatever the order of the commands; a long text costs no more than its length."""
    rng = random.Random(0)
    parts = r"""\frac \sqrt \sin \log_ ^ _ { } ( ) [ ] \{ \} | ! \pm , = < \le \cup \infty 1 23 0.5 x \pi e i
        % $ \\ & ° ½ \text{ \text{or} \begin{pmatrix} \end{pmatrix} \boxed{ #### <think> </think> answer is
        \in \pmod \mathbb{R} \approx \ne \setminus \mid : ; \dot \overline ' \text{million} k\in\mathbb{Z}
        x_1= (x,y)= \cis \choose !! \over _{16} A5 \exp \gcd \lfloor \rfloor |x|> \text{K} \Omega \equiv f(x)=
        \angle \forall June ① \text{since} \emptyset √""".split()
    for _ in range(1500):
        a, b = ("".join(rng.choices(parts, k=rng.randrange(1, 25))) for _ in range(2))
        assert grade(a, b)[0] in (0.0, 1.0) and score(a, b) in (0.0, 1.0)
        assert readable(a) in (True, False)
    starts = r"\boxed{", "#### ", "<think>", "</think>", "<answer>", "answer is ", "$", "\n", "\\", "{", "}"
    for text in starts:
        start = time.thread_time()
        grade(text * (1_000_000 // len(text)), "5")
        assert time.thread_time() - start < 1.0, text


def expression(rng, depth):
    """A random expression in x and y, and a rewriting of it."""
    if depth == 0:
        a = rng.choice(["x", "y", str(rng.randrange(1, 9)), r"\pi", r"\sqrt{%d}" % rng.randrange(2, 9)])
        return a, rng.choice([a, f"({a})", "{%s}" % a, f"{a}+0", rf"1 \cdot {a}", rf"\frac{{{a}}}{{1}}"])
    (a, a2), (b, b2) = expression(rng, depth - 1), expression(rng, depth - 1)
    return rng.choice(
        [
            (f"({a})+({b})", f"({b2})+({a2})"),
            (f"({a})-({b})", f"-({b2})+({a2})"),
            (f"({a})({b})", rf"({b2}) \cdot ({a2})"),
            (f"({a})^2", f"({a2})({a2})"),
            (rf"\frac{{{a}}}{{({b})^2+1}}", rf"({a2})/(1+({b2})({b2}))"),
            (rf"\sin({a})", rf"-\sin(-({a2}))"),
            (rf"\sqrt{{({a})^2}}", rf"\left|{a2}\right|" if "|" not in a2 else a2),
        ]
        if "|" not in a2
        else [(a, a2)]
    )


def test_random_rewritings():
    """An expression equals its rewriting however it is dressed, and never itself plus something."""
    rng = random.Random(1)
    for _ in range(40):
        a, b = expression(rng, 2)
        dressed = b.replace("(", r"\left( ").replace(")", r" \right) ")
        assert score(a, b) == score(b, a) == score(f"${a}$", rf"\displaystyle {dressed}") == 1.0, (a, b)
        assert score(a, f"{b}+{rng.choice(['1', '0.001', '10^{-9}', 'x'])}") == 0.0, (a, b)
        assert score(f"({a}, 1)", f"({b}, 1)") == score(f"{a}=7x^3", f"14x^3=2({b})") == 1.0, (a, b)
        assert score(f"({a}, 1)", f"(1, {b})") == score(a, "1"), (a, b)
        label = rng.choice(["h(t)", "f^{-1}(x)", r"(f\circ g)(x)", r"\frac{dy}{dx}", r"\overline{AB}"])
        assert score(f"{label}={a}", b) == score(f"{label}={a}", f"{label}={b}") == 1.0, (label, a, b)
        assert score(a + r"\blacksquare", b) == score(rf"\text{{The answer is }}{a}", b) == 1.0, (a, b)


def test_random_numbers():
    """Fractions, decimals and thousands are exact: one unit in the last place is another number."""
    rng = random.Random(2)
    for _ in range(200):
        p, q, k = rng.randrange(1, 10**6), rng.randrange(2, 999), rng.randrange(2, 9)
        assert score(rf"\frac{{{p}}}{{{q}}}", rf"\dfrac{{{k * p}}}{{{k * q}}}") == 1.0
        assert score(f"{p:,}", str(p)) == 1.0
        assert score(rf"\frac{{{p}}}{{{q}}}", f"{p + 1}/{q}") == score(f"{p:,}", str(p + 1)) == 0.0
        assert score(f"{p}/{q}", f"-{p}/-{q}") == 1.0 and score(f"{p}.001", f"{p}.002") == 0.0
        word = rng.choice(["thousand", "million", "dozen", "hundred"])
        assert score(rf"{p}\text{{ {word} }}", str(p)) == score(rf"{p}\text{{ a {word} }}", str(p)) == 0.0


def test_random_sets_of_reals():
    """The same set as intervals, inequalities or set-builder; another bracket is another set."""
    rng = random.Random(3)
    for _ in range(50):
        a, b, c = sorted(rng.sample(range(-20, 20), 3))
        union = rf"({a},{b})\cup({b},{c}]"
        ways = [rf"({b},{c}]\cup({a},{b})", rf"x\in({a},{b})\cup({b},{c}]",
                rf"{b}<x\le{c}\text{{ or }}{a}<x<{b}", rf"\{{x\mid {a}<x<{b}\text{{ or }}{c}\ge x>{b}\}}"]
        for way in ways:
            assert score(way, union) == score(union, way) == 1.0, (way, union)
            assert score(way, rf"({a},{c}]") == score(way, rf"({a},{b})\cup({b},{c})") == 0.0, (way, union)


# ------------------------------------------------------------------------------------------------------------
# Data and models. Every layout that the README names, what is left out (and said so), and no dropout.
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chat():
    """A template that marks roles by their first letter: (uab)(sab), then g where the model is to go on."""
    tokenizer = letter_tokenizer(LETTERS + "()")
    tokenizer.chat_template = (
        "{% for m in messages %}({{ m.role[0] }}{{ m.content }}){% endfor %}"
        "{% if add_generation_prompt %}g{% endif %}"
    )
    return tokenizer


def read(rows, tokenizer, name="rows", own_reward=False, trained_on=None, **settings):
    """Problems from a list of rows, read as a dataset would be: with no instruction, unless given."""
    rows = Dataset.from_list(rows) if rows and isinstance(rows, list) else rows
    cfg = Config(**{"instruction": "", **settings})
    return pipo.read_problems(rows, tokenizer, cfg, name, own_reward=own_reward, trained_on=trained_on)


def sentence_of(call):
    """The one sentence with which a call is refused."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


USER = [{"role": "user", "content": "q"}]
LAYOUTS = [
    ({"prompt": USER, "reward_model": {"ground_truth": "5", "style": "rule"}}, "5"),
    ({"prompt": USER, "reward_model": {"ground_truth": ["so \\boxed{5}"]}, "problem": "x", "answer": 6}, "5"),
    ({"problem": "q", "answer": "5", "solution": "\\boxed{6}"}, "5"),
    ({"problem": "q", "solution": "first \\boxed{4}, then \\boxed{5}"}, "5"),
    ({"question": "q", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}, "5"),
    ({"prompt": "q", "answer": 5}, "5"),
    ({"prompt": "q", "solution": "\\boxed{5}"}, "5"),
    ({"prompt": "q", "ground_truth": "5"}, "5"),
    ({"prompt": USER, "solution": "5"}, "5"),  # trl-lib/DeepMath-103K
    ({"question": "q", "final_answer": ["5"], "solution": ["so it is 6."]}, "5"),  # OlympiadBench
    ({"question": "q", "final_answer": "5", "r1_solution_1": "\\boxed{6}"}, "5"),  # zwhe99/DeepMath-103K
    ({"problem": "q", "expected_answer": "5", "generated_solution": "\\boxed{6}"}, "5"),  # OpenMathReasoning
    ({"question": "q", "solution": "so \\boxed{5}"}, "5"),
    ({"messages": USER, "answer": "5"}, "5"),
    ({"ID": "x", "Problem": "q", "Solution": "so \\boxed{6}", "Answer": 5}, "5"),  # Maxwell-Jia/AIME_2024
    ({"prompt": USER, "reward_model": '{"ground_truth": "[\\"5\\"]"}'}, "5"),  # Skywork-OR1
    ({"problem": "q", "PROBLEM": "x", "answer": "5"}, "5"),
]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "tsv", "folder", "disk", "disks"])
def test_dataset_layouts_and_file_types(tmp_path, tokenizer, ending):
    """A column that is not recognised; the gold of another column; a file type read as something else."""
    for i, (row, gold) in enumerate(LAYOUTS):
        if ending in ("csv", "tsv") and not all(isinstance(value, (str, int)) for value in row.values()):
            continue
        name = tmp_path / f"{i}.{ending}"
        rows = Dataset.from_list([row, row])
        if ending == "folder":
            name.mkdir()
            rows.to_parquet(name / "train.parquet")
        elif ending == "json":
            name.write_text(json.dumps([row, row]))
        elif ending == "tsv":
            rows.to_csv(name, sep="\t")
        elif ending == "disk":
            rows.save_to_disk(name)
        elif ending == "disks":
            DatasetDict(test=rows.select([0]), train=rows).save_to_disk(name)
        else:
            {"jsonl": rows.to_json, "parquet": rows.to_parquet, "csv": rows.to_csv}[ending](name)
        problems = read(pipo.load_rows(str(name), "train"), tokenizer, instruction=" box")
        assert [(p.answer, p.golds) for p in problems] == [(gold, (gold,))] * 2, row
        asked = "q" if USER in row.values() else "q box"  # the instruction is not put behind messages
        assert problems[0].text == "q" and problems[0].prompt == tokenizer(asked).input_ids


GOLDS = [
    ('["\\\\frac{1}{2}"]', ["\\frac{1}{2}"]),  # Skywork-OR1
    ('["1","2"]', ["1", "2"]),
    ("[1, 2]", ["[1, 2]"]),  # an interval
    ("[1, 2)", ["[1, 2)"]),
    ('{"a", "b"}', ['{"a", "b"}']),  # a set: no JSON
    ("{1, 2}", ["{1, 2}"]),
    ("1, 2", ["1, 2"]),  # one answer of two parts
    ("[" * 100_000 + '"', ["[" * 100_000 + '"']),
    ('["a",' * 100_000, ['["a",' * 100_000]),
    ('{"ground_truth": "5", "style": "rule"}', ["5"]),
    ({"ground_truth": ["5", "\\boxed{6}"]}, ["5", "6"]),
    ({"ground_truth": {"target": 24, "numbers": [1, 2]}}, []),  # Countdown
    ({"target": 24, "numbers": [1, 2]}, []),
    ('{"target": 24, "numbers": [1, 2]}', []),
    (["1", None, ["2", 3.0]], ["1", "2", "3"]),
    ([], []),
    ("[]", []),
    (None, []),
    (float("nan"), []),
    ("NaN", []),
    (27.0, ["27"]),
    (0, ["0"]),
    (2.5, ["2.5"]),
    (float("inf"), ["inf"]),
    ("proof", []),
    ("notfound", []),
    ("  ", []),
    ("\\boxed{}", []),
    ("None of these", ["None of these"]),
    ("so\n#### 1,234", ["1,234"]),
    (" 5 ", ["5"]),
]


@pytest.mark.parametrize("cell, golds", GOLDS, ids=range(len(GOLDS)))
def test_golds(cell, golds):
    """A gold that no completion can equal: "27.0", "None", the JSON of a list, a dictionary as text."""
    assert pipo.read_golds(cell) == golds


def test_a_worked_solution_is_its_last_box_or_nothing():
    """A page of prose as the gold of a row, which silently is 0 for ever."""
    assert pipo.read_golds("first \\boxed{4}, then \\boxed{5}", worked=True) == ["5"]
    assert pipo.read_golds(["so \\boxed{5}"], worked=True) == ["5"]
    assert pipo.read_golds("we are done", worked=True) == []


def test_a_solution_column_is_worked_out_or_bare_as_a_whole(tokenizer, capsys):
    """Rows of a worked-out column whose box is missing were compared with their prose."""
    rows = [{"problem": "ab", "solution": text} for text in ("5", "x + 1", "\\frac12")]
    assert [p.answer for p in read(rows, tokenizer)] == ["5", "x + 1", "\\frac12"]
    rows.append({"problem": "ab", "solution": "so \\boxed{7}"})
    assert [p.answer for p in read(rows, tokenizer)] == ["7"]
    assert "left out of rows: 3 without an answer" in capsys.readouterr().out
    proofs = [{"question": "ab", "final_answer": ["3"], "solution": ["we count"]}]
    proofs.append({"question": "ab", "final_answer": None, "solution": ["we prove it"]})
    assert [p.answer for p in read(proofs, tokenizer)] == ["3"]


def test_the_columns_that_answer_are_tried_in_order_in_each_row(tokenizer):
    """An empty answer beside a solution with a box was a row less."""
    answers = ["", None, "proof", "6"]
    rows = [{"problem": "ab", "answer": answer, "solution": "so \\boxed{5}"} for answer in answers]
    assert [p.golds for p in read(rows, tokenizer)] == [("5",), ("5",), ("5",), ("6",)]


def test_columns_can_be_named(tokenizer, capsys):
    """Columns with names of their own could not be used; a name that is not there was passed over."""
    rows = [{"query": "ab", "response": "so \\boxed{5}", "problem": "x", "answer": "6"}]
    assert [(p.text, p.golds) for p in read(rows, tokenizer, columns="query, response")] == [("ab", ("5",))]
    assert [p.golds for p in read(rows, tokenizer, columns="query,response,answer")] == [("5",)]
    said = sentence_of(lambda: read(rows, tokenizer, columns="query,label"))
    assert "--columns is 'query,label', but rows has the columns query, response, problem, answer;" in said
    assert "'query'" in sentence_of(lambda: read(rows, tokenizer, columns="query"))
    assert "'query,'" in sentence_of(lambda: read(rows, tokenizer, columns="query,"))
    # held-out problems of the usual layout go with training problems of another
    usual = [{"problem": "ab", "answer": "7"}]
    assert [p.answer for p in read(usual, tokenizer, columns="query,response", trained_on=[])] == ["7"]
    unusual = [{"text": "ab", "label": "5"}]
    said = sentence_of(lambda: read(unusual, tokenizer, columns="query,response", trained_on=[]))
    assert said.startswith("--columns is 'query,response', but rows has the columns text, label; understood")
    said = sentence_of(lambda: read(unusual, tokenizer))
    assert said.startswith("rows has the columns text, label; understood are prompt, problem, question")
    assert said.endswith("or as --columns question,answer says")
    assert "rows has the columns (none)" in sentence_of(lambda: read([], tokenizer))
    empty = Dataset.from_dict({"problem": [], "answer": []})
    assert sentence_of(lambda: read(empty, tokenizer)) == "no usable problem in rows: it has no rows"


def test_large_columns_are_not_read_and_rows_only_kept_for_ones_own_reward(tokenizer):
    """A column of images needs Pillow; 100,000 rows of long solutions fill the host's memory."""
    image = datasets.Features({"problem": datasets.Value("string"), "answer": datasets.Value("string"),
                               "image": datasets.Image()})
    broken = {"bytes": b"no picture", "path": None}
    rows = Dataset.from_list([{"problem": "ab", "answer": "5", "image": broken}], features=image)
    assert [p.row for p in read(rows, tokenizer)] == [{}]
    rows = [{"problem": "ab", "target": 24, "nums": [1, 2]}, {"problem": "cd", "target": 25, "nums": [3]}]
    problems = read(rows, tokenizer, own_reward=True)
    assert [(p.answer, p.golds, p.row) for p in problems] == [("", (), row) for row in rows]
    with_gold = read([{"problem": "ab", "answer": "5", "id": 1}], tokenizer, own_reward=True)
    assert with_gold[0].golds == ("5",) and with_gold[0].row == {"problem": "ab", "answer": "5", "id": 1}
    assert "no usable problem in rows: 1 without an answer" == sentence_of(
        lambda: read([{"problem": "ab", "answer": None}], tokenizer))


def test_rows_that_cannot_be_used_are_left_out_and_counted(tokenizer, capsys):
    """A crash in the middle of a dataset, or rows that vanish unsaid."""
    good = {"problem": "ab", "answer": "1"}
    rows = [good, good | {"answer": ""}, good | {"answer": None}, good | {"problem": "abcdefgh"}]
    rows += [good | {"problem": None}, good | {"problem": " "}, good | {"problem": "123"}]
    problems = read(rows, tokenizer, max_prompt_tokens=5)
    assert [p.text for p in problems] == ["ab"]
    said = capsys.readouterr().out
    assert (
        "left out of rows: 2 without an answer; 1 with a prompt over 5 tokens; 2 without a question in text; "
        "1 with no token to ask" in said
    )
    broken = [good, good | {"problem": "a\ud800"}, good | {"answer": '["\\ud800"]'}]  # not for Arrow
    cfg = Config(instruction="")
    assert len(pipo.read_problems(broken, tokenizer, cfg, "rows")) == 1
    assert "left out of rows: 2 with broken UTF-8" in capsys.readouterr().out


ASKED_SO = [
    (USER, "(uq)g"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "(uab)g"),
    ([{"role": "system", "content": "z"}, *USER], "(sz)(uq)g"),
    ([*USER, {"role": "assistant", "content": "so"}], "(uq)(aso"),  # gone on with
    ([{"from": "system", "value": "z"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "so"},
      {"from": "user", "value": "r"}], "(sz)(uq)(aso)(ur)g"),
    ([{"from": "user", "value": "q"}, {"from": "assistant", "value": "so"}], "(uq)(aso"),
]


@pytest.mark.parametrize("cell, asked", ASKED_SO, ids=range(len(ASKED_SO)))
def test_prompts_through_the_chat_template(chat, cell, asked):
    """An answer that was begun got a turn of its own; parts of a content were written as a list."""
    problem, = read([{"prompt": cell, "answer": "5"}], chat)
    assert chat.decode(problem.prompt) == asked
    assert problem.text == ("r" if "ur" in asked else "ab" if "ab" in asked else "q")


def test_prompts_without_text(chat, capsys):
    """A message without content was a KeyError, or the word None; a picture was left out of its question."""
    cells = [
        [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "q"}], ["q"], [], {"a": 1}, 5,
        [{"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "q"}]}],
        [{"role": "system", "content": "q"}],
    ]
    rows = [{"prompt": cell, "answer": "5"} for cell in [*cells, USER]]
    assert len(pipo.read_problems(rows, chat, Config(), "rows")) == 1
    assert f"left out of rows: {len(cells)} without a question in text" in capsys.readouterr().out


def test_a_system_message_stands_in_front_where_there_is_none(chat, tokenizer):
    """--system must not displace the data's own, and must not end up behind the question."""
    own = [{"role": "system", "content": "z"}, *USER]
    asked = ["q", USER, own]
    rows, cfg = [{"prompt": cell, "answer": "5"} for cell in asked], Config(system="be", instruction="box")
    problems = pipo.read_problems(rows, chat, cfg, "rows")
    assert [chat.decode(p.prompt) for p in problems] == ["(sbe)(uqbox)g", "(sbe)(uq)g", "(sz)(uq)g"]
    problem, = read([{"prompt": "q", "answer": "5"}], tokenizer, system="be")
    assert tokenizer.decode(problem.prompt) == "beq"


def test_the_chat_template_is_used_where_there_is_one(tokenizer):
    """Without its template a chat model never emits EOS and every reward is 0."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}u{{ m.content }}{% endfor %}{% if add_generation_prompt %}g{% endif %}"
        "{% if not enable_thinking %}n{% endif %}"
    )
    messages = [{"role": "user", "content": "abc"}]
    assert chat.decode(pipo.encode(chat, messages)) == "uabcgn"
    assert chat.decode(pipo.encode(chat, messages, thinking=True)) == "uabcg"
    assert tokenizer.decode(pipo.encode(tokenizer, messages)) == "abc"


@pytest.mark.parametrize("template, says", [
    ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}a",
     "row 2 of rows cannot be made a prompt: TemplateError: System role not supported"),
    ("{% for %}", "row 1 of rows cannot be made a prompt: TemplateSyntaxError: Expected an expression"),
    ("{{ tools | length }}", "row 1 of rows cannot be made a prompt: TypeError: object of type 'NoneType'"),
    ("{{ messages[7].content.x }}", "row 1 of rows cannot be made a prompt: UndefinedError: list object"),
    ("{{ 1 / 0 }}", "row 1 of rows cannot be made a prompt: ZeroDivisionError: division by zero"),
])
def test_a_template_that_raises_is_one_sentence(tokenizer, template, says):
    """A traceback through jinja."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = template
    rows = [{"prompt": USER, "answer": "5"}]
    rows.append({"prompt": [{"role": "system", "content": "z"}, *USER], "answer": "5"})
    assert says in sentence_of(lambda: read(rows, chat))


def test_a_tokenizer_that_raises_is_one_sentence():
    """The exceptions of tokenizers are of no kind but Exception."""
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")))
    said = sentence_of(lambda: read([{"prompt": "b", "answer": "5"}], words))
    assert "row 1 of rows cannot be made a prompt: Exception: WordLevel error: Missing [UNK]" in said


def test_golds_that_are_compared_as_text_only_are_said_once(tokenizer, capsys, monkeypatch):
    """A dataset of proofs trains on nothing, unsaid. One gold that can be read is enough."""
    monkeypatch.setattr(pipo, "readable", lambda answer: answer.isdigit())
    rows = [{"problem": "ab", "answer": answer} for answer in (["5"], ["??"], ["!!"], ["??", "5"])]
    read(rows, tokenizer)
    assert capsys.readouterr().out.count("2 golds of rows are compared as text only, such as '??'") == 1
    read(rows, tokenizer, own_reward=True)
    assert "as text only" not in capsys.readouterr().out


def test_problems_that_are_trained_on_too_are_warned_of(tmp_path, tokenizer, capsys):
    """An evaluation on the training split, the same file or a copy of it scores what was learned by heart."""
    rows = [{"problem": letter, "answer": "5"} for letter in "abcd"]
    problems = read(rows, tokenizer)
    new = {"problem": "z", "answer": "5"}
    assert len(read([*rows[:2], new], tokenizer, "exam", trained_on=problems)) == 3
    said = capsys.readouterr().out.splitlines()
    assert "warning: 2 of the 3 held-out problems in exam are trained on too" in said
    read([new], tokenizer, trained_on=problems)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("splits, split, found", [
    (["test", "train"], "train", "train"),
    (["train", "test", "validation"], "test", "test"),
    (["train", "dev"], "test", "dev"),
    (["train", "val"], "test", "val"),
    (["train", "validation"], "test", "validation"),
    (["train"], "test", "train"),
    (["test"], "train", "test"),
    (["odd", "even"], "test", "odd"),
])
def test_splits(tmp_path, capsys, splits, split, found):
    """Evaluating on "train" because the first split is that, with a "validation" beside it; unsaid."""
    rows = {name: Dataset.from_list([{"problem": name}]) for name in splits}
    DatasetDict(rows).save_to_disk(tmp_path / "all")
    name = str(tmp_path / "all")
    assert pipo.load_rows(name, split)[0] == {"problem": found}
    said = f"the dataset {name} is read from its split {found!r}"
    assert (said in capsys.readouterr().out) == (found != split)


def test_a_path_is_a_path(tmp_path, monkeypatch):
    """datasets takes br[1].jsonl for a pattern, and reads br1.jsonl; ~ is no folder of that name."""
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a1").mkdir()
    rows = {"br[1]": "right", "br1": "wrong", "a*": "star", "ab": "wrong", "a[1]/br": "inside", "a1/br": "no"}
    for name, problem in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"problem": problem}))
    for name, problem in rows.items():
        assert pipo.load_rows(str(tmp_path / f"{name}.jsonl"), "train")[0]["problem"] == problem
    assert "rename it" in sentence_of(lambda: pipo.load_rows(str(tmp_path / "a[1]"), "train"))
    Dataset.from_list([{"problem": "disk"}]).save_to_disk(tmp_path / "d[1]")
    assert pipo.load_rows(str(tmp_path / "d[1]"), "train")[0]["problem"] == "disk"
    monkeypatch.chdir(tmp_path / "a[1]")
    assert pipo.load_rows("br.jsonl", "train")[0]["problem"] == "inside"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pipo.load_rows("~/br1.jsonl", "train")[0]["problem"] == "wrong"
    (tmp_path / "UPPER.JSONL").write_text('{"problem": "upper"}')
    assert pipo.load_rows("~/UPPER.JSONL", "train")[0]["problem"] == "upper"


def test_files_that_cannot_be_read_are_one_sentence_with_the_cause(tmp_path, monkeypatch):
    """"An error occurred while generating the dataset" says nothing of what is wrong with the file."""
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    (tmp_path / "mixed").mkdir()
    texts = {
        "broken.jsonl": b'{"problem": "a", "answer": "1"}\n{"problem":',
        "latin.csv": b"problem,answer\na\xe9,1\n",
        "torn.parquet": b"PAR1",
        "notes.txt": b"x",
        "empty.jsonl": b"",
        "mixed/a.jsonl": b'{"problem": "a", "answer": "1"}\n',
        "mixed/b.jsonl": b'{"problem": "a", "x": "1"}\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    for name, says in {
        "broken.jsonl": "JSON parse error: Invalid value. in row 1",
        "latin.csv": "codec can't decode byte 0xe9",
        "torn.parquet": "Parquet file size is 4 bytes",
        "mixed": "because column names don't match",
        "notes.txt": "notes.txt is empty or not a .parquet, .jsonl, .json, .csv, .tsv file",
        "empty.jsonl": "empty.jsonl is empty or not a",
        "no such": "no such does not exist",
    }.items():
        assert says in sentence_of(lambda: pipo.load_rows(str(tmp_path / name), "train")), name
    for name in ("nobody/nothing", "x" * 300 + "/y"):
        assert f"{name} can be read neither" in sentence_of(lambda: pipo.load_rows(name, "train"))


@pytest.mark.parametrize("error", [
    ImportError("needs tiktoken"), RuntimeError("scripts are no longer supported"), KeyError("qwen9"),
    TypeError("unexpected keyword argument"), Exception("tokenizers says this"), AttributeError("no such"),
], ids=lambda error: type(error).__name__)
def test_whatever_a_library_raises_is_one_sentence(error):
    """Only three kinds of exceptions were told from a bug of pipo's."""
    def load():
        raise error
    said = sentence_of(lambda: pipo.load_or_explain("org/name", "model", load))
    assert said.startswith("the model org/name can be read neither here nor from the hub: ")
    assert said.endswith(f"{type(error).__name__}: {error}")


def test_what_is_said_already_is_not_said_again():
    """A UserError from inside (layers of an unknown kind) was wrapped in "can be read neither here nor"."""
    def load():
        raise UserError("has layers of a kind")
    assert sentence_of(lambda: pipo.load_or_explain("org/name", "model", load)) == "has layers of a kind"


def test_dropout_is_off(tokenizer, tmp_path):
    """With dropout the ratio is not 1 before any update, and gspo's narrow clip eats the signal."""
    config = GPT2Config(vocab_size=28, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = pipo.load_model(str(tmp_path), CPU)
    batch = batch_of(model, tokenizer)
    metrics = pipo.update(model, Recorder(model), batch, batch.advantages, BASES["gspo"], 0.0)
    assert metrics["logprob_gap"] < 1e-5 and metrics["clip_fraction"] == 0


def test_weights_are_float32(folder):
    """bf16 weights swallow updates at a rate of 1e-6: where nothing else is asked for, weights are fp32."""
    half = AutoModelForCausalLM.from_pretrained(folder / "model").to(torch.bfloat16)
    half.save_pretrained(folder / "half")
    model = pipo.load_model(str(folder / "half"), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "shared_heads"


def chat_tokenizer(tail="<eos>"):
    """The letter tokenizer with a chat template that ends every turn with `tail`."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}" + tail + "{% endfor %}{% if add_generation_prompt %}a{% endif %}")
    return tokenizer


def in_folder(model, folder, tokenizer=None):
    """A model folder as a user would have it."""
    model.save_pretrained(folder)
    (tokenizer or letter_tokenizer()).save_pretrained(folder)
    return folder


def refused(folder, out, sentence, **changes):
    """train raises UserError with this sentence."""
    with pytest.raises(UserError, match=re.escape(sentence)):
        pipo.train(settings(folder, out, **changes))


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_positions_that_turn_otherwise_later_are_refused(folder, tmp_path, rope_type):
    """Past that length the cache holds keys turned the old way: the gap was 2.2, and nobody was told."""
    sizes = dict(vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, eos_token_id=1)
    rope = {"rope_type": rope_type, "rope_theta": 1e4}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 24}
        config = Phi3Config(**sizes, max_position_embeddings=128, rope_parameters=rope,
                            original_max_position_embeddings=24)
    else:
        config = LlamaConfig(**sizes, max_position_embeddings=24, rope_parameters=rope | {"factor": 4.0})
    model = in_folder(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    changes = dict(model=str(model), instruction="", steps=1)
    refused(folder, tmp_path / "run", "turns positions otherwise beyond 24 tokens", max_new_tokens=20, **changes)
    assert len(pipo.train(settings(folder, tmp_path / "run", **changes))) == 1


def test_learned_positions_end_and_rotary_ones_are_warned_about(folder, tmp_path, capsys):
    """Learned positions ended in an IndexError; rotary ones go on, on garbage, without a word."""
    config = GPT2Config(vocab_size=28, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=1)
    gpt2 = in_folder(GPT2LMHeadModel(config), tmp_path / "gpt2")
    sentence = "has 64 positions, but a prompt and its completion can take 105"
    refused(folder, tmp_path / "run", sentence, model=str(gpt2), instruction="", max_new_tokens=100)
    pipo.train(settings(folder, tmp_path / "rotary", steps=1, instruction="", max_new_tokens=200))
    assert "was made for 128 tokens; a completion can end at 205" in capsys.readouterr().out


def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(folder, tmp_path, monkeypatch):
    """A general guard: whatever a new architecture does to cache or positions, no run starts on a wrong ratio."""
    plain = pipo.draw

    def off_by_a_little(*arguments):
        tokens, logprobs = plain(*arguments)
        return tokens, logprobs + 0.02

    monkeypatch.setattr(pipo, "draw", off_by_a_little)
    refused(folder, tmp_path / "run", "sampler and trainer disagree by 0.02")
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_dropout_is_off_in_nested_configs(tmp_path):
    """Gemma 3 keeps its dropout in text_config: the gap was 0.21."""
    text = dict(vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, attention_dropout=0.5, max_position_embeddings=64)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)
    Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    assert pipo.load_config(str(tmp_path)).get_text_config().attention_dropout == 0.0


def test_missing_weights_are_named_not_drawn_at_random(folder, tmp_path):
    """transformers draws what it does not find, and the run trained it: exit code 0."""
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights_ = load_file(file)
    del weights_["model.layers.1.mlp.up_proj.weight"]
    save_file(weights_, file, metadata={"format": "pt"})
    refused(folder, tmp_path / "run", "lacks 1 weights, such as model.layers.1.mlp.up_proj.weight",
            model=str(tmp_path / "model"))


def test_the_end_of_a_turn_ends_a_completion(model):
    """A base model's EOS ends a document; without its template's end of turn it would ramble on to the limit."""
    assert pipo.eos_ids(model, chat_tokenizer("<pad>")) == [0, 1, 5, 9]  # a special token behind each turn
    assert pipo.eos_ids(model, chat_tokenizer("b")) == [1, 5, 9]  # a letter is part of the text


def test_a_generation_config_that_transformers_refuses_to_save(folder, tmp_path, graded_by_coin):
    """A temperature without do_sample, as in many published models: save_pretrained raised after the last step."""
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6}))
    pipo.train(settings(folder, tmp_path / "run", model=str(tmp_path / "model"), steps=1))
    kept = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.6 and kept["do_sample"] and kept["eos_token_id"] == [1, 5, 9]


def test_heads_whose_values_have_another_size(tokenizer, tmp_path):
    """Multi-head latent attention (DeepSeek): the decoding attention reshaped with the query's size."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ours = pipo.load_model(str(tmp_path), torch.device("cpu"))
    batch = sample(ours, tokenizer, PROMPTS, 2, 12, generator=pipo.rng("cpu", 0))
    again = token_logprobs(ours, batch.prompts, batch.tokens, batch.mask)
    assert (again - batch.behavior_logprobs).abs().max() < 1e-4


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(folder, tmp_path):
    """An index out of range in the middle of a run, or a CUDA assert that names nothing."""
    larger = in_folder(tiny_model(), tmp_path / "model", letter_tokenizer(LETTERS + "ABCDE"))
    refused(folder, tmp_path / "run", "has a token 32, but the model no embedding for it", model=str(larger))


def test_an_added_token_without_embedding_that_no_prompt_uses(folder, tmp_path):
    """gemma-3-1b's tokenizer has one for images, and its model, which reads text alone, no embedding for it."""
    tokenizer = letter_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert max(tokenizer.get_vocab().values()) == 28
    where = in_folder(tiny_model(), tmp_path / "model", tokenizer)
    assert len(pipo.train(settings(folder, tmp_path / "run", model=str(where), steps=1))) == 1
    rows = [{"problem": "ab<image>", "answer": "1"}] * 4
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(folder, tmp_path / "other", "has a token 28, but the model no embedding for it", model=str(where),
            dataset=str(tmp_path / "train.jsonl"))


def test_the_head_is_not_copied_for_each_prompt():
    """On a slice, torch multiplies by a frozen head in batches: with --lora 5 GiB for 100 prompts of SmolLM2."""
    model, seen = tiny_model().requires_grad_(False), []
    model.get_output_embeddings().register_forward_pre_hook(lambda head, given: seen.append(given[0].is_contiguous()))
    pipo.sample(model, letter_tokenizer(), PROMPTS, 2, 4, generator=pipo.rng("cpu", 0))
    assert len(seen) > 2 and all(seen)


def test_no_end_of_a_completion_is_in_its_text():
    """Llama 3's tokenizer calls one of its ends special; the other, <|eot_id|>, stood behind every answer."""
    batch = pipo.sample(tiny_model(), letter_tokenizer(), PROMPTS, 8, 12, generator=pipo.rng("cpu", 0))
    ended = {LETTERS[token - 2] for token in (5, 9)}
    assert not batch.truncated.all() and not any(set(text) & ended for text in batch.texts)


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", b""), ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
    ("model.safetensors", None), ("tokenizer.json", b"{}"), ("config.json", b"{"), ("config.json", b"[1]")])
def test_broken_model_folders_get_one_sentence(folder, tmp_path, name, content):
    """Truncated, empty, or a pointer of git-lfs in place of the weights."""
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    refused(folder, tmp_path / "run", str(tmp_path / "model"), model=str(tmp_path / "model"))


def test_code_of_a_repository_is_never_run(folder, tmp_path, monkeypatch):
    """transformers asks on standard input whether to trust it, and a piped `y` executed it."""
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for kind, own in [("own", "AutoConfig"), ("t5", "AutoModelForCausalLM")]:
        config = json.loads(file.read_text()) | {"model_type": kind, "auto_map": {own: "own.Own"}}
        file.write_text(json.dumps(config))
        refused(folder, tmp_path / "run", "can be read neither", model=str(tmp_path / "model"))
        assert not (tmp_path / "ran").exists()


def test_any_of_several_golds_counts():
    """Only the first was looked at: a right answer in the form of the second went unpaid."""
    problem = pipo.Problem("", [3], "1/2", ("1/2", "x=3"), {})
    batch = SimpleNamespace(texts=[r"\boxed{0.5}", r"\boxed{3}", r"\boxed{4}", "none"], tokens=torch.zeros(1))
    rewards, failures = pipo.grade_all(batch, [problem])
    assert rewards.tolist() == [[1, 1, 0, 0]] and failures == {"no_answer": 1}


def test_a_reward_of_ones_own(folder, tmp_path):
    """Any finite number, called with completion, answer and row; an exception in it is the user's to see."""
    file = tmp_path / "rewards.py"
    file.write_text("def length(completion, answer, row):\n    assert answer == row['answer'] == '1'\n"
                    "    return len(completion) / 4\n\ndef broken(completion, answer, row):\n    return 1 / 0\n")
    rows = pipo.train(settings(folder, tmp_path / "run", reward=f"{file}:length", steps=4))
    given = pipo.train(settings(folder, tmp_path / "again", steps=4), reward=lambda text, *_: len(text) / 4)
    assert [row["mu"] for row in rows] == [row["mu"] for row in given] and any(row["mu"] > 1 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    with pytest.raises(ZeroDivisionError):
        pipo.train(settings(folder, tmp_path / "broken", reward=f"{file}:broken"))
    refused(folder, tmp_path / "none", "has no function 'missing'", reward=f"{file}:missing")
    refused(folder, tmp_path / "none", "it must be file.py:function", reward="missing")


def test_pass_at_k_is_unbiased(folder, tmp_path, monkeypatch):
    """By hand: 2 of 4 right gives pass@2 = 1 - C(2,2)/C(4,2) = 5/6; the naive 1 - (1 - 1/2)^2 is 3/4.

    The standard error is over problems: the samples of one problem are no independent problems.
    """
    problems = [pipo.Problem("a", [3], "1", ("1",), {}), pipo.Problem("b", [4], "1", ("1",), {})]
    rewards = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    monkeypatch.setattr(pipo, "grade_all", lambda *_: (rewards, {}))
    run = pipo.Run(tiny_model(), letter_tokenizer(), None, None)
    scores = pipo.evaluate(run, {"set": problems}, Config(eval_samples=4, max_new_tokens=4), pipo.rng("cpu", 0))
    assert scores["eval/set/pass@1"] == scores["eval_pass@1"] == 0.25
    assert scores["eval/set/pass@2"] == pytest.approx(5 / 12) and scores["eval/set/pass@4"] == 0.5
    assert scores["eval/set/stderr"] == pytest.approx(0.25 / math.sqrt(2))


def test_several_held_out_sets_and_evaluation_alone(folder, tmp_path, graded_by_coin, capsys):
    """--steps 0 evaluates a model, or what --lora saved, and stops; each set has its own line and metrics."""
    sets = []
    for name in ("one", "two"):
        sets.append(str(tmp_path / f"{name}.jsonl"))
        shutil.copy(folder / "train.jsonl", sets[-1])
    changes = dict(eval_dataset=sets, eval_every=1, eval_samples=2, eval_temperature=0.5, eval_limit=5)
    rows = pipo.train(settings(folder, tmp_path / "run", steps=0, **changes))
    assert len(rows) == 1 and not (tmp_path / "run" / "model").exists()
    assert {"eval/one/pass@1", "eval/two/pass@2", "eval/two/stderr", "eval_pass@1"} <= set(rows[0])
    said = capsys.readouterr().out
    assert "step 0: one pass@1" in said and "step 0: two pass@1" in said
    pytest.importorskip("peft")
    pipo.train(settings(folder, tmp_path / "adapters", steps=2, lora=4))
    adapters = pipo.train(settings(folder, tmp_path / "again", model=str(tmp_path / "adapters" / "model"), steps=0, **changes))
    assert len(adapters) == 1
    merged = pipo.load_model(str(tmp_path / "adapters" / "model"), torch.device("cpu"))
    assert not torch.equal(weights(merged), weights(folder / "model"))
    broken = tmp_path / "adapters" / "model" / "adapter_model.safetensors"
    broken.write_bytes(b"no tensors")
    refused(folder, tmp_path / "broken", "the adapters in", model=str(broken.parent), steps=0, **changes)
    (broken.parent / "adapter_config.json").write_text("{}")
    refused(folder, tmp_path / "broken", "adapter_config.json cannot be read", model=str(broken.parent))


def test_truncated_completions_can_be_left_out_of_updates(folder, tmp_path, graded_by_coin, monkeypatch):
    """Their coefficient is 0, in both steps; mu and their group's mean and spread still count them."""
    seen, plain = [], pipo.update
    monkeypatch.setattr(pipo, "update", lambda model, optimizer, batch, coefficients, **options: (
        seen.append((batch, coefficients)), plain(model, optimizer, batch, coefficients, **options))[1])
    masked = pipo.train(settings(folder, tmp_path / "a", steps=3, mask_truncated=True))
    plainly = pipo.train(settings(folder, tmp_path / "b", steps=3))
    assert masked[0]["mu"] == plainly[0]["mu"]
    for batch, coefficients in seen[:3]:
        assert batch.truncated.any() and (coefficients.flatten()[batch.truncated] == 0).all()
    batch, coefficients = seen[0]
    rewards = torch.tensor([coin(text, "")[0] for text in batch.texts]).view(4, 4)
    expected = group_advantages(rewards).masked_fill(batch.truncated.view(4, 4), 0.0)
    assert torch.equal(coefficients, expected)


def test_metrics_go_to_a_tracker_only_when_asked(folder, tmp_path, graded_by_coin, monkeypatch):
    """Fed with the rows of metrics.jsonl; its package is looked for before any work and imported only then."""
    sent = []
    fake = SimpleNamespace(init=lambda **options: sent.append(options), finish=lambda: sent.append("finished"),
                           log=lambda row, step: sent.append(row))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(pipo, "find_spec", lambda name: True)
    rows = pipo.train(settings(folder, tmp_path / "run", steps=2, tracker="wandb"))
    assert sent[0]["config"]["steps"] == 2 and sent[1:] == [*rows, "finished"]
    monkeypatch.setattr(pipo, "find_spec", lambda name: None)
    refused(folder, tmp_path / "no", "--tracker is 'wandb': it needs the package of that name", tracker="wandb")


# ------------------------------------------------------------------------------------------------------------
# Memory. Masters are plain AdamW for fp32 weights, and keep what bf16 weights would lose; what fits where.
# ------------------------------------------------------------------------------------------------------------


def test_masters_of_float32_weights_are_plain_adamw():
    """The slow obvious version is torch's: same steps and moments, to the last bit, also saved and loaded."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    masters = pipo.MasterAdamW(ours.parameters(), "cpu", lr=1e-2, weight_decay=0.1)
    for step in range(6):
        x = torch.randn(4, 5)
        for network, optimizer in ((theirs, plain), (ours, masters)):
            network(x).square().sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(weights(ours), weights(theirs))
        if step == 2:
            state = copy.deepcopy(masters.state_dict())
            masters = pipo.MasterAdamW(ours.parameters(), "cpu", lr=1.0, weight_decay=0.1)
            masters.load_state_dict(state)


def test_small_updates_of_bf16_weights_are_not_lost():
    """At lr 1e-6 a bf16 weight of 1 never moves by itself (the next is 0.004 away); its fp32 master does."""
    for make, where, expected in ((torch.optim.AdamW, [], 0.0),
                                  (pipo.MasterAdamW, ["cpu"], pytest.approx(0.004, rel=0.05))):
        weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = make([weight], *where, lr=1e-6, weight_decay=0.0)
        for _ in range(4000):
            weight.grad = torch.ones_like(weight, dtype=weight.grad_dtype)
            optimizer.step()
        assert (1 - weight.detach().float().mean()).item() == expected


def test_many_small_gradients_add_up_with_bf16_weights():
    """1 added 600 times is 600, not 256: a bf16 sum stands still once a micro-batch is a small part of it."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = pipo.MasterAdamW([weight], "cpu", lr=1e-3)
    for _ in range(600):
        weight.sum().backward()
    assert weight.grad.tolist() == [600.0, 600.0] and weight.dtype == torch.bfloat16
    optimizer.zero_grad()
    assert weight.grad is None


@pytest.mark.parametrize("changes", [
    pytest.param(dict(dtype="bfloat16"), id="bf16"), pytest.param(dict(lora=4, kl_coef=0.01), id="lora")])
def test_other_precisions_and_adapters_train_and_resume(folder, tmp_path, graded_by_coin, changes):
    """bf16 weights with masters, and LoRA: a resumed run equals an unbroken one; what is saved can be loaded.

    Guards against masters rebuilt from the rounded weights, and against adapters left out of the checkpoint.
    """
    if "lora" in changes:
        pytest.importorskip("peft")
    whole = pipo.train(settings(folder, tmp_path / "whole", **changes))
    pipo.train(settings(folder, tmp_path / "broken", steps=4, **changes))
    resumed = pipo.train(settings(folder, tmp_path / "broken", resume=True, **changes))
    assert without_times(whole) == without_times(resumed) and any("pi_loss" in row for row in whole)
    unbroken, broken = (weights(tmp_path / run / "model") for run in ("whole", "broken"))
    assert torch.equal(unbroken, broken) and not torch.equal(unbroken, weights(folder / "model"))
    if "lora" in changes:
        # the reference is the model with its adapters off, which at the start is the model
        assert whole[0]["kl"] == pytest.approx(0, abs=1e-7) and whole[-1]["kl"] > 1e-6
        assert not (tmp_path / "whole" / "model" / "model.safetensors").exists()  # the adapters alone
    assert whole[0]["logprob_gap"] < (0.05 if "dtype" in changes else 1e-4)


@on_gpu
@pytest.mark.parametrize("optimizer_device", ["cpu", "cuda"])
def test_a_run_on_a_gpu_learns_in_bf16_and_resumes(folder, tmp_path, graded_by_coin, optimizer_device):
    """bf16 weights on the card, masters here or there: the policy that samples is the one that is trained."""
    changes = dict(device="cuda", optimizer_device=optimizer_device)
    pipo.train(settings(folder, tmp_path / "run", steps=4, **changes))
    rows = pipo.train(settings(folder, tmp_path / "run", steps=6, resume=True, **changes))
    assert len(rows) == 6 and all(row["logprob_gap"] < 0.05 for row in rows) and rows[-1]["memory_gb"] < 4


QWEN3_4B = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128)


def test_memory_plan_of_a_4b_model(monkeypatch, tmp_path):
    """The arithmetic for 4B: 8.0 GB of bf16 weights, 48 GB of masters and moments, 144 KiB of cache a token.

    They go to the host where that leaves the card to the cache; what cannot fit is refused beforehand.
    """
    with torch.device("meta"):
        shapes = Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, tie_word_embeddings=True, **QWEN3_4B))
    monkeypatch.setattr(pipo.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))

    def plan(gpu, host, **changes):
        monkeypatch.setattr(pipo, "free_memory", lambda device: {"cuda": gpu, "cpu": host}[device] * 1e9)
        return pipo.plan_memory(shapes, Config(model="4b", **changes), torch.device("cuda"), tmp_path)

    cfg, table = plan(80, 128)
    assert cfg.dtype == "bfloat16" and cfg.optimizer_device == "cpu" and 400_000 < cfg.cache_tokens < 470_000
    assert "7.49 GiB on cuda" in table and "47.13 GiB on cpu" in table
    assert all(re.search(r" [\d.]+ GiB on (cuda|cpu|disk)$", line) for line in table.splitlines())
    smaller = plan(48, 128)[0].cache_tokens
    assert 200_000 < smaller < 250_000  # a token takes 36 layers x 8 heads x 128 x 2 x 2 bytes
    assert cfg.cache_tokens - smaller == pytest.approx(32e9 * 15/16 / (144 * 1024), abs=1)
    # free memory that the system does not tell
    assert plan(math.inf, math.inf, dtype="float32", cache_tokens=None)[0].cache_tokens == 1024 * (512 + 4096)
    assert plan(80, 128, cache_tokens=50_000)[0].cache_tokens == 50_000
    on_the_card = plan(85, 128, optimizer_device="cuda")[0]  # what a card of "80 GB" really has
    assert on_the_card.optimizer_device == "cuda" and 100_000 < on_the_card.cache_tokens < 140_000
    assert plan(140, 40)[0].optimizer_device == "cuda"  # no room in the host
    for gpu, host, changes, sentence in [
            (24, 128, {}, "GiB on cuda, where 21.0 are free"),  # gradients in fp32 alone take 16
            (80, 30, dict(optimizer_device="cpu"), "GiB on cpu, where 26.2 are free"),
            (24, 128, dict(kl_coef=0.1), "GiB on cuda"),  # a reference policy is 8 GB more
            (80, 128, dict(cache_tokens=1000), "the cache has room for 1,000 tokens")]:
        with pytest.raises(UserError, match=sentence):
            plan(gpu, host, **changes)
    assert plan(24, 32, lora=16)[0].cache_tokens > 40_000  # a 24 GB card trains adapters


def test_free_memory_heeds_the_limits_of_a_container(tmp_path, monkeypatch):
    """The host's table alone is wrong in a container, and the run is killed."""
    monkeypatch.setattr(pipo, "CGROUP", tmp_path)
    host = pipo.free_memory("cpu")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nactive_file 200000\ninactive_file 300000\n")
    assert abs(pipo.free_memory("cpu") - host) < 2**30
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert pipo.free_memory("cpu") == 2_500_000  # what files were read can be forgotten


# ------------------------------------------------------------------------------------------------------------
# The demo. Its problems, and the README's first command from nothing.
# ------------------------------------------------------------------------------------------------------------


def test_demo_problems_are_right_and_disjoint():
    """Guards against held-out problems that were trained on, and worked examples that teach wrong sums."""
    evaluation, warm, training = pipo.demo_rows(0)
    assert len(evaluation) >= 500
    asked = [{row["problem"] for row in rows} for rows in (evaluation, warm, training)]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    for row in warm[:200]:
        a, b = map(int, row["problem"].rstrip("?").split("+"))
        assert int(row["answer"]) == a + b and verify(row["worked"], row["answer"]) == 1.0
    assert pipo.demo_rows(0)[0] != pipo.demo_rows(1)[0]


def test_the_demo_end_to_end(tmp_path, offline, monkeypatch, capsys):
    """The README's first command, with two digits: from nothing, without network, to a model that was taught.

    Then it goes on from its checkpoint, without a second warm start.
    """
    for name, value in dict(DIGITS=2, EVAL=512, WARM=4096, TRAIN=512).items():
        monkeypatch.setattr(pipo, f"DEMO_{name}", value)
    sizes = "--warm-start 0.02 --window 2 --prompts-per-step 8 --group-size 4 --eval-limit 32".split()
    flags = [*sizes, "--show-every", "1", "--device", "cpu", "--out", str(tmp_path / "demo")]
    assert pipo.main([*flags, "--steps", "3"]) == 0
    said = capsys.readouterr()
    assert "step 0: demo pass@1" in said.out + said.err and "feedback" in said.out
    assert "step 1, reward" in said.out + said.err
    monkeypatch.setattr(pipo, "build_demo", lambda *_: pytest.fail("a second warm start"))
    assert pipo.main([*flags, "--steps", "4", "--resume"]) == 0
    rows = pipo.read_jsonl(tmp_path / "demo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and any(row["mu"] > 0 for row in rows[1:])
    assert (tmp_path / "demo" / "model").is_dir()


# ------------------------------------------------------------------------------------------------------------
# Files. A run goes on exactly where it stood, whatever stopped it, and is never lost by mistake.
# ------------------------------------------------------------------------------------------------------------


def test_files_of_a_run_and_the_saved_model(folder, tmp_path, graded_by_coin):
    """Metrics hold every number that the README explains; the model folder loads as any other."""
    out = tmp_path / "run"
    rows = pipo.train(settings(folder, out, eval_every=2, eval_dataset=str(folder / "train.jsonl"),
                               kl_coef=0.01, steps=4))
    expected = """step mu mu_his sigma_his xi phi feedback coefficient loss grad_norm pi_loss pi_grad_norm
        clip_fraction ratio logprob_gap entropy kl truncated zero_signal completion_length tokens
        seconds_sample seconds_grade seconds_verification seconds_exploration memory_gb eval_pass@1""".split()
    assert set(expected) <= set(rows[-1]) and [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_pass@1" in row] == [0, 2, 4] and "mu" not in rows[0]
    assert rows[1]["ratio"] == pytest.approx(1, abs=1e-4) and rows[1]["logprob_gap"] < 1e-4
    assert json.loads((out / "config.json").read_text())["lr"] == 1e-3
    samples = pipo.read_jsonl(out / "samples.jsonl")
    assert {"problem", "completion", "reward"} <= set(samples[0])
    for row in rows[1:]:  # a right and a wrong one, where there are both
        rewards = {sample["reward"] for sample in samples if sample["step"] == row["step"]}
        assert rewards == ({0.0, 1.0} if 0 < row["mu"] < 1 else {row["mu"]})
    AutoTokenizer.from_pretrained(out / "model")
    assert not torch.equal(weights(out / "model"), weights(folder / "model"))


def test_a_resumed_run_equals_an_unbroken_one(folder, tmp_path, graded_by_coin):
    """12 steps, and 7 resumed to 12: same metrics, same samples, same bits.

    Guards against a lost window, batch, moment or data order. What a kill leaves behind the checkpoint in the
    logs, whole lines and one cut in half, must go, not stand there twice.
    """
    changes = dict(feedback="shuffled", kl_coef=0.01)
    whole = pipo.train(settings(folder, tmp_path / "whole", steps=12, **changes))
    pipo.train(settings(folder, tmp_path / "broken", steps=7, **changes))
    for name in pipo.LOGS:
        with open(tmp_path / "broken" / name, "a") as file:
            file.write(json.dumps({"step": 8, "mu": 9}) + "\n" + '{"step": 9, "m')
    resumed = pipo.train(settings(folder, tmp_path / "broken", steps=12, resume=True, **changes))
    assert without_times(whole) == without_times(resumed) and len(whole) == 12
    assert torch.equal(weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model"))
    samples = [(tmp_path / run / "samples.jsonl").read_text() for run in ("whole", "broken")]
    assert samples[0] == samples[1] and samples[0].count("\n") > 12
    assert len({row["mu"] for row in whole}) > 3 and any(row["feedback"] == "negative" for row in whole)


def command(cfg, patch=""):
    """Arguments of subprocess: a run in its own process, graded by coin, after the lines of `patch`."""
    script = ["import os, sys, signal, zlib, torch, pipo", inspect.getsource(coin), "pipo.grade = coin",
              patch, "sys.exit(pipo.main(sys.argv[1:]))"]
    given = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
    flags = [x for name, value in given.items() for x in ([pipo.flag(name), value], [pipo.flag(name)])[value is True]]
    return own_process("-c", "\n".join(script), *flags)


def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_checkpoint(folder, tmp_path, graded_by_coin):
    """Guards against writing over the only checkpoint: a SIGKILL with half of step 4's on the disk."""
    patch = """
plain_save = torch.save
def save(state, file):
    if state["step"] == 4:
        file.write(b"half of it"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
    plain_save(state, file)
torch.save = save
"""
    cfg = settings(folder, tmp_path / "run", save_every=2)
    killed = subprocess.run(**command(cfg, patch))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert saved(tmp_path / "run")["step"] == 2
    rows = pipo.train(replace(cfg, resume=True))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def wait_for_rows(out, n):
    """Until a running process has logged n steps."""
    deadline, log = time.time() + 60, out / "metrics.jsonl"
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= n):
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_stop_saves_and_says_how_to_go_on(folder, tmp_path, graded_by_coin, name):
    """Guards against a step cut in half, and against a run that says --resume and cannot. Exit code 128 + n.

    What a scheduler sends before it kills ended the run at once, with nothing saved.
    """
    out, number = tmp_path / "run", getattr(signal, name)
    cfg = settings(folder, out, steps=100_000, save_every=100_000)
    # a suite started in the background hands on that SIGINT, or under nohup SIGHUP, is ignored, which pipo respects
    run = subprocess.Popen(**command(cfg), preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    wait_for_rows(out, 3)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "--resume" in said and "Traceback" not in said
    step = saved(out)["step"]
    assert step >= 3 and pipo.read_jsonl(out / "metrics.jsonl")[-1]["step"] == step
    rows = pipo.train(replace(cfg, steps=step + 1, resume=True))
    assert [row["step"] for row in rows] == list(range(1, step + 2))


def test_a_second_ctrl_c_stops_at_once():
    """Guards against a run that cannot be stopped within a long step, and a handler that outlives the run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    with pipo.signals_caught() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pipo.signals_caught() as caught:
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler and not caught
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler


@pytest.mark.parametrize("broken", ["sampling", "gradient"])
def test_a_run_that_breaks_down_names_its_step_and_meets_it_again(
        folder, tmp_path, graded_by_coin, monkeypatch, broken):
    """A NaN must stop the run, never be trained through; what goes on from the checkpoint meets it again."""
    cfg, said = settings(folder, tmp_path / "run", lr=1e30 if broken == "sampling" else 1e-3, steps=20), []
    plain, calls = pipo.policy_loss, []

    def nan_from_the_fourth_on(*args):
        calls.append(1)
        loss, means = plain(*args)
        return loss * (math.nan if len(calls) > 3 else 1), means

    if broken == "gradient":
        monkeypatch.setattr(pipo, "policy_loss", nan_from_the_fourth_on)
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match="; the last checkpoint is as it was$") as stopped:
            pipo.train(replace(cfg, resume=resume))
        said.append(str(stopped.value))
        assert said[0].startswith(f"step {saved(tmp_path / 'run')['step'] + 1}: ")
    assert said[0] == said[1]


def test_runs_are_not_overwritten_and_resume_names_what_differs(folder, tmp_path, graded_by_coin):
    """Guards against a run of days that a mistyped command deletes, or goes on with under other settings."""
    pipo.train(settings(folder, tmp_path, steps=2))
    for changes, sentence in [
            ({}, "already holds a run"),
            (dict(resume=True, steps=1), "already stands at step 2"),
            (dict(resume=True, steps=4, lr=0.5, window=3), "--window was 2, is 3; --lr was 0.001, is 0.5")]:
        with pytest.raises(UserError, match=re.escape(sentence)):
            pipo.train(settings(folder, tmp_path, **dict(steps=2) | changes))
    with pytest.raises(UserError):  # a mistyped name must not cost the run
        pipo.train(settings(folder, tmp_path, steps=1, overwrite=True, dataset="/no/such"))
    assert len(pipo.train(settings(folder, tmp_path, steps=2, resume=True))) == 2
    assert len(pipo.train(settings(folder, tmp_path, steps=1, overwrite=True))) == 1


def flipped(data):
    """One bit in the middle turned round."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


def changed(change):
    """Bytes of a checkpoint with its dictionary changed."""
    def edit(data):
        state = torch.load(io.BytesIO(data), weights_only=True)
        file = io.BytesIO()
        torch.save(change(state), file)
        return file.getvalue()
    return edit


def without_a_weight(state):
    state["model"].pop("model.norm.weight")
    return state


def of_another_shape(state):
    state["model"]["model.norm.weight"] = torch.ones(7)
    return state


BROKEN = {
    "empty": lambda data: b"", "truncated": lambda data: data[:len(data) // 2], "zeros": lambda data: bytes(1000),
    "random": lambda data: random.Random(0).randbytes(5000), "text": lambda data: b"hello", "a flipped bit": flipped,
    "a list": changed(lambda state: [1]), "no optimizer": changed(lambda state: {**state, "optimizer": {}}),
    "a key missing": changed(lambda state: {k: v for k, v in state.items() if k != "window"}),
    "a weight missing": changed(without_a_weight), "another shape": changed(of_another_shape),
}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of two steps with its checkpoint, to be copied and broken."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipo, "grade", coin)
        pipo.train(settings(folder, out, steps=2))
    return out


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_refused_and_left_as_it_is(folder, tmp_path, finished, how):
    """A weight missing from it kept its start value, flipped bits were loaded, the rest were tracebacks."""
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint" / "state.pt"
    file.write_bytes(BROKEN[how](file.read_bytes()))
    before = file.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    refused(folder, tmp_path / "run", "checkpoint", resume=True)
    assert before == (file.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1]\n" * 400, b"null\n" * 400, b'{"mu": 1}\n' * 400])
def test_broken_logs_are_refused(folder, tmp_path, finished, content):
    """What stands before the checkpoint's place in a log is part of the run: no row of it may be lost or made up."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(content)
    refused(folder, tmp_path / "run", "the logs in", resume=True)


def test_a_checkpoint_that_would_run_code_is_refused(folder, tmp_path, finished):
    """A pickle can call anything: only tensors and plain values are read."""
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    shutil.copytree(finished, tmp_path / "run")
    torch.save({"step": Evil()}, tmp_path / "run" / "checkpoint" / "state.pt")
    refused(folder, tmp_path / "run", "cannot be used", resume=True)
    assert not (tmp_path / "ran").exists()


def test_a_resumed_run_must_read_what_it_began_with(folder, tmp_path, finished):
    """Other problems or another start model under the same name: it went on without a word."""
    shutil.copytree(finished, tmp_path / "run")
    rows = (folder / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[::-1]))
    shutil.copytree(folder / "model", tmp_path / "model")
    tiny_model(seed=1, spread=0.05).save_pretrained(tmp_path / "model")
    state = saved(tmp_path / "run")
    for setting, value, name in [("dataset", tmp_path / "train.jsonl", "training problems"),
                                 ("model", tmp_path / "model", "start model")]:
        state["config"] |= {"dataset": str(folder / "train.jsonl"), "model": str(folder / "model")}
        state["config"][setting] = str(value)  # the same name as before, with another content
        torch.save(state, tmp_path / "run" / "checkpoint" / "state.pt")
        refused(folder, tmp_path / "run", f"changed are: {name}", resume=True, **{setting: str(value)})


def test_overwrite_does_not_delete_what_it_is_to_read(folder, tmp_path, finished):
    """--overwrite --dataset OUT/samples.jsonl deleted the data set it was about to read; a linked folder stays."""
    shutil.copytree(finished, tmp_path / "run")
    data = str(tmp_path / "run" / "samples.jsonl")
    refused(folder, tmp_path / "run", f"{data} is to be read", overwrite=True, dataset=data)
    inside = str(tmp_path / "run" / "model")
    refused(folder, tmp_path / "run", f"{inside} is to be read", overwrite=True, model=inside)
    shutil.move(tmp_path / "run" / "model", tmp_path / "elsewhere")
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")
    pipo.train(settings(folder, tmp_path / "run", steps=1, overwrite=True))
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_overwrite_spares_a_model_folder_and_what_a_tilde_means(folder, tmp_path, finished, monkeypatch):
    """`--model M --out M --overwrite` replaced the model's own config.json; ~ was expanded for reading only."""
    shutil.copytree(folder / "model", tmp_path / "model")
    refused(folder, tmp_path / "model", "is to be read", overwrite=True, model=str(tmp_path / "model"))
    assert "vocab_size" in (tmp_path / "model" / "config.json").read_text()
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(folder, tmp_path / "run", "is to be read", overwrite=True, dataset="~/run/samples.jsonl")
    assert (tmp_path / "run" / "samples.jsonl").exists()


def test_a_reward_cannot_end_the_run_as_if_it_were_done(folder, tmp_path):
    """sys.exit(0) in it gave exit code 0: a queue took the half-done run for finished."""
    file = tmp_path / "rewards.py"
    file.write_text("import sys\ndef score(*_):\n    sys.exit(0)\n")
    with pytest.raises(RuntimeError, match="sys.exit"):
        pipo.train(settings(folder, tmp_path / "run", reward=f"{file}:score"))
    for content in ("sys.exit(0)", "def (", "import nothing_of_that_name"):
        file.write_text(f"import sys\n{content}\n")
        refused(folder, tmp_path / "run", "that file does not run", reward=f"{file}:score")


def test_held_out_sets_of_one_name_are_both_there(folder, tmp_path, graded_by_coin):
    """a/test.jsonl and b/test.jsonl had one key: the second was lost in silence."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "train.jsonl", tmp_path / name / "test.jsonl")
    sets = [str(tmp_path / name / "test.jsonl") for name in ("a", "b")]
    rows = pipo.train(settings(folder, tmp_path / "run", steps=0, eval_every=1, eval_limit=3, eval_dataset=sets))
    assert {"eval/test/pass@1", "eval/test+/pass@1"} <= set(rows[0])


def test_a_model_is_saved_whole_or_not_at_all(folder, tmp_path, graded_by_coin, monkeypatch):
    """A kill between its weights and its tokenizer left half a model for good; a file in its place, none."""
    cfg = settings(folder, tmp_path / "run", steps=2, keep_models=1)

    def full(*_):
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(UserError, match="could not be saved"):
            pipo.train(cfg)
    assert not (tmp_path / "run" / "model-1").exists()
    (tmp_path / "run" / "model-7.txt").write_text("mine")
    pipo.train(replace(cfg, overwrite=True))
    assert sorted(path.name for path in (tmp_path / "run").glob("model*")) == ["model", "model-2", "model-7.txt"]


def test_weights_that_are_not_finite_are_not_saved_as_a_model(folder, tmp_path, graded_by_coin):
    """The last step's were never sampled from: exit code 0, and a model of nan."""
    with pytest.raises(FloatingPointError, match="the weights are not finite"):
        pipo.train(settings(folder, tmp_path / "run", steps=1, lr=1e300))


def test_two_processes_cannot_share_a_folder(folder, tmp_path, graded_by_coin):
    """Both returned 0, their metrics interleaved. The lock dies with its process, also by SIGKILL."""
    cfg = settings(folder, tmp_path / "run", steps=100_000)
    run = subprocess.Popen(**command(cfg))
    wait_for_rows(tmp_path / "run", 1)
    for changes in (dict(resume=True), dict(overwrite=True), {}):
        with pytest.raises(UserError, match=f"is in use by the process {run.pid}: give another --out"):
            pipo.train(replace(cfg, **changes))
    run.kill()
    run.communicate()
    assert len(pipo.train(replace(cfg, steps=1, overwrite=True))) == 1


def test_optimized_python_resumes_to_the_same_weights(folder, tmp_path, graded_by_coin):
    """python -O strips asserts: one with a side effect left --resume on the start weights, exit code 0."""
    pipo.train(settings(folder, tmp_path / "whole", steps=4))
    pipo.train(settings(folder, tmp_path / "broken", steps=2))
    optimized = command(settings(folder, tmp_path / "broken", steps=4, resume=True))
    optimized["args"].insert(1, "-O")
    assert subprocess.run(**optimized).returncode == 0
    assert torch.equal(weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model"))


def test_a_closed_pipe_and_an_ascii_terminal_do_not_end_a_run(folder, tmp_path):
    """`| head -1` raised BrokenPipeError, a non-ASCII problem UnicodeEncodeError, both before the checkpoint."""
    rows = [{"problem": "é" + letters, "answer": "1"} for letters in ("ab", "cd", "ef", "gh")]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    cfg = settings(folder, tmp_path / "run", dataset=str(tmp_path / "train.jsonl"), steps=3, show_every=1)
    run = command(cfg)
    run["args"][1:3] = ["pipo.py"]
    line = f"set -o pipefail; {shlex.join(run['args'])} 2>&1 | head -1"
    run |= dict(args=["bash", "-c", line], env=run["env"] | {"PYTHONIOENCODING": "ascii"})
    done = subprocess.run(**run)
    assert done.returncode == 0, done.stderr
    assert len(pipo.read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 3 and (tmp_path / "run" / "model").exists()


def test_a_stream_closed_from_the_start_writes_into_no_other_file(tmp_path):
    """After `2>&-` the next file that was opened got the number 2, and what was said stood in it."""
    stream = pipo.sturdy(None)
    with open(tmp_path / "file", "w"):
        print("a warning", file=stream, flush=True)
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk_leaves_the_old_checkpoint_and_no_partial_one(folder, tmp_path, graded_by_coin, monkeypatch):
    """The half-written file stayed and filled the disk for good."""
    plain = torch.save

    def full(state, file):
        if state["step"] == 3:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        plain(state, file)

    monkeypatch.setattr(torch, "save", full)
    refused(folder, tmp_path / "run", "step 3 could not be saved after 0.00 GiB")
    assert os.listdir(tmp_path / "run" / "checkpoint") == ["state.pt"]
    assert saved(tmp_path / "run")["step"] == 2


def test_masters_stand_for_the_weights_in_a_checkpoint(folder, tmp_path, graded_by_coin):
    """bf16 weights stood in it twice: 8 of 56 GB for 4B. The time of a save is in the next row."""
    rows = pipo.train(settings(folder, tmp_path / "run", dtype="bfloat16", steps=3, keep_models=2))
    state = saved(tmp_path / "run")
    assert state["model"] == {} and len(state["optimizer"]["masters"]) > 0
    assert "seconds_save" not in rows[0] and rows[1]["seconds_save"] > 0
    assert sorted(path.name for path in (tmp_path / "run").glob("model-*")) == ["model-2", "model-3"]
    assert torch.equal(weights(tmp_path / "run" / "model-3"), weights(tmp_path / "run" / "model"))


def test_a_checkpoint_is_saved_after_so_many_minutes(folder, tmp_path, graded_by_coin):
    """A step of a 4B model takes minutes and a scheduler waits for seconds: the last checkpoint must be recent."""
    cfg = settings(folder, tmp_path / "run", steps=2, save_every=100, save_minutes=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        saved, plain = [], pipo.save_checkpoint
        patch.setattr(pipo, "save_checkpoint", lambda *a: (saved.append(a[0].step), plain(*a)))
        pipo.train(cfg)
    assert saved == [1, 2]


@pytest.mark.parametrize("flags, sentence", [
    (["--seed", str(2**63)], "--seed is"), (["--window", str(2**63)], "--window is"), (["--out", "a\0b"], "--out is"),
    (["--model", "m" * 5000], "--model is"), (["--dataset", "d" * 5000], "--dataset is"),
    (["--model", ""], "--model is empty"), (["--dataset", ""], "--dataset is '': name a data set")])
def test_values_beyond_reason_get_one_sentence(folder, tmp_path, capsys, flags, sentence):
    """Each of these was a traceback."""
    good = ["--model", str(folder / "model"), "--dataset", str(folder / "train.jsonl"), "--out", str(tmp_path / "run")]
    code, said = pipo.main([*good, *flags]), capsys.readouterr().err.strip()
    assert code == 2 and sentence in said and said.count("\n") == 0


def test_a_long_system_message_is_no_name():
    """Few-shot examples in --system were refused as no text that could name something."""
    pipo.validate(Config(model="m", system="few-shot examples " * 200))


# ------------------------------------------------------------------------------------------------------------
# Command line. What the user can put right is one sentence and exit code 2, and --help leaves nothing out.
# ------------------------------------------------------------------------------------------------------------


def bad_inputs(where):
    """Flags and what must be said of them, where model, data and all other flags are good."""
    (where / "columns.jsonl").write_text('{"text": "x", "label": "y"}')
    (where / "empty.jsonl").write_text("")
    (where / "notes.txt").write_text("x")
    (where / "noanswer.jsonl").write_text('{"problem": "x", "answer": ""}')
    (where / "emptyfolder").mkdir(exist_ok=True)
    (where / "translator").mkdir(exist_ok=True)
    (where / "translator" / "config.json").write_text('{"model_type": "t5"}')
    return [
        ("--model /no/such/folder", "/no/such/folder does not exist"),
        ("--model nobody/nothing", "nobody/nothing can be read neither"),
        (f"--model {where}/emptyfolder", "emptyfolder can be read neither"),
        (f"--model {where}/translator", "translator can be read neither"),
        ("--dataset /no/such/file.parquet", "/no/such/file.parquet does not exist"),
        ("--dataset nobody/nothing", "nobody/nothing can be read neither"),
        (f"--dataset {where}/columns.jsonl",
         "has the columns text, label; understood are prompt, problem"),
        (f"--dataset {where}/empty.jsonl", "empty.jsonl is empty or"),
        (f"--dataset {where}/emptyfolder", "emptyfolder"),
        (f"--dataset {where}/notes.txt", "notes.txt is empty or not a"),
        (f"--dataset {where}/noanswer.jsonl", "no usable problem"),
        ("--max-prompt-tokens 1", "40 with a prompt over 1 tokens"),
        ("--eval-every 2 --eval-dataset /no/such", "/no/such does not exist"),
        ("--window 1", "--window is 1"), ("--lam 1.5", "--lam is 1.5"), ("--lam nan", "--lam is nan"),
        ("--group-size 1", "--group-size is 1"), ("--temperature 0", "--temperature is 0.0"),
        ("--top-p 0", "--top-p is 0.0"), ("--top-p 1.1", "--top-p is 1.1"), ("--lr -1", "--lr is -1.0"),
        ("--steps 0", "--steps is 0"), ("--epochs 0", "--epochs is 0"),
        ("--clip-high nan", "--clip-high is nan"), ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--eval-limit -1", "--eval-limit is -1"),
        ("--minibatches 3", "--minibatches is 3: it must divide --prompts-per-step (128)"),
        ("--device cuda", "--device is 'cuda'"), ("--device abacus", "--device is 'abacus'"),
        ("--device meta", "--device is 'meta': it must be cpu or"),
        ("--optimizer-device cuda --device cpu", "--optimizer-device is 'cuda': the run is on cpu"),
        ("--cache-tokens 30", "the cache has room for 30 tokens"),
        ("--resume", "nothing to resume"),
        ("--resume --overwrite", "--overwrite is True: it contradicts --resume"),
        (f"--out {where}/train.jsonl/run", "cannot be written"),
    ]


def test_bad_input_gets_one_sentence_and_exit_code_2(folder, offline, capsys, monkeypatch):
    """No traceback, no work done first, no run left behind."""
    for expensive in ("load_model", "build_demo"):
        monkeypatch.setattr(pipo, expensive, lambda *_: pytest.fail("expensive work before the check"))
    good = f"--model {folder}/model --dataset {folder}/train.jsonl --eval-every 0 --out {folder}/never "
    cases = [(good + flags, sentence) for flags, sentence in bad_inputs(folder)
             if "cuda" not in sentence or not torch.cuda.is_available()]
    cases += [(f"--dataset {folder}/train.jsonl", "--dataset is"), ("--eval-dataset a/b", "it needs --model"),
              ("--warm-start 1.5", "--warm-start is 1.5")]
    for flags, sentence in cases:
        code, said = pipo.main(flags.split()), capsys.readouterr().err.strip()
        assert code == 2 and sentence in said and said.count("\n") == 0, (flags, said)
    assert not any((folder / "never" / name).exists() for name in pipo.RUN_FILES)
    for flags in ("--no-such-flag", "--base ppo", "--steps many", "--temp 1"):
        with pytest.raises(SystemExit) as stop:
            pipo.main(flags.split())
        assert stop.value.code == 2


def test_the_script_itself_hands_on_the_exit_code():
    """Guards against a script in a queue that takes a refused run for a finished one."""
    run = subprocess.run(**own_process("pipo.py", "--window", "1"))
    assert (run.returncode, run.stdout) == (2, "") and run.stderr.startswith("pipo: --window is 1")


def test_every_flag_is_explained_with_its_default_and_parsed(capsys, monkeypatch):
    """Guards against a setting that cannot be given, and against a --help that names another default."""
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as stop:
        pipo.parse(["--help"])
    texts = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    said = {text.split()[0]: " ".join(text.split()) for text in texts}
    assert stop.value.code == 0 and set(said) == {pipo.flag(f.name) for f in fields(Config)}
    assert pipo.parse([]) == Config(**pipo.DEMO) and pipo.parse(["--model", "x"]) == Config(model="x")
    for f in fields(Config):
        kind, help, choices = TYPES[f.name], f.metadata["help"], f.metadata["choices"]
        _, found, behind = said[pipo.flag(f.name)].partition(help)
        assert found and len(help) > 5
        if f.default is None:
            assert "(default: " in help  # what a blank comes to
        elif kind is not bool and f.default != "":
            assert behind.startswith(f" (default: {' '.join(str(f.default).split())})")
        value = choices[-1] if choices else {int: 7, float: 0.25, str: "any", bool: True, list[str]: ["any"]}[kind]
        words = [] if kind is bool else value if kind == list[str] else [str(value)]
        given = getattr(pipo.parse([pipo.flag(f.name), *words]), f.name)
        assert given == value and isinstance(given, get_origin(kind) or kind)


# ------------------------------------------------------------------------------------------------------------
# README. Its commands, its tables and the pieces it says can be copied; the figures behind them.
# ------------------------------------------------------------------------------------------------------------


def readme_section(title):
    """What stands under a heading of the README."""
    return README.read_text().split(f"## {title}")[1].split("\n## ")[0]


def experiment(*arguments):
    """assets/experiment.py as a user starts it."""
    return subprocess.run(**own_process("assets/experiment.py", *arguments))


def test_the_readmes_reward_for_countdown(folder, tmp_path):
    """Each number once, no power towers to hang on, nothing but arithmetic is evaluated; and a run takes it."""
    block, = (b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "def score" in b)
    (tmp_path / "countdown.py").write_text(block)
    score, row = pipo.load_reward(f"{tmp_path}/countdown.py:score"), {"numbers": [2, 3, 4], "target": 24}
    assert [score(rf"so \boxed{{{sum_}}}", "", row) for sum_ in ("2*3*4", "(4*3)*2", "4*3 / (1/2)")] == [1, 1, 0]
    for wrong in ("2*12", "2**3*4", "2*3+4", "2 3 4", "2//3*4", "4*3*2)", "4/(3-3)", "__import__('os')"):
        assert score(rf"\boxed{{{wrong}}}", "", row) == 0.0
    rows = [{"problem": letters, "numbers": [1, 2], "target": 3} for letters in ("ab", "cd", "ef", "gh")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = settings(folder, tmp_path / "run", dataset=str(tmp_path / "train.jsonl"), steps=1,
                   reward=f"{tmp_path}/countdown.py:score")
    assert pipo.train(cfg)[0]["mu"] == 0.0


def test_the_readme_commands_parse():
    """README and code drift apart: every command shown must be one that the program takes."""
    commands = re.findall(r"^python pipo\.py(.*?)(?:\s+#.*)?$", README.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 3
    for line in commands:
        if "--help" not in line:
            pipo.validate(pipo.parse(line.split()))


def test_results_come_from_the_packed_runs_and_the_readme_from_the_results(tmp_path):
    """Guards against a table that nobody can make again, and a README that was not changed with it."""
    for pack in (HERE / "assets").glob("runs-*.jsonl.gz"):
        shutil.copy(pack, tmp_path)
    assert experiment("table", "--into", tmp_path).returncode == 0
    results = (HERE / "assets" / "results.md").read_text()
    assert (tmp_path / "results.md").read_text() == results
    rows = [line for line in readme_section("Results").splitlines() if line.startswith("| ") and "±" in line]
    assert len(rows) >= 6 and all(row in results for row in rows)


def test_the_readme_says_what_was_measured():
    """Guards against a README with the speed of an older pipo.py, or of the rows that look best."""
    speed = readme_section("Speed and memory")
    measured = json.loads((HERE / "assets" / "bench.json").read_text())
    rows = [row for processor in measured.values() for row in processor["rows"].values()]
    told = set(re.findall(r"[0-9.]*[0-9]", speed))
    for ratio in [ratio for row in rows for ratio in row.get("ratios", [row.get("ratio")])]:
        assert {f"{ratio:.1f}", f"{ratio:.2f}"} & told, ratio


def test_plots_of_ones_own_runs(folder, tmp_path, graded_by_coin):
    """The command behind `make plot`, on a run that was never evaluated, and on a folder that is no run."""
    pipo.train(settings(folder, tmp_path / "run"))
    done = experiment("plot", tmp_path / "run", "--into", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("pipo-curves.png", "pipo-inside.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    wrong = experiment("plot", tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "holds no step" in wrong.stderr


@pytest.fixture
def on_paper(monkeypatch):
    """assets/experiment.py, whose formulas the README's results rest on."""
    monkeypatch.syspath_prepend(HERE / "assets")
    import experiment
    return experiment


def test_a_steady_rise_has_the_same_xi_however_fast_it_is(on_paper):
    """On steady progress PIPO is a constant replay. By the tracker itself."""
    for K in (4, 8, 16):
        for pace in (1e-4, 0.03):
            tracker = pipo.ImprovementTracker(K)
            for i in range(K):
                tracker.push(0.2 + pace * i)
            assert tracker.feedback(0.2 + pace * K).xi == pytest.approx(on_paper.perfect_xi(K), rel=1e-6)


def test_the_noise_of_a_mean_reward_by_drawing_prompts_and_samples(on_paper):
    """Plain, held against rates known, and against rates from earlier samples or of a class."""
    random, Q, G, n = np.random.default_rng(0), 16, 8, 40_000
    centre = random.choice([0.2, 0.5, 0.8], (n, Q))  # of the class
    p = centre + random.choice([-0.1, 0.1], (n, Q))
    between, within, explained = 0.06 + 0.01, np.mean(p * (1 - p)), 0.06 / 0.07
    mean = random.binomial(G, p) / G
    earlier = random.binomial(4, p) / 4
    for measured, formula in (
            (mean, on_paper.reward_variance(between, within, Q, G)),
            (mean - p, on_paper.paired_variance(between, within, Q, G)),
            (mean - earlier, on_paper.paired_variance(between, within, Q, G, earlier=4)),
            (mean - centre, on_paper.paired_variance(between, within, Q, G, explained=explained))):
        assert measured.mean(1).var() == pytest.approx(formula, rel=0.05)


def test_how_much_xi_knows_by_simulating_runs(on_paper):
    """The numerator as the formula says; xi itself within 0.03 of it where noise prevails, 0.06 where it is even."""
    random, n = np.random.default_rng(0), 100_000
    for K in (8, 16):
        for step in (0.1, 0.3, 1.0):  # in standard deviations of the noise
            changes = step * (0.3 + random.standard_normal((n, K + 1)))  # with a steady part
            mu = changes.cumsum(1) + random.standard_normal((n, K + 1))
            gap, formula = mu[:, K] - mu[:, :K].mean(1), on_paper.xi_correlation(step, 1.0, K)
            assert np.corrcoef(gap, changes[:, K])[0, 1] == pytest.approx(formula, abs=0.01)
            xi = gap / mu[:, :K].std(1, ddof=1)
            assert np.corrcoef(xi, changes[:, K])[0, 1] == pytest.approx(formula, abs=0.03 if step < 1 else 0.06)
    needed = on_paper.prompts_needed(0.4, 0.01, 0.1, 0.1, 8, 8)
    variance = on_paper.reward_variance(0.1, 0.1, needed, 8)
    assert on_paper.xi_correlation(0.01, variance, 8) == pytest.approx(0.4)
    assert on_paper.prompts_needed(0.6, 0.01, 0.1, 0.1, 8, 8) == math.inf  # its numerator cannot reach 0.57 at K = 8


def test_pairing_takes_out_the_luck_of_the_draw(on_paper):
    """Three easy prompts drawn for one hard: mu says 0.7, the policy's rate is 0.5, and 0.6 after each rose by 0.1."""
    pairing = on_paper.Paired(("easy", "hard"))
    for _ in range(60):
        pairing([0.9, 0.1], ["easy", "hard"])
    assert pairing([0.9, 0.9, 0.9, 0.1], ["easy", "easy", "easy", "hard"]) == pytest.approx(0.5, abs=0.01)
    assert pairing([1.0, 1.0, 1.0, 0.2], ["easy", "easy", "easy", "hard"]) == pytest.approx(0.6, abs=0.02)


def test_what_follows_a_harm_by_hand(on_paper):
    """Guards against rows off by one, and a harm that is charged with the next one's fall."""
    J = [0.5] * 12 + [0.5, 0.47, 0.46, 0.5, 0.51, 0.51, 0.3, 0.3]  # harms at rows 12 and 17
    xi = [None] * 9 + [1.0, 2.0, 3.0, 1.5, -1.0, -2.0, 0.0, 0.0, 0.0, -3.0, -3.0]
    columns = {"J": J, "xi": xi, "harm": [int(t in (12, 17)) for t in range(20)]}
    run = dict(arm="pipo", seed=0, failed=None, rows=20, columns=columns)
    first, = on_paper.aftermath(run)  # of the second too little is known
    assert first[:6] == pytest.approx([0, -3, -4, 0, 1, 1]) and np.isnan(first[6:]).all()
    after, free = on_paper.told_apart([run], 1)
    assert after.tolist() == [-1.0, -3.0] and free.tolist() == [1.0, 2.0, 3.0, 1.5]
    report = on_paper.harm_report([run])["pipo"]
    assert (report["lost"], report["back"], report["area_1"]) == (pytest.approx(4), 3, 1.0)


def test_harm_roll_back_and_a_tracker_that_hears_something_else(on_paper):
    """The experiment's wrappers around an iteration that only records what it was given."""
    rewards, seen = torch.tensor([[1.0, 0.0]]), []
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = pipo.Run(model, None, optimizer, pipo.ImprovementTracker(2))

    def iteration(run, problems, cfg):
        run.step += 1
        seen.append((pipo.group_advantages(rewards)[0, 0].item(), cfg.lr, model.weight.item()))
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        run.tracker.push(0.0)
        return None, {"xi": next(xis)}

    cfg = pipo.Config(lr=1.0)
    xis = iter([None, None, None, 0.5, -3.0, 0.0])
    for kind in ("inverted", "tenfold"):
        run.step = 0
        on_paper.sabotaged(iteration, kind, [1])(run, [], cfg)
    assert [(advantage > 0, lr) for advantage, lr, _ in seen] == [(False, 1.0), (True, 10.0)]
    assert pipo.group_advantages(rewards)[0, 0] > 0  # nothing stays changed
    seen.clear()
    rolling = on_paper.rolling_back(iteration, -2.0)
    rows = [rolling(run, [], cfg)[1] for _ in range(4)]
    assert [row["rolled_back"] for row in rows] == [0, 0, 1, 0]
    assert seen[3][2] == seen[1][2] != seen[2][2]  # as before the step that the third iteration judged
    told = on_paper.telling(run.tracker)
    told["mu"] = 7.0
    run.tracker.push(0.0)
    assert run.tracker.history[-1] == 7.0


def test_gradient_distortion_against_monte_carlo_on_a_softmax_bandit(monkeypatch):
    """The mean GRPO gradient of a two-armed bandit over that of p. Guards against a mixed-up conditioning."""
    monkeypatch.syspath_prepend(HERE / "assets")
    from experiment import gradient_distortion
    torch.manual_seed(0)
    p, G, n = 0.1, 8, 400_000
    rewards = (torch.rand(n, G) < p).float()
    spread = rewards.std(1, correction=0, keepdim=True)
    advantages = torch.where(spread > 0, (rewards - rewards.mean(1, keepdim=True)) / spread, 0.0)
    score = rewards - p  # d log pi(arm) / d logit
    gradient, mixed = (advantages * score).mean(1), (spread > 0).squeeze(1)
    for estimate, conditional in ((gradient, False), (gradient[mixed], True)):
        eta, error = estimate.mean() / (p * (1 - p)), estimate.std() / len(estimate) ** 0.5 / (p * (1 - p))
        assert abs(eta - gradient_distortion(p, G, conditional)) < 4 * error < 0.05
    for p, conditional, value in [(0.1, True, 4.09), (0.01, True, 33.8), (0.001, True, 331),
                                  (0.5, True, 1.87), (0.1, False, 2.33), (0.01, False, 2.61)]:
        assert math.isclose(gradient_distortion(p, 8, conditional), value, rel_tol=4e-3)
    assert math.isclose(gradient_distortion(1e-9, 8), math.sqrt(7), rel_tol=1e-6)


def copied(names, imports):
    """A module that holds nothing but these definitions of pipo.py and these imports."""
    source, space = (HERE / "pipo.py").read_text(), {"__name__": "copied"}
    for name in imports:
        if name == "torch":  # with what everybody imports from it
            exec("import torch; import torch.nn.functional as F; from torch import Tensor", space)
        else:
            module, _, attribute = name.rpartition(".")
            exec(f"from {module} import {attribute}" if module else f"import {name}", space)
    for node in ast.parse(source).body:
        named = {getattr(target, "id", "") for target in [*getattr(node, "targets", []), node]}
        if (named | {getattr(node, "name", "")}) & set(names):
            decorators = [line.lineno for line in getattr(node, "decorator_list", [])]
            first = min([node.lineno, *decorators]) - 1
            exec("\n".join(source.splitlines()[first:node.end_lineno]), space)
    return space


def test_sections_can_be_copied_as_the_readme_says():
    """Guards against a helper from another section that the README does not name."""
    text, defined, used = " ".join(readme_section("Copying pieces").split()), {}, {}
    lines = Path(pipo.__file__).read_text().splitlines()
    banners = [i for i, line in enumerate(lines, 1) if line.startswith("# ---") and lines[i].startswith("# ")]
    for node in ast.parse("\n".join(lines)).body:
        section = lines[max(i for i in (0, *banners) if i < node.lineno)].split(".")[0]
        for target in (node, *getattr(node, "targets", ())):
            defined.setdefault(getattr(target, "name", getattr(target, "id", None)), section)
        loads = [x for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)]
        used.setdefault(section, set()).update(x.id for x in loads)
    for section in ("# Sampling", "# Verifying"):
        local = {"values", "joined", "Problem"}  # variables of the same name; an annotation
        others = {name for name in used[section] - local if defined.get(name, section) != section}
        assert all(f"`{name}`" in text for name in others), others


def test_pieces_can_be_copied_as_the_readme_says():
    """Guards against a helper or an import that the README's table of pieces forgot."""
    lines = readme_section("Copying pieces").splitlines()
    rows = [[re.findall(r"`([\w.]+)`", cell) for cell in line.split("|")[1:4]] for line in lines]
    rows = [row for row in rows if len(row) == 3 and row[0]]
    pieces = {piece: copied([piece] + beside, imports)[piece] for (piece, *_), beside, imports in rows}
    assert len(pieces) >= 6
    advantages = pieces["group_advantages"](torch.tensor([[1.0, 0, 0, 1]]))
    assert torch.equal(advantages, group_advantages(torch.tensor([[1.0, 0, 0, 1]])))
    assert torch.equal(pieces["improvement_rewards"](advantages, 2.0), improvement_rewards(advantages, 2.0))
    tracker = pieces["ImprovementTracker"](2)
    tracker.push(0.1), tracker.push(0.2)
    assert tracker.feedback(0.3).xi > 0
    assert pieces["policy_loss"](*random_rows())[0] == policy_loss(*random_rows())[0]
    given = tiny_model(), [[3, 4]], torch.tensor([[5, 6]]), torch.ones(1, 2)
    assert torch.equal(pieces["token_logprobs"](*given), token_logprobs(*given))
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = pieces["MasterAdamW"]([weight], "cpu", lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert (weight < 1).all()
