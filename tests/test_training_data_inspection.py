"""`--inspect-data`: what a run would learn from, on one page, with nothing written and no target loaded."""

import json

import pytest
from reference_templates import tokenizer_like
from reference_ttt import CONVERSATIONS, save_tiny_target, tiny_tokenizer, write_conversations
from rich.console import Console

from eagle3_mla.training import cli
from eagle3_mla.training.arguments import DataArguments
from eagle3_mla.training.data import prepare_rows
from eagle3_mla.training.inspection import choose_evenly, describe_template, print_row

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def printed_row(tmp_path, tokenizer, conversation, **console_arguments) -> str:
    path = write_conversations(tmp_path / "train.jsonl", [conversation])
    rows = prepare_rows(DataArguments(dataset=[str(path)]), tokenizer).rows
    console = Console(width=100, record=True, **console_arguments)
    with console.capture() as capture:
        print_row(console, rows, 0, tokenizer)
    return capture.get()


def test_what_is_supervised_is_coloured(tmp_path):
    text = printed_row(tmp_path, tiny_tokenizer(), CONVERSATIONS[1], force_terminal=True, color_system="standard")
    green, end = "\x1b[1;32m", "\x1b[0m"
    assert f"{green}1 2 3<end>{end}" in text
    assert f"{green}4 5 6 7<end>{end}" in text
    assert text.count(green) == 2
    assert "row 1 of 1" in text


def test_what_is_supervised_is_in_brackets_where_there_are_no_colours(tmp_path):
    text = printed_row(tmp_path, tiny_tokenizer(), CONVERSATIONS[1], force_terminal=False)
    assert "<assistant>«1 2 3<end>»<user>more<end><assistant>«4 5 6 7<end>»" in text


def test_text_that_looks_like_markup_is_printed_as_it_is(tmp_path):
    conversation = [("user", "[red]say[/red]"), ("assistant", "[bold]abc[/bold] [/]")]
    text = printed_row(tmp_path, tokenizer_like("phi3"), conversation, force_terminal=False)
    assert "[red]say[/red]<|end|>" in text
    assert "«[bold]abc[/bold] [/]<|end|>»" in text


def test_rows_are_chosen_at_equal_distances():
    assert choose_evenly(10, 3) == [0, 3, 6]
    assert choose_evenly(2, 5) == [0, 1]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (tiny_tokenizer(), "marks the answers with {% generation %}"),
        (tokenizer_like("gemma"), "does not mark the answers"),
        (tokenizer_like("mistral"), "`add_generation_prompt` changes nothing in it"),
    ],
    ids=["marked", "plain", "no prompt"],
)
def test_the_verdict_on_the_template_says_how_answers_are_found(tokenizer, message):
    assert message in describe_template(tokenizer)
    assert ("changes nothing" in describe_template(tokenizer)) == ("changes nothing" in message)


def test_a_tokenizer_without_template_is_said_to_have_none():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert "there is none" in describe_template(tokenizer)


def test_the_command_prints_the_data_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "load_target", lambda *args: pytest.fail("the target was loaded"))
    target = save_tiny_target(tmp_path / "target")
    (target / "model.safetensors").unlink()
    path = write_conversations(tmp_path / "train.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "say a few words"}) + "\n" + json.dumps({"text": ""}) + "\n")
    output = tmp_path / "out"
    flags = f"--model-path {target} --output-dir {output} --draft-vocab-size 60 --use-cpu --inspect-data 2 --packing"
    code = cli.main(
        [*flags.split(), "--dataset", str(path), str(bad), "--skip-bad-rows", "--dataset-weights", "2", "1"]
    )
    text = capsys.readouterr().out
    assert code == 0
    assert not output.exists()
    assert "row 1 of 11" in text
    assert "«abc abc abc<end>»" in text
    assert "first refusal of" in text
    assert "Row 2: `text` must be text that is not empty" in " ".join(text.split())
    assert "60 of 280 tokens cover" in text
    assert "of the tokens are supervised" in " ".join(text.split())


def test_data_that_cannot_be_used_end_the_command_with_one_message(tmp_path, capsys):
    target = save_tiny_target(tmp_path / "target")
    path = write_conversations(tmp_path / "train.jsonl", [[("user", "say abc")]])
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--model-path", str(target), "--dataset", str(path), "--use-cpu", "--inspect-data", "2"])
    assert exit_info.value.code == 2
    assert "Row 1 has no assistant turn" in capsys.readouterr().err
