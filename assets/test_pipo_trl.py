"""What must hold in pipo_trl.py, on a tiny model on the CPU, in one process and in two. Needs TRL.

make test-trl          or          python -m pytest -q assets/test_pipo_trl.py

`accelerate launch` runs this very file too, as the script of each of the two processes.
"""

import copy
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
trl = pytest.importorskip("trl")

import pipo
from pipo import BASES, ImprovementTracker, group_advantages, improvement_rewards, policy_loss, token_logprobs
from pipo_trl import PIPOTrainer
from test_pipo import LETTERS, folder, gradient_of  # folder is a fixture: a model and its tokenizer

torch.set_num_threads(1)


def coin(completions, **_):
    """Rewards that look like chance and depend on the texts alone."""
    return [float(zlib.crc32(completion.encode()) % 3 == 0) for completion in completions]


def trainer_of(kind, folder, out, trainer=None, **changes):
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
    extra = {"plain": {}, "off": {"feedback": False}, "on": {"window": 2}}[kind]
    trainer = trainer or (trl.GRPOTrainer if kind == "plain" else PIPOTrainer)
    model_folder = Path(folder) / "model"
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        reward_funcs=coin,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        args=trl.GRPOConfig(**{**given, **changes}),
        train_dataset=Dataset.from_list([{"prompt": LETTERS[i : i + 2 + i % 4]} for i in range(17)]),
        **extra,
    )


def result(trainer):
    """What a trainer logged, times apart, and the weights it ended with."""
    trainer.train()
    rows = [
        {name: value for name, value in row.items() if "time" not in name and "second" not in name}
        for row in trainer.state.log_history
    ]
    return {"rows": rows, "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()])}


def texts(trainer, batches):
    """The prompts and the completions of micro-batches, decoded."""
    decode = trainer.processing_class.decode
    return [
        [decode(row, skip_special_tokens=True) for batch in batches for row in batch[name]]
        for name in ("prompt_ids", "completion_ids")
    ]


def run_each_kind(folder, out):
    """The script of one process: all three kinds of trainer; each rank leaves its own files."""
    for kind in ("plain", "off", "on"):
        trainer = trainer_of(kind, folder, out)
        ran = result(trainer)
        if kind == "on":
            last = trainer._buffered_inputs
            attribution = [a for batch in last for a in batch["attribution"].tolist()]
            ran["last"] = list(zip(*texts(trainer, last), attribution))
        torch.save(ran, f"{out}/{kind}{trainer.accelerator.process_index}.pt")


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


def attribution_by_hand(prompts, texts, phi):
    """The improvement rewards of shuffled rows, from their texts: the rows of a prompt are its group of 4."""
    order, coefficients = sorted(range(len(prompts)), key=lambda i: prompts[i]), torch.empty(len(prompts))
    rewards = torch.tensor(coin([texts[i] for i in order])).view(-1, 4)
    coefficients[order] = improvement_rewards(group_advantages(rewards), phi).flatten()
    return coefficients


def test_without_feedback_it_is_grpo_and_with_it_looks_back(folder, tmp_path):
    """Guards against a subclass that changes GRPO's own numbers, and against a verification step that is
    never taken.

    Accelerate's optimizer silently ignores step() while the trainer accumulates gradients: the weights must
    move.
    """
    def ran(kind):
        return result(trainer_of(kind, folder, tmp_path, per_device_train_batch_size=6))

    plain, off, on = ran("plain"), ran("off"), ran("on")
    assert plain["rows"] == off["rows"] and torch.equal(plain["weights"], off["weights"])
    assert check_xi_by_hand(on["rows"][:-1]) >= 1 and not torch.equal(plain["weights"], on["weights"])


@pytest.mark.parametrize("minibatches", [1, 2])
def test_gradients_of_both_steps_by_hand(folder, tmp_path, minibatches):
    """Against policy_loss on the same rows, the rewards, groups and old log-probabilities all worked out
    anew.

    Guards against a replay whose ratio is 1 (TRL keeps no log-probabilities where batch and policy agree),
    groups lost in TRL's shuffle, a KL in the verification step or none in the exploration step, an
    exploration ratio against the policy after the verification step, and a step that moves nothing.
    """
    phis, samplers, steps = [], [], []

    class Watched(PIPOTrainer):
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

    trainer = trainer_of(
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
        """The gradient of `step` is policy_loss's on these micro-batches; returns the mean |log-ratio|."""
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
        objective = BASES["grpo"]._replace(kl_coef=kl_coef)
        loss, means = policy_loss(fresh, behavior, coefficients, mask, objective, ref_logprobs)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        largest = expected.abs().max()
        assert torch.allclose(gradient, expected, atol=1e-5 * largest) and largest > 1e-3
        return means["logprob_gap"]

    for at, phi, previous in phis:
        coefficients = attribution_by_hand(*texts(trainer, previous), phi)
        for k in range(minibatches):
            verification, exploration = steps[at + k], steps[at + minibatches + k]
            (before, sampler), fresh = exploration[2:]
            own = slice(2 * k, 2 * k + 2)
            assert check(verification, before, previous[own], coefficients[8 * k : 8 * k + 8], 0.0) > 0.01
            advantages = torch.cat([b["advantages"] for b in fresh[own]])
            assert check(exploration, sampler, fresh[own], advantages, 0.05) > 0.001


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

    def step(optimizer):
        given = dict(microbatch_tokens=40, max_grad_norm=1e9)
        return pipo.update(model, optimizer, batch, advantages, BASES["grpo"], 0.0, **given)

    _, ours = gradient_of(step, model)
    assert gradient.abs().max() > 1e-3 and torch.allclose(ours, gradient, atol=1e-6, rtol=1e-4)


def test_ranks_agree(folder, tmp_path):
    """Two processes, a group across both: guards against a xi of each rank's own rewards, which ends in a
    deadlock.

    Also against gradients that DDP does not average while the trainer accumulates (the ranks' weights would
    part), and against attribution of another rank's rows. (--multi_gpu: accelerate's --cpu starts one
    process; the runs themselves ask for the CPU.)
    """
    accelerate, flags = Path(sys.executable).with_name("accelerate"), (
        "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
        "--main_process_port 0")
    done = subprocess.run(
        [accelerate, *flags.split(), __file__, folder, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    kinds = "plain", "off", "on"
    plain, off, on = ([torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1)] for kind in kinds)
    for first, second in (plain, off, on):
        assert torch.equal(first["weights"], second["weights"])
    assert plain[0]["rows"] == off[0]["rows"] and torch.equal(plain[0]["weights"], off[0]["weights"])
    for one, other in zip(on[0]["rows"], on[1]["rows"], strict=True):
        assert all(one[name] == other[name] for name in one if name.startswith("pipo/"))
    assert check_xi_by_hand(on[0]["rows"][:-1]) == check_xi_by_hand(on[1]["rows"][:-1]) >= 1
    assert not torch.equal(plain[0]["weights"], on[0]["weights"])
    prompts, completions, attribution = zip(*on[0]["last"], *on[1]["last"])
    assert torch.allclose(torch.tensor(attribution), attribution_by_hand(prompts, completions, 1.0))
    assert set(prompts[:6]) & set(prompts[6:]) and any(attribution[:6]) and any(attribution[6:])


@pytest.mark.parametrize("place", ["beside pipo.py", "one folder down"])
def test_it_finds_pipo(tmp_path, place):
    """From another folder than the repository's, and by its path alone."""
    target = tmp_path if place == "beside pipo.py" else tmp_path / "assets"
    target.mkdir(exist_ok=True)
    (tmp_path / "pipo.py").symlink_to(HERE.parent / "pipo.py")
    (target / "pipo_trl.py").write_text((HERE / "pipo_trl.py").read_text())
    code = f"import runpy; print(runpy.run_path({str(target / 'pipo_trl.py')!r})['PIPOTrainer'].__name__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command, elsewhere = [sys.executable, "-c", code], tmp_path.parent
    run = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "PIPOTrainer", run.stderr


if __name__ == "__main__":
    run_each_kind(*sys.argv[1:])
