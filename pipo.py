#!/usr/bin/env python3
"""PIPO, Policy Improvement Policy Optimization (arXiv 2604.00860), in one file.

Reinforcement learning with verifiable rewards, in a loop that looks back. GRPO samples G answers to each prompt, grades
them, and pushes up what beat its group: nobody checks whether the push helped. PIPO does: the next batch's mean reward,
held against the last K, says whether the policy improved, and the previous batch is then stepped on once more.

Letters: Q prompts a step, G samples a prompt (the group), N = Q*G sequences, T tokens, V vocabulary. B_t is the batch
of step t, A_i the GRPO advantage of its sample i, K the length of the window, lam the weight of a fall.

    mu_t    = mean reward of the fresh batch B_t
    xi_t    = (mu_t - mean(mu_{t-1} .. mu_{t-K})) / std(mu_{t-1} .. mu_{t-K})
    phi_t   = xi_t if xi_t >= 0 else lam * xi_t
    r_i     = phi_t * G * A_i / sum_group |A_j|         for each sample i of B_{t-1}

    one iteration: sample, grade B_t -> step on B_{t-1} with r (verification) -> step on B_t with A (exploration)

mu_t judges B_{t-1} because the policy that drew B_t came out of the step on B_{t-1}. There is no verification step
while the window fills (the first K iterations), where its rewards are all equal, where phi_t is 0, and where no group
of B_{t-1} is mixed. In names of settings and metrics it is `pi_`, for policy improvement.

    python pipo.py                          # offline demo: a 0.3M-parameter model learns to add, minutes on a laptop
    python pipo.py --model Qwen/Qwen3-4B    # MATH, on one GPU
    python pipo.py --help                   # every setting, with its meaning

Left out on purpose: more than one GPU, an inference server, replay beyond the previous batch, learned reward models,
rate schedules, dropout.
"""

import argparse
import copy
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
import unicodedata
import zlib
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import datasets
import mpmath
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models as tokenizer_models
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer,
                          Cache, DynamicCache, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

try:
    import resource
except ImportError:             # Windows
    resource = None

# ---------------------------------------------------------------------------------------------------------------------
# Settings. One dataclass holds them all: its fields are the command-line flags, their --help and config.json. `demo` is
# the value used instead when no --model is given.
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can put right: shown as one sentence, exit code 2."""


def first_line(error: Exception) -> str:
    """What an error of a library says first; its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def option(default, help, demo=None, choices=None):
    """A field of Config: its default, its --help, its value in the demo if that is another, and what it may be."""
    return field(default=default, metadata=dict(help=help, demo=demo, choices=choices))


@dataclass
class Config:
    """All settings of a run; each field is the flag of its name, with - for _."""
    # the task
    model: str = option("", "hub name or folder of a causal language model; without it, the offline demo")
    dataset: str = option("DigitalLearningGmbH/MATH-lighteval", "training problems: a hub name (org/name, or "
                          "org/name:config), a .parquet, .jsonl, .json or .csv file, or a folder", demo="")
    eval_dataset: str = option("HuggingFaceH4/MATH-500", "held-out problems, in the same forms", demo="")
    instruction: str = option("\n\nReason step by step, and put your final answer within \\boxed{}.",
                              "put behind a problem without \\boxed in it, not behind ready messages", demo="")
    warm_start: float = option(0.25, "demo only: its supervised phase ends once it solves this share of fresh problems")
    thinking: bool = option(False, "let a chat template switch its thinking mode on")
    max_prompt_tokens: int = option(512, "longer prompts are left out, and counted")
    # sampling
    steps: int = option(261, "iterations", demo=120)
    prompts_per_step: int = option(128, "Q, prompts an iteration", demo=32)
    group_size: int = option(8, "G, samples a prompt")
    max_new_tokens: int = option(4096, "longest completion", demo=48)
    temperature: float = option(0.7, "of sampling, in training and evaluation", demo=1.0)
    top_p: float = option(1.0, "draw from the smallest set of tokens with this mass")
    cache_tokens: int = option(None, "tokens in the key-value cache at a time; more is faster (default: what fits)")
    # the base objective (exploration step)
    base: str = option("grpo", "base objective", choices=("grpo", "dr_grpo", "dapo", "gspo"))
    clip_low: float = option(None, "lower clip of the ratio (default: the base's own)")
    clip_high: float = option(None, "upper clip of the ratio (default: the base's own)")
    kl_coef: float = option(0.0, "weight of the KL to the starting model, in the exploration step only; above 0 that "
                            "model is kept in memory (with --lora it need not be)")
    # the feedback (verification step)
    feedback: str = option("pipo", "what scales the verification step: phi(xi), no such step, --constant, or the "
                           "phi of an earlier xi drawn at random", choices=("pipo", "none", "constant", "shuffled"))
    window: int = option(8, "K, past mean rewards that the present one is held against")
    lam: float = option(0.1, "lambda, the weight of a fall in reward against a rise")
    xi_clip: float = option(None, "cut xi to [-this, this] (default: no cut, as in the paper)")
    constant: float = option(0.43, "coefficient of --feedback constant, once the window is full; 0.43: phi's mean on "
                             "noise at K 8, lambda 0.1")
    reward_noise: float = option(0.0, "share of training rewards flipped at random, to study noisy feedback")
    # the optimizer
    lr: float = option(1e-6, "learning rate", demo=1e-4)
    pi_lr: float = option(None, "learning rate of the verification (policy-improvement) step (default: --lr)")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    minibatches: int = option(1, "optimizer steps that a batch is split into, in both steps (the paper: 2)")
    epochs: int = option(1, "passes over a batch in the exploration step; the last one is logged")
    microbatch_tokens: int = option(8192, "padded tokens in one backward pass; changes memory, not results", demo=2048)
    # precision and memory
    dtype: str = option("auto", "of the weights that sample and are differentiated; gradients are summed, and AdamW "
                        "steps, in float32 (auto: bfloat16 on a GPU, float32 on a CPU and in the demo)",
                        choices=("auto", "float32", "bfloat16"))
    optimizer_device: str = option("auto", "where AdamW's float32 weights and moments are kept and stepped (auto: in "
                                   "host memory, if they would take over a tenth of the GPU's and fit there)",
                                   choices=("auto", "cpu", "cuda"))
    lora: int = option(0, "rank of LoRA adapters that are trained instead of the weights, 0 for all weights (needs "
                       "peft, and a higher --lr)")
    # the run
    seed: int = option(0, "the same seed gives the same run on the same machine (on a CPU, to the last bit)")
    device: str = option("", "cpu, cuda, cuda:1, ... (default: cuda if present)")
    out: str = option("", "folder for the run's files (default: runs/<name of the model, base, feedback and seed>)")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    overwrite: bool = option(False, "delete the run that is in --out")
    eval_every: int = option(10, "steps between evaluations, 0 for none at all", demo=20)
    eval_limit: int = option(0, "evaluate on the first so many problems only, 0 for all")
    save_every: int = option(10, "steps between checkpoints, 0 for none at all", demo=20)
    show_every: int = option(5, "steps between samples shown on the screen, 0 for none", demo=20)


# Config(**DEMO) is what `python pipo.py` runs; a real run is Config(model=..., ...).
DEMO = {f.name: f.metadata["demo"] for f in fields(Config) if f.metadata["demo"] is not None}


def validate(cfg: Config) -> None:
    """Refuse settings that make no sense (raises UserError) before anything is loaded."""
    positive = ("steps prompts_per_step minibatches epochs max_new_tokens max_prompt_tokens cache_tokens "
                "microbatch_tokens lr pi_lr max_grad_norm temperature xi_clip").split()
    not_negative = "eval_every eval_limit save_every show_every kl_coef weight_decay clip_low clip_high lora".split()
    given = {name: value for name, value in asdict(cfg).items() if value is not None}
    rules = [(math.isfinite(value), name, "it must be a finite number") for name, value in given.items()
             if isinstance(value, float)]
    rules += [(given[name] > 0, name, "it must be above 0") for name in positive if name in given]
    rules += [(given[name] >= 0, name, "it must be 0 or more") for name in not_negative if name in given]
    rules += [(getattr(cfg, f.name) in choices, f.name, f"it must be one of {', '.join(choices)}")
              for f in fields(cfg) if (choices := f.metadata["choices"])]
    rules += [
        (cfg.window >= 2, "window", "a standard deviation needs at least 2 past rewards"),
        (0 <= cfg.lam <= 1, "lam", "it must lie between 0 and 1"),
        (0 <= cfg.reward_noise < 0.5, "reward_noise", "it must be a share, from 0 to below 0.5"),
        (cfg.group_size >= 2, "group_size", "a sample is compared with its group, so it takes at least 2"),
        (0 < cfg.top_p <= 1, "top_p", "it must lie above 0 and not above 1"),
        (cfg.clip_low is None or cfg.clip_low < 1, "clip_low", "it must lie below 1"),
        (cfg.prompts_per_step % max(1, cfg.minibatches) == 0, "minibatches",
         f"it must divide --prompts-per-step ({cfg.prompts_per_step})"),
        (not (cfg.resume and cfg.overwrite), "overwrite", "it contradicts --resume; give one of the two"),
        (not cfg.lora or find_spec("peft"), "lora", "it needs the package peft (pip install peft)"),
        (0 <= cfg.warm_start < 1, "warm_start", "it must be a share, from 0 to below 1"),
        (cfg.model or not cfg.dataset, "dataset", "it needs --model: the demo makes its own problems"),
        (cfg.model or not cfg.eval_dataset, "eval_dataset", "it needs --model: the demo makes its own problems"),
    ]
    for ok, name, reason in rules:
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)!r}: {reason}")
    try:
        torch.empty(0, device=cfg.device or "cpu")
    except (RuntimeError, AssertionError) as error:                         # an unknown name, or no such device here
        raise UserError(f"--device is {cfg.device!r}: {first_line(error)}")
    device = pick_device(cfg)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {cfg.device!r}: it must be cpu or a CUDA device")
    if cfg.optimizer_device not in ("auto", "cpu", device.type):
        raise UserError(f"--optimizer-device is {cfg.optimizer_device!r}: the run is on {device}")


def pick_device(cfg: Config) -> torch.device:
    """The device that samples and trains."""
    return torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def rng(device, *key) -> torch.Generator:
    """A generator that depends on `key` alone, so that no draw depends on how many others were made before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))           # 7 bytes fit an int64


# ---------------------------------------------------------------------------------------------------------------------
# Verifying. The verifier is the objective: a wrong "no" punishes a right answer, a wrong "yes" is a hole to be found.
# Text -> tokens -> recursive descent -> values -> comparison. Nothing is ever executed: an answer can only become
# numbers, names and operators listed here. There is no timer: the limits below bound the work before it is done.
# ---------------------------------------------------------------------------------------------------------------------

MAX_TEXT = 1_500  # characters of an answer
MAX_DEPTH = 25  # nested brackets, fractions, roots, ...
MAX_BITS = 20_000  # of an exact number: 2^20000, 1500!
MAX_COST = 50_000  # of reading and comparing, about a microsecond each
POINTS = 12  # where expressions in variables are compared
DIGITS = 300  # decimals of what is not an exact fraction; also the bits that its operands may have
TINY = 1e-150  # far below any honest difference, far above what rounding does to numbers between 2^-300 and 2^300


class Unreadable(Exception):
    """The text is not in the grammar."""


class TooBig(Exception):
    """Reading or comparing the text would take more than the limits allow."""


# --- What is known: names, spellings, units, and the rewritings that take off the dress


def table(text):
    """'a b c; d e': b and c stand for a, e stands for d."""
    return {name: row.split()[0] for row in text.split(";") for name in row.split()}


SPELLINGS = table(r"""
    * \cdot \times \ast × · ⋅ ∙ ∗; / \div ÷ ⁄ ∕; - − – —; ^ **; <= \le \leq \leqslant ≤ ⩽; >= \ge \geq \geqslant ≥ ⩾;
    < \lt; > \gt; != \ne \neq ≠; ~ \approx \simeq ≈; \in ∈; \pm ±; \mp ∓; \cup ∪; \cap ∩; \setminus \backslash ∖;
    \infty ∞ infinity infty inf; \emptyset \varnothing ∅; \mathbb{R} ℝ \R \reals; \pi π pi; \sqrt √ sqrt; % \%; $ \$;
    \frac \dfrac \tfrac \cfrac; \binom \dbinom \tbinom; { \{ \lbrace; } \} \rbrace; ( \langle ⟨; ) \rangle ⟩; : \colon;
    [ \lbrack; ] \rbrack; or \lor \vee; and \land \wedge &; \arcsin arcsin asin; \arccos arccos acos; \log log \lg;
    \arctan arctan atan; \ln ln; \sin sin; \cos cos; \tan tan; \cot cot; \sec sec; \csc csc; \gcd gcd; \lcm lcm""")
# Different units are never equal; other trailing words are merely dropped. A plural -s is dropped before the look-up.
UNITS = table(r"""
    mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre; inch inche in; yard yd;
    foot feet ft; mile mi; mg milligram; g gram; kg kilogram; pound lb; ounce oz; second sec s; minute min; hour hr h;
    ms millisecond; day; week; month; year yr; l liter litre; ml milliliter; gallon; mph; dollar $ usd; cent ¢; euro €;
    £; radian; degree deg \circ; % percent pct percentage; j joule; n newton; w watt; v volt; k kelvin; hz hertz;
    am; pm""")
PLAIN_UNITS = UNITS.keys() - {"in", "mi", "min"}  # units outside \text{...} too; a bare min is m*i*n
# After one of these words, "5 and some words" is no longer 5.
HEDGES = set("""not nor either neither maybe perhaps possibly probably but versus vs alternatively otherwise to through
    between less more fewer than least most about approximately if unless except without
    dozen hundred thousand million billion trillion""".split())
LETTERS = set(r"""\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \kappa \lambda \mu \nu
    \xi \rho \sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Sigma \Phi \Psi \Omega \ell
    \hbar""".split())
ACCENTS = set(r"\overline \bar \vec \hat \tilde \overrightarrow \widehat \dot \ddot".split())
FUNCTIONS = {"\\" + name: name for name in "sin cos tan cot sec csc sinh cosh tanh log ln floor ceil".split()} | {
    r"\arcsin": "asin", r"\arccos": "acos", r"\arctan": "atan", r"\abs": "fabs"}  # as mpmath calls them
EXACT = {r"\abs": abs, r"\floor": math.floor, r"\ceil": math.ceil, r"\gcd": math.gcd, r"\lcm": math.lcm,
         r"\binom": math.comb, "!": math.factorial}
CALLS = {*FUNCTIONS, r"\gcd", r"\lcm"}
SIGNS = {"+": 1, "-": -1, r"\pm": 1, r"\mp": -1}
SEPARATORS = (",", ";", "or", "and", r"\\")
RELATIONS = ("=", "~", "!=", "<", "<=", ">", ">=", r"\in")
MATRICES = {rf"\begin{{{name}}}" for name in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "cases")}
STARTS = {*CALLS, *LETTERS, *ACCENTS, *MATRICES, "(", "[", "{", r"\pi", r"\sqrt", r"\frac", r"\binom"}
INFINITY, MINUS_ONE = [math.inf], [Fraction(-1)]
CONSTANTS = {r"\infty": INFINITY, r"\emptyset": ("set",), r"\mathbb{R}": ("()", [-math.inf], INFINITY), '"nan"': [None]}
# What may stand before "=" as a mere label of the value: x, a_n, f(x), (x, y), V_1 : V_2, AB, Area.
NAME = r"\\?[a-zA-Z]+(?: _ (?:\w|\{[^{}]*\}))?(?: ')*(?: \( [^()=]* \))?"
LABEL = re.compile(rf'{NAME}(?: : {NAME})*|\( {NAME}(?: , {NAME})+ \)|[A-Z](?: [A-Z])+|(?:"\w+" ?)+')
UNIT = re.compile(r'(?:"[^"]*"|\\circ|[%$€£¢]) (?:(?:"[^"]*"|\\circ|[/*%$]|\^ (?:- )?\d|\^ \{ (?:- )?\d \}) )*')

# What is only dress, or another way to write the same: a text that contains the first has the second replaced.
STYLE = r"\\(?:text|mbox|hbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|boldsymbol|operatorname)\*?\s*"
SPACE = r"(?<!\\)\\[,!;:> ]|\\q?quad|\\thinspace|~"
FRAC, INTEGER = r"\\[dtc]?frac\s*", r"\{\s*([0-9]+)\s*\}\s*"
REWRITES = [(part, re.compile(pattern), new) for part, pattern, new in [
    ("", r'["“”`]|(?<!\\)\$|(?<!\\)\\[()\[\]](?![a-z])', " "),
    ("\\", r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:left|right)\s*\.", " "),
    ("\\", r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|boxed|fbox|underline|rm|bf)(?![A-Za-z])", " "),
    ("", r"[⁰¹²³⁴-⁹⁻ⁿ]+", lambda m: "^{%s}" % unicodedata.normalize("NFKC", m[0])),
    ("", r"[¼-¾⅐-⅞]", lambda m: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("⁄"))),
    ("\\l", r"\\l(floor|ceil)", r"\\\1("), ("\\r", r"\\r(?:floor|ceil)", ")"), ("vert", r"\\[lr]?vert", "|"),
    ("|", r"\|([^|]*)\|", r"\\abs(\1)"), ("exp", r"\\?\bexp(?![A-Za-z])", "e^"),
    ("\\\\", r"\\\\\s*\[[^][]*\]", r"\\\\"),  # \\[2pt]
    ("", r"(?<=[0-9])(?:\{\s*,\s*\}|,?(?:%s)|,\\!|\s)\s*(?=[0-9]{3}(?![0-9]))" % SPACE, ""),  # 1{,}234  1,\!234  1\,234
    ("", r"(?:%s|\s)+" % SPACE, " "),
    (".", r"(?i)\b([ap])\.\s?m\.?(?![a-z])", r"\1m"),
    ("\\", STYLE + r"\{([^{}]*)\}", lambda m: quoted(m[1])), ("\\", STYLE + r"(?![A-Za-z])", " "),
    ("", r'^ *\(?"?([A-Z])"? ?[).:] *(?=["0-9]|\\frac|\\sqrt|\\\$)(?:(?!\b(?:or|and|not|[A-Z])\b|[,;(]).)*$', r"\1"),
    ('"', r'\^? ?\{? ?"(?:st|nd|rd|th)" ?\}?', " "), ("", r"(?<=[0-9])(?:st|nd|rd|th)\b", " "),  # 12^{\text{th}}
    ("", r"°|\\degree", r"\\circ "), ("circ", r"\^ ?(?:\{ ?\\circ ?\}|\\circ)", r"\\circ "),
    ("circ", r'\\circ *"?[CF]"? *$', r"\\circ"), ("\\", r"\\(angle|triangle) ?([A-Z]{1,5})", r' "\1\2" '),
    ("over", r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    ("\\", r"(\\[dtc]?(?:frac|binom)\s*)([0-9])", r"\1{\2}"),  # \frac12
    ("\\", r"(\\[dtc]?(?:frac|binom)\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
    ("/", r"(?<![0-9])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}"),  # 1 1/2
    ("frac", r"(?<![0-9.^_])([0-9]+)\s*%s%s%s" % (FRAC, INTEGER, INTEGER),  # 1\frac12
     lambda m: r"(%s+\frac{%s}{%s})" % m.groups() if int(m[2]) < int(m[3]) else m[0]),
    (".", r"(?<![0-9])([0-9]*\.([0-9]*))\\(?:overline|bar)\{([0-9]+)\}",  # 0.1\overline{6}
     lambda m: "(%s0+%s/%s)" % (m[1], m[3], "9" * len(m[3]) + "0" * len(m[2]))),
    ("frac", FRAC + r'\{ ?("\w+") ?\} ?\{ ?("\w+") ?\}', r"\1/\2"),
    ("eal", r'(?i)"?all"? "?reals?"?(?: "?numbers"?)?', r"\\mathbb{R}"),
    ("", r"^ ?(?:[=:≈]|\\approx(?![a-z]))|(?<![\s.,;:])[\s.,;:]+$", ""),
    (",", r"^(?:[^(\[\\]|\\(?!\{))*$", lambda m: COMMAS.sub(lambda n: n[0].replace(",", ""), m[0])),  # not (1,234)
    ("", r"^(?=.*(?:[^\W\d_]{4}|[A-Z]\w|[aeiou]))(?:[^\W\d_]|[\s.,'’-])+$", lambda m: quoted(m[0])),
]]
COMMAS = re.compile(r"(?<![0-9.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])")
TOKEN = re.compile(r"""(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9.]))?  # 12  .5  1e-8
    | "[^"]*" | \\(?:begin|end)\{\w+\} | \\mathbb\{\w\} | \\[A-Za-z]+ | \\\S
    | [^\W\d_]+ | <= | >= | \*\* | (?<![0-9)!])!= | \S""", re.VERBOSE)

# --- Finding the answer in a text

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
HASHES = re.compile(r"(?<!#)####(?!#)(?!\W{0,9}(?:final|answer|step|solution)\b)[ \t]*(\S.*)", re.I)
CUE = re.compile(r"(?:\b(?:final\s+)?answer\b[^.\n]{0,40}?(?:\bis\b|\bare\b|:|=)|final\s+answer)[\s*_:]*(?=\S)", re.I)
MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
SPECIAL = re.compile(r"<\|[^|>]*\|>|</s>|<eos>")


def boxed(text):
    """The content of the last box; None without a box, "" if the last one is empty or never closed."""
    box = BOX.match(text, max(text.rfind(r"\boxed"), text.rfind(r"\fbox"), 0))
    if not box:
        return None
    rest, depth = text[box.end():box.end() + 10 * MAX_TEXT], 0
    if not rest.startswith("{"):  # \boxed 5
        return re.match(r"[^\s${}]*", rest)[0]
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[1:brace.start()].strip()
    return ""


def extract_answer(text: str) -> str | None:
    """The final answer of a completion as it was written, or None.

    The last box; without any box the last `#### x`; otherwise "the answer is x" near the end. Thoughts do not count,
    and there is no fallback: a truncated or empty last box, or bare numbers in prose, are no answer.
    """
    start, *thoughts = text.split("<think>")
    text = "\n".join(part.rpartition("</think>")[2] for part in (start, *(x for x in thoughts if "</think>" in x)))
    answer = boxed(text)
    if answer is None and (found := HASHES.findall(text[-10 * MAX_TEXT:])):
        answer = SPECIAL.split(found[-1])[0]
    elif answer is None:
        tail = SPECIAL.split(text[-1000:])[0]
        for cue in CUE.finditer(tail):
            inside = MATH.match(tail, cue.end())
            rest = re.split(r"\.\s|\n", tail[cue.end():] + "\n")[0]
            answer = next(filter(None, inside.groups())) if inside else rest
    return (answer or "").strip(" \t\n*") or None


# --- From text to tokens


def quoted(text):
    """Words in quotes, so that they are never read as products of letters."""
    return " %s " % re.sub(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", r'"\g<0>"', text)


def unit_name(word):
    """A word as UNITS spells it, without a plural -s (but ms is no m)."""
    word = word.lower()
    return word[:-1] if len(word) > 2 and word[-1] == "s" and word not in UNITS else word


def tokenize(text):
    """Canonical tokens: numbers, "words" in quotes, single letters, \\commands and symbols."""
    if len(text) > MAX_TEXT:
        raise TooBig
    for part, pattern, new in REWRITES:
        text = pattern.sub(new, text) if part in text else text
    tokens = []
    for match in TOKEN.finditer(text):
        token = match[0]
        word, attached = token.strip('"'), text[match.start() - 1:match.start()].isdigit()
        # 5 apples and 5cm end in words; 2lwh and 6abcd are products
        is_word = token != word or unit_name(word) in PLAIN_UNITS or not attached and (len(word) > 3 or word.istitle())
        if word in SPELLINGS or token == word and not word.isalpha():
            tokens.append(SPELLINGS.get(word, word))
        elif len(word) > 1 and is_word or token != word and word in UNITS:
            tokens.append(f'"{word.lower()}"')
        else:  # a product of letters
            tokens.extend(word)
    return tokens


# --- Arithmetic and comparison, within a budget


class PerThread(threading.local):
    """An mpmath context for each thread, as the precision of the global one is not ours to change."""

    def __init__(self):
        self.mp = mpmath.MPContext()
        self.mp.dps = DIGITS


LOCAL = PerThread()


def kind(node):
    """What a node is: "" if samples."""
    return node[0] if type(node) is tuple else ""


class Arithmetic:
    """Computes with samples: a list of one number if constant, else of one at each of POINTS points; None if undefined.

    Numbers are exact fractions as long as they can be, and then mpmath's with DIGITS digits. A float is always an
    infinity: it can be compared and negated, and any arithmetic with it is undefined.
    """

    def __init__(self):
        self.mp, self.cost = LOCAL.mp, MAX_COST
        self.complex = False  # whether i was met

    def pay(self, cost):
        """Take `cost` from the budget of this comparison; at its end it is TooBig."""
        self.cost -= cost
        if self.cost < 0:
            raise TooBig

    def size(self, x):
        """The bits of a fraction, the binary exponent of another number."""
        exact = type(x) is Fraction
        return x.numerator.bit_length() + x.denominator.bit_length() if exact else abs(self.mp.mag(x or 1))

    def checked(self, x, *args):
        """x, if it is a fraction that is not too large, or args have so few digits that rounding does no harm."""
        exact = type(x) is Fraction
        for size in map(self.size, [x] if exact else args):
            self.pay(3 + size // 20 if exact else DIGITS // 15)
            if size > (MAX_BITS if exact else DIGITS):
                raise TooBig
        return x

    def each(self, function, *args):
        """The samples of function(*args)."""
        if not args or any(type(arg) is not list for arg in args):
            raise Unreadable

        def value(*xs):
            try:
                return None if any(x is None or type(x) is float for x in xs) else function(*xs)
            except (ArithmeticError, ValueError, TypeError):  # undefined here, or of such arguments
                return None

        return [value(*(arg[k % len(arg)] for arg in args)) for k in range(max(map(len, args)))]

    def add(self, a, b):
        """a + b."""
        return self.each(lambda x, y: self.checked(x + y, *(z for z in (x, y) if type(z) is Fraction)), a, b)

    def mul(self, a, b):
        """a * b, one of which may be a matrix."""
        for x, y in ((a, b), (b, a)):
            if kind(x) in ("matrix", "row"):
                return (x[0], *(self.mul(item, y) for item in x[1:]))
        return self.each(lambda x, y: self.checked(x * y, x, y, x * y), a, b)

    def neg(self, a):
        """-a, of samples or a matrix."""
        return [None if x is None else -x for x in a] if type(a) is list else self.mul(MINUS_ONE, a)

    def pow(self, a, b):
        """a ** b."""
        return self.each(self.power, a, b)

    def div(self, a, b):
        """a / b, undefined where b is 0."""
        return self.mul(a, self.each(lambda x: self.power(x, Fraction(-1)), b))

    def call(self, name, *args):
        """A function of FUNCTIONS or EXACT."""
        return self.each(lambda *xs: self.function(name, *xs), *args)

    def power(self, x, y):
        """x ** y for single numbers: exact where it can be, the real one of odd roots, never too large to compute."""
        if abs(x) < TINY and (x == 0 or type(x) is not Fraction):
            return Fraction(0) if y.real > 0 else 1 / Fraction(0)
        if abs(y) * (self.size(x) + 5) > MAX_BITS:
            raise TooBig
        if type(x) is type(y) is Fraction and y.denominator == 1:
            return self.checked(x ** int(y))
        if type(y) is Fraction and y.denominator % 2 and x.real < 0 and abs(x.imag) < TINY:  # the real root
            return self.power(-x.real, y) * (-1) ** (y.numerator % 2)
        self.pay(DIGITS)
        power = self.mp.power(x, y)
        return self.checked(power, x, y, power)

    def function(self, name, *xs):
        """A function of single numbers; ArithmeticError or ValueError where it is undefined."""
        if name in EXACT and all(type(x) is Fraction for x in xs):
            if name in (r"\binom", "!") and max(xs) > 1500:
                raise TooBig
            return self.checked(Fraction(EXACT[name](*(int(x) if x.denominator == 1 else x for x in xs))))
        if name not in FUNCTIONS:
            raise ValueError("not whole numbers")
        self.pay(DIGITS)
        if abs(xs[0]) > 10**6:
            raise TooBig
        y = getattr(self.mp, FUNCTIONS[name])(*xs)
        if not self.mp.isfinite(y) or abs(y) > 1 / TINY:
            raise ZeroDivisionError("a pole")
        if 0 < abs(y) < TINY and all(type(x) is Fraction for x in xs):  # sin(10^-200) is not 0, sin(pi) is
            raise TooBig
        return Fraction(0) if abs(y) < TINY else self.checked(y, y, *xs)

    def variable(self, name):
        """Samples of a variable: fractions of either sign, then positive integers."""
        bits = [zlib.crc32(f"{name} {k}".encode()) for k in range(POINTS)]
        return [Fraction(2 + b % 11) if k > 5 else Fraction(3 + b % 53, 37) * (-1 if k > 1 and b & 1024 else 1)
                for k, b in enumerate(bits)]

    def equal(self, a, b):
        """Whether samples agree wherever both are defined, and that is at enough points."""
        seen, n = 0, max(len(a), len(b))
        for k in range(n):
            x, y = a[k % len(a)], b[k % len(b)]
            if x is None or y is None or n > 1 and not self.complex and abs(x.imag) > TINY < abs(y.imag):
                continue  # a real function is not compared where it is not real
            exact = type(x) is type(y) is Fraction or float in (type(x), type(y))
            if x != y if exact else abs(self.add([x], [-y])[0]) > TINY:
                return False
            self.pay(1)
            seen += 1
        return seen > (n > 1) * 2

    def proportional(self, a, b, positive=False):
        """Whether a is b times a constant that is not zero, or even positive."""
        for x, y in zip(a, b) if len(a) == len(b) > 1 else ():
            if x is not None and y is not None and abs(x) > TINY < abs(y):
                return (not positive or (x * y).real > 0) and self.equal(self.mul(a, [y]), self.mul(b, [x]))
        return False

    def same(self, a, b):
        """Whether two answers, as read by Reader, are equal."""
        self.pay(1)
        for x, y in ((a, b), (b, a)):
            if kind(x) == "unit":
                return (kind(y) != "unit" or x[2] == y[2]) and self.same(x[1], y[1] if kind(y) == "unit" else y)
            if kind(x) in ("is", "in") and x[1] and kind(y) != x[0] or kind(x) == "set" != kind(y) and len(x) == 2:
                return self.same(x[1] if x[0] == "set" else x[2], y)
        if type(a) is list is type(b):
            return self.equal(a, b)
        if type(a) is not type(b) or type(a) is str or a[0] != b[0] or len(a) != len(b):
            return type(a) is str and a == b
        if a[0] == "is":
            return self.proportional(a[3], b[3]) or a[1] == b[1] != "" and self.same(a[2], b[2])
        if a[0] in (">", ">=", "!="):
            return self.proportional(a[1], b[1], positive=a[0] != "!=")
        if a[0] in ("set", "all", r"\cup", r"\cap"):  # as often here as there
            return all(0 < sum(self.same(x, y) for y in a[1:]) == sum(self.same(x, y) for y in b[1:]) for x in a[1:])
        return all(map(self.same, a[1:], b[1:]))


# --- The grammar


class Reader(Arithmetic):
    """Reads an answer by recursive descent, one method for each level of the grammar.

    An expression becomes its samples (a list), anything else a tuple: ("word", text), ("base", digits, base),
    ("()", ...), ("[)", ...), ("row", ...) in order, ("set", ...), ("\\cup", ...) in any order, ("unit", node, name),
    ("is", label, node, left - right) for equations, ("in", name, interval) or (">", left - right) for inequalities.
    """

    def read(self, tokens):
        """The answer; a set of both its readings where there is a \\pm."""
        found = []
        for self.sign in (1, -1) if {r"\pm", r"\mp"} & set(tokens) else (1,):
            self.tokens, self.i, self.depth, self.angle = [*tokens, "end"], 0, 0, 0
            self.next = self.tokens[0]
            node = self.items()
            if self.next != "end":
                raise Unreadable
            items = node[1:] if kind(node) == "set" else (node,)
            found += [x for x in items if not any(self.same(x, y) for y in found)]
        return ("set", *found) if self.sign < 0 else node

    def accept(self, *tokens):
        """Use up and return the next token if it is one of these, else None."""
        if self.next in tokens and self.next != "end":
            self.i += 1
            self.next = self.tokens[self.i]
            return self.tokens[self.i - 1]
        return None

    def need(self, *tokens):
        """The same, but anything else is Unreadable."""
        if token := self.accept(*tokens):
            return token
        raise Unreadable

    def raw(self):
        """A token, or a bracket with its content, as text."""
        start, depth = self.i, 0
        while self.i == start or depth:
            token = self.need(self.next)
            depth += (token in ("(", "{")) - (token in (")", "}"))
        return "".join(self.tokens[start:self.i]).strip("{}")

    def items(self):
        """Items between separators: the only one, or a set of them."""
        found, joint = [self.relation()], False
        while separator := self.accept(*SEPARATORS):
            joint |= separator == "and"
            if self.next not in SEPARATORS:
                found.append(self.relation())
        if joint and all(kind(x) in ("in", ">", ">=") for x in found):  # x > 2 and x < 3
            return self.meet(*found)
        if len(found) > 1 and all(kind(x) == "in" and x[1] == found[0][1] for x in found):  # x < 2 or x > 3
            return ("in", found[0][1], (r"\cup", *(x[2] for x in found)))
        return ("set", *found) if len(found) > 1 else found[0]

    def relation(self):
        """a = b, a < b <= c, x \\in S."""
        start, ops, self.names = self.i, [], self.names if self.depth else set()
        sides = [self.side()]
        if self.next not in RELATIONS and (self.next != ":" or kind(sides[0]) != "word"):
            return sides[0]
        label = LABEL.fullmatch(" ".join(self.tokens[start:self.i]))
        while op := self.accept(*RELATIONS, ":"):
            ops.append("=" if op == ":" or op == "~" and label and not ops else op)
            sides.append(self.side())
        if "~" in ops:  # what follows 1/3 \approx is no part of the answer
            ops, sides = ops[:ops.index("~")], sides[:ops.index("~") + 1]
        if not ops or ops == [r"\in"] and label:
            return ("in", label[0], sides[1]) if ops else sides[0]
        gaps = [self.add(a, self.neg(b)) if type(a) is type(b) is list else [None] for a, b in zip(sides, sides[1:])]
        if set(ops) != {"="}:
            return self.meet(*map(self.claim, ops, gaps))
        if not label and len(gaps) == 1 < len(gaps[0]):
            return ("is", "", sides[1], gaps[0])
        values = sides[1:] if label else sides
        if not all(self.same(value, values[-1]) for value in values):
            return [None]  # 41 = 43
        return ("is", label[0] if label else "value", values[-1], gaps[0])

    def claim(self, op, gap):
        """An inequality, gap op 0; as an interval if the gap is linear in the only variable."""
        if len(gap) == 1:
            raise Unreadable
        if op[0] == "<":
            op, gap = ">" + op[1:], self.neg(gap)
        if len(self.names) != 1 or None in gap:
            return (op, gap)
        x = self.variable(*self.names)
        slope = self.mul(self.add([gap[1]], [-gap[0]]), [1 / (x[1] - x[0])])
        zero = self.add([x[0]], self.neg(self.div([gap[0]], slope)))
        if zero == [None] or not self.equal(gap, self.mul(slope, self.add(x, self.neg(zero)))):
            return (op, gap)
        below, above = ("(]" if op == ">=" else "()", [-math.inf], zero), ("[)" if op == ">=" else "()", zero, INFINITY)
        return ("in", *self.names, (r"\cup", below, above) if op == "!=" else above if slope[0].real > 0 else below)

    def meet(self, a, *others):
        """Several claims at once; one interval where that can be said."""
        for b, c in ((a, *others), (*others, a)) if len(others) == 1 else ():
            if kind(b) == kind(c) == "in" and b[1] == c[1] and b[2][2] == INFINITY and c[2][1] == [-math.inf]:
                return ("in", b[1], (b[2][0][0] + c[2][0][1], b[2][1], c[2][2]))
        return ("all", a, *others) if others else a

    def side(self):
        """Sums joined by \\cup, ratios; each with a unit."""
        node = self.unit(self.sum())
        while op := self.accept(r"\cup", r"\cap", r"\setminus", *([":"] if kind(node) != "word" else [])):
            node = (op, *(node[1:] if kind(node) == op else [node]), self.unit(self.sum()))
        return node

    def unit(self, node):
        """A node with its trailing words: only a unit among them is kept."""
        match = UNIT.match(" ".join(self.tokens[self.i:])) if self.next[0] in '"\\%$€£¢' else None
        words = match[0].replace('"', "").split() if match else []
        if HEDGES.intersection(words) or len(words) > 9:
            raise Unreadable
        for _ in words:
            self.need(self.next)
        power = "^2" if {"square", "sq"} & set(words) else "^3" if "cubic" in words else ""
        name = "".join(UNITS.get(unit_name(w)) or re.sub(r"\w{2,}|[{}]", "", w) for w in words) + power
        return ("unit", node, name) if name else node

    def sum(self):
        """Products joined by + and -; of a \\pm the sign of this reading."""
        total = None
        while total is None or self.next in SIGNS:
            sign = 1
            while op := self.accept(*SIGNS):
                sign *= SIGNS[op] * (self.sign if op[0] == "\\" else 1)
            term = self.product() if sign > 0 else self.neg(self.product())
            total = term if total is None else self.add(total, term)
        return total

    def product(self):
        """Powers joined by *, / or nothing."""
        node = self.powers()
        while (op := self.accept("*", "/")) or self.starts_factor():
            sign = op and self.accept("-")
            factor = self.neg(self.powers()) if sign else self.powers()
            node = self.div(node, factor) if op == "/" else self.mul(node, factor)
        return node

    def starts_factor(self):
        """Whether the next token can follow a factor as another one, without a sign between."""
        return self.next[0] in "0123456789." or len(self.next) == 1 and self.next.isalpha() or self.next in STARTS

    def powers(self):
        """An atom with what follows it: factorial, powers, and degrees in an angle."""
        node = self.atom()
        if self.accept("!"):
            node = self.call("!", node)
        while op := self.accept("^", *([r"\circ"] if self.angle else [])):
            node = self.pow(node, self.exponent()) if op == "^" else self.mul(node, [self.mp.pi / 180])
        return node

    def exponent(self):
        """What stands behind ^."""
        return self.neg(self.atom()) if self.accept("-") else self.atom()

    def atom(self):
        """A number, name, bracket, root, fraction, function or matrix: what an operator applies to."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig
        token = self.need(self.next)
        if token[0] in "0123456789." and token != ".":
            if self.next[0] in "0123456789." and self.tokens[self.i - 2] not in ("^", "_"):
                raise Unreadable  # 2 3, but not 2^6 3^5
            base = self.raw() if self.accept("_") else "10"
            node = [self.checked(Fraction(token))] if base == "10" else ("base", token, base)
        elif token in ("(", "[", "{"):
            node = self.bracket(token)
        elif token in CONSTANTS:
            node = CONSTANTS[token]
        elif token in ("e", "i", r"\pi"):
            self.complex |= token == "i"
            node = [+{"e": self.mp.e, "i": self.mp.j, r"\pi": self.mp.pi}[token]]
        elif token[0] == '"':
            while self.next[0] == '"':
                token += " " + self.need(self.next)
            node = ("word", token)
        elif token in (r"\frac", r"\binom"):
            a, b = self.atom(), self.atom()
            node = self.div(a, b) if token == r"\frac" else self.call(token, a, b)
        elif token == r"\sqrt":
            index = self.bracket("[") if self.accept("[") else [Fraction(2)]
            node = self.pow(self.atom(), self.pow(index, MINUS_ONE))
        elif token in CALLS:
            node = self.named(token)
        elif token in MATRICES:
            node = self.matrix(token)
        elif token in ("$", "€", "£"):
            node = ("unit", self.atom(), UNITS[token])
        elif token in ACCENTS or token in LETTERS or len(token) == 1 and token.isalpha():
            name = token + (self.raw() if token in ACCENTS else "") + ("_" + self.raw() if self.accept("_") else "")
            while self.accept("'"):
                name += "'"
            name += self.raw() if name[0] in "fg" and self.next == "(" else ""  # f(2) is no product
            self.names.add(name)
            node = self.variable(name)
        else:
            raise Unreadable
        self.depth -= 1
        return node

    def bracket(self, opening):
        """The rest of a bracket: a tuple or interval if it holds several items, else what is in it."""
        node = ("set",) if self.next == "}" else self.items()
        brackets = opening + self.need(")", "]", "}")
        if kind(node) == "set" and brackets in ("()", "[]", "(]", "[)"):
            return (brackets, *node[1:])
        return node if brackets in ("()", "[]", "{}") else self.need("a matching bracket")

    def named(self, name):
        """\\sin^2 x, \\log_2 8, \\gcd(a, b); an argument without brackets ends before + - * / and the next function."""
        power, base = None, [[Fraction(10)]] if name == r"\log" else []
        while op := self.accept("^", *["_" for _ in base]):
            power, base = (power, [self.atom()]) if op == "_" else (self.exponent(), base)
        self.angle += 1
        bracketed = self.next in ("(", "[", "{")
        node = self.atom() if bracketed else self.powers()
        while not bracketed and self.starts_factor() and self.next not in CALLS:
            node = self.mul(node, self.powers())
        self.angle -= 1
        if power == MINUS_ONE and (inverse := "\\arc" + name[1:]) in CALLS:
            name, power = inverse, None
        node = self.call(name, *([node] if type(node) is list else node[1:]), *base)
        return self.pow(node, power) if power else node

    def matrix(self, begin):
        """The rows up to the \\end of this \\begin."""
        if begin == r"\begin{array}":
            self.raw()
        rows, end = [["row"]], begin.replace("begin", "end")
        while not self.accept(end):
            rows[-1].append(self.relation())
            if self.next != end and self.need("and", r"\\") == r"\\":
                rows.append(["row"])
        return ("matrix", *(tuple(row) for row in rows if len(row) > 1))


# --- Judging


def plain(text):
    """The value of a plain integer, decimal or fraction, else None: this spares most pairs all of the above."""
    text = re.sub(r"^(-?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    return Fraction(text) if re.fullmatch(r"-?[0-9]{1,99}(?:\.[0-9]{1,99}|/[1-9][0-9]{0,99})?", text) else None


def grade(completion: str, answer: str) -> tuple[float, str | None]:
    """(1.0 or 0.0, cause): whether the final answer of a completion equals the given answer.

    `answer` is a bare answer, a GSM8K solution with its `#### x`, or a MATH solution with its box. `cause` is None
    when both could be compared, otherwise "no_answer", "unparsed" or "too_big" (work is bounded before it is done,
    so there is no timeout). Never executes anything, never raises, changes nothing, keeps nothing.
    """
    given = extract_answer(completion)
    gold = extract_answer(answer) if re.search(r"\\(?:boxed|fbox)|####", answer) else answer
    if given is None or gold is None:
        return 0.0, "no_answer"
    numbers, tokens = (plain(given), plain(gold)), []
    if None not in numbers:
        return float(numbers[0] == numbers[1]), None
    try:
        tokens = [tokenize(given), tokenize(gold)]
        reader = Reader()
        return float(reader.same(*map(reader.read, tokens))), None
    except (Unreadable, TooBig, RecursionError) as error:
        if tokens and tokens[0] == tokens[1] != []:
            return 1.0, None
        return 0.0, "unparsed" if isinstance(error, Unreadable) else "too_big"


def verify(completion: str, answer: str) -> float:
    """1.0 if the final answer of a completion equals the given answer, else 0.0; see `grade`."""
    return grade(completion, answer)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling. Each prompt is read once and its cache copied to the G rows of its group; rows that have ended are dropped,
# and rows for which there is no room wait. The sampler alone knows what was drawn and how likely it was, so the mask
# and the behavior policy's log-probabilities come from here and are never guessed from token ids later.
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
    cache_tokens: int | None = None     # the room that was left for the cache: less than given if memory ran out
    advantages: Tensor | None = None    # (Q, G) filled in once the completions are graded


def eos_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: Qwen3 has two, and models that miss one ramble on after their answer."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    ids = sorted({i for i in [*configured, tokenizer.eos_token_id] if i is not None})
    if not ids:
        raise UserError("neither the model's generation_config nor its tokenizer names a token that ends a completion")
    return ids


def draw(logits, temperature=1.0, top_p=1.0, generator=None) -> tuple[Tensor, Tensor]:
    """Draw one token a row from (n, V) logits; temperature 0 takes the likeliest.

    Returns tokens (n,) and their log-probabilities (n,) under softmax(logits / temperature), before top-p restricts
    what may be drawn: that is the distribution the training step can compute again. (At temperature 0: at 1.)
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
        # one uniform number a row, not one a token as torch.multinomial; fp32 sums would lose the tail of a large V
        sums = probs.cumsum(-1, dtype=torch.float64)                        # (n, V)
        u = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device, generator=generator)  # (n, 1)
        tokens = torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(max=sums.shape[1] - 1).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def shared_heads_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' SDPA; but at one new token a row, the queries that share a key-value head become rows of one query.

    Under a mask transformers would copy every key-value head to each of its queries, at every token: with long prompts
    that is most of the time of sampling. query (n, heads, S, D), key and value (n, key-value heads, S', D).
    """
    n, heads, S, D = query.shape
    if S > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    query = query.reshape(n, key.shape[1], -1, D)                           # (n, key-value heads, queries of each, D)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(n, 1, heads, D), None


AttentionInterface.register("shared_heads", shared_heads_attention)
AttentionMaskInterface.register("shared_heads", sdpa_mask)


class RoomyLayer(DynamicLayer):
    """A layer of the key-value cache that writes into room made beforehand; transformers' copies itself every token."""

    def __init__(self, pieces, rows, room):
        """Move the given rows of `pieces` (counted through, repeats allowed) here, with `room` free columns behind."""
        super().__init__()
        self.is_initialized = True
        self.all_keys, self.all_values = (self.take(pieces, name, rows, room) for name in ("keys", "values"))
        self.show(self.all_keys.shape[2] - room)

    def take(self, pieces, name, rows, room):
        held = [vars(piece).pop(name) for piece in pieces]
        for piece in pieces:
            vars(piece).pop("all_" + name, None)                            # so that the old memory goes layer by layer
        held = torch.cat(held) if len(held) > 1 else held[0]
        return F.pad(held[rows], (0, 0, 0, room))                           # (n, heads, P + room, D)

    def show(self, P):
        self.keys, self.values = self.all_keys[:, :, :P], self.all_values[:, :, :P]                 # (n, heads, P, D)

    def update(self, keys, values, *_, **__):
        """Write the next token's keys and values (n, heads, 1, D) behind those held; returns them all."""
        P = self.keys.shape[2]
        self.all_keys[:, :, P:P + 1], self.all_values[:, :, P:P + 1] = keys, values
        self.show(P + 1)
        return self.keys, self.values


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size=1, max_new_tokens=256, temperature=1.0, top_p=1.0, generator=None,
           cache_tokens=None, chunk=None, prefill_tokens=16384) -> Batch:
    """Sample `group_size` completions of each of Q prompts (lists of token ids); temperature 0 is greedy.

    Works in waves of as many rows as the cache has room for. Every `chunk` tokens the rows that have ended are dropped,
    and where the rest would outgrow `cache_tokens` (None: no bound), some wait for a later wave, which reads in what
    they have so far. Running out of memory is no more than that: the wave ends, and the room is halved. Raises
    FloatingPointError where the model's probabilities are not finite.
    """
    model.eval()
    device, eos, T, room = model.device, set(eos_ids(model, tokenizer)), max_new_tokens, cache_tokens or math.inf
    # Within a chunk nothing is read back, so that the GPU never waits; a row that ends early is carried to its end.
    chunk = chunk or max(1, min(T // 8, 128))
    prompts = [prompt for prompt in prompts for _ in range(group_size)]     # N
    completions, logprobs = [[] for _ in prompts], [[] for _ in prompts]    # N lists that grow

    def ended(i):
        return len(completions[i]) == T or completions[i][-1:] != [] and completions[i][-1] in eos

    def length(i):
        return len(prompts[i]) + len(completions[i])

    def decode(wave):
        """Carry on the rows in `wave`, until each has ended or has to wait."""
        prefixes = [(*prompts[i], *completions[i]) for i in wave]
        place = {prefix: k for k, prefix in enumerate(dict.fromkeys(prefixes))}     # equal ones are read once
        width = max(map(len, place))
        ids = torch.tensor([[0] * (width - len(p)) + [*p] for p in place], device=device)           # (q, P) pads first
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in place], device=device)  # (q, P)
        caches, logits = [], []
        for part, mask in zip(*(x.split(max(1, prefill_tokens // width)) for x in (ids, seen))):
            caches.append(DynamicCache())
            logits.append(model(part, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                                past_key_values=caches[-1], use_cache=True, logits_to_keep=1).logits[:, -1])
        rows, token = torch.tensor([place[p] for p in prefixes], device=device), None               # (n,) of the q
        logits = torch.cat(logits)[rows]                                    # (n, V)
        while wave:
            caches = [Cache([RoomyLayer(pieces, rows, chunk) for pieces in zip(*(cache.layers for cache in caches))])]
            seen, drawn = seen[rows], []                                    # (n, P) rows are now those of the wave
            for _ in range(min(chunk, T - min(len(completions[i]) for i in wave))):
                if token is not None:
                    seen = F.pad(seen, (0, 1), value=1)                     # (n, P + 1)
                    logits = model(token[:, None], attention_mask=seen, position_ids=seen.sum(-1, keepdim=True) - 1,
                                   past_key_values=caches[0], use_cache=True).logits[:, -1]         # (n, V)
                token, logprob = draw(logits, temperature, top_p, generator)    # (n,), (n,)
                drawn.append((token, logprob))
            new_tokens, new_logprobs = (torch.stack(x, 1) for x in zip(*drawn))     # (n, up to chunk)
            if not new_logprobs.isfinite().all():
                raise FloatingPointError("the model's probabilities are not finite")
            for i, row, logs in zip(wave, new_tokens.tolist(), new_logprobs.tolist()):
                n = next((k for k, drawn_token in enumerate(row, 1) if drawn_token in eos), chunk)
                n = min(n, T - len(completions[i]))
                completions[i] += row[:n]
                logprobs[i] += logs[:n]
            keep = [k for k, i in enumerate(wave) if not ended(i)]
            width = seen.shape[1] + 1 + chunk                               # after one more chunk
            keep = [k for n, k in enumerate(keep, 1) if n == 1 or n * width <= room]    # the others wait
            wave, rows = [wave[k] for k in keep], torch.tensor(keep, dtype=torch.long, device=device)
            token = token[rows]                                             # (n,)

    waiting = list(range(len(prompts)))
    while waiting:
        waiting.sort(key=length)                                            # alike in length: little padding
        n = max(1, sum(k * (length(i) + chunk) <= room for k, i in enumerate(waiting, 1)))  # that fit, for one chunk
        wave, waiting = waiting[:n], waiting[n:]
        try:
            decode(wave)
        except torch.OutOfMemoryError:
            if n == 1:
                raise
            room = min(room, sum(length(i) + chunk for i in wave)) // 2
        waiting += [i for i in wave if not ended(i)]

    T = max(map(len, completions))                                          # the longest, no longer the limit
    tokens, behavior_logprobs = (torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
                                 for rows in (completions, logprobs))       # (N, T), (N, T)
    lengths = torch.tensor([len(row) for row in completions], device=device)                        # (N,)
    mask = (torch.arange(T, device=device) < lengths[:, None]).float()      # (N, T)
    truncated = torch.tensor([row[-1] not in eos for row in completions], device=device)            # (N,)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in completions]
    return Batch(prompts, tokens, mask, behavior_logprobs, truncated, texts, None if room == math.inf else room)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities. The training pass: prompt and completion side by side with all padding behind, where causal
# attention never looks, so that no mask is needed; logits only where a completion token is predicted, a few at a time.
# ---------------------------------------------------------------------------------------------------------------------


def token_logprobs(model, prompts, tokens, mask, temperature=1.0, chunk=256) -> Tensor:
    """log-probability of each completion token: (n, T), 0 where `mask` is 0, at the temperature of sampling.

    prompts: n lists of token ids; tokens and mask: (n, T), each row of the mask ones and then zeros. The logits are the
    largest tensor of RL on language models (151,936 columns for Qwen3): they are made `chunk` tokens at a time, and
    again in the backward pass instead of being kept.
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

    A group of equal rewards has advantage exactly 0. Raises ValueError for G < 2 and for a reward that is not finite.
    Source: DeepSeekMath (2402.03300); without the std, Dr. GRPO (2503.20783).
    """
    rewards = rewards.float()                                               # (Q, G)
    if rewards.dim() != 2 or rewards.shape[1] < 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite and (Q, G) with G >= 2, got {tuple(rewards.shape)}")
    centered = rewards - rewards.mean(1, keepdim=True)                      # (Q, G)
    if normalize_std:
        centered = centered / (rewards.std(1, keepdim=True) + 1e-6)         # (Q, G) ddof 1
    mixed = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)   # (Q, 1)
    return torch.where(mixed, centered, 0.0)


def gradient_distortion(p: float, G: int, conditional: bool = False) -> float:
    """eta(p) with E[g_GRPO] = eta(p) * grad p: how far GRPO stretches the gradient of a prompt with success rate p.

    For 0/1 rewards and the population std; for tests and figures, not used in training. `conditional` averages over
    groups with both rewards only (the paper's Theorem 3.1): only there does eta explode as p -> 0 or 1; over all groups
    it tends to sqrt(G - 1). Raises ValueError for p outside (0, 1) and G < 2.
    """
    if not 0 < p < 1 or G < 2:
        raise ValueError(f"needs 0 < p < 1 and G >= 2, got p = {p}, G = {G}")
    pmf = [math.comb(G, k) * p**k * (1 - p)**(G - k) for k in range(G + 1)]
    eta = sum(w * math.sqrt(k * (G - k)) for k, w in enumerate(pmf)) / (G * p * (1 - p))
    return eta / sum(pmf[1:-1]) if conditional else eta


# ---------------------------------------------------------------------------------------------------------------------
# The improvement tracker. PIPO's new piece: is this batch better than the last K, in units of their own spread? To add
# it to another trainer take this section, keep the previous batch, and do as the loop in `train` does: feedback(mu), a
# step on the previous batch with improvement_rewards, its ratio against the policy that sampled it, the trainer's own
# step, push(mu).
# ---------------------------------------------------------------------------------------------------------------------


class Feedback(NamedTuple):
    """What the tracker has to say of one batch."""
    xi: float           # improvement in standard deviations of the window
    phi: float          # the coefficient it becomes
    mu_his: float       # mean of the window
    sigma_his: float    # its sample standard deviation


class ImprovementTracker:
    """The sliding window of mean rewards, and xi and phi read against it (PIPO, Section 5; K = 8, lambda = 0.1).

    Read `feedback(mu)` first, then `push(mu)` once: a reward in its own window would bound xi.
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
        return {"history": list(self.history)}

    def load_state_dict(self, state: dict) -> None:
        self.history = deque(state["history"], maxlen=self.window)


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
    """What sets one base objective apart from the others."""
    normalize_std: bool     # divide the advantage by the group's std
    sequence_ratio: bool    # one ratio a sequence instead of one a token
    clip_low: float
    clip_high: float
    average: str            # "sequence": tokens, then sequences; "token": all alike; "fixed": by N * max_new_tokens


BASES = {
    "grpo": Base(True, False, 0.2, 0.2, "sequence"),        # DeepSeekMath, 2402.03300
    "dr_grpo": Base(False, False, 0.2, 0.2, "fixed"),       # 2503.20783
    "dapo": Base(True, False, 0.2, 0.28, "token"),          # 2503.14476, without its dynamic sampling
    "gspo": Base(True, True, 3e-4, 4e-4, "sequence"),       # 2507.18071
}


def policy_loss(logprobs, behavior_logprobs, advantages, mask, base="grpo", clip_low=None, clip_high=None,
                ref_logprobs=None, kl_coef=0.0, n_sequences=None, n_tokens=None, max_new_tokens=None):
    """The clipped surrogate of `base`: log-probabilities (N, T), advantages (N,), mask (N, T) -> (loss, metrics).

    -min(ratio * A, clip(ratio) * A) with the coefficient inside the min, so that it clips on both signs; plus
    kl_coef times the k3 estimate of KL(policy || reference), averaged the same way. `n_sequences`, `n_tokens` (default:
    those given) are the whole batch's where this is a part of it: the parts' losses then add up to the batch's.
    `max_new_tokens` is the constant of dr_grpo's denominator (default T, right only if padded to the limit). Metrics
    are means over this mask's tokens: the share clipped, the ratio, and `logprob_gap`, the mean |log-ratio|, which
    before any update is the disagreement of sampler and trainer. Raises ValueError for advantages of another shape, and
    for a KL without `ref_logprobs`.
    """
    if advantages.shape != mask.shape[:1] or (kl_coef and ref_logprobs is None):
        raise ValueError(f"needs advantages (N,) with a mask (N, T), and ref_logprobs with a kl_coef; "
                         f"got {tuple(advantages.shape)} and {tuple(mask.shape)}")
    spec, (N, T) = BASES[base], mask.shape
    low = spec.clip_low if clip_low is None else clip_low
    high = spec.clip_high if clip_high is None else clip_high
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


@torch.no_grad()
def reference_logprobs(model, reference, *args) -> Tensor:
    """token_logprobs under the reference policy: a frozen model, or with LoRA the model itself, its adapters off."""
    if reference is model:
        model.disable_adapters()
    logprobs = token_logprobs(reference, *args)                             # (n, T)
    if reference is model:
        model.enable_adapters()
    return logprobs


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

    Both steps of an iteration are this function. A minibatch without any signal (or KL) takes no step at all: AdamW
    would move the weights on momentum and decay alone. Rows with coefficient 0 are not computed (their gradient is 0
    unless there is a KL) but still count in the denominators. Of several gradient norms the largest is returned; means
    over no token are None. Raises FloatingPointError on a loss or gradient that is not finite. Of cfg it reads
    minibatches, microbatch_tokens, temperature, base, clip_low, clip_high, kl_coef, max_new_tokens, max_grad_norm.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    coefficients = advantages.flatten().to(model.device)                    # (N,)
    sums, trained, norms = Counter(loss=0.0, clip_fraction=0.0, ratio=0.0, logprob_gap=0.0), 0, []
    for rows in torch.arange(len(coefficients), device=model.device).chunk(cfg.minibatches):    # groups stay whole
        n_sequences, n_tokens = len(rows), batch.mask[rows].sum()
        if reference is None:
            rows = rows[coefficients[rows] != 0]
        if len(rows) == 0:
            continue
        lengths = torch.tensor([len(batch.prompts[i]) for i in rows.tolist()]) + batch.mask[rows].sum(1).long().cpu()
        for part in microbatches(lengths, cfg.microbatch_tokens):
            picked = rows[part.to(rows.device)]                             # (n,)
            width = int(batch.mask[picked].sum(1).max())
            tokens, mask, behavior = (x[picked, :width] for x in (batch.tokens, batch.mask, batch.behavior_logprobs))
            prompts = [batch.prompts[i] for i in picked.tolist()]
            ref_logprobs = None
            if reference is not None:
                ref_logprobs = reference_logprobs(model, reference, prompts, tokens, mask, cfg.temperature)     # (n, T)
            logprobs = token_logprobs(model, prompts, tokens, mask, cfg.temperature)                # (n, T)
            loss, means = policy_loss(
                logprobs, behavior, coefficients[picked], mask, cfg.base, cfg.clip_low, cfg.clip_high, ref_logprobs,
                cfg.kl_coef if reference is not None else 0.0, n_sequences, n_tokens, cfg.max_new_tokens)
            loss.backward()
            count = int(mask.sum())
            sums.update({name: value * count for name, value in means.items()})    # a Counter adds
            sums["loss"] += loss.item()
            trained += count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
        if not math.isfinite(norm) or not math.isfinite(sums["loss"]):
            optimizer.zero_grad(set_to_none=True)                           # for a caller who goes on
            raise FloatingPointError(f"loss {sums['loss']}, gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norms.append(norm)
    return {"loss": sums.pop("loss") / max(1, len(norms)), "grad_norm": max(norms, default=0.0),
            "skipped_steps": cfg.minibatches - len(norms),
            **{name: value / trained if trained else None for name, value in sums.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# Data and models. All that touches the hub, a dataset or a chat template, so that the rest sees token ids and tensors.
# ---------------------------------------------------------------------------------------------------------------------

LAYOUTS = (("prompt", "reward_model"), ("problem", "answer"), ("problem", "solution"), ("question", "answer"),
           ("prompt", "answer"), ("prompt", "solution"), ("prompt", "ground_truth"))     # problem + gold, first match
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


class Problem(NamedTuple):
    """One question with its answer, ready to be asked."""
    text: str               # the question, for people
    prompt: list[int]       # token ids
    answer: str


def load_or_explain(name: str, what: str, load):
    """load(), with the failure to find `name`, a path here or a name on the hub, told in one sentence."""
    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name):
        raise UserError(f"the {what} {name} does not exist")
    try:
        return load()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"the {what} {name} can be read neither here nor from the hub: {first_line(error)}")


def load_rows(name: str, split: str) -> datasets.Dataset:
    """The rows of a local file, a folder or a hub dataset: `split` if it has one by that name, else its first split."""
    path = Path(name)
    if path.is_file():
        if path.suffix not in READERS or path.stat().st_size == 0:
            raise UserError(f"the dataset {name} is empty or not a {', '.join(READERS)} file")
        source = {"path": READERS[path.suffix], "data_files": name}
    elif path.exists():
        source = {"path": name}
    else:
        hub_name, _, config = name.partition(":")
        source = {"path": hub_name, "name": config or None}
    splits = load_or_explain(name, "dataset", lambda: datasets.load_dataset(**source))
    if split not in splits:
        split = next(iter(splits))
        if not path.is_file():                                              # a file has no other
            tqdm.write(f"the dataset {name} is read from its split {split!r}")
    return splits[split]


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
        text = prompt[-1]["content"] if isinstance(prompt, list) else str(prompt)
        if not isinstance(prompt, list):
            prompt = [{"role": "user", "content": text + ("" if "\\boxed" in text else cfg.instruction)}]
        ids = encode(tokenizer, prompt, cfg.thinking)
        if len(ids) > cfg.max_prompt_tokens:
            left_out[f"with a prompt over {cfg.max_prompt_tokens} tokens"] += 1
            continue
        problems.append(Problem(text, ids, answer))
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not problems:
        raise UserError(f"no usable problem in {name}: {reasons or 'it has no rows'}")
    if reasons:
        tqdm.write(f"left out of {name}: {reasons}")
    return problems


def load_config(path: str):
    """The configuration of the model at `path`, without dropout: the ratio would not be 1 before the first update."""
    config = load_or_explain(path, "model", lambda: AutoConfig.from_pretrained(path))
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UserError(f"{path} has layers of the kind {', '.join(sorted(kinds))}: only attention can be sampled from")
    return config


def load_model(path: str, device, dtype: str = "float32", lora: int = 0, trainable: bool = True):
    """The causal language model at `path`; with `lora`, frozen but for adapters of that rank, which are float32.

    Raises UserError where that is no such model.
    """
    model = load_or_explain(path, "model", lambda: AutoModelForCausalLM.from_pretrained(
        path, config=load_config(path), dtype=getattr(torch, dtype)))
    model = model.to(device).requires_grad_(trainable and not lora).eval()
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("shared_heads")
    if model.device.type == "cuda" and trainable:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(4, device=model.device)[None]                        # (1, 4)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if not torch.allclose(model.get_output_embeddings()(hidden), model(ids).logits, atol=1e-3, equal_nan=True):
            raise UserError(f"{path} changes its logits behind the output layer (a soft cap or a scale): not supported")
    if lora:
        from peft import LoraConfig
        model.add_adapter(LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear"))
        for weight in trained_weights(model).values():
            weight.data = weight.data.float()
    return model


def trained_weights(model) -> dict[str, Tensor]:
    """What is trained, by name: all weights, or the adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------------------------
# Memory. What it takes to train 4B parameters on one GPU: bf16 weights there, what AdamW needs in host memory, and the
# rest of the card for the key-value cache. All worked out from the model's shapes before anything is loaded.
# ---------------------------------------------------------------------------------------------------------------------


class MasterAdamW:
    """AdamW on fp32 copies of the weights ("masters") on a device of their own; a tensor at a time goes there and back.

    Without them bf16 weights would lose most updates: their spacing is up to 2^-7 of their size. Gradients are summed
    in fp32 as well, or the last of many micro-batches would be rounded away.
    """

    def __init__(self, weights, device, **options):
        self.weights, device = list(weights), torch.device(device)
        for weight in self.weights:
            weight.grad_dtype = torch.float32
        self.masters = [weight.detach().to(device, torch.float32, copy=True) for weight in self.weights]
        self.adam = torch.optim.AdamW(self.masters, fused=True, **options)
        self.buffer = torch.empty(max(weight.numel() for weight in self.weights), device=device,
                                  pin_memory=device.type == "cpu" and self.weights[0].is_cuda)      # pinned: faster

    @property
    def param_groups(self):
        return self.adam.param_groups

    @torch.no_grad()
    def step(self):
        """One AdamW step of every weight that has a gradient."""
        for weight, master in zip(self.weights, self.masters):
            if weight.grad is not None:
                on_the_way = self.buffer[:weight.numel()].view_as(weight)
                master.grad = on_the_way.copy_(weight.grad)
                self.adam.step()                                            # of this one: no other has a gradient
                master.grad = None
                weight.copy_(on_the_way.copy_(master))

    def zero_grad(self, set_to_none=True):
        for weight in self.weights:
            weight.grad = None

    def state_dict(self):
        return {"masters": self.masters, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state):
        self.adam.load_state_dict(state["adam"])
        for weight, master, saved in zip(self.weights, self.masters, state["masters"]):
            weight.copy_(master.copy_(saved))


def make_optimizer(model, cfg: Config):
    """The one place where the optimizer is chosen: plain AdamW for fp32 weights that stay where they are."""
    weights, options = list(trained_weights(model).values()), dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    where = torch.device("cpu") if cfg.optimizer_device == "cpu" else model.device
    if where == model.device and all(weight.dtype == torch.float32 for weight in weights):
        return torch.optim.AdamW(weights, fused=True, **options)
    return MasterAdamW(weights, where, **options)


def free_memory(device) -> float:
    """Bytes that can be had on a device now; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


def plan_memory(shapes, cfg: Config, device, out: Path) -> tuple[Config, str]:
    """cfg with what it leaves open filled in for this model and device, and a table of the memory that the run takes.

    `shapes` is the model on the meta device, `out` the folder of the run. These are estimates, and a sixteenth of the
    free memory is left alone. Raises UserError for what cannot fit.
    """
    c, here, gpu = shapes.config.get_text_config(), device.type, device.type == "cuda"
    free = {"cpu": free_memory(torch.device("cpu")) * 15 / 16, here: free_memory(device) * 15 / 16,
            "disk": shutil.disk_usage(out).free + sum(file.stat().st_size for file in out.rglob("*") if file.is_file())}
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if gpu else "float32"
    size, weights = getattr(torch, dtype).itemsize, sum(p.numel() for p in shapes.parameters())
    trained, trained_size = weights, size
    if cfg.lora:
        linear = [m for name, m in shapes.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
        trained, trained_size = cfg.lora * sum(m.in_features + m.out_features for m in linear), 4
    crowded = free[here] / 10 < trained * 12 < free["cpu"]
    there = cfg.optimizer_device if cfg.optimizer_device != "auto" else "cpu" if crowded else here
    adam = trained * (8 if trained_size == 4 and there == here else 12)     # two moments, and the weights in fp32

    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    cached = 2 * c.num_hidden_layers * kv_heads * head_dim * size           # bytes of a token's keys and values
    # Of one token, for backward: gate, up and their product; and norms, queries, keys, values, outputs, residuals.
    layer = (3 * (getattr(c, "intermediate_size", None) or 4 * c.hidden_size) + 22 * c.hidden_size) * size
    kept = layer + c.num_hidden_layers * c.hidden_size * size if gpu else c.num_hidden_layers * layer
    N, longest = cfg.prompts_per_step * cfg.group_size, cfg.max_prompt_tokens + cfg.max_new_tokens
    rows = [("always", here, f"weights: {weights / 1e6:,.1f}M in {dtype}", weights * size),
            ("always", here, "reference policy", weights * size if cfg.kl_coef and not cfg.lora else 0),
            ("always", there, f"AdamW: {trained / 1e6:,.1f}M trained", adam),
            ("training", here, "gradients in float32", trained * 4),
            ("training", here, f"a micro-batch: {cfg.microbatch_tokens:,} tokens",      # 256 logits: 4 fp32 copies
             cfg.microbatch_tokens * kept + 256 * c.vocab_size * 16),
            ("sampling", here, "probabilities of the next token", N * c.vocab_size * 24)]   # 4 fp32 copies, 1 fp64

    def needed(kind, phase):
        return sum(n for when, on, _, n in rows if on == kind and when in ("always", phase))

    room = max(0, free[here] - needed(here, "sampling")) / cached
    cache_tokens = cfg.cache_tokens or int(min(room, N * longest))
    rows += [("sampling", here, f"cache: {cache_tokens:,} tokens, {cache_tokens // longest:,} rows of full length",
              cache_tokens * cached),
             ("saving", "disk", "the model at the end", weights * size)]
    if cfg.save_every:
        rows.append(("saving", "disk", "checkpoints, the old and the new", 2 * (trained * trained_size + adam)))
    for kind in dict.fromkeys((here, there, "disk")):
        most = max(needed(kind, phase) for phase in ("training", "sampling", "saving"))
        if most > free[kind]:
            raise UserError(f"this run would take about {most / 2**30:.1f} GiB on {kind}, where "
                            f"{free[kind] / 2**30:.1f} are free: --lora 16 takes far less; see also "
                            "--optimizer-device, --microbatch-tokens, --cache-tokens and, for the disk, --save-every 0")
    if cache_tokens < longest:
        raise UserError(f"the cache has room for {cache_tokens:,} tokens, but a prompt and its completion may take "
                        f"{longest:,}: give a larger --cache-tokens or a smaller --max-new-tokens")
    table = [f"  {when:9} {what:52} {n / 2**30:8.2f} GiB on {on}" for when, on, what, n in rows if n]
    return replace(cfg, dtype=dtype, cache_tokens=cache_tokens, optimizer_device=there), "\n".join(table)


# ---------------------------------------------------------------------------------------------------------------------
# Grading and evaluation. Where completions, problems and the verifier meet.
# ---------------------------------------------------------------------------------------------------------------------


def grade_all(batch: Batch, problems: list[Problem]) -> tuple[Tensor, Counter]:
    """Rewards (Q, G), and how often a completion could not be judged, by cause."""
    G = len(batch.texts) // len(problems)
    grades = [grade(text, problems[i // G].answer) for i, text in enumerate(batch.texts)]
    rewards = torch.tensor([reward for reward, _ in grades], device=batch.tokens.device).view(-1, G)        # (Q, G)
    return rewards, Counter(cause for _, cause in grades if cause)


def evaluate(model, tokenizer, problems: list[Problem], cfg: Config, generator=None) -> dict:
    """pass@1 with its standard error: one completion a problem, sampled as in training."""
    batch = sample(model, tokenizer, [p.prompt for p in problems], 1, cfg.max_new_tokens, cfg.temperature, cfg.top_p,
                   generator, cfg.cache_tokens)
    rewards, _ = grade_all(batch, problems)
    p = rewards.mean().item()
    return {"eval_pass@1": p, "eval_stderr": math.sqrt(p * (1 - p) / len(problems)),
            "eval_truncated": batch.truncated.float().mean().item()}


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
        vocab_size=len(vocabulary), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
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
        raise UserError(f"the warm start solves {right:.0%} after {step} steps, not --warm-start {cfg.warm_start:.0%}")
    bar.close()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Files. A run is a folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/, and at the end model/.
# ---------------------------------------------------------------------------------------------------------------------

RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "model", "bad_batch.pt")
# What may change when a run goes on. (Another cache size draws other samples, another micro-batch rounds otherwise.)
MAY_DIFFER = {"steps", "device", "out", "resume", "overwrite", "save_every", "show_every", "cache_tokens",
              "microbatch_tokens"}


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
        state = torch.load(saved, map_location="cpu", weights_only=True, mmap=True)    # not twice in memory
        before, now = state["config"], asdict(cfg)
        changed = [f"--{name.replace('_', '-')} was {before.get(name)!r}, is {now[name]!r}" for name in now
                   if name not in MAY_DIFFER and before.get(name) != now[name]]
        if state["device"] != pick_device(cfg).type:
            changed.append(f"the device was {state['device']}, is {pick_device(cfg).type}")
        if changed:
            raise UserError("--resume goes on with the same settings, but " + "; ".join(changed))
        if state["step"] > cfg.steps:
            raise UserError(f"{out} already stands at step {state['step']}, beyond --steps {cfg.steps}")
        return out, state
    if any((out / file).exists() for file in RUN_FILES) and not cfg.overwrite:
        ways = "--resume goes on with it, --overwrite deletes it" if saved.exists() else "--overwrite deletes it"
        raise UserError(f"{out} already holds a run: {ways}")
    return out, None


def clear_run(out: Path) -> None:
    """Delete the files of an earlier run, and only those."""
    for path in (out / file for file in RUN_FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
    """Put rows behind those of a file, one JSON object a line."""
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@contextmanager
def interrupt_flag():
    """Yields an event that Ctrl-C sets: the step in hand can then end and be saved. A second Ctrl-C stops at once."""
    flag, main = threading.Event(), threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)

    def handler(*_):
        flag.set()
        signal.signal(signal.SIGINT, before)
        tqdm.write("finishing this step, then saving; Ctrl-C again stops at once, with the last checkpoint intact")

    if main:                                                                # only there can signals be caught
        signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


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
    """The start model's path, its tokenizer, the training and the held-out problems, and cfg with its blanks filled in.

    Cheap checks come before expensive ones.
    """
    if cfg.model:
        path = cfg.model
        with torch.device("meta"):                                          # shapes only
            shapes = load_or_explain(path, "model", lambda: AutoModelForCausalLM.from_config(load_config(path)))
        cfg, table = plan_memory(shapes, cfg, device, out)
        tqdm.write(f"memory, as far as it can be told beforehand:\n{table}")
        if shapes.num_parameters() > 1e9 and device.type == "cpu":
            tqdm.write("warning: over a billion parameters on a CPU: an iteration takes hours; use a GPU for this")
        train_rows = load_rows(cfg.dataset, "train")
        eval_rows = load_rows(cfg.eval_dataset, "test") if cfg.eval_every else None
    else:
        path, cfg = str(out / "start"), replace(cfg, dtype=cfg.dtype.replace("auto", "float32"))
        eval_rows, warm, train_rows = demo_rows(cfg.seed)
        if not resumed:
            tqdm.write("demo: building a tiny Qwen3 and teaching it worked additions until it is sometimes right")
            build_demo(Path(path), cfg, warm, device)
        train_rows, eval_rows = datasets.Dataset.from_list(train_rows), datasets.Dataset.from_list(eval_rows)
    tokenizer = load_or_explain(path, "tokenizer of", lambda: AutoTokenizer.from_pretrained(path))
    problems = read_problems(train_rows, tokenizer, cfg, cfg.dataset or "the demo")
    held_out = read_problems(eval_rows, tokenizer, cfg, cfg.eval_dataset or "the demo") if cfg.eval_every else []
    return path, tokenizer, problems, held_out[:cfg.eval_limit or None], cfg


def train(cfg: Config) -> list[dict]:
    """Run PIPO as `cfg` says; returns the rows of metrics.jsonl.

    Raises UserError for what the user can put right, FloatingPointError where numbers stop being finite, and
    KeyboardInterrupt, its message saying how to go on, after a Ctrl-C.
    """
    validate(cfg)
    out, state = open_run(cfg)
    device = pick_device(cfg)
    settings = asdict(cfg)                                                  # as they were given, blanks and all
    if state:                                                               # not to be decided anew
        cfg = replace(cfg, dtype=state["dtype"], optimizer_device=state["optimizer_device"])
    path, tokenizer, problems, held_out, cfg = prepare(cfg, out, device, resumed=state is not None)
    torch.manual_seed(cfg.seed)                                             # LoRA's adapters start at random
    model, reference = load_model(path, device, cfg.dtype, cfg.lora), None
    if cfg.kl_coef:
        reference = model if cfg.lora else load_model(path, device, cfg.dtype, trainable=False)
    optimizer = make_optimizer(model, cfg)
    tracker, previous, past_xi, done = ImprovementTracker(cfg.window, cfg.lam, cfg.xi_clip), None, [], 0
    if state:
        assert not model.load_state_dict(state["model"], strict=False).unexpected_keys      # it holds what is trained
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))        # from the mapped file into memory
        tracker.load_state_dict(state["tracker"])
        past_xi, done = state["past_xi"], state["step"]
        previous = Batch(**{name: x.to(device, copy=True) if isinstance(x, Tensor) else x
                            for name, x in state["previous"].items()})
        state = None                                                        # lets go of the file
    else:
        clear_run(out)                                                      # now that all that is needed was found
    with swapped_in(out / "config.json") as file:
        file.write(json.dumps(asdict(cfg), indent=2).encode())
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
        scores = evaluate(model, tokenizer, held_out, cfg, rng(device, cfg.seed, "evaluation"))     # each time the same
        tqdm.write(f"step {step}: held-out pass@1 {scores['eval_pass@1']:.1%} +- {scores['eval_stderr']:.1%}")
        return scores

    if done == 0 and held_out:
        append_jsonl(out / "metrics.jsonl", {"step": 0, **evaluation(0)})
    seconds, clock = {}, 0.0

    def lap(name):
        """Book the seconds since the last lap to `name`."""
        nonlocal clock
        seconds[f"seconds_{name}"], clock = time.perf_counter() - clock, time.perf_counter()

    bar = tqdm(initial=done, total=cfg.steps, desc="pipo", unit="step")
    with interrupt_flag() as interrupted:
        for step in range(done + 1, cfg.steps + 1):
            seconds, clock = {}, time.perf_counter()
            chosen, batch = pick_problems(problems, step, cfg), None
            try:
                # --- sample B_t ~ pi_theta, grade it -----------------------------------------------------------------
                batch = sample(model, tokenizer, [p.prompt for p in chosen], cfg.group_size, cfg.max_new_tokens,
                               cfg.temperature, cfg.top_p, rng(device, cfg.seed, "sample", step), cfg.cache_tokens)
                cfg = replace(cfg, cache_tokens=batch.cache_tokens)
                lap("sample")
                rewards, failures = grade_all(batch, chosen)                # (Q, G)
                flipped = torch.rand(rewards.shape, generator=rng("cpu", cfg.seed, "noise", step)) < cfg.reward_noise
                rewards = torch.where(flipped.to(device), 1 - rewards, rewards)                     # (Q, G)
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
                for _ in range(cfg.epochs):
                    exploration = update(model, optimizer, batch, batch.advantages, cfg, cfg.lr, reference)
                lap("exploration")
            except FloatingPointError as error:
                torch.save({"step": step, "problems": [tuple(p) for p in chosen], "batch": batch and vars(batch),
                            "previous": previous and vars(previous)}, out / "bad_batch.pt")
                raise FloatingPointError(f"step {step}: {error}; what it worked on is in {out / 'bad_batch.pt'}, and "
                                         f"the last checkpoint in {out / 'checkpoint'} is as it was")
            tracker.push(mu)                                                # once, after it was read
            past_xi += [feedback.xi] if feedback else []
            previous = batch

            # --- evaluate, log, save ---------------------------------------------------------------------------------
            scores = {}
            if held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
                scores = evaluation(step)
                lap("evaluation")
            n_tokens = batch.mask.sum().item()
            row = {"step": step, "mu": mu, "feedback": kind, "coefficient": coefficient,
                   **(feedback or Feedback(None, None, None, None))._asdict(),
                   **exploration, **{f"pi_{name}": value for name, value in verification.items()},
                   "entropy": -batch.behavior_logprobs.sum().item() / n_tokens,
                   "truncated": batch.truncated.float().mean().item(), "cache_tokens": batch.cache_tokens,
                   "zero_signal": (batch.advantages == 0).all(1).float().mean().item(),
                   "completion_length": n_tokens / N, "tokens": int(n_tokens),
                   **{f"grader_{cause}": count for cause, count in failures.items()},
                   **scores, **seconds, "memory_gb": peak_memory_gb(device)}
            append_jsonl(out / "metrics.jsonl", row)
            picks = pick_samples(batch, rewards, chosen, step)
            append_jsonl(out / "samples.jsonl", *picks)
            for pick in picks if cfg.show_every and step % cfg.show_every == 0 else []:
                problem, completion = (" ".join(pick[name].split()) for name in ("problem", "completion"))
                tqdm.write(f"step {step}, reward {pick['reward']:.0f}, answer {pick['answer']}: "
                           f"{problem[-100:]} -> {completion[-300:]}{' [cut off]' * pick['truncated']}")
            bar.set_postfix(reward=f"{mu:.2f}", **{name: f"{row[name]:+.2f}" for name in ("xi", "phi") if feedback})
            bar.update()
            stop = interrupted.is_set() and step < cfg.steps                # read once: saving and stopping agree
            if cfg.save_every and (step % cfg.save_every == 0 or step == cfg.steps or stop):
                with swapped_in(out / "checkpoint" / "state.pt") as file:
                    torch.save({"config": settings, "device": device.type, "dtype": cfg.dtype,
                                "optimizer_device": cfg.optimizer_device, "step": step, "model": trained_weights(model),
                                "optimizer": optimizer.state_dict(), "tracker": tracker.state_dict(),
                                "previous": vars(previous), "past_xi": past_xi}, file)
            if stop:
                bar.close()
                how = "--resume (without --overwrite) goes on from there" if cfg.save_every else "nothing was saved"
                raise KeyboardInterrupt(f"stopped after step {step}; {how}")
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
              f"files: {out}/metrics.jsonl, samples.jsonl, checkpoint/, and what was trained in {out}/model"]
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
        default = "" if f.default is None or f.default is False or f.default == "" else f" (default: {f.default})"
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
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
    except torch.OutOfMemoryError as error:
        print(f"pipo: {first_line(error)} Halve --microbatch-tokens; the last checkpoint is as it was", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"pipo: {str(error) or 'stopped; the last checkpoint, if there is one, is as it was'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
