"""The least time of a program that was compiled for GPUs, by part: each launch at the published peaks of the card.

A launch takes at least as long as its bytes need at the memory's bandwidth, as if nothing stayed in a cache, and its
products at their peak. What it computes beside products, and to start it, count for nothing; of a kernel of Pallas only
the bytes are known.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

from idattn.chips import Chip
from idattn.plan.cycles import PARTS, Estimate, add_up, part_of
from idattn.plan.hlo import Instruction, Module, arrays, called, dimensions, shape_of
from idattn.plan.traffic import instruction_bytes

GPU_PARTS = PARTS | {"kernels": "the op", "mixer": "elementwise work of the mixer, without the op"}


def bound(module: Module, chip: Chip) -> Estimate:
    """The nanoseconds (`chip.clock`) of a run of a module on each GPU, its launches and the bytes that they move.

    Raises:
      ValueError: a loop does not say how often it runs.
    """

    def launch(module: Module, name: str, x: Instruction, exchanged: bool) -> Estimate:
        moved = instruction_bytes(module, name, x)
        if not moved or x.kind.endswith("-start") or exchanged:
            return Estimate(Counter())
        seconds = sum(flops / chip.peak(dtype) for flops, dtype in products(module, name, x))
        in_op = re.search(r'op_name="[^"]*\bop\b', x.line)  # the scope around it in `idattn.nn`
        part = "kernels" if in_op else part_of(module, x)
        time = max(seconds, moved / chip.hbm_bytes) * chip.clock
        # Counters count fractions too, which their types do not know.
        return Estimate(Counter({part: time}), Counter([part]), Counter({part: moved}))  # pyright: ignore[reportArgumentType]

    return add_up(module, "ENTRY", chip, launch)


def products(module: Module, computation: str, x: Instruction) -> Iterator[tuple[int, str]]:
    """FLOPs and the dtype of the operands of each matrix product that an instruction is or, as a fusion, holds."""
    if x.kind == "fusion":
        inside = called("calls", x)
        for y in module[inside].values():
            yield from products(module, inside, y)
    elif x.kind == "dot" or 'custom_call_target="__cublas' in x.line:
        contracted = re.search(r"lhs_contracting_dim(?:s=\{|ensions\":\[)([^\]}]*)", x.line)
        shape = shape_of(module[computation], x.operands[0])
        sizes = dimensions(shape)
        depth = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", contracted[1] if contracted else ""))
        dtype = "float32" if shape.startswith("f32") else "bfloat16"
        yield 2 * math.prod(dimensions(arrays(x.shape)[0])) * depth, dtype
