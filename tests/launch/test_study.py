"""`launch.study`: cells in separate processes, failures, a stop in the middle, a second call."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.helpers import defined_flags, run_main
from support.programs import run_program

from idattn.cli import study
from idattn.files import lock_file
from idattn.study.runner import Runner

ROOT = Path(__file__).parents[2]
STUDY = """
from idattn.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, to_config_dict
from idattn.study import Study, grid

STUDY = Study(
    cells=grid(["tiny"], {conditions}, [1]),
    evaluate=("--tasks=length", "--lengths=8", "--max_tokens=64", "--chunk_size=8"),
    prepare=("--source={folder}/text.jsonl", "--tokenizer=bytes", "--validation=0.4", "--out={folder}/data"),
)


def get_config(argument):
    cell = STUDY.cell(argument)
    return to_config_dict(
        Config(
            seed=cell.seed,
            model=ModelConfig.tiny("softmax", vocab_size=37 if cell.condition == "broken" else 257),
            data=DataConfig(source="{folder}/data", holdout=(), seq_len=8),
            optim=OptimConfig(peak_lr=1e-2, warmup_steps=1),
            train=TrainConfig(steps={steps}, batch_size=2, eval_every=2, eval_batches=2, checkpoint_every=2),
            compute=ComputeConfig(dtype="float32"),
        )
    )
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def write_study(folder, conditions, steps):
    rows = [{"text": f"document {number} says it again; " * 20} for number in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "study.py"
    file.write_text(STUDY.format(folder=folder, conditions=conditions, steps=steps))
    return [sys.executable, "-m", "launch.study", f"--config={file}", f"--workdir={folder / 'study'}"]


def test_study(settings, tmp_path, monkeypatch):
    """One cell that works and one that does not, side by side; then only what is left is done."""
    command = write_study(tmp_path, ["good", "broken"], steps=4)

    def printed(flag):
        done = run_program("study", *command[3:], flag)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert [line.split()[1] for line in printed("--dry_run").splitlines()] == ["train", "evaluate"] * 2

    for name, value in settings.items():  # of the cells' processes
        monkeypatch.setenv(name, value)
    done = run_program("study", *command[3:], "--jobs=2")
    assert done.returncode == 0, done.stderr
    assert "tiny,good,1  done, validation loss" in done.stderr + done.stdout
    folder = tmp_path / "study"
    record = json.loads((folder / "cells" / "tiny,good,1.json").read_text())
    metrics = [
        json.loads(line) for line in (folder / "runs" / "tiny,good,1" / "metrics.jsonl").read_text().splitlines()
    ]
    assert record["curve"] == [[row["step"], row["val_loss"]] for row in metrics if "val_loss" in row]
    assert [step for step, _ in record["curve"]] == [2, 4] and record["device"] == "1 x cpu"
    assert list(record["evaluations"]["length"]["corpora"]["validation"]) == ["8"]
    failure = json.loads((folder / "cells" / "tiny,broken,1.json").read_text())["error"]
    assert failure.endswith("model.vocab_size=37 must be at least the 257 tokens of the tokenizer 'bytes'.")
    assert "1 of 2 cells." in done.stdout and "tiny,broken,1: `idattn train: model.vocab_size=37" in done.stdout

    (folder / "runs" / "tiny,good,1" / "metrics.jsonl").unlink()  # a record is all that the report reads
    assert printed("--report") == done.stdout[done.stdout.index("# study") :]
    planned = printed("--dry_run")
    assert [line.split()[1] for line in planned.splitlines()] == ["train", "evaluate"]
    assert "good" not in planned

    # A run that was killed between its last evaluation and its last checkpoint is not trained.
    (folder / "cells" / "tiny,good,1.json").unlink()
    shutil.rmtree(folder / "runs" / "tiny,good,1" / "checkpoints" / "4")
    assert [line.split()[1] for line in printed("--dry_run").splitlines() if "good" in line] == ["train"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_resumes(settings, tmp_path, number):
    """The record is that of a study that nothing happened to; while a killed study's run lives, its cell is taken."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    command = write_study(whole, ["good"], steps=60)
    subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, check=True, timeout=240)

    command = write_study(stopped, ["good"], steps=60)
    run = stopped / "study" / "runs" / "tiny,good,1"
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert not (stopped / "study" / "cells").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 0 and output.endswith("stopped; the same command resumes.\n")
    file = stopped / "study" / "cells" / "tiny,good,1.json"
    for _ in range(100):  # after SIGKILL the run that it had begun continues alone, and nobody else takes its cell
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=240)
        if file.exists():
            break
        assert "under way elsewhere" in done.stderr + done.stdout
    a, b = (json.loads((folder / "study" / "cells" / file.name).read_text()) for folder in (whole, stopped))
    assert a["curve"] == b["curve"] and len(a["curve"]) == 30
    assert a["evaluations"]["length"]["metrics"] == b["evaluations"]["length"]["metrics"]


def test_a_damaged_run_leaves_the_others_and_the_report(tmp_path, monkeypatch):
    def call(self, name, arguments, log, lock):
        log.write_text(f"{name} failed")
        return int(name != "prepare-data")

    monkeypatch.setattr(Runner, "_call", call)
    results = tmp_path / "study" / "runs" / "tiny,good,1" / "evals" / "results.json"
    results.parent.mkdir(parents=True)
    (results.parents[1] / "checkpoints" / "4").mkdir(parents=True)  # it is trained
    results.write_bytes(b"")
    done = run_program("study", *write_study(tmp_path, ["good", "broken"], steps=4)[3:])
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert f"preparing the text: see {tmp_path / 'study' / 'runs' / 'prepare.log'}\n" in done.stdout
    assert f"tiny,good,1  failed: {results} is damaged (empty" in printed
    assert "tiny,broken,1  failed, see " in printed and "0 of 2 cells." in done.stdout


def test_a_preparation_stops(tmp_path, monkeypatch):
    """One's own, and the wait for that of another runner."""
    command = write_study(tmp_path, ["good"], steps=4)[3:]

    def call(self, *_):
        self.stop(signal.SIGINT, None)
        return -signal.SIGTERM

    monkeypatch.setattr(Runner, "_call", call)
    own = run_program("study", *command)
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGINT))
    with lock_file(tmp_path / "study" / "runs" / "prepare.lock"):
        others = run_program("study", *command)
    for done in (own, others):
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("prepare.log\nstopped; the same command resumes.\n")
        assert "not begun" not in done.stderr


def test_a_study_is_on_a_disk():
    with defined_flags(study), pytest.raises(ValueError, match="'gs://bucket/x' must be a path of a disk"):
        run_main(study, "--config=study_cpu", "--workdir=gs://bucket/x")


def test_damaged_files_of_a_study_are_named(tmp_path):
    runner = Runner("study_cpu", tmp_path)
    cell = runner.study.cells[0]
    for file, use, remedy in (
        (tmp_path / "cells" / f"{cell}.json", runner.is_done, "Remove it to have the cell done again"),
        (
            tmp_path / "runs" / str(cell) / "evals" / "results.json",
            lambda cell: [*runner.missing(cell)],
            "Delete it to have the cell evaluated again",
        ),
    ):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{file.name} is damaged \(empty.*{remedy}"):
            use(cell)


def test_no_study(tmp_path):
    done = run_program("study", "--config=configs/quickstart.py", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "configs/quickstart.py has no STUDY; name a config that defines one, such as study_cpu." in done.stderr
