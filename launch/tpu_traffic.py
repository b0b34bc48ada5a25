"""Bytes that a compiled TPU program moves to and from HBM, read off its HLO.

An instruction reads its operands and writes its result, unless they lie in on-chip memory (memory space 1 and above in
their layouts). A fusion reads of an operand only what it slices, and of an array that it updates in place it writes
only the part. Loops that say how often they run are multiplied out; a conditional counts as its longest branch.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all", "partition-id"}


class Instruction(NamedTuple):
    name: str
    kind: str
    shape: str  # of its result
    operands: list[str]
    line: str


Module = dict[str, dict[str, Instruction]]  # computation -> name -> instruction; the entry computation is "ENTRY"


def parse(text: str) -> Module:
    """The computations of an HLO module's text."""
    module: Module = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = module["ENTRY" if match[1] else match[2]] = {}
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)", line):
            current[match[1]] = Instruction(match[1], match[3], match[2], re.findall(r"%([\w.\-]+)", match[4]), line)
    return module


def loops(module: Module, computation: str) -> Iterator[Instruction]:
    """The loops that a computation runs."""
    return (x for x in module[computation].values() if x.kind == "while")


def body(loop: Instruction) -> str:
    """The computation that a loop repeats."""
    return _called("body", loop.line)


def size(shape: str, *, hbm_only: bool = True) -> int:
    """Bytes of the arrays of a shape, their tiles filled up, or of those of them that lie in HBM."""
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype in _BYTES and not (hbm_only and re.search(r"S\([1-9]\)", layout)):
            sizes = [int(d) for d in dims.split(",") if d]
            if match := re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout):
                order, tile = ([int(n) for n in part.split(",")] for part in match.groups())
                for axis, n in zip(order, reversed(tile), strict=False):  # the minor axes
                    sizes[axis] += -sizes[axis] % n
            total += _BYTES[dtype] * math.prod(sizes)
    return total


def moved_bytes(module: Module, computation: str) -> int:
    """Bytes that one run of a computation moves.

    Raises:
      ValueError: a loop does not say how often it runs.
    """
    return sum(_moved(module, computation, x) for x in module[computation].values())


def decode_traffic(text: str, block_size: int) -> tuple[float, float]:
    """Bytes that a token moves in the compiled program of `Decoder.decode`, and its share of what a block moves once.

    Args:
      text: of the program's HLO.
      block_size: tokens of a block.

    Raises:
      ValueError: the program is not one loop over tokens around loops over layers.
    """
    module = parse(text)
    over_tokens = [loop for loop in loops(module, "ENTRY") if any(loops(module, body(loop)))]
    if len(over_tokens) != 1:
        raise ValueError(
            f"{len(over_tokens)} loops of the program hold loops; the one over tokens must be the only one."
        )
    once = sum(_moved(module, "ENTRY", x) for x in module["ENTRY"].values() if x.name != over_tokens[0].name)
    return moved_bytes(module, body(over_tokens[0])), once / block_size


def _moved(module: Module, computation: str, x: Instruction) -> int:
    defined = module[computation]
    shapes = [defined[name].shape for name in x.operands if name in defined]
    if x.kind in _FREE or x.kind.endswith("-done"):
        return 0
    if x.kind == "while":
        return _trips(module, x) * moved_bytes(module, body(x))
    if x.kind == "conditional":
        branches = re.search(r"branch_computations=\{(.*?)\}", x.line)[1]
        return max(moved_bytes(module, name) for name in re.findall(r"%([\w.\-]+)", branches))
    if x.kind == "fusion":
        return _fusion(module, x, shapes)
    if x.kind == "copy-start":  # the shapes of destination, source and a flag
        parts = [match[0] for match in _ARRAY.finditer(x.shape)][:2]
        return sum(map(size, parts))
    if x.kind == "dynamic-update-slice":
        return 2 * size(shapes[1])
    if x.kind == "dynamic-slice":
        return size(x.shape) + (size(x.shape, hbm_only=False) if size(shapes[0]) else 0)
    return size(x.shape) + sum(map(size, shapes))


def _fusion(module: Module, x: Instruction, shapes: list[str]) -> int:
    """What a fusion reads of its operands and writes."""
    fused = module[_called("calls", x.line)]
    total = sum(min(_read(module, fused, _parameter(fused, i)), size(shape)) for i, shape in enumerate(shapes))
    written = size(x.shape)
    for update in (inner for inner in fused.values() if inner.kind == "dynamic-update-slice"):
        whole = size(update.shape, hbm_only=False)
        if written >= whole:  # in place
            written += size(fused[update.operands[1]].shape, hbm_only=False) - whole
    return total + written


def _read(module: Module, fused: dict[str, Instruction], name: str) -> int:
    """Bytes of an array that a fused computation needs."""
    total = 0
    for user in (inner for inner in fused.values() if name in inner.operands):
        at = user.operands.index(name)
        if user.kind == "bitcast":
            total += _read(module, fused, user.name)
        elif user.kind == "fusion":
            inner = module[_called("calls", user.line)]
            total += _read(module, inner, _parameter(inner, at))
        elif user.kind == "dynamic-slice" and at == 0:
            total += size(user.shape, hbm_only=False)
        elif user.kind != "dynamic-update-slice" or at > 0:
            total += size(fused[name].shape, hbm_only=False)
    return total


def _parameter(fused: dict[str, Instruction], index: int) -> str:
    return next(x.name for x in fused.values() if x.kind == "parameter" and f"parameter({index})" in x.line)


def _called(attribute: str, line: str) -> str:
    return re.search(rf"{attribute}=%?([\w.\-]+)", line)[1]


def _trips(module: Module, loop: Instruction) -> int:
    if known := re.search(r"known_trip_count[^\d]*(\d+)", loop.line):
        return int(known[1])
    condition = module[_called("condition", loop.line)].values()
    constants = {int(n) for x in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", x.line)}
    if len(constants) != 1:
        raise ValueError(f"cannot tell how often the loop {loop.name} runs.")
    return constants.pop()
