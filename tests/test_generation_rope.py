"""Targets whose RoPE factors depend on the length of the text are read as in plain generation, on every side of it."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from pairwise import pairwise
from reference_generation import SHAPE, assert_same_generation, make_draft, make_prompts, run, set_tree
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from eagle3_mla.generation import decoder, notices
from eagle3_mla.generation.rope import ReadingLimits
from eagle3_mla.generation.tree import DraftTree

LIMIT = 24
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": LIMIT,
}


class FreshDynamicLlama(LlamaForCausalLM):
    """Every call begins with the first factors; transformers keeps those of an earlier, longer text."""

    def _prefill(self, *args, **kwargs):
        self.model.rotary_emb(torch.zeros(1), torch.zeros(1, 1, dtype=torch.long))
        return super()._prefill(*args, **kwargs)


def phi3(**fields):
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    return Phi3ForCausalLM(Phi3Config(**shape | fields, original_max_position_embeddings=LIMIT))


TARGETS = {
    "llama-dynamic": lambda: FreshDynamicLlama(
        LlamaConfig(**SHAPE | {"max_position_embeddings": LIMIT}, rope_parameters=DYNAMIC)
    ),
    "llama-longrope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LONGROPE)),
    "phi3-longrope": lambda: phi3(rope_parameters=LONGROPE),
    "phi3-longrope-window-8": lambda: phi3(rope_parameters=LONGROPE, sliding_window=8),
    "phi3-default": lambda: phi3(),
}
# Lengths of the prompts, padding besides, and new tokens.
TEXTS = {
    "before": ([5], 0, LIMIT - 6),
    "up-to": ([5], 0, LIMIT - 5),
    "one-beyond": ([5], 2, LIMIT - 3),
    "crossing": ([12], 0, 30),
    "crossing-padded": ([12], 3, 30),
    "prompt-up-to": ([LIMIT], 0, 14),
    "prompt-one-beyond": ([LIMIT + 1], 0, 14),
    "prompt-beyond-padded": ([LIMIT + 2], 3, 14),
    "columns-beyond": ([LIMIT - 2], 4, 14),
    "batch-before": ([5, 3, 1], 0, LIMIT - 6),
    "batch-crossing": ([12, 5, 9], 0, 26),
    "batch-crossing-padded": ([12, 5, 9], 3, 26),
    "batch-beyond": ([LIMIT + 5, 9, LIMIT + 2], 0, 14),
    "batch-columns-beyond": ([LIMIT - 2, 9, 12], 4, 14),
}
SHAPES = {"chain": (5, 1, 5), "tree": (14, 3, 4)}


def with_known_path(tree: DraftTree, row: int, coming: torch.Tensor) -> DraftTree:
    """`tree` with `coming` on the way to its deepest node; a sibling that had such a token gets the other one."""
    token_ids = tree.token_ids.clone()
    path = tree.attends[row, tree.depths[row].argmax()].nonzero()[1:, 0]
    for node, token in zip(path, coming, strict=False):
        is_twin = (tree.parents[row] == tree.parents[row, node]) & (token_ids[row] == token)
        is_twin[0] = False
        token_ids[row, is_twin] = token_ids[row, node]
        token_ids[row, node] = token
    return replace(tree, token_ids=token_ids)


def knowing(texts_class, plain: torch.Tensor):
    """Texts that put some of what plain generation says into the trees, so that much is accepted at any length."""

    class KnowingTexts(texts_class):
        def fit(self, tree, depth):
            tree = super().fit(tree, depth)
            lengths = getattr(self, "num_tokens", [self.ids.shape[1]] * len(self.ids))
            for row, length in enumerate(lengths):
                tree = with_known_path(tree, row, plain[row, length : length + max(lengths) % 5])
            return tree

    return KnowingTexts


@contextmanager
def known_text(plain: torch.Tensor):
    with pytest.MonkeyPatch.context() as patch:
        for name in "RaggedTexts", "TextsInStep":
            patch.setattr(decoder, name, knowing(getattr(decoder, name), plain))
        yield


def forgets_text(target) -> bool:
    """Whether this transformers' Phi-3 drops its cache at the switch and then reads no more than the newest token."""
    ids = torch.zeros(1, LIMIT + 1, dtype=torch.long)
    cache = DynamicCache(config=target.config)
    inputs = target.prepare_inputs_for_generation(
        ids, past_key_values=cache, attention_mask=ids + 1, next_sequence_length=1
    )
    return inputs.get("past_key_values") is None and inputs["input_ids"].shape[1] == 1


# Every text of every target; of every text and of every target greedy ones and sampled ones, by chains and by trees.
@pytest.mark.parametrize(("text", "name", "cell"), pairwise(TEXTS, TARGETS, product(SHAPES, [False, True])), ids=str)
def test_text_is_that_of_plain_generation_on_both_sides_of_the_switch(text, name, cell):
    (lengths, num_padding, num_new), (shape, do_sample) = TEXTS[text], cell
    target = TARGETS[name]().eval()
    draft = set_tree(make_draft(target), *SHAPES[shape])
    prompt, settings = make_prompts(lengths, num_padding), {"do_sample": do_sample, "max_new_tokens": num_new}
    num_columns = prompt["input_ids"].shape[1]
    if forgets_text(target) and num_columns <= LIMIT < num_columns + num_new - 1:
        with pytest.raises(
            NotImplementedError, match=f"forgets the text before its token {LIMIT + 1}, so that texts of at most"
        ):
            run(target, prompt, assistant_model=draft, **settings)
        return
    plain, _ = run(target, prompt, **settings)
    with known_text(plain.sequences):
        assert_same_generation(target, draft, prompt, **settings)
    is_plain = name == "llama-dynamic" and max(lengths) >= LIMIT
    num_accepted = sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted == 0 if is_plain else num_accepted > 0


@pytest.mark.parametrize("name", ["phi3-longrope", "phi3-longrope-window-8"])
@pytest.mark.parametrize("lengths", [[18], [18, 7]], ids=["one", "batch"])
def test_traces_have_the_whole_text_where_it_is_read_again(name, lengths):
    target = TARGETS[name]().eval()
    if forgets_text(target):
        pytest.skip("this transformers' Phi-3 loses the text")
    target.set_attn_implementation("eager")
    draft, prompt = set_tree(make_draft(target), *SHAPES["tree"]), make_prompts(lengths)
    settings = {"output_hidden_states": True, "output_attentions": True, "do_sample": False, "max_new_tokens": 18}
    plain, _ = run(target, prompt, **settings)
    with known_text(plain.sequences):
        assisted, _ = run(target, prompt, assistant_model=draft, **settings)
    for traces in "hidden_states", "attentions":
        for found, expected in zip(getattr(assisted, traces), getattr(plain, traces), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [entry[0].shape[1] for entry in assisted.hidden_states if entry[0].shape[1] > 1] == [18, LIMIT + 1]


def test_where_nothing_is_drafted_the_log_says_so_once(caplog):
    notices.warn_once.cache_clear()
    target = TARGETS["llama-dynamic"]().eval()
    draft = make_draft(target)
    for num_new, num_warnings in [(LIMIT - 5, 0), (LIMIT, 1), (LIMIT, 1)]:
        run(target, make_prompts([5]), assistant_model=draft, max_new_tokens=num_new)
        assert sum("other RoPE factors" in record.message for record in caplog.records) == num_warnings


def test_rounds_after_a_switch_are_as_large_as_ever():
    limits = ReadingLimits(switches=(40, 44))
    assert [limits.room(num_tokens) for num_tokens in (30, 38, 40, 41, 42, 44, 45, 46)] == [10, 2, 0, 0, 2, 0, 0, None]
    limits = ReadingLimits(last=40)
    assert [limits.room(num_tokens) for num_tokens in (30, 40, 41, 42, 100)] == [10, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope", "phi3-longrope", "phi3-default"])
def test_part_of_a_text_that_may_be_read_again_is_refused_before_any_forward(name):
    """What is new alone does as long as nothing changes; beyond, `input_ids` must be the whole text."""
    target, num_cached = TARGETS[name]().eval(), 8
    draft, text = set_tree(make_draft(target), *SHAPES["tree"]), make_prompts([12])
    new = text | {"input_ids": text["input_ids"][:, num_cached:]}

    def cache():
        cached = DynamicCache(config=target.config)
        target(input_ids=text["input_ids"][:, :num_cached], past_key_values=cached)
        return cached

    up_to, beyond = ({"max_new_tokens": LIMIT - 12 + more, "do_sample": False} for more in (0, 1))
    expected = target.generate(**new, past_key_values=cache(), **up_to).tolist()
    assert target.generate(**new, past_key_values=cache(), assistant_model=draft, **up_to).tolist() == expected
    given = cache()
    with pytest.raises(NotImplementedError, match=f"{LIMIT} tokens .* whole text, got .* of {num_cached} more tokens"):
        target.generate(**new, past_key_values=given, assistant_model=draft, **beyond)
    assert given.get_seq_length() == num_cached
    expected = target.generate(**text, past_key_values=cache(), **beyond).tolist()
    assert target.generate(**text, past_key_values=given, assistant_model=draft, **beyond).tolist() == expected
