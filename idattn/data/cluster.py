"""Preparation on many machines, by datatrove's executors: they start the parts, which make the folder as anywhere."""

import functools
from typing import Any

from idattn.choices import check_choice
from idattn.data import optional
from idattn.data.preparation import Preparation, begin, prepare
from idattn.files import disk_path

_EXECUTORS = {"slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}


def submit(settings: Preparation, out: str, *, engine: str, tasks: int, **options: Any) -> None:
    """Hands a preparation to an engine as `tasks` parts; where documents are deduplicated, twice, one after the other.

    Args:
      settings: of the preparation.
      out: folder that all machines see; the engine's logs go to `out`-logs next to it.
      engine: "slurm" or "ray".
      tasks: number of parts, at least 1.
      **options: of datatrove's executor, such as `partition` and `time` for SLURM.

    Raises:
      ImportError: the package datatrove is missing.
      ValueError: the engine is not known.
    """
    check_choice("engine", engine, _EXECUTORS)
    executor = getattr(optional.load("datatrove.executor", f"engine={engine!r}", extra="cluster"), _EXECUTORS[engine])
    folder, last = disk_path(out).absolute(), None
    begin(settings, folder)  # here, where the tokenizer is available
    for attempt in range(1 + settings.deduplicate):
        logs = folder.with_name(f"{folder.name}-logs") / str(attempt)
        step = functools.partial(_run_part, settings, str(folder))
        last = executor([step], tasks=tasks, logging_dir=str(logs), depends=last, **options)
    assert last, "there is at least one attempt"
    last.run()


def _run_part(settings: Preparation, out: str, data: Any, rank: int, world_size: int) -> None:
    """A step of a datatrove pipeline."""
    prepare(settings, out, part=(rank, world_size))
