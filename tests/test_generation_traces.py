"""Hidden states and attentions of the target: an entry for each emitted token, that of plain generation."""

import logging
from dataclasses import replace

import pytest
import torch
from pairwise import pairwise
from reference_generation import (
    MAX_NEW_TOKENS,
    SHAPE,
    TARGETS,
    assert_same_cache,
    make_draft,
    make_prompts,
    run,
    set_tree,
)
from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM

from eagle3_mla.generation import decoder, notices
from eagle3_mla.generation.traces import attention_of, state_of
from eagle3_mla.generation.tree import DraftTree
from eagle3_mla.generation.verification import TextsInStep

SHAPES = {"chain": (5, 1, 5), "tree": (12, 3, 4)}
LENGTHS = {"B1": [13], "B1-short": [3], "B3-short": [5, 2, 4], "B3-beyond-the-window": [12, 9, 3]}
CELLS = {
    "greedy": {"do_sample": False},
    "greedy-eos": {"do_sample": False, "eos_token_id": [1, 5], "min_new_tokens": 6},
    "sample-eos": {"do_sample": True, "eos_token_id": [5], "min_new_tokens": 6},
    "sample-chunked-prompt": {"do_sample": True, "prefill_chunk_size": 4, "repetition_penalty": 1.2},
}
TRACES = {"output_hidden_states": True, "output_attentions": True}


def set_shape(draft, shape: str):
    return set_tree(draft, *SHAPES[shape])


class KnowingTexts(TextsInStep):
    """Puts some of what plain generation says into the trees: an untrained draft rarely guesses for all sequences."""

    def __init__(self, transcript, plain: torch.Tensor):
        super().__init__(transcript)
        self.plain = plain

    def fit(self, tree: DraftTree, depth: int) -> DraftTree:
        tree, coming = super().fit(tree, depth), self.plain[:, self.ids.shape[1] :]
        num_known = min(self.ids.shape[1] % 4, coming.shape[1], depth)
        if num_known == 0:
            return tree
        on_path = tree.attends[torch.arange(len(coming)), tree.depths.argmax(dim=1)]
        is_known = on_path & (tree.depths > 0) & (tree.depths <= num_known)
        known = coming.gather(1, (tree.depths - 1).clamp(0, coming.shape[1] - 1))
        return replace(tree, token_ids=torch.where(is_known, known, tree.token_ids))


def assert_same_traces(target, draft, prompt, new_cache=None, **settings):
    """Texts, and entry by entry structure, shapes and values; some round has gone on for all sequences."""
    outputs, states = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "TextsInStep", lambda transcript: KnowingTexts(transcript, outputs[0].sequences))
        for assistance in {}, {"assistant_model": draft}:
            if new_cache is not None:
                assistance["past_key_values"] = new_cache()
            output, state = run(target, prompt, **TRACES | settings, **assistance)
            outputs.append(output)
            states.append(state)
    plain, assisted = outputs
    assert assisted.sequences.tolist() == plain.sequences.tolist()
    assert torch.equal(*states)
    for name in "hidden_states", "attentions", "scores", "logits":
        assert_same_structure(getattr(assisted, name), getattr(plain, name))
    assert draft.speculation_stats.target_calls < len(assisted.scores)
    return plain, assisted


def assert_same_structure(found, expected) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same_structure(*pair)
    elif expected is not None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(("name", "setting", "lengths", "shape"), pairwise(TARGETS, CELLS, LENGTHS, SHAPES))
def test_states_and_attentions_of_each_token_are_those_of_plain_generation(name, setting, lengths, shape):
    target = TARGETS[name]().eval()
    target.set_attn_implementation("eager")
    draft, prompt = set_shape(make_draft(target), shape), make_prompts(LENGTHS[lengths], num_padding=1)
    plain, assisted = assert_same_traces(target, draft, prompt, **CELLS[setting])
    assert_same_cache(assisted.past_key_values, plain.past_key_values)
    num_layers = target.config.num_hidden_layers
    assert {len(entry) for entry in assisted.attentions} == {num_layers}
    assert {len(entry) for entry in assisted.hidden_states} == {num_layers + 1}


def test_window_shows_the_keys_of_plain_generation():
    """Otherwise no cell above would be about a window that a path has left."""
    target = TARGETS["gemma3-window-8"]().eval()
    target.set_attn_implementation("eager")
    draft, prompt = set_shape(make_draft(target), "tree"), make_prompts([5])
    _, outputs = assert_same_traces(target, draft, prompt, do_sample=True, output_hidden_states=False)
    assert {entry[0].shape[-1] for entry in outputs.attentions} == {5, 6, 7, 8}
    assert outputs.hidden_states is None


def test_attention_sinks_take_their_share_as_in_plain_generation():
    config = GptOssConfig(**SHAPE, sliding_window=8, num_local_experts=2, num_experts_per_tok=1)
    target = GptOssForCausalLM(config).eval()
    target.set_attn_implementation("eager")
    draft = set_shape(make_draft(target), "tree")
    _, outputs = assert_same_traces(target, draft, make_prompts([12, 3]), do_sample=True)
    assert (outputs.attentions[-1][0].sum(dim=-1) < 0.999).all()
    assert {weights.shape[-1] for weights in outputs.attentions[-1]} == {8, 12 + MAX_NEW_TOKENS - 1}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_target_whose_attention_keeps_no_weights_gives_what_it_gives_plainly(name):
    target = TARGETS[name]().eval()
    target.set_attn_implementation("sdpa")
    draft = set_shape(make_draft(target), "tree")
    assert_same_traces(target, draft, make_prompts([6, 3]), do_sample=True)


@pytest.mark.parametrize("name", ["mistral-window-8", "gemma2-window-8"])
def test_cache_without_windows_shows_all_keys_in_every_layer(name):
    target = TARGETS[name]().eval()
    target.set_attn_implementation("eager")
    draft, prompt = set_shape(make_draft(target), "tree"), make_prompts([11, 6])
    assert_same_traces(target, draft, prompt, do_sample=True, new_cache=DynamicCache)


def test_entries_are_given_only_in_a_returned_dictionary():
    target = TARGETS["llama"]().eval()
    draft, prompt = set_shape(make_draft(target), "tree"), make_prompts([6])
    settings = {"max_new_tokens": 9, "do_sample": False, **TRACES}
    expected = target.generate(**prompt, **settings)
    assert target.generate(**prompt, **settings, assistant_model=draft).equal(expected)


def test_batch_goes_on_in_step_and_says_why_once(caplog):
    notices.warn_once.cache_clear()
    target = TARGETS["llama"]().eval()
    draft = set_shape(make_draft(target), "chain")
    with caplog.at_level(logging.WARNING):
        for lengths in [5], [5, 3], [4, 2]:
            run(target, make_prompts(lengths), do_sample=False, assistant_model=draft, output_hidden_states=True)
    assert [record.message for record in caplog.records if "accept equally many" in record.message] == [
        "The sequences of the batch accept equally many draft tokens per round: `output_hidden_states` and "
        "`output_attentions` have one entry for each token of all sequences."
    ]


def test_entries_hold_nothing_of_rejected_nodes():
    target = TARGETS["llama"]().eval()
    target.set_attn_implementation("eager")
    draft = set_shape(make_draft(target), "tree")
    outputs, _ = run(target, make_prompts([6, 3]), do_sample=True, assistant_model=draft, **TRACES)
    assert len(outputs.hidden_states) == MAX_NEW_TOKENS
    for entry in outputs.hidden_states[1:] + outputs.attentions[1:]:
        for tensor in entry:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_attention_of_a_node_is_over_the_committed_tokens_and_its_path_in_order():
    weights = torch.arange(2 * 1 * 4 * 7).view(2, 1, 4, 7)  # three committed tokens, four nodes
    path = torch.tensor([[0, 2, 3], [0, 1, 2]])
    assert attention_of(weights, path, None).tolist() == [[[[21, 22, 23, 24, 26, 27]]], [[[42, 43, 44, 45, 46, 47]]]]
    assert attention_of(weights, path, 4).tolist() == [[[[23, 24, 26, 27]]], [[[44, 45, 46, 47]]]]
    assert attention_of(weights, path[:, :1], None).tolist() == [[[[0, 1, 2, 3]]], [[[28, 29, 30, 31]]]]
    states = torch.arange(8).view(2, 4, 1)
    assert state_of(states, path).tolist() == [[[3]], [[6]]]
