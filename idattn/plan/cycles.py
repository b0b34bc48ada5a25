"""The time of a compiled TPU program, by part, as its compiler estimates it.

The compiler notes the cycles that it expects of every instruction that a core computes (`estimated_cycles`). They are
summed as the instructions are scheduled: loops are multiplied out, called computations followed, a conditional counts
as its longest branch, and a fusion has one estimate for all that it holds. Kernels have no estimate; the caller gives
their cycles. Exchanges between chips go one after another at the published peak of the links, or of the network between
slices, while the core computes; what is left when their result is waited for counts as the part `links`.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from idattn.chips import Chip
from idattn.plan.hlo import Instruction, Module, branches, called, collectives, kernel_call, trip_count
from idattn.plan.traffic import instruction_bytes

PARTS = {  # name -> what the table calls it
    "kernels": "kernels of the mixer",
    "products": "products",
    "mixer": "elementwise work of the mixer",
    "copies": "stacking of residuals, copies",
    "layout": "reshapes, transposes, concatenations",
    "loss": "loss, its products included",
    "block": "norms and SwiGLU",
    "optimizer": "optimiser",
    "other": "embedding, sums of gradients, rest",
    "links": "exchanges that nothing hides",
}
_FREE = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
_COPIES = ("dynamic_update_slice", "dynamic_slice", "dynamic_update_index_in_dim", "dynamic_index_in_dim", "copy")
_LAYOUT = ("reshape", "transpose", "concatenate", "squeeze", "broadcast_in_dim", "pad", "slice", "split")


class Estimate(NamedTuple):
    """Cycles of one run of a program.

    Attributes:
      parts: cycles by name of `PARTS`.
      uncounted: runs of instructions that move bytes and have no estimate.
      uncounted_bytes: bytes that these move to and from HBM.
    """

    parts: Counter[str]
    uncounted: int = 0
    uncounted_bytes: int = 0

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.parts + other.parts, *(a + b for a, b in zip(self[1:], other[1:], strict=True)))

    def __mul__(self, times: int) -> "Estimate":
        return Estimate(Counter({k: v * times for k, v in self.parts.items()}), *(n * times for n in self[1:]))

    @property
    def cycles(self) -> float:
        return sum(self.parts.values())


def estimate(module: Module, chip: Chip, kernel_cycles: Callable[[Instruction], float]) -> Estimate:
    """The cycles of a run of a module on each chip.

    Args:
      module: as `idattn.plan.hlo.parse` reads it, with the compiler's estimates.
      chip: whose clock, links and network count.
      kernel_cycles: those of a kernel's call.

    Raises:
      ValueError: the compiler has no estimates for this chip, a loop does not say how often it runs, or as
        `kernel_cycles`.
    """
    if not any(_estimated(x) for computation in module.values() for x in computation.values()):
        raise ValueError("the program carries no estimated cycles; the compiler has no cost model for this topology.")
    return _estimate(module, "ENTRY", chip, kernel_cycles)


def _estimate(module: Module, name: str, chip: Chip, kernel_cycles: Callable[[Instruction], float]) -> Estimate:
    computation = module[name]
    exchanged = {x.name: collectives(module, name, x) for x in computation.values()}
    ends = {c.key: instruction for instruction, exchanges in exchanged.items() for c in exchanges}
    for x in computation.values():  # an asynchronous one ends where it is waited for
        if x.kind.endswith("-done"):
            ends |= {c.key: x.name for c in exchanged.get(x.operands[0].partition("#")[0], ())}
    total, now = Estimate(Counter()), 0.0
    speed, free = {"ICI": chip.link_bytes, "DCN": chip.dcn_bytes}, {"ICI": 0.0, "DCN": 0.0}
    finish: dict[str | tuple[str, str], float] = {}
    for x in computation.values():
        for c in exchanged[x.name]:
            if c.key not in finish:
                begin = max(now, free[c.network])
                finish[c.key] = free[c.network] = begin + c.sent_bytes / speed[c.network] * chip.clock
        cost = _cost(module, name, x, bool(exchanged[x.name]), chip, kernel_cycles)
        now += cost.cycles
        waits = [finish[key] for key, instruction in ends.items() if instruction == x.name]
        if waits and max(waits) > now:
            # Counters count fractions too, which their types do not know.
            cost += Estimate(Counter(links=max(waits) - now))  # pyright: ignore[reportArgumentType]
            now = max(waits)
        total += cost
    return total


def _cost(
    module: Module,
    name: str,
    x: Instruction,
    exchanged: bool,
    chip: Chip,
    kernel_cycles: Callable[[Instruction], float],
) -> Estimate:
    """The cycles of the core in one run of an instruction."""
    if x.kind == "while":
        return _estimate(module, called("body", x), chip, kernel_cycles) * trip_count(module, name, x)
    if x.kind == "conditional":
        return max((_estimate(module, y, chip, kernel_cycles) for y in branches(x)), key=lambda y: y.cycles)
    if x.kind in ("call", "async-start"):
        return _estimate(module, called("to_apply" if "to_apply=" in x.line else "calls", x), chip, kernel_cycles)
    if kernel_call(x):
        return Estimate(Counter(kernels=kernel_cycles(x)))  # pyright: ignore[reportArgumentType]  # as above
    if (cycles := _estimated(x)) is not None:
        return Estimate(Counter({part_of(module, x): cycles}))
    if x.kind.endswith("-start") or _FREE.search(x.line) or exchanged:
        return Estimate(Counter())
    moved = instruction_bytes(module, name, x)
    return Estimate(Counter(), int(moved > 0), moved)


def _estimated(x: Instruction) -> int | None:
    match = re.search(r'"estimated_cycles":"(\d+)"', x.line)
    return int(match[1]) if match else None


def part_of(module: Module, x: Instruction) -> str:
    """The part of a train step that an instruction belongs to, by its scopes and by what it computes."""
    match = re.search(r'op_name="([^"]*)"', x.line)
    scopes = match[1] if match else ""
    *_, operation = scopes.split("/")
    for part in ("loss", "optimizer"):
        if re.search(rf"\b{part}\b", scopes):
            return part
    if _has_product(module, x):
        return "products"
    in_mixer = re.search(r"\bmixer\b", scopes)
    if operation in _COPIES or (x.kind == "copy" and not in_mixer):
        return "copies"
    if operation in _LAYOUT:
        return "layout"
    if in_mixer:
        return "mixer"
    return "block" if re.search(r"\bblock_\d+\b", scopes) else "other"


def _has_product(module: Module, x: Instruction) -> bool:
    if x.kind == "fusion":
        return any(_has_product(module, inner) for inner in module[called("calls", x)].values())
    return x.kind in ("convolution", "dot")
