"""chalot: shrink a language model, say what that costs, and run it on the machine you have.

    chalot.convert("folder or org/name", "x.myai", scheme="nl4")
    with chalot.load("x.myai") as model:
        print(model.generate("Once upon a time", seed=1))

Names are imported when they are first used: `import chalot` itself costs next to nothing.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chalot.convert import convert
    from chalot.describe import describe
    from chalot.errors import ChalotError
    from chalot.export import export
    from chalot.load import Model, load
    from chalot.quant.scheme import Scheme
    from chalot.tokenizer import tokenizer

__all__ = ["ChalotError", "Model", "Scheme", "convert", "describe", "export", "load", "tokenizer"]
HOMES = {
    "ChalotError": "chalot.errors",
    "Model": "chalot.load",
    "Scheme": "chalot.quant.scheme",
    "convert": "chalot.convert",
    "describe": "chalot.describe",
    "export": "chalot.export",
    "load": "chalot.load",
    "tokenizer": "chalot.tokenizer",
}


class _Package(ModuleType):
    """Importing `chalot.load` must not put the module where the function of that name belongs."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in HOMES:
        raise AttributeError(f"module 'chalot' has no attribute {name!r}")
    value = getattr(import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
