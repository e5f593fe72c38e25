"""Muon for the matrices of the draft, beside the optimizer that the Trainer makes for everything else.

Muon (K. Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the gradient of a matrix by the nearest
orthogonal one, so that all its directions learn at one speed. Updates are scaled to the size of AdamW's
(arXiv:2502.16982, Eq. 4). `lm_head`, embeddings and norms stay with the other optimizer.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME

# Components of the names of matrices that look tokens up instead of mapping states to states.
TOKEN_MATRICES = {"lm_head", "embed_tokens"}


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices that map states to states."""
    return [
        weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dim() == 2 and TOKEN_MATRICES.isdisjoint(name.split("."))
    ]


def check_has_matrices(model: nn.Module, muon_learning_rate: float) -> None:
    """
    Requires that Muon has something to train.

    Raises:
        ValueError: If no trainable matrix of `model` maps states to states.
    """
    if not hidden_matrices(model):
        raise ValueError(
            f"`--muon-learning-rate` must be 0 or left out, got {muon_learning_rate}: it trains the matrices that map "
            "states to states, and what is trained here has none."
        )


def check_same_optimizer(uses_muon: bool, checkpoint: Path) -> None:
    """
    Requires that a run resumes with the optimizer that it began with.

    Raises:
        ValueError: If Muon was used and is not any more, or the reverse.
    """
    file = checkpoint / OPTIMIZER_NAME
    if not file.is_file():  # FSDP and DeepSpeed, which Muon is refused with, save in parts
        return
    groups = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    used_muon = any("ns_steps" in group for group in groups)
    if used_muon != uses_muon:
        raise ValueError(
            f"{checkpoint} was trained {'by' if used_muon else 'without'} Muon. Resume with the arguments of the "
            f"interrupted run: `--muon-learning-rate` must be {'above 0' if used_muon else '0'}."
        )


class MuonBeside(torch.optim.Optimizer):
    """
    Two optimizers as one: their groups share a schedule, and they are saved and restored together.

    Args:
        other (`torch.optim.Optimizer`): Not used yet. **Effects**: `matrices` leave its groups.
        matrices (`Iterable[nn.Parameter]`): What Muon trains.
        learning_rate (`float`): Of Muon.
        weight_decay (`float`): Of Muon.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        matrices: Iterable[nn.Parameter],
        learning_rate: float,
        weight_decay: float,
    ):
        matrices = list(matrices)
        moved = set(matrices)
        for group in other.param_groups:
            group["params"] = [weight for weight in group["params"] if weight not in moved]
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = other, muon  # a log shows the rate of the first group: `--learning-rate`
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.defaults = dict(other.defaults)  # some schedules read the rate there
        self.share()

    def share(self) -> None:
        """Lets the parts step with the groups and the state of this optimizer, which are saved and scheduled."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self.share()
