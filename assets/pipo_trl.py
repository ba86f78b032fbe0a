"""PIPO on top of TRL: a GRPOTrainer that looks back. For several GPUs, sharding, vLLM: what TRL brings.

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

or, where weights, gradients and AdamW do not fit on one card, sharded by `accelerate launch --config_file
fsdp2.yaml train.py`, where fsdp2.yaml is

    compute_environment: LOCAL_MACHINE
    distributed_type: FSDP
    num_machines: 1
    num_processes: 8
    mixed_precision: bf16
    fsdp_config:
      fsdp_version: 2
      fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
      fsdp_cpu_ram_efficient_loading: false
      fsdp_state_dict_type: FULL_STATE_DICT

DeepSpeed's ZeRO-2 and 3 work too, with accelerate's config for them.

It logs `pipo/mu`, `pipo/xi`, `pipo/phi` and, of the verification step, `pi/*`. TRL's own defaults average as
DAPO does and let the learning rate fall to 0; the settings above do as pipo.py does. Checkpoints hold the
window of mean rewards and the batch: train(resume_from_checkpoint=True) goes on as if never stopped. It has
not run on GPUs or with a real vLLM yet.
"""

import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from trl import GRPOTrainer

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]  # pipo.py is beside this file or one folder up

from pipo import ImprovementTracker, group_advantages, improvement_rewards


def reduce_next_gradients(model, on: bool) -> None:
    """Whether the next backward averages gradients over the ranks, whatever no_sync is around it."""
    model = getattr(model, "_orig_mod", model)  # inside what torch.compile made
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's
        model.set_requires_gradient_sync(on)
    elif hasattr(model, "require_backward_grad_sync"):  # DDP's
        model.require_backward_grad_sync = on


class PIPOTrainer(GRPOTrainer):
    """GRPOTrainer in which each freshly sampled batch decides on one more step on the batch before it.

    `window`, `lam` and `xi_clip` are those of pipo.ImprovementTracker; all other arguments are GRPOTrainer's.
    With feedback=False it is GRPOTrainer, number for number.
    As in the authors' code, one optimizer takes both steps: a verification step is first of all its momentum.
    """

    def __init__(self, *args, feedback=True, window=8, lam=0.1, xi_clip=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.feedback, self.tracker = feedback, ImprovementTracker(window, lam, xi_clip)
        args, fsdp = self.args, self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        deepspeed = getattr(self.accelerator.state.deepspeed_plugin, "deepspeed_config", {})
        uneven = args.steps_per_generation % args.gradient_accumulation_steps
        refused = {
            "FSDP1; ask for fsdp_version: 2": fsdp and fsdp.fsdp_version == 1,
            # TRL leaves the reference empty on all ranks but the first
            "beta and fsdp_cpu_ram_efficient_loading; set that to false":
                fsdp and fsdp.cpu_ram_efficient_loading and self.ref_model,
            # the engine moves it at verification steps, too
            "DeepSpeed's scheduler; use lr_scheduler_type": "scheduler" in deepspeed,
            "images": self._is_vlm,
            "a steps_per_generation that gradient_accumulation_steps does not divide": uneven,
            # its advantages are not those of the mean reward
            "normalize_then_sum": self.multi_objective_aggregation == "normalize_then_sum",
        }
        for what in refused:
            if feedback and refused[what]:
                raise ValueError(f"PIPOTrainer cannot look back with {what}")
        # what must be alike for a saved batch to be gone on with
        self._layout = [self.accelerator.num_processes, self.num_generations, self.num_iterations,
                        args.per_device_train_batch_size, args.steps_per_generation,
                        args.gradient_accumulation_steps]

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
        if self._rewards.isnan().all(1).any():
            raise ValueError("no reward function gave a completion a number; let one give 0.0 if it is wrong")
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(1)  # (N,)
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
        """A step on the previous batch, in the micro-batches it was trained in.

        The loss is TRL's, with the ratio to the policy that sampled, and the correction for vLLM. Left out is
        what is no reward: KL, entropy bonus, balance of experts.
        """
        model, state, log = self.model_wrapped, self.accelerator.gradient_state, defaultdict(list)
        was_syncing, each = state.sync_gradients, state.plugin_kwargs.get("sync_each_batch", False)
        unscaled = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}  # the loss is, already
        alone = dict(beta=0.0, _entropy_bonus_enabled=False, aux_loss_enabled=False, _metrics={"train": log})
        normal = {name: getattr(self, name) for name in alone}
        vars(self).update(alone)
        for i, batch in enumerate(previous, 1):
            last = i % self.args.gradient_accumulation_steps == 0
            state._set_sync_gradients(last)  # else optimizer and DeepSpeed's engine pass over step()
            reduce_next_gradients(model, last or each)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, {**batch, "advantages": phi * batch["attribution"]})
            self.accelerator.backward(loss, **unscaled)
            if last:  # DeepSpeed's backward has clipped and stepped
                if self.args.max_grad_norm > 0:
                    log["grad_norm"].append(float(self._clip_grad_norm(model)))
                self.optimizer.step()  # at the learning rate of the step to come
                model.zero_grad()
        vars(self).update(normal)
        state._set_sync_gradients(was_syncing)
        reduce_next_gradients(model, was_syncing or each)
        for name, values in log.items():
            self._metrics["train"][f"pi/{name}"] += values

    def _save_checkpoint(self, model, trial):
        """TRL's checkpoint, and beside it the window and this rank's part of the batch."""
        super()._save_checkpoint(model, trial)
        if self.feedback:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)  # another machine's may not have it
            state = [self._layout, list(self.tracker.history), self._buffered_inputs, self._step]
            torch.save(state, folder / f"pipo-{self.accelerator.process_index}.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        """TRL's, and the window and the batch, if every rank finds its part."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if not (self.feedback and checkpoint):
            return
        file, device = Path(checkpoint, f"pipo-{self.accelerator.process_index}.pt"), self.accelerator.device
        saved = torch.load(file, map_location=device.type, weights_only=True) if file.exists() else [None]
        if self.accelerator.gather(torch.tensor([saved[0] == self._layout], device=device).long()).all():
            self.tracker.history.extend(saved[1])
            self._buffered_inputs, self._step = saved[2:]  # amid its num_iterations TRL would sample anew
        else:
            warnings.warn(f"{checkpoint} has no window and batch of this number of processes and these batch "
                          "sizes: the window of mean rewards starts anew")
