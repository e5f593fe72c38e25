"""Loss of the draft's predictions without the logits of a whole batch.

`(N, Vd)` draft logits and `(M, V)` target logits are the largest tensors of a training step. Here a chunk of taught
positions goes through the target's output embeddings once and meets the predictions of all TTT steps that it teaches.
The gradient of their loss with respect to states and head is taken on the spot, and only it is kept for the backward
pass: the logits of a chunk are gone before those of the next one exist, and none is computed twice.

Shapes: M taught positions, N predictions of a TTT step, K TTT steps, D and Dt hidden sizes of draft and target, V and
Vd vocabularies of target and draft.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .losses import widen

# Elements of the largest tensor of a chunk. In float32 it takes 256 MiB, and a few of its size exist at a time.
CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Predictions:
    """
    What the unroll predicts at one TTT step.

    Args:
        states (`torch.Tensor` of shape `(N, D)`): After the final norm, input of the head.
        taught (`torch.LongTensor` of shape `(N,)`): Index of each one's teacher among the taught positions, rising.
    """

    states: Tensor
    taught: Tensor


@dataclass(frozen=True)
class Teaching:
    """
    What the predictions of a batch are compared with, and how.

    Args:
        states (`torch.Tensor` of shape `(M, Dt)`): The target's last hidden states at the taught positions.
        logits (`Callable`): The target's logits of such states, `(m, Dt) -> (m, V)`.
        vocab_size (`int`): V.
        draft_ids (`torch.LongTensor` of shape `(Vd,)`): Target ids of the draft vocabulary.
        loss (`Callable`): Draft logits and target log-probabilities, both `(n, Vd)`, to `(n,)`.
        step_weights (`torch.Tensor` of shape `(K,)`): Factor on the summed loss of each step.
    """

    states: Tensor
    logits: Callable[[Tensor], Tensor]
    vocab_size: int
    draft_ids: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    step_weights: Tensor


def chunked_loss(head: nn.Module, predictions: list[Predictions], teaching: Teaching) -> tuple[Tensor, list[Tensor]]:
    """
    Weighted loss of all predictions, and where they hit.

    Args:
        head (`nn.Module`): Makes logits `(n, Vd)` of states `(n, D)`.
        predictions (`list[Predictions]`): One entry for each TTT step.
        teaching (`Teaching`): What they are compared with.

    Returns:
        The summed loss, differentiable in the states and in the head's weights, and for each step `(N,)` of bool: the
        draft's top-1 is the target's, over the full vocabulary.
    """
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    states = [entry.states for entry in predictions]
    loss, *hits = _ChunkedLoss.apply(head, predictions, teaching, len(weights), *weights, *states)
    return loss, hits


class _ChunkedLoss(torch.autograd.Function):
    """`chunked_loss` as a node of the graph; its inputs that carry gradients are the head's weights and the states."""

    @staticmethod
    def forward(ctx, head, predictions, teaching, num_weights, *inputs):
        weights, states = inputs[:num_weights], inputs[num_weights:]
        needs_gradient = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(tensor) for tensor in inputs] if needs_gradient else []
        hits = [entry.taught.new_zeros(len(entry.taught), dtype=torch.bool) for entry in predictions]
        row_weights = [factor.expand(len(entry)) for factor, entry in zip(teaching.step_weights, states, strict=True)]
        loss = teaching.step_weights.new_zeros(())
        for positions, slices in chunks(predictions, teaching):
            target_log_probs, target_tokens = read_target(teaching, positions)
            taught = gather([entry.taught for entry in predictions], slices) - positions.start  # (n,)
            with torch.set_grad_enabled(needs_gradient):
                chunk_states = gather(states, slices).detach().requires_grad_(needs_gradient)
                draft_logits = head(chunk_states)  # (n, Vd)
                row_losses = teaching.loss(draft_logits, target_log_probs[taught])
                chunk_loss = (row_losses * gather(row_weights, slices)).sum()
            loss += chunk_loss.detach()
            draft_tokens = teaching.draft_ids[draft_logits.detach().argmax(dim=-1)]
            scatter(hits, slices, draft_tokens == target_tokens[taught])
            if needs_gradient:
                *of_weights, of_states = torch.autograd.grad(chunk_loss, [*weights, chunk_states])
                scatter(gradients[num_weights:], slices, of_states)
                for total, gradient in zip(gradients, of_weights, strict=False):
                    total += gradient
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*hits)
        return loss, *hits

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so that there can be one backward only
        return None, None, None, None, *(gradient.mul_(loss_gradient) for gradient in gradients)


def chunks(predictions: list[Predictions], teaching: Teaching) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the taught positions, each with the slices of all steps' predictions that it teaches."""
    vocab_size, draft_vocab_size = teaching.vocab_size, len(teaching.draft_ids)
    num_rows = max(1, CHUNK_ELEMENTS // max(vocab_size, draft_vocab_size * len(predictions)))
    num_taught = len(teaching.states)
    borders = torch.arange(0, num_taught + num_rows, num_rows, device=teaching.states.device).clamp(max=num_taught)
    bounds = torch.stack([torch.searchsorted(entry.taught, borders) for entry in predictions]).T.tolist()
    for start, (first, last) in zip(range(0, num_taught, num_rows), itertools.pairwise(bounds), strict=True):
        yield slice(start, start + num_rows), [slice(*bound) for bound in zip(first, last, strict=True)]


@torch.no_grad()
def read_target(teaching: Teaching, positions: slice) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the draft vocabulary `(m, Vd)`, not renormalised, and top-1 of the full one `(m,)`."""
    device = teaching.draft_ids.device
    logits = widen(teaching.logits(teaching.states[positions]))  # (m, V)
    draft_ids = teaching.draft_ids.to(logits.device)
    log_probs = logits[:, draft_ids] - logits.logsumexp(dim=-1, keepdim=True)
    return log_probs.to(device), logits.argmax(dim=-1).to(device)


def gather(tensors: Sequence[Tensor], slices: list[slice]) -> Tensor:
    """One slice of each tensor, one after the other."""
    return torch.cat([tensor[part] for tensor, part in zip(tensors, slices, strict=True)])


def scatter(tensors: Sequence[Tensor], slices: list[slice], values: Tensor) -> None:
    """Puts what `gather` would have taken back to its place. **Effects**: writes to `tensors`."""
    sizes = [part.stop - part.start for part in slices]
    for tensor, part, value in zip(tensors, slices, values.split(sizes), strict=True):
        tensor[part] = value
