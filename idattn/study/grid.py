"""The cells of a study, and the records of their results: one JSON file each, small enough to be stored."""

import dataclasses
import importlib.metadata
import itertools
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from idattn.choices import check_choice
from idattn.config import Config, from_config_dict, to_config_dict
from idattn.costs import state_size
from idattn.files import read_json

REMEDY = "Remove it to have the cell done again."
_PACKAGES = ("idattn", "jax", "jaxlib", "flax", "optax", "numpy")


class Cell(NamedTuple):
    """One training run of a study; as text SCALE,CONDITION,SEED."""

    scale: str
    condition: str  # a mixer, or a name for what else differs
    seed: int

    def __str__(self) -> str:
        return f"{self.scale},{self.condition},{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of training runs, and what is done with each."""

    cells: tuple[Cell, ...]
    evaluate: tuple[str, ...]  # flags of `idattn evaluate`
    prepare: tuple[str, ...] = ()  # flags of `idattn prepare-data`, where text is to be prepared
    is_text: bool = True  # whether validation losses may stand next to the paper's
    comparisons: tuple[tuple[str, str], ...] = ()  # pairs to test besides those of table 4, the better one first

    def cell(self, text: str) -> Cell:
        """The cell that SCALE,CONDITION,SEED names.

        Raises:
          ValueError: there is none; the nearest is named.
        """
        names = {str(cell): cell for cell in self.cells}
        check_choice("cell", text, names)
        return names[text]

    def config(self, text: str, shared: Config) -> ConfigDict:
        """The settings of a cell whose condition is a mixer.

        Args:
          text: SCALE,MIXER,SEED of the cell.
          shared: the config of all cells; its mixer and seed are replaced by the cell's.

        Raises:
          ValueError: as `cell`.
        """
        cell = self.cell(text)
        model = dataclasses.replace(shared.model, mixers=(cell.condition,))
        return to_config_dict(dataclasses.replace(shared, seed=cell.seed, model=model))


def grid(scales: Iterable[str], conditions: Iterable[str], seeds: Iterable[int]) -> tuple[Cell, ...]:
    """Every condition at every scale, seed after seed, so that a study that is stopped has whole seeds."""
    return tuple(
        Cell(scale, condition, seed) for scale, seed, condition in itertools.product(scales, seeds, conditions)
    )


def versions() -> dict[str, str]:
    """The versions of what a result may depend on, by name."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def record_file(folder: Path, cell: Cell) -> Path:
    """The file of a cell's record among those of `folder`."""
    return folder / f"{cell}.json"


def read_records(folder: Path, configs: Mapping[Cell, Config]) -> dict[Cell, dict[str, Any]]:
    """The records of a study's cells that are there, in its order.

    A record holds `config`, `versions`, `device`, `date`, `curve` (pairs of step and validation loss in nats per token)
    and `evaluations` (the tasks of `idattn evaluate`); the record of a cell that failed holds `error`.

    Args:
      folder: of the records.
      configs: the study's cells with their configs.

    Raises:
      ValueError: none is there, or one is no record, of no cell of this study, of another config than the study has, or
        of other versions or settings of its evaluations than the first.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} has no records of cells; run the study, without --report, to make them.")
    names = {str(cell): cell for cell in configs}
    records = {}
    for file in files:
        if file.stem not in names:
            raise ValueError(f"{file} is of no cell of this study; move it away, or name the study that it is of.")
        cell = names[file.stem]
        record = records[cell] = read_json(file, REMEDY)
        try:
            stored = configs[cell] if "error" in record else from_config_dict(record["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no record ({error}); remove it to have the cell done again.") from error
        differences = configs[cell].differences(stored)
        there, now = stored.data.source, configs[cell].data.source  # no part of a run's identity, as paths may move
        if there != now:
            differences.append(f"data.source: {there!r} there, {now!r} now")
        if differences:
            raise ValueError(
                f"{file} is of another config than the study's ({'; '.join(differences)}); move it and its run away to "
                "have the cell trained anew, or use another workdir."
            )
    done = [cell for cell in configs if "error" not in records.get(cell, {"error": ""})]
    for kind, values in {"versions": lambda record: record["versions"], "evaluations": _evaluation_settings}.items():
        for cell in done[1:]:
            first, here = values(records[done[0]]), values(records[cell])
            if first != here:
                mixed = "; ".join(
                    f"{name} {first.get(name)} in {done[0]}, {here.get(name)} in {cell}"
                    for name in first | here
                    if first.get(name) != here.get(name)
                )
                raise ValueError(
                    f"{folder} mixes {kind} ({mixed}); move the records and runs of one side away to have its cells "
                    "trained anew."
                )
    return {cell: records[cell] for cell in configs if cell in records}


def _evaluation_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all evaluations, and the versions of their tasks, by task and name."""
    return {
        f"{task} {name}": value
        for task, result in record["evaluations"].items()
        for name, value in (result["settings"] | {"versions": result.get("versions")}).items()
    }


def best_loss(record: Mapping[str, Any]) -> float:
    """The lowest validation loss of a run, in nats per token."""
    return min(loss for _, loss in record["curve"])


def by_condition(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The cells of each scale and condition, which differ by their seed."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.scale, cell.condition), []).append(cell)
    return groups


def state_of_layer(config: Config) -> int:
    """Numbers in the state of a layer after a row of the training length, on average over the layers."""
    mixers = config.model.mixers
    return sum(state_size(config.model, mixer, config.data.seq_len) for mixer in mixers) // len(mixers)
