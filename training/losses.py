"""Losses and metrics of the training unroll.

At TTT step k a supervised row is charged for the difference between the target's distribution p and the draft's q over
the draft vocabulary. The loss of a global batch is

    sum_k weight_k / N_k * sum_{rows i supervised at k} loss(p_{i+1+k}, q_i^(k))

where N_k counts the supervised rows of the whole global batch at step k: gradient accumulation and data parallelism
change nothing. The weights default to 0.8^k, EAGLE-3's (arXiv:2503.01840) and SpecForge's.

Every loss takes the draft's logits and the target's log-probabilities *before* renormalisation: what they lack to 1 is
the target's mass outside the draft vocabulary.

Shapes: N supervised rows, K TTT steps, Vd draft vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# arXiv:2602.23881 weighs the KL divergence by exp(-LK_DECAY * acceptance).
LK_DECAY = 3.0


def forward_kl(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """KL(p || q) with p renormalised over the draft vocabulary, `(N, Vd), (N, Vd) -> (N,)`."""
    draft_log_probs = widen(draft_logits).log_softmax(dim=-1)
    target_log_probs = widen(target_log_probs).log_softmax(dim=-1)
    return F.kl_div(draft_log_probs, target_log_probs, reduction="none", log_target=True).sum(dim=-1)


def cross_entropy(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """-log q(x) at the target's likeliest token x of the draft vocabulary, `(N, Vd), (N, Vd) -> (N,)`."""
    return F.cross_entropy(widen(draft_logits), target_log_probs.argmax(dim=-1), reduction="none")


def acceptance_rate(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """Probability sum_x min(p(x), q(x)) that speculative sampling accepts a draft (arXiv:2211.17192), `-> (N,)`.

    p is not renormalised: a token outside the draft vocabulary is never accepted.
    """
    draft_probs = widen(draft_logits).softmax(dim=-1)
    return torch.minimum(draft_probs, widen(target_log_probs).exp()).sum(dim=-1)


def lk_alpha(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """Negative logarithm of the acceptance rate (arXiv:2602.23881), `(N, Vd), (N, Vd) -> (N,)`."""
    rate = acceptance_rate(draft_logits, target_log_probs)
    return -rate.clamp(min=torch.finfo(rate.dtype).tiny).log()


def lk_lambda(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """Forward KL where the acceptance rate is low, its complement where it is high (arXiv:2602.23881), `-> (N,)`.

    The mixture lambda * KL + (1 - lambda) * (1 - rate) has lambda = exp(-3 * rate), of each row by itself: an average
    over a batch would make the loss depend on how rows are spread over processes.
    """
    rate = acceptance_rate(draft_logits, target_log_probs)
    kl_share = (-LK_DECAY * rate.detach()).exp()
    return kl_share * forward_kl(draft_logits, target_log_probs) + (1 - kl_share) * (1 - rate)


LOSSES = {"forward_kl": forward_kl, "cross_entropy": cross_entropy, "lk_alpha": lk_alpha, "lk_lambda": lk_lambda}


def widen(tensor: Tensor) -> Tensor:
    """float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def step_weights(num_supervised: Tensor, weights: list[float]) -> Tensor:
    """Factor on the summed loss of each step, `weight_k / N_k`, `(K,)`; finite for a step without rows."""
    weights = torch.tensor(weights, dtype=torch.float32, device=num_supervised.device)
    return weights / num_supervised.clamp(min=1)


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
