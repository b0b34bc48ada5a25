"""Packages that only some sources and tokenizers need."""

import importlib
from types import ModuleType


def load(package: str, user: str, extra: str = "data") -> ModuleType:
    """The package that `user` needs; an ImportError that says how to install it where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        distribution = "backports.zstd" if package.startswith("backports") else package.split(".")[0]
        raise ImportError(f"{user} needs the package {distribution}: pip install idattn[{extra}].") from error
