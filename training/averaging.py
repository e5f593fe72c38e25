"""Exponential moving average of the trained weights.

After every optimizer step s (from 1) the average moves towards the weights,

    average += (1 - min(decay, s / (s + 9))) * (weight - average),

the warm-up of TensorFlow's `ExponentialMovingAverage`: a short run is not left with its random beginning. The average
is kept in float32 or wider, saved with each checkpoint, and is what a run releases.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

AVERAGE_FILE = "averaged_weights.safetensors"
WARM_UP_OFFSET = 9


class WeightAveraging(TrainerCallback):
    """
    Follows the weights that a Trainer trains.

    Args:
        decay (`float`): Share of the average that an optimizer step keeps once the warm-up is over.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.checkpoint: str | None = None

    def resume_from(self, checkpoint: str | None) -> None:
        """Makes the next training begin with the average of `checkpoint`; with the weights themselves for `None`."""
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        self.averages = {name: widened(weight) for name, weight in trained_weights(model)}
        if self.checkpoint is not None:
            self.load(Path(self.checkpoint))

    @torch.no_grad()
    def on_step_end(self, args, state, control, model: nn.Module, **kwargs):
        kept = min(self.decay, state.global_step / (state.global_step + WARM_UP_OFFSET))
        for name, weight in trained_weights(model):
            average = self.averages[name]
            average.lerp_(weight.detach().to(average.dtype), 1 - kept)

    def whole(self) -> dict[str, Tensor]:
        """The averages on the CPU, gathered where they are sharded: every process has to call this."""
        return {name: gathered(average).cpu() for name, average in self.averages.items()}

    def save(self, directory: Path, is_writer: bool) -> None:
        """Writes the average into a checkpoint; every process calls this, the writers write."""
        averages = self.whole()
        if is_writer:
            save_file({name: average.contiguous() for name, average in averages.items()}, directory / AVERAGE_FILE)

    def load(self, checkpoint: Path) -> None:
        """
        Takes the average from a checkpoint.

        Raises:
            ValueError: If it has none, or one of other weights.
        """
        file = checkpoint / AVERAGE_FILE
        check_has_average(checkpoint, self.decay)
        saved = load_file(file)
        if saved.keys() != self.averages.keys():
            differing = sorted(saved.keys() ^ self.averages.keys())
            raise ValueError(f"The average in {file} has other weights than are trained: {differing}.")
        for name, average in self.averages.items():
            average.copy_(sharded_like(saved[name], average))


def check_has_average(checkpoint: Path, decay: float) -> None:
    """
    Requires that a run which averages resumes with an average.

    Raises:
        ValueError: If `checkpoint` has none.
    """
    if not (checkpoint / AVERAGE_FILE).is_file():
        raise ValueError(
            f"`--ema-decay` is {decay} but {checkpoint} holds no average. "
            "Resume with the arguments of the interrupted run."
        )


def trained_weights(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and weights that the optimizer changes."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def widened(weight: Tensor) -> Tensor:
    """A copy in float32 or wider, sharded as `weight` is."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def gathered(tensor: Tensor) -> Tensor:
    """All shards of `tensor` together; a collective where there are several."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(whole: Tensor, example: Tensor) -> Tensor:
    """`whole` on the device of `example`, and spread over processes as it is."""
    whole = whole.to(example.device)
    if isinstance(example, DTensor):
        return distribute_tensor(whole, example.device_mesh, example.placements)
    return whole
