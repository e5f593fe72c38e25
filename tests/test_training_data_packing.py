"""Several documents in one row: none is lost, divided or mixed with another, and the order can be resumed."""

from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ttt import tiny_draft

from eagle3_mla.training.batching import LengthGroupedSampler, PaddingCollator
from eagle3_mla.training.documents import count_supervised_rows
from eagle3_mla.training.packing import PackedRows, pack_documents, pack_rows

NUM_TTT_STEPS = 3


def documents(lengths: list[int]) -> Dataset:
    """Documents whose tokens say which document they are of; all but the first token are the assistant's."""
    return Dataset.from_dict(
        {
            "input_ids": [[index + 1] * length for index, length in enumerate(lengths)],
            "loss_mask": [[0] + [1] * (length - 1) for length in lengths],
            "length": lengths,
        }
    )


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), seed=st.integers(0, 5))
def test_every_document_is_in_one_row_that_has_room_for_it(lengths, seed):
    packs = pack_documents(lengths, max_length=40, seed=seed)
    assert sorted(document for pack in packs for document in pack) == list(range(len(lengths)))
    assert max(sum(lengths[document] for document in pack) for pack in packs) <= 40
    assert packs == pack_documents(lengths, max_length=40, seed=seed)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_no_two_rows_could_be_one(lengths):
    """Where best fit opens a row, the document fits into none, so at most one row is half empty."""
    packs = pack_documents(lengths, max_length=40, seed=0)
    used = sorted(sum(lengths[document] for document in pack) for pack in packs)
    assert all(least + next_least > 40 for least, next_least in pairwise(used))


def test_a_document_goes_where_the_least_room_is_left():
    assert pack_documents([6, 5, 4, 3, 1], max_length=10, seed=0) == [[0, 2], [1, 3, 4]]


def test_the_seed_decides_which_of_equal_documents_are_together():
    lengths = [5] * 12
    assert pack_documents(lengths, 10, seed=0) != pack_documents(lengths, 10, seed=1)


def test_a_packed_row_is_its_documents_one_behind_the_other():
    rows = PackedRows(documents([6, 5, 4, 3, 1]), max_length=10, seed=0)
    assert rows[0]["input_ids"].tolist() == [1] * 6 + [3] * 4
    assert rows[0]["document_ids"].tolist() == [1] * 6 + [2] * 4
    assert rows[0]["loss_mask"].tolist() == [0, 1, 1, 1, 1, 1, 0, 1, 1, 1]
    assert rows[1]["document_ids"].tolist() == [1] * 5 + [2] * 3 + [3]
    assert rows["length"] == [10, 9]
    assert (len(rows), rows[1]["length"], rows.fill_share) == (2, 9, 19 / 20)


def test_what_there_is_of_each_token_is_packed_with_it():
    class Stored(torch.utils.data.Dataset):
        def __getitem__(self, index):
            if index == "length":
                return [2, 1]
            states = torch.full((2 - index, 3), float(index))
            return {"input_ids": [index] * (2 - index), "length": 2 - index, "aux_hidden_states": states}

    row = PackedRows(Stored(), max_length=3, seed=0)[0]
    assert row["aux_hidden_states"].tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]


def test_the_share_of_filled_places_is_logged(caplog):
    with caplog.at_level("INFO", logger="eagle3_mla.training.packing"):
        pack_rows(documents([6, 5, 4, 3, 1]), max_length=10, seed=0)
    assert "Packed 5 documents into 2 rows, 95.0 % full" in caplog.text


def test_batches_are_padded_on_the_right_to_their_longest_row():
    batch = PaddingCollator(pad_token_id=9)(
        [
            {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "length": 3},
            {"input_ids": [4], "loss_mask": [1], "length": 1},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["document_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


@pytest.mark.parametrize(("multiple_of", "width"), [(1, 9), (4, 12), (16, 16), (9, 9)])
def test_batches_can_be_padded_to_a_multiple(multiple_of, width):
    rows = PackedRows(documents([6, 3, 2]), max_length=9, seed=0)
    batch = PaddingCollator(0, multiple_of)([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, width)
    assert batch["document_ids"][0].tolist() == [1] * 6 + [2] * 3 + [0] * (width - 9)
    assert batch["loss_mask"][1].tolist() == [0, 1] + [0] * (width - 2)


def test_packed_documents_teach_the_rows_that_padded_ones_do():
    lengths = [9, 8, 7, 6, 5, 5, 4, 3]
    rows = documents(lengths)
    packed = PackedRows(rows, max_length=16, seed=0)
    pad = PaddingCollator(0)
    together, apart = pad([packed[index] for index in range(len(packed))]), pad(list(rows))
    assert len(packed) < len(rows)
    counts = [count_supervised_rows(batch["loss_mask"], batch["document_ids"], 4) for batch in (together, apart)]
    assert torch.equal(*counts)


@pytest.mark.parametrize("attention", [{"attention_type": "mla", "mla_latent_dim": 12}, {"attention_type": "gqa"}])
def test_packed_documents_have_the_loss_and_gradient_of_padded_ones(attention):
    """Whole pipeline: packed and padded batches of the same documents, a teacher that sees single tokens."""
    draft = tiny_draft(**attention)
    sizes, generator = draft.config, torch.Generator().manual_seed(0)
    tables = {
        name: torch.randn(sizes.vocab_size, width, dtype=torch.float64, generator=generator)
        for name, width in (
            ("inputs_embeds", sizes.target_hidden_size),
            ("aux_hidden_states", 3 * sizes.target_hidden_size),
            ("last_hidden_states", sizes.target_hidden_size),
        )
    }
    head = torch.randn(sizes.vocab_size, sizes.target_hidden_size, dtype=torch.float64, generator=generator)
    rows = documents([9, 8, 7, 6, 5, 5, 4, 3])
    packed = PackedRows(rows, max_length=16, seed=0)
    results = []
    for batch_rows in ([packed[index] for index in range(len(packed))], list(rows)):
        batch = PaddingCollator(0, multiple_of=4)(batch_rows)
        states = {name: table[batch["input_ids"]] for name, table in tables.items()}
        draft.zero_grad()
        output = draft(
            **batch,
            **states,
            target_logits=lambda states: states @ head.T,
            step_weights=torch.full((NUM_TTT_STEPS,), 0.1, dtype=torch.float64),
        )
        output.loss.backward()
        gradients = {name: weight.grad for name, weight in draft.named_parameters() if weight.grad is not None}
        results.append((output, gradients))
    (together, together_gradients), (apart, apart_gradients) = results
    assert together.loss > 0
    torch.testing.assert_close(together.loss, apart.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together_gradients, apart_gradients, rtol=1e-10, atol=1e-12)
    assert torch.equal(together.hits, apart.hits)


def test_the_order_of_packed_rows_is_a_function_of_seed_and_epoch():
    """So that a resumed run sees the rows of an uninterrupted one."""
    lengths = PackedRows(documents([7, 6, 5, 4, 3, 2, 9, 8] * 3), max_length=9, seed=0)["length"]
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (7, 0)):
        samplers = [LengthGroupedSampler(lengths, batch_size=2, seed=seed) for _ in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders[seed, epoch], again = (list(sampler) for sampler in samplers)
        assert orders[seed, epoch] == again
        assert sorted(again) == list(range(len(again)))
        assert len(again) - len(lengths) in (0, 1)
    assert len({tuple(order) for order in orders.values()}) == 3
