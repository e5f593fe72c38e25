"""Time and memory of a training step: the six attention backends at the shape of an 8B target's head.

Hidden size 4096, 32 query heads and 8 key-value heads of 128, MLP 14336, draft vocabulary 32,000, target vocabulary
128,256; seven TTT steps, bfloat16 autocast over float32 weights; forward, backward, clipping and a fused AdamW step.
The target's states are given, its output head is not: the target's logits are part of the step. All tokens but the
first of a row are the assistant's, so that every row is supervised.
"""

import argparse
import itertools
from pathlib import Path

import torch
from harness import OUT_OF_MEMORY, measure, write_table
from torch import nn

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.training.arguments import ATTENTION_BACKENDS
from eagle3_mla.training.documents import count_supervised_rows
from eagle3_mla.training.losses import step_weights
from eagle3_mla.training.ttt import TTTDraftModel

NOTE = __doc__.replace("\n", " ")
NUM_TTT_STEPS = 7
HIDDEN_SIZE, VOCAB_SIZE, DRAFT_VOCAB_SIZE = 4096, 128_256, 32_000


class Step:
    """A training step on random states, and everything that it needs on the GPU."""

    def __init__(self, backend: str, batch_size: int, num_tokens: int, recompute_steps: bool):
        torch.manual_seed(0)
        attention_type, attn_implementation = ATTENTION_BACKENDS[backend]
        config = Eagle3MLAConfig(
            vocab_size=VOCAB_SIZE,
            draft_vocab_size=DRAFT_VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            attention_type=attention_type,
            attn_implementation=attn_implementation,
        )
        with torch.device("cuda"):
            self.draft = TTTDraftModel(config)
            self.target_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False, dtype=torch.bfloat16)
        if recompute_steps:
            self.draft.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(self.draft.parameters(), lr=1e-5, fused=True)
        shape = batch_size, num_tokens
        self.input_ids = torch.randint(VOCAB_SIZE, shape, device="cuda")
        self.aux_hidden_states, self.inputs_embeds, self.last_hidden_states = (
            torch.randn(*shape, width, device="cuda", dtype=torch.bfloat16)
            for width in (3 * HIDDEN_SIZE, HIDDEN_SIZE, HIDDEN_SIZE)
        )
        self.document_ids = torch.ones(shape, dtype=torch.long, device="cuda")
        self.loss_mask = self.document_ids.clone()
        self.loss_mask[:, 0] = 0

    @torch.no_grad()
    def target_logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.target_head(states)

    def __call__(self) -> None:
        counts = count_supervised_rows(self.loss_mask, self.document_ids, NUM_TTT_STEPS)
        with torch.autocast("cuda", torch.bfloat16):
            output = self.draft(
                input_ids=self.input_ids,
                inputs_embeds=self.inputs_embeds,
                aux_hidden_states=self.aux_hidden_states,
                last_hidden_states=self.last_hidden_states,
                target_logits=self.target_logits,
                loss_mask=self.loss_mask,
                document_ids=self.document_ids,
                step_weights=step_weights(counts, [0.8**ttt_step for ttt_step in range(NUM_TTT_STEPS)]),
            )
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.draft.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def benchmark(backend: str, batch_size: int, num_tokens: int, arguments: argparse.Namespace) -> list[str]:
    cell = [backend, str(batch_size), str(num_tokens)]
    cost = measure(lambda: Step(backend, batch_size, num_tokens, arguments.recompute_steps), arguments.num_calls)
    if cost is None:
        return [*cell, OUT_OF_MEMORY]
    rate = batch_size * num_tokens / cost.milliseconds * 1000
    return [
        *cell,
        f"{cost.milliseconds:.0f}",
        f"{rate:,.0f}",
        f"{cost.peak_gigabytes:.1f}",
        f"{cost.first_seconds:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(ATTENTION_BACKENDS), choices=list(ATTENTION_BACKENDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 16384])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--num-calls", type=int, default=3)
    parser.add_argument("--recompute-steps", action="store_true", help="as with --gradient-checkpointing")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training_step.md"))
    arguments = parser.parse_args()
    columns = ["backend", "batch", "length", "step, ms", "tokens/s", "peak GB", "first call, s"]
    rows = []
    for num_tokens, batch_size in itertools.product(arguments.lengths, arguments.batch_sizes):
        torch.compiler.reset()  # every shape gets kernels of its own, as rows of one fixed length do in training
        for backend in arguments.backends:
            torch.cuda.empty_cache()
            rows.append(benchmark(backend, batch_size, num_tokens, arguments))
            print(*rows[-1], flush=True)
            # After every row: one that is out of time or memory takes no other with it.
            write_table(arguments.output, "Training step of an 8B target's head", columns, rows, NOTE)


if __name__ == "__main__":
    main()
