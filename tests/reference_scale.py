"""Packed rows for training, a trainer on them, and the same as a program that several processes can run."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from reference_ttt import tiny_config, tiny_target
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from eagle3_mla.training.arguments import Eagle3TrainingArguments
from eagle3_mla.training.batching import PaddingCollator
from eagle3_mla.training.placement import shard_layers, try_packing_together
from eagle3_mla.training.target import Teacher
from eagle3_mla.training.trainer import Eagle3Trainer
from eagle3_mla.training.ttt import TTTDraftModel

NUM_TTT_STEPS = 3


def packed_rows(num_rows: int) -> Dataset:
    """Random rows of one to three documents and of different lengths, each document beginning with a prompt."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for index in range(num_rows):
        row = {"input_ids": [], "loss_mask": [], "document_ids": []}
        for document in range(1, 2 + index % 3):
            length = int(torch.randint(5, 12, (), generator=generator))
            row["input_ids"] += torch.randint(0, 40, (length,), generator=generator).tolist()
            row["loss_mask"] += [0, 0] + [1] * (length - 2)
            row["document_ids"] += [document] * length
        rows.append(row | {"length": len(row["input_ids"])})
    return Dataset.from_list(rows)


def packed_trainer(
    output_dir: Path, dtype: torch.dtype = torch.float64, is_sharded: bool = False, num_rows: int = 8, **overrides
) -> Eagle3Trainer:
    """A trainer of a tiny draft on packed rows, perhaps of a sharded target; `overrides` are training arguments."""
    torch.manual_seed(0)
    target = tiny_target().to(dtype).requires_grad_(False)
    draft = TTTDraftModel(tiny_config(draft_vocab_size=30)).to(dtype)
    arguments = {
        "output_dir": str(output_dir),
        "learning_rate": 1e-3,
        "num_ttt_steps": NUM_TTT_STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = Eagle3TrainingArguments(**arguments | overrides)
    if is_sharded:
        shard_layers(target, args.device)
        assert all(isinstance(weight, DTensor) for weight in target.model.layers.parameters())
    teacher = Teacher(target, draft)
    if is_sharded:
        try_packing_together(teacher)
    return Eagle3Trainer(draft, teacher, args, train_dataset=packed_rows(num_rows), data_collator=PaddingCollator(0))


def gradients_of_run(trainer: Eagle3Trainer) -> dict[str, Tensor]:
    """What plain gradient descent at rate 1 takes off each weight, in one step or several."""
    before = {name: weight.detach().clone() for name, weight in trainer.draft.named_parameters()}
    trainer.train()
    return {name: before[name] - weight.detach() for name, weight in trainer.draft.named_parameters()}


ONE_PLAIN_STEP = {
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "learning_rate": 1.0,
}


def main() -> None:
    """Arguments: a directory, and those of `packed_trainer` as JSON. Leaves losses and the sum of gradients there."""
    directory = Path(sys.argv[1])
    trainer = packed_trainer(directory, **ONE_PLAIN_STEP | json.loads(sys.argv[2]))
    gradients = gradients_of_run(trainer)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        save_file(gradients | {"loss": torch.tensor(losses, dtype=torch.float64)}, directory / "gradients.safetensors")
    sys.stdout.flush()
    # At the end of the interpreter torch 2.13 may join a thread of gloo that waits for the interpreter: no such end.
    os._exit(0)


if __name__ == "__main__":
    main()
