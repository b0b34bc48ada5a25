"""Packages that only some sources and tokenizers need."""

import importlib
from types import ModuleType


def load(package: str, user: str) -> ModuleType:
    """The package that `user` needs; an ImportError that says how to install it where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{user} needs the package {package.replace('.', '-')}: pip install idattn[data].") from error
