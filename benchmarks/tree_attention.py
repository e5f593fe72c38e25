"""Time of the target's attention to a draft tree, per layer, inside a CUDA graph.

61 nodes, 32 query heads and 8 key-value heads of 128, bfloat16. A graph holds the attention of several layers with
buffers of their own, up to 32 layers and at least as much as does not stay in the device's cache from one replay to
the next; times are of one layer. SDPA is what transformers runs for such a mask: keys and values repeated for every
query head, and a dense additive mask, which is made beforehand. GB/s counts keys and values of the text (of its part
in the window, if there is one) and the nodes once, queries and outputs. Buffers hold the text and the nodes; in the
rows with a larger capacity most of the buffer is empty, which SDPA reads all the same.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import BYTES_PER_GB, OUT_OF_MEMORY, write_table

from eagle3_mla.generation.tree_attention import attend_tree, visible_slots

NUM_NODES, NUM_HEADS, NUM_GROUPS, HEAD_DIM, DTYPE = 61, 32, 8, 128, torch.bfloat16
MAX_LAYERS, GRAPH_BYTES = 32, 400e6
NUM_REPLAYS = 50


@dataclass(frozen=True)
class Case:
    """Sequences of one length in buffers of `capacity` slots, of which a window may hold the newest ones."""

    batch_size: int
    length: int
    capacity: int
    window: int | None

    @property
    def bytes_moved(self) -> int:
        """Keys, values, queries and outputs of one layer."""
        num_seen = self.length if self.window is None else min(self.length, self.window - 1)
        per_sequence = 2 * NUM_GROUPS * (num_seen + NUM_NODES) + 2 * NUM_HEADS * NUM_NODES
        return self.batch_size * per_sequence * HEAD_DIM * DTYPE.itemsize

    @property
    def num_layers(self) -> int:
        return max(1, min(MAX_LAYERS, round(GRAPH_BYTES / self.bytes_moved)))


def make_cases(batch_sizes: list[int], lengths: list[int], window: int | None) -> list[Case]:
    """Each length in a buffer that it fills, and the shortest also in one for the longest."""
    capacities = {length: -(-(length + NUM_NODES) // 64) * 64 for length in lengths}
    cases = []
    for batch_size in batch_sizes:
        cases += [Case(batch_size, length, capacities[length], window) for length in lengths]
        cases.append(Case(batch_size, min(lengths), max(capacities.values()), window))
    return cases


def random_tree(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`attends (B, N, N)` and `depths (B, N)` of a tree in which every node has two children."""
    attends = torch.eye(NUM_NODES, dtype=torch.bool)
    for node in range(1, NUM_NODES):
        attends[node] |= attends[(node - 1) // 2]
    depths = attends.sum(dim=-1) - 1
    return attends.cuda().repeat(batch_size, 1, 1), depths.cuda().repeat(batch_size, 1)


def make_layers(case: Case) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Random queries, keys and values of each layer."""
    sizes = [(NUM_HEADS, NUM_NODES), (NUM_GROUPS, case.capacity), (NUM_GROUPS, case.capacity)]
    return [
        tuple(torch.randn(case.batch_size, *size, HEAD_DIM, device="cuda", dtype=DTYPE) for size in sizes)
        for _ in range(case.num_layers)
    ]


def ours(case: Case) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    lengths = torch.full((case.batch_size,), case.length, device="cuda")
    first_slots, scaling = torch.zeros_like(lengths), HEAD_DIM**-0.5
    attends, depths = random_tree(case.batch_size)
    arguments = lengths, first_slots, attends, depths, scaling, case.window
    return lambda query, keys, values: attend_tree(query, keys, values, *arguments)


def sdpa(case: Case) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """As transformers calls it, over the whole buffer."""
    lengths = torch.full((case.batch_size,), case.length, device="cuda")
    attends, depths = random_tree(case.batch_size)
    visible = visible_slots(case.capacity, lengths, torch.zeros_like(lengths), attends, depths, case.window)
    mask = torch.zeros(visible.shape, device="cuda", dtype=DTYPE).masked_fill(~visible, torch.finfo(DTYPE).min)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        keys, values = (repeat_heads(tensor) for tensor in (keys, values))
        output = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask[:, None], scale=HEAD_DIM**-0.5
        )
        return output.transpose(1, 2).contiguous()

    return attend


def repeat_heads(tensor: torch.Tensor) -> torch.Tensor:
    """`(B, G, K, d)` as `(B, H, K, d)`, copied."""
    copies = NUM_HEADS // NUM_GROUPS
    return tensor[:, :, None].expand(-1, -1, copies, -1, -1).reshape(tensor.shape[0], NUM_HEADS, *tensor.shape[2:])


def microseconds(attend: Callable, layers: list[tuple]) -> float | None:
    """Of one layer, the median of the replays of a graph of all; `None` if it does not fit into memory."""
    try:
        attend(*layers[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in layers:
                attend(*layer)
        graph.replay()
    except torch.OutOfMemoryError:
        return None
    times = sorted(replay_milliseconds(graph) for _ in range(NUM_REPLAYS))
    return 1000 * times[NUM_REPLAYS // 2] / len(layers)


def replay_milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def benchmark(case: Case) -> list[str]:
    torch.manual_seed(0)
    layers = make_layers(case)
    cells = [str(case.batch_size), str(case.length), str(case.capacity)]
    times = [microseconds(make(case), layers) for make in (ours, sdpa)]
    for time in times:
        if time is None:
            cells += [OUT_OF_MEMORY, ""]
        else:
            cells += [f"{time:.1f}", f"{case.bytes_moved / time * 1e6 / BYTES_PER_GB:.0f}"]
    return [*cells, "" if None in times else f"{times[1] / times[0]:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 8192, 32768])
    parser.add_argument("--window", type=int, help="slots that a node sees; absent: all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tree_attention.md"))
    arguments = parser.parse_args()
    columns = ["batch", "length", "capacity", "attend_tree, µs", "GB/s", "SDPA, µs", "GB/s", "ratio"]
    rows = []
    for case in make_cases(arguments.batch_sizes, arguments.lengths, arguments.window):
        torch.cuda.empty_cache()
        rows.append(benchmark(case))
        print(*rows[-1], flush=True)
        note = __doc__.replace("\n", " ")
        write_table(arguments.output, "Attention to a draft tree in the verification", columns, rows, note)


if __name__ == "__main__":
    main()
