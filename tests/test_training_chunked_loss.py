"""The chunked loss against one that makes all logits at once."""

import pytest
import torch
from torch import nn

from eagle3_mla.training import chunked_loss as module
from eagle3_mla.training.chunked_loss import Predictions, Teaching, chunked_loss
from eagle3_mla.training.losses import LOSSES

NUM_TAUGHT, VOCAB_SIZE, WIDTH, TARGET_WIDTH = 11, 13, 6, 5
DRAFT_IDS = torch.tensor([0, 3, 4, 7, 12])
TAUGHT = [list(range(11)), [1, 2, 3, 5, 6, 9, 10], [3, 6, 10], []]
STEP_WEIGHTS = [0.5, 0.25, 0.125, 1.0]


def random_case(loss: str):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    head = nn.Linear(WIDTH, len(DRAFT_IDS), bias=False).double()
    head.weight.data = normal(*head.weight.shape)
    states = [normal(len(taught), WIDTH).requires_grad_() for taught in TAUGHT]
    output_embeddings = normal(VOCAB_SIZE, TARGET_WIDTH)
    teaching = Teaching(
        states=normal(NUM_TAUGHT, TARGET_WIDTH),
        logits=lambda states: states @ output_embeddings.T,
        vocab_size=VOCAB_SIZE,
        draft_ids=DRAFT_IDS,
        loss=LOSSES[loss],
        step_weights=torch.tensor(STEP_WEIGHTS, dtype=torch.float64),
    )
    return head, states, teaching


def run_chunked(head, states, teaching):
    predictions = [
        Predictions(step, torch.tensor(taught, dtype=torch.long)) for step, taught in zip(states, TAUGHT, strict=True)
    ]
    return chunked_loss(head, predictions, teaching)


def run_at_once(head, states, teaching):
    target_logits = teaching.logits(teaching.states)
    log_probs = target_logits.log_softmax(dim=-1)[:, DRAFT_IDS]
    loss, hits = 0.0, []
    for weight, step, taught in zip(STEP_WEIGHTS, states, TAUGHT, strict=True):
        logits = head(step)
        loss = loss + weight * teaching.loss(logits, log_probs[taught]).sum()
        hits.append(DRAFT_IDS[logits.argmax(dim=-1)] == target_logits[taught].argmax(dim=-1))
    return loss, hits


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 11, 100])
def test_chunks_change_neither_loss_nor_gradient_nor_hits(loss, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows_per_chunk * 20)
    head, states, teaching = random_case(loss)
    results = []
    for run in (run_at_once, run_chunked):
        total, hits = run(head, states, teaching)
        results.append([total, *torch.autograd.grad(3 * total, [head.weight, *states]), *hits])
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-12)


def test_no_tensor_has_a_row_of_logits_for_every_position(monkeypatch):
    """Memory is the purpose of the chunks: a larger batch must make more of them, not larger ones."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 40)
    head, states, teaching = random_case("forward_kl")
    sizes = []
    head.register_forward_hook(lambda module, args, logits: sizes.append(logits.numel()))
    run_chunked(head, states, teaching)
    assert len(sizes) == 6
    assert max(sizes) <= 40


def test_an_evaluation_takes_no_gradient():
    head, states, teaching = random_case("forward_kl")
    with torch.no_grad():
        loss, _ = run_chunked(head, states, teaching)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, run_at_once(head, states, teaching)[0].detach())


def test_a_frozen_head_passes_the_gradient_on():
    head, states, teaching = random_case("forward_kl")
    head.requires_grad_(False)
    loss, _ = run_chunked(head, states, teaching)
    expected, _ = run_at_once(head, states, teaching)
    torch.testing.assert_close(torch.autograd.grad(loss, states[:3]), torch.autograd.grad(expected, states[:3]))
