"""README and documentation: their commands name flags that exist, their links lead somewhere."""

import argparse
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Those that ask a parser for their arguments, and nothing before.
SCRIPTS = {path.name for path in (ROOT / "scripts").glob("*.py") if "import main" in path.read_text(encoding="utf-8")}
# The rest of a command, across lines that end with a backslash, up to the next command or comment.
COMMAND = re.compile(r"scripts/(\w+\.py)((?:\\\n|[^\n|;&#])*)")
FLAG = re.compile(r"(?<!\S)--[a-z][\w-]*")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MACHINE_PATH = re.compile(r"(?<![\w.:/>-])/(?:home|root|tmp|mnt|opt|srv|usr|var|work|Users)/")


class ParserFoundError(Exception):
    """Carries the parser of a script out of it, before it does anything."""


@cache
def flags_of(script: str) -> set[str]:
    """All flags of a script, from the parser that it asks for its arguments."""

    def stop(parser, *args, **kwargs):
        raise ParserFoundError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [script])
        with pytest.raises(ParserFoundError) as found:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    return set(found.value.args[0]._option_string_actions)


def code_of(text: str) -> str:
    """Code blocks, in fences and indented by four spaces."""
    return "\n".join(FENCED.findall(text) + INDENTED.findall(FENCED.sub("", text)))


def prose_of(text: str) -> str:
    return INDENTED.sub("", FENCED.sub("", text))


def anchors_of(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_of(page: Path) -> list[tuple[str, set[str]]]:
    """Script and flags of every command on a page."""
    commands = COMMAND.findall(code_of(page.read_text(encoding="utf-8")))
    return [(script, set(FLAG.findall(rest))) for script, rest in commands]


def test_commands_are_found_on_the_pages():
    found = {script for page in PAGES for script, flags in commands_of(page) if flags}
    assert found >= {"train_eagle3.py", "eval_eagle.py", "prepare_features.py", "regenerate_dataset.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_flags_that_their_script_has(page):
    for script, flags in commands_of(page):
        assert not flags or script in SCRIPTS, script
        assert not flags or flags <= flags_of(script), (script, flags - flags_of(script))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in LINK.findall(prose_of(page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), link
        assert linked.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors_of(linked), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_path_of_somebodys_machine(page):
    assert MACHINE_PATH.findall(page.read_text(encoding="utf-8")) == []
