#!/usr/bin/env python3
"""PIPO, GRPO and controls on the demo's task, from one warm start.

    python assets/experiment.py run                 # -> assets/runs-<condition>.jsonl.gz; can be interrupted
    python assets/experiment.py table               # what they came to -> assets/results.md, results.json
    python assets/experiment.py figures             # -> assets/*.png
    python assets/experiment.py plot RUN [RUN ...]  # your own run folders -> pipo-curves.png, pipo-inside.png

`table` and `figures` need the packed runs only. `--into DIR` puts, and looks for, everything in another
folder: to repeat the experiment beside the one kept here. All arms of a seed see the same prompts in the same
order (pipo draws them by seed and step alone), so arms are compared in pairs.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two runs side by side, each on a core of its own
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from the hub

import argparse
import copy
import gzip
import hashlib
import json
import math
import multiprocessing
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # pipo is imported where it is needed: plots of runs start without torch

# ------------------------------------------------------------------------------------------------------------
# What is compared. SAFE_LR and EDGE_LR were chosen by eye from the sweep's table, before any other arm ran.
# ------------------------------------------------------------------------------------------------------------

STEPS = 60
PROBE_LENGTH = 2  # times STEPS
SEEDS, SWEEP_SEEDS = 8, 3
SWEEP = (5e-5, 1e-4, 2e-4, 2.5e-4, 3e-4, 4e-4, 8e-4)
SAFE_LR = 1e-4  # half of the highest rate at which GRPO still learns as well as it does here
EDGE_LR = 3e-4  # above it, runs first fall far below the start, or never come back
WINDOW = 8  # K, the paper's
PROBE_PROBLEMS = 1024
WORKERS = 2

ARMS = {
    "grpo": dict(feedback="none"),
    "pipo": dict(feedback="pipo", lam=0.1),
    "pipo-lam0": dict(feedback="pipo", lam=0.0),
    "pipo-lam1": dict(feedback="pipo", lam=1.0),
    "constant": dict(feedback="constant", constant=0.43),
    "shuffled": dict(feedback="shuffled", lam=0.1),
    "grpo-2": dict(feedback="none", epochs=2),
}
# What xi without noise would bring, and the constant that it is on steady progress (perfect_xi).
ORACLES = {
    "constant-1.84": dict(feedback="constant", constant=1.84),
    "oracle": dict(feedback="pipo", lam=0.1, told="truth"),
    "oracle-lam1": dict(feedback="pipo", lam=1.0, told="truth"),
}
KNOBS = {  # of the paper and of its first version
    "pipo-K4": dict(feedback="pipo", lam=0.1, window=4),
    "pipo-K16": dict(feedback="pipo", lam=0.1, window=16),
    "pipo-v1": dict(feedback="pipo", lam=0.0, xi_clip=0.5),
    "pipo-v1-lam1": dict(feedback="pipo", lam=1.0, xi_clip=0.5),
}
# Is the second step its own momentum? Both of PIPO's steps share one AdamW, so that the second is first of
# all another step along the mean of the gradients before. The factors are its learning rate's, over --lr,
# chosen by the table of "rates": a step without momentum is a larger one.
FACTORS = (1.0, 0.3, 0.1)
OWN_FACTOR, B0_FACTOR = 0.3, 0.3
KINDS = {"own": dict(second="own moments", pi_factor=OWN_FACTOR),
         "b0": dict(second="beta1 0", pi_factor=B0_FACTOR)}
BACK = {f"{arm}-{kind}{end}": ARMS[arm + end] | own for kind, own in KINDS.items()
        for arm, end in (("pipo", ""), ("constant", ""), ("pipo", "-lam1"))}
MOMENTUM = {
    "grpo": ARMS["grpo"],
    **{arm: ARMS[arm] | dict(second="adamw") for arm in ("pipo", "constant")},
    "tick": ARMS["pipo"] | dict(second="tick"),
    "tick-always": ARMS["pipo"] | dict(second="tick always"),
} | BACK
WATCHED = {  # where updates do harm
    **{arm: ARMS[arm] for arm in ("grpo", "pipo", "pipo-lam1", "constant", "shuffled")},
    "oracle": ORACLES["oracle"],
    "roll-back": dict(feedback="none", roll_back=-2.0),
}
MIXED = {
    "grpo": ARMS["grpo"],
    "pipo": ARMS["pipo"] | dict(measured=512),
    "pipo-paired": ARMS["pipo"] | dict(measured=512, told="paired"),
    "constant": ARMS["constant"],
    "oracle": ORACLES["oracle"],
}
# condition -> common settings, arms (the first is what the others are held against)
CONDITIONS = {
    "sweep": ({}, {f"lr{lr:g}": dict(feedback="none", lr=lr) for lr in SWEEP}),
    "safe": (dict(lr=SAFE_LR), ARMS | ORACLES | KNOBS),
    "again": (dict(lr=SAFE_LR), {arm: ARMS[arm] for arm in ("grpo", "pipo", "constant", "shuffled", "grpo-2")}),
    "probe": (dict(lr=SAFE_LR, eval_every=1, prompts_per_step=32), {"pipo": ARMS["pipo"]}),
    "noisy": (dict(lr=SAFE_LR, reward_noise=0.1), ARMS),
    "edge": (dict(lr=EDGE_LR), ARMS | ORACLES),
    "gspo": (dict(lr=SAFE_LR, base="gspo"),
             {"gspo": ARMS["grpo"], "pipo": ARMS["pipo"], "constant": ARMS["constant"]}),
    "inverted": (dict(lr=SAFE_LR, sabotage="inverted", measured=256), WATCHED),
    "tenfold": (dict(lr=SAFE_LR, sabotage="tenfold", measured=256), WATCHED),
    "mixed": (dict(lr=SAFE_LR, task="mixed", max_new_tokens=64), MIXED),
    "rates": (dict(lr=SAFE_LR), {f"pipo-{kind}-x{factor:g}": ARMS["pipo"] | own | dict(pi_factor=factor)
                                 for kind, own in KINDS.items() for factor in FACTORS}),
    "momentum": (dict(lr=SAFE_LR), MOMENTUM),
    "momentum-edge": (dict(lr=EDGE_LR), MOMENTUM),
    **{f"momentum-{kind}": (dict(lr=SAFE_LR, sabotage=kind, measured=256), MOMENTUM)
       for kind in ("inverted", "tenfold")},
}
OTHER_SEEDS = {"sweep": range(SWEEP_SEEDS), "rates": range(SWEEP_SEEDS),
               "again": range(SEEDS, 2 * SEEDS)}  # all others have range(SEEDS)


def wanted(args) -> list[dict]:
    """The jobs in the order in which they are worth having: by condition, then by seed, then by arm."""
    jobs = []
    for condition in args.only:
        common, arms = CONDITIONS[condition]
        steps = round(args.steps * (PROBE_LENGTH if condition == "probe" else 1))
        settings = dict(base="grpo", steps=steps, prompts_per_step=16, window=WINDOW, eval_every=10) | common
        jobs += [dict(condition=condition, arm=arm, seed=seed, settings=settings | own)
                 for seed in OTHER_SEEDS.get(condition, range(SEEDS))[:args.seeds]
                 for arm, own in arms.items() if not args.arms or arm in args.arms]
    return jobs


# ------------------------------------------------------------------------------------------------------------
# Variants. What only this experiment needs, as wrappers around pipo.iteration, switched on by settings that
# are none of pipo's own (`feedback` is pipo's, but for one value):
#   feedback  "shuffled": the verification step has the phi of a xi drawn from the run's earlier ones
#   reward_noise  share of the training rewards that is flipped
#   told      "truth": the tracker hears J(theta_t) in place of mu_t; "paired": mu_t less the luck of the draw
#   measured  every row has J(theta_t), on so many problems, the worked solutions' part of it
#   sabotage  at a tenth of the steps exploration does harm: "inverted" advantages, or "tenfold" learning rate
#   roll_back below this xi, the weights and moments of the step before come back
#   task      "mixed": additions of one to five digits in place of the demo's
#   second    the verification step: "adamw", pipo's own, watched; "tick": a step with a gradient of zero;
#             "tick always": the same from the first full window on, whatever phi; "own moments": a step of an
#             AdamW of its own; "beta1 0": along the gradient in place of the mean of gradients
#   pi_factor its learning rate over --lr
# ------------------------------------------------------------------------------------------------------------

VARIANTS = ("reward_noise", "told", "measured", "sabotage", "roll_back", "task", "second", "pi_factor")


def true_reward(run, problems, worked: list[list[int]], cfg, whole: bool = True) -> float:
    """J(theta) on these problems: the probability of the worked solution, and the rest, sampled.

    The first part is exact and nearly all of J; what chance is left is that of the rest (only if `whole`):
    0.4 points for 512 problems and 1 % of such answers, where 4,096 plain samples have 0.7. The random numbers
    are always the same.
    """
    import pipo
    import torch
    prompts, exact = [problem.prompt for problem in problems], 0.0
    with torch.no_grad():
        for i in range(0, len(prompts), 128):
            tokens = pipo.padded(worked[i:i + 128], "cpu")  # (n, T)
            mask = pipo.padded([[1.0] * len(row) for row in worked[i:i + 128]], "cpu")  # (n, T)
            logprobs = pipo.token_logprobs(run.model, prompts[i:i + 128], tokens, mask)  # (n, T)
            exact += logprobs.sum(1).exp().sum().item()
    if not whole:
        return exact / len(prompts)
    generator = pipo.rng("cpu", "J")
    batch = pipo.sample(run.model, run.tokenizer, prompts, 1, cfg.max_new_tokens, generator=generator)
    right = pipo.grade_all(batch, problems)[0].flatten().tolist()
    rest = [reward for reward, mask, tokens, solution in zip(right, batch.mask, batch.tokens.tolist(), worked)
            if tokens[:int(mask.sum())] != solution]
    return (exact + sum(rest)) / len(prompts)


@contextmanager
def in_place(**functions):
    """Meanwhile these stand in place of pipo's functions of the same names."""
    import pipo
    kept = {name: getattr(pipo, name) for name in functions}
    try:
        vars(pipo).update(functions)
        yield
    finally:
        vars(pipo).update(kept)


def telling(tracker) -> dict:
    """Let a tracker hear what is put into the dict returned, as "mu", in place of the batch's mean reward."""
    told, feedback, push = {}, tracker.feedback, tracker.push
    tracker.feedback = lambda mu: feedback(told["mu"])
    tracker.push = lambda mu: push(told["mu"])
    return told


def measured(iteration, rows: list[dict], tell: bool):
    """An iteration that begins by measuring J on `rows`; `tell`: the tracker hears it."""
    import pipo
    kept = {}

    def wrapped(run, problems, cfg):
        if not kept:
            kept["problems"] = pipo.read_problems(rows, run.tokenizer, cfg, "measured")
            kept["worked"] = [run.tokenizer(row["worked"]).input_ids + [run.tokenizer.eos_token_id]
                              for row in rows]
            kept["told"] = telling(run.tracker) if tell else {}
        J = kept["told"]["mu"] = true_reward(run, kept["problems"], kept["worked"], cfg, whole=tell)
        batch, row = iteration(run, problems, cfg)
        return batch, row | {"J": J}

    return wrapped


class Paired:
    """mu without the luck of which prompts were drawn: each reward is held against the rate of its class.

    mu - mean rate of the classes drawn + mean rate of all classes: unbiased whatever the rates are, as these
    come from earlier batches alone, of which each counts nine tenths of the next.
    """

    def __init__(self, classes):
        self.right, self.asked = {c: 0.5 for c in classes}, {c: 1.0 for c in classes}

    def __call__(self, means: list[float], classes: list) -> float:
        """The mean reward of each group and its class -> mu; then the rates take them in."""
        rate = {c: self.right[c] / self.asked[c] for c in self.asked}
        luck = np.mean([rate[c] for c in classes]) - np.mean(list(rate.values()))
        for c in self.asked:
            found = [mean for mean, own in zip(means, classes) if own == c]
            self.right[c] = 0.9 * self.right[c] + sum(found)
            self.asked[c] = 0.9 * self.asked[c] + len(found)
        return float(np.mean(means) - luck)


def paired(iteration):
    """An iteration whose tracker hears Paired's mu; classes are the digits of the first number."""
    import pipo
    grade_all, pairing, told = pipo.grade_all, Paired(range(1, MIXED_DIGITS + 1)), {}

    def graded(batch, problems, *given):
        rewards, failures = grade_all(batch, problems, *given)  # (Q, G)
        digits = [problem.text.index("+") for problem in problems]
        told["tracker"]["mu"] = told["paired_mu"] = pairing(rewards.mean(1).tolist(), digits)
        return rewards, failures

    def wrapped(run, problems, cfg):
        if not told:
            told["tracker"] = telling(run.tracker)
        with in_place(grade_all=graded):
            batch, row = iteration(run, problems, cfg)
        return batch, row | {"paired_mu": told["paired_mu"]}

    return wrapped


def noisy(iteration, share: float):
    """An iteration in whose batch a share of the rewards is flipped, the same ones whatever the feedback."""
    import pipo
    import torch
    grade_all = pipo.grade_all

    def wrapped(run, problems, cfg):
        def graded(*given):
            rewards, failures = grade_all(*given)  # (Q, G)
            noise = torch.rand(rewards.shape, generator=pipo.rng("cpu", cfg.seed, "noise", run.step))  # (Q, G)
            return torch.where(noise < share, 1 - rewards, rewards), failures

        with in_place(grade_all=graded):  # held-out problems are graded outside of iterations
            return iteration(run, problems, cfg)

    return wrapped


def shuffled(iteration):
    """An iteration with the phi of an earlier xi of the run: the right sizes at the wrong times."""
    import pipo
    import torch
    coefficient, past = pipo.feedback_coefficient, []

    def drawn(feedback, run, cfg):
        if feedback is None:
            return coefficient(feedback, run, cfg)
        past.append(feedback.xi)
        if len(past) == 1:
            return 0.0, "warmup"
        place = torch.randint(len(past) - 1, (), generator=pipo.rng("cpu", cfg.seed, "xi", run.step))
        xi = past[int(place)]
        return coefficient(feedback._replace(xi=xi, phi=run.tracker.phi(xi)), run, cfg)

    def wrapped(run, problems, cfg):
        with in_place(feedback_coefficient=drawn):
            return iteration(run, problems, cfg)

    return wrapped


def harmful_steps(seed: int, steps: int) -> list[int]:
    """The steps at which updates do harm: a tenth, from the first that has a xi on, the same for all arms."""
    places = range(WINDOW + 1, steps - 2)
    return sorted(random.Random(seed).sample(places, min(len(places), steps // 10)))


def sabotaged(iteration, kind: str, harmful: list[int]):
    """An iteration whose exploration does harm at some steps; the batch keeps the advantages it had."""
    import pipo
    advantages = pipo.group_advantages

    def wrapped(run, problems, cfg):
        harm, inverted = run.step + 1 in harmful, kind == "inverted"
        if harm and not inverted:
            cfg = replace(cfg, lr=10 * cfg.lr, pi_lr=cfg.pi_lr or cfg.lr)
        with in_place(group_advantages=lambda *given: -advantages(*given)) if harm and inverted else nullcontext():
            batch, row = iteration(run, problems, cfg)
        return batch, row | {"harm": int(harm)}

    return wrapped


def rolling_back(iteration, below: float):
    """An iteration after which, where xi fell below this, all is as before the step that xi judges.

    The batch that showed it was drawn by the model given up: it is not trained on, nor is its reward kept. The
    window is one short then, so that the step after is not judged.
    """
    kept = {}

    def wrapped(run, problems, cfg):
        now = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
        batch, row = iteration(run, problems, cfg)
        bad = row["xi"] is not None and row["xi"] < below
        if bad:
            weights, moments = copy.deepcopy(kept["before"])
            run.model.load_state_dict(weights)
            run.optimizer.load_state_dict(moments)
            run.tracker.history.pop()
        else:
            kept["before"] = now
        return batch, row | {"rolled_back": int(bad)}

    return wrapped


def favour(model, batch, cfg) -> float:
    """How far the policy favours a batch's better samples: the mean of a_i times a token's log-probability.

    a_i is A_i scaled to a mean size of 1, and a sample's tokens are averaged first: the direction in which
    GRPO's gradient on the batch points, whatever phi.
    """
    import pipo
    import torch
    weights = pipo.improvement_rewards(batch.advantages, 1.0).flatten()  # (N,)
    rows = weights.nonzero().flatten()  # (n,) those of mixed groups
    prompts, mask = [batch.prompts[i] for i in rows.tolist()], batch.mask[rows]
    with torch.no_grad():
        logprobs = pipo.token_logprobs(model, prompts, batch.tokens[rows], mask, cfg.temperature)  # (n, T)
    return float((weights[rows] * logprobs.sum(1) / mask.sum(1).clamp(min=1)).sum() / len(weights))


def tick(optimizer, lr: float) -> None:
    """An optimizer step with a gradient of zero: moments decay, weights move along them and decay."""
    import torch
    for group in optimizer.param_groups:
        group["lr"] = lr
    for weight in optimizer.weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def without_momentum(optimizer):
    """AdamW's steps go along the gradient g in place of the mean of gradients m.

    m is left as it was. v, and the count of steps in the bias corrections, go on as ever: m's correction is
    then a little too near 1 at first, by 6 % at the tenth step.
    """
    betas = [group["betas"] for group in optimizer.param_groups]
    means = {master: moments["exp_avg"].clone() for master, moments in optimizer.state.items()}
    for group in optimizer.param_groups:
        group["betas"] = 0.0, group["betas"][1]
    yield
    for group, own in zip(optimizer.param_groups, betas):
        group["betas"] = own
    for master, mean in means.items():
        optimizer.state[master]["exp_avg"].copy_(mean)


@contextmanager
def undone(model, optimizer):
    """What is done to weights and moments meanwhile is taken back."""
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    yield
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])


def second_step(iteration, kind: str):
    """An iteration with another verification step and, where phi < 0, with what that did.

    `pi_gain` is the change of B_{t-1}'s favour by the step, `tick_gain` that by a tick of the same optimizer in
    its place. The time it takes to measure them is left out of the row's seconds.
    """
    import pipo
    update, own = pipo.update, []

    def wrapped(run, problems, cfg):
        lr, row, taken = cfg.pi_lr or cfg.lr, dict(pi_gain=None, tick_gain=None, watching=0.0), []
        if kind == "own moments" and not own:
            own.append(pipo.MasterAdamW(run.model.parameters(), "cpu", lr=lr, weight_decay=cfg.weight_decay))
        optimizer = own[0] if own else run.optimizer
        momentum = without_momentum if kind == "beta1 0" else nullcontext

        def favoured(before=0.0):
            return favour(run.model, run.previous, cfg) - before

        def verify(*given, **options):
            taken.append(True)
            with momentum(optimizer):
                if kind.startswith("tick"):
                    return tick(optimizer, lr) or {}
                return update(run.model, optimizer, run.previous, *given, **options)

        def watched(coefficients, *given, **options):
            if (coefficients * run.previous.advantages).sum() >= 0:  # phi > 0
                return verify(coefficients, *given, **options)
            clock = [pipo.time.perf_counter()]
            before = favoured()
            with undone(run.model, optimizer), momentum(optimizer):
                tick(optimizer, lr)
                row["tick_gain"] = favoured(before)
            clock.append(pipo.time.perf_counter())
            metrics = verify(coefficients, *given, **options)
            clock.append(pipo.time.perf_counter())
            row["pi_gain"] = favoured(before)
            clock.append(pipo.time.perf_counter())
            row["watching"] = clock[1] - clock[0] + clock[3] - clock[2]
            return metrics

        def chosen(model, optimizer, batch, *given, **options):
            if batch is run.previous:
                return watched(*given, **options)
            if kind == "tick always" and len(run.tracker.history) == cfg.window and not taken:
                verify()
            return update(model, optimizer, batch, *given, **options)

        with in_place(update=chosen):
            batch, found = iteration(run, problems, cfg)
        found["seconds_verification"] -= row.pop("watching")
        return batch, found | row

    return wrapped


def with_variants(iteration, settings: dict, seed: int, folder: Path):
    """pipo.iteration with what the settings of a run change of it; the outermost wrapper comes last."""
    if settings.get("reward_noise"):
        iteration = noisy(iteration, settings["reward_noise"])
    if settings["feedback"] == "shuffled":
        iteration = shuffled(iteration)
    if settings.get("second"):
        iteration = second_step(iteration, settings["second"])
    if settings.get("sabotage"):
        iteration = sabotaged(iteration, settings["sabotage"], harmful_steps(seed, settings["steps"]))
    if settings.get("told") == "paired":
        iteration = paired(iteration)
    tell = settings.get("told") == "truth"
    if size := 512 if tell else settings.get("measured"):
        iteration = measured(iteration, read_rows(folder / "probe.jsonl")[:size], tell)
    if settings.get("roll_back"):
        iteration = rolling_back(iteration, settings["roll_back"])
    return iteration


MIXED_DIGITS, MIXED_ROWS = 5, 3000  # a class


def mixed_rows() -> tuple[list[dict], ...]:
    """Additions of one to five digits, as many of each: evaluation and probe, warm start, training.

    Pairs of short numbers are few: evaluation has a fifth of them for itself, and asks some several times; warm
    start and training share the others.
    """
    import pipo
    parts, chosen = ([], [], []), random.Random(0)
    for digits in range(1, MIXED_DIGITS + 1):
        span = 9 * 10**(digits - 1)
        pairs = chosen.sample(range(span**2), min(span**2, MIXED_ROWS))
        fifth = len(pairs) // 5
        held_out, others = pairs[:fifth], pairs[fifth:]
        for part, source, size in zip(parts, (held_out, others, others), (320, 2400, 2400)):
            drawn = (source * (size // len(source) + 1))[:size]
            part += [pipo.addition(pair, digits) for pair in chosen.sample(drawn, size)]
    for part in parts:
        chosen.shuffle(part)
    return parts


# ------------------------------------------------------------------------------------------------------------
# Running. A finished run is a folder with result.json, or a line of a pack; what is neither starts again.
# ------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside `path` and swap it in, so that a kill leaves the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".partial").write_bytes(data)
    os.replace(path.with_name(path.name + ".partial"), path)


def write_rows(path: Path, rows: list[dict]) -> None:
    """The rows of a data set, whole."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict]:
    """The rows of a data set, or of metrics."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def task_folder(runs: Path, settings: dict) -> Path:
    """Where the warm start and the problems of a run are."""
    return runs / settings["task"] if "task" in settings else runs


def make_start(runs: Path, mixed: bool = False) -> str:
    """The common warm start and the problems of a task, made once; returns a fingerprint of them all."""
    start, files = runs / "start", [runs / f"{name}.jsonl" for name in ("train", "eval", "probe")]
    if not start.exists():
        import pipo
        import torch
        torch.set_num_threads(1)
        own, solved = {}, 0.25
        if mixed:
            held_out, warm, train = mixed_rows()
            held_out, probe = held_out[:512], held_out[-PROBE_PROBLEMS:]
            own, solved = dict(max_new_tokens=64), 0.4
        else:
            held_out, warm, train = pipo.demo_rows(0)
            train, probe = train[:-PROBE_PROBLEMS], train[-PROBE_PROBLEMS:]
        for path, rows in zip(files, (train, held_out, probe)):
            write_rows(path, rows)
        print("warm start: teaching the demo's model until it is sometimes right", flush=True)
        with open(runs / "start.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            cfg = pipo.Config(**pipo.DEMO | own)
            pipo.build_demo(str(runs / "start.partial"), cfg, warm, torch.device("cpu"), solved)
        os.replace(runs / "start.partial", start)
    contents = b"".join(path.read_bytes() for path in [start / "model.safetensors", *files])
    return hashlib.sha256(contents).hexdigest()[:12]


def set_up_worker() -> None:
    """Once in each worker: give way to other work, leave Ctrl-C to the parent, and set the clock."""
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import pipo
    import torch
    pipo.datasets.disable_progress_bars()
    torch.set_num_threads(1)
    # pipo's clock becomes this process's CPU time: with one thread that is the wall-clock time of a core
    # of its own, whatever else the machine does meanwhile.
    pipo.time = SimpleNamespace(perf_counter=time.process_time, time=time.time)


def perform(job: dict, runs: Path, start: str) -> dict:
    """One run, in a worker, from its beginning."""
    import pipo
    out = runs / job["condition"] / f"{job['arm']}-seed{job['seed']}"
    shutil.rmtree(out, ignore_errors=True)
    held_out = "probe.jsonl" if job["condition"] == "probe" else "eval.jsonl"
    settings, folder = job["settings"], task_folder(runs, job["settings"])
    own = {name: value for name, value in settings.items() if name not in VARIANTS}
    if own["feedback"] == "shuffled":
        own["feedback"] = "pipo"
    if "pi_factor" in settings:
        own["pi_lr"] = settings["pi_factor"] * settings["lr"]
    cfg = pipo.Config(**pipo.DEMO | own | dict(
        model=str(folder / "start"), dataset=str(folder / "train.jsonl"),
        eval_dataset=[str(folder / held_out)], instruction="", seed=job["seed"], device="cpu",
        save_every=settings["steps"], show_every=0, out=str(out)))
    with in_place(iteration=with_variants(pipo.iteration, settings, job["seed"], folder)):
        return train_for_result(cfg, job | dict(start=start))


def train_for_result(cfg, job: dict) -> dict:
    """pipo.train into cfg.out, and of that the metrics: the job with what it came to, also as result.json.

    Numbers that stop being finite are a result too, with the metrics up to there.
    """
    import pipo
    out, failed = Path(cfg.out), None
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            pipo.train(cfg)
        except FloatingPointError as error:
            failed = str(error).split(";")[0]
    rows = read_rows(out / "metrics.jsonl")
    result = job | dict(failed=failed, rows=len(rows), columns=to_columns(rows))
    write_whole(out / "result.json", json.dumps(result).encode())
    (out / pipo.CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(out / "model", ignore_errors=True)
    return result


MACHINES = ("memory_gb", "tokens", "microbatch_tokens", "pi_microbatch_tokens")


def to_columns(rows: list[dict]) -> dict:
    """Metrics as columns (half the size of rows), floats to 5 digits; what never changes is one value.

    Left out are what depends on the machine, and the evaluation by data set: there is one only.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in (n for n in names if n not in MACHINES and not n.startswith("eval/")):
        values = [row.get(name) for row in rows]
        first, *rest = (float(f"{v:.5g}") if isinstance(v, float) else v for v in values)
        columns[name] = rest[0] if len(set(rest)) == 1 and first in (None, rest[0]) else [first, *rest]
    return columns


def read_pack(into: Path, condition: str, arms=None) -> list[dict]:
    """The packed runs of a condition, arms in their order (default: CONDITIONS'), then those not among them."""
    path, order = into / f"runs-{condition}.jsonl.gz", list(arms or CONDITIONS[condition][1])
    lines = gzip.decompress(path.read_bytes()).splitlines() if path.exists() else []

    def place(run):
        return (order + [run["arm"]]).index(run["arm"]), run["settings"]["lr"], run["seed"]

    return sorted(map(json.loads, lines), key=place)


def pack(into: Path, condition: str, done: dict[tuple, dict]) -> None:
    """Write the finished runs, {(arm, seed): run}, of a condition; the same runs give the same bytes."""
    lines = [json.dumps(done[key], separators=(",", ":")) for key in sorted(done)]
    write_whole(into / f"runs-{condition}.jsonl.gz", gzip.compress("\n".join(lines).encode(), 9, mtime=0))


def cost(job: dict) -> float:
    """About how long a run takes, in steps."""
    settings = job["settings"]
    return settings["steps"] * (settings.get("epochs", 1) + 2 / settings["eval_every"])


def finished(perform, jobs: list[tuple], workers: int, stopped: str, **options):
    """Yields perform(*job) of each job as they finish, some at a time; wrap it in closing().

    A signal ends this process with `stopped`, and the workers with it.
    """
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: sys.exit(stopped))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), set_up_worker, **options)
    try:
        for future in as_completed([pool.submit(perform, *job) for job in jobs]):
            yield future.result()
    except BaseException:  # not at the end: a pool that replaces its workers would wait for one for ever
        for worker in multiprocessing.active_children():
            worker.kill()  # pipo would heed a milder signal, save, and leave the worker to the next job
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def told_short(result: dict) -> str:
    """A finished run in a few words."""
    scores, broken = curve(result)[2], " FAILED, " + result["failed"] if result["failed"] else ""
    return f"{result['arm']} seed {result['seed']}: {scores[0]:.1%} -> {scores[-1]:.1%}{broken}"


def run(args) -> None:
    """Do what is not done yet, two runs at a time; pack after every run."""
    jobs, done, left = wanted(args), {}, []
    for condition in args.only:
        found = [json.loads(path.read_text()) for path in (args.runs / condition).glob("*/result.json")]
        done[condition] = {(x["arm"], x["seed"]): x for x in read_pack(args.into, condition) + found}
    for job in jobs:
        before = done[job["condition"]].get((job["arm"], job["seed"]))
        if before and before["settings"] != job["settings"]:
            sys.exit(f"{job['condition']} {job['arm']} seed {job['seed']} is there with other settings, "
                     f"{before['settings']}, not {job['settings']}: delete it, or run elsewhere, with --into")
        left += [] if before else [job]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already", flush=True)
    starts = {}
    for condition in dict.fromkeys(job["condition"] for job in left):
        common = CONDITIONS[condition][0]
        starts[condition] = make_start(task_folder(args.runs, common), "task" in common)
        if any(x["start"] != starts[condition] for x in done[condition].values()):
            sys.exit(f"{args.into} holds runs from another warm start; begin your own with --into DIR")
    begun, total, spent = time.time(), sum(map(cost, left)), 0
    again = [(job, args.runs, starts[job["condition"]]) for job in left]
    with closing(finished(perform, again, WORKERS,
                          "stopped; the same command goes on, unfinished runs anew")) as results:
        for count, result in enumerate(results, 1):
            condition = result["condition"]
            done[condition][result["arm"], result["seed"]] = result
            pack(args.into, condition, done[condition])
            spent, elapsed = spent + cost(result), (time.time() - begun) / 60
            print(f"{count}/{len(left)} {condition} {told_short(result)}; "
                  f"{elapsed:.1f} min, about {elapsed * (total / spent - 1):.0f} min left", flush=True)


# ------------------------------------------------------------------------------------------------------------
# What a run came to. Seconds are those of sampling, grading and both steps, not of evaluation and saving.
# ------------------------------------------------------------------------------------------------------------

MEASURES = {"end": "final pass@1 (%)", "best": "best (%)", "auc": "mean over the run (%)",
            "equal_time": "at equal time (%)", "seconds": "seconds", "collapsed": "collapsed (%)",
            "spikes": "gradient spikes", "length": "final tokens"}
# Compared in pairs beside each arm with the first.
PAIRS = (("pipo", "constant"), ("pipo", "shuffled"), ("pipo-paired", "pipo"), ("oracle", "pipo"),
         ("oracle", "constant"), ("oracle", "constant-1.84"), ("roll-back", "pipo"),
         ("pipo", "tick"), ("constant", "tick"), ("tick-always", "tick"), ("pipo-own", "constant-own"),
         ("pipo-own-lam1", "constant-own"), ("pipo-b0", "constant-b0"), ("pipo-b0-lam1", "constant-b0"))
UNTIMED = {*ORACLES, *KNOBS}  # run long after the others of their condition, beside other work
BESIDE = {condition for condition, (_, arms) in CONDITIONS.items()
          if any("second" in own for own in arms.values())}  # all of it run beside other work
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
         2.131)


def series(run: dict, name: str) -> np.ndarray:
    """A metric as an array over the rows of a run (row 0 is the start), nan where it was not measured."""
    values = run["columns"].get(name)
    values = values if isinstance(values, list) else [values] * run["rows"]
    return np.array(values, float)  # None becomes nan


def curve(run: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, seconds and pass@1 at the evaluations. Where a run broke down there is no model: pass@1 is 0."""
    clock = sum(np.nan_to_num(series(run, f"seconds_{phase}"))
                for phase in ("sample", "grade", "verification", "exploration")).cumsum()
    scores = series(run, "eval_pass@1")
    steps, clock, scores = (x[np.isfinite(scores)] for x in (series(run, "step"), clock, scores))
    if run["failed"]:
        lost = np.arange(steps[-1], run["settings"]["steps"], run["settings"]["eval_every"])
        lost = lost + run["settings"]["eval_every"]
        pace = clock[-1] / max(1, steps[-1])
        steps, clock = np.append(steps, lost), np.append(clock, lost * pace)
        scores = np.append(scores, 0 * lost)
    return steps, clock, scores


def measures(run: dict, time_up: float) -> list[float]:
    """The numbers of MEASURES for one run. What counts as a collapse and as a spike is defined here."""
    steps, clock, scores = curve(run)
    norms, lengths = series(run, "grad_norm")[1:], series(run, "completion_length")[1:]
    low = max(scores.max() / 2, scores[0] - 3 * series(run, "eval_stderr")[0])
    collapsed = run["failed"] or scores[-1] < low
    spikes = (norms > 5 * np.median(norms)).sum() if len(norms) else 0  # norms before clipping
    beside = run["condition"] in BESIDE or run["arm"] in UNTIMED and run["condition"] in ("safe", "edge")
    timed = math.nan if beside else 1.0
    return [100 * scores[-1], 100 * scores.max(), 100 * scores[1:].mean(),
            timed * 100 * np.interp(time_up, clock, scores), timed * clock[-1], 100 * bool(collapsed), spikes,
            lengths[-10:].mean() if len(lengths) else math.nan]


def mean_and_half(values) -> np.ndarray:
    """The mean over the first axis, and half the width of its 95 % t-interval (nan from one value)."""
    n = len(values)
    half = T_975[min(n - 2, len(T_975) - 1)] * np.std(values, 0, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return np.stack(np.broadcast_arrays(np.mean(values, 0), half))


def compare(runs: list[dict]) -> dict:
    """A condition's arms and their paired differences; equal time is when the first arm ends on average."""
    first, arms = runs[0]["arm"], {}
    ends = [curve(run)[1][-1] for run in runs if run["arm"] == first and not run["failed"]]
    time_up = float(np.mean(ends)) if ends else math.nan
    for run in runs:
        arms.setdefault(run["arm"], {})[run["seed"]] = np.array(measures(run, time_up))
    pairs = [(arm, first) for arm in arms if arm != first]
    pairs += [pair for pair in PAIRS if set(pair) <= arms.keys()]
    gaps = {f"{a} − {b}": [arms[a][seed] - arms[b][seed] for seed in arms[a] if seed in arms[b]]
            for a, b in pairs if a in arms}

    def told(values):
        return {"seeds": len(values)} | dict(zip(MEASURES, mean_and_half(values).T.tolist()))

    return {"time_up": time_up, "arms": {arm: told(list(x.values())) for arm, x in arms.items()},
            "differences": {pair: told(x) for pair, x in gaps.items() if x}}


# ------------------------------------------------------------------------------------------------------------
# Does xi know anything? Row t holds mu and xi of a batch drawn from theta_t, the policy BEFORE the updates of
# step t, but an evaluation made AFTER them: with E the column of evaluations, J(theta_t) = E[t - 1].
# ------------------------------------------------------------------------------------------------------------

TARGETS = {"last": "J(θ_t) − J(θ_t−1), the last step's change",
           "window": f"J(θ_t) − mean of J(θ_t−1) … J(θ_t−{WINDOW}), what ξ estimates",
           "next": "J(θ_t+1) − J(θ_t), the next step's change"}
PHASES = ("early", "middle", "late", "whole")


def true_change(run: dict, target: str, every: int = 1) -> np.ndarray:
    """A target over the rows of a run, nan where it is not known; `every`: over so many steps, not one."""
    E = np.append(math.nan, series(run, "eval_pass@1"))  # E[t] is J(theta_t), one more than rows
    before = np.append(np.full(every, math.nan), E)[:len(E)]  # J(theta_{t - every})
    after = np.append(E, np.full(every, math.nan))[every:]
    if target == "window":
        before = np.full(len(E), math.nan)
        before[WINDOW:] = np.convolve(E, np.ones(WINDOW) / WINDOW, "valid")[:len(E) - WINDOW]
    return (after - E if target == "next" else E - before)[:-1]


def phase_rows(run: dict, phase: str) -> slice:
    """The rows of a third of the run, or of all of it, from the first that has a xi."""
    edges = np.linspace(WINDOW + 1, run["settings"]["steps"] + 1, 4).astype(int)
    i = PHASES.index(phase)
    return slice(edges[0], edges[3]) if phase == "whole" else slice(edges[i], edges[i + 1])


def agreement(pairs: list[tuple[np.ndarray, np.ndarray]], draws: int = 1000) -> dict | None:
    """Correlation and agreement in sign of x and y, pooled over runs; 95 % intervals by resampling runs."""
    pairs = [np.array([x, y])[:, np.isfinite(x) & np.isfinite(y)] for x, y in pairs]
    x, y = np.hstack(pairs)
    if len(x) < 3 or not x.std() or not y.std():
        return None

    def both(pairs):
        x, y = np.hstack(pairs)
        return np.corrcoef(x, y)[0, 1], (x * y > 0).sum() / max(1, (x * y != 0).sum())

    random, up_x, up_y = np.random.default_rng(0), (x[x * y != 0] > 0).mean(), (y[x * y != 0] > 0).mean()
    with np.errstate(invalid="ignore"):
        n = len(pairs)
        resampled = [both([pairs[i] for i in random.integers(0, n, n)]) for _ in range(draws)]
    (r, same), ranges = both(pairs), np.nanpercentile(resampled, (2.5, 97.5), 0).T.tolist()
    return {"r": float(r), "r_95": ranges[0], "same_sign": float(same), "same_sign_95": ranges[1],
            "same_sign_by_chance": float(up_x * up_y + (1 - up_x) * (1 - up_y)), "points": len(x)}


def noise(runs: list[dict], phase: str) -> dict[str, float]:
    """How much of what was measured can be signal, in the changes of J and in xi's numerator, mu_t - mu_his.

    All evaluations of a run are drawn with the same random numbers, so a change of J is known better than the
    binomial error says. Noise that is new at each evaluation, of variance v, makes neighbouring changes
    covary by -v: hence v.
    """
    changes, products, gaps, numerators, binomial = [], [], [], [], []
    for run in runs:
        rows, mu = phase_rows(run, phase), series(run, "mu")
        J = np.append(math.nan, series(run, "eval_pass@1"))[:-1]
        change = true_change(run, "last")[rows]
        products.append((change[1:] - np.nanmean(change)) * (change[:-1] - np.nanmean(change)))
        changes.append(change)
        gaps.append((mu - J)[rows])
        numerators.append((mu - series(run, "mu_his"))[rows])
        binomial.append((J * (1 - J))[rows] / PROBE_PROBLEMS)
    square = {name: np.nanmean(np.concatenate(x)**2) for name, x in
              dict(change=changes, gap=gaps, numerator=numerators).items()}
    new, binomial = max(0.0, -np.nanmean(np.concatenate(products))), np.nanmean(np.concatenate(binomial))
    mu_noise, real = max(0.0, square["gap"] - binomial), max(0.0, square["change"] - 2 * new)
    numerator_noise = mu_noise * (1 + 1 / WINDOW)  # of mu_t, and of the mean of the window
    return {"root mean square of the measured one-step change of J": math.sqrt(square["change"]),
            "its standard error, were evaluations independent": math.sqrt(2 * binomial),
            "its standard error, from how neighbouring changes covary": math.sqrt(2 * new),
            "root mean square of the change that is none of this error": math.sqrt(real),
            "highest correlation with it that this leaves":
                math.sqrt(real / square["change"]) if real else 0.0,
            "sd of μ_t given J(θ_t), the sampling noise": math.sqrt(mu_noise),
            "root mean square of μ_t − μ_his, ξ's numerator": math.sqrt(square["numerator"]),
            "correlation of ξ's numerator with it, from these two and the formula":
                math.sqrt(real / square["change"]) * xi_correlation(math.sqrt(real), mu_noise, WINDOW)
                if real else 0.0,
            "share of its square that is change of J": max(0.0, 1 - numerator_noise / square["numerator"]),
            "share that is the last step's change of J": real / square["numerator"]}


def xi_report(packs: dict[str, list[dict]]) -> dict:
    """Agreement and noise in the probe, by phase; and, coarser, in all PIPO runs evaluated every 10 steps."""
    def pairs(runs, phase, target, every=1):
        return [(series(run, "xi")[rows], true_change(run, target, every)[rows])
                for run in runs for rows in [phase_rows(run, phase)]]

    probe = [run for run in packs["probe"] if run["rows"] > WINDOW + 3]
    report = {phase: {"noise": noise(probe, phase)} | {x: agreement(pairs(probe, phase, x)) for x in TARGETS}
              for phase in (PHASES if probe else ())}
    looking_back = {"feedback": "pipo", "eval_every": 10, "window": WINDOW}
    others = [run for condition, runs in packs.items() if condition != "probe" for run in runs
              if looking_back.items() <= run["settings"].items() and run["rows"] > 20
              and not {*VARIANTS, "xi_clip"} - {"reward_noise"} & run["settings"].keys()]
    if others:
        report["coarse"] = {f"change of J over the 10 steps {words}": agreement(pairs(others, "whole", x, 10))
                            for x, words in (("last", "before"), ("next", "after"))}
    return report


# ------------------------------------------------------------------------------------------------------------
# Where updates do harm, and where problems are of unlike difficulty. Here J(theta_t) is in row t itself.
# ------------------------------------------------------------------------------------------------------------

LAGS = (1, 2, 3)  # steps after the harm at which xi could show it
AFTER, WORST = 12, 6  # steps that a harm is followed for, and in which its worst is looked for


def harmed(run: dict) -> list[int]:
    """The steps (row numbers) of a run whose exploration did harm."""
    return np.flatnonzero(series(run, "harm") == 1).tolist()


def told_apart(runs: list[dict], lag: int) -> tuple[np.ndarray, np.ndarray]:
    """xi of the steps `lag` after a harm (no other between), and of those with none in reward or window."""
    after, free = [], []
    for run in runs:
        xi, harms = series(run, "xi"), harmed(run)
        after += [xi[s + lag] for s in harms if s + lag < run["rows"] and not {*range(s + 1, s + lag)} & {*harms}]
        free += [xi[t] for t in range(run["rows"]) if not {*range(t - WINDOW - 1, t)} & {*harms}]
    after, free = np.array(after), np.array(free)
    return after[np.isfinite(after)], free[np.isfinite(free)]


def area(after: np.ndarray, free: np.ndarray) -> float:
    """Area under the ROC curve: how often xi is lower after a harm than at another step (1/2 is chance)."""
    gaps = after[:, None] - free[None]
    return float(((gaps < 0) + 0.5 * (gaps == 0)).mean())


def aftermath(run: dict) -> np.ndarray:
    """J at the steps 0 .. AFTER from each harm, less J before it, in points: (harms, AFTER + 1).

    nan behind the next harm, and the end of the run; harms of which less than the longest lag is known are
    left out.
    """
    paths, harms, J = [], harmed(run), np.append(100 * series(run, "J"), np.full(AFTER, math.nan))
    for s in harms:
        path = J[s:s + AFTER + 1] - J[s]
        path[min((t - s for t in harms if t > s), default=AFTER) + 1:] = math.nan
        paths += [path] if np.isfinite(path[LAGS[-1]]) else []
    return np.array(paths).reshape(-1, AFTER + 1)


def harm_report(runs: list[dict]) -> dict:
    """By arm: what xi detects, what a harm costs, and how long until J is back (inf: not before the next)."""
    report = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm and not run["failed"]]
        paths, back = np.concatenate([aftermath(run) for run in own]), []
        for path in paths:
            low = int(np.nanargmin(path[:WORST + 1]))  # back after the fall, not before it
            back.append(next((i for i in range(low + 1, AFTER + 1) if path[i] >= 0), math.inf))
        after, free = told_apart(own, 1)
        report[arm] = {"detected": float((after < 0).mean()), "false_alarms": float((free < 0).mean()),
                       **{f"area_{lag}": area(*told_apart(own, lag)) for lag in LAGS},
                       "lost": float(-np.nanmin(paths[:, :WORST + 1], 1).mean()), "back": float(np.median(back)),
                       "harms": len(paths), "judged": len(after), "free": len(free)}
    return report


def mixed_report(runs: list[dict]) -> dict:
    """By arm: correlation of xi with the last step's change of J, and the noise in what the tracker heard."""
    report = {}
    for arm in ("pipo", "pipo-paired", "oracle"):
        own = [run for run in runs if run["arm"] == arm and not run["failed"]]
        if not own:
            continue
        pairs, noises = [], []
        for run in own:
            J, rows = series(run, "J"), phase_rows(run, "whole")
            change = np.append(math.nan, np.diff(J))
            pairs.append((series(run, "xi")[rows], change[rows]))
            told = series(run, {"pipo": "mu", "pipo-paired": "paired_mu", "oracle": "J"}[arm])
            noises.append((told - J)[rows] - np.nanmean((told - J)[rows]))
        report[arm] = {"agreement": agreement(pairs), "noise": float(np.concatenate(noises).std()),
                       "change": float(np.nanstd(np.concatenate([y for _, y in pairs])))}
    return report


# ------------------------------------------------------------------------------------------------------------
# On paper. What xi can know: mu_t is J(theta_t) and noise of variance V, and J changes by `step` (its
# standard deviation, whatever the steady part) each step, independently. test_pipo.py simulates all of it.
# ------------------------------------------------------------------------------------------------------------


def perfect_xi(K: int) -> float:
    """xi where the reward rises by the same b each step, without noise, whatever b: sqrt(3 (K + 1) / K).

    mu_t lies b (K + 1) / 2 above the mean of the K before, whose sample variance is b^2 K (K + 1) / 12.
    """
    return math.sqrt(3 * (K + 1) / K)


def reward_variance(between: float, within: float, Q: int, G: int) -> float:
    """Variance of the mean reward of Q drawn prompts with G samples each.

    `between` is the variance over prompts of their success rate p, `within` the mean of p (1 - p).
    """
    return between / Q + within / (Q * G)


def paired_variance(between: float, within: float, Q: int, G: int, explained=1.0, earlier=math.inf) -> float:
    """The same where each prompt is held against its own success rate, known from `earlier` samples of it.

    Or against that of its class, which explains a share of `between` (with very many earlier samples).
    """
    return (1 - explained) * between / Q + within / Q * (1 / G + 1 / earlier)


def xi_correlation(step: float, variance: float, K: int) -> float:
    """Correlation of xi's numerator mu_t - mean(mu_{t-1} .. mu_{t-K}) with the last step's change of J.

    The change i steps before the last is in the numerator with weight (K - i) / K, and the squares of these
    sum to (K + 1) (2 K + 1) / (6 K). The division by sigma_his takes off another 5 % at K = 8 (20 % at 4)
    where noise is most.
    """
    walk = step**2 * (K + 1) * (2 * K + 1) / (6 * K)
    return step / math.sqrt(walk + (1 + 1 / K) * variance)


def prompts_needed(target: float, step: float, between: float, within: float, G: int, K: int) -> float:
    """Q at which xi_correlation reaches a target; infinite where even mean rewards without noise do not."""
    room = 1 / target**2 - (K + 1) * (2 * K + 1) / (6 * K)
    return (1 + 1 / K) * reward_variance(between, within, 1, G) / (step**2 * room) if room > 0 else math.inf


# The paper's setting: 128 prompts x 8 on MATH. Assumed: a mean rate of 0.7, half of whose p (1 - p) is Var(p).
PAPER = dict(Q=128, G=8, between=0.105, within=0.105)


def paper_table() -> str:
    """Correlations in the paper's setting and around it."""
    rows = []
    for step in (0.001, 0.003, 0.01):
        for Q in (16, 32, 128):
            variances = (reward_variance(PAPER["between"], PAPER["within"], Q, 8),
                         paired_variance(PAPER["between"], PAPER["within"], Q, 8, earlier=8),
                         paired_variance(PAPER["between"], PAPER["within"], Q, 8))
            needed = prompts_needed(0.5, step, PAPER["between"], PAPER["within"], 8, WINDOW)
            rows.append([f"{100 * step:g}", Q, *(f"{xi_correlation(step, V, WINDOW):.3f}" for V in variances),
                         f"{needed:,.0f}"])
    return markdown(["sd of a step's change (points)", "Q", "ξ, plain", "paired, 8 earlier samples a prompt",
                     "paired, known rates", "Q for 0.5, plain"], rows)


# ------------------------------------------------------------------------------------------------------------
# Tables.
# ------------------------------------------------------------------------------------------------------------


def markdown(header: list, rows: list[list]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


HARMS = {"inverted": "advantages inverted", "tenfold": "learning rate × 10"}
MOMENTUMS = {"momentum": "safe rate", "momentum-edge": "rate at the edge"} | {
    f"momentum-{kind}": title for kind, title in HARMS.items()}
BRIEF = {"safe": "safe rate", "noisy": "safe rate, noisy rewards", "edge": "rate at the edge", "gspo": "GSPO"}


def brief(results: dict, names: dict = BRIEF, arms=tuple(ARMS | ORACLES)) -> list[str]:
    """Tables of arms and conditions for the README; in brackets the paired difference to the first."""
    def cell(condition, arm, measure):
        found, first = results[condition], next(iter(results[condition]["arms"]))
        name = first if arm == "grpo" else arm
        if name not in found["arms"] or math.isnan(found["arms"][name][measure][0]):
            return "–"
        gap = found["differences"].get(f"{name} − {first}")
        return f"{found['arms'][name][measure][0]:.1f}" + (
            " ({:+.1f} ± {:.1f})".format(*gap[measure]) if gap else "")

    conditions = [condition for condition in names if condition in results]
    return [f"**{title}**\n\n" + markdown(["arm", *(names[condition] for condition in conditions)], [
        [STYLES[arm][0], *(cell(condition, arm, measure) for condition in conditions)] for arm in arms])
            for measure, title in (("end", f"Held-out pass@1 (%) after {STEPS} iterations"),
                                   ("auc", "Held-out pass@1 (%), mean over the run"),
                                   ("equal_time", "Held-out pass@1 (%) at equal time, when GRPO ends"),
                                   ("collapsed", "Collapsed runs (%)"))]


ON_PAPER = f"""## On paper

**A perfect ξ on steady progress is a constant.** Let μ rise by b a step, without noise. Then μ_t is b·(K+1)/2
above the mean of the K before it, and the sample variance of those is b²·K(K+1)/12, so that ξ = √(3(K+1)/K) for
every b > 0: {perfect_xi(4):.2f} at K = 4, {perfect_xi(8):.2f} at 8, {perfect_xi(16):.2f} at 16.
Only a departure from a straight line says something.

**The noise of μ.** Q prompts are drawn, each answered G times. By the law of total variance
Var μ = Var_q(p)/Q + E[p(1−p)]/(QG): which prompts were drawn, and how they were answered.

**What ξ can know.** Let J change each step by an independent amount of standard deviation s (any steady part
aside). In μ_t − mean(μ_t−1 … μ_t−K) the change i steps before the last has the weight (K−i)/K; these squared sum to
(K+1)(2K+1)/(6K), the noise is (1+1/K)·Var μ, and the last change itself has weight 1. So

    correlation(ξ_t, ΔJ_t) = s / √(s²·(K+1)(2K+1)/(6K) + (1+1/K)·Var μ)

which even without noise is at most {xi_correlation(1, 0, 8):.2f} at K = 8: seven other changes are in it too. That is ξ's
numerator. The division by σ_his takes off 5 % at K = 8 where noise prevails and adds up to 16 % where there is
none (0.65), and so do neighbouring changes that are alike, as AdamW's momentum makes them.

**Pairing.** Held against its own rate, a prompt brings no Var_q(p): what is left is E[p(1−p)]/(QG), with rates
known, and E[p(1−p)]/Q·(1/G+1/m) with rates from m earlier samples each. Where Var_q(p) is half of p̄(1−p̄), p̄ the
mean rate, as assumed here for MATH, that is 1/(G+1) (m = G: 2/(G+1)) of the variance, whatever Q.

In the paper's setting and around it (Var_q(p) = E[p(1−p)] = {PAPER["between"]}, G = 8, K = 8):"""


MOMENTUM_TEXT = """\
Both of PIPO's steps share one AdamW, which moves the weights along the mean of the gradients so far. So the second
step is first of all another step in the direction of those before it, whatever its coefficient. The control for
that is an empty tick: where PIPO would take its second step, the optimizer takes one with a gradient of zero. With
moments of its own, or with β₁ = 0 (the gradient in place of the mean of gradients, which is left as it was; v goes
on), the second step does without that momentum.

Where φ < 0, PIPO's second step does not step back: it moves the batch that it should undo forward, only a little
less than an empty tick does. With β₁ = 0 it moves that batch back, with moments of its own in most of the cases.
At the safe rate such real steps gain about what the tick gains, and PIPO with them no more than the constant with
them: ξ does not pay there either. At the edge they ruin every run, whatever scales them. So momentum is most of
what the second step is, and what makes the feedback harmless. Where a tenth of the updates is inverted, steps that
do go back repair nothing either: a harm costs as much with them, with the constant, and with none. From rates ten
times too high the constant recovers in part, PIPO no more than it.

These runs have a warm start of their own, with baselines from it, and were made beside other work: their levels do
not compare with those of other sections, and they are not timed. A tick "always" is taken where φ = 0, too."""


def harm_tables(results: dict, names: dict) -> list[str]:
    """What xi detects of harmful updates, what they cost, and the arms beside each other."""
    text = []
    for condition in (c for c in names if c in results):
        report = results[condition]["harm"]
        rows = [[STYLES[arm][0], *(f"{x[name]:.0%}" for name in ("detected", "false_alarms")),
                 *(f"{x[f'area_{lag}']:.2f}" for lag in LAGS), x["judged"], x["free"], f"{x['lost']:.1f}",
                 f"{x['back']:.0f}" if math.isfinite(x["back"]) else "–", x["harms"]] for arm, x in report.items()]
        text.append(
            f"Harmful updates, {names[condition]}. Detected: ξ < 0 at the step after one; false alarms: at steps "
            f"with none in the {WINDOW + 1} before; area: under the ROC curve, one, two and three steps after. "
            f"Points lost at the worst of {WORST} steps, and median steps until J is back (–: not before the next "
            "harm), of those with no other in the next three steps. AdamW's momentum still holds the old "
            "direction, and the harmful gradient for some ten steps: J falls most two to three steps after.\n\n"
            + markdown(["arm", "detected", "false alarms", *(f"area, {lag} after" for lag in LAGS), "harms judged",
                        "other steps", "points lost", "steps until back", "harms followed"], rows))
    return text


def mixed_table(report: dict) -> str:
    """What pairing does for the tracker."""
    rows = []
    for arm, x in report.items():
        found = x["agreement"]
        expected = f"{xi_correlation(x['change'], x['noise']**2, WINDOW):+.2f}" if x["noise"] else "–"
        told = "–" if not found else "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["r"], *found["r_95"])
        rows.append([STYLES[arm][0], f"{100 * x['change']:.2f}", f"{100 * x['noise']:.2f}", told, expected])
    return "What the tracker was told, and what its ξ knows of the last step's change of J:\n\n" + markdown(
        ["arm", "sd of a step's change (points)", "sd of what it was told, given J (points)",
         "correlation of ξ with the change", "by the formula"], rows)


def gains(runs: list[dict]) -> dict | None:
    """Steps with phi < 0: what they did to the favour of B_{t-1}, and a gradient of zero in their place."""
    found = [[x[np.isfinite(x)] for x in (series(run, "pi_gain"), series(run, "tick_gain"))] for run in runs]
    found = [pair for pair in found if len(pair[0])]
    if not found:
        return None
    step, tick = (np.concatenate(x) for x in zip(*found))
    return {"steps": len(step), "forward": float((step > 0).mean()), "tick_forward": float((tick > 0).mean()),
            "seeds": len(found),
            **{name: mean_and_half([x.mean() for x in values]).tolist()
               for name, values in zip(("gain", "tick_gain"), zip(*found))}}


def momentum_tables(results: dict, packs: dict[str, list[dict]]) -> list[str]:
    """The section on what part of PIPO's gain is its optimizer's momentum."""
    names = {condition: name for condition, name in MOMENTUMS.items() if condition in results}
    arms, watched = [], []
    for condition, name in names.items():
        found = results[condition]
        for arm, x in found["arms"].items():
            gap = found["differences"].get(f"{arm} − grpo")
            arms.append([name, STYLES[arm][0], x["seeds"], *(f"{x[measure][0]:.1f}" + (
                " ({:+.1f} ± {:.1f})".format(*gap[measure]) if gap else "") for measure in ("end", "auc"))])
        found["gains"] = {arm: x for arm in MOMENTUM
                          if (x := gains([run for run in packs[condition] if run["arm"] == arm]))}
        watched += [[name, STYLES[arm][0], x["seeds"], x["steps"],
                     f"{x['forward']:.0%}", f"{x['tick_forward']:.0%}",
                     *("{:+.2f} ± {:.2f}".format(*(1000 * v for v in x[own])) for own in ("gain", "tick_gain"))]
                    for arm, x in found["gains"].items() if not arm.startswith("tick")]
    if not names:
        return []
    rates = [[STYLES[f"pipo-{kind}"][0],
              f"{factor:g}" + " (chosen)" * (own["pi_factor"] == factor), x["seeds"],
              *("{:.1f} ± {:.1f}".format(*x[measure]) for measure in ("end", "auc"))]
             for kind, own in KINDS.items() for factor in FACTORS
             if (x := results.get("rates", {}).get("arms", {}).get(f"pipo-{kind}-x{factor:g}"))]
    return ["## Is the second step its own momentum?", MOMENTUM_TEXT,
            "In brackets the difference to GRPO, paired by seed, over the seeds of the row:\n\n" + markdown(
                ["condition", "arm", "seeds", MEASURES["end"], MEASURES["auc"]], arms),
            "Steps with φ < 0, and a gradient of zero in their place, from the same weights and moments. "
            "Forward: the better samples of B_t−1 became more likely against its worse ones. Change: of the mean "
            "over its samples of a_i times the log-probability of a token, in thousandths; ± over seeds.\n\n"
            + markdown(["condition", "arm", "seeds", "steps", "forward", "with zero", "change", "with zero"],
                       watched),
            "The verification step's learning rate over that of exploration, for the two kinds of step without "
            "shared momentum: chosen for PIPO on three seeds at the safe rate, by final pass@1; the other "
            "arms of a kind take the same. These seeds are among those above, where PIPO's rows of the two kinds are "
            "so a little too high.\n\n"
            + markdown(["arm", "factor", "seeds", MEASURES["end"], MEASURES["auc"]], rates),
            *harm_tables(results, {f"momentum-{kind}": title for kind, title in HARMS.items()
                                   if f"momentum-{kind}" in results})]


# Which table of results.md answers which question.
MAP = """Which table answers which question (an *arm* is one way to train, "J" the true success rate; each table says its conditions):

| question | table |
| --- | --- |
| How good is each arm in the end, over the whole run, at equal time? Do runs break down? | the first four tables |
| Is the second step's size (ξ) what helps, or that there is a second step? | the same, rows *PIPO* against *constant*, *shuffled*, *GRPO, 2 epochs* |
| Would a ξ without noise help? | the same, rows *PIPO told J* |
| How strongly may a fall count? | the same, rows *λ = 0* and *λ = 1* |
| Does ξ help where a tenth of the updates do harm? | "advantages inverted", "learning rate × 10": final, and mean over the run |
| Does ξ notice such updates, and how long does the harm last? | "Harmful updates, ..." (areas under the ROC curve, points lost, steps until back) |
| Does it help to take the luck of the draw out of μ, where problems are unlike? | "one to five digits", and the table under it |
| Which learning rates are "safe" and "the edge"? | sweep |
| Any arm with its interval, seconds, collapses; any difference between two arms | safe, noisy, edge, gspo, inverted, tenfold, mixed |
| Do other seeds say the same? | again |
| K = 4 and 16, the clip of the paper's first version | safe, rows *pipo-K4*, *pipo-K16*, *pipo-v1* |
| What does ξ know of the last change of J, and of the next? | Does ξ know anything? (probe), first table; all other runs: its last |
| How much of ξ is noise? | Does ξ know anything?, second table |
| What could ξ know at the paper's size? How many prompts would it take? | On paper |
| Does a step after a fall go back, or does momentum carry it forward? Would moments of its own help? | Is the second step its own momentum? |"""


def table(args) -> None:
    """Write results.md and results.json from the packed runs."""
    def line(found, names, sign=""):
        means = ["–" if math.isnan(found[n][0]) else f"{found[n][0]:{sign}.1f}" for n in names]
        halves = [f" ± {found[n][1]:.1f}" if found[n][1] > 0 else "" for n in names]
        return [found["seeds"], *(mean + half for mean, half in zip(means, halves))]

    def xi_line(found):
        return ["–"] * 4 if not found else [
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["r"], *found["r_95"]),
            "{:.0%} [{:.0%}, {:.0%}]".format(found["same_sign"], *found["same_sign_95"]),
            f"{found['same_sign_by_chance']:.0%}", found["points"]]

    results = {}
    text = ["# Results\n\nMade by `python assets/experiment.py table`. ± is half a 95 % t-interval over "
            "seeds; differences are paired by seed."]
    packs = {condition: read_pack(args.into, condition) for condition in CONDITIONS}
    for condition in (c for c in args.only if packs[c]):
        runs = packs[condition]
        found = results[condition] = compare(runs)
        common = {k: v for k, v in runs[0]["settings"].items()
                  if all(run["settings"].get(k) == v for run in runs)}
        names = [n for n in MEASURES if n != "equal_time" or condition != "sweep"]
        when = "" if condition in BESIDE else (
            f" Equal time: {found['time_up']:.0f} CPU seconds, when {runs[0]['arm']} ends.")
        text += [f"## {condition}", ", ".join(f"{k} {v}" for k, v in common.items()) + "." + when,
                 markdown(["arm", "seeds", *(MEASURES[n] for n in names)],
                          [[arm, *line(x, names)] for arm, x in found["arms"].items()])]
        if found["differences"] and condition not in ("sweep", "rates"):
            names = [n for n in MEASURES if n not in ("best", "length")]
            text += [markdown(["difference", "seeds", *(MEASURES[n].replace("%", "points") for n in names)],
                              [[pair, *line(x, names, "+")] for pair, x in found["differences"].items()])]
    report = results["xi"] = xi_report(packs)
    columns = ["correlation with ξ_t", "same sign", "by chance", "points"]
    if "whole" in report:
        known = [[TARGETS[x], phase, *xi_line(report[phase][x])] for x in TARGETS for phase in PHASES]
        noises = [[words, *(f"{report[phase]['noise'][words]:.4f}" for phase in PHASES)]
                  for words in report["whole"]["noise"]]
        text += ["## Does ξ know anything?",
                 f"PIPO, J measured on {PROBE_PROBLEMS} problems after every step; thirds of the run. "
                 "[95 % interval from resampling runs]",
                 markdown(["change of J", "phase", *columns], known), markdown(["noise", *PHASES], noises)]
    if "coarse" in report:
        text += ["All other PIPO runs, evaluated every 10 steps:",
                 markdown(["change of J", *columns],
                          [[words, *xi_line(x)] for words, x in report["coarse"].items()])]
    text += [ON_PAPER, paper_table()]
    for condition in (c for c in results if "sabotage" in CONDITIONS.get(c, [{}])[0]):
        results[condition]["harm"] = harm_report(packs[condition])
    shown = ["![Held-out accuracy against steps and seconds](panels.png)"] if "safe" in results else []
    tables = [MAP, *shown, *brief(results)]
    tables += brief(results, HARMS, WATCHED)[:2] + harm_tables(results, HARMS)
    if "mixed" in results:
        told = results["mixed"]["told"] = mixed_report(packs["mixed"])
        tables += brief(results, {"mixed": "one to five digits"}, MIXED)[:2] + [mixed_table(told)]
    text = "\n\n".join(text[:1] + tables + text[1:] + momentum_tables(results, packs)) + "\n"
    print(text)
    write_whole(args.into / "results.md", text.encode())
    short = json.loads(json.dumps(results), parse_float=lambda x: float(f"{float(x):.5g}"),
                       parse_constant=lambda _: None)  # nan
    write_whole(args.into / "results.json", json.dumps(short, indent=1, ensure_ascii=False).encode())


# ------------------------------------------------------------------------------------------------------------
# Figures.
# ------------------------------------------------------------------------------------------------------------

# arm -> label, colour (Okabe-Ito), line, marker
STYLES = {"grpo": ("GRPO", "#000000", "-", "o"), "pipo": ("PIPO", "#D55E00", "-", "s"),
          "constant": ("constant", "#0072B2", "--", "^"), "shuffled": ("shuffled", "#009E73", "-.", "v"),
          "grpo-2": ("GRPO, 2 epochs", "#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "D"),
          "pipo-lam0": ("PIPO, λ = 0", "#E69F00", ":", "<"),
          "pipo-lam1": ("PIPO, λ = 1", "#56B4E9", (0, (3, 1)), ">"),
          "gspo": ("GSPO", "#000000", "-", "o"),
          "constant-1.84": ("constant 1.84", "#56B4E9", "-", "d"),
          "oracle": ("PIPO told J", "#E69F00", "-", "*"),
          "oracle-lam1": ("PIPO told J, λ = 1", "#009E73", ":", "P"),
          "roll-back": ("roll back", "#CC79A7", (0, (5, 1)), "X"),
          "pipo-paired": ("PIPO, paired", "#CC79A7", "--", "p"),
          "tick": ("empty tick", "#0072B2", ":", "x"),
          "tick-always": ("empty tick, always", "#56B4E9", ":", "+"),
          "pipo-own": ("PIPO, own moments", "#D55E00", "--", "s"),
          "constant-own": ("constant, own moments", "#0072B2", "-.", "^"),
          "pipo-own-lam1": ("PIPO, λ = 1, own moments", "#56B4E9", "--", ">"),
          "pipo-b0": ("PIPO, β₁ = 0", "#D55E00", ":", "s"),
          "constant-b0": ("constant, β₁ = 0", "#0072B2", ":", "^"),
          "pipo-b0-lam1": ("PIPO, λ = 1, β₁ = 0", "#56B4E9", ":", ">")}
FIRST = ("grpo", "pipo", "constant", "grpo-2")  # in the README's first figure
SHOWN = ("grpo", "gspo", "pipo", "pipo-lam1", "constant", "shuffled", "grpo-2", "oracle")


def pyplot():
    """matplotlib, set for print."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True, "legend.frameon": False,
        "legend.fontsize": 10, "figure.constrained_layout.use": True, "lines.linewidth": 1.8})
    return plt


def save(figure, path: Path) -> None:
    """A PNG of 256 colours: a third of the size."""
    from PIL import Image
    figure.savefig(path, dpi=150, facecolor="white")
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True, dpi=(150, 150))
    print(path)


def gradient_distortion(p: float, G: int, conditional: bool = False) -> float:
    """eta(p) with E[g_GRPO] = eta(p) * grad p: how far GRPO stretches the gradient at success rate p.

    For 0/1 rewards and the population std. `conditional` averages over groups with both rewards only (the
    paper's Theorem 3.1): only there does eta explode as p -> 0 or 1; over all groups it tends to sqrt(G - 1).
    Raises ValueError for p outside (0, 1) and G < 2.
    """
    if not 0 < p < 1 or G < 2:
        raise ValueError(f"needs 0 < p < 1 and G >= 2, got p = {p}, G = {G}")
    pmf = [math.comb(G, k) * p**k * (1 - p)**(G - k) for k in range(G + 1)]  # of k right answers
    eta = sum(w * math.sqrt(k * (G - k)) for k, w in enumerate(pmf)) / (G * p * (1 - p))
    mixed = sum(pmf[1:-1])
    return eta / mixed if conditional else eta


def draw_distortion(path: Path) -> None:
    """eta(p) by its formula, and as a simulated GRPO gradient over the true one, for one parameter."""
    plt, random = pyplot(), np.random.default_rng(0)
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), sharey=True)
    odds = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3])
    for axis, conditional in zip(axes, (False, True)):
        for G, _, colour, line, marker in ((8, *STYLES["pipo"]), (128, *STYLES["constant"])):
            p = 1 / (1 + np.exp(np.linspace(-6.9, 6.9, 121)))
            eta = [gradient_distortion(x, G, conditional) for x in p]
            axis.plot(p, eta, ls=line, color=colour, label=f"G = {G}")
            for x in [*odds, 0.5, *1 - odds]:
                rate = random.binomial(G, x, 200_000) / G  # of each group; its std is below
                std = np.sqrt(rate * (1 - rate))
                # advantages are (1 - rate) / std and -rate / std; grad log pi is 1 - x if right, -x if wrong;
                # the true gradient is x (1 - x)
                gradient = (rate * (1 - rate) * (1 - x) + (1 - rate) * -rate * -x) / np.where(std, std, 1)
                eta = gradient / (x * (1 - x))
                eta = eta[std > 0] if conditional else eta
                axis.errorbar(x, eta.mean(), 1.96 * eta.std() / math.sqrt(len(eta)), fmt=marker, color=colour,
                              ms=5, mfc="white", capsize=3, lw=1)
            if not conditional:
                axis.axhline(math.sqrt(G - 1), color=colour, lw=0.8, ls=":")
                axis.text(0.5, math.sqrt(G - 1) * 1.08, rf"$\sqrt{{{G}-1}}$", color=colour, ha="center")
        axis.set(xscale="logit", yscale="log", xlim=(0.0008, 0.9992), ylim=(1, 500),
                 xlabel="success rate p of a prompt (%)",
                 title="over mixed groups only: explodes" if conditional else "over all groups: bounded")
        axis.set_xticks([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999],
                        ["0.1", "1", "10", "50", "90", "99", "99.9"])
        axis.xaxis.set_minor_locator(plt.NullLocator())
    axes[0].set_ylabel("η(p), GRPO's gradient / true gradient")
    axes[0].legend(loc="upper center")
    figure.supxlabel(
        "Lines: formula; points: 200,000 simulated groups, 95 %. A group with equal rewards has no gradient: "
        "left it counts\nas 0, as it does in training; right it is left out of the mean, as in the paper's "
        "Theorem 3.1.", fontsize=9)
    save(figure, path)


def draw_first(arms: dict[str, list[dict]], path: Path) -> None:
    """The README's first figure: pass@1 over iterations, a band an arm, and each arm's name at its line's end."""
    figure, axis = pyplot().subplots(figsize=(7, 4.2))
    ends = []
    for arm, runs in arms.items():
        label, colour, line, _ = STYLES[arm]
        curves = [curve(run) for run in runs]
        mean, half = 100 * mean_and_half([c[2] for c in curves])
        axis.plot(curves[0][0], mean, ls=line, color=colour, lw=2.4)
        axis.fill_between(curves[0][0], mean - half, mean + half, color=colour, alpha=0.12, lw=0)
        ends.append([mean[-1], label, colour])
    ends.sort()
    for lower, upper in zip(ends, ends[1:]):
        upper[0] = max(upper[0], lower[0] + 1.5)  # one line of text apart
    for height, label, colour in ends:
        axis.annotate(label, (curves[0][0][-1], height), xytext=(6, 0), textcoords="offset points",
                      color=colour, va="center", fontsize=13)
    axis.set_xlim(0, curves[0][0][-1] * 1.27)
    axis.set_xticks(curves[0][0])
    axis.set_xlabel("iterations", fontsize=13)
    axis.set_ylabel("held-out accuracy (%)", fontsize=13)
    save(figure, path)


def draw_curves(panels: dict[str, dict[str, list[dict]]], path: Path, unit: str = "CPU seconds",
                measure: str = "held-out pass@1 (%)") -> None:
    """`measure` against steps and seconds, a row of panels a condition; panels: title -> label -> runs."""
    plt, handles = pyplot(), {}
    size = 9.5, 1 + 2.9 * len(panels)
    figure, grid = plt.subplots(len(panels), 2, figsize=size, sharey="row", squeeze=False)
    for axes, (title, arms) in zip(grid, panels.items()):
        for i, (arm, runs) in enumerate(arms.items()):
            label, colour, line, marker = STYLES.get(arm) or (arm, *list(STYLES.values())[i % 7][1:])
            curves = [curve(run) for run in runs]
            for axis, kind in zip(axes, (0,) if arm in UNTIMED else (0, 1)):  # steps, seconds
                x = np.unique(np.concatenate([c[0] for c in curves])) if kind == 0 else np.linspace(
                    0, np.mean([c[1][-1] for c in curves]), 61)
                mean, half = 100 * mean_and_half([np.interp(x, c[kind], c[2]) for c in curves])
                every, front = max(1, len(x) // 6), arm in ("grpo", "gspo", "pipo")
                handles[label], = axis.plot(x, mean, ls=line, color=colour, marker=marker, ms=5, mfc="white",
                                            markevery=(i * every // 7, every), zorder=3 if front else 2)
                if front:
                    axis.fill_between(x, (mean - half).clip(0), (mean + half).clip(max=100), color=colour,
                                      alpha=0.15, lw=0)
        axes[0].set_ylabel(measure)
        axes[0].set_title(title, loc="left")
    grid[-1][0].set_xlabel("steps")
    grid[-1][1].set_xlabel(f"{unit} of sampling, grading and training")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4 if len(handles) > 3 else 1,
                  handlelength=3.5)
    save(figure, path)


def draw_inside(run: dict, title: str, path: Path) -> None:
    """Reward and window, xi and phi, and both gradient norms of one run."""
    plt, step = pyplot(), series(run, "step")
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(8.5, 8), sharex=True, height_ratios=(3, 2, 2))
    his, sigma = 100 * series(run, "mu_his"), 100 * series(run, "sigma_his")
    top.fill_between(step, his - sigma, his + sigma, color="#56B4E9", alpha=0.4, lw=0,
                     label=r"$\mu_{his}\pm\sigma_{his}$")
    top.plot(step, his, color="#0072B2", lw=1.2, label=r"$\mu_{his}$")
    top.plot(step, 100 * series(run, "mu"), "o", color="black", ms=3, label=r"$\mu_t$")
    top.plot(step, 100 * series(run, "eval_pass@1"), "D", color="#D55E00", ms=5, mfc="white",
             label="held-out pass@1")
    top.set(ylabel="mean reward (%)")
    middle.axhline(0, color="#888888", lw=0.8)
    middle.vlines(step, 0, series(run, "phi"), color="#D55E00", lw=1.6, label=r"$\varphi_t$")
    middle.plot(step, series(run, "xi"), "o", color="#0072B2", ms=4, mfc="white", label=r"$\xi_t$")
    middle.set(ylabel=r"$\xi$, $\varphi$ (sd of window)")
    for name, label, colour, marker in (("grad_norm", "exploration step", "black", "o"),
                                        ("pi_grad_norm", "verification step", "#D55E00", "s")):
        norms = series(run, name)
        bottom.plot(step, np.where(norms > 0, norms, math.nan), marker, color=colour, ms=3, label=label)
    bottom.set(yscale="log", ylabel="gradient norm", xlabel="step")
    for axis in (top, middle, bottom):
        axis.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4)
    top.set_title(title, loc="left", pad=24)
    save(figure, path)


def draw_xi(runs: list[dict], path: Path) -> None:
    """xi against the true changes: steps of the probe as dots, and means over eighths of xi's range, 95 %."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), sharex=True, sharey=True)
    titles = ("the last step's change\n" r"$J(\theta_t)-J(\theta_{t-1})$",
              "what $\\xi_t$ estimates\n" r"$J(\theta_t)$" f" − mean of the {WINDOW} before",
              "the next step's change\n" r"$J(\theta_{t+1})-J(\theta_t)$")
    for axis, target, title in zip(axes, TARGETS, titles):
        for phase, arm in (("early", "pipo-lam0"), ("middle", "shuffled"), ("late", "constant")):
            _, colour, line, marker = STYLES[arm]
            pairs = [(series(run, "xi")[rows], 100 * true_change(run, target)[rows])
                     for run in runs for rows in [phase_rows(run, phase)]]
            x, y = np.hstack(pairs)
            x, y = (v[np.isfinite(x) & np.isfinite(y)] for v in (x, y))
            eighths = [part for part in np.array_split(np.argsort(x), 8) if len(part) > 2]
            found, label = agreement(pairs), phase
            if found:
                label += ": r = {:+.2f} [{:+.2f}, {:+.2f}]".format(found["r"], *found["r_95"])
            axis.plot(x, y, ".", color=colour, ms=2.5, alpha=0.35, zorder=1)
            axis.errorbar([x[part].mean() for part in eighths], [y[part].mean() for part in eighths],
                          [1.96 * y[part].std(ddof=1) / math.sqrt(len(part)) for part in eighths],
                          marker=marker, ls=line, color=colour, mfc="white", ms=6, lw=1.3, capsize=2,
                          zorder=3, label=label)
        axis.axhline(0, color="#888888", lw=0.8)
        axis.set(title=title, xlabel=r"$\xi_t$ (sd of window)", xlim=(-5, 5))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), handlelength=2.5)
    changes = np.concatenate([100 * true_change(run, target) for run in runs for target in TARGETS])
    limit = np.nanpercentile(np.abs(changes), 99)
    axes[0].set(ylabel="change of held-out pass@1 (points)", ylim=(-limit, limit))
    save(figure, path)


def draw_paper(probe: list[dict], mixed: dict, path: Path) -> None:
    """What xi can know of the last step's change: by a step's size in noise, and by the number of prompts."""
    plt, random = pyplot(), np.random.default_rng(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    sizes = np.geomspace(0.02, 5, 101)
    for K, arm in ((4, "shuffled"), (8, "pipo"), (16, "constant")):
        _, colour, line, marker = STYLES[arm]
        known = [xi_correlation(size, 1, K) for size in sizes]
        left.plot(sizes, known, color=colour, ls=line, label=f"K = {K}")
        for size in (0.03, 0.1, 0.3, 1, 3):
            changes = size * random.standard_normal((100_000, K + 1))
            mu = changes.cumsum(1) + random.standard_normal(changes.shape)
            xi = (mu[:, K] - mu[:, :K].mean(1)) / mu[:, :K].std(1, ddof=1)
            left.plot(size, np.corrcoef(xi, changes[:, K])[0, 1], marker, color=colour, ms=5, mfc="white")
    found, told = agreement([(series(r, "xi")[rows], true_change(r, "last")[rows])
                             for r in probe for rows in [phase_rows(r, "whole")]]), noise(probe, "whole")
    real = told["root mean square of the change that is none of this error"]
    points = [("ours, 32 × 8", real / told["sd of μ_t given J(θ_t), the sampling noise"], found, "o")]
    points += [(f"mixed: {name}", x["change"] / x["noise"], x["agreement"], marker) for name, x, marker in (
        ("plain", mixed.get("pipo"), "s"), ("paired", mixed.get("pipo-paired"), "^")) if x and x["agreement"]]
    for name, size, x, marker in points:
        interval = np.abs(np.array(x["r_95"]) - x["r"])[:, None]
        left.errorbar(size, x["r"], interval, fmt=marker, color="black", ms=7, capsize=3, label=f"measured, {name}")
    steps, V = (0.001, 0.003), reward_variance(**{n: PAPER[n] for n in ("between", "within", "Q", "G")})
    left.axvspan(*(step / math.sqrt(V) for step in steps), color="#888888", alpha=0.25, lw=0,
                 label="the paper's 128 × 8, if a step\nchanges J by 0.1 to 0.3 points")
    left.set(xscale="log", xlabel="sd of a step's change of J, in sd of μ", ylim=(-0.12, 0.75),
             ylabel=r"correlation of $\xi_t$ with the last step's change")
    Q = np.geomspace(8, 30000, 101)
    for step, arm in ((0.001, "constant"), (0.003, "pipo"), (0.01, "shuffled")):
        colour = STYLES[arm][1]
        for variance, style in ((reward_variance, "-"), (paired_variance, ":")):
            noises = [variance(PAPER["between"], PAPER["within"], q, 8) for q in Q]
            right.plot(Q, [xi_correlation(step, V, WINDOW) for V in noises], color=colour, ls=style,
                       label=f"s = {100 * step:g}" if style == "-" else None)
    right.plot([], [], ":", color="#888888", label="paired with known rates")
    right.axhline(xi_correlation(1, 0, WINDOW), color="#888888", lw=0.8)
    right.text(9, xi_correlation(1, 0, WINDOW) + 0.01, "no noise at all", fontsize=9, color="#555555")
    right.axvline(PAPER["Q"], color="#888888", lw=0.8, ls="--")
    right.set(xscale="log", xlabel="Q, prompts a step (G = 8, K = 8, MATH's spread)", ylim=(-0.12, 0.75))
    left.legend(loc="upper left", fontsize=8.5)
    right.legend(loc="upper left", bbox_to_anchor=(0, 0.74), fontsize=8.5,
                 title="sd of a step's change, points", title_fontsize=8.5)
    save(figure, path)


def draw_harm(packs: dict[str, list[dict]], path: Path) -> None:
    """Harmful updates, a row a kind: whether xi tells them from others (ROC), how J falls and comes back."""
    plt = pyplot()
    size = 10.5, 3.9 * len(packs)
    figure, grid = plt.subplots(len(packs), 2, figsize=size, squeeze=False, width_ratios=(2, 3))
    for (left, right), (title, runs) in zip(grid, packs.items()):
        left.plot([0, 1], [0, 1], color="#888888", lw=0.8)
        for arm in ("pipo", "oracle"):
            for lag in (1, 3):
                after, free = told_apart([run for run in runs if run["arm"] == arm], lag)
                cuts = np.sort(np.concatenate([after, free, [-np.inf, np.inf]]))
                label, colour, *_ = STYLES[arm]
                false, found = ([(xi <= cut).mean() for cut in cuts] for xi in (free, after))
                left.plot(false, found, color=colour, ls="-" if lag == 1 else "--",
                          label=f"{label if arm == 'oracle' else 'ξ'}, {lag} after: {area(after, free):.2f}")
        left.set(title=title, ylabel="share of harmful updates found",
                 xlabel="share of other steps taken for one")
        left.legend(loc="lower right", fontsize=8.5, title="area under the curve")
        right.axhline(0, color="#888888", lw=0.8)
        arms = [arm for arm in WATCHED if any(run["arm"] == arm for run in runs)]
        seeds = [{run["seed"] for run in runs if run["arm"] == arm} for arm in arms]
        for i, arm in enumerate(arms):
            paths = [x for run in runs if run["arm"] == arm and not run["failed"]
                     and run["seed"] in set.intersection(*seeds) for x in aftermath(run)]
            if paths:
                label, colour, line, marker = STYLES[arm]
                right.plot(range(WORST + 1), np.nanmean(paths, 0)[:WORST + 1], color=colour, ls=line, marker=marker, ms=5,
                           mfc="white", markevery=(i % 3, 3), label=label)
        right.set(xlabel="steps after a harmful update", ylabel="J less J before it (points)")
    grid[0][1].legend(loc="lower right", ncols=2, fontsize=8.5)
    save(figure, path)


def figures(args) -> None:
    """All pictures of this folder, as far as there are runs for them."""
    draw_distortion(args.into / "distortion.png")
    titles = {"safe": f"safe rate, {SAFE_LR:g}", "noisy": f"safe rate, {SAFE_LR:g}, 10 % of rewards flipped",
              "edge": f"rate at the edge, {EDGE_LR:g}", "gspo": f"GSPO as base, safe rate, {SAFE_LR:g}"}
    panels = {}
    for condition in (c for c in titles if c in args.only):
        for run in read_pack(args.into, condition):
            if run["arm"] in SHOWN:
                panels.setdefault(titles[condition], {}).setdefault(run["arm"], []).append(run)
    for arms in panels.values():
        most = max(map(len, arms.values()))
        for arm in [arm for arm, runs in arms.items() if len(runs) < most]:
            del arms[arm]  # a mean over other seeds would not compare
    if panels:
        draw_curves(panels, args.into / "panels.png")
    safe = panels.get(titles["safe"], {})
    if first := {arm: safe[arm] for arm in FIRST if arm in safe}:
        draw_first(first, args.into / "curves.png")
    if inside := [run for run in read_pack(args.into, "safe") if run["arm"] == "pipo"]:
        title = f"PIPO, learning rate {SAFE_LR:g}, seed {inside[0]['seed']}"
        draw_inside(inside[0], title, args.into / "inside.png")
    if probe := [run for run in read_pack(args.into, "probe") if run["rows"] > WINDOW + 3]:
        draw_xi(probe, args.into / "xi.png")
        draw_paper(probe, mixed_report(read_pack(args.into, "mixed")), args.into / "paper.png")
    harm = {title: read_pack(args.into, condition) for condition, title in HARMS.items()}
    if harm := {title: runs for title, runs in harm.items() if runs}:
        draw_harm(harm, args.into / "harm.png")


# What `plot` can draw, the best first.
MEASURED = {"eval_pass@1": "held-out pass@1 (%)", "eval_reward": "held-out reward", "mu": "reward in training"}


def plot(args) -> None:
    """Curves and inside of anybody's run folders, into the present folder or --into."""
    into, runs, logs, measured = Path() if args.into == HERE else args.into, {}, {}, []
    for folder in args.folders:
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut one short
        if not any("mu" in row for row in rows):
            print(f"experiment: {path} does not exist or holds no step; give the folder of a run",
                  file=sys.stderr)
            sys.exit(2)
        # what all runs have: held-out pass@1, the same of a reward of one's own, or else the training reward
        measured.append({name for row in rows for name in ("eval_pass@1", "eval_reward", "mu") if name in row})
        logs[str(folder)] = rows
    common = set.intersection(*measured)
    name, words = next((name, words) for name, words in MEASURED.items() if name in common)
    for folder, rows in logs.items():
        scale = 1 if name == "eval_pass@1" else 0.01  # a curve is drawn times 100
        rows = [row | ({"eval_pass@1": row[name] * scale} if name in row else {}) for row in rows]
        runs[folder] = dict(columns=to_columns(rows), rows=len(rows), failed=None)
    into.mkdir(parents=True, exist_ok=True)
    draw_curves({"": {name: [run] for name, run in runs.items()}}, into / "pipo-curves.png", "seconds", words)
    if name := next((name for name, run in runs.items() if np.isfinite(series(run, "xi")).any()), None):
        draw_inside(runs[name], name, into / "pipo-inside.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "figures", "plot"))
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN",
                        help="plot: folders with a metrics.jsonl")
    parser.add_argument("--only", default=",".join(CONDITIONS),
                        help="conditions, with commas (default: %(default)s)")
    parser.add_argument("--arms", default="", help="run these arms only, with commas (default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="so many seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="iterations a run (default: %(default)s)")
    parser.add_argument("--into", type=Path, default=HERE,
                        help="another folder than assets/, its runs in its runs/")
    args = parser.parse_args()
    args.only, args.arms = args.only.split(","), args.arms.split(",") if args.arms else []
    known = {"only": [*CONDITIONS], "arms": [*dict.fromkeys(arm for _, arms in CONDITIONS.values() for arm in arms)]}
    for name, names in known.items():
        if unknown := [given for given in getattr(args, name) if given not in names]:
            parser.error(f"--{name}: there is no {', '.join(unknown)}, but {', '.join(names)}")
    if (args.command == "plot") != bool(args.folders):
        parser.error("plot, and nothing else, takes the folders of runs")
    args.runs = HERE.parent / "runs" / "experiment" if args.into == HERE else args.into / "runs"
    {"run": run, "table": table, "figures": figures, "plot": plot}[args.command](args)


if __name__ == "__main__":
    main()
