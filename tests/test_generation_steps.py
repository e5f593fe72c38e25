"""The steps that sequences take through their trees: the kernel against the definition and against a plain loop."""

from dataclasses import replace

import pytest
import torch
from reference_generation import TARGETS, make_draft, make_prompts, set_tree

from eagle3_mla.generation import steps as module
from eagle3_mla.generation import tree as tree_module
from eagle3_mla.generation.steps import Standing, Steps, take_by_definition, take_steps
from eagle3_mla.generation.tree import DraftTree, build_chain

in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
VOCAB_SIZE, PAD = 40, 0
ENDS = [3, 5, 39]
# Sequences, nodes, depth; 0: chains.
SHAPES = [(1, 1, 0), (1, 9, 0), (1, 13, 4), (3, 13, 4), (5, 30, 6), (4, 7, 0)]
BIG_SHAPES = [(1, 61, 8), (32, 61, 8), (8, 128, 10), (4, 61, 8), (64, 61, 8), (16, 33, 0)]
ENDINGS = ["endless", "ends", "ends-in-step", "pads"]


def make_tree(shape: tuple[int, int, int], generator: torch.Generator) -> DraftTree:
    """The children of a node hold different tokens."""
    num_rows, num_nodes, depth = shape
    if depth == 0:
        return build_chain(torch.randint(0, VOCAB_SIZE, (num_rows, num_nodes), generator=generator))
    parents, token_ids = (torch.zeros(num_rows, num_nodes, dtype=torch.long) for _ in range(2))
    for row in range(num_rows):
        depths, tokens = [0], torch.rand(num_nodes, VOCAB_SIZE, generator=generator).argsort(dim=1)
        for node in range(1, num_nodes):
            may_go_on = [each for each, steps in enumerate(depths) if steps < depth]
            parent = may_go_on[int(torch.randint(0, len(may_go_on), (), generator=generator))]
            depths.append(depths[parent] + 1)
            num_siblings = parents[row, 1:node].tolist().count(parent)
            parents[row, node], token_ids[row, node] = parent, tokens[parent, num_siblings]
    preferred = torch.rand(num_rows, num_nodes - 1, generator=generator).argsort(dim=1)
    return DraftTree(token_ids, parents, max_depth=depth, preferred=preferred)


def make_round(shape: tuple[int, int, int], ending: str, seed: int) -> tuple[DraftTree, torch.Tensor, Standing]:
    """Trees, choices of which most are held by a child, and sequences of which some have ended or have little room."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_nodes, depth = shape
    tree = make_tree(shape, generator)
    choices = torch.randint(0, VOCAB_SIZE, (num_rows, num_nodes), generator=generator)
    for row in range(num_rows):
        for node in torch.randperm(num_nodes - 1, generator=generator).tolist():
            if torch.rand((), generator=generator) < 0.9:
                choices[row, tree.parents[row, node + 1]] = tree.token_ids[row, node + 1]
    is_frozen = torch.rand(num_rows, generator=generator) < (0.5 if ending != "endless" else 0.0)
    if ending == "pads":
        tree = tree.with_pads(is_frozen, torch.tensor(PAD), depth if depth > 0 else num_nodes - 1)
    lengths = torch.randint(3, 9, (num_rows,), generator=generator)
    limit = int(lengths.min()) + int(torch.randint(1, 12, (), generator=generator))
    ends = None if ending == "endless" else torch.tensor(ENDS)
    return tree, choices, Standing(lengths, torch.tensor(limit), is_frozen, ends, pad_of(ending))


def pad_of(ending: str) -> torch.Tensor | None:
    return torch.tensor(PAD) if ending == "pads" else None


def take_with(take, tree: DraftTree, choices: torch.Tensor, standing: Standing):
    """The report, the steps, and who is frozen after them."""
    standing = replace(standing, is_frozen=standing.is_frozen.clone())
    num_rows, longest = len(choices), tree.deepest + 1
    new = torch.full((2, num_rows, longest), -7, device=choices.device)
    steps = Steps(new[0], new[1], new[0, :, 0].clone())
    return take(tree, choices, standing, steps), steps, standing.is_frozen


def assert_same_steps(found, expected, num_nodes: int) -> None:
    """As far as it means something; beyond, nodes and tokens are at least some."""
    report, steps, is_frozen = found
    other_report, other_steps, other_is_frozen = expected
    longest = steps.path.shape[1]
    assert report.dtype == other_report.dtype
    assert torch.equal(report[:, :4], other_report[:, :4])
    assert torch.equal(steps.num_new, other_steps.num_new)
    assert torch.equal(is_frozen, other_is_frozen)
    is_taken = torch.arange(longest, device=report.device) < steps.num_new[:, None]
    for value, other in [
        (steps.path, other_steps.path),
        (steps.tokens, other_steps.tokens),
        (report[:, 4 : 4 + longest], other_report[:, 4 : 4 + longest]),
        (report[:, 4 + longest :], other_report[:, 4 + longest :]),
    ]:
        assert torch.equal(value[is_taken], other[is_taken])
    assert bool(((steps.path >= 0) & (steps.path < num_nodes)).all())
    assert bool(((steps.tokens >= 0) & (steps.tokens < VOCAB_SIZE)).all())


def to_device(record, device: str):
    return replace(
        record,
        **{name: value.to(device) for name, value in vars(record).items() if torch.is_tensor(value)},
    )


def compare(shape: tuple[int, int, int], ending: str, seed: int, device: str = "cpu") -> torch.Tensor:
    """The columns of the report that tell how far sequences came."""
    from eagle3_mla.generation.steps_triton import take

    tree, choices, standing = make_round(shape, ending, seed)
    given = to_device(tree, device), choices.to(device), to_device(standing, device)
    found = take_with(take, *given)
    assert_same_steps(found, take_with(take_by_definition, *given), shape[1])
    return found[0][:, :4]


@in_interpreter
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_takes_the_steps_of_the_definition_in_the_interpreter(shape, ending):
    pytest.importorskip("triton")
    for seed in range(4):
        compare(shape, ending, seed)


@in_interpreter
def test_rounds_of_these_tests_end_in_every_way():
    """Otherwise they would compare little."""
    pytest.importorskip("triton")
    reports = torch.cat([compare((5, 30, 6), "pads", seed) for seed in range(12)])
    num_new, has_ended, num_drafted, num_tried = reports.unbind(dim=1)
    assert num_new.unique().numel() >= 5
    assert 0 < has_ended.sum() < len(reports)
    assert (num_drafted < num_new).any()
    assert (num_drafted == num_new).any()
    assert (num_tried > num_drafted).any()


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_those_of_a_plain_walk(seed):
    """One sequence after the other, with Python's own lists; none of them is frozen."""
    tree, choices, standing = make_round((4, 30, 6), "endless", seed)
    standing = replace(standing, eos_token_ids=torch.tensor(ENDS))
    report, steps, _ = take_with(take_steps, tree, choices, standing)
    for row in range(4):
        path, tokens, has_ended, goes_on = [0], [], False, True
        parents, token_ids = tree.parents[row].tolist(), tree.token_ids[row].tolist()
        room = int(standing.limit) - int(standing.lengths[row]) - 1
        while goes_on and len(tokens) < room and not has_ended:
            tokens.append(int(choices[row, path[-1]]))
            has_ended = tokens[-1] in ENDS
            following = [node for node in range(1, 30) if parents[node] == path[-1] and token_ids[node] == tokens[-1]]
            path, goes_on = path + following, bool(following)
        num_new = len(tokens)
        assert report[row, :2].tolist() == [min(num_new, room), has_ended]
        assert steps.tokens[row, :num_new].tolist() == tokens
        assert steps.path[row, :num_new].tolist() == path[:num_new]


def test_drawn_choices_and_large_batches_never_reach_the_kernel(monkeypatch):
    tree, choices, standing = make_round((2, 13, 4), "ends", 0)
    asked = []
    monkeypatch.setattr(module, "runs_on_triton", lambda *given: asked.append(given))
    scores = torch.randn(2, 13, VOCAB_SIZE)
    for given in (None, scores):
        take_steps(tree, choices, standing, Steps(*torch.zeros(2, 2, 5).long(), torch.zeros(2).long()), given)
    assert len(asked) == 1
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(module, "can_run_kernels", lambda device: True)
    assert module.runs_on_triton(tree, standing)
    assert not module.runs_on_triton(tree, replace(standing, eos_token_ids=torch.zeros(module.MOST_ENDS + 1)))
    nodes = torch.zeros(32, 128, dtype=torch.long)
    assert module.runs_on_triton(DraftTree(nodes, nodes), standing)
    assert not module.runs_on_triton(DraftTree(nodes[:, :65].repeat(2, 1), nodes), standing)


@in_interpreter
@pytest.mark.parametrize("size", [(12, 3, 4), (5, 1, 5)], ids=["tree", "chain"])
def test_text_is_that_of_plain_generation_with_the_kernels_of_steps_and_trees(size, monkeypatch):
    """A batch whose sequences end at different places."""
    pytest.importorskip("triton")
    from eagle3_mla.generation import steps_triton

    taken, take = [], steps_triton.take
    monkeypatch.setattr(steps_triton, "take", lambda *given: taken.append(take(*given)) or taken[-1])
    for each in (module, tree_module):
        monkeypatch.setattr(each, "runs_on_triton", lambda *given: True)
    target = TARGETS["llama"]().eval()
    draft = set_tree(make_draft(target), *size)
    draft.generation_config.fixed_shapes = True
    prompt, settings = make_prompts([5, 2, 4]), {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**prompt, **settings)
    settings["eos_token_id"] = [int(plain[0, 30]), int(plain[1, 38])]
    plain = target.generate(**prompt, **settings).tolist()
    assert target.generate(**prompt, **settings, assistant_model=draft).tolist() == plain
    assert any(report[:, 1].any() for report in taken)
    assert any(report[:, 2].any() for report in taken)


@pytest.mark.gpu
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("shape", [*SHAPES, *BIG_SHAPES], ids=str)
def test_kernel_takes_the_steps_of_the_definition(shape, ending):
    for seed in range(2):
        compare(shape, ending, seed, "cuda")
    tree, choices, standing = make_round(shape, ending, 0)
    given = to_device(tree, "cuda"), choices.cuda(), to_device(standing, "cuda")
    assert_same_steps(take_with(take_steps, *given), take_with(take_by_definition, *given), shape[1])
