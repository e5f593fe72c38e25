"""Targets whose weights are not all where the text is: spread over several devices, or fetched for each forward."""

import pytest
import torch
from accelerate import dispatch_model
from reference_generation import SETTINGS, TARGETS, assert_same_generation, make_draft, make_prompts, set_tree

CELLS = [("greedy", 1, [9]), ("greedy-processors", 3, [9, 4]), ("sample", 3, [9]), ("sample-warpers", 1, [9, 4, 6])]


@pytest.mark.parametrize("on_disk", ["model.layers.2", "model.embed_tokens", "lm_head"])
@pytest.mark.parametrize(("setting", "top_k", "lengths"), CELLS)
def test_target_that_is_partly_on_disk_gives_its_plain_text(on_disk, setting, top_k, lengths, tmp_path):
    """Between forwards these weights have no values: whoever reads them elsewhere reads nothing."""
    target = TARGETS["llama"]().eval()
    draft = set_tree(make_draft(target), 9, top_k)
    parts = ["model.embed_tokens", "model.rotary_emb", *(f"model.layers.{layer}" for layer in range(4))]
    places = dict.fromkeys([*parts, "model.norm", "lm_head"], "cpu") | {on_disk: "disk"}
    dispatch_model(target, places, main_device="cpu", offload_dir=tmp_path)
    assert sum(parameter.is_meta for parameter in target.parameters()) > 0
    assert_same_generation(target, draft, make_prompts(lengths), **SETTINGS[setting])
    assert sum(draft.speculation_stats.accepted_by_depth) > 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("place_of_draft", ["cuda:0", "cuda:1", "cpu"])
@pytest.mark.parametrize("place_of_text", ["cuda:0", "cpu"])
@pytest.mark.parametrize("last", ["cuda:0", "cuda:1", "cpu"])
@pytest.mark.parametrize(("setting", "top_k", "lengths"), CELLS)
def test_target_on_two_gpus_gives_its_plain_text(setting, top_k, lengths, last, place_of_text, place_of_draft):
    """As `device_map` places it: layers in order, the head on the device of the last ones, or offloaded."""
    target = TARGETS["llama"]().eval()
    draft = set_tree(make_draft(target), 9, top_k).to(place_of_draft)
    places = {f"model.layers.{layer}": f"cuda:{layer // 2}" for layer in range(4)}
    places |= {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", "model.norm": "cuda:1", "lm_head": last}
    dispatch_model(target, places, main_device="cuda:0")
    prompt = {name: tensor.to(place_of_text) for name, tensor in make_prompts(lengths).items()}
    assert_same_generation(target, draft, prompt, **SETTINGS[setting])
    assert sum(draft.speculation_stats.accepted_by_depth) > 0
