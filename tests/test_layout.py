"""The import rules, held by reading the files: nothing here imports the package."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("generation", "training", "evaluation")
MODEL_FILES = {"configuration_eagle3_mla.py": [], "modeling_eagle3_mla.py": ["configuration_eagle3_mla"]}
# What the Hub loader takes for an import of ours, wherever in the text it stands (transformers.dynamic_module_utils).
RELATIVE_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\S*)", re.MULTILINE)


def own_imports(path: Path) -> set[str]:
    """Dotted names, from the repository root, of the modules of ours that the file at `path` imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.update(imported_from(node, path))
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.removeprefix("eagle3_mla.") for name in names if is_own(name)}


def imported_from(node: ast.ImportFrom, path: Path) -> list[str]:
    if node.level == 0:
        return [node.module]
    package = path.relative_to(ROOT).parent.parts
    base = ("eagle3_mla", *package[: len(package) - (node.level - 1)])
    tails = [node.module] if node.module else [alias.name for alias in node.names]
    return [".".join((*base, tail)) for tail in tails]


def is_own(name: str) -> bool:
    top = name.split(".")[0]
    return top == "eagle3_mla" or (ROOT / "tests" / f"{top}.py").exists()


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


def test_modeling_imports_the_configuration_only():
    assert own_imports(ROOT / "modeling_eagle3_mla.py") == {"configuration_eagle3_mla"}
    assert own_imports(ROOT / "configuration_eagle3_mla.py") == set()


@pytest.mark.parametrize(("name", "imports"), list(MODEL_FILES.items()), ids=MODEL_FILES)
def test_no_line_of_a_model_file_looks_like_another_relative_import(name, imports):
    """The Hub loader searches the raw text, docstrings included; for a file that does not exist loading fails."""
    assert RELATIVE_IMPORT.findall((ROOT / name).read_text(encoding="utf-8")) == imports


@pytest.mark.parametrize("path", sources("generation"), ids=lambda path: path.name)
def test_generation_imports_nothing_outside_itself(path):
    """It is loaded without the package around it, from wherever the model came."""
    assert {name.split(".")[0] for name in own_imports(path)} <= {"generation"}


@pytest.mark.parametrize("path", sources("training"), ids=lambda path: path.name)
def test_training_imports_neither_generation_nor_evaluation(path):
    assert not {name.split(".")[0] for name in own_imports(path)} & {"generation", "evaluation", "scripts"}


@pytest.mark.parametrize("path", sources(".", *PACKAGES, "scripts"), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_tests(path):
    assert not any((ROOT / "tests" / f"{name.split('.')[0]}.py").exists() for name in own_imports(path))


def test_every_package_is_installed():
    listed = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(ast.literal_eval(listed[1])) == {"eagle3_mla"} | {f"eagle3_mla.{name}" for name in folders}


def test_a_checkout_may_have_any_name(request):
    """The root is a package; pytest would import it under the folder's name, which `eagle3-mla` is not."""
    assert not any(isinstance(node, pytest.Package) for node in request.node.listchain())
