"""The training unroll against a draft that really decodes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from reference_ttt import ATTENTION, Documents, decode_one_row, tiny_config, tiny_draft, visited_pairs

from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel
from eagle3_mla.training.documents import (
    count_supervised_rows,
    document_lengths,
    document_positions,
    supervised_rows,
    taught_positions,
)
from eagle3_mla.training.ttt import TTTDraftModel, shift_left

NUM_TTT_STEPS = 4
WEIGHTS = [1.0, 0.8, 0.64, 0.512]
# (content seed, tokens, prompt tokens); seed 0 is padding.
FIRST, SECOND, PADDING = (1, 11, 3), (2, 8, 2), (0, 3, 0)
LAYOUTS = {
    "right-padded": [[FIRST, (0, 2, 0)], [SECOND, (0, 5, 0)]],
    "left-padded": [[(0, 2, 0), FIRST], [(0, 5, 0), SECOND]],
    "packed": [[FIRST, SECOND]],
}
VARIANTS = {name: {**fields, "norm_output": False} for name, fields in ATTENTION.items()} | {
    "two-layers": {"num_hidden_layers": 2, "mla_latent_dim": 12},
    "embed-residual": {"embed_residual": True, "mla_latent_dim": 12, "num_hidden_layers": 2},
    "eagle-3.1": {"fc_norm": True, "norm_output": True, "mla_latent_dim": 12},
}


def as_inference_model(draft: TTTDraftModel) -> Eagle3MLADraftModel:
    inference = Eagle3MLADraftModel(draft.config).double()
    inference.load_state_dict(draft.state_dict())
    return inference.eval()


def loss_and_gradients(draft: TTTDraftModel, documents: Documents) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draft.zero_grad()
    loss = documents.run(draft, WEIGHTS).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in draft.named_parameters()}


def saved_bytes(draft: TTTDraftModel, documents: Documents, num_steps: int) -> int:
    """Bytes of the tensors that the forward pass keeps for the backward pass, each storage once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        documents.run(draft, WEIGHTS[:num_steps])
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_i_at_step_k_is_what_a_decoding_draft_computes(variant, backend, layout):
    """A wrong mask, shift, position or feedback state still trains and only shows as acceptance near 1."""
    draft = tiny_draft(**VARIANTS[variant], attn_implementation=backend)
    inference = as_inference_model(draft)
    batch = Documents(draft, LAYOUTS[layout])
    pairs = set()
    with torch.no_grad():
        for ttt_step, (rows, states) in enumerate(batch.unroll(draft, NUM_TTT_STEPS)):
            for flat_row, row_logits in zip(rows.tolist(), draft.lm_head(states), strict=True):
                sample, position = divmod(flat_row, batch.loss_mask.shape[1])
                document_id = batch.document_ids[sample, position]
                document = (batch.document_ids[sample] == document_id).nonzero().squeeze(1)
                row = position - int(document[0])
                decoded = decode_one_row(
                    inference,
                    batch.inputs_embeds[sample, document],
                    batch.aux_hidden_states[sample, document],
                    row,
                    num_steps=ttt_step + 1,
                )
                torch.testing.assert_close(row_logits, decoded[-1], atol=1e-10, rtol=1e-10)
                pairs.add((len(document), row, ttt_step))
    expected = {(11, *pair) for pair in visited_pairs([0] * 3 + [1] * 8, NUM_TTT_STEPS)}
    expected |= {(8, *pair) for pair in visited_pairs([0] * 2 + [1] * 6, NUM_TTT_STEPS)}
    assert pairs == expected


@pytest.mark.parametrize("num_tokens", range(1, 9))
def test_supervised_pairs_are_those_that_decoding_visits_for_every_mask(num_tokens):
    for loss_mask in itertools.product([0, 1], repeat=num_tokens):
        mask = torch.tensor([loss_mask])
        supervised = {
            (row, ttt_step)
            for ttt_step in range(NUM_TTT_STEPS)
            for row in supervised_rows(mask, torch.ones_like(mask), ttt_step)[0].nonzero().flatten().tolist()
        }
        assert supervised == visited_pairs(list(loss_mask), NUM_TTT_STEPS)


def test_no_supervised_row_reads_or_predicts_across_documents():
    document_ids = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
    loss_mask = (document_ids > 0).long()
    for ttt_step in range(NUM_TTT_STEPS):
        rows = supervised_rows(loss_mask, document_ids, ttt_step)[0].nonzero().flatten().tolist()
        first = [row for row, step in visited_pairs([1] * 4, NUM_TTT_STEPS) if step == ttt_step]
        second = [row + 4 for row, step in visited_pairs([1] * 5, NUM_TTT_STEPS) if step == ttt_step]
        assert rows == sorted(first + second)


def test_rows_supervised_at_a_step_were_supervised_at_every_step_before():
    torch.manual_seed(0)
    loss_mask, document_ids = torch.randint(0, 2, (8, 40)), torch.randint(1, 3, (8, 40)).sort(dim=1).values
    steps = [supervised_rows(loss_mask, document_ids, ttt_step) for ttt_step in range(NUM_TTT_STEPS)]
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(steps))
    assert count_supervised_rows(loss_mask, document_ids, NUM_TTT_STEPS).tolist() == [
        int(rows.sum()) for rows in steps
    ]


def test_taught_positions_are_the_teachers_of_all_supervised_rows():
    torch.manual_seed(0)
    loss_mask, document_ids = torch.randint(0, 4, (8, 40)).clamp(max=1), torch.ones(8, 40, dtype=torch.long)
    teachers = torch.zeros_like(loss_mask, dtype=torch.bool)
    for ttt_step in range(NUM_TTT_STEPS):
        rows = supervised_rows(loss_mask, document_ids, ttt_step)
        teachers |= rows.roll(ttt_step + 1, dims=1)
    assert torch.equal(teachers, taught_positions(loss_mask, document_ids))


def test_positions_restart_at_every_document():
    document_ids = torch.tensor([[0, 0, 7, 7, 7, 2], [3, 3, 3, 3, 3, 3]])
    assert document_positions(document_ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_lengths_are_those_of_the_documents_in_all_rows():
    assert document_lengths(torch.tensor([[0, 0, 7, 7, 7, 2], [2, 2, 2, 1, 0, 0]])).tolist() == [3, 1, 3, 1]


def test_shift_left_fills_with_zeros_also_beyond_the_length():
    inputs_embeds = torch.tensor([[[1.0], [2.0], [3.0]]])
    assert shift_left(inputs_embeds, 1).flatten().tolist() == [2, 3, 0]
    assert shift_left(inputs_embeds, 5).flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_packing_change_neither_loss_nor_gradient(attention, layout):
    draft = tiny_draft(**ATTENTION[attention])
    alone = [loss_and_gradients(draft, Documents(draft, [[document]])) for document in (FIRST, SECOND)]
    loss, gradients = loss_and_gradients(draft, Documents(draft, LAYOUTS[layout]))
    torch.testing.assert_close(loss, alone[0][0] + alone[1][0], atol=1e-10, rtol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, alone[0][1][name] + alone[1][1][name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("attention", ATTENTION)
def test_backends_give_one_loss_and_one_gradient(attention):
    results = []
    for backend in ("eager", "sdpa"):
        draft = tiny_draft(**ATTENTION[attention], attn_implementation=backend)
        results.append(loss_and_gradients(draft, Documents(draft, LAYOUTS["left-padded"])))
    torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_the_steps_changes_neither_loss_nor_gradient(variant):
    draft = tiny_draft(**VARIANTS[variant])
    kept = loss_and_gradients(draft, Documents(draft, LAYOUTS["packed"]))
    draft.gradient_checkpointing_enable()
    recomputed = loss_and_gradients(draft, Documents(draft, LAYOUTS["packed"]))
    torch.testing.assert_close(recomputed, kept, atol=0, rtol=0)


@pytest.mark.parametrize("attention", ATTENTION)
def test_what_a_step_keeps_grows_with_the_latent_and_not_with_the_heads(attention):
    """Keys and values of every step, kept for the backward pass, would cost more than a standard head's cache."""
    kept = {}
    for num_heads in (4, 8):
        draft = tiny_draft(**ATTENTION[attention], num_attention_heads=num_heads)
        batch = Documents(draft, [[(1, 60, 2)]])
        sizes = [saved_bytes(draft, batch, num_steps) for num_steps in (2, 4)]
        kept[num_heads] = (sizes[1] - sizes[0]) / 2
    assert kept[4] == kept[8]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    draft = tiny_draft(**VARIANTS[variant])
    _, gradients = loss_and_gradients(draft, Documents(draft, LAYOUTS["right-padded"]))
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert gradients.keys() == {name for name in draft.state_dict() if name not in ("d2t", "t2d")}


def test_own_embeddings_are_trained_and_those_of_the_target_are_not_saved():
    draft = tiny_draft(has_own_embeddings=True)
    batch = Documents(draft, [[FIRST]])
    batch.inputs_embeds = None
    _, gradients = loss_and_gradients(draft, batch)
    assert gradients["embed_tokens.weight"].abs().max() > 0
    assert "embed_tokens.weight" not in tiny_draft().state_dict()


def test_hits_are_counted_against_the_full_vocabulary():
    """A target token outside the draft vocabulary is a miss, or acceptance would look better than it decodes."""
    draft = tiny_draft()
    batch = Documents(draft, [[FIRST]])
    with torch.no_grad():
        best = draft.draft_to_target(draft.lm_head(next(batch.unroll(draft, 1))[1]).argmax(dim=-1))
    outside = int((~draft.t2d).nonzero()[0])
    top = best.clone()
    top[2] = outside
    batch.target_logits = lambda states: F.one_hot(top, draft.config.vocab_size).double() * 9.0
    output = batch.run(draft, WEIGHTS)
    assert output.hits[0] == output.num_supervised[0] - 1
    assert output.num_supervised.tolist() == [7, 6, 5, 4]


def test_a_batch_without_supervised_rows_costs_nothing_and_has_a_gradient():
    draft = tiny_draft()
    loss, gradients = loss_and_gradients(draft, Documents(draft, [[(1, 6, 6)]]))
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_the_trained_model_has_the_weights_of_the_draft():
    trained, draft = TTTDraftModel(tiny_config()), Eagle3MLADraftModel(tiny_config())
    assert trained.state_dict().keys() == draft.state_dict().keys()
