"""Law 4: train.py holds the only training loop."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(path for folder in ("minilm", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py"))


def test_only_train_py_updates_weights() -> None:
    def updates(path: Path) -> bool:
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
        return bool(names & {"backward", "zero_grad"})

    assert [path.name for path in SOURCES if updates(path)] == ["train.py"]
