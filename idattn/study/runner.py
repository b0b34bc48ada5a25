"""Runs the cells of a study, each in a process, until all have a record. Several runners may share a study."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import IO, Any

from idattn.config import Config, from_config_dict
from idattn.config_files import load_module
from idattn.files import lock_file, read_json, write_atomic
from idattn.study.grid import REMEDY, Cell, Study, record_file, versions
from idattn.train.metrics import read_metrics

_LOG_LINES = 15  # of a failed cell, in its record


def load_study(file: str) -> tuple[Study, dict[Cell, Config]]:
    """A study and the configs of its cells.

    Raises:
      ValueError: the file defines no study.
    """
    module = load_module(file)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise ValueError(f"{file} has no STUDY; name a config that defines one, such as study_cpu.")
    return study, {cell: from_config_dict(module.get_config(str(cell))) for cell in study.cells}


class Runner:
    """Runs cells until their records are there, each in a process.

    Args:
      file: of the study.
      workdir: folder of the study.
    """

    def __init__(self, file: str, workdir: Path):
        self.file, self.workdir = file, workdir
        self.study, self.configs = load_study(file)
        self.stopped = threading.Event()
        self._processes: set[subprocess.Popen] = set()

    def stop(self, number: int, frame: Any) -> None:
        """Have the runs save and end, and start no other: a handler of signals."""
        self.stopped.set()
        for process in list(self._processes):
            process.terminate()

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell has a record that is not of a failure."""
        file = record_file(self.workdir / "cells", cell)
        return file.exists() and "error" not in read_json(file, REMEDY)

    def missing(self, cell: Cell) -> Iterator[tuple[str, list[str]]]:
        """The entry points, with their arguments, that a cell without a record still has to go through, in order."""
        run, config = self.workdir / "runs" / str(cell), self.configs[cell]
        if not (run / "checkpoints" / str(config.train.steps)).is_dir():  # which is there whole, or not at all
            yield "train", [f"--config={self.file}:{cell}", f"--workdir={run}"]
        stored = _evaluations(run)
        tasks = next(flag for flag in self.study.evaluate if flag.startswith("--tasks="))
        if not stored or stored["step"] < config.train.steps or set(tasks[8:].split(",")) - set(stored["tasks"]):
            yield "evaluate", [f"--checkpoint={run}", *self.study.evaluate, f"--out={run / 'evals'}"]

    def prepare(self) -> None:
        """Prepare the text, if the study names one, nobody has, and a cell still needs it; until `stop`.

        Raises:
          RuntimeError: it could not be prepared; with the end of the log.
          ValueError: the record of a cell is damaged.
        """
        if not self.study.prepare or all(map(self.is_done, self.study.cells)):
            return
        log = self.workdir / "runs" / "prepare.log"
        print(f"preparing the text: see {log}", flush=True)
        while not self.stopped.is_set():
            with lock_file(log.with_suffix(".lock")) as lock:
                if lock is not None:
                    failed = self._call("prepare-data", list(self.study.prepare), log, lock)
                    if failed and not self.stopped.is_set():
                        raise RuntimeError(f"the text could not be prepared:\n{_end(log)}")
                    return
            time.sleep(1)  # another runner prepares it

    def finish(self, cell: Cell) -> str:
        """Train and evaluate a cell as far as that is not done, and write its record; returns the outcome."""
        try:
            return self._finish(cell)
        except (ValueError, OSError) as error:  # such as a damaged file: the other cells, and the report, go on
            return f"failed: {error}"

    def _finish(self, cell: Cell) -> str:
        file, run = record_file(self.workdir / "cells", cell), self.workdir / "runs" / str(cell)
        if self.stopped.is_set():
            return "not begun"
        with lock_file(run.with_name(f"{cell}.lock")) as lock:
            if lock is None:
                return "under way elsewhere"
            if self.is_done(cell):
                return "done before"
            log = run.with_name(f"{cell}.log")
            for name, arguments in self.missing(cell):
                failed = self._call(name, arguments, log, lock)
                if self.stopped.is_set():
                    return "stopped"
                if failed or name in (step for step, _ in self.missing(cell)):
                    error = _end(log) or f"idattn {name} ended with status {failed} and printed nothing"
                    write_atomic(file, json.dumps({"error": error}, indent=1))
                    return f"failed, see {log}"
            results, metrics = _evaluations(run), read_metrics(run / "metrics.jsonl")
            assert results is not None, "the cell has been evaluated"
            curve = [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]
            record = {
                "config": read_json(run / "config.json", f"Delete {run} to train the cell again."),
                "versions": versions(),
                "device": next(iter(results["tasks"].values()))["device"],
                "date": date.today().isoformat(),
                "curve": curve,
                "evaluations": {
                    task: {name: value for name, value in result.items() if name not in ("answers", "documents")}
                    for task, result in results["tasks"].items()
                },
            }
            write_atomic(file, json.dumps(record, indent=1))
            return f"done, validation loss {curve[-1][1]:.4f} nats per token"

    def _call(self, name: str, arguments: list[str], log: Path, lock: IO) -> int:
        """Run an entry point; it inherits the lock, so that the cell stays claimed should this process be killed."""
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "idattn", name, *arguments],
                stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()], start_new_session=True,
            )  # fmt: skip
            self._processes.add(process)
            if self.stopped.is_set():
                process.terminate()
            code = process.wait()
        self._processes.discard(process)
        return code


def _evaluations(run: Path) -> dict[str, Any] | None:
    """The results of `idattn evaluate` for a run, if it has any."""
    file = run / "evals" / "results.json"
    return read_json(file, "Delete it to have the cell evaluated again.") if file.exists() else None


def _end(log: Path) -> str:
    """The last lines of a log; of lines that overwrite one another, as those of progress bars, the last."""
    lines = [line.rsplit("\r", 1)[-1] for line in log.read_text().rstrip().split("\n")]
    return "\n".join(lines[-_LOG_LINES:])
