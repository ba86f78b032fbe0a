#!/usr/bin/env python3
"""PIPO, Policy Improvement Policy Optimization (arXiv 2604.00860), in one file.

Reinforcement learning with verifiable rewards, in a loop that looks back. GRPO samples G answers to each
prompt, grades them, and pushes up what beat its group: nobody checks whether the push helped. PIPO does: the
next batch's mean reward, held against the last K, says whether the policy improved, and the previous batch is
then stepped on once more.

Letters: Q prompts a step, G samples a prompt (the group), N = Q*G sequences, T tokens, V vocabulary. B_t is the
batch of step t, A_i the GRPO advantage of its sample i, K the length of the window, lam the weight of a fall.

    mu_t    = mean reward of the fresh batch B_t
    xi_t    = (mu_t - mean(mu_{t-1} .. mu_{t-K})) / std(mu_{t-1} .. mu_{t-K})
    phi_t   = xi_t if xi_t >= 0 else lam * xi_t
    r_i     = phi_t * G * A_i / sum_group |A_j|         for each sample i of B_{t-1}

    one iteration: sample, grade B_t -> step on B_{t-1} with r (verification) -> step on B_t with A (exploration)

mu_t judges B_{t-1} because the policy that drew B_t came out of the step on B_{t-1}. Both steps share one AdamW,
whose momentum still points along B_{t-1}: a rise reinforces it, and a fall brakes it (by a tenth of that step, as
measured), but takes nothing back. There is no verification step while the window fills (the first K iterations),
where its rewards are all equal, where phi_t is 0, and where no group of B_{t-1} is mixed.

    python pipo.py                          # offline demo: a 0.3M-parameter model learns to add, in minutes
    python pipo.py --model Qwen/Qwen3-4B    # MATH, on one GPU

Contents, in reading order; the first five are PIPO, the others are its engine rooms:

    Records             what users are told; what passes through an iteration: problems, a batch, the run
    The mathematics     group advantages, the improvement tracker, improvement rewards, the clipped loss
    The update          log-probabilities of a batch, and optimizer steps on it
    One iteration       PIPO on one screen
    Training            the loop around it: set up, evaluate, log, save
    Sampling            completions with their log-probabilities; a prompt is read once for its group
    Verifying           whether a final answer is right
    Data and models     datasets, prompts, checkpoints of others
    Memory              fp32 masters, and what fits where
    The demo            a tiny model that learns to add
    Files               what a run leaves, and how it goes on
    Command line        every setting, what it means and what it may be

Left out on purpose: several GPUs, an inference server, replay of older batches, learned rewards, rate schedules.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import inspect
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, get_type_hints

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # or the GPU's memory breaks into pieces

import datasets
import mpmath  # of sympy: its arithmetic alone, for the verifier
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models as tokenizer_models
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# ------------------------------------------------------------------------------------------------------------
# Records. What passes through an iteration: the problems, the batch of answers to them, and the run that carries the
# rest on; before them, what users are told. Settings (`cfg`) stand with the command line, last.


class UserError(Exception):
    """Something the user can put right: shown as one sentence, exit code 2."""


def say(text: str) -> None:
    """Show a line above the progress bar; a terminal that has hung up is no reason to fail."""
    with suppress(OSError):
        tqdm.write(text)


@contextmanager
def explained_as(what: str):
    """Foreign files can break in any way: whatever a library raises about one becomes a sentence."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        cause = error.__cause__ if type(error) is datasets.exceptions.DatasetGenerationError else error  # says why
        raise UserError(f"{what}: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}") from error


class Problem(NamedTuple):
    """One question with its answers, ready to be asked."""
    text: str  # the question, for people
    prompt: list[int]  # token ids
    golds: tuple[str, ...]  # any of these answers is right
    row: dict  # of the dataset, whole, for a reward function of the user's own; otherwise {}
    thinking: bool = False  # the prompt opens a thought, which the completion has to end


@dataclass
class Batch:
    """N completions, the G of a prompt side by side. Padding stands behind; `mask` says what was sampled."""
    prompts: list[list[int]]  # N lists of token ids
    tokens: Tensor  # (N, T) sampled token ids
    mask: Tensor  # (N, T) 1 on every sampled token, the EOS that ended it included
    behavior_logprobs: Tensor  # (N, T) under the policy that sampled, at its temperature: what the ratio is against
    truncated: Tensor  # (N,) True where the length limit cut it off
    texts: list[str]  # N decoded completions
    cache_tokens: int = 0  # the room that was left for the cache: less if memory ran out
    out_of_memory: int = 0  # how often it did
    rewards: Tensor | None = None  # (Q, G) filled in once the completions are graded
    advantages: Tensor | None = None  # (Q, G)
    ref_logprobs: Tensor | None = None  # (N, T) under the reference policy, where there is a KL to it

    def lengths(self) -> Tensor:
        """Tokens of each prompt and its completion (N,), on the CPU."""
        return torch.tensor(list(map(len, self.prompts))) + self.mask.sum(1).long().cpu()

    def metrics(self) -> dict:
        """What a graded batch says of the policy's health."""
        n_tokens = self.mask.sum().item()
        return {"entropy": -self.behavior_logprobs.sum().item() / n_tokens, "tokens": int(n_tokens),
                "prompt_tokens": sum(map(len, self.prompts)), "completion_length": n_tokens / len(self.prompts),
                "truncated": self.truncated.float().mean().item(), "cache_tokens": self.cache_tokens,
                "zero_signal": (self.advantages == 0).all(1).float().mean().item(), "out_of_memory": self.out_of_memory}


@dataclass
class Run:
    """What one iteration hands to the next."""
    model: torch.nn.Module
    tokenizer: object
    optimizer: object
    tracker: ImprovementTracker
    reference: torch.nn.Module | None = None  # the starting model, where there is a KL to it
    adapters: object = None  # peft's handle on them, with LoRA
    reward: object = None  # the user's own function in place of the verifier
    previous: Batch | None = None  # B_{t-1}, with the advantages it was trained with
    step: int = 0  # iterations done, or within one the present one
    name: str = ""  # that trackers know it by
    cache_tokens: int = sys.maxsize  # room of the key-value cache; less once memory ran out in sampling
    microbatch_tokens: int = 8192  # less than the setting once memory ran out in training


# ------------------------------------------------------------------------------------------------------------
# The mathematics. Pure functions on tensors, and the tracker: what GRPO learns from, PIPO's window, and the one
# clipped loss that both steps minimise. Lift any of it into a trainer of your own.


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """(Q, G) rewards -> (Q, G) advantages: R - mean, over the sample std + 1e-6 if `normalize_std`.
    A group of equal rewards has advantage 0. ValueError for G < 2 and for a reward that is not finite. Source:
    DeepSeekMath (2402.03300); without the std, Dr. GRPO (2503.20783)."""
    rewards = rewards.float()  # (Q, G)
    if rewards.dim() != 2 or rewards.shape[1] < 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite and (Q, G) with G >= 2, got {tuple(rewards.shape)}")
    centered = rewards - rewards.mean(1, keepdim=True)  # (Q, G)
    if normalize_std:
        centered = centered / (rewards.std(1, keepdim=True) + 1e-6)  # (Q, G) ddof 1
    mixed = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)  # (Q, 1)
    return torch.where(mixed, centered, 0.0)


# What the tracker says of a batch: xi, the coefficient which that becomes, the window's mean and (sample) std.
Feedback = namedtuple("Feedback", "xi phi mu_his sigma_his")


class ImprovementTracker:
    """PIPO's new piece: is this batch better than the last K, in units of their own spread? (PIPO, Section 5)
    Read `feedback(mu)` first, then `push(mu)` once: a reward in its own window would bound xi."""

    def __init__(self, window: int = 8, lam: float = 0.1, xi_clip: float | None = None):
        self.window, self.lam, self.xi_clip, self.history = window, lam, xi_clip, deque(maxlen=window)

    def phi(self, xi: float) -> float:
        """The rectifier: a fall counts lambda times a rise."""
        return xi if xi >= 0 else self.lam * xi

    def feedback(self, mu: float) -> Feedback | None:
        """How `mu` compares with the window; None while it fills, or if its rewards are all equal."""
        if len(self.history) < self.window or len(set(self.history)) == 1:
            return None
        mu_his, sigma_his = statistics.mean(self.history), statistics.stdev(self.history)  # ddof 1
        xi = (mu - mu_his) / sigma_his
        if self.xi_clip is not None:
            xi = max(-self.xi_clip, min(self.xi_clip, xi))
        return Feedback(xi, self.phi(xi), mu_his, sigma_his)

    def push(self, mu: float) -> None:
        self.history.append(mu)


def improvement_rewards(advantages: Tensor, phi: float) -> Tensor:
    """(Q, G) advantages of the previous batch, phi -> (Q, G) policy-improvement rewards (Definition 5.1).
    a_i * phi with a_i = G * A_i / sum_j |A_j|, of mean size 1 in every mixed group, however A was normalised:
    for 0/1 rewards 1/(2p) on a right answer and -1/(2(1-p)) on a wrong one. It is 0 in a group without signal."""
    total = advantages.abs().sum(1, keepdim=True)  # (Q, 1)
    return torch.where(total > 0, advantages * advantages.shape[1] * phi / total, 0.0)  # (Q, G)


class Objective(NamedTuple):
    """What sets one base objective apart from the others, and what a run may add to it."""
    normalize_std: bool  # divide the advantage by the group's std
    sequence_ratio: bool  # one ratio a sequence instead of one a token
    clip_low: float
    clip_high: float
    average: str  # "sequence": tokens, then sequences; "token": all alike; "fixed": by N * max_new_tokens
    max_new_tokens: int | None = None  # of "fixed"; default T, right only if padded to the limit
    kl_coef: float = 0.0  # weight of the KL to the reference policy


BASES = {
    "grpo": Objective(True, False, 0.2, 0.2, "sequence"),  # DeepSeekMath, 2402.03300
    "dr_grpo": Objective(False, False, 0.2, 0.2, "fixed"),  # 2503.20783
    "dapo": Objective(True, False, 0.2, 0.28, "token"),  # 2503.14476, without its dynamic sampling
    "gspo": Objective(True, True, 3e-4, 4e-4, "sequence"),  # 2507.18071
}


def policy_loss(logprobs, behavior_logprobs, advantages, mask, objective=BASES["grpo"], ref_logprobs=None,
                n_sequences=None, n_tokens=None):
    """The clipped surrogate: log-probabilities (N, T), advantages (N,), mask (N, T) -> (loss, metrics).
    -min(ratio * A, clip(ratio) * A) with the coefficient inside the min, so that it clips on both signs; with
    `ref_logprobs` plus kl_coef times the k3 estimate of KL(policy || reference), averaged the same way. `n_sequences`,
    `n_tokens`: the whole batch's where this is a part of it, whose losses then add up to the batch's. Metrics are
    means over this mask's tokens: the share clipped, the ratio, and `logprob_gap`, the mean |log-ratio|, which before
    any update is the disagreement of sampler and trainer. Raises ValueError for advantages of another shape."""
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages (N,), mask (N, T) are {tuple(advantages.shape)}, {tuple(mask.shape)}")
    N, T = mask.shape
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # (N, 1)
    log_ratio = (logprobs - behavior_logprobs).masked_fill(mask == 0, 0.0)  # (N, T)
    gap = log_ratio.detach().abs()  # (N, T)
    if objective.sequence_ratio:  # the same all along a row
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand(N, T)  # (N, T)
    ratio, A = log_ratio.exp(), advantages[:, None]  # (N, T), (N, 1)
    plain = ratio * A  # (N, T)
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * A  # (N, T)
    per_token = -torch.min(plain, clipped)  # (N, T)
    means = {"clip_fraction": (clipped < plain).float(), "ratio": ratio.detach(), "logprob_gap": gap}
    if ref_logprobs is not None:
        d = (ref_logprobs - logprobs).masked_fill(mask == 0, 0.0)  # (N, T)
        kl = d.exp() - d - 1  # (N, T) k3: unbiased and never negative
        per_token, means["kl"] = per_token + objective.kl_coef * kl, kl.detach()
    if objective.average == "sequence":
        loss = (per_token * mask / lengths).sum() / (n_sequences or N)
    elif objective.average == "token":
        loss = (per_token * mask).sum() / (n_tokens or mask.sum().clamp(min=1))
    else:
        loss = (per_token * mask).sum() / ((n_sequences or N) * (objective.max_new_tokens or T))
    count = mask.sum().clamp(min=1)
    return loss, {name: ((value * mask).sum() / count).item() for name, value in means.items()}


# ------------------------------------------------------------------------------------------------------------
# The update. The training pass: all padding stands behind, where causal attention never looks, so that no mask is
# needed; logits only where a completion token is predicted, a few at a time. Both steps of an iteration are `update`.

# Rows of logits at a time. Small chunks save memory, but each adds to the head's whole gradient: that takes time.
LOGITS_CHUNK = {"cpu": 256, "cuda": 1024}


def padded(rows, device, side="right") -> Tensor:
    """Lists of numbers as one tensor (n, longest), with zeros behind, or in front if `side` is "left"."""
    rows = [torch.tensor(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_side=side).to(device)


def token_logprobs(model, prompts, tokens, mask, temperature=1.0, chunk=None) -> Tensor:
    """log-probability of each completion token: (n, T), 0 where `mask` is 0, at the temperature of sampling.
    prompts: n lists of token ids; tokens and mask: (n, T), each row of the mask ones and then zeros. The logits
    are the largest tensor of RL on language models (151,936 columns for Qwen3): they are made `chunk` tokens at
    a time, and again in the backward pass instead of being kept."""
    lengths = mask.sum(-1).long().tolist()
    ids = padded([p + c[:n] for p, c, n in zip(prompts, tokens.tolist(), lengths)], model.device)  # (n, S)
    predicts = padded([[False] * (len(p) - 1) + [True] * n + [False] for p, n in zip(prompts, lengths)],
                      model.device)  # (n, S) a completion token comes next
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[predicts]  # (tokens, H)
    targets = ids.roll(-1, 1)[predicts]  # (tokens,)
    head = model.get_output_embeddings()

    def logprob(h, y):  # (chunk, H), (chunk,) -> (chunk,)
        return -F.cross_entropy(head(h).float() / temperature, y, reduction="none")

    chunks = (x.split(chunk or LOGITS_CHUNK[model.device.type]) for x in (hidden, targets))
    pieces = [checkpoint(logprob, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in zip(*chunks)]
    logprobs = torch.zeros_like(mask, dtype=torch.float32)  # (n, T)
    return logprobs.masked_scatter(mask.bool(), torch.cat(pieces))


def microbatches(rows: Tensor, lengths: Tensor, budget: int) -> list[Tensor]:
    """Split `rows` (n,) into parts alike in length, each padded to at most `budget` tokens, or a single row."""
    parts = [[]]
    for i in rows[lengths[rows].argsort(stable=True)].tolist():  # from short to long: row i sets the width
        if parts[-1] and (len(parts[-1]) + 1) * int(lengths[i]) > budget:
            parts.append([])
        parts[-1].append(i)
    return [torch.tensor(part) for part in parts]


def backward(model, batch, part, coefficients, objective, temperature, n_sequences, n_tokens):
    """Add the gradient of the rows `part` (n,): (loss, tokens, mean metrics).
    `n_sequences` and `n_tokens` are the whole minibatch's, so that no split of it changes the gradient."""
    width = int(batch.mask[part].sum(1).max())
    tokens, mask = batch.tokens[part, :width], batch.mask[part, :width]  # (n, width)
    logprobs = token_logprobs(model, [batch.prompts[i] for i in part.tolist()], tokens, mask, temperature)
    ref_logprobs = batch.ref_logprobs[part, :width] if objective.kl_coef else None  # (n, width)
    loss, means = policy_loss(logprobs, batch.behavior_logprobs[part, :width], coefficients[part].to(mask.device),
                              mask, objective, ref_logprobs, n_sequences, n_tokens)
    loss.backward()
    return loss.item(), int(mask.sum()), means


def accumulate(model, batch, rows, microbatch_tokens, *given):
    """`backward` for all `rows` of a minibatch; halves `microbatch_tokens` while memory runs out; returns it, too."""
    while True:
        parts = microbatches(rows, batch.lengths(), microbatch_tokens)
        try:
            return [backward(model, batch, part, *given) for part in parts], microbatch_tokens
        except torch.OutOfMemoryError:
            if len(parts) == len(rows):  # one at a time already
                raise
        model.zero_grad()  # behind the except block, which holds the tensors of the failed pass
        torch.cuda.empty_cache()
        microbatch_tokens //= 2


def update(model, optimizer, batch, coefficients, objective, lr, temperature=1.0, minibatches=1,
           microbatch_tokens=8192, max_grad_norm=1.0) -> dict:
    """Take `minibatches` optimizer steps on a Batch with coefficients (Q, G); returns mean metrics.
    A minibatch without any signal (or KL) takes no step at all: AdamW would move the weights on momentum and decay
    alone. Rows with coefficient 0 are not computed but still count in the denominators. Of several gradient norms
    the largest is returned; means over no token are None. FloatingPointError where loss or norm is not finite."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    coefficients, loss_sum, trained, norms = coefficients.flatten().cpu(), 0.0, 0, []  # (N,)
    sums = dict.fromkeys(["clip_fraction", "ratio", "logprob_gap"] + ["kl"] * (objective.kl_coef > 0), 0.0)
    for minibatch in torch.arange(len(coefficients)).chunk(minibatches):  # groups stay whole
        rows = minibatch if objective.kl_coef else minibatch[coefficients[minibatch] != 0]
        if len(rows) == 0:
            continue
        whole = len(minibatch), batch.mask[minibatch].sum()  # sequences, tokens
        passes, microbatch_tokens = accumulate(
            model, batch, rows, microbatch_tokens, coefficients, objective, temperature, *whole)
        for loss, count, means in passes:
            loss_sum, trained = loss_sum + loss, trained + count
            sums = {name: value + means[name] * count for name, value in sums.items()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
        if not math.isfinite(norm + loss_sum):
            optimizer.zero_grad()
            raise FloatingPointError(f"training broke down: loss {loss_sum}, gradient norm {norm}; try a lower --lr")
        optimizer.step()
        norms.append(norm)
        optimizer.zero_grad()
    return {"loss": loss_sum / max(1, len(norms)), "grad_norm": max(norms, default=0.0), "lr": lr,
            "skipped_steps": minibatches - len(norms), "microbatch_tokens": microbatch_tokens,
            **{name: value / trained if trained else None for name, value in sums.items()}}


# ------------------------------------------------------------------------------------------------------------
# One iteration. PIPO on one screen, in the order of the README's eight steps. What it adds to a trainer are steps
# 4, 5, 6 and 8, with ImprovementTracker and improvement_rewards; the helpers above `iteration` say how, not what.


def rng(device, *key) -> torch.Generator:
    """A generator that depends on `key` alone, so that no draw depends on how many were made before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))  # 7 bytes fit an int64


@torch.no_grad()
def trainer_logprobs(model, batch: Batch, temperature: float, microbatch_tokens: int) -> Tensor:
    """The log-probabilities (N, T) of a batch under `model`, as the training pass computes them."""
    model.train()
    logprobs = torch.zeros_like(batch.mask)  # (N, T)
    for part in microbatches(torch.arange(len(logprobs)), batch.lengths(), microbatch_tokens):
        prompts = [batch.prompts[i] for i in part.tolist()]
        logprobs[part] = token_logprobs(model, prompts, batch.tokens[part], batch.mask[part], temperature)
    return logprobs


def rollout(run: Run, problems: list[Problem], cfg: Config) -> Batch:
    """Sample B_t, with the log-probabilities that the ratio is against; UserError if at step 1 training's differ."""
    generator = rng(run.model.device, cfg.seed, "sample", run.step)
    batch = sample(run.model, run.tokenizer, [problem.prompt for problem in problems], cfg.group_size,
                   cfg.max_new_tokens, cfg.temperature, cfg.top_p, generator, run.cache_tokens)
    run.cache_tokens = batch.cache_tokens
    is_rounded = run.model.dtype == torch.bfloat16
    is_too_coarse = is_rounded and cfg.base == "gspo"  # whose clip is narrower than the sampler's rounding
    if run.step == 1 or is_too_coarse:
        recomputed = trainer_logprobs(run.model, batch, cfg.temperature, run.microbatch_tokens)  # (N, T)
        gap = (recomputed - batch.behavior_logprobs).abs().sum().item() / batch.mask.sum().item()
        if run.step == 1 and gap > (0.1 if is_rounded else 0.01):
            raise UserError(f"unsupported model: sampler and trainer disagree by {gap:.2g} in a log-probability")
        if is_too_coarse:
            batch.behavior_logprobs = recomputed
    return batch


def own_grade(reward, text: str, problem: Problem) -> float:
    """What a reward function of the user's own says; UserError where it fails, or says no finite number."""
    with explained_as(f"the reward function fails for {text[-60:]!r} as the answer to {problem.text[:60]!r}"):
        value = float(reward(text, "".join(problem.golds[:1]), problem.row))
        if not math.isfinite(value):
            raise ValueError(f"it returned {value}")
    return value


def grade_all(batch: Batch, problems: list[Problem], reward=None) -> tuple[Tensor, Counter]:
    """Rewards (Q, G), and how often a completion could not be judged, by cause.
    A `reward` of one's own may return any finite number: mu and xi are then of that scale's mean, and
    G * A / sum |A| still has mean size 1. It is called from a few threads, since some rewards wait for a judge."""
    G = len(batch.texts) // len(problems)
    asked = [problem for problem in problems for _ in range(G)]  # N
    if reward is None:
        grades = [max((grade(text, gold, problem.thinking) for gold in problem.golds), key=lambda found: found[0])
                  for text, problem in zip(batch.texts, asked)]
    else:
        with ThreadPoolExecutor(8) as threads:
            grades = [(value, None) for value in threads.map(partial(own_grade, reward), batch.texts, asked)]
    rewards = torch.tensor([value for value, _ in grades], device=batch.tokens.device).view(-1, G)  # (Q, G)
    return rewards, Counter(cause for value, cause in grades if cause and not value)


def feedback_coefficient(feedback: Feedback | None, run: Run, cfg: Config) -> tuple[float, str]:
    """What the verification step is scaled with, and why in a word: phi(xi), or a control in its place."""
    if cfg.feedback == "none":
        return 0.0, "off"
    if feedback is None:
        return 0.0, "warmup" if len(run.tracker.history) < cfg.window else "sigma_zero"
    value = cfg.constant if cfg.feedback == "constant" else feedback.phi
    return value, "positive" if value > 0 else "negative" if value < 0 else "zero"


def iteration(run: Run, problems: list[Problem], cfg: Config) -> tuple[Batch, dict]:
    """One iteration of PIPO on Q problems; carries `run` on and returns B_t and a row of metrics."""
    run.step, clock = run.step + 1, [time.perf_counter()]
    objective = BASES[cfg.base]._replace(max_new_tokens=cfg.max_new_tokens)
    how = dict(temperature=cfg.temperature, minibatches=cfg.minibatches, max_grad_norm=cfg.max_grad_norm,
               microbatch_tokens=run.microbatch_tokens)

    # 1. sample B_t ~ pi_theta_t
    batch = rollout(run, problems, cfg)
    clock.append(time.perf_counter())
    # 2. grade it; mu_t is the mean over every sample, before any is left out
    batch.rewards, failures = grade_all(batch, problems, run.reward)  # (Q, G)
    mu = batch.rewards.mean(dtype=torch.float64).item()
    # 3. how much better each sample did than its group
    batch.advantages = group_advantages(batch.rewards, objective.normalize_std)  # (Q, G)
    clock.append(time.perf_counter())

    # 4. look back, did the last updates help? xi against the last K rewards; 5. phi, or a control in its place
    feedback = run.tracker.feedback(mu)
    coefficient, verdict = feedback_coefficient(feedback, run, cfg)
    # 6. verification: a second step on B_{t-1}, its ratio against the policy that sampled it
    verification = {}
    if coefficient:
        pi_rewards = improvement_rewards(run.previous.advantages, coefficient)  # (Q, G)
        if pi_rewards.any():
            verification = update(run.model, run.optimizer, run.previous, pi_rewards, objective,
                                  lr=cfg.pi_lr or cfg.lr, **how)
        else:
            coefficient, verdict = 0.0, "zero_signal"
    clock.append(time.perf_counter())
    # 7. exploration: the base algorithm's step on B_t, its ratio still against the policy that sampled it
    if cfg.kl_coef:  # in this step alone
        objective = objective._replace(kl_coef=cfg.kl_coef)
        batch.ref_logprobs = trainer_logprobs(run.reference, batch, cfg.temperature, run.microbatch_tokens)
    for _ in range(cfg.epochs):
        exploration = update(run.model, run.optimizer, batch, batch.advantages, objective, lr=cfg.lr, **how)
    clock.append(time.perf_counter())
    # 8. push mu_t, once, after it was read; keep B_t
    run.tracker.push(mu)
    run.previous, run.microbatch_tokens = batch, exploration["microbatch_tokens"]
    phases = ("sample", "grade", "verification", "exploration")
    return batch, {
        "step": run.step, "mu": mu, "feedback": verdict, "coefficient": coefficient,
        **(feedback or Feedback(None, None, None, None))._asdict(), **exploration,
        **{f"pi_{name}": value for name, value in verification.items()}, **batch.metrics(),
        **{f"grader_{cause}": count for cause, count in failures.items()},
        **{f"seconds_{phase}": end - start for phase, start, end in zip(phases, clock, clock[1:])}}


# ------------------------------------------------------------------------------------------------------------
# Training. The loop around `iteration`: what it starts from, which problems it gets, what is said and kept.


def pick_problems(problems: list[Problem], step: int, cfg: Config) -> list[Problem]:
    """The prompts of a step: consecutive pieces of one fresh shuffle an epoch, found from the step alone."""
    n, Q = len(problems), cfg.prompts_per_step
    places = range((step - 1) * Q, step * Q)
    orders = {epoch: torch.randperm(n, generator=rng("cpu", cfg.seed, "order", epoch)).tolist()
              for epoch in {place // n for place in places}}
    return [problems[orders[place // n][place % n]] for place in places]


def evaluate(run: Run, held_out: dict[str, list[Problem]], cfg: Config, generator=None) -> dict:
    """pass@1 of each held-out set, the mean over --eval-samples a problem, its standard error over problems.
    It is called "reward" where a function of the user's own gives it. With several samples also the unbiased
    pass@k (2107.03374) for k = 2, 4, ... where rewards are 0 or 1; `eval_*` is the mean over the sets."""
    start, scores, n = time.perf_counter(), {}, cfg.eval_samples
    measure = "pass@1" if run.reward is None else "reward"
    few = FEW_PROBABILITIES // run.model.get_input_embeddings().num_embeddings
    for name, problems in held_out.items():
        batch = sample(run.model, run.tokenizer, [p.prompt for p in problems], n, cfg.max_new_tokens, cfg.temperature,
                       cfg.top_p, generator, run.cache_tokens, max(few, cfg.prompts_per_step * cfg.group_size))
        rewards = grade_all(batch, problems, run.reward)[0].double()  # (Q, n)
        found = {measure: rewards.mean(), "stderr": rewards.mean(1).std(correction=0) / math.sqrt(len(problems)),
                 "truncated": batch.truncated.float().mean()}
        is_right_or_wrong = torch.equal(rewards, (rewards == 1).double())
        for k in [2**i for i in range(1, n.bit_length())] if is_right_or_wrong else []:
            misses = [math.comb(n - int(right), k) / math.comb(n, k) for right in rewards.sum(1)]
            found[f"pass@{k}"] = 1 - statistics.mean(misses)
        scores |= {f"eval/{name}/{key}": float(value) for key, value in found.items()}
    for key, total in ((measure, sum), ("stderr", lambda errors: math.hypot(*errors)), ("truncated", sum)):
        scores[f"eval_{key}"] = total([scores[f"eval/{name}/{key}"] for name in held_out]) / len(held_out)
    return scores | {"seconds_evaluation": time.perf_counter() - start}


def show_samples(batch: Batch, problems: list[Problem], step: int) -> None:
    """A right and a wrong completion of the batch, where it has both."""
    rewards, G = batch.rewards.flatten(), batch.rewards.shape[1]  # (N,)
    for i in sorted({int(rewards.argmax()), int(rewards.argmin())}):
        problem, text = problems[i // G], batch.texts[i]
        say(f"step {step}, reward {rewards[i]:g}, gold {problem.golds[:1]}: {problem.text[-100:]!r} -> {text[-300:]!r}")


def load_reward(spec: str):
    """The function that `file.py:name` names, of the file imported as a module."""
    path, _, name = spec.rpartition(":")
    sys.path.insert(0, str(Path(path).absolute().parent))  # for what stands beside it, too
    with explained_as(f"--reward is {spec!r}: it must be file.py:function"):
        return getattr(import_module(Path(path).stem), name)


def set_up(cfg: Config, out: Path, state: dict | None, reward):
    """The run at its start, or where its checkpoint `state` left it, its problems, and the held-out ones by set."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length: in decoding, for every token
    device, path, own = torch.device(cfg.device), cfg.model or str(out / "start"), reward is not None
    if cfg.model:
        rows = load_rows(cfg.dataset, "train") if cfg.steps else None
        eval_sets = {name: load_rows(name, "test") for name in cfg.eval_dataset}
    else:
        eval_rows, warm, rows = demo_rows(cfg.seed)
        eval_sets = {"demo": eval_rows} if cfg.eval_every else {}
        if not state:
            build_demo(path, cfg, warm, device)
    masters_on = fit_memory(cfg, path, device)
    with explained_as(f"the tokenizer of {path} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    problems = read_problems(rows, tokenizer, cfg, cfg.dataset or "the demo", own) if cfg.steps else []
    held_out = {}
    for name, eval_rows in eval_sets.items():
        label = Path(name).stem if Path(name).stem not in held_out else name
        held_out[label] = read_problems(eval_rows, tokenizer, cfg, name, own, held_out=True)
    prompts = [problem.prompt for some in (problems, *held_out.values()) for problem in some]
    model = load_model(path, device, cfg.dtype, max(map(len, prompts)) + cfg.max_new_tokens)
    # vocab_size leaves out added tokens, which matter in a prompt only: gemma-3-1b has no row for its image's
    if max(tokenizer.vocab_size - 1, *map(max, prompts)) >= model.get_input_embeddings().num_embeddings:
        raise UserError(f"the tokenizer of {path} has tokens that the model has no embedding for")
    run = Run(model, tokenizer, None, ImprovementTracker(cfg.window, cfg.lam, cfg.xi_clip), reward=reward,
              name=f"{out.name}-{time.time():.0f}", microbatch_tokens=cfg.microbatch_tokens)
    if cfg.kl_coef:
        run.reference = load_model(path, device, cfg.dtype).requires_grad_(False)
    if cfg.lora:
        run.adapters = add_adapters(model, cfg)
    if cfg.steps:
        run.optimizer = MasterAdamW(model.parameters(), masters_on, lr=cfg.lr, weight_decay=cfg.weight_decay)
    run.cache_tokens = cfg.cache_tokens or (state or {}).get("cache_tokens") or cache_room(run, cfg)
    if state:
        load_checkpoint(run, state, problems, out)
    else:
        for name in RUN_FILES:  # of an earlier run, folders and files
            shutil.rmtree(out / name, ignore_errors=True)
            (out / name).unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2))
    return run, problems, held_out


def loop(run: Run, problems: list[Problem], held_out: dict, cfg: Config, out: Path, board) -> None:
    """Iterations until cfg.steps or a signal to stop, with evaluations, rows of metrics, and checkpoints."""
    def finish(row, is_evaluated):
        if is_evaluated:  # each time with the same random numbers
            row |= evaluate(run, held_out, cfg, rng(run.model.device, cfg.seed, "evaluation"))
            say(f"step {run.step}: " + ", ".join(f"{key[5:]} {row[key]:.3f}" for key in row if key.startswith("eval/")))
        with open(out / "metrics.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        if board:
            board.log(row, step=run.step)

    if run.step == 0 and held_out:
        finish({"step": 0}, is_evaluated=True)
    with signals_caught() as caught, tqdm(initial=run.step, total=cfg.steps, desc="pipo", unit="step") as bar:
        while run.step < cfg.steps and not caught:
            asked = pick_problems(problems, run.step + 1, cfg)
            batch, row = iteration(run, asked, cfg)
            row["memory_gb"] = torch.cuda.max_memory_allocated(run.model.device.index) / 2**30  # 0 on a CPU
            finish(row, held_out and (run.step == cfg.steps or run.step % cfg.eval_every == 0))
            if cfg.show_every and run.step % cfg.show_every == 0:
                show_samples(batch, asked, run.step)
            bar.set_postfix({name: row[name] for name in ("mu", "xi", "phi") if row[name] is not None})
            bar.update()
            if cfg.save_every and (caught or run.step == cfg.steps or run.step % cfg.save_every == 0):
                save_checkpoint(run, problems, cfg, out)
    if run.step < cfg.steps:
        raise KeyboardInterrupt(f"stopped after step {run.step}{'; --resume goes on' if cfg.save_every else ''}")


def train(cfg: Config, reward=None) -> list[dict]:
    """Run PIPO as `cfg` says; returns the rows of metrics.jsonl.
    `reward`: (completion, answer, row of the data set) -> number, in place of the verifier. Raises UserError for what
    the user can put right, FloatingPointError for numbers that are not finite, KeyboardInterrupt after a signal."""
    cfg = settled(cfg, own_reward=reward is not None)
    reward, out = reward or (load_reward(cfg.reward) if cfg.reward else None), Path(cfg.out)
    run, problems, held_out = set_up(cfg, out, open_run(cfg, out), reward)
    say(f"{run.step} of {cfg.steps} steps done; {run.model.num_parameters():,} weights on {cfg.device}; files: {out}")
    board = import_module(cfg.tracker) if cfg.tracker else None  # wandb, or trackio with its three calls
    if board:
        own = {"id": run.name} if cfg.tracker == "wandb" else {}  # the same when resumed; trackio goes by the name
        board.init(project=os.getenv("WANDB_PROJECT", "pipo"), name=run.name, config=vars(cfg), resume="allow", **own)
    try:
        loop(run, problems, held_out, cfg, out, board)
    finally:
        if board:
            board.finish()
    if cfg.steps:
        save_model(run, out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# Sampling. Each prompt is read once and its cache copied to the G rows of its group. The sampler alone knows what was
# drawn and how likely it was, so the mask and the behavior policy's log-probabilities come from here.


# Rows * V of a wave in an evaluation, whatever Q * G is: so many probabilities take little room (64 MB).
FEW_PROBABILITIES = 2_000_000


def eos_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: Qwen3 has two, and models that miss one ramble on."""
    configured = model.generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    if tokenizer.chat_template:  # the EOS of a base model ends a document; its template ends a turn otherwise
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        _, answer, tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")
        first = tokenizer(tail.strip(), add_special_tokens=False).input_ids[:1] if answer else []
        ids.update(i for i in first if i in tokenizer.added_tokens_decoder)
    return sorted(ids - {None})


def draw(logits, temperature=1.0, top_p=1.0, generator=None) -> tuple[Tensor, Tensor]:
    """Draw one token a row from (n, V) logits; temperature 0 takes the likeliest.
    Returns tokens (n,) and their log-probabilities (n,) under softmax(logits / temperature), before top-p
    restricts what may be drawn: that is what the training step can compute again. (At temperature 0: at 1.)"""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (n, V)
    if temperature == 0:
        tokens = logprobs.argmax(-1)  # (n,)
    else:
        probs = logprobs.exp()  # (n, V)
        if top_p < 1:
            ranked, order = probs.sort(descending=True)  # (n, V)
            ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # the first token always stays
            probs = torch.zeros_like(probs).scatter(-1, order, ranked)  # (n, V)
        # one uniform number a row, not one a token; fp32 sums would lose the tail of a large V
        sums = probs.cumsum(-1, dtype=torch.float64)  # (n, V)
        u = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device, generator=generator)  # (n, 1)
        tokens = torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(max=sums.shape[1] - 1)[:, 0]  # (n,)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def shared_heads_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' SDPA; at one new token a row, the queries that share a key-value head become its rows.
    Under a mask transformers would copy every key-value head to each of its queries, at every token: most of the time
    of sampling. query (n, heads, S, D), key and value (n, kv heads, S', D)."""
    n, heads, S, D = query.shape
    if S > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    query = query.reshape(n, key.shape[1], -1, D)  # (n, kv heads, queries of each, D)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(n, 1, heads, value.shape[-1]), None


transformers.AttentionInterface.register("shared_heads", shared_heads_attention)
transformers.AttentionMaskInterface.register("shared_heads", sdpa_mask)


class RoomyLayer(DynamicLayer):
    """A layer of the key-value cache that writes into room made beforehand; transformers' copies itself."""

    def __init__(self, all_keys, all_values, room):
        """Tensors (n, heads, columns, D), of which the last `room` columns are free."""
        super().__init__()
        self.is_initialized = True
        self.all_keys, self.all_values = all_keys, all_values
        self.keys, self.values = all_keys[:, :, :-room], all_values[:, :, :-room]  # (n, heads, P, D)

    def update(self, keys, values, *_, **__):
        """Write the next token's keys and values (n, heads, 1, D) behind those held; returns them all."""
        P = self.keys.shape[2]
        self.all_keys[:, :, P:P + 1], self.all_values[:, :, P:P + 1] = keys, values
        self.keys, self.values = self.all_keys[:, :, :P + 1], self.all_values[:, :, :P + 1]
        return self.keys, self.values


def move_rows(caches: list[Cache], rows: Tensor, room: int) -> Cache:
    """A cache of the given rows of `caches` (counted through, repeats allowed), with `room` free columns.
    Empties `caches` layer by layer, so that the old memory is free before the next layer's is taken."""
    def moved(pieces, name):
        held = [vars(piece).pop(name) for piece in pieces]
        for piece in pieces:
            vars(piece).pop("all_" + name, None)
        held = torch.cat(held) if len(held) > 1 else held[0]
        return F.pad(held[rows], (0, 0, 0, room))  # (n, heads, P + room, D)

    return Cache([RoomyLayer(moved(pieces, "keys"), moved(pieces, "values"), room)
                  for pieces in zip(*(cache.layers for cache in caches))])


def cache_name(model) -> str:
    """What a forward pass calls the key-value cache: transformers renames it (5.20 knows one, 5.40 the other)."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def prefill(model, prefixes: list[tuple], prefill_tokens: int):
    """Read n prefixes, equal ones once, `prefill_tokens` at a time.
    Returns their q caches in pieces, the next token's logits (n, V), what is no padding (n, P), and which of
    the q each row is (n,)."""
    place = {prefix: k for k, prefix in enumerate(dict.fromkeys(prefixes))}
    ids = padded(place, model.device, "left")  # (q, P)
    seen = padded([[1] * len(prefix) for prefix in place], model.device, "left")  # (q, P)
    caches, logits = [], []
    last = torch.tensor([-1], device=model.device)  # 1 makes a view of the states, for which a frozen head is copied
    for part, mask in zip(*(x.split(max(1, prefill_tokens // ids.shape[1])) for x in (ids, seen))):
        caches.append(DynamicCache())
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        output = model(part, attention_mask=mask, position_ids=position_ids, use_cache=True, logits_to_keep=last,
                       **{cache_name(model): caches[-1]})
        logits.append(output.logits[:, -1])
    rows = torch.tensor([place[prefix] for prefix in prefixes], device=model.device)  # (n,)
    return caches, torch.cat(logits)[rows], seen[rows], rows


def decode_chunk(model, cache, seen, token, logits, steps, pick):
    """Draw `steps` tokens for each of n rows; nothing is read back meanwhile, so that the GPU never waits.
    seen (n, P); the last token drawn (n,), not in the cache yet, or None and the next one's logits (n, V);
    `pick` is `draw` with its settings. Returns tokens (n, steps), their log-probabilities, and `seen` as it is now."""
    tokens, logprobs, name = [], [], cache_name(model)
    config = model.config.get_text_config()
    is_plain = config._attn_implementation == "shared_heads" and not getattr(config, "sliding_window", None)
    for _ in range(steps):
        if token is not None:
            seen = F.pad(seen, (0, 1), value=1)  # (n, P + 1)
            position_ids = seen.sum(-1, keepdim=True) - 1  # (n, 1)
            # where all layers look at all tokens, a ready mask: transformers would wait for the GPU to make one
            mask = seen[:, None, None].bool() if is_plain else seen
            logits = model(token[:, None], attention_mask=mask, position_ids=position_ids, use_cache=True,
                           **{name: cache}).logits[:, -1]  # (n, V)
        token, logprob = pick(logits)  # (n,), (n,)
        tokens.append(token)
        logprobs.append(logprob)
    return torch.stack(tokens, 1), torch.stack(logprobs, 1), seen


@dataclass
class Row:
    """One completion while it grows."""
    tokens: list[int]  # those of the prompt, then those that were drawn, as many as there are logprobs
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    def take(self, tokens, logprobs, eos, limit):
        """Append what was drawn up to the first EOS, or to `limit` tokens in all."""
        n = next((k for k, token in enumerate(tokens, 1) if token in eos), len(tokens))
        n = min(n, limit - len(self.logprobs))
        self.tokens += tokens[:n]
        self.logprobs += logprobs[:n]
        self.ended = self.tokens[-1] in eos or len(self.logprobs) == limit


def carry_on(model, wave: list[Row], pick, eos: set[int], limit: int, room: int, chunk: int, prefill_tokens: int):
    """Carry on rows, `chunk` tokens at a time, until each has ended or, where `room` gets scarce, has to wait."""
    caches, logits, seen, kept = prefill(model, [tuple(row.tokens) for row in wave], prefill_tokens)
    token = None
    while wave:
        caches = [move_rows(caches, kept, chunk)]
        steps = min(chunk, limit - min(len(row.logprobs) for row in wave))
        tokens, logprobs, seen = decode_chunk(model, caches[0], seen, token, logits, steps, pick)
        if not logprobs.isfinite().all():
            raise FloatingPointError("the model's probabilities are not finite")
        for row, new_tokens, new_logprobs in zip(wave, tokens.tolist(), logprobs.tolist()):
            row.take(new_tokens, new_logprobs, eos, limit)
        alive = [k for k, row in enumerate(wave) if not row.ended]
        fit = max(1, room // (seen.shape[1] + 1 + chunk))  # after one more chunk; the others wait
        kept = torch.tensor(alive[:fit], dtype=torch.long, device=model.device)
        wave, seen, token = [wave[k] for k in alive[:fit]], seen[kept], tokens[kept, -1]


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size=1, max_new_tokens=256, temperature=1.0, top_p=1.0,
           generator=None, cache_tokens=sys.maxsize, rows_a_wave=None, chunk=None, prefill_tokens=16384) -> Batch:
    """Sample `group_size` completions of each of Q prompts (lists of token ids); temperature 0 is greedy.
    Works in waves of as many rows as the cache has room for, at most `rows_a_wave`. Every `chunk` tokens the rows
    that have ended are dropped, and where the rest would outgrow `cache_tokens`, some wait for a later wave, which
    reads in what they have so far. After running out of memory a wave's rows wait again, from the second time on for
    one with less room; only a single row that does not fit raises. FloatingPointError where probabilities are not
    finite."""
    model.eval()
    device, eos, room = model.device, set(eos_ids(model, tokenizer)), cache_tokens
    chunk = chunk or max(1, min(max_new_tokens // 8, 128))  # a row that has ended is carried on to the chunk's end
    pick = partial(draw, temperature=temperature, top_p=top_p, generator=generator)
    prompts = [prompt for prompt in prompts for _ in range(group_size)]  # N
    rows = [Row([*prompt]) for prompt in prompts]  # N
    waiting, out_of_memory = rows, 0
    while waiting:
        waiting = sorted(waiting, key=lambda row: len(row.tokens))  # alike in length: little padding
        fitting = sum(k * (len(row.tokens) + chunk) <= room for k, row in enumerate(waiting, 1))
        n = max(1, min(fitting, rows_a_wave or fitting))
        try:
            carry_on(model, waiting[:n], pick, eos, max_new_tokens, room, chunk, prefill_tokens)
        except torch.OutOfMemoryError:
            out_of_memory += 1
            if n == 1:
                raise
            if out_of_memory > 1:
                room = int(0.8 * min(room, sum(len(row.tokens) + chunk for row in waiting[:n])))
        # behind the except block, which holds a failed pass; what comes next wants pieces of other sizes
        torch.cuda.empty_cache()
        waiting = [row for row in waiting[n:] + waiting[:n] if not row.ended]
    drawn = [row.tokens[-len(row.logprobs):] for row in rows]
    tokens = padded(drawn, device)  # (N, T) T is the longest's
    behavior_logprobs = padded([row.logprobs for row in rows], device)  # (N, T)
    mask = padded([[1.0] * len(row.logprobs) for row in rows], device)  # (N, T)
    truncated = torch.tensor([row.tokens[-1] not in eos for row in rows], device=device)  # (N,)
    # Ends, padding and BOS are hidden; other special tokens, as those of a thought or a tool, can be the answer's.
    hidden = {tokenizer.pad_token_id, tokenizer.bos_token_id} | eos
    texts = [tokenizer.decode([token for token in completion if token not in hidden]) for completion in drawn]
    return Batch(prompts, tokens, mask, behavior_logprobs, truncated, texts, room, out_of_memory)


# ------------------------------------------------------------------------------------------------------------
# Verifying. The verifier is the objective: a wrong "no" punishes a right answer, a wrong "yes" is a hole. An answer is
# found, cleaned, read by recursive descent into numbers, and compared; nothing is executed, and all work is limited.

MAX_TEXT = 1_000  # characters of an answer
MAX_BITS = 20_000  # binary exponent of a power
MAX_WORK = 20_000  # of computing and comparing, some microseconds each
BITS = 640  # precision of all numbers
TINY = mpmath.mpf(2) ** -(BITS // 2)  # relative: far above rounding errors, far below honest differences
POINTS = 12  # where expressions in variables are compared


class Refused(Exception):
    """The text is not in the grammar ("unparsed"), or would take too much work ("too_big")."""


def require(condition, cause="unparsed"):
    """Refused for that cause where the condition does not hold."""
    if not condition:
        raise Refused(cause)


# --- Where an answer is looked for

BRACED = ""
for _ in range(20):
    BRACED = rf"(?:[^{{}}\\]|\\.|\{{{BRACED}\}})*"  # balanced braces, that deep
BOX = re.compile(rf"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{{({BRACED})\}}|([^\s${{}}]*))", re.DOTALL)
TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
HASHES = re.compile(r"(?<!#)####(?!#)(?!\W{0,9}(?:final|answer|step|solution)\b)[ \t]*(\S.*)", re.I)
# "the answer is", then math with no more behind it (not $5$ or $6$, $2$ fifths), or the rest of the sentence
CUE = re.compile(r"(?:(?:final\s+)?answer\b[^.\n]{0,40}?(?:\bis\b|\bare\b|:|=)|final\s+answer)[\s*_:]*(?=\S)"
                 r"(?:\$\$?([^$]+)\$\$?(?!\$| *(?:, *(?:or|and)\b|[A-Za-z]))|(.*?)(?:\.\s|\.?$|\n))", re.I)


def extract_answer(text: str, thinking: bool = False) -> str | None:
    """The final answer of a completion as it was written, or None.
    The last box; without any box <answer>x</answer>, then the last `#### x`, then "the answer is x" near the end.
    Thoughts do not count (`thinking`: the prompt opened one). A truncated last box, or bare numbers, are no answer."""
    parts = ("</think>" + "<think>" * thinking + text).split("<think>")  # the first is no thought
    text = "\n".join(part.rpartition("</think>")[2] for part in parts if "</think>" in part)
    last = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"), 0)
    box = BOX.match(text, last, last + 10 * MAX_TEXT)
    tail = re.sub(r"<\|[^|>]*\|>|</s>|<eos>", "\n", text[-10 * MAX_TEXT:])
    found = TAGGED.findall(tail) or HASHES.findall(tail) or CUE.findall(tail[-MAX_TEXT:]) or [""]
    answer = box[1] or box[2] or "" if box else "".join(found[-1]).replace("**", "")
    return answer.strip(" \t\n*") or None


# --- How a text is cleaned


def table(text):
    """'a b c; d e': b and c stand for a, e stands for d."""
    return {name: row.split()[0] for row in text.split(";") for name in row.split()}


# One spelling of each sign; words are in quotes by then.
SPELLINGS = table(r"""* \cdot \times × ·; / \div ÷; - − – —; ^ **; < \lt; <= \le \leq \leqslant ≤; > \gt;
    >= \ge \geq \geqslant ≥; = \equiv; ≈ \approx; ∈ \in; ± \pm; ∪ \cup; \pi π "pi" pi; ∞ \infty; ^2 ²; ^3 ³;
    ° \circ \degree; \sqrt √ "sqrt" sqrt; \frac \dfrac \tfrac \cfrac; \binom \dbinom; ( \langle; ) \rangle;
    : \colon; | \mid \vert \lvert \rvert; % \%; $ \$; , 、 ， "or"; & "and"; \{\} \emptyset \varnothing ∅;
    ' \prime; (-∞,∞) \mathbb{R} ℝ; (0/0) "nan" nan; \log \lg log; \ln ln; \sin sin; \cos cos; \tan tan;
    e^ \exp; \asin \arcsin \sin^{-1}; \acos \arccos \cos^{-1}; \atan \arctan \tan^{-1}; \frac12 ½""")
# Different units are never equal; other trailing words are merely dropped. A plural -s is gone by then.
UNITS = table("""mm millimeter; cm centimeter; m meter; km kilometer; mi mile; inch inche in; yard yd; ft foot
    feet; mg; g gram; kg kilogram; lb pound; oz ounce; s second sec; ms; minute min; h hour hr; day; week;
    month; year; am; pm; l liter L; ml; mph; hz; cent ¢; $ dollar; € euro; £; % percent; ° degree; C celsius;
    A; T; Ω ohm; F fahrenheit; radian; / per; N newton; J joule; W watt; V volt; K kelvin""")
# Words that change what is before them, so that it is no longer the answer.
HEDGES = re.compile(r"""half|halve|third|quarter|[efhnst]\w*[dfhnrx]th|\w+t(?:y|ieth)|\w+teen(?:th)?|zero|one|two|three
    |four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|hundred|thousand|\w*illion(?:th)?|k|M|bn|mil|lakh|crore
    |score|gross|not|neither|maybe|perhaps?|possibly|probably|likely|but|if|unless|except|alternatively|less|fewer|more
    |greater|least|most|about|approx\w*|around|roughly|nearly|almost|ish|up|otherwise|plus|below|point|squared?|cubed?
    |factorial|root|once|twice|thrice|(?:doubl|halv|tripl)ed?|negat\w+|inverse|reciprocal|recurring|repeating|remainder
    |max\w*|min\w*mum|\w+uary|march|april|may|june|july|august|(?:septem|octo|novem|decem)ber""", re.X)
SHORT = "|".join([name for name in UNITS if name.isalpha() and len(name) > 1] + ["or", "and", "not"])
GREEK = "alpha|beta|gamma|[dD]elta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|(?:var)?phi|psi|omega|Omega|pi"
# a variable: x, \alpha, x_1, f', f(x), I(0), or a number in another base: 204_5
NAME = (rf'(?:∞|\\(?:{GREEK})(?![a-zA-Z])|d[p-z]\b|[A-Za-z]|"\w"|\d+(?=_))(?:_(?:\d+|\w|\{{[^{{}}]*\}}))*'
        r"'*(?:\(0\)|(?<=[fgh'])\([^()]*\))?")


def quoted(match):
    """Words in quotes, each on its own, in lower case and without a plural -s."""
    words = re.sub(r"\.(?!\d)|(?<=[a-z])['’-](?=[a-z])|\b(?:a|the) (?=[a-z]{2})", "", match[match.re.groups])
    return re.sub(r"([^\W\d_]+?)(?:(?<=[^\W\d_]{2})(?<![su])s)?(?![^\W\d_])",
                  lambda word: f' "{word[1].lower() if word[1][1:] else word[1]}" ', words)


def interval(match):
    """-1<=x<5 as x∈[-1,5)."""
    low, first, name, last, high = match.groups("")
    if ">" in first + last:
        low, first, last, high = high, last, first, low
    return f"{name}∈{'(['['=' in first]}{low or '-∞'},{high or '∞'}{')]'['=' in last]}"


# Applied one after the other: patterns, and what becomes of their matches.
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\\\\(?:\[[\w.]+\])?", " ; "),  # the end of a matrix's row
    (r";?\s*\\(begin|end)\{(?:[pb]?matrix|array|cases)\}(?:\{[clr| ]+\})?", lambda m: "⟦⟧"[m[1] == "end"]),
    (r"(?<=\d)(?:\{,\}|,?\\[,!]|\\[ ;:]|[ ~])\s*(?=\d{3}(?!\d))", ""),  # 1{,}234, 1\,234  ->  1234
    # 1,234  ->  1234, but not in (1,234)
    (r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,]|[^()[\]]*[)\]]|.*\\\})", lambda m: m[0].replace(",", "")),
    (r'["“”`~]|(?<!\\)\$|\\[,!;:>()\[\] ]|\\(?:left|right)\.|\\(?:text)?color\{\w+\}|(?<=\d)(?:st|nd|rd|th)\b'
     r"|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|q?quad|underline|blacksquare|mathbf|bf|rm)\b", " "),
    (r"^ *(?=[A-H]{2})A?B?C?D?E?F?G?H? *$", lambda m: ",".join(m[0].strip())),  # BCD  ->  B,C,D
    (r"^\s*(?=.*(?:[A-Za-z]{4}|[A-Z][A-Za-z]|[eiou]))([A-Za-z][A-Za-z\s.,'’-]+)$", quoted),  # No  ->  "no"
    # 5\text{cm}  ->  5 "cm", \overline{AB}  ->  "ab"
    (r"\\(?:text(?:bf|it|rm)?|[mh]box|mathrm|operatorname|overline(?=\{[A-Z]{2}))\*?\s*\{([^{}]*)\}", quoted),
    # 5 red apples, 5cm, but 6xyzw is a product
    (r'(?<![\\A-Za-z"\d])(?:[A-Za-z]{2,} +)*[A-Za-z]{4,}(?: +(?:a|[A-Za-z]{2,})\b)*'
     rf'|(?<=[\d }}])(?i:{SHORT})s?(?![A-Za-z])', quoted),
    ("|".join(r"(?<![A-Za-z\\])" * name[0].isalpha() + re.escape(name) + "(?![A-Za-z])" * name[-1].isalpha()
              for name in sorted(SPELLINGS, key=len, reverse=True)), lambda m: SPELLINGS[m[0]]),
    (r"(?<!\w)\s+|\s+(?!\w)", ""),  # only "2 3" and "\pi r" need a space
    (r'\^\{?(°|"(?:st|nd|rd|th)")\}?|([$€£])(\d+(?:\.\d+)?)', r"\1\3\2"),  # 45^{°}, $5  ->  45°, 5$
    (r'"(sq|cu)(?:uare|bic)?"("\w+")', lambda m: f"{m[2]}^{2 if m[1] == 'sq' else 3}"),  # "square""foot"
    (r'\\frac\{("\w+")\}\{("\w+"[^{}]*)\}', r"\1/\2"),  # \frac{"m"}{"s"}  ->  "m"/"s"
    (r"(?<=\d) ?x ?(?=10\^)", "*"),  # 3x10^8  ->  3*10^8
    (r"(\\frac|\\binom) ?(?:\{([^{}]*)\}|(\d)) ?(\d)", r"\1{\2\3}{\4}"),  # \frac12  ->  \frac{1}{2}
    (r"(?<![\w.^}/])(\d+)(?:\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+)\b)", r"(\1+\2\4/\3\5)"),  # 1\frac{4}{5}
    (r"(\\(?:sin|cos|tan)(?:\^\d)?[({ ]?)(\d[\d.]*)°", r"\1(\2*\\pi/180)"),  # \sin 30°
    (r"\\\{ ?\w(?:∈\(-∞,∞\))?[|:]([^{}]*[<>][^{}]*)\\\}", r"\1"),  # \{x|x>2\}  ->  x>2
    (r"\|([^|]*)\|", r"\\fabs(\1)"),  # |x|  ->  \fabs(x)
    (r"^(?:[a-df-z]?≈|[=:])|[.,;: ]+$", ""),  # =5.  ->  5
    (r'^(?!.*"not")(?:"\w+")+?"(?:is|are|equal)":?|^"(?:exactly|option|choice|answer)":?', ""),  # "it""is"5
    # A:12, (C)"plane"  ->  A, C
    (r'^[({"]*([A-J])["}]*(?:\)(?![*/^+=∪)}-])|[.:](?=$|["\d\\]))(?!.*(?:"not"|[,;&]|\("?[A-J]\b)).*', r"\1"),
    (rf"(?<![^,;])(?=[^,;]*[<>])(?:([^<>,;&]+)([<>]=?))?({NAME})(?:([<>]=?)([^<>,;&]+))?(?![^,;])", interval),
    (r"(?<![^,;])([^±,;]*)±([^±,;]*)(?![^,;])", r"\1+\2,\1-\2"),  # 2±3  ->  2+3,2-3
]]


def clean(text, gold):
    """An answer without its dress and in one spelling; words are in quotes."""
    require(len(text) <= MAX_TEXT, "too_big")
    for pattern, new in REWRITES if not text.isdigit() else ():
        text = pattern.sub(new, text)
    # 200 K is 200, unless K is a variable of the gold
    unit = re.fullmatch(r"(-?\d[^A-Za-z\\]*)((?<=[ }])(?:[KNJCVWLATF]|m/s)|\\Omega)", text)
    return unit[1] if unit and unit[2] not in re.split(r"\\text|\\mathrm", gold)[0] else text.strip()


# --- What an answer can be

# A list of numbers: the values of an expression at POINTS points, or the one of a constant. A str: words.
# Everything else is a Node with items:  "=" label, left - right, value   "@" unit, value   "{}" a set or list
# "()" "[)" ":" "&;&" ordered items: tuples and intervals, ratios, matrices
Node = namedtuple("Node", "kind items")
MP = mpmath.MPContext()  # nothing used of it changes its precision for a while: threads share it
MP.prec = BITS


def add(x, y):
    """x + y: 0 if nearly all digits cancel, refused if one is too small to show in the other."""
    size_x, size_y, size = map(MP.mag, (x, y, x + y))
    require(not BITS // 2 < abs(size_x - size_y) < MP.inf, "too_big")
    return MP.zero if size < size_x - BITS // 2 else x + y


def power(x, y):
    """x ** y if that is not too large; the real one of odd roots of negative numbers."""
    require(not abs(y) * (abs(MP.mag(x or 1)) + 1) > MAX_BITS, "too_big")
    n = MP.nint(105 * y) if not x.imag and x.real < 0 else MP.inf
    return (-x) ** y * (-1) ** int(n) if abs(105 * y - n) < TINY else x ** y


def whole(function):
    """A function of whole numbers."""
    return lambda *xs: MP.mpf(function(*(int(x) if x == int(x) else None for x in xs)))


CALLS = {"\\" + name: getattr(MP, name) for name in "sin cos tan asin acos atan ln fabs".split()}
CALLS |= {r"\log": MP.log10, r"\cot": lambda x: 1 / MP.tan(x), r"\sec": lambda x: 1 / MP.cos(x)}
FUNCTIONS = {**CALLS, "+": add, "-": lambda x, y: add(x, -y), "*": operator.mul, "/": operator.truediv,
             r"\frac": operator.truediv, "^": power, r"\binom": whole(math.comb), "!": whole(math.factorial)}
LIMITS = dict.fromkeys(CALLS, 1e60) | {"!": 1500, r"\binom": 1500}  # of what they apply to
CONSTANTS = {"e": +MP.e, "i": MP.j, r"\pi": +MP.pi, "∞": MP.inf}


def compute(name, *xs):
    """A function or operator of numbers; nan where it is undefined."""
    require(name not in LIMITS or not abs(xs[0]) > LIMITS[name], "too_big")
    try:
        y = FUNCTIONS[name](*xs)
    except (ArithmeticError, ValueError, TypeError):
        return MP.nan
    if name in CALLS and abs(y) <= TINY * min(1, abs(xs[0])):
        return MP.zero  # sin(pi), but not sin(10^-200)
    return MP.nan if name in CALLS and abs(y) > 1 / TINY else y  # tan(pi/2)


# --- How it is read

WORDS = r'"\w{2,}"(?:"\w+")*|"\w"(?:"\w+")+'
UNIT = r'(?:"\w+"|[°%$€£¢])(?:"\w+"|[°%$/*]|(?<=/)[hs]|\^(?:\d|\{-?\d\}))*(?=$|[,;:&)\]}=≈⟧]|\\\})'
# What is only a name before "=": f^{-1}(x), f(g(x)), (f°g)(x), dy/dx, m\angle A, (x,y), AB, "area"
LABEL = (r"(?:m?\\angle [A-Z]+|[A-Z]{2,}|\w\^\{-1\}\(\w\)|(?:\(\w°\w\)|\w)\([\w,]+\)|\\frac\{d\w\}\{d\w\}"
         rf"|[PEfgh]\((?:[^()=]|\(\w\))*\)|{NAME}|{WORDS}|\([a-zA-Z][\w ,\\]*\))[=∈]|(?:{WORDS}):")
# Operators from weak to strong; "" stands between factors: 2x, 2^6 3^5, but not 2 3.
LEVELS = ["[+-]", r"[*/]|(?=[A-Za-z\\([{])(?!\\})|(?<![\d ])(?=\d)|(?<=\^\d )(?=\d)", r"\^|!"]
CALL = rf"(?:{'|'.join(map(re.escape, CALLS))})(?![A-Za-z])"


class Reader:
    """Reads answers by recursive descent, one method for each level of the grammar, and compares them."""

    work = 0

    def pay(self, count):
        """Count the work that is done, up to MAX_WORK."""
        self.work += count
        require(self.work <= MAX_WORK, "too_big")

    def read(self, text):
        """The answer that a text is."""
        self.text, self.i = text, 0
        return self.listed()

    def accept(self, pattern):
        """Use up and return what matches here, else None; a space behind it does not matter."""
        match = re.compile(f"({pattern}) ?").match(self.text, self.i)
        self.i = match.end() if match else self.i
        return match and match[1]

    def listed(self, opening=""):
        """The only item up to a closing bracket or the end, or a tuple, interval, set, ratio or matrix."""
        items, separators = [self.relation()], ""
        while separator := self.accept("[∪:,;&][,;&]*"):
            items.append(self.relation())
            separators += separator[-1]
        closing = self.accept(r"\)|\]|\\?\}|⟧|$")
        require(closing is not None)
        brackets = (opening + closing).replace("\\", "")
        require(brackets in ("", "()", "[]", "{}", "⟦⟧") or brackets in ("(]", "[)") and len(items) == 2)
        kind = separators if brackets == "⟦⟧" or ":" in separators else brackets or "{}"
        return Node(kind, items) if len(items) > 1 else items[0]

    def relation(self):
        """One side, perhaps with a label; several that are equal count as the last; or an equation."""
        label, sides = self.accept(LABEL), [self.side()]
        while self.accept("="):
            sides.append(self.side())
        value, are_equal = sides[-1], all(self.same(side, sides[-1]) for side in sides[:-1])
        if are_equal and not label:
            return value
        require(are_equal or len(sides) == 2 and not label)  # not x = 2 = 3
        name = re.sub(r"[{}()]|m?\\angle |.$", "", label or "")
        left = self.variable(name) if label else sides[0]
        is_expression = type(value) is list and (len(value) > 1 or not label)
        gap = self.call("-", left, value) if is_expression else [MP.one]
        require(label or gap.count(gap[0]) < len(gap))  # not 2 = 3
        return Node("=", [name, gap, value if label else [MP.nan]])

    def side(self):
        """An expression with its trailing words, of which only a unit is kept; 1/3 ≈ 0.333 is 1/3."""
        node = self.expression()
        words = re.findall(r"\w+|[°%$€£¢/^-]", self.accept(UNIT) or "")
        require(not any(map(HEDGES.fullmatch, words)))
        unit = "".join(UNITS.get(word, "?" if word.isalpha() else word) for word in words).partition("?")[0]
        require(not self.accept("≈") or abs(self.call("/", node, self.expression())[0] - 1) < 0.01)
        return Node("@", [unit, node]) if unit else node

    def expression(self, level=0):
        """Operands joined by the operators of LEVELS from this level on."""
        sign = self.accept("[+-]") if level != 1 else None
        node = self.atom() if level == 2 and not sign else self.expression(min(level + 1, 2))
        node = self.call("*", [-MP.one], node) if sign == "-" else node
        while (op := self.accept(LEVELS[level])) is not None:
            right = [] if op == "!" else [self.expression(min(level + 1, 2))]
            node = self.call(op or "*", node, *right)
        return node

    def atom(self):
        """A number, name, bracket, root, fraction, function or matrix: what an operator applies to."""
        if number := self.accept(r"(?![\d.]{90})(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?(?![\d_.])"):
            return [MP.mpf("0" + number)]
        if opening := self.accept(r"\(|\[|\\?\{|⟦"):
            return self.listed(opening)
        if name := self.accept(r"\\frac|\\binom"):
            return self.call(name, self.atom(), self.atom())
        if self.accept(r"\\sqrt"):
            index = self.listed("[") if self.accept(r"\[") else [MP.mpf(2)]
            return self.call("^", self.atom(), self.call("/", [MP.one], index))
        if name := self.accept(CALL):
            return self.function(name)
        return self.accept(WORDS) or self.variable(self.accept(NAME))

    def function(self, name):
        """\\sin^2 x, \\log_2 8; without brackets it ends before + - * / or another function."""
        base = self.atom() if self.accept("_") else None
        power = self.atom() if self.accept(r"\^") else None
        is_bracketed = self.accept(r"(?=[({[])") is not None
        node = self.atom() if is_bracketed else self.expression(2)
        while not is_bracketed and self.accept(rf"(?=[\w{{(]|\\(?:frac|sqrt|{GREEK}))") is not None:
            node = self.call("*", node, self.expression(2))
        node = self.call(name, node)
        node = self.call("/", node, self.call(name, base)) if base else node
        return self.call("^", node, power) if power else node

    def variable(self, name):
        """A constant, or the values of a variable: whole numbers and fractions of either sign."""
        require(name)
        name = re.sub(r'[{}()"]', "", name)
        if name in CONSTANTS:
            return [CONSTANTS[name]]
        draw = random.Random(name).randint
        return [MP.mpf(draw(2, 12)) if k < 5 else MP.mpf(draw(-99, 99)) / 37 for k in range(POINTS)]

    def call(self, name, *args):
        """The values of a function or operator."""
        require(all(type(arg) is list for arg in args))
        points = max(map(len, args))
        self.pay(points * (2 if name in ("+", "-", "*", "/") else 40))
        return [compute(name, *xs) for xs in zip(*(arg * (points // len(arg)) for arg in args))]

    # --- When two are equal

    def same(self, a, b):
        """Whether two answers are equal; a label or unit that only one of them has is dropped."""
        self.pay(1)
        kinds = [getattr(x, "kind", type(x)) for x in (a, b)]
        for dress in ("=", "@"):
            if kinds.count(dress) == 1:
                return self.same(*(x.items[-1] if kind == dress else x for x, kind in zip((a, b), kinds)))
        if kinds[0] != kinds[1] or type(a) is str:
            return a == b
        if type(a) is list:
            return self.equal(a, b)
        if kinds[0] == "{}":  # each as often here as there
            counts = [[sum(self.same(x, y) for y in c.items) for x in a.items] for c in (a, b)]
            return len(a.items) == len(b.items) and counts[0] == counts[1] and 0 not in counts[0]
        are_equal = len(a.items) == len(b.items) and all(map(self.same, a.items, b.items))
        if are_equal or kinds[0] != "=":
            return are_equal
        ratio = self.call("/", a.items[1], b.items[1])  # equations are equal up to a factor
        return len(ratio) > 1 and self.same(ratio, [next((x for x in ratio if x == x and x), MP.nan)])

    def equal(self, a, b):
        """Whether values agree wherever both are defined, which must be at enough points."""
        points = max(len(a), len(b))
        self.pay(points)
        pairs = zip(a * (points // len(a)), b * (points // len(b)))
        pairs = [(x, y) for x, y in pairs if x == x and y == y]  # nan is not
        real = [(x, y) for x, y in pairs if not x.imag or not y.imag]  # sqrt(1/x) and 1/sqrt(x)
        pairs = real if len(real) >= min(3, points) else pairs
        are_near = [x == y or abs(x - y) < TINY * max(abs(x), abs(y)) for x, y in pairs]
        return len(pairs) >= min(3, points) and all(are_near)


def gold_of(answer):
    """The bare answer of a gold, which may be a solution that ends in `#### x` or has a box."""
    return extract_answer(answer) if "####" in answer or BOX.search(answer) else answer


def grade(completion: str, answer: str, thinking: bool = False) -> tuple[float, str | None]:
    """(1.0 or 0.0, cause): whether the final answer of a completion equals the given answer.
    `answer` is bare, a GSM8K solution with its `#### x`, or a MATH solution with its box. `thinking`: the prompt opened
    a thought. `cause` is None when both could be compared, else "no_answer", "unparsed" or "too_big", and then only
    the same cleaned text is equal. Never executes anything, never raises, changes nothing, keeps nothing."""
    given, gold = extract_answer(completion, thinking), gold_of(answer)
    if given is None or gold is None:
        return 0.0, "no_answer"
    texts = ["", ""]
    try:
        texts = [clean(given, gold), clean(gold, gold)]
        reader = Reader()
        return float(reader.same(*map(reader.read, texts))), None
    except (Refused, RecursionError) as error:
        return float(texts[0] == texts[1] != ""), error.args[0] if type(error) is Refused else "too_big"


def verify(completion: str, answer: str, thinking: bool = False) -> float:
    """1.0 if the final answer of a completion equals the given answer, else 0.0; see `grade`."""
    return grade(completion, answer, thinking)[0]


# ------------------------------------------------------------------------------------------------------------
# Data and models. All that touches the hub, a dataset or a chat template: the rest sees token ids and tensors.

ASKING = ("prompt", "problem", "question", "messages")  # the first of these columns asks
# Each row's answer is in the first of these that has one.
ANSWERING = ("reward_model", "final_answer", "expected_answer", "answer", "ground_truth", "solution")
MARKED = re.compile(r"\\(?:boxed|fbox)|####")  # a text that says what in it is the answer
ROLES = {"human": "user", "gpt": "assistant"}


def load_rows(name: str, split: str) -> datasets.Dataset:
    """The rows of a file, a folder or a hub dataset: those of `split`, or of what comes nearest to it."""
    path, (hub_name, _, config) = os.path.expanduser(name), name.partition(":")
    without = "" if split == "train" else " (--eval-every 0 does without it)"
    with explained_as(f"the dataset {name} can be read neither here nor from the hub{without}"):
        if os.path.isfile(path):
            file = glob.escape(os.path.abspath(path))  # br[1].jsonl is no pattern
            splits = datasets.load_dataset(os.path.dirname(path) or ".", data_files=file)
        elif os.path.exists(f"{path}/state.json") or os.path.exists(f"{path}/dataset_dict.json"):
            splits = datasets.load_from_disk(path)
        else:
            splits = datasets.load_dataset(path if os.path.isdir(path) else hub_name, config or None)
    splits = {split: splits} if isinstance(splits, datasets.Dataset) else splits  # saved to disk without any
    return splits[next(name for name in (split, "validation", "valid", "val", "dev", *splits) if name in splits)]


def find_columns(rows, columns: str, name: str, own_reward: bool, held_out: bool):
    """The column that asks, and those that answer: --columns, which held-out problems may lack, or else known ones."""
    present = getattr(rows, "column_names", None) or list(*rows[:1])
    asking, *answering = [column.strip() for column in columns.split(",")]
    if not columns or held_out and not {asking, *answering} <= set(present):
        spelled = {column.lower(): column for column in sorted(present)}  # Problem is problem
        asking = next((spelled[column] for column in ASKING if column in spelled), None)
        answering = [spelled[column] for column in ANSWERING if column in spelled]
    if not {asking, *answering} <= set(present) or not (answering or own_reward):
        raise UserError(f"{name} has the columns {', '.join(present) or '(none)'}: name two as in --columns "
                        f"question,answer; known are {', '.join(ASKING)} + {', '.join(ANSWERING)}")
    return asking, answering


def read_golds(cell, worked: bool = False) -> list[str]:
    """The answers in a cell, any of which is right; so an answer of two parts is a single text, "1, 2".
    Of a `worked` solution it is the last box (or GSM8K's ####), and none without one."""
    if isinstance(cell, str) and re.match(r'\s*[\[{]\s*"', cell):  # JSON; [1, 2] is an interval
        with suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    if isinstance(cell, dict):  # verl: {"ground_truth": "5" or ["5"], ...}
        return read_golds(cell.get("ground_truth"), worked)
    if isinstance(cell, list):
        return [gold for item in cell for gold in read_golds(item, worked)]
    cell = int(cell) if isinstance(cell, float) and cell.is_integer() else cell  # a gap in a column makes floats
    text = "" if cell is None else str(cell).strip()
    bare = not worked and not MARKED.search(text)
    answer = extract_answer(text) or (text if bare else "")
    none = answer.lower() in ("", "[]", "nan", "proof", "notfound")  # the last two: NuminaMath-1.5
    return [] if none else [answer]


def read_messages(cell) -> list[dict]:
    """A prompt's messages of {"role", "content"} or {"from", "value"}, or one of the user's; [] if any has no text."""
    messages = []
    for turn in cell if isinstance(cell, list) else [{"role": "user", "content": cell}]:
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        if not role or not isinstance(content, str):
            return []
        messages.append({"role": ROLES.get(str(role), str(role)), "content": content})
    return messages


def encode(tokenizer, messages: list[dict], thinking: bool = False) -> list[int]:
    """Token ids of a prompt, by the chat template if there is one; an assistant's message at its end is continued."""
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(message["content"] for message in messages)).input_ids
    begun = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(messages, add_generation_prompt=not begun, continue_final_message=begun,
                                         enable_thinking=thinking, return_dict=False)


def read_problems(rows, tokenizer, cfg: Config, name: str, own_reward=False, held_out=False) -> list[Problem]:
    """Turn dataset rows into problems; says how many were left out and why. UserError if none is left.
    `own_reward`: for a reward function of the user's own, which gets the whole row and may need no answer."""
    asking, answering = find_columns(rows, cfg.columns, name, own_reward, held_out)
    if isinstance(rows, datasets.Dataset) and not own_reward:
        rows = rows.select_columns(list({asking, *answering}))  # others can be images, or long
    # A solution is worked out if any is marked, or if another column has the answers; otherwise it is bare.
    worked = [column for column in answering if column.lower() == "solution"
              and (len(answering) > 1 or any(MARKED.search(str(row[column])) for row in rows))]
    problems, left_out, encoded = [], Counter(), {}  # `encoded`: some data sets ask a question a hundred times
    for number, row in enumerate(rows, 1):
        golds = next(filter(None, (read_golds(row[column], column in worked) for column in answering)), [])
        messages = read_messages(row[asking])
        if asking.lower() == "messages" and messages and messages[-1]["role"] == "assistant":
            messages.pop()  # the answer
        text = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
        if isinstance(row[asking], str) and "\\boxed" not in text:
            messages[-1]["content"] += cfg.instruction
        ids, reason = [], "without a question in text" if golds or own_reward else "without an answer"
        if text.strip() and (golds or own_reward):
            reason, key = f"with a prompt of no token, or over {cfg.max_prompt_tokens}", json.dumps(messages)
            with explained_as(f"row {number} of {name} cannot be made a prompt"):  # a template is a program
                ids = encoded[key] = encoded.get(key) or encode(tokenizer, messages, cfg.thinking)
        if not 0 < len(ids) <= cfg.max_prompt_tokens:
            left_out[reason] += 1
            continue
        thinking = tokenizer.decode(ids[-10:]).rstrip().endswith("<think>")
        problems.append(Problem(text, ids, tuple(golds), row if own_reward else {}, thinking))  # rows can be large
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not problems:
        raise UserError(f"no usable problem in {name}: {reasons or 'it has no rows'}")
    if reasons:
        say(f"note: left out of {name}: {reasons}")
    return problems


def load_config(path: str):
    """The configuration of the model at `path`, without dropout or noise: the ratio must begin at 1."""
    with explained_as(f"the model {path} can be read neither here nor from the hub"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        part.update({name: 0.0 for name, value in vars(part).items()
                     if isinstance(value, float) and re.search("drop|jitter|noise", name)})
    return config


def load_model(path: str, device, dtype: str = "float32", longest: int = 0):
    """The causal language model at `path`; UserError if it is none, or not whole, or `longest` breaks its positions."""
    config = load_config(path)
    text_config = config.get_text_config()
    ropes = getattr(text_config, "rope_parameters", None) or {}
    is_varying = ropes.get("rope_type") in ("longrope", "dynamic")  # turned otherwise in a longer text
    kept = ropes.get("original_max_position_embeddings") if is_varying else None
    limit = kept or getattr(text_config, "max_position_embeddings", math.inf)
    if longest > limit and (is_varying or not ropes):  # without any, positions are learned
        raise UserError(f"{path} ends at {limit:,} tokens, a completion at {longest:,}: lower --max-new-tokens")
    if "rope_theta" in ropes:  # will be saved where transformers 4 looks for it: it would take 10,000, in silence
        text_config.rope_theta = ropes["rope_theta"]
    with explained_as(f"the model {path} cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"it lacks {', '.join(sorted(found['missing_keys']))}, which would be random")
    model.generation_config.do_sample = True  # or save_pretrained refuses those that name a temperature
    model = model.to(device).eval()
    if model.config._attn_implementation == "sdpa" and ropes:
        model.set_attn_implementation("shared_heads")
    if model.device.type == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(4, device=model.device)[None]  # (1, 4)
    with torch.no_grad(), explained_as(f"{path} is not built as this file expects"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits, plain = model(ids, use_cache=False).logits, model.get_output_embeddings()(hidden)
    if not torch.allclose(plain, logits, atol=1e-3, equal_nan=True):
        raise UserError(f"{path} changes its logits behind the output layer (cap or scale): not supported")
    return model


def add_adapters(model, cfg: Config):
    """Freeze a model but for LoRA adapters, in float32; returns peft's handle on them."""
    torch.manual_seed(cfg.seed)  # they start at random
    with explained_as("--lora does not go with the peft that is installed"):
        from peft import LoraConfig, get_peft_model
        return get_peft_model(model, LoraConfig(r=cfg.lora, lora_alpha=2 * cfg.lora, target_modules="all-linear"))


# ------------------------------------------------------------------------------------------------------------
# Memory. 4B parameters on one GPU: bf16 weights there, what AdamW needs in host memory, and a share of what is then
# free on the card for the key-value cache. What runs out meanwhile is tried again in smaller pieces.

RESIDENT_SHARE = 0.6  # of a card for weights, gradients and AdamW; with more, AdamW is in host memory
CACHE_SHARE = 0.7  # of what is free, for the cache; the rest is for what a pass computes


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies of the weights ("masters") on a device of their own; one tensor at a time goes there.
    Without them bf16 weights would lose most updates: their spacing is up to 2^-7 of their size. Gradients are summed
    in fp32, too, or the last of many would be rounded away. An fp32 weight on that device is its own master."""

    def __init__(self, weights, device, **options):
        self.weights = [weight for weight in weights if weight.requires_grad]
        for weight in self.weights:
            weight.grad_dtype = torch.float32
        self.masters = [weight.detach().to(device, torch.float32) for weight in self.weights]
        super().__init__(self.masters, fused=True, **options)

    @torch.no_grad()
    def step(self):
        """One AdamW step of every weight that has a gradient."""
        for weight, master in zip(self.weights, self.masters):
            if weight.grad is not None:
                master.grad = weight.grad.to(master.device)
                super().step()  # of this one: no other has a gradient
                master.grad = None
                weight.copy_(master.to(weight.dtype))  # rounded first: half as much travels

    def zero_grad(self, set_to_none=True):
        for weight in self.weights:
            weight.grad = None

    def state_dict(self):
        return {"masters": self.masters, "adam": super().state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state):
        super().load_state_dict(state["adam"])
        for weight, master, saved in zip(self.weights, self.masters, state["masters"], strict=True):
            weight.copy_(master.copy_(saved))
            self.state[master] = {name: value.clone() for name, value in self.state[master].items()}  # off the file


def free_memory(device: torch.device) -> float:
    """Bytes that can be had on a device now; infinite where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier run of this process has kept
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else math.inf


def fit_memory(cfg: Config, path: str, device: torch.device) -> torch.device:
    """Where AdamW's masters and moments are to be, the card or the host; UserError where they fit on neither."""
    with torch.device("meta"), explained_as(f"{path} is not a causal language model"):  # shapes only
        n = AutoModelForCausalLM.from_config(load_config(path), trust_remote_code=False).num_parameters()
    models, trained = 2 if cfg.kl_coef else 1, 0 if cfg.lora or not cfg.steps else n  # adapters are small
    resident = models * n * getattr(torch, cfg.dtype).itemsize + 4 * trained  # gradients are fp32
    adam = 12 * trained  # the masters, two moments; fp32 weights that stay are their own masters and take less
    where = device if resident + adam < RESIDENT_SHARE * free_memory(device) else torch.device("cpu")
    needs = {device: resident + adam} if where == device else {device: resident, where: adam}
    for place, needed in needs.items():
        if needed > free_memory(place):
            raise UserError(f"{n:,} weights in {cfg.dtype} take {needed / 2**30:.1f} GiB on {place} with all that they "
                            f"need, and {free_memory(place) / 2**30:.1f} are free (--lora 16 needs least)")
    return where


@torch.no_grad()
def cache_room(run: Run, cfg: Config) -> int:
    """Tokens that the key-value cache may hold: a share of what is free now, by what one token leaves in it."""
    with explained_as("this model leaves nothing in a key-value cache that rows could be taken from"):
        caches, *_ = prefill(run.model, [(0,)], 1)
        token_share = CACHE_SHARE / sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[0].layers)
    masters = run.optimizer.masters if run.optimizer else []
    moments = 8 * sum(master.numel() for master in masters if master.device == run.model.device)  # not there yet
    longest = cfg.max_prompt_tokens + cfg.max_new_tokens
    room = token_share * (free_memory(run.model.device) - moments)
    if room < longest:
        raise UserError(f"the cache has room for {room:,.0f} of {longest:,} tokens: give a smaller --max-new-tokens")
    return int(min(room, cfg.prompts_per_step * cfg.group_size * longest))


# ------------------------------------------------------------------------------------------------------------
# The demo. The only code that a real run does not use: a tiny Qwen3 with a tokenizer of single characters learns
# to add from worked examples until it is sometimes right (RL needs that), is saved, and loaded like any model.

DEMO_EVAL, DEMO_WARM, DEMO_TRAIN, DEMO_DIGITS = 512, 16384, 16384, 3


def addition(pair: int, digits: int) -> dict:
    """Addition number `pair` of two numbers of so many digits, as a row (problem, worked, answer)."""
    low, span = 10**(digits - 1), 9 * 10**(digits - 1)
    a, b = low + pair // span, low + pair % span
    columns, carry = [], 0
    for i in range(digits):  # column by column, from the right
        x, y = a // 10**i % 10, b // 10**i % 10
        columns.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    return {"problem": f"{a}+{b}?", "worked": f"{' '.join(columns)} \\boxed{{{a + b}}}", "answer": str(a + b)}


def demo_rows(seed: int) -> tuple[list[dict], ...]:
    """Additions, no pair twice: evaluation, warm start, training."""
    pairs = random.Random(seed).sample(range(81 * 100**(DEMO_DIGITS - 1)), DEMO_EVAL + DEMO_WARM + DEMO_TRAIN)
    rows = [addition(pair, DEMO_DIGITS) for pair in pairs]
    return rows[:DEMO_EVAL], rows[DEMO_EVAL:-DEMO_TRAIN], rows[-DEMO_TRAIN:]


def supervise(run: Run, warm: list[dict], cfg: Config, solved: float) -> None:
    """Teach a model worked examples until it has solved so large a share of 256 others."""
    probe = read_problems(warm[:256], run.tokenizer, cfg, "the warm start")
    prompts = [run.tokenizer(row["problem"]).input_ids for row in warm[256:]]
    solutions = [run.tokenizer(row["worked"]).input_ids + [run.tokenizer.eos_token_id] for row in warm[256:]]
    tokens = padded(solutions, run.model.device)  # (n, T)
    mask = padded([[1.0] * len(solution) for solution in solutions], run.model.device)  # (n, T)
    for step in tqdm(range(1, 2001), "warm start", leave=False):
        rows = torch.randint(len(prompts), (64,), generator=rng("cpu", cfg.seed, "warm start", step))
        logprobs = token_logprobs(run.model, [prompts[i] for i in rows], tokens[rows], mask[rows])  # (n, T)
        (-logprobs.sum() / mask[rows].sum()).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        if step % 10 == 0:
            generator = rng(run.model.device, cfg.seed, "probe", step)
            if evaluate(run, {"probe": probe}, cfg, generator)["eval_pass@1"] >= solved:
                return
    raise UserError("the warm start has solved too little after 2,000 steps: a larger --max-new-tokens?")


def build_demo(folder: str, cfg: Config, warm: list[dict], device, solved: float = 0.25) -> None:
    """Make a Qwen3 of 0.3M parameters, teach it worked examples until it has solved that share of others, save it."""
    torch.manual_seed(cfg.seed)
    vocabulary = ["<pad>", "<eos>", *sorted(set("0123456789+=? \\boxed{}"))]
    characters = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(vocabulary)}, merges=[]))
    characters.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)).to(device)
    run = Run(model, tokenizer, torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True), tracker=None)
    supervise(run, warm, cfg, solved)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# Files. A run is a folder: config.json, metrics.jsonl, checkpoint.pt, and at the end model/.

# Of Ctrl-C, a scheduler (some time before it kills), and a closed terminal (ignored under nohup).
STOP = [sign for sign in signal.Signals if sign.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
CHECKPOINT = "checkpoint.pt"
RUN_FILES = ("config.json", "metrics.jsonl", CHECKPOINT, "model")
# What may change when a run goes on: what does not shape training, and paths, as files move.
MAY_DIFFER = set("""steps out resume overwrite model dataset reward device eval_dataset eval_every eval_samples
    save_every show_every tracker cache_tokens microbatch_tokens""".split())


def open_run(cfg: Config, out: Path) -> dict | None:
    """The checkpoint to go on from, or None where a run begins; UserError for what is in the way."""
    with explained_as(f"the output folder {out} cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
    if cfg.resume and (out / CHECKPOINT).is_file():
        with explained_as(f"the checkpoint in {out} cannot be used"):
            state = torch.load(out / CHECKPOINT, map_location="cpu", weights_only=True, mmap=True)  # not all in memory
            before = state["config"]
        changed = [f"{flag(name)} was {before.get(name)!r}, is {value!r}" for name, value in asdict(cfg).items()
                   if name not in MAY_DIFFER and value != before.get(name)]
        if changed:
            raise UserError("--resume goes on with the same settings, but " + "; ".join(changed))
        return state
    present = [name for name in RUN_FILES if (out / name).exists()]
    was_killed_early = cfg.resume and cfg.save_every and "model" not in present  # before its first save
    if present and not (cfg.overwrite or was_killed_early):
        raise UserError(f"{out} already holds a run: --overwrite deletes it, --resume goes on if it has a checkpoint")
    return None


def save_checkpoint(run: Run, problems: list[Problem], cfg: Config, out: Path) -> None:
    """All that a resumed run needs, swapped in whole. If the disk is full, that is said and the old one stays."""
    path = out / CHECKPOINT
    partial_file = path.with_suffix(".partial")
    # the reference's log-probabilities of a batch are for its exploration step alone, which is done
    state = {"config": asdict(cfg), "problems": len(problems), "optimizer": run.optimizer.state_dict(),
             "window": list(run.tracker.history), "previous": vars(replace(run.previous, ref_logprobs=None)),
             "step": run.step, "name": run.name, "cache_tokens": run.cache_tokens}
    try:
        torch.save(state, partial_file)
        os.replace(partial_file, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's word for a full disk
        partial_file.unlink(missing_ok=True)
        say(f"warning: step {run.step} could not be saved, the checkpoint before it stays: {error}")


def load_checkpoint(run: Run, state: dict, problems: list[Problem], out: Path) -> None:
    """Bring a fresh `run` to where it was saved, and cut its logs back to there."""
    with explained_as(f"the checkpoint in {out} does not fit"):
        if state["problems"] != len(problems):
            raise ValueError(f"it was trained on {state['problems']} problems, not {len(problems)}")
        run.optimizer.load_state_dict(state["optimizer"])
        run.tracker.history.extend(state["window"])
        run.step, run.name = state["step"], state["name"]
        run.previous = Batch(**{name: value.to(run.model.device) if isinstance(value, Tensor) else value
                                for name, value in state["previous"].items()})
        log = out / "metrics.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)  # the last may be half of one, after a kill
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= run.step]
        os.truncate(log, sum(map(len, kept)))


def save_model(run: Run, out: Path) -> None:
    """model/, a plain folder that transformers, vLLM and --model read; written beside an old one, swapped in whole."""
    if run.adapters:
        run.adapters.merge_and_unload()  # what is left of run.model is a plain one
    partial_folder = out / "model.partial"
    with explained_as(f"the model could not be saved in {out}"):
        run.model.save_pretrained(partial_folder)
        run.tokenizer.save_pretrained(partial_folder)
        shutil.rmtree(out / "model", ignore_errors=True)
        os.replace(partial_folder, out / "model")


@contextmanager
def signals_caught():
    """Yields a list that a signal to stop is put into, so that a step can end and be saved; a second stops at once."""
    caught, before = [], {}

    def catch(sign, _):
        if caught:
            raise KeyboardInterrupt
        caught.append(sign)
        say("finishing this step; a second signal stops at once, unsaved")

    with suppress(ValueError):  # off the main thread no signal can be caught
        before = {sign: signal.signal(sign, catch) for sign in STOP if signal.getsignal(sign) != signal.SIG_IGN}
    try:
        yield caught
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


# ------------------------------------------------------------------------------------------------------------
# Command line. One dataclass holds all settings: its fields are the flags, their --help and config.json. What
# the user can put right is one sentence and exit code 2, before anything is loaded or deleted.


def option(default, help, low=None, high=math.inf, demo=None, choices=None):
    """A field of Config: its default, --help, what it may be, and the demo's value if that is another."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, demo=demo, choices=choices))


@dataclass
class Config:
    """All settings of a run; each field is the flag of its name, with - for _."""
    # the task
    model: str = option("", "hub name or folder of a causal language model; without it, the offline demo")
    dataset: str = option("", "training problems: a hub name, org/name or org/name:config, a file or a folder (MATH)")
    eval_dataset: list[str] = option((), "held-out problems, one set or more (MATH-500, if --dataset is not given)")
    reward: str = option("", "file.py:function in place of the verifier: (completion, answer, row) -> number")
    columns: str = option("", "the columns that ask and answer, as in question,answer (known names)")
    instruction: str = option("\n\nReason step by step, and put your final answer within \\boxed{}.",
                              "put behind a problem that has no \\boxed in it, not behind messages", demo="")
    thinking: bool = option(False, "let a chat template switch its thinking mode on")
    max_prompt_tokens: int = option(512, "longer prompts are left out, and counted", 1)
    # sampling and grading
    steps: int = option(261, "iterations; 0 only evaluates", 0, demo=120)
    prompts_per_step: int = option(128, "Q, prompts an iteration", 1, demo=32)
    group_size: int = option(8, "G, samples a prompt", 2)
    max_new_tokens: int = option(4096, "longest completion", 1, demo=48)
    temperature: float = option(0.7, "of sampling, in training and evaluation", 0.01, demo=1.0)
    top_p: float = option(1.0, "draw from the smallest set of tokens with this mass", 0.01, 1)
    cache_tokens: int = option(None, "room of the key-value cache (what fits)", 1)
    # the base objective (both steps; the KL in exploration only)
    base: str = option("grpo", "base objective", choices=tuple(BASES))
    kl_coef: float = option(0.0, "weight of the KL to the starting model, in exploration", 0)
    # the feedback (verification step)
    feedback: str = option("pipo", "what scales the verification step", choices=("pipo", "none", "constant"))
    window: int = option(8, "K, past mean rewards that the present one is held against", 2)
    lam: float = option(0.1, "lambda, the weight of a fall in reward against a rise", 0, 1)
    xi_clip: float = option(None, "cut xi to [-this, this] (no cut, as in the paper)", 0)
    constant: float = option(0.43, "coefficient of --feedback constant (0.43: phi's mean on noise)", -math.inf)
    # the optimizer, precision
    lr: float = option(None, "learning rate (1e-6; with --lora 1e-4)", 1e-12, demo=1e-4)
    pi_lr: float = option(None, "learning rate of the verification step (--lr)", 1e-12)
    weight_decay: float = option(0.01, "AdamW's weight decay", 0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", 1e-6)
    minibatches: int = option(1, "optimizer steps a batch is split into, in both steps (paper: 2)", 1)
    epochs: int = option(1, "passes over a batch in the exploration step; the last one is logged", 1)
    microbatch_tokens: int = option(8192, "padded tokens a backward pass (memory only)", 1, demo=2048)
    dtype: str = option("", "of the weights (bfloat16 on a GPU, else float32)", choices=("", "float32", "bfloat16"))
    lora: int = option(0, "rank of LoRA adapters to train instead of all weights (needs peft)", 0)
    # the run
    seed: int = option(0, "the same seed gives the same run (on the same CPU, to the last bit)")
    device: str = option("", "cpu, cuda, cuda:1, ... (cuda if present)")
    out: str = option("", "folder for the run's files (runs/<model>-<base>-<feedback>-seed<n>)")
    resume: bool = option(False, "go on from the checkpoint in --out; begin if there is none")
    overwrite: bool = option(False, "delete the run that is in --out")
    # evaluating, saving, showing
    eval_every: int = option(10, "steps between evaluations, 0 for none at all", 0, demo=20)
    eval_samples: int = option(1, "completions a held-out problem; above 1 there is a pass@k too", 1)
    save_every: int = option(5, "steps between checkpoints, 0 for none", 0, demo=20)
    show_every: int = option(5, "steps between samples shown on the screen, 0 for none", 0, demo=20)
    tracker: str = option("", "send the metrics there too", choices=("", "wandb", "trackio"))


# Config(**DEMO) is what `python pipo.py` runs; a real run is Config(model=..., ...).
DEMO = {f.name: f.metadata["demo"] for f in fields(Config) if f.metadata["demo"] is not None}
MATH = ("DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500")  # to train and to evaluate on


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def settled(cfg: Config, own_reward: bool = False) -> Config:
    """The settings as config.json takes them, with what others decide filled in, and valid (raises UserError).
    MATH is the default only where neither a data set nor a reward is named: its rows would not fit another's."""
    cfg = Config(**json.loads(json.dumps(asdict(cfg), default=lambda x: x.item() if hasattr(x, "item") else str(x))))
    with explained_as(f"--device is {cfg.device!r}"):  # an unknown name, or a torch without CUDA
        device = torch.empty(0, device=cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    train_set, eval_sets = cfg.dataset, [cfg.eval_dataset] if isinstance(cfg.eval_dataset, str) else cfg.eval_dataset
    if cfg.model and not (train_set or cfg.reward or own_reward):
        train_set, eval_sets = MATH[0], eval_sets or [MATH[1]]
    start = Path(cfg.model).resolve()
    name = f"{start.name if cfg.model else 'demo'}-{cfg.base}-{cfg.feedback}-seed{cfg.seed}"
    cfg = replace(cfg, dataset=train_set, eval_dataset=eval_sets if cfg.eval_every else [], device=str(device),
                  lr=(1e-4 if cfg.lora else 1e-6) if cfg.lr is None else cfg.lr,
                  dtype=cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
                  out=os.path.expanduser(cfg.out or f"runs/{name}"))
    for f in fields(cfg):
        value, (low, high, choices) = getattr(cfg, f.name), (f.metadata[k] for k in ("low", "high", "choices"))
        is_inside = low is None or value is None or low <= value <= high and abs(value) < math.inf
        if not is_inside or choices and value not in choices:
            raise UserError(f"{flag(f.name)} is {value!r}: it must be {choices or f'from {low:g} to {high:g}'}")
    for is_wrong, sentence in (
            (cfg.prompts_per_step % cfg.minibatches, "--minibatches must divide --prompts-per-step"),
            (cfg.lora and not find_spec("peft"), "--lora needs the package peft (pip install peft)"),
            (cfg.tracker and not find_spec(cfg.tracker), f"--tracker needs the package {cfg.tracker}"),
            (not cfg.model and (cfg.dataset or cfg.eval_dataset), "a --dataset needs --model: the demo makes its own"),
            (cfg.model and cfg.steps and not cfg.dataset, "--dataset is missing: the data that --reward is made for"),
            (not cfg.steps and not (cfg.eval_dataset if cfg.model else cfg.eval_every),
             "--steps is 0 and nothing is evaluated: see --eval-dataset and --eval-every"),
            (cfg.model and Path(cfg.out).resolve() in (start, start.parent), f"--model is in {cfg.out}: another --out"),
            (device.type not in LOGITS_CHUNK, f"--device is {device}: it must be cpu or a CUDA device")):
        if is_wrong:
            raise UserError(sentence)
    return cfg


def parse(arguments: list[str]) -> Config:
    """Flags from the fields of Config; without --model, the demo's values stand where none was given."""
    parser = argparse.ArgumentParser(usage="python pipo.py [--setting value ...]; without --model: the demo",
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    types, kinds = get_type_hints(Config), {bool: dict(action="store_true"), list[str]: dict(nargs="+")}
    for f in fields(Config):
        default = f" (default: {f.default})" if f.default and types[f.name] in (int, float) else ""
        demo = f" (demo: {DEMO[f.name]})" if DEMO.get(f.name) else ""
        kind = kinds.get(types[f.name], dict(type=types[f.name], choices=f.metadata["choices"]))
        parser.add_argument(flag(f.name), help=f.metadata["help"] + default + demo, **kind)
    given = vars(parser.parse_args(arguments))
    return Config(**({} if given.get("model") else DEMO) | given)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for what the user can put right, 130 after a signal to stop."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails becomes a sentence
    transformers.utils.logging.disable_progress_bar()
    try:
        train(parse(sys.argv[1:] if arguments is None else arguments))
        return 0
    except (UserError, FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        print(f"pipo: {str(error) or 'stopped; the last checkpoint, if any, is as it was'}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for an ASCII terminal
    sys.exit(main())
