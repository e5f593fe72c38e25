"""A draft's layers by kind of attention, and what forwards compute when a graph replays them with changing inputs."""

from collections.abc import Callable

import torch

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.generation.capture import capture
from eagle3_mla.generation.fused_target import fused_draft_operations
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

KINDS = {
    "R0": {"attention_type": "mla", "mla_rope_dim": 0},
    "R64": {"attention_type": "mla", "mla_rope_dim": 64},
    "gqa": {"attention_type": "gqa"},
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
# Large enough for the matrix products that large heads have, and for branches that really run at once.
BIG = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "head_dim": 128}
NUM_FORWARDS = 4
NUM_REPLAYS = 50
# Of a GPU's clock: some hundred microseconds, longer than any branch takes.
PAUSE = 400_000


def make_layers(kind: str, sizes: dict[str, int], num_layers: int = 1) -> Eagle3MLADraftModel:
    settings = {"vocab_size": 40, "draft_vocab_size": 30, "num_key_value_heads": 2, "initializer_range": 0.05}
    config = Eagle3MLAConfig(num_hidden_layers=num_layers, **settings, **sizes, **KINDS[kind])
    return Eagle3MLADraftModel(config).eval()


@torch.no_grad()
def replay_captured(stage: Callable[..., torch.Tensor], num_inputs: int, width: int, num_replays: int) -> list:
    """What `stage` computes of inputs `(1, 10, width)`, new ones in each replay of one graph."""
    inputs = [torch.empty(1, 10, width, device="cuda", dtype=torch.bfloat16) for _ in range(num_inputs)]
    (replay,) = capture([lambda: stage(*inputs)], inputs[0].device)
    generator, found = torch.Generator("cuda").manual_seed(0), []
    for _ in range(num_replays):
        for each in inputs:
            each.normal_(generator=generator)
        found.append(replay().clone())
    return found


def captured_rounds(draft: Eagle3MLADraftModel, num_replays: int) -> list[torch.Tensor]:
    """What a draft's forwards that feed each other compute."""

    def stage(embeds: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        logits = []
        for _ in range(NUM_FORWARDS):
            outputs = draft(embeds, fused_states=states)
            states = outputs.states
            logits.append(outputs.logits)
        return torch.cat([*logits, states], dim=-1)

    return replay_captured(stage, 2, draft.config.hidden_size, num_replays)


def assert_same_bits_without(switch_off: Callable[[], None], draft: Eagle3MLADraftModel) -> None:
    """Every replay of fused forwards computes what those compute that are captured after `switch_off`."""
    with fused_draft_operations(draft):
        found = captured_rounds(draft, NUM_REPLAYS)
    switch_off()
    with fused_draft_operations(draft):
        expected = captured_rounds(draft, NUM_REPLAYS)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], found[1])
    assert found[0].isfinite().all()
