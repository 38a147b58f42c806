"""One fact, one place: the version, the Pythons, what CI calls, and the packages that trackers are."""

import configparser
import re
import typing

import yaml

from minilm.config import Run
from tests.launch import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
CI = (ROOT / ".ci" / "run").read_text()


def packages(extra: str) -> list[str]:
    """Names of the packages of an extra."""
    return re.findall(r"^[\w-]+", SETUP["options.extras_require"][extra], re.MULTILINE)


def test_the_version_is_in_setup_cfg_and_nowhere_else() -> None:
    version = SETUP["metadata"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    places = [*ROOT.glob("*.*"), *ROOT.glob("minilm/**/*.py"), *ROOT.glob("docs/*"), ROOT / "Dockerfile"]
    stated = re.compile(rf"(version\W{{1,6}}|minilm[- =v]+){re.escape(version)}\b", re.IGNORECASE)
    found = [path.name for path in places if path.is_file() and stated.search(path.read_text())]
    assert found == ["setup.cfg"]


def test_the_workflow_calls_ci_run_on_every_python_of_setup_cfg() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    pythons = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert job["strategy"]["matrix"]["python-version"] == pythons
    last = int(pythons[-1].removeprefix("3."))
    assert SETUP["options"]["python_requires"] == f">={pythons[0]},<3.{last + 1}"


def test_ci_run_is_the_readme_s_command_lint_and_types_as_before_a_commit() -> None:
    command = re.search(r"pip install (-e \S+ && pytest)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert command is not None
    assert f"pip install -q {command[1]}\n" in CI
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert sorted(hook["name"] for hook in hooks) == ["mypy", "ruff check", "ruff format"]
    assert re.findall(r"^(ruff|mypy)(.*)$", CI, re.MULTILINE) == [
        *(("ruff", " format --check ."), ("ruff", " check ."), ("mypy", ""))
    ]


def test_the_extra_trackers_is_what_run_trackers_takes() -> None:
    (names, _) = typing.get_args(typing.get_type_hints(Run)["trackers"])
    assert sorted(packages("trackers")) == sorted(typing.get_args(names))


def test_the_image_runs_as_a_user_who_is_not_root_and_has_what_the_build_reads() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "FROM python:3.11-slim" in lines
    assert lines.index("USER minilm") < lines.index('ENTRYPOINT ["minilm"]')
    copied = {"pyproject.toml", "setup.cfg", "README.md", "LICENSE", "minilm"}
    words = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert words == copied
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in kept if line.startswith("!")} == copied
