"""A draft loads anywhere: from a directory or a Hub, in a fresh process with fresh caches, its code included.

Every test loads in a process of its own in which the installed package cannot be imported: what runs is what travelled
with the model.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from loopback_hub import LoopbackHub

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

LOAD_AND_GENERATE = """
import json, sys
sys.modules["eagle3_mla"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM

target = AutoModelForCausalLM.from_pretrained({target!r})
results = []
for source, revision in {sources!r}:
    draft = AutoModel.from_pretrained(source, revision=revision, trust_remote_code=True)
    prompt = torch.tensor([[3, 4, 5, 6]])
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assisted = target.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=draft)
    results.append({{
        "lossless": plain.tolist() == assisted.tolist(),
        "code": draft.generation_package,
        "num_assistant_tokens": draft.generation_config.num_assistant_tokens,
        "marker": getattr(sys.modules[draft.generation_package], "MARKER", None),
        "rounds": draft.speculation_stats.rounds,
    }})
{extra}
print(json.dumps(results))
"""


@pytest.fixture
def saved_target(tiny_target, tmp_path):
    tiny_target.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def saved_draft(tiny_target, tmp_path):
    draft = Eagle3MLADraftModel(Eagle3MLAConfig.from_target(tiny_target.config, draft_vocab_size=20))
    draft.generation_config.num_assistant_tokens = 3
    draft.save_pretrained(tmp_path / "saved")
    return (tmp_path / "saved").rename(tmp_path / "moved")


def run_fresh(tmp_path, target, sources, extra="", **environment):
    """Runs `LOAD_AND_GENERATE` in a new process, whose caches are empty the first time."""
    script = LOAD_AND_GENERATE.format(target=str(target), sources=sources, extra=extra)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=clean | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.strip().splitlines()[-1])


def test_directory_loads_in_a_fresh_process_and_again_after_saving_there(saved_target, saved_draft, tmp_path):
    extra = "draft.save_pretrained('again')"
    (first,) = run_fresh(tmp_path, saved_target, [("./moved", "main")], extra)
    shutil.rmtree(saved_draft)
    shutil.rmtree(tmp_path / "hf")
    (second,) = run_fresh(tmp_path, saved_target, [("again", "main")])
    for result in first, second:
        assert result["lossless"]
        assert result["rounds"] > 0
        assert result["num_assistant_tokens"] == 3
        assert result["code"].startswith("transformers_modules.")


def test_saved_directory_is_complete(saved_draft):
    names = {str(path.relative_to(saved_draft)) for path in saved_draft.rglob("*") if path.is_file()}
    code = {f"generation/{path.name}" for path in (saved_draft / "generation").glob("*.py")}
    assert {"generation/__init__.py", "generation/decoder.py"} < code
    root_files = {"config.json", "generation_config.json", "model.safetensors"}
    assert names == code | root_files | {"configuration_eagle3_mla.py", "modeling_eagle3_mla.py"}
    config = json.loads((saved_draft / "config.json").read_text())
    assert config["architectures"] == ["Eagle3MLADraftModel"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def mark(folder, marker: str):
    with (folder / "generation" / "__init__.py").open("a") as file:
        file.write(f"\nMARKER = {marker!r}\n")


def test_two_directories_of_one_name_keep_their_own_code(saved_target, saved_draft, tmp_path):
    """transformers files remote code by the folder's name and its root files; `generation/` may differ."""
    sources = []
    for name in ("one", "two"):
        folder = tmp_path / name / "draft"
        shutil.copytree(saved_draft, folder)
        mark(folder, name)
        sources.append((str(folder), "main"))
    results = run_fresh(tmp_path, saved_target, sources)
    assert [result["marker"] for result in results] == ["one", "two"]
    assert all(result["lossless"] for result in results)


def test_directory_without_the_decoding_code_says_so(saved_target, saved_draft, tmp_path):
    shutil.rmtree(saved_draft / "generation")
    with pytest.raises(AssertionError, match=r"FileNotFoundError: The folder `generation/` is missing"):
        run_fresh(tmp_path, saved_target, [("moved", "main")])


def test_hub_repository_loads_each_commit_with_its_own_code(saved_target, saved_draft, tmp_path):
    """Two commits in one process: code must never come from another commit than the model's."""
    commits = []
    for name in ("first", "second"):
        folder = tmp_path / "commits" / name
        shutil.copytree(saved_draft, folder)
        mark(folder, name)
        commits.append(folder)
    hub = LoopbackHub({"user/draft-1.0": commits})
    first, second = hub.commits("user/draft-1.0")
    sources = [("user/draft-1.0", first), ("user/draft-1.0", "main"), ("user/draft-1.0", second)]
    with hub.serve() as address:
        results = run_fresh(tmp_path, saved_target, sources, "draft.save_pretrained('copy')", HF_ENDPOINT=address)
    assert [result["marker"] for result in results] == ["first", "second", "second"]
    assert all(result["lossless"] for result in results)
    offline = run_fresh(tmp_path, saved_target, sources[:1], HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert offline[0]["marker"] == "first"
    (copied,) = run_fresh(tmp_path, saved_target, [("copy", "main")], HF_HUB_OFFLINE="1")
    assert copied["marker"] == "second"


KNOBS = [("num_assistant_tokens", value) for value in (0, 1, 7, 12)]
KNOBS += [("assistant_confidence_threshold", value) for value in (None, 0.0, 0.3)]
KNOBS += [("assistant_tree_top_k", 10), ("assistant_tree_depth", 3), ("num_assistant_tokens_schedule", "heuristic")]
KNOBS += [("draft_window", 512), ("draft_window_sink", 0), ("fixed_shapes", False), ("fixed_shapes", True)]


@pytest.mark.parametrize(("knob", "value"), KNOBS, ids=str)
def test_generation_knobs_survive_save_and_load(tiny_target, knob, value, tmp_path):
    draft = Eagle3MLADraftModel(Eagle3MLAConfig.from_target(tiny_target.config))
    assert draft.generation_config.num_assistant_tokens == 7
    assert draft.generation_config.assistant_confidence_threshold is None
    setattr(draft.generation_config, knob, value)
    draft.save_pretrained(tmp_path)
    loaded = Eagle3MLADraftModel.from_pretrained(tmp_path)
    assert getattr(loaded.generation_config, knob) == value
    assert loaded.generation_config.to_dict() == draft.generation_config.to_dict()


def test_checkpoint_without_a_generation_config_drafts_the_default_chain(tiny_target, tmp_path):
    draft = Eagle3MLADraftModel(Eagle3MLAConfig.from_target(tiny_target.config))
    draft.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = Eagle3MLADraftModel.from_pretrained(tmp_path)
    prompt = torch.tensor([[3, 4, 5]])
    tiny_target.generate(prompt, max_new_tokens=30, do_sample=False, assistant_model=loaded)
    assert 1 <= len(loaded.speculation_stats.drafted_by_depth) <= 7


def test_saving_over_the_loaded_directory_keeps_it_loadable(saved_draft):
    for _ in range(2):
        Eagle3MLADraftModel.from_pretrained(saved_draft).save_pretrained(saved_draft)
    assert not list(saved_draft.rglob("*.partial"))
