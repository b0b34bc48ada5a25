"""The command `idattn`: its list of programs, and how mistakes of users and of libraries end a program."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import idattn
from idattn.cli import PROGRAMS, _store_compiled_programs

ROOT = Path(__file__).parents[2]
FAKE = '''"""A program that fails."""
import json
from absl import flags, logging
from idattn.choices import check_choice
from idattn.cli import PROGRAMS, run

def define_flags():
    flags.DEFINE_enum("by", "rule", ["rule", "library", "path", "folder", "nothing"], "What fails.")

def full():
    from idattn.train.storage import writing
    with writing("runs/x"):
        raise OSError("No space left on device")

def main(arguments):
    {"rule": lambda: check_choice("colour", "gren", ["green"]), "library": lambda: json.loads("{"), "folder": full,
     "path": lambda: open("/no/such"), "nothing": lambda: logging.info("a detail")}[flags.FLAGS.by]()
    logging.warning("a warning")

if __name__ == "__main__":
    PROGRAMS["fake"] = "fake"
    run("fake")
'''


def idattn_command(*arguments, **environment):
    command = [sys.executable, "-m", "idattn", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_list_of_programs(arguments):
    done = idattn_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in PROGRAMS)
    assert "  generate      Continue text with a trained model.\n" in done.stdout


def test_version():
    assert idattn_command("--version").stdout == f"{idattn.__version__}\n"


def test_unknown_program():
    done = idattn_command("trian", "--config=quickstart")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("idattn trian: program='trian' is not known. Did you mean 'train'? It must be one of")


def test_help_of_a_program():
    """Underscores in a name are dashes."""
    done = idattn_command("inspect_data", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Show what prepare-data made") and "--sample_tokens: Tokens of each" in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["schedule", "--help"]])
def test_a_reader_may_close_its_end_of_the_pipe(arguments, unbuffered):
    """As in `idattn | head`: no traceback, and the status that a shell gives for SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "idattn", *arguments]
    settings = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=ROOT, env=settings, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("flag", "show", "status", "last"),
    [
        ("--by=rule", "", 2, "idattn fake: colour='gren' is not known. Did you mean 'green'? It must be one of green."),
        ("--by=path", "", 2, "idattn fake: [Errno 2] No such file or directory: '/no/such'"),
        ("--by=folder", "", 2, "idattn fake: workdir='runs/x' cannot be written (No space left on device); name a"),
        ("--by=ruel", "", 2, "idattn fake: flag --by=ruel: value should be one of <rule|library|path|folder|nothing>"),
        ("--bye=rule", "", 2, "idattn fake: Unknown command line flag 'bye'. Did you mean: by ?"),
        ("--by=library", "", 1, "json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes"),
        ("--by=rule", "1", 1, "ValueError: colour='gren' is not known."),
    ],
)
def test_errors(tmp_path, flag, show, status, last):
    """Mistakes of the user end with one line, other errors and on request all with a traceback."""
    (tmp_path / "fake.py").write_text(FAKE)
    settings = os.environ | {"PYTHONPATH": str(ROOT), "IDATTN_TRACEBACK": show}
    command = [sys.executable, "fake.py", flag]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == status
    *traceback, line = done.stderr.splitlines()
    assert line.startswith(last) and bool(traceback) == (status == 1)


@pytest.mark.parametrize(("flags", "messages"), [([], ["a warning"]), (["--verbosity=0"], ["a detail", "a warning"])])
def test_libraries_only_warn(tmp_path, flags, messages):
    """Details of libraries, such as Orbax's of every checkpoint, are shown on request."""
    (tmp_path / "fake.py").write_text(FAKE)
    command, settings = [sys.executable, "fake.py", "--by=nothing", *flags], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert [line.split("] ")[1] for line in done.stderr.splitlines()] == messages


def test_libtpu_is_silent_where_there_is_no_tpu(libtpu):
    """It is installed to compile with; loaded to look for a TPU, it prints alarms, and a stack trace at SIGTERM."""
    code = "import idattn, jax, time; print(jax.devices(), flush=True); time.sleep(60)"
    settings = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS" and not name.startswith("TPU_")}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        devices = process.stdout.readline()
        process.terminate()
        _, errors = process.communicate()
    assert (devices, errors, process.returncode) == (b"[CpuDevice(id=0)]\n", b"", -signal.SIGTERM)


def test_compiled_programs_are_stored_where_that_is_possible(tmp_path, monkeypatch):
    """In the user's cache; not where the environment names a place, JAX runs already, or nothing may be written."""
    stored = "JAX_COMPILATION_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(stored, "elsewhere")
    _store_compiled_programs()
    assert os.environ[stored] == "elsewhere" and not (tmp_path / "cache").exists()
    monkeypatch.delenv(stored)
    monkeypatch.setitem(sys.modules, "jax", jax)
    _store_compiled_programs()
    assert stored not in os.environ
    monkeypatch.delitem(sys.modules, "jax")
    _store_compiled_programs()
    assert os.environ.pop(stored) == str(tmp_path / "cache" / "idattn")
    for nowhere in ("/proc", "/dev/null"):
        monkeypatch.setenv("XDG_CACHE_HOME", nowhere)
        _store_compiled_programs()
        assert stored not in os.environ
