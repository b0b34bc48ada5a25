"""The programs of the command `idattn NAME --flags`: modules with `define_flags()` and `main(arguments)`."""

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

import idattn
from idattn.choices import check_choice

# Imported when it is run. The first line of the module's docstring is what `idattn --help` shows.
PROGRAMS = {
    "train": "idattn.cli.train",
    "generate": "idattn.cli.generate",
    "evaluate": "idattn.cli.evaluate",
    "export": "idattn.cli.export",
    "describe": "idattn.cli.describe",
    "prepare-data": "idattn.cli.prepare_data",
    "inspect-data": "idattn.cli.inspect_data",
    "study": "idattn.cli.study",
    "plot-kernel": "idattn.cli.plot_kernel",
    "plot-ideal": "idattn.cli.plot_ideal",
}
TRACEBACK = "IDATTN_TRACEBACK"  # environment variable: show where a user's mistake was noticed
_PACKAGE = str(Path(idattn.__file__).parent)


def main() -> None:
    """Run the program that the command line names: what the command `idattn` calls."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(f"{idattn.__doc__}\n\nidattn NAME --flags, and idattn NAME --help for the flags of one:\n")
        for program in PROGRAMS:
            print(f"  {program:<14}{summary(program)}")
    elif name == "--version":
        print(idattn.__version__)
    else:
        run(name, arguments)


def run(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a program, and exit with its status.

    A mistake of the user (a ValueError, NotImplementedError or FileNotFoundError of this package, or a flag that does
    not parse) ends it with one line and status 2; the environment variable IDATTN_TRACEBACK=1 shows where it was
    noticed.

    Args:
      name: of the program, with dashes or underscores.
      arguments: of the program; None for those of this process.

    Raises:
      SystemExit: always.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.argv = [f"idattn {name}", *arguments]  # where config flags look for the settings that they override
    try:
        module = load(name)
        if {"--help", "-h"} & {*arguments}:
            print(f"{module.__doc__}\n{flags.FLAGS.module_help(module)}")
            sys.exit()
        app.run(module.main, argv=sys.argv, flags_parser=_parse)
    except (ValueError, NotImplementedError, FileNotFoundError, flags.Error) as error:
        if os.environ.get(TRACEBACK) or not _is_of_user(error):
            raise
        print(f"idattn {name}: {error}", file=sys.stderr)
        sys.exit(2)


def load(name: str):
    """The module of a program, its flags defined.

    Raises:
      ValueError: there is no such program; the nearest is named.
    """
    name = name.replace("_", "-")
    check_choice("program", name, PROGRAMS)
    module = importlib.import_module(PROGRAMS[name])
    module.define_flags()
    return module


def summary(name: str) -> str:
    """The first line of a program's docstring, read without importing the program."""
    spec = importlib.util.find_spec(PROGRAMS[name])
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())).partition("\n")[0]


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except AttributeError as error:  # ml_collections' for --config.NAME, with the nearest name
        raise flags.Error(error) from error


def _is_of_user(error: Exception) -> bool:
    """Whether an error tells of a mistake: one that this package raised, not a library that it called wrongly."""
    if isinstance(error, flags.Error | FileNotFoundError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename.startswith(_PACKAGE)
