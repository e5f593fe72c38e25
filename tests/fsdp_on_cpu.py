"""The training command with accelerate's FSDP on CPU processes: accelerate itself offers FSDP to accelerators only."""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from eagle3_mla.training.cli import main


def use_gloo(self, *args, **kwargs) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def use_cpu(self) -> None:
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = use_gloo
    PartialState.set_device = use_cpu
    sys.exit(main())
