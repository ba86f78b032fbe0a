#!/usr/bin/env python3
"""Speed and memory of pipo.py against transformers' generate and TRL's GRPOTrainer, on one core.

    python assets/bench.py                  # everything: about 15 minutes -> a table, and runs/bench.json
    python assets/bench.py --only short     # one part: memory, short, long or 4b
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
`pip install trl==1.16.0`; the part "4b" needs a GPU, and is left out without one.

assets/bench.json holds what was measured, by processor: for each row the figures of both sides, the mean
lengths of their completions, and the ratio, theirs over ours: above 1 PIPO is faster or smaller.
runs/bench.json has the same form; measuring again on the same processor replaces its rows.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from the hub

import argparse
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models
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
        print(f"\n{'seconds (or GB)':46}{'ours':>10}{'theirs':>10}{'ratio':>8}   mean lengths")

    def add(self, key: str, label: str, figures: dict, ratio: float | None, lengths=()):
        """One row: `figures` are two or less by name, usually {"ours": seconds, "theirs": seconds}."""
        self.rows[key] = figures | {"ratio": ratio, "mean_lengths": list(lengths)}
        values = "".join(f"{value:10.3f}" for value in figures.values())
        told = "" if ratio is None else f"{ratio:.2f}"
        print(f"{label:46}{values:20}{told:>8}   {'  '.join(f'{x:.1f}' for x in lengths)}", flush=True)

    def against(self, key: str, label: str, ours: float, theirs: float, lengths=()):
        """A row of our figure and theirs, of which less is better."""
        self.add(key, label, {"ours": ours, "theirs": theirs}, theirs / ours, lengths)

    def write(self, path: Path) -> None:
        """Put the rows into the records of `path`, under the name of this machine's processor."""
        records = json.loads(path.read_text()) if path.exists() else {}
        before = records.get(processor(), {"rows": {}})
        versions = {name: version(name) for name in ("torch", "transformers", "trl")}
        records[processor()] = {"versions": versions, "rows": before["rows"] | self.rows}
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


def bench_sampling(ours, theirs, tokenizer, prompts, limit, turns, clock=CPU_CLOCK) -> tuple[list, list]:
    """Median seconds and mean completion length of pipo.sample and of generate, each as [ours, theirs]."""
    seconds, lengths = ([], []), ([], [])
    eos = torch.tensor(theirs.generation_config.eos_token_id)
    for turn in range(turns + 1):
        torch.manual_seed(turn)
        times = [clock()]
        generator = pipo.rng(ours.device, turn)
        batch = pipo.sample(ours, tokenizer, prompts, GROUP, limit, generator=generator, cache_tokens=MANY)
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


class TimedPIPO:
    """PIPO's iterations with a clock on each phase. A GRPO iteration is the same without the verification."""

    def __init__(self, model, tokenizer, prompts, rewards, cfg, clock=CPU_CLOCK):
        self.model, self.tokenizer, self.cfg, self.clock = model, tokenizer, cfg, clock
        self.prompts, self.rewards = prompts, rewards
        self.optimizer, self.previous = pipo.make_optimizer(model, cfg), None
        self.seconds, self.lengths, self.metrics = [], [], {}

    def update(self, batch, coefficients) -> dict:
        """Either step."""
        return pipo.update(self.model, self.optimizer, batch, coefficients, pipo.BASES["grpo"], self.cfg.lr,
                           microbatch_tokens=self.cfg.microbatch_tokens)

    def step(self) -> None:
        """One iteration: sample, verify on the batch before (the first, a warm-up, has none), explore."""
        times, generator = [self.clock()], pipo.rng(self.model.device, len(self.seconds))
        batch = pipo.sample(self.model, self.tokenizer, self.prompts, GROUP, self.cfg.max_new_tokens,
                            generator=generator, cache_tokens=self.cfg.cache_tokens)
        batch.advantages = pipo.group_advantages(self.rewards)
        times.append(self.clock())
        if self.previous is not None:
            self.update(self.previous, pipo.improvement_rewards(self.previous.advantages, 0.5))
        times.append(self.clock())
        self.metrics = self.update(batch, batch.advantages)
        times.append(self.clock())
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
LOGPROB_MEMORY = """
import sys, torch, pipo
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.set_num_threads(1)
V = int(sys.argv[2])
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1, head_dim=32))
tokens = torch.randint(2, V, (8, 256))
before = pipo.peak_memory_gb(model.device)
if sys.argv[1] == "chunked":
    logprobs = pipo.token_logprobs(model, [[7]] * 8, tokens, torch.ones(8, 256))
else:
    ids = torch.cat([torch.full((8, 1), 7), tokens[:, :-1]], 1)
    logprobs = model(ids, use_cache=False).logits.log_softmax(-1).gather(-1, tokens[..., None])
logprobs.mean().backward()
print(pipo.peak_memory_gb(model.device) - before)
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


def bench_4b(report, folder, device="cuda", limit=4096, count=128, waves=(64, 256), **sizes) -> None:
    """A random Qwen3-4B on a GPU: tokens a second against generate, and the phases of one whole PIPO
    iteration.

    Lengths average about 0.38 of the limit, as above. Peak memory and the gap between sampler and trainer go
    along. `waves`: how many rows are sampled at a time; `sizes`: of another model.
    """
    sizes = sizes or QWEN3_4B
    device, prompts = torch.device(device), [[100 + i] * 128 for i in range(count)]
    tokenizer = character_tokenizer()
    cfg = pipo.Config(prompts_per_step=count, max_new_tokens=limit, max_prompt_tokens=128, temperature=1.0,
                      save_every=0)
    with torch.device("meta"):
        shapes = Qwen3ForCausalLM(bench_config(limit, **sizes))
    cfg, table = pipo.plan_memory(shapes, cfg, device, folder)
    print(table)

    def random_model(limit, attention):
        torch.manual_seed(0)
        with device:
            config, dtype = bench_config(limit, **sizes), getattr(torch, cfg.dtype)
            model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
        model.set_attn_implementation(attention)
        return model.eval()

    for rows in waves:
        both = random_model(limit // 8, "shared_heads"), random_model(limit // 8, "sdpa")
        asked = prompts[:rows // GROUP]
        seconds, lengths = bench_sampling(*both, tokenizer, asked, limit // 8, 3, time.perf_counter)
        ours, theirs = (rows * length / s for length, s in zip(lengths, seconds))
        report.add(f"gpu_tokens_{rows}", f"tokens a second, 4B, {rows} rows",
                   {"ours": ours, "theirs": theirs}, ours / theirs, lengths)
        del both
    model = random_model(limit, "shared_heads")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rewards = (torch.arange(count * GROUP, device=device) % 3 == 0).float().view(-1, GROUP)
    ours = TimedPIPO(model, tokenizer, prompts, rewards, cfg, time.perf_counter)
    ours.step()
    ours.step()
    figures = {"sampling": ours.median(0), "verification": ours.median(1), "exploration": ours.median(2),
               "peak_gb": pipo.peak_memory_gb(device), "logprob_gap": ours.metrics["logprob_gap"]}
    for name, value in figures.items():
        report.add(f"gpu_iteration_{name}", f"4B, {count} x {GROUP}: {name}", {"ours": value}, None,
                   ours.lengths[1:])


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, print the table, write the file."""
    parts = ("memory", *SIZES, "4b")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts (default: all)")
    parser.add_argument("--prompts", type=int, default=32, help=f"of {GROUP} samples each, a multiple of 4 "
                        "(default: %(default)s)")
    parser.add_argument("--turns", type=int, help="turns that are counted (default: {})".format(
        ", ".join(f"{size.turns} {name}" for name, size in SIZES.items())))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench.json", help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.prompts < 4 or args.prompts % 4:
        parser.error("--prompts must be a multiple of 4")
    if args.turns is not None and args.turns < 1:
        parser.error("--turns must be 1 or more")

    torch.set_num_threads(1)
    pipo.transformers.utils.logging.disable_progress_bar()
    check_greedy()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        if "memory" in args.only:
            bench_memory(report)
        for name in (name for name in SIZES if name in args.only):
            size = SIZES[name]._replace(**{"turns": args.turns} if args.turns else {})
            bench_size(report, name, size, args.prompts, Path(folder))
        if "4b" in args.only and torch.cuda.is_available():
            bench_4b(report, Path(folder))
    report.write(args.out)


if __name__ == "__main__":
    main()
