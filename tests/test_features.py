"""Stored features as training data: what is read back, what is found damaged, and how exact eight bits are."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from features_fixtures import preparation_flags, prepare_features, save_target
from reference_ttt import TARGET_SIZES, tiny_draft, tiny_target, write_conversations
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from eagle3_mla.training import features as features_module
from eagle3_mla.training.batching import PaddingCollator
from eagle3_mla.training.data import content_hash
from eagle3_mla.training.document_teacher import DocumentTeacher
from eagle3_mla.training.feature_collator import FeatureCollator
from eagle3_mla.training.feature_shards import features_num_bytes, is_taught, plan_shards
from eagle3_mla.training.features import open_features
from eagle3_mla.training.initialization import initialize_from_target
from eagle3_mla.training.state_storage import GROUP_SIZE, bytes_per_state, decode_states, encode_states, num_groups
from eagle3_mla.training.stored_target import StoredTarget, StoredTeacher, head_tensors
from eagle3_mla.training.target import Teacher, run_decoder, target_logits

SIZES = TARGET_SIZES | {"pad_token_id": 0}
FAMILIES = {
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "scaled embeddings": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=2.0)),
    "scaled logits": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "positions": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=6, num_attention_heads=4)
    ),
}


@pytest.fixture(scope="module")
def features_of(tmp_path_factory):
    """Directories by storage dtype, made once; tests that change one copy it first."""
    root = tmp_path_factory.mktemp("features")
    target, dataset = save_target(root / "target"), write_conversations(root / "train.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(root / "datasets-cache"))
        for storage_dtype in ("bfloat16", "int8"):
            flags = preparation_flags(target, dataset, root / storage_dtype)
            prepare_features(flags | {"--storage-dtype": storage_dtype})
    return lambda storage_dtype: root / storage_dtype


@pytest.fixture
def directory(features_of, tmp_path) -> Path:
    return shutil.copytree(features_of("bfloat16"), tmp_path / "features")


def first_shard(directory: Path) -> Path:
    return min(directory.glob("features-*"))


def rewrite_shard(path: Path, change) -> None:
    """Saves a shard again with other tensors or metadata, and records the new checksum as if it were right."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = load_file(path), file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    entry = next(shard for shard in manifest["shards"] if shard["name"] == path.name)
    entry["sha256"] = features_module.file_sha256(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


# Storage


@pytest.mark.parametrize("width", [48, 512, 1536, 2880 * 3, 7])
def test_eight_bits_are_exact_to_half_a_step_of_their_group(width):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, width, generator=generator) * torch.logspace(-3, 3, 50)[:, None]
    states[:, 5] *= 1000
    stored, scales = encode_states(states, torch.int8)
    assert stored.shape == states.shape
    assert scales.shape == (50, num_groups(width))
    groups = states.unflatten(-1, (num_groups(width), -1))
    assert groups.shape[-1] <= GROUP_SIZE
    step = groups.abs().amax(dim=-1, keepdim=True) / 127
    error = (decode_states(stored, scales, torch.float32).unflatten(-1, groups.shape[1:]) - groups).abs()
    # The scale itself is rounded to bfloat16: 2^-8 of it, over at most 127 steps.
    assert (error <= step * (0.5 * (1 + 2**-8) + 1e-3)).all()
    assert error.max() > 0


def test_a_large_channel_spoils_only_its_own_group():
    states = torch.randn(100, 256)
    states[:, 3] = 1000.0
    decoded = decode_states(*encode_states(states, torch.int8), torch.float32)
    others = slice(GROUP_SIZE, None)
    relative = (decoded - states)[:, others].norm() / states[:, others].norm()
    assert relative < 0.01


def test_zeros_survive_eight_bits():
    states = torch.zeros(2, 128)
    states[1, :64] = torch.randn(64)
    decoded = decode_states(*encode_states(states, torch.int8), torch.bfloat16)
    assert torch.equal(decoded[0], states[0].bfloat16())
    assert torch.equal(decoded[1, 64:], states[1, 64:].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_stored_in_its_own_dtype_keeps_its_bits(dtype):
    states = torch.randn(5, 48).to(dtype)
    assert torch.equal(decode_states(*encode_states(states, dtype), dtype), states)


def test_the_size_per_thousand_tokens_is_what_the_documentation_says():
    """Half of the positions taught; hidden 512 and 4096."""
    sizes = {
        (hidden_size, dtype): features_num_bytes(hidden_size, dtype, 0, 1000, 500) / 1e6
        for hidden_size in (512, 4096)
        for dtype in (torch.bfloat16, torch.int8)
    }
    assert {key: round(size, 2) for key, size in sizes.items()} == {
        (512, torch.bfloat16): 3.59,
        (512, torch.int8): 1.85,
        (4096, torch.bfloat16): 28.68,
        (4096, torch.int8): 14.79,
    }
    assert bytes_per_state(4096, torch.int8) == 4096 + 2 * 64


def test_documents_are_cut_into_shards_in_their_order_and_never_apart():
    lengths = [5, 9, 30, 4, 4, 4, 12]
    masks = [[0, *[1] * (length - 1)] for length in lengths]
    shards = plan_shards(Dataset.from_dict({"input_ids": masks, "loss_mask": masks}), tokens_per_shard=16)
    assert [shard.num_tokens for shard in shards] == [14, 30, 12, 12]
    assert [shard.first_document for shard in shards] == [0, 2, 3, 6]
    taught = [int(is_taught(torch.tensor(mask)).sum()) for mask in masks]
    assert [shard.num_taught for shard in shards] == [sum(taught[:2]), taught[2], sum(taught[3:6]), taught[6]]


# Reading


def test_rows_come_back_as_they_were_stored_in_any_order(features_of):
    features = open_features(str(features_of("bfloat16")))
    tensors = [load_file(features.directory / shard.name) for shard in features.manifest.shards]
    aux = torch.cat([shard["aux_hidden_states"] for shard in tensors])
    last = torch.cat([shard["last_hidden_states"] for shard in tensors])
    first_tokens = torch.tensor([0, *features.lengths]).cumsum(dim=0)
    masks = [torch.tensor(mask) for mask in features["loss_mask"]]
    first_taught = torch.tensor([0, *[int(is_taught(mask).sum()) for mask in masks]]).cumsum(dim=0)
    for index in (3, 0, 4, 1, 2, 2):
        row = features[index]
        assert row["input_ids"].tolist() == features["input_ids"][index]
        assert row["length"] == len(row["input_ids"]) == features["length"][index]
        assert torch.equal(row["aux_hidden_states"], aux[first_tokens[index] : first_tokens[index + 1]])
        taught = is_taught(row["loss_mask"])
        assert torch.equal(row["last_hidden_states"][taught], last[first_taught[index] : first_taught[index + 1]])
        assert not row["last_hidden_states"][~taught].any()


def test_the_tokens_are_hashed_as_those_of_other_training_data(features_of):
    features = open_features(str(features_of("bfloat16")))
    assert content_hash(features) == features.manifest.request.data_sha256


def test_few_files_stay_open(features_of, monkeypatch):
    monkeypatch.setattr(features_module, "MAX_OPEN_SHARDS", 1)
    features = open_features(str(features_of("bfloat16")))
    rows = [features[index]["aux_hidden_states"].clone() for index in (0, 4, 0)]
    assert len(features.files) == 1
    assert torch.equal(rows[0], rows[2])


def test_a_worker_process_opens_its_own_files(features_of):
    features = open_features(str(features_of("bfloat16")))
    expected = features[1]["aux_hidden_states"]
    copied = pickle.loads(pickle.dumps(features))
    assert not copied.files
    assert torch.equal(copied[1]["aux_hidden_states"], expected)
    loader = torch.utils.data.DataLoader(features, batch_size=None, num_workers=2)
    assert torch.equal(list(loader)[1]["aux_hidden_states"], expected)


def test_eight_bit_states_are_near_those_of_sixteen(features_of):
    exact, short = (open_features(str(features_of(dtype))) for dtype in ("bfloat16", "int8"))
    for index in range(len(exact)):
        for name in ("aux_hidden_states", "last_hidden_states"):
            expected, stored = exact[index][name].float(), short[index][name].float()
            assert exact[index][name].dtype == short[index][name].dtype == torch.bfloat16
            assert 0 < (stored - expected).norm() < 0.01 * expected.norm()


# Damage


def test_incomplete_features_are_refused(directory):
    manifest = json.loads((directory / "manifest.json").read_text()) | {"complete": False, "shards": []}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="are not complete"):
        open_features(str(directory))
    (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no stored features"):
        open_features(str(directory))


MANIFEST_EDITS = {
    "a shard less": lambda manifest: manifest["shards"].pop(),
    "another order": lambda manifest: manifest["shards"].reverse(),
    "no shards": lambda manifest: manifest.pop("shards"),
    "an unknown key": lambda manifest: manifest.update(colour="red"),
}


@pytest.mark.parametrize("edit", MANIFEST_EDITS)
def test_a_manifest_that_does_not_hold_all_documents_is_refused(edit, directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    assert len(manifest["shards"]) > 1
    MANIFEST_EDITS[edit](manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is damaged"):
        open_features(str(directory))


def test_a_flipped_bit_is_found_and_its_shard_named(directory):
    for path in (*sorted(directory.glob("features-*")), directory / "target_head.safetensors"):
        content = bytearray(path.read_bytes())
        content[-2] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is damaged: its SHA-256"):
            open_features(str(directory))
        content[-2] ^= 4
        path.write_bytes(content)
    open_features(str(directory))


def test_every_process_verifies_its_share_and_all_of_them_everything(directory):
    damaged = sorted(directory.glob("features-*"))[1]
    content = bytearray(damaged.read_bytes())
    content[-2] ^= 4
    damaged.write_bytes(content)
    open_features(str(directory), process_index=0, num_processes=2)
    with pytest.raises(ValueError, match=damaged.name):
        open_features(str(directory), process_index=1, num_processes=2)


def test_missing_and_truncated_shards_are_named(directory):
    shard = first_shard(directory)
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged.*prepare_features.py again"):
        open_features(str(directory))
    os.truncate(shard, 5)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        open_features(str(directory))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        open_features(str(directory))


def test_a_shard_of_other_features_is_named_even_if_its_checksum_is_recorded(directory):
    shard = first_shard(directory)

    def disown(tensors, metadata):
        metadata["eagle3_mla_features"] = metadata["eagle3_mla_features"].replace('"request_sha256": "', '"x": "')

    rewrite_shard(shard, disown)
    with pytest.raises(ValueError, match=f"{shard.name} is foreign"):
        open_features(str(directory))


def test_a_shard_in_the_place_of_another_is_named(directory):
    first, second = sorted(directory.glob("features-*"))[:2]
    shutil.copy(second, first)
    with pytest.raises(ValueError, match=f"{first.name} is foreign"):
        open_features(str(directory))


@pytest.mark.parametrize("name", ["aux_hidden_states", "last_hidden_states", "input_ids", "lengths"])
def test_a_tensor_of_the_wrong_shape_or_type_is_named(name, directory):
    shard = first_shard(directory)
    original = shard.read_bytes()
    rewrite_shard(shard, lambda tensors, metadata: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(ValueError, match=f"{shard.name} is damaged: `{name}` must be"):
        open_features(str(directory))
    shard.write_bytes(original)
    rewrite_shard(shard, lambda tensors, metadata: tensors.update({name: tensors[name].double()}))
    with pytest.raises(ValueError, match=f"{shard.name} is damaged: `{name}` must be"):
        open_features(str(directory))


# The teacher


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_head_embeds_and_predicts_with_the_bits_of_its_target(family, dtype):
    torch.manual_seed(0)
    target = FAMILIES[family]().eval().to(dtype)
    tensors = head_tensors(target)
    stored = StoredTarget(target.config, tensors, [])
    input_ids = torch.randint(40, (2, 9))
    states = run_decoder(target, input_ids)[0]
    assert torch.equal(target_logits(stored, states), target_logits(target, states))
    assert torch.equal(stored.get_input_embeddings()(input_ids), target.get_input_embeddings()(input_ids))
    assert ("embeddings.weight" in tensors) == (family in ("untied", "scaled embeddings"))
    drafts = [tiny_draft().float() for _ in range(2)]
    taken = [initialize_from_target(draft, source) for draft, source in zip(drafts, (target, stored), strict=True)]
    assert taken[0] == taken[1]
    for name, weight in drafts[0].state_dict().items():
        assert torch.equal(weight, drafts[1].state_dict()[name]), name


def test_an_output_layer_that_is_no_matrix_product_is_refused():
    """Stored as a matrix, it would teach other distributions than the target's."""
    target = tiny_target()

    class Doubled(torch.nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    doubled = Doubled(16, 40, bias=False)
    doubled.weight = target.lm_head.weight
    target.lm_head = doubled
    with pytest.raises(ValueError, match=r"\(Doubled\) is not a product with its weight"):
        head_tensors(target)


def test_a_lesson_from_the_shards_is_the_lesson_of_the_target(features_of):
    directory = features_of("bfloat16")
    features = open_features(str(directory))
    target_path = directory.parent / "target"
    target = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.bfloat16).eval()
    config = AutoConfig.from_pretrained(target_path)
    draft = tiny_draft(vocab_size=config.vocab_size).float()
    stored = StoredTarget.load(directory / "target_head.safetensors", config, [], torch.device("cpu"))
    batch = FeatureCollator(PaddingCollator(0))([features[index] for index in (2, 0, 3)])
    lesson, expected = StoredTeacher(stored, draft).lesson(batch), DocumentTeacher(target, draft).lesson(batch)
    assert torch.equal(lesson.aux_hidden_states, expected.aux_hidden_states)
    assert lesson.aux_hidden_states.dtype == torch.float32
    assert lesson.last_hidden_states.dtype == expected.last_hidden_states.dtype == torch.bfloat16
    row_masks = zip(batch["loss_mask"], batch["document_ids"], strict=True)
    for row, (loss_mask, document_ids) in enumerate(row_masks):
        taught = is_taught(loss_mask * document_ids)
        assert torch.equal(lesson.last_hidden_states[row, taught], expected.last_hidden_states[row, taught])


def test_documents_read_alone_are_those_of_the_batch_up_to_rounding():
    """The two ways to run the target differ in the last bits only: in the lesson of padding and packing alike."""
    target, draft = tiny_target().double(), tiny_draft()
    input_ids = torch.randint(1, 40, (2, 12))
    for document_ids in (
        torch.tensor([[1] * 12, [1] * 7 + [0] * 5]),
        torch.tensor([[1] * 5 + [2] * 4 + [3] * 3, [1] * 3 + [2] * 7 + [0] * 2]),
    ):
        batch = {"input_ids": input_ids, "document_ids": document_ids}
        alone, together = (teacher(target, draft).lesson(batch) for teacher in (DocumentTeacher, Teacher))
        is_document = document_ids > 0
        for name in ("aux_hidden_states", "last_hidden_states"):
            torch.testing.assert_close(getattr(alone, name)[is_document], getattr(together, name)[is_document])
            assert not getattr(alone, name)[~is_document].any()


def test_states_go_where_their_documents_lie():
    rows = [
        {"input_ids": [1] * length, "aux_hidden_states": torch.full((length, 3), float(length)),
         "last_hidden_states": torch.full((length, 1), -float(length))}
        for length in (2, 3, 1)
    ]  # fmt: skip

    def pack(rows):
        assert all("aux_hidden_states" not in row for row in rows)
        return {"document_ids": torch.tensor([[1, 1, 2, 2, 2], [1, 0, 0, 0, 0]])}

    batch = FeatureCollator(pack)(rows)
    assert batch["aux_hidden_states"][..., 0].tolist() == [[2, 2, 3, 3, 3], [1, 0, 0, 0, 0]]
    assert batch["last_hidden_states"][..., 0].tolist() == [[-2, -2, -3, -3, -3], [-1, 0, 0, 0, 0]]
