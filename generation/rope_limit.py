"""RoPE whose factors depend on the length of the text: "longrope", as in Phi-3, and "dynamic" NTK scaling.

Such a target takes the factors for the longest position of a forward. The forward of a round holds nodes that are not
decided yet, so near the length at which factors change it would read tokens with those of longer texts.
"""

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def length_of_fixed_rope(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """
    Up to which length the factors are the same.

    Returns:
        Tokens of the text, `None` for any length, and whether the factors change again beyond it.
    """
    text_config = config.get_text_config(decoder=True)
    rope = getattr(text_config, "rope_parameters", None) or {}
    lengths, changes_again = [], False
    for parameters in (rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))):
        if parameters.get("rope_type") == "longrope":
            lengths.append(parameters["original_max_position_embeddings"])
        elif parameters.get("rope_type") == "dynamic":
            lengths.append(text_config.max_position_embeddings)
            changes_again = True
    return min(lengths, default=None), changes_again


def check_rope(target: PreTrainedModel, num_tokens: int, mask: Tensor | None, max_length: int, num_nodes: int) -> None:
    """
    Refuses texts in which the target's RoPE factors would change.

    Args:
        target (`PreTrainedModel`): Any target.
        num_tokens (`int`): T, tokens of the prompt.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 where a position is padding.
        max_length (`int`): Tokens of the longest text that may come.
        num_nodes (`int`): Draft tokens that a round may hold.

    Raises:
        NotImplementedError: Says how many tokens may be generated.
    """
    limit, changes_again = length_of_fixed_rope(target.config)
    if limit is None or max_length + num_nodes <= limit:
        return
    longest = num_tokens if mask is None else int(mask.sum(dim=1).max())
    if longest > limit and not changes_again:
        return
    raise NotImplementedError(
        f"{type(target).__name__} changes its RoPE factors at {limit} tokens, so with {num_nodes} draft tokens the "
        f"text must not be longer than {limit - num_nodes}, got a prompt of {num_tokens} and a `max_length` of "
        f"{max_length}. Generate fewer tokens, or pass no `assistant_model`."
    )
