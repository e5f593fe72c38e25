"""The text of the nano target: the Python standard library as conversations and as plain code.

Every function of the running interpreter's standard library becomes a "write this function" conversation (signature
and docstring in, source out), and every file becomes one plain text. Files, not functions, are split into training
and held-out, by a hash of the module's name: no function of a held-out file is seen in training by either route.
"""

import argparse
import ast
import hashlib
import json
import logging
import os
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

HELD_OUT_FRACTION = 0.05
MAX_ANSWER_CHARACTERS = 6000
MAX_DOCSTRING_CHARACTERS = 1000
# Tests, bundled packages, and folders that hold tables rather than code.
EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo", "encodings", "pydoc_data", "_bundled"
}  # fmt: skip
EXCLUDED_MODULES = {"html.entities", "msilib.schema", "msilib.sequence", "msilib.text", "stringprep", "this"}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One file of the standard library.

    Args:
        name (`str`): Dotted name; it decides the split.
        text (`str`): The file's source.
        tree (`ast.Module`): The parsed source.
    """

    name: str
    text: str
    tree: ast.Module

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def read_modules(stdlib: Path) -> Iterator[Module]:
    """The parseable modules below `stdlib`, tests and tables excluded, in the order of their paths."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if EXCLUDED_FOLDERS & set(parts) or name in EXCLUDED_MODULES or name.startswith("_sysconfigdata"):
            continue
        if not all(part.isidentifier() for part in parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield Module(name, text, tree)


def find_functions(node: ast.AST, classes: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    """Functions at module or class level, each with the names of its enclosing classes, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTION):
            yield classes, child
        elif isinstance(child, ast.ClassDef):
            yield from find_functions(child, (*classes, child.name))
        elif isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from find_functions(child, classes)


def body_without_docstring(function: ast.FunctionDef) -> list[ast.stmt]:
    return function.body if ast.get_docstring(function) is None else function.body[1:]


def normalised_body(function: ast.FunctionDef) -> str:
    """The body as `ast` prints it: equal for functions that differ in layout, comments or docstring only."""
    return "\n".join(ast.unparse(statement) for statement in body_without_docstring(function))


def is_trivial(function: ast.FunctionDef) -> bool:
    return all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        or ast.unparse(statement).startswith("raise NotImplementedError")
        for statement in body_without_docstring(function)
    )


def source_without_docstring(function: ast.FunctionDef, lines: list[str]) -> str | None:
    """The dedented source with decorators; `None` where taking the docstring out or dedenting changes the code."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
    kept = lines[first : function.end_lineno]
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        del kept[docstring.lineno - 1 - first : docstring.end_lineno - first]
        while len(kept) > docstring.lineno - 1 - first and not kept[docstring.lineno - 1 - first].strip():
            del kept[docstring.lineno - 1 - first]
    source = textwrap.dedent("\n".join(kept)).strip()
    try:
        parsed = ast.parse(source).body
    except SyntaxError:
        return None
    is_same = (
        len(parsed) == 1
        and isinstance(parsed[0], FUNCTION)
        and normalised_body(parsed[0]) == normalised_body(function)
    )
    return source if is_same else None


def request(function: ast.FunctionDef, classes: tuple[str, ...]) -> str:
    """The user's turn: signature, class where there is one, and the docstring, cut at a line's end if it is long."""
    kind = "method" if classes else "function"
    owner = f" of the class `{classes[-1]}`" if classes else ""
    sentence = f"Write the Python {kind} `{function.name}({ast.unparse(function.args)})`{owner}."
    docstring = (ast.get_docstring(function) or "").strip()
    if len(docstring) > MAX_DOCSTRING_CHARACTERS:
        docstring = docstring[:MAX_DOCSTRING_CHARACTERS].rpartition("\n")[0].rstrip()
    return f"{sentence}\n\n{docstring}" if docstring else sentence


def conversations(module: Module) -> Iterator[tuple[str, dict]]:
    """`(normalised body, row)` of every function of `module` that is worth asking for."""
    lines = module.text.split("\n")
    for classes, function in find_functions(module.tree):
        answer = None if is_trivial(function) else source_without_docstring(function, lines)
        if answer is None or len(answer) > MAX_ANSWER_CHARACTERS:
            continue
        yield (
            normalised_body(function),
            {
                "id": f"{module.name}:{'.'.join((*classes, function.name))}:{function.lineno}",
                "source": "stdlib",
                "documented": bool(ast.get_docstring(function)),
                "messages": [
                    {"role": "user", "content": request(function, classes)},
                    {"role": "assistant", "content": answer},
                ],
            },
        )


def unseen(rows: Iterable[tuple[str, dict]], seen_bodies: set[str]) -> Iterator[dict]:
    """Rows whose body is not among `seen_bodies`, every answer once."""
    answers = set()
    for body, row in rows:
        answer = row["messages"][1]["content"]
        if body not in seen_bodies and answer not in answers:
            answers.add(answer)
            yield row


def build_splits(stdlib: Path) -> dict[str, list[dict]]:
    """Rows of the four files, by file stem. A held-out function whose body occurs in training is left out."""
    modules = list(read_modules(stdlib))
    train = [module for module in modules if not module.is_held_out]
    held_out = [module for module in modules if module.is_held_out]
    train_bodies = {
        normalised_body(node) for module in train for node in ast.walk(module.tree) if isinstance(node, FUNCTION)
    }
    return {
        "train": list(unseen((pair for module in train for pair in conversations(module)), set())),
        "heldout": list(unseen((pair for module in held_out for pair in conversations(module)), train_bodies)),
        "code_train": [{"id": module.name, "text": module.text} for module in train],
        "code_heldout": [{"id": module.name, "text": module.text} for module in held_out],
    }


def write_jsonl(rows: list[dict], path: Path) -> None:
    """Writes beside `path`, then renames, so that an interrupted run leaves no half file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def count_characters(row: dict) -> int:
    return len(row["text"]) if "text" in row else sum(len(message["content"]) for message in row["messages"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the four .jsonl files")
    output_dir = parser.parse_args(argv).output_dir
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, rows in build_splits(Path(sysconfig.get_path("stdlib"))).items():
            write_jsonl(rows, output_dir / f"{name}.jsonl")
            documented = sum(row.get("documented", False) for row in rows)
            kind = "files" if name.startswith("code") else f"functions, {documented} documented"
            logger.info("%-12s %6d %s, %d characters", name, len(rows), kind, sum(map(count_characters, rows)))
    except OSError as error:
        parser.error(f"`--output-dir` must be a folder that can be written to, got {output_dir} ({error.strerror}).")


if __name__ == "__main__":
    main()
