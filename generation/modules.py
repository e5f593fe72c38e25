"""A model's modules, for what is asked of all of them in every call."""

import torch
from torch import nn


def modules_of(model: nn.Module) -> set[nn.Module]:
    """Those of `model.modules()`, in a fifth of its time, which goes into names and order."""
    found, level = set(), {model}
    while level:
        found |= level
        level = {child for module in level for child in module._modules.values() if child is not None} - found
    return found


def devices_of(modules: set[nn.Module]) -> set[torch.device]:
    """Where the parameters of modules are."""
    parameters = [parameter for module in modules for parameter in module._parameters.values()]
    return {parameter.device for parameter in parameters if parameter is not None}
