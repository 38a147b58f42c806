"""The class of an objective, by its name and the file that defines it. A run records both in run.json."""

import hashlib
import importlib.util
import os
import sys
from typing import Any

from minilm.config import ObjectiveSettings, objective_settings


def name_class(kind: type[ObjectiveSettings]) -> dict[str, Any]:
    """Return how a run records a class of settings: its `name` and, if it is not one of minilm's, `defined_in`."""
    if kind.__module__ == objective_settings.__name__:
        return {"name": kind.__name__}
    return {"name": kind.__name__, "defined_in": {"module": kind.__module__, "file": _find_file(kind.__module__)}}


def find_class(name: str, defined_in: Any = None) -> type[ObjectiveSettings] | None:
    """Return the class that `name_class` describes; None if minilm defines no class of this name.

    A class of the user's is taken from its module if that is imported, or else imported from its file. Raise ValueError
    if the file is gone, cannot be imported, or does not define the class any more.
    """
    if defined_in is None:
        return find_builtin_classes().get(name)
    module, file = (str(defined_in.get(key)) for key in ("module", "file"))
    of_class = f"the objective {name} of this run is defined in {file}"
    for loaded in [*sys.modules.values()]:
        if _is_file_of(loaded, file) and isinstance(kind := getattr(loaded, name, None), type):
            return kind
    if not os.path.isfile(file):
        raise ValueError(f"{of_class}, which does not exist: put the file back, or import the class before")
    try:
        kind = getattr(_import_file(module, file), name, None)
    except Exception as error:
        # The user's file may raise anything.
        reason = " ".join(str(error).split())
        raise ValueError(f"{of_class}, which cannot be imported: {type(error).__name__}: {reason}") from error
    if not (isinstance(kind, type) and issubclass(kind, ObjectiveSettings)):
        raise ValueError(f"{of_class}, which does not define it any more: put the class back under this name")
    return kind


def find_builtin_classes() -> dict[str, type[ObjectiveSettings]]:
    """Return minilm's own classes of settings of objectives, by name."""
    kinds = [kind for kind in ObjectiveSettings.__subclasses__() if kind.__module__ == objective_settings.__name__]
    return {kind.__name__: kind for kind in kinds}


def _find_file(module: str) -> str:
    return os.path.abspath(getattr(sys.modules[module], "__file__", None) or f"<{module}>")


def _is_file_of(module: Any, file: str) -> bool:
    own = getattr(module, "__file__", None)
    return isinstance(own, str) and os.path.abspath(own) == file


def _import_file(module: str, file: str) -> Any:
    """Import a module by its name if that finds the file, or else from the file. Its neighbours can be imported."""
    if module != "__main__":
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        if spec is not None and spec.origin is not None and os.path.abspath(spec.origin) == file:
            return importlib.import_module(module)
    # A file such as random.py must not take the place of another module, so its name has a hash of its path.
    name = f"minilm_objective_{hashlib.blake2b(file.encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[name] = loaded
    sys.path.insert(0, os.path.dirname(file))
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(os.path.dirname(file))
    return loaded
