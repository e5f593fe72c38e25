"""Text after an image: the target reads the image in its prefill, the rounds that follow read text."""

import pytest
import torch
from reference_generation import SHAPE, assert_same_generation, make_draft, run, set_tree
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

# Tokens of the image, and one that begins it.
IMAGE, BEGIN, NUM_IMAGE_TOKENS = 15, 14, 4
TEXT = SHAPE | {"vocab_size": 16}
# Positions of three axes, in equal parts of a head but for the last.
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**TEXT)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config), lambda ids: {"pixel_values": torch.randn(len(ids), 3, 8, 8)}


def qwen25_vl():
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": AXES},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        video_token_id=13,
        vision_end_token_id=12,
    )
    return Qwen2_5_VLForConditionalGeneration(config), lambda ids: {
        "pixel_values": torch.randn(len(ids) * 16, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids)),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def make_prompts(num_sequences: int) -> dict[str, torch.Tensor]:
    """Texts with an image in each; every one after the first is a token shorter."""
    ids = torch.randint(2, 11, (num_sequences, 12))
    ids[:, 2], ids[:, 3 : 3 + NUM_IMAGE_TOKENS] = BEGIN, IMAGE
    mask = torch.ones_like(ids)
    for row in range(num_sequences):
        ids[row], mask[row, :row] = ids[row].roll(row), 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("make_target", [llava, qwen25_vl], ids=lambda make: make.__name__)
def test_text_after_an_image_is_that_of_plain_generation(make_target, num_sequences):
    target, images_of = make_target()
    target, prompt = target.eval(), make_prompts(num_sequences)
    prompt |= images_of(prompt["input_ids"])
    draft, num_accepted = make_draft(target), 0
    for shape in (5, 1), (12, 3, 4):
        assert_same_generation(target, set_tree(draft, *shape), prompt, do_sample=True)
        num_accepted += sum(draft.speculation_stats.accepted_by_depth)
    assert num_accepted > 0


@pytest.mark.parametrize("make_target", [llava, qwen25_vl], ids=lambda make: make.__name__)
def test_later_turn_after_an_image_is_that_of_plain_generation(make_target):
    target, images_of = make_target()
    target, prompt = target.eval(), make_prompts(1)
    images, texts = images_of(prompt["input_ids"]), []
    for assistance in {}, {"assistant_model": set_tree(make_draft(target), 12, 3, 4)}:
        first, _ = run(target, prompt | images, do_sample=False, max_new_tokens=12, **assistance)
        ids = torch.cat([first.sequences, first.sequences.new_tensor([[3, 4, 5]])], dim=1)
        question = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        second, _ = run(target, question, do_sample=True, max_new_tokens=12, **assistance)
        texts.append(second.sequences.tolist())
    assert texts[0] == texts[1]


def test_target_with_an_image_in_its_cache_is_refused_by_name():
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    target = MllamaForCausalLM(MllamaTextConfig(**text, cross_attention_layers=[1], rope_parameters=rope)).eval()
    with pytest.raises(NotImplementedError, match="MllamaForCausalLM has `cross_attention_layers`, which keep"):
        target.generate(torch.tensor([[3, 4]]), assistant_model=make_draft(target), max_new_tokens=3)
