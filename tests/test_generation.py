"""`generate(assistant_model=draft)` equals plain `generate()`: tokens, scores, cache length, random state, stream."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pairwise import pairwise
from reference_generation import (
    MAX_NEW_TOKENS,
    SETTINGS,
    TARGETS,
    CountingProcessor,
    assert_same_generation,
    make_draft,
    make_prompt,
    make_prompts,
    run,
    set_tree,
)
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.generation import caches as caching
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return TARGETS["llama"]().eval()


# Tokens, and padding before them.
PROMPTS = [(1, 0), (9, 0), (6, 3), (12, 5), (7, 0), (8, 1)]


@pytest.mark.parametrize(("name", "setting", "prompt"), pairwise(TARGETS, SETTINGS, PROMPTS), ids=str)
def test_text_is_that_of_plain_generation(name, setting, prompt):
    target, num_accepted, seed = TARGETS[name]().eval(), 0, 0
    while num_accepted == 0 and seed < 6:
        draft = make_draft(target)
        assert_same_generation(target, draft, make_prompt(*prompt), seed, **SETTINGS[setting])
        num_accepted, seed = sum(draft.speculation_stats.accepted_by_depth), seed + 1
    assert num_accepted > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"mla_rope_dim": 4},
        {"mla_rope_dim": 4, "mla_q_lora_rank": 8},
        {"attention_type": "gqa"},
        {"num_hidden_layers": 2},
        {"hidden_size": 16},
        {"fc_norm": True, "norm_output": True},
    ],
    ids=str,
)
def test_every_kind_of_head_gives_the_plain_text(llama, fields):
    draft = make_draft(llama, **fields)
    for settings in SETTINGS["greedy"], SETTINGS["sample-warpers"]:
        assert_same_generation(llama, draft, make_prompt(7), **settings)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
def test_every_kernel_gives_the_plain_text(llama, kernel):
    draft = make_draft(llama)
    draft.set_attn_implementation(kernel)
    assert_same_generation(llama, draft, make_prompt(7, num_padding=2), do_sample=False)


@pytest.mark.parametrize("num_assistant_tokens", [0, 1, 2, 7, 40])
def test_any_chain_length_gives_the_plain_text(llama, num_assistant_tokens):
    draft = make_draft(llama)
    draft.generation_config.num_assistant_tokens = num_assistant_tokens
    for settings in SETTINGS["greedy"], SETTINGS["sample"]:
        assert_same_generation(llama, draft, make_prompt(5), **settings)
    assert len(draft.speculation_stats.drafted_by_depth) <= num_assistant_tokens


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1])
def test_any_confidence_threshold_gives_the_plain_text(llama, threshold):
    draft = make_draft(llama)
    draft.generation_config.assistant_confidence_threshold = threshold
    for settings in SETTINGS["greedy"], SETTINGS["sample"]:
        assert_same_generation(llama, draft, make_prompt(5), **settings)


def test_chain_ends_with_the_first_unsure_proposal(llama):
    draft = make_draft(llama)
    draft.generation_config.assistant_confidence_threshold = 1.0
    assert_same_generation(llama, draft, make_prompt(5), do_sample=False)
    assert len(draft.speculation_stats.drafted_by_depth) == 1


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 8])
def test_length_limit_cuts_inside_a_round(llama, max_new_tokens):
    draft = make_draft(llama)
    for settings in SETTINGS["greedy"], SETTINGS["sample"]:
        assisted = assert_same_generation(llama, draft, make_prompt(5), max_new_tokens=max_new_tokens, **settings)
        assert assisted.sequences.shape[1] == 5 + max_new_tokens


def test_two_calls_in_a_row_equal_two_plain_calls(llama):
    """The generator's state after the first call decides the second; unused draws must not count."""
    draft, prompt = make_draft(llama), make_prompt(6)

    def two_calls(**assistance):
        torch.manual_seed(3)
        return [llama.generate(**prompt, max_new_tokens=20, do_sample=True, **assistance).tolist() for _ in range(2)]

    assert two_calls(assistant_model=draft) == two_calls()


class RandomProcessor(LogitsProcessor):
    """Draws random numbers of its own, as a watermark might."""

    def __call__(self, input_ids, scores):
        return scores + torch.rand_like(scores)


@pytest.mark.parametrize("make_processor", [RandomProcessor, CountingProcessor])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_processor_with_a_state_of_its_own_sees_plain_generations_calls(llama, make_processor, do_sample):
    draft, prompt = make_draft(llama), make_prompt(6)
    texts = []
    for assistance in {}, {"assistant_model": draft}:
        outputs, state = run(llama, prompt, do_sample=do_sample, logits_processor=[make_processor()], **assistance)
        texts.append((outputs.sequences.tolist(), state.tolist()))
    assert texts[0] == texts[1]


class StopAtToken(StoppingCriteria):
    """Stops after a token; raises instead if asked to."""

    def __init__(self, token: int, error: type[Exception] | None = None):
        self.token, self.error, self.lengths = token, error, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        is_done = input_ids[:, -1] == self.token
        if is_done.any() and self.error is not None:
            raise self.error
        return is_done


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_custom_criterion_stops_exactly_where_it_stops_plain_generation(llama, do_sample):
    draft, prompt = make_draft(llama), make_prompt(6)
    plain, _ = run(llama, prompt, do_sample=do_sample)
    for token in set(plain.sequences[0, 6:].tolist()):
        criteria = StopAtToken(token), StopAtToken(token)
        expected, _ = run(llama, prompt, do_sample=do_sample, stopping_criteria=[criteria[0]])
        assisted, _ = run(llama, prompt, do_sample=do_sample, stopping_criteria=[criteria[1]], assistant_model=draft)
        assert assisted.sequences.tolist() == expected.sequences.tolist()
        assert criteria[0].lengths == criteria[1].lengths


class RecordingStreamer:
    def __init__(self):
        self.pieces, self.has_ended = [], False

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.has_ended = True


def test_streamer_gets_what_plain_generation_streams(llama):
    draft, prompt, streams = make_draft(llama), make_prompt(6), []
    for assistance in {}, {"assistant_model": draft}:
        streamer = RecordingStreamer()
        llama.generate(**prompt, max_new_tokens=20, do_sample=False, streamer=streamer, **assistance)
        assert streamer.has_ended
        streams.append(streamer.pieces)
    assert streams[0] == streams[1]


def test_exception_ends_the_stream_and_leaves_the_random_state_of_plain_generation(llama):
    draft, prompt = make_draft(llama), make_prompt(6)
    token = run(llama, prompt, do_sample=True)[0].sequences[0, 16].item()
    states = []
    for assistance in {}, {"assistant_model": draft}:
        streamer = RecordingStreamer()
        torch.manual_seed(0)
        with pytest.raises(ZeroDivisionError):
            llama.generate(
                **prompt,
                max_new_tokens=20,
                do_sample=True,
                stopping_criteria=[StopAtToken(token, ZeroDivisionError)],
                streamer=streamer,
                **assistance,
            )
        states.append(torch.get_rng_state().tolist())
    assert streamer.has_ended
    assert states[0] == states[1]
    assert not llama.model.layers[2]._forward_pre_hooks


class FailingStreamer(RecordingStreamer):
    """Raises at the token after `num_tokens` ones, the prompt not counted."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def put(self, value):
        super().put(value)
        if len(self.pieces) == self.num_tokens + 2:
            raise BrokenPipeError


class FailingProcessor(LogitsProcessor):
    """Raises at the call after `num_calls` ones."""

    def __init__(self, num_calls: int):
        self.num_calls = num_calls

    def __call__(self, input_ids, scores):
        self.num_calls -= 1
        if self.num_calls < 0:
            raise BrokenPipeError
        return scores + torch.rand_like(scores)


def state_after_failure(target, prompt, **settings) -> list[int]:
    torch.manual_seed(0)
    with pytest.raises(BrokenPipeError):
        target.generate(**prompt, **{"max_new_tokens": 12, **settings})
    return torch.get_rng_state().tolist()


@pytest.mark.parametrize("top_k", [1, 3], ids=["chain", "tree"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.1, "repetition_penalty": 1.2},
        {"do_sample": True, "logits_processor": [RandomProcessor()]},
        {"do_sample": False, "logits_processor": [RandomProcessor()]},
    ],
    ids=["at-once", "by-steps", "random-processor", "greedy-random-processor"],
)
def test_streamer_that_raises_leaves_the_random_state_of_the_tokens_it_took(llama, settings, top_k):
    draft, prompt = set_tree(make_draft(llama), 7, top_k), make_prompt(6)
    for num_tokens in range(8):
        expected = state_after_failure(llama, prompt, streamer=FailingStreamer(num_tokens), **settings)
        streamer = FailingStreamer(num_tokens)
        assert state_after_failure(llama, prompt, assistant_model=draft, streamer=streamer, **settings) == expected
        assert streamer.has_ended


class DrawingStreamer(RecordingStreamer):
    """Moves the global random generator with every piece."""

    def put(self, value):
        super().put(value)
        torch.rand(1)


@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["changing", "fixed"])
def test_streamer_that_draws_random_numbers_is_left_alone_or_named(llama, fixed_shapes):
    """Where nothing is sampled its draws are its own; otherwise they would decide what has been chosen already."""
    draft, prompt = set_tree(make_draft(llama), 7, 3), make_prompt(6)
    draft.generation_config.fixed_shapes = fixed_shapes
    states = []
    for assistance in {}, {"assistant_model": draft}:
        torch.manual_seed(0)
        llama.generate(**prompt, max_new_tokens=20, do_sample=False, streamer=DrawingStreamer(), **assistance)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert sum(draft.speculation_stats.accepted_by_depth) > 0
    with pytest.raises(RuntimeError, match=r"`streamer` \(DrawingStreamer\) must not draw random numbers"):
        llama.generate(**prompt, max_new_tokens=40, do_sample=True, streamer=DrawingStreamer(), assistant_model=draft)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize("lengths", [[5], [5, 3]], ids=["one", "batch"])
def test_processor_that_raises_leaves_the_random_state_of_plain_generation(llama, lengths, do_sample):
    draft, prompt = make_draft(llama), make_prompts(lengths)
    for num_calls in range(8):
        states = [
            state_after_failure(
                llama, prompt, do_sample=do_sample, logits_processor=[FailingProcessor(num_calls)], **assistance
            )
            for assistance in ({}, {"assistant_model": draft})
        ]
        assert states[0] == states[1]


def test_chunked_prefill_gives_the_plain_text(llama):
    draft, prompt = make_draft(llama), make_prompt(20)
    assert_same_generation(llama, draft, prompt, do_sample=False, prefill_chunk_size=7)


def test_plain_tensor_is_returned_unless_a_dict_is_asked_for(llama):
    draft, prompt = make_draft(llama), make_prompt(6)
    assisted = llama.generate(**prompt, max_new_tokens=9, do_sample=False, assistant_model=draft)
    assert assisted.tolist() == llama.generate(**prompt, max_new_tokens=9, do_sample=False).tolist()


def test_prompt_without_a_mask_gives_the_plain_text(llama):
    draft, input_ids = make_draft(llama), make_prompt(6)["input_ids"]
    assert_same_generation(llama, draft, {"input_ids": input_ids}, do_sample=False)


@pytest.mark.parametrize("mask", [[1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]], ids=str)
def test_mask_of_any_form_gives_the_plain_text(llama, mask):
    prompt = {"input_ids": make_prompt(6)["input_ids"], "attention_mask": torch.tensor([mask])}
    assert_same_generation(llama, make_draft(llama), prompt, do_sample=False)


def test_threads_that_share_a_target_get_their_own_text(llama):
    prompts = [make_prompt(num_tokens) for num_tokens in (5, 6, 7, 8)]
    expected = [llama.generate(**prompt, max_new_tokens=20, do_sample=False).tolist() for prompt in prompts]

    def generate(prompt):
        return llama.generate(**prompt, max_new_tokens=20, do_sample=False, assistant_model=make_draft(llama)).tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(generate, prompts)) == expected


def test_statistics_count_emitted_tokens(llama):
    draft = make_draft(llama)
    assert_same_generation(llama, draft, make_prompt(6), do_sample=True)
    stats = draft.speculation_stats
    assert stats.new_tokens == MAX_NEW_TOKENS == 1 + sum(stats.acceptance_lengths)
    assert stats.target_calls == 1 + stats.rounds
    assert stats.accepted_by_depth[0] == sum(length > 1 for length in stats.acceptance_lengths)
    assert all(0 <= rate <= 1 for rate in stats.acceptance_by_depth)
    # The prompt's rows and as many spare ones as a new buffer gets.
    assert stats.draft_cache_bytes == (6 + caching.SPARE_POSITIONS) * draft.config.mla_latent_dim * 4
    assert 6 + MAX_NEW_TOKENS - 8 < stats.draft_cache_tokens < 6 + MAX_NEW_TOKENS


@torch.no_grad()
def test_draft_cache_is_rebuilt_from_the_targets_true_states(llama, monkeypatch):
    """Rows of guesses that stay behind cost no correctness and much acceptance; nobody would see it."""
    caches, new_cache = [], caching.Cache
    monkeypatch.setattr(caching, "Cache", lambda **fields: caches.append(new_cache(**fields)) or caches[-1])
    draft = make_draft(llama)
    sequences = llama.generate(**make_prompt(6), max_new_tokens=20, do_sample=False, assistant_model=draft)
    num_rows = caches[0].get_seq_length()
    captured = draft.capture_aux_hidden_states(llama)
    with captured:
        llama(sequences[:, :num_rows])
    expected = DynamicCache()
    draft(draft.embed(sequences[:, 1 : num_rows + 1], llama), captured.take(), past_key_values=expected)
    assert num_rows > 20
    torch.testing.assert_close(caches[0].layers[0].keys, expected.layers[0].keys, rtol=1e-4, atol=1e-5)


def test_other_assistants_go_the_way_they_always_went(llama):
    prompt = make_prompt(6) | {"max_new_tokens": 12, "do_sample": False}
    expected = llama.generate(**prompt).tolist()
    assert llama.generate(**prompt, assistant_model=llama).tolist() == expected
    assert llama.generate(**prompt, prompt_lookup_num_tokens=3).tolist() == expected


def test_hook_wraps_once_however_often_it_is_installed():
    from transformers import GenerationMixin

    from eagle3_mla.modeling_eagle3_mla import install_assistant_hook

    before = GenerationMixin._assisted_decoding
    install_assistant_hook()
    assert GenerationMixin._assisted_decoding is before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cache_implementation": "static"}, NotImplementedError, "must be a DynamicCache.*'static'"),
        ({"use_cache": False}, ValueError, "`use_cache` must be True"),
    ],
    ids=str,
)
def test_what_is_not_supported_yet_is_refused_by_name(llama, change, error, message):
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True} | change
    with pytest.raises(error, match=message):
        llama.generate(**make_prompt(4), assistant_model=make_draft(llama), **settings)


@pytest.mark.parametrize("value", [-1, 2.5, True, "7"])
def test_wrong_number_of_draft_tokens_is_refused_by_name(llama, value):
    draft = make_draft(llama)
    draft.generation_config.num_assistant_tokens = value
    with pytest.raises(ValueError, match="num_assistant_tokens` must be an integer of at least 0, got"):
        llama.generate(**make_prompt(4), max_new_tokens=5, assistant_model=draft)


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "high"])
def test_wrong_confidence_threshold_is_refused_by_name(llama, value):
    draft = make_draft(llama)
    draft.generation_config.assistant_confidence_threshold = value
    with pytest.raises(ValueError, match=r"assistant_confidence_threshold` must be None or a number between 0 and 1"):
        llama.generate(**make_prompt(4), max_new_tokens=5, assistant_model=draft)


def test_draft_of_another_target_is_refused_before_any_forward(llama):
    config = Eagle3MLAConfig.from_target(llama.config, target_hidden_size=24)
    with pytest.raises(ValueError, match="made for another target"):
        llama.generate(**make_prompt(4), max_new_tokens=5, assistant_model=Eagle3MLADraftModel(config))


@pytest.mark.gpu
@pytest.mark.parametrize("device_of_prompt", ["cuda", "cpu"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "sample-guidance"])
def test_text_on_a_gpu_is_that_of_plain_generation(name, device_of_prompt):
    """Plain sampling draws on the prompt's device; guidance is left out, it needs the prompt on the target's."""
    torch.manual_seed(0)
    target = TARGETS["llama"]().eval().cuda()
    for seed, (num_tokens, num_padding) in enumerate([(9, 0), (6, 3)]):
        draft = make_draft(target).cuda()
        prompt = {key: tensor.to(device_of_prompt) for key, tensor in make_prompt(num_tokens, num_padding).items()}
        texts, states = [], []
        for assistance in {}, {"assistant_model": draft}:
            texts.append(run(target, prompt, seed, **SETTINGS[name], **assistance)[0].sequences.tolist())
            states.append((torch.get_rng_state().tolist(), torch.cuda.get_rng_state().tolist()))
        assert texts[0] == texts[1]
        assert states[0] == states[1]
