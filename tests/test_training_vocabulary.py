"""The draft vocabulary: most frequent first, deterministic, ends of turns always in."""

import pytest
import torch
from datasets import Dataset

from eagle3_mla.training.vocabulary import choose_draft_vocabulary, count_supervised_tokens


def test_only_supervised_tokens_are_counted():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 2, 3], [3]], "loss_mask": [[0, 1, 1, 1], [1]]})
    assert count_supervised_tokens(rows, vocab_size=5).tolist() == [0, 0, 2, 2, 0]


def test_a_token_beyond_the_vocabulary_of_the_target_is_refused():
    rows = Dataset.from_dict({"input_ids": [[1, 7]], "loss_mask": [[0, 1]]})
    with pytest.raises(ValueError, match="token id 7"):
        count_supervised_tokens(rows, vocab_size=5)


def test_the_most_frequent_tokens_are_chosen_in_rising_order():
    assert choose_draft_vocabulary(torch.tensor([0, 5, 1, 9, 3]), size=3).tolist() == [1, 3, 4]


def test_ties_go_to_the_lower_id():
    assert choose_draft_vocabulary(torch.tensor([1, 2, 1, 1, 0, 0]), size=3).tolist() == [0, 1, 2]
    assert choose_draft_vocabulary(torch.zeros(6, dtype=torch.long), size=2).tolist() == [0, 1]


def test_ends_of_turns_are_in_whatever_their_count():
    counts = torch.tensor([9, 8, 7, 0, 0])
    assert choose_draft_vocabulary(counts, size=3, required_ids=[4, 3, 4]).tolist() == [0, 3, 4]
    assert choose_draft_vocabulary(counts, size=5, required_ids=[4]).tolist() == [0, 1, 2, 3, 4]


def test_coverage_is_logged(caplog):
    with caplog.at_level("INFO", logger="eagle3_mla.training.vocabulary"):
        choose_draft_vocabulary(torch.tensor([6, 3, 1]), size=1)
    assert "1 of 3 tokens, 60.00 %" in caplog.text


def test_the_whole_vocabulary_is_its_own_draft_vocabulary():
    assert choose_draft_vocabulary(torch.tensor([0, 5, 1]), size=3, required_ids=[2, 7]).tolist() == [0, 1, 2]


def test_the_order_of_the_rows_does_not_matter():
    """Processes that read the rows in another order choose the same tokens."""
    rows = Dataset.from_dict({"input_ids": [[1, 2, 2], [3, 3], [4, 0]], "loss_mask": [[1, 1, 1], [0, 1], [1, 1]]})
    counts = [count_supervised_tokens(rows.select(order), 6) for order in ([0, 1, 2], [2, 0, 1])]
    assert torch.equal(*counts)
    assert torch.equal(*(choose_draft_vocabulary(count, size=4) for count in counts))


@pytest.mark.parametrize("size", [1, 4])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match="must be between 2 and the target's 3"):
        choose_draft_vocabulary(torch.tensor([1, 1, 1]), size=size, required_ids=[0, 1])
