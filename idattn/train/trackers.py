"""Experiment trackers: where the metrics of a run go, other than to its own files."""

import dataclasses
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping

from etils import epath

from idattn.config import Config
from idattn.data import optional
from idattn.files import in_bucket, write_atomic


class Tracker(ABC):
    """What `train(..., trackers=["module:Class"])` makes at each start of a run, on the first process.

    An error that it raises ends the run.

    Args:
      config: of the run.
      workdir: folder of the run.
      start: optimiser steps done. Metrics of later steps may have been written before, and are written again; they are
        the same numbers.
    """

    @abstractmethod
    def __init__(self, config: Config, workdir: epath.Path, start: int): ...

    @abstractmethod
    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take the metrics of a step, which may come in several calls.

        Args:
          step: optimiser steps done.
          scalars: values by name, in groups: `train/loss`, `val/loss` and so on.
        """

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Finish; `failed` says whether an error ends the run, rather than its last step or a request to stop."""


class WeightsAndBiases(Tracker):
    """Weights & Biases, with the settings of its environment variables, such as WANDB_PROJECT.

    A run that is resumed stays one run there: `workdir/wandb-id` has its id.

    Raises:
      ImportError: the package wandb is missing.
    """

    def __init__(self, config: Config, workdir: epath.Path, start: int):
        wandb = optional.load("wandb", "tracker='wandb'", "wandb")
        file = workdir / "wandb-id"
        if not file.exists():
            write_atomic(file, uuid.uuid4().hex)
        self._run = wandb.init(
            id=file.read_text(),
            resume="allow",
            name=workdir.name,
            config=dataclasses.asdict(config),
            dir=None if in_bucket(workdir) else str(workdir),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
