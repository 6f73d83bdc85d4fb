"""Names of a package that are imported when they are first asked for."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """
    The `__getattr__` of a package whose public names must not cost the import of what they need.

    Args:
        package (`str`):
            The package's `__name__`.
        modules (`Mapping[str, str]`):
            Public name -> the module within the package that defines it.
    """

    def getattribute(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattribute
