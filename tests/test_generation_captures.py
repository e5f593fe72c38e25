"""Ways to capture a round: the best that works, what is lost is said once, and what failed is not tried again."""

import logging

import pytest
import torch
from reference_generation import TARGETS, make_draft, make_prompt, set_tree
from transformers import CompileConfig

from eagle3_mla.generation import fixed_rounds, obstacles, shelf

COMPILED_FUSED, COMPILED, FUSED, PLAIN = (True, True), (True, False), (False, True), (False, False)
BROKEN_COMPILER = RuntimeError("Failed to find C compiler.\nSet CC, or install one:\n  ...")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
OWN_ATTENTION = NotImplementedError("attention with ['output_router_logits'] and a window of None")
ASKS_THE_DEVICE = RuntimeError("CUDA error: operation not permitted when stream is capturing\nAdvice.")

WITHOUT_FUSED = "Rounds of LlamaForCausalLM are captured without fused operations: {}."
WITHOUT_COMPILER = "Rounds of LlamaForCausalLM are captured without `compile_config`: {}."
NOT_CAPTURED = "Rounds of LlamaForCausalLM are not captured as CUDA graphs: {}."
ASKED = "RuntimeError: CUDA error: operation not permitted when stream is capturing"
MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB"
COMPILER = "RuntimeError: Failed to find C compiler"
MORE = "NotImplementedError: attention with ['output_router_logits'] and a window of None"

# Whether both are compiled, what fails, what two calls with new texts try, and what the log says.
CASES = {
    "nothing fails": (False, {}, [FUSED], []),
    "nothing fails, compiled": (True, {}, [COMPILED_FUSED], []),
    "kernel": (False, {FUSED: ASKS_THE_DEVICE}, [FUSED, PLAIN], [("WARNING", WITHOUT_FUSED.format(ASKED))]),
    "own attention": (False, {FUSED: OWN_ATTENTION}, [FUSED, PLAIN], [("INFO", WITHOUT_FUSED.format(MORE))]),
    "memory": (False, {FUSED: OUT_OF_MEMORY}, [FUSED, FUSED, PLAIN], [("WARNING", WITHOUT_FUSED.format(MEMORY))]),
    "compiler": (
        True,
        {COMPILED_FUSED: BROKEN_COMPILER, COMPILED: BROKEN_COMPILER},
        [COMPILED_FUSED, COMPILED, FUSED],
        [("WARNING", WITHOUT_COMPILER.format(COMPILER))],
    ),
    "compiler on own attention": (
        True,
        {COMPILED_FUSED: OWN_ATTENTION},
        [COMPILED_FUSED, COMPILED],
        [("INFO", WITHOUT_FUSED.format(MORE))],
    ),
    "compiler and kernel": (
        True,
        {COMPILED_FUSED: BROKEN_COMPILER, COMPILED: BROKEN_COMPILER, FUSED: ASKS_THE_DEVICE},
        [COMPILED_FUSED, COMPILED, FUSED, PLAIN],
        [("WARNING", WITHOUT_COMPILER.format(COMPILER)), ("WARNING", WITHOUT_FUSED.format(ASKED))],
    ),
    "everything": (
        True,
        dict.fromkeys([COMPILED_FUSED, COMPILED, FUSED, PLAIN], ASKS_THE_DEVICE),
        [COMPILED_FUSED, COMPILED, FUSED, PLAIN],
        [("WARNING", NOT_CAPTURED.format(ASKED))],
    ),
    "memory for nothing": (
        False,
        {FUSED: OUT_OF_MEMORY, PLAIN: OUT_OF_MEMORY},
        2 * [FUSED, FUSED, PLAIN, PLAIN],
        [("WARNING", NOT_CAPTURED.format(MEMORY))],
    ),
}


@pytest.mark.parametrize(("is_compiled", "errors", "expected", "lines"), CASES.values(), ids=CASES)
def test_best_way_that_works_is_taken_and_losses_are_said_once(
    is_compiled, errors, expected, lines, monkeypatch, caplog
):
    tried = []

    def capture(rounds, fuses, compile_config):
        tried.append((compile_config is not None, fuses))
        if tried[-1] in errors:
            raise errors[tried[-1]]

    monkeypatch.setattr(obstacles, "_reasons_given", set())
    monkeypatch.setattr(shelf, "can_capture", lambda device: True)
    monkeypatch.setattr(shelf, "memory_of", lambda device: 2**40)
    monkeypatch.setattr(fixed_rounds.FixedRounds, "capture", capture)
    monkeypatch.setattr(shelf, "can_fuse", lambda target: True)
    caplog.set_level(logging.INFO, obstacles.__name__)
    target = TARGETS["llama"]().eval()
    draft, prompt = set_tree(make_draft(target), 12, 3, 4), make_prompt(6)
    draft.generation_config.fixed_shapes = True
    draft.generation_config.compile_config = CompileConfig() if is_compiled else None
    plain = target.generate(**prompt, max_new_tokens=8, do_sample=False)
    for _ in range(2):
        assert torch.equal(target.generate(**prompt, max_new_tokens=8, do_sample=False, assistant_model=draft), plain)
    assert tried == expected
    records = [record for record in caplog.records if record.name == obstacles.__name__]
    assert [(record.levelname, record.message) for record in records] == lines


def test_target_whose_attention_cannot_be_replaced_is_known():
    target = TARGETS["bloom"]()
    assert shelf.Failure.of(RuntimeError("The size of tensor a must match."), target).is_known
    assert not shelf.Failure.of(RuntimeError("The size of tensor a must match."), TARGETS["llama"]()).is_known
    assert shelf.Failure.of(RuntimeError(), target).reason == "RuntimeError"


def test_other_buffers_go_before_rounds_are_left_uncaptured(monkeypatch, caplog):
    """Those of a shorter text, say, where the device has room for the graphs of one of them."""
    target, num_kept = TARGETS["llama"]().eval(), []

    def capture(rounds, fuses, compile_config):
        num_kept.append(sum(map(len, shelf._kept[target.device].values())))
        if num_kept[-1] > 0:
            raise OUT_OF_MEMORY

    monkeypatch.setattr(obstacles, "_reasons_given", set())
    monkeypatch.setattr(shelf, "_kept", {})
    monkeypatch.setattr(shelf, "can_capture", lambda device: True)
    monkeypatch.setattr(shelf, "memory_of", lambda device: 2**40)
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 32)
    monkeypatch.setattr(fixed_rounds.FixedRounds, "capture", capture)
    draft, prompt = set_tree(make_draft(target), 5, 1, 5), make_prompt(6)
    draft.generation_config.fixed_shapes = True
    plain = target.generate(**prompt, max_new_tokens=60, do_sample=False)
    assert torch.equal(target.generate(**prompt, max_new_tokens=60, do_sample=False, assistant_model=draft), plain)
    assert num_kept[:3] == [0, 1, 0]
    assert not caplog.messages
