#!/usr/bin/env python3
"""Speed and memory of pipo.py against transformers' generate and TRL's GRPOTrainer, on one core.

    python assets/bench.py                  # everything: about 15 minutes -> a table, and runs/bench.json
    python assets/bench.py --only short     # one part: memory, short or long
    python assets/bench.py --gpu            # 4B, random, on a GPU -> runs/bench-gpu.json (--tiny: on the CPU)
    python assets/bench.py --costs          # what 4B should take: memory, and an iteration's time, calculated
    python assets/bench.py --help

Both sides run in this process, on one thread, in fp32, from the same weights, with the same prompts, rewards
and learning rate. They take turns, the first turn is warm-up, and medians are compared, in seconds of CPU
time: on one thread that is the wall clock of an idle machine. (Neighbours do not count, but slow down memory
and caches.) What changes memory only is set to suit each side: TRL's micro-batch is its fastest, and PIPO's
cache has room for all rows.

At 256 tokens the ratios depend on the machine's memory. Most of generate's time there is the copying of keys
and values, and up to two fifths of it are the kernel's, which hands out pages anew for every tensor above 32
MB. That differs between machines, and between runs on one: on an Intel Xeon, sampling came to ratios from 6
to 13. Where glibc keeps what it has, they were from 6 to 9:

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=200000000 \\
        python assets/bench.py

Rewards are made up by position on both sides, so that neither has grading in it (it takes milliseconds):
"alive" means that every group is mixed, "typical" that 13 of 32 groups have equal rewards. Needs
`pip install trl==1.16.0`, which --gpu and --costs do not.

assets/bench.json holds what was measured, by processor: for each row the figures of both sides, the mean
lengths of their completions, and the ratio, theirs over ours: above 1 PIPO is faster or smaller.
runs/bench.json has the same form; measuring again on the same processor replaces its rows.
"""

import os

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from the hub

import argparse
import json
import math
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pipo

CPU_CLOCK = time.process_time
GROUP = 8  # samples a prompt
VOCABULARY = 512
LR = 1e-6
MANY = 10**6  # cache tokens: room for all rows


class Size(NamedTuple):
    """One size of the comparison."""
    limit: int  # longest completion
    turns: int  # that are counted


SIZES = {"short": Size(32, 9), "long": Size(256, 3)}


# ------------------------------------------------------------------------------------------------------------
# What is measured, and where it is kept
# ------------------------------------------------------------------------------------------------------------


def processor() -> str:
    """The processor's name, with family and model where the name says little."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    told = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if len(told) < 3:
        return platform.processor() or platform.machine()
    return f"{told['model name']} (family {told['cpu family']}, model {told['model']})"


class Report:
    """Rows that are printed as they come, and kept."""

    def __init__(self):
        self.rows = {}
        print(f"\n{'seconds, or what is named':46}{'ours':>10}{'theirs':>10}{'ratio':>8}   mean lengths")

    def add(self, key: str, label: str, figures: dict, ratio: float | None, lengths=()):
        """One row: `figures` are two or less by name, usually {"ours": seconds, "theirs": seconds}."""
        self.rows[key] = figures | {"ratio": ratio, "mean_lengths": list(lengths)}
        values = "".join(f"{value:10.3f}" for value in figures.values())
        told = "" if ratio is None else f"{ratio:.2f}"
        print(f"{label:46}{values:20}{told:>8}   {'  '.join(f'{x:.1f}' for x in lengths)}", flush=True)

    def against(self, key: str, label: str, ours: float, theirs: float, lengths=()):
        """A row of our figure and theirs, of which less is better."""
        self.add(key, label, {"ours": ours, "theirs": theirs}, theirs / ours, lengths)

    def write(self, path: Path, name: str) -> None:
        """Put the rows into the records of `path`, under the name of this processor or card."""
        records, versions = json.loads(path.read_text()) if path.exists() else {}, {}
        before = records.get(name, {"rows": {}})
        for package in ("torch", "transformers", "trl"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:  # TRL, which a GPU's rows do without
                pass
        records[name] = {"versions": versions, "rows": before["rows"] | self.rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------
# The model, the prompts and the rewards
# ------------------------------------------------------------------------------------------------------------


def bench_config(limit: int, vocabulary: int = VOCABULARY, **sizes) -> Qwen3Config:
    """A model of the demo's kind that, at random and so near uniform, draws an EOS as likely at every token.

    It takes many EOS ids: completions then average 0.37 to 0.4 of `limit`, which cuts a tenth of them off.
    """
    given = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True)
    eos = list(range(1, 1 + round(2.3 * vocabulary / limit)))
    return Qwen3Config(vocab_size=vocabulary, pad_token_id=0, eos_token_id=eos, **given | sizes)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A character for each id, so that TRL's text prompts come back as the same ids."""
    names = ["<pad>", "<eos>", *(chr(0x4E00 + i) for i in range(2, VOCABULARY))]
    characters = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


def bench_folder(folder: Path, limit: int) -> str:
    """The model and its tokenizer, saved as any other."""
    torch.manual_seed(0)
    Qwen3ForCausalLM(bench_config(limit)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def bench_prompts(count: int) -> list[list[int]]:
    """Prompts of 5 to 20 tokens, none of them an EOS."""
    draw = random.Random(0)
    return [[draw.randrange(100, VOCABULARY) for _ in range(draw.randint(5, 20))] for _ in range(count)]


def bench_rewards(count: int, kind: str) -> torch.Tensor:
    """(Q, G) by position, not by text: `kind` is "alive" or "typical"."""
    rewards = (torch.arange(count * GROUP) % GROUP % 3 == 0).float().view(count, GROUP)
    if kind == "typical":
        rewards[1::5], rewards[3::5] = 0.0, 1.0
    return rewards


# ------------------------------------------------------------------------------------------------------------
# Sampling against generate
# ------------------------------------------------------------------------------------------------------------


def generate(model, prompts, group_size: int, limit: int, **options) -> torch.Tensor:
    """transformers' generate on padded prompts, as TRL calls it: tokens (N, T), 0 behind the EOS."""
    rows, width = [p for p in prompts for _ in range(group_size)], max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in rows], device=model.device)
    return model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=limit, **options)[:, width:]


def check_greedy() -> None:
    """What is compared must be the same: greedy, both sides give the same tokens, at several lengths."""
    torch.manual_seed(0)
    config = bench_config(24, vocabulary=28, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                          head_dim=8, initializer_range=0.3)  # far from uniform: no ties
    model = Qwen3ForCausalLM(config).eval()
    prompts = [[random.Random(i).randrange(4, 28) for _ in range(1 + i % 7)] for i in range(24)]
    theirs = generate(model, prompts, 1, 24, do_sample=False)
    ours = pipo.sample(model, character_tokenizer(), prompts, 1, 24, temperature=0)
    assert ours.tokens.tolist() == theirs.tolist(), "greedy completions differ"
    assert ours.mask.sum(1).unique().numel() > 3, "greedy completions are all of a length"


def bench_sampling(ours, theirs, tokenizer, prompts, limit, turns, clock=CPU_CLOCK, room=MANY) -> tuple:
    """Median seconds and mean completion length of pipo.sample and of generate, each as [ours, theirs]."""
    seconds, lengths = ([], []), ([], [])
    eos = torch.tensor(theirs.generation_config.eos_token_id)
    for turn in range(turns + 1):
        torch.manual_seed(turn)
        times = [clock()]
        generator = pipo.rng(ours.device, turn)
        batch = pipo.sample(ours, tokenizer, prompts, GROUP, limit, generator=generator, cache_tokens=room)
        lengths[0].append(batch.mask.sum(1).mean().item())  # .item() and .cpu() also wait for a GPU
        times.append(clock())
        tokens = generate(theirs, prompts, GROUP, limit, do_sample=True, temperature=1.0, top_k=0).cpu()
        times.append(clock())
        ended = torch.isin(tokens, eos)
        own = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        lengths[1].append(own.float().mean().item())
        for side in (0, 1):
            seconds[side].append(times[side + 1] - times[side])
    return [statistics.median(x[1:]) for x in seconds], [statistics.mean(x[1:]) for x in lengths]


# ------------------------------------------------------------------------------------------------------------
# Whole iterations against TRL
# ------------------------------------------------------------------------------------------------------------


def phase_peak_gb(device) -> float:
    """The most memory held on a GPU since this was last asked; 0 elsewhere."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class TimedPIPO:
    """PIPO's iterations with a clock on each phase. A GRPO iteration is the same without the verification."""

    def __init__(self, model, tokenizer, prompts, rewards, cfg, clock=CPU_CLOCK, masters_on=None):
        self.model, self.tokenizer, self.cfg, self.clock = model, tokenizer, cfg, clock
        self.prompts, self.rewards = prompts, rewards
        self.optimizer, self.previous = pipo.MasterAdamW(
            model.parameters(), masters_on or model.device, lr=cfg.lr, weight_decay=cfg.weight_decay), None
        self.seconds, self.lengths, self.metrics, self.peaks = [], [], {}, {}

    def update(self, batch, coefficients) -> dict:
        """Either step."""
        return pipo.update(self.model, self.optimizer, batch, coefficients, pipo.BASES["grpo"], self.cfg.lr,
                           microbatch_tokens=self.cfg.microbatch_tokens)

    def step(self) -> None:
        """One iteration: sample, verify on the batch before (the first, a warm-up, has none), explore."""
        times, generator = [self.clock()], pipo.rng(self.model.device, len(self.seconds))

        def done(phase):
            times.append(self.clock())
            self.peaks[phase] = max(self.peaks.get(phase, 0), phase_peak_gb(self.model.device))

        batch = pipo.sample(self.model, self.tokenizer, self.prompts, GROUP, self.cfg.max_new_tokens,
                            generator=generator, cache_tokens=self.cfg.cache_tokens)
        batch.advantages = pipo.group_advantages(self.rewards)
        done("sampling")
        if self.previous is not None:
            self.update(self.previous, pipo.improvement_rewards(self.previous.advantages, 0.5))
        done("verification")
        self.metrics = self.update(batch, batch.advantages)
        done("exploration")
        self.previous = batch
        self.seconds.append([after - before for before, after in zip(times, times[1:])])
        self.lengths.append(batch.mask.sum(1).mean().item())

    def median(self, *phases) -> float:
        """Median seconds of these phases together: 0 sampling, 1 verification, 2 exploration."""
        return statistics.median(sum(row[i] for i in phases) for row in self.seconds[1:])


def bench_trl(path, limit, prompts, rewards, steps_each, turns, out) -> tuple[float, float, TimedPIPO]:
    """TRL's GRPO with `steps_each` optimizer steps a generation, in turns with PIPO.

    Returns its median seconds from generation to the last step, its mean completion length, and our side.
    """
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = len(prompts) * GROUP
    cfg = pipo.Config(prompts_per_step=len(prompts), group_size=GROUP, max_new_tokens=limit, temperature=1.0,
                      lr=LR, cache_tokens=MANY, microbatch_tokens=2048)
    ours = TimedPIPO(pipo.load_model(path, torch.device("cpu")), AutoTokenizer.from_pretrained(path), prompts,
                     rewards, cfg)
    seconds, lengths = [], []
    texts = [ours.tokenizer.decode(prompt) for prompt in prompts]
    assert ours.tokenizer(texts).input_ids == prompts

    def reward(completion_ids, **_):
        lengths.append(statistics.mean(map(len, completion_ids)))
        return rewards.flatten().tolist()

    class Turns(TrainerCallback):
        """Stops TRL's clock after its last step on a batch, and lets PIPO have its turn."""

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
            output_dir=str(out), max_steps=steps_each * (turns + 1), num_iterations=steps_each,
            num_generations=GROUP, per_device_train_batch_size=32, gradient_accumulation_steps=rows // 32,
            max_completion_length=limit, temperature=1.0, loss_type="grpo", beta=0.0, learning_rate=LR,
            lr_scheduler_type="constant", weight_decay=cfg.weight_decay, shuffle_dataset=False,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", logging_strategy="no",
            save_strategy="no", disable_tqdm=True))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert len(seconds) == len(ours.seconds) == turns + 1
    return statistics.median(seconds[1:]), statistics.mean(lengths[1:]), ours


def bench_size(report: Report, name: str, size: Size, count: int, folder: Path) -> None:
    """Sampling and iterations at one size, on `count` prompts."""
    (limit, turns), looks_back = size, []
    path, prompts = bench_folder(folder / name, limit), bench_prompts(count)
    ours = pipo.load_model(path, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    seconds, lengths = bench_sampling(ours, theirs, tokenizer, prompts, limit, turns)
    report.against(f"sampling_{name}", f"sampling, {name}", *seconds, lengths)
    for kind in ("alive", "typical"):
        rewards, where = bench_rewards(count, kind), f"{name}, {kind}"
        for steps, word in ((1, "one"), (2, "two")):
            trl, length, ours = bench_trl(path, limit, prompts, rewards, steps, turns, folder / "trl")
            lengths = statistics.mean(ours.lengths[1:]), length
            if steps == 1:
                report.against(f"grpo_{name}_{kind}", f"GRPO against GRPO, {where}",
                               ours.median(0, 2), trl, lengths)
            report.against(f"pipo_vs_{word}_{name}_{kind}", f"PIPO against {word} of TRL's steps, {where}",
                           ours.median(0, 1, 2), trl, lengths)
            if kind == "alive":  # both on the same batch, explored first and verified an iteration later
                looks_back += [after[1] / row[2] for row, after in zip(ours.seconds[1:], ours.seconds[2:])]
                both = {"verification": ours.median(1), "exploration": ours.median(2)}
    if looks_back:  # two turns or more
        report.add(f"verify_over_explore_{name}", f"verification and exploration, both ours, {name}", both,
                   statistics.median(looks_back))


# ------------------------------------------------------------------------------------------------------------
# Memory of the log-probabilities
# ------------------------------------------------------------------------------------------------------------

# In a process of its own, because the peak of a process never falls. H is small, so that the logits dominate.
LOGPROB_MEMORY = r"""
import re, sys, torch, pipo
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.set_num_threads(1)
def peak_gb():
    return int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 2**20
V = int(sys.argv[2])
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1, head_dim=32))
tokens = torch.randint(2, V, (8, 256))
before = peak_gb()
if sys.argv[1] == "chunked":
    logprobs = pipo.token_logprobs(model, [[7]] * 8, tokens, torch.ones(8, 256))
else:
    ids = torch.cat([torch.full((8, 1), 7), tokens[:, :-1]], 1)
    logprobs = model(ids, use_cache=False).logits.log_softmax(-1).gather(-1, tokens[..., None])
logprobs.mean().backward()
print(peak_gb() - before)
"""


def logprob_memory(kind: str, vocabulary: int = 151_936) -> float:
    """GB that the log-probabilities of 2,048 tokens and their gradient take; the vocabulary is Qwen3's."""
    command = [sys.executable, "-c", LOGPROB_MEMORY, kind, str(vocabulary)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)


def bench_memory(report: Report) -> None:
    """Chunked log-probabilities against all logits at once: 2,048 tokens, whose logits alone are 1.2 GB."""
    chunked, plain = logprob_memory("chunked"), logprob_memory("plain")
    report.against("logprob_memory", "GB for log-probabilities, against all at once", chunked, plain)


# ------------------------------------------------------------------------------------------------------------
# A 4B model on a GPU
# ------------------------------------------------------------------------------------------------------------

QWEN3_4B = dict(vocabulary=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192)


TINY = dict(vocabulary=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8)  # to see on a CPU that --gpu runs


def random_model(limit: int, cfg, device, attention="shared_heads", **sizes):
    """Random weights whose completions average about 0.38 of `limit`."""
    torch.manual_seed(0)
    with device:
        config = bench_config(limit, **sizes)
        model = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, cfg.dtype))
    model.set_attn_implementation(attention)
    return model.eval()


def bench_waves(report, tokenizer, prompts, cfg, device, waves, **sizes) -> None:
    """Tokens a second of pipo.sample and of generate, that many rows at a time."""
    both = [random_model(cfg.max_new_tokens, cfg, device, how, **sizes) for how in ("shared_heads", "sdpa")]
    room = pipo.cache_room(pipo.Run(both[0], tokenizer, None, None), cfg)
    for rows in waves:
        fits = room // rows // 2 - len(prompts[0])  # generate's cache is there twice
        new = max(8, min(cfg.max_new_tokens // 8, fits))
        for model in both:
            model.generation_config.eos_token_id = bench_config(new, **sizes).eos_token_id
        try:
            seconds, lengths = bench_sampling(*both, tokenizer, prompts[:rows // GROUP], new, 2,
                                              time.perf_counter, room)
            ours, theirs = (rows * length / s for length, s in zip(lengths, seconds))
            report.add(f"gpu_tokens_{rows}", f"tokens a second, {rows} rows, up to {new} tokens",
                       {"ours": ours, "theirs": theirs}, ours / theirs, lengths)
        except torch.OutOfMemoryError as error:
            print(f"{rows} rows: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()  # behind the except block, which holds the tensors of what failed


def bench_gpu(report, folder, device="cuda", limit=4096, count=32, waves=(64, 256, 1024), **sizes) -> None:
    """A random Qwen3-4B on a GPU: speed against generate, iterations of `count` prompts x GROUP by phase,
    what was calculated against what they took, how far sampler and trainer are apart, a save and a resume.

    `waves`: how many rows are sampled at a time; `sizes`: of another model.
    """
    sizes = sizes or QWEN3_4B
    device, most = torch.device(device), max(count * GROUP, *waves) // GROUP
    prompts = [[100 + i] * 128 for i in range(most)]
    tokenizer = character_tokenizer()
    cfg = pipo.Config(prompts_per_step=count, group_size=GROUP, max_new_tokens=limit, max_prompt_tokens=128,
                      temperature=1.0, lr=LR, device=device.type,
                      dtype="bfloat16" if device.type == "cuda" else "float32")
    bench_config(limit, **sizes).save_pretrained(folder / "shapes")
    masters_on = pipo.fit_memory(cfg, str(folder / "shapes"), device)
    if device.type == "cuda":
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
        name = torch.cuda.get_device_name(device)
        report.add("gpu_card", f"{name}: GiB, free", {"GiB": total, "free": free}, None)
    bench_waves(report, tokenizer, prompts, cfg, device, waves, **sizes)
    free = pipo.free_memory(device)

    model = random_model(limit, cfg, device, **sizes)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rewards = (torch.arange(count * GROUP, device=device) % 3 == 0).float().view(-1, GROUP)
    ours = TimedPIPO(model, tokenizer, prompts[:count], rewards, cfg, time.perf_counter, masters_on)
    room = pipo.cache_room(pipo.Run(model, tokenizer, ours.optimizer, None), cfg)
    with torch.device("meta"):
        shapes = Qwen3ForCausalLM(bench_config(limit, **sizes))
    fits = memory_plan(shapes, cfg, device.type, masters_on.type, free).tokens
    cfg = ours.cfg = replace(cfg, cache_tokens=room)
    plan = memory_plan(shapes, cfg, device.type, masters_on.type, free)
    first = pipo.sample(model, tokenizer, ours.prompts, GROUP, limit, generator=pipo.rng(device, 0),
                        cache_tokens=room)
    report.add("gpu_cache", "tokens of cache: taken, calculated", {"taken": room, "fits": fits}, None)
    report.add("gpu_out_of_memory", "how often sampling ran out of memory",
               {"times": first.out_of_memory}, None)
    advantages = pipo.group_advantages(rewards).flatten()
    again = pipo.trainer_logprobs(model, first, cfg.temperature, cfg.microbatch_tokens)
    for base in ("grpo", "gspo"):  # before any update, against the sampler: 0 but for rounding
        means = pipo.policy_loss(again, first.behavior_logprobs, advantages, first.mask, pipo.BASES[base])[1]
        report.add(f"gpu_step1_{base}", f"{base}, step 1: gap, share clipped",
                   {"gap": means["logprob_gap"], "clipped": means["clip_fraction"]}, None)
    del first, again
    torch.cuda.empty_cache()
    phase_peak_gb(device)  # from here on
    ours.step()
    ours.step()
    for i, phase in enumerate(("sampling", "verification", "exploration")):
        planned = plan.gib["sampling" if phase == "sampling" else "training"]
        gb = {"planned": planned, "measured": ours.peaks[phase]}
        report.add(f"gpu_seconds_{phase}", f"{count} x {GROUP}: seconds of {phase}", {"ours": ours.median(i)},
                   None, ours.lengths[1:])
        report.add(f"gpu_memory_{phase}", f"{count} x {GROUP}: GiB planned, measured", gb,
                   ours.peaks[phase] / planned)
    bench_resume(report, folder / "run", ours)


def bench_resume(report, out: Path, ours: TimedPIPO) -> None:
    """Seconds of saving a run, of opening its checkpoint, and of going on from it."""
    size = 13 * sum(weight.numel() for weight in ours.model.parameters())
    if shutil.disk_usage(out.parent).free < 2 * size:
        print(f"no save: {size / 2**30:.0f} GiB would be written below {out.parent}")
        return
    run = pipo.Run(ours.model, ours.tokenizer, ours.optimizer, pipo.ImprovementTracker(8, 0.1), step=2,
                   previous=ours.previous)
    run.tracker.push(0.5)
    out.mkdir()
    (out / "metrics.jsonl").touch()
    clock = [time.perf_counter()]
    pipo.save_checkpoint(run, [], ours.cfg, out)
    clock.append(time.perf_counter())
    state = pipo.open_run(replace(ours.cfg, resume=True), out)
    clock.append(time.perf_counter())
    before = run.model.get_input_embeddings().weight[:1].clone()
    pipo.load_checkpoint(run, state, [], out)
    clock.append(time.perf_counter())
    assert torch.equal(before, run.model.get_input_embeddings().weight[:1])
    save, opened, load = (after - start for start, after in zip(clock, clock[1:]))
    report.add("gpu_save", "seconds of a save", {"ours": save}, None)
    report.add("gpu_resume", "seconds of a resume: opening, loading", {"read": opened, "load": load}, None)


# ------------------------------------------------------------------------------------------------------------
# What memory a run should take, calculated. (pipo.py measures what is free instead: fit_memory, cache_room.)
# ------------------------------------------------------------------------------------------------------------

MEMORY_SHARE = 15 / 16  # of a card that is planned for


class Plan(NamedTuple):
    """What a run should take."""
    gib: dict[str, float]  # by what it is for
    tokens: int  # in the cache
    taken: int  # by pipo.cache_room on such a card


def pass_sizes(shapes, cfg: pipo.Config, here: str, size: int) -> tuple[int, int, int, int]:
    """Bytes that a token leaves in the cache, layers there, bytes of a training pass, and of a sampling one.

    Without weights, gradients and cache. `size` is that of a number; `here` is "cpu" or "cuda".
    """
    one_token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    with torch.no_grad():  # what it leaves in the cache
        layers = shapes(one_token, use_cache=True)[pipo.cache_name(shapes)].layers
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers) * size
    c, gpu, lora = shapes.config, here == "cuda", cfg.lora > 0
    H, V, inner = c.hidden_size, c.vocab_size, c.intermediate_size
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
    training += max(tokens * again, pipo.LOGITS_CHUNK[here] * V * 12, head * (size + 4))
    # Besides the cache, one at a time: the next token's probabilities (logits twice, 2 fp32 copies, 2 fp64;
    # top-p: a sort too), a layer that reads 16,384 tokens.
    drawing = cfg.prompts_per_step * cfg.group_size * V * (48 if cfg.top_p < 1 else 32)
    sampling = max(drawing, 16384 * ((3 * inner + 5 * H) * size + lora * 8 * inner))
    return cached, len(layers), training, sampling


def memory_plan(shapes, cfg: pipo.Config, here: str, masters_on: str, free: float) -> Plan:
    """What a run takes where `free` bytes are, in the cache as many tokens as there is room for.

    `shapes` is the model on the meta device; it runs `here`, AdamW's masters and moments are on `masters_on`,
    each "cpu" or "cuda". cfg says dtype, and can say cache_tokens. Held against a simulation in
    test_memory_plan.py.
    """
    size, parameters = getattr(torch, cfg.dtype).itemsize, shapes.num_parameters()
    weights, trained, is_here = parameters * size, parameters, masters_on == here
    if cfg.lora:
        linear = [m for m in shapes.base_model.modules() if isinstance(m, torch.nn.Linear)]
        trained = cfg.lora * sum(m.in_features + m.out_features for m in linear)
        weights += trained * 4
    is_plain = is_here and (cfg.lora or size == 4)
    adam = trained * (8 if is_plain else 12)  # two moments, and fp32 weights
    if not is_here and not cfg.lora:  # in passing, the largest weight's gradient and its rounded copy
        adam += max(weight.numel() for weight in shapes.parameters()) * (4 + size)
    reference = parameters * size if cfg.kl_coef else 0
    always = weights + reference + (adam if is_here else 0)

    cached, n_layers, training, beside = pass_sizes(shapes, cfg, here, size)
    most = cfg.prompts_per_step * cfg.group_size * (cfg.max_prompt_tokens + cfg.max_new_tokens)
    left = max(0, free * MEMORY_SHARE - always)
    room = min(left - beside, left * n_layers / (n_layers + 1)) / cached  # a layer moves at a time
    tokens = cfg.cache_tokens or int(min(max(0, room), most))
    taken = min(most, max(0, pipo.CACHE_SHARE * (free - always) / cached))
    sampling = tokens * cached + max(beside, tokens * cached / n_layers)
    kept = 2 * trained * 12 + weights  # the old checkpoint and the new: fp32 weights and moments
    needs = {"weights": weights, "AdamW": adam, "training": always + trained * 4 + training,
             "sampling": always + sampling, "disk": kept}
    return Plan({what: n / 2**30 for what, n in needs.items()}, tokens, int(taken))


# A card's free bytes, and settings: the README's table
PLANS = {"80 GB": (80e9, {}), "48 GB": (48e9, {}), "24 GB": (24e9, dict(lora=16)),
         "24 GB, smaller": (24e9, dict(lora=16, prompts_per_step=32, max_new_tokens=2048))}


def qwen3_4b(sizes: dict):
    """The shapes of Qwen3-4B, or of another size."""
    with torch.device("meta"):
        return Qwen3ForCausalLM(bench_config(4096, **(sizes or QWEN3_4B)))


def plans(**sizes) -> dict[str, Plan]:
    """Print what 4B takes on some cards, AdamW in host memory but with LoRA: calculated, never measured."""
    shapes, found = qwen3_4b(sizes), {}
    print("|card|GiB: weights|AdamW|training|sampling|disk|cache fits: tokens, full rows|taken|")
    print("|---|---|---|---|---|---|---|---|")
    for name, (free, settings) in PLANS.items():
        where = "cuda" if "lora" in settings else "cpu"
        cfg = pipo.Config(dtype="bfloat16", **settings)
        plan = found[name] = memory_plan(shapes, cfg, "cuda", where, free)
        flags = " ".join(f"`{pipo.flag(setting)} {value}`" for setting, value in settings.items())
        full = plan.tokens // (cfg.max_prompt_tokens + cfg.max_new_tokens)
        gib = "|".join(f"{n:.1f}" for n in plan.gib.values())
        print(f"|{name} {flags}|{gib}|{plan.tokens:,}, {full}|{plan.taken:,}|")
    return found


# ------------------------------------------------------------------------------------------------------------
# What an iteration of 4B should cost, calculated
# ------------------------------------------------------------------------------------------------------------

# bf16 FLOP/s and bytes/s at best (makers' figures, dense), and whose memory plan it has
CARDS = {"A100 80GB": (312e12, 2.0e12, "80 GB"), "H100 SXM": (989e12, 3.35e12, "80 GB"),
         "RTX 4090, `--lora 16`": (165e12, 1.0e12, "24 GB")}
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6  # assumed


def flops(length: int, trains: bool, lora: int = 0, **sizes) -> int:
    """What one sequence of Qwen3-4B costs, its logits included: counted by torch on shapes without memory.

    `trains`: with layers and logits computed again in the backward pass. Attention is counted in full, though
    causal kernels need half of it.
    """
    model = qwen3_4b(sizes).requires_grad_(not lora)
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora:
        from peft import LoraConfig
        with torch.device("meta"):
            model.add_adapter(LoraConfig(r=lora, target_modules="all-linear"))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trains):
        hidden = model.train().base_model(ids, attention_mask={"full_attention": None}, use_cache=False)[0]
        sums = checkpoint(lambda h: model.lm_head(h).logsumexp(-1), hidden, use_reentrant=False)
        if trains:
            sums.sum().backward()
    return counter.get_total_flops()


def schedule(lengths: list[int], prompt: int, room: int, chunk: int = 128):
    """pipo.sample's waves for completions of these lengths: yields (rows, columns) at every token drawn, and
    (tokens, 0) for those read in when a wave begins."""
    waiting = [(0, length) for length in lengths]  # drawn so far, to draw
    while waiting:
        waiting.sort()
        n = max(1, sum(k * (prompt + done + chunk) <= room for k, (done, _) in enumerate(waiting, 1)))
        wave, waiting = waiting[:n], waiting[n:]
        width = wave[-1][0]
        yield (n // GROUP if width == 0 else n) * (prompt + width), 0
        while wave:
            for _ in range(chunk):
                width += 1
                yield len(wave), prompt + width
            wave = [(done + chunk, length) for done, length in wave if done + chunk < length]
            fit = max(1, room // (prompt + width + 1 + chunk))
            waiting, wave = waiting + wave[fit:], wave[:fit]


def costs(prompts: int = 128, prompt: int = 128, limit: int = 4096, mean: int = 1536, **sizes) -> list[dict]:
    """Print what a run takes and an iteration costs on some cards: calculated, never measured.

    `prompts` x GROUP completions, geometric with this `mean` once cut off at `limit`.
    """
    scale = mean
    for _ in range(100):  # of the geometric distribution before the cut
        scale = mean / (1 - math.exp(-limit / scale))
    draw = random.Random(0)
    lengths = [min(limit, 1 + int(draw.expovariate(1 / scale))) for _ in range(prompts * GROUP)]
    shapes, planned = qwen3_4b(sizes), plans(**sizes)
    config, weights = shapes.config, 2 * shapes.num_parameters()
    cached = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes a token

    def fitted(*how):  # a sequence costs a * S + b * S^2: two lengths tell both
        one, two = (flops(S, *how, **sizes) for S in (512, 1024))
        b = (two - 2 * one) / (1024**2 - 2 * 512**2)
        return one / 512 - 512 * b, b

    rows, (a, b) = [], fitted(False)
    print("\n|card|sampling|verification|exploration|hours for 261|PFLOP: sampling, each step|TB read|")
    print("|---|---|---|---|---|---|---|")
    for name, (peak, bandwidth, memory) in CARDS.items():
        peak, bandwidth = peak * OF_PEAK, bandwidth * OF_BANDWIDTH
        room, lora = planned[memory].tokens // 1000 * 1000, PLANS[memory][1].get("lora", 0)
        sampled = read = seconds = steps = 0
        for n, columns in schedule(lengths, prompt, room):
            arithmetic = n * (a + b * columns)  # one token in each of n rows; or n tokens read in
            cache = n * columns * cached * (1 + 2 / 128)  # read, and moved once a chunk
            sampled, read, steps = sampled + arithmetic, read + weights + cache, steps + (columns > 0)
            seconds += max(weights / bandwidth, arithmetic / peak) + cache / bandwidth
        c, d = fitted(True, lora)
        step = sum(c * S + d * S**2 for S in (prompt + length for length in lengths))
        rows.append({"card": name, "sampling": seconds, "step": step / peak, "sampling_flops": sampled,
                     "step_flops": step, "read": read, "decoding_steps": steps})
        print(f"|{name}|{seconds / 60:.1f} min|{step / peak / 60:.1f} min|{step / peak / 60:.1f} min|"
              f"{261 * (seconds + 2 * step / peak) / 3600:.0f}|{sampled / 1e15:.0f}, {step / 1e15:.0f}|"
              f"{read / 1e12:.0f}|")
    drawn = sum(lengths) / len(lengths)
    print(f"{prompts} x {GROUP} completions of {drawn:.0f} tokens on average, prompts of {prompt}; "
          f"{OF_PEAK:.0%} of peak, {OF_BANDWIDTH:.0%} of bandwidth")
    return rows


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, print the table, write the file."""
    parts = ("memory", *SIZES)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts (default: all)")
    parser.add_argument("--prompts", type=int, default=32, help=f"of {GROUP} samples each, a multiple of 4 "
                        "(default: %(default)s)")
    parser.add_argument("--turns", type=int, help="turns that are counted (default: {})".format(
        ", ".join(f"{size.turns} {name}" for name, size in SIZES.items())))
    parser.add_argument("--gpu", action="store_true", help="instead: a random Qwen3-4B on a GPU")
    parser.add_argument("--tiny", action="store_true", help="with --gpu: a tiny model on the CPU")
    parser.add_argument("--costs", action="store_true", help="instead: what 4B should take")
    parser.add_argument("--out", type=Path, help="default: runs/bench.json, with --gpu runs/bench-gpu.json")
    args = parser.parse_args(arguments)
    out = args.out or ROOT / "runs" / ("bench-gpu.json" if args.gpu else "bench.json")
    if args.gpu and not args.tiny and not torch.cuda.is_available():
        parser.error("--gpu needs a GPU; --gpu --tiny shows on the CPU that it runs")
    if args.prompts < 4 or args.prompts % 4:
        parser.error("--prompts must be a multiple of 4")
    if args.turns is not None and args.turns < 1:
        parser.error("--turns must be 1 or more")

    torch.set_num_threads(1)
    pipo.transformers.utils.logging.disable_progress_bar()
    if args.costs:
        costs()
        return
    check_greedy()
    report = Report()
    if args.gpu:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # a checkpoint of 4B takes 45 GiB
            if args.tiny:
                bench_gpu(report, Path(folder), "cpu", limit=64, count=4, waves=(16, 32), **TINY)
            else:
                bench_gpu(report, Path(folder))
        report.write(out, processor() if args.tiny else torch.cuda.get_device_name())
        return
    with tempfile.TemporaryDirectory() as folder:
        if "memory" in args.only:
            bench_memory(report)
        for name in (name for name in SIZES if name in args.only):
            size = SIZES[name]._replace(**{"turns": args.turns} if args.turns else {})
            bench_size(report, name, size, args.prompts, Path(folder))
    report.write(out, processor())


if __name__ == "__main__":
    main()
