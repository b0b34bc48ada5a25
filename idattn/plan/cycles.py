"""The time of a compiled program, by part: of a TPU as its compiler estimates it, of a GPU at its published peaks.

The TPU's compiler notes the cycles that it expects of every instruction that a core computes (`estimated_cycles`). A
fusion has one estimate for all that it holds. Kernels have none; the caller gives their cycles. The GPUs' compiler
notes nothing: `idattn.plan.roofline` has a bound for each launch.

Either is summed as the instructions are scheduled: loops are multiplied out, called computations followed, and a
conditional counts as its longest branch. Exchanges between chips go one after another at the published peak of the
links, or of the network between slices, while the core computes; what is left when their result is waited for counts as
the part `links`.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
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
      runs: of instructions that move bytes to and from memory, by name of `PARTS`: of a GPU of all, its launches; of a
        TPU only of those without an estimate, as "uncounted".
      moved_bytes: bytes that these move, likewise.
    """

    parts: Counter[str]
    runs: Counter[str] = Counter()
    moved_bytes: Counter[str] = Counter()

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: int) -> "Estimate":
        return Estimate(*(Counter({name: n * times for name, n in x.items()}) for x in self))

    @property
    def cycles(self) -> float:
        return sum(self.parts.values())


# Of the core in one run of an instruction of a computation, and whether it is part of an exchange between chips.
Cost = Callable[[Module, str, Instruction, bool], Estimate]


def estimate(module: Module, chip: Chip, kernel_cycles: Callable[[Instruction], float]) -> Estimate:
    """The cycles of a run of a module on each TPU.

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
    return add_up(module, "ENTRY", chip, partial(_compilers_cost, kernel_cycles=kernel_cycles))


def add_up(module: Module, name: str, chip: Chip, cost: Cost) -> Estimate:
    """The cycles of a run of a computation, those of instructions that run others and of exchanges included.

    Raises:
      ValueError: a loop does not say how often it runs, or as `cost`.
    """
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
        spent = _spent(module, name, x, bool(exchanged[x.name]), chip, cost)
        now += spent.cycles
        waits = [finish[key] for key, instruction in ends.items() if instruction == x.name]
        if waits and max(waits) > now:
            # Counters count fractions too, which their types do not know.
            spent += Estimate(Counter(links=max(waits) - now))  # pyright: ignore[reportArgumentType]
            now = max(waits)
        total += spent
    return total


def _spent(module: Module, name: str, x: Instruction, exchanged: bool, chip: Chip, cost: Cost) -> Estimate:
    """The cycles of the core in one run of an instruction."""
    if x.kind == "while":
        return add_up(module, called("body", x), chip, cost) * trip_count(module, name, x)
    if x.kind == "conditional":
        return max((add_up(module, y, chip, cost) for y in branches(x)), key=lambda y: y.cycles)
    if x.kind in ("call", "async-start"):
        return add_up(module, called("to_apply" if "to_apply=" in x.line else "calls", x), chip, cost)
    return cost(module, name, x, exchanged)


def _compilers_cost(
    module: Module, name: str, x: Instruction, exchanged: bool, kernel_cycles: Callable[[Instruction], float]
) -> Estimate:
    if kernel_call(x):
        return Estimate(Counter(kernels=kernel_cycles(x)))  # pyright: ignore[reportArgumentType]  # as above
    if (cycles := _estimated(x)) is not None:
        return Estimate(Counter({part_of(module, x): cycles}))
    if x.kind.endswith("-start") or _FREE.search(x.line) or exchanged:
        return Estimate(Counter())
    moved = instruction_bytes(module, name, x)
    return Estimate(Counter(), Counter(uncounted=int(moved > 0)), Counter(uncounted=moved))


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
    return x.kind in ("convolution", "dot") or 'custom_call_target="__cublas' in x.line
