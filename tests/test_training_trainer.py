"""Training end to end on a tiny target: the global batch, checkpoints, resuming, the result, wrong requests."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference_runs import assert_same_bits, command_line, error_of, run, run_whole_and_joined, training_flags
from reference_ttt import CONVERSATIONS, save_tiny_target, tiny_config, tiny_target, write_conversations
from safetensors.torch import load_file
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig

from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel
from eagle3_mla.training import cli, feature_preparation, trainer
from eagle3_mla.training.arguments import Eagle3TrainingArguments
from eagle3_mla.training.batching import LengthGroupedSampler, PaddingCollator
from eagle3_mla.training.data import tokenize_conversations
from eagle3_mla.training.sources import load_conversations
from eagle3_mla.training.target import Teacher
from eagle3_mla.training.trainer import Eagle3Trainer, find_checkpoint
from eagle3_mla.training.ttt import TTTDraftModel

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

NUM_TTT_STEPS = 3


@pytest.fixture(scope="module")
def target_path(tmp_path_factory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def dataset_path(tmp_path) -> Path:
    return write_conversations(tmp_path / "train.jsonl", CONVERSATIONS)


@pytest.fixture
def command(target_path, tmp_path):
    """Flags of the smallest run: 5 conversations, 2 a step, 3 steps an epoch, 8 steps."""
    steps = {"max_steps": "8", "save_steps": "2", "logging_steps": "2"}
    return training_flags(tmp_path, target_path, num_ttt_steps="3", per_device_train_batch_size="2", **steps)


def make_trainer(rows, target, output_dir: Path, **overrides) -> Eagle3Trainer:
    torch.manual_seed(0)
    config = tiny_config(vocab_size=target.config.vocab_size, draft_vocab_size=100)
    arguments = {"learning_rate": 1e-3, "num_ttt_steps": NUM_TTT_STEPS, "use_cpu": True, "disable_tqdm": True}
    args = Eagle3TrainingArguments(output_dir=str(output_dir), save_strategy="no", **arguments | overrides)
    draft = TTTDraftModel(config).double()
    return Eagle3Trainer(draft, Teacher(target, draft), args, train_dataset=rows, data_collator=PaddingCollator(0))


def test_accumulated_micro_batches_have_the_gradient_of_one_batch(target_path, dataset_path, tmp_path):
    """Each micro-batch must be divided by the rows of all of them, at each TTT step, not by its own."""
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    rows = tokenize_conversations(load_conversations(str(dataset_path)), tokenizer, 64)
    target = tiny_target(vocab_size=len(tokenizer)).double()
    gradients = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        run_trainer = make_trainer(
            rows,
            target,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=1.0,
        )
        before = {name: weight.detach().clone() for name, weight in run_trainer.draft.named_parameters()}
        run_trainer.train()
        gradients.append({name: weight - before[name] for name, weight in run_trainer.draft.named_parameters()})
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, atol=1e-10, rtol=1e-7)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_an_interrupted_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(command):
    """Interrupted after 3, 5 and 7 of 8 steps, 3 to an epoch: resumed at 2, 4 and 6, within and between epochs."""
    whole, all_joined = run_whole_and_joined(command, [3, 5, 7])
    for joined in all_joined:
        assert joined.resolve().name == "checkpoint-8"
        assert_same_bits(whole, joined, "model.safetensors")


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(command, tmp_path, monkeypatch):
    save_state = Eagle3Trainer._save_rng_state

    def die_at_step_4(self, output_dir):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        save_state(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Eagle3Trainer, "_save_rng_state", die_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            run(command)
    output_dir = tmp_path / "out"
    assert find_checkpoint("True", str(output_dir)) == str((output_dir / "checkpoint-2").resolve())
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-2"]
    run(command, "--resume-from-checkpoint")
    assert not (output_dir / trainer.STAGING_DIRECTORY).exists()
    assert (output_dir / "checkpoint").resolve().name == "checkpoint-8"


def test_the_result_and_the_newest_checkpoint_load_as_drafts(command, tmp_path):
    run(command, "--save-total-limit", "2")
    output_dir = tmp_path / "out"
    assert (output_dir / "checkpoint").is_symlink()
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    result = Eagle3MLADraftModel.from_pretrained(output_dir)
    newest = Eagle3MLADraftModel.from_pretrained(output_dir / "checkpoint")
    for name, tensor in result.state_dict().items():
        assert torch.equal(tensor, newest.state_dict()[name])
    assert result.config.architectures == ["Eagle3MLADraftModel"]
    assert (output_dir / "modeling_eagle3_mla.py").exists()
    assert not any(path.name.startswith(".") for path in output_dir.iterdir())


def test_the_result_says_where_it_comes_from(command, tmp_path, target_path):
    run(command)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["target"] == str(target_path)
    assert len(provenance["data_sha256"]) == 64
    assert provenance["num_steps"] == 8
    assert provenance["versions"].keys() >= {"torch", "transformers", "eagle3-mla"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: transformers" in card
    assert "{" not in card.split("```")[0]
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy_0", "accuracy_2", "simulated_acceptance_length"} <= log[0].keys()


def test_training_learns_to_imitate_the_target(command, tmp_path):
    run(command | {"--max-steps": "150", "--save-steps": "150", "--learning-rate": "0.02", "--logging-steps": "10"})
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    lengths = [entry["simulated_acceptance_length"] for entry in log if "simulated_acceptance_length" in entry]
    assert lengths[0] < 1.5
    assert lengths[-1] > 2


@pytest.mark.parametrize("backend", ["flex_attention_mla", "eager_mla", "flex_attention", "sdpa", "eager"])
def test_every_backend_trains_the_attention_that_its_name_says(backend, command, tmp_path):
    run(command | {"--attention-backend": backend, "--max-steps": "1", "--save-steps": "1"})
    draft = Eagle3MLADraftModel.from_pretrained(tmp_path / "out")
    assert draft.config.attention_type == ("mla" if backend.endswith("_mla") else "gqa")


def test_metrics_are_those_of_the_rows_since_the_last_log(target_path, dataset_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    rows = tokenize_conversations(load_conversations(str(dataset_path)), tokenizer, 64)
    target = tiny_target(vocab_size=len(tokenizer)).double()
    run_trainer = make_trainer(
        rows, target, tmp_path, learning_rate=0.0, max_steps=2, per_device_train_batch_size=5, logging_steps=1
    )
    run_trainer.train()
    first, second = (entry for entry in run_trainer.state.log_history if "accuracy_0" in entry)
    assert first["accuracy_0"] == second["accuracy_0"]
    assert first["simulated_acceptance_length"] == second["simulated_acceptance_length"]


def test_the_order_of_rows_depends_on_seed_and_epoch_alone():
    lengths = torch.randint(3, 100, (103,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler, other = (LengthGroupedSampler(lengths, batch_size=4, seed=3) for _ in range(2))
    first = list(sampler)
    assert sorted(first) == list(range(104))
    assert first[-1] == 103  # behind the last row
    sampler.set_epoch(1)
    other.set_epoch(1)
    assert list(sampler) == list(other) != first
    spans = [
        max(batch) - min(batch) for batch in ([lengths[row] for row in first[i : i + 4]] for i in range(0, 100, 4))
    ]
    assert sum(spans) / len(spans) < 10


def test_the_order_of_rows_follows_the_seed_of_the_data(target_path, dataset_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    rows = tokenize_conversations(load_conversations(str(dataset_path)), tokenizer, 64)
    target = tiny_target(vocab_size=len(tokenizer)).double()
    seeds = {"seed": 3, "data_seed": None}, {"seed": 4, "data_seed": 3}, {"seed": 3, "data_seed": 4}
    sizes = {"per_device_train_batch_size": 1}
    orders = [list(make_trainer(rows, target, tmp_path, **sizes, **each)._get_train_sampler()) for each in seeds]
    assert orders[0] == orders[1] != orders[2]


WRONG_REQUESTS = {
    "missing dataset": ({"--dataset": "./nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    "missing target": (
        {"--model-path": "./nowhere"},
        "The target ./nowhere cannot be loaded: there is no such folder here",
    ),
    "draft vocabulary too large": (
        {"--draft-vocab-size": "100000"},
        "`--draft-vocab-size` must be between 1 and the target's",
    ),
    "odd rope dimension": ({"--mla-rope-dim": "3"}, "`mla_rope_dim` must be 0 or a positive even number"),
    "rope dimension without mla": (
        {"--attention-backend": "sdpa", "--mla-rope-dim": "4"},
        'with "gqa" they must be 0',
    ),
    "no ttt step": ({"--num-ttt-steps": "0"}, "`--num-ttt-steps` must be at least 1"),
    "a decay that is not a number": ({"--ttt-decay": "nan"}, "`--ttt-decay` must be above 0 and finite, got nan"),
    "an infinite decay": ({"--ttt-decay": "inf"}, "`--ttt-decay` must be above 0 and finite, got inf"),
    "a decay whose powers overflow": ({"--ttt-decay": "1e300"}, "`--ttt-decay` must give finite weights"),
    "a step weight that is not a number": (
        {"--ttt-step-weights": "nan 1 1"},
        "`--ttt-step-weights` must give finite weights of at least 0, not all of them 0, got [nan, 1.0, 1.0].",
    ),
    "a negative step weight": ({"--ttt-step-weights": "-1 1 1"}, "got [-1.0, 1.0, 1.0]."),
    "no step weight above 0": ({"--ttt-step-weights": "0 0 0"}, "not all of them 0, got [0.0, 0.0, 0.0]."),
    "a gradient norm that is not a number": ({"--max-grad-norm": "nan"}, "`--max-grad-norm` must be at least 0"),
    "a negative learning rate": ({"--learning-rate": "-1"}, "`--learning-rate` must be at least 0 and finite, got -1"),
    "a learning rate that is not a number": ({"--learning-rate": "nan"}, "at least 0 and finite, got nan"),
    "negative weight decay": ({"--weight-decay": "-1"}, "`--weight-decay` must be at least 0 and finite, got -1"),
    "a weight decay that is not a number": ({"--weight-decay": "nan"}, "`--weight-decay` must be at least 0"),
    "a batch of nothing": (
        {"--per-device-train-batch-size": "0"},
        "`--per-device-train-batch-size` must be at least 1, got 0",
    ),
    "no micro-batch": ({"--gradient-accumulation-steps": "0"}, "`--gradient-accumulation-steps` must be at least 1"),
    "no epoch": (
        {"--num-train-epochs": "0", "--max-steps": "-1"},
        "`--num-train-epochs` must be above 0 and finite, got 0.0",
    ),
    "a beta of one": ({"--adam-beta2": "1"}, "`--adam-beta2` must be at least 0 and below 1, got 1.0"),
    "a beta that is not a number": ({"--adam-beta1": "nan"}, "`--adam-beta1` must be at least 0 and below 1, got nan"),
    "an epsilon of zero": ({"--adam-epsilon": "0"}, "`--adam-epsilon` must be above 0 and finite, got 0"),
    "logging that is not a number": ({"--logging-steps": "nan"}, "`--logging-steps` must be above 0 and finite"),
    "saving that is not a number": ({"--save-steps": "nan"}, "`--save-steps` must be above 0 and finite, got nan"),
    "epochs that are not a number": ({"--num-train-epochs": "nan"}, "`--num-train-epochs` must be above 0 and finite"),
    "a negative seed": ({"--seed": "-1"}, "`--seed` must be between 0 and 4294967295, got -1"),
    "a negative seed of the data": ({"--data-seed": "-1"}, "`--data-seed` must be between 0 and 4294967295, got -1"),
    "noise on embeddings": ({"--neftune-noise-alpha": "5"}, "`--neftune-noise-alpha` must be left out, got 5.0: "),
    "an evaluation": ({"--eval-on-start": "True"}, "`--eval-on-start` must be left out, got True: "),
    "Liger kernels": ({"--use-liger-kernel": "True"}, "`--use-liger-kernel` must be left out, got True: "),
    "more rows than memory": (
        {"--dataset-weights": "1e9"},
        "train.jsonl in an epoch, got 1000000000.0, which makes 5e+09 of its 5.",
    ),
    "a weight near infinity": ({"--dataset-weights": "1e308"}, "which makes inf of its 5."),
    "a weight that draws no row": (
        {"--dataset-weights": "1e-9"},
        "`--dataset-weights` must give between 1 and 100000000 rows of ",
    ),
    "a split of a file": ({"--dataset-split": "foo"}, "`--dataset-split` must be train for "),
    "fewer rows than a step": (
        {"--per-device-train-batch-size": "64", "--dataloader-drop-last": "True"},
        "`--dataloader-drop-last` leaves no step: a step takes 64 rows, and there are 5",
    ),
    "unwritable directory": ({"--output-dir": "/dev/null/out"}, "is not writable"),
    "nothing to resume": ({"--resume-from-checkpoint": "True"}, "is no complete checkpoint"),
    "a tracker that is not installed": (
        {"--report-to": "tensorboard"},
        "`--report-to` tensorboard cannot be used: TensorBoardCallback requires tensorboard to be installed.",
    ),
    "a tracker that nobody knows": ({"--report-to": "notebook"}, "notebook is not supported, only"),
    "unknown backend": ({"--attention-backend": "paged"}, "invalid choice: 'paged'"),
}


@pytest.mark.parametrize("request_name", WRONG_REQUESTS)
def test_a_wrong_request_is_one_message_and_leaves_nothing(request_name, command, tmp_path, capsys, monkeypatch):
    """Before the target is loaded, and before the output directory exists."""
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    monkeypatch.setattr(cli, "load_target", lambda *args: pytest.fail("the target was loaded"))
    flags, message = WRONG_REQUESTS[request_name]
    error = error_of(command | flags, capsys)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_no_result(command, tmp_path, caplog):
    assert run(command | {"--learning-rate": "1e20", "--max-steps": "4"}) == 1
    assert "holds a number that is not finite: no result is written" in caplog.text
    assert (tmp_path / "out" / "checkpoint-4" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_target_whose_weights_are_cut_is_refused(command, target_path, tmp_path, capsys):
    cut = tmp_path / "cut"
    shutil.copytree(target_path, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error = error_of(command | {"--model-path": str(cut)}, capsys)
    assert f"The weights in {cut} are damaged or incomplete (" in error


def test_a_target_without_a_decoder_of_its_own_is_refused(command, target_path, tmp_path, capsys):
    """`get_decoder()` of Llama 4 gives the whole model, whose output has no last hidden state."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 2}
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = Llama4TextConfig(vocab_size=len(tokenizer), **sizes, **heads, **ids)
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "llama4")
    tokenizer.save_pretrained(tmp_path / "llama4")
    flags = command | {"--model-path": str(tmp_path / "llama4")}
    message = "error: The target Llama4ForCausalLM is not supported in training: "
    assert message in error_of(flags, capsys)
    names = ("--model-path", "--dataset", "--output-dir", "--use-cpu")
    with pytest.raises(SystemExit) as exit_info:
        feature_preparation.main(command_line({name: flags[name] for name in names}))
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_whose_weights_are_cut_is_not_resumed(command, tmp_path, capsys):
    run(command | {"--max-steps": "2"})
    weights = tmp_path / "out" / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "are damaged or incomplete (" in error_of(command | {"--resume-from-checkpoint": "True"}, capsys)


def test_resuming_with_another_draft_or_other_data_is_refused(command, tmp_path, capsys):
    run(command | {"--max-steps": "2", "--draft-vocab-size": "100"})
    resume = command | {"--resume-from-checkpoint": "True", "--draft-vocab-size": "100"}
    assert "`mla_latent_dim` is 2 in" in error_of(resume | {"--mla-latent-dim": "6"}, capsys)
    other = write_conversations(tmp_path / "other.jsonl", [[("user", "z"), ("assistant", "qqq zzz ### qqq !!!")]])
    assert "another draft vocabulary" in error_of(resume | {"--dataset": str(other)}, capsys)


def test_mixed_precision_trains_and_saves_float32_weights(command, tmp_path):
    for backend in ("sdpa_mla", "eager_mla"):
        run(command | {"--attention-backend": backend, "--bf16": "True", "--max-steps": "2"})
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert weights["lm_head.weight"].dtype == torch.float32
        assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.slow
def test_two_processes_train_what_one_trains(command, tmp_path):
    """The same global batch: the gradient average over processes must not divide the loss a second time.

    Without Muon, which rounds gradients to bfloat16: where their last bits differ, that is seen in the weights.
    """
    script = Path(__file__).parents[1] / "scripts" / "train_eagle3.py"
    command |= {"--max-steps": "3", "--save-strategy": "no", "--muon-learning-rate": "0"}
    for num_processes, name in ((1, "one"), (2, "two")):
        flags = command | {
            "--output-dir": str(tmp_path / name),
            "--per-device-train-batch-size": str(4 // num_processes),
        }
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), script]
        subprocess.run([*launch, *command_line(flags)], check=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_documented_command_runs_from_a_shell(command, tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "train_eagle3.py"
    documented = {"--attention-backend": "flex_attention_mla", "--output-dir": "./outputs/eagle3-mla"}
    subprocess.run([sys.executable, script, *command_line(command | documented)], cwd=tmp_path, check=True)
    assert (tmp_path / "outputs" / "eagle3-mla" / "checkpoint" / "model.safetensors").exists()
