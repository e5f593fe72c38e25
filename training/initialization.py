"""What a fresh draft starts from instead of small random numbers.

The draft imitates the target, so it starts with the target's own output space: `lm_head` and the final `norm`. The
up-projections of the latent start at the scale that makes keys and values as large as a standard head's; at the usual
scale they are several times smaller, attention is close to a plain mean, and learning starts late. An `fc` that passes
one auxiliary state through, and the MLP of the target's last layer, were tried and learned slower.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_eagle3_mla import Eagle3MLADraftModel


@torch.no_grad()
def initialize_from_target(draft: Eagle3MLADraftModel, target: PreTrainedModel) -> list[str]:
    """
    Sets the draft's weights to their starting point.

    Args:
        draft (`Eagle3MLADraftModel`): Freshly made, its draft vocabulary chosen. **Effects**: changed in place.
        target (`PreTrainedModel`): Its target.

    Returns:
        `list[str]`: Names of the weights that came from the target; those whose shape or meaning differs stay random.
    """
    scale_up_projections(draft)
    copied = {"lm_head.weight": copy_lm_head(draft, target), "norm.weight": copy_final_norm(draft, target)}
    return [name for name, was_copied in copied.items() if was_copied]


def scale_up_projections(draft: Eagle3MLADraftModel) -> None:
    """Gives keys and values the variance `fan_in * std^2` of a projection from the whole attention input.

    The latent has unit variance and C components where the attention input has unit variance and 2D, so `W_uk` and
    `W_uv` grow by `sqrt(2D / C)`.
    """
    if draft.config.attention_type != "mla" or not draft.config.mla_use_kv_norm:
        return
    for layer in draft.layers:
        attention = layer.self_attn
        factor = (attention.W_dkv.in_features / attention.W_dkv.out_features) ** 0.5
        attention.W_uk.weight.mul_(factor)
        attention.W_uv.weight.mul_(factor)


def copy_lm_head(draft: Eagle3MLADraftModel, target: PreTrainedModel) -> bool:
    """The target's output embeddings of the draft vocabulary."""
    weight = target.get_output_embeddings().weight
    if weight.shape != (draft.config.vocab_size, draft.config.hidden_size):
        return False
    draft_ids = draft.draft_to_target(torch.arange(draft.config.draft_vocab_size, device=draft.d2t.device))
    draft.lm_head.weight.copy_(weight[draft_ids.to(weight.device)])
    return True


def copy_final_norm(draft: Eagle3MLADraftModel, target: PreTrainedModel) -> bool:
    """The weight of the target's final norm, if that norm computes what the draft's does."""
    norm = getattr(target.get_decoder(), "norm", None)
    if norm is None or not is_plain_rms_norm(norm, draft.config.hidden_size):
        return False
    draft.norm.weight.copy_(norm.weight)
    return True


def is_plain_rms_norm(norm: nn.Module, hidden_size: int) -> bool:
    """True if `norm(x)` is `x / rms(x) * weight`, tried on random numbers: Gemma's multiplies by `1 + weight`."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (hidden_size,) or getattr(norm, "bias", None) is not None:
        return False
    states = torch.randn(4, hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    expected = states * states.square().mean(dim=-1, keepdim=True).rsqrt() * weight
    return torch.allclose(norm(states), expected, rtol=2e-2, atol=2e-2)
