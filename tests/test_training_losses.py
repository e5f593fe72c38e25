"""Loss and metrics against their definitions."""

import pytest
import torch

from eagle3_mla.training.losses import acceptance_metrics, forward_kl, step_weights


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


def test_step_weights_decay_and_divide_by_the_rows_of_their_step():
    weights = step_weights(torch.tensor([10, 5, 0]), decay=0.5)
    assert weights.tolist() == pytest.approx([1 / 10, 0.5 / 5, 0.25])


def test_simulated_acceptance_length_counts_prefixes_and_the_bonus_token():
    hits, prefix_hits = torch.tensor([8, 6, 4]), torch.tensor([8, 5, 2])
    metrics = acceptance_metrics(hits, prefix_hits, num_supervised=torch.tensor([10, 10, 8]))
    assert metrics["simulated_acceptance_length"] == pytest.approx(1 + 0.8 + 0.5 + 0.25)
    assert [metrics[f"accuracy_{ttt_step}"] for ttt_step in range(3)] == pytest.approx([0.8, 0.6, 0.5])


def test_metrics_of_a_step_without_rows_are_zero():
    zero = torch.tensor([0])
    assert acceptance_metrics(zero, zero, zero) == {"accuracy_0": 0.0, "simulated_acceptance_length": 1.0}
