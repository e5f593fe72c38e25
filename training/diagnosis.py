"""`--diagnose`: why is the acceptance 1.x?

Eight checks, each with a verdict, what was measured, and what to do. They look along the way from the text to the
accepted token: data, vocabulary, the target's agreement with the data, the states read, the unroll, the draft itself.

| check | asks |
|---|---|
| mask and template | are whole answers supervised, with their ends and nothing else |
| draft vocabulary | can the draft say what the data and the target say |
| data against target | are the data what the target would say |
| length | has the draft seen positions as far as it is used |
| feature layers | does the draft read the target's states where its configuration says |
| training against decoding | does the unroll compute what decoding computes |
| feedback norm | do the states that are fed back keep their size |
| overfitting one batch | can the draft learn at all |
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .diagnosis_case import FAILED, OK, WARNING, Case, Finding
from .diagnosis_data import check_agreement, check_lengths, check_masks, check_vocabulary
from .diagnosis_draft import check_feedback, check_overfitting, check_parity
from .diagnosis_layers import check_layers

DIAGNOSIS_FILE = "diagnosis.json"
CHECKS = (
    check_masks,
    check_vocabulary,
    check_agreement,
    check_lengths,
    check_layers,
    check_parity,
    check_feedback,
    check_overfitting,
)
STYLES = {OK: "green", WARNING: "yellow", FAILED: "bold red"}


def diagnose(case: Case, console: Console) -> list[Finding]:
    """Runs all checks, the cheap ones first, saying on `console` which one is running."""
    findings = []
    for check in CHECKS:
        with console.status(f"{check.__name__.replace('_', ' ')} ..."):
            findings.append(check(case))
    return findings


def report_diagnosis(case: Case, output_dir: Path, origin: dict[str, Any]) -> int:
    """
    Diagnoses, prints the table and writes `diagnosis.json`.

    Args:
        case ([`Case`]): What is diagnosed.
        output_dir (`Path`): An existing directory.
        origin (`dict`): Command, commit and versions.

    Returns:
        `int`: The exit code, 0 if nothing failed.
    """
    console = Console()
    findings = diagnose(case, console)
    write_findings(output_dir, findings, origin)
    print_findings(console, findings)
    console.print(f"The numbers are in {output_dir / DIAGNOSIS_FILE}.", highlight=False, soft_wrap=True)
    return exit_code(findings)


def exit_code(findings: list[Finding]) -> int:
    """0 if nothing failed."""
    return int(any(finding.verdict == FAILED for finding in findings))


def print_findings(console: Console, findings: list[Finding]) -> None:
    """A table of the verdicts, and the borders of a few answers, which only a person can judge."""
    table = Table(show_lines=True)
    for column in ("check", "verdict", "what was measured, and what to do"):
        table.add_column(column)
    for finding in findings:
        verdict = f"[{STYLES[finding.verdict]}]{finding.verdict}[/]"
        text = escape_markup(finding.summary)
        if finding.verdict != OK:
            text += f"\n[{STYLES[finding.verdict]}]{escape_markup(finding.remedy)}[/]"
        table.add_row(finding.check, verdict, text)
    console.print(table)
    examples = next((finding.measured["examples"] for finding in findings if "examples" in finding.measured), [])
    for example in examples:
        parts = [("before", "dim"), ("first", "green"), ("last", "green"), ("after", "dim")]
        line = " ".join(f"[{style}]{escape_markup(repr(example[name]))}[/]" for name, style in parts)
        console.print(f"supervised between the dim parts: {line}", soft_wrap=True, highlight=False)


def write_findings(output_dir: Path, findings: list[Finding], origin: dict[str, Any]) -> None:
    """
    Writes `diagnosis.json`: `failed` (bool), `findings`, and where they come from.

    Args:
        output_dir (`Path`): An existing directory.
        findings (`list[Finding]`): Of all checks.
        origin (`dict`): Command, commit and versions.
    """
    report = {"failed": bool(exit_code(findings)), "findings": [vars(finding) for finding in findings]} | origin
    (output_dir / DIAGNOSIS_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def escape_markup(text: str) -> str:
    """Text in which rich sees no markup."""
    return text.replace("[", r"\[")
