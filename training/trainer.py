"""`transformers.Trainer` for a draft: the teacher before each step, the loss of the global batch, safe checkpoints.

What the Trainer does stays its own: optimizer, schedule, mixed precision, data parallelism, logging, resuming. Added
are the target, which is run on every batch; the number of supervised rows of the global batch, by which each TTT step
is normalised; metrics per step; and checkpoints that are complete under their name or not there at all.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from .adapters import base_draft
from .arguments import Eagle3TrainingArguments
from .averaging import WeightAveraging
from .batching import FillableRows, LengthGroupedSampler
from .documents import count_supervised_rows
from .losses import acceptance_metrics, step_weights
from .optimization import MuonBeside, hidden_matrices
from .target import Teacher
from .ttt import TTTDraftModel, TTTOutput

STAGING_DIRECTORY = ".incomplete-checkpoint"
NEWEST_CHECKPOINT = "checkpoint"


class Eagle3Trainer(Trainer):
    """
    Trains a draft against a frozen target.

    Args:
        model ([`TTTDraftModel`] or `peft.PeftModel`): The draft, or one in an adapter.
        teacher ([`Teacher`]): The target, or its stored features.
        args ([`Eagle3TrainingArguments`]): Arguments of the run.
        train_dataset (`Dataset`): Rows from `tokenize_conversations`, or with what they have.
        kwargs: As for `transformers.Trainer`.

    Raises:
        ValueError: If one process sees several GPUs.
        NotImplementedError: If the draft is to be sharded in a way that this trainer cannot save.
    """

    def __init__(
        self, model: TTTDraftModel, teacher: Teacher, args: Eagle3TrainingArguments, train_dataset: Any, **kwargs
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs. Start one process per GPU with `torchrun` or `accelerate "
                "launch`, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        self.teacher = teacher
        super().__init__(model=model, args=args, train_dataset=FillableRows(train_dataset), **kwargs)
        # `compute_loss` normalises by the global batch itself.
        self.model_accepts_loss_kwargs = True
        self.draft = base_draft(model)
        self.draft.recomputes_attention = args.recompute_attention
        self.averaging = None if args.ema_decay is None else WeightAveraging(args.ema_decay)
        if self.averaging is not None:
            self.add_callback(self.averaging)
        self.check_sharding()
        self.tallies = torch.zeros(3, args.num_ttt_steps, dtype=torch.long, device=args.device)
        self.run_directory = Path(args.output_dir)
        if self.callback_handler.pop_callback(ProgressCallback) is not None:
            self.add_callback(DraftProgressCallback)

    def check_sharding(self) -> None:
        """
        Raises:
            NotImplementedError: If weights would not be whole tensors, or tensors sharded one by one, or Muon gets
                parts of them.
        """
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise NotImplementedError("The draft is sharded by FSDP2 only: set `fsdp_version: 2`.")
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise NotImplementedError("ZeRO stage 3 would shard a draft of one layer: use stage 2.")
        if self.args.muon_learning_rate and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise NotImplementedError(
                "`--muon-learning-rate` needs whole matrices and their gradients: train without FSDP and DeepSpeed."
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with Muon beside it if the run has a rate for that."""
        if self.optimizer is None and self.args.muon_learning_rate:
            matrices = hidden_matrices(self.model if model is None else model)
            other = super().create_optimizer(model)
            self.optimizer = MuonBeside(other, matrices, self.args.muon_learning_rate, self.args.weight_decay)
        return super().create_optimizer(model)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As `Trainer.train`; the average of the weights resumes with them."""
        if self.averaging is not None:
            self.averaging.resume_from(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, **kwargs) -> None:
        """Nothing, if training goes on from its last checkpoint: the Trainer would make one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def released_weights(self) -> dict[str, Tensor]:
        """
        The weights of the result, averaged if the run averages.

        Every process has to call this; where the draft is sharded, the main process gets the weights, others nothing.
        """
        weights = self.accelerator.get_state_dict(self.model_wrapped if self.is_deepspeed_enabled else self.model)
        averages = {} if self.averaging is None else self.averaging.whole()
        return {
            name: averages[name].to(weight.dtype) if name in averages else weight for name, weight in weights.items()
        }

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """The micro-batches of one optimizer step, and the supervised rows of each TTT step over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_supervised = torch.zeros(self.args.num_ttt_steps, dtype=torch.long, device=device)
        for batch in batches:
            counts = count_supervised_rows(batch["loss_mask"], batch["document_ids"], self.args.num_ttt_steps)
            num_supervised += counts.to(device)
        return batches, self.accelerator.reduce(num_supervised)

    def compute_loss(
        self, model, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor | tuple[Tensor, TTTOutput]:
        """This process's share of the global batch's loss; `num_items_in_batch (K,)` counts supervised rows."""
        input_ids, loss_mask, document_ids = inputs["input_ids"], inputs["loss_mask"], inputs["document_ids"]
        if num_items_in_batch is None:
            num_items_in_batch = count_supervised_rows(loss_mask, document_ids, self.args.num_ttt_steps)
        lesson = self.teacher.lesson(inputs)
        output = model(
            input_ids=input_ids,
            inputs_embeds=None if self.draft.config.owns_embeddings else self.teacher.embed(input_ids),
            aux_hidden_states=lesson.aux_hidden_states,
            last_hidden_states=lesson.last_hidden_states,
            target_logits=self.teacher.logits,
            loss_mask=loss_mask,
            document_ids=document_ids,
            step_weights=step_weights(num_items_in_batch, self.args.step_weights),
            loss=self.args.loss,
        )
        self.tallies += torch.stack([output.num_supervised, output.hits, output.prefix_hits])
        # Data parallelism averages gradients over processes, the weights already divide by all of them.
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last call to what is logged. **Effects**: starts them anew."""
        if "loss" in logs:
            num_supervised, hits, prefix_hits = self.accelerator.reduce(self.tallies)
            logs |= acceptance_metrics(hits, prefix_hits, num_supervised)
            self.tallies.zero_()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """0: the Trainer's estimate knows neither the target nor the unroll."""
        return 0

    def _get_train_sampler(self, train_dataset=None) -> LengthGroupedSampler:
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = LengthGroupedSampler(dataset.lengths, args.global_batch_size, seed, args.dataloader_drop_last)
        self.add_callback(SamplerEpochCallback(sampler))
        return sampler

    def _get_output_dir(self, trial) -> str:
        return str(self.run_directory)

    def _save_checkpoint(self, model, trial) -> None:
        """
        Saves under another name and renames, so that a process killed at any moment leaves complete checkpoints only.

        **Effects**: `checkpoint` in the output directory links to the newest one; older ones go by `save_total_limit`.
        """
        output_dir = self.run_directory
        self.run_directory = output_dir / STAGING_DIRECTORY
        if self.args.should_save:
            shutil.rmtree(self.run_directory, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            if self.averaging is not None:
                name = f"checkpoint-{self.state.global_step}"
                self.averaging.save(self.run_directory / name, is_writer=self.args.should_save)
        finally:
            self.run_directory = output_dir
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            publish_checkpoint(output_dir, name)
            rotate_checkpoints(str(output_dir), save_total_limit=self.args.save_total_limit, use_mtime=True)


class SamplerEpochCallback(TrainerCallback):
    """Tells the sampler its epoch, also behind the wrappers with which a resumed or distributed run skips batches."""

    def __init__(self, sampler: LengthGroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class DraftProgressCallback(ProgressCallback):
    """The Trainer's progress bar, with loss, acceptance length and per-step accuracy in one line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "simulated_acceptance_length" not in logs:
            return
        accuracies = [logs[f"accuracy_{ttt_step}"] for ttt_step in range(args.num_ttt_steps)]
        self.training_bar.write(
            f"step {state.global_step}: loss {logs['loss']:.3f}, "
            f"simulated acceptance length {logs['simulated_acceptance_length']:.2f}, "
            f"accuracy {' '.join(f'{accuracy:.3f}' for accuracy in accuracies)}"
        )
        self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")


def publish_checkpoint(output_dir: Path, name: str) -> None:
    """Moves the staged checkpoint to its name, then points the link `checkpoint` at it; both steps are atomic."""
    staging = output_dir / STAGING_DIRECTORY
    if (output_dir / name).exists():
        os.replace(output_dir / name, staging / "replaced")
    os.replace(staging / name, output_dir / name)
    link = output_dir / f".{NEWEST_CHECKPOINT}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, output_dir / NEWEST_CHECKPOINT)
    shutil.rmtree(staging)


def find_checkpoint(resume_from_checkpoint: str, output_dir: str) -> str:
    """
    The checkpoint to resume from.

    Args:
        resume_from_checkpoint (`str`): A directory, or `"True"` for the newest checkpoint in `output_dir`.
        output_dir (`str`): Where the interrupted run wrote.

    Raises:
        ValueError: If there is none.
    """
    newest = Path(output_dir) / NEWEST_CHECKPOINT
    checkpoint = Path(resume_from_checkpoint)
    if resume_from_checkpoint == "True":
        # The link rather than the highest number: an older, longer run may have left higher ones.
        checkpoint = newest
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{checkpoint} is no complete checkpoint. Start anew, without `--resume-from-checkpoint`.")
    return str(checkpoint.resolve())
