"""The tree that ours is compared with: EAGLE-2's (arXiv:2406.16858), written down slowly, and replayed on known texts.

Expansion (Section 4.1): the best tokens of the root, then at each depth the best nodes of the depth before, each with
its best tokens; a node's value is the product of the probabilities on its path. Re-ranking (Section 4.2): of all these
candidates, those of the highest value. The paper counts nodes beside the root, and its depth is that of the deepest
node. The published code counts the root among its `total_tokens`, and its `depth` is the number of expansions after
the root's: `total_tokens=60, depth=7` are 59 drafted nodes, the deepest at depth 8.

Every path is a row of a batch with a copy of the cache, so that no mask, position or index of a tree can be wrong.
Nothing is verified either: the texts are those of plain `generate()`, which every exact algorithm emits, so that a
round accepts what its tree holds of the text that follows. EAGLE's sampling tries the children of a node one after
the other, each with its probability under the target, and so accepts with the sum of their probabilities, which is the
probability that the target's own token is among them: for sampled texts the replay has the law of EAGLE's rounds.

Shapes: T tokens, W paths, D and Dt hidden sizes of draft and target, Vd draft vocabulary.
"""

from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

Path = tuple[int, ...]  # target ids after the root


@dataclass(frozen=True)
class TreeSize:
    """Drafted nodes, continuations (of each node, and nodes continued at each depth), and depth of the deepest."""

    num_nodes: int
    top_k: int
    depth: int


@dataclass
class Replay:
    """What the rounds of one text did, under the names that `SpeculationStats` gives it."""

    acceptance_lengths: list[int] = field(default_factory=list)
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)


@torch.no_grad()
def replay(target: PreTrainedModel, draft, text: Tensor, num_prompt: int, size: TreeSize) -> Replay:
    """
    The rounds in which a text of the target is emitted with reference trees.

    Args:
        text (`torch.LongTensor` of shape `(1, T)`): Prompt and emitted tokens.
        num_prompt (`int`): How many of them are the prompt. The token after it is the prefill's.
        size ([`TreeSize`]): Of every tree.
    """
    captured = draft.capture_aux_hidden_states(target)
    with captured:
        target(text)
    states, counts = captured.take(), Replay([], [0] * size.depth, [0] * size.depth)
    tokens, cache, root = text[0].tolist(), DynamicCache(), num_prompt
    while root + 1 < len(tokens):
        rows = slice(cache.get_seq_length(), root)  # the row of a state holds the token after it; the last is the root
        outputs = draft(
            inputs_embeds=draft.embed(text[:, 1:][:, rows], target),
            aux_hidden_states=states[:, rows],
            past_key_values=cache,
            logits_to_keep=1,
        )
        tree = reference_tree(target, draft, deepcopy(cache), outputs.states[:, -1:], outputs.logits[:, -1], size)
        root += count_round(counts, tree, tuple(tokens[root + 1 :]))
    return counts


def reference_tree(
    target: PreTrainedModel, draft, cache: DynamicCache, states: Tensor, logits: Tensor, size: TreeSize
) -> list[Path]:
    """
    The paths of EAGLE-2's nodes, the most probable first.

    Args:
        cache (`DynamicCache`): The draft's, with all rows up to that of the root; used up.
        states (`torch.Tensor` of shape `(1, 1, D)`), logits (`torch.Tensor` of shape `(1, Vd)`): Of that row.
        size ([`TreeSize`]): Of the tree.
    """
    candidates: list[tuple[float, Path]] = []
    frontier: list[tuple[float, Path]] = [(0.0, ())]
    for depth in range(1, size.depth + 1):
        children = []  # (value, path, row of the parent)
        log_probs, draft_ids = logits.float().log_softmax(dim=-1).topk(size.top_k)  # (W, top_k)
        target_ids = draft.draft_to_target(draft_ids)
        for row, (value, path) in enumerate(frontier):
            for log_prob, token in zip(log_probs[row].tolist(), target_ids[row].tolist(), strict=True):
                children.append((value + log_prob, (*path, token), row))
        candidates += [(value, path) for value, path, _ in children]
        best = sorted(children, key=lambda child: child[0], reverse=True)[: size.top_k]
        frontier = [(value, path) for value, path, _ in best]
        if depth < size.depth:
            rows = torch.tensor([row for *_, row in best], device=logits.device)
            cache.batch_select_indices(rows)
            tokens = torch.tensor([[path[-1]] for _, path in frontier], device=logits.device)  # (W, 1)
            outputs = draft(
                inputs_embeds=draft.embed(tokens, target), fused_states=states[rows], past_key_values=cache
            )
            states, logits = outputs.states, outputs.logits[:, -1]
    ranked = sorted(candidates, key=lambda candidate: candidate[0], reverse=True)
    return [path for _, path in ranked[: size.num_nodes]]


def count_round(counts: Replay, tree: list[Path], following: Path) -> int:
    """Adds one round before the text `following`, which is not empty; returns how many tokens it emitted."""
    nodes, parents = set(tree), {path[:-1] for path in tree}
    num_accepted = 0
    while num_accepted < len(following) and following[: num_accepted + 1] in nodes:
        num_accepted += 1
    num_emitted = min(num_accepted + 1, len(following))
    counts.acceptance_lengths.append(num_emitted)
    for depth in range(num_emitted):
        if following[:depth] in parents:
            counts.drafted_by_depth[depth] += 1
            counts.accepted_by_depth[depth] += depth < num_accepted
    return num_emitted
