"""Where the inputs of a target belong, whose weights may be on several devices, or on none between two forwards."""

import torch
from transformers import PreTrainedModel


def input_device(target: PreTrainedModel) -> torch.device:
    """
    The device of the embeddings.

    Where `device_map` has put them on disk or into the memory of the CPU, they have none: accelerate fetches them for
    each forward, and moves the inputs from any device to where they are wanted.
    """
    weights = [target.get_input_embeddings().weight, *target.parameters()]
    return next((weight.device for weight in weights if not weight.is_meta), torch.device("cpu"))
