"""Batches: every sequence gets the text of plain generation, whatever the others accept and wherever they end."""

import logging
from functools import partial

import pytest
import torch
from pairwise import pairwise
from reference_generation import (
    GPT2_SHAPE,
    SETTINGS,
    TARGETS,
    VOCAB_SIZE,
    CountingProcessor,
    assert_same_cache,
    assert_same_generation,
    make_draft,
    make_prompts,
    run,
    set_tree,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.generation import MaxLengthCriteria

from eagle3_mla.generation import decoder, notices
from eagle3_mla.generation.drafting import draft_tree
from eagle3_mla.generation.memory import DraftMemory
from eagle3_mla.generation.ragged import RaggedTexts
from eagle3_mla.generation.support import TreePlan
from eagle3_mla.generation.verification import TextsInStep

LENGTHS = {"short": [5, 2, 4, 1], "beyond-the-window": [12, 9, 14, 3]}
SHAPES = {"chain": (5, 1, 5), "tree": (12, 3, 4)}
CELLS = ["greedy", "greedy-processors", "greedy-min-new-tokens", "sample-warpers", "sample-processors", "sample-eos"]
CHAINS_ONLY = ["bloom", "gpt-neo-window-8"]


def set_shape(draft, shape: str):
    return set_tree(draft, *SHAPES[shape])


@pytest.fixture
def modes(monkeypatch) -> list[type]:
    """How the calls of a test went on: at their own pace or in step."""
    seen = []
    for mode in RaggedTexts, TextsInStep:
        new = partial(lambda mode, transcript: seen.append(mode) or mode(transcript), mode)
        monkeypatch.setattr(decoder, mode.__name__, new)
    return seen


@pytest.mark.parametrize(("name", "setting", "shape", "lengths"), pairwise(TARGETS, CELLS, SHAPES, LENGTHS))
def test_text_of_a_batch_is_that_of_plain_generation(name, setting, shape, lengths, modes):
    target, num_accepted, seed = TARGETS[name]().eval(), 0, 0
    while num_accepted == 0 and seed < 6:
        draft = set_shape(make_draft(target), shape)
        assert_same_generation(target, draft, make_prompts(LENGTHS[lengths]), seed, **SETTINGS[setting])
        num_accepted, seed = sum(draft.speculation_stats.accepted_by_depth), seed + 1
    assert num_accepted > 0
    in_step = name in CHAINS_ONLY or setting == "sample-guidance"
    assert set(modes) == {TextsInStep if in_step else RaggedTexts}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return TARGETS["llama"]().eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_may_end_at_very_different_times(llama, shape):
    """A finished sequence gets padding, which is read like any token; scores and cache say whether it really was."""
    prompt = make_prompts([5, 2, 4, 1])
    plain, _ = run(llama, prompt, max_new_tokens=40, do_sample=True)
    new_tokens = plain.sequences[:, 5:].tolist()
    ends_first, ends_late = new_tokens[0][2], new_tokens[1][-1]
    for eos_token_id in [ends_first], [ends_late], [ends_first, ends_late]:
        draft = set_shape(make_draft(llama), shape)
        assert_same_generation(llama, draft, prompt, max_new_tokens=40, do_sample=True, eos_token_id=eos_token_id)


class StopRowAtToken(StoppingCriteria):
    """Stops each sequence after a token of its own, and says so only once."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.lengths = torch.tensor(tokens), []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.tokens


@pytest.mark.parametrize("eos_token_id", [None, [5]], ids=["no-eos", "eos"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_custom_processor_and_criterion_see_plain_generations_calls(llama, do_sample, eos_token_id, modes):
    prompt, calls = make_prompts([5, 2, 4]), []
    settings = {"do_sample": do_sample, "eos_token_id": eos_token_id}
    for assistance in {}, {"assistant_model": set_shape(make_draft(llama), "tree")}:
        criterion = StopRowAtToken([3, 4, 6])
        outputs, state = run(
            llama,
            prompt,
            **settings,
            logits_processor=[CountingProcessor()],
            stopping_criteria=[criterion],
            **assistance,
        )
        calls.append((outputs.sequences.tolist(), criterion.lengths, state.tolist()))
    assert calls[0] == calls[1]
    assert modes == [TextsInStep]


@pytest.mark.parametrize("change", ["processor", "criterion", "guidance", "allowed tokens"])
def test_batch_goes_on_in_step_where_calls_may_be_counted_and_says_why_once(llama, change, modes, caplog):
    notices.warn_once.cache_clear()
    settings, reason = {
        "processor": ({"logits_processor": [CountingProcessor()]}, "CountingProcessor"),
        "criterion": ({"stopping_criteria": [StopRowAtToken([3, 4])]}, "StopRowAtToken"),
        "guidance": ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        "allowed tokens": (
            {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) + row) % 11, 3, 8]},
            "PrefixConstrainedLogitsProcessor",
        ),
    }[change]
    draft, prompt = make_draft(llama), make_prompts([5, 2])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            texts = [
                run(llama, prompt, do_sample=False, **settings, **assistance)[0].sequences.tolist()
                for assistance in ({}, {"assistant_model": draft})
            ]
            if change in ("guidance", "allowed tokens"):
                assert texts[0] == texts[1]
    assert modes == [TextsInStep] * 2
    assert [record.message for record in caplog.records if "accept equally many" in record.message] == [
        f"The sequences of the batch accept equally many draft tokens per round: {reason} may depend on how often or "
        "in which order texts are shown."
    ]


def test_one_sequence_chooses_everywhere_at_once_where_processors_look_at_scores_alone(llama, modes):
    draft, prompt = make_draft(llama), make_prompts([5])
    for settings in {"temperature": 0.7}, {"repetition_penalty": 1.2}, {"logits_processor": [CountingProcessor()]}:
        run(llama, prompt, do_sample=True, assistant_model=draft, **settings)
    assert modes == [RaggedTexts, TextsInStep, TextsInStep]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One letter for each token."""
    tokenizer = Tokenizer(models.WordLevel({letter: token for token, letter in enumerate("_abcdefghij")}, "_"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_", pad_token="_")


@pytest.mark.parametrize("eos_token_id", [None, [5]], ids=["no-eos", "eos"])
@pytest.mark.parametrize("lengths", [[5], [5, 2, 4]], ids=["B1", "B3"])
def test_stop_strings_stop_each_sequence_where_they_stop_plain_generation(llama, lengths, eos_token_id, modes):
    draft, prompt, tokenizer = set_shape(make_draft(llama), "tree"), make_prompts(lengths), letter_tokenizer()
    plain, _ = run(llama, prompt, do_sample=True)
    new_tokens, num_cut = plain.sequences[:, 5:], 0
    for row, place, size in (0, 3, 2), (-1, 9, 2), (0, 5, 1):
        stop_string = "".join("_abcdefghij"[token] for token in new_tokens[row, place : place + size])
        settings = {"do_sample": True, "stop_strings": [stop_string], "eos_token_id": eos_token_id}
        texts, states = [], []
        for assistance in {}, {"assistant_model": draft}:
            outputs, state = run(llama, prompt, tokenizer=tokenizer, **settings, **assistance)
            texts.append(outputs)
            states.append(state)
        assert texts[0].sequences.tolist() == texts[1].sequences.tolist()
        assert torch.equal(*states)
        torch.testing.assert_close(torch.cat(texts[1].scores), torch.cat(texts[0].scores), rtol=1e-4, atol=1e-4)
        assert_same_cache(texts[1].past_key_values, texts[0].past_key_values)
        assert draft.speculation_stats.new_tokens <= len(lengths) * (texts[0].sequences.shape[1] - 5)
        num_cut += texts[0].sequences.shape[1] < plain.sequences.shape[1]
    assert num_cut > 0
    assert set(modes) == {RaggedTexts}


@pytest.mark.parametrize("max_time", [0.0, 1e6])
def test_time_limit_stops_all_sequences_at_the_same_token(llama, max_time, modes):
    draft, prompt = set_shape(make_draft(llama), "tree"), make_prompts([5, 2, 4])
    assert_same_generation(llama, draft, prompt, do_sample=True, max_time=max_time, eos_token_id=[5])
    assert modes == [RaggedTexts]


@pytest.mark.parametrize("lengths", [[5], [5, 2]], ids=str)
@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["changing", "fixed"])
def test_the_least_of_several_length_limits_ends_the_text(llama, lengths, fixed_shapes, modes):
    draft, prompt = set_shape(make_draft(llama), "tree"), make_prompts(lengths)
    draft.generation_config.fixed_shapes = fixed_shapes
    for limits in [14, 9], [9, 14]:
        criteria = [MaxLengthCriteria(limit) for limit in limits]
        assisted = assert_same_generation(llama, draft, prompt, do_sample=True, stopping_criteria=criteria)
        assert assisted.sequences.shape[1] == 9
    assert modes == [RaggedTexts] * 2


@pytest.mark.parametrize("name", ["llama", "mistral-window-8", "gemma3-window-8", "gpt2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cache_of_a_batch_is_that_of_a_text_that_never_branched(name, shape, modes):
    target = TARGETS[name]().eval().double()
    draft, prompt = set_shape(make_draft(target).double(), shape), make_prompts([12, 9, 14, 3])
    settings = {"max_new_tokens": 25, "do_sample": True, "eos_token_id": [5]}
    plain, assisted = run(target, prompt, **settings)[0], run(target, prompt, assistant_model=draft, **settings)[0]
    assert assisted.sequences.tolist() == plain.sequences.tolist()
    assert_same_cache(assisted.past_key_values, plain.past_key_values, tolerance=1e-10)
    assert modes == [RaggedTexts]


@pytest.mark.parametrize("name", ["llama", "mistral-window-8", "gemma3-window-8"])
@pytest.mark.parametrize("lengths", [[14], [14, 9, 3]], ids=["B1", "B3"])
def test_cache_made_without_a_config_has_the_windows_of_the_target(name, lengths):
    """Such a cache holds the whole text in every layer; the mask alone says what a window shows."""
    target = TARGETS[name]().eval()
    draft, prompt = set_shape(make_draft(target), "tree"), make_prompts(lengths)
    texts = []
    for assistance in {}, {"assistant_model": draft}:
        torch.manual_seed(0)
        settings = {"max_new_tokens": 20, "do_sample": True, "past_key_values": DynamicCache(), **assistance}
        texts.append(target.generate(**prompt, **settings).tolist())
    assert texts[0] == texts[1]


def test_positions_stay_within_those_that_the_target_has():
    """A sequence near its last place has nodes beyond it; learnt positions would be read out of bounds."""
    target = GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE | {"n_positions": 32})).eval()
    for shape in SHAPES:
        draft = set_shape(make_draft(target), shape)
        for settings in SETTINGS["greedy"], SETTINGS["sample"]:
            for seed in range(2):
                prompt = make_prompts([7, 3, 5])
                assert_same_generation(target, draft, prompt, seed, max_new_tokens=25, **settings)


def test_two_calls_in_a_row_equal_two_plain_calls(llama):
    draft, prompt = set_shape(make_draft(llama), "tree"), make_prompts([6, 3, 2])

    def two_calls(**assistance):
        torch.manual_seed(3)
        settings = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": [5], **assistance}
        return [llama.generate(**prompt, **settings).tolist() for _ in range(2)]

    assert two_calls(assistant_model=draft) == two_calls()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_mask", [True, False])
def test_prompts_of_one_length_need_no_padding(llama, shape, with_mask):
    prompt = make_prompts([5, 5])
    if not with_mask:
        del prompt["attention_mask"]
    assert_same_generation(llama, set_shape(make_draft(llama), shape), prompt, do_sample=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_of_any_form_give_the_plain_text(llama, shape):
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    prompt = make_prompts([6] * 4) | {"attention_mask": mask}
    assert_same_generation(llama, set_shape(make_draft(llama), shape), prompt, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{}, {"mla_rope_dim": 4}, {"attention_type": "gqa"}, {"num_hidden_layers": 2}], ids=str
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_sequences_of_a_batch_are_drafted_as_each_alone(fields, top_k):
    """Rows that see another's slots cost no correctness and much acceptance; nobody would see it."""
    target = TARGETS["llama"]().eval().double()
    draft = make_draft(target, **fields).double()
    plan = TreePlan(num_nodes=8 if top_k > 1 else 3, depth=3, top_k=top_k, confidence_threshold=None)
    lengths, rounds = [7, 3, 5, 1], [[2, 4, 1, 3], [1, 1, 1, 1], [4, 1, 2, 1]]
    read = [[random_rows(length) for length in lengths], *([random_rows(count) for count in each] for each in rounds)]
    batch, alone = None, [None] * len(lengths)
    for rows in read:
        batch = await_rows(batch, rows)
        trees = draft_tree(draft, target, batch, plan, LogitsProcessorList(), None)
        for row, own in enumerate(rows):
            alone[row] = await_rows(alone[row], [own])
            tree = draft_tree(draft, target, alone[row], plan, LogitsProcessorList(), None)
            assert trees.token_ids[row].tolist() == tree.token_ids[0].tolist()
            assert trees.parents[row].tolist() == tree.parents[0].tolist()
            for layer, expected in zip(batch.cache.layers, alone[row].cache.layers, strict=True):
                kept = batch.num_rows[row]
                assert kept == alone[row].cache.get_seq_length()
                for name in "keys", "values":
                    states, own_states = getattr(layer, name)[row, :, :kept], getattr(expected, name)[0]
                    torch.testing.assert_close(states, own_states, rtol=1e-9, atol=1e-9)
    assert batch.cache.get_seq_length() == max(batch.num_rows)


def random_rows(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num_rows, 32).double(), torch.randint(2, VOCAB_SIZE, (num_rows,))


def await_rows(memory: DraftMemory | None, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> DraftMemory:
    """Rows of different counts, beside others that nobody may see."""
    counts = [len(tokens) for _, tokens in rows]
    width = max(counts) + (memory is not None)
    states, tokens = torch.full((len(rows), width, 32), 1e3).double(), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (own_states, own_tokens) in enumerate(rows):
        # The prompt's rows end together, those of a path begin together.
        place = slice(width - counts[row], None) if memory is None else slice(counts[row])
        states[row, place], tokens[row, place] = own_states, own_tokens
    if memory is None:
        return DraftMemory(states, tokens, counts, [0] * len(rows))
    # In two steps, as when a round does not draft.
    first = [count // 2 for count in counts]
    memory.await_rows(states, tokens, first)
    places = (torch.arange(states.shape[1]) + torch.tensor(first)[:, None]).clamp(max=states.shape[1] - 1)
    states, tokens = states.gather(1, places[..., None].expand_as(states)), tokens.gather(1, places)
    memory.await_rows(states, tokens, [count - done for count, done in zip(counts, first, strict=True)])
    return memory


def test_statistics_count_the_rounds_of_each_unfinished_sequence(llama):
    draft, prompt = set_shape(make_draft(llama), "chain"), make_prompts([6, 3, 2])
    assert_same_generation(llama, draft, prompt, do_sample=True)
    stats = draft.speculation_stats
    assert stats.new_tokens == 3 + sum(stats.acceptance_lengths)
    assert stats.target_calls - 1 < stats.rounds < 3 * (stats.target_calls - 1)  # those that are full do not count
    assert all(hit <= tried for hit, tried in zip(stats.accepted_by_depth, stats.drafted_by_depth, strict=True))


def test_several_texts_of_one_prompt_are_a_batch_that_repeats_it(llama):
    draft, prompt = make_draft(llama), make_prompts([6])
    with pytest.raises(ValueError, match="num_return_sequences has to be 1"):
        llama.generate(**prompt, num_return_sequences=3, do_sample=True, max_new_tokens=5, assistant_model=draft)
    repeated = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in prompt.items()}
    torch.manual_seed(0)
    expected = llama.generate(**prompt, num_return_sequences=3, do_sample=True, max_new_tokens=15)
    torch.manual_seed(0)
    assisted = llama.generate(**repeated, do_sample=True, max_new_tokens=15, assistant_model=draft)
    assert assisted.tolist() == expected.tolist()


@pytest.mark.parametrize("lengths", [[5], [5, 4]], ids=["one", "batch"])
def test_scores_hold_no_more_memory_than_they_show(lengths):
    target = TARGETS["llama"]().eval()
    outputs, _ = run(target, make_prompts(lengths), assistant_model=make_draft(target))
    for records in outputs.scores, outputs.logits:
        held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in records}
        assert sum(held.values()) <= 2 * sum(each.nbytes for each in records)
    assert torch.stack(outputs.logits).isfinite().all()
