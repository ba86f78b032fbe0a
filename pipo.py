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

So a batch after which the reward rose gets a second step the same way, and one after which it fell a small
step back (times lam). mu_t judges B_{t-1} because the policy that drew B_t came out of the step on B_{t-1}.
Both steps share one optimizer; each ratio is against the policy that sampled its batch. There is no verification
step while the window fills (the first K iterations), where its rewards are all equal, where phi_t is 0, and
where no group of B_{t-1} is mixed. Settings and metrics named `pi_` are of this step (policy improvement).

    python pipo.py                          # offline demo: a 0.3M-parameter model learns to add, in minutes
    python pipo.py --model Qwen/Qwen3-4B    # MATH, on one GPU
    python pipo.py --help                   # every setting, with its meaning

Contents, in reading order; the first five are PIPO, the others are its engine rooms:

    Settings            every flag, what it means and what it may be
    The mathematics     group advantages, the improvement tracker, improvement rewards, the clipped loss
    The update          log-probabilities of a batch, and optimizer steps on it
    One iteration       PIPO on one screen
    Training            the loop around it: set up, evaluate, log, save
    Sampling            completions with their log-probabilities, from a cache shared by each group
    Verifying           whether a final answer is right
    Data and models     datasets, prompts, checkpoints of others
    Memory              fp32 masters in host memory, and what fits where
    The demo            a tiny model that learns to add
    Files               what a run leaves, and how it goes on
    Command line

Left out on purpose: more than one GPU, an inference server, replay beyond the previous batch, learned reward
models, rate schedules, dropout.
"""

from __future__ import annotations

import argparse
import errno
import glob
import hashlib
import importlib
import inspect
import io
import json
import math
import operator
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import sys
import textwrap
import time
import zipfile
import zlib
from collections import Counter, deque, namedtuple
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, get_type_hints

# Without this the GPU's memory breaks into pieces.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # no traceback while the libraries load

import datasets
# mpmath alone, without sympy: to build and compare two of sympy's sets takes 1 to 4 ms (ours 0.3 ms),
# and to it endpoints are only equal if written alike: sqrt(6 + 2 sqrt(5)) and 1 + sqrt(5) are not.
import mpmath
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
# Settings. One dataclass holds them all: its fields are the command-line flags, their --help and config.json.
# `demo` is the value used instead when no --model is given.
# ------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can put right: shown as one sentence, exit code 2."""


def cause_of(error: BaseException) -> str:
    """An error in one line; where it only says that there was another, that one."""
    while str(error) == "An error occurred while generating the dataset" and error.__cause__:
        error = error.__cause__
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


@contextmanager
def explained_as(what: str):
    """Foreign files can break in any way: whatever a library raises about one becomes a sentence."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {cause_of(error)}")


BOUNDS = {  # what a number must be; none of them takes nan or an infinity
    "above 0": lambda x: 0 < x < math.inf,
    "0 or more": lambda x: 0 <= x < math.inf,
    "at least 2": lambda x: 2 <= x < math.inf,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "finite": lambda x: -math.inf < x < math.inf,
}


def option(default, help, bound=None, demo=None, choices=None):
    """A field of Config: its default, --help, what it may be, and the demo's value if that is another."""
    return field(default=default, metadata=dict(help=help, bound=bound, demo=demo, choices=choices))


@dataclass
class Config:
    """All settings of a run; each field is the flag of its name, with - for _."""
    # the task
    model: str = option("", "hub name or folder of a causal language model; without it, the offline demo")
    dataset: str = option("DigitalLearningGmbH/MATH-lighteval", "training problems: a hub name (org/name or "
                          "org/name:config), a .parquet, .jsonl, .json, .csv, .tsv file or folder", demo="")
    eval_dataset: list[str] = option("HuggingFaceH4/MATH-500", "held-out problems, one set or more", demo="")
    reward: str = option("", "file.py:function in place of the verifier: (completion, answer, row) -> number")
    columns: str = option("", "the columns that ask and answer, as in question,answer (default: known names)")
    system: str = option("", "system message, put in front of prompts that have none")
    instruction: str = option("\n\nReason step by step, and put your final answer within \\boxed{}.",
                              "put behind a problem that has no \\boxed in it, not behind messages", demo="")
    warm_start: float = option(0.25, "demo: the warm start ends once this share is solved", "in [0, 1)")
    thinking: bool = option(False, "let a chat template switch its thinking mode on")
    max_prompt_tokens: int = option(512, "longer prompts are left out, and counted", "above 0")
    # sampling and grading
    steps: int = option(261, "iterations; 0 only evaluates", "0 or more", demo=120)
    prompts_per_step: int = option(128, "Q, prompts an iteration", "above 0", demo=32)
    group_size: int = option(8, "G, samples a prompt", "at least 2")
    max_new_tokens: int = option(4096, "longest completion", "above 0", demo=48)
    temperature: float = option(0.7, "of sampling, in training and evaluation", "above 0", demo=1.0)
    top_p: float = option(1.0, "draw from the smallest set of tokens with this mass", "in (0, 1]")
    cache_tokens: int = option(None, "room of the key-value cache (default: what fits)", "above 0")
    dynamic_sampling: int = option(0, "DAPO's: at most so many more rounds, for Q mixed groups", "0 or more")
    reward_noise: float = option(0.0, "share of training rewards to flip, to study noise", "in [0, 1)")
    mask_truncated: bool = option(False, "completions cut off by the limit: advantage 0 (means, KL keep them)")
    # the base objective (both steps; the KL in exploration only)
    base: str = option("grpo", "base objective", choices=("grpo", "dr_grpo", "dapo", "gspo"))
    clip_low: float = option(None, "lower clip of the ratio (default: the base's own)", "in [0, 1)")
    clip_high: float = option(None, "upper clip of the ratio (default: the base's own)", "0 or more")
    kl_coef: float = option(0.0, "weight of the KL to the starting model, in exploration", "0 or more")
    behavior: str = option("auto", "whose log-probabilities the ratio is against (auto: the sampler's; for "
                           "gspo in bfloat16 the trainer's)", choices=("auto", "sampler", "trainer"))
    # the feedback (verification step)
    feedback: str = option("pipo", "what scales the verification step: phi(xi); nothing, as there is none; "
                           "--constant; phi of an earlier xi", choices=("pipo", "none", "constant", "shuffled"))
    window: int = option(8, "K, past mean rewards that the present one is held against", "at least 2")
    lam: float = option(0.1, "lambda, the weight of a fall in reward against a rise", "in [0, 1]")
    xi_clip: float = option(None, "cut xi to [-this, this] (default: no cut, as in the paper)", "above 0")
    constant: float = option(0.43, "coefficient of --feedback constant (0.43: phi's mean on noise)", "finite")
    # the optimizer
    lr: float = option(1e-6, "learning rate", "above 0", demo=1e-4)
    pi_lr: float = option(None, "learning rate of the verification step (default: --lr)", "above 0")
    weight_decay: float = option(0.01, "AdamW's weight decay", "0 or more")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", "above 0")
    minibatches: int = option(1, "optimizer steps a batch is split into, in both steps (paper: 2)", "above 0")
    epochs: int = option(1, "passes over a batch in the exploration step; the last one is logged", "above 0")
    microbatch_tokens: int = option(8192, "padded tokens a backward pass (memory only)", "above 0", demo=2048)
    # precision and memory
    dtype: str = option("auto", "of the weights; gradients are summed, and AdamW steps, in float32 (auto: "
                        "bfloat16 on a GPU, else float32)", choices=("auto", "float32", "bfloat16"))
    optimizer_device: str = option("auto", "where AdamW's float32 weights and moments are (auto: the host's "
                                   "memory, if they are large and fit there)", choices=("auto", "cpu", "cuda"))
    lora: int = option(0, "rank of LoRA adapters to train instead of all weights (needs peft)", "0 or more")
    # the run
    seed: int = option(0, "the same seed gives the same run (on the same CPU, to the last bit)", "finite")
    device: str = option("", "cpu, cuda, cuda:1, ... (default: cuda if present)")
    out: str = option("", "folder for the run's files (default: runs/<model>-<base>-<feedback>-seed<n>)")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    overwrite: bool = option(False, "delete the run that is in --out")
    eval_every: int = option(10, "steps between evaluations, 0 for none at all", "0 or more", demo=20)
    eval_samples: int = option(1, "completions a held-out problem; above 1 there is a pass@k too", "above 0")
    eval_temperature: float = option(None, "of evaluation; 0 is greedy (default: --temperature)", "0 or more")
    eval_top_p: float = option(None, "top-p of evaluation (default: --top-p)", "in (0, 1]")
    eval_limit: int = option(0, "evaluate on the first so many problems only, 0 for all", "0 or more")
    save_every: int = option(None, "steps between saves, 0: none (default: 10, 1B+ 50)", "0 or more", demo=20)
    save_minutes: float = option(30.0, "minutes after which there is a save in between, too", "above 0")
    keep_models: int = option(0, "keep the last so many checkpoints' models as model-<step>/", "0 or more")
    show_every: int = option(5, "steps between samples shown on the screen, 0 for none", "0 or more", demo=20)
    tracker: str = option("", "send the metrics there too", choices=("", "wandb", "trackio", "tensorboard"))


# The headings of --help, by the first setting below each.
HEADINGS = {"model": "the task", "steps": "sampling and grading",
            "base": "the base objective (both steps; KL: one)", "feedback": "the feedback (verification step)",
            "lr": "the optimizer", "dtype": "precision and memory", "seed": "the run",
            "eval_every": "evaluating, saving, showing"}
# Config(**DEMO) is what `python pipo.py` runs; a real run is Config(model=..., ...).
DEMO = {f.name: f.metadata["demo"] for f in fields(Config) if f.metadata["demo"] is not None}


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def validate(cfg: Config) -> None:
    """Refuse settings that make no sense (raises UserError) before anything is loaded."""
    def need(holds, name, reason):
        if not holds:
            raise UserError(f"{flag(name)} is {getattr(cfg, name)!r}: {reason}")

    for f in fields(cfg):
        value, bound, choices = getattr(cfg, f.name), f.metadata["bound"], f.metadata["choices"]
        need(not bound or value is None or BOUNDS[bound](value), f.name, f"it must be {bound}")
        need(not choices or value in choices, f.name, f"it must be one of {choices}")
        is_name = isinstance(value, str) and f.name not in ("system", "instruction")
        names_nothing = is_name and ("\0" in value or len(value) > 2000)
        too_large = isinstance(value, int) and abs(value) >= 2**63
        need(not names_nothing, f.name, "it is no text that could name something")
        need(not too_large, f.name, "it is too large")
    need(cfg.prompts_per_step % cfg.minibatches == 0, "minibatches",
         f"it must divide --prompts-per-step ({cfg.prompts_per_step})")
    need(not (cfg.reward and cfg.reward_noise), "reward_noise", "it swaps 0 and 1; a --reward has others")
    need(cfg.steps or cfg.eval_every, "steps", "with --eval-every 0 there is nothing to do")
    need(not (cfg.resume and cfg.overwrite), "overwrite", "it contradicts --resume; give one of the two")
    need(not cfg.lora or find_spec("peft"), "lora", "it needs the package peft (pip install peft)")
    need(not cfg.tracker or find_spec(cfg.tracker), "tracker", "it needs the package of that name")
    need(not cfg.model or cfg.dataset or not cfg.steps, "dataset", "name a data set to train on")
    need(cfg.model or not cfg.dataset, "dataset", "it needs --model: the demo makes its own")
    need(cfg.model or not cfg.eval_dataset, "eval_dataset", "it needs --model: the demo makes its own")
    device = pick_device(cfg)
    need(device.type in ("cpu", "cuda"), "device", "it must be cpu or a CUDA device")
    need(cfg.optimizer_device in ("auto", "cpu", device.type), "optimizer_device", f"the run is on {device}")


MEMORY_SHARE = 15 / 16  # of what is free in the plan, and of a card at the most


def pick_device(cfg: Config) -> torch.device:
    """The device that samples and trains, made ready; a UserError if there is no such device here."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with explained_as(f"--device is {device!r}"):  # an unknown name, or a torch without CUDA
        device = torch.empty(0, device=device).device
    if device.type == "cuda":
        # cuDNN plans attention anew for every length, and in decoding each token has another
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, device)
    return device


def rng(device, *key) -> torch.Generator:
    """A generator that depends on `key` alone, so that no draw depends on how many were made before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))  # 7 bytes fit an int64


# ------------------------------------------------------------------------------------------------------------
# The mathematics. Pure functions on tensors, and the tracker: what GRPO learns from, PIPO's window and what it
# says of a batch, and the one clipped loss that both steps minimise. Lift any of it into a trainer of your own.
# ------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """(Q, G) rewards -> (Q, G) advantages: R - mean, over the sample std + 1e-6 if `normalize_std`.

    A group of equal rewards has advantage exactly 0. Raises ValueError for G < 2 and for a reward that is not
    finite. Source: DeepSeekMath (2402.03300); without the std, Dr. GRPO (2503.20783).
    """
    rewards = rewards.float()  # (Q, G)
    if rewards.dim() != 2 or rewards.shape[1] < 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite and (Q, G) with G >= 2, got {tuple(rewards.shape)}")
    centered = rewards - rewards.mean(1, keepdim=True)  # (Q, G)
    if normalize_std:
        centered = centered / (rewards.std(1, keepdim=True) + 1e-6)  # (Q, G) ddof 1
    mixed = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)  # (Q, 1)
    return torch.where(mixed, centered, 0.0)


class Feedback(NamedTuple):
    """What the tracker has to say of one batch."""
    xi: float  # improvement in standard deviations of the window
    phi: float  # the coefficient it becomes
    mu_his: float  # mean of the window
    sigma_his: float  # its sample standard deviation


class ImprovementTracker:
    """PIPO's new piece: is this batch better than the last K, in units of their own spread? (PIPO, Section 5)

    The sliding window of mean rewards, and xi and phi read against it; K = 8, lambda = 0.1. Read `feedback(mu)`
    first, then `push(mu)` once: a reward in its own window would bound xi.
    """

    def __init__(self, window: int = 8, lam: float = 0.1, xi_clip: float | None = None):
        if window < 2 or not 0 <= lam <= 1:
            raise ValueError(f"needs window >= 2 and 0 <= lam <= 1, got {window} and {lam}")
        self.window, self.lam, self.xi_clip, self.history = window, lam, xi_clip, deque(maxlen=window)

    @property
    def full(self) -> bool:
        return len(self.history) == self.window

    def phi(self, xi: float) -> float:
        """The rectifier: a fall counts lambda times a rise."""
        return xi if xi >= 0 else self.lam * xi

    def feedback(self, mu: float) -> Feedback | None:
        """How `mu` compares with the window; None while it fills, or if its rewards are all equal."""
        if not self.full or len(set(self.history)) == 1:
            return None
        mu_his = statistics.mean(self.history)
        sigma_his = statistics.stdev(self.history)  # ddof 1
        xi = (mu - mu_his) / sigma_his
        if self.xi_clip is not None:
            xi = max(-self.xi_clip, min(self.xi_clip, xi))
        return Feedback(xi, self.phi(xi), mu_his, sigma_his)

    def push(self, mu: float) -> None:
        self.history.append(mu)


def improvement_rewards(advantages: Tensor, phi: float) -> Tensor:
    """(Q, G) advantages of the previous batch, phi -> (Q, G) policy-improvement rewards (Definition 5.1).

    a_i * phi with a_i = G * A_i / sum_j |A_j|, of mean size 1 in every mixed group, however A was normalised:
    for 0/1 rewards 1/(2p) on a right answer and -1/(2(1-p)) on a wrong one. It is 0 in a group without signal.
    """
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
    `ref_logprobs` plus kl_coef times the k3 estimate of KL(policy || reference), averaged the same way.
    `n_sequences`, `n_tokens` (default: those given) are the whole batch's where this is a part of it: the
    parts' losses then add up to the batch's. Metrics are means over this mask's tokens: the share clipped, the
    ratio, and `logprob_gap`, the mean |log-ratio|, which before any update is the disagreement of sampler and
    trainer. Raises ValueError for advantages of another shape.
    """
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
# The update. The training pass: prompt and completion side by side with all padding behind, where causal
# attention never looks, so that no mask is needed; logits only where a completion token is predicted, a few at
# a time. Both steps of an iteration are `update`.
# ------------------------------------------------------------------------------------------------------------


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
    a time, and again in the backward pass instead of being kept.
    """
    chunk = chunk or LOGITS_CHUNK[model.device.type]
    lengths = mask.sum(-1).long().tolist()
    ids = padded([p + c[:n] for p, c, n in zip(prompts, tokens.tolist(), lengths)], model.device)  # (n, S)
    predicts = [[False] * (len(p) - 1) + [True] * n + [False] for p, n in zip(prompts, lengths)]
    predicts = padded(predicts, model.device)  # (n, S) a completion token comes next
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[predicts]  # (tokens, H)
    targets = ids.roll(-1, 1)[predicts]  # (tokens,)
    head = model.get_output_embeddings()

    def logprob(h, y):  # (chunk, H), (chunk,) -> (chunk,)
        return -F.cross_entropy(head(h).float() / temperature, y, reduction="none")

    pieces = [checkpoint(logprob, h, y, use_reentrant=False, preserve_rng_state=False)
              for h, y in zip(hidden.split(chunk), targets.split(chunk))]
    logprobs = torch.zeros_like(mask, dtype=torch.float32)  # (n, T)
    return logprobs.masked_scatter(mask.bool(), torch.cat(pieces))


@torch.no_grad()
def reference_logprobs(model, reference, *args) -> Tensor:
    """token_logprobs under the reference policy: a frozen model, or the model itself with its adapters off."""
    if reference is model:
        model.disable_adapters()
    logprobs = token_logprobs(reference, *args)  # (n, T)
    if reference is model:
        model.enable_adapters()
    return logprobs


def microbatches(rows: Tensor, lengths: Tensor, budget: int) -> list[Tensor]:
    """Split `rows` (n,) into parts alike in length, each padded to at most `budget` tokens, or a single row."""
    parts = [[]]
    for i in rows[lengths[rows].argsort(stable=True)].tolist():  # from short to long: row i sets the width
        if parts[-1] and (len(parts[-1]) + 1) * int(lengths[i]) > budget:
            parts.append([])
        parts[-1].append(i)
    return [torch.tensor(part) for part in parts]


def update(model, optimizer, batch, coefficients, objective, lr, temperature=1.0, minibatches=1,
           microbatch_tokens=8192, max_grad_norm=1.0, reference=None) -> dict:
    """Take `minibatches` optimizer steps on a Batch with coefficients (Q, G); returns mean metrics.

    A minibatch without any signal (or KL) takes no step at all: AdamW would move the weights on momentum and
    decay alone. Rows with coefficient 0 are not computed (their gradient is 0 unless there is a KL) but still
    count in the denominators. Of several gradient norms the largest is returned; means over no token are None.
    Raises FloatingPointError on a loss or gradient that is not finite, and leaves no gradient behind.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    coefficients = coefficients.flatten().cpu()  # (N,)
    lengths = batch.lengths()  # (N,)
    loss_sum, trained, norms = 0.0, 0, []
    sums = dict.fromkeys(("clip_fraction", "ratio", "logprob_gap", *["kl"] * (reference is not None)), 0.0)
    for rows in torch.arange(len(coefficients)).chunk(minibatches):  # groups stay whole
        n_sequences, n_tokens = len(rows), batch.mask[rows].sum()
        if reference is None:
            rows = rows[coefficients[rows] != 0]
        if len(rows) == 0:
            continue
        for part in microbatches(rows, lengths, microbatch_tokens):
            width = int(batch.mask[part].sum(1).max())
            tokens, mask = batch.tokens[part, :width], batch.mask[part, :width]  # (n, width)
            asked = [batch.prompts[i] for i in part.tolist()], tokens, mask, temperature
            ref_logprobs = None if reference is None else reference_logprobs(model, reference, *asked)
            loss, means = policy_loss(
                token_logprobs(model, *asked), batch.behavior_logprobs[part, :width],
                coefficients[part].to(mask.device), mask, objective, ref_logprobs, n_sequences, n_tokens)
            loss.backward()
            loss_sum, count = loss_sum + loss.item(), int(mask.sum())
            for name, value in means.items():
                sums[name] += value * count
            trained += count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
        if not math.isfinite(norm + loss_sum):
            optimizer.zero_grad()
            raise FloatingPointError(f"loss {loss_sum}, gradient norm {norm}")
        optimizer.step()
        norms.append(norm)
        optimizer.zero_grad()
    return {"loss": loss_sum / max(1, len(norms)), "grad_norm": max(norms, default=0.0),
            "skipped_steps": minibatches - len(norms),
            **{name: value / trained if trained else None for name, value in sums.items()}}


# ------------------------------------------------------------------------------------------------------------
# One iteration. PIPO on one screen, in the order of the README's eight steps. What it adds to a trainer are steps
# 4, 6 and 8, with ImprovementTracker and improvement_rewards; the helpers above `iteration` say how, not what.
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one iteration hands to the next."""
    model: torch.nn.Module
    tokenizer: object
    optimizer: object
    tracker: ImprovementTracker
    reference: torch.nn.Module | None = None  # the starting model, where there is a KL to it
    reward: object = None  # the user's own function in place of the verifier
    previous: Batch | None = None  # B_{t-1}, with the advantages it was trained with
    past_xi: list[float] = field(default_factory=list)
    step: int = 0  # iterations done
    read: dict[str, str] = field(default_factory=dict)  # fingerprints of what it began with


def step_with(run: Run, cfg: Config):
    """`update` with all that both steps share: the base objective, and what cfg changes of it."""
    given = {name: getattr(cfg, name) for name in ("clip_low", "clip_high") if getattr(cfg, name) is not None}
    objective = BASES[cfg.base]._replace(max_new_tokens=cfg.max_new_tokens, kl_coef=cfg.kl_coef, **given)
    return partial(update, run.model, run.optimizer, objective=objective, temperature=cfg.temperature,
                   minibatches=cfg.minibatches, microbatch_tokens=cfg.microbatch_tokens,
                   max_grad_norm=cfg.max_grad_norm)


def feedback_coefficient(feedback: Feedback | None, run: Run, cfg: Config) -> tuple[float, str]:
    """What the verification step is scaled with, and why in a word: phi(xi), or a control in its place."""
    if cfg.feedback == "none":
        return 0.0, "off"
    if feedback is None:
        return 0.0, "sigma_zero" if run.tracker.full else "warmup"
    value = cfg.constant if cfg.feedback == "constant" else feedback.phi
    if cfg.feedback == "shuffled":
        if not run.past_xi:
            return 0.0, "warmup"
        drawn = torch.randint(len(run.past_xi), (), generator=rng("cpu", cfg.seed, "xi", run.step))
        value = run.tracker.phi(run.past_xi[int(drawn)])
    return value, "positive" if value > 0 else "negative" if value < 0 else "zero"


def grade_all(batch: Batch, problems: list[Problem], reward=None) -> tuple[Tensor, Counter]:
    """Rewards (Q, G), and how often a completion could not be judged, by cause.

    A `reward` of one's own may return any finite number: mu and xi are then of that scale's mean, and
    G * A / sum |A| still has mean size 1.
    """
    def judged(text, problem):
        if reward is not None:
            try:
                value = float(reward(text, problem.answer, problem.row))
            except SystemExit as error:  # would end the run as if it were done
                raise RuntimeError("the reward function called sys.exit") from error
            if not math.isfinite(value):
                raise ValueError(f"the reward of {text[-100:]!r} is {value}: it must be a finite number")
            return value, None
        grades = [grade(text, gold, problem.thinking) for gold in problem.golds]
        return max(grades, key=lambda graded: graded[0])

    G = len(batch.texts) // len(problems)
    grades = [judged(text, problems[i // G]) for i, text in enumerate(batch.texts)]
    rewards = torch.tensor([value for value, _ in grades], device=batch.tokens.device).view(-1, G)  # (Q, G)
    return rewards, Counter(cause for value, cause in grades if cause and not value)


def fill_in_rewards(run: Run, batch: Batch, cfg: Config, *round_) -> Counter:
    """Grade a batch, with --reward-noise turned round; how often a completion could not be judged, by cause."""
    rewards, failures = grade_all(batch, batch.problems, run.reward)  # (Q, G)
    noise = torch.rand(rewards.shape, generator=rng("cpu", cfg.seed, "noise", run.step, *round_))  # (Q, G)
    flipped = (noise < cfg.reward_noise).to(rewards.device)  # the same whatever --feedback
    batch.rewards = torch.where(flipped, 1 - rewards, rewards)
    return failures


@torch.no_grad()
def trainer_logprobs(model, batch: Batch, rows: Tensor, cfg: Config) -> Tensor:
    """The log-probabilities (N, T) of some `rows` of a batch as the trainer computes them; 0 elsewhere."""
    model.train()
    again = torch.zeros_like(batch.mask)  # (N, T)
    for part in microbatches(rows, batch.lengths(), cfg.microbatch_tokens):
        prompts = [batch.prompts[i] for i in part.tolist()]
        again[part] = token_logprobs(model, prompts, batch.tokens[part], batch.mask[part], cfg.temperature)
    return again


def settle_behavior(run: Run, batch: Batch, cfg: Config) -> None:
    """Whose log-probabilities the ratio is against; before the first update sampler and trainer must agree."""
    if run.step == 1:
        rows = batch.lengths().argsort(descending=True)[:8]  # (n,) the longest
        again = trainer_logprobs(run.model, batch, rows, cfg)  # (N, T)
        gap = (again - batch.behavior_logprobs)[rows].abs().sum().item() / batch.mask[rows].sum().item()
        if gap > (1e-2 if run.model.dtype == torch.float32 else 0.1):
            raise UserError(f"sampler and trainer disagree by {gap:.2g} in the log-probability of a token "
                            "before any update: this model, or its attention, is not supported here")
    narrow = cfg.base == "gspo" and run.model.dtype == torch.bfloat16  # a clip within the sampler's rounding
    if cfg.behavior == "trainer" or cfg.behavior == "auto" and narrow:
        batch.behavior_logprobs = trainer_logprobs(run.model, batch, torch.arange(len(batch.texts)), cfg)


def ask(run: Run, problems: list[Problem], cfg: Config, *round_) -> Batch:
    """Sample the groups of these problems, with the log-probabilities that the ratio is against."""
    generator = rng(run.model.device, cfg.seed, "sample", run.step, *round_)
    batch = sample(run.model, run.tokenizer, [p.prompt for p in problems], cfg.group_size, cfg.max_new_tokens,
                   cfg.temperature, cfg.top_p, generator, cfg.cache_tokens)
    batch.problems = problems
    settle_behavior(run, batch, cfg)
    return batch


def fill_up(run: Run, batch: Batch, problems: list[Problem], cfg: Config, failures: Counter):
    """More rounds of prompts until Q groups are mixed: the Q groups to train on, mixed ones first, and mu.

    mu, and `failures`, are over every sample drawn: over the kept groups alone mu would be pulled towards 1/2.
    Source: DAPO.
    """
    Q, batches, rewards = cfg.prompts_per_step, [batch], batch.rewards  # (q, G)
    for round_ in range(1, cfg.dynamic_sampling + 1):
        if (rewards.amax(1) > rewards.amin(1)).sum() < Q:
            batches.append(ask(run, problems[round_ * Q:(round_ + 1) * Q], cfg, round_))
            failures.update(fill_in_rewards(run, batches[-1], cfg, round_))
            rewards = torch.cat([rewards, batches[-1].rewards])
    mixed = rewards.amax(1) > rewards.amin(1)  # (q,)
    groups = mixed.long().argsort(descending=True, stable=True)[:Q].tolist()
    return joined(batches, groups), rewards.mean(dtype=torch.float64).item()


def iteration(run: Run, problems: list[Problem], cfg: Config) -> tuple[Batch, dict]:
    """One iteration of PIPO on Q problems; carries `run` on and returns B_t and a row of metrics.

    Any problems behind the first Q are for --dynamic-sampling.
    """
    run.step, clock = run.step + 1, [time.perf_counter()]
    step_on = step_with(run, cfg)

    # 1. sample B_t ~ pi_theta_t
    batch = ask(run, problems[:cfg.prompts_per_step], cfg)
    clock.append(time.perf_counter())

    # 2. grade it; mu_t is the mean over every sample, before any is left out
    failures = fill_in_rewards(run, batch, cfg)
    mu = batch.rewards.mean(dtype=torch.float64).item()
    if cfg.dynamic_sampling:
        batch, mu = fill_up(run, batch, problems, cfg, failures)
    # 3. how much better each sample did than its group
    batch.advantages = group_advantages(batch.rewards, BASES[cfg.base].normalize_std)  # (Q, G)
    if cfg.mask_truncated:  # their group's mean and spread, and mu, keep them
        batch.advantages[batch.truncated.view_as(batch.advantages)] = 0.0
    clock.append(time.perf_counter())

    # 4. look back, did the last updates help? xi against the last K rewards; 5. phi, or a control in its place
    feedback = run.tracker.feedback(mu)
    coefficient, verdict = feedback_coefficient(feedback, run, cfg)
    # 6. verification: a second step on B_{t-1}, its ratio against the policy that sampled it
    verification = {}
    if coefficient:
        pi_rewards = improvement_rewards(run.previous.advantages, coefficient)  # (Q, G)
        if pi_rewards.any():
            verification = step_on(run.previous, pi_rewards, lr=cfg.pi_lr or cfg.lr)
        else:
            coefficient, verdict = 0.0, "zero_signal"
    clock.append(time.perf_counter())

    # 7. exploration: the base algorithm's step on B_t, its ratio still against the policy that sampled it
    for _ in range(cfg.epochs):
        exploration = step_on(batch, batch.advantages, lr=cfg.lr, reference=run.reference)
    clock.append(time.perf_counter())

    # 8. push mu_t, once, after it was read; keep B_t
    run.tracker.push(mu)
    if feedback:
        run.past_xi.append(feedback.xi)
    run.previous = batch
    phases = ("sample", "grade", "verification", "exploration")
    return batch, {
        "step": run.step, "mu": mu, "feedback": verdict, "coefficient": coefficient,
        **(feedback or Feedback(None, None, None, None))._asdict(), **exploration,
        **{f"pi_{name}": value for name, value in verification.items()}, **batch.metrics(),
        **{f"grader_{cause}": count for cause, count in failures.items()},
        **{f"seconds_{phase}": end - start for phase, start, end in zip(phases, clock, clock[1:])}}


# ------------------------------------------------------------------------------------------------------------
# Training. The loop around `iteration`: what it starts from, which problems it gets, what is said and kept.
# ------------------------------------------------------------------------------------------------------------


def pick_problems(problems: list[Problem], step: int, cfg: Config) -> list[Problem]:
    """The prompts of a step: consecutive pieces of one fresh shuffle an epoch, found from the step alone."""
    n = len(problems)
    per_step = cfg.prompts_per_step * (1 + cfg.dynamic_sampling)  # those of later rounds may not be needed
    places = range((step - 1) * per_step, step * per_step)
    orders = {epoch: torch.randperm(n, generator=rng("cpu", cfg.seed, "order", epoch)).tolist()
              for epoch in {place // n for place in places}}
    return [problems[orders[place // n][place % n]] for place in places]


def evaluate(run: Run, held_out: dict[str, list[Problem]], cfg: Config, generator=None) -> dict:
    """pass@1 of each held-out set, the mean over --eval-samples a problem, its standard error over problems.

    With several samples also the unbiased pass@k (2107.03374) for k = 2, 4, ...; `eval_*` is the mean over sets.
    """
    start, scores, n = time.perf_counter(), {}, cfg.eval_samples
    temperature = cfg.temperature if cfg.eval_temperature is None else cfg.eval_temperature
    for name, problems in held_out.items():
        batch = sample(run.model, run.tokenizer, [p.prompt for p in problems], n, cfg.max_new_tokens,
                       temperature, cfg.eval_top_p or cfg.top_p, generator, cfg.cache_tokens)
        rewards = grade_all(batch, problems, run.reward)[0].double()  # (Q, n)
        scores[f"eval/{name}/pass@1"] = rewards.mean().item()
        scores[f"eval/{name}/stderr"] = rewards.mean(1).std(correction=0).item() / math.sqrt(len(problems))
        scores[f"eval/{name}/truncated"] = batch.truncated.float().mean().item()
        is_right_or_wrong = torch.isin(rewards, torch.tensor([0.0, 1.0], device=rewards.device)).all()
        for k in (2**i for i in range(1, n.bit_length() if is_right_or_wrong else 1)):
            misses = [math.comb(n - int(c), k) / math.comb(n, k) for c in rewards.sum(1)]
            scores[f"eval/{name}/pass@{k}"] = 1 - statistics.mean(misses)
    for key in ("pass@1", "stderr", "truncated"):
        values = [scores[f"eval/{name}/{key}"] for name in held_out]
        size = math.hypot(*values) if key == "stderr" else sum(values)
        scores[f"eval_{key}"] = size / len(values)
    return scores | {"seconds_evaluation": time.perf_counter() - start}


def pick_samples(batch: Batch, step: int, show: bool) -> list[dict]:
    """A right and a wrong completion of the batch, where it has both; `show` puts them on the screen too."""
    flat, G, picks = batch.rewards.flatten(), batch.rewards.shape[1], []  # (N,)
    for i in sorted({int(flat.argmax()), int(flat.argmin())}):
        problem, text, cut = batch.problems[i // G], batch.texts[i], batch.truncated[i].item()
        picks.append({"step": step, "problem": problem.text, "answer": problem.answer, "completion": text,
                      "reward": flat[i].item(), "truncated": cut})
        if show:
            asked, given = " ".join(problem.text.split())[-100:], " ".join(text.split())[-300:]
            tqdm.write(f"step {step}, reward {flat[i]:g}, answer {problem.answer}: {asked} -> {given}"
                       + " [cut off]" * cut)
    return picks


def held_out_names(cfg: Config) -> list[str]:
    """The data sets to evaluate on."""
    names = [cfg.eval_dataset] if isinstance(cfg.eval_dataset, str) else cfg.eval_dataset
    return names if cfg.eval_every else []


def load_reward(spec: str):
    """The function that `file.py:name` names."""
    path, _, name = spec.rpartition(":")
    sys.path.append(str(Path(path).absolute().parent))  # for what stands beside it
    with explained_as(f"--reward is {spec!r}, and that file does not run"):
        found = runpy.run_path(path).get(name) if Path(path).is_file() else None
    if not callable(found):
        raise UserError(f"--reward is {spec!r}: it must be file.py:function; {path} has no function {name!r}")
    return found


@contextmanager
def open_tracker(cfg: Config, out: Path):
    """Yields a function that sends a row of metrics to --tracker, whose package is imported only when asked for."""
    if cfg.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(out) as writer:
            yield lambda row: [writer.add_scalar(name, value, row["step"]) for name, value in row.items()
                               if isinstance(value, (int, float))]
    elif cfg.tracker:
        service = importlib.import_module(cfg.tracker)
        service.init(project="pipo", name=out.name, config=asdict(cfg))
        yield lambda row: service.log(row, step=row["step"])
        service.finish()
    else:
        yield lambda row: None


def set_up(cfg: Config, out: Path, state: dict | None, reward):
    """The run at its start, or where its checkpoint `state` left it, its problems, and cfg with no blanks left.

    Cheap checks come before expensive ones, and files of an earlier run are deleted last.
    """
    device = pick_device(cfg)
    if state:  # not to be decided anew
        cfg = replace(cfg, dtype=state["dtype"], optimizer_device=state["optimizer_device"],
                      cache_tokens=cfg.cache_tokens or state["cache_tokens"])
    if cfg.model:
        path = cfg.model
        with torch.device("meta"):  # shapes only
            shapes = load_or_explain(path, "model", lambda: AutoModelForCausalLM.from_config(
                load_config(path), dtype=torch.bfloat16, trust_remote_code=False))
        cfg, table = plan_memory(shapes, cfg, device, out)
        tqdm.write(f"memory, as far as it can be told beforehand:\n{table}")
        rows = load_rows(cfg.dataset, "train") if cfg.steps else None
        eval_sets = {name: load_rows(name, "test") for name in held_out_names(cfg)}
    else:
        path, cfg = str(out / "start"), replace(cfg, dtype=cfg.dtype.replace("auto", "float32"))
        eval_rows, warm, rows = demo_rows(cfg.seed)
        eval_sets = {"demo": eval_rows} if cfg.eval_every else {}
        if not state:
            build_demo(path, cfg, warm, device)
    tokenizer = load_or_explain(
        path, "tokenizer of", lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    held_out, own = {}, reward is not None
    problems = read_problems(rows, tokenizer, cfg, cfg.dataset or "the demo", own) if cfg.steps else []
    for name, eval_rows in eval_sets.items():
        found = read_problems(eval_rows, tokenizer, cfg, name, own, trained_on=problems)
        label = Path(name).stem
        while label in held_out:
            label += "+"
        held_out[label] = found[:cfg.eval_limit or None]
    asked = [p.prompt for some in (problems, *held_out.values()) for p in some]
    check_positions(path, max(map(len, asked)) + cfg.max_new_tokens)
    torch.manual_seed(cfg.seed)  # LoRA's adapters start at random
    model, reference = load_model(path, device, cfg.dtype, cfg.lora), None
    # vocab_size leaves out added tokens, which matter in a prompt only: gemma-3-1b has no row for its image's
    highest = max(tokenizer.vocab_size - 1, *map(max, asked))
    if highest >= model.get_input_embeddings().num_embeddings:
        raise UserError(f"the tokenizer of {path} has a token {highest}, but the model no embedding for it")
    if cfg.kl_coef:
        reference = model if cfg.lora else load_model(path, device, cfg.dtype, trainable=False)
    tracker = ImprovementTracker(cfg.window, cfg.lam, cfg.xi_clip)
    run = Run(model, tokenizer, make_optimizer(model, cfg) if cfg.steps else None, tracker, reference, reward)
    run.read = fingerprints(run, problems, held_out, cfg)
    if state:
        load_checkpoint(run, state, out)
    else:
        clear_run(out)
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2))
    return run, problems, held_out, cfg


def loop(run: Run, problems: list[Problem], held_out: dict, cfg: Config, settings: dict, out: Path, track):
    """Iterations until cfg.steps or a signal to stop, with evaluations, rows of metrics, and checkpoints."""
    saved, save_seconds = time.perf_counter(), {}

    def log(row, with_evaluation):
        if with_evaluation:  # each time with the same random numbers
            row |= evaluate(run, held_out, cfg, rng(run.model.device, cfg.seed, "evaluation"))
            for name in held_out:
                told = {key.rpartition("/")[2]: row[key] for key in row if key.startswith(f"eval/{name}/")}
                scores = ", ".join(f"{key} {value:.3f}" for key, value in told.items())
                tqdm.write(f"step {run.step}: {name} {scores}")
        append_jsonl(out / "metrics.jsonl", row)
        track(row)

    if run.step == 0 and held_out:
        log({"step": 0}, with_evaluation=True)
    with signals_caught() as caught, tqdm(initial=run.step, total=cfg.steps, desc="pipo", unit="step") as bar:
        while run.step < cfg.steps:
            try:
                batch, row = iteration(run, pick_problems(problems, run.step + 1, cfg), cfg)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {run.step}: {error}; the last checkpoint is as it was")
            last = run.step == cfg.steps
            evaluate_now = held_out and (last or run.step % cfg.eval_every == 0)
            log(row | save_seconds | {"memory_gb": peak_memory_gb(run.model.device)}, evaluate_now)
            show = cfg.show_every and run.step % cfg.show_every == 0
            append_jsonl(out / "samples.jsonl", *pick_samples(batch, run.step, show))
            bar.set_postfix({name: row[name] for name in ("mu", "xi", "phi") if row[name] is not None})
            bar.update()
            begun, save_seconds = time.perf_counter(), {}
            overdue = begun - saved > 60 * cfg.save_minutes
            save_now = last or caught or overdue or run.step % (cfg.save_every or cfg.steps) == 0
            if cfg.save_every and save_now:
                save_checkpoint(run, settings, cfg, out)
                saved = time.perf_counter()
                save_seconds = {"seconds_save": saved - begun}  # in the next row: this one is saved
            if caught and save_now and not last:  # a signal during the save need not wait for another step
                how = "--resume (without --overwrite) goes on" if cfg.save_every else "nothing was saved"
                raise KeyboardInterrupt(f"stopped after step {run.step}; {how}", caught[0])


def train(cfg: Config, reward=None) -> list[dict]:
    """Run PIPO as `cfg` says; returns the rows of metrics.jsonl.

    `reward`: a function (completion, answer, row of the data set) -> number, in place of the verifier. Raises
    UserError for what the user can put right, FloatingPointError where numbers stop being finite, and
    KeyboardInterrupt, its message saying how to go on, after a signal to stop.
    """
    validate(cfg)
    settings = asdict(cfg)  # as they were given, blanks and all
    if cfg.reward and reward is None:
        reward = load_reward(cfg.reward)
    with run_folder(cfg) as out:
        run, problems, held_out, cfg = set_up(cfg, out, open_run(cfg, out), reward)
        size, tested = run.model.num_parameters() / 1e6, sum(map(len, held_out.values()))
        tqdm.write(f"{cfg.base} with feedback {cfg.feedback}: {size:,.1f}M parameters on {run.model.device}; "
                   f"{len(problems):,} training and {tested:,} held-out problems; steps {run.step + 1} to "
                   f"{cfg.steps} of {cfg.prompts_per_step} prompts x {cfg.group_size} samples; files: {out}")
        with open_tracker(cfg, out) as track:
            loop(run, problems, held_out, cfg, settings, out, track)
        if cfg.steps:
            save_model(run, out / "model")
        rows = read_jsonl(out / "metrics.jsonl")
    verdicts = Counter(row["feedback"] for row in rows if "feedback" in row)
    print(f"feedback: {dict(verdicts)}; the run's files are in {out}")
    return rows


# ------------------------------------------------------------------------------------------------------------
# Sampling. Each prompt is read once and its cache copied to the G rows of its group; rows that have ended are
# dropped, and rows for which there is no room wait. The sampler alone knows what was drawn and how likely it
# was, so the mask and the behavior policy's log-probabilities come from here, never from token ids later.
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """N completions, the G of a prompt side by side. Padding stands behind; `mask` says what was sampled."""
    prompts: list[list[int]]  # N lists of token ids
    tokens: Tensor  # (N, T) sampled token ids
    mask: Tensor  # (N, T) 1 on every sampled token, the EOS that ended it included
    behavior_logprobs: Tensor  # (N, T) under the policy that sampled, at the sampling temperature
    truncated: Tensor  # (N,) True where the length limit cut it off
    texts: list[str]  # N decoded completions
    cache_tokens: int | None = None  # the room that was left for the cache: less if memory ran out
    out_of_memory: int = 0  # how often it did
    rewards: Tensor | None = None  # (Q, G) filled in once the completions are graded
    advantages: Tensor | None = None  # (Q, G)
    problems: list[Problem] | None = None  # Q, what was asked

    def lengths(self) -> Tensor:
        """Tokens of each prompt and its completion (N,), on the CPU."""
        return torch.tensor(list(map(len, self.prompts))) + self.mask.sum(1).long().cpu()

    def metrics(self) -> dict:
        """What a graded batch says of the policy's health."""
        n_tokens = self.mask.sum().item()
        return {"entropy": -self.behavior_logprobs.sum().item() / n_tokens, "tokens": int(n_tokens),
                "completion_length": n_tokens / len(self.prompts), "cache_tokens": self.cache_tokens,
                "truncated": self.truncated.float().mean().item(), "out_of_memory": self.out_of_memory,
                "zero_signal": (self.advantages == 0).all(1).float().mean().item()}


def joined(batches: list[Batch], groups: list[int]) -> Batch:
    """These groups, counted through several graded batches, as one batch."""
    G = batches[0].rewards.shape[1]
    rows = [group * G + i for group in groups for i in range(G)]  # N

    def chosen(name, places=rows):
        every = [item for batch in batches for item in getattr(batch, name)]
        return [every[i] for i in places]

    names = ("tokens", "mask", "behavior_logprobs")
    tensors = [pad_sequence(chosen(name), batch_first=True) for name in names]  # (N, T) each
    return Batch(chosen("prompts"), *tensors, torch.stack(chosen("truncated")), chosen("texts"),
                 batches[-1].cache_tokens, sum(batch.out_of_memory for batch in batches),
                 torch.stack(chosen("rewards", groups)), problems=chosen("problems", groups))


def eos_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: Qwen3 has two, and models that miss one ramble on."""
    configured = model.generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    if tokenizer.chat_template:  # the EOS of a base model ends a document; its template ends a turn otherwise
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        with explained_as("the chat template of this model"):
            _, answer, tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")
        first = tokenizer(tail.strip(), add_special_tokens=False).input_ids[:1] if answer else []
        ids.update(i for i in first if i in tokenizer.added_tokens_decoder)
    ids.discard(None)
    if not ids:
        raise UserError("neither the model's generation_config nor its tokenizer names an end of sequence")
    return sorted(ids)


def draw(logits, temperature=1.0, top_p=1.0, generator=None) -> tuple[Tensor, Tensor]:
    """Draw one token a row from (n, V) logits; temperature 0 takes the likeliest.

    Returns tokens (n,) and their log-probabilities (n,) under softmax(logits / temperature), before top-p
    restricts what may be drawn: that is what the training step can compute again. (At temperature 0: at 1.)
    """
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
        tokens = torch.searchsorted(sums, u * sums[:, -1:], right=True)  # (n, 1)
        tokens = tokens.clamp(max=sums.shape[1] - 1).squeeze(-1)  # (n,)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def shared_heads_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' SDPA; at one new token a row, the queries that share a key-value head become its rows.

    Under a mask transformers would copy every key-value head to each of its queries, at every token: with long
    prompts that is most of the time of sampling. query (n, heads, S, D), key and value (n, kv heads, S', D).
    """
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

    Empties `caches` layer by layer, so that the old memory is free before the next layer's is taken.
    """
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
    the q each row is (n,).
    """
    place = {prefix: k for k, prefix in enumerate(dict.fromkeys(prefixes))}
    ids = padded(place, model.device, "left")  # (q, P)
    seen = padded([[1] * len(prefix) for prefix in place], model.device, "left")  # (q, P)
    caches, logits = [], []
    last = torch.tensor([-1], device=model.device)  # as 1 it makes a slice, for which a frozen head is copied
    for part, mask in zip(*(x.split(max(1, prefill_tokens // ids.shape[1])) for x in (ids, seen))):
        caches.append(DynamicCache())
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        output = model(part, attention_mask=mask, position_ids=position_ids, use_cache=True, logits_to_keep=last,
                       **{cache_name(model): caches[-1]})
        logits.append(output.logits[:, -1])
    rows = torch.tensor([place[prefix] for prefix in prefixes], device=model.device)  # (n,)
    return caches, torch.cat(logits)[rows], seen[rows], rows


def decode_chunk(model, cache, seen, token, logits, steps, temperature, top_p, generator):
    """Draw `steps` tokens for each of n rows; nothing is read back meanwhile, so that the GPU never waits.

    seen (n, P); the last token drawn (n,), not in the cache yet, or None and the next one's logits (n, V).
    Returns tokens (n, steps), their log-probabilities, and `seen` as it is now.
    """
    tokens, logprobs, name = [], [], cache_name(model)
    config = model.config.get_text_config()
    is_plain = getattr(config, "rope_parameters", None) and not getattr(config, "sliding_window", None)
    is_plain = is_plain and model.config._attn_implementation != "eager"  # which adds masks
    for _ in range(steps):
        if token is not None:
            seen = F.pad(seen, (0, 1), value=1)  # (n, P + 1)
            position_ids = seen.sum(-1, keepdim=True) - 1  # (n, 1)
            # where all layers look at all tokens, a ready mask: transformers would wait for the GPU to make one
            mask = seen[:, None, None].bool() if is_plain else seen
            logits = model(token[:, None], attention_mask=mask, position_ids=position_ids, use_cache=True,
                           **{name: cache}).logits[:, -1]  # (n, V)
        token, logprob = draw(logits, temperature, top_p, generator)  # (n,), (n,)
        tokens.append(token)
        logprobs.append(logprob)
    return torch.stack(tokens, 1), torch.stack(logprobs, 1), seen


@dataclass
class Row:
    """One completion while it grows."""
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    def __len__(self):
        return len(self.prompt) + len(self.tokens)

    def take(self, tokens, logprobs, eos, limit):
        """Append what was drawn up to the first EOS, or to `limit` tokens in all."""
        n = next((k for k, token in enumerate(tokens, 1) if token in eos), len(tokens))
        n = min(n, limit - len(self.tokens))
        self.tokens += tokens[:n]
        self.logprobs += logprobs[:n]
        self.ended = self.tokens[-1] in eos or len(self.tokens) == limit


def decode(tokenizer, completions: list[list[int]], eos: set[int]) -> list[str]:
    """Texts of completions without their ends and special tokens, but with the marks of a thought."""
    thoughts = {tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>")}
    hidden = set(tokenizer.all_special_ids) - thoughts | eos  # all ends, where the tokenizer knows only one
    return [tokenizer.decode([token for token in tokens if token not in hidden]) for tokens in completions]


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size=1, max_new_tokens=256, temperature=1.0, top_p=1.0,
           generator=None, cache_tokens=None, chunk=None, prefill_tokens=16384) -> Batch:
    """Sample `group_size` completions of each of Q prompts (lists of token ids); temperature 0 is greedy.

    Works in waves of as many rows as the cache has room for. Every `chunk` tokens the rows that have ended are
    dropped, and where the rest would outgrow `cache_tokens` (None: no bound), some wait for a later wave, which
    reads in what they have so far. Running out of memory is no more than that: the wave ends, and is tried
    again, the first time with the same room, later with less; only a single row that does not fit raises.
    Raises FloatingPointError where the model's probabilities are not finite.
    """
    model.eval()
    device, eos, room = model.device, set(eos_ids(model, tokenizer)), cache_tokens or sys.maxsize
    chunk = chunk or max(1, min(max_new_tokens // 8, 128))  # a row that has ended is carried on to the chunk's end
    rows = [Row(prompt) for prompt in prompts for _ in range(group_size)]  # N

    def carry_on(wave):
        """Carry on these rows until each has ended or has to wait."""
        caches, logits, seen, kept = prefill(model, [(*r.prompt, *r.tokens) for r in wave], prefill_tokens)
        token = None
        while wave:
            caches = [move_rows(caches, kept, chunk)]
            steps = min(chunk, max_new_tokens - min(len(row.tokens) for row in wave))
            tokens, logprobs, seen = decode_chunk(
                model, caches[0], seen, token, logits, steps, temperature, top_p, generator)
            if not logprobs.isfinite().all():
                raise FloatingPointError("the model's probabilities are not finite")
            for row, new_tokens, new_logprobs in zip(wave, tokens.tolist(), logprobs.tolist()):
                row.take(new_tokens, new_logprobs, eos, max_new_tokens)
            alive = [k for k, row in enumerate(wave) if not row.ended]
            fit = max(1, room // (seen.shape[1] + 1 + chunk))  # after one more chunk; the others wait
            kept = torch.tensor(alive[:fit], dtype=torch.long, device=device)
            wave, seen, token = [wave[k] for k in alive[:fit]], seen[kept], tokens[kept, -1]

    waiting, out_of_memory = rows, 0
    while waiting:
        waiting = sorted(waiting, key=len)  # alike in length: little padding
        n = max(1, sum(k * (len(row) + chunk) <= room for k, row in enumerate(waiting, 1)))  # that fit
        try:
            carry_on(waiting[:n])
        except torch.OutOfMemoryError:
            out_of_memory += 1
            if n == 1:
                raise
            if out_of_memory > 1:
                room = int(0.8 * min(room, sum(len(row) + chunk for row in waiting[:n])))
        # Behind the except block, which holds the tensors of a failed pass: training, and a wave with less room,
        # want pieces of other sizes than the allocator has kept. (Without a GPU this does nothing.)
        torch.cuda.empty_cache()
        waiting = [row for row in waiting[n:] + waiting[:n] if not row.ended]

    tokens = padded([row.tokens for row in rows], device)  # (N, T) T is the longest, no longer the limit
    behavior_logprobs = padded([row.logprobs for row in rows], device)  # (N, T)
    mask = padded([[1.0] * len(row.tokens) for row in rows], device)  # (N, T)
    truncated = torch.tensor([row.tokens[-1] not in eos for row in rows], device=device)  # (N,)
    texts = decode(tokenizer, [row.tokens for row in rows], eos)
    left = None if room == sys.maxsize else room
    prompts = [row.prompt for row in rows]
    return Batch(prompts, tokens, mask, behavior_logprobs, truncated, texts, left, out_of_memory)


# ------------------------------------------------------------------------------------------------------------
# Verifying. The verifier is the objective: a wrong "no" punishes a right answer, a wrong "yes" is a hole. An
# answer is found, cleaned, read by recursive descent into numbers, and compared; nothing is ever executed.
# There is no timer: what may be asked is limited before any work is done.
# ------------------------------------------------------------------------------------------------------------

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

    The last box; without any box <answer>x</answer>, then the last `#### x`, then "the answer is x" near the
    end. Thoughts do not count, and `thinking` says that the prompt already opened one. There is no fallback:
    a truncated or empty last box, or bare numbers in prose, are no answer.
    """
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
HEDGES = re.compile(r"""half|halve|third|quarter|[efhnst]\w*[dfhnrx]th|\w+t(?:y|ieth)|\w+teen(?:th)?|zero|one
    |two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|hundred|thousand|\w*illion(?:th)?|k|M|bn
    |mil|lakh|crore|score|gross|not|neither|maybe|perhaps?|possibly|probably|likely|but|if|unless|except
    |alternatively|less|fewer|more|greater|least|most|about|approx\w*|around|roughly|nearly|almost|ish|up
    |otherwise|plus|below|point|squared?|cubed?|factorial|root|once|twice|thrice|(?:doubl|halv|tripl)ed?
    |negat\w+|inverse|reciprocal|recurring|repeating|remainder|max\w*|min\w*mum|\w+uary|march|april|may|june
    |july|august|(?:septem|octo|novem|decem)ber""", re.VERBOSE)
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


# --- Judging


def gold_of(answer):
    """The bare answer of a gold, which may be a solution that ends in `#### x` or has a box."""
    return extract_answer(answer) if "####" in answer or BOX.search(answer) else answer


def grade(completion: str, answer: str, thinking: bool = False) -> tuple[float, str | None]:
    """(1.0 or 0.0, cause): whether the final answer of a completion equals the given answer.

    `answer` is a bare answer, a GSM8K solution with its `#### x`, or a MATH solution with its box. `thinking`
    says that the prompt opened a thought. `cause` is None when both could be compared, else "no_answer",
    "unparsed" or "too_big", and then only the same cleaned text is equal. Never executes anything, never
    raises, changes nothing, keeps nothing.
    """
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


def readable(answer: str) -> bool:
    """Whether a gold can be read; one that cannot is only compared as text."""
    return grade(rf"\boxed{{{gold_of(answer)}}}", answer)[1] is None


def verify(completion: str, answer: str, thinking: bool = False) -> float:
    """1.0 if the final answer of a completion equals the given answer, else 0.0; see `grade`."""
    return grade(completion, answer, thinking)[0]


# ------------------------------------------------------------------------------------------------------------
# Data and models. All that touches the hub, a dataset or a chat template, so that the rest sees token ids and
# tensors.
# ------------------------------------------------------------------------------------------------------------

ASKING = ("prompt", "problem", "question", "messages")  # the first of these columns asks
# Each row's answer is in the first of these that has one.
ANSWERING = ("reward_model", "final_answer", "expected_answer", "answer", "ground_truth", "solution")
MARKED = re.compile(r"\\(?:boxed|fbox)|####")  # a text that says what in it is the answer
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes
ROLES = {"human": "user", "gpt": "assistant"}
READERS = {".parquet": {"path": "parquet"}, ".jsonl": {"path": "json"}, ".json": {"path": "json"},
           ".csv": {"path": "csv"}, ".tsv": {"path": "csv", "sep": "\t"}}


class Problem(NamedTuple):
    """One question with its answers, ready to be asked."""
    text: str  # the question, for people
    prompt: list[int]  # token ids
    answer: str  # the first gold, for people; "" without any
    golds: tuple[str, ...]  # any of them is right
    row: dict  # of the dataset, whole, for a reward function of the user's own; otherwise {}
    thinking: bool = False  # the prompt opens a thought, which the completion has to end


def load_or_explain(name: str, what: str, load):
    """load(), with the failure to find or read `name`, a path or a name on the hub, told in one sentence."""
    if not os.path.exists(name) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name):
        raise UserError(f"the {what} {name} does not exist")
    with explained_as(f"the {what} {name} can be read neither here nor from the hub"):
        return load()


def load_rows(name: str, split: str) -> datasets.Dataset:
    """The rows of a file, a folder or a hub dataset: those of `split`, or of what comes nearest to it."""
    path, (hub_name, _, config) = os.path.expanduser(name), name.partition(":")
    is_file, is_folder, ending = os.path.isfile(path), os.path.isdir(path), Path(path).suffix.lower()
    literal = glob.escape(os.path.abspath(path))  # datasets would read br1.jsonl for br[1].jsonl
    if is_file and (ending not in READERS or os.path.getsize(path) == 0):
        raise UserError(f"the dataset {name} is empty or not a {', '.join(READERS)} file")
    saved = os.path.exists(f"{path}/state.json") or os.path.exists(f"{path}/dataset_dict.json")
    if is_folder and not saved and literal != os.path.abspath(path):
        raise UserError(f"the folder {name} has a [, ? or * in its path, a pattern to datasets: rename it")
    source = {"path": path} if is_folder else {"path": hub_name, "name": config or None}
    if is_file:
        source = READERS[ending] | {"data_files": literal}
    load = partial(datasets.load_from_disk, path) if saved else partial(datasets.load_dataset, **source)
    splits = load_or_explain(path, "dataset", load)
    if isinstance(splits, datasets.Dataset):  # saved to disk without splits
        return splits
    wanted = (split, "validation", "valid", "val", "dev", *splits)  # best first
    found = next((candidate for candidate in wanted if candidate in splits), None)
    if found is None:
        raise UserError(f"the dataset {name} has no rows")
    if found != split and not is_file:  # a file has no other
        tqdm.write(f"the dataset {name} is read from its split {found!r}")
    return splits[found]


def find_columns(rows, columns: str, name: str, own_reward: bool, held_out: bool):
    """The name of the column that asks, and a list of those that answer: `columns`, or else known ones.

    Held-out problems may lack those of --columns. A reward function of one's own needs no answers.
    """
    there = rows.column_names if isinstance(rows, datasets.Dataset) else list(rows[0] if rows else ())
    asking, *answering = [column.strip() for column in columns.split(",")]
    if not columns or held_out and not {asking, *answering} <= set(there):
        spelled = {column.lower(): column for column in sorted(there)}  # Problem is problem
        asking = next((spelled[column] for column in ASKING if column in spelled), None)
        answering = [spelled[column] for column in ANSWERING if column in spelled]
    if not {asking, *answering} <= set(there) or not (answering or own_reward):
        given = f"--columns is {columns!r}, but " if columns else ""
        raise UserError(f"{given}{name} has the columns {', '.join(there) or '(none)'}; understood are "
                        f"{', '.join(ASKING)} + {', '.join(ANSWERING)}, or as --columns question,answer says")
    return asking, answering


def read_golds(cell, worked: bool = False) -> list[str]:
    """The answers in a cell, any of which is right; so an answer of two parts is a single text, "1, 2".

    Of a `worked` solution it is the last box (or GSM8K's ####), and none without one.
    """
    if isinstance(cell, str) and re.match(r'\s*[\[{]\s*"', cell):  # JSON; [1, 2] is an interval
        with suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    if isinstance(cell, dict):  # verl: {"ground_truth": "5" or ["5"], ...}
        return read_golds(cell.get("ground_truth"), worked)
    if isinstance(cell, list):
        return [gold for item in cell for gold in read_golds(item, worked)]
    if isinstance(cell, float) and cell.is_integer():  # a gap in a column makes all its numbers floats
        cell = int(cell)
    text = "" if cell is None else str(cell).strip()
    bare = not worked and not MARKED.search(text)
    answer = extract_answer(text) or (text if bare else "")
    none = answer.lower() in ("", "[]", "nan", "proof", "notfound")  # the last two: NuminaMath-1.5
    return [] if none else [answer]


def read_messages(cell, system: str = "") -> list[dict]:
    """The messages of a prompt, a text being one of the user's; [] where one has no role or is not all text.

    Understands {"role", "content"} and {"from", "value"}, and contents in parts. `system` is put in front
    where there is no such message.
    """
    messages = []
    for turn in cell if isinstance(cell, list) else [{"role": "user", "content": cell}]:
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not role or not all(isinstance(text, str) for text in texts):
            return []
        messages.append({"role": ROLES.get(str(role), str(role)), "content": "".join(texts)})
    if system and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def encode(tokenizer, messages: list[dict], thinking: bool = False) -> list[int]:
    """Token ids of a prompt: through the chat template where there is one, as plain text otherwise.

    An assistant's message at the end is the start of the completion.
    """
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(message["content"] for message in messages)).input_ids
    begun = messages[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not begun,
                                         continue_final_message=begun, enable_thinking=thinking)
    return tokenizer(text, add_special_tokens=False).input_ids


def read_problems(rows, tokenizer, cfg: Config, name: str, own_reward: bool = False,
                  trained_on: list[Problem] | None = None) -> list[Problem]:
    """Turn dataset rows into problems; says how many were left out and why. UserError if none is left.

    `own_reward`: for a reward function of the user's own, which gets the whole row and may need no answer.
    `trained_on`: the training problems, where these are held out: what is among both is warned of.
    """
    asking, answering = find_columns(rows, cfg.columns, name, own_reward, held_out=trained_on is not None)
    if isinstance(rows, datasets.Dataset) and not own_reward:
        rows = rows.select_columns(list({asking, *answering}))  # others can be images, or long
    # A solution is worked out if any is marked, or if another column has the answers; otherwise it is bare.
    worked = [column for column in answering if column.lower() == "solution"
              and (len(answering) > 1 or any(MARKED.search(str(row[column])) for row in rows))]
    problems, left_out = [], Counter()
    for number, row in enumerate(rows, 1):
        golds = next(filter(None, (read_golds(row[column], column in worked) for column in answering)), [])
        messages = read_messages(row[asking], cfg.system)
        text = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
        if isinstance(row[asking], str) and "\\boxed" not in text:
            messages[-1]["content"] += cfg.instruction
        broken = SURROGATE.search("".join([*golds, *(message["content"] for message in messages)]))
        reason = ("without an answer" if not golds and not own_reward else
                  "without a question in text" if not text.strip() else
                  "with broken UTF-8" if broken else "")
        with explained_as(f"row {number} of {name} cannot be made a prompt"):  # a template is a program
            ids = [] if reason else encode(tokenizer, messages, cfg.thinking)
        if not reason and not 0 < len(ids) <= cfg.max_prompt_tokens:
            reason = f"with a prompt over {cfg.max_prompt_tokens} tokens" if ids else "with no token to ask"
        if reason:
            left_out[reason] += 1
        else:
            row = row if own_reward else {}  # rows can be large
            thinking = tokenizer.decode(ids[-10:]).rstrip().endswith("<think>")
            problems.append(Problem(text, ids, (golds or [""])[0], tuple(golds), row, thinking))
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not problems:
        raise UserError(f"no usable problem in {name}: {reasons or 'it has no rows'}")
    if reasons:
        tqdm.write(f"left out of {name}: {reasons}")
    as_text = [] if own_reward else [p.answer for p in problems if not any(map(readable, p.golds))]
    if as_text:
        tqdm.write(f"{len(as_text)} golds of {name} are compared as text only, such as {as_text[0]!r}")
    known = {tuple(problem.prompt) for problem in trained_on or ()}
    shared = sum(tuple(problem.prompt) in known for problem in problems)
    if shared:
        tqdm.write(f"warning: {shared} of the {len(problems)} held-out problems in {name} are trained on too")
    return problems


def base_folder(path: str) -> str:
    """Where the weights of the model at `path` are: there, or where its adapters (of --lora) say."""
    adapters = Path(path, "adapter_config.json")
    with explained_as(f"{adapters} cannot be read"):
        return json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.exists() else path


def load_config(path: str):
    """The configuration of the model at `path`, without dropout: the ratio must be 1 before the first update."""
    config = load_or_explain(
        path, "model", lambda: AutoConfig.from_pretrained(base_folder(path), trust_remote_code=False))
    text = config.get_text_config()
    for part in (config, text):
        part.update({name: 0.0 for name, x in vars(part).items() if "drop" in name and isinstance(x, float)})
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UserError(f"{path} has layers of the kind {', '.join(sorted(kinds))}: not supported")
    return config


DATA_ROPES = ("longrope", "dynamic")  # ways to turn positions that depend on how long the text is


def check_positions(path: str, longest: int) -> None:
    """Refuse a model whose positions `longest` tokens would break; warn where they are only beyond its training."""
    config = load_config(path).get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    for rope in (ropes, *ropes.values()):  # one for all layers, or one a kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") in DATA_ROPES:
            limit = min(limit, rope.get("original_max_position_embeddings") or limit)
            if longest > limit:
                raise UserError(f"{path} turns positions otherwise beyond {limit:,} tokens, which the cache "
                                f"cannot follow; a completion can end at {longest:,}: see --max-new-tokens")
    if longest > limit and not ropes:
        raise UserError(f"{path} has {limit:,} positions, but a prompt and its completion can take "
                        f"{longest:,}: give a smaller --max-new-tokens")
    if longest > limit:
        tqdm.write(f"warning: {path} was made for {limit:,} tokens; a completion can end at {longest:,}")


def load_model(path: str, device, dtype: str = "float32", lora: int = 0, trainable: bool = True):
    """The causal language model at `path`; with `lora`, frozen but for float32 adapters of that rank.

    Raises UserError where that is no such model, or not all of it.
    """
    model, found = load_or_explain(path, "model", lambda: AutoModelForCausalLM.from_pretrained(
        base_folder(path), config=load_config(path), dtype=getattr(torch, dtype), trust_remote_code=False,
        output_loading_info=True))
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UserError(f"{path} lacks {len(missing)} weights, such as {missing[0]}: they would be random")
    if base_folder(path) != path:
        if lora:
            raise UserError(f"{path} holds adapters, which are not saved with new ones: train it without "
                            "--lora, or merge it first")
        with explained_as(f"the adapters in {path} cannot be loaded with the package peft"):
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature without do_sample, say, with which save_pretrained refuses to save
        model.generation_config.do_sample = True
    model = model.to(device).requires_grad_(trainable and not lora).eval()
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("shared_heads")
    if model.device.type == "cuda" and trainable:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(4, device=model.device)[None]  # (1, 4)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits, plain = model(ids, use_cache=False).logits, model.get_output_embeddings()(hidden)
    if not torch.allclose(plain, logits, atol=1e-3, equal_nan=True):
        raise UserError(f"{path} changes its logits behind the output layer (cap or scale): not supported")
    if lora:
        with explained_as("--lora does not go with the peft that is installed"):
            from peft import LoraConfig
            model.add_adapter(LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear"))
        for weight in trained_weights(model).values():
            weight.data = weight.data.float()
    return model


def trained_weights(model) -> dict[str, Tensor]:
    """What is trained, by name: all weights, or the adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------------
# Memory. What it takes to train 4B parameters on one GPU: bf16 weights there, what AdamW needs in host memory,
# and the rest of the card for the key-value cache. All worked out from the model's shapes before it is loaded.
# ------------------------------------------------------------------------------------------------------------


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies of the weights ("masters") on a device of their own; one tensor at a time goes there.

    Without them bf16 weights would lose most updates: their spacing is up to 2^-7 of their size. Gradients are
    summed in fp32 as well, or the last of many micro-batches would be rounded away.
    """

    def __init__(self, weights, device, **options):
        self.weights, device = list(weights), torch.device(device)
        for weight in self.weights:
            weight.grad_dtype = torch.float32
        self.masters = [weight.detach().to(device, torch.float32, copy=True) for weight in self.weights]
        super().__init__(self.masters, fused=True, **options)
        pinned = device.type == "cpu" and self.weights[0].is_cuda  # faster on the way
        self.travels = self.masters[0].device != self.weights[0].device  # else nothing needs room on the way
        largest = max(weight.numel() for weight in self.weights) if self.travels else 0
        self.down = torch.empty(largest, device=device, pin_memory=pinned)
        self.up = torch.empty(largest, dtype=self.weights[0].dtype, device=device, pin_memory=pinned)

    @torch.no_grad()
    def step(self):
        """One AdamW step of every weight that has a gradient."""
        for weight, master in zip(self.weights, self.masters):
            if weight.grad is not None:
                n, travels = weight.numel(), self.travels
                master.grad = self.down[:n].view_as(weight).copy_(weight.grad) if travels else weight.grad
                super().step()  # of this one: no other has a gradient
                master.grad = None
                weight.copy_(self.up[:n].view_as(weight).copy_(master) if travels else master)

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


def make_optimizer(model, cfg: Config):
    """The one place where the optimizer is chosen: plain AdamW for fp32 weights that stay where they are."""
    weights = list(trained_weights(model).values())
    options = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    where = torch.device("cpu") if cfg.optimizer_device == "cpu" else model.device
    if where == model.device and all(weight.dtype == torch.float32 for weight in weights):
        return torch.optim.AdamW(weights, fused=True, **options)
    return MasterAdamW(weights, where, **options)


CGROUP = Path("/sys/fs/cgroup")  # where a container is told its limits


def free_memory(device: str) -> float:
    """Bytes that can be had on a device now; infinite where the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what an earlier run of this process has kept
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+)", meminfo.read_text() if meminfo.exists() else "")
    free = int(found[1]) * 1024 if found else math.inf
    if (CGROUP / "memory.max").exists() and (CGROUP / "memory.max").read_text().strip().isdigit():
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = re.findall(r"^(?:in)?active_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - used + sum(map(int, files)))  # what was read can be forgotten
    return free


def peak_memory_gb(device) -> float | None:
    """The most memory held so far: on the GPU, or by this process (None on Windows, which does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def pass_sizes(shapes, cfg: Config, here: str, size: int) -> tuple[int, int, int, int]:
    """Bytes that a token leaves in the cache, layers there, bytes of a training pass, and of a sampling one.

    Without weights, gradients and cache. `size` is that of a number; `here` is "cpu" or "cuda".
    """
    for module in shapes.modules():  # some positions cannot be computed without data; here they do not matter
        if getattr(module, "rope_type", None) in DATA_ROPES:
            module.rope_type = "default"
    one_token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    with torch.no_grad():  # what it leaves in the cache
        layers = shapes(one_token, use_cache=True)[cache_name(shapes)].layers
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers) * size
    c, gpu, lora = shapes.config.get_text_config(), here == "cuda", cfg.lora > 0
    H, V, inner = c.hidden_size, c.vocab_size, getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    # Of a token, for backward: gate, up and their product; norms, queries, keys, values, outputs, residuals.
    layer = (3 * inner + 22 * H) * size
    # A GPU keeps what goes into each layer (and 6 as wide behind them), and computes a layer again when its
    # turn comes: with 4 gradients as wide as its gate. Adapters are given fp32 copies.
    held = (len(layers) + 6) * H * size if gpu else len(layers) * layer
    again = layer + 4 * inner * size + lora * (2 * inner + 24 * H) if gpu else 0
    # The head's gradient is summed in fp32 over the chunks; besides, one at a time: a layer, a chunk's logits
    # (3 fp32 copies), a chunk's gradient of the head (as computed, and in fp32).
    tokens = max(cfg.microbatch_tokens, cfg.max_prompt_tokens + cfg.max_new_tokens)  # a row is never split
    head = 0 if lora else V * H
    training = tokens * held + head * 4
    training += max(tokens * again, LOGITS_CHUNK[here] * V * 12, head * (size + 4))
    # Besides the cache, one at a time: the next token's probabilities (logits twice, 2 fp32 copies, 2 fp64;
    # top-p: a sort too), a layer that reads 16,384 tokens.
    drawing = cfg.prompts_per_step * cfg.group_size * V * (48 if cfg.top_p < 1 else 32)
    sampling = max(drawing, 16384 * ((3 * inner + 5 * H) * size + lora * 8 * inner))
    return cached, len(layers), training, sampling


def plan_memory(shapes, cfg: Config, device, out: Path) -> tuple[Config, str]:
    """cfg with what it leaves open filled in for this model and device, and a table of the memory it takes.

    `shapes` is the model on the meta device, `out` the folder of the run. Held against a simulation in
    assets/test_memory_plan.py. Raises UserError for what cannot fit.
    """
    here = device.type
    free = {"cpu": free_memory("cpu") * MEMORY_SHARE, here: free_memory(str(device)) * MEMORY_SHARE}
    old_files = [file for path in run_files(out) for file in (path, *path.rglob("*")) if file.is_file()]
    old_run = sum(file.stat().st_size for file in old_files)  # is replaced, or goes
    free["disk"] = shutil.disk_usage(out).free + old_run
    dtype = ("bfloat16" if here == "cuda" else "float32") if cfg.dtype == "auto" else cfg.dtype
    size, parameters = getattr(torch, dtype).itemsize, shapes.num_parameters()
    weights, trained, trained_size = parameters * size, parameters, size
    if not cfg.steps:  # only to be evaluated
        trained = 0
    elif cfg.lora:
        linear = [m for m in shapes.base_model.modules() if isinstance(m, torch.nn.Linear)]
        trained, trained_size = cfg.lora * sum(m.in_features + m.out_features for m in linear), 4
        weights += trained * 4
    crowded = free[here] / 10 < trained * 12 < free["cpu"]
    there = ("cpu" if crowded else here) if cfg.optimizer_device == "auto" else cfg.optimizer_device
    adam = trained * (8 if trained_size == 4 and there == here else 12)  # two moments, and fp32 weights
    if there != here and trained == parameters:  # `down` and `up` of MasterAdamW hold the largest weight
        adam += max(weight.numel() for weight in shapes.parameters()) * (4 + size)

    cached, n_layers, training, beside = pass_sizes(shapes, cfg, here, size)
    N, longest = cfg.prompts_per_step * cfg.group_size, cfg.max_prompt_tokens + cfg.max_new_tokens
    always = weights * (2 if cfg.kl_coef and not cfg.lora else 1) + (adam if there == here else 0)
    left = max(0, free[here] - always)
    room = min(left - beside, left * n_layers / (n_layers + 1)) / cached  # a layer moves at a time
    cache_tokens = cfg.cache_tokens or int(min(max(0, room), N * longest))
    sampling = cache_tokens * cached + max(beside, cache_tokens * cached / n_layers)
    save_every = cfg.save_every if cfg.save_every is not None else 50 if parameters > 1e9 else 10
    checkpoint = trained * 12  # fp32 weights, wherever they are, and the moments
    kept = 2 * checkpoint * (save_every > 0) + weights * (1 + cfg.keep_models)  # the old one and the new
    rows = [(f"{parameters / 1e6:,.1f}M weights in {dtype}", here, weights),
            (f"AdamW, {trained / 1e6:,.1f}M trained", there, adam),
            (f"training, {cfg.microbatch_tokens:,} tokens a pass", here, always + trained * 4 + training),
            (f"sampling, {cache_tokens:,} tokens cached", here, always + sampling),
            ("checkpoints and models", "disk", kept)]
    for what, place, n in rows:
        if n > free[place]:
            raise UserError(
                f"{what}, would take about {n / 2**30:.1f} GiB on {place}, where {free[place] / 2**30:.1f} "
                "are free: --lora 16 takes far less; see also --optimizer-device, --microbatch-tokens, "
                "--cache-tokens and, for the disk, --save-every 0")
    if cache_tokens < longest:
        raise UserError(f"the cache has room for {cache_tokens:,} tokens, but a prompt and its completion "
                        f"can take {longest:,}: give a larger --cache-tokens or a smaller --max-new-tokens")
    table = [f"  {what:45} {n / 2**30:8.2f} GiB on {place}" for what, place, n in rows]
    return replace(cfg, dtype=dtype, cache_tokens=cache_tokens, optimizer_device=there,
                   save_every=save_every), "\n".join(table)


# ------------------------------------------------------------------------------------------------------------
# The demo. The only code that a real run does not use: a tiny Qwen3 with a tokenizer of single characters learns
# to add from worked examples until it is sometimes right (RL needs that), is saved, and loaded like any model.
# ------------------------------------------------------------------------------------------------------------

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


def supervise(run: Run, prompts: list, solutions: list, probe: list[Problem], cfg: Config, rows_a_step=64):
    """Teach a model worked solutions (both lists of token ids) until it solves cfg.warm_start of `probe`."""
    tokens = padded(solutions, run.model.device)  # (n, T)
    mask = padded([[1.0] * len(s) for s in solutions], run.model.device)  # (n, T)
    bar, right = tqdm(range(1, 5001), desc="warm start", unit="step", leave=False), 0.0
    for step in bar:
        rows = torch.randint(len(prompts), (rows_a_step,), generator=rng("cpu", cfg.seed, "warm start", step))
        logprobs = token_logprobs(run.model, [prompts[i] for i in rows], tokens[rows], mask[rows])  # (n, T)
        loss = -logprobs.sum() / mask[rows].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        if step % 10 == 0:
            generator = rng(run.model.device, cfg.seed, "probe", step)
            right = evaluate(run, {"probe": probe}, cfg, generator)["eval_pass@1"]
            bar.set_postfix(loss=f"{loss.item():.2f}", solved=f"{right:.0%}")
            if right >= cfg.warm_start:
                break
    else:
        raise UserError(f"after {step} steps the warm start solves {right:.0%}, not {cfg.warm_start:.0%}")
    bar.close()


def build_demo(folder: str, cfg: Config, warm: list[dict], device) -> None:
    """Make a Qwen3 of 0.3M parameters, warm-start it on worked examples, and save it and its tokenizer."""
    torch.manual_seed(cfg.seed)
    vocabulary = ["<pad>", "<eos>", *sorted(set("0123456789+=? \\boxed{}"))]
    characters = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(vocabulary)}, merges=[]))
    characters.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False)
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    model = transformers.Qwen3ForCausalLM(config).to(device)
    run = Run(model, tokenizer, torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True), tracker=None)
    probe = read_problems(warm[:256], tokenizer, cfg, "the warm start")  # not trained on
    prompts = [tokenizer(row["problem"]).input_ids for row in warm[256:]]
    solutions = [tokenizer(row["worked"]).input_ids + [tokenizer.eos_token_id] for row in warm[256:]]
    supervise(run, prompts, solutions, probe, cfg)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# Files. A run is a folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/, and at the end model/.
# ------------------------------------------------------------------------------------------------------------

# What Ctrl-C, a closed terminal and a scheduler send, the last some time before it kills.
STOP_SIGNALS = [sign for sign in signal.Signals if sign.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
LOGS = ("metrics.jsonl", "samples.jsonl")
STATE_KEYS = set("""config dtype optimizer_device cache_tokens step past_xi model optimizer window previous
    read logs""".split())
RUN_FILES = ("config.json", *LOGS, "checkpoint", "model")
# What may change when a run goes on. (Another cache draws other samples, another micro-batch rounds otherwise.)
MAY_DIFFER = {"steps", "out", "resume", "overwrite", "save_every", "save_minutes", "keep_models",
              "show_every", "cache_tokens", "microbatch_tokens", "tracker"}


def kept_models(out: Path) -> list[Path]:
    """The folders of --keep-models, oldest first."""
    found = [path for path in out.glob("model-*") if path.name[6:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[6:]))


def run_files(out: Path) -> list[Path]:
    """What a run has left in its folder."""
    return [out / name for name in RUN_FILES if os.path.lexists(out / name)] + kept_models(out)


@contextmanager
def run_folder(cfg: Config):
    """The run's folder, made and held for this process alone; the system lets go of it however that ends."""
    name = f"{Path(cfg.model).name or 'demo'}-{cfg.base}-{cfg.feedback}-seed{cfg.seed}"
    out = Path(cfg.out or f"runs/{name}").expanduser()
    lock = out / ".lock"
    with explained_as(f"the output folder {out} cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")
    with file:
        try:
            if sys.platform != "win32":
                import fcntl  # not there on Windows
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by the process {lock.read_text() or '?'}: give another --out")
        except OSError as error:  # a network file system without locks
            tqdm.write(f"warning: {out} cannot be locked ({error.strerror}): let no other process in")
        lock.write_text(str(os.getpid()))
        yield out


def log_mark(log: bytes) -> tuple[int, int]:
    """What a log was at a checkpoint: its size and checksum."""
    return len(log), zlib.crc32(log)


def open_run(cfg: Config, out: Path) -> dict | None:
    """The checkpoint to go on from, if that is asked for; UserError for what is in the way."""
    saved = out / "checkpoint" / "state.pt"
    there = run_files(out)
    if not cfg.resume:
        reward_file = cfg.reward.rpartition(":")[0]
        named = (cfg.model, base_folder(cfg.model), cfg.dataset, reward_file, *held_out_names(cfg))
        for name in filter(None, named):
            read = Path(name).expanduser().resolve()
            is_in_the_way = any(path.resolve() in (read, *read.parents) for path in there)
            if is_in_the_way or read == out.resolve():
                raise UserError(f"{name} is to be read, but a run may delete it in {out}: give another --out")
        if there and not cfg.overwrite:
            raise UserError(f"{out} already holds a run: --resume goes on with it, --overwrite deletes it")
        return None
    if not saved.is_file():
        raise UserError(f"there is nothing to resume in {out}: it has no checkpoint; --overwrite starts anew")
    with explained_as(f"the checkpoint {saved} cannot be used"):
        broken = zipfile.ZipFile(saved).testzip()  # torch.save writes checksums, but torch.load does not look
        if broken:
            raise ValueError(f"the checksum of {broken} is wrong")
        state = torch.load(saved, map_location="cpu", weights_only=True, mmap=True)  # not twice in memory
        if set(state) != STATE_KEYS or set(state["logs"]) != set(LOGS):
            raise ValueError("it is of another version")
        before = state["config"] | {}
    with explained_as(f"the logs in {out} cannot be used"):
        for name, (size, checksum) in state["logs"].items():
            if log_mark((out / name).read_bytes()[:size]) != (size, checksum):
                raise ValueError(f"{name} is not as the checkpoint left it")
    now = asdict(cfg) | {"device": pick_device(cfg).type}
    changed = [f"{flag(name)} was {before.get(name)!r}, is {now[name]!r}" for name in now
               if name not in MAY_DIFFER and before.get(name) != now[name]]
    if changed:
        raise UserError("--resume goes on with the same settings, but " + "; ".join(changed))
    if state["step"] > cfg.steps:
        raise UserError(f"{out} already stands at step {state['step']}, beyond --steps {cfg.steps}")
    return state


def clear_run(out: Path) -> None:
    """Delete the files of an earlier run, and only those."""
    for path in run_files(out):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def fingerprints(run: Run, problems: list[Problem], held_out: dict, cfg: Config) -> dict[str, str]:
    """What a run reads, each in a short hash, so that a resumed run can tell whether it is still the same."""
    read = {name: [(p.prompt, p.golds) for p in some] for name, some in held_out.items()}
    read["training problems"] = [(p.prompt, p.golds) for p in problems]
    read["start model"] = [p.flatten()[:4].tolist() for p in run.model.parameters()]
    if cfg.reward:
        read["reward function"] = Path(cfg.reward.rpartition(":")[0]).read_bytes()
    return {name: hashlib.sha256(repr(things).encode("utf-8", "backslashreplace")).hexdigest()[:16]
            for name, things in read.items()}


def loose_weights(run: Run) -> dict[str, Tensor]:
    """The trained weights that the optimizer's state does not hold: masters stand for those made from them."""
    return {} if isinstance(run.optimizer, MasterAdamW) else trained_weights(run.model)


def save_model(run: Run, folder: Path) -> None:
    """The model and its tokenizer as transformers saves them, beside `folder` and swapped in whole."""
    if not all(weight.isfinite().all() for weight in trained_weights(run.model).values()):
        raise FloatingPointError(f"step {run.step}: the weights are not finite; a lower --lr may help")
    partial_folder = folder.with_name(f"{folder.name}.partial")
    with explained_as(f"the model could not be saved as {folder}, --resume tries again"):
        shutil.rmtree(partial_folder, ignore_errors=True)
        run.model.save_pretrained(partial_folder)
        run.tokenizer.save_pretrained(partial_folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial_folder, folder)


def save_checkpoint(run: Run, settings: dict, cfg: Config, out: Path) -> None:
    """All that a resumed run needs, written beside the old checkpoint and swapped in whole.

    `settings` are those given, `cfg` has its blanks filled in.
    """
    partial_file = out / "checkpoint" / "state.partial"
    partial_file.parent.mkdir(exist_ok=True)
    state = {"config": settings | {"device": run.model.device.type}, "dtype": cfg.dtype,
             "optimizer_device": cfg.optimizer_device, "cache_tokens": cfg.cache_tokens, "step": run.step,
             "past_xi": run.past_xi, "model": loose_weights(run), "optimizer": run.optimizer.state_dict(),
             "window": list(run.tracker.history), "previous": vars(replace(run.previous, problems=None)),
             "read": run.read, "logs": {name: log_mark((out / name).read_bytes()) for name in LOGS}}
    try:
        with open(partial_file, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's word for a full disk
        size = partial_file.stat().st_size if partial_file.exists() else 0
        partial_file.unlink(missing_ok=True)
        raise UserError(f"step {run.step} could not be saved after {size / 2**30:.2f} GiB: {cause_of(error)}."
                        " The checkpoint before it is as it was: make room, then --resume")
    if cfg.keep_models:
        save_model(run, out / f"model-{run.step}")
    os.replace(partial_file, partial_file.with_suffix(".pt"))
    for folder in kept_models(out)[:-cfg.keep_models] if cfg.keep_models else ():
        shutil.rmtree(folder)


def load_checkpoint(run: Run, state: dict, out: Path) -> None:
    """Bring a fresh `run` to where it was saved, and cut its logs back to there."""
    changed = [name for name in run.read if state["read"].get(name) != run.read[name]]
    if changed:
        raise UserError(f"--resume goes on with what a run began with, but changed are: {', '.join(changed)}")
    with explained_as(f"the checkpoint in {out} does not fit"):
        if state["model"].keys() != loose_weights(run).keys():
            raise ValueError("it holds other weights")
        run.model.load_state_dict(state["model"], strict=False)  # the others are those of the start
        run.optimizer.load_state_dict(state["optimizer"])
        for weight, moments in run.optimizer.state.items():  # out of the mapped file one by one, never twice
            if any(value.dim() and value.shape != weight.shape for value in moments.values()):
                raise ValueError("a moment has another shape than its weight")
            moments.update({name: value.clone() for name, value in moments.items()})
        run.tracker.history.extend(state["window"])
        run.past_xi, run.step = state["past_xi"], state["step"]
        run.previous = Batch(**{name: x.to(run.model.device, copy=True) if isinstance(x, Tensor) else x
                                for name, x in state["previous"].items()})
    for name, (size, _) in state["logs"].items():
        os.truncate(out / name, size)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def append_jsonl(path: Path, *rows: dict) -> None:
    """Put rows behind those of a file."""
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@contextmanager
def signals_caught():
    """Yields a list that a signal to stop is put into, so that a step can end and be saved; a second stops at once."""
    caught, before = [], {}

    def restore():
        for sign, handler in before.items():
            signal.signal(sign, handler)

    def catch(sign, _):
        caught.append(sign)
        restore()
        tqdm.write("finishing this step, then saving; a second signal stops at once, unsaved")

    with suppress(ValueError):  # off the main thread no signal can be caught
        heeded = [sign for sign in STOP_SIGNALS if signal.getsignal(sign) != signal.SIG_IGN]  # nohup
        before = {sign: signal.signal(sign, catch) for sign in heeded}
    try:
        yield caught
    finally:
        restore()


# ------------------------------------------------------------------------------------------------------------
# Command line.
# ------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> Config:
    """Flags from the fields of Config; without --model, the demo's values stand where none was given."""
    parser = argparse.ArgumentParser(description="PIPO in one file. Without --model: an offline demo.",
                                     usage="python pipo.py [--setting value ...]; --help lists them",
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    types, kinds = get_type_hints(Config), {bool: dict(action="store_true"), list[str]: dict(nargs="+")}
    for f in fields(Config):
        has_default = types[f.name] is not bool and f.default not in (None, "")
        default = f" (default: {f.default})" if has_default else ""
        demo = f" (demo: {DEMO[f.name]})" if DEMO.get(f.name) else ""
        kind = kinds.get(types[f.name], dict(type=types[f.name], choices=f.metadata["choices"]))
        if f.name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[f.name])
        group.add_argument(flag(f.name), help=f.metadata["help"] + default + demo, **kind)
    given = vars(parser.parse_args(arguments))
    if given.get("model") == "":
        raise UserError("--model is empty: name a model, or leave the flag away for the demo")
    return Config(**({} if given.get("model") else DEMO) | given)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for what the user can put right, 1 for a run that broke down."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails becomes a sentence
    transformers.utils.logging.disable_progress_bar()
    try:
        train(parse(arguments))
        return 0
    except UserError as error:
        code, said = 2, error
    except FloatingPointError as error:
        code, said = 1, error
    except torch.OutOfMemoryError as error:
        code, said = 1, f"{cause_of(error)} Halve --microbatch-tokens or --cache-tokens, then --resume"
    except KeyboardInterrupt as error:
        said, sign = error.args or ("stopped; the last checkpoint, if any, is as it was", signal.SIGINT)
        code = 128 + sign
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code, said = 1, f"{error}; the last checkpoint is as it was"
    print(f"pipo: {said}", file=sys.stderr)
    return code


class Sturdy(io.FileIO):
    """What stands below a stream; a closed pipe (`| head -1`) is no error to it."""

    def write(self, data):
        with suppress(OSError):  # the terminal of a run may hang up, too
            return super().write(data)
        return len(data)


def sturdy(stream):
    """A stream like this one that neither a closed pipe nor an ASCII terminal can turn into an error."""
    if stream is None:  # closed from the start
        return open(os.devnull, "w")
    buffer = io.BufferedWriter(Sturdy(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = sturdy(sys.stdout), sturdy(sys.stderr)
    sys.exit(main())
