"""Compiled rounds: the text is that of plain generation, and a compiler copies no cache."""

import shutil
from functools import partial

import pytest
import torch
from reference_generation import TARGETS, make_draft, make_prompts, set_tree
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core
from transformers import CompileConfig, DynamicCache

from eagle3_mla.generation import notices, shelf
from eagle3_mla.generation.compilation import compiled
from eagle3_mla.generation.fixed_cache import FixedCache

WAYS = {"own-attention": False, "attention-to-trees": True}
# Key-value heads, widths of keys and values: a target's and a draft's without decoupled RoPE.
CACHES = {"heads": (3, 8, 8), "latents": (1, 16, 0)}


def make_cache(num_groups: int, *widths: int, capacity: int = 40) -> FixedCache:
    """Two layers, which lie in one tensor."""
    like = DynamicCache()
    for index in range(2):
        like.update(*(torch.randn(2, num_groups, 3, width) for width in widths), index)
    return FixedCache(like, capacity)


@pytest.mark.parametrize("shape", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_compiler_writes_into_slots_where_they_are(shape):
    """
    Where it cannot see that nobody wants what was there before, Inductor copies a cache whole, in every layer.

    It can if what is written into is an input of the graph: views of one count as somebody else's.
    """
    cache, expected, graphs = make_cache(*shape), make_cache(*shape), []
    slots, states = torch.tensor([[3, 4], [7, 9]]), [torch.randn(2, shape[0], 2, width) for width in shape[1:]]
    for each in (cache, expected):
        each.write_at(slots)

    def write_and_read(cache: FixedCache) -> list[torch.Tensor]:
        return [2 * each for layer in cache.layers for each in layer.update(*states)]

    def reinplaced(graph: fx.GraphModule, inputs) -> fx.GraphModule:
        reinplace_inplaceable_ops_core(graph.graph)
        graph.recompile()
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=reinplaced, keep_inference_input_mutations=True)  # as Inductor's
    found = torch.compile(write_and_read, backend=backend)(cache)
    assert all(map(torch.equal, found, write_and_read(expected)))
    assert all(map(torch.equal, cache.stacks.values(), expected.stacks.values()))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("aten.index_put_.default") == 4
    assert not {"aten.index_put.default", "aten.copy_.default"} & set(targets)


def assert_plain_text(target, draft, prompts: list[dict[str, torch.Tensor]]) -> None:
    """The texts outgrow their first buffers."""
    for prompt in prompts:
        settings = {"max_new_tokens": 40, "do_sample": False, **prompt}
        plain = target.generate(**settings)
        assert torch.equal(target.generate(**settings, assistant_model=draft), plain)
        assert sum(draft.speculation_stats.accepted_by_depth) > 0
        assert draft.speculation_stats.choice_seconds > 0


def compile_on_the_cpu(monkeypatch, config: CompileConfig, fuses: bool) -> None:
    """What is recorded on a GPU runs as it is in every round."""
    new_rounds = shelf.Shelf._new_rounds

    def run(stage, of: shelf.Shelf):
        with compiled(config, of.target, of.draft):
            return stage()

    def new(of: shelf.Shelf, size):
        rounds = new_rounds(of, size)
        rounds.listener.thread, rounds.fuses, rounds.is_compiled = None, fuses, True
        rounds.draft_trees, rounds.verify = partial(run, rounds.draft_trees, of), partial(run, rounds.verify, of)
        return rounds

    monkeypatch.setattr(shelf.Shelf, "_new_rounds", new)


@pytest.mark.parametrize("fixed_shapes", [None, True, False])
def test_log_says_once_where_nothing_is_compiled(fixed_shapes, caplog):
    """A backend that does not exist is not missed there."""
    target = TARGETS["llama"]().eval()
    draft = set_tree(make_draft(target), 4, 2, 2)
    draft.generation_config.fixed_shapes = fixed_shapes
    notices.warn_once.cache_clear()

    def ignored() -> list[str]:
        target.generate(**make_prompts([5]), max_new_tokens=4, do_sample=False, assistant_model=draft)
        return [message for message in caplog.messages if "`compile_config`" in message]

    assert ignored() == []
    draft.generation_config.compile_config = CompileConfig(backend="no_such_backend")
    for _ in range(2):
        assert len(ignored()) == 1
    assert "only where their rounds are captured as CUDA graphs" in ignored()[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("fuses", WAYS.values(), ids=WAYS)
def test_compiled_rounds_give_the_plain_text_on_the_cpu(fuses, monkeypatch):
    """An operation that says it writes into two parts of one tensor got one of them shifted by PyTorch 2.11."""
    target = TARGETS["llama"]().eval()
    draft = set_tree(make_draft(target), 12, 3, 4)
    draft.generation_config.fixed_shapes = True
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 48)
    compile_on_the_cpu(monkeypatch, CompileConfig(dynamic=False, mode="default"), fuses)
    assert_plain_text(target, draft, [make_prompts([12, 5, 9])])


@pytest.mark.gpu
@pytest.mark.parametrize("fuses", WAYS.values(), ids=WAYS)
def test_compiled_and_captured_rounds_give_the_plain_text(fuses, monkeypatch):
    target = TARGETS["llama"]().eval().cuda()
    draft = set_tree(make_draft(target), 12, 3, 4).cuda()
    draft.generation_config.compile_config = CompileConfig(dynamic=False, mode="default")
    monkeypatch.setattr(shelf, "LEAST_CAPACITY", 48)
    monkeypatch.setattr(shelf, "can_fuse", lambda target: fuses)
    prompts = [make_prompts([9], num_padding=2), make_prompts([12, 5, 9])]
    assert_plain_text(target, draft, [{name: each.cuda() for name, each in prompt.items()} for prompt in prompts])
