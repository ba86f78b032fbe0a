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
import gzip
import hashlib
import json
import math
import multiprocessing
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
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
# condition -> common settings, arms (the first is what the others are held against), seeds at most
CONDITIONS = {
    "sweep": ({}, {f"lr{lr:g}": dict(feedback="none", lr=lr) for lr in SWEEP}, SWEEP_SEEDS),
    "safe": (dict(lr=SAFE_LR), ARMS, SEEDS),
    "probe": (dict(lr=SAFE_LR, eval_every=1, prompts_per_step=32), {"pipo": ARMS["pipo"]}, SEEDS),
    "noisy": (dict(lr=SAFE_LR, reward_noise=0.1), ARMS, SEEDS),
    "edge": (dict(lr=EDGE_LR), ARMS, SEEDS),
    "gspo": (dict(lr=SAFE_LR, base="gspo"),
             {"gspo": ARMS["grpo"], "pipo": ARMS["pipo"], "constant": ARMS["constant"]}, SEEDS),
}


def wanted(args) -> list[dict]:
    """The jobs in the order in which they are worth having: by condition, then by seed, then by arm."""
    jobs = []
    for condition in args.only:
        common, arms, most = CONDITIONS[condition]
        steps = round(args.steps * (PROBE_LENGTH if condition == "probe" else 1))
        settings = dict(base="grpo", steps=steps, prompts_per_step=16, window=WINDOW, eval_every=10) | common
        jobs += [dict(condition=condition, arm=arm, seed=seed, settings=settings | own)
                 for seed in range(min(args.seeds, most)) for arm, own in arms.items()]
    return jobs


# ------------------------------------------------------------------------------------------------------------
# Running. A finished run is a folder with result.json, or a line of a pack; what is neither starts again.
# ------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside `path` and swap it in, so that a kill leaves the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".partial").write_bytes(data)
    os.replace(path.with_name(path.name + ".partial"), path)


def make_start(runs: Path) -> str:
    """The common warm start and the problems, made once; returns a fingerprint of them all."""
    start, files = runs / "start", [runs / f"{name}.jsonl" for name in ("train", "eval", "probe")]
    if not start.exists():
        import pipo
        import torch
        torch.set_num_threads(1)
        held_out, warm, train = pipo.demo_rows(0)
        for path, rows in zip(files, (train[:-PROBE_PROBLEMS], held_out, train[-PROBE_PROBLEMS:])):
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        print("warm start: teaching the demo's model until it is sometimes right", flush=True)
        with open(runs / "start.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            pipo.build_demo(str(runs / "start.partial"), pipo.Config(**pipo.DEMO), warm, torch.device("cpu"))
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
    pipo.time = SimpleNamespace(perf_counter=time.process_time)


def perform(job: dict, runs: Path, start: str) -> dict:
    """One run, in a worker. Numbers that stop being finite are a result too, with the metrics up to there."""
    import pipo
    out, failed = runs / job["condition"] / f"{job['arm']}-seed{job['seed']}", None
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    held_out = "probe.jsonl" if job["condition"] == "probe" else "eval.jsonl"
    cfg = pipo.Config(**pipo.DEMO | job["settings"] | dict(
        model=str(runs / "start"), dataset=str(runs / "train.jsonl"), eval_dataset=str(runs / held_out),
        instruction="", seed=job["seed"], device="cpu", save_every=job["settings"]["steps"], show_every=0,
        out=str(out)))
    with open(out / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            pipo.train(cfg)
        except FloatingPointError as error:
            failed = str(error).split(";")[0]
    rows = pipo.read_jsonl(out / "metrics.jsonl")
    for heavy in ("checkpoint", "model"):
        shutil.rmtree(out / heavy, ignore_errors=True)
    result = job | dict(start=start, failed=failed, rows=len(rows), columns=to_columns(rows))
    write_whole(out / "result.json", json.dumps(result).encode())
    return result


def to_columns(rows: list[dict]) -> dict:
    """Metrics as columns (half the size of rows), floats to 5 digits; what never changes is one value.

    Left out are what depends on the machine, and the evaluation by data set: there is one only.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in (n for n in names if n not in ("memory_gb", "tokens") and not n.startswith("eval/")):
        values = [row.get(name) for row in rows]
        first, *rest = (float(f"{v:.5g}") if isinstance(v, float) else v for v in values)
        columns[name] = rest[0] if len(set(rest)) == 1 and first in (None, rest[0]) else [first, *rest]
    return columns


def read_pack(into: Path, condition: str) -> list[dict]:
    """The packed runs of a condition, its arms in their order, then arms that CONDITIONS no longer has."""
    path, order = into / f"runs-{condition}.jsonl.gz", list(CONDITIONS[condition][1])
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
    start = make_start(args.runs) if left else None
    if left and any(x["start"] != start for runs in done.values() for x in runs.values()):
        sys.exit(f"{args.into} holds runs from another warm start; begin your own with --into DIR")
    begun, total, spent = time.time(), sum(map(cost, left)), 0
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: sys.exit("stopped; the same command goes on, unfinished runs anew"))
    pool = ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), set_up_worker)
    try:
        futures = {pool.submit(perform, job, args.runs, start): job for job in left}
        for count, future in enumerate(as_completed(futures), 1):
            job, result = futures[future], future.result()
            done[job["condition"]][job["arm"], job["seed"]] = result
            pack(args.into, job["condition"], done[job["condition"]])
            spent, elapsed, scores = spent + cost(job), (time.time() - begun) / 60, curve(result)[2]
            broken = " FAILED, " + result["failed"] if result["failed"] else ""
            name = f"{job['condition']} {job['arm']} seed {job['seed']}"
            print(f"{count}/{len(left)} {name}: {scores[0]:.1%} -> {scores[-1]:.1%}{broken}; "
                  f"{elapsed:.1f} min, about {elapsed * (total / spent - 1):.0f} min left", flush=True)
    finally:
        for worker in multiprocessing.active_children():  # idle, unless something stopped us
            worker.terminate()
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------
# What a run came to. Seconds are those of sampling, grading and both steps, not of evaluation and saving.
# ------------------------------------------------------------------------------------------------------------

MEASURES = {"end": "final pass@1 (%)", "best": "best (%)", "auc": "mean over the run (%)",
            "equal_time": "at equal time (%)", "seconds": "seconds", "collapsed": "collapsed (%)",
            "spikes": "gradient spikes", "length": "final tokens"}
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
    return [100 * scores[-1], 100 * scores.max(), 100 * scores[1:].mean(),
            100 * np.interp(time_up, clock, scores), clock[-1], 100 * bool(collapsed), spikes,
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
    pairs += [("pipo", arm) for arm in arms if arm in ("constant", "shuffled")]
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
            "highest correlation with it that this leaves":
                math.sqrt(real / square["change"]) if real else 0.0,
            "sd of μ_t given J(θ_t), the sampling noise": math.sqrt(mu_noise),
            "root mean square of μ_t − μ_his, ξ's numerator": math.sqrt(square["numerator"]),
            "share of its square that is change of J": max(0.0, 1 - numerator_noise / square["numerator"]),
            "share that is the last step's change of J": real / square["numerator"]}


def xi_report(into: Path) -> dict:
    """Agreement and noise in the probe, by phase; and, coarser, in all PIPO runs evaluated every 10 steps."""
    def pairs(runs, phase, target, every=1):
        return [(series(run, "xi")[rows], true_change(run, target, every)[rows])
                for run in runs for rows in [phase_rows(run, phase)]]

    probe = [run for run in read_pack(into, "probe") if run["rows"] > WINDOW + 3]
    report = {phase: {"noise": noise(probe, phase)} | {x: agreement(pairs(probe, phase, x)) for x in TARGETS}
              for phase in (PHASES if probe else ())}
    looking_back = {"feedback": "pipo", "eval_every": 10}
    others = [run for condition in CONDITIONS if condition != "probe" for run in read_pack(into, condition)
              if looking_back.items() <= run["settings"].items() and run["rows"] > 20]
    if others:
        report["coarse"] = {f"change of J over the 10 steps {words}": agreement(pairs(others, "whole", x, 10))
                            for x, words in (("last", "before"), ("next", "after"))}
    return report


# ------------------------------------------------------------------------------------------------------------
# Tables.
# ------------------------------------------------------------------------------------------------------------


def markdown(header: list, rows: list[list]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


BRIEF = {"safe": "safe rate", "noisy": "safe rate, noisy rewards", "edge": "rate at the edge", "gspo": "GSPO"}


def brief(results: dict) -> list[str]:
    """Tables of all arms and conditions for the README; in brackets the paired difference to GRPO."""
    def cell(condition, arm, measure):
        found, first = results[condition], next(iter(results[condition]["arms"]))
        name = first if arm == "grpo" else arm
        if name not in found["arms"]:
            return "–"
        gap = found["differences"].get(f"{name} − {first}")
        return f"{found['arms'][name][measure][0]:.1f}" + (
            " ({:+.1f} ± {:.1f})".format(*gap[measure]) if gap else "")

    conditions = [condition for condition in BRIEF if condition in results]
    return [f"**{title}**\n\n" + markdown(["arm", *(BRIEF[condition] for condition in conditions)], [
        [STYLES[arm][0], *(cell(condition, arm, measure) for condition in conditions)] for arm in ARMS])
            for measure, title in (("end", f"Held-out pass@1 (%) after {STEPS} iterations"),
                                   ("auc", "Held-out pass@1 (%), mean over the run"),
                                   ("equal_time", "Held-out pass@1 (%) at equal time, when GRPO ends"),
                                   ("collapsed", "Collapsed runs (%)"))]


def table(args) -> None:
    """Write results.md and results.json from the packed runs."""
    def line(found, names, sign=""):
        means = [f"{found[n][0]:{sign}.1f}" for n in names]
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
    for condition in (c for c in args.only if read_pack(args.into, c)):
        runs = read_pack(args.into, condition)
        found = results[condition] = compare(runs)
        common = {k: v for k, v in runs[0]["settings"].items()
                  if all(run["settings"].get(k) == v for run in runs)}
        names = [n for n in MEASURES if n != "equal_time" or condition != "sweep"]
        text += [f"## {condition}", ", ".join(f"{k} {v}" for k, v in common.items()) + ". Equal time: "
                 f"{found['time_up']:.0f} CPU seconds, when {runs[0]['arm']} ends.",
                 markdown(["arm", "seeds", *(MEASURES[n] for n in names)],
                          [[arm, *line(x, names)] for arm, x in found["arms"].items()])]
        if found["differences"] and condition != "sweep":
            names = [n for n in MEASURES if n not in ("best", "length")]
            text += [markdown(["difference", "seeds", *(MEASURES[n].replace("%", "points") for n in names)],
                              [[pair, *line(x, names, "+")] for pair, x in found["differences"].items()])]
    report = results["xi"] = xi_report(args.into)
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
    text = "\n\n".join(text[:1] + brief(results) + text[1:]) + "\n"
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
          "gspo": ("GSPO", "#000000", "-", "o")}


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


def draw_curves(panels: dict[str, dict[str, list[dict]]], path: Path, unit: str = "CPU seconds") -> None:
    """pass@1 against steps and seconds, a row of panels a condition; panels: title -> label -> runs."""
    plt, handles = pyplot(), {}
    size = 9.5, 1 + 2.9 * len(panels)
    figure, grid = plt.subplots(len(panels), 2, figsize=size, sharey="row", squeeze=False)
    for axes, (title, arms) in zip(grid, panels.items()):
        for i, (arm, runs) in enumerate(arms.items()):
            label, colour, line, marker = STYLES.get(arm) or (arm, *list(STYLES.values())[i % 7][1:])
            curves = [curve(run) for run in runs]
            for axis, kind in zip(axes, (0, 1)):  # steps, seconds
                x = np.unique(np.concatenate([c[0] for c in curves])) if kind == 0 else np.linspace(
                    0, np.mean([c[1][-1] for c in curves]), 61)
                mean, half = 100 * mean_and_half([np.interp(x, c[kind], c[2]) for c in curves])
                every, front = max(1, len(x) // 6), arm in ("grpo", "gspo", "pipo")
                handles[label], = axis.plot(x, mean, ls=line, color=colour, marker=marker, ms=5, mfc="white",
                                            markevery=(i * every // 7, every), zorder=3 if front else 2)
                if front:
                    axis.fill_between(x, (mean - half).clip(0), (mean + half).clip(max=100), color=colour,
                                      alpha=0.15, lw=0)
        axes[0].set_ylabel("held-out pass@1 (%)")
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


def figures(args) -> None:
    """All pictures of this folder, as far as there are runs for them."""
    draw_distortion(args.into / "distortion.png")
    titles = {"safe": f"safe rate, {SAFE_LR:g}", "noisy": f"safe rate, {SAFE_LR:g}, 10 % of rewards flipped",
              "edge": f"rate at the edge, {EDGE_LR:g}", "gspo": f"GSPO as base, safe rate, {SAFE_LR:g}"}
    panels = {}
    for condition in (c for c in titles if c in args.only):
        for run in read_pack(args.into, condition):
            panels.setdefault(titles[condition], {}).setdefault(run["arm"], []).append(run)
    if panels:
        draw_curves(panels, args.into / "curves.png")
    if inside := [run for run in read_pack(args.into, "safe") if run["arm"] == "pipo"]:
        title = f"PIPO, learning rate {SAFE_LR:g}, seed {inside[0]['seed']}"
        draw_inside(inside[0], title, args.into / "inside.png")
    if probe := [run for run in read_pack(args.into, "probe") if run["rows"] > WINDOW + 3]:
        draw_xi(probe, args.into / "xi.png")


def plot(args) -> None:
    """Curves and inside of anybody's run folders, into the present folder or --into."""
    into, runs = Path() if args.into == HERE else args.into, {}
    for folder in args.folders:
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut one short
        if not any("mu" in row for row in rows):
            print(f"experiment: {path} does not exist or holds no step; give the folder of a run",
                  file=sys.stderr)
            sys.exit(2)
        if not any("eval_pass@1" in row for row in rows):  # never evaluated: the training reward
            rows = [row | {"eval_pass@1": row["mu"]} for row in rows]
        runs[str(folder)] = dict(columns=to_columns(rows), rows=len(rows), failed=None)
    into.mkdir(parents=True, exist_ok=True)
    draw_curves({"": {name: [run] for name, run in runs.items()}}, into / "pipo-curves.png", "seconds")
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
    parser.add_argument("--seeds", type=int, default=SEEDS, help="so many seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="iterations a run (default: %(default)s)")
    parser.add_argument("--into", type=Path, default=HERE,
                        help="another folder than assets/, its runs in its runs/")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := [condition for condition in args.only if condition not in CONDITIONS]:
        parser.error(f"--only: there is no condition {', '.join(unknown)}, but {', '.join(CONDITIONS)}")
    if (args.command == "plot") != bool(args.folders):
        parser.error("plot, and nothing else, takes the folders of runs")
    args.runs = HERE.parent / "runs" / "experiment" if args.into == HERE else args.into / "runs"
    {"run": run, "table": table, "figures": figures, "plot": plot}[args.command](args)


if __name__ == "__main__":
    main()
