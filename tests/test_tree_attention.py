"""Attention of a tree's nodes against softmax over each node's own path, and its kernels against its definition."""

import math
from dataclasses import dataclass

import pytest
import torch

from eagle3_mla.generation import tree_attention as module
from eagle3_mla.generation.tree_attention import attend_tree, attend_tree_by_definition

in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a case; one length and one first slot per row."""

    lengths: tuple[int, ...]
    first: tuple[int, ...]
    num_heads: int = 4
    num_groups: int = 2
    num_nodes: int = 6
    key_dim: int = 16
    value_dim: int = 16
    spare: int = 20

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.lengths))
        heads = f"H{self.num_heads}-G{self.num_groups}-N{self.num_nodes}"
        return f"T{sizes}-{heads}-d{self.key_dim}-dv{self.value_dim}"


def random_parents(batch_size: int, num_nodes: int) -> torch.Tensor:
    """A parent for every node, before it; the root is its own."""
    places = torch.rand(batch_size, num_nodes) * torch.arange(num_nodes)
    return places.floor().long()


def ancestors(parents: list[int], node: int) -> list[int]:
    """A node and those above it."""
    path = [node]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    return path


def tree_masks(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`attends (B, N, N)` and `depths (B, N)`."""
    batch_size, num_nodes = parents.shape
    attends = torch.zeros(batch_size, num_nodes, num_nodes, dtype=torch.bool)
    for row, row_parents in enumerate(parents.tolist()):
        for node in range(num_nodes):
            attends[row, node, ancestors(row_parents, node)] = True
    return attends, attends.sum(dim=-1) - 1


def random_buffer(shape: Shape, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A view with gaps between its slots; what lies outside of the text is NaN."""
    lengths, first = torch.tensor(shape.lengths)[:, None], torch.tensor(shape.first)[:, None]
    num_slots = max(shape.lengths) + shape.num_nodes + shape.spare
    buffer = torch.randn(len(shape.lengths), num_slots, shape.num_groups, width + 8).to(dtype)
    slot = torch.arange(num_slots)
    buffer[(slot < first) | (slot >= lengths + shape.num_nodes)] = torch.nan
    return buffer[..., :width].transpose(1, 2)


def random_case(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[dict, torch.Tensor]:
    """Arguments of `attend_tree`, and the nodes' parents `(B, N)`."""
    batch_size = len(shape.lengths)
    parents = random_parents(batch_size, shape.num_nodes)
    attends, depths = tree_masks(parents)
    query = torch.randn(batch_size, shape.num_nodes, shape.num_heads, shape.key_dim).to(dtype).transpose(1, 2)
    arguments = {
        "query": query,
        "keys": random_buffer(shape, shape.key_dim, dtype),
        "values": random_buffer(shape, shape.value_dim, dtype),
        "lengths": torch.tensor(shape.lengths),
        "first_slots": torch.tensor(shape.first),
        "attends": attends,
        "depths": depths,
        "scaling": 2 * shape.key_dim**-0.5,
    }
    return arguments, parents


def attend_paths(arguments: dict, parents: torch.Tensor, window=None, softcap=None, sinks=None) -> torch.Tensor:
    """For each node a softmax over the committed tokens and its ancestors, one number at a time."""
    query, keys, values = (arguments[name] for name in ("query", "keys", "values"))
    lengths, first = arguments["lengths"].tolist(), arguments["first_slots"].tolist()
    batch_size, num_heads, num_nodes, _ = query.shape
    output = query.new_zeros(batch_size, num_heads, num_nodes, values.shape[-1])
    for row, row_parents in enumerate(parents.tolist()):
        for node in range(num_nodes):
            path = ancestors(row_parents, node)
            slots = [*range(first[row], lengths[row]), *(lengths[row] + ancestor for ancestor in reversed(path))]
            # The tokens of a path follow each other, whatever slots they lie in.
            slots = slots if window is None else slots[-window:]
            for head in range(num_heads):
                group = head // (num_heads // keys.shape[1])
                scores = [(query[row, head, node] @ keys[row, group, slot]).item() for slot in slots]
                scores = [score * arguments["scaling"] for score in scores]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                weights = [math.exp(score) for score in scores]
                total = sum(weights) + (0 if sinks is None else math.exp(sinks[head]))
                for slot, weight in zip(slots, weights, strict=True):
                    output[row, head, node] += weight / total * values[row, group, slot]
    return output


SMALL = Shape(lengths=(9, 4, 0), first=(0, 2, 0), num_nodes=5, key_dim=6, value_dim=4)
OPTIONS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)},
    "all": {"window": 6, "softcap": 2.0, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_node_attends_to_the_text_and_its_ancestors(option):
    arguments, parents = random_case(SMALL)
    expected = attend_paths(arguments, parents, **OPTIONS[option])
    torch.testing.assert_close(attend_tree(**arguments, **OPTIONS[option]), expected, atol=1e-12, rtol=1e-12)


def blind_case(dtype: torch.dtype) -> dict:
    """Nodes of which the odd ones see nothing at all."""
    arguments, _ = random_case(Shape(lengths=(7, 3), first=(7, 3)), dtype)
    arguments["attends"][:, 1::2] = False
    return arguments


def test_a_node_that_sees_nothing_gets_zeros():
    output = attend_tree(**blind_case(torch.float64))
    assert output[:, :, 1::2].eq(0).all()
    assert output[:, :, ::2].ne(0).all()


def on_device(arguments: dict, device: str) -> dict:
    """On another device; the order of the axes in memory is kept."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}


def compare_with_definition(shape: Shape, dtype: torch.dtype, device: str = "cpu", **settings) -> None:
    """Kernels on rounded inputs against the definition on the same inputs in fp64."""
    from eagle3_mla.generation.tree_attention_triton import attend

    arguments, _ = random_case(shape, dtype)
    arguments = on_device(arguments, device)
    options = {name: value for name, value in settings.items() if name != "num_splits"}
    exact = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    expected = attend_tree_by_definition(**exact, **options)
    result = attend(**arguments, **settings)
    assert result.dtype == dtype
    assert relative_error(result, expected) <= TOLERANCES[dtype]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    assert result.shape == expected.shape
    return (result.double() - expected).abs().max() / expected.abs().max()


# Lengths at, below and above a tile's boundary, nodes across it, padded rows, odd widths and group sizes.
INTERPRETED = [
    Shape(lengths=(150, 64, 5), first=(0, 0, 0)),
    Shape(lengths=(130, 63), first=(70, 3), num_heads=6, num_groups=2, key_dim=80, value_dim=80, num_nodes=3),
    Shape(lengths=(61,), first=(0,), num_heads=2, num_groups=1, key_dim=48, value_dim=32, num_nodes=37),
    Shape(lengths=(33, 0), first=(0, 0), num_heads=2, num_groups=2, key_dim=192, value_dim=128, num_nodes=1),
]


@in_interpreter
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("shape", INTERPRETED, ids=str)
def test_kernels_equal_the_definition_in_the_interpreter(shape, num_splits):
    pytest.importorskip("triton")
    compare_with_definition(shape, torch.float32, num_splits=num_splits)


def random_options(num_heads: int) -> dict[str, dict]:
    """Windows shorter than a tree, than a tile, and longer than one; and the rest."""
    sinks = torch.randn(num_heads)
    return {
        "window 2": {"window": 2},
        "window 20": {"window": 20},
        "window 100": {"window": 100},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": sinks},
        "all": {"window": 90, "softcap": 3.0, "sinks": sinks},
    }


@in_interpreter
@pytest.mark.parametrize("option", random_options(4))
def test_windows_softcaps_and_sinks_equal_the_definition_in_the_interpreter(option):
    pytest.importorskip("triton")
    shape = Shape(lengths=(200, 70), first=(150, 0), num_nodes=20)
    compare_with_definition(shape, torch.float32, num_splits=2, **random_options(4)[option])


@in_interpreter
def test_deep_nodes_whose_window_begins_among_the_nodes_equal_the_definition_in_the_interpreter():
    """A chain of several blocks of rows: the last block reads neither the text nor the first nodes."""
    pytest.importorskip("triton")
    from eagle3_mla.generation.tree_attention_triton import attend

    shape = Shape(lengths=(10,), first=(0,), num_heads=1, num_groups=1, num_nodes=90)
    arguments, _ = random_case(shape, torch.float32)
    arguments["attends"] = torch.ones(1, 90, 90, dtype=torch.bool).tril()
    arguments["depths"] = torch.arange(90)[None]
    expected = attend_tree_by_definition(**arguments, window=3).double()
    assert relative_error(attend(**arguments, window=3, num_splits=2), expected) <= 2e-5


def compare_random_texts(seed: int, dtype: torch.dtype, device: str, max_length: int, **sizes: int) -> None:
    """Padded texts that are longer than their window, as long, or shorter."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, max_length, (2,)).tolist()
    shape = Shape(tuple(lengths), tuple(int(torch.randint(length, ())) for length in lengths), **sizes)
    options = [{}, {"softcap": 2.0}, {"softcap": 3.0, "sinks": torch.randn(shape.num_heads, device=device)}][seed % 3]
    for window in (max(lengths) // 3 + 1, lengths[0] - shape.first[0], max_length + shape.num_nodes):
        compare_with_definition(shape, dtype, device, window=window, num_splits=seed + 1, **options)


@in_interpreter
@pytest.mark.parametrize("seed", range(3))
def test_windows_of_every_size_equal_the_definition_in_the_interpreter(seed):
    pytest.importorskip("triton")
    num_nodes = [1, 9, 20][seed]
    compare_random_texts(seed, torch.float32, "cpu", 70, num_heads=2, num_groups=1, num_nodes=num_nodes, value_dim=8)


def compare_beyond_a_window(window: int, lengths: tuple[int, ...], tile: int, device: str) -> None:
    """What no node sees is NaN, but for the tile that also holds something seen."""
    from eagle3_mla.generation.tree_attention_triton import attend

    arguments, _ = random_case(Shape(lengths, (0,) * len(lengths)), torch.float32)
    for row, length in enumerate(lengths):
        first_read = (length - window + 1) // tile * tile
        assert first_read > 0
        for name in ("keys", "values"):
            arguments[name][row, :, :first_read] = torch.nan
    arguments = on_device(arguments, device)
    clean = arguments | {name: arguments[name].nan_to_num() for name in ("keys", "values")}
    expected = attend_tree_by_definition(**clean, window=window).double()
    assert relative_error(attend(**arguments, window=window), expected) <= 2e-5


@in_interpreter
def test_text_before_all_windows_is_not_read_in_the_interpreter():
    """Otherwise a window would cost as much as the whole text."""
    pytest.importorskip("triton")
    compare_beyond_a_window(20, (200, 77, 48), 16, "cpu")


@in_interpreter
def test_half_precision_equals_the_definition_in_the_interpreter():
    pytest.importorskip("triton")
    compare_with_definition(INTERPRETED[0], torch.float16, num_splits=2)


@in_interpreter
@pytest.mark.parametrize("option", ["window 20", "sinks", "all"])
def test_kernels_give_zeros_to_nodes_that_see_nothing_in_the_interpreter(option):
    pytest.importorskip("triton")
    from eagle3_mla.generation.tree_attention_triton import attend

    arguments, options = blind_case(torch.float32), random_options(4)[option]
    output = attend(**arguments, **options, num_splits=2)
    assert output[:, :, 1::2].eq(0).all()
    assert relative_error(output, attend_tree_by_definition(**arguments, **options).double()) <= 2e-5


def test_double_precision_and_very_wide_heads_never_reach_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(module, "can_run_kernels", lambda device: True)
    narrow, wide = torch.zeros(1, 1, 1, 256), torch.zeros(1, 1, 1, 272)
    assert not module.runs_on_triton(narrow.double(), narrow.double())
    assert not module.runs_on_triton(narrow, wide)
    assert not module.runs_on_triton(wide, narrow)
    assert module.runs_on_triton(narrow, narrow)


def large(*lengths: int, **sizes) -> Shape:
    """An 8B model's attention over a tree of 61 nodes."""
    first = tuple(5 * row for row in range(len(lengths)))
    defaults = {"num_heads": 32, "num_groups": 8, "num_nodes": 61, "key_dim": 128, "value_dim": 128, "spare": 3000}
    return Shape(lengths=lengths, first=first, **(defaults | sizes))


LARGE = [large(512), large(3000), large(33000), large(700, 3000, 17)]
WIDTHS = [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256)]
ODD = [large(777, 300, key_dim=key_dim, value_dim=value_dim) for key_dim, value_dim in WIDTHS]
ODD += [
    large(1000, 90, num_heads=14, num_groups=2, num_nodes=33),
    large(1000, 90, num_heads=8, num_groups=8, num_nodes=1),
    large(1000, 90, num_heads=8, num_groups=1, num_nodes=128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [*LARGE, *ODD], ids=str)
def test_kernels_equal_the_definition_on_a_gpu(shape, dtype):
    compare_with_definition(shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("option", random_options(32))
def test_windows_softcaps_and_sinks_equal_the_definition_on_a_gpu(option, dtype):
    options = on_device(random_options(32)[option], "cuda")
    compare_with_definition(large(3000, 90, 700), dtype, "cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_windows_of_every_size_equal_the_definition_on_a_gpu(seed, dtype):
    width, num_nodes = [64, 128, 256][seed // 4], [1, 17, 61, 128][seed % 4]
    sizes = {"num_heads": 16, "num_groups": 4, "num_nodes": num_nodes, "key_dim": width, "value_dim": width}
    compare_random_texts(seed, dtype, "cuda", 3000, **sizes)


@pytest.mark.gpu
def test_text_before_all_windows_is_not_read_on_a_gpu():
    compare_beyond_a_window(1024, (33000, 3000), 16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100], ids=str)
def test_a_captured_graph_serves_every_length_and_nothing_waits_for_the_device(window):
    shape = large(2500, 2500)
    arguments, _ = random_case(shape, torch.float32)
    for name in ("keys", "values"):
        arguments[name] = torch.randn_like(arguments[name])
    arguments = on_device(arguments, "cuda") | {"window": window}
    attend_tree(**arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend_tree(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend_tree(**arguments)
    for lengths in ([2500, 2500], [0, 77], [64, 2400]):
        arguments["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        assert relative_error(output, attend_tree_by_definition(**arguments).double()) <= 2e-5
