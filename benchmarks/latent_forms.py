"""Expanded or in latent space: which form of MLA a training step should use.

Causal attention of one layer, forward and backward, recomputed in the backward pass, so that both forms leave the
latents behind and nothing else. Expanded: keys and values of every head are made from the latents. In latent space:
the values stay latent until after the attention, and with R > 0 the keys too (multi-query of width C + R, values of
width C). 32 query heads and 8 key-value heads of 128 with `--device cuda`, 8 and 2 of 64 elsewhere.
"""

import argparse
from pathlib import Path

import torch
from harness import timed, write_table

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import Eagle3MLARotaryEmbedding, LatentAttention
from eagle3_mla.training.ttt import recomputed

SHAPES = {"cuda": (32, 8, 128, torch.bfloat16), "cpu": (8, 2, 64, torch.float32)}  # heads, key-value heads, width
NUM_CALLS = 20


def make_attention(device: str, kernel: str, rope_share: float) -> LatentAttention:
    """A layer's attention at the default size of the latent; R is `rope_share` of the head's width."""
    num_heads, num_groups, head_dim, dtype = SHAPES[device]
    config = Eagle3MLAConfig(
        vocab_size=64,
        draft_vocab_size=64,
        hidden_size=num_heads * head_dim,
        intermediate_size=64,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        head_dim=head_dim,
        mla_rope_dim=int(rope_share * head_dim),
        attn_implementation=kernel,
    )
    return LatentAttention(config, layer_idx=0).to(device, dtype)


def unrolled_step(attention: LatentAttention, form: str, attention_input: torch.Tensor) -> None:
    """Forward and backward of the causal attention in one form."""
    position_ids = torch.arange(attention_input.shape[1], device=attention_input.device)[None]
    cos_sin = Eagle3MLARotaryEmbedding(attention.config).to(attention_input.device)(
        position_ids, attention_input.dtype
    )

    def attend(rows: torch.Tensor, c_kv: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        return getattr(attention, form)(attention.ask(rows, cos_sin), (c_kv, k_rope), cos_sin, None)

    heads = recomputed(attend, attention_input, *attention.remember(attention_input, cos_sin))
    attention.output(heads).sum().backward()
    attention.zero_grad(set_to_none=True)


def benchmark(attention: LatentAttention, num_tokens: int) -> list[float]:
    """Milliseconds of both forms, the least of calls that take turns."""
    parameter = attention.o_proj.weight
    rows = torch.randn(1, num_tokens, 2 * parameter.shape[0], device=parameter.device, dtype=parameter.dtype)
    rows.requires_grad_()
    seconds = {"attend_expanded": [], "attend_absorbed": []}
    for _ in range(NUM_CALLS + 1):
        for form, times in seconds.items():
            times.append(timed(lambda form=form: unrolled_step(attention, form, rows)))
    return [1000 * min(times[1:]) for times in seconds.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--kernel", choices=["sdpa", "flex_attention"], default="sdpa")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latent_forms.md"))
    arguments = parser.parse_args()
    rows = []
    for num_tokens in arguments.lengths:
        for rope_share in (0, 0.5):
            attention = make_attention(arguments.device, arguments.kernel, rope_share)
            expanded, absorbed = benchmark(attention, num_tokens)
            sizes = attention.latent_dim, attention.rope_dim, num_tokens
            rows.append([*map(str, sizes), f"{expanded:.1f}", f"{absorbed:.1f}", f"{absorbed / expanded:.2f}"])
            print(*rows[-1], flush=True)
    columns = ["C", "R", "length", "expanded, ms", "in latent space, ms", "ratio"]
    write_table(arguments.output, "Two forms of MLA in training", columns, rows, __doc__.replace("\n", " "))


if __name__ == "__main__":
    main()
