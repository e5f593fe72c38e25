"""LoRA adapters on a trained draft: what they compute, how they train, travel and help `generate()`; and going on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference_runs import assert_same_bits, error_of, run, run_whole_and_joined, training_flags
from reference_ttt import ATTENTION, save_tiny_target, tiny_draft, tiny_target, write_conversations
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel
from eagle3_mla.training import adapters
from eagle3_mla.training.arguments import DraftArguments
from eagle3_mla.training.trainer import Eagle3Trainer

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

MLA = {name: fields for name, fields in ATTENTION.items() if fields["attention_type"] == "mla"}
MORE_CONVERSATIONS = [
    [("user", "sing"), ("assistant", "la la la la la la")],
    [("user", "sing more"), ("assistant", "li la li la li la")],
    [("user", "count down"), ("assistant", "9 8 7 6 5")],
]
PROMPT = torch.tensor([[3, 7, 1, 30, 12, 8]])


def adapted(draft: Eagle3MLADraftModel, seed: int = 0, **overrides) -> PeftModel:
    """`draft` in an adapter of rank 3 on all of its linear layers whose second factor is not zero."""
    torch.manual_seed(seed)
    fields = {"r": 3, "lora_alpha": 6, "target_modules": adapters.adapted_modules(draft, None)}
    return get_peft_model(draft, LoraConfig(**fields | {"init_lora_weights": False} | overrides)).double().eval()


def decoded_logits(draft, num_tokens: int = 6) -> torch.Tensor:
    """Logits of a prompt and of single rows behind it, with a cache, as a decoder calls the draft."""
    generator = torch.Generator().manual_seed(1)
    config = draft.config
    embeds = torch.randn(1, num_tokens, config.hidden_size, generator=generator, dtype=torch.float64)
    aux = torch.randn(1, num_tokens, 3 * config.target_hidden_size, generator=generator, dtype=torch.float64)
    cache = DynamicCache()
    pieces = [slice(0, 3), *(slice(index, index + 1) for index in range(3, num_tokens))]
    with torch.no_grad():
        outputs = [
            draft(inputs_embeds=embeds[:, piece], aux_hidden_states=aux[:, piece], past_key_values=cache)
            for piece in pieces
        ]
    return torch.cat([output.logits for output in outputs], dim=1)


def serving(draft) -> Eagle3MLADraftModel:
    """The weights of a training draft in the class that decodes."""
    served = Eagle3MLADraftModel(draft.config).double().eval()
    served.load_state_dict(draft.state_dict())
    return served


@pytest.fixture(scope="module")
def target_path(tmp_path_factory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def flags(target_path, tmp_path_factory) -> dict[str, str]:
    """The smallest run: 2 conversations a step, 8 steps."""
    steps = {"max_steps": "8", "save_steps": "2", "logging_steps": "2"}
    sizes = {"num_ttt_steps": "3", "per_device_train_batch_size": "2"}
    return training_flags(tmp_path_factory.mktemp("data"), target_path, **sizes, **steps)


@pytest.fixture(scope="module")
def head(flags, tmp_path_factory) -> Path:
    """A trained head with a draft vocabulary of its own."""
    directory = tmp_path_factory.mktemp("head")
    vocabulary = {"--draft-vocab-size": "100", "--save-strategy": "no", "--learning-rate": "0.02"}
    run(flags | vocabulary | {"--output-dir": str(directory), "--max-steps": "20"})
    return directory


@pytest.fixture
def command(flags, head, tmp_path) -> dict[str, str]:
    """Trains an adapter of rank 2 of the head on other conversations."""
    dataset = write_conversations(tmp_path / "more.jsonl", MORE_CONVERSATIONS)
    adapter = {"--draft-checkpoint": str(head), "--lora-rank": "2", "--learning-rate": "0.02"}
    return flags | adapter | {"--dataset": str(dataset), "--output-dir": str(tmp_path / "out")}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("attention", MLA)
def test_absorbed_attention_equals_expanded_attention_under_an_adapter(attention, use_dora):
    """
    Invariant: both forms of the attention are one function. Mechanism: the absorbed one multiplies by the matrices of
    W_uk and W_uv, and `weight` of an adapted layer is that of the layer below. Symptom: low acceptance, no error.
    """
    draft = serving(tiny_draft(**MLA[attention]))
    layer = draft.layers[0].self_attn
    cos_sin = draft.rotary_emb(torch.arange(5)[None], torch.float64)
    attention_input = torch.randn(1, 5, 2 * draft.config.hidden_size, dtype=torch.float64)
    without_adapter = layer.attend_absorbed(
        layer.ask(attention_input, cos_sin), layer.remember(attention_input, cos_sin), cos_sin, None
    )
    model = adapted(draft, use_dora=use_dora, target_modules=["W_uk", "W_uv"])
    query, memory = layer.ask(attention_input, cos_sin), layer.remember(attention_input, cos_sin)
    absorbed, expanded = (
        attend(query, memory, cos_sin, None) for attend in (layer.attend_absorbed, layer.attend_expanded)
    )
    torch.testing.assert_close(absorbed, expanded, atol=1e-12, rtol=1e-10)
    assert (absorbed - without_adapter).abs().max() > 1e-2
    with model.disable_adapter():
        switched_off = layer.attend_absorbed(query, memory, cos_sin, None)
    torch.testing.assert_close(switched_off, without_adapter, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("attention", ATTENTION)
def test_an_adapter_changes_what_is_drafted_and_merging_keeps_it(attention):
    draft = serving(tiny_draft(**ATTENTION[attention]))
    plain = decoded_logits(draft)
    model = adapted(draft)
    logits = decoded_logits(model)
    assert (logits - plain).abs().max() > 1e-2
    merged = model.merge_and_unload()
    assert type(merged) is Eagle3MLADraftModel
    torch.testing.assert_close(decoded_logits(merged), logits, atol=1e-10, rtol=1e-8)


def test_adapters_of_one_head_are_switched_without_a_trace():
    draft = serving(tiny_draft(**ATTENTION["mla-R4"]))
    plain = decoded_logits(draft)
    model = adapted(draft)
    first = decoded_logits(model)
    torch.manual_seed(5)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["W_uv", "fc"], init_lora_weights=False))
    model.double().set_adapter("second")
    second = decoded_logits(model)
    assert (second - first).abs().max() > 1e-2
    model.set_adapter("default")
    assert torch.equal(decoded_logits(model), first)
    with model.disable_adapter():
        assert torch.equal(decoded_logits(model), plain)


@pytest.mark.parametrize("name", ["fc", "q_proj"])
def test_adapter_whose_dropout_draws_random_numbers_is_refused_by_name(name):
    target, draft = tiny_target(), serving(tiny_draft(**ATTENTION["mla-R0"])).float()
    model = adapted(draft, target_modules=[name], lora_dropout=0.5).float().train()
    state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=r"training mode with dropout.*Call `assistant_model.eval\(\)`"):
        target.generate(PROMPT, assistant_model=model, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)
    texts = []
    for assistance in {}, {"assistant_model": model.eval()}:
        torch.manual_seed(3)
        texts.append(target.generate(PROMPT, max_new_tokens=9, do_sample=True, **assistance).tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("attention", ["mla-R0", "mla-R4"])
def test_generate_with_an_adapter_gives_the_plain_text(attention, do_sample):
    target = tiny_target()
    draft = serving(tiny_draft(**ATTENTION[attention])).float()
    model = adapted(draft).float()
    settings = {"max_new_tokens": 24, "do_sample": do_sample}
    texts = []
    for assistant in (None, model, model.merge_and_unload()):
        torch.manual_seed(3)
        texts.append(target.generate(PROMPT, assistant_model=assistant, **settings))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert draft.speculation_stats.new_tokens == 24


def test_gradients_reach_the_adapter_everywhere_and_nothing_else(command, tmp_path, monkeypatch):
    gradients = {}
    step = Eagle3Trainer.training_step

    def keep_gradients(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        named = self.model.named_parameters()
        gradients.update({name: weight.grad.abs().max().item() for name, weight in named if weight.grad is not None})
        return loss

    monkeypatch.setattr(Eagle3Trainer, "training_step", keep_gradients)
    everywhere = ["fc", "q_proj", "W_dkv", "W_uk", "W_uv", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    run(command | {"--max-steps": "4"}, "--lora-target-modules", *everywhere)
    assert {name.split(".")[-4] for name in gradients} == set(everywhere)
    assert {name.split(".")[-3] for name in gradients} == {"lora_A", "lora_B"}
    assert all(gradient > 0 for gradient in gradients.values())


def test_training_an_adapter_learns_and_leaves_the_head_alone(command, head, tmp_path):
    before = load_file(head / "model.safetensors")
    run(command | {"--max-steps": "60", "--save-strategy": "no"})
    out = tmp_path / "out"
    losses = [json.loads(line).get("loss") for line in (out / "training_log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.7 * losses[0]
    draft = Eagle3MLADraftModel.from_pretrained(head)
    for name, weight in draft.state_dict().items():
        assert torch.equal(weight, before[name])
    model = PeftModel.from_pretrained(draft, out)
    with model.double().disable_adapter():
        without = decoded_logits(model)
    with_adapter = decoded_logits(model)
    assert (with_adapter - without).abs().max() > 1e-2
    torch.testing.assert_close(decoded_logits(model.merge_and_unload()), with_adapter, atol=1e-10, rtol=1e-8)


def test_an_adapter_directory_holds_the_adapter_and_names_its_head(command, head, tmp_path):
    run(command | {"--max-steps": "2"}, "--lora-target-modules", "W_uk", "W_uv", "lm_head")
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    weights = load_file(out / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in weights} == {"lora_A", "lora_B"}
    assert len(weights) == 6
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(head)
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert f'head = AutoModel.from_pretrained("{head}", trust_remote_code=True)' in card
    assert 'PeftModel.from_pretrained(head, "<this repository>")' in card
    assert "More Information Needed" not in card
    assert json.loads((out / "provenance.json").read_text())["num_steps"] == 2


def test_an_adapter_of_a_head_loaded_as_remote_code_drafts_and_merges(
    command, head, tmp_path, target_path, monkeypatch
):
    run(command)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    target = AutoModelForCausalLM.from_pretrained(target_path)
    plain = target.generate(PROMPT, max_new_tokens=16, do_sample=False)
    remote_class = get_class_from_dynamic_module("modeling_eagle3_mla.Eagle3MLADraftModel", str(head))
    draft = remote_class.from_pretrained(head)
    assert type(draft).__module__.startswith("transformers_modules")
    model = PeftModel.from_pretrained(draft, tmp_path / "out" / "checkpoint")
    for assistant in (model, model.merge_and_unload()):
        text = target.generate(PROMPT, assistant_model=assistant, max_new_tokens=16, do_sample=False)
        assert torch.equal(text, plain)
    draft.save_pretrained(tmp_path / "merged")
    assert Eagle3MLADraftModel.from_pretrained(tmp_path / "merged").config.draft_vocab_size == 100


def test_a_resumed_adapter_ends_with_the_bits_of_an_uninterrupted_one(command):
    whole, all_joined = run_whole_and_joined(command, [3, 5])
    weights = load_file(whole / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    for joined in all_joined:
        assert_same_bits(whole, joined, "adapter_model.safetensors")


def test_training_goes_on_from_the_weights_and_the_vocabulary_of_a_draft(command, head, tmp_path):
    del command["--lora-rank"]
    run(command | {"--learning-rate": "0", "--max-steps": "1", "--draft-vocab-size": "100"})
    weights, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "out", head))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    run(command | {"--max-steps": "4"})
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["d2t"], expected["d2t"])
    assert not torch.equal(weights["fc.weight"], expected["fc.weight"])


WRONG_REQUESTS = {
    "no head": ({"--draft-checkpoint": None}, "Name it with `--draft-checkpoint`"),
    "alpha without rank": ({"--lora-rank": None, "--lora-alpha": "4"}, "need `--lora-rank`"),
    "alpha that is not a number": ({"--lora-alpha": "nan"}, "`--lora-alpha` must be above 0 and finite, got nan"),
    "alpha 0": ({"--lora-alpha": "0"}, "`--lora-alpha` must be above 0 and finite, got 0.0"),
    "negative alpha": ({"--lora-alpha": "-1"}, "`--lora-alpha` must be above 0 and finite, got -1.0"),
    "rank 0": ({"--lora-rank": "0"}, "`--lora-rank` must be at least 1, got 0"),
    "no such layer": ({"--lora-target-modules": "k_proj"}, "must be among ['W_dkv', 'W_uk', 'W_uv', 'down_proj'"),
    "other attention": ({"--attention-backend": "sdpa"}, '`--attention-backend` sdpa trains "gqa" attention, but'),
    "other vocabulary": ({"--draft-vocab-size": "50"}, "`--draft-vocab-size` must be 100, as in"),
    "other residual": ({"--embed-residual": "True"}, "`--embed-residual` must be left out: "),
    "other feedback": ({"--norm-output": "True"}, "`--norm-output` must be left out: "),
    "nothing for Muon": (
        {"--lora-target-modules": "lm_head", "--muon-learning-rate": "0.01"},
        "`--muon-learning-rate` must be 0 or left out, got 0.01: it trains the matrices that map states to states",
    ),
    "no draft": (
        {"--draft-checkpoint": "./nowhere"},
        "The draft ./nowhere does not exist: `--draft-checkpoint` must be",
    ),
    "no draft by an absolute path": ({"--draft-checkpoint": "/nonexistent"}, "The draft /nonexistent does not exist"),
}


@pytest.mark.parametrize("request_name", WRONG_REQUESTS)
def test_a_wrong_request_is_one_message_and_leaves_nothing(request_name, command, tmp_path, capsys):
    changes, message = WRONG_REQUESTS[request_name]
    request = {flag: value for flag, value in (command | changes).items() if value is not None}
    error = error_of(request, capsys)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_draft_with_a_number_that_is_not_finite_is_no_start(command, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(command["--draft-checkpoint"], broken, ignore=shutil.ignore_patterns("checkpoint*"))
    weights = load_file(broken / "model.safetensors")
    weights["fc.weight"][0, 0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "`fc.weight` of the draft" in error_of(command | {"--draft-checkpoint": str(broken)}, capsys)


@pytest.mark.parametrize("num_bytes", [0, 100, 5000, -100])
def test_a_draft_whose_weights_are_cut_is_no_start(num_bytes, command, tmp_path, capsys):
    """In the length of the header, in the header, and in the weights."""
    cut = tmp_path / "cut"
    shutil.copytree(command["--draft-checkpoint"], cut, ignore=shutil.ignore_patterns("checkpoint*"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    error = error_of(command | {"--draft-checkpoint": str(cut)}, capsys)
    assert f"The weights in {cut} are damaged or incomplete (" in error


def test_a_target_is_no_draft_to_go_on_from(command, target_path, capsys):
    error = error_of(command | {"--draft-checkpoint": str(target_path)}, capsys)
    assert "must be a draft of type eagle3_mla, got llama" in error


def test_without_peft_the_request_says_what_to_install(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    assert "pip install 'eagle3-mla[peft]'" in error_of(command, capsys)
    assert not (tmp_path / "out").exists()


def test_resuming_as_something_else_is_refused(command, capsys):
    run(command | {"--max-steps": "2"})
    resume = command | {"--resume-from-checkpoint": "True"}
    assert "`r` is 2 in" in error_of(resume | {"--lora-rank": "3"}, capsys)
    del resume["--lora-rank"]
    assert "holds an adapter but the arguments train a draft" in error_of(resume, capsys)


def test_adapters_go_to_every_linear_layer_but_the_output_head():
    draft = tiny_draft(**ATTENTION["mla-R6-q-lora"])
    settings = DraftArguments(model_path="target", draft_checkpoint="draft", lora_rank=4)
    model = adapters.add_adapter(draft, settings)
    trained = {name.split(".")[-4] for name, weight in model.named_parameters() if weight.requires_grad}
    latent = {"q_a_proj", "q_b_proj", "W_dkv", "W_uk", "W_uv", "W_qr", "W_kr", "o_proj"}
    assert trained == latent | {"fc", "gate_proj", "up_proj", "down_proj"}
    assert adapters.base_draft(model) is adapters.base_draft(draft) is draft
