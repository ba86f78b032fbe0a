"""What must hold in pipo.py, in the order of its sections. Read `test_start_here` first, three iterations of
PIPO by hand; every other docstring names the bug that its test guards against. Those with `gpu` in their
names run where there is one.

    make test                                                       # all: on the CPU, offline, in a minute
    .venv/bin/python -m pytest -q test_pipo.py -k start_here        # some, by a part of their names

    Start here      three iterations on numbers that fit a napkin; real ones learn
    Settings        every number has a range and is held to it; randomness depends on its key alone
    Mathematics     by hand, against scalar loops and finite differences; xi by Monte Carlo
    Update          the plain softmax; a gradient that does not depend on how the batch is split; no bad steps
    Iteration       what both steps get under every base and setting, and when there is none to take
    Training        GRPO and PIPO written out, bit for bit; data order, evaluation
    Sampling        greedy tokens are those of transformers' generate, whatever waited or ran out of room
    Verifying       what is paid, what is not, and what hostile answers cost
    Data, models    layouts, file types, what is left out, chat templates, no dropout, rewards of one's own
    Memory          masters against plain AdamW; what fits where
    Demo            its problems, and the README's first command from nothing
    Files           a resumed run equals an unbroken one, whatever stopped it; nothing is lost by mistake
    Command line    what the user can put right is one sentence and exit code 2; --help says everything
    README          its commands, its tables, and the pieces to copy
"""

import ast
import copy
import functools
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import tokenize
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from decimal import getcontext
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import datasets
import mpmath
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma3Config, Gemma3TextConfig,
    GPT2Config, GPT2LMHeadModel, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast, Qwen3Config,
    Qwen3ForCausalLM)

import pipo
from pipo import (
    BASES, Config, ImprovementTracker, UserError, extract_answer, grade, group_advantages,
    improvement_rewards, policy_loss, sample, token_logprobs, verify)

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

    All but the sampler, which hands out answers that earn these rewards (Q, G), and `update`, which does nothing.
    """
    calls = []

    def noted(model, optimizer, batch, coefficients, objective, **how):
        calls.append(SimpleNamespace(model=model, optimizer=optimizer, batch=batch, coefficients=coefficients,
                                     objective=objective, **how))
        return {"microbatch_tokens": how["microbatch_tokens"]}

    def one_iteration(run, rewards, cfg, cut_off=()):
        texts = [rf"\boxed{{{reward}}}" for group in rewards for reward in group]  # 1 is right
        N = len(texts)
        tokens, mask = torch.full((N, 1), 3), torch.ones(N, 1)
        truncated = torch.tensor([i in cut_off for i in range(N)])
        batch = pipo.Batch([[7]] * N, tokens, mask, -mask, truncated, texts)
        monkeypatch.setattr(pipo, "sample", lambda *_, **__: batch)
        monkeypatch.setattr(pipo, "update", noted)
        monkeypatch.setattr(pipo, "trainer_logprobs", lambda model, *_: -mask if model is run.model else f"by {model}")
        calls.clear()
        _, row = pipo.iteration(run, [pipo.Problem("What is 1?", [7], ("1",), {})] * len(rewards), cfg)
        return batch, row, list(calls)

    return one_iteration


def start(cfg, *past_means):
    """A run whose window holds these mean rewards."""
    tracker = ImprovementTracker(cfg.window, cfg.lam, cfg.xi_clip)
    for mu in past_means:
        tracker.push(mu)
    return pipo.Run(SimpleNamespace(device=CPU, dtype=torch.float32), None, None, tracker,
                    microbatch_tokens=cfg.microbatch_tokens)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def readable(gold):
    """Whether the verifier can read a gold."""
    return grade(rf"\boxed{{{pipo.gold_of(gold)}}}", gold)[1] is None


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
    # Verification turns the gradient of B2 round: what was right (p = 3/4 and 1/4) is pushed down now. In the
    # AdamW that both steps share this brakes; momentum still carries the weights along the step on B2.
    verification, exploration = updates
    assert verification.batch is b2 and row["feedback"] == "negative"
    assert close(verification.coefficients, [[-0.2/3, -0.2/3, -0.2/3, 0.2], [-0.2, 0.2/3, 0.2/3, 0.2/3]])
    # Exploration learns from the second prompt alone.
    assert exploration.batch is b3
    assert close(exploration.coefficients, [[0.0, 0.0, 0.0, 0.0], [s, s, -s, -s]])


def test_real_iterations_learn_to_answer():
    """Nothing replaced: a tiny model (see Shared) samples, the verifier grades, both steps train it, and it learns."""
    # Each of its tokens is an answer to "What is 1?", and every other one is right.
    tokenizer = letter_tokenizer([rf"\boxed{{{x}}}" for k in range(2, 15) for x in (f"{k}/{k}", k)])
    model, mus, steps = tiny_model(spread=0.05), [], 0
    run = pipo.Run(model, tokenizer, torch.optim.AdamW(model.parameters()), ImprovementTracker(window=3))
    cfg = Config(window=3, group_size=8, max_new_tokens=4, temperature=1.0, lr=1e-2, pi_lr=5e-3)
    for _ in range(15):
        sampler = copy.deepcopy(model)
        batch, row = pipo.iteration(run, PROBLEMS, cfg)
        # The ratio of both steps is against the policy that sampled, before either.
        logprobs = token_logprobs(sampler, batch.prompts, batch.tokens, batch.mask)
        assert (logprobs - batch.behavior_logprobs).abs().max() < 1e-4
        assert batch.rewards.flatten().tolist() == [verify(text, "1") for text in batch.texts]
        # One AdamW takes both steps, each with its own rate; without a verification step there is one.
        steps += 1 + bool(row["coefficient"]) - row["skipped_steps"]
        assert next(iter(run.optimizer.state.values()))["step"] == steps
        assert row["lr"] == 1e-2 and row.get("pi_lr") == (5e-3 if row["coefficient"] else None)
        assert (row["prompt_tokens"], row["tokens"]) == (12 * 8, batch.mask.sum())
        mus.append(row["mu"])
    assert steps > 20 and mus[0] < 0.6 and statistics.mean(mus[-3:]) > 0.75


# ------------------------------------------------------------------------------------------------------------
# Shared. A tiny model, and runs of the training loop in which rewards vary.
# ------------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = [[3, 4, 5], [7], [8, 9, 10, 11, 12, 13], [2, 2]]
PROBLEMS = [pipo.Problem("What is 1?", prompt, ("1",), {}) for prompt in PROMPTS]


def tiny_model(seed=0, spread=0.3, **changes):
    """A random Qwen3 with three EOS ids among 28 tokens, so that its completions end at different lengths."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=spread, pad_token_id=0, eos_token_id=[1, 5, 9], **changes)).eval()


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
    return torch.load(out / pipo.CHECKPOINT)


def without_times(rows):
    return [{name: value for name, value in row.items() if not name.startswith(("seconds_", "memory_"))}
            for row in rows]


def own_process(*arguments):
    """Arguments of subprocess: `python ...`, offline, on one thread: another number rounds otherwise."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # as in this process
    return dict(args=[sys.executable, *map(str, arguments)], cwd=HERE, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ------------------------------------------------------------------------------------------------------------
# Settings. Every number has a range and is held to it, and randomness depends on its key alone.
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [f for f in fields(Config) if f.name != "seed" and (
    f.metadata["choices"] or get_type_hints(Config)[f.name] in (int, float))], ids=lambda f: f.name)
def test_every_setting_is_held_to_its_range_or_choices(f, monkeypatch):
    """A setting out of its range, or nan, must be named at once, not fail (or train) an hour later."""
    monkeypatch.setattr(pipo, "find_spec", lambda _: True)  # as if every package were there
    cfg = Config(model="any", dataset="any", eval_dataset=["any"], device="cpu")
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    for value in ["other"] if choices else [low - 1, low - 1e-9, high + 1, math.nan, math.inf, -math.inf]:
        must = f"{pipo.flag(f.name)} is {value!r}: it must be {choices or f'from {low:g} to {high:g}'}"
        with pytest.raises(UserError, match=f"^{re.escape(must)}$"):
            pipo.settled(replace(cfg, **{f.name: value}))
    for value in choices or (low, high, f.default):
        if value not in ("cuda", math.inf, -math.inf):
            pipo.settled(replace(cfg, **{f.name: value}))


def test_a_generator_depends_on_its_key_alone():
    """Guards against draws that change with what was drawn before, or that two purposes or steps share."""
    def draw(key):
        return tuple(torch.rand(4, generator=pipo.rng("cpu", *key)).tolist())

    keys = [(seed, what, step) for seed in (0, 1) for what in ("sample", "order") for step in (1, 2, 11)]
    first = [draw(key) for key in keys]
    assert [draw(key) for key in reversed(keys)] == first[::-1] and len(set(first)) == len(keys)


# ------------------------------------------------------------------------------------------------------------
# The mathematics. By hand, against slow obvious versions, by finite differences and by Monte Carlo.
# ------------------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    """[1, 0, 0, 1]: mean 0.5, sample std 0.5774. Guards against ddof 0, and noise where rewards are equal."""
    advantages, s = group_advantages(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [0.1] * 4])), 0.5 * 3**0.5
    assert close(advantages[:2], [[s, -s, -s, s], [-0.5, -0.5, -0.5, 1.5]]) and (advantages[2] == 0).all()
    without_std = group_advantages(torch.tensor([[1.0, 0, 0, 0]]), normalize_std=False)
    assert torch.equal(without_std, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))
    for bad in (torch.ones(3, 1), torch.tensor([[1.0, math.nan]])):  # one sample a group; no number
        with pytest.raises(ValueError):
            group_advantages(bad)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_attribution_identities(normalize_std):
    """a_i = 1/(2p) on right answers, -1/(2(1-p)) on wrong ones, mean size 1, however A is made; else 0."""
    for right in range(9):  # of 8
        advantages = group_advantages(torch.tensor([[1.0] * right + [0.0] * (8 - right)]), normalize_std)
        a, p = [0.0] * 8, right / 8
        if 0 < p < 1:
            a = [1 / (2 * p)] * right + [-1 / (2 * (1 - p))] * (8 - right)
        assert close(improvement_rewards(advantages, 1.0), [a])
        assert close(improvement_rewards(advantages, -0.3), [[-0.3 * x for x in a]])


def test_tracker_by_hand():
    """Guards against ddof 0, a window with the present in it (xi could not reach 3), and a xi where sigma is 0."""
    tracker, cut = ImprovementTracker(window=3, lam=0.1), ImprovementTracker(window=2, lam=0.5, xi_clip=2.0)
    for mu in (0.1, 0.2, 0.3):
        assert tracker.feedback(mu) is None
        tracker.push(mu)
        cut.push(mu)
    for _ in range(3):  # mean 0.2, sample std 0.1; reading changes nothing; xi, phi, mu_his, sigma_his
        assert [round(x, 9) for x in tracker.feedback(0.5)] == [3.0, 3.0, 0.2, 0.1]
    assert [round(x, 9) for x in tracker.feedback(0.1)] == [-1.0, -0.1, 0.2, 0.1]
    assert cut.feedback(0.9)[:2] == (2.0, 2.0) and cut.feedback(0.0)[:2] == (-2.0, -1.0)
    tracker.push(0.5)  # the oldest leaves: [0.2, 0.3, 0.5]
    assert math.isclose(tracker.feedback(0.4).mu_his, 1 / 3)
    for _ in range(3):
        tracker.push(0.1)  # where rounding would leave a sigma of 1e-17
    assert tracker.feedback(0.9) is None


def test_phi_on_a_plateau():
    """There E[phi_0.1] is +0.43, not 0 (hence the constant of 0.43), by Monte Carlo."""
    noise, phis = random.Random(0), []
    for _ in range(2000):
        tracker = ImprovementTracker(window=8, lam=0.1)
        tracker.history.extend(noise.gauss(0, 1) for _ in range(8))
        phis.append(tracker.feedback(noise.gauss(0, 1)).phi)
    assert abs(statistics.mean(phis) - 0.43) < 0.05


def random_rows():
    """6 rows of up to 5 tokens: log-probabilities, the behavior policy's, advantages and mask."""
    g, lengths = torch.Generator().manual_seed(0), [1, 5, 3, 2, 5, 4]
    logprobs = (-torch.rand(6, 5, generator=g, dtype=torch.float64) * 2).requires_grad_()
    behavior = logprobs.detach() + 0.4 * torch.randn(6, 5, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1.0] * n + [0.0] * (5 - n) for n in lengths], dtype=torch.float64)
    return logprobs, behavior, torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5], dtype=torch.float64), mask


def loss_by_hand(logprobs, behavior, advantages, mask, reference, base, kl_coef, max_new_tokens):
    """The table of the four objectives, written as loops over Python floats."""
    low, high = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}[base]
    sequences = []
    for lp, old, A, m, ref in zip(*(x.tolist() for x in (logprobs, behavior, advantages, mask, reference))):
        n = int(sum(m))
        ratios = [math.exp(lp[t] - old[t]) for t in range(n)]
        if base == "gspo":
            ratios = [math.exp(sum(lp[t] - old[t] for t in range(n)) / n)] * n
        kls = [math.exp(ref[t] - lp[t]) - (ref[t] - lp[t]) - 1 for t in range(n)]  # k3
        sequences.append([-min(r * A, min(max(r, 1 - low), 1 + high) * A) + kl_coef * kl
                          for r, kl in zip(ratios, kls)])
    tokens = [x for sequence in sequences for x in sequence]
    if base in ("grpo", "gspo"):
        return sum(sum(s) / len(s) for s in sequences) / len(sequences)
    return sum(tokens) / (len(tokens) if base == "dapo" else len(sequences) * max_new_tokens)


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
@pytest.mark.parametrize("base", BASES)
def test_loss_against_scalar_loops_and_finite_differences(base, kl_coef):
    """Guards against a wrong average, ratio, KL, gradient, and a denominator that is a part's own: parts add up.

    The released code takes min(ratio, clip(ratio)) * r: for r < 0 that goes on pushing down what is down.
    """
    rows, objective = random_rows(), BASES[base]._replace(max_new_tokens=9, kl_coef=kl_coef)
    reference, parts = rows[1].flip(0), []
    loss, metrics = policy_loss(*rows, objective, reference)
    assert math.isclose(loss.item(), loss_by_hand(*rows, reference, base, kl_coef, 9), rel_tol=1e-12)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, *rows[1:], objective, reference)[0], rows[0])
    assert 0 < metrics["clip_fraction"] < 1 and metrics["kl"] > 0
    for i in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part, _ = policy_loss(*(x[i] for x in rows), objective, reference[i], 6, rows[3].sum())
        parts.append(part.item())
    assert math.isclose(sum(parts), loss.item(), rel_tol=1e-12)
    with pytest.raises(ValueError):  # (Q, G) advantages would broadcast into nonsense
        policy_loss(rows[0], rows[1], rows[2].view(2, 3), rows[3], objective)


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


class Recorder(torch.optim.SGD):
    """An optimizer that only looks at gradients."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.seen = []

    def step(self):
        self.seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))


def gradients_of(model, batch, coefficients, objective, **options):
    """The metrics of an update, and the gradient of each of its steps."""
    recorder = Recorder(model)
    options = dict(lr=0.0, max_grad_norm=1e9) | options
    return pipo.update(model, recorder, batch, coefficients, objective, **options), recorder.seen


def moved(model):
    """A copy whose weights are a little elsewhere, so that ratios are not 1."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_splitting_the_batch_does_not_change_the_gradient(model, tokenizer, base, kl_coef):
    """Guards against a denominator per micro-batch, or without dropped rows, or beyond the minibatch."""
    batch, model = batch_of(model, tokenizer), moved(model)
    objective = BASES[base]._replace(max_new_tokens=16, kl_coef=kl_coef)
    if kl_coef:
        reference = tiny_model(seed=3)
        batch.ref_logprobs = token_logprobs(reference, batch.prompts, batch.tokens, batch.mask).detach()
    for n in (16, 8):  # rows of a minibatch; the oracle is one padded pass over all of them
        losses, plain = [], []
        for rows in (slice(i, i + n) for i in range(0, 16, n)):
            logprobs = token_logprobs(model, batch.prompts[rows], batch.tokens[rows], batch.mask[rows])
            loss, _ = policy_loss(logprobs, batch.behavior_logprobs[rows], batch.advantages.flatten()[rows],
                                  batch.mask[rows], objective, batch.ref_logprobs[rows] if kl_coef else None)
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            plain.append(torch.cat([gradient.flatten() for gradient in gradients]))
        for budget in (1, 60, 10**9):
            metrics, seen = gradients_of(model, batch, batch.advantages, objective, minibatches=16 // n,
                                         microbatch_tokens=budget)
            for ours, oracle in zip(seen, plain, strict=True):
                assert torch.allclose(ours, oracle, atol=1e-5 * oracle.abs().max()) and oracle.abs().max() > 0
            assert math.isclose(metrics["loss"], statistics.mean(losses), rel_tol=1e-3, abs_tol=1e-6)
            assert math.isclose(metrics["grad_norm"], max(oracle.norm() for oracle in plain), rel_tol=1e-4)


def test_microbatches_cover_every_row_once_within_budget():
    """Guards against a row lost or trained twice, and a budget that counts tokens without their padding."""
    lengths, rows = torch.tensor([5, 50, 7, 7, 31, 2, 90, 12]), [0, 1, 3, 4, 6, 7]
    parts = pipo.microbatches(torch.tensor(rows), lengths, 64)
    assert sorted(i for part in parts for i in part.tolist()) == rows
    assert all(len(part) == 1 or len(part) * lengths[part].max() <= 64 for part in parts)


def test_where_memory_runs_out_passes_get_smaller(model, tokenizer, graded_by_coin, monkeypatch):
    """With the same gradient: no row counts twice or not at all. Later steps remember, or each would run out anew."""
    batch, model, sizes, plain = batch_of(model, tokenizer), moved(model), [], pipo.policy_loss
    options = dict(minibatches=2, microbatch_tokens=60)

    def with_room_for(tokens):
        def loss(logprobs, *others):
            sizes.append(logprobs.numel())
            if logprobs.numel() > tokens:
                raise torch.OutOfMemoryError
            return plain(logprobs, *others)

        monkeypatch.setattr(pipo, "policy_loss", loss)
        return gradients_of(model, batch, batch.advantages, BASES["dapo"], **options)

    (_, whole), (metrics, split) = with_room_for(999), with_room_for(30)
    assert sizes[0] <= 30 < max(sizes) and metrics["microbatch_tokens"] < 60  # what was done is done again
    for a, b in zip(whole, split, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * a.abs().max()) and a.abs().max() > 0
    run = pipo.Run(model, tokenizer, Recorder(model), ImprovementTracker(2))
    for step in (1, 2):
        sizes.clear()
        _, row = pipo.iteration(run, PROBLEMS, Config(lr=0.0, max_new_tokens=8))
        assert (max(sizes) > 30) == (step == 1) and row["microbatch_tokens"] == run.microbatch_tokens
    with pytest.raises(torch.OutOfMemoryError):  # where not even one row fits, there is no going on
        with_room_for(0)


def test_no_step_without_signal(tokenizer):
    """AdamW moves weights on momentum and decay even when the gradient is zero: no signal, no step at all."""
    model = tiny_model()
    batch = batch_of(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pipo.update(model, optimizer, batch, batch.advantages, BASES["grpo"], 1e-2)  # momentum to move on
    before = weights(model)
    metrics = pipo.update(model, optimizer, batch, torch.zeros_like(batch.advantages), BASES["grpo"], 1e-2)
    assert torch.equal(weights(model), before) and metrics["skipped_steps"] == 1 and metrics["ratio"] is None


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
# One iteration. What both steps are given under every base and setting, and when one is not taken.
# ------------------------------------------------------------------------------------------------------------

HALF_AND_HALF, ALL_WRONG = [[1, 1, 0, 0]], [[0, 0, 0, 0]]


@pytest.mark.parametrize("base", BASES)
def test_both_steps_get_the_objective_and_the_settings(iterate, base, monkeypatch):
    """Guards against another base's advantages (Dr. GRPO's have no std), and a setting lost or of the other step."""
    cfg = Config(base=base, window=2, kl_coef=0.01, lr=1e-3, pi_lr=5e-4, temperature=0.9,
                 minibatches=2, microbatch_tokens=77, max_grad_norm=3.0, max_new_tokens=9, epochs=2)
    run = start(cfg, 0)
    run.optimizer = object()
    run.reference = "the start"
    b1, *_ = iterate(run, [[1, 0, 0, 0], [1, 1, 1, 1]], cfg)
    b2, row, (verification, *exploration) = iterate(run, [[1, 1, 1, 0], [0, 0, 0, 0]], cfg)
    size = 1.0 if base == "dr_grpo" else 0.5  # of the std that is divided by
    assert close(b2.advantages, [[*[0.25 / size] * 3, -0.75 / size], [0.0] * 4])
    phi = 2**0.5 / 10  # of 3/8 against the window 0, 5/8; the attribution is the same whatever the base
    assert close(verification.coefficients, [[2 * phi, *[-2/3 * phi] * 3], [0.0] * 4])
    assert verification.batch is b1 and verification.lr == 5e-4 and verification.objective.kl_coef == 0
    assert len(exploration) == 2 and b2.ref_logprobs == "by the start"
    for step in exploration:
        assert step.batch is b2 and step.coefficients is b2.advantages
        assert step.lr == 1e-3 and step.objective.kl_coef == 0.01
    for step in (verification, *exploration):
        assert step.model is run.model and step.optimizer is run.optimizer
        assert step.objective._replace(kl_coef=0) == BASES[base]._replace(max_new_tokens=9)
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


def test_gspo_in_bfloat16_takes_its_ratio_against_the_trainers_own_logprobs(tokenizer):
    """There sampler and trainer differ by more than GSPO's clip: noise alone clips, before any update."""
    clipped = {}
    for base in ("grpo", "gspo"):
        model, cfg = tiny_model().to(torch.bfloat16), Config(base=base, max_new_tokens=24)
        batch = pipo.rollout(pipo.Run(model, tokenizer, None, None, step=2), PROBLEMS, cfg)
        coefficients = torch.tensor([[1.0, -1.0] * 4] * 4)
        clipped[base] = pipo.update(model, Recorder(model), batch, coefficients, BASES["gspo"], 0.0, 0.7)
    assert clipped["grpo"]["clip_fraction"] > 0.1 and clipped["grpo"]["logprob_gap"] > 1e-4
    assert clipped["gspo"]["clip_fraction"] == clipped["gspo"]["logprob_gap"] == 0


# ------------------------------------------------------------------------------------------------------------
# Training. The loop as a whole, against GRPO and PIPO written out; data order and evaluation.
# ------------------------------------------------------------------------------------------------------------


def step_by_hand(model, optimizer, batch, coefficients, lr):
    """One GRPO step: one pass over all rows that have a coefficient, shortest first; the clip is 0.2."""
    lengths = torch.tensor([len(p) for p in batch.prompts]) + batch.mask.sum(1)
    order = (coefficients.flatten() != 0).nonzero().squeeze(1)
    order = order[lengths[order].argsort(stable=True)]
    width = int(batch.mask[order].sum(1).max())
    A, mask = coefficients.flatten()[order, None], batch.mask[order, :width]
    logprobs = token_logprobs(model, [batch.prompts[i] for i in order], batch.tokens[order, :width], mask)
    ratio = (logprobs - batch.behavior_logprobs[order, :width]).exp()
    surrogate = -torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
    ((surrogate * mask / mask.sum(1, keepdim=True)).sum() / 16).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("feedback, epochs", [("none", 1), ("pipo", 2), ("constant", 1)])
def test_runs_are_plain_grpo_or_pipo_bit_for_bit(folder, tmp_path, graded_by_coin, feedback, epochs):
    """Guards against a verification step in GRPO, or too early, on another batch, of another size, rate or ratio."""
    cfg = settings(folder, tmp_path / "run", feedback=feedback, epochs=epochs, steps=7, window=3, pi_lr=5e-4)
    rows = pipo.train(cfg)
    model, tokenizer = pipo.load_model(cfg.model, CPU), AutoTokenizer.from_pretrained(cfg.model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=cfg.weight_decay, fused=True)
    problems = pipo.read_problems(pipo.load_rows(cfg.dataset, "train"), tokenizer, cfg, "")
    mus, coefficients, previous = [], [], None
    for step in range(1, 8):
        prompts = [problem.prompt for problem in pipo.pick_problems(problems, step, cfg)]
        batch = sample(model, tokenizer, prompts, 4, 8, generator=pipo.rng("cpu", cfg.seed, "sample", step))
        rewards = torch.tensor([coin(text, "")[0] for text in batch.texts]).view(4, 4)
        A, mu, used = group_advantages(rewards), rewards.double().mean().item(), 0.0
        if feedback != "none" and step > 3:
            xi = (mu - statistics.mean(mus[-3:])) / statistics.stdev(mus[-3:])
            used = 0.43 if feedback == "constant" else xi if xi >= 0 else 0.1 * xi
        if used:
            rewards = (previous[1] * 4 * used / previous[1].abs().sum(1, keepdim=True)).nan_to_num()
            step_by_hand(model, optimizer, previous[0], rewards, 5e-4)
        for _ in range(epochs):
            step_by_hand(model, optimizer, batch, A, 1e-3)
        mus, coefficients, previous = mus + [mu], coefficients + [used], (batch, A)
    assert torch.equal(weights(model), weights(tmp_path / "run" / "model"))
    assert [row["mu"] for row in rows] == mus and [row["coefficient"] for row in rows] == coefficients
    assert [row["feedback"] for row in rows[:3]] == ["off" if feedback == "none" else "warmup"] * 3
    assert [row["xi"] is None for row in rows] == [True] * 3 + [False] * 4  # a control logs it, too


def test_the_kl_is_to_the_start_and_training_needs_no_signals(folder, tmp_path, graded_by_coin):
    """Guards against a reference that is trained along: the KL would stay 0. In a thread no signal is caught."""
    with ThreadPoolExecutor() as threads:
        rows = threads.submit(pipo.train, settings(folder, tmp_path / "run", steps=3, kl_coef=0.1)).result()
    assert abs(rows[0]["kl"]) < 1e-8 < 1e-6 < rows[1]["kl"] < rows[2]["kl"]


@pytest.mark.parametrize("Q, n", [(5, 10), (3, 7), (10, 10), (25, 10), (3, 2)])
def test_every_epoch_shows_every_problem_once(Q, n):
    """Guards against problems lost or doubled where an epoch ends in the middle of a step, and a lasting order."""
    problems, cfg = list(range(n)), Config(prompts_per_step=Q)
    steps = [pipo.pick_problems(problems, step, cfg) for step in range(1, 4 * n + 1)]
    assert all(len(step) == Q for step in steps)
    shown = sum(steps, [])
    epochs = [shown[i:i + n] for i in range(0, len(shown), n)]
    assert all(sorted(epoch) == problems for epoch in epochs) and len(epochs) == 4 * Q
    assert len(set(map(tuple, epochs))) > 1 and pipo.pick_problems(problems, 3, cfg) == steps[2]
    assert steps != [pipo.pick_problems(problems, step, replace(cfg, seed=1)) for step in range(1, 4 * n + 1)]


def test_evaluation_is_the_mean_grade_with_its_standard_error(model, tokenizer, graded_by_coin, monkeypatch):
    """Guards against sampling that is not training's, and more rows at a time, whose probabilities would not fit."""
    cfg = Config(max_new_tokens=16, temperature=0.8, top_p=0.9, prompts_per_step=3, group_size=2)
    waves, plain = [], pipo.carry_on
    monkeypatch.setattr(pipo, "carry_on", lambda model, wave, *others: (
        waves.append(len(wave)), plain(model, wave, *others)))
    batch = sample(model, tokenizer, PROMPTS * 8, 1, 16, 0.8, 0.9, pipo.rng("cpu", 3))
    p = statistics.mean(coin(text, "")[0] for text in batch.texts)
    for few, rows in ((28 * 8, 8), (28, 6), (28 * 100, 32)):  # probabilities of 28 tokens; Q * G is 6
        waves.clear()
        monkeypatch.setattr(pipo, "FEW_PROBABILITIES", few)
        run = pipo.Run(model, tokenizer, None, None)
        scores = pipo.evaluate(run, {"set": PROBLEMS * 8}, cfg, pipo.rng("cpu", 3))
        assert max(waves) == rows
    assert scores["eval_pass@1"] == pytest.approx(p) and 0 < p < 1
    assert scores["eval_stderr"] == pytest.approx((p * (1 - p) / 32) ** 0.5)


def test_every_evaluation_draws_the_same_random_numbers(folder, tmp_path, graded_by_coin):
    """A policy that has not changed had another score each time, which looked like progress."""
    cfg = settings(folder, tmp_path, lr=1e-12, weight_decay=0.0, eval_every=1, steps=3,
                   eval_dataset=[str(folder / "train.jsonl")])
    assert len({row["eval_pass@1"] for row in pipo.train(cfg)}) == 1


# ------------------------------------------------------------------------------------------------------------
# Sampling. What makes it fast (groups that share a cache, rows that are dropped or wait) changes no token.
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "sliding windows", pytest.param("gpu", marks=on_gpu)])
def test_greedy_sampling_equals_generate(kind, tokenizer):
    """Guards against errors of cache, positions, padding and attention, or a mask that sees past a window.

    Chance cannot pass it: prompts differ in length, and rows end at different lengths, by EOS or by the limit.
    """
    window = dict(use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 2)
    plain = tiny_model(**window if kind == "sliding windows" else {}).to("cuda" if kind == "gpu" else "cpu")
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("shared_heads")
    prompts = [[random.Random(i).randrange(2, 28) for _ in range(1 + i % 7)] for i in range(16)]
    batch = sample(ours, tokenizer, prompts, 1, 24, temperature=0)
    assert len(set(batch.mask.sum(1).tolist())) > 3 and batch.truncated.any() and not batch.truncated.all()
    for prompt, tokens, mask in zip(prompts, batch.tokens, batch.mask):
        ids = torch.tensor([prompt], device=plain.device)
        theirs = plain.generate(ids, do_sample=False, max_new_tokens=24)[0]
        assert tokens[mask == 1].tolist() == theirs[len(prompt):].tolist()


@pytest.mark.parametrize("temperature, top_p, room", [(1.0, 1.0, 10**6), (0.7, 1.0, 100), (1.3, 0.8, 100)])
def test_sampler_logprobs_are_the_training_logprobs(model, tokenizer, temperature, top_p, room):
    """Guards against a temperature, or top-p, on one side only, hidden state, and one draw for a whole group."""
    batch, again, other = (sample(model, tokenizer, PROMPTS, 8, 16, temperature, top_p, pipo.rng("cpu", seed), room)
                           for seed in (1, 1, 2))
    logprobs = token_logprobs(model, batch.prompts, batch.tokens, batch.mask, temperature, chunk=5)
    assert (logprobs - batch.behavior_logprobs).abs().max() < 1e-4
    assert batch.mask.sum(1).unique().numel() > 3 and (batch.behavior_logprobs[batch.mask == 1] < 0).all()
    assert torch.equal(batch.tokens, again.tokens) and batch.texts != other.texts
    assert max(group.unique().numel() for group in batch.tokens[:, 0].split(8)) > 2


def test_only_ends_padding_and_bos_are_left_out_of_the_text(model):
    """Where <answer> or </think> is a special token it went with the others: a right answer was not found."""
    words = ["<pad>", "<eos>", "<think>", "</think>", "<answer>", "d", "<tool_call>", *LETTERS[5:]]
    tokenizer = letter_tokenizer(words[2:])
    tokenizer.add_tokens([word for word in words if word[0] == "<"], special_tokens=True)
    tokenizer.bos_token = words[27]
    batch = sample(model, tokenizer, PROMPTS, 32, 16, generator=pipo.rng("cpu", 0))
    assert {*batch.tokens[batch.mask == 1].tolist()} == {*range(28)} and tokenizer.decode([4], True) == ""
    for text, tokens, mask in zip(batch.texts, batch.tokens, batch.mask):
        shown = [token for token in tokens[mask == 1].tolist() if token not in (0, 1, 5, 9, 27)]
        assert text == "".join(words[token] for token in shown)


def test_a_thought_that_the_prompt_opens_and_nobody_ends_is_no_answer():
    """`so 5? wait` was paid for 5."""
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
    opened, = pipo.read_problems([{"problem": "a", "answer": "5"}], tokenizer, Config(instruction=""), "rows")
    batch = SimpleNamespace(texts=[r"so \boxed{5}? wait", r"so</think>\boxed{5}"], tokens=torch.zeros(1))
    assert opened.thinking and pipo.grade_all(batch, [opened])[0].tolist() == [[0.0, 1.0]]


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


def forward_fails(monkeypatch, model, when):
    """A pass of the model runs out of memory where when(passes); passes: (rows, tokens in the cache) of all."""
    plain, passes = type(model).forward.__get__(model), []

    @functools.wraps(plain)
    def forward(ids, **options):
        passes.append((len(ids), len(ids) * options["attention_mask"].shape[-1]))
        if when(passes):
            raise torch.OutOfMemoryError
        return plain(ids, **options)

    monkeypatch.setattr(model, "forward", forward)
    return passes


@pytest.mark.parametrize("options", [dict(cache_tokens=100), dict(rows_a_wave=5), {}], ids=str)
def test_rows_that_had_to_wait_go_on_as_if_they_had_not(model, tokenizer, monkeypatch, options):
    """Little room, few rows a wave, out of memory: no token is lost, drawn twice or put in the wrong place."""
    whole = sample(model, tokenizer, PROMPTS, 4, 24, temperature=0)
    passes = forward_fails(monkeypatch, model, lambda passes: not options and passes[-1][1] > 100)
    cut = sample(model, tokenizer, PROMPTS, 4, 24, temperature=0, prefill_tokens=30, **options)
    assert torch.equal(whole.tokens, cut.tokens) and torch.equal(whole.mask, cut.mask)
    assert (whole.behavior_logprobs - cut.behavior_logprobs).abs().max() < 1e-5
    assert max(passes[10:])[0] < 16 and max(passes)[0] <= options.get("rows_a_wave", 16)
    assert cut.cache_tokens == options.get("cache_tokens", sys.maxsize) if options else cut.cache_tokens <= 100


def test_running_out_of_memory_is_tried_again_before_the_room_shrinks(model, tokenizer, monkeypatch):
    """One fragmented allocation left room for a row at a time for good; what runs out again is not asked for again."""
    forward_fails(monkeypatch, model, lambda passes: len(passes) == 3)
    batch = sample(model, tokenizer, PROMPTS, 4, 24, temperature=0, cache_tokens=10_000)
    assert batch.out_of_memory == 1 and batch.cache_tokens == 10_000
    run = pipo.Run(model, tokenizer, None, None, step=2, cache_tokens=10_000)
    for limit in (100, 10_000):
        forward_fails(monkeypatch, model, lambda passes: passes[-1][1] > limit)
        batch = pipo.rollout(run, PROBLEMS, Config(group_size=4, max_new_tokens=24))
        assert (batch.out_of_memory > 1) == (limit == 100) and run.cache_tokens == batch.cache_tokens <= 100
    forward_fails(monkeypatch, model, lambda passes: True)
    with pytest.raises(torch.OutOfMemoryError):  # where not even one row fits, there is no going on
        sample(model, tokenizer, PROMPTS, 4, 24)


def test_the_cache_is_written_in_place(model):
    """A copy of it for every token would take most of the time of sampling."""
    caches, logits, seen, rows = pipo.prefill(model, [(3, 4), (5, 6, 7)], 99)
    cache = pipo.move_rows(caches, rows, room=5)
    storage = cache.layers[0].all_keys.data_ptr()
    pipo.decode_chunk(model, cache, seen, None, logits, 5, pipo.draw)
    assert cache.get_seq_length() == 7 and cache.layers[0].all_keys.data_ptr() == storage




def test_pass_at_k_is_unbiased(model, tokenizer, monkeypatch):
    """By hand: 2 of 4 right gives pass@2 = 1 - C(2,2)/C(4,2) = 5/6. The standard error is over problems."""
    rewards, run = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]]), pipo.Run(model, tokenizer, None, None)
    monkeypatch.setattr(pipo, "grade_all", lambda *_: (rewards, {}))
    scores = pipo.evaluate(run, {"set": PROBLEMS[:2]}, Config(eval_samples=4, max_new_tokens=4), pipo.rng("cpu", 0))
    assert (scores["eval/set/pass@1"], scores["eval_pass@1"], scores["eval/set/pass@4"]) == (0.25, 0.25, 0.5)
    assert scores["eval/set/pass@2"] == pytest.approx(5 / 12)
    assert scores["eval/set/stderr"] == pytest.approx(0.25 / math.sqrt(2))


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
    if "|" in a2:
        return a, a2
    return rng.choice([
        (f"({a})+({b})", f"({b2})+({a2})"), (f"({a})-({b})", f"-({b2})+({a2})"),
        (f"({a})({b})", rf"({b2}) \cdot ({a2})"), (f"({a})^2", f"({a2})({a2})"),
        (rf"\frac{{{a}}}{{({b})^2+1}}", rf"({a2})/(1+({b2})({b2}))"),
        (rf"\sin({a})", rf"-\sin(-({a2}))"), (rf"\sqrt{{({a})^2}}", rf"\left|{a2}\right|")])


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
# Data and models. Every layout that the README names, what is left out (and said so), no dropout, own rewards.
# ------------------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "q"}]


def read(rows, tokenizer, name="rows", own_reward=False, held_out=False, **settings):
    """Problems from a list of rows, read as a dataset would be: with no instruction, unless given."""
    rows = Dataset.from_list(rows) if rows and isinstance(rows, list) else rows
    cfg = Config(**{"instruction": "", **settings})
    return pipo.read_problems(rows, tokenizer, cfg, name, own_reward=own_reward, held_out=held_out)


def sentence_of(call, *args, **options):
    """The one sentence with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(folder, out, sentence, **changes):
    """train raises UserError, and this is in its one sentence."""
    said = sentence_of(pipo.train, settings(folder, out, **changes))
    assert sentence in said, said


def in_folder(model, folder, tokenizer=None):
    """A model folder as a user would have it."""
    model.save_pretrained(folder)
    (tokenizer or letter_tokenizer()).save_pretrained(folder)
    return folder


LAYOUTS = [
    {"prompt": USER, "reward_model": {"ground_truth": "5", "style": "rule"}},  # verl
    {"prompt": USER, "reward_model": '{"ground_truth": "[\\"5\\"]"}'},  # Skywork-OR1
    {"messages": USER, "answer": "5"},
    {"prompt": "q", "ground_truth": 5},
    {"problem": "q", "answer": "5", "solution": "\\boxed{6}"},
    {"problem": "q", "solution": "first \\boxed{4}, then \\boxed{5}"},  # MATH
    {"question": "q", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},  # GSM8K
    {"question": "q", "final_answer": ["5"], "solution": ["so it is 6."]},  # OlympiadBench
    {"ID": "x", "Problem": "q", "Solution": "so \\boxed{6}", "Answer": 5},  # Maxwell-Jia/AIME_2024
]


def test_layouts(tokenizer):
    """A column that is not recognised; the gold of another column; an instruction behind messages."""
    for row in LAYOUTS:
        problem, = read([row], tokenizer, instruction=" box")
        asked = "q box" if "q" in row.values() else "q"
        assert (problem.text, problem.golds, problem.prompt) == ("q", ("5",), tokenizer(asked).input_ids), row


def test_file_types(tmp_path, monkeypatch):
    """A file type read as something else; br[1].jsonl read as br1.jsonl; ~ is no folder of that name."""
    rows = Dataset.from_list([{"problem": "q", "answer": "5"}] * 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, write in {
            "br1.jsonl": lambda path: path.write_text("other"), "br[1].jsonl": rows.to_json,
            "br[1]/rows.jsonl": lambda path: (path.parent.mkdir(), rows.to_json(path)),
            "rows.json": lambda path: path.write_text(json.dumps(rows.to_list())), "rows.csv": rows.to_csv,
            "rows.tsv": functools.partial(rows.to_csv, sep="\t"), "rows.parquet": rows.to_parquet,
            "folder": lambda path: (path.mkdir(), rows.to_parquet(path / "train.parquet")),
            "disk[1]": rows.save_to_disk, "disks": DatasetDict(test=rows, train=rows).save_to_disk}.items():
        write(tmp_path / name)
        if name != "br1.jsonl":
            found = pipo.load_rows(f"~/{name}", "train")
            assert [(row["problem"], str(row["answer"])) for row in found] == [("q", "5")] * 2, name


GOLDS = [
    ('["\\\\frac{1}{2}"]', ["\\frac{1}{2}"]), ('["1","2"]', ["1", "2"]),  # JSON
    ("[1, 2]", ["[1, 2]"]), ("[1, 2)", ["[1, 2)"]), ('{"a", "b"}', ['{"a", "b"}']), ("{1, 2}", ["{1, 2}"]),  # not
    ("1, 2", ["1, 2"]),  # one answer of two parts
    ("[" * 100_000 + '"', ["[" * 100_000 + '"']), ('["a",' * 100_000, ['["a",' * 100_000]),
    ('{"ground_truth": "5", "style": "rule"}', ["5"]), ({"ground_truth": ["5", "\\boxed{6}"]}, ["5", "6"]),
    ({"ground_truth": {"target": 24, "numbers": [1, 2]}}, []), ('{"target": 24}', []),  # Countdown
    (["1", None, ["2", 3.0]], ["1", "2", "3"]), ([], []), ("[]", []), (None, []), (float("nan"), []), ("NaN", []),
    (27.0, ["27"]), (0, ["0"]), (2.5, ["2.5"]), (float("inf"), ["inf"]), ("proof", []), ("notfound", []),
    ("  ", []), ("\\boxed{}", []), ("None of these", ["None of these"]), ("so\n#### 1,234", ["1,234"]),
    (" 5 ", ["5"]),
]


def test_golds(tokenizer, capsys):
    """A gold that no completion can equal: "27.0", "None", the JSON of a list, a dictionary, a page of prose."""
    for cell, golds in GOLDS:
        assert pipo.read_golds(cell) == golds, str(cell)[:99]
    # a solution column is worked out, or bare, as a whole
    rows = [{"problem": letter, "solution": text} for letter, text in zip("abc", ("5", "x + 1", "\\frac12"))]
    assert [p.golds[0] for p in read(rows, tokenizer)] == ["5", "x + 1", "\\frac12"]
    rows.append({"problem": "ab", "solution": "so \\boxed{7}"})
    assert [p.golds[0] for p in read(rows, tokenizer)] == ["7"]
    assert "3 without an answer" in capsys.readouterr().out
    rows = [{"problem": "ab", "answer": answer, "solution": "so \\boxed{5}"} for answer in ("", None, "proof", "6")]
    assert [p.golds for p in read(rows, tokenizer)] == [("5",), ("5",), ("5",), ("6",)]
    batch = SimpleNamespace(texts=[r"\boxed{0.5}", r"\boxed{3}", "none"], tokens=torch.zeros(1))  # any gold counts
    assert pipo.grade_all(batch, [pipo.Problem("", [3], ("1/2", "x=3"), {})])[0].tolist() == [[1, 1, 0]]


def test_columns(tokenizer):
    """A name that is not there was passed over."""
    rows = [{"query": "ab", "response": "so \\boxed{5}", "problem": "x", "answer": "6"}]
    assert [(p.text, p.golds) for p in read(rows, tokenizer, columns="query, response")] == [("ab", ("5",))]
    for columns in ("query,label", "query", "query,"):
        assert "rows has the columns query, response, pro" in sentence_of(read, rows, tokenizer, columns=columns)
    usual, = read([{"problem": "ab", "answer": "7"}], tokenizer, columns="query,response", held_out=True)
    assert usual.golds == ("7",)  # held-out problems of the usual layout go with training problems of another
    assert "rows has the columns (none)" in sentence_of(read, [], tokenizer)


def test_large_columns_are_not_read_and_rows_only_kept_for_ones_own_reward(tokenizer):
    """A column of images needs Pillow; 100,000 rows of long solutions fill the host's memory."""
    kinds = {"problem": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    row = {"problem": "ab", "answer": "5", "image": {"bytes": b"no picture", "path": None}}
    assert [p.row for p in read(Dataset.from_list([row], features=datasets.Features(kinds)), tokenizer)] == [{}]
    problem, = read([{"problem": "ab", "nums": [1, 2]}], tokenizer, own_reward=True)
    assert (problem.golds, problem.row) == ((), {"problem": "ab", "nums": [1, 2]})


def test_what_is_left_out_of_the_data_is_said(tokenizer, capsys, monkeypatch):
    """Rows that vanish; a data set that asks each problem a hundred times was tokenised for minutes."""
    good = {"problem": "ab", "answer": "1"}
    rows = [good | change for change in (dict(answer=""), dict(answer=None), dict(problem="abcdefgh"), {}, dict(
        problem=None), dict(problem=" "), dict(problem="123"))]
    assert [p.text for p in read(rows, tokenizer, max_prompt_tokens=5)] == ["ab"]
    assert ("2 without an answer; 2 with a prompt of no token, or over 5; 2 without a question in text"
            ) in capsys.readouterr().out
    assert "no usable problem in rows: 1 without" in sentence_of(read, [good | {"answer": None}], tokenizer)
    plain, asked = pipo.encode, []
    monkeypatch.setattr(pipo, "encode", lambda *args: (asked.append(1), plain(*args))[1])
    assert len(read([{"problem": letter, "answer": "5"} for letter in "abca"], tokenizer)) == 4 and len(asked) == 3
    assert capsys.readouterr().out == ""


SO = {"role": "assistant", "content": "so"}
ASKED_SO = [
    ("prompt", USER, "(uq)g"),
    ("prompt", [*USER, SO], "(uq)(aso"),  # an answer that was begun is gone on with
    ("messages", [*USER, SO], "(uq)g"),  # an answer to learn from is not shown
    ("prompt", [{"from": "system", "value": "z"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "so"},
                {"from": "user", "value": "r"}], "(sz)(uq)(aso)(ur)g"),
]


def test_prompts_through_the_chat_template(model, tokenizer):
    """A chat model without its template never emits EOS; a message without content was the word None."""
    chat, thinker = letter_tokenizer(LETTERS + "()"), letter_tokenizer()
    chat.chat_template = ("{% for m in messages %}({{ m.role[0] }}{{ m.content }}){% endfor %}"
                          "{% if add_generation_prompt %}g{% endif %}")
    for column, cell, asked in ASKED_SO:
        problem, = read([{column: cell, "answer": "5"}], chat)
        assert chat.decode(problem.prompt) == asked
        assert problem.text == ("r" if "ur" in asked else "q")
    picture = [{"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "q"}]}]
    for cell in ([{"role": "user", "content": None}], [{"content": "q"}], [], picture):
        assert "1 without a question in text" in sentence_of(read, [{"prompt": cell, "answer": "5"}], chat)
    assert tokenizer.decode(pipo.encode(tokenizer, USER)) == "q"
    thinker.chat_template = "{% if not enable_thinking %}n{% endif %}{{ messages[-1].content }}<pad>"
    assert thinker.decode(pipo.encode(thinker, USER)) == "nq<pad>"
    assert thinker.decode(pipo.encode(thinker, USER, thinking=True)) == "q<pad>"
    assert pipo.eos_ids(model, thinker) == [0, 1, 5, 9]  # what ends its turns ends a completion


def test_dropout_and_noise_are_off(tokenizer, tmp_path):
    """With dropout the ratio is not 1 before any update, and gspo's narrow clip eats the signal."""
    Gemma3Config(text_config=dict(attention_dropout=0.5)).save_pretrained(tmp_path / "nested")
    assert pipo.load_config(str(tmp_path / "nested")).get_text_config().attention_dropout == 0.0
    MixtralConfig(router_jitter_noise=0.1).save_pretrained(tmp_path / "noise")
    assert pipo.load_config(str(tmp_path / "noise")).router_jitter_noise == 0.0
    config = GPT2Config(vocab_size=28, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = pipo.load_model(str(tmp_path), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # unless asked for, no bf16: it rounds
    batch, optimizer = batch_of(model, tokenizer), torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = pipo.update(model, optimizer, batch, batch.advantages, BASES["gspo"], 0.0)
    assert metrics["logprob_gap"] < 1e-5 and metrics["clip_fraction"] == 0


def test_positions_beyond_those_of_the_model(tmp_path):
    """Learned ones ended in an IndexError; turned otherwise later, cached keys were of no use: a gap of 2.2."""
    ways = dict(factor=4.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=24)
    for kind, more in (("learned", {}), ("longrope", ways), ("dynamic", ways), ("default", {})):
        rope = dict(rope_type=kind, rope_theta=1e4, **more)
        config = GPT2Config(vocab_size=28, n_embd=32, n_layer=1, n_head=2, n_positions=24) if kind == "learned" else (
            LlamaConfig(vocab_size=28, hidden_size=32, intermediate_size=32, num_hidden_layers=1, rope_parameters=rope,
                        num_attention_heads=4, max_position_embeddings=128 if kind == "longrope" else 24))
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        pipo.load_model(str(tmp_path / kind), CPU, longest=24)
        if kind != "default":
            assert "ends at 24 tokens" in sentence_of(pipo.load_model, str(tmp_path / kind), CPU, longest=25), kind
    pipo.load_model(str(tmp_path / "default"), CPU, longest=25)


def test_models_that_cannot_be_trained_are_refused(folder, tmp_path, monkeypatch):
    """Weights that a file lacks were random, logits changed behind the head, the ratio wrong: exit code 0."""
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(folder, tmp_path / "run", "it lacks model.layers.1.mlp.up_proj.weight", model=str(tmp_path / "model"))
    capped = Gemma2Config(vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16,
                          num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.1)
    where = in_folder(AutoModelForCausalLM.from_config(capped), tmp_path / "capped")
    refused(folder, tmp_path / "run", "changes its logits behind the output layer", model=str(where))
    larger = in_folder(tiny_model(), tmp_path / "larger", letter_tokenizer(LETTERS + "ABCDE"))
    refused(folder, tmp_path / "run", "has tokens that the model has no embedding for", model=str(larger))
    plain = pipo.draw
    monkeypatch.setattr(pipo, "draw", lambda *args, **how: tuple(
        x + 0.02 if x.is_floating_point() else x for x in plain(*args, **how)))
    refused(folder, tmp_path / "run", "sampler and trainer disagree by 0.02")
    assert not (tmp_path / "run" / pipo.CHECKPOINT).exists()


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory):
    """A file of reward functions; a module is imported once, so it is the same for all tests."""
    file = tmp_path_factory.mktemp("rewards") / "own_rewards.py"
    file.write_text("import zlib\ndef coin(completion, *_):\n    return zlib.crc32(completion.encode()) % 3 == 0\n"
                    "def length(completion, answer, row):\n    assert answer == row['answer'] == '1'\n"
                    "    return len(completion) / 4\n")
    return file


def test_a_reward_of_ones_own(folder, tmp_path, rewards_file):
    """Any finite number, called with completion, answer and row; as a module, a process pool can be sent it."""
    rows = pipo.train(settings(folder, tmp_path, reward=f"{rewards_file}:length", steps=2))
    assert any(row["mu"] > 1 for row in rows) and any(row["grad_norm"] > 0 for row in rows)
    function = pipo.load_reward(f"{rewards_file}:length")
    assert pickle.loads(pickle.dumps(function)) is function is sys.modules["own_rewards"].length
    (tmp_path / "own_broken.py").write_text("import sys\nsys.exit(0)\n")
    for spec in (f"{rewards_file}:missing", "missing", "no.py:score", f"{tmp_path}/own_broken.py:score"):
        assert f"{spec!r}: it must be file.py:function" in sentence_of(pipo.load_reward, spec)


def test_a_reward_that_fails_is_told_with_what_it_was_given():
    """sys.exit(0) in it gave exit code 0 for half a run; nan made every advantage of its group nan."""
    batch, problem = SimpleNamespace(texts=["so"], tokens=torch.zeros(1)), pipo.Problem("asked", [3], ("1",), {})
    for reward, part in [(lambda *_: None, "NoneType"), (lambda *_: "yes", "could not convert"),
                         (lambda *_: math.nan, "nan"), (lambda *_: object(), "object"),
                         (lambda *_: 1 / 0, "ZeroDivision"), (lambda *_: sys.exit(0), "SystemExit")]:
        said = sentence_of(pipo.grade_all, batch, [problem], reward)
        assert part in said and "'so'" in said and "'asked'" in said
    assert pipo.grade_all(batch, [problem], lambda *_: np.float32(0.5))[0].tolist() == [[0.5]]


def test_metrics_go_to_a_tracker_only_when_asked(folder, tmp_path, graded_by_coin, monkeypatch):
    """Fed with the rows of metrics.jsonl, under the same name when resumed; finished after an error, too."""
    sent = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=lambda **options: sent.append(options),
        log=lambda row, step: sent.append(row), finish=lambda: sent.append("finished")))
    monkeypatch.setenv("WANDB_PROJECT", "sums")
    monkeypatch.setattr(pipo, "find_spec", lambda name: True)
    cfg = settings(folder, tmp_path / "run", steps=1, tracker="wandb")
    assert [*pipo.train(cfg), "finished"] == sent[1:] and sent[0]["project"] == "sums"
    pipo.train(replace(cfg, out=str(tmp_path / "another")))  # in the same process, as in a notebook
    with pytest.raises(UserError):
        pipo.train(replace(cfg, steps=2, resume=True), reward=lambda *_: None)
    assert sent[0]["id"] == sent[0]["name"] == sent[6]["name"] == sent[6]["id"] and sent[7:] == ["finished"]
    assert sent[3]["id"] == sent[3]["name"] != sent[0]["id"]


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
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(weights(ours), weights(theirs))
        state, masters = masters.state_dict(), pipo.MasterAdamW(ours.parameters(), "cpu", lr=1.0)
        masters.load_state_dict(copy.deepcopy(state))


def test_small_updates_and_gradients_of_bf16_weights_are_not_lost():
    """At a small lr a bf16 weight of 1 never moves by itself (the next is 0.004 away); its fp32 master does."""
    for make, where, expected in ((torch.optim.AdamW, [], 0.0),
                                  (pipo.MasterAdamW, ["cpu"], pytest.approx(0.004, rel=0.05))):
        weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = make([weight], *where, lr=1e-5, weight_decay=0.0)
        for _ in range(400):
            weight.grad = torch.ones_like(weight, dtype=weight.grad_dtype)
            optimizer.step()
        assert (1 - weight.detach().float().mean()).item() == expected
    assert weight.grad_dtype == torch.float32  # 1 added 600 times would be 256


@on_gpu
@pytest.mark.parametrize("masters_on", ["cpu", "cuda"])
def test_a_run_on_a_gpu_learns_in_bf16_and_resumes(folder, tmp_path, graded_by_coin, monkeypatch, masters_on):
    """bf16 weights on the card, masters here or there: the policy that samples is the one that is trained."""
    monkeypatch.setattr(pipo, "fit_memory", lambda *_: torch.device(masters_on))
    pipo.train(settings(folder, tmp_path, steps=4, device="cuda"))
    rows = pipo.train(settings(folder, tmp_path, steps=6, resume=True, device="cuda"))
    assert len(rows) == 6 and all(row["logprob_gap"] < 0.05 for row in rows) and rows[-1]["memory_gb"] < 4


def test_what_fits_where(monkeypatch):
    """A 4B model: 8.0 GB of bf16 weights, 16 of gradients, 48 of AdamW; those go to the host of a card of 80 GB.
    What cannot fit is refused before anything is loaded."""
    with torch.device("meta"):
        shapes = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=151936, tie_word_embeddings=True, hidden_size=2560, intermediate_size=9728,
            num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128))
    monkeypatch.setattr(pipo, "load_config", lambda _: shapes.config)
    monkeypatch.setattr(pipo.AutoModelForCausalLM, "from_config", lambda *_, **__: shapes)

    def fitted(card, host, **changes):
        monkeypatch.setattr(pipo, "free_memory", lambda device: {"cuda": card, "cpu": host}[device.type] * 1e9)
        return pipo.fit_memory(Config(model="4b", dtype="bfloat16", **changes), "4b", torch.device("cuda")).type

    assert fitted(149, 200) == "cuda"  # the 139 GiB of an H200
    assert fitted(80, 128) == "cpu" and fitted(24, 32, lora=16) == "cuda"
    assert "take 22.5 GiB on cuda with all that they need, and 20.5 are free" in sentence_of(fitted, 22, 128)
    assert "take 45.0 GiB on cpu with all that they need, and 27.9 are free" in sentence_of(fitted, 80, 30)
    assert "take 30.0 GiB on cuda" in sentence_of(fitted, 30, 128, kl_coef=0.1)  # a reference policy


def test_the_room_of_the_cache(monkeypatch):
    """A share of what is free: a token of the tiny model is 2 layers x 2 heads x 8 x (key, value) x 4 bytes."""
    assert pipo.free_memory(CPU) > 2**20
    run = pipo.Run(tiny_model(), None, None, None)
    run.optimizer = pipo.MasterAdamW(run.model.parameters(), CPU)
    cfg = Config(prompts_per_step=4, group_size=4, max_prompt_tokens=10, max_new_tokens=20)
    moments = 8 * run.model.num_parameters()  # AdamW makes them at its first step
    for free, room in ((moments + 256 * 100, int(pipo.CACHE_SHARE * 100)), (math.inf, 16 * 30)):
        monkeypatch.setattr(pipo, "free_memory", lambda device: free)
        assert pipo.cache_room(run, cfg) == room
    monkeypatch.setattr(pipo, "free_memory", lambda device: moments)
    assert "the cache has room for 0 of 30 tokens" in sentence_of(pipo.cache_room, run, cfg)


# ------------------------------------------------------------------------------------------------------------
# The demo. Its problems, and the README's first command from nothing.
# ------------------------------------------------------------------------------------------------------------


def test_demo_problems_are_right_and_disjoint():
    """Guards against held-out problems that were trained on, and worked examples that teach wrong sums."""
    sets = pipo.demo_rows(0)
    asked = [row["problem"] for rows in sets for row in rows]
    assert len(sets[0]) >= 500 and len(asked) == len(set(asked))
    for row in sets[1][:200]:
        a, b = map(int, row["problem"].rstrip("?").split("+"))
        assert int(row["answer"]) == a + b and verify(row["worked"], row["answer"]) == 1.0


SMALLER_DEMO = """
import sys, pipo
pipo.DEMO_DIGITS, pipo.DEMO_EVAL, pipo.DEMO_WARM, pipo.DEMO_TRAIN, plain = 2, 32, 4096, 512, pipo.evaluate
pipo.evaluate = lambda run, sets, *how: {"eval_pass@1": 1.0} if "probe" in sets else plain(run, sets, *how)
sizes = "--window 2 --prompts-per-step 8 --group-size 4 --max-new-tokens 32 --show-every 1 --steps".split()
code = pipo.main([*sizes, "3"])
pipo.build_demo = None  # no second warm start
sys.exit(code or pipo.main([*sizes, "4", "--resume"]))
"""


def test_the_demo_end_to_end(tmp_path):
    """The README's first command, with two digits: from nothing, without network; the warm start is cut short."""
    demo = own_process("-c", SMALLER_DEMO)
    demo |= dict(cwd=tmp_path, env=demo["env"] | {"PYTHONPATH": str(HERE), "HF_HOME": str(tmp_path / "hub")})
    done = subprocess.run(**demo)
    said, out = done.stdout + done.stderr, tmp_path / "runs" / "demo-grpo-pipo-seed0"
    assert done.returncode == 0 and "step 0: demo" in said and "step 1, reward" in said, said
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and (out / "model").is_dir()


# ------------------------------------------------------------------------------------------------------------
# Files. A run goes on exactly where it stood, whatever stopped it, and is never lost by mistake.
# ------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(folder, tmp_path, graded_by_coin):
    """Metrics hold every number that the README explains."""
    (tmp_path / "b").mkdir()
    sets = [str(folder / "train.jsonl"), shutil.copy(folder / "train.jsonl", tmp_path / "b")]  # of one name
    cfg = settings(folder, tmp_path / "run", eval_every=2, eval_dataset=sets, eval_samples=2, kl_coef=0.01, steps=4)
    rows, (alone,) = pipo.train(cfg), pipo.train(replace(cfg, steps=0, out=str(tmp_path / "alone")))
    assert {f"eval/{name}/{key}" for name in ("train", sets[1]) for key in ("pass@1", "pass@2", "stderr")} <= set(alone)
    assert without_times([alone]) == without_times(rows[:1])
    expected = """step mu mu_his sigma_his xi phi feedback coefficient loss grad_norm pi_loss pi_grad_norm
        clip_fraction ratio logprob_gap entropy kl truncated zero_signal completion_length tokens
        seconds_sample seconds_grade seconds_verification seconds_exploration memory_gb eval_pass@1""".split()
    assert set(expected) <= set(rows[-1]) and [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_pass@1" in row] == [0, 2, 4] and "mu" not in rows[0]
    assert rows[1]["ratio"] == pytest.approx(1, abs=1e-4) and rows[1]["logprob_gap"] < 1e-4
    assert set(os.listdir(tmp_path / "run")) == {"config.json", "metrics.jsonl", "checkpoint.pt", "model"}


def assert_same_run(one, other):
    """The same metrics but for times, the same bits."""
    rows = [without_times(read_jsonl(out / "metrics.jsonl")) for out in (one, other)]
    assert rows[0] == rows[1] and any("pi_loss" in row for row in rows[0])
    assert torch.equal(weights(one / "model"), weights(other / "model"))


@pytest.mark.parametrize("owner, name, call, changes", [
    (pipo, "sample", 1, {}), (pipo, "update", 5, {}), (pipo, "save_model", 1, dict(base="dapo", minibatches=2)),
    (torch, "save", 2, dict(dtype="bfloat16")), (torch, "save", 2, dict(lora=4, kl_coef=0.1))])
def test_a_run_killed_at_any_moment_and_resumed_equals_an_unbroken_one(
        folder, tmp_path, graded_by_coin, owner, name, call, changes):
    """Guards against a lost window, batch, moment or data order, masters rebuilt from rounded weights, adapters
    left out; half a checkpoint in the place of the old one; logs in which what came after it stands twice."""
    if "lora" in changes:
        pytest.importorskip("peft")
    whole = pipo.train(settings(folder, tmp_path / "whole", save_every=2, steps=4, **changes))
    cfg = settings(folder, tmp_path / "run", save_every=2, steps=4, **changes)
    plain, calls = getattr(owner, name), []

    def killed(*args, **options):
        calls.append(args)
        if len(calls) < call:
            return plain(*args, **options)
        if name == "save":
            args[1].write_bytes(b"half of it")
        raise GeneratorExit  # which no `except` of pipo.py catches, as nothing catches SIGKILL

    with pytest.MonkeyPatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr(owner, name, killed)
        pipo.train(cfg)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "m')
    pipo.train(replace(cfg, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.partial"))
    if "dtype" in changes:
        assert whole[0]["logprob_gap"] < 0.05
    if "lora" in changes:  # the reference is the start
        assert whole[0]["kl"] == pytest.approx(0, abs=1e-7) and whole[-1]["kl"] > 1e-6


def test_processes_that_are_stopped_or_killed_go_on_as_if_nothing_had_been(folder, tmp_path, rewards_file):
    """Ctrl-C cut a step in half, or exited with 0; an ASCII terminal ended the run at a non-ASCII problem."""
    rows = [{"problem": "é" + LETTERS[i:i + 3], "answer": "1"} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = settings(folder, tmp_path / "whole", dataset=str(tmp_path / "train.jsonl"), steps=100_000, show_every=1,
                   save_every=2, reward=f"{rewards_file}:coin")
    outs, runs, said = {signal.SIGINT: tmp_path / "stopped", signal.SIGKILL: tmp_path / "killed"}, {}, {}
    for sign, out in outs.items():
        given = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
        process = own_process("pipo.py", *[f"{pipo.flag(name)}={x}" for name, x in (given | {"out": out}).items()])
        process["env"]["PYTHONIOENCODING"] = "ascii"
        # a suite started in the background hands on that SIGINT is ignored, which pipo respects
        runs[sign] = subprocess.Popen(**process, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for sign, run in runs.items():
        deadline, log = time.time() + 90, outs[sign] / "metrics.jsonl"
        while time.time() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
            time.sleep(0.05)
        run.send_signal(sign)
        said[sign] = "".join(run.communicate(timeout=90))
        assert run.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[sign], said[sign]
    steps, of_stopped = {sign: saved(out)["step"] for sign, out in outs.items()}, said[signal.SIGINT]
    assert f"stopped after step {steps[signal.SIGINT]}; --resume goes on\n" in of_stopped
    assert "Traceback" not in of_stopped
    for out in (tmp_path / "whole", *outs.values()):
        pipo.train(replace(cfg, out=str(out), resume=True, steps=max(steps.values()) + 2))
        assert_same_run(tmp_path / "whole", out)
    assert "\\xe9" in of_stopped


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_stop_saves_and_says_how_to_go_on(folder, tmp_path, graded_by_coin, monkeypatch, capsys, name):
    """What a scheduler sends before it kills ended the run at once, with nothing saved."""
    number, plain = getattr(signal, name), pipo.iteration
    flags = (f"--model {folder}/model --dataset {folder}/train.jsonl --max-new-tokens 4 --group-size 2 "
             f"--device cpu --prompts-per-step 2 --steps 5 --out {tmp_path}").split()
    monkeypatch.setattr(pipo, "iteration", lambda run, *given: (
        run.step == 1 and signal.raise_signal(number), plain(run, *given))[1])
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, which pipo respects
    assert pipo.main(flags) == 130 and saved(tmp_path)["step"] == 2 and not (tmp_path / "model").exists()
    assert "pipo: stopped after step 2; --resume goes on\n" in capsys.readouterr().err
    with pipo.signals_caught() as caught, pytest.raises(KeyboardInterrupt):  # a second stops at once
        for _ in range(2):
            signal.raise_signal(number)
    assert signal.signal(number, before) == signal.SIG_DFL and caught == [number]


def test_a_run_that_breaks_down_meets_it_again(folder, tmp_path, graded_by_coin):
    """A NaN must stop the run, never be trained through."""
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match="not finite|gradient norm"):
            pipo.train(settings(folder, tmp_path, lr=1e30, resume=resume))
        assert saved(tmp_path)["step"] == 1 and not (tmp_path / "model").exists()


def test_runs_are_not_overwritten_and_resume_names_what_differs(folder, tmp_path, graded_by_coin):
    """Guards against a run of days that a mistyped command deletes, or goes on with under other settings."""
    pipo.train(settings(folder, tmp_path, steps=2, resume=True))  # with nothing to go on from, it begins
    (tmp_path / "short.jsonl").write_text('{"problem": "ab", "answer": "1"}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for changes, sentence in [
            ({}, "already holds a run: --overwrite deletes it, --resume goes on if it has a checkpoint"),
            (dict(resume=True, dataset=f"{tmp_path}/short.jsonl"), "trained on 40 problems, not 1"),
            (dict(resume=True, steps=4, lr=0.5, window=3), "--window was 2, is 3; --lr was 0.001, is 0.5"),
            (dict(overwrite=True, dataset="/no/such"), "/no/such"),  # a mistyped name must not cost the run
            (dict(overwrite=True, model=f"{tmp_path}/model"), "--model is in"),
            # the checkpoint's adapters would come on top of a model that already holds them
            (dict(resume=True, model=f"{tmp_path}/model"), "--model is in")]:
        refused(folder, tmp_path, sentence, **dict(steps=3) | changes)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert len(pipo.train(settings(folder, tmp_path, steps=3, resume=True, show_every=9))) == 3
    (tmp_path / pipo.CHECKPOINT).unlink()
    refused(folder, tmp_path, "already holds a run", resume=True)  # a finished model is not begun anew
    assert len(pipo.train(settings(folder, tmp_path, steps=1, overwrite=True))) == 1


def test_a_clock_in_the_template_does_not_hinder_resume(folder, tmp_path, graded_by_coin):
    """Llama 3's template writes today's date: what was begun yesterday is another prompt, not another run."""
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ strftime_now('%f') }}{{ messages[0].content }}")
    cfg = settings(folder, tmp_path / "run", model=tmp_path / "model", steps=np.int64(1))
    pipo.train(replace(cfg, out=tmp_path / "run"))  # paths and numpy's numbers, from Python
    assert len(pipo.train(replace(cfg, steps=2, resume=True, lr=np.float64(1e-3)))) == 2


def test_a_broken_checkpoint_or_log_is_refused_and_left_as_it_is(folder, tmp_path, graded_by_coin):
    """A weight missing from it kept its start value, a pickle ran any code, the rest were tracebacks."""
    pipo.train(settings(folder, tmp_path, steps=1))
    for name, edit in [
            (pipo.CHECKPOINT, b""), (pipo.CHECKPOINT, b"PK" + bytes(9999)),
            (pipo.CHECKPOINT, dict(step=os.abort)), (pipo.CHECKPOINT, dict(config={})),
            (pipo.CHECKPOINT, dict(optimizer={})), (pipo.CHECKPOINT, dict(window=None)),
            ("metrics.jsonl", b"\xff\xfe\x00\n"), ("metrics.jsonl", b'{"mu": 1}\n')]:
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(edit) if isinstance(edit, bytes) else torch.save(saved(tmp_path) | edit, file)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        refused(folder, tmp_path, "", resume=True)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        file.write_bytes(whole)


def test_a_full_disk_leaves_the_old_checkpoint_or_model(folder, tmp_path, graded_by_coin, monkeypatch, capsys):
    """A half-written file stayed and filled the disk for good, or a run of days ended for a moment's trouble."""
    plain = torch.save
    errors = {2: OSError(28, "No space left on device"), 3: RuntimeError("unexpected pos 64 vs 0")}

    def full(state, file):
        if state["step"] in errors:
            file.write_bytes(b"half of it")
            raise errors[state["step"]]
        plain(state, file)

    monkeypatch.setattr(torch, "save", full)
    assert len(pipo.train(settings(folder, tmp_path, steps=3))) == 3
    said = capsys.readouterr().out
    assert all(f"step {step} could not be saved, the ch" in said and str(errors[step]) in said for step in errors)
    assert saved(tmp_path)["step"] == 1 and not list(tmp_path.glob("*.partial"))
    model = weights(tmp_path / "model")
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *_: 1 / 0)
    refused(folder, tmp_path, "could not be saved", steps=4, resume=True)
    assert torch.equal(model, weights(tmp_path / "model"))


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_with_lora_a_plain_model_is_saved_that_answers_as_the_adapters_did(folder, tmp_path, dtype, atol):
    """Adapters alone are no folder for vLLM or --model; merged twice, or scaled wrongly, it is another policy."""
    pytest.importorskip("peft")
    start, ids = str(folder / "model"), torch.arange(28)[None]
    model = pipo.load_model(start, CPU, dtype)
    adapters = pipo.add_adapters(model, Config(lora=4))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32} and len(trained) == 28
    plain = model(ids).logits.detach()
    for weight in trained:
        torch.nn.init.normal_(weight, std=0.3)
    adapted = model(ids).logits.detach()
    pipo.save_model(pipo.Run(model, letter_tokenizer(), None, None, adapters=adapters), tmp_path)
    again = pipo.load_model(str(tmp_path / "model"), CPU, dtype)(ids).logits
    assert torch.allclose(again, adapted, atol=atol) and (adapted - plain).abs().max() > 3 * atol
    assert not list((tmp_path / "model").glob("adapter*"))


def test_a_saved_model_tells_transformers_4_its_theta(tmp_path):
    """It looks elsewhere for it, and took 10,000 in silence. A temperature without do_sample, as in many a
    published model, made save_pretrained raise at the end."""
    start, ids = in_folder(tiny_model(), tmp_path / "start"), torch.arange(28)[None]
    (start / "generation_config.json").write_text('{"temperature": 0.6}')
    run = pipo.Run(pipo.load_model(str(start), CPU), AutoTokenizer.from_pretrained(start), None, None)
    pipo.save_model(run, tmp_path)
    found = json.loads((tmp_path / "model/config.json").read_text())
    again = pipo.load_model(str(tmp_path / "model"), CPU)
    assert found["rope_theta"] == run.model.config.rope_parameters["rope_theta"]
    assert again.config.rope_parameters == run.model.config.rope_parameters
    assert torch.equal(again(ids).logits, run.model(ids).logits) and again.generation_config.temperature == 0.6


# ------------------------------------------------------------------------------------------------------------
# Command line. What the user can put right is one sentence and exit code 2, and --help leaves nothing out.
# ------------------------------------------------------------------------------------------------------------

BAD_INPUTS = [
    ("--model /no/such", "/no/such can be read neither"), ("--model no/thing", "no/thing can be read neither"),
    ("--model {where}", "can be read neither"), ("--model {where}/t5", "is not a causal language model"),
    ("--dataset /no/such", "/no/such can be read neither"), ("--dataset no/thing", "no/thing can be read neither"),
    ("--dataset {where}/t5", "can be read neither"), ("--columns text,label", "has the columns problem, answer:"),
    ("--dataset {where}/noanswer.jsonl", "no usable problem"), ("--max-prompt-tokens 1", "over 1"),
    ("--eval-every 2 --eval-dataset /no/such", "--eval-every 0"), ("--window 1", "--window is 1: it must be"),
    ("--lam nan", "--lam is nan"), ("--steps 0", "--steps is 0 and nothing is evaluated"),
    ("--minibatches 3", "--minibatches must divide"), ("--device abacus", "--device is 'abacus'"),
    ("--device cuda:99", "--device is 'cuda:99'"), ("--device meta", "must be cpu or a CUDA device"),
    ("--tracker wandb", "package wandb"), ("--out {folder}", "another --out"),
    ("--out {folder}/train.jsonl/x", "cannot be written"), ("--reward no.py:score", "--reward is 'no.py:score'"),
]


def test_bad_input_gets_one_sentence_and_exit_code_2(folder, tmp_path, offline, capsys, monkeypatch):
    """No traceback, no work done first, no run left behind."""
    for expensive in ("load_model", "build_demo"):
        monkeypatch.setattr(pipo, expensive, lambda *_: pytest.fail("expensive work before the check"))
    monkeypatch.setattr(pipo, "find_spec", lambda name: None)
    (tmp_path / "noanswer.jsonl").write_text('{"problem": "x", "answer": ""}')
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    good = f"--model {folder}/model --dataset {folder}/train.jsonl --eval-every 0 --out {tmp_path}/never "
    cases = [(good + flags, sentence) for flags, sentence in BAD_INPUTS]
    cases += [("--dataset a/b", "needs --model"), ("--eval-dataset a/b", "needs --model"),
              ("--model {folder}/model --reward r.py:f", "--dataset is missing: the data that --reward is made for"),
              ("--steps 0 --eval-every 0 --out {where}/never", "--steps is 0")]
    for flags, sentence in cases:
        flags = flags.format(where=tmp_path, folder=folder).split()
        code, said = pipo.main(flags), capsys.readouterr().err.strip()
        assert code == 2 and sentence in said and said.count("\n") == 0, (flags, said)
    assert not any((tmp_path / "never" / name).exists() for name in pipo.RUN_FILES)
    for flags in ("--no-such-flag", "--base ppo", "--steps many", "--temp 1"):
        with pytest.raises(SystemExit, match="2"):
            pipo.main(flags.split())


def test_what_is_not_given_depends_on_what_is(monkeypatch):
    """Word problems, or a reward of one's own, were evaluated on MATH-500; adapters learned at a rate of 1e-6."""
    monkeypatch.setattr(pipo, "find_spec", lambda name: True)
    for changes, expected in [
            ({}, (pipo.MATH[0], [pipo.MATH[1]], 1e-6)), (dict(eval_every=0), (pipo.MATH[0], [], 1e-6)),
            (dict(dataset="mine"), ("mine", [], 1e-6)), (dict(dataset="mine", reward="r.py:f"), ("mine", [], 1e-6)),
            (dict(eval_dataset="mine", lora=4), (pipo.MATH[0], ["mine"], 1e-4))]:
        cfg = pipo.settled(Config(model="m", **changes))
        assert (cfg.dataset, cfg.eval_dataset, cfg.lr) == expected


def test_every_flag_is_explained_with_its_default_and_parsed(capsys, monkeypatch):
    """Guards against a setting that cannot be given, and against a --help that names another default."""
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as stop:
        pipo.parse(["--help"])
    texts, types = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:], get_type_hints(Config)
    said = {text.split()[0]: " ".join(text.split()) for text in texts}
    assert stop.value.code == 0 and [*said] == [pipo.flag(f.name) for f in fields(Config)] and len(said) <= 46
    assert pipo.parse([]) == Config(**pipo.DEMO) and pipo.parse(["--model", "x"]) == Config(model="x")
    for f in fields(Config):
        kind, help, choices = types[f.name], f.metadata["help"], f.metadata["choices"]
        _, found, behind = said[pipo.flag(f.name)].partition(help)
        assert found and len(help) > 5
        assert kind not in (int, float) or not f.default or behind.startswith(f" (default: {f.default})")
        value = choices[-1] if choices else {int: 7, float: 0.25, str: "any", bool: True, list[str]: ["any"]}[kind]
        words = [] if kind is bool else value if kind == list[str] else [str(value)]
        assert getattr(pipo.parse([pipo.flag(f.name), *words]), f.name) == value


MAX_CODE_LINES = 1250
MAX_LINES = 1800


def test_the_file_stays_short():
    """A reference grows until nobody reads it. Without comments, docstrings and blank lines, and in all."""
    source, lines, statement = (HERE / "pipo.py").read_text(), set(), []
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        statement += [token] * (token.type not in blank)
        if token.type == tokenize.NEWLINE:
            if statement[0].type != tokenize.STRING:  # a docstring
                lines.update(*(range(part.start[0], part.end[0] + 1) for part in statement))
            statement = []
    assert len(lines) <= MAX_CODE_LINES and source.count("\n") <= MAX_LINES
    tree = list(ast.walk(ast.parse(source)))
    long = [node.name for node in tree if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50]
    assert not long and not any(isinstance(node, ast.Assert) for node in tree)  # python -O leaves them out


# ------------------------------------------------------------------------------------------------------------
# README. It and assets/usage.md: commands, links, tables, pieces to copy; the figures behind them.
# ------------------------------------------------------------------------------------------------------------

USAGE = HERE / "assets" / "usage.md"


def section_of(path, title):
    """What stands under a heading of a page."""
    return path.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def table_rows(text):
    """The rows of all tables in a text, headers among them, as lists of cells."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*$", text, re.MULTILINE)]


def experiment(*arguments):
    """assets/experiment.py as a user starts it."""
    return subprocess.run(**own_process("assets/experiment.py", *arguments))


def test_the_readme_is_short_and_links_to_what_exists():
    """Guards against a page that nobody reads to its end, and against dead links, anchors and make targets."""
    assert len(README.read_text().split()) <= 1700
    targets = set(re.findall(r"^([a-z-]+):", (HERE / "Makefile").read_text(), re.MULTILINE))
    for page in (README, USAGE):
        text = page.read_text()
        assert set(re.findall(r"\bmake (?!up\b)([a-z-]+)", text.replace("\n", " "))) <= targets
        for path, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", text):
            file = page.parent / path if path else page
            assert file.exists(), path
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else [""]
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_the_commands_shown_parse():
    """README and code drift apart: every command and flag shown must be one that the program takes."""
    text = (README.read_text() + USAGE.read_text()).replace("\\\n", " ")
    commands = re.findall(r"^python pipo\.py(.*?)(?:\s+#.*)?$", text, flags=re.MULTILINE)
    assert len([pipo.settled(pipo.parse(line.split())) for line in commands]) >= 3
    flags = {pipo.flag(f.name) for f in fields(Config)} | {"--help"}
    flags |= {"--config_file", "--into", "--arms", "--seeds", "--costs", "--tokenizer", "--hf-overrides"}  # of others
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= flags


def test_the_reward_for_countdown(folder, tmp_path):
    """Each number once, no power towers to hang on, nothing but arithmetic is evaluated; and a run takes it."""
    block, = re.findall(r"```python\n(.*?)```", section_of(USAGE, "A reward of your own"), re.DOTALL)
    (tmp_path / "countdown.py").write_text(block)
    score, row = pipo.load_reward(f"{tmp_path}/countdown.py:score"), {"numbers": [2, 3, 4], "target": 24}
    assert [score(rf"so \boxed{{{sum_}}}", "", row) for sum_ in ("2*3*4", "(4*3)*2", "4*3 / (1/2)")] == [1, 1, 0]
    for wrong in ("2*12", "2**3*4", "2*3+4", "2 3 4", "2//3*4", "4*3*2)", "4/(3-3)", "__import__('os')"):
        assert score(rf"\boxed{{{wrong}}}", "", row) == 0.0
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps({"problem": text, "numbers": [1, 2], "target": 3}) for text in ("ab", "cd")))
    cfg = settings(folder, tmp_path / "run", dataset=data, steps=1, reward=f"{tmp_path}/countdown.py:score")
    assert pipo.train(cfg)[0]["mu"] == 0.0


def test_the_glossary_names_every_metric(folder, tmp_path, graded_by_coin):
    """Guards against a column that nobody can look up, and against one that is no more."""
    told = " ".join(row[0] for row in table_rows(section_of(USAGE, "Metrics"))).replace("<set>", "*")
    told = [re.escape(name).replace(r"\*", ".*") for name in re.findall(r"`(\S+)`", told)]
    rows = pipo.train(settings(folder, tmp_path / "r", eval_every=3, kl_coef=0.1, eval_dataset=folder / "train.jsonl"))
    names = {name for row in rows for name in row} | {"grader_unparsed"}
    assert all(any(re.fullmatch(one, name) for one in told) for name in names), names
    assert all(any(re.fullmatch(one, name) for name in names) for one in told), told


def test_results_come_from_the_packed_runs_and_the_readme_from_the_results(tmp_path):
    """Guards against a table that nobody can make again, and a README that was not changed with it."""
    [shutil.copy(pack, tmp_path) for pack in (HERE / "assets").glob("runs-*.jsonl.gz")]
    results = (HERE / "assets" / "results.md").read_text()
    assert experiment("table", "--into", tmp_path).returncode == 0
    assert (tmp_path / "results.md").read_text() == results
    brought, known = section_of(README, "What looking back brought"), set()
    for part in re.split(r"\n(?=\*\*)", results):
        heads, *found = [row for row in table_rows(part.partition("\n## ")[0]) if "---" not in row[0]] or [[]]
        if part.startswith(f"**{brought.split('**')[1]}**"):
            known |= {(row[0], head, cell) for row in found for head, cell in zip(heads, row)}
    if "condition | arm" in results:  # the table of momentum: a condition and an arm a row
        known |= {(row[1], row[0], row[3]) for row in table_rows(results.split("condition | arm")[1]) if len(row) > 3}
    heads, *rows = [row for row in table_rows(brought) if "---" not in row[0]]  # of two tables with the same heads
    cells = {(row[0], head, cell) for row in rows if row[0] != "arm" for head, cell in zip(heads[1:], row[1:])}
    cells = {cell for cell in cells if cell[2] != "–"}
    assert len(cells) >= 25 and cells <= known, cells - known


def test_costs_and_speed_are_those_kept():
    """Guards against costs that differ on the two pages, and the speed of an older pipo.py or of the best row."""
    costs = {row[0]: row for row in table_rows(section_of(USAGE, "Costs"))}
    for card, flags, host, minutes, hours in table_rows(section_of(README, "One GPU"))[2:]:
        row = costs[": ".join(card.split(", ")[::-1])]
        assert (flags, hours) == (row[1], row[5])
        assert float(minutes) == pytest.approx(float(row[3]) + 2 * float(row[4]), abs=0.5)
        assert host in ("none", f"{float(costs['AdamW: fp32 weights and moments, and a buffer'][2]):.0f} GiB")
    told, measured = section_of(USAGE, "Speed"), json.loads((HERE / "assets" / "bench.json").read_text())
    rows = [row for processor in measured.values() for row in processor["rows"].values()]
    for ratio in [ratio for row in rows for ratio in row.get("ratios", [row.get("ratio")])]:
        assert {f"{ratio:.1f}", f"{ratio:.2f}"} & set(re.findall(r"[0-9.]*[0-9]", told)), ratio


def test_plots_of_ones_own_runs(folder, tmp_path, graded_by_coin):
    """The command behind `make plot`, on a run that was never evaluated, and on a folder that is no run."""
    pipo.train(settings(folder, tmp_path / "run"))
    done = experiment("plot", tmp_path / "run", "--into", tmp_path)
    assert done.returncode == 0, done.stderr
    assert min((tmp_path / f"pipo-{name}.png").stat().st_size for name in ("curves", "inside")) > 10_000
    wrong = experiment("plot", tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "holds no step" in wrong.stderr


def copied(names, imports):
    """A module that holds nothing but these definitions of pipo.py and these imports."""
    source, space = (HERE / "pipo.py").read_text(), {"__name__": "copied"}
    exec("import torch; import torch.nn.functional as F; from torch import Tensor", space)
    for module, _, attribute in (name.rpartition(".") for name in imports if name != "torch"):
        exec(f"from {module} import {attribute}" if module else f"import {attribute}", space)
    for node in ast.parse(source).body:
        named = {getattr(target, "id", "") for target in getattr(node, "targets", [])}
        if (named | {getattr(node, "name", "")}) & set(names):
            first = min([node.lineno, *(line.lineno for line in getattr(node, "decorator_list", []))]) - 1
            exec("\n".join(source.splitlines()[first:node.end_lineno]), space)
    return space


def test_pieces_can_be_copied_as_said():
    """Guards against a helper or an import that usage.md's table forgot, and one from another section."""
    part, defined, used = section_of(USAGE, "Copying pieces"), {}, {}
    lines = Path(pipo.__file__).read_text().splitlines()
    banners = [i for i, line in enumerate(lines, 1) if line.startswith("# ---") and lines[i].startswith("# ")]
    for node in ast.parse("\n".join(lines)).body:
        section = lines[max(i for i in (0, *banners) if i < node.lineno)].split(".")[0]
        for target in (node, *getattr(node, "targets", ())):
            defined.setdefault(getattr(target, "name", getattr(target, "id", None)), section)
        loads = [x for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)]
        used.setdefault(section, set()).update(x.id for x in loads)
    for section in ("# Sampling", "# Verifying"):
        others = {name for name in used[section] - {"draw"} if defined.get(name, section) != section}  # a local one
        assert all(f"`{name}`" in part for name in others), others
    rows = [[re.findall(r"`([\w.]+)`", cell) for cell in row] for row in table_rows(part)]
    pieces = {row[0][0]: copied(row[0] + row[1], row[2])[row[0][0]] for row in rows if row[0]}
    named = re.findall(r"`(\w+)`", README.read_text().split("can be [copied]")[0].split("```")[-1])
    assert {*named} == {*pieces, "sample", "verify"}
    rewards, tracker = torch.tensor([[1.0, 0, 0, 1]]), pieces["ImprovementTracker"](2)
    advantages = group_advantages(rewards)
    assert torch.equal(pieces["group_advantages"](rewards), advantages)
    assert torch.equal(pieces["improvement_rewards"](advantages, 2.0), improvement_rewards(advantages, 2.0))
    assert tracker.push(0.1) is tracker.push(0.2) is None is not tracker.feedback(0.3)
    assert pieces["policy_loss"](*random_rows())[0] == policy_loss(*random_rows())[0]
    given = tiny_model(), [[3, 4]], torch.tensor([[5, 6]]), torch.ones(1, 2)
    assert torch.equal(pieces["token_logprobs"](*given), token_logprobs(*given))
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = pieces["MasterAdamW"]([weight], "cpu", lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert (weight < 1).all()


@pytest.fixture
def on_paper(monkeypatch):
    """assets/experiment.py, whose formulas the README's results rest on."""
    monkeypatch.syspath_prepend(HERE / "assets")
    import experiment
    return experiment


def three_weights():
    """Three weights after ten of pipo's AdamW steps along a direction, and that direction."""
    direction, model = torch.tensor([3.0, -1.0, 0.5]), torch.nn.Linear(3, 1, bias=False)
    optimizer = pipo.MasterAdamW(model.parameters(), "cpu", lr=0.01, weight_decay=0.0)
    for _ in range(10):
        model.weight.grad = -direction[None]
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, direction


def test_a_small_step_back_by_hand(on_paper):
    """AdamW's mean of gradients m decides: m = 0.9 m + 0.1 g still points forward where g is a small step back."""
    def moved(optimizer, coefficient):
        before = model.weight.detach().clone()
        model.weight.grad = -coefficient * direction[None]
        optimizer.step()
        return ((model.weight - before).detach() * direction).sign().squeeze().tolist()

    model, shared, direction = three_weights()
    assert moved(shared, -0.1) == [1.0, 1.0, 1.0]  # forward, every weight: m is 0.58 of the whole gradient
    model, shared, direction = three_weights()
    assert moved(shared, -6.0) == [-1.0, -1.0, -1.0]  # 0.9 * 0.65 - 0.1 * 6 < 0
    model, shared, direction = three_weights()
    state = shared.state[shared.masters[0]]
    mean = state["exp_avg"].clone()
    with on_paper.without_momentum(shared):
        assert moved(shared, -0.1) == [-1.0, -1.0, -1.0]
    assert state["exp_avg"].equal(mean) and state["step"] == 11
    assert [group["betas"] for group in shared.param_groups] == [(0.9, 0.999)]
    assert moved(torch.optim.AdamW(model.parameters(), 0.01), -0.1) == [-1.0, -1.0, -1.0]  # moments of its own
