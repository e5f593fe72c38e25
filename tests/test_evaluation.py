"""Counting, the comparison of texts, and what the evaluation writes."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VOCAB_SIZE
from reference_generation import TARGETS, make_draft, make_prompt
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle3_mla import Eagle3MLAConfig, Eagle3MLADraftModel
from eagle3_mla.evaluation import cli
from eagle3_mla.evaluation.measure import (
    Comparison,
    Decoding,
    Run,
    cache_bytes_per_token,
    compare,
    compare_all,
    describe_divergence,
    find_divergence,
    generate_timed,
    sampling_noise,
    standard_head_like,
    summarise,
)
from eagle3_mla.evaluation.prompts import Prompt, choose_evenly, messages_before_last_answer, render_prompts
from eagle3_mla.evaluation.report import round_milliseconds
from eagle3_mla.evaluation.streaming import ColouringStreamer

LETTERS = " \nabcdefghijklmnopqrstuvwxyz?"
PROMPT = Prompt("first", torch.tensor([[5, 9, 3, 17]]))
GREEDY = Decoding(max_new_tokens=12)
SAMPLING = Decoding(max_new_tokens=12, do_sample=True, temperature=0.7, seeds=(1, 2))
QUESTION = {"role": "user", "content": "who"}
ANSWER = {"role": "assistant", "content": "me"}


class LyingDraft(Eagle3MLADraftModel):
    """Returns the target's own text with new token 3 replaced by the next id."""

    def assisted_decoding(self, target, input_ids, **settings):
        self.speculation_stats = stats(lengths=[4], drafted=[1], accepted=[1], target_calls=2)
        everything = torch.ones_like(input_ids)
        text = target.generate(input_ids, attention_mask=everything, max_new_tokens=12, do_sample=False)
        text[0, input_ids.shape[1] + 3] += 1
        return text


@pytest.fixture
def tiny_draft(tiny_target) -> Eagle3MLADraftModel:
    return Eagle3MLADraftModel(Eagle3MLAConfig.from_target(tiny_target.config)).eval()


@pytest.fixture
def lying_draft(tiny_target) -> LyingDraft:
    return LyingDraft(Eagle3MLAConfig.from_target(tiny_target.config)).eval()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", chat_template=template)


@pytest.fixture
def checkpoints(tmp_path, tiny_target, tiny_draft, tiny_tokenizer):
    """Folders of a target and of a draft that fits it."""
    target_path, draft_path = tmp_path / "target", tmp_path / "draft"
    tiny_target.save_pretrained(target_path)
    tiny_tokenizer.save_pretrained(target_path)
    tiny_draft.save_pretrained(draft_path)
    return SimpleNamespace(target=target_path, draft=draft_path, output=tmp_path / "eval")


def stats(lengths, drafted, accepted, target_calls):
    return SimpleNamespace(
        acceptance_lengths=lengths,
        drafted_by_depth=drafted,
        accepted_by_depth=accepted,
        target_calls=target_calls,
        prefill_seconds=1.0,
        draft_seconds=0.5,
        target_seconds=1.0,
        host_seconds=0.25 * len(lengths),
    )


def comparison(num_tokens: int, plain_seconds: float, assisted_seconds: float, one: SimpleNamespace) -> Comparison:
    token_ids = list(range(num_tokens))
    return Comparison("p", 0, Run(token_ids, plain_seconds), Run(token_ids, assisted_seconds), one, divergence=None)


def arguments(checkpoints, *extra: str) -> list[str]:
    paths = ["--draft-checkpoint", checkpoints.draft, "--target-model-path", checkpoints.target]
    return [*map(str, paths), "--output-dir", str(checkpoints.output), "--max-new-tokens", "8", *extra]


@pytest.mark.parametrize(
    ("plain", "assisted", "position"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([1, 2], [], 0), ([], [], None)],
)
def test_texts_differ_where_a_token_or_the_length_does(plain, assisted, position):
    assert find_divergence(plain, assisted) == position


def test_every_round_and_token_counts_once():
    """A mean of means would weigh the short text as much as the long one."""
    long = comparison(9, 4.0, 1.0, stats([4, 4], [2, 2, 2], [2, 2, 2], target_calls=3))
    short = comparison(2, 1.5, 1.0, stats([1], [1], [0], target_calls=2))
    results = summarise([long, short])
    assert results["acceptance_length"] == 3.0
    assert results["acceptance_by_depth"] == [2 / 3, 1.0, 1.0]
    assert results["target_calls_per_token"] == 5 / 11
    assert (results["plain_tokens_per_second"], results["assisted_tokens_per_second"]) == (2.0, 5.5)
    assert results["speedup"] == 2.75
    assert (results["prefill_seconds"], results["draft_seconds"], results["target_seconds"]) == (2.0, 1.0, 2.0)
    assert (results["host_seconds"], results["host_share"]) == (0.75, 0.75 / 3.75)
    assert round_milliseconds(results) == "333.33, 666.67, 250.00 ms (rest 20%)"
    assert (results["num_texts"], results["num_tokens"], results["num_rounds"]) == (2, 11, 3)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_assisted_text_equals_plain_text(tiny_target, tiny_draft, decoding):
    comparisons = list(compare_all(tiny_target, tiny_draft, [PROMPT], decoding))
    results = summarise(comparisons)
    assert [one.seed for one in comparisons] == list(decoding.seeds)
    assert results["lossless"]
    assert results["num_tokens"] == 12 * len(comparisons)


def test_tokens_are_those_of_the_prefill_and_of_the_rounds(tiny_target, tiny_draft):
    for one in compare_all(tiny_target, tiny_draft, [PROMPT], SAMPLING):
        assert len(one.assisted.token_ids) == 1 + sum(one.stats.acceptance_lengths)
        assert one.stats.target_calls == 1 + len(one.stats.acceptance_lengths)


def test_a_planted_divergence_is_found_with_its_position_and_gap(tiny_target, lying_draft):
    found = compare(tiny_target, lying_draft, PROMPT, GREEDY, seed=0)
    divergence = found.divergence
    assert (divergence.prompt, divergence.seed, divergence.position) == ("first", 0, 3)
    assert divergence.assisted_token == divergence.plain_token + 1
    assert divergence.logit_gap > 1000 * divergence.logit_spacing > 0
    assert not summarise([found])["lossless"]


def test_a_text_that_ends_early_has_no_gap(tiny_target):
    found = describe_divergence(tiny_target, PROMPT, GREEDY, 0, [1, 2], [1])
    assert (found.position, found.plain_token, found.assisted_token) == (1, 2, None)
    assert (found.logit_gap, found.logit_spacing) == (None, None)


@torch.no_grad()
def test_a_sampled_token_is_the_largest_logit_with_the_noise(tiny_target):
    """So a gap of a sampled text compares what was really compared."""
    run = generate_timed(tiny_target, PROMPT.input_ids, SAMPLING, seed=7)
    for position, token in enumerate(run.token_ids):
        prefix = torch.cat([PROMPT.input_ids, torch.tensor([run.token_ids[:position]], dtype=torch.long)], dim=1)
        scores = tiny_target(prefix).logits[0, -1] + sampling_noise(tiny_target, SAMPLING, 7, position)
        assert scores.argmax() == token


def divergences_in(dtype: torch.dtype, do_sample: bool, num_prompts: int, hook=None) -> list:
    """Where texts with trees leave plain ones, for a random Llama whose forwards `hook` may change."""
    target = TARGETS["llama"]().eval().to(dtype)
    draft = make_draft(target).to(dtype)
    draft.generation_config.num_assistant_tokens, draft.generation_config.assistant_tree_top_k = 6, 2
    if hook is not None:
        target.register_forward_hook(hook)
    prompts = [Prompt(str(number), make_prompt(4 + number % 5)["input_ids"]) for number in range(num_prompts)]
    decoding = Decoding(max_new_tokens=24, do_sample=do_sample, temperature=0.7, seeds=(1,))
    return [one.divergence for one in compare_all(target, draft, prompts, decoding) if one.divergence is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_in_half_precision_texts_part_only_where_rounding_decides(dtype, do_sample):
    """One token and a tree round differently; a mask, position or cache that is wrong shows as a wide gap."""
    for divergence in divergences_in(dtype, do_sample, num_prompts=4):
        assert abs(divergence.logit_gap) <= 8 * divergence.logit_spacing


@pytest.mark.parametrize(("do_sample", "num_prompts"), [(False, 12), (True, 24)], ids=["greedy", "sampling"])
def test_rounding_shows_as_a_narrow_gap(do_sample, num_prompts):
    """Forwards over several tokens are off by up to four spacings, so that some texts part on any processor."""

    generator = torch.Generator().manual_seed(0)

    def round_coarsely(module, arguments, outputs):
        if outputs.logits.shape[1] > 1:
            off = 2 * torch.rand(outputs.logits.shape, generator=generator) - 1
            outputs.logits = outputs.logits * (1 + 4 * torch.finfo(torch.bfloat16).eps * off).bfloat16()

    found = divergences_in(torch.bfloat16, do_sample, num_prompts, hook=round_coarsely)
    assert found
    assert all(abs(each.logit_gap) <= 16 * each.logit_spacing < 4 for each in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rope_dim", [0, 4])
def test_cache_bytes_are_read_off_the_cache(tiny_target, dtype, rope_dim):
    config = Eagle3MLAConfig.from_target(tiny_target.config, mla_latent_dim=4, mla_rope_dim=rope_dim)
    draft = Eagle3MLADraftModel(config).to(dtype)
    assert cache_bytes_per_token(draft) == (4 + rope_dim) * dtype.itemsize
    assert cache_bytes_per_token(standard_head_like(draft)) == 2 * 2 * 8 * dtype.itemsize


def test_a_prompt_ends_before_the_last_answer():
    assert messages_before_last_answer([QUESTION, ANSWER, QUESTION, ANSWER]) == [QUESTION, ANSWER, QUESTION]
    assert messages_before_last_answer([QUESTION]) == [QUESTION]


def test_samples_are_spread_over_the_dataset():
    assert choose_evenly(list(range(100)), 4) == [0, 25, 50, 75]
    assert choose_evenly([1, 2], 10) == [1, 2]


def test_prompts_without_room_are_left_out_aloud(tiny_tokenizer, caplog):
    rows = [{"messages": [{"role": "user", "content": "a" * length}, ANSWER]} for length in (3, 30)]
    prompts = render_prompts(rows, tiny_tokenizer, max_prompt_tokens=10)
    assert [prompt.input_ids.shape[1] for prompt in prompts] == [4]
    assert "1 prompts of more than 10 tokens are left out" in caplog.text
    with pytest.raises(ValueError, match="1 to 2 tokens"):
        render_prompts(rows, tiny_tokenizer, max_prompt_tokens=2)


def test_streamer_colours_all_tokens_of_a_round_but_the_last(tiny_tokenizer):
    draft = SimpleNamespace(speculation_stats=SimpleNamespace(new_tokens=1, target_calls=1, acceptance_length=0.0))
    streamer = ColouringStreamer(tiny_tokenizer, draft)
    streamer.put(torch.tensor([[4, 5]]))
    for round_ids in ([2], [3, 4, 5], [6]):
        draft.speculation_stats.new_tokens = len(streamer.token_ids) + len(round_ids)
        for token_id in round_ids:
            streamer.put(torch.tensor([token_id]))
    coloured = [streamer.text.plain[span.start : span.end].strip() for span in streamer.text.spans]
    assert streamer.token_ids == [2, 3, 4, 5, 6]
    assert coloured == ["b", "c"]


def test_command_writes_results_report_and_provenance(checkpoints):
    assert cli.main(arguments(checkpoints, "--attention-backend", "eager_mla", "--num-samples", "2")) == 0
    results = json.loads((checkpoints.output / "results.json").read_text())
    assert results["lossless"]
    assert results["num_prompts"] == 2
    assert (results["draft_cache_bytes_per_token"], results["standard_cache_bytes_per_token"]) == (16, 128)
    assert {"acceptance_length", "acceptance_by_depth", "target_calls_per_token", "speedup"} <= results.keys()
    assert min(results["prefill_seconds"], results["draft_seconds"], results["target_seconds"]) > 0
    assert 0 < results["host_share"] < 1
    report = (checkpoints.output / "report.md").read_text()
    assert "Lossless: all 2" in report
    assert "## Divergences" not in report
    texts = [json.loads(line) for line in (checkpoints.output / "texts.jsonl").read_text().splitlines()]
    assert [text["divergence"] for text in texts] == [None, None]
    assert sum(sum(text["acceptance_lengths"]) for text in texts) == results["num_tokens"] - 2
    origin = json.loads((checkpoints.output / "provenance.json").read_text())
    assert {"argv", "commit", "versions", "hardware"} <= origin.keys()


def test_prompts_come_from_the_dataset(checkpoints, tmp_path):
    dataset = tmp_path / "conversations.jsonl"
    dataset.write_text("".join(json.dumps({"id": f"row{n}", "messages": [QUESTION, ANSWER]}) + "\n" for n in range(3)))
    assert cli.main(arguments(checkpoints, "--dataset", str(dataset), "--num-samples", "2", "--do-sample")) == 0
    results = json.loads((checkpoints.output / "results.json").read_text())
    assert (results["num_prompts"], results["settings"]["seeds"]) == (2, [0])


def test_a_divergence_makes_the_command_fail(checkpoints, tiny_target, lying_draft, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(cli, "load_models", lambda _: (tiny_target, lying_draft, tiny_tokenizer))
    assert cli.main(arguments(checkpoints, "--num-samples", "1")) == 1
    first = json.loads((checkpoints.output / "results.json").read_text())["first_divergence"]
    assert (first["prompt"], first["position"]) == ("built-in-1", 3)
    report = (checkpoints.output / "report.md").read_text()
    assert "Not lossless: 1 of 1 texts differ" in report
    assert "## Divergences" in report
    assert f"| built-in-1 | 0 | 3 | {first['plain_token']} | {first['plain_token'] + 1} |" in report
    assert json.loads((checkpoints.output / "texts.jsonl").read_text())["divergence"] == first


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--draft-checkpoint", "./missing"], "`--draft-checkpoint` must be an existing folder"),
        (["--target-model-path", "./missing"], "`--target-model-path` must be an existing folder"),
        (["--attention-backend", "flex_attention"], '`attention_type="gqa"`'),
        (["--dataset", "./missing.jsonl"], "does not exist"),
        (["--max-new-tokens", "256"], "`--max-new-tokens` must be below 256"),
    ],
    ids=["draft", "target", "backend", "dataset", "length"],
)
def test_wrong_input_is_one_message_and_leaves_nothing(checkpoints, caplog, extra, message):
    assert cli.main(arguments(checkpoints, *extra)) == 2
    assert len(caplog.records) == 1
    assert message in caplog.text
    assert not checkpoints.output.exists()


def test_a_draft_of_another_target_is_refused(checkpoints, tiny_target, caplog):
    other = Eagle3MLAConfig.from_target(tiny_target.config, vocab_size=TINY_VOCAB_SIZE + 1)
    Eagle3MLADraftModel(other).save_pretrained(checkpoints.draft)
    assert cli.main(arguments(checkpoints)) == 2
    assert "vocab_size" in caplog.text
