"""The fastest plan of a run that fits a TPU slice: what is recomputed, and in how many parts a batch is taken."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from idattn.config import REMAT, Config, MeshConfig
from idattn.plan.compiler import count_slices
from idattn.plan.step import compile_step, fewest_parts


def fastest_that_fits(
    config: Config, topology: str, chips: int, say: Callable[[str], None] = lambda plan: None
) -> tuple[Config, dict[str, Any]]:
    """A run's config with the plan that is predicted to be fastest, or the last one where none fits, and its figures.

    Rows are split before tokens are: `data` over slices, `fsdp` over as many chips as divide their rows, `sequence`
    over the rest. From what recomputes least to what recomputes most, a batch is taken in as few parts as fit, until
    that is no longer faster.

    Args:
      config: of the run; its mesh, `compute.remat` and `train.accumulation` are replaced.
      topology: as v5e:4x4, or 2xv5e:4x4.
      chips: of the topology.
      say: called with each plan in words before it is compiled, which takes a minute or more for a large model.

    Raises:
      ValueError: as `compile_step`.
    """
    rows = config.train.batch_size
    slices = count_slices(topology)
    fsdp = math.gcd(rows // slices, chips // slices)
    mesh = MeshConfig(data=slices, fsdp=fsdp, sequence=chips // slices // fsdp, slices=slices)
    config = dataclasses.replace(config, mesh=mesh)
    best = None
    for remat in REMAT:
        plan = _fewest_parts(
            dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat)),
            topology,
            rows // slices // fsdp,
            say,
        )
        if best is not None and not (plan[1]["fits"] and _seconds(plan) < _seconds(best)):
            return best
        if plan[1]["fits"]:
            best = plan
    return best or plan


def _fewest_parts(
    config: Config, topology: str, rows: int, say: Callable[[str], None]
) -> tuple[Config, dict[str, Any]]:
    """The plan that takes the `rows` of a chip in as few parts as fit, or the last one that does not fit."""
    parts = 1
    while True:
        planned = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=parts))
        say(f"{topology}: {plan_flags(planned)}")
        figures = compile_step(planned, topology)
        if figures["fits"]:
            return planned, figures
        parts = fewest_parts(figures, rows, parts)
        if parts is None:
            return planned, figures


def _seconds(plan: tuple[Config, dict[str, Any]]) -> float:
    return plan[1]["predicted"]["seconds"]


def plan_flags(config: Config) -> str:
    """The flags that make a program take a plan."""
    values = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(config.mesh).items() if size > 1}
    values |= {"compute.remat": config.compute.remat, "train.accumulation": config.train.accumulation}
    return " ".join(f"--config.{name}={value}" for name, value in values.items())
