"""Sequences at their own pace: for any trees and noise, texts, scores and caches are those of plain decoding."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_generation import GivenNoise
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TopKLogitsWarper,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from eagle3_mla.generation import ragged
from eagle3_mla.generation.caches import keep_path
from eagle3_mla.generation.choice import process_by_length
from eagle3_mla.generation.ragged import RaggedTexts
from eagle3_mla.generation.transcript import Transcript
from eagle3_mla.generation.tree import DraftTree
from eagle3_mla.generation.verification import TextsInStep
from eagle3_mla.generation.windows import forget_unseen, uneven_windows

VOCAB_SIZE, BATCH_SIZE, NUM_TOKENS, PAD, EOS, WINDOW = 4, 3, 9, 0, 3, 3
PROMPT = torch.tensor([[0, 1], [2, 1], [1, 1]])


def target_logits(prefix: tuple[int, ...]) -> torch.Tensor:
    """The target: some distribution for every prefix, `(V,)`."""
    generator = torch.Generator().manual_seed(hash(prefix) % 2**31)
    return 2 * torch.randn(VOCAB_SIZE, generator=generator)


@dataclass
class Proposals:
    """Stands for the draft: any trees, often with what the target is likely to say."""

    seed: int
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self):
        self.generator.manual_seed(self.seed)

    def random(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def trees(self) -> tuple[DraftTree, int]:
        """Trees without roots, and a depth that none exceeds."""
        num_nodes = self.random(1, 9)
        if self.random(0, 4) == 0:
            tokens = torch.randint(0, VOCAB_SIZE, (BATCH_SIZE, num_nodes), generator=self.generator)
            parents = (torch.arange(num_nodes) - 1).clamp(min=0).expand(BATCH_SIZE, -1)
            return DraftTree(tokens, parents, is_chain=True), num_nodes - 1
        rows = [self.tree(num_nodes) for _ in range(BATCH_SIZE)]
        tree = DraftTree(*(torch.tensor(each) for each in zip(*rows, strict=True)))
        return tree, tree.deepest

    def tree(self, num_nodes: int) -> tuple[list[int], list[int]]:
        tokens, parents = [0], [0]
        for node in range(1, num_nodes):
            places = [(parent, token) for parent in range(node) for token in range(VOCAB_SIZE)]
            free = [place for place in places if place not in zip(parents[1:], tokens[1:], strict=True)]
            parent, token = free[self.random(0, len(free))]
            parents.append(parent)
            tokens.append(token)
        return tokens, parents


PROCESSORS = {
    "none": lambda: [],
    "warper": lambda: [TopKLogitsWarper(2)],
    "prefix": lambda: [RepetitionPenaltyLogitsProcessor(1.5)],
}
CRITERIA = {
    "length": lambda: [],
    "eos": lambda: [EosTokenCriteria(EOS)],
    "eos-and-time": lambda: [EosTokenCriteria(EOS), MaxTimeCriteria(1e6)],
    "no-time": lambda: [EosTokenCriteria(EOS), MaxTimeCriteria(-1.0)],
}


def new_transcript(noise: torch.Tensor | None, processors: str, criteria: str) -> Transcript:
    limit = MaxLengthCriteria(PROMPT.shape[1] + NUM_TOKENS)
    return Transcript(
        PROMPT,
        LogitsProcessorList(PROCESSORS[processors]()),
        StoppingCriteriaList([limit, *CRITERIA[criteria]()]),
        do_sample=noise is not None,
        pad_token_id=torch.tensor(PAD),
        scores=(),
        logits=(),
        noise=GivenNoise(noise) if noise is not None else None,
    )


def read(prefixes: list[tuple[int, ...]]) -> torch.Tensor:
    return torch.stack([target_logits(prefix) for prefix in prefixes])


def plain_texts(noise: torch.Tensor | None, processors: str, criteria: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and scores of a loop written as transformers writes it."""
    process, limit = LogitsProcessorList(PROCESSORS[processors]()), PROMPT.shape[1] + NUM_TOKENS
    stop = StoppingCriteriaList([MaxLengthCriteria(limit), *CRITERIA[criteria]()])
    ids, scores, unfinished = PROMPT, (), torch.ones(BATCH_SIZE, dtype=torch.long)
    while unfinished.any():
        scores += (process(ids, read([tuple(row) for row in ids.tolist()])),)
        draws = 1.0 if noise is None else noise[len(scores) - 1]
        tokens = (scores[-1].softmax(dim=-1) / draws).argmax(dim=-1)
        if criteria != "length":
            tokens = tokens * unfinished + PAD * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        unfinished = unfinished & ~stop(ids, scores)
    return ids, torch.stack(scores)


def new_cache() -> DynamicCache:
    """Holds tokens instead of states: one layer with all of them, one with a window."""
    cache = DynamicCache()
    cache.layers = [cache.layer_class_to_replicate(), DynamicSlidingWindowLayer(WINDOW)]
    append(cache, PROMPT)
    cache.activate_past_recording()
    return cache


def append(cache: DynamicCache, tokens: torch.Tensor) -> None:
    for index in range(len(cache.layers)):
        cache.update(tokens[:, None, :, None].float(), tokens[:, None, :, None].float(), index)


def speculative_texts(texts_class, noise, processors: str, criteria: str, proposals: Proposals):
    """Runs the rounds of decoding with given trees; `(transcript, cache, texts)`."""
    transcript, cache = new_transcript(noise, processors, criteria), new_cache()
    transcript.extend(read([tuple(row) for row in PROMPT.tolist()]))
    texts = texts_class(transcript)
    with uneven_windows(cache):
        while not transcript.is_finished:
            lengths = texts.lengths or [transcript.input_ids.shape[1] - 1] * BATCH_SIZE
            committed = [tuple(row[: length + 1]) for row, length in zip(texts.ids.tolist(), lengths, strict=True)]
            tree, depth = proposals.trees()
            tree = texts.fit(tree.with_roots(texts.ids[:, -1:]), depth)
            assert [row[-1] for row in committed] == tree.token_ids[:, 0].tolist()
            logits = torch.stack([read(prefixes(tree, row, committed[row])) for row in range(BATCH_SIZE)])
            append(cache, tree.token_ids)
            verdict = texts.accept(tree, logits)
            keep_path(cache, len(tree), verdict.path, verdict.lengths, verdict.num_kept, tree.is_chain)
            kept = [length + num for length, num in zip(verdict.lengths, verdict.num_kept, strict=True)]
            forget_unseen(cache, min(kept))
            for row, count in enumerate(kept):
                assert cache.layers[0].keys[row, 0, :count, 0].tolist() == texts.ids[row, :count].tolist()
                first = cache.layers[1].first_slot
                assert first <= max(count - WINDOW + 1, 0)
                assert (
                    cache.layers[1].keys[row, 0, : count - first, 0].tolist() == texts.ids[row, first:count].tolist()
                )
    return transcript, cache, texts


def prefixes(tree: DraftTree, row: int, committed: tuple[int, ...]) -> list[tuple[int, ...]]:
    found = [committed]
    for node in range(1, len(tree)):
        found.append((*found[tree.parents[row, node]], int(tree.token_ids[row, node])))
    return found


@pytest.mark.parametrize("texts_class", [RaggedTexts, TextsInStep])
@pytest.mark.parametrize("criteria", CRITERIA)
@pytest.mark.parametrize("processors", PROCESSORS)
@given(seed=st.integers(0, 10**6), samples=st.booleans(), max_lead=st.sampled_from([1, 2, 128]))
@settings(max_examples=12, deadline=None)
def test_texts_are_plain_for_any_trees_and_noise(texts_class, criteria, processors, seed, samples, max_lead):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(NUM_TOKENS, BATCH_SIZE, VOCAB_SIZE).exponential_(1, generator=generator) if samples else None
    expected, expected_scores = plain_texts(noise, processors, criteria)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "MAX_LEAD", max_lead)
        transcript, cache, _ = speculative_texts(texts_class, noise, processors, criteria, Proposals(seed))
    assert transcript.input_ids.tolist() == expected.tolist()
    assert torch.equal(torch.stack(transcript.scores), expected_scores)
    assert len(transcript.logits) == len(transcript.scores)
    assert not samples or transcript.noise.num_spent == len(expected_scores)
    read_tokens = expected[:, :-1].float()
    assert torch.equal(cache.layers[0].keys[:, 0, :, 0], read_tokens)
    assert type(cache.layers[1]) is DynamicSlidingWindowLayer
    assert torch.equal(cache.layers[1].keys[:, 0, :, 0], read_tokens[:, -(WINDOW - 1) :])
    assert cache.layers[1].get_seq_length() == read_tokens.shape[1]


@pytest.mark.parametrize("max_lead", [2, 128])
def test_sequences_differ_in_length_up_to_a_limit_when_sampling(max_lead, monkeypatch):
    """Otherwise none of the above would be about more than one length, and noise would be kept without end."""
    monkeypatch.setattr(ragged, "MAX_LEAD", max_lead)
    noise, leads = torch.empty(NUM_TOKENS, BATCH_SIZE, VOCAB_SIZE).exponential_(1), []

    class WatchedTexts(RaggedTexts):
        def accept(self, tree, logits):
            leads.append(max(self.num_tokens) - min(self.num_tokens))
            return super().accept(tree, logits)

    for seed in range(20):
        speculative_texts(WatchedTexts, noise, "none", "length", Proposals(seed))
    assert (0 < max(leads) < 2) if max_lead == 2 else (2 < max(leads) < 128)


@pytest.mark.parametrize("sequence", range(BATCH_SIZE))
def test_scores_that_are_no_distribution_raise_when_plain_sampling_comes_to_them(sequence, monkeypatch):
    def broken_logits(prefix):
        is_broken = len(prefix) == 6 and prefix[:2] == tuple(PROMPT[sequence].tolist())
        return torch.full((VOCAB_SIZE,), float("nan")) if is_broken else whole_logits(prefix)

    whole_logits = target_logits
    monkeypatch.setitem(globals(), "target_logits", broken_logits)
    noise = torch.empty(NUM_TOKENS, BATCH_SIZE, VOCAB_SIZE).exponential_(1)
    for seed in range(5):
        given_noise = []
        monkeypatch.setattr(RaggedTexts, "__init__", remember(RaggedTexts.__init__, given_noise))
        with pytest.raises(RuntimeError, match="probability tensor contains either"):
            speculative_texts(RaggedTexts, noise, "none", "length", Proposals(seed))
        assert given_noise[-1].num_spent == 4


def remember(original, found: list):
    def __init__(self, transcript):
        found.append(transcript.noise)
        original(self, transcript)

    return __init__


def test_processor_gets_every_text_with_its_own_length_and_row():
    calls = []

    def process(ids, scores):
        calls.append(ids.tolist())
        return scores + torch.arange(len(ids))[:, None]

    ids = torch.tensor([[1, 2, 3, 9], [4, 5, 9, 9], [6, 7, 8, 9]])
    logits = torch.tensor([[10.0], [20.0], [30.0]])
    assert process_by_length(process, ids, [3, 2, 3], logits).tolist() == [[10.0], [21.0], [32.0]]
    assert calls == [[[4, 5]] * 3, [[1, 2, 3], [1, 2, 3], [6, 7, 8]]]
