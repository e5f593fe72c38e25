"""What graphs are kept by: whatever a model computes by in Python; and what happens where that changes by itself."""

import copy
import gc
import weakref
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from reference_generation import TARGETS, make_draft, make_prompt, make_prompts, set_tree
from torch import nn
from torch.nn.utils import parametrize

from eagle3_mla.generation import fixed_rounds, obstacles, shelf
from eagle3_mla.generation.fingerprint import Fingerprint


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return TARGETS["llama"]().eval()


@pytest.fixture
def captures(monkeypatch) -> list:
    """Lets rounds on the CPU be kept, as on CUDA; returns the captures, which run what they would record."""
    made = []

    def capture(rounds, fuses, compile_config):
        made.append(rounds.plan)
        for stage in rounds._stages():
            stage()

    monkeypatch.setattr(shelf, "can_capture", lambda device: True)
    monkeypatch.setattr(shelf, "memory_of", lambda device: 2**40)
    monkeypatch.setattr(fixed_rounds.FixedRounds, "capture", capture)
    return made


def make_fixed(target):
    draft = set_tree(make_draft(target), 12, 3, 4)
    draft.generation_config.fixed_shapes = True
    return draft


def assert_plain_text(target, draft, prompt) -> torch.Tensor:
    plain = target.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(target.generate(**prompt, max_new_tokens=12, do_sample=False, assistant_model=draft), plain)
    return plain


@dataclass
class Settings:
    strengths: list
    table: dict


class Steered(nn.Module):
    """An MLP with a control vector; what a forward may read lies in fields of all kinds."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.alpha, self.vector = block, None, 3 * torch.randn(32)
        self.settings, self.plain_object = Settings([1.0, 2.0], {"layer": 1}), SimpleNamespace(alpha=1)
        self.pair, self.dtype, self.scale, self.function = (1, [2]), torch.float32, 1, partial(torch.add, alpha=1)
        self.hidden, self.constants = [nn.ReLU()], {"low": [1.0], "high": [2.0]}
        self.constant = self.constants["low"]

    def forward(self, states):
        states = self.block(states)
        return states if self.alpha is None else states + self.alpha * self.vector


class Control:
    """Of no special kind."""

    def __init__(self):
        self.alpha, self.others, self.strengths = 1.0, [self], {"all": 1.0}


@dataclass(slots=True)
class SlottedSettings:
    strength: float = 1.0


class SlottedControl:
    """Takes no weak reference."""

    __slots__ = ("__hidden", "alpha", "held")

    def __init__(self, held=None):
        self.alpha, self.__hidden, self.held = 1.0, 1.0, held

    def hide(self, value):
        self.__hidden = value


def steer(target) -> Steered:
    layer = target.model.layers[1]
    layer.mlp = type("OwnSteered", (Steered,), {"beta": 1.0})(layer.mlp)
    layer.mlp.control, layer.mlp.slotted_control = Control(), SlottedControl()
    layer.mlp.slotted_settings = SlottedSettings()
    layer.mlp.slotted_control.held = SlottedControl(nn.ReLU())
    layer.mlp.steps = nn.Sequential(nn.ReLU(), nn.GELU(), nn.ReLU())
    layer.mlp.window, layer.mlp.order = slice(0, 4), range(4)
    layer.mlp.read_only = MappingProxyType(layer.mlp.constants)
    return layer.mlp


def set_field(target, name: str, value):
    setattr(target.model.layers[1].mlp, name, value)


CHANGES = {
    "number": lambda target: set_field(target, "alpha", 1.0),
    "type of a number": lambda target: set_field(target, "scale", 1.0),
    "truth": lambda target: set_field(target, "scale", True),
    "dtype": lambda target: set_field(target, "dtype", torch.float16),
    "new field": lambda target: set_field(target, "new", None),
    "tensor": lambda target: set_field(target, "vector", torch.randn(32)),
    "inside a tuple": lambda target: target.model.layers[1].mlp.pair[1].append(3),
    "list in a dataclass": lambda target: target.model.layers[1].mlp.settings.strengths.__setitem__(0, 1.5),
    "dict in a dataclass": lambda target: target.model.layers[1].mlp.settings.table.update(layer=2),
    "namespace": lambda target: setattr(target.model.layers[1].mlp.plain_object, "alpha", 2),
    "object": lambda target: setattr(target.model.layers[1].mlp.control, "alpha", 2.0),
    "dict in an object": lambda target: target.model.layers[1].mlp.control.strengths.update(all=2.0),
    "slots of an object": lambda target: setattr(target.model.layers[1].mlp.slotted_control, "alpha", 2.0),
    "slots of a dataclass": lambda target: setattr(target.model.layers[1].mlp.slotted_settings, "strength", 2.0),
    "hidden slot of an object": lambda target: target.model.layers[1].mlp.slotted_control.hide(2.0),
    "slots of an object in slots": lambda target: setattr(target.model.layers[1].mlp.slotted_control.held, "alpha", 2),
    "module in slots": lambda target: target.model.layers[1].mlp.slotted_control.held.held.eval(),
    "another object in slots": lambda target: setattr(
        target.model.layers[1].mlp.slotted_control, "held", SlottedControl(nn.ReLU())
    ),
    "slice": lambda target: set_field(target, "window", slice(0, 5)),
    "range": lambda target: set_field(target, "order", range(5)),
    "mapping that is read only": lambda target: set_field(target, "read_only", MappingProxyType({"low": 1.0})),
    "another of two lists": lambda target: set_field(target, "constant", target.model.layers[1].mlp.constants["high"]),
    "class of a module": lambda target: setattr(target.model.layers[1].mlp.steps[2], "__class__", nn.GELU),
    "class": lambda target: setattr(type(target.model.layers[1].mlp), "beta", 2.0),
    "function of a class": lambda target: setattr(type(target.model.layers[1].mlp), "helper", lambda self: 1),
    "another object": lambda target: set_field(target, "control", Control()),
    "argument of a partial": lambda target: set_field(target, "function", partial(torch.add, alpha=2)),
    "module in a list": lambda target: target.model.layers[1].mlp.hidden.append(nn.ReLU()),
    "module": lambda target: set_field(target, "block", copy.copy(target.model.layers[1].mlp.block)),
    "buffer": lambda target: target.model.layers[1].mlp.register_buffer("shift", torch.zeros(1)),
    "no bias": lambda target: target.lm_head.register_parameter("bias", nn.Parameter(torch.zeros(11))),
    "training": lambda target: target.model.layers[1].train(),
    "scaling of an attention": lambda target: setattr(target.model.layers[0].self_attn, "scaling", 2.0),
    "epsilon": lambda target: setattr(target.model.norm, "variance_epsilon", 1.0),
    "configuration": lambda target: setattr(target.config, "final_logit_softcapping", 1.0),
    "rope in the configuration": lambda target: target.config.rope_parameters.update(rope_theta=5.0),
    "attention": lambda target: target.set_attn_implementation("eager"),
    "weights elsewhere": lambda target: setattr(target.lm_head.weight, "data", target.lm_head.weight.data.clone()),
    "weights transposed": lambda target: setattr(
        target.model.layers[1].self_attn.q_proj.weight, "data", target.model.layers[1].self_attn.q_proj.weight.data.t()
    ),
    "parametrization": lambda target: parametrize.register_parametrization(target.lm_head, "weight", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_forward_may_read_makes_another_fingerprint(llama, change):
    steer(llama)
    before = Fingerprint(llama)
    assert Fingerprint(llama) == before
    assert hash(Fingerprint(llama)) == hash(before)
    change(llama)
    assert Fingerprint(llama) != before


def test_traced_module_has_a_fingerprint(llama):
    llama.traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    assert Fingerprint(llama) == Fingerprint(llama)


def test_what_is_as_before_has_the_fingerprint_of_before(llama):
    mlp = steer(llama)
    before = Fingerprint(llama)
    for name, value in {"alpha": 2.0, "vector": torch.zeros(32), "block": nn.Identity()}.items():
        old = getattr(mlp, name)
        setattr(mlp, name, value)
        assert Fingerprint(llama) != before
        setattr(mlp, name, old)
        assert Fingerprint(llama) == before


def test_code_at_the_address_of_code_that_is_gone_is_told_apart(llama):
    mlp = llama.model.layers[1].mlp
    prints = []
    for _ in range(20):
        mlp.forward = lambda states: states
        prints.append(Fingerprint(llama))
        del mlp.forward
    assert len(set(prints)) == 20


def test_variable_of_a_function_is_told_apart(llama):
    mlp, alpha = llama.model.layers[1].mlp, 1.0
    forward = mlp.forward
    mlp.forward = lambda states: alpha * forward(states)
    before = Fingerprint(llama)
    alpha = 2.0
    assert Fingerprint(llama) != before


def test_class_that_a_module_also_holds_is_looked_into(llama):
    mlp = steer(llama)
    mlp.kind = type(mlp)
    before = Fingerprint(llama)
    mlp.kind.beta = 2.0
    assert Fingerprint(llama) != before


def test_adapter_of_another_scale_has_another_fingerprint(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    before, layer = Fingerprint(llama), llama.model.layers[1].self_attn.q_proj
    layer.scale_layer(0.5)
    assert Fingerprint(llama) != before
    layer.unscale_layer()
    assert Fingerprint(llama) == before
    with model.disable_adapter():
        assert Fingerprint(llama) != before
    assert Fingerprint(llama) == before


def test_fingerprint_keeps_no_model():
    def take() -> tuple[list[Fingerprint], list[weakref.ref]]:
        target = TARGETS["llama"]().eval()
        mlp, draft = steer(target), make_fixed(target)
        forward = mlp.forward
        mlp.forward, mlp.whole = lambda states: forward(states), [target, draft]
        return [Fingerprint(target), Fingerprint(draft)], [weakref.ref(target), weakref.ref(draft)]

    kept, models = take()
    gc.collect()
    assert [model() for model in models] == [None, None]
    assert len(set(kept)) == 2


@dataclass(slots=True)
class SlottedReference:
    model: nn.Module


# Objects that take no weak reference, each around a model.
HOLDERS = {
    "slots": SlottedControl,
    "slots of a dataclass": SlottedReference,
    "namespace": lambda model: SimpleNamespace(model=model),
    "mapping that is read only": lambda model: MappingProxyType({"model": model}),
    "slice": lambda model: slice(0, model),
    "method of C": lambda model: model.__str__.__call__,
    "iterator": lambda model: iter([model]),
    "exception": lambda model: ValueError(model),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_what_takes_no_weak_reference_keeps_no_model(hold):
    """As the value of a dictionary with weak keys it would keep its own key."""
    target = TARGETS["llama"]().eval()
    target.holder = hold(target)
    with pytest.raises(TypeError, match="weak reference"):
        weakref.ref(target.holder)
    kept, model = Fingerprint(target), weakref.ref(target)
    assert Fingerprint(target) == kept
    del target
    gc.collect()
    assert model() is None


def test_class_that_refers_to_a_model_keeps_it_not():
    """Its functions have taken the model from where they were defined."""

    def close_over(target) -> type:
        class Closed(nn.Module):
            def forward(self, states):
                return target.model.norm(states)

        return Closed

    target = TARGETS["llama"]().eval()
    target.model.layers[1].mlp = close_over(target)()
    kept, model = Fingerprint(target), weakref.ref(target)
    assert Fingerprint(target) == kept
    del target
    gc.collect()
    assert model() is None


def test_class_at_the_address_of_a_class_that_is_gone_is_told_apart(llama):
    prints, addresses = set(), set()
    for _ in range(20):
        llama.model.layers[1].helper = type("Helper", (), {})()
        addresses.add(id(type(llama.model.layers[1].helper)))
        prints.add(Fingerprint(llama))
        del llama.model.layers[1].helper
        gc.collect()
    assert len(prints) == 20


def test_what_a_call_leaves_behind_a_weak_proxy_changes_no_fingerprint(llama):
    draft = make_fixed(llama)
    llama.drafts = [weakref.proxy(draft)]
    prints = []
    for _ in range(2):
        assert_plain_text(llama, draft, make_prompt(6))
        prints.append(Fingerprint(llama))
    assert prints[0] == prints[1]


def plain_target(name: str):
    return TARGETS[name]().eval()


def adapted_target():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=True)
    return peft.get_peft_model(plain_target("llama"), config).eval().base_model.model


def compiled_target():
    target = plain_target("llama")
    target.model.layers[1].mlp = torch.compile(target.model.layers[1].mlp, backend="eager")
    target.model.layers[2].mlp.compile(backend="eager")
    target.model.layers[3].mlp.forward = torch.compile(target.model.layers[3].mlp.forward, backend="eager")
    return target


def parametrized_target():
    target = plain_target("llama")
    parametrize.register_parametrization(target.model.layers[1].mlp.up_proj, "weight", nn.Tanh())
    return target


USUAL_TARGETS = {name: partial(plain_target, name) for name in TARGETS} | {
    "adapters": adapted_target,
    "compiled modules": compiled_target,
    "parametrized": parametrized_target,
}


@pytest.mark.parametrize("make", USUAL_TARGETS.values(), ids=USUAL_TARGETS)
def test_usual_models_keep_their_graphs(make, captures):
    target, prompts = make(), [make_prompt(6), make_prompts([6, 4]), make_prompt(6), make_prompts([6, 4])]
    draft = make_fixed(target)
    can_capture = target.config.model_type not in ("bloom", "gpt_neo")
    for num_captures, prompt in zip([1, 2, 2, 2], prompts, strict=True):
        assert_plain_text(target, draft, prompt)
        assert len(captures) == num_captures * can_capture
    prints = Fingerprint(target), Fingerprint(draft)
    assert_plain_text(target, draft, prompts[0])
    assert (Fingerprint(target), Fingerprint(draft)) == prints


HEADS = [{"mla_rope_dim": 4, "mla_q_lora_rank": 8}, {"attention_type": "gqa"}, {"fc_norm": True, "norm_output": True}]


@pytest.mark.parametrize("fields", HEADS, ids=str)
def test_heads_keep_their_graphs(llama, fields, captures):
    draft = set_tree(make_draft(llama, **fields), 5, 1, 5)
    draft.generation_config.fixed_shapes = True
    for _ in range(3):
        assert_plain_text(llama, draft, make_prompt(6))
    assert len(captures) == 1


def test_control_vector_of_another_strength_gets_rounds_of_its_own(llama, captures):
    mlp, draft, texts, prompt = steer(llama), make_fixed(llama), set(), make_prompt(6)
    for alpha, num_captures in [(None, 1), (1.0, 2), (5.0, 3), (1.0, 3), (None, 3)]:
        mlp.alpha = alpha
        texts.add(str(assert_plain_text(llama, draft, prompt).tolist()))
        assert len(captures) == num_captures
    assert len(texts) == 3


class Counting(nn.Module):
    """Changes with every forward, or with the first ones."""

    def __init__(self, block: nn.Module, num_changes: float):
        super().__init__()
        self.block, self.num_changes, self.num_seen = block, num_changes, 0

    def forward(self, states):
        self.num_seen = min(self.num_seen + (states.shape[1] == 13), self.num_changes)  # over a tree
        return self.block(states)


def test_model_that_changes_with_every_forward_is_refused_once(llama, captures, caplog, monkeypatch):
    monkeypatch.setattr(obstacles, "_reasons_given", set())
    layer = llama.model.layers[1]
    layer.mlp = Counting(layer.mlp, num_changes=float("inf"))
    draft = make_fixed(llama)
    for num_captures in (2, 4, 6, 6, 6):
        assert_plain_text(llama, draft, make_prompt(6))
        assert draft.speculation_stats.rounds > 0
        assert len(captures) == num_captures
    assert [message for message in caplog.messages if "not captured" in message] == [
        "Rounds of LlamaForCausalLM are not captured as CUDA graphs: what its modules, or the draft's, hold in Python "
        "changes while it generates."
    ]
    other = TARGETS["llama"]().eval()
    assert_plain_text(other, draft, make_prompt(6))
    assert len(captures) == 7


def test_model_that_is_changed_during_one_call_is_captured_in_the_next(llama, captures):
    """Another thread may have done it."""
    layer = llama.model.layers[1]
    layer.mlp = Counting(layer.mlp, num_changes=3)
    draft = make_fixed(llama)
    for num_captures in (2, 3, 3):
        assert_plain_text(llama, draft, make_prompt(6))
        assert len(captures) == num_captures


def test_model_that_makes_something_once_is_captured(llama, captures, caplog):
    layer = llama.model.layers[1]
    layer.mlp = Counting(layer.mlp, num_changes=1)
    draft = make_fixed(llama)
    for _ in range(3):
        assert_plain_text(llama, draft, make_prompt(6))
    assert len(captures) == 2
    assert not any("not captured" in message for message in caplog.messages)
