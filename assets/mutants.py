#!/usr/bin/env python3
"""Whether the tests notice: plants faults in a copy of pipo.py, one at a time, each of which test_pipo.py
must catch.

    python assets/mutants.py                        # all of them, a few minutes; exit code 1 if one survived
    python assets/mutants.py --only phi-without-lambda --only one-eos
    python assets/mutants.py --list
    python assets/mutants.py --check                # only whether all of them can be planted, in a second

A fault is a text that stands in pipo.py exactly once and what it becomes. `tests` is a -k expression of
pytest, the tests that are tried first; a fault that they let pass is tried on all tests before it counts as
survived.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pipo.py", "test_pipo.py", "README.md", "Makefile", "assets")
TIME_LIMIT = 600  # seconds a call of pytest


class Fault(NamedTuple):
    """One planted fault."""
    name: str
    find: str
    replace: str
    tests: str


FAULTS = [
    # The mathematics
    Fault("tracker-ddof-0", "statistics.stdev(self.history)", "statistics.pstdev(self.history)",
          "start_here or tracker"),
    Fault("window-holds-the-present", "statistics.mean(self.history)",
          "statistics.mean([*self.history, mu][1:])", "start_here or tracker"),
    Fault("phi-without-lambda", "return xi if xi >= 0 else self.lam * xi",
          "return xi", "start_here or tracker"),
    Fault("advantages-ddof-0", "rewards.std(1, keepdim=True)", "rewards.std(1, correction=0, keepdim=True)",
          "start_here or advantages"),
    Fault("rewards-of-mean-size-1-over-g", "advantages * advantages.shape[1] * phi / total",
          "advantages * phi / total", "start_here or attribution"),
    Fault("coefficient-outside-the-min", "-torch.min(plain, clipped)",
          "-torch.min(ratio, ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)) * A",
          "loss or clip"),
    Fault("sequence-ratio-not-averaged", "log_ratio.sum(1, keepdim=True) / lengths",
          "log_ratio.sum(1, keepdim=True)", "loss"),
    Fault("kl-without-its-second-term", "d.exp() - d - 1", "d.exp() - 1", "kl"),

    # The update
    Fault("shifted-by-one", "[False] * (len(p) - 1) + [True] * n + [False]", "[False] * len(p) + [True] * n",
          "softmax or training_logprobs"),
    Fault("no-temperature-in-training", "head(h).float() / temperature", "head(h).float()",
          "softmax or training_logprobs"),
    Fault("denominators-per-micro-batch", "mask, objective, ref_logprobs, n_sequences, n_tokens)",
          "mask, objective, ref_logprobs)", "splitting"),
    Fault("dropped-rows-not-in-denominators", "whole = len(minibatch), batch.mask[minibatch].sum()",
          "whole = len(rows), batch.mask[rows].sum()", "splitting or plain_grpo"),
    Fault("ratio-against-the-policy-of-now", "batch.behavior_logprobs[part, :width]", "logprobs.detach()",
          "splitting or epoch"),
    Fault("a-step-without-signal", "        if len(rows) == 0:\n", """\
        if len(rows) == 0:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
""", "without_signal"),
    Fault("a-step-on-numbers-that-are-not-finite", "if not math.isfinite(norm + loss_sum):", "if False:",
          "finite"),
    Fault("lr-never-set", 'group["lr"] = lr', "pass", "both_steps"),
    Fault("gradient-of-the-failed-attempt-kept", "        model.zero_grad()  # behind",
          "        pass  # behind", "where_memory"),
    Fault("as-many-tokens-after-running-out", "        microbatch_tokens //= 2\n",
          "        parts = microbatches(rows, batch.lengths(), microbatch_tokens // 2)\n"
          "        return [backward(model, batch, part, *given) for part in parts], microbatch_tokens\n",
          "where_memory"),

    # One iteration
    Fault("pushed-twice-and-before-it-is-read", "    feedback = run.tracker.feedback(mu)\n",
          "    run.tracker.push(mu)\n    feedback = run.tracker.feedback(mu)\n", "start_here or window"),
    Fault("never-pushed", "    run.tracker.push(mu)\n", "", "start_here or window"),
    Fault("mu-of-mixed-groups-only", "mu = batch.rewards.mean(dtype=torch.float64).item()",
          "mu = batch.rewards[batch.rewards.std(1) > 0].mean(dtype=torch.float64).item()", "start_here"),
    Fault("every-base-divides-by-the-std", "group_advantages(batch.rewards, objective.normalize_std)",
          "group_advantages(batch.rewards, True)", "both_steps"),
    Fault("kl-in-the-verification-step", "objective = BASES[cfg.base]._replace(",
          "objective = BASES[cfg.base]._replace(kl_coef=cfg.kl_coef, ", "both_steps or kl"),
    Fault("reference-trained-along", "run.reference = load_model(path, device, cfg.dtype).requires_grad_(False)",
          "run.reference = model", "kl"),
    Fault("pi-lr-ignored", "lr=cfg.pi_lr or cfg.lr", "lr=cfg.lr", "start_here or both_steps"),
    Fault("the-fresh-batch-verified", "run.optimizer, run.previous, pi_rewards",
          "run.optimizer, batch, pi_rewards", "start_here"),
    Fault("sampler-never-checked", "if run.step == 1 and gap > ", "if False and gap > ", "cannot_be_trained"),
    Fault("gspo-against-the-samplers-rounding", "batch.behavior_logprobs = recomputed", "pass", "gspo_in_bfloat16"),
    Fault("room-that-was-left-forgotten", "    run.cache_tokens = batch.cache_tokens\n", "", "running_out"),

    # Training
    Fault("evaluations-drawn-anew", 'cfg.seed, "evaluation")',
          'cfg.seed, "evaluation", run.step)', "evaluation"),

    # What users bring
    Fault("missing-weights-are-drawn", 'if found["missing_keys"]:', "if False:", "cannot_be_trained"),
    Fault("the-first-gold-only", "for gold in problem.golds), key=", "for gold in problem.golds[:1]), key=",
          "gold"),
    Fault("the-answer-is-in-the-prompt", "messages.pop()", "pass", "left_out or prompts_through"),
    Fault("golds-in-json-unread", "cell = json.loads(cell)", "pass", "golds"),
    Fault("naive-pass-at-k", "math.comb(n - int(right), k) / math.comb(n, k)", "(1 - int(right) / n) ** k",
          "pass_at_k"),
    Fault("turn-ends-nothing", "ids.update(i for i in first if i in tokenizer.added_tokens_decoder)", "pass",
          "every_eos or prompts_through"),

    # Sampling
    Fault("top-p-in-the-log-probabilities", "return tokens, logprobs.gather(", """\
if temperature and top_p < 1:
        logprobs = (probs / probs.sum(-1, keepdim=True)).log()
    return tokens, logprobs.gather(""", "draws or training_logprobs"),
    Fault("one-eos", "*(configured if isinstance(configured, list)",
          "*(configured[:1] if isinstance(configured, list)", "eos"),
    Fault("eos-not-trained", "mask = padded([[1.0] * len(row.logprobs) for row in rows], device)",
          "mask = padded([[1.0] * (len(row.logprobs) - (row.tokens[-1] in eos)) for row in rows], device)",
          "eos"),
    Fault("cut-off-counts-as-ended", "[row.tokens[-1] not in eos for row in rows]", "[False for row in rows]",
          "eos or greedy"),

    Fault("special-tokens-hidden",
          "tokenizer.decode([token for token in completion if token not in hidden])",
          "tokenizer.decode(completion, skip_special_tokens=True)", "only_ends"),
    Fault("as-many-rows-a-wave-as-fit", "n = max(1, min(fitting, rows_a_wave or fitting))",
          "n = max(1, fitting)", "evaluation or had_to_wait"),

    # Verifying
    Fault("a-tolerance-for-fractions", "abs(x - y) < TINY * max(", "abs(x - y) < 1e-3 * max(", "answers"),
    Fault("hedges-are-paid", "require(not any(map(HEDGES.fullmatch, words)))", "pass", "answers"),
    Fault("an-unfinished-thought-is-paid", "grade(text, gold, problem.thinking)", "grade(text, gold)",
          "thought"),
    Fault("the-first-box-counts", r'max(text.rfind(r"\boxed"), text.rfind(r"\fbox"), 0)',
          r'max(text.find(r"\boxed"), text.find(r"\fbox"), 0)', "extraction"),

    # Memory
    Fault("weights-that-are-no-masters-never-move", "weight.copy_(master.to(weight.dtype))", "pass", "small_updates"),
    Fault("masters-lost-on-resume", "weight.copy_(master.copy_(saved))", "master.copy_(weight)",
          "masters or unbroken"),

    # Files
    Fault("old-checkpoint-deleted-first", "        torch.save(state, partial_file)\n",
          "        path.unlink(missing_ok=True)\n        torch.save(state, partial_file)\n", "full_disk or killed"),
    Fault("window-not-restored", 'run.tracker.history.extend(state["window"])', "pass", "unbroken"),
    Fault("previous-batch-not-restored", "run.previous = Batch(", "Batch(", "unbroken"),
    Fault("moments-not-restored", 'run.optimizer.load_state_dict(state["optimizer"])', "pass",
          "unbroken"),
    Fault("logs-not-cut-on-resume", "os.truncate(log, sum(map(len, kept)))", "pass", "unbroken or killed"),
    Fault("other-problems-on-resume", 'if state["problems"] != len(problems):', "if False:", "overwritten"),
    Fault("a-signal-saves-nothing", "if cfg.save_every and (caught or ", "if cfg.save_every and (", "signal_to_stop"),
    Fault("rope-theta-not-written", 'text_config.rope_theta = ropes["rope_theta"]', "pass", "transformers_4"),
    Fault("order-starts-over-on-resume", "pick_problems(problems, run.step + 1, cfg)",
          "pick_problems(problems, bar.n - bar.initial + 1, cfg)", "unbroken"),
]


def misfit(fault: Fault, source: str) -> str | None:
    """Why a fault cannot be planted, in a sentence; None if it can."""
    times = source.count(fault.find)
    if times != 1:
        return f"{fault.name}: stands {times} times in pipo.py, not once: {fault.find.strip()}"
    try:
        ast.parse(source.replace(fault.find, fault.replace))
    except SyntaxError as error:  # which any test would notice
        return f"{fault.name}: {error}"
    return None


def run_tests(folder: Path, *arguments: str) -> tuple[int, str]:
    """pytest on the copy in `folder`, up to the first failure: its exit code, and the test that failed."""
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "test_pipo.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, text=True, timeout=TIME_LIMIT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired:
        return 1, "a test that never ended"
    failed = re.search(r"^(?:FAILED|ERROR) test_pipo\.py(?:::(.+?))?(?: - |$)", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] or "test_pipo.py as a whole" if failed else done.stdout[-1000:]


def check_without_fault(source: str, folder: Path, *arguments: str) -> None:
    """Exit if tests fail on pipo.py as it is: they would seem to catch anything."""
    (folder / "pipo.py").write_text(source)
    code, told = run_tests(folder, *arguments)
    if code != 0:
        sys.exit(f"the tests fail without any fault: {told}")


def catch(fault: Fault, source: str, folder: Path) -> str | None:
    """Plant the fault in the copy; the test that catches it, or None."""
    for arguments in (["-k", fault.tests], []):
        if not arguments:
            check_without_fault(source, folder)
        (folder / "pipo.py").write_text(source.replace(fault.find, fault.replace))
        code, told = run_tests(folder, *arguments)
        if code == 1:
            return told
        if code not in (0, 5):  # 5: no test is called like this any more
            sys.exit(f"pytest could not run on {fault.name} (exit code {code}): {told}")
    return None


def main() -> None:
    """Plant what is asked for, and say for each whether it was caught."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="this one; may be repeated")
    parser.add_argument("--list", action="store_true", help="the names of the faults")
    parser.add_argument("--check", action="store_true", help="whether they can be planted, without any test")
    args = parser.parse_args()
    if args.list:
        print("\n".join(fault.name for fault in FAULTS))
        return
    if unknown := set(args.only or ()) - {fault.name for fault in FAULTS}:
        parser.error(f"--only: there is no fault {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    source = (ROOT / "pipo.py").read_text()
    misplaced = [told for fault in chosen if (told := misfit(fault, source))]
    if misplaced:
        sys.exit("\n".join(misplaced))
    if args.check:
        print(f"{len(chosen)} faults can be planted")
        return

    survived = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        check_without_fault(source, folder, "-k", " or ".join(fault.tests for fault in chosen))
        for fault in chosen:
            test = catch(fault, source, folder)
            print(f"{fault.name:40} {'caught by ' + test if test else 'SURVIVED'}", flush=True)
            survived += [] if test else [fault.name]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} faults were caught")
    if survived:
        sys.exit(1)


if __name__ == "__main__":
    main()
