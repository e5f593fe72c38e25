"""Operations that have a Triton kernel, on a GPU where Triton cannot run: PyTorch's stand in, and the log says why."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eagle3_mla.generation import (
    fused_draft_layer,
    fused_mlp,
    fused_norm,
    fused_residual,
    fused_rope,
    fused_target,
    kernels,
    latent_attention,
    levels,
    notices,
    slot_writing,
    steps,
    top_tokens,
    tree_attention,
)
from eagle3_mla.generation import tree as tree_module

PACKAGE = kernels.__package__
KERNELS = [f"{PACKAGE}.{path.stem}" for path in Path(kernels.__file__).parent.glob("*_triton.py")]


@pytest.fixture(params=["not installed", "no C compiler"])
def broken_triton(request, monkeypatch):
    """Tensors that pass for a GPU's, and kernels that cannot be had; what the log then says."""
    for name in KERNELS:
        monkeypatch.setitem(sys.modules, name, None)  # to import one is an error
    if request.param == "not installed":
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
        reason = "Triton is not installed"
    else:
        pytest.importorskip("triton")
        monkeypatch.setitem(sys.modules, f"{PACKAGE}.fused_kernels_triton", SimpleNamespace(gate=fail))
        reason = "RuntimeError: no C compiler"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(latent_attention, "shared_memory", lambda device: latent_attention.MIN_SHARED_MEMORY)
    forget()
    yield reason
    forget()


def fail(*arguments):
    raise RuntimeError("no C compiler")


def forget() -> None:
    kernels.can_run_kernels.cache_clear()
    notices.warn_once.cache_clear()


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def latents() -> tuple:
    projections = latent_attention.UpProjections(half(2, 8, 16), half(2, 8, 16))
    lengths = torch.tensor([5], dtype=torch.int32)
    return half(1, 4, 3, 24), half(1, 1, 6, 16), half(1, 1, 6, 16), projections, lengths, 0.2


def tree() -> tuple:
    lengths, first_slots = torch.tensor([4]), torch.tensor([1])
    attends, depths = torch.ones(1, 2, 2, dtype=torch.bool).tril(), torch.tensor([[0, 1]])
    return half(1, 4, 2, 8), half(1, 2, 7, 8), half(1, 2, 7, 8), lengths, first_slots, attends, depths, 0.3


def norm() -> fused_norm.UsualNorm:
    return fused_norm.usual_norm(LlamaRMSNorm(8).half())


def sum_and_norm(function) -> tuple:
    torch.manual_seed(1)
    return function(half(2, 8), half(2, 8), norm())


def written(write) -> torch.Tensor:
    torch.manual_seed(1)
    keys, values = half(1, 2, 5, 4), half(1, 2, 5, 4)
    write(keys, values, torch.tensor([[3, 1]]), half(1, 2, 2, 4), half(1, 2, 2, 4))
    return torch.cat([keys, values])


def angles(function) -> tuple:
    torch.manual_seed(1)
    heads = half(1, 4, 3, 8), half(1, 2, 3, 8)
    return function(*heads, half(1, 3, 8), half(1, 3, 8))


class Rotary(torch.nn.Module):
    def forward(self, position_ids, dtype):
        return position_ids.to(dtype).cos(), position_ids.to(dtype).sin()


def both_norms(function) -> torch.Tensor:
    torch.manual_seed(1)
    return function(norm(), norm(), half(2, 8), half(2, 8))


def grown(grow) -> tuple:
    torch.manual_seed(1)
    log_probs, draft_ids = -torch.rand(2, 1, 3), torch.tensor([[[4, 0, 2]], [[1, 2, 3]]])
    roots = levels.Frontier.of_roots(2, torch.device("cpu"))
    level, frontier = grow(roots, log_probs, draft_ids, torch.ones(5, dtype=torch.long), 6)
    return *vars(level).values(), frontier.scores, frontier.token_ids, frontier.sees


def built(build) -> tuple:
    torch.manual_seed(1)
    parents, scores = torch.tensor([[-1, -1, 0, 0, 1]]), torch.tensor([[-1.0, -0.5, -1.5, -3.0, -2.0]])
    tree = build(torch.tensor([[7]]), torch.arange(5)[None], parents, scores, 3)
    return tree.token_ids, tree.parents, tree.preferred


def stepped(take) -> tuple:
    tree = tree_module.build_chain(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    standing = steps.Standing(torch.tensor([3, 4]), torch.tensor(9), torch.zeros(2, dtype=torch.bool), None, None)
    taken = steps.Steps(*torch.zeros(2, 2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    return take(tree, torch.tensor([[2, 3, 1], [5, 1, 1]]), standing, taken), *vars(taken).values()


def seeded(function, make, *more):
    torch.manual_seed(1)
    return function(*make(), *more)


PARENTS = torch.tensor([[0, 0, 1, 1]])
OPERATIONS = {
    "attention to latents": (
        lambda: seeded(latent_attention.attend_latents, latents),
        lambda: seeded(latent_attention.attend_by_definition, latents),
    ),
    "attention to trees": (
        lambda: seeded(tree_attention.attend_tree, tree),
        lambda: seeded(tree_attention.attend_tree_by_definition, tree),
    ),
    "norm": (
        lambda: seeded(lambda states: norm()(states), lambda: [half(3, 8)]),
        lambda: seeded(
            lambda states: fused_norm.normalise_by_definition(states, *vars(norm()).values()), lambda: [half(3, 8)]
        ),
    ),
    "sum and norm": (
        lambda: sum_and_norm(fused_residual.add_and_normalise),
        lambda: sum_and_norm(fused_residual.add_and_normalise_by_definition),
    ),
    "rotation": (lambda: angles(fused_rope.rotate_heads), lambda: angles(fused_rope.rotate_by_definition)),
    "angles": (
        lambda: fused_rope.cos_sin_at(Rotary(), torch.arange(3), torch.float16),
        lambda: Rotary()(torch.arange(3), torch.float16),
    ),
    "gate": (
        lambda: seeded(fused_mlp.gate, lambda: (half(2, 8), half(2, 8)), "silu"),
        lambda: seeded(fused_mlp.gate_by_definition, lambda: (half(2, 8), half(2, 8)), "silu"),
    ),
    "best tokens": (
        lambda: seeded(top_tokens.best_log_probs, lambda: [half(2, 64)], 4),
        lambda: seeded(lambda scores, k: scores.float().log_softmax(-1).topk(k), lambda: [half(2, 64)], 4),
    ),
    "highest token": (
        lambda: seeded(top_tokens.highest, lambda: [half(2, 2048)]),
        lambda: seeded(lambda scores: scores.argmax(dim=-1), lambda: [half(2, 2048)]),
    ),
    "both norms": (
        lambda: both_norms(fused_draft_layer.normalise_both),
        lambda: both_norms(fused_draft_layer.normalise_both_by_definition),
    ),
    "level": (lambda: grown(levels.grow), lambda: grown(levels.grow_by_definition)),
    "tree": (lambda: built(tree_module.build_tree), lambda: built(tree_module.build_by_definition)),
    "who sees whom": (
        lambda: tree_module.DraftTree(PARENTS, PARENTS).attends,
        lambda: tree_module.attends_by_definition(PARENTS, 2),
    ),
    "steps": (lambda: stepped(steps.take_steps), lambda: stepped(steps.take_by_definition)),
    "writing": (lambda: written(slot_writing.write_to_slots), lambda: written(slot_writing.write_by_definition)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_where_triton_cannot_run_pytorch_does_and_the_log_says_why_once(name, broken_triton, caplog):
    run, define = OPERATIONS[name]
    expected = define()
    for _ in range(2):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    assert len(caplog.messages) == 1
    assert broken_triton in caplog.messages[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_where_triton_can_run_nothing_is_said(caplog):
    pytest.importorskip("triton")
    forget()
    assert kernels.can_run_kernels(torch.device("cpu"))
    assert caplog.messages == []


def test_all_operations_and_devices_together_say_it_once(broken_triton, caplog):
    for run, _ in OPERATIONS.values():
        run()
    assert not kernels.can_run_kernels(torch.device("cpu:0"))  # not asked about before
    assert len(caplog.messages) == 1


def test_a_gpu_without_kernels_captures_the_target_with_its_own_code(monkeypatch):
    """The definitions of the fused operations stand in for kernels in the tests; nothing is gained by them."""
    target = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    for can_run in (True, False):
        monkeypatch.setattr(fused_target, "can_run_kernels", lambda device, can_run=can_run: can_run)
        assert fused_target.can_fuse(target) is can_run
    target.device = torch.device("cpu")
    assert fused_target.can_fuse(target)
