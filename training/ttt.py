"""Training-time test (TTT): the draft unrolled on its own states, as it will be when it decodes (arXiv:2503.01840).

Letters: x_i tokens, g_i the target's auxiliary states at i, y_i the target's distribution after x_i. At step k every
row i takes the embedding of x_{i+1+k} and a state, fc(g_i) at first and then what it produced itself at step k - 1,
and predicts x_{i+2+k}; its teacher is y_{i+1+k}. It attends to the step-0 keys of its document up to its own and to
its own keys of steps 1 to k, at the RoPE positions where a decoder would have put them. Row i at step k therefore
equals what a draft computes that decodes k tokens with its cache after the target has committed x_{i+1}.

Only the rows that a decoder can visit are supervised, and a row supervised at step k was so at all steps before.
Nobody reads the later states of the others: they are skipped from the last layer's MLP on.

Shapes: B batch, T tokens, D hidden, Dt the target's hidden, N supervised rows, M taught positions, K TTT steps, V and
Vd vocabularies of target and draft.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..modeling_eagle3_mla import (
    CosSin,
    Eagle3MLADecoderLayer,
    Eagle3MLADraftModel,
    GroupedQueryAttention,
    LatentAttention,
)
from .attention import joint_attention, step_zero_mask, trainable_backend
from .chunked_loss import Predictions, Teaching, chunked_loss
from .documents import document_positions, supervised_rows, taught_positions
from .losses import LOSSES
from .rotary import fused_rotate

Memory = tuple[Tensor, Tensor]


def shift_left(inputs_embeds: Tensor, count: int) -> Tensor:
    """Row i of the result is row `i + count`, zeros beyond the end: `(B, T, D) -> (B, T, D)`."""
    return F.pad(inputs_embeds[:, count:], (0, 0, 0, min(count, inputs_embeds.shape[1])))


@dataclass(frozen=True)
class Unroll:
    """
    What all TTT steps and layers of one batch share.

    Args:
        backend (`str`): Kernel of the joint attention.
        mask: Who sees which step-0 key, from `step_zero_mask`.
        cos_sin (`tuple[torch.Tensor, torch.Tensor]`): RoPE at the positions of every step, each `(K, B, T, width)`.
        recomputes_attention (`bool`): Of an attention, keep its input and what it remembers only.
    """

    backend: str
    mask: Tensor | BlockMask | None
    cos_sin: CosSin
    recomputes_attention: bool

    def step_cos_sin(self, ttt_step: int) -> CosSin:
        """RoPE of one step, each `(B, T, width)`."""
        cos, sin = self.cos_sin
        return cos[ttt_step], sin[ttt_step]

    def own_cos_sin(self, num_steps: int) -> CosSin:
        """RoPE of the steps from 1 on, one below the other, each `((num_steps - 1) * B, T, width)`."""
        cos, sin = self.cos_sin
        return cos[1:num_steps].flatten(0, 1), sin[1:num_steps].flatten(0, 1)


def attend_jointly(
    attention: LatentAttention | GroupedQueryAttention, unroll: Unroll, attention_input: Tensor, seen: list[Memory]
) -> Tensor:
    """
    Attention of a layer at one TTT step, `(B, T, 2D) -> (B, T, D)`.

    Queries, keys and values are made in here, out of what was remembered: where this function is recomputed for the
    backward pass, a step leaves nothing behind that grows with the number of heads.

    Args:
        attention (`nn.Module`): Of the layer.
        unroll (`Unroll`): What the steps share.
        attention_input (`torch.Tensor` of shape `(B, T, 2D)`): Of this step.
        seen (`list[tuple[torch.Tensor, torch.Tensor]]`): What `remember` gave at every step up to this one.
    """
    num_steps = len(seen)
    query = attention.ask(attention_input, unroll.step_cos_sin(num_steps - 1), fused_rotate)
    key, value = attention.expand(seen[0], unroll.step_cos_sin(0), fused_rotate)
    own_keys, own_values = None, None
    if num_steps > 1:
        memory = tuple(torch.cat(parts) for parts in zip(*seen[1:], strict=True))  # ((steps - 1) * B, ...)
        expanded = attention.expand(memory, unroll.own_cos_sin(num_steps), fused_rotate)
        own_keys, own_values = (part.unflatten(0, (num_steps - 1, -1)) for part in expanded)  # (steps - 1, B, ...)
    heads = joint_attention(unroll.backend, query, key, value, own_keys, own_values, unroll.mask, attention.scaling)
    return attention.output(heads.to(attention_input.dtype))


def run_attention(
    layer: Eagle3MLADecoderLayer, unroll: Unroll, inputs_embeds: Tensor, states: Tensor, seen: list[Memory]
) -> tuple[Tensor, Memory]:
    """The first half of a layer at one TTT step, residual included `(B, T, D)`, and what the step remembers."""
    attention_input = layer.attention_input(inputs_embeds, states)
    memory = layer.self_attn.remember(attention_input, unroll.step_cos_sin(len(seen)), fused_rotate)
    attend = recomputed if unroll.recomputes_attention else run
    attended = attend(attend_jointly, layer.self_attn, unroll, attention_input, [*seen, memory])
    return layer.residual(attention_input, states) + attended, memory


def run(function: Callable, *inputs):
    """`function(*inputs)`."""
    return function(*inputs)


def recomputed(function: Callable, *inputs):
    """`function(*inputs)`, computed again in the backward pass instead of being kept."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    # Nothing here draws random numbers, and the shapes of a step are fixed.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


def count_hits(rows: list[Tensor], hits: list[Tensor], num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, hits and prefix hits of each step, `(K,)` each, of `hits (N,)` at `rows (N,)` of `num_rows`."""
    has_prefix_hit = torch.ones(num_rows, dtype=torch.bool, device=rows[0].device)
    prefix_hits = []
    for step_rows, step_hits in zip(rows, hits, strict=True):
        has_prefix_hit[step_rows] &= step_hits
        prefix_hits.append(has_prefix_hit[step_rows].sum())
    num_supervised = torch.tensor([len(step_rows) for step_rows in rows], device=rows[0].device)
    return num_supervised, torch.stack([step_hits.sum() for step_hits in hits]), torch.stack(prefix_hits)


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

    supports_gradient_checkpointing = True
    recomputes_attention = True
    recomputes_steps = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """
        Keeps of a TTT step what it reads and remembers, and computes the rest again in the backward pass.

        Raises:
            ValueError: If `every_n_layers` is not 1, or what is kept shall leave the device.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "A draft recomputes whole steps of training-time test: `every_n_layers` must be 1 and `offload` "
                f"False, got {every_n_layers} and {offload}."
            )
        self.recomputes_steps = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """`activation_checkpointing_enable` under its name in older transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        """What the Trainer says: transformers would leave out all but rank 0, and with them all machines but one."""
        return is_main_process

    def activation_checkpointing_disable(self) -> None:
        """Back to keeping what a step computes outside of its attention."""
        self.recomputes_steps = False

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` under its name in older transformers."""
        self.activation_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor,
        aux_hidden_states: Tensor,
        last_hidden_states: Tensor,
        target_logits: Callable[[Tensor], Tensor],
        loss_mask: Tensor,
        step_weights: Tensor,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        loss: str = "forward_kl",
    ) -> TTTOutput:
        """
        Loss and hits of `K = len(step_weights)` TTT steps.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`):
                The conversation, in target ids.
            aux_hidden_states (`torch.Tensor` of shape `(B, T, 3 * Dt)`):
                The target's states at these tokens.
            last_hidden_states (`torch.Tensor` of shape `(B, T, Dt)`):
                The target's last states, after its final norm; read at the `taught_positions` only.
            target_logits (`Callable`):
                The target's logits of such states, `(M, Dt) -> (M, V)`.
            loss_mask (`torch.LongTensor` of shape `(B, T)`):
                1 where the token was produced by the assistant.
            step_weights (`torch.Tensor` of shape `(K,)`):
                Factor on the summed loss of each step.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*):
                Embeddings of `input_ids`; needed unless the draft carries its own.
            document_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Documents from 1, padding 0. Defaults to one document in each row.
            loss (`str`, *optional*, defaults to `"forward_kl"`):
                A name in `LOSSES`.

        Returns:
            [`TTTOutput`]
        """
        document_ids = torch.ones_like(loss_mask) if document_ids is None else document_ids
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        taught = taught_positions(loss_mask, document_ids)
        taught_index = taught.flatten().cumsum(dim=0) - 1  # (B * T,)
        steps = list(self.unroll(inputs_embeds, aux_hidden_states, loss_mask, document_ids, len(step_weights)))
        predictions = [
            Predictions(states, taught_index[rows + 1 + ttt_step]) for ttt_step, (rows, states) in enumerate(steps)
        ]
        teaching = Teaching(
            states=last_hidden_states[taught.to(last_hidden_states.device)],
            logits=target_logits,
            vocab_size=self.config.vocab_size,
            draft_ids=self.draft_to_target(torch.arange(len(self.d2t), device=self.d2t.device)),
            loss=LOSSES[loss],
            step_weights=step_weights,
        )
        summed_loss, hits = chunked_loss(self.lm_head, predictions, teaching)
        return TTTOutput(summed_loss, *count_hits([rows for rows, _ in steps], hits, taught.numel()))

    def unroll(
        self,
        inputs_embeds: Tensor,
        aux_hidden_states: Tensor,
        loss_mask: Tensor,
        document_ids: Tensor,
        num_ttt_steps: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields for each TTT step the supervised rows, `(N,)` indices into `B * T`, and their states, `(N, D)`.

        The states are those that `lm_head` reads, after the final norm.
        """
        states = self.fuse(aux_hidden_states)  # (B, T, D)
        unroll = self.prepare_unroll(document_ids, num_ttt_steps, states.dtype)
        seen: list[list[Memory]] = [[] for _ in self.layers]
        for ttt_step in range(num_ttt_steps):
            rows = supervised_rows(loss_mask, document_ids, ttt_step).flatten().nonzero().squeeze(dim=1)
            inputs = unroll, shift_left(inputs_embeds, ttt_step + 1), states, rows, [list(layer) for layer in seen]
            states, predicting, memories = (recomputed if self.recomputes_steps else run)(self.step, *inputs)
            for layer_seen, memory in zip(seen, memories, strict=True):
                layer_seen.append(memory)
            yield rows, predicting

    def prepare_unroll(self, document_ids: Tensor, num_ttt_steps: int, dtype: torch.dtype) -> Unroll:
        """What all steps of a batch share."""
        backend = trainable_backend(self.config._attn_implementation, document_ids.device)
        steps = torch.arange(num_ttt_steps, device=document_ids.device)
        position_ids = steps[:, None, None] + document_positions(document_ids)  # (K, B, T)
        cos_sin = self.rotary_emb(position_ids.flatten(0, 1), dtype)
        cos_sin = tuple(part.unflatten(0, (num_ttt_steps, -1)) for part in cos_sin)
        return Unroll(backend, step_zero_mask(backend, document_ids), cos_sin, self.recomputes_attention)

    def step(
        self, unroll: Unroll, inputs_embeds: Tensor, states: Tensor, rows: Tensor, seen: list[list[Memory]]
    ) -> tuple[Tensor, Tensor, list[Memory]]:
        """
        One TTT step.

        Args:
            unroll (`Unroll`): What the steps share.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D)`): Of the tokens that the rows read.
            states (`torch.Tensor` of shape `(B, T, D)`): What the rows read beside them.
            rows (`torch.LongTensor` of shape `(N,)`): Supervised ones, as indices into `B * T`.
            seen (`list[list[tuple[torch.Tensor, torch.Tensor]]]`): For each layer its memory of earlier steps.

        Returns:
            The states that the rows feed back `(B, T, D)`, those that `lm_head` reads `(N, D)`, and each layer's
            memory of this step.
        """
        memories = []
        for index, (layer, layer_seen) in enumerate(zip(self.layers, seen, strict=True)):
            states = self.layers[index - 1].feed_forward(states) if index > 0 else states
            states, memory = run_attention(layer, unroll, inputs_embeds, states, layer_seen)
            memories.append(memory)
        row_states = self.layers[-1].feed_forward(states.flatten(0, 1)[rows])  # (N, D)
        predicting = self.norm(row_states)
        fed_back = predicting if self.config.norm_output else row_states
        next_states = fed_back.new_zeros(states.shape).flatten(0, 1).index_copy(0, rows, fed_back)
        return next_states.view(states.shape), predicting, memories
