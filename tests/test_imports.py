"""The order of the packages and the names in them: imports go one way, and a public name has one meaning."""

import ast
import collections
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT

ORDER = (
    *("utils", "config", "data", "models", "optim", "objectives", "distributed", "runs"),
    *("train", "commands"),
)
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "minilm").rglob("*.py"))


def find_imports(path: Path) -> set[str]:
    """Return the packages of minilm that a module imports, anywhere in the file, and the modules beside packages."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module} if node.module != "minilm" else {f"minilm.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in modules if name and name.startswith("minilm.")}


def find_package(path: Path) -> str:
    """Return the package of a module, or the module itself if it is beside the packages."""
    return path.parts[1].removesuffix(".py")


def find_wrong_imports(path: Path) -> set[str]:
    """Return the packages that a module imports although they come after its own."""
    own = ORDER.index(find_package(path))
    return {part for part in find_imports(path) if part in ORDER and ORDER.index(part) > own}


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=str)
def test_a_module_imports_only_from_packages_before_its_own(path: Path) -> None:
    assert find_wrong_imports(path) == set()


def test_the_order_has_every_package_and_no_other() -> None:
    assert {find_package(path) for path in FILES} == {*ORDER, "__init__"}


def test_a_wrong_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "minilm" / "data" / "wrong.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text(
        "def load():\n    from minilm.models.head import Head\n    import minilm.train\n", encoding="utf-8"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert find_wrong_imports(Path("minilm", "data", "wrong.py")) == {"models", "train"}


@pytest.mark.parametrize("module", ["minilm", "minilm.config", "minilm.config.command_line", "minilm.commands.main"])
def test_settings_and_commands_import_no_large_library_at_first(module: str) -> None:
    program = f"import sys, {module}; print(*{{'torch', 'transformers', 'datasets', 'numpy'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout.strip() == b""


@pytest.mark.parametrize("package", [part for part in ORDER if (ROOT / "minilm" / part).is_dir()])
def test_a_package_says_what_is_in_it(package: str) -> None:
    doc = ast.get_docstring(ast.parse((ROOT / "minilm" / package / "__init__.py").read_text(encoding="utf-8")))
    assert doc is not None
    assert len(doc.splitlines()) >= 2


def find_repeated_names(folder: Path) -> dict[str, list[str]]:
    """Return the public names of modules, classes and functions below a folder that occur in more than one module.

    A module may hold a function of its own name.
    """
    places = collections.defaultdict(set)
    for path in sorted(folder.rglob("*.py")):
        module = path.relative_to(folder).as_posix()
        names = [] if path.stem == "__init__" else [path.stem]
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.append(node.name)
        for name in names:
            if not name.startswith("_"):
                places[name].add(module)
    return {name: sorted(modules) for name, modules in places.items() if len(modules) > 1}


def test_a_public_name_is_defined_in_one_module() -> None:
    assert find_repeated_names(ROOT / "minilm") == {}


def test_a_repeated_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "load.py").write_text("class Batch: ...\ndef load(): ...\ndef _private(): ...\n")
    (tmp_path / "two.py").write_text("def load(): ...\nclass Batch:\n    def save(self): ...\ndef _private(): ...\n")
    (tmp_path / "three.py").write_text("class Other:\n    def save(self): ...\n")
    assert find_repeated_names(tmp_path) == {"Batch": ["one/load.py", "two.py"], "load": ["one/load.py", "two.py"]}
