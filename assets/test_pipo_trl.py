"""What must hold in pipo_trl.py, on a tiny model on the CPU, in one process and in two. Needs TRL and PEFT.

make test-trl          or          python -m pytest -q assets/test_pipo_trl.py

`accelerate launch` runs this very file too, as the script of each of the two processes.
"""

import copy
import importlib.util
import math
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
trl = pytest.importorskip("trl")

import pipo
import pipo_trl
from accelerate.state import AcceleratorState, DistributedType, PartialState
from pipo import BASES, ImprovementTracker, group_advantages, improvement_rewards, policy_loss, token_logprobs
from pipo_trl import PIPOTrainer
from test_pipo import LETTERS, folder  # a fixture: a model and its tokenizer

torch.set_num_threads(1)


def coin(completions, **_):
    """Rewards that look like chance and depend on the texts alone."""
    return [float(zlib.crc32(completion.encode()) % 3 == 0) for completion in completions]


def short(completions, **_):
    """A second reward, of no opinion about the empty completion."""
    return [len(completion) / -8 if completion else None for completion in completions]


def trainer_of(kind, folder, out, trainer=None, reward_funcs=coin, extra=None, **changes):
    """A trainer for six steps on groups of 4: "plain" is TRL's own, "off" and "on" are PIPO's by feedback."""
    given = dict(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    ours = {"plain": {}, "off": {"feedback": False}, "on": {"window": 2}}[kind]
    trainer = trainer or (trl.GRPOTrainer if kind == "plain" else PIPOTrainer)
    model_folder = Path(folder) / "model"
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        reward_funcs=reward_funcs,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        args=trl.GRPOConfig(**copy.deepcopy({**given, **changes})),  # transformers writes into what is nested
        train_dataset=Dataset.from_list([{"prompt": LETTERS[i % 20 :][: 2 + i // 10]} for i in range(40)]),
        **ours,
        **(extra or {}),
    )


def result(trainer, **how):
    """What a trainer logged, times apart, and the weights it ended with, all shards together."""
    trainer.train(**how)
    rows = [
        {name: value for name, value in row.items() if "time" not in name and "second" not in name}
        for row in trainer.state.log_history
    ]
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()]
    return {"rows": rows, "weights": torch.cat([p.detach().flatten() for p in weights])}


def texts(trainer, batches):
    """The prompts and the completions of micro-batches, decoded."""
    decode = trainer.processing_class.decode
    return [
        [decode(row, skip_special_tokens=True) for batch in batches for row in batch[name]]
        for name in ("prompt_ids", "completion_ids")
    ]


def check_xi_by_hand(rows):
    """The logged xi and phi are the tracker's on the logged mean rewards: read before the push, one push a
    batch.

    Returns how many verification steps were logged.
    """
    tracker = ImprovementTracker(2)
    for row in rows:
        feedback = tracker.feedback(row["pipo/mu"])
        assert math.isclose(row["pipo/mu"], row["reward"], rel_tol=1e-6)
        for name, value in (feedback._asdict() if feedback else {"xi": None}).items():
            assert row.get(f"pipo/{name}") == value
        tracker.push(row["pipo/mu"])
    return sum("pi/grad_norm" in row for row in rows)


def attribution_by_hand(prompts, texts, phi, rewards_of=coin):
    """The improvement rewards of shuffled rows, from their texts: the rows of a prompt are its group of 4."""
    order, coefficients = sorted(range(len(prompts)), key=lambda i: prompts[i]), torch.empty(len(prompts))
    rewards = torch.tensor(rewards_of([texts[i] for i in order])).view(-1, 4)
    coefficients[order] = improvement_rewards(group_advantages(rewards), phi).flatten()
    return coefficients


# ------------------------------------------------------------------------------------------------------------
# One process: both steps' gradients by hand, in all that TRL's users switch on.
# ------------------------------------------------------------------------------------------------------------


def test_without_feedback_it_is_grpo_and_with_it_looks_back(folder, tmp_path):
    """Guards against a subclass that changes GRPO's own numbers, against a verification step that is never
    taken, and against an evaluation whose batch or rewards get into the window.

    Accelerate's optimizer silently ignores step() while the trainer accumulates gradients: the weights must
    move.
    """
    held_out = Dataset.from_list([{"prompt": "xyz"}] * 4)
    given = dict(per_device_train_batch_size=6, eval_strategy="steps", eval_steps=2)
    given["extra"] = {"eval_dataset": held_out}

    def ran(kind):
        return result(trainer_of(kind, folder, tmp_path, **given))

    plain, off, on = ran("plain"), ran("off"), ran("on")
    assert plain["rows"] == off["rows"] and torch.equal(plain["weights"], off["weights"])
    training = [row for row in on["rows"][:-1] if "eval_reward" not in row]
    assert len(training) == 6 and len(on["rows"]) == 6 + 3 + 1
    assert check_xi_by_hand(training) >= 1 and not torch.equal(plain["weights"], on["weights"])


def watched(folder, out, trainer=PIPOTrainer, **changes):
    """A trained trainer; where each verification step began, and of what; all steps, as they were clipped."""
    phis, samplers, steps = [], [], []

    class Watched(trainer):
        def weights(self):
            return copy.deepcopy(self.model.state_dict())

        def _generate_and_score_completions(self, rows):
            samplers.append(self.weights())
            return super()._generate_and_score_completions(rows)

        def verification_step(self, previous, phi):
            phis.append((len(steps), phi, previous))
            super().verification_step(previous, phi)

        def _clip_grad_norm(self, model):
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
            steps.append((gradient, self.weights(), samplers[-2:], self._buffered_inputs))
            return super()._clip_grad_norm(model)

    given = dict(loss_type="grpo", per_device_train_batch_size=4, temperature=0.7, seed=4)
    trainer = trainer_of("on", folder, out, Watched, **given | changes)
    trainer.train()
    assert any(phi > 0 for _, phi, _ in phis)
    return trainer, phis, steps


def rows_of(batches):
    """The prompts without padding, the completions and their mask."""
    ids, seen, tokens, mask = (
        torch.cat([b[name] for b in batches])
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    )
    return [row[row_seen == 1].tolist() for row, row_seen in zip(ids, seen)], tokens, mask.float()


def both(completions):
    """The weighted sum of `coin` and `short`, by hand."""
    return [one + 0.5 * (other or 0) for one, other in zip(coin(completions), short(completions))]


CASES = {
    "grpo": {},
    "two minibatches": dict(generation_batch_size=16),
    "two iterations": dict(num_iterations=2),
    "no accumulation": dict(gradient_accumulation_steps=1),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none"),
    "dapo": dict(loss_type="dapo", scale_rewards="batch", epsilon_high=0.28),
    "gspo": dict(importance_sampling_level="sequence", epsilon_high=0.3, learning_rate=2e-3),
    "masked": dict(mask_truncated_completions=True, max_completion_length=16),
    "two rewards": dict(reward_funcs=[coin, short], reward_weights=[1.0, 0.5]),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_both_steps_by_hand(folder, tmp_path, case):
    """Against policy_loss on the same rows, the rewards, groups and old log-probabilities all worked out
    anew.

    Guards against a replay whose ratio is 1 (TRL keeps no log-probabilities where batch and policy agree),
    groups lost in TRL's shuffle, a KL in the verification step or none in the exploration step, an
    exploration ratio against the policy after the verification step, and a step that moves nothing.
    """
    changes = CASES[case]
    iterations, accumulated = changes.get("num_iterations", 1), changes.get("gradient_accumulation_steps", 2)
    minibatches = changes.get("generation_batch_size", 8) // 8
    trainer, phis, steps = watched(
        folder,
        tmp_path,
        beta=0.05,
        use_bias_correction_kl=False,  # the KL of policy_loss, not times the ratio
        max_steps=7 * minibatches * iterations,
        **changes,
    )
    model, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    assert len(steps) == 7 * minibatches * iterations + len(phis) * minibatches
    base = BASES[case if case in BASES else "grpo"]._replace(
        max_new_tokens=8, clip_low=trainer.epsilon_low, clip_high=trainer.epsilon_high)

    def check(step, sampler, batches, coefficients, kl_coef):
        """The gradient of `step` is policy_loss's on these micro-batches; returns the mean |log-ratio|."""
        (gradient, weights, *_), rows = step, rows_of(batches)
        with torch.no_grad():
            model.load_state_dict(sampler)
            behavior, ref_logprobs = (token_logprobs(m, *rows, 0.7) for m in (model, reference))
        model.load_state_dict(weights)
        fresh = token_logprobs(model, *rows, 0.7)
        objective = base._replace(kl_coef=kl_coef)
        loss, means = policy_loss(fresh, behavior, coefficients, rows[2], objective, ref_logprobs)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        largest = expected.abs().max()
        assert torch.allclose(gradient, expected, atol=1e-5 * largest) and largest > 1e-4
        return means["logprob_gap"]

    rewards_of = both if case == "two rewards" else coin
    for at, phi, previous in phis:
        coefficients = attribution_by_hand(*texts(trainer, previous), phi, rewards_of)
        for k in range(minibatches):
            (before, sampler), fresh = steps[at + minibatches + k][2:]
            own, rows = slice(accumulated * k, accumulated * (k + 1)), slice(8 * k, 8 * k + 8)
            rows = rows if accumulated == 2 else slice(None)
            assert check(steps[at + k], before, previous[own], coefficients[rows], 0.0) > 0.001
            advantages = torch.cat([b["advantages"] for b in fresh[own]])
            for i in range(1, iterations + 1):
                exploration = steps[at + minibatches * i + k]
                assert check(exploration, sampler, fresh[own], advantages, 0.05) > 0.0001


class FakeVLLM:
    """A sampler whose log-probabilities are the model's less 0.02 times the token's id."""

    def __init__(self, model, **_):
        self.model, self.synced = model, 0

    def sync_weights(self):
        self.synced += 1

    @torch.no_grad()
    def generate(self, prompts, num_generations, **_):
        tokens = torch.randint(10, 28, (len(prompts), 8))
        logprobs = token_logprobs(self.model, prompts, tokens, torch.ones(tokens.shape), 0.7) - 0.02 * tokens
        return prompts, tokens.tolist(), logprobs.unsqueeze(-1).tolist(), None


def test_both_steps_correct_for_the_sampler(folder, tmp_path, monkeypatch):
    """With vLLM. Guards against a previous batch that loses TRL's correction, or keeps another row's, and
    against sampling from old weights."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeVLLM)
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_vllm_available", lambda: True, raising=False)
    trainer, phis, steps = watched(
        folder,
        tmp_path,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=100.0,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert trainer.vllm_generation.synced == 6

    def check(step, sampler, batches, coefficients):
        (gradient, weights, *_), rows = step, rows_of(batches)
        model.load_state_dict(sampler)
        behavior = token_logprobs(model, *rows, 0.7).detach()
        model.load_state_dict(weights)
        ratio = (token_logprobs(model, *rows, 0.7) - behavior).exp()  # (8, T)
        gain = torch.min(ratio * coefficients[:, None], ratio.clamp(0.8, 1.2) * coefficients[:, None])
        loss = -(gain * (0.02 * rows[1]).exp()).mean()  # all completions are as long
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert torch.allclose(gradient, expected, atol=1e-5 * expected.abs().max())

    for at, phi, previous in phis:
        (before, sampler), fresh = steps[at + 1][2:]
        check(steps[at], before, previous, attribution_by_hand(*texts(trainer, previous), phi))
        check(steps[at + 1], sampler, fresh, torch.cat([b["advantages"] for b in fresh]))


def test_adapters(folder, tmp_path):
    """LoRA: guards against a step on frozen weights, and against a KL that finds no reference."""
    peft = pytest.importorskip("peft")
    lora = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    trainer, phis, steps = watched(folder, tmp_path, beta=0.05, extra=lora)
    start = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    end = trainer.model.get_base_model().state_dict()
    for name, weight in start.items():
        assert torch.equal(weight, end[name if name in end else name.replace("proj.", "proj.base_layer.")])
    before, after = (steps[phis[-1][0] + i][1] for i in (0, 1))  # around a verification step
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora" in name} and len(steps) == 6 + len(phis)


def test_update_takes_the_gradient_of_trl(folder, tmp_path):
    """Another implementation as oracle: TRL computes one padded batch, `update` drops, sorts, splits."""
    seen = []

    class Watched(trl.GRPOTrainer):
        def _clip_grad_norm(self, model):
            seen.append((torch.cat([p.grad.flatten() for p in model.parameters()]), self._buffered_inputs))
            return super()._clip_grad_norm(model)

    one_step = dict(per_device_train_batch_size=16, gradient_accumulation_steps=1, max_steps=1)
    trainer_of("plain", folder, tmp_path, Watched, loss_type="grpo", beta=0.0, **one_step).train()
    (gradient, (rows,)) = seen[0]
    order = sorted(range(16), key=lambda i: (rows["prompt_ids"][i].tolist(), i))  # TRL shuffles them
    prompts = [rows["prompt_ids"][i][rows["prompt_mask"][i] == 1].tolist() for i in order]
    tokens, mask = rows["completion_ids"][order], rows["completion_mask"][order].float()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    behavior = token_logprobs(model, prompts, tokens, mask).detach()
    advantages = rows["advantages"][order].view(4, 4)
    batch = pipo.Batch(prompts, tokens, mask, behavior, mask[:, 0] > 0, [""] * 16)

    class Recorder(torch.optim.SGD):
        def step(self):
            self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()])

    optimizer = Recorder(model.parameters())
    pipo.update(model, optimizer, batch, advantages, BASES["grpo"], 0.0, microbatch_tokens=40,
                max_grad_norm=1e9)
    ours = optimizer.gradient
    assert gradient.abs().max() > 1e-3 and torch.allclose(ours, gradient, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Stopped and resumed.
# ------------------------------------------------------------------------------------------------------------


SAVED = dict(max_steps=8, save_strategy="steps", save_steps=6)


def check_resumed(unbroken, resumed):
    """Eight steps, alike to the last bit, the seventh with a look back at a batch of before the stop."""
    assert resumed["rows"][:-1] == unbroken["rows"][:-1] and len(resumed["rows"]) == 8 + 1
    assert torch.equal(resumed["weights"], unbroken["weights"])
    assert "pi/grad_norm" in unbroken["rows"][6]


@pytest.mark.parametrize("num_iterations, stopped", [(1, 6), (2, 5)])
def test_resumed_in_one_process(folder, tmp_path, num_iterations, stopped):
    """Also in the middle of a batch's two iterations, where TRL would sample a new one."""
    given = SAVED | dict(seed=1, per_device_train_batch_size=6, num_iterations=num_iterations)
    given["save_steps"] = stopped
    unbroken = result(trainer_of("on", folder, tmp_path, **given))
    resumed = trainer_of("on", folder, tmp_path, **given | {"save_strategy": "no"})
    check_resumed(unbroken, result(resumed, resume_from_checkpoint=f"{tmp_path}/checkpoint-{stopped}"))


# ------------------------------------------------------------------------------------------------------------
# Refused, and found.
# ------------------------------------------------------------------------------------------------------------


def fsdp(version):
    return {"fsdp_plugin": SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=True)}


SCHEDULED = {"deepspeed_plugin": SimpleNamespace(zero_stage=2, deepspeed_config={"scheduler": {}})}
REFUSED = {  # a sentence: accelerate's plugin and GRPOConfig's arguments
    "with FSDP1; ask for fsdp_version: 2": (fsdp(1), {}),
    "with beta and fsdp_cpu_ram_efficient_loading": (fsdp(2), dict(beta=0.1)),
    "with DeepSpeed's scheduler": (SCHEDULED, {}),
    "that gradient_accumulation_steps does not divide": ({}, dict(steps_per_generation=3)),
    "with normalize_then_sum": ({}, dict(multi_objective_aggregation="normalize_then_sum")),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_with_a_sentence(folder, tmp_path, monkeypatch, sentence):
    """Guards against runs that would train wrongly, or fail hours later."""
    plugin, changes = REFUSED[sentence]

    create = trl.GRPOTrainer.__init__

    def created(trainer, *args, **kwargs):
        create(trainer, *args, **kwargs)
        trainer.is_fsdp_enabled = "fsdp_plugin" in plugin
        for name, given in plugin.items():
            monkeypatch.setattr(AcceleratorState, name, given, raising=False)

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", created)
    with pytest.raises(ValueError, match=f"^PIPOTrainer cannot look back .*{sentence}"):
        trainer_of("on", folder, tmp_path, per_device_train_batch_size=4, **changes)


def test_a_completion_without_any_reward(folder, tmp_path):
    """Guards against a mean reward that is not a number, which would stay in the window for K steps."""
    trainer = trainer_of("on", folder, tmp_path, per_device_train_batch_size=4,
                         reward_funcs=lambda completions, **_: [None, *coin(completions[1:])])
    with pytest.raises(ValueError, match="no reward function gave a completion a number"):
        trainer.train()


def test_it_finds_pipo(tmp_path):
    """From another folder than the repository's, by its path alone, beside pipo.py and one folder down.

    Of what it imports this has the names only.
    """
    code = "import runpy, sys"
    for home, target in ("one", "one"), ("two", "two/assets"):
        (tmp_path / target).mkdir(parents=True)
        names = "ImprovementTracker = group_advantages = improvement_rewards"
        (tmp_path / home / "pipo.py").write_text(f"{names} = {home!r}")
        (tmp_path / target / "pipo_trl.py").write_text((HERE / "pipo_trl.py").read_text())
        code += f"\npath = {str(tmp_path / target / 'pipo_trl.py')!r}; before = sys.path[:]"
        code += "\nprint(runpy.run_path(path)['group_advantages'])"
        code += "\ndel sys.modules['pipo']; sys.path[:] = before"
    (tmp_path / "trl.py").write_text("GRPOTrainer = object")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["one", "two"], run.stderr


# ------------------------------------------------------------------------------------------------------------
# Two processes: this file as their script, launched once, with the accelerate config of pipo_trl.py.
# ------------------------------------------------------------------------------------------------------------


class Scripted(PIPOTrainer):
    """Completions by step and row alone: any number of processes trains on the same global batch."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        first, completions = self.accelerator.process_index * len(prompt_ids), []
        for i in range(first, first + len(prompt_ids)):
            generator = torch.Generator().manual_seed(1000 * self.state.global_step + i)
            length = torch.randint(2, 9, (), generator=generator)
            completions.append(torch.randint(10, 28, (length,), generator=generator).tolist())
        return completions, None


SCRIPTED = dict(
    trainer=Scripted,
    max_steps=5,
    loss_type="grpo",
    beta=0.05,  # a sharded reference too
    max_grad_norm=0.5,
    adam_epsilon=1e-4,  # or AdamW makes whole steps of what is rounding
)
EACH = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}  # FSDP2 then shards gradients between them


def zero(stage):
    """DeepSpeed, with what it takes from the trainer's arguments."""
    auto = {name: "auto" for name in (
        "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")}
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **auto}, "use_cpu": False}


MODES = {"ddp": ("DistributedDataParallel", {}), "fsdp2": ("FSDPQwen3ForCausalLM", {"use_cpu": False})}
if importlib.util.find_spec("deepspeed"):  # no requirement: it compiles for a minute when first run
    MODES |= {f"zero{stage}": ("DeepSpeedEngine", zero(stage)) for stage in (2, 3)}


def pretend_that_cpus_are_cards():
    """accelerate shards over cards only: it falls back to DDP on CPUs."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")


def run_two(folder, out):
    """The script of one process: all that is asked of two, in every mode; each rank leaves its files."""
    assert os.environ.pop("ACCELERATE_USE_FSDP") == "true" and os.environ["FSDP_VERSION"] == "2"
    for mode, (_, how) in MODES.items():
        if mode == "fsdp2":
            pretend_that_cpus_are_cards()
        os.environ["ACCELERATE_USE_FSDP"] = str(mode == "fsdp2").lower()
        where = f"{out}/{mode}"
        ran = {kind: result(trainer_of(kind, folder, where, max_steps=2, **how)) for kind in ("plain", "off")}
        trainer = trainer_of("on", folder, where, seed=2, **SAVED, **how)
        ran["on"] = result(trainer)
        attribution = [a for batch in trainer._buffered_inputs for a in batch["attribution"].tolist()]
        ran["last"] = list(zip(*texts(trainer, trainer._buffered_inputs), attribution))
        ran["wrapped"] = type(trainer.model_wrapped).__name__
        resumed = trainer_of("on", folder, where, seed=2, **SAVED | how | {"save_strategy": "no"})
        ran["resumed"] = result(resumed, resume_from_checkpoint=f"{where}/checkpoint-6")
        ran["scripted"] = result(trainer_of("on", folder, where, **SCRIPTED, **how))
        if mode == "fsdp2":
            ran["each"] = result(trainer_of("on", folder, where, **SCRIPTED, **how, accelerator_config=EACH))
        torch.save(ran, f"{out}/{mode}{trainer.accelerator.process_index}.pt")


@pytest.fixture(scope="module", autouse=True)
def launched(request, folder, tmp_path_factory):
    """Both processes, started before the first test, with the config that pipo_trl.py shows; their folder."""
    if not any("two" in item.fixturenames for item in request.session.items):
        yield None
        return
    out = tmp_path_factory.mktemp("two")
    config = re.search(r"( +compute_environment.*?)\n\n", pipo_trl.__doc__, re.S)[1]
    for given, here in {"num_processes: 8": "num_processes: 2", "precision: bf16": "precision: 'no'"}.items():
        assert given in config
        config = config.replace(given, here)
    (out / "config.yaml").write_text(config)
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", out / "config.yaml"]
    with open(out / "log", "w") as log:
        process = subprocess.Popen(
            [*launch, "--main_process_port", "0", __file__, folder, out],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
        yield process, out
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def two(launched):
    """What both ranks left, by mode, and the folder."""
    process, out = launched
    assert process.wait(300) == 0, (out / "log").read_text()[-5000:]
    return {mode: [torch.load(out / f"{mode}{rank}.pt") for rank in (0, 1)] for mode in MODES}, out


@pytest.mark.parametrize("mode", MODES)
def test_ranks_agree(two, mode):
    """Two processes, a group across both: guards against a xi of each rank's own rewards, which ends in a
    deadlock.

    Also against a sharding that was asked for and silently not done, gradients that nobody averages while the
    trainer accumulates (the ranks' weights would part), and attribution of another rank's rows.
    """
    first, second = two[0][mode]
    assert first["wrapped"] == MODES[mode][0]
    for kind in ("plain", "off", "on", "scripted"):
        assert torch.equal(first[kind]["weights"], second[kind]["weights"])
    assert first["plain"]["rows"] == first["off"]["rows"]
    assert torch.equal(first["plain"]["weights"], first["off"]["weights"])
    for one, other in zip(first["on"]["rows"], second["on"]["rows"], strict=True):
        assert all(one[name] == other[name] for name in one if name.startswith("pipo/"))
    rows = first["on"]["rows"], second["on"]["rows"]
    assert check_xi_by_hand(rows[0][:-1]) == check_xi_by_hand(rows[1][:-1]) >= 1
    prompts, completions, attribution = zip(*first["last"], *second["last"])
    assert torch.allclose(torch.tensor(attribution), attribution_by_hand(prompts, completions, 1.0))
    assert set(prompts[:6]) & set(prompts[6:]) and any(attribution[:6]) and any(attribution[6:])


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """The scripted run in one process, looking back and not."""
    out = tmp_path_factory.mktemp("one")
    given = dict(per_device_train_batch_size=6, **SCRIPTED)
    return [result(trainer_of(kind, folder, out, **given)) for kind in ("on", "off")]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one(two, one, mode):
    """Guards against a verification step whose gradients are a sum, one rank's own or clipped by shard, and
    against a reduction that stays off behind it.
    """
    (looking, not_looking), ranks = one, two[0][mode][0]
    assert check_xi_by_hand(looking["rows"][:-1]) >= 2
    assert (looking["weights"] - not_looking["weights"]).abs().max() > 1e-3
    for how in {"scripted", "each"} & set(ranks):
        assert torch.allclose(ranks[how]["weights"], looking["weights"], rtol=0, atol=1e-5), how
        for row, other in zip(ranks[how]["rows"][:-1], looking["rows"][:-1], strict=True):
            assert row["pipo/mu"] == other["pipo/mu"] and row.get("pipo/xi") == other.get("pipo/xi")
            for name in ("pi/grad_norm", "grad_norm"):
                assert math.isclose(row.get(name, 1), other.get(name, 1), rel_tol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_in_two_processes(two, mode):
    """Guards against a window that starts anew, and against another rank's part of the batch."""
    for rank in two[0][mode]:
        check_resumed(rank["on"], rank["resumed"])


def test_the_window_starts_anew(two, folder, tmp_path):
    """A checkpoint of another number of processes: guards against another batch's part and a silent start."""
    trainer = trainer_of("on", folder, tmp_path, per_device_train_batch_size=6, max_steps=7)
    with pytest.warns(UserWarning, match="the window of mean rewards starts anew"):
        result(trainer, resume_from_checkpoint=str(two[1] / "ddp" / "checkpoint-6"))
    assert len(trainer.tracker.history) == 1


if __name__ == "__main__":
    run_two(*sys.argv[1:])
