"""One step of drafting at long contexts: MLA with the kernels, MLA in plain PyTorch, and standard attention.

The head of an 8B target: 32 query heads and 8 key-value heads of 128, hidden 4096, MLP 14336, bfloat16, batch 1; MLA
with C = 256, R = 0 and R = 64. `width` new rows attend to the context and, each, to itself. "Attention" is what lies
between query and output projection, the projections that MLA moves there included; "layer" is the draft's whole layer
as captured rounds run it, with their kernels (norms, RoPE, gate, cache) and streams, whatever the attention.
Times are medians of CUDA graphs, the L2 cache emptied before each. TFLOP/s and GB/s are attention's: FLOPs that the
absorbed form needs (R = 0: its keys made once), bytes of the cache, read once. "cache" is what the draft's cache has
allocated for the context, a quarter more than it holds. `flash` is standard attention without a mask, a bound for what
a tree mask could reach.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from harness import BYTES_PER_GB, OUT_OF_MEMORY, write_table

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.generation.caches import new_draft_cache
from eagle3_mla.generation.fused_target import fused_draft_operations
from eagle3_mla.generation.latent_attention import DraftedSlots, UpProjections, attend_latents
from eagle3_mla.generation.slot_writing import write_to_slots
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel, sdpa_attention

LATENT_DIM = 256
NUM_REPLAYS = 20
BYTES_PER_MB = 1e6
FLUSHED_BYTES = 256 * 1024**2
# Name, attention type, R, how attention runs.
VARIANTS = [
    ("MLA R = 0, kernel", "mla", 0, "kernel"),
    ("MLA R = 0, PyTorch", "mla", 0, "plain"),
    ("MLA R = 64, kernel", "mla", 64, "kernel"),
    ("MLA R = 64, PyTorch", "mla", 64, "plain"),
    ("standard, SDPA", "gqa", 0, "plain"),
    ("standard, flash", "gqa", 0, "unmasked"),
]
Heads = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Step:
    """
    A draft's only layer and what one step of drafting reads.

    Args:
        draft ([`Eagle3MLADraftModel`]): With random weights.
        memory (`tuple[torch.Tensor, torch.Tensor]`): What the cache holds, the new rows last.
        rows (`torch.Tensor` of shape `(1, W, D)`): Embeddings and states of the new rows.
    """

    draft: Eagle3MLADraftModel
    memory: tuple[torch.Tensor, torch.Tensor]
    rows: torch.Tensor

    def __post_init__(self):
        self.layer, self.rotary = self.draft.layers[0], self.draft.rotary_emb
        width, num_slots = self.rows.shape[1], self.memory[0].shape[2]
        device, dtype = self.rows.device, self.rows.dtype
        self.num_context = num_slots - width
        slots = torch.arange(num_slots, device=device)[None]
        self.slots = slots[:, self.num_context :]
        # Siblings: one depth of a tree.
        positions = slots.clamp(max=self.num_context)
        self.key_cos_sin = self.rotary(positions, dtype)
        self.cos_sin = tuple(part[:, -width:] for part in self.key_cos_sin)
        sees = torch.eye(width, dtype=torch.bool, device=device)[None]
        self.drafted = DraftedSlots(sees, positions[:, -width:].int())
        hidden = torch.zeros(1, 1, width, num_slots, dtype=dtype, device=device)
        hidden[..., self.num_context :].masked_fill_(~sees, torch.finfo(dtype).min)
        self.mask = None if width == 1 else hidden
        self.lengths = torch.tensor([num_slots], dtype=torch.int32, device=device)

    def run(self, attend: Heads) -> torch.Tensor:
        """The whole layer; its new rows enter the cache."""
        layer, attention = self.layer, self.layer.self_attn
        attention_input = layer.attention_input(self.rows, self.rows)
        query = attention.ask(attention_input, self.cos_sin)
        write_to_slots(*self.memory, self.slots, *attention.remember(attention_input, self.cos_sin))
        return layer.finish(layer.residual(attention_input, self.rows), attention.output(attend(query)))

    def attend_plain(self, query: torch.Tensor) -> torch.Tensor:
        """As the model does: MLA in the cheaper of its two forms, or standard attention."""
        attention = self.layer.self_attn
        if attention.config.attention_type == "gqa":
            return sdpa_attention(query, *self.memory, self.mask, attention.scaling)
        absorbs = attention.absorbing_is_cheaper(query.shape[2])
        attend = attention.attend_absorbed if absorbs else attention.attend_expanded
        return attend(query, self.memory, self.key_cos_sin, self.mask)

    def attend_unmasked(self, query: torch.Tensor) -> torch.Tensor:
        attention = self.layer.self_attn
        return torch.nn.functional.scaled_dot_product_attention(
            query, *self.memory, scale=attention.scaling, enable_gqa=True
        )

    def attend_by_kernel(self, query: torch.Tensor) -> torch.Tensor:
        attention = self.layer.self_attn
        matrices = attention.up_projections(self.memory[0])
        projections = UpProjections(*matrices, self.rotary.inv_freq, self.rotary.attention_scaling)
        return attend_latents(query, *self.memory, projections, self.lengths, attention.scaling, self.drafted)


def make_draft(attention_type: str, rope_dim: int) -> Eagle3MLADraftModel:
    config = Eagle3MLAConfig(
        vocab_size=1024,
        draft_vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        attention_type=attention_type,
        attn_implementation="sdpa",
        **({"mla_latent_dim": LATENT_DIM, "mla_rope_dim": rope_dim} if attention_type == "mla" else {}),
    )
    with torch.device("cuda"):
        return Eagle3MLADraftModel(config).eval().bfloat16()


def make_memory(config: Eagle3MLAConfig, num_slots: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
    """A draft cache full of random numbers: its tensors, and the bytes that the device gave for it."""
    if config.attention_type == "gqa":
        sizes = [(config.num_key_value_heads, config.head_dim)] * 2
    else:
        sizes = [(1, config.mla_latent_dim), (1, config.mla_rope_dim)]
    states = [torch.randn(1, heads, num_slots, size, device="cuda", dtype=torch.bfloat16) for heads, size in sizes]
    num_before = torch.cuda.memory_allocated()
    cache = new_draft_cache()
    memory = cache.update(*states, 0)
    return memory, torch.cuda.memory_allocated() - num_before


def flops_per_slot(config: Eagle3MLAConfig, width: int) -> int:
    num_queries, head_dim = config.num_attention_heads * width, config.head_dim
    if config.attention_type == "gqa":
        return 4 * num_queries * head_dim
    latent, rope = config.mla_latent_dim, config.mla_rope_dim
    if rope > 0:
        return 2 * num_queries * (2 * latent + rope)
    return 2 * num_queries * (head_dim + latent) + 2 * latent * config.num_key_value_heads * head_dim


def graph_milliseconds(function: Callable[[], torch.Tensor]) -> float:
    """Median time of a replay on a cold L2 cache."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    milliseconds = []
    for _ in range(NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return sorted(milliseconds)[NUM_REPLAYS // 2]


@torch.no_grad()
def benchmark(variant: tuple[str, str, int, str], num_context: int, width: int) -> list[str]:
    name, attention_type, rope_dim, kind = variant
    cell = [name, str(num_context), str(width)]
    torch.manual_seed(0)
    try:
        draft = make_draft(attention_type, rope_dim)
        memory, num_bytes = make_memory(draft.config, num_context + width)
        step = Step(draft, memory, torch.randn(1, width, 4096, device="cuda", dtype=torch.bfloat16))
        attends = {"kernel": step.attend_by_kernel, "plain": step.attend_plain, "unmasked": step.attend_unmasked}
        attend = attends[kind]
        query = torch.randn(1, 32, width, draft.config.head_dim + rope_dim, device="cuda", dtype=torch.bfloat16)
        attention_ms = graph_milliseconds(partial(attend, query))
        with fused_draft_operations(draft):
            layer_ms = graph_milliseconds(partial(step.run, attend))
    except torch.OutOfMemoryError:
        return [*cell, OUT_OF_MEMORY]
    num_read = sum(part.numel() * part.element_size() for part in memory)
    flops = flops_per_slot(draft.config, width) * memory[0].shape[2]
    return [
        *cell,
        f"{attention_ms:.3f}",
        f"{layer_ms:.3f}",
        f"{flops / attention_ms / 1e9:.1f}",
        f"{1000 * num_read / attention_ms / BYTES_PER_GB:.0f}",
        f"{num_bytes / BYTES_PER_MB:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768, 131072])
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/draft_step.md"))
    arguments = parser.parse_args()
    columns = ["attention", "context", "width", "attention, ms", "layer, ms", "TFLOP/s", "GB/s", "cache, MB"]
    rows = []
    for num_context in arguments.contexts:
        for width in arguments.widths:
            for variant in VARIANTS:
                if variant[3] == "unmasked" and width == 1:
                    continue
                torch.cuda.empty_cache()
                rows.append(benchmark(variant, num_context, width))
                print(*rows[-1], flush=True)
                write_table(arguments.output, "One step of drafting", columns, rows, __doc__.replace("\n", " "))


if __name__ == "__main__":
    main()
