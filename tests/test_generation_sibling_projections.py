"""Projections beside each other: who runs where and waits for whom, who may, and the same bits whichever is slow."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from captured_layers import (
    BIG,
    KINDS,
    NUM_REPLAYS,
    PAUSE,
    SMALL,
    assert_same_bits_without,
    captured_rounds,
    make_layers,
    replay_captured,
)
from fake_streams import FakeStreams
from peft import LoraConfig, get_peft_model
from reference_generation import TARGETS, make_draft, make_prompts, set_tree
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from eagle3_mla.generation import fused_target, streams
from eagle3_mla.generation.fused_target import fused_draft_operations, fused_operations
from eagle3_mla.generation.parallel_branches import parallel_branches as with_branches
from eagle3_mla.generation.sibling_projections import DRAFT_FAMILIES, TARGET_FAMILIES, Siblings
from eagle3_mla.generation.sibling_projections import sibling_projections as with_siblings

QKV = ("q_proj", "k_proj", "v_proj")
NAMES = {name for family in (*TARGET_FAMILIES, *DRAFT_FAMILIES) for name in family.names}
PLAIN_FORWARD = nn.Linear.forward


class Attention(nn.Module):
    """Three projections and no more."""

    def __init__(self):
        super().__init__()
        for name in QKV:
            self.add_module(name, nn.Linear(8, 6))


def watch(model: nn.Module, monkeypatch, note) -> None:
    """Has `note(name)` called before each of the projections of `model` computes anything."""
    names = {
        module: name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }

    def watched(self, input):
        if names.get(self) in NAMES:
            note(names[self])
        return PLAIN_FORWARD(self, input)

    monkeypatch.setattr(nn.Linear, "forward", watched)


@pytest.fixture
def fakes(monkeypatch) -> FakeStreams:
    return FakeStreams(monkeypatch)


@pytest.fixture
def attention(fakes, monkeypatch) -> Iterator[Attention]:
    """Whose projections are siblings, on streams that write down what they compute."""
    module = Attention()
    watch(module, monkeypatch, fakes.note)
    with torch.no_grad(), with_siblings(module, TARGET_FAMILIES):
        yield module


def lines_of(first: str, *others: str, event: int, sides: tuple[int, ...] = (1, 2), stream: str = "current"):
    """What happens where one of a family is asked first."""
    pairs = list(zip(sides, others, strict=False))
    return [
        f"{stream} records event {event}",
        *(f"side {side} waits for event {event}" for side, _ in pairs),
        *(f"{other} on side {side}" for side, other in pairs),
        f"{first} on {stream}",
        *(f"{stream} waits for side {side}" for side, _ in pairs),
    ]


@torch.no_grad()
def test_projections_of_a_target_run_beside_each_other(fakes, monkeypatch):
    target, prompt = TARGETS["llama"]().eval(), make_prompts([5, 3])
    expected = target(**prompt).logits
    watch(target, monkeypatch, fakes.note)
    with with_siblings(target, TARGET_FAMILIES):
        found = target(**prompt).logits
    layers = range(target.config.num_hidden_layers)
    assert fakes.log == [
        line
        for layer in layers
        for line in (*lines_of(*QKV, event=2 * layer + 1), *lines_of("gate_proj", "up_proj", event=2 * layer + 2))
    ]
    assert torch.equal(found, expected)


def lines_of_draft(kind: str) -> list[str]:
    """Event 1 is where `remember` parts from `ask`."""
    ask, remember = {
        "R0": (["q_proj on current"], ["W_dkv on side 0"]),
        "R64": (
            lines_of("q_proj", "W_qr", event=2),
            lines_of("W_dkv", "W_kr", event=3, sides=(2,), stream="side 0"),
        ),
        "gqa": (
            ["q_proj on current"],
            lines_of("k_proj", "v_proj", event=2, sides=(2,), stream="side 0"),
        ),
    }[kind]
    mlp = lines_of("gate_proj", "up_proj", event={"R0": 2, "R64": 4, "gqa": 3}[kind])
    join = ["side 0 waits for event 1", *remember, "current waits for side 0"]
    return ["current records event 1", *ask, *join, *mlp]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_projections_of_a_draft_run_beside_each_other_within_its_branches(kind, fakes, monkeypatch):
    draft, rows = make_layers(kind, SMALL), torch.randn(1, 3, 32)
    expected = draft(rows, fused_states=rows)
    watch(draft, monkeypatch, fakes.note)
    with with_siblings(draft, DRAFT_FAMILIES), with_branches(draft):
        found = draft(rows, fused_states=rows)
    assert fakes.log == lines_of_draft(kind)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.states, expected.states)


@pytest.mark.parametrize("name", QKV)
def test_all_streams_part_before_and_join_after_an_error_in_any_sibling(name, fakes, monkeypatch):
    """To wait for a stream that did not part is another error for a recording, which would hide the first."""
    module, states = Attention(), torch.randn(2, 8)

    def fail(each):
        fakes.note(each)
        if each == name:
            raise torch.OutOfMemoryError("no room")

    watch(module, monkeypatch, fail)
    with with_siblings(module, TARGET_FAMILIES), pytest.raises(torch.OutOfMemoryError, match="no room"):
        module.q_proj(states)
    parts = [f"side {side} waits for event 1" for side in (1, 2)]
    assert fakes.log[1:3] == parts
    assert fakes.log[-2:] == ["current waits for side 1", "current waits for side 2"]
    assert fakes.entered[-1].name == "current"


def test_after_an_error_everything_is_computed_anew(attention, fakes):
    states = torch.randn(2, 8)
    attention.q_proj(states)
    with pytest.raises(RuntimeError, match="shape"):
        attention.q_proj(torch.randn(2, 7))
    fakes.log.clear()
    attention.k_proj(states)
    assert fakes.log == lines_of("k_proj", "q_proj", "v_proj", event=1)


@pytest.mark.parametrize("first", QKV)
def test_whichever_is_asked_first_computes_all_and_each_output_is_given_once(first, attention, fakes):
    states = torch.randn(2, 8)
    others = [name for name in QKV if name != first]
    for name in 2 * (first, *reversed(others)):
        module = getattr(attention, name)
        assert torch.equal(module(states), PLAIN_FORWARD(module, states))
    assert fakes.log == lines_of(first, *others, event=1) + lines_of(first, *others, event=2)
    fakes.log.clear()
    attention.v_proj(states)
    attention.v_proj(states)
    assert fakes.log.count("v_proj on current") == 2


def test_states_that_were_written_to_are_projected_anew(attention, fakes):
    states = torch.randn(2, 8)
    attention.q_proj(states)
    states[0] += 1
    assert torch.equal(attention.k_proj(states), PLAIN_FORWARD(attention.k_proj, states))
    assert "k_proj on current" in fakes.log


def test_other_states_are_projected_anew_even_if_they_are_equal(attention, fakes):
    """As in an attention that asks one text and reads another."""
    states = torch.randn(2, 8)
    attention.q_proj(states)
    read = states.clone()
    for name in ("k_proj", "v_proj"):
        module = getattr(attention, name)
        assert torch.equal(module(read), PLAIN_FORWARD(module, read))
    assert fakes.log == lines_of(*QKV, event=1) + lines_of("k_proj", "q_proj", "v_proj", event=2)


def test_states_are_projected_anew_on_another_stream(attention, fakes):
    """That one has not waited for the siblings."""
    states = torch.randn(2, 8)
    attention.q_proj(states)
    with fakes.on(fakes.side(states.device, 0)):
        attention.k_proj(states)
    assert "k_proj on side 0" in fakes.log


def test_other_threads_compute_their_own_and_leave_what_this_one_has(attention, fakes):
    states, found = torch.randn(2, 8), []
    attention.q_proj(states)
    fakes.log.clear()
    thread = threading.Thread(target=lambda: found.append(attention.k_proj(states)))
    thread.start()
    thread.join()
    assert fakes.log == ["k_proj on current"]
    fakes.log.clear()
    assert torch.equal(attention.k_proj(states), found[0])
    assert not fakes.log


def test_inference_tensors_have_no_siblings(attention, fakes):
    with torch.inference_mode():
        states = torch.randn(2, 8)
        attention.q_proj(states)
        states += 1
        attention.k_proj(states)
    assert fakes.log == ["q_proj on current", "k_proj on current"]


def test_states_are_forgotten_with_the_last_output(attention):
    """They would stay in a graph's memory for every layer of the model."""
    states = torch.randn(2, 8)
    for name in QKV:
        getattr(attention, name)(states)
    reference = weakref.ref(states)
    del states
    assert reference() is None


def test_projections_take_their_input_by_its_name(attention):
    states = torch.randn(2, 8)
    assert torch.equal(attention.q_proj(input=states), PLAIN_FORWARD(attention.q_proj, states))


def test_gradients_are_those_of_projections_one_after_the_other(fakes):
    module, states = Attention().double(), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        outputs = [getattr(module, name)(states).tanh().sum() for name in QKV]
        return list(torch.autograd.grad(sum(outputs), [states, *module.parameters()]))

    expected = gradients()
    with with_siblings(module, TARGET_FAMILIES):
        for found, right in zip(gradients(), expected, strict=True):  # added up in another order
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


class Adapter(nn.Linear):
    """As those of quantised layers and adapters are."""


def give_hook(module: Attention) -> None:
    def double(projection, inputs) -> None:
        projection.weight.data = 2 * projection.weight

    module.k_proj.register_forward_pre_hook(double)


def give_plain_weight(module: Attention) -> None:
    """As older `weight_norm` does, which makes a new one in each forward."""
    weight = module.k_proj.weight.detach()
    del module.k_proj.weight
    module.k_proj.weight = weight


def give_own_forward(module: Attention) -> None:
    module.k_proj.forward = lambda states: states


UNRELATED = {
    "adapter": lambda module: setattr(module, "k_proj", Adapter(8, 6)),
    "nested": lambda module: setattr(module, "k_proj", nn.Sequential(nn.Linear(8, 6))),
    "own forward": give_own_forward,
    "other width": lambda module: setattr(module, "k_proj", nn.Linear(7, 6)),
    "other type": lambda module: module.k_proj.double(),
    "other device": lambda module: module.k_proj.to("meta"),
    "missing": lambda module: delattr(module, "k_proj"),
    "shared": lambda module: setattr(module, "k_proj", module.v_proj),
    "hook before it": give_hook,
    "weight that is no parameter": give_plain_weight,
    "weight of another kind": lambda module: setattr(module.k_proj, "weight", OtherWeight(torch.randn(6, 8))),
}


class OtherWeight(nn.Parameter):
    """As those of quantised weights are."""


@pytest.mark.parametrize("change", UNRELATED)
def test_projections_are_left_alone_where_one_is_not_like_the_others(change):
    module = Attention()
    UNRELATED[change](module)
    before = [dict(vars(each)) for each in module.modules()]
    with with_siblings(module, TARGET_FAMILIES):
        assert [dict(vars(each)) for each in module.modules()] == before


def test_projection_of_two_modules_belongs_to_the_first():
    first, second = Attention(), Attention()
    second.v_proj = first.v_proj
    with with_siblings(nn.ModuleList([first, second]), TARGET_FAMILIES):
        assert all("forward" in vars(each) for each in first.children())
        assert "forward" not in vars(second.q_proj)
    assert not any("forward" in vars(each) for each in (*first.children(), *second.children()))


@pytest.mark.parametrize(
    ("names", "are_siblings"),
    [
        (("q_a_proj", "kv_a_proj_with_mqa"), True),
        (("q_proj", "kv_a_proj_with_mqa"), True),
        (("gate_proj", "up_proj"), True),
        (("q_proj", "o_proj"), False),
        (("q_b_proj", "kv_b_proj"), False),
    ],
    ids=str,
)
def test_families_of_a_target(names, are_siblings):
    module = nn.ModuleDict({name: nn.Linear(8, 6) for name in names})
    with with_siblings(module, TARGET_FAMILIES):
        assert ["forward" in vars(each) for each in module.values()] == [are_siblings] * 2


@torch.no_grad()
def test_target_with_an_adapter_on_one_projection_has_the_other_families(fakes):
    target, prompt = TARGETS["llama"]().eval(), make_prompts([5, 3])
    target = get_peft_model(target, LoraConfig(target_modules=["k_proj"], init_lora_weights=False)).eval()
    expected = target(**prompt).logits
    with with_siblings(target, TARGET_FAMILIES):
        assert torch.equal(target(**prompt).logits, expected)
        layer = target.base_model.model.model.layers[0]
        assert not any("forward" in vars(each) for each in layer.self_attn.modules())
        assert "forward" in vars(layer.mlp.up_proj)


@torch.no_grad()
def test_hooks_behind_projections_run_with_what_they_change(fakes):
    target, prompt, called = TARGETS["llama"]().eval(), make_prompts([5, 3]), []

    def negate(module, inputs, output):
        called.append(module)
        return output.neg_()

    attention = target.model.layers[1].self_attn
    for name in QKV:
        getattr(attention, name).register_forward_hook(negate)
    expected = target(**prompt).logits
    with with_siblings(target, TARGET_FAMILIES):
        assert torch.equal(target(**prompt).logits, expected)
    assert called == 2 * [attention.q_proj, attention.k_proj, attention.v_proj]
    assert fakes.log


@torch.no_grad()
def test_hooks_before_projections_run_with_what_they_change(fakes):
    """Of the states, and even of the weights by which another projection would have computed ahead."""
    states, expected, found = torch.randn(2, 8), [], []
    for results, families in (expected, ()), (found, TARGET_FAMILIES):
        torch.manual_seed(0)
        module = Attention()
        give_hook(module)
        module.q_proj.register_forward_pre_hook(lambda projection, inputs: inputs[0] + 1)
        with with_siblings(module, families):
            results += [getattr(module, name)(states) for name in QKV]
    assert all(map(torch.equal, found, expected))


def test_own_forwards_are_back_after_an_error():
    module = Attention()

    def fail() -> None:
        with with_siblings(module, TARGET_FAMILIES):
            assert all("forward" in vars(each) for each in module.children())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any("forward" in vars(each) for each in module.children())


def test_siblings_are_among_the_fused_operations_and_gone_behind_them():
    target = TARGETS["llama"]().eval().bfloat16()
    draft = make_draft(target, mla_rope_dim=4).bfloat16()
    ours, theirs = target.model.layers[0], draft.layers[0]
    projections = [
        *(getattr(ours.self_attn, name) for name in QKV),
        *(getattr(theirs.self_attn, name) for name in ("q_proj", "W_qr", "W_dkv", "W_kr")),
        *(getattr(layer.mlp, name) for layer in (ours, theirs) for name in ("gate_proj", "up_proj")),
    ]
    with torch.no_grad(), fused_operations(target, draft):
        assert all(isinstance(each.forward.func.__self__, Siblings) for each in projections)
    assert not any("forward" in vars(each) for each in (*target.modules(), *draft.modules()))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_changes_on_the_cpu_nor_for_a_compiled_layer(kind):
    draft, rows = make_layers(kind, SMALL), torch.randn(2, 3, 32)
    compiled = torch.compile(draft.layers[0], backend="eager", fullgraph=True)
    cos_sin = draft.rotary_emb(torch.arange(3)[None], rows.dtype)
    inputs = {"cos_sin": cos_sin, "key_cos_sin": cos_sin, "mask": None}
    expected = draft.layers[0](rows, rows, **inputs)
    with with_siblings(draft, DRAFT_FAMILIES):
        assert torch.equal(draft.layers[0](rows, rows, **inputs), expected)
        assert torch.equal(compiled(rows, rows, **inputs), expected)


def test_compilers_get_one_projection_after_the_other(attention, fakes, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    attention.q_proj(torch.randn(2, 8))
    assert fakes.log == ["q_proj on current"]


def test_streams_on_the_side_are_never_the_same(monkeypatch):
    """Else one would be given memory again that it wrote for another branch, which still reads it."""
    made = iter(range(100))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: next(made) % 32)
    device, found = torch.device("cuda", 99), set()
    for index in range(3):
        found.add(streams.side_stream(device, index))
        for _ in range(31):
            torch.cuda.Stream(device, priority=-1)  # a library's
    streams.side_streams.cache_clear()
    assert len(found) == 3


class Layers(nn.Module):
    """Two layers of a target that feed each other, with attention by transformers' own code."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            hidden_size=BIG["hidden_size"],
            intermediate_size=BIG["intermediate_size"],
            num_attention_heads=BIG["num_attention_heads"],
            num_key_value_heads=4,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(2))
        angles = torch.randn(1, 10, config.head_dim)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = layer(states, position_embeddings=(self.cos, self.sin), attention_mask=None)
        return states


def captured_layers(layers: Layers, num_replays: int) -> list[torch.Tensor]:
    return replay_captured(layers, 1, BIG["hidden_size"], num_replays)


def slow_down(name: str, model: nn.Module, monkeypatch) -> None:
    """Pauses the stream before and behind each projection of this name."""
    slow = {module for path, module in model.named_modules() if path.endswith(f".{name}")}
    assert slow

    def slowed(self, input):
        if self not in slow:
            return PLAIN_FORWARD(self, input)
        torch.cuda._sleep(PAUSE)
        output = PLAIN_FORWARD(self, input)
        torch.cuda._sleep(PAUSE)
        return output

    monkeypatch.setattr(nn.Linear, "forward", slowed)


def one_after_the_other(monkeypatch) -> None:
    monkeypatch.setattr(fused_target, "sibling_projections", lambda model, families: nullcontext())
    monkeypatch.setattr(fused_target, "parallel_branches", lambda draft: nullcontext())


@pytest.mark.gpu
def test_captured_siblings_of_a_target_give_the_same_bits_in_every_replay():
    layers = Layers().cuda().bfloat16().eval()
    expected = captured_layers(layers, NUM_REPLAYS)
    with with_siblings(layers, TARGET_FAMILIES):
        found = captured_layers(layers, NUM_REPLAYS)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], found[1])
    assert found[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_siblings_of_a_target_wait_for_each_other_whichever_is_slow(name, monkeypatch):
    """What one reads may not be there yet, or what it was given be overwritten too early."""
    layers = Layers().cuda().bfloat16().eval()
    expected = captured_layers(layers, 3)
    slow_down(name, layers, monkeypatch)
    with with_siblings(layers, TARGET_FAMILIES):
        assert all(map(torch.equal, captured_layers(layers, 3), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_siblings_of_a_draft_give_the_same_bits_in_every_replay(kind, monkeypatch):
    draft = make_layers(kind, BIG, num_layers=2).cuda().bfloat16()
    assert_same_bits_without(partial(one_after_the_other, monkeypatch), draft)


SLOW = {
    "R0": ["q_proj", "W_dkv", "o_proj", "gate_proj", "up_proj"],
    "R64": ["q_proj", "W_qr", "W_dkv", "W_kr", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gqa": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
}


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in SLOW.items() for name in names])
def test_siblings_of_a_draft_wait_for_each_other_whichever_is_slow(kind, name, monkeypatch):
    draft = make_layers(kind, BIG, num_layers=2).cuda().bfloat16()
    with monkeypatch.context() as patch:
        one_after_the_other(patch)
        with fused_draft_operations(draft):
            expected = captured_rounds(draft, 3)
    slow_down(name, draft, monkeypatch)
    with fused_draft_operations(draft):
        assert all(map(torch.equal, captured_rounds(draft, 3), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("name", QKV)
def test_recording_that_breaks_off_in_a_sibling_leaves_all_streams_usable(name, monkeypatch):
    """The error is its own, not that of a stream which never parted."""
    layers, stream = Layers().cuda().bfloat16().eval(), torch.cuda.current_stream()
    expected = captured_layers(layers, 3)

    def fail(each):
        if each == name and torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        watch(layers, patch, fail)
        with with_siblings(layers, TARGET_FAMILIES), pytest.raises(torch.OutOfMemoryError, match="no room"):
            captured_layers(layers, 1)
    assert torch.cuda.current_stream() == stream

    def ask(each):
        if each == name:
            torch.zeros(1, device="cuda").item()

    with monkeypatch.context() as patch:
        watch(layers, patch, ask)
        with with_siblings(layers, TARGET_FAMILIES), pytest.raises(RuntimeError, match="captur"):
            captured_layers(layers, 1)
    assert torch.cuda.current_stream() == stream
    with with_siblings(layers, TARGET_FAMILIES):
        assert all(map(torch.equal, captured_layers(layers, 3), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, {"mla_rope_dim": 4}, {"attention_type": "gqa"}], ids=str)
def test_captured_rounds_have_siblings_and_the_texts_of_none(kind, monkeypatch):
    target = TARGETS["llama"]().eval().cuda().bfloat16()
    prompt = {name: tensor.cuda() for name, tensor in make_prompts([9, 5]).items()}
    settings = {**prompt, "max_new_tokens": 100, "do_sample": False}
    compute_all, recorded, texts = Siblings.compute_all, [], []

    def counted(siblings, name, states, current):
        recorded.append(torch.cuda.is_current_stream_capturing())
        return compute_all(siblings, name, states, current)

    monkeypatch.setattr(Siblings, "compute_all", counted)
    for has_siblings in True, False:
        if not has_siblings:
            one_after_the_other(monkeypatch)
        torch.manual_seed(0)
        draft = set_tree(make_draft(target, **kind), 8, 3, 3).cuda().bfloat16()  # with graphs of its own
        recorded.clear()
        texts.append(target.generate(**settings, assistant_model=draft).tolist())
        assert any(recorded) == has_siblings
    assert texts[0] == texts[1]
