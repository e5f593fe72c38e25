"""Training-time test (TTT): the draft unrolled on its own states, as it will be when it decodes (arXiv:2503.01840).

Letters: x_i tokens, g_i the target's auxiliary states at i, y_i the target's distribution after x_i. At step k every
row i takes the embedding of x_{i+1+k} and a state, fc(g_i) at first and then what it produced itself at step k - 1,
and predicts x_{i+2+k}; its teacher is y_{i+1+k}. It attends to the step-0 keys of its document up to its own and to
its own keys of steps 1 to k, at the RoPE positions where a decoder would have put them. Row i at step k therefore
equals what a draft computes that decodes k tokens with its cache after the target has committed x_{i+1}.

Only the rows that a decoder can visit are supervised, and a row supervised at step k was so at all steps before.
Nobody reads the later states of the others: they are skipped from the last layer's MLP on.

Shapes: B batch, T tokens, D hidden, Dt the target's hidden, N supervised rows, M taught positions, K TTT steps,
Vd draft vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.utils import ModelOutput

from ..modeling_eagle3_mla import CosSin, Eagle3MLADecoderLayer, Eagle3MLADraftModel
from .attention import joint_attention, step_zero_mask, trainable_backend
from .losses import forward_kl


def supervised_rows(loss_mask: Tensor, document_ids: Tensor, ttt_step: int) -> Tensor:
    """True at (row, step) pairs that a decoder visits; `(B, T)` of bool.

    Row i at step k read the tokens up to i + 1 + k and predicts the next one. All from i + 1, the token with which the
    target began the round, must be the assistant's, and all from i in one document. With two prompt tokens (p) and
    four of the assistant (a):

        token        0 1 2 3 4 5
                     p p a a a a
        step 0         1 2 3          row 1 reads token 2, predicts token 3
        step 1         1 2            row 1 reads token 3, predicts token 4
        step 2         1              row 1 reads token 4, predicts token 5
        step 3       none
    """
    num_rows = loss_mask.shape[1] - ttt_step - 2
    supervised = torch.zeros_like(loss_mask, dtype=torch.bool)
    if num_rows > 0:
        produced = loss_mask[:, 1:].bool().unfold(1, ttt_step + 2, 1).all(dim=-1)  # (B, T - k - 2)
        documents = document_ids.unfold(1, ttt_step + 3, 1)
        supervised[:, :num_rows] = produced & (documents == documents[..., :1]).all(dim=-1)
    return supervised


def count_supervised_rows(loss_mask: Tensor, document_ids: Tensor, num_ttt_steps: int) -> Tensor:
    """Supervised rows of each step, `(K,)`."""
    counts = [supervised_rows(loss_mask, document_ids, ttt_step).sum() for ttt_step in range(num_ttt_steps)]
    return torch.stack(counts)


def taught_positions(loss_mask: Tensor, document_ids: Tensor) -> Tensor:
    """True at the positions whose target distribution teaches some row: `i + 1` of a row i supervised at step 0.

    Later steps need no others: row i at step k shares its teacher with row i + k at step 0.
    """
    return F.pad(supervised_rows(loss_mask, document_ids, 0)[:, :-1], (1, 0))


def document_positions(document_ids: Tensor) -> Tensor:
    """Position of every token in its document, `(B, T)`: documents 0 0 7 7 7 2 have positions 0 1 0 1 2 0."""
    indices = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = F.pad(document_ids.diff(dim=1) != 0, (1, 0), value=True)
    return indices - torch.where(starts, indices, 0).cummax(dim=1).values


def shift_left(inputs_embeds: Tensor, count: int) -> Tensor:
    """Row i of the result is row `i + count`, zeros beyond the end: `(B, T, D) -> (B, T, D)`."""
    return F.pad(inputs_embeds[:, count:], (0, 0, 0, min(count, inputs_embeds.shape[1])))


def attend_jointly(
    layer: Eagle3MLADecoderLayer,
    inputs_embeds: Tensor,
    states: Tensor,
    cos_sin: CosSin,
    seen: list[tuple[Tensor, Tensor]],
    backend: str,
    mask: Tensor | BlockMask | None,
) -> Tensor:
    """The attention half of a layer at one TTT step, residual included, `(B, T, D)`.

    **Effects**: appends this step's keys and values to `seen`, whose first entry belongs to the document and whose
    later ones belong to their row alone.
    """
    attention = layer.self_attn
    query, memory = attention.project(layer.attention_input(inputs_embeds, states), cos_sin)
    seen.append(attention.expand(memory, cos_sin))
    (key, value), *own = seen
    own_keys, own_values = [own_key for own_key, _ in own], [own_value for _, own_value in own]
    heads = joint_attention(backend, query, key, value, own_keys, own_values, mask, attention.scaling)
    return states + attention.output(heads.to(states.dtype))


@dataclass
class TTTOutput(ModelOutput):
    """
    Output of [`TTTDraftModel`].

    Args:
        loss (`torch.Tensor`): Sum over steps and rows, weighted by `step_weights`.
        num_supervised (`torch.LongTensor` of shape `(K,)`): Rows supervised at each step.
        hits (`torch.LongTensor` of shape `(K,)`): Of these, rows whose top-1 is the target's.
        prefix_hits (`torch.LongTensor` of shape `(K,)`): Of these, rows that hit at every step so far.
    """

    loss: torch.FloatTensor | None = None
    num_supervised: torch.LongTensor | None = None
    hits: torch.LongTensor | None = None
    prefix_hits: torch.LongTensor | None = None


class TTTDraftModel(Eagle3MLADraftModel):
    """The draft with the training unroll as its `forward`: same modules, same weights, saved as the draft itself."""

    def forward(
        self,
        input_ids: Tensor,
        aux_hidden_states: Tensor,
        teacher_logits: Tensor,
        teacher_tokens: Tensor,
        loss_mask: Tensor,
        step_weights: Tensor,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> TTTOutput:
        """
        Loss and hits of `K = len(step_weights)` TTT steps.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`):
                The conversation, in target ids.
            aux_hidden_states (`torch.Tensor` of shape `(B, T, 3 * Dt)`):
                The target's states at these tokens.
            teacher_logits (`torch.Tensor` of shape `(M, Vd)`):
                The target's logits of the draft vocabulary at the `taught_positions`, row after row.
            teacher_tokens (`torch.LongTensor` of shape `(M,)`):
                The target's top-1 at these positions, over the full vocabulary.
            loss_mask (`torch.LongTensor` of shape `(B, T)`):
                1 where the token was produced by the assistant.
            step_weights (`torch.Tensor` of shape `(K,)`):
                Factor on the summed loss of each step.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*):
                Embeddings of `input_ids`; needed unless the draft carries its own.
            document_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Documents from 1, padding 0; an attention mask is the case of one document. Defaults to all ones.

        Returns:
            [`TTTOutput`]
        """
        document_ids = torch.ones_like(loss_mask) if document_ids is None else document_ids
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        taught_index = taught_positions(loss_mask, document_ids).flatten().cumsum(dim=0) - 1  # (B * T,)
        has_prefix_hit = torch.ones_like(taught_index, dtype=torch.bool)
        num_supervised, hits, prefix_hits = taught_index.new_zeros(3, len(step_weights)).unbind()
        loss = step_weights.new_zeros(())
        unroll = self.unroll(inputs_embeds, aux_hidden_states, loss_mask, document_ids, len(step_weights))
        for ttt_step, (rows, logits) in enumerate(unroll):
            taught = taught_index[rows + 1 + ttt_step]
            loss = loss + step_weights[ttt_step] * forward_kl(logits, teacher_logits[taught]).sum()
            hit = self.draft_to_target(logits.detach().argmax(dim=-1)) == teacher_tokens[taught]
            has_prefix_hit[rows] &= hit
            num_supervised[ttt_step] = len(rows)
            hits[ttt_step] = hit.sum()
            prefix_hits[ttt_step] = has_prefix_hit[rows].sum()
        return TTTOutput(loss, num_supervised, hits, prefix_hits)

    def unroll(
        self,
        inputs_embeds: Tensor,
        aux_hidden_states: Tensor,
        loss_mask: Tensor,
        document_ids: Tensor,
        num_ttt_steps: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields for each TTT step the supervised rows, `(N,)` indices into `B * T`, and their logits `(N, Vd)`."""
        backend = trainable_backend(self.config._attn_implementation, inputs_embeds.device)
        mask = step_zero_mask(backend, document_ids)
        position_ids = document_positions(document_ids)
        states = self.fuse(aux_hidden_states)  # (B, T, D)
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        for ttt_step in range(num_ttt_steps):
            embeds = shift_left(inputs_embeds, ttt_step + 1)
            cos_sin = self.rotary_emb(position_ids + ttt_step, states.dtype)
            for index, layer in enumerate(self.layers):
                states = self.layers[index - 1].feed_forward(states) if index > 0 else states
                states = attend_jointly(layer, embeds, states, cos_sin, seen[index], backend, mask)
            rows = supervised_rows(loss_mask, document_ids, ttt_step).flatten().nonzero().squeeze(dim=1)
            row_states = self.layers[-1].feed_forward(states.flatten(0, 1)[rows].unsqueeze(0))  # (1, N, D)
            logits, row_states = self.predict(row_states)
            yield rows, logits.squeeze(0)
            flat_states = row_states.new_zeros(states.shape).flatten(0, 1)
            states = flat_states.index_copy(0, rows, row_states.squeeze(0)).view(states.shape)
