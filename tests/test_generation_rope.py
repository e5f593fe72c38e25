"""Targets whose RoPE factors depend on the length of the text are read as in plain generation, on every side of it."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from reference_generation import SHAPE, assert_same_generation, make_draft, make_prompts, run, set_tree
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from eagle3_mla.generation import decoder
from eagle3_mla.generation.tree import DraftTree

LIMIT = 40
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
    "crossing": ([20], 0, 50),
    "crossing-padded": ([20], 3, 50),
    "prompt-up-to": ([LIMIT], 0, 20),
    "prompt-one-beyond": ([LIMIT + 1], 0, 20),
    "prompt-beyond-padded": ([LIMIT + 2], 3, 20),
    "columns-beyond": ([LIMIT - 2], 4, 20),
    "batch-before": ([5, 3, 1], 0, LIMIT - 6),
    "batch-crossing": ([20, 9, 17], 0, 40),
    "batch-crossing-padded": ([20, 9, 17], 3, 40),
    "batch-beyond": ([LIMIT + 5, 9, LIMIT + 2], 0, 20),
    "batch-columns-beyond": ([LIMIT - 2, 9, 20], 4, 20),
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


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TARGETS)
def test_text_is_that_of_plain_generation_on_both_sides_of_the_switch(name, text, shape, do_sample):
    lengths, num_padding, num_new = TEXTS[text]
    target = TARGETS[name]().eval()
    draft = set_tree(make_draft(target), *SHAPES[shape])
    prompt, settings = make_prompts(lengths, num_padding), {"do_sample": do_sample, "max_new_tokens": num_new}
    plain, _ = run(target, prompt, **settings)
    with known_text(plain.sequences):
        assert_same_generation(target, draft, prompt, **settings)
    is_plain = name == "llama-dynamic" and max(lengths) >= LIMIT
    num_accepted = sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted == 0 if is_plain else num_accepted > 0
