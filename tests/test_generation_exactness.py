"""The law of the emitted text, by enumeration: whatever the tree and the noise, the text is the plain text."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_generation import GivenNoise
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria

from eagle3_mla.generation.sampling import Noise, choose_token
from eagle3_mla.generation.transcript import Transcript
from eagle3_mla.generation.tree import DraftTree, build_chain
from eagle3_mla.generation.verification import accept_path

VOCAB_SIZE = 3
NUM_TOKENS = 3
PROMPT = torch.tensor([[0, 1]])


def target_logits(prefix: tuple[int, ...]) -> torch.Tensor:
    """The target: some distribution for every prefix, `(1, V)`."""
    generator = torch.Generator().manual_seed(hash(prefix) % 2**31)
    return 2 * torch.randn(1, VOCAB_SIZE, generator=generator)


@dataclass
class Proposals:
    """Stands for the draft: any tree, here one that a seed decides."""

    seed: int
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self):
        self.generator.manual_seed(self.seed)

    def tree(self, root: int):
        num_nodes = int(torch.randint(1, 8, (), generator=self.generator))
        parents = [0] + [int(torch.randint(0, node, (), generator=self.generator)) for node in range(1, num_nodes)]
        tokens, taken = [root], set()
        for node in range(1, num_nodes):
            free = [token for token in range(VOCAB_SIZE) if (parents[node], token) not in taken] or [0]
            tokens.append(free[int(torch.randint(0, len(free), (), generator=self.generator))])
            taken.add((parents[node], tokens[-1]))
        return DraftTree(torch.tensor([tokens]), torch.tensor([parents]))


def new_transcript(noise: torch.Tensor | None) -> Transcript:
    return Transcript(
        PROMPT,
        LogitsProcessorList(),
        StoppingCriteriaList([MaxLengthCriteria(PROMPT.shape[1] + NUM_TOKENS)]),
        do_sample=noise is not None,
        noise=GivenNoise(noise[:, None]) if noise is not None else None,
    )


def plain_text(noise: torch.Tensor | None) -> list[int]:
    text = PROMPT[0].tolist()
    for index in range(NUM_TOKENS):
        draw = noise[index : index + 1] if noise is not None else None
        text.append(int(choose_token(target_logits(tuple(text)), draw)))
    return text


def speculative_text(noise: torch.Tensor | None, proposals: Proposals) -> list[int]:
    transcript = new_transcript(noise)
    transcript.extend(target_logits(tuple(PROMPT[0].tolist())))
    while not transcript.is_finished:
        committed = transcript.input_ids[0].tolist()
        tree = proposals.tree(root=committed[-1])
        paths = [tuple(committed)]
        for node in range(1, len(tree)):
            paths.append((*paths[tree.parents[0, node]], int(tree.token_ids[0, node])))
        accept_path(tree, torch.cat([target_logits(path) for path in paths])[None], transcript)
    return transcript.input_ids[0].tolist()


def test_text_is_the_plain_text_for_every_noise_and_any_tree():
    """Exactness is pathwise; a biased walk would still produce fluent text."""
    draws = torch.tensor(list(itertools.permutations([0.2, 1.0, 3.0])))  # all orders of three levels
    texts = set()
    for choice in itertools.product(range(len(draws)), repeat=NUM_TOKENS):
        noise = draws[list(choice)]
        expected = plain_text(noise)
        texts.add(tuple(expected))
        for seed in range(4):
            assert speculative_text(noise, Proposals(seed)) == expected
    assert len(texts) > 5


@given(seed=st.integers(0, 10**6), noise_seed=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_text_is_the_plain_text_for_random_noise_and_random_trees(seed, noise_seed):
    noise = torch.empty(NUM_TOKENS, VOCAB_SIZE).exponential_(1, generator=torch.Generator().manual_seed(noise_seed))
    assert speculative_text(noise, Proposals(seed)) == plain_text(noise)
    assert speculative_text(None, Proposals(seed)) == plain_text(None)


@pytest.mark.parametrize("vocab_size", [3, 17, 4096, 50_257])
def test_chosen_token_is_the_one_that_multinomial_draws(vocab_size):
    probs = (3 * torch.randn(1, vocab_size)).softmax(dim=-1)
    torch.manual_seed(7)
    expected = [torch.multinomial(probs, 1).item() for _ in range(50)]
    torch.manual_seed(7)
    noise = Noise(like=probs)
    noise.peek(9)
    assert [choose_token(probs.log(), noise.spend()).item() for _ in range(50)] == expected


def test_generator_moves_only_when_a_token_is_committed():
    scores = torch.randn(1, 5)
    torch.manual_seed(1)
    start = torch.get_rng_state()
    noise = Noise(like=scores)
    noise.peek(7)
    assert torch.equal(torch.get_rng_state(), start)
    ahead = noise.peek(0).clone()
    assert torch.equal(noise.spend(), ahead)
    torch.manual_seed(1)
    torch.empty(1, 5).exponential_(1)
    after_one_draw = torch.get_rng_state()
    torch.manual_seed(1)
    noise = Noise(like=scores)
    noise.peek(7)
    noise.spend()
    assert torch.equal(torch.get_rng_state(), after_one_draw)


def test_draws_ahead_are_void_once_somebody_else_has_drawn():
    scores = torch.randn(1, 5)
    torch.manual_seed(1)
    noise = Noise(like=scores)
    noise.peek(3)
    torch.rand(2)
    state = torch.get_rng_state()
    spent = noise.spend()
    torch.set_rng_state(state)
    assert torch.equal(spent, torch.empty(1, 5).exponential_(1))


def test_children_are_found_by_parent_and_token():
    tree = DraftTree(
        torch.tensor([[5, 6, 7, 6, 8], [5, 8, 8, 8, 8]]),
        torch.tensor([[0, 0, 0, 1, 3], [0, 0, 1, 1, 2]]),
    )
    children = {}
    for node, token in itertools.product(range(len(tree)), (5, 6, 7, 8)):
        is_there, child = tree.children(torch.full((2,), node), torch.full((2,), token))
        children |= {(row, node, token): int(child[row]) for row in range(2) if is_there[row]}
    first_row = {(0, 0, 6): 1, (0, 0, 7): 2, (0, 1, 6): 3, (0, 3, 8): 4}
    assert children == first_row | {(1, 0, 8): 1, (1, 1, 8): 2, (1, 2, 8): 4}  # the first of two equal ones
    assert tree.has_children.tolist() == [[True, True, False, True, False], [True, True, True, False, False]]


def test_chain_is_the_tree_in_which_each_node_continues_the_last():
    chain = build_chain(torch.tensor([[5, 6, 6, 7], [1, 2, 3, 4]]))
    assert chain.parents.tolist() == [[0, 0, 1, 2]] * 2
    assert chain.deepest == 3


def test_sequence_that_gets_padding_has_a_chain_of_it():
    tree = DraftTree(torch.tensor([[5, 6, 7, 6, 8]] * 2), torch.tensor([[0, 0, 0, 1, 3]] * 2))
    padded = tree.with_pads(torch.tensor([False, True]), torch.tensor(9), depth=3)
    assert padded.token_ids.tolist() == [[5, 6, 7, 6, 8], [5, 9, 9, 9, 0]]
    assert padded.parents.tolist() == [[0, 0, 0, 1, 3], [0, 0, 1, 2, 0]]


@pytest.mark.parametrize("scores", [[0.0, float("nan")], [0.0, float("inf")], [-float("inf")] * 2], ids=str)
def test_scores_that_are_no_distribution_raise_as_in_plain_sampling(scores):
    scores = torch.tensor([scores])
    transcript = new_transcript(torch.ones(NUM_TOKENS, 2))
    with pytest.raises(RuntimeError, match="probability tensor contains either") as plain_error:
        torch.multinomial(scores.softmax(dim=-1), 1)
    with pytest.raises(RuntimeError, match="probability tensor contains either") as our_error:
        transcript.extend(scores)
    assert str(our_error.value) == str(plain_error.value)
    assert transcript.noise.num_spent == 0
