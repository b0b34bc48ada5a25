"""The first plan of a run that fits a TPU slice: mesh, what is recomputed, and in how many parts a batch is taken."""

import dataclasses
import math
from typing import Any

from idattn.config import Config, MeshConfig
from idattn.plan.step import compile_step


def first_that_fits(config: Config, topology: str, chips: int) -> tuple[Config, dict[str, Any]]:
    """A run's config with the first plan that fits, or the last one that does not, and its figures.

    Rows are split before tokens are: `fsdp` over as many chips as divide the rows, `sequence` over the rest. Plans are
    tried from the one that recomputes least to the one that recomputes most, each in ever more parts.

    Args:
      config: of the run; its mesh, `compute.remat` and `train.accumulation` are replaced.
      topology: as v5e:4x4.
      chips: of the topology.

    Raises:
      ValueError: as `compile_step`.
    """
    rows = config.train.batch_size
    fsdp = math.gcd(rows, chips)
    mesh = MeshConfig(data=1, fsdp=fsdp, sequence=chips // fsdp)
    for remat in ("none", "dots", "mixer", "block"):
        parts = 1
        while rows // fsdp % parts == 0:
            planned = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, accumulation=parts),
                compute=dataclasses.replace(config.compute, remat=remat),
                mesh=mesh,
            )
            figures = compile_step(planned, topology)
            if figures["fits"]:
                return planned, figures
            # What a part needs is at best in proportion to its rows.
            parts *= 2 ** max(1, math.ceil(math.log2(figures["needed_gib"] / figures["usable_gib"])))
    return planned, figures


def plan_flags(config: Config) -> str:
    """The flags that make a program take a plan."""
    values = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(config.mesh).items() if size > 1}
    values |= {"compute.remat": config.compute.remat, "train.accumulation": config.train.accumulation}
    return " ".join(f"--config.{name}={value}" for name, value in values.items())
