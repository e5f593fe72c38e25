"""The feature-layer check: the draft reads the places of the target's residual stream that its configuration names.

`eagle_aux_hidden_state_layer_ids` i means the stream before layer i, which is the output of layer i - 1. Engines have
disagreed by one about it, and a head that was trained with the other convention still runs, only worse.

Shapes: B batch, T tokens, Dt the target's hidden.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling_eagle3_mla import AuxHiddenStates, decoder_layers
from .diagnosis_case import FAILED, OK, WARNING, Case, Finding, StudiedRow
from .losses import acceptance_metrics
from .target import run_decoder

SHIFTS = (-1, 0, 1)
# Rounding, relative to the largest number: the recomputed layer runs the same kernels on the same input.
TOLERATED_DIFFERENCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# By how much other layers must lower the loss; on the nano target one layer off costs 6 % of it or more.
CLEAR_IMPROVEMENT = 0.98
# Between the largest and the smallest of the three states; `fc` sees little of the small ones.
LARGE_NORM_RATIO = 100


def check_layers(case: Case) -> Finding:
    """Captured states against recomputed ones, their norms, and for a trained head the accuracy one layer off."""
    layer_ids = case.draft.config.eagle_aux_hidden_state_layer_ids
    row = case.studied_rows[0]
    captured = row.lesson.aux_hidden_states.chunk(3, dim=-1)
    expected = recompute_states(case.target, row.batch["input_ids"], layer_ids)
    differences = [relative_difference(*pair) for pair in zip(captured, expected, strict=True)]
    largest = torch.tensor(differences).max().item()  # not a number, if one of them is not
    published = output_hidden_states(case.target, row.batch["input_ids"], layer_ids)
    norms = [states.float().square().mean().sqrt().item() for states in captured]
    measured = {
        "layer_ids": layer_ids,
        "difference_from_recomputed": differences,
        "largest_difference_from_recomputed": largest,
        "difference_from_output_hidden_states": [
            None if other is None else relative_difference(states, other)
            for states, other in zip(captured, published, strict=True)
        ],
        "rms_by_layer": norms,
        "shifts": shifted_metrics(case) if case.is_trained else {},
    }
    verdict, remedy = judge_layers(measured, TOLERATED_DIFFERENCE[case.target.dtype])
    summary = (
        f"The states read at {layer_ids} differ from the residual stream there by {largest:.1e}; their root "
        f"mean squares are {', '.join(f'{norm:.3g}' for norm in norms)}."
    )
    if measured["shifts"]:
        parts = (f"{shift}: {metrics['accuracy_0']:.3f}" for shift, metrics in measured["shifts"].items())
        summary += f" Accuracy at step 0 with the layers shifted by {', '.join(parts)}."
    return Finding("feature layers", verdict, summary, remedy, measured)


def judge_layers(measured: dict[str, Any], tolerance: float) -> tuple[str, str]:
    """Verdict and remedy, the gravest fault first."""
    # Not `>`: a difference that is no number fails too.
    if not measured["largest_difference_from_recomputed"] <= tolerance:
        return FAILED, (
            "The captured states are not the residual stream before these layers; look at `AuxHiddenStates` in "
            "modeling_eagle3_mla.py for this target, and report the architecture."
        )
    shifts = measured["shifts"]
    if shifts:
        best = min(shifts, key=lambda shift: shifts[shift]["loss"])
        if shifts[best]["loss"] < CLEAR_IMPROVEMENT * shifts["0"]["loss"]:
            return FAILED, (
                f"The head was trained on other layers: set `eagle_aux_hidden_state_layer_ids` to "
                f"{shifts[best]['layer_ids']} in its config.json, or train it again."
            )
    if max(measured["rms_by_layer"]) > LARGE_NORM_RATIO * min(measured["rms_by_layer"]):
        return WARNING, "One state drowns the others in `fc`; train the head with `fc_norm`."
    return OK, "Nothing to do."


@torch.no_grad()
def recompute_states(target: PreTrainedModel, input_ids: Tensor, layer_ids: list[int]) -> list[Tensor]:
    """The residual stream before each of `layer_ids`, `(B, T, Dt)`: layer i - 1 called again on what it was given."""
    layers, calls = decoder_layers(target), {}

    def remember(index: int):
        return lambda module, args, kwargs: calls.setdefault(index, (args, kwargs)) and None

    handles = [
        layer.register_forward_pre_hook(remember(index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    run_decoder(target, input_ids)
    for handle in handles:
        handle.remove()
    states = []
    for layer_id in layer_ids:
        args, kwargs = calls[max(layer_id - 1, 0)]
        output = args[0] if args else kwargs["hidden_states"]
        if layer_id > 0:
            output = layers[layer_id - 1](*args, **kwargs)
        states.append(output[0] if isinstance(output, tuple) else output)
    return states


@torch.no_grad()
def output_hidden_states(target: PreTrainedModel, input_ids: Tensor, layer_ids: list[int]) -> list[Tensor | None]:
    """What transformers publishes for these layers; `None` for the last, which it gives after the final norm."""
    num_layers = len(decoder_layers(target))
    input_ids = input_ids.to(target.get_input_embeddings().weight.device)
    published = target.get_decoder()(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    return [published[layer_id] if layer_id < num_layers else None for layer_id in layer_ids]


@torch.no_grad()
def shifted_metrics(case: Case) -> dict[str, dict[str, Any]]:
    """Loss and accuracy of the first TTT step with all layer ids shifted, as far as the target has such layers."""
    layer_ids, num_layers = case.draft.config.eagle_aux_hidden_state_layer_ids, len(decoder_layers(case.target))
    results = {}
    for shift in SHIFTS:
        shifted = [layer_id + shift for layer_id in layer_ids]
        if min(shifted) < 0 or max(shifted) > num_layers:
            continue
        outputs = [case.unroll(case.draft, row, read_states(case, row, shifted), 1) for row in case.studied_rows]
        num_supervised = sum(output.num_supervised for output in outputs)
        hits, prefix_hits = sum(output.hits for output in outputs), sum(output.prefix_hits for output in outputs)
        # Each row's loss is a mean over its supervised positions.
        losses = sum(output.loss.item() * output.num_supervised[0].item() for output in outputs)
        results[f"{shift:+d}" if shift else "0"] = {
            "layer_ids": shifted,
            "loss": losses / max(num_supervised[0].item(), 1),
            "accuracy_0": acceptance_metrics(hits, prefix_hits, num_supervised)["accuracy_0"],
        }
    return results


def read_states(case: Case, row: StudiedRow, layer_ids: list[int]) -> Tensor:
    """The target's states before `layer_ids` on a studied row, `(1, T, 3 * Dt)`."""
    weight = case.draft.fc.weight
    captured = AuxHiddenStates(case.target, layer_ids, weight.device, weight.dtype)
    with captured:
        run_decoder(case.target, row.batch["input_ids"])
    return captured.take()


def relative_difference(states: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number."""
    states, expected = states.double(), expected.to(states.device).double()
    return ((states - expected).abs().max() / expected.abs().max()).item()
