"""Time and memory of one attention layer over the training unroll: seven TTT steps, forward and backward.

The layer has the width of an 8B target's head: 32 query heads and 8 key-value heads of 128, input 8192, output 4096,
bfloat16. Memory includes the seven inputs, their gradients and the weights. The limit is the time that the matrix
products alone would take at the rate that a large one reaches on this device, each counted once: forward, twice that
for the backward, nothing for what is computed again.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import OUT_OF_MEMORY, matrix_product_rate, measure, write_table

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.training.arguments import ATTENTION_BACKENDS
from eagle3_mla.training.rotary import fused_rotate
from eagle3_mla.training.ttt import TTTDraftModel, attend_jointly, recomputed

NUM_TTT_STEPS = 7
GEOMETRIES = [(4, 2176), (1, 8192)]
NUM_CALLS = 5


def make_model(attention_type: str, attn_implementation: str, **overrides) -> TTTDraftModel:
    """A head of the shape of an 8B target's on the GPU; the vocabulary is small, as nothing here reads it."""
    config = Eagle3MLAConfig(
        vocab_size=1024,
        draft_vocab_size=1024,
        hidden_size=4096,
        intermediate_size=1024,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        attention_type=attention_type,
        attn_implementation=attn_implementation,
        **overrides,
    )
    return TTTDraftModel(config).to("cuda", torch.bfloat16)


def run_unroll(model: TTTDraftModel, inputs: list[torch.Tensor], document_ids: torch.Tensor, gradient: torch.Tensor):
    """Seven TTT steps of the layer's attention, each on its own input, then their backward pass."""
    attention = model.layers[0].self_attn
    unroll = model.prepare_unroll(document_ids, NUM_TTT_STEPS, torch.bfloat16)
    seen, outputs = [], []
    for ttt_step, attention_input in enumerate(inputs):
        seen.append(attention.remember(attention_input, unroll.step_cos_sin(ttt_step), fused_rotate))
        outputs.append(recomputed(attend_jointly, attention, unroll, attention_input, list(seen)))
    torch.autograd.backward(outputs, [gradient] * NUM_TTT_STEPS)
    for leaf in [*inputs, *model.parameters()]:
        leaf.grad = None


def make_unroll(model: TTTDraftModel, batch_size: int, num_tokens: int) -> Callable[[], None]:
    """`run_unroll` on random numbers."""
    inputs = [
        torch.randn(batch_size, num_tokens, 8192, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(NUM_TTT_STEPS)
    ]
    gradient = torch.randn(batch_size, num_tokens, 4096, device="cuda", dtype=torch.bfloat16)
    document_ids = torch.ones(batch_size, num_tokens, dtype=torch.long, device="cuda")
    return partial(run_unroll, model, inputs, document_ids, gradient)


def matrix_product_flops(model: TTTDraftModel, batch_size: int, num_tokens: int) -> float:
    """Floating-point operations of the matrix products of forward and backward, the causal half of the scores."""
    attention, config = model.layers[0].self_attn, model.config
    per_token = 2 * sum(weight.numel() for weight in attention.parameters() if weight.dim() == 2)
    per_token += 4 * config.num_attention_heads * config.head_dim * num_tokens / 2
    return 3 * NUM_TTT_STEPS * batch_size * num_tokens * per_token


def benchmark(name: str, batch_size: int, num_tokens: int, rate: float) -> list[str]:
    torch.manual_seed(0)
    model = make_model(*ATTENTION_BACKENDS[name])
    limit = 1000 * matrix_product_flops(model, batch_size, num_tokens) / rate
    cell = [name, str(batch_size), str(num_tokens), f"{limit:.1f}"]
    cost = measure(partial(make_unroll, model, batch_size, num_tokens), NUM_CALLS)
    if cost is None:
        return [*cell, OUT_OF_MEMORY]
    return [
        *cell,
        f"{cost.milliseconds:.1f}",
        f"{cost.peak_gigabytes:.2f}",
        f"{cost.milliseconds / limit:.2f}",
        f"{cost.first_seconds:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(ATTENTION_BACKENDS), choices=list(ATTENTION_BACKENDS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attention_layer.md"))
    arguments = parser.parse_args()
    rate = matrix_product_rate()
    note = __doc__.replace("\n", " ") + f"\nMatrix products: {rate / 1e12:.0f} TFLOP/s."
    columns = ["backend", "batch", "length", "limit, ms", "ms", "peak GB", "times the limit", "first call, s"]
    rows = []
    for batch_size, num_tokens in GEOMETRIES:
        for name in arguments.backends:
            torch.cuda.empty_cache()
            rows.append(benchmark(name, batch_size, num_tokens, rate))
            print(*rows[-1], flush=True)
            write_table(arguments.output, "Attention layer in the training unroll", columns, rows, note)


if __name__ == "__main__":
    main()
