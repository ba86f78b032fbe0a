"""What must hold in pipo.py. Each test names the bug it guards against; all run on the CPU, offline, in a minute,
but for those that `make test-trl`, `make bench` or a GPU runs.

make test          or          python -m pytest -q test_pipo.py
"""

import ast
import copy
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zlib
from decimal import getcontext
from pathlib import Path

import mpmath
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import pipo
from pipo import (
    BASES,
    Config,
    ImprovementTracker,
    UserError,
    extract_answer,
    grade,
    gradient_distortion,
    group_advantages,
    improvement_rewards,
    policy_loss,
    sample,
    token_logprobs,
    verify,
)

HERE = Path(__file__).parent
README = HERE / "README.md"
torch.set_num_threads(1)  # tiny tensors gain nothing from a second thread, and lose much beside another process
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # the marks stand here, not in a file


def only_by(target):
    """A mark for what takes long or needs another package: `make TARGET` runs it, the plain suite does not."""
    skip = pytest.mark.skipif(os.environ.get("TARGET") != target, reason=f"make {target} runs it")
    return lambda test: getattr(pytest.mark, target.removeprefix("test-"))(skip(test))


LETTERS = "abcdefghijklmnopqrstuvwxyz"


# ---------------------------------------------------------------------------------------------------------------------
# A tiny model, and runs of the training loop in which rewards vary
# ---------------------------------------------------------------------------------------------------------------------


def tiny_model(seed=0, spread=0.3):
    """A random Qwen3 with three EOS ids among 28 tokens, so that its completions end at different lengths."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=28,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=spread,
        pad_token_id=0,
        eos_token_id=[1, 5, 9],
    )
    return Qwen3ForCausalLM(config).eval()


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
    rows = [{"problem": LETTERS[i % 20 : i % 20 + 2 + i % 4], "answer": "1"} for i in range(40)]
    (where / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return where


PROMPTS = [[3, 4, 5], [7], [8, 9, 10, 11, 12, 13], [2, 2]]


def batch_of(model, tokenizer, group_size=4, max_new_tokens=16):
    """A sampled batch with made-up rewards in which every group but the last is mixed."""
    batch = sample(model, tokenizer, PROMPTS, group_size, max_new_tokens, generator=pipo.rng("cpu", 0))
    batch.advantages = group_advantages(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]]))
    return batch


def settings(folder, out, **changes):
    given = dict(
        model=str(folder / "model"),
        dataset=str(folder / "train.jsonl"),
        eval_every=0,
        steps=6,
        window=2,
        lr=1e-3,
        prompts_per_step=4,
        group_size=4,
        max_new_tokens=8,
        temperature=1.0,
        save_every=1,
        show_every=0,
        device="cpu",
        out=str(out),
    )
    return Config(**{**given, **changes})


def coin(completion, answer):
    """A grade that looks like chance and depends on the text alone."""
    return float(zlib.crc32(completion.encode()) % 3 == 0), None


@pytest.fixture
def graded_by_coin(monkeypatch):
    monkeypatch.setattr(pipo, "grade", coin)


def weights(path_or_model):
    model = (
        path_or_model
        if isinstance(path_or_model, torch.nn.Module)
        else AutoModelForCausalLM.from_pretrained(path_or_model)
    )
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds_") and k != "memory_gb"} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The verifier. Each line of the two tables is a kind of answer and its pairs, both ways round.
# ---------------------------------------------------------------------------------------------------------------------

EQUAL = r"""
integers, decimals: 42 = 42.0 | -7 = −7 | 12345 = 12{,}345 | 12345 = 12,\!345 | 1234567 = 1\,234\,567 | 004 = 4
    | 0.5 = .50 | 0.000001 = 10^{-6} | 4.5e33 = 45\times10^{32} | 3 \cdot 10^8 = 3e8 \text{ m/s}
    | 1/6 = 0.1\overline{6}
fractions: \frac34 = \dfrac{6}{8} | 3/4 = 0.75 | \frac{-1}{2} = -\frac12 | \frac72 = 3\frac12 | -\frac72 = -3 1/2
    | ½ = \tfrac 12
dress: 40\% = 40 percent | \$1,000 = 1000.00 dollars | 45^\circ = 45 | 5\text{ cm}^2 = 5 square centimeters
    | 5 = \mathbf{5}. | 12 = 12^{\text{th}} | 10 \mbox{ inches} = 10 \text{ in} | 7 = 7 \text{ different ways}
    | 4:30\text{ p.m.} = 4:30 PM
radicals, powers: 2\sqrt3 = \sqrt{12} | \frac{\sqrt2}2 = \frac1{\sqrt2} | \sqrt[3]{-8} = -2
    | 1+\sqrt5 = \sqrt{6+2\sqrt5} | \frac{100!}{2^{50}} = 100!\cdot2^{-50} | 2^6 3^5 = 3^5 \cdot 2^6
    | \pi^2 = \pi\cdot\pi | \ln 2 = -\ln\frac12 | e^2 = \exp(2)
expressions: x^2-1 = (x-1)(x+1) | |x| = \sqrt{x^2} | 2\sin x\cos x = \sin 2x | \tan 15^\circ = 2-\sqrt3
    | \frac12x = x/2 | \sin^{-1} x = \arcsin x | \binom n2 = \frac{n(n-1)}2 | \binom{10}3 = 120 | n! = n(n-1)!
    | \log_2 8 = 3 | a_{1}+b = b+a_1 | \lfloor n/2 \rfloor = \left\lfloor \frac n2 \right\rfloor
    | \sqrt[3]{\sin x} = (\sin x)^{1/3} | \sum_k k = \sum_k k
equations: x=5 = 5 | f(x)=2x+1 = 1+2x | y=2x+3 = 2x-y+3=0 | x^2+y^2=1 = 2y^2=2-2x^2 | 25 = 5^2=25
    | \frac13 = \frac13\approx0.333 | (1,2) = (x,y)=(1,2) | \text{Area} = 5 = 5
inequalities: x>5 = 5<x | x>\frac52 = (2.5,\infty) | x\le1 = -x\ge-1 | 0<x<12.5 = (0,12.5) | [2,7] = x\in[2,7]
    | x\ne3 = (-\infty,3)\cup(3,\infty) | a<b = b>a | x<2\text{ or }x>3 = (3,\infty)\cup(-\infty,2)
    | (2,3) = x>2\text{ and }x<3 | \mathbb{R} = (-\infty,\infty)
collections: 1,2,3 = \{3,2,1\} | 1,2 = 2 \text{ and } 1 | \pm2 = 2,-2 | 1\pm\sqrt2 = 1-\sqrt2,1+\sqrt2
    | (1,2),(3,4) = (3,4),(1,2) | x=2,x=3 = 3\text{ or }2 | \emptyset = \{\} | (0;1) = (0,1) | 3:4 = 3:4
    | (1,234) = (1, 234)
matrices: \begin{pmatrix}1&2\\3&4\end{pmatrix} = \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
    | \begin{pmatrix}\frac12\\1\end{pmatrix} = \frac12\begin{bmatrix}1\\2\end{bmatrix}
complex: 3+4i = 4i+3 | e^{i\pi/4} = \frac{\sqrt2}2+\frac{\sqrt2}2i | i^2 = -1 | |3+4i| = 5
bases, choices, words: 204_5 = 204_{5} | \text{(C)} = C | C = \textbf{(C)}\ 12 | C = C. | \text{even} = Even
    | \text{Ann} = ann. | \text{B, C} = C and B | \text{May 5} = May 5 | \overline{CD} = \overline{CD}
    | \infty = +\infty
"""
UNEQUAL = r"""
near numbers: 28801 = 28800 | 1/3 = 0.333 | 0.000001 = 0.0000011 | \pi = 3.14159265358979 | 10000001 = 10000000
    | 13.1 = 1.31 | 123456789012345678 = 123456789012345679 | \sqrt2 = \sqrt2+10^{-40} | 2.7e-6 = 2.7 | \frac34 = 3
    | 0 = 10^{-300} | 0 = \sin(10^{-200})
signs, elements, order: 5 = -5 | 2-\sqrt3 = 2+\sqrt3 | 3-4i = 3+4i | (1,2) = (2,1) | 1,2,3 = 1,2 | 5 = 5,6 | \pm2 = 2
    | 3:4 = 4:3 | (1,2) = \{1,2\} | \begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}2\\1\end{pmatrix}
    | 2^{10} = 10^2 | [-36,104] = -36104
hedges: 41 = 41 \text{ or } 43 | 41 = 41 or 43 | 41 = 41\text{ (or 43)} | 41 = 41\text{ not }43 | 41 = 41=43
    | 43 = 41=43 | 41 = 41|43 | 41 = 41\text{ possibly forty} | 41 = 41\lor43 | 41 = \{41,43\} | 41 = 41\pm2
    | 41 = 41;43 | 41 = 41\quad43 | 41 = 41 \\ 43 | A = (A) 5 or (B) 6
brackets: (0,9) = [0,9) | [0,1] = [0,1]\cup[2,3] | x>5 = x\ge5 | (2,3) = x>2\text{ or }x<3 | x>5 = y>5 | x>1 = x<1
functions: |x| = x | \ln|x| = \ln x | \sin^{-1}x = \frac1{\sin x} | \tan 2x = 2\tan x | (x^2-1)^3 = (x^3-1)(x^3+1)
    | x = X | f(2)<f(1) = f(1)<f(4) | \lfloor n/2\rfloor = \lceil n/2\rceil | 1 = \sin^2x
equations: 2x+z=1 = 1 | x=5 = y=5 | y^2=4x = y^2=-4x | 5 = x>5 | 5 = x=6 | e=5 = e=6
dress: 5\text{ cm} = 5\text{ m} | 5\text{ cm} = 5\text{ cm}^2 | \$5 = 5 cents | 50\% = 0.5 | 2 = 2\text{ million}
    | 1,234 = 1.234 | 2 = 2lwh | 6 = 6xyzw | 5\text{ m} = 5\text{ ms}
    | x<1\text{ or }x>2 = x<1\text{ or }y>2 | (0,1)\cup(2,3) = x\in(0,1), y\in(2,3)
bases, words: 204_5 = 204 | 204_5 = 54 | 204_5 = 204_6 | seat = east | \text{no} = on | C = D
    | \text{even} = \text{even or odd} | \overline{CD} = \overline{DC} | \angle ABC = \angle ACB | HHT = THH
    | 21\text{st} = 22\text{nd}
never equal: nan = nan | 1/0 = 1/0 | \frac00 = 0 | \log 0 = \log 0 | \tan 90^\circ = \tan 90^\circ | \infty-\infty = 0
    | 5,7 = 5,1/0 | 7?8 = 7 | 5^ = 5 | \zoo = 5
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
        (r"First \boxed{1}, no: \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{5} and then \boxed{12", None),
        ("", None),
        (r"\boxed{5} or \boxed{}", None),
        (r"\boxed{5\}", None),
        ("\\boxed", None),
        ("The answer is \\boxed{", None),
        (r"<think>\boxed{5}</think>\boxed{6}", "6"),
        (r"<think>\boxed{5}</think> Yes.", None),
        (r"<think>\boxed{5}", None),
        (r"Hm, \boxed{5}? No.</think> The answer is 6.", "6"),
        ("1+1=2\n#### 72", "72"),
        ("#### 72\nThe answer is 5", "72"),
        ("#### Step 3: add\nThe answer is 5", "5"),
        ("So, the answer is $\\frac12$. Good.", r"\frac12"),
        ("**Answer:** 12", "12"),
        ("The answer is 3.5. I hope it is correct.", "3.5"),
        ("the answer is $45", "$45"),
        ("**Final Answer**\n\n12", "12"),
        ("The final answer is: 12", "12"),
        ("The answer is C<|im_end|>", "C"),
        ("It is 5. We get 7", None),
    ],
)
def test_extraction(text, answer):
    """Paying for an earlier box, for a thought, or for the last number in the text teaches not to answer."""
    assert extract_answer(text) == answer


def test_gold_forms_and_causes():
    """The gold may be a whole solution; failures are told apart so that a training run can count them."""
    assert verify(r"\boxed{72}", "48+24 = <<48+24=72>>72\n#### 72") == 1.0
    assert verify("#### 1,234", r"First \boxed{5}. Thus $\boxed{1234}$ ways.") == 1.0
    texts = "", r"\boxed{5}", r"\boxed{6}", r"\boxed{5+}", r"\boxed{%s}" % ("7" * 2000)
    causes = "no_answer", None, None, "unparsed", "too_big"
    assert [grade(text, "5") for text in texts] == list(zip((0.0, 1.0, 0.0, 0.0, 0.0), causes))


HOSTILE = [
    "9^{9^{9^{9^9}}}",
    "(100000)!",
    "((99!)!)!",
    r"\binom{10^9}{5\cdot10^8}",
    "(x+1)^{99999}",
    "2^{2^{64}}",
    "1e999999999",
    "10^{-10^{10}}",
    r"\sin(10^{10^8})",
    r"\lfloor10^{10^7}\pi\rfloor",
    r"e^{e^{e^{e^e}}}",
    "1/0",
    "0^{-1}",
    "nan",
    "7" * 100_000,
    "(" * 5000,
    "{" * 100_000,
    r"\sqrt{" * 400 + "}" * 400,
    r"\frac" * 300,
    "-" * 1400 + "5",
    "!" * 1400,
    "|" * 1400,
    "x" + "^2" * 700,
    r"\sin" * 400 + "x",
    "+".join([r"\sin x"] * 200),
    "+".join([r"\sqrt{x^{99}+1}"] * 90),
    ",".join("x" * 700),
    r"\pm1," * 300 + "1",
    r"\{\pm" * 200,
    '"' * 1400,
    " " * 1400 + "5",
    r"\!" * 700,
    "$" * 1400,
    "½" * 700,
    "1" + " 000" * 300,
    "\x00",
    "\ud800",
    "Ⅴ",
    "٣",
    "\\",
    "_",
    "'",
    "{}" * 700,
    "5^",
    r"\gcd()",
    r"\log_{}",
    r"\begin{pmatrix}",
    "__import__('os').system('touch pwned')",
    r"\input{/etc/passwd}",
    "x.__class__",
    "lambda: 0",
]


def hammer():
    """All hostile inputs as answer, as gold and as both; the longest call in seconds."""
    longest = 0.0
    for text in HOSTILE:
        box = r"\boxed{%s}" % text
        for completion, gold in ((box, "55"), (r"\boxed{55}", text), (text, text), (text * 9, "55"), (box, text)):
            start = time.perf_counter()
            assert grade(completion, gold)[0] in ((0.0, 1.0) if gold == text else (0.0,)), text
            longest = max(longest, time.perf_counter() - start)
    return longest


def test_hostile_inputs():
    """A tower of powers must not stop the run, nor may anything be executed, raised, or left changed."""

    def state():
        limits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
        return mpmath.mp.dps, getcontext().prec, limits, random.getstate(), threading.active_count()

    before, times = state(), [hammer()]
    threads = [threading.Thread(target=lambda: times.append(hammer())) for _ in range(2)]  # signals would fail here
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 3 and times[0] < 1.0  # a tenth of that on an idle machine
    assert before == state()


def test_random_texts():
    """Nothing raises, whatever the bytes or the order of the commands; a long text costs no more than its length."""
    rng = random.Random(0)
    parts = r"""\frac \sqrt \sin \log_ ^ _ { } ( ) [ ] \{ \} | ! \pm , = < \le \cup \infty 1 23 0.5 x \pi e i % $ \\ & °
        ½ \text{ \text{or} \begin{pmatrix} \end{pmatrix} \boxed{ #### <think> </think> answer is""".split()
    for _ in range(1500):
        a, b = ("".join(rng.choices(parts, k=rng.randrange(1, 25))) for _ in range(2))
        assert grade(a, b)[0] in (0.0, 1.0) and score(a, b) in (0.0, 1.0)
    for text in (r"\boxed{", "#### ", "<think>", "</think>", "answer is ", "$", "\n", "\\", "{", "}", r"\boxed{{}"):
        start = time.perf_counter()
        grade(text * (1_000_000 // len(text)), "5")
        assert time.perf_counter() - start < 1.0, text


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
    for _ in range(60):
        a, b = expression(rng, 2)
        dressed = b.replace("(", r"\left( ").replace(")", r" \right) ")
        assert score(a, b) == score(b, a) == score(f"${a}$", rf"\displaystyle {dressed}") == 1.0, (a, b)
        assert score(a, f"{b}+{rng.choice(['1', '0.001', '10^{-9}', 'x'])}") == 0.0, (a, b)
        assert score(f"({a}, 1)", f"({b}, 1)") == score(f"{a}=7x^3", f"14x^3=2({b})") == 1.0, (a, b)
        assert score(f"({a}, 1)", f"(1, {b})") == score(a, "1"), (a, b)


def test_random_numbers():
    """Fractions, decimals and thousands are exact: one unit in the last place is another number."""
    rng = random.Random(2)
    for _ in range(200):
        p, q, k = rng.randrange(1, 10**6), rng.randrange(2, 999), rng.randrange(2, 9)
        assert score(rf"\frac{{{p}}}{{{q}}}", rf"\dfrac{{{k * p}}}{{{k * q}}}") == score(f"{p:,}", str(p)) == 1.0
        assert score(rf"\frac{{{p}}}{{{q}}}", f"{p + 1}/{q}") == score(f"{p:,}", str(p + 1)) == 0.0
        assert score(f"{p}/{q}", f"-{p}/-{q}") == 1.0 and score(f"{p}.001", f"{p}.002") == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def check_greedy(ours, plain, prompts, limit):
    """A batch sampled greedily holds the tokens of transformers' generate, one prompt at a time: nothing is padded."""
    for prompt, tokens, mask in zip(prompts, ours.tokens, ours.mask):
        ids = torch.tensor([prompt], device=plain.device)
        reference = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)[0]
        assert tokens[mask == 1].tolist() == reference[len(prompt) :].tolist()


def test_greedy_sampling_equals_generate(model, tokenizer):
    """Guards against cache, position, padding and attention errors, with prompts of several lengths and dropped rows.

    Chance cannot pass it: the rows end at different lengths, some by EOS and some by the limit.
    """
    plain, prompts = tiny_model(), [[random.Random(i).randrange(2, 28) for _ in range(1 + i % 7)] for i in range(24)]
    assert plain.config._attn_implementation == "sdpa"
    ours = sample(model, tokenizer, prompts, 1, 24, temperature=0)
    check_greedy(ours, plain, prompts, 24)
    lengths = ours.mask.sum(1).tolist()
    assert len(set(lengths)) > 3 and ours.truncated.any() and not ours.truncated.all()


@pytest.mark.parametrize("temperature, top_p, cache_tokens", [(1.0, 1.0, 10**6), (0.7, 1.0, 100), (1.3, 0.8, 100)])
def test_sampler_logprobs_are_the_training_logprobs(model, tokenizer, temperature, top_p, cache_tokens):
    """Guards against a ratio that is not 1 before any update: other temperature, or top-p, on one of the two sides."""
    batch = sample(model, tokenizer, PROMPTS, 8, 16, temperature, top_p, pipo.rng("cpu", 1), cache_tokens)
    again = token_logprobs(model, batch.prompts, batch.tokens, batch.mask, temperature, chunk=5)
    assert (again - batch.behavior_logprobs).abs().max() < 1e-4
    assert (batch.mask.sum(1).unique().numel() > 3) and (batch.behavior_logprobs[batch.mask == 1] < 0).all()


def test_token_logprobs_equal_the_plain_full_softmax(model, tokenizer):
    """The slow obvious version: one row at a time, all logits at once. Guards against the shift by one."""
    batch = batch_of(model, tokenizer)
    ours = token_logprobs(model, batch.prompts, batch.tokens, batch.mask, 0.7, chunk=3)
    for i, prompt in enumerate(batch.prompts):
        row = batch.tokens[i, : int(batch.mask[i].sum())]
        logits = model(torch.cat([torch.tensor(prompt), row])[None]).logits[0] / 0.7
        plain = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, row[:, None]).squeeze(-1)
        assert torch.allclose(ours[i, : len(row)], plain, atol=1e-5) and (ours[i, len(row) :] == 0).all()


def test_every_eos_ends_a_completion_and_is_trained(model, tokenizer):
    """A stop token outside the loss is never learned; a model with several EOS ids must stop at each of them."""
    assert pipo.eos_ids(model, tokenizer) == [1, 5, 9]
    batch = batch_of(model, tokenizer, group_size=32, max_new_tokens=40)
    ended_by = set()
    for tokens, mask, cut in zip(batch.tokens, batch.mask, batch.truncated):
        row = tokens[mask == 1].tolist()
        assert not {1, 5, 9} & set(row[:-1]) and (row[-1] in (1, 5, 9)) != bool(cut)
        assert mask[: len(row)].all() and not mask[len(row) :].any()
        ended_by.add(row[-1])
    assert {1, 5, 9} <= ended_by
    logprobs = token_logprobs(model, batch.prompts, batch.tokens, batch.mask)
    last = batch.mask.sum(1).long() - 1
    gradient = torch.autograd.grad(
        policy_loss(logprobs, batch.behavior_logprobs, torch.ones(len(last)), batch.mask)[0], logprobs
    )[0]
    assert (gradient.gather(1, last[:, None]) < 0).all()


def test_groups_are_independent_draws_and_seeds_repeat(model, tokenizer):
    """Guards against copies of a prompt sharing their first token (one draw for G rows), and against hidden state."""
    first = sample(model, tokenizer, [[3]], 64, 4, generator=pipo.rng("cpu", 5))
    torch.rand(7)  # somebody else draws in between
    again = sample(model, tokenizer, [[3]], 64, 4, generator=pipo.rng("cpu", 5))
    assert first.tokens[:, 0].unique().numel() > 5 and torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, sample(model, tokenizer, [[3]], 64, 4, generator=pipo.rng("cpu", 6)).tokens)


def test_draws_follow_the_distribution():
    """40,000 draws have the frequencies of softmax(logits / T); top-p keeps the smallest set that reaches its mass."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(40000, 4)
    tokens, logprobs = pipo.draw(logits, 1.0, 1.0, pipo.rng("cpu", 0))
    assert torch.allclose(tokens.bincount(minlength=4) / 40000, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.01)
    tokens, logprobs = pipo.draw(logits, 1.0, 0.7, pipo.rng("cpu", 0))
    assert torch.allclose(tokens.bincount(minlength=4) / 40000, torch.tensor([0.625, 0.375, 0, 0]), atol=0.01)
    assert torch.allclose(logprobs.exp().unique(), torch.tensor([0.3, 0.5]))  # of the full distribution all the same
    tokens, _ = pipo.draw(logits, 0.5, 1.0, pipo.rng("cpu", 0))
    assert torch.allclose(tokens.bincount(minlength=4)[0] / 40000, torch.tensor(0.25 / 0.365), atol=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages, attribution, tracker
# ---------------------------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    """[1, 0, 0, 1].

    Mean 0.5, sample std 0.5774. Guards against ddof 0, and against noise in groups of equal rewards.
    """
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [0, 0, 0, 1]]))
    assert torch.allclose(advantages[0], torch.tensor([1, -1, -1, 1]) * 0.5 / 0.57735, atol=1e-4)
    assert (advantages[1] == 0).all()
    assert torch.allclose(advantages[2], torch.tensor([-0.5, -0.5, -0.5, 1.5]), atol=1e-4)
    assert torch.equal(
        group_advantages(torch.tensor([[1.0, 0, 0, 0]]), normalize_std=False),
        torch.tensor([[0.75, -0.25, -0.25, -0.25]]),
    )
    for bad in (torch.ones(3, 1), torch.tensor([[1.0, math.nan]])):  # one sample a group; a reward that is no number
        with pytest.raises(ValueError):
            group_advantages(bad)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_attribution_identities(normalize_std):
    """a_i = 1/(2p) on right answers, -1/(2(1-p)) on wrong ones, mean size 1, however A is normalised; else 0."""
    G = 8
    for k in range(G + 1):
        rewards = torch.tensor([[1.0] * k + [0.0] * (G - k)])
        a = improvement_rewards(group_advantages(rewards, normalize_std), 1.0)[0]
        if k in (0, G):
            assert (a == 0).all()
            continue
        assert torch.allclose(a[:k], torch.tensor(G / (2 * k))) and torch.allclose(
            a[k:], torch.tensor(-G / (2 * (G - k)))
        )
        assert math.isclose(a.abs().mean(), 1, rel_tol=1e-6)
        assert torch.allclose(improvement_rewards(group_advantages(rewards, normalize_std), -0.3)[0], -0.3 * a)


def test_tracker_by_hand():
    """Window [0.1, 0.2, 0.3]: mean 0.2, sample std 0.1.

    Guards against ddof 0, against a window that holds the present (xi could then not reach 3), against a push too many,
    and against a warm-up of the wrong length.
    """
    tracker = ImprovementTracker(window=3, lam=0.1)
    for mu in (0.1, 0.2, 0.3):
        assert tracker.feedback(mu) is None
        tracker.push(mu)
    for _ in range(3):  # reading changes nothing
        xi, phi, mu_his, sigma_his = tracker.feedback(0.5)
        assert (round(xi, 9), round(phi, 9), round(mu_his, 9), round(sigma_his, 9)) == (3.0, 3.0, 0.2, 0.1)
    fall = tracker.feedback(0.1)
    assert math.isclose(fall.xi, -1) and math.isclose(fall.phi, -0.1)
    tracker.push(0.5)  # the oldest leaves: [0.2, 0.3, 0.5]
    assert math.isclose(tracker.feedback(0.4).mu_his, 1 / 3)


def test_tracker_without_spread_clip_and_state():
    """sigma = 0 makes xi undefined, also where rounding would leave 1e-17; a cut xi; a tracker saved and loaded."""
    tracker = ImprovementTracker(window=8)
    for _ in range(8):
        tracker.push(0.1)
    assert tracker.full and tracker.feedback(0.9) is None
    clipped = ImprovementTracker(window=2, lam=0.5, xi_clip=2.0)
    for mu in (0.50, 0.51):
        clipped.push(mu)
    assert (clipped.feedback(0.9).xi, clipped.feedback(0.1).xi, clipped.feedback(0.1).phi) == (2.0, -2.0, -1.0)
    loaded = ImprovementTracker(window=2, lam=0.5, xi_clip=2.0)
    loaded.load_state_dict(json.loads(json.dumps(clipped.state_dict())))
    assert loaded.feedback(0.505) == clipped.feedback(0.505)
    loaded.push(0.7)
    assert list(loaded.history) == [0.51, 0.7] and list(clipped.history) == [0.50, 0.51]
    for window, lam in ((1, 0.1), (8, 1.5), (8, -0.1)):
        with pytest.raises(ValueError):
            ImprovementTracker(window, lam)


def test_xi_on_a_plateau_and_on_a_trend():
    """Monte Carlo.

    On a plateau E[phi_0.1] is +0.43, not 0 (hence the controls); a trend of s a step reads as s(K+1)/2.
    """
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


def test_gradient_distortion_against_monte_carlo_on_a_softmax_bandit():
    """A two-armed softmax bandit: the mean GRPO gradient over that of p. Guards against mixing up the conditioning."""
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
    table = {
        (0.1, True): 4.09,
        (0.01, True): 33.8,
        (0.001, True): 331,
        (0.1, False): 2.33,
        (0.01, False): 2.61,
        (0.5, True): 1.87,
    }
    for (p, conditional), value in table.items():
        assert math.isclose(gradient_distortion(p, 8, conditional), value, rel_tol=4e-3)
    assert math.isclose(gradient_distortion(1e-9, 8), math.sqrt(7), rel_tol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def random_rows(N=6, T=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    logprobs = (-torch.rand(N, T, generator=g, dtype=torch.float64) * 2).requires_grad_()
    behavior = logprobs.detach() + 0.4 * torch.randn(N, T, generator=g, dtype=torch.float64)
    lengths = [1, 5, 3, 2, 5, 4][:N]
    mask = torch.tensor([[1.0] * n + [0.0] * (T - n) for n in lengths], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5], dtype=torch.float64)[:N]
    return logprobs, behavior, advantages, mask


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
    logprobs, behavior, advantages, mask = random_rows()
    loss, metrics = policy_loss(logprobs, behavior, advantages, mask, base, max_new_tokens=9)
    assert math.isclose(loss.item(), loss_by_hand(logprobs, behavior, advantages, mask, base, 9), rel_tol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, behavior, advantages, mask, base, max_new_tokens=9)[0], logprobs
    )
    assert 0 < metrics["clip_fraction"] < 1


@pytest.mark.parametrize("coefficient", [1.0, -1.0])
def test_clip_on_both_signs(coefficient):
    """The released code takes min(ratio, clip(ratio)) * r: for r < 0 that goes on pushing down what is down already.

    With the coefficient inside the min, the gradient stops exactly where the ratio has moved far enough its way.
    """
    for ratio in (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0):
        logprob = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
        loss, metrics = policy_loss(logprob, torch.tensor([[-1.0]]), torch.tensor([coefficient]), torch.ones(1, 1))
        loss.backward()
        moved_enough = ratio > 1.2 if coefficient > 0 else ratio < 0.8
        assert (logprob.grad.item() == 0) == moved_enough == (metrics["clip_fraction"] == 1)
        if not moved_enough:
            assert math.isclose(logprob.grad.item(), -coefficient * ratio, rel_tol=1e-5)


def test_kl_is_k3_and_averaged_like_the_loss():
    """k3 = e^d - d - 1 with d = log pi_ref - log pi, by hand on one token; zero advantages leave the KL alone."""
    logprobs, reference = torch.tensor([[-1.0, -9.0]]), torch.tensor([[-1.5, -2.0]])
    loss, metrics = policy_loss(
        logprobs, logprobs, torch.zeros(1), torch.tensor([[1.0, 0.0]]), ref_logprobs=reference, kl_coef=0.5
    )
    k3 = math.exp(-0.5) + 0.5 - 1
    assert math.isclose(loss.item(), 0.5 * k3, rel_tol=1e-6) and math.isclose(metrics["kl"], k3, rel_tol=1e-6)


def gradient_of(update_of, model):
    """The gradient that an optimizer gets to see."""

    class Recorder(torch.optim.SGD):
        def step(self):
            self.seen = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).clone()

    recorder = Recorder(model.parameters(), lr=0.0)
    return update_of(recorder), recorder.seen


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_splitting_the_batch_does_not_change_the_gradient(model, tokenizer, base, kl_coef):
    """Guards against a denominator per micro-batch, and against dropped rows missing from it.

    Also against the last one's loss standing for the batch's. The oracle is one padded pass over all rows.
    """
    batch, results = batch_of(model, tokenizer), []
    model, reference = copy.deepcopy(model), tiny_model(seed=3) if kl_coef else None
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))  # so that ratios are not 1
    for budget in (1, 60, 10**9):
        cfg = Config(
            base=base, kl_coef=kl_coef, microbatch_tokens=budget, max_grad_norm=1e9, temperature=1.0, max_new_tokens=16
        )
        results.append(
            gradient_of(lambda o: pipo.update(model, o, batch, batch.advantages, cfg, 0.0, reference), model)
        )
    logprobs = token_logprobs(model, batch.prompts, batch.tokens, batch.mask)
    ref_logprobs = token_logprobs(reference, batch.prompts, batch.tokens, batch.mask).detach() if kl_coef else None
    loss, means = policy_loss(
        logprobs,
        batch.behavior_logprobs,
        batch.advantages.flatten(),
        batch.mask,
        base,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        max_new_tokens=16,
    )
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    for metrics, gradient in results:
        assert torch.allclose(gradient, plain, atol=1e-5 * plain.abs().max()) and plain.abs().max() > 0
        assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-3, abs_tol=1e-6)
        assert math.isclose(metrics["grad_norm"], plain.norm().item(), rel_tol=1e-4)
        if kl_coef:
            assert math.isclose(metrics["kl"], means["kl"], rel_tol=1e-4)


def test_microbatches_cover_every_row_once_within_budget():
    lengths = torch.tensor([5, 50, 7, 7, 31, 2, 90, 12])
    parts = pipo.microbatches(lengths, 64)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(8))
    assert all(len(part) == 1 or len(part) * lengths[part].max() <= 64 for part in parts)


@pytest.mark.parametrize("phi, direction", [(2.0, 1), (-0.2, -1)])
def test_feedback_reinforces_or_suppresses_the_previous_batch(tokenizer, phi, direction):
    """xi < 0 must lower the log-probability of the previous batch's right answers and raise that of its wrong ones."""
    model = tiny_model()
    batch = batch_of(model, tokenizer)
    before = token_logprobs(model, batch.prompts, batch.tokens, batch.mask).sum(1).detach()
    cfg = Config(temperature=1.0, max_new_tokens=16)
    pipo.update(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batch, improvement_rewards(batch.advantages, phi), cfg, 0.1
    )
    moved = token_logprobs(model, batch.prompts, batch.tokens, batch.mask).sum(1).detach() - before
    right, wrong = batch.advantages.flatten() > 0, batch.advantages.flatten() < 0
    assert (moved[right].mean() - moved[wrong].mean()) * direction > 0


def test_no_step_without_signal(tokenizer):
    """AdamW moves weights on momentum and decay even when the gradient is zero.

    A batch without signal takes no step.
    """
    model = tiny_model()
    batch = batch_of(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cfg = Config(temperature=1.0, max_new_tokens=16)
    pipo.update(model, optimizer, batch, batch.advantages, cfg, 1e-2)  # momentum to move on
    before = weights(model)
    metrics = pipo.update(model, optimizer, batch, torch.zeros_like(batch.advantages), cfg, 1e-2)
    assert torch.equal(weights(model), before) and metrics["skipped_steps"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def test_feedback_none_is_plain_grpo_bit_for_bit(folder, tmp_path, graded_by_coin):
    """Against GRPO written out: no tracker, one optimizer step a batch, one pass over all rows."""
    cfg = settings(folder, tmp_path / "run", feedback="none", steps=4)
    rows = pipo.train(cfg)
    model, tokenizer = pipo.load_model(cfg.model, torch.device("cpu")), AutoTokenizer.from_pretrained(cfg.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    problems = pipo.read_problems(pipo.load_rows(cfg.dataset, "train"), tokenizer, cfg, "")
    for step in range(1, 5):
        chosen = pipo.pick_problems(problems, step, cfg)
        batch = sample(
            model, tokenizer, [p.prompt for p in chosen], 4, 8, generator=pipo.rng("cpu", cfg.seed, "sample", step)
        )
        A = group_advantages(torch.tensor([coin(text, "")[0] for text in batch.texts]).view(4, 4)).flatten()
        rows_ = (A != 0).nonzero().squeeze(1)
        order = rows_[
            torch.tensor([len(batch.prompts[i]) + int(batch.mask[i].sum()) for i in rows_]).argsort(stable=True)
        ]
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
    """The order of one iteration, from what `update` is called with.

    Verification comes first, on the previous batch, from step K + 1 on, with a_i * phi; exploration's ratio is against
    the policy that sampled; mu counts every sample; xi is read from the K values before it.
    """
    calls, plain_update = [], pipo.update

    def recorded(model, optimizer, batch, coefficients, cfg, lr, reference=None):
        calls.append((batch, coefficients.clone(), lr))
        return plain_update(model, optimizer, batch, coefficients, cfg, lr, reference)

    monkeypatch.setattr(pipo, "update", recorded)
    rows = pipo.train(settings(folder, tmp_path / "run", window=3, pi_lr=5e-4, steps=8))
    assert [row["feedback"] for row in rows[:3]] == ["warmup"] * 3 and rows[3]["feedback"] in ("positive", "negative")
    mus, k, previous = [row["mu"] for row in rows], 0, None
    for t, row in enumerate(rows):
        if t >= 3:
            window = mus[t - 3 : t]
            assert math.isclose(row["xi"], (mus[t] - statistics.mean(window)) / statistics.stdev(window), rel_tol=1e-9)
            assert math.isclose(row["phi"], row["xi"] if row["xi"] >= 0 else 0.1 * row["xi"])
            assert (row["feedback"] == "zero") == (row["xi"] == 0)  # neither up nor down: no step
        if row["coefficient"]:
            batch, coefficients, lr = calls[k]
            k += 1
            assert batch is previous and lr == 5e-4 and "pi_loss" in row
            assert torch.allclose(coefficients, improvement_rewards(previous.advantages, row["phi"]))
        batch, coefficients, lr = calls[k]
        k += 1
        assert batch is not previous and lr == 1e-3 and torch.equal(coefficients, batch.advantages)
        rewards = torch.tensor([coin(text, "")[0] for text in batch.texts])
        assert math.isclose(row["mu"], rewards.mean(), rel_tol=1e-6) and len(rewards) == 16
        previous = batch
    assert k == len(calls) > len(rows) + 3


@pytest.mark.parametrize("feedback", ["constant", "shuffled"])
def test_controls_take_the_same_steps_with_another_coefficient(folder, tmp_path, graded_by_coin, feedback):
    """A gain of PIPO must be told from that of one more step.

    Same steps, coefficient a constant or an earlier xi's phi.
    """
    rows = pipo.train(settings(folder, tmp_path / "run", feedback=feedback, steps=8, lam=0.5))
    used = [(t, row["coefficient"]) for t, row in enumerate(rows) if row["feedback"] in ("positive", "negative")]
    assert len(used) >= 4
    for t, coefficient in used:
        earlier = [row["xi"] for row in rows[:t] if row["xi"] is not None]
        allowed = [0.43] if feedback == "constant" else [xi if xi >= 0 else 0.5 * xi for xi in earlier]
        assert any(math.isclose(coefficient, value) for value in allowed)


def test_minibatches_take_that_many_steps_in_both_updates(folder, tmp_path, graded_by_coin, monkeypatch):
    steps = []
    monkeypatch.setattr(pipo, "make_optimizer", lambda model, cfg: CountingAdamW(steps, model.parameters(), lr=cfg.lr))
    rows = pipo.train(settings(folder, tmp_path / "run", minibatches=2, steps=5))
    taken = sum(2 - row["skipped_steps"] + (2 - row["pi_skipped_steps"] if "pi_loss" in row else 0) for row in rows)
    assert len(steps) == taken > 10


class CountingAdamW(torch.optim.AdamW):
    def __init__(self, steps, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = steps

    def step(self):
        self.steps.append(1)
        super().step()


def test_a_resumed_run_equals_an_unbroken_one(folder, tmp_path, graded_by_coin):
    """12 steps, and 7 resumed to 12: same metrics, same bits.

    Guards against a lost window, batch, moment or data order. The metrics behind the checkpoint that a kill leaves, and
    a line cut in half, must go, not stand there twice.
    """
    whole = pipo.train(settings(folder, tmp_path / "whole", steps=12, feedback="shuffled", kl_coef=0.01))
    pipo.train(settings(folder, tmp_path / "broken", steps=7, feedback="shuffled", kl_coef=0.01))
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 8, "mu": 9}) + "\n" + '{"step": 9, "m')
    resumed = pipo.train(
        settings(folder, tmp_path / "broken", steps=12, feedback="shuffled", kl_coef=0.01, resume=True)
    )
    assert without_times(whole) == without_times(resumed) and len(whole) == 12
    assert torch.equal(weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model"))
    assert len({row["mu"] for row in whole}) > 3 and any(row["feedback"] == "negative" for row in whole)


RUN = """
import os, sys, signal, torch, pipo, test_pipo
pipo.grade = test_pipo.coin
{patch}
sys.exit(pipo.main(sys.argv[1:]))
"""


def command(folder, out, *flags, patch=""):
    arguments = [
        "--model",
        folder / "model",
        "--dataset",
        folder / "train.jsonl",
        "--eval-every",
        "0",
        "--window",
        "2",
        "--lr",
        "1e-3",
        "--prompts-per-step",
        "4",
        "--group-size",
        "4",
        "--max-new-tokens",
        "8",
        "--out",
        out,
        *flags,
    ]
    return [sys.executable, "-c", RUN.format(patch=patch), *map(str, arguments)]


def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_checkpoint(folder, tmp_path):
    """Guards against writing over the only checkpoint: a SIGKILL with half of step 4's on the disk, then resume."""
    patch = """
plain_save = torch.save
def save(state, file):
    if state["step"] == 4:
        file.write(b"half of it"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
    plain_save(state, file)
torch.save = save
"""
    flags = ["--steps", "6", "--save-every", "2"]
    killed = subprocess.run(command(folder, tmp_path / "run", *flags, patch=patch), cwd=HERE, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt")["step"] == 2
    resumed = subprocess.run(
        command(folder, tmp_path / "run", *flags, "--resume"), cwd=HERE, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in pipo.read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves_and_says_how_to_go_on(folder, tmp_path):
    run = subprocess.Popen(
        command(folder, tmp_path / "run", "--steps", "100000", "--save-every", "100000"),
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 60
    while len(pipo.read_jsonl(tmp_path / "run" / "metrics.jsonl")) < 3 and time.time() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "--resume" in said and "Traceback" not in said
    step = torch.load(tmp_path / "run" / "checkpoint" / "state.pt")["step"]
    assert step >= 3 and pipo.read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step


def test_files_of_a_run_and_the_saved_model(folder, tmp_path, graded_by_coin):
    """Metrics hold every number that the README explains; the model folder loads as any other."""
    cfg = settings(
        folder, tmp_path / "run", eval_every=2, eval_dataset=str(folder / "train.jsonl"), kl_coef=0.01, steps=4
    )
    rows = pipo.train(cfg)
    expected = (
        "step mu mu_his sigma_his xi phi feedback coefficient loss grad_norm pi_loss pi_grad_norm clip_fraction ratio "
        "logprob_gap entropy kl truncated zero_signal completion_length tokens seconds_sample seconds_grade "
        "seconds_verification seconds_exploration memory_gb eval_pass@1"
    ).split()
    assert set(expected) <= set(rows[-1]) and [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_pass@1" in row] == [0, 2, 4] and "mu" not in rows[0]
    assert rows[1]["ratio"] == pytest.approx(1, abs=1e-4) and rows[1]["logprob_gap"] < 1e-4
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 1e-3
    assert {"problem", "completion", "reward"} <= set(pipo.read_jsonl(tmp_path / "run" / "samples.jsonl")[0])
    AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert not torch.equal(weights(tmp_path / "run" / "model"), weights(folder / "model"))


def test_noise_in_the_rewards_and_a_second_epoch(folder, tmp_path, graded_by_coin):
    """Guards against noise that changes with the arm (seed and step alone decide), and against one epoch too few."""
    runs = [
        pipo.train(settings(folder, tmp_path / name, steps=3, feedback=feedback, reward_noise=0.25, epochs=epochs))
        for name, feedback, epochs in (("a", "none", 1), ("b", "pipo", 1), ("c", "none", 2))
    ]
    plain = pipo.train(settings(folder, tmp_path / "d", steps=3, feedback="none"))
    assert runs[0][0]["mu"] == runs[1][0]["mu"] == runs[2][0]["mu"]
    assert [row["mu"] for row in runs[0]] != [row["mu"] for row in plain]
    assert runs[0][0]["ratio"] == pytest.approx(1, abs=1e-5) and abs(runs[2][0]["ratio"] - 1) > 1e-5
    state = torch.load(tmp_path / "c" / "checkpoint" / "state.pt")["optimizer"]["state"]
    assert next(iter(state.values()))["step"] == 6


def test_dropout_is_off(tokenizer, tmp_path):
    """With dropout in the training pass the ratio is not 1 before any update, and gspo's narrow clip eats the signal.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=28, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1)
    ).save_pretrained(tmp_path)
    model = pipo.load_model(str(tmp_path), torch.device("cpu"))
    batch = batch_of(model, tokenizer)
    metrics = pipo.update(
        model, torch.optim.SGD(model.parameters(), lr=0.0), batch, batch.advantages, Config(temperature=1.0), 0.0
    )
    assert metrics["logprob_gap"] < 1e-5 and metrics["clip_fraction"] == 0


def test_weights_are_float32(folder):
    """bf16 weights swallow updates at a learning rate of 1e-6: masters must be fp32."""
    half = AutoModelForCausalLM.from_pretrained(folder / "model").to(torch.bfloat16)
    half.save_pretrained(folder / "half")
    model = pipo.load_model(str(folder / "half"), torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "shared_heads"


def test_prompts_of_a_step_depend_on_the_step_alone():
    """Guards against a data order that starts over on resume: each epoch shows every problem once, in a new order."""
    problems, cfg = list(range(10)), Config(prompts_per_step=5)
    epochs = [pipo.pick_problems(problems, s, cfg) + pipo.pick_problems(problems, s + 1, cfg) for s in (1, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == problems and epochs[0] != epochs[1]
    assert pipo.pick_problems(problems, 7, cfg) == pipo.pick_problems(problems, 7, cfg)


def test_the_demo_end_to_end_through_the_command_line(tmp_path):
    """The command of the README at a tiny size: it must run from nothing, offline, and leave its files."""
    flags = "--warm-start 0.02 --steps 3 --window 2 --prompts-per-step 4 --group-size 4 --eval-limit 32".split()
    flags += ["--show-every", "1"]
    run = subprocess.run(
        [sys.executable, "pipo.py", *flags, "--out", tmp_path / "demo"],
        cwd=HERE,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "held-out pass@1" in run.stdout and "feedback" in run.stdout and "step 1, reward" in run.stdout + run.stderr
    assert len(pipo.read_jsonl(tmp_path / "demo" / "metrics.jsonl")) == 4 and (tmp_path / "demo" / "model").is_dir()


def test_demo_problems_are_right_and_disjoint():
    evaluation, warm, training = pipo.demo_rows(0)
    assert len(evaluation) >= 500
    asked = [{row["problem"] for row in rows} for rows in (evaluation, warm, training)]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    for row in warm[:200]:
        a, b = map(int, row["problem"].rstrip("?").split("+"))
        assert int(row["answer"]) == a + b and pipo.verify(row["worked"], row["answer"]) == 1.0
    assert pipo.demo_rows(0)[0] != pipo.demo_rows(1)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory: what makes it fast or small must not change what is computed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["little room", "out of memory"])
def test_rows_that_had_to_wait_go_on_as_if_they_had_not(model, tokenizer, monkeypatch, trouble):
    """Guards against a token lost, drawn twice or put in the wrong place when a wave is cut short.

    Chance cannot pass it: greedy completions of several lengths, most of which are interrupted at least once.
    """
    whole = sample(model, tokenizer, PROMPTS, 4, 24, temperature=0)
    plain, sizes, room = model.forward, [], 100 if trouble == "little room" else None

    def forward(ids, **options):
        sizes.append(len(ids))
        if trouble == "out of memory" and ids.shape[0] * options["attention_mask"].shape[1] > 100:
            raise torch.OutOfMemoryError
        return plain(ids, **options)

    monkeypatch.setattr(model, "forward", forward)
    cut = sample(model, tokenizer, PROMPTS, 4, 24, temperature=0, cache_tokens=room, prefill_tokens=30)
    assert torch.equal(whole.tokens, cut.tokens) and torch.equal(whole.mask, cut.mask)
    assert (whole.behavior_logprobs - cut.behavior_logprobs).abs().max() < 1e-5
    assert max(sizes[10:]) < 16  # no wave held all rows for long
    assert cut.cache_tokens == 100 if room else cut.cache_tokens <= 100  # what memory ran out of is not asked for again
    monkeypatch.setattr(model, "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):  # where not even one row fits, there is no going on
        sample(model, tokenizer, PROMPTS, 4, 24)


def test_the_cache_writes_in_place_and_drops_rows(model):
    """Against transformers' own cache, token by token, with a row dropped and the others put in another order."""
    ids = torch.randint(2, 28, (3, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = pipo.DynamicCache(), pipo.DynamicCache()
    for cache in (ours, theirs):
        model(ids[:, :4], past_key_values=cache, use_cache=True)
    rows = torch.tensor([2, 0])
    theirs.batch_select_indices(rows)
    ours = pipo.Cache([pipo.RoomyLayer([layer], rows, 5) for layer in ours.layers])
    storage = ours.layers[0].all_keys.data_ptr()
    for t in range(4, 9):
        logits = [model(ids[rows, t : t + 1], past_key_values=cache, use_cache=True).logits for cache in (ours, theirs)]
        assert torch.allclose(*logits, atol=1e-5)
    assert ours.get_seq_length() == 9 and ours.layers[0].all_keys.data_ptr() == storage


def test_masters_of_float32_weights_are_plain_adamw():
    """The slow obvious version is torch's: same steps, same moments, to the last bit, also after saving and loading."""
    torch.manual_seed(0)
    models_ = [torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)) for _ in range(2)]
    models_[1].load_state_dict(models_[0].state_dict())
    plain = torch.optim.AdamW(models_[0].parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    masters = pipo.MasterAdamW(models_[1].parameters(), "cpu", lr=1e-2, weight_decay=0.1)
    for step in range(6):
        x = torch.randn(4, 5)
        for model_, optimizer in zip(models_, (plain, masters)):
            model_(x).square().sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(weights(models_[0]), weights(models_[1]))
        if step == 2:
            state = copy.deepcopy(masters.state_dict())
            masters = pipo.MasterAdamW(models_[1].parameters(), "cpu", lr=1.0, weight_decay=0.1)
            masters.load_state_dict(state)


def test_small_updates_of_bf16_weights_are_not_lost():
    """At lr 1e-6 a bf16 weight of 1 never moves by itself (its neighbours are 0.004 away); its fp32 master does."""
    moved = {}
    for name in ("bf16 alone", "with masters"):
        weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        options = dict(lr=1e-6, weight_decay=0.0)
        optimizer = (
            torch.optim.AdamW([weight], **options)
            if name == "bf16 alone"
            else pipo.MasterAdamW([weight], "cpu", **options)
        )
        for _ in range(4000):
            weight.grad = torch.ones_like(weight, dtype=weight.grad_dtype)
            optimizer.step()
        moved[name] = (1 - weight.detach().float().mean()).item()
    assert moved["bf16 alone"] == 0.0 and moved["with masters"] == pytest.approx(0.004, rel=0.05)


def test_many_small_gradients_add_up_with_bf16_weights():
    """1 added 600 times is 600, not 256: a bf16 sum stands still once a micro-batch is a small part of it."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = pipo.MasterAdamW([weight], "cpu", lr=1e-3)
    for _ in range(600):
        weight.sum().backward()
    assert weight.grad.tolist() == [600.0, 600.0] and weight.dtype == torch.bfloat16
    optimizer.zero_grad()
    assert weight.grad is None


@pytest.mark.parametrize("changes", [dict(dtype="bfloat16"), dict(lora=4, kl_coef=0.01)], ids=["bf16", "lora"])
def test_other_precisions_and_adapters_train_and_resume(folder, tmp_path, graded_by_coin, changes):
    """bf16 weights with masters, and LoRA: a resumed run equals an unbroken one, and what is saved can be loaded.

    Guards against masters rebuilt from the rounded weights, and against adapters left out of the checkpoint.
    """
    if "lora" in changes:
        pytest.importorskip("peft")
    whole = pipo.train(settings(folder, tmp_path / "whole", **changes))
    pipo.train(settings(folder, tmp_path / "broken", steps=4, **changes))
    resumed = pipo.train(settings(folder, tmp_path / "broken", resume=True, **changes))
    assert without_times(whole) == without_times(resumed) and any("pi_loss" in row for row in whole)
    models_ = [weights(tmp_path / run / "model") for run in ("whole", "broken")]
    assert torch.equal(*models_) and not torch.equal(models_[0], weights(folder / "model"))
    if "lora" in changes:
        assert whole[0]["kl"] == pytest.approx(0, abs=1e-7) and whole[-1]["kl"] > 1e-6  # adapters off: the start
        assert not (tmp_path / "whole" / "model" / "model.safetensors").exists()  # the adapters alone
    assert whole[0]["logprob_gap"] < (0.05 if "dtype" in changes else 1e-4)


QWEN3_4B = dict(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


def test_memory_plan_of_a_4b_model(monkeypatch, tmp_path):
    """The arithmetic for 4B: 8.0 GB of bf16 weights, 48 GB of masters and moments, 144 KiB of cache a token.

    They go to the host where that leaves the card to the cache; what cannot fit is refused before anything is loaded.
    """
    with torch.device("meta"):
        shapes = Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, tie_word_embeddings=True, **QWEN3_4B))
    cuda = torch.device("cuda")
    monkeypatch.setattr(pipo.shutil, "disk_usage", lambda _: type("disk", (), {"free": 1e12}))

    def plan(gpu, host, **changes):
        monkeypatch.setattr(pipo, "free_memory", lambda device: {"cuda": gpu, "cpu": host}[device.type] * 1e9)
        return pipo.plan_memory(shapes, Config(model="4b", **changes), cuda, tmp_path)

    cfg, table = plan(80, 128)
    assert cfg.dtype == "bfloat16" and cfg.optimizer_device == "cpu" and 400_000 < cfg.cache_tokens < 470_000
    assert "7.49 GiB on cuda" in table and "44.95 GiB on cpu" in table and len(table.splitlines()) == 8
    assert 200_000 < plan(48, 128)[0].cache_tokens < 250_000
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
        (80, 128, dict(cache_tokens=1000), "the cache has room for 1,000 tokens"),
    ]:
        with pytest.raises(UserError, match=sentence):
            plan(gpu, host, **changes)
    assert plan(24, 32, lora=16)[0].cache_tokens > 40_000  # a 24 GB card trains adapters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_greedy_sampling_on_a_gpu_equals_generate(tokenizer):
    """Other attention kernels, the same tokens (fp32, so that rounding does not decide between near equals)."""
    model, plain = tiny_model().cuda(), tiny_model().cuda()
    model.set_attn_implementation("shared_heads")
    check_greedy(sample(model, tokenizer, PROMPTS, 1, 24, temperature=0, cache_tokens=60), plain, PROMPTS, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("optimizer_device", ["cpu", "cuda"])
def test_a_run_on_a_gpu_learns_in_bf16_and_resumes(folder, tmp_path, graded_by_coin, optimizer_device):
    """bf16 weights on the card, masters here or there: the behavior policy is the trained one, and resuming works."""
    changes = dict(device="cuda", optimizer_device=optimizer_device)
    rows = pipo.train(settings(folder, tmp_path / "run", steps=4, **changes))
    rows = pipo.train(settings(folder, tmp_path / "run", steps=6, resume=True, **changes))
    assert len(rows) == 6 and all(row["logprob_gap"] < 0.05 for row in rows) and rows[-1]["memory_gb"] < 4


# ---------------------------------------------------------------------------------------------------------------------
# Data, prompts and bad input
# ---------------------------------------------------------------------------------------------------------------------

LAYOUTS = [
    ({"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "5", "style": "rule"}}, "5"),
    (
        {
            "prompt": [{"role": "user", "content": "q"}],
            "reward_model": {"ground_truth": ["so \\boxed{5}"]},
            "problem": "x",
            "solution": "y",
        },
        "5",
    ),
    ({"problem": "q", "answer": "5", "solution": "\\boxed{6}"}, "5"),
    ({"problem": "q", "solution": "first \\boxed{4}, then \\boxed{5}"}, "5"),
    ({"question": "q", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}, "5"),
    ({"prompt": "q", "answer": 5}, "5"),
    ({"prompt": "q", "solution": "\\boxed{5}"}, "5"),
    ({"prompt": "q", "ground_truth": "5"}, "5"),
]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "folder"])
def test_dataset_layouts_and_file_types(tmp_path, tokenizer, ending):
    import datasets

    cfg = Config(instruction=" box")
    for i, (row, gold) in enumerate(LAYOUTS):
        if ending == "csv" and not all(isinstance(value, (str, int)) for value in row.values()):
            continue
        name = tmp_path / (f"{i}.{ending}" if ending != "folder" else str(i))
        rows = datasets.Dataset.from_list([row, row])
        if ending == "folder":
            name.mkdir()
            rows.to_parquet(name / "train.parquet")
        elif ending == "json":
            name.write_text(json.dumps([row, row]))
        else:
            {"jsonl": rows.to_json, "parquet": rows.to_parquet, "csv": rows.to_csv}[ending](name)
        problems = pipo.read_problems(pipo.load_rows(str(name), "train"), tokenizer, cfg, "rows")
        assert [p.answer for p in problems] == [gold, gold]
        asked = "q" if isinstance(row.get("prompt"), list) else "q box"  # the instruction is not put behind messages
        assert problems[0].text == "q" and problems[0].prompt == tokenizer(asked).input_ids


def test_rows_without_an_answer_and_long_prompts_are_left_out_and_counted(tokenizer, capsys):
    import datasets

    rows = [
        {"problem": "ab", "solution": "\\boxed{1}"},
        {"problem": "ab", "solution": "no box"},
        {"problem": "ab", "solution": None},
        {"problem": "abcdefgh", "solution": "\\boxed{1}"},
    ]
    problems = pipo.read_problems(
        datasets.Dataset.from_list(rows), tokenizer, Config(max_prompt_tokens=5, instruction=""), "rows"
    )
    assert len(problems) == 1
    assert (
        "left out of rows: 2 without a question or an answer; 1 with a prompt over 5 tokens" in capsys.readouterr().out
    )


def test_the_chat_template_is_used_where_there_is_one(tokenizer):
    """Without its template a chat model never emits EOS and every reward is 0."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}u{{ m.content }}{% endfor %}{% if add_generation_prompt %}g{% endif %}"
        "{% if not enable_thinking %}n{% endif %}"
    )
    messages = [{"role": "user", "content": "abc"}]
    assert (
        chat.decode(pipo.encode(chat, messages)) == "uabcgn"
        and chat.decode(pipo.encode(chat, messages, thinking=True)) == "uabcg"
    )
    assert tokenizer.decode(pipo.encode(tokenizer, messages)) == "abc"


def bad_inputs(where):
    good = [
        "--model",
        f"{where}/model",
        "--dataset",
        f"{where}/train.jsonl",
        "--eval-every",
        "0",
        "--out",
        f"{where}/never",
    ]
    (where / "columns.jsonl").write_text('{"text": "x", "label": "y"}')
    (where / "empty.jsonl").write_text("")
    (where / "notes.txt").write_text("x")
    (where / "noanswer.jsonl").write_text('{"problem": "x", "answer": ""}')
    (where / "emptyfolder").mkdir(exist_ok=True)
    (where / "translator").mkdir(exist_ok=True)
    (where / "translator" / "config.json").write_text('{"model_type": "t5"}')
    return [
        ([*good, "--model", "/no/such/folder"], "/no/such/folder does not exist"),
        ([*good, "--model", "nobody/nothing"], "nobody/nothing can be read neither"),
        ([*good, "--model", f"{where}/emptyfolder"], "emptyfolder can be read neither"),
        ([*good, "--dataset", "/no/such/file.parquet"], "/no/such/file.parquet does not exist"),
        ([*good, "--dataset", "nobody/nothing"], "nobody/nothing can be read neither"),
        (
            [*good, "--dataset", f"{where}/columns.jsonl"],
            "has the columns text, label; understood are prompt + reward_model",
        ),
        ([*good, "--dataset", f"{where}/empty.jsonl"], "empty.jsonl is empty or"),
        ([*good, "--dataset", f"{where}/emptyfolder"], "emptyfolder"),
        ([*good, "--dataset", f"{where}/notes.txt"], "notes.txt is empty or not a"),
        ([*good, "--dataset", f"{where}/noanswer.jsonl"], "no usable problem"),
        ([*good, "--max-prompt-tokens", "1"], "40 with a prompt over 1 tokens"),
        ([*good, "--eval-every", "2", "--eval-dataset", "/no/such"], "/no/such does not exist"),
        ([*good, "--window", "1"], "--window is 1"),
        ([*good, "--lam", "1.5"], "--lam is 1.5"),
        ([*good, "--lam", "nan"], "--lam is nan"),
        ([*good, "--group-size", "1"], "--group-size is 1"),
        ([*good, "--temperature", "0"], "--temperature is 0.0"),
        ([*good, "--top-p", "0"], "--top-p is 0.0"),
        ([*good, "--top-p", "1.1"], "--top-p is 1.1"),
        ([*good, "--lr", "-1"], "--lr is -1.0"),
        ([*good, "--steps", "0"], "--steps is 0"),
        ([*good, "--minibatches", "3"], "--minibatches is 3"),
        ([*good, "--device", "cuda"], "--device is 'cuda'"),
        ([*good, "--device", "abacus"], "--device is 'abacus'"),
        ([*good, "--device", "meta"], "--device is 'meta': it must be cpu or"),
        ([*good, "--optimizer-device", "cuda", "--device", "cpu"], "--optimizer-device is 'cuda': the run is on cpu"),
        ([*good, "--reward-noise", "0.7"], "--reward-noise is 0.7"),
        ([*good, "--epochs", "0"], "--epochs is 0"),
        ([*good, "--cache-tokens", "30"], "the cache has room for 30 tokens"),
        ([*good, "--resume"], "nothing to resume"),
        ([*good, "--resume", "--overwrite"], "--overwrite is True"),
        ([*good, "--clip-high", "nan"], "--clip-high is nan"),
        ([*good, "--weight-decay", "-1"], "--weight-decay is -1.0"),
        ([*good, "--eval-limit", "-1"], "--eval-limit is -1"),
        ([*good, "--model", f"{where}/translator"], "translator can be read neither"),
        ([*good, "--out", f"{where}/train.jsonl/run"], "cannot be written"),
        (["--dataset", f"{where}/train.jsonl"], "it needs --model"),
        (["--warm-start", "1.5"], "--warm-start is 1.5"),
    ]


def test_bad_input_gets_one_sentence_and_exit_code_2(folder, capsys, monkeypatch):
    """No traceback, no work done first, no run left behind."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pipo, "load_model", lambda *_: pytest.fail("expensive work before the check"))
    monkeypatch.setattr(pipo, "build_demo", lambda *_: pytest.fail("expensive work before the check"))
    cases = bad_inputs(folder)
    if torch.cuda.is_available():
        cases = [case for case in cases if "cuda" not in case[1]]
    for arguments, sentence in cases:
        code, said = pipo.main(arguments), capsys.readouterr().err.strip()
        assert code == 2 and sentence in said and said.count("\n") == 0, (arguments, said)
    for arguments in (["--no-such-flag"], ["--base", "ppo"], ["--steps", "many"], ["--temp", "1"]):
        with pytest.raises(SystemExit) as stop:
            pipo.main(arguments)
        assert stop.value.code == 2


def test_runs_are_not_overwritten_and_resume_names_what_differs(folder, tmp_path, graded_by_coin):
    pipo.train(settings(folder, tmp_path, steps=2))
    for changes, sentence in [
        ({}, "already holds a run"),
        ({"resume": True, "steps": 1}, "already stands at step 2"),
        ({"resume": True, "steps": 4, "lr": 0.5, "window": 3}, "--window was 2, is 3; --lr was 0.001, is 0.5"),
    ]:
        with pytest.raises(UserError, match=re.escape(sentence)):
            pipo.train(settings(folder, tmp_path, **{"steps": 2, **changes}))
    with pytest.raises(UserError):  # a mistyped name must not cost the run
        pipo.train(settings(folder, tmp_path, steps=1, overwrite=True, dataset="/no/such"))
    assert len(pipo.train(settings(folder, tmp_path, steps=2, resume=True))) == 2
    assert len(pipo.train(settings(folder, tmp_path, steps=1, overwrite=True))) == 1


@pytest.mark.parametrize("lr, broken", [(1e30, "sampling"), (1e-3, "gradient")])
def test_a_run_that_breaks_down_stops_with_its_batch_on_file(folder, tmp_path, graded_by_coin, monkeypatch, lr, broken):
    """A NaN must stop the run, never be trained through; the step is named and the last checkpoint stays."""
    if broken == "gradient":
        plain, calls = pipo.policy_loss, []
        monkeypatch.setattr(
            pipo,
            "policy_loss",
            lambda *a, **k: (calls.append(1), (plain(*a, **k)[0] * (math.nan if len(calls) > 3 else 1), {}))[1],
        )
    with pytest.raises(FloatingPointError, match=r"step \d+: .*bad_batch"):
        pipo.train(settings(folder, tmp_path / "run", lr=lr, steps=20))
    bad = torch.load(tmp_path / "run" / "bad_batch.pt")
    assert (
        len(bad["problems"]) == 4
        and bad["step"] == torch.load(tmp_path / "run" / "checkpoint" / "state.pt")["step"] + 1
    )


def test_training_off_the_main_thread(folder, tmp_path, graded_by_coin):
    """Signals can only be caught on the main thread; the loop must not need them."""
    results = []
    thread = threading.Thread(target=lambda: results.append(pipo.train(settings(folder, tmp_path / "run", steps=2))))
    thread.start()
    thread.join()
    assert len(results[0]) == 2


def readme_section(title):
    """What stands under a heading of the README."""
    return README.read_text().split(f"## {title}")[1].split("\n## ")[0]


def experiment(*arguments):
    """assets/experiment.py as a user starts it."""
    command = [sys.executable, HERE / "assets" / "experiment.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_results_come_from_the_packed_runs_and_the_readme_from_the_results(tmp_path):
    """Guards against a table that nobody can make again, and a README that was not changed with it."""
    for pack in (HERE / "assets").glob("runs-*.jsonl.gz"):
        shutil.copy(pack, tmp_path)
    assert experiment("table", "--into", tmp_path).returncode == 0
    results = (HERE / "assets" / "results.md").read_text()
    assert (tmp_path / "results.md").read_text() == results
    rows = [line for line in readme_section("Results").splitlines() if line.startswith("| ") and "±" in line]
    assert len(rows) >= 12 and all(row in results for row in rows)
    speed = readme_section("Speed and memory")
    for value in json.loads((HERE / "assets" / "bench.json").read_text()).values():
        assert f" {value:.1f} " in speed or f" {value:.2f} " in speed or f"1/{value:.1f} " in speed


def test_plots_of_ones_own_runs(folder, tmp_path, graded_by_coin):
    """The command behind `make plot`, on a run that was never evaluated, and on a folder that is no run."""
    pipo.train(settings(folder, tmp_path / "run"))
    done = experiment("plot", tmp_path / "run", "--into", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pipo-curves.png").stat().st_size > 10_000 < (tmp_path / "pipo-inside.png").stat().st_size
    wrong = experiment("plot", tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "holds no step" in wrong.stderr


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
        named = [getattr(target, "id", "") for target in getattr(node, "targets", [])] or [getattr(node, "name", "")]
        if set(named) & set(names):
            decorators = [line.lineno for line in getattr(node, "decorator_list", [])]
            first = min([node.lineno, *decorators]) - 1
            exec("\n".join(source.splitlines()[first : node.end_lineno]), space)
    return space


def test_pieces_can_be_copied_as_the_readme_says():
    """Guards against a helper or an import that the README's table of pieces forgot."""
    lines = readme_section("Copying pieces").splitlines()
    rows = [[re.findall(r"`([\w.]+)`", cell) for cell in line.split("|")[1:4]] for line in lines]
    spaces = {row[0][0]: copied(row[0] + row[1], row[2]) for row in rows if len(row) == 3 and row[0]}
    assert len(spaces) >= 7
    advantages = spaces["group_advantages"]["group_advantages"](torch.tensor([[1.0, 0, 0, 1]]))
    assert torch.equal(advantages, group_advantages(torch.tensor([[1.0, 0, 0, 1]])))
    assert torch.equal(
        spaces["improvement_rewards"]["improvement_rewards"](advantages, 2.0), improvement_rewards(advantages, 2.0)
    )
    tracker = spaces["ImprovementTracker"]["ImprovementTracker"](2)
    tracker.push(0.1), tracker.push(0.2)
    assert tracker.feedback(0.3).xi > 0
    logprobs, behavior, advantages, mask = random_rows()
    loss, _ = spaces["policy_loss"]["policy_loss"](logprobs, behavior, advantages, mask)
    assert loss == policy_loss(logprobs, behavior, advantages, mask)[0]
    given = tiny_model(), [[3, 4]], torch.tensor([[5, 6]]), torch.ones(1, 2)
    assert torch.equal(spaces["token_logprobs"]["token_logprobs"](*given), token_logprobs(*given))
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = spaces["MasterAdamW"]["MasterAdamW"]([weight], "cpu", lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert (weight < 1).all()
    assert spaces["gradient_distortion"]["gradient_distortion"](0.5, 8) == gradient_distortion(0.5, 8)


def test_every_flag_has_a_meaning_and_the_readme_commands_parse():
    """README and code drift apart: every command shown must be one that the program takes."""
    help_text = subprocess.run([sys.executable, "pipo.py", "--help"], cwd=HERE, capture_output=True, text=True).stdout
    for flag in (
        "--model --dataset --eval-dataset --base --feedback --window --lam --xi-clip --steps --prompts-per-step "
        "--group-size --max-new-tokens --max-prompt-tokens --temperature --top-p --lr --pi-lr --kl-coef --minibatches "
        "--seed --device --out --resume --eval-every --save-every"
    ).split():
        assert flag + " " in help_text or flag + "\n" in help_text
    commands = re.findall(r"^python pipo\.py(.*?)(?:\s+#.*)?$", README.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 3
    for line in commands:
        if "--help" not in line:
            pipo.validate(pipo.parse(line.split()))


# ---------------------------------------------------------------------------------------------------------------------
# PIPO on top of TRL: the very block of the README, on a tiny model, in one process and in two
# ---------------------------------------------------------------------------------------------------------------------

TRL_RUNS = """
import sys
import zlib
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from pipo_trl import PIPOTrainer


def coin(completions, **_):
    return [float(zlib.crc32(completion.encode()) % 3 == 0) for completion in completions]


def trainer_of(kind, folder, out, trainer=None, **changes):
    given = dict(output_dir=str(out), max_steps=6, per_device_train_batch_size=3, gradient_accumulation_steps=2,
                 num_generations=4, max_completion_length=8, learning_rate=1e-2, lr_scheduler_type="constant",
                 logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
                 gradient_checkpointing=False)
    extra = {"plain": {}, "off": {"feedback": False}, "on": {"window": 2}}[kind]
    return (trainer or (GRPOTrainer if kind == "plain" else PIPOTrainer))(
        model=AutoModelForCausalLM.from_pretrained(Path(folder) / "model"), reward_funcs=coin,
        processing_class=AutoTokenizer.from_pretrained(Path(folder) / "model"), args=GRPOConfig(**{**given, **changes}),
        train_dataset=Dataset.from_list([{"prompt": "abcdefghijklmnopqrst"[i:i + 2 + i % 4]} for i in range(17)]),
        **extra)


def result(trainer):
    trainer.train()
    return {"rows": [{name: value for name, value in row.items() if "time" not in name and "second" not in name}
                     for row in trainer.state.log_history],
            "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()])}


def texts(trainer, batches):
    decode = trainer.processing_class.decode
    return [[decode(row, skip_special_tokens=True) for batch in batches for row in batch[name]]
            for name in ("prompt_ids", "completion_ids")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out = sys.argv[1:]
    for kind in ("plain", "off", "on"):
        trainer = trainer_of(kind, folder, out)
        ran, last = result(trainer), trainer._buffered_inputs
        if kind == "on":
            attribution = [a for batch in last for a in batch["attribution"].tolist()]
            ran["last"] = list(zip(*texts(trainer, last), attribution))
        torch.save(ran, f"{out}/{kind}{trainer.accelerator.process_index}.pt")
"""


@pytest.fixture(scope="module")
def trl_runs(tmp_path_factory):
    """The README's block as pipo_trl.py, and a script around it, in a folder; returns the script as a module."""
    pytest.importorskip("trl")
    where = tmp_path_factory.mktemp("trl")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "(GRPOTrainer)" in b)
    (where / "pipo_trl.py").write_text(block)
    (where / "trl_runs.py").write_text(TRL_RUNS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(where)
        import trl_runs

        yield trl_runs


def check_xi_by_hand(rows):
    """The logged xi and phi are the tracker's on the logged mean rewards: read before the push, one push a batch."""
    tracker = ImprovementTracker(2)
    for row in rows:
        feedback = tracker.feedback(row["pipo/mu"])
        assert math.isclose(row["pipo/mu"], row["reward"], rel_tol=1e-6)
        for name, value in (feedback._asdict() if feedback else {"xi": None}).items():
            assert row.get(f"pipo/{name}") == value
        tracker.push(row["pipo/mu"])
    return sum("pi/grad_norm" in row for row in rows)


def attribution_by_hand(prompts, texts, grade, phi):
    """The improvement rewards of shuffled rows, from their texts: the rows of a prompt are its group of 4."""
    order, coefficients = sorted(range(len(prompts)), key=lambda i: prompts[i]), torch.empty(len(prompts))
    rewards = torch.tensor(grade([texts[i] for i in order])).view(-1, 4)
    coefficients[order] = improvement_rewards(group_advantages(rewards), phi).flatten()
    return coefficients


@only_by("test-trl")
def test_trl_without_feedback_is_grpo_and_with_it_looks_back(trl_runs, folder, tmp_path):
    """Guards against a subclass that changes GRPO's own numbers, and against a verification step that is never taken.

    Accelerate's optimizer silently ignores step() while the trainer accumulates gradients: the weights must move.
    """
    plain, off, on = (
        trl_runs.result(trl_runs.trainer_of(kind, folder, tmp_path, per_device_train_batch_size=6))
        for kind in ("plain", "off", "on")
    )
    assert plain["rows"] == off["rows"] and torch.equal(plain["weights"], off["weights"])
    assert check_xi_by_hand(on["rows"][:-1]) >= 1 and not torch.equal(plain["weights"], on["weights"])


@only_by("test-trl")
@pytest.mark.parametrize("minibatches", [1, 2])
def test_gradients_of_both_trl_steps_by_hand(trl_runs, folder, tmp_path, minibatches):
    """Against policy_loss on the same rows, the rewards, groups and old log-probabilities all worked out anew.

    Guards against a replay whose ratio is 1 (TRL keeps no log-probabilities where batch and policy agree), groups lost
    in TRL's shuffle, a KL in the verification step or none in the exploration step, an exploration ratio against the
    policy after the verification step, and a step that moves nothing.
    """
    phis, samplers, steps = [], [], []

    class Watched(trl_runs.PIPOTrainer):
        def weights(self):
            return copy.deepcopy(self.model.state_dict())

        def _generate_and_score_completions(self, rows):
            samplers.append(self.weights())
            return super()._generate_and_score_completions(rows)

        def verification_step(self, previous, phi):
            phis.append((len(steps), phi, previous))
            super().verification_step(previous, phi)

        def _clip_grad_norm(self, model):
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            steps.append((gradient, self.weights(), samplers[-2:], self._buffered_inputs))
            return super()._clip_grad_norm(model)

    trainer = trl_runs.trainer_of(
        "on",
        folder,
        tmp_path,
        Watched,
        loss_type="grpo",
        per_device_train_batch_size=4,
        steps_per_generation=2 * minibatches,
        temperature=0.7,
        beta=0.05,
        use_bias_correction_kl=False,  # the KL of policy_loss, not times the ratio
        max_steps=6 * minibatches,
    )
    trainer.train()
    model, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    assert any(phi > 0 for _, phi, _ in phis) and len(steps) == (6 + len(phis)) * minibatches

    def logprobs(model, weights, prompts, tokens, mask):
        model.load_state_dict(weights)
        return token_logprobs(model, prompts, tokens, mask, 0.7)

    def check(step, sampler, batches, coefficients, kl_coef):
        """The recorded gradient of `step` is that of policy_loss on these micro-batches; returns the mean log-ratio."""
        ids, seen, tokens, mask = (
            torch.cat([b[name] for b in batches])
            for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        )
        prompts, mask = [row[row_seen == 1].tolist() for row, row_seen in zip(ids, seen)], mask.float()
        with torch.no_grad():
            behavior = logprobs(model, sampler, prompts, tokens, mask)
            ref_logprobs = token_logprobs(reference, prompts, tokens, mask, 0.7)
        gradient, weights, *_ = step
        fresh = logprobs(model, weights, prompts, tokens, mask)
        loss, means = policy_loss(
            fresh, behavior, coefficients, mask, "grpo", ref_logprobs=ref_logprobs, kl_coef=kl_coef
        )
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert torch.allclose(gradient, expected, atol=1e-5 * expected.abs().max()) and expected.abs().max() > 1e-3
        return means["logprob_gap"]

    for at, phi, previous in phis:
        coefficients = attribution_by_hand(*trl_runs.texts(trainer, previous), trl_runs.coin, phi)
        for k in range(minibatches):
            verification, exploration = steps[at + k], steps[at + minibatches + k]
            (before, sampler), fresh = exploration[2:]
            own = slice(2 * k, 2 * k + 2)
            assert check(verification, before, previous[own], coefficients[8 * k : 8 * k + 8], 0.0) > 0.01
            advantages = torch.cat([b["advantages"] for b in fresh[own]])
            assert check(exploration, sampler, fresh[own], advantages, 0.05) > 0.001


@only_by("test-trl")
def test_update_takes_the_gradient_of_trl(trl_runs, folder, tmp_path):
    """Another implementation as oracle: TRL computes all rows in one padded batch, `update` drops, sorts and splits."""
    seen = []

    class Watched(trl_runs.GRPOTrainer):
        def _clip_grad_norm(self, model):
            seen.append((torch.cat([p.grad.flatten() for p in model.parameters()]), self._buffered_inputs))
            return super()._clip_grad_norm(model)

    whole = dict(per_device_train_batch_size=16, gradient_accumulation_steps=1, max_steps=1, loss_type="grpo", beta=0.0)
    trl_runs.trainer_of("plain", folder, tmp_path, Watched, **whole).train()
    (gradient, (rows,)) = seen[0]
    order = sorted(range(16), key=lambda i: (rows["prompt_ids"][i].tolist(), i))  # TRL shuffles the rows of a batch
    prompts = [rows["prompt_ids"][i][rows["prompt_mask"][i] == 1].tolist() for i in order]
    tokens, mask = rows["completion_ids"][order], rows["completion_mask"][order].float()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    behavior = token_logprobs(model, prompts, tokens, mask).detach()
    advantages = rows["advantages"][order].view(4, 4)
    batch = pipo.Batch(prompts, tokens, mask, behavior, mask[:, 0] > 0, [""] * 16)
    cfg = Config(temperature=1.0, microbatch_tokens=40, max_grad_norm=1e9)
    _, ours = gradient_of(lambda optimizer: pipo.update(model, optimizer, batch, advantages, cfg, 0.0), model)
    assert gradient.abs().max() > 1e-3 and torch.allclose(ours, gradient, atol=1e-6, rtol=1e-4)


@only_by("test-trl")
def test_trl_ranks_agree(trl_runs, folder, tmp_path):
    """Two processes, a group across both: guards against a xi of each rank's own rewards, which ends in a deadlock.

    Also against gradients that DDP does not average while the trainer accumulates (the ranks' weights would part), and
    against attribution of another rank's rows. (--multi_gpu: accelerate's --cpu starts one process; the runs themselves
    ask for the CPU.)
    """
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, trl_runs.__file__, folder, tmp_path],
        env={**os.environ, "PYTHONPATH": f"{HERE}:{Path(trl_runs.__file__).parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    plain, off, on = ([torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1)] for kind in ("plain", "off", "on"))
    for first, second in (plain, off, on):
        assert torch.equal(first["weights"], second["weights"])
    assert plain[0]["rows"] == off[0]["rows"] and torch.equal(plain[0]["weights"], off[0]["weights"])
    for one, other in zip(on[0]["rows"], on[1]["rows"], strict=True):
        assert all(one[name] == other[name] for name in one if name.startswith("pipo/"))
    assert check_xi_by_hand(on[0]["rows"][:-1]) == check_xi_by_hand(on[1]["rows"][:-1]) >= 1
    assert not torch.equal(plain[0]["weights"], on[0]["weights"])
    prompts, texts, attribution = zip(*on[0]["last"], *on[1]["last"])
    assert torch.allclose(torch.tensor(attribution), attribution_by_hand(prompts, texts, trl_runs.coin, 1.0))
    assert set(prompts[:6]) & set(prompts[6:]) and any(attribution[:6]) and any(attribution[6:])


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory against transformers' generate and TRL: `make bench`. Needs TRL, is not part of `make test`, and no
# speed is a failure. Both sides run in this process, on one thread, in fp32, from the same weights, with the same
# prompts, rewards and learning rate; they take turns, the first is warm-up, and medians are compared. What changes
# memory only is set to suit each side: TRL's micro-batch is its fastest, and PIPO's cache has room for all rows.
# ---------------------------------------------------------------------------------------------------------------------

BENCH = {"short": (32, 9), "long": (256, 3)}  # longest completion, counted turns
Q, G = 32, 8
CPU_CLOCK = time.process_time  # on one thread the wall clock of an idle machine; neighbours on a busy one do not count


def bench_config(limit, vocabulary=512, **sizes):
    """A model of the demo's size that, at random and so near uniform, draws an EOS as likely at every token.

    It takes many EOS ids: completions then average 0.37 to 0.4 of `limit`, which cuts a tenth of them off.
    """
    demo = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, head_dim=32)
    eos = list(range(1, 1 + round(2.3 * vocabulary / limit)))
    demo.update(num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0)
    return Qwen3Config(vocab_size=vocabulary, eos_token_id=eos, **{**demo, **sizes})


def bench_folder(folder, limit):
    """The model and a tokenizer with a character for each id, so that TRL's text prompts come back as the same ids."""
    torch.manual_seed(0)
    Qwen3ForCausalLM(bench_config(limit)).save_pretrained(folder)
    letter_tokenizer([chr(0x4E00 + i) for i in range(2, 512)]).save_pretrained(folder)
    return str(folder)


def bench_prompts():
    """Q prompts of 5 to 20 tokens, none of them an EOS."""
    draw = random.Random(0)
    return [[draw.randrange(100, 512) for _ in range(draw.randint(5, 20))] for _ in range(Q)]


def bench_rewards(kind):
    """(Q, G) by position, not by text. alive: every group mixed; typical: 13 of 32 groups have equal rewards."""
    rewards = (torch.arange(Q * G) % G % 3 == 0).float().view(Q, G)
    if kind == "typical":
        rewards[1::5], rewards[3::5] = 0.0, 1.0
    return rewards


def generate(model, prompts, group_size, limit, **options):
    """transformers' generate on padded prompts, as TRL calls it: tokens (N, T), 0 behind the EOS."""
    rows, width = [p for p in prompts for _ in range(group_size)], max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in rows], device=model.device)
    return model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=limit, **options)[:, width:]


def bench_sampling(ours, theirs, tokenizer, prompts, limit, turns, clock):
    """Median seconds and mean completion length of pipo.sample and of generate."""
    seconds, lengths, eos = ([], []), ([], []), torch.tensor(theirs.generation_config.eos_token_id)
    for turn in range(turns + 1):
        torch.manual_seed(turn)
        times = [clock()]
        batch = sample(ours, tokenizer, prompts, G, limit, 1.0, 1.0, pipo.rng(ours.device, turn), 10**6)
        lengths[0].append(batch.mask.sum(1).mean().item())  # .item() and .cpu() also wait for a GPU
        times.append(clock())
        tokens = generate(theirs, prompts, G, limit, do_sample=True, temperature=1.0, top_k=0, top_p=1.0).cpu()
        times.append(clock())
        ended = torch.isin(tokens, eos)
        lengths[1].append(torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1]).float().mean().item())
        for side in (0, 1):
            seconds[side].append(times[side + 1] - times[side])
    return [statistics.median(x[1:]) for x in seconds], [statistics.mean(x[1:]) for x in lengths]


class TimedPIPO:
    """PIPO's iterations with a clock on each phase. A GRPO iteration is the same without the verification.

    Rewards are made up on both sides, so that neither has grading in it: it takes milliseconds.
    """

    def __init__(self, model, tokenizer, prompts, rewards, cfg, clock=CPU_CLOCK):
        self.model, self.tokenizer, self.prompts, self.rewards, self.cfg = model, tokenizer, prompts, rewards, cfg
        self.optimizer, self.clock = pipo.make_optimizer(model, cfg), clock
        self.previous, self.seconds, self.lengths, self.metrics = None, [], [], {}

    def step(self):
        """One iteration: sample, verify on the batch before (there is none in the first, the warm-up), explore."""
        times, cfg, generator = [self.clock()], self.cfg, pipo.rng(self.model.device, len(self.seconds))
        batch = sample(self.model, self.tokenizer, self.prompts, G, cfg.max_new_tokens, 1.0, 1.0, generator,
                       cfg.cache_tokens)
        batch.advantages = group_advantages(self.rewards)
        times.append(self.clock())
        if self.previous is not None:
            again = improvement_rewards(self.previous.advantages, 0.5)
            pipo.update(self.model, self.optimizer, self.previous, again, cfg, cfg.lr)
        times.append(self.clock())
        self.metrics = pipo.update(self.model, self.optimizer, batch, batch.advantages, cfg, cfg.lr)
        times.append(self.clock())
        self.previous = batch
        self.seconds.append([b - a for a, b in zip(times, times[1:])])
        self.lengths.append(batch.mask.sum(1).mean().item())

    def median(self, *phases):
        """Median seconds of these phases together: 0 sampling, 1 verification, 2 exploration."""
        return statistics.median(sum(row[i] for i in phases) for row in self.seconds[1:])


def bench_trl(path, limit, rewards, steps_each, turns, out):
    """TRL's GRPO with `steps_each` optimizer steps a generation, in turns with PIPO.

    Returns its median seconds from generation to the last step, its mean completion length, and our side.
    """
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    cfg = Config(prompts_per_step=Q, group_size=G, max_new_tokens=limit, temperature=1.0, lr=1e-6,
                 cache_tokens=10**6, microbatch_tokens=2048)
    ours = TimedPIPO(pipo.load_model(path, torch.device("cpu")), AutoTokenizer.from_pretrained(path), bench_prompts(),
                     rewards, cfg)
    seconds, lengths = [], []
    texts = [ours.tokenizer.decode(prompt) for prompt in ours.prompts]
    assert ours.tokenizer(texts).input_ids == ours.prompts

    def reward(completion_ids, **_):
        lengths.append(statistics.mean(map(len, completion_ids)))
        return rewards.flatten().tolist()

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = CPU_CLOCK()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % steps_each == 0:
                seconds.append(CPU_CLOCK() - self.start)
                ours.step()
                self.start = CPU_CLOCK()

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), reward_funcs=reward,
        processing_class=ours.tokenizer, callbacks=[Turns()],
        train_dataset=pipo.datasets.Dataset.from_dict({"prompt": texts * (turns + 1)}),
        args=GRPOConfig(
            output_dir=str(out), max_steps=steps_each * (turns + 1), num_iterations=steps_each, num_generations=G,
            per_device_train_batch_size=32, gradient_accumulation_steps=Q * G // 32, max_completion_length=limit,
            temperature=1.0, loss_type="grpo", beta=0.0, learning_rate=1e-6, lr_scheduler_type="constant",
            weight_decay=ours.cfg.weight_decay, shuffle_dataset=False, gradient_checkpointing=False, bf16=False,
            use_cpu=True, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert len(seconds) == len(ours.seconds) == turns + 1
    return statistics.median(seconds[1:]), statistics.mean(lengths[1:]), ours


# In a process of its own, because the peak of a process never falls. H is small, so that the logits dominate.
LOGPROB_MEMORY = """
import sys, torch, pipo
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.set_num_threads(1)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1, head_dim=32))
tokens = torch.randint(2, 151936, (8, 256))                                 # 2,048 tokens: logits of 1.2 GB
before = pipo.peak_memory_gb(model.device)
if sys.argv[1] == "chunked":
    logprobs = pipo.token_logprobs(model, [[7]] * 8, tokens, torch.ones(8, 256))
else:
    ids = torch.cat([torch.full((8, 1), 7), tokens[:, :-1]], 1)
    logprobs = model(ids, use_cache=False).logits.log_softmax(-1).gather(-1, tokens[..., None])
logprobs.mean().backward()
print(pipo.peak_memory_gb(model.device) - before)
"""


def logprob_memory(kind):
    """GB that the log-probabilities of 2,048 tokens and their gradient take at Qwen3's vocabulary."""
    command = [sys.executable, "-c", LOGPROB_MEMORY, kind]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(pipo.__file__).parent).stdout)


def bench_4b(show, tmp_path, device="cuda", limit=4096, prompts=128, **sizes):
    """A random Qwen3-4B on a GPU: tokens a second against generate, and the phases of one whole PIPO iteration.

    Lengths average about 0.38 of the limit, as above. Peak memory and the gap between sampler and trainer go along.
    """
    sizes = sizes or dict(QWEN3_4B, max_position_embeddings=8192, vocabulary=151936)
    device, asked = torch.device(device), [[1000 + i] * 128 for i in range(prompts)]
    cfg = Config(prompts_per_step=prompts, max_new_tokens=limit, max_prompt_tokens=128, temperature=1.0, save_every=0)
    with torch.device("meta"):
        cfg, table = pipo.plan_memory(Qwen3ForCausalLM(bench_config(limit, **sizes)), cfg, device, tmp_path)
    print(table)

    def random_model(limit, attention):
        torch.manual_seed(0)
        with device:
            model = Qwen3ForCausalLM._from_config(bench_config(limit, **sizes), dtype=getattr(torch, cfg.dtype)).eval()
        model.set_attn_implementation(attention)
        return model

    for n in (64, 256):
        both = random_model(limit // 8, "shared_heads"), random_model(limit // 8, "sdpa")
        seconds, lengths = bench_sampling(*both, letter_tokenizer(), asked[: n // G], limit // 8, 3, time.perf_counter)
        rates = [n * length / s for length, s in zip(lengths, seconds)]
        show(f"tokens a second, 4B, {n} rows", *rates, f"gpu_tokens_{n}", rates[0] / rates[1], lengths)
        del both
    model = random_model(limit, "shared_heads")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rewards = (torch.arange(prompts * G, device=device) % 3 == 0).float().view(-1, G)
    pipo_run = TimedPIPO(model, letter_tokenizer(), asked, rewards, cfg, time.perf_counter)
    pipo_run.step(), pipo_run.step()
    figures = {"sampling": pipo_run.median(0), "verification": pipo_run.median(1), "exploration": pipo_run.median(2),
               "peak_gb": pipo.peak_memory_gb(device), "logprob_gap": pipo_run.metrics["logprob_gap"]}
    for name, value in figures.items():
        show(f"4B, {prompts} x {G}: {name}", value, math.nan, f"gpu_iteration_{name}", value, pipo_run.lengths[1:])


@only_by("bench")
def test_bench(tmp_path):
    """Prints a table, writes runs/bench.json. Ratios are theirs over ours: above 1 PIPO is faster or smaller."""
    torch.set_num_threads(1)
    pipo.transformers_logging.disable_progress_bar()
    ratios = {}

    def show(what, ours, theirs, key, ratio, lengths=()):
        ratios[key] = ratio
        print(f"{what:46}{ours:9.3f}{theirs:9.3f}{ratio:8.2f}   {'  '.join(f'{x:.1f}' for x in lengths)}", flush=True)

    prompts = [[random.Random(i).randrange(2, 28) for _ in range(1 + i % 7)] for i in range(24)]
    greedy = sample(tiny_model(), letter_tokenizer(), prompts, 1, 24, temperature=0)
    assert greedy.tokens.tolist() == generate(tiny_model(), prompts, 1, 24, do_sample=False).tolist()
    assert greedy.mask.sum(1).unique().numel() > 3

    print(f"\n{'seconds (or GB)':46}{'ours':>9}{'theirs':>9}{'ratio':>8}   mean lengths")
    plain, chunked = map(logprob_memory, ("plain", "chunked"))
    show("GB for log-probabilities, against all at once", chunked, plain, "logprob_memory_ratio", plain / chunked)
    for size, (limit, turns) in BENCH.items():
        path, looks_back = bench_folder(tmp_path / size, limit), []
        ours = pipo.load_model(path, torch.device("cpu"))
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        seconds, lengths = bench_sampling(
            ours, theirs, AutoTokenizer.from_pretrained(path), bench_prompts(), limit, turns, CPU_CLOCK)
        show(f"sampling, {size}", *seconds, f"sampling_{size}", seconds[1] / seconds[0], lengths)
        for kind in ("alive", "typical"):
            for k, word in ((1, "one"), (2, "two")):
                trl, length, ours = bench_trl(path, limit, bench_rewards(kind), k, turns, tmp_path / "trl")
                rows, lengths = [(f"PIPO against {word} of TRL's steps", f"pipo_vs_{word}", ours.median(0, 1, 2))], (
                    statistics.mean(ours.lengths[1:]), length)
                if k == 1:
                    rows.insert(0, ("GRPO against GRPO", "grpo", ours.median(0, 2)))
                for what, key, mine in rows:
                    show(f"{what}, {size}, {kind}", mine, trl, f"{key}_{size}_{kind}", trl / mine, lengths)
                if kind == "alive":  # both on the same batch, which is explored first and verified an iteration later
                    looks_back += [after[1] / row[2] for row, after in zip(ours.seconds[1:], ours.seconds[2:])]
                    both = ours.median(1), ours.median(2)
        ratio = statistics.median(looks_back)
        show(f"verification and exploration, both ours, {size}", *both, f"verify_over_explore_{size}", ratio)
    if torch.cuda.is_available():
        bench_4b(show, tmp_path)
    (HERE / "runs").mkdir(exist_ok=True)
    (HERE / "runs" / "bench.json").write_text(json.dumps(ratios, indent=2) + "\n")
