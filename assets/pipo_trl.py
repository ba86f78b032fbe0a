"""PIPO on top of TRL: a GRPOTrainer that looks back. For several GPUs, vLLM and LoRA, which TRL brings.

For TRL 1.16.0 (`pip install trl==1.16.0`): private methods are overridden, which another version may have
changed. Use it as any GRPOTrainer, in a train.py:

    import pipo
    from datasets import load_dataset
    from pipo_trl import PIPOTrainer
    from trl import GRPOConfig

    PIPOTrainer(
        model="Qwen/Qwen3-4B",
        train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),  # of prompt and answer
        reward_funcs=lambda completions, answer, **_: list(map(pipo.verify, completions, answer)),
        args=GRPOConfig(num_generations=8, per_device_train_batch_size=8, gradient_accumulation_steps=16,
                        temperature=0.7, max_completion_length=4096, loss_type="grpo",
                        lr_scheduler_type="constant", logging_steps=1),
    ).train()

    accelerate launch --multi_gpu --num_processes 8 train.py    # 8 * 8 * 16 = 1,024 samples a batch

It logs `pipo/mu`, `pipo/xi`, `pipo/phi` and, of the verification step, `pi/*`. TRL's own defaults average as
DAPO does and let the learning rate fall to 0; the settings above do as pipo.py does.

Refused: DeepSpeed, FSDP, images, and a steps_per_generation that gradient_accumulation_steps does not divide.
Not in the checkpoints: the window of mean rewards and the previous batch, so that a resumed run fills the
window anew. It has not run on GPUs or with vLLM yet.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
from trl import GRPOTrainer

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]  # pipo.py is beside this file or one folder up

from pipo import ImprovementTracker, group_advantages, improvement_rewards


class PIPOTrainer(GRPOTrainer):
    """GRPOTrainer in which each freshly sampled batch decides on one more step on the batch before it.

    `window`, `lam` and `xi_clip` are those of pipo.ImprovementTracker; all other arguments are GRPOTrainer's.
    With feedback=False it is GRPOTrainer, number for number.
    """

    def __init__(self, *args, feedback=True, window=8, lam=0.1, xi_clip=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.feedback = feedback
        self.tracker = ImprovementTracker(window, lam, xi_clip)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        uneven = self.args.steps_per_generation % self.args.gradient_accumulation_steps
        if feedback and (sharded or self._is_vlm or uneven):
            raise ValueError("needs text, one device or DDP, and a steps_per_generation that "
                             "gradient_accumulation_steps divides")

    def _calculate_rewards(self, *args):
        """TRL's rewards (N, functions) of all ranks, the same on every rank; kept to be looked at."""
        self._rewards = super()._calculate_rewards(*args)
        return self._rewards

    def _generate_and_score_completions(self, rows):
        """TRL's batch, with what a later verification step on it will need."""
        training = self.model.training
        batch = super()._generate_and_score_completions(rows)
        if not (self.feedback and training):
            return batch
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(1)  # (N,)
        graded_by_none = self._rewards.isnan().all(1)
        rewards[graded_by_none] = torch.nan  # group_advantages raises
        self._mu = rewards.mean(dtype=torch.float64).item()

        # A group may lie on two ranks, and TRL shuffles the rows behind this: attribute now, scale later.
        advantages = group_advantages(rewards.view(-1, self.num_generations))  # (Q, G)
        attribution = improvement_rewards(advantages, 1.0).flatten()  # (N,)
        first = self.accelerator.process_index * len(rows)
        batch["attribution"] = attribution[first:first + len(rows)]
        batch["mixed"] = attribution.any()  # a group of any rank

        # TRL leaves these out where a batch gets one step, and takes the ratio for 1. It is not, once there
        # was a verification step.
        if "old_per_token_logps" not in batch:
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # (n, S)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)  # (n, S)
            width, at_a_time = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
            with torch.no_grad():
                batch["old_per_token_logps"], *_ = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, width, at_a_time)
        return batch

    def _prepare_inputs(self, rows):
        """TRL's inputs; where they begin a fresh batch, first a verification step on the batch before it."""
        previous = self._buffered_inputs
        inputs = super()._prepare_inputs(rows)
        is_fresh = self._buffered_inputs is not previous  # and no step was taken on it yet
        if not (self.feedback and is_fresh):
            return inputs
        feedback = self.tracker.feedback(self._mu)
        self.tracker.push(self._mu)  # once, after it was read
        for name, value in {"mu": self._mu, **(feedback._asdict() if feedback else {})}.items():
            self._metrics["train"][f"pipo/{name}"].append(value)
        # all of these are alike on all ranks, which would hang otherwise
        if previous and feedback and feedback.phi and previous[0]["mixed"]:
            self.verification_step(previous, feedback.phi)
        return inputs

    def verification_step(self, previous, phi):
        """A step on the previous batch, in the micro-batches it was trained in; no KL, no entropy bonus."""
        model, state, log = self.model_wrapped, self.accelerator.gradient_state, defaultdict(list)
        normal = self.beta, self._entropy_bonus_enabled, self._metrics
        was_syncing = state.sync_gradients
        self.beta, self._entropy_bonus_enabled, self._metrics = 0.0, False, {"train": log}
        state._set_sync_gradients(True)  # or accelerate's optimizer passes over step()
        for i, batch in enumerate(previous, 1):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, {**batch, "advantages": phi * batch["attribution"]})
            self.accelerator.backward(loss)
            if i % self.args.gradient_accumulation_steps == 0:
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.copy_(self.accelerator.reduce(p.grad, "mean"))  # DDP is within no_sync here
                if self.args.max_grad_norm > 0:
                    log["grad_norm"].append(float(self._clip_grad_norm(model)))
                self.optimizer.step()  # at the learning rate of the step to come
                model.zero_grad()
        self.beta, self._entropy_bonus_enabled, self._metrics = normal
        state._set_sync_gradients(was_syncing)
        for name, values in log.items():
            self._metrics["train"][f"pi/{name}"] += values
