"""The programs of the command `idattn NAME --flags`: modules with `define_flags()` and `main(arguments)`."""

import ast
import importlib
import importlib.util
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from absl import app, flags, logging

import idattn
from idattn.choices import check_choice

# A program is imported when it runs. `idattn --help` shows the first line of its module's docstring.
PROGRAMS = {
    "train": "idattn.cli.train",
    "generate": "idattn.cli.generate",
    "evaluate": "idattn.cli.evaluate",
    "export": "idattn.cli.export",
    "describe": "idattn.cli.describe",
    "prepare-data": "idattn.cli.prepare_data",
    "inspect-data": "idattn.cli.inspect_data",
    "study": "idattn.cli.study",
    "plan": "idattn.cli.plan",
    "schedule": "idattn.cli.schedule",
    "scaling": "idattn.cli.scaling",
    "verify": "idattn.cli.verify",
    "bench-ops": "idattn.cli.bench_ops",
    "bench-decode": "idattn.cli.bench_decode",
    "bench-data": "idattn.cli.bench_data",
    "plot-kernel": "idattn.cli.plot_kernel",
    "plot-ideal": "idattn.cli.plot_ideal",
}
TRACEBACK = "IDATTN_TRACEBACK"
_STORING = ("train", "generate", "evaluate")  # programs that store what they compile for the next start
# Errors that tell of a mistake of the user, wherever they come from, and those that do if this package raises them.
_ALWAYS = (flags.Error, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_OURS = (ValueError, NotImplementedError, ImportError, OSError)
_PACKAGE = str(Path(idattn.__file__).parent)


@contextmanager
def _closed_pipe_is_no_error() -> Iterator[None]:
    """Exits with the status of SIGPIPE where the reader of standard output is gone, as in `idattn | head`."""
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        pipe = select.poll()
        pipe.register(sys.stdout, 0)
        if not pipe.poll(0):  # another pipe or socket broke
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
        sys.exit(128 + signal.SIGPIPE)


@_closed_pipe_is_no_error()
def main() -> None:
    """Run the program that the command line names: what the command `idattn` calls."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        title = (idattn.__doc__ or "").partition("\n")[0]
        print(f"{title}\n\nidattn NAME --flags, and idattn NAME --help for the flags of one:\n")
        for program in PROGRAMS:
            print(f"  {program:<14}{summary(program)}")
        print(f"\n{TRACEBACK}=1 in the environment shows the traceback of an error that ends a program with one line.")
    elif name == "--version":
        print(idattn.__version__)
    else:
        run(name, arguments)


@_closed_pipe_is_no_error()
def run(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a program, and exit with its status.

    A mistake of the user ends it with one line and status 2: a flag that does not parse, a path that is not as it must
    be, or what this package raises as a ValueError, NotImplementedError, ImportError or OSError. Errors of
    libraries show a traceback; with the environment variable IDATTN_TRACEBACK=1 all do.

    Args:
      name: of the program, with dashes or underscores.
      arguments: of the program; None for those of this process.

    Raises:
      SystemExit: always.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.argv = [f"idattn {name}", *arguments]  # where config flags look for the settings that they override
    if name in _STORING:
        _store_compiled_programs()
    try:
        module = load(name)
        if {"--help", "-h"} & {*arguments}:
            print(f"{module.__doc__}\n{flags.FLAGS.module_help(module)}")
            sys.exit()
        app.run(module.main, argv=sys.argv, flags_parser=_parse)
    except BrokenPipeError:  # `main` knows it: a reader has enough
        raise
    except (*_ALWAYS, *_OURS) as error:
        if os.environ.get(TRACEBACK) or not _is_of_user(error):
            raise
        print(f"idattn {name}: {error}", file=sys.stderr)
        sys.exit(2)


def _store_compiled_programs() -> None:
    """Have JAX store programs in the user's cache, unless it runs already, a place is named, or none can be written."""
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "idattn"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that may be written to
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def _parse(argv: list[str]) -> list[str]:
    """Parse the flags; without --verbosity libraries only warn, as Orbax logs every detail of every checkpoint."""
    arguments = flags.FLAGS(argv)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING
    return arguments


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
    assert spec is not None and spec.origin is not None, "a program is a file"
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or "").partition("\n")[0]


def _is_of_user(error: Exception) -> bool:
    """Whether an error tells of a mistake of the user, not of a library that was called wrongly."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, _ALWAYS) or frame.f_code.co_filename.startswith(_PACKAGE)
