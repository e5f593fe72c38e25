"""Loss and metrics of the training unroll.

At TTT step k a supervised row is charged the forward KL divergence from the target's distribution, restricted to the
draft vocabulary and renormalised, to the draft's. The loss of a global batch is

    sum_k decay^k / N_k * sum_{rows i supervised at k} KL(target_{i+1+k} || draft_i^(k))

where N_k counts the supervised rows of the whole global batch at step k: gradient accumulation and data parallelism
change nothing. The decay 0.8 is EAGLE-3's (arXiv:2503.01840) and SpecForge's.

Shapes: B batch, T tokens, N supervised rows, K TTT steps, Vd draft vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(draft_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || draft) of every row in float32 or wider, `(N, Vd), (N, Vd) -> (N,)`.

    The restriction to the draft vocabulary is made by the caller, who passes the target's logits of those tokens only;
    the softmax renormalises them.
    """
    dtype = torch.promote_types(draft_logits.dtype, torch.float32)
    draft_log_probs = draft_logits.to(dtype).log_softmax(dim=-1)
    teacher_log_probs = teacher_logits.to(dtype).log_softmax(dim=-1)
    return F.kl_div(draft_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(dim=-1)


def step_weights(num_supervised: Tensor, decay: float) -> Tensor:
    """Factor on the summed loss of each step, `decay^k / N_k`, `(K,) -> (K,)`; finite for a step without rows."""
    steps = torch.arange(len(num_supervised), device=num_supervised.device)
    return decay**steps / num_supervised.clamp(min=1)


def acceptance_metrics(hits: Tensor, prefix_hits: Tensor, num_supervised: Tensor) -> dict[str, float]:
    """Per-step accuracy and the acceptance length that chain drafting would have on these rows.

    A row hits at step k if the draft's top-1 is the target's full-vocabulary top-1; it has a prefix hit if it hits at
    every step up to k. The expected number of accepted tokens is the sum of the prefix hit rates, and the bonus token
    comes on top.

    Args:
        hits (`torch.Tensor` of shape `(K,)`): Rows that hit at each step.
        prefix_hits (`torch.Tensor` of shape `(K,)`): Rows that hit at each step and at all before.
        num_supervised (`torch.Tensor` of shape `(K,)`): Rows that were supervised at each step.

    Returns:
        `dict[str, float]` with `accuracy_0` to `accuracy_{K-1}` and `simulated_acceptance_length`.
    """
    num_rows = num_supervised.clamp(min=1).double()
    accuracies = (hits / num_rows).tolist()
    metrics = {f"accuracy_{ttt_step}": accuracy for ttt_step, accuracy in enumerate(accuracies)}
    metrics["simulated_acceptance_length"] = 1 + (prefix_hits / num_rows).sum().item()
    return metrics
