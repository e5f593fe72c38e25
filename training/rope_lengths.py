"""RoPE whose factors depend on the length of the text: "longrope", as in Phi-3, and "dynamic" NTK scaling.

Up to some length the factors are fixed. Beyond it transformers takes those for the longest text of the batch, so that
a text is read otherwise beside a longer one; "dynamic" also keeps them for later, shorter texts.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig


def length_of_fixed_rope(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text up to which the target's RoPE has the same factors; `None`: at any length."""
    text_config = config.get_text_config(decoder=True)
    rope = getattr(text_config, "rope_parameters", None) or {}
    lengths = []
    for parameters in (rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))):
        if parameters.get("rope_type") == "longrope":
            lengths.append(parameters["original_max_position_embeddings"])
        elif parameters.get("rope_type") == "dynamic":
            lengths.append(text_config.max_position_embeddings)
    return min(lengths, default=None)


@torch.no_grad()
def forget_lengths(decoder: nn.Module) -> None:
    """Lets "dynamic" RoPE begin anew, by a text of one token. **Effects**: changes its buffers."""
    for module in decoder.modules():
        rope_type = getattr(module, "rope_type", None)
        layer_types = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        for layer_type, of_layers in layer_types.items():
            if of_layers == "dynamic":
                kwargs = {} if layer_type is None else {"layer_type": layer_type}
                factors = next(module.buffers())
                module(factors, torch.zeros(1, 1, dtype=torch.long, device=factors.device), **kwargs)
