"""Compiled rounds: what a compiler makes of them."""

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core
from transformers import DynamicCache

from eagle3_mla.generation.fixed_cache import FixedCache

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
