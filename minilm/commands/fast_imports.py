"""Import torch and transformers in less time, for programs and commands. This file does not import them by itself."""

import atexit
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

# transformers imports these packages if they are installed, for images and for other tasks than minilm's.
_UNUSED_PACKAGES = ("scipy", "sklearn", "torchvision")
# These functions of torch._dynamo return a function that the compiler treats in another way.
_DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Switch garbage collection off in the block, so that large libraries are imported in four fifths of the time.

    Imports leave nothing to collect. All objects that exist at the end of the block stay out of garbage collection
    until the process ends.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Otherwise libraries report the frozen objects as leaks when the process ends.
        atexit.register(gc.unfreeze)
        if collects:
            gc.enable()


@contextmanager
def inference_imports(*, distributed: bool = False) -> Iterator[None]:
    """Do what `quick_imports` does, and first import transformers without the parts that inference does not use.

    These are packages for other tasks, torch's compiler, and torch.distributed. They take half of the time. For
    transformers, the packages and torch.distributed are missing until the process ends, so this function is for a
    command, which is a process of its own. The compiler is imported if something uses it. Nothing changes if the
    process has imported transformers' models before.

    distributed: whether the command uses torch.distributed.
    """
    with quick_imports():
        if "transformers.modeling_utils" not in sys.modules:
            _import_transformers(distributed=distributed)
        yield


def _import_transformers(*, distributed: bool) -> None:
    import torch

    _defer_compiler()
    if not distributed:
        torch.distributed.is_available = lambda: False
    # Python takes None as a package that is not installed.
    hidden: dict[str, Any] = {name: None for name in _UNUSED_PACKAGES if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        importlib.import_module("transformers.modeling_utils")
    finally:
        for name in hidden:
            del sys.modules[name]


class _DeferredPackage(ModuleType):
    """A package whose code runs when something reads an attribute that it lacks, or imports one of its modules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        spec: Any = self.__spec__
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)


def _defer_compiler() -> None:
    """Let Python import torch._dynamo when it is used, and not where transformers marks functions for it.

    The marks are lost. They matter to torch.compile alone, and only for kernels of GPUs.
    """
    import torch

    if "torch._dynamo" in sys.modules or (spec := importlib.util.find_spec("torch._dynamo")) is None:
        return
    package = importlib.util.module_from_spec(spec)
    for name in _DECORATORS:
        setattr(package, name, _return_function)
    sys.modules["torch._dynamo"] = torch._dynamo = package
    with suppress(ModuleNotFoundError):
        # transformers takes a class of this module for its masks.
        importlib.import_module("torch._dynamo._trace_wrapped_higher_order_op")
    package.__class__ = _DeferredPackage
    del package.__path__


def _return_function(function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Return the function, or a decorator that does so."""
    return _return_function if function is None else function
