"""The programs as a command line starts them, in this process: another would import JAX and Orbax for three seconds."""

import contextlib
import dataclasses
import io
import logging
import runpy
import signal
import traceback
from unittest import mock

from absl import app, flags


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a program left, under the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def run_program(name, *arguments) -> Finished:
    """Does what `python -m launch.NAME ARGUMENTS` does, then restores flags, signals and logging."""
    app.define_help_flags()
    before, handlers, level = set(flags.FLAGS), logging.root.handlers[:], logging.root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.argv", [name, *map(str, arguments)]),
    ):
        try:
            runpy.run_module(f"launch.{name}", run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            flags.FLAGS.unparse_flags()
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
            logging.root.handlers[:] = handlers
            logging.root.setLevel(level)
            for number, handler in signals.items():
                signal.signal(number, handler)
    return Finished(code, out.getvalue(), err.getvalue())
