#!/usr/bin/env python3
"""PIPO, Policy Improvement Policy Optimization (arXiv 2604.00860), in one file.

Reinforcement learning with verifiable rewards, in a loop that looks back. GRPO samples G answers to each prompt, grades
them, and pushes up what beat its group: nobody checks whether the push helped. PIPO does: the next batch's mean reward,
held against the last K, says whether the policy improved, and the previous batch is then stepped on once more.

    mu_t    = mean reward of the fresh batch B_t
    xi_t    = (mu_t - mean(mu_{t-1} .. mu_{t-K})) / std(mu_{t-1} .. mu_{t-K})
    phi_t   = xi_t if xi_t >= 0 else lam * xi_t
    r_i     = phi_t * G * A_i / sum_group |A_j|         for each sample i of B_{t-1}, A the GRPO advantage

    one iteration: sample, grade B_t -> step on B_{t-1} with r (verification) -> step on B_t with A (exploration)

    python pipo.py                          # offline demo: a 1M-parameter model learns to add, minutes on a laptop
    python pipo.py --model Qwen/Qwen3-4B    # MATH, on one GPU
    python pipo.py --help                   # every setting, with its meaning

Left out on purpose: more than one GPU, an inference server, replay beyond the previous batch, learned reward models and
rate schedules. Letters: Q prompts a step, G samples a prompt (the group), N = Q*G sequences, T tokens, V vocabulary.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models as tokenizer_models, pre_tokenizers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast,
                          Qwen3Config, Qwen3ForCausalLM)
from transformers.utils import logging as transformers_logging

try:
    import resource
except ImportError:             # Windows
    resource = None

# ---------------------------------------------------------------------------------------------------------------------
# Settings. One dataclass is the only place where a number is chosen: its fields are the command-line flags, their help
# and config.json. `demo` is the value used instead when no --model is given.
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can put right: shown as one sentence, exit code 2."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def option(default, help, demo=None, choices=None):
    return field(default=default, metadata=dict(help=help, demo=demo, choices=choices))


@dataclass
class Config:
    # the task
    model: str = option("", "hub name or folder of a causal language model; without it, the offline demo")
    dataset: str = option("DigitalLearningGmbH/MATH-lighteval", "training problems: a hub name (org/name, or "
                          "org/name:config), a .parquet, .jsonl, .json or .csv file, or a folder", demo="")
    eval_dataset: str = option("HuggingFaceH4/MATH-500", "held-out problems, in the same forms", demo="")
    instruction: str = option("\n\nReason step by step, and put your final answer within \\boxed{}.",
                              "text put behind a problem that does not mention \\boxed yet", demo="")
    warm_start: float = option(0.25, "the demo's supervised phase ends once it solves this share of fresh problems")
    thinking: bool = option(False, "let a chat template switch its thinking mode on")
    max_prompt_tokens: int = option(512, "longer prompts are left out, and counted")
    # sampling
    steps: int = option(261, "iterations", demo=60)
    prompts_per_step: int = option(128, "Q, prompts an iteration", demo=32)
    group_size: int = option(8, "G, samples a prompt")
    max_new_tokens: int = option(4096, "longest completion", demo=48)
    temperature: float = option(0.7, "of sampling, in training and evaluation", demo=1.0)
    top_p: float = option(1.0, "draw from the smallest set of tokens with this mass")
    cache_tokens: int = option(262144, "tokens the key-value cache may hold at once; more is faster, less saves memory")
    # the base objective (exploration step)
    base: str = option("grpo", "base objective", choices=("grpo", "dr_grpo", "dapo", "gspo"))
    clip_low: float = option(None, "lower clip of the ratio (default: the base's own)")
    clip_high: float = option(None, "upper clip of the ratio (default: the base's own)")
    kl_coef: float = option(0.0, "weight of the KL to the starting model; above 0 it is kept in memory as a reference")
    # the feedback (verification step)
    feedback: str = option("pipo", "what scales the verification step: phi(xi), no such step, --constant, or the "
                           "phi of an earlier xi drawn at random", choices=("pipo", "none", "constant", "shuffled"))
    window: int = option(8, "K, past mean rewards that the present one is held against")
    lam: float = option(0.1, "lambda, the weight of a fall in reward against a rise")
    xi_clip: float = option(None, "cut xi to [-this, this] (default: no cut, as in the paper)")
    constant: float = option(0.43, "coefficient of --feedback constant; 0.43 is the mean of phi(xi) on pure noise")
    # the optimizer
    lr: float = option(1e-6, "learning rate", demo=1e-4)
    pi_lr: float = option(None, "learning rate of the verification step (default: --lr)")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    minibatches: int = option(1, "optimizer steps that a batch is split into, in both steps (the paper: 2)")
    microbatch_tokens: int = option(16384, "padded tokens in one backward pass; changes memory, not results", demo=4096)
    # the run
    seed: int = option(0, "the same seed gives the same run on the same machine")
    device: str = option("", "cpu, cuda, cuda:1, ... (default: cuda if present)")
    out: str = option("", "folder for the run's files (default: runs/<name of the model, base, feedback and seed>)")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    overwrite: bool = option(False, "delete the run that is in --out")
    eval_every: int = option(10, "steps between evaluations, 0 for none at all", demo=20)
    eval_limit: int = option(0, "evaluate on the first so many problems only, 0 for all", demo=512)
    save_every: int = option(10, "steps between checkpoints", demo=20)
    show_every: int = option(5, "steps between samples shown on the screen, 0 for none", demo=20)


DEMO = {f.name: f.metadata["demo"] for f in fields(Config) if f.metadata["demo"] is not None}


def validate(cfg: Config) -> None:
    """Refuse settings that make no sense (raises UserError) before anything is loaded."""
    positive = "steps prompts_per_step max_new_tokens max_prompt_tokens lr max_grad_norm microbatch_tokens cache_tokens"
    rules = [(0 < getattr(cfg, name) < math.inf, name, "it must be above 0") for name in positive.split()]
    rules += [(getattr(cfg, f.name) in choices, f.name, f"it must be one of {', '.join(choices)}")
              for f in fields(cfg) if (choices := f.metadata["choices"])]
    rules += [
        (cfg.window >= 2, "window", "a standard deviation needs at least 2 past rewards"),
        (0 <= cfg.lam <= 1, "lam", "it must lie between 0 and 1"),
        (cfg.xi_clip is None or cfg.xi_clip > 0, "xi_clip", "it must be above 0"),
        (cfg.group_size >= 2, "group_size", "a sample is compared with its group, so it takes at least 2"),
        (0 < cfg.temperature < math.inf, "temperature", "it must be above 0"),
        (0 < cfg.top_p <= 1, "top_p", "it must lie above 0 and not above 1"),
        (cfg.pi_lr is None or 0 < cfg.pi_lr < math.inf, "pi_lr", "it must be above 0"),
        (0 <= cfg.kl_coef < math.inf, "kl_coef", "it must be 0 or more"),
        (cfg.minibatches >= 1 and cfg.prompts_per_step % cfg.minibatches == 0, "minibatches",
         f"it must divide --prompts-per-step ({cfg.prompts_per_step})"),
        (not (cfg.resume and cfg.overwrite), "overwrite", "it contradicts --resume; give one of the two"),
        (0 <= cfg.warm_start < 1, "warm_start", "it must be a share, from 0 to below 1"),
        (cfg.model or not cfg.dataset, "dataset", "it needs --model: the demo makes its own problems"),
        (cfg.model or not cfg.eval_dataset, "eval_dataset", "it needs --model: the demo makes its own problems"),
        (min(cfg.eval_every, cfg.eval_limit, cfg.show_every) >= 0 and cfg.save_every > 0, "eval_every",
         "it, --eval-limit and --show-every must be 0 or more, --save-every above 0"),
    ]
    for ok, name, reason in rules:
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)!r}: {reason}")
    try:
        torch.empty(0, device=cfg.device or "cpu")
    except (RuntimeError, AssertionError) as error:                         # an unknown name, or no such device here
        raise UserError(f"--device is {cfg.device!r}: {first_line(error)}")


def rng(device, *key) -> torch.Generator:
    """A generator that depends on `key` alone, so that no draw depends on how many others were made before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------------------------------
# Verifying. The verifier is the objective: a wrong "no" punishes a right answer, a wrong "yes" is a hole to be found.
# ---------------------------------------------------------------------------------------------------------------------


def extract_answer(text: str) -> str | None:
    """The final answer of a completion: its last \\boxed{...}, else what follows its last `####`, else None."""
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        found = re.findall(r"####\s*(\S[^\n]*)", text)
        return found[-1].strip() if found else None
    depth, first = 0, text.index("{", start)
    for i in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[first + 1:i].strip() or None
    return None                                                             # cut off inside the box


def normalize(answer: str) -> str | Fraction:
    """A rational number exactly, or the text without what does not change its meaning."""
    text = re.sub(r"\\left|\\right|\\[!,;: ]|[\s$]|\.$", "", answer)
    text = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}|\\[dt]?frac(\d)(\d)", r"\1\3/\2\4", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    if len(text) <= 100 and re.fullmatch(r"[-+]?(\d+/0*[1-9]\d*|\d+\.?\d*|\.\d+)", text):
        return Fraction(text)
    return text.lower()


def grade(completion: str, answer: str) -> tuple[float, str | None]:
    """(1.0 or 0.0, why the completion could not be judged or None)."""
    found = extract_answer(completion)
    if found is None:
        return 0.0, "no_answer"
    return float(normalize(found) == normalize(extract_answer(answer) or answer)), None


def verify(completion: str, answer: str) -> float:
    """1.0 if the completion's final answer equals `answer`, bare or a solution holding \\boxed{...}; else 0.0."""
    return grade(completion, answer)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling. Each prompt is read once and its cache copied to the G rows of its group; rows that have ended are dropped.
# The sampler alone knows what was drawn and how likely it was, so the mask and the behavior policy's log-probabilities
# come from here and are never guessed from token ids later.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """N completions, the G of a prompt side by side. Padding stands behind; `mask` says what was sampled."""
    prompts: list[list[int]]            # N lists of token ids
    tokens: Tensor                      # (N, T) sampled token ids
    mask: Tensor                        # (N, T) 1 on every sampled token, the EOS that ended it included
    behavior_logprobs: Tensor           # (N, T) under the policy that sampled, at the sampling temperature
    truncated: Tensor                   # (N,) True where the length limit cut it off
    texts: list[str]                    # N decoded completions
    advantages: Tensor | None = None    # (Q, G) filled in once the completions are graded


def eos_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: Qwen3 has two, and models that miss one ramble on after their answer."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*configured, tokenizer.eos_token_id] if i is not None})


def draw(logits, temperature=1.0, top_p=1.0, generator=None) -> tuple[Tensor, Tensor]:
    """Draw one token a row from (n, V) logits; temperature 0 takes the likeliest.

    Returns tokens (n,) and their log-probabilities (n,) under softmax(logits / temperature), before top-p restricts
    what may be drawn: that is the distribution the training step can compute again.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)      # (n, V)
    if temperature == 0:
        tokens = logprobs.argmax(-1)                                        # (n,)
    else:
        probs = logprobs.exp()                                              # (n, V)
        if top_p < 1:
            ranked, order = probs.sort(descending=True)                     # (n, V)
            ranked[ranked.cumsum(-1) - ranked >= top_p] = 0                 # the first token always stays
            probs = torch.zeros_like(probs).scatter(-1, order, ranked)      # (n, V)
        # argmax p/Exp(1) is a draw from p, and unlike torch.multinomial never makes the CPU wait for the GPU
        tokens = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)     # (n,)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size=1, max_new_tokens=256, temperature=1.0, top_p=1.0, generator=None,
           cache_tokens=262144) -> Batch:
    """Sample `group_size` completions of each of Q prompts (lists of token ids).

    Runs in waves of as many prompts as `cache_tokens` has room for. temperature=0 is greedy. Raises FloatingPointError
    where the model's probabilities are not finite.
    """
    model.eval()
    device, eos, T = model.device, torch.tensor(eos_ids(model, tokenizer), device=model.device), max_new_tokens
    N = len(prompts) * group_size
    tokens = torch.zeros(N, T, dtype=torch.long, device=device)             # (N, T)
    mask, logprobs = torch.zeros(N, T, device=device), torch.zeros(N, T, device=device)             # (N, T), (N, T)
    longest = max(len(prompt) for prompt in prompts)
    per_wave = max(1, cache_tokens // (group_size * (longest + T)))         # prompts
    chunk = max(1, min(T // 8, 128))                                        # tokens between two looks for ended rows
    for first in range(0, len(prompts), per_wave):
        wave = prompts[first:first + per_wave]
        width = max(len(prompt) for prompt in wave)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in wave], device=device)               # (q, P) pads first
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in wave], device=device)   # (q, P)
        cache = DynamicCache(config=model.config)
        logits = model(ids, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0), past_key_values=cache,
                       use_cache=True, logits_to_keep=1).logits[:, -1]      # (q, V)
        cache.batch_repeat_interleave(group_size)
        logits, seen = (x.repeat_interleave(group_size, 0) for x in (logits, seen))                 # (n, V), (n, P)
        rows = torch.arange(first * group_size, first * group_size + len(seen), device=device)      # (n,) of the batch
        alive = torch.ones_like(rows, dtype=torch.bool)                     # (n,) not ended yet
        for t in range(T):
            drawn, logprob = draw(logits, temperature, top_p, generator)    # (n,), (n,)
            tokens[rows, t], logprobs[rows, t], mask[rows, t] = drawn, logprob, alive.float()
            alive = alive & ~torch.isin(drawn, eos)
            if (t + 1) % chunk == 0 or t + 1 == T:
                if not logprobs[rows].isfinite().all():
                    raise FloatingPointError("the model's probabilities are not finite")
                keep = alive.nonzero().squeeze(-1)                          # (n',)
                if len(keep) == 0 or t + 1 == T:
                    break
                if len(keep) < len(rows):
                    cache.batch_select_indices(keep)
                    rows, alive, seen, drawn = rows[keep], alive[keep], seen[keep], drawn[keep]
            seen = F.pad(seen, (0, 1), value=1)                             # (n, P + t + 1)
            logits = model(drawn[:, None], attention_mask=seen, position_ids=seen.sum(-1, keepdim=True) - 1,
                           past_key_values=cache, use_cache=True).logits[:, -1]                     # (n, V)
    lengths = mask.sum(-1).long()                                           # (N,)
    last = tokens.gather(-1, lengths[:, None] - 1).squeeze(-1)              # (N,)
    T = int(lengths.max())
    tokens, mask, logprobs = (tokens * mask.long())[:, :T], mask[:, :T], (logprobs * mask)[:, :T]   # (N, T)
    texts = [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(tokens.tolist(), lengths.tolist())]
    return Batch([p for p in prompts for _ in range(group_size)], tokens, mask, logprobs, ~torch.isin(last, eos), texts)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities. The training pass: prompt and completion side by side with all padding behind, where causal
# attention never looks, so that no mask is needed; logits only where a completion token is predicted, a few at a time.
# ---------------------------------------------------------------------------------------------------------------------


def token_logprobs(model, prompts, tokens, mask, temperature=1.0, chunk=256) -> Tensor:
    """log-probability of each completion token: (n, T), 0 where `mask` is 0, at the temperature of sampling.

    The (tokens, V) logits are the largest tensor of RL on language models (151,936 columns for Qwen3): they are made
    `chunk` tokens at a time and made again in the backward pass instead of being kept.
    """
    lengths = mask.sum(-1).long().tolist()
    rows = [p + c[:n] for p, c, n in zip(prompts, tokens.tolist(), lengths)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)       # (n, S)
    predicts = torch.tensor([[len(p) <= s + 1 < len(row) for s in range(width)] for p, row in zip(prompts, rows)],
                            device=model.device)                            # (n, S) a completion token comes next
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[predicts]           # (tokens, H)
    targets = ids.roll(-1, 1)[predicts]                                     # (tokens,)
    head = model.get_output_embeddings()

    def logprob(h, y):                                                      # (chunk, H), (chunk,) -> (chunk,)
        return -F.cross_entropy(head(h).float() / temperature, y, reduction="none")

    pieces = [checkpoint(logprob, h, y, use_reentrant=False, preserve_rng_state=False)
              for h, y in zip(hidden.split(chunk), targets.split(chunk))]
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask.bool(), torch.cat(pieces))      # (n, T)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages. What GRPO learns from: how much better a sample did than the others drawn for its prompt.
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """(Q, G) rewards -> (Q, G) advantages: R - mean, over the sample std + 1e-6 unless `normalize_std` is False.

    A group of equal rewards has advantage exactly 0. Raises ValueError for G < 2. Source: DeepSeekMath (2402.03300);
    without the std, Dr. GRPO (2503.20783).
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (Q, G) with G >= 2, got {tuple(rewards.shape)}")
    rewards = rewards.float()                                               # (Q, G)
    centered = rewards - rewards.mean(1, keepdim=True)                      # (Q, G)
    if normalize_std:
        centered = centered / (rewards.std(1, keepdim=True) + 1e-6)         # (Q, G) ddof 1
    mixed = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)   # (Q, 1)
    return torch.where(mixed, centered, 0.0)


def gradient_distortion(p: float, G: int, conditional: bool = False) -> float:
    """eta(p) with E[g_GRPO] = eta(p) * grad p: how far GRPO stretches the gradient of a prompt with success rate p.

    For 0/1 rewards and the population std. `conditional` averages over groups with both rewards only (the paper's
    Theorem 3.1): only there does eta explode as p -> 0 or 1; over all groups it tends to sqrt(G - 1).
    """
    if not 0 < p < 1 or G < 2:
        raise ValueError(f"needs 0 < p < 1 and G >= 2, got p = {p}, G = {G}")
    pmf = [math.comb(G, k) * p**k * (1 - p)**(G - k) for k in range(G + 1)]
    eta = sum(w * math.sqrt(k * (G - k)) for k, w in enumerate(pmf)) / (G * p * (1 - p))
    return eta / sum(pmf[1:-1]) if conditional else eta


# ---------------------------------------------------------------------------------------------------------------------
# The improvement tracker. PIPO's new piece: is this batch better than the last K, in units of their own spread?
# ---------------------------------------------------------------------------------------------------------------------


class Feedback(NamedTuple):
    xi: float           # improvement in standard deviations of the window
    phi: float          # the coefficient it becomes
    mu_his: float       # mean of the window
    sigma_his: float    # its sample standard deviation


class ImprovementTracker:
    """The sliding window of mean rewards, and xi and phi read against it (PIPO, Section 5; K = 8, lambda = 0.1).

    Read `feedback(mu)` first, then `push(mu)` once: a reward in its own window would bound xi and halve its trend.
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
        """How `mu` compares with the window; None while it fills, or if its rewards are all equal (xi is undefined)."""
        if not self.full:
            return None
        mu_his, sigma_his = statistics.mean(self.history), statistics.stdev(self.history)   # exact sums: equal gives 0
        if sigma_his == 0:
            return None
        xi = (mu - mu_his) / sigma_his
        if self.xi_clip is not None:
            xi = max(-self.xi_clip, min(self.xi_clip, xi))
        return Feedback(xi, self.phi(xi), mu_his, sigma_his)

    def push(self, mu: float) -> None:
        self.history.append(mu)

    def state_dict(self) -> dict:
        return {**vars(self), "history": list(self.history)}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state, history=deque(state["history"], maxlen=state["window"]))


def improvement_rewards(advantages: Tensor, phi: float) -> Tensor:
    """(Q, G) advantages of the previous batch, phi -> (Q, G) policy-improvement rewards a_i * phi (Definition 5.1).

    a_i = G * A_i / sum_j |A_j| has mean size 1 in every mixed group, however A was normalised: for 0/1 rewards
    1/(2p) on a right answer and -1/(2(1-p)) on a wrong one. It is 0 in a group without signal.
    """
    total = advantages.abs().sum(1, keepdim=True)                           # (Q, 1)
    return torch.where(total > 0, advantages * advantages.shape[1] * phi / total, 0.0)      # (Q, G)


# ---------------------------------------------------------------------------------------------------------------------
# The loss. One clipped surrogate serves both steps: the exploration step weighs it with advantages, the verification
# step with improvement rewards.
# ---------------------------------------------------------------------------------------------------------------------


class Base(NamedTuple):
    normalize_std: bool     # divide the advantage by the group's std
    sequence_ratio: bool    # one ratio a sequence instead of one a token
    clip_low: float
    clip_high: float
    average: str            # "sequence": tokens, then sequences; "token": all alike; "fixed": by N * max_new_tokens


BASES = {
    "grpo": Base(True, False, 0.2, 0.2, "sequence"),        # DeepSeekMath, 2402.03300
    "dr_grpo": Base(False, False, 0.2, 0.2, "fixed"),       # 2503.20783
    "dapo": Base(True, False, 0.2, 0.28, "token"),          # 2503.14476
    "gspo": Base(True, True, 3e-4, 4e-4, "sequence"),       # 2507.18071
}


def policy_loss(logprobs, behavior_logprobs, advantages, mask, base="grpo", clip_low=None, clip_high=None,
                ref_logprobs=None, kl_coef=0.0, n_sequences=None, n_tokens=None, max_new_tokens=None):
    """The clipped surrogate of `base`: log-probabilities (N, T), advantages (N,), mask (N, T) -> (loss, metrics).

    -min(ratio * A, clip(ratio) * A) with the coefficient inside the min, so that it clips on both signs; plus
    kl_coef times the k3 estimate of KL(policy || reference), averaged the same way. `n_sequences`, `n_tokens` (default:
    those given) are the whole batch's where this is a part of it: the parts' losses then add up to the batch's.
    `max_new_tokens` (default T) is the denominator of dr_grpo. Metrics are means over this mask's tokens.
    """
    spec, (N, T) = BASES[base], mask.shape
    low, high = (given if given is not None else own for given, own in
                 ((clip_low, spec.clip_low), (clip_high, spec.clip_high)))
    lengths = mask.sum(1, keepdim=True).clamp(min=1)                        # (N, 1)
    log_ratio = (logprobs - behavior_logprobs).masked_fill(mask == 0, 0.0)  # (N, T)
    gap = log_ratio.detach().abs()                                          # (N, T)
    if spec.sequence_ratio:
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand(N, T)     # (N, T) the same all along a row
    ratio, A = log_ratio.exp(), advantages[:, None]                         # (N, T), (N, 1)
    plain, clipped = ratio * A, ratio.clamp(1 - low, 1 + high) * A          # (N, T)
    per_token = -torch.min(plain, clipped)                                  # (N, T)
    means = {"clip_fraction": (clipped < plain).float(), "ratio": ratio.detach(), "logprob_gap": gap}
    if kl_coef:
        d = (ref_logprobs - logprobs).masked_fill(mask == 0, 0.0)           # (N, T)
        kl = d.exp() - d - 1                                                # (N, T) k3: unbiased and never negative
        per_token, means["kl"] = per_token + kl_coef * kl, kl.detach()
    if spec.average == "sequence":
        loss = (per_token * mask / lengths).sum() / (n_sequences or N)
    elif spec.average == "token":
        loss = (per_token * mask).sum() / (n_tokens or mask.sum().clamp(min=1))
    else:
        loss = (per_token * mask).sum() / ((n_sequences or N) * (max_new_tokens or T))
    return loss, {name: ((value * mask).sum() / mask.sum().clamp(min=1)).item() for name, value in means.items()}


def microbatches(lengths: Tensor, budget: int) -> list[Tensor]:
    """Split rows (n,) into index tensors of similar length, each padded to at most `budget` tokens, or a single row."""
    parts, order = [[]], lengths.argsort(stable=True).tolist()
    for i in order:                                                         # from short to long: row i sets the width
        if parts[-1] and (len(parts[-1]) + 1) * int(lengths[i]) > budget:
            parts.append([])
        parts[-1].append(i)
    return [torch.tensor(part) for part in parts]


def update(model, optimizer, batch: Batch, advantages: Tensor, cfg: Config, lr: float, reference=None) -> dict:
    """Take cfg.minibatches optimizer steps on `batch` with coefficients `advantages` (Q, G); returns mean metrics.

    Both steps of an iteration are this function. A minibatch without any signal takes no step at all: AdamW would move
    the weights on momentum and decay alone. Rows with coefficient 0 are not computed (their gradient is 0 unless there
    is a KL term) but still count in the denominators. Raises FloatingPointError on a non-finite loss or gradient.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    coefficients = advantages.flatten().to(model.device)                    # (N,)
    sums, trained, skipped, norms = Counter(), 0, 0, []
    for rows in torch.arange(len(coefficients), device=model.device).chunk(cfg.minibatches):    # groups stay whole
        n_sequences, n_tokens = len(rows), batch.mask[rows].sum()
        if reference is None:
            rows = rows[coefficients[rows] != 0]
        if len(rows) == 0:
            skipped += 1
            continue
        lengths = torch.tensor([len(batch.prompts[i]) for i in rows.tolist()]) + batch.mask[rows].sum(1).long().cpu()
        for part in microbatches(lengths, cfg.microbatch_tokens):
            picked = rows[part.to(rows.device)]                             # (n,)
            width = int(batch.mask[picked].sum(1).max())
            tokens, mask, behavior = (x[picked, :width] for x in (batch.tokens, batch.mask, batch.behavior_logprobs))
            prompts = [batch.prompts[i] for i in picked.tolist()]
            logprobs = token_logprobs(model, prompts, tokens, mask, cfg.temperature)                # (n, T)
            ref_logprobs = None
            if reference is not None:
                with torch.no_grad():
                    ref_logprobs = token_logprobs(reference, prompts, tokens, mask, cfg.temperature)
            loss, means = policy_loss(
                logprobs, behavior, coefficients[picked], mask, cfg.base, cfg.clip_low, cfg.clip_high, ref_logprobs,
                cfg.kl_coef if reference is not None else 0.0, n_sequences, n_tokens, cfg.max_new_tokens)
            loss.backward()
            count = int(mask.sum())
            sums.update({name: value * count for name, value in means.items()})
            trained, sums["loss"] = trained + count, sums["loss"] + loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
        if not math.isfinite(norm) or not math.isfinite(sums["loss"]):
            raise FloatingPointError(f"loss {sums['loss']}, gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norms.append(norm)
    steps = max(1, cfg.minibatches - skipped)
    return {"loss": sums.pop("loss", 0.0) / steps, "grad_norm": max(norms, default=0.0), "skipped_steps": skipped,
            **{name: value / max(1, trained) for name, value in sums.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# Data and models. All that touches the hub, a dataset or a chat template, so that the rest sees token ids and tensors.
# ---------------------------------------------------------------------------------------------------------------------

LAYOUTS = (("prompt", "reward_model"), ("problem", "answer"), ("problem", "solution"), ("question", "answer"),
           ("prompt", "answer"), ("prompt", "solution"), ("prompt", "ground_truth"))     # problem + gold, first match
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


class Problem(NamedTuple):
    text: str
    prompt: list[int]       # token ids
    answer: str


def find(name: str, what: str, load):
    """load(), with the failure to find `name`, a path here or a name on the hub, told in one sentence."""
    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name):
        raise UserError(f"the {what} {name} does not exist")
    try:
        return load()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"the {what} {name} can be read neither here nor from the hub: {first_line(error)}")


def load_rows(name: str, split: str) -> datasets.Dataset:
    """The rows of a local file, a folder or a hub dataset: `split` if it has one by that name, else its first split."""
    path, source = Path(name), dict(zip(("path", "name"), [name] if Path(name).exists() else name.split(":")))
    if path.is_file():
        if path.suffix not in READERS or path.stat().st_size == 0:
            raise UserError(f"the dataset {name} is empty or not a {', '.join(READERS)} file")
        source = {"path": READERS[path.suffix], "data_files": name}
    splits = find(name, "dataset", lambda: datasets.load_dataset(**source))
    return splits[split] if split in splits else next(iter(splits.values()))


def encode(tokenizer, messages: list[dict], thinking: bool = False) -> list[int]:
    """Token ids of a prompt: through the chat template where the tokenizer has one, as plain text otherwise."""
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(message["content"] for message in messages)).input_ids
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return tokenizer(text, add_special_tokens=False).input_ids


def read_problems(rows, tokenizer, cfg: Config, name: str) -> list[Problem]:
    """Turn dataset rows into problems; says how many were left out and why. Raises UserError if none is left."""
    layout = next((pair for pair in LAYOUTS if set(pair) <= set(rows.column_names)), None)
    if layout is None:
        raise UserError(f"{name} has the columns {', '.join(rows.column_names)}; understood are "
                        + "; ".join(" + ".join(pair) for pair in LAYOUTS))
    problems, left_out = [], Counter()
    for row in rows.select_columns(list(layout)):
        prompt, gold = (row[column] for column in layout)
        if isinstance(gold, dict):                                          # verl: {"ground_truth": "5" or ["5"], ...}
            gold = gold.get("ground_truth")
        gold = gold[0] if isinstance(gold, list) and gold else gold
        gold = "" if gold is None else str(gold)
        # a worked solution counts by its last box (or GSM8K's ####); without one it is no answer
        answer = extract_answer(gold) or ("" if layout[1] == "solution" else gold.strip())
        if not answer or not prompt:
            left_out["without a question or an answer"] += 1
            continue
        if not isinstance(prompt, list):
            text = str(prompt)
            prompt = [{"role": "user", "content": text + ("" if "\\boxed" in text else cfg.instruction)}]
        ids = encode(tokenizer, prompt, cfg.thinking)
        if len(ids) > cfg.max_prompt_tokens:
            left_out[f"with a prompt over {cfg.max_prompt_tokens} tokens"] += 1
            continue
        problems.append(Problem(prompt[-1]["content"], ids, answer))
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not problems:
        raise UserError(f"no usable problem in {name}: {reasons or 'it has no rows'}")
    if reasons:
        tqdm.write(f"left out of {name}: {reasons}")
    return problems


def load_model(path: str, device, trainable: bool = True):
    """The causal language model at `path`. The choice of dtype is here and in `make_optimizer`, and nowhere else.

    fp32 weights: at a learning rate of 1e-6 most updates are too small for a bf16 weight to notice.
    """
    model = find(path, "model", lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    model = model.to(device).requires_grad_(trainable).eval()
    if model.device.type == "cuda" and trainable:
        model.gradient_checkpointing_enable()
    ids = torch.arange(4, device=model.device)[None]                        # (1, 4)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if not torch.allclose(model.get_output_embeddings()(hidden), model(ids).logits, atol=1e-3, equal_nan=True):
            raise UserError(f"{path} changes its logits behind the output layer (a soft cap or a scale): not supported")
    return model


def make_optimizer(model, cfg: Config):
    return torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# The demo. The only code that a real run does not use: a tiny Qwen3 with a tokenizer of single characters learns to add
# from worked examples until it is sometimes right (RL needs that), and is saved to a folder and loaded like any model.
# ---------------------------------------------------------------------------------------------------------------------

DEMO_EVAL, DEMO_WARM, DEMO_TRAIN, DEMO_DIGITS = 512, 16384, 16384, 3


def demo_rows(seed: int) -> tuple[list[dict], ...]:
    """Additions as rows (problem, worked, answer), no pair of numbers twice: evaluation, warm start, training."""
    low, high = 10**(DEMO_DIGITS - 1), 10**DEMO_DIGITS
    pairs = random.Random(seed).sample(range((high - low)**2), DEMO_EVAL + DEMO_WARM + DEMO_TRAIN)
    rows = []
    for pair in pairs:
        a, b = low + pair // (high - low), low + pair % (high - low)
        columns, carry = [], 0
        for i in range(DEMO_DIGITS):                                        # column by column, from the right
            x, y = a // 10**i % 10, b // 10**i % 10
            columns.append(f"{x}+{y}+{carry}={x + y + carry}")
            carry = (x + y + carry) // 10
        rows.append({"problem": f"{a}+{b}?", "worked": f"{' '.join(columns)} \\boxed{{{a + b}}}", "answer": str(a + b)})
    return rows[:DEMO_EVAL], rows[DEMO_EVAL:-DEMO_TRAIN], rows[-DEMO_TRAIN:]


def build_demo(folder: Path, cfg: Config, warm: list[dict], device) -> None:
    """Make the tiny model and its tokenizer, warm-start it on worked examples, and save both to `folder`."""
    vocabulary = ["<pad>", "<eos>", *sorted(set("0123456789+=? \\boxed{}"))]
    characters = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(vocabulary)}, merges=[]))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>",
                                        clean_up_tokenization_spaces=False)
    torch.manual_seed(cfg.seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    prompts = [tokenizer(row["problem"]).input_ids for row in warm]
    solutions = [tokenizer(row["worked"]).input_ids + [tokenizer.eos_token_id] for row in warm]
    T = max(map(len, solutions))
    tokens = torch.tensor([s + [0] * (T - len(s)) for s in solutions], device=device)               # (n, T)
    mask = torch.tensor([[1.0] * len(s) + [0.0] * (T - len(s)) for s in solutions], device=device)  # (n, T)
    probe = [Problem(row["problem"], ids, row["answer"]) for row, ids in zip(warm[:256], prompts)]  # not trained on
    bar, right = tqdm(range(1, 5001), desc="warm start", unit="step", leave=False), 0.0
    for step in bar:
        rows = torch.randint(len(probe), len(prompts), (64,), generator=rng("cpu", cfg.seed, "warm start", step))
        loss = -token_logprobs(model, [prompts[i] for i in rows], tokens[rows], mask[rows]).sum() / mask[rows].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            right = evaluate(model, tokenizer, probe, cfg, rng(device, cfg.seed, "probe", step))["eval_pass@1"]
            bar.set_postfix(loss=f"{loss.item():.2f}", solved=f"{right:.0%}")
            if right >= cfg.warm_start:
                break
    else:
        raise UserError(f"the warm start solves {right:.0%} after {step} steps and not --warm-start {cfg.warm_start:.0%}")
    bar.close()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Files. A run is a folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/, and at the end model/.
# ---------------------------------------------------------------------------------------------------------------------

RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "model", "start")
MAY_DIFFER = {"steps", "device", "out", "resume", "overwrite", "save_every", "show_every"}       # when a run goes on


def open_run(cfg: Config) -> tuple[Path, dict | None]:
    """The run's folder, made and writable, and the checkpoint to go on from; a UserError for what is in the way."""
    name = f"{Path(cfg.model).name or 'demo'}-{cfg.base}-{cfg.feedback}-seed{cfg.seed}"
    out = Path(cfg.out or Path("runs") / name).expanduser()
    saved = out / "checkpoint" / "state.pt"
    if cfg.resume and not saved.exists():
        raise UserError(f"there is nothing to resume in {out}: it has no checkpoint; start anew with --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"the output folder {out} cannot be written: {error.strerror}")
    if cfg.resume:
        before, now = json.loads((out / "config.json").read_text()), asdict(cfg)
        changed = [f"--{name.replace('_', '-')} was {before.get(name)!r}, is {now[name]!r}" for name in now
                   if name not in MAY_DIFFER and before.get(name) != now[name]]
        if changed:
            raise UserError("--resume goes on with the same settings, but " + "; ".join(changed))
        state = torch.load(saved, map_location="cpu", weights_only=True)
        if state["step"] >= cfg.steps:
            raise UserError(f"{out} already stands at step {state['step']} of {cfg.steps}: raise --steps to go on")
        return out, state
    if any((out / file).exists() for file in RUN_FILES):
        if not cfg.overwrite:
            raise UserError(f"{out} already holds a run: --resume goes on with it, --overwrite deletes it")
        for path in (out / file for file in RUN_FILES):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return out, None


@contextmanager
def swapped_in(path: Path):
    """A binary file to write beside `path` and swap in whole: a kill at any moment leaves the old one or the new."""
    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".partial"), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".partial"), path)


def read_jsonl(path: Path, last_step: float = math.inf) -> list[dict]:
    """The rows up to `last_step`; a last line cut short by a kill is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if row["step"] <= last_step]


def append_jsonl(path: Path, *rows: dict) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@contextmanager
def interrupt_flag():
    """Yields a list, empty until Ctrl-C: the step in hand can then end and be saved. A second one stops at once."""
    flag, previous = [], None

    def handler(*_):
        flag.append(True)
        signal.signal(signal.SIGINT, previous)
        tqdm.write("finishing this step, then saving; Ctrl-C again stops at once, with the last checkpoint intact")

    if threading.current_thread() is not threading.main_thread():           # only there can signals be caught
        yield flag
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop.
# ---------------------------------------------------------------------------------------------------------------------


def pick_problems(problems: list[Problem], step: int, cfg: Config) -> list[Problem]:
    """The prompts of one step: consecutive pieces of one fresh shuffle an epoch, found again from the step alone."""
    shuffles, chosen = {}, []
    for position in range((step - 1) * cfg.prompts_per_step, step * cfg.prompts_per_step):
        epoch, i = divmod(position, len(problems))
        if epoch not in shuffles:
            shuffles[epoch] = torch.randperm(len(problems), generator=rng("cpu", cfg.seed, "order", epoch)).tolist()
        chosen.append(problems[shuffles[epoch][i]])
    return chosen


def grade_all(batch: Batch, problems: list[Problem]) -> tuple[Tensor, Counter]:
    """Rewards (Q, G), and how often a completion could not be judged, by cause."""
    G = len(batch.texts) // len(problems)
    grades = [grade(text, problems[i // G].answer) for i, text in enumerate(batch.texts)]
    return torch.tensor([reward for reward, _ in grades]).view(-1, G), Counter(cause for _, cause in grades if cause)


def evaluate(model, tokenizer, problems: list[Problem], cfg: Config, generator=None) -> dict:
    """pass@1 with its standard error: one completion a problem, sampled as in training."""
    batch = sample(model, tokenizer, [p.prompt for p in problems], 1, cfg.max_new_tokens, cfg.temperature, cfg.top_p,
                   generator, cfg.cache_tokens)
    rewards, _ = grade_all(batch, problems)
    p = rewards.mean().item()
    return {"eval_pass@1": p, "eval_stderr": math.sqrt(p * (1 - p) / len(problems)),
            "eval_truncated": batch.truncated.float().mean().item()}


def feedback_coefficient(feedback: Feedback | None, past_xi: list[float], tracker: ImprovementTracker, cfg: Config,
                         step: int) -> tuple[float, str]:
    """What the verification step is scaled with, and why in a word: phi(xi), or a control in its place."""
    if cfg.feedback == "none":
        return 0.0, "off"
    if feedback is None:
        return 0.0, "sigma_zero" if tracker.full else "warmup"
    value = feedback.phi
    if cfg.feedback == "constant":
        value = cfg.constant
    if cfg.feedback == "shuffled":
        if not past_xi:
            return 0.0, "warmup"
        value = tracker.phi(past_xi[int(torch.randint(len(past_xi), (), generator=rng("cpu", cfg.seed, "xi", step)))])
    return value, "positive" if value > 0 else "negative" if value < 0 else "zero"


def pick_samples(batch: Batch, rewards: Tensor, problems: list[Problem], step: int) -> list[dict]:
    """A right and a wrong completion of the batch, where it has both, for eyes and samples.jsonl."""
    flat, G = rewards.flatten(), rewards.shape[1]                           # (N,)
    return [{"step": step, "problem": problems[i // G].text, "answer": problems[i // G].answer,
             "completion": batch.texts[i], "reward": flat[i].item(), "truncated": batch.truncated[i].item()}
            for i in sorted({int(flat.argmax()), int(flat.argmin())})]


def peak_memory_gb(device) -> float | None:
    """The most memory held so far: on the GPU, or by this process (None on Windows, which does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def prepare(cfg: Config, out: Path, device, resumed: bool):
    """The start model's path, its tokenizer, the training and the held-out problems; cheap checks before dear ones."""
    if cfg.model:
        path = cfg.model
        config = find(path, "model", lambda: AutoConfig.from_pretrained(path))
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > 1e9 and device.type == "cpu":
            tqdm.write(f"warning: {size / 1e9:.1f}B parameters on a CPU: an iteration takes hours; use a GPU for this")
        train_rows = load_rows(cfg.dataset, "train")
        eval_rows = load_rows(cfg.eval_dataset, "test") if cfg.eval_every else None
    else:
        path = str(out / "start")
        eval_rows, warm, train_rows = demo_rows(cfg.seed)
        if not resumed:
            tqdm.write("demo: building a tiny Qwen3 and teaching it worked additions until it is sometimes right")
            build_demo(Path(path), cfg, warm, device)
        train_rows, eval_rows = datasets.Dataset.from_list(train_rows), datasets.Dataset.from_list(eval_rows)
    tokenizer = find(path, "tokenizer of", lambda: AutoTokenizer.from_pretrained(path))
    problems = read_problems(train_rows, tokenizer, cfg, cfg.dataset)
    held_out = read_problems(eval_rows, tokenizer, cfg, cfg.eval_dataset) if cfg.eval_every else []
    return path, tokenizer, problems, held_out[:cfg.eval_limit or None]


def train(cfg: Config) -> list[dict]:
    """Run PIPO as `cfg` says; returns the rows of metrics.jsonl. Raises UserError for what the user can put right."""
    validate(cfg)
    out, state = open_run(cfg)
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path, tokenizer, problems, held_out = prepare(cfg, out, device, resumed=state is not None)
    model = load_model(path, device)
    reference = load_model(path, device, trainable=False) if cfg.kl_coef else None
    optimizer = make_optimizer(model, cfg)
    tracker, previous, past_xi, done = ImprovementTracker(cfg.window, cfg.lam, cfg.xi_clip), None, [], 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        tracker.load_state_dict(state["tracker"])
        previous, past_xi, done = state["previous"], state["past_xi"], state["step"]
        previous = Batch(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in previous.items()})
        state = None                                                        # free the loaded copy
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2))
    for name in ("metrics.jsonl", "samples.jsonl"):                         # rows later than the checkpoint go
        kept = read_jsonl(out / name, done)
        with swapped_in(out / name) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())

    N, size = cfg.prompts_per_step * cfg.group_size, sum(p.numel() for p in model.parameters())
    tqdm.write(f"{cfg.base} with feedback {cfg.feedback}: {size / 1e6:,.1f}M parameters on {device}; {len(problems):,} "
               f"training and {len(held_out):,} held-out problems; steps {done + 1} to {cfg.steps}, each of "
               f"{cfg.prompts_per_step} prompts x {cfg.group_size} samples = {N:,} sequences, at most "
               f"{N * cfg.max_new_tokens:,} new tokens; files in {out}")

    def evaluation(step) -> dict:
        scores = evaluate(model, tokenizer, held_out, cfg, rng(device, cfg.seed, "evaluation"))
        tqdm.write(f"step {step}: held-out pass@1 {scores['eval_pass@1']:.1%} +- {scores['eval_stderr']:.1%}")
        return scores

    if done == 0 and held_out:
        append_jsonl(out / "metrics.jsonl", {"step": 0, **evaluation(0)})
    bar = tqdm(initial=done, total=cfg.steps, desc="pipo", unit="step")
    with interrupt_flag() as interrupted:
        for step in range(done + 1, cfg.steps + 1):
            seconds, clock = {}, time.perf_counter()

            def lap(name):                                                  # seconds since the last lap are `name`'s
                nonlocal clock
                seconds[f"seconds_{name}"], clock = time.perf_counter() - clock, time.perf_counter()

            torch.manual_seed(cfg.seed * 1_000_003 + step)                  # for models with dropout
            chosen, batch = pick_problems(problems, step, cfg), None
            try:
                # --- sample B_t ~ pi_theta, grade it -----------------------------------------------------------------
                batch = sample(model, tokenizer, [p.prompt for p in chosen], cfg.group_size, cfg.max_new_tokens,
                               cfg.temperature, cfg.top_p, rng(device, cfg.seed, "sample", step), cfg.cache_tokens)
                lap("sample")
                rewards, failures = grade_all(batch, chosen)                # (Q, G)
                mu = rewards.mean(dtype=torch.float64).item()               # of every sample, before any is left out
                batch.advantages = group_advantages(rewards, BASES[cfg.base].normalize_std)         # (Q, G)
                lap("grade")

                # --- verification: did the last updates help? a second step on B_{t-1} that says so ------------------
                feedback, verification = tracker.feedback(mu), {}
                coefficient, kind = feedback_coefficient(feedback, past_xi, tracker, cfg, step)
                if coefficient:
                    pi_rewards = improvement_rewards(previous.advantages, coefficient)              # (Q, G)
                    if pi_rewards.any():
                        verification = update(model, optimizer, previous, pi_rewards, cfg, cfg.pi_lr or cfg.lr)
                    else:
                        coefficient, kind = 0.0, "zero_signal"
                lap("verification")

                # --- exploration: the base algorithm's step on B_t, its ratio still against the policy that sampled it
                exploration = update(model, optimizer, batch, batch.advantages, cfg, cfg.lr, reference)
                lap("exploration")
            except FloatingPointError as error:
                torch.save({"step": step, "problems": [tuple(p) for p in chosen], "batch": batch and vars(batch),
                            "previous": previous and vars(previous)}, out / "bad_batch.pt")
                raise FloatingPointError(f"step {step}: {error}; its batch is in {out / 'bad_batch.pt'}, and the last "
                                         f"checkpoint in {out / 'checkpoint'} is as it was")
            tracker.push(mu)                                                # once, after it was read
            past_xi += [feedback.xi] if feedback else []
            previous = batch

            # --- log, evaluate, save ---------------------------------------------------------------------------------
            n_tokens = batch.mask.sum().item()
            row = {"step": step, "mu": mu, "feedback": kind, "coefficient": coefficient,
                   **(feedback or Feedback(None, None, None, None))._asdict(),
                   **exploration, **{f"pi_{name}": value for name, value in verification.items()},
                   "entropy": -batch.behavior_logprobs.sum().item() / n_tokens,
                   "truncated": batch.truncated.float().mean().item(),
                   "zero_signal": (batch.advantages == 0).all(1).float().mean().item(),
                   "completion_length": n_tokens / N, "tokens": int(n_tokens),
                   **{f"grader_{cause}": count for cause, count in failures.items()},
                   **seconds, "memory_gb": peak_memory_gb(device)}
            if held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
                clock = time.perf_counter()
                row.update(evaluation(step))
                row["seconds_evaluation"] = time.perf_counter() - clock
            append_jsonl(out / "metrics.jsonl", row)
            picks = pick_samples(batch, rewards, chosen, step)
            append_jsonl(out / "samples.jsonl", *picks)
            for pick in picks if cfg.show_every and step % cfg.show_every == 0 else []:
                problem, completion = (" ".join(pick[name].split()) for name in ("problem", "completion"))
                tqdm.write(f"step {step}, reward {pick['reward']:.0f}, answer {pick['answer']}: "
                           f"{problem[-100:]} -> {completion[-300:]}{' [cut off]' * pick['truncated']}")
            bar.set_postfix(reward=f"{mu:.2f}", **{name: f"{row[name]:+.2f}" for name in ("xi", "phi") if feedback})
            bar.update()
            if step % cfg.save_every == 0 or step == cfg.steps or interrupted:
                with swapped_in(out / "checkpoint" / "state.pt") as file:
                    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                "tracker": tracker.state_dict(), "previous": vars(previous), "past_xi": past_xi}, file)
            if interrupted and step < cfg.steps:
                bar.close()
                raise KeyboardInterrupt(f"stopped after step {step}; go on with the same command and --resume")
    bar.close()
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    rows = read_jsonl(out / "metrics.jsonl")
    print(summary(rows, out))
    return rows


def summary(rows: list[dict], out: Path) -> str:
    """What a run came to, in a few lines."""
    steps, evals = ([row for row in rows if key in row] for key in ("mu", "eval_pass@1"))
    kinds = Counter(row["feedback"] for row in steps)
    phases = {name: sum(row[f"seconds_{name}"] for row in steps)
              for name in ("sample", "grade", "verification", "exploration")}
    scores = [f"{row['eval_pass@1']:.1%} +- {row['eval_stderr']:.1%}" for row in evals]
    lines = [f"held-out pass@1: {scores[0]} -> {scores[-1]}"] if scores else []
    lines += ["feedback: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
              "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in phases.items()),
              f"files: {out}/metrics.jsonl, samples.jsonl, checkpoint/, and the trained model in {out}/model"]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line.
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> Config:
    """Flags from the fields of Config; without --model, the demo's values stand where none was given."""
    parser = argparse.ArgumentParser(description="PIPO in one file: without --model, an offline demo on additions.",
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(Config):
        demo = f" (demo: {DEMO[f.name]})" if f.name in DEMO and DEMO[f.name] != "" else ""
        default = "" if f.default in (None, "", False) else f" (default: {f.default})"
        kind = dict(action="store_true") if f.type in (bool, "bool") else dict(
            type=float if f.default is None else type(f.default), choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"] + default + demo, **kind)
    given = vars(parser.parse_args(arguments))
    return Config(**({} if given.get("model") else DEMO) | given)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for what the user can put right, 1 for a run that broke down."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        train(parse(arguments))
    except UserError as error:
        print(f"pipo: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"pipo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"pipo: {error or 'stopped before the first checkpoint: nothing was saved'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
