"""Config files, by path or by the name of one that comes with the package: FILE[:ARGUMENTS] or NAME[:ARGUMENTS]."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from idattn.choices import check_choice

_PACKAGE = Path(__file__).parent
# Inside an installed package; next to it in a checkout.
_FOLDER = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())


def config_names() -> list[str]:
    """The names of the config files that come with the package."""
    return sorted(file.stem for file in _FOLDER.glob("[!_]*.py"))


def load_module(name: str) -> ModuleType:
    """The module of a config file.

    Args:
      name: a name such as "paper", or the path of a file, which ends with .py.

    Raises:
      ValueError: no config has this name; the nearest is named.
      FileNotFoundError: there is no such file.
    """
    file = Path(name)
    if file.suffix != ".py":
        check_choice("config", name, config_names())
        file = _FOLDER / f"{name}.py"
    elif not file.is_file():
        hint = f"; the one that comes with the package is named {file.stem}" if file.stem in config_names() else ""
        raise FileNotFoundError(f"{name} does not exist{hint}.")
    spec = importlib.util.spec_from_file_location(f"idattn.configs.{file.stem}", file)
    assert spec is not None and spec.loader is not None, "as of every file that ends with .py"
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(text: str) -> ConfigDict:
    """The settings of a run, which `idattn.config.from_config_dict` checks.

    Args:
      text: as --config takes it, such as "quickstart", "paper:1.3B,interdomain" or "my_config.py:3".

    Raises:
      ValueError: the file has no `get_config`, or it takes other arguments; and as `load_module`.
      FileNotFoundError: as `load_module`.
    """
    name, *arguments = text.split(":", 1)
    get_config = getattr(load_module(name), "get_config", None)
    if get_config is None:
        raise ValueError(f"{name} has no get_config; name a config file that defines one.")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        raise ValueError(
            f"{text}: the config is get_config{inspect.signature(get_config)}, which does not take {arguments}."
        ) from None
    return get_config(*arguments)
