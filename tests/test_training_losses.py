"""Losses and metrics against their definitions."""

import pytest
import torch
from torch.autograd import gradcheck

from eagle3_mla.training.losses import (
    LOSSES,
    acceptance_metrics,
    acceptance_rate,
    cross_entropy,
    forward_kl,
    lk_alpha,
    lk_lambda,
    step_weights,
)


def random_pair(num_rows: int = 5, vocab_size: int = 12, draft_vocab_size: int = 7):
    """Draft logits, and target log-probabilities of the first tokens of a larger vocabulary."""
    generator = torch.Generator().manual_seed(0)
    draft_logits = torch.randn(num_rows, draft_vocab_size, dtype=torch.float64, generator=generator)
    target_logits = torch.randn(num_rows, vocab_size, dtype=torch.float64, generator=generator)
    return draft_logits.requires_grad_(), target_logits.log_softmax(dim=-1)[:, :draft_vocab_size]


def test_forward_kl_is_its_definition():
    torch.manual_seed(0)
    draft_logits, teacher_logits = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    draft_probs = draft_logits.exp() / draft_logits.exp().sum(dim=-1, keepdim=True)
    teacher_probs = teacher_logits.exp() / teacher_logits.exp().sum(dim=-1, keepdim=True)
    expected = (teacher_probs * (teacher_probs / draft_probs).log()).sum(dim=-1)
    torch.testing.assert_close(forward_kl(draft_logits, teacher_logits), expected, atol=1e-12, rtol=1e-12)


def test_forward_kl_renormalises_the_teacher_over_the_draft_vocabulary():
    torch.manual_seed(0)
    full_logits, draft_ids = torch.randn(3, 10, dtype=torch.float64), torch.tensor([1, 4, 5, 9])
    restricted = full_logits.softmax(dim=-1)[:, draft_ids]
    restricted = restricted / restricted.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(forward_kl(restricted.log(), full_logits[:, draft_ids]), torch.zeros(3).double())


def test_forward_kl_of_half_precision_logits_is_computed_in_float32():
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = forward_kl(logits, logits.flip(0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), forward_kl(logits.double(), logits.flip(0).double()), rtol=1e-5, atol=0)


def test_gradient_of_forward_kl_is_the_difference_of_probabilities():
    torch.manual_seed(0)
    draft_logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher_logits = torch.randn(5, 7, dtype=torch.float64)
    forward_kl(draft_logits, teacher_logits).sum().backward()
    expected = draft_logits.softmax(dim=-1) - teacher_logits.softmax(dim=-1)
    torch.testing.assert_close(draft_logits.grad, expected.detach(), atol=1e-12, rtol=1e-12)


def test_cross_entropy_is_charged_at_the_targets_likeliest_token_of_the_draft_vocabulary():
    draft_logits, target_log_probs = random_pair()
    expected = [
        -draft_logits[row].log_softmax(dim=-1)[target_log_probs[row].argmax()].item()
        for row in range(len(draft_logits))
    ]
    assert cross_entropy(draft_logits, target_log_probs).tolist() == pytest.approx(expected, rel=1e-12)


def test_acceptance_rate_is_that_of_speculative_sampling_by_enumeration():
    """A draft x ~ q is accepted with probability min(1, p(x) / q(x)); p lacks what the draft vocabulary lacks."""
    draft_logits, target_log_probs = random_pair()
    q, p = draft_logits.softmax(dim=-1), target_log_probs.exp()
    expected = (q * (p / q).clamp(max=1)).sum(dim=-1)
    torch.testing.assert_close(acceptance_rate(draft_logits, target_log_probs), expected, atol=1e-12, rtol=1e-12)
    assert (p.sum(dim=-1) < 1).all()
    assert (expected < p.sum(dim=-1)).all()


def test_lk_losses_are_their_definitions():
    draft_logits, target_log_probs = random_pair()
    rate = acceptance_rate(draft_logits, target_log_probs)
    torch.testing.assert_close(lk_alpha(draft_logits, target_log_probs), -rate.log())
    share = (-3 * rate).exp()
    expected = share * forward_kl(draft_logits, target_log_probs) + (1 - share) * (1 - rate)
    torch.testing.assert_close(lk_lambda(draft_logits, target_log_probs), expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "lk_lambda"])
def test_gradients_of_losses_are_their_differences(name):
    draft_logits, target_log_probs = random_pair()
    assert gradcheck(lambda logits: LOSSES[name](logits, target_log_probs), [draft_logits])


def test_the_mixture_of_lk_lambda_is_not_differentiated():
    draft_logits, target_log_probs = random_pair()
    share = (-3 * acceptance_rate(draft_logits, target_log_probs)).exp().detach()

    def with_fixed_share(logits):
        rate = acceptance_rate(logits, target_log_probs)
        return share * forward_kl(logits, target_log_probs) + (1 - share) * (1 - rate)

    gradients = [
        torch.autograd.grad(loss.sum(), draft_logits)[0]
        for loss in (lk_lambda(draft_logits, target_log_probs), with_fixed_share(draft_logits))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_stay_finite_where_draft_and_target_share_nothing(name):
    draft_logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = LOSSES[name](draft_logits, torch.tensor([[-300.0, 0.0]]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert draft_logits.grad.isfinite().all()


def test_step_weights_divide_by_the_rows_of_their_step():
    weights = step_weights(torch.tensor([10, 5, 0]), [1.0, 0.5, 0.25])
    assert weights.tolist() == pytest.approx([1 / 10, 0.5 / 5, 0.25])


def test_simulated_acceptance_length_counts_prefixes_and_the_bonus_token():
    hits, prefix_hits = torch.tensor([8, 6, 4]), torch.tensor([8, 5, 2])
    metrics = acceptance_metrics(hits, prefix_hits, num_supervised=torch.tensor([10, 10, 8]))
    assert metrics["simulated_acceptance_length"] == pytest.approx(1 + 0.8 + 0.5 + 0.25)
    assert [metrics[f"accuracy_{ttt_step}"] for ttt_step in range(3)] == pytest.approx([0.8, 0.6, 0.5])


def test_metrics_of_a_step_without_rows_are_zero():
    zero = torch.tensor([0])
    assert acceptance_metrics(zero, zero, zero) == {"accuracy_0": 0.0, "simulated_acceptance_length": 1.0}
