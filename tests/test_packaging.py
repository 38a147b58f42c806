"""Packaging: the version, the Python versions, CI, the extras and the image agree with each other and the text."""

import configparser
import re
import typing

import yaml

from minilm.config import Run
from tests.launch import ROOT
from tests.test_imports import ORDER

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
CI = (ROOT / ".ci" / "run").read_text()


def read_extra(extra: str) -> list[str]:
    """Return the names of the packages of an extra."""
    return re.findall(r"^[\w-]+", SETUP["options.extras_require"][extra], re.MULTILINE)


def test_the_version_is_in_setup_cfg_and_nowhere_else() -> None:
    version = SETUP["metadata"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    places = [*ROOT.glob("*.*"), *ROOT.glob("minilm/**/*.py"), *ROOT.glob("docs/*"), ROOT / "Dockerfile"]
    stated = re.compile(rf"(version\W{{1,6}}|minilm[- =v]+){re.escape(version)}\b", re.IGNORECASE)
    found = [path.name for path in places if path.is_file() and stated.search(path.read_text())]
    assert found == ["setup.cfg"]


def test_every_folder_of_minilm_is_a_package_that_setup_cfg_finds() -> None:
    folders = {path.parent for path in (ROOT / "minilm").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
    assert SETUP["options"]["packages"] == "find:"
    assert SETUP["options.packages.find"]["include"] == "minilm*"


def test_the_wheel_has_every_file_of_minilm_that_is_not_python() -> None:
    patterns = {
        package: [pattern.strip() for pattern in names.split(",")]
        for package, names in SETUP["options.package_data"].items()
    }
    packed = {
        path
        for package, names in patterns.items()
        for name in names
        for path in (ROOT / package.replace(".", "/")).glob(name)
    }
    files = {path for path in (ROOT / "minilm").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path for path in files if path.suffix != ".py"}


def test_the_workflow_calls_ci_run_on_every_python_of_setup_cfg() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    pythons = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert job["strategy"]["matrix"]["python-version"] == pythons
    last = int(pythons[-1].removeprefix("3."))
    assert SETUP["options"]["python_requires"] == f">={pythons[0]},<3.{last + 1}"


def test_ci_run_has_the_command_of_the_readme_and_the_checks_before_a_commit() -> None:
    command = re.search(r"pip install (-e \S+ && pytest)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert command is not None
    assert f"pip install -q {command[1]}\n" in CI
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert sorted(hook["name"] for hook in hooks) == ["mypy", "ruff check", "ruff format"]
    assert re.findall(r"^(ruff|mypy)(.*)$", CI, re.MULTILINE) == [
        *(("ruff", " format --check ."), ("ruff", " check ."), ("mypy", ""))
    ]


def test_the_extra_trackers_has_the_packages_that_run_trackers_takes() -> None:
    (names, _) = typing.get_args(typing.get_type_hints(Run)["trackers"])
    assert sorted(read_extra("trackers")) == sorted(typing.get_args(names))


def test_the_image_does_not_run_as_root_and_copies_what_the_build_reads() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "FROM python:3.11-slim" in lines
    assert lines.index("USER minilm") < lines.index('ENTRYPOINT ["minilm"]')
    copied = {"pyproject.toml", "setup.cfg", "README.md", "LICENSE", "minilm"}
    words = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert words == copied
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in kept if line.startswith("!")} == copied


def test_the_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:tests|minilm|docs|recipes)/[\w*/]+(?:\.\w+)?", text)
    modules = [name.replace(".", "/") + ".py" for name in re.findall(r"python -m (tests[\w.]+)", text)]
    assert len(paths) > 8
    assert len(modules) > 2
    built = "docs/api"
    assert [path for path in [*paths, *modules] if path != built and not list(ROOT.glob(path))] == []


def test_the_tree_in_the_readme_has_each_part_of_minilm_and_the_files_that_it_names() -> None:
    (tree,) = re.findall(r"^```\nminilm/\n(.*?)^\w", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^  (\w[\w.]*)/? (.*\n(?: {4,}.*\n)*)", tree, re.MULTILINE)
    assert {name for name, _ in entries} == {
        path.name for path in (ROOT / "minilm").iterdir() if path.name not in ("__init__.py", "py.typed", "__pycache__")
    }
    named = [ROOT / "minilm" / name / file for name, text in entries for file in re.findall(r"\((\w+\.py)\)", text)]
    assert len(named) >= 5
    assert [path for path in named if not path.exists()] == []


def test_the_order_of_packages_in_contributing_is_the_one_that_is_checked() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (order,) = re.findall(r"before it in this order: (.*?)\. ", text, re.DOTALL)
    assert tuple(name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", order)) == ORDER


def test_the_modules_that_the_changelog_names_as_new_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## 0.1.0")[0]
    cells = re.findall(r"^  \| `minilm.* \| (`minilm.*) \|$", text, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)]
    assert len(names) > 10
    assert [name for name in names if not (ROOT / (name.replace(".", "/") + ".py")).exists()] == []
