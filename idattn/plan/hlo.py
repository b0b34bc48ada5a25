"""The text of a compiled HLO module: computations, how often each runs, arrays and collectives."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?$")
# Between slices the compiler has a host send a chip's array, and receive for it what the hosts made of all of them.
_BETWEEN_SLICES = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)".*_xla_megascale_transfer_type="(\w+)"')


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      shape: of its result.
      operands: names; NAME#3 is an element of a tuple.
    """

    name: str
    kind: str
    shape: str
    operands: list[str]
    line: str

    @property
    def is_root(self) -> bool:
        return self.line.lstrip().startswith("ROOT ")


Computation = dict[str, Instruction]  # by name, in the order in which they run
Module = dict[str, Computation]  # by name; the entry computation is "ENTRY"


def parse(text: str) -> Module:
    """The computations of an HLO module's text."""
    module: Module = {}
    current: Computation = {}
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = module["ENTRY" if match[1] else match[2]] = {}
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)", line):
            operands = re.findall(r"%([\w.\-]+(?:#\d+)?)", match[4])
            current[match[1]] = Instruction(match[1], match[3], match[2], operands, line)
    return module


def called(attribute: str, instruction: Instruction) -> str:
    """The computation that an attribute of an instruction names."""
    return _find(rf"\b{attribute}=%?([\w.\-]+)", instruction.line)


def kernel_call(x: Instruction) -> tuple[str, tuple[str, ...]] | None:
    """The name of the Pallas kernel that an instruction calls, and the shapes of its operands; None for another."""
    if 'custom_call_target="tpu_custom_call"' not in x.line:
        return None
    shapes = _find(r"operand_layout_constraints=\{(.*?\})\}", x.line)
    # After the kernel's name come a number and, in newer compilers, the operands that are fetched ahead: .10.refs_2_
    return x.name.partition(".")[0], tuple(re.findall(r"\w+\[[\d,]*\]", shapes))


def branches(conditional: Instruction) -> list[str]:
    """The computations between which a conditional chooses."""
    if match := re.search(r"branch_computations=\{(.*?)\}", conditional.line):
        return re.findall(r"%([\w.\-]+)", match[1])
    return [called("true_computation", conditional), called("false_computation", conditional)]


def loops(computation: Computation) -> Iterator[Instruction]:
    """The loops that a computation runs."""
    return (x for x in computation.values() if x.kind == "while")


def executions(module: Module, name: str = "ENTRY", times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
    """Every instruction that a computation runs, with the computation that it stands in and how often it runs.

    The bodies of loops and called computations follow what runs them, all branches of a conditional too; the insides of
    fusions do not.

    Raises:
      ValueError: a loop does not say how often it runs.
    """
    for x in module[name].values():
        yield name, x, times
        if x.kind == "while":
            yield from executions(module, called("body", x), times * trip_count(module, name, x))
        elif x.kind == "conditional":
            for branch in branches(x):
                yield from executions(module, branch, times)
        elif x.kind in ("call", "async-start"):
            yield from executions(module, called("to_apply" if "to_apply=" in x.line else "calls", x), times)


def shape_of(computation: Computation, operand: str) -> str:
    """The shape of what an operand names; empty where the computation does not define it."""
    name, _, index = operand.partition("#")
    if name not in computation:
        return ""
    shape = computation[name].shape
    return [match[0] for match in _ARRAY.finditer(shape)][int(index)] if index else shape


def arrays(shape: str) -> list[str]:
    """The shapes of the arrays of a shape, which may be a tuple."""
    return [match[0] for match in _ARRAY.finditer(shape) if match[1] in _BYTES]


def dimensions(shape: str) -> list[int]:
    """The dimensions of an array's shape."""
    match = _ARRAY.match(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def size(shape: str, *, hbm_only: bool = True, padded: bool = True) -> int:
    """Bytes of the arrays of a shape.

    Args:
      hbm_only: without those that lie in on-chip memory (memory space 1 and above in their layouts).
      padded: with their tiles filled up.
    """
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype in _BYTES and not (hbm_only and re.search(r"S\([1-9]\)", layout)):
            sizes = [int(d) for d in dims.split(",") if d]
            match = re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout)
            if padded and match:
                order, tile = ([int(n) for n in part.split(",")] for part in match.groups())
                for axis, n in zip(order, reversed(tile), strict=False):  # the minor axes
                    sizes[axis] += -sizes[axis] % n
            total += _BYTES[dtype] * math.prod(sizes)
    return total


def trip_count(module: Module, computation: str, loop: Instruction) -> int:
    """How often a loop runs, as the compiler noted it or by a counter that a constant is added to up to a constant.

    Args:
      computation: that the loop stands in.

    Raises:
      ValueError: neither is so.
    """
    if known := re.search(r"known_trip_count[^\d]*(\d+)", loop.line):
        return int(known[1])
    condition, body = (module[called(attribute, loop)] for attribute in ("condition", "body"))
    compare, results = (next((x for x in part.values() if x.is_root), None) for part in (condition, body))
    if compare and results and compare.kind == "compare" and "direction=LT" in compare.line and results.kind == "tuple":
        counter, limit = compare.operands
        index, limit = _tuple_index(condition, counter), _constant(condition, limit)
        added = _source(body, results.operands[index]) if index is not None else None
        if (
            index is not None
            and limit
            and added
            and added.kind == "add"
            and index in (_tuple_index(body, x) for x in added.operands)
        ):
            step = max(_constant(body, name) or 0 for name in added.operands)
            start = _start(module[computation], loop, index)
            if step and start is not None:
                return max(0, -(-(limit - start) // step))
    raise ValueError(f"cannot tell how often the loop {loop.name} runs, whose condition is {compare and compare.line}")


def _find(pattern: str, line: str) -> str:
    if not (match := re.search(pattern, line)):
        raise ValueError(f"cannot read this line of HLO, in which {pattern} is missing: {line.strip()[:300]}")
    return match[1]


def _source(computation: Computation, operand: str) -> Instruction | None:
    """The instruction that an operand names, copies of it passed over."""
    x = computation.get(operand)
    while x and x.kind in ("copy", "bitcast"):
        x = computation.get(x.operands[0])
    return x


def _tuple_index(computation: Computation, operand: str) -> int | None:
    """Which element of a loop's tuple an operand is: %tuple#3 to newer compilers, an instruction to older ones."""
    if match := re.search(r"#(\d+)$", operand):
        return int(match[1])
    x = _source(computation, operand)
    if x and x.kind == "get-tuple-element":
        return int(_find(r"index=(\d+)", x.line))
    return None


def _constant(computation: Computation, operand: str) -> int | None:
    x = _source(computation, operand)
    match = x and re.search(r"[su]32\[\]\S* constant\((\d+)\)", x.line)
    return int(match[1]) if match else None


def _start(computation: Computation, loop: Instruction, index: int) -> int | None:
    """The value at the start of an element of a loop's tuple."""
    initial = _source(computation, loop.operands[0])
    return _constant(computation, initial.operands[index]) if initial and initial.kind == "tuple" else None


class Collective(NamedTuple):
    """An exchange between chips.

    Attributes:
      key: the same for the parts of one exchange, which may be started and finished in several fusions.
      sent_bytes: that a chip sends in one run: a ring's share, so an all-gather of n shards sends (n - 1)/n of its
        result, an all-reduce twice that.
      network: "ICI", the links within a slice, or "DCN", the data-centre network between slices.
    """

    kind: str
    key: str | tuple[str, str]
    sent_bytes: float
    network: str = "ICI"


def collectives(module: Module, computation: str, x: Instruction) -> list[Collective]:
    """The collectives that an instruction is or, as a fusion, holds."""
    if x.kind == "fusion":
        inside = called("calls", x)
        return [c for y in module[inside].values() for c in collectives(module, inside, y)]
    if x.kind in ("send", "recv") and (match := _BETWEEN_SLICES.search(x.line)):
        kind = match[2].lower().replace("_", "-").replace("one-to-one", "collective-permute")
        return [Collective(kind, match[1], _sent(kind, x), "DCN")]
    if not (match := _COLLECTIVE.match(x.kind)):
        return []
    # The parts of an exchange have one chain, or else one channel, of which 1 is that of many exchanges.
    found = re.search(r'chain_id="\d+', x.line) or re.search(r"channel_id=(?!1\b)\d+", x.line)
    key = found[0] if found else (computation, x.name)
    if computation.startswith("all-reduce-scatter"):  # a fusion that retains only its shard of a sum
        return [Collective("reduce-scatter", key, _sent(match[1], x) / 2)]
    return [Collective(match[1], key, _sent(match[1], x))]


def count_collectives(module: Module, network: str = "ICI") -> dict[str, int]:
    """Bytes that a chip sends over a network in a run of a module, by kind of collective, loops multiplied out.

    Raises:
      ValueError: a loop does not say how often it runs.
    """
    sent: dict[str, int] = {}
    seen = set()
    for name, x, times in executions(module):
        for collective in collectives(module, name, x):
            if collective.network == network and collective.key not in seen:
                seen.add(collective.key)
                sent[collective.kind] = sent.get(collective.kind, 0) + round(times * collective.sent_bytes)
    return sent


def _sent(kind: str, x: Instruction) -> int:
    """Bytes that a chip sends in one run of a collective instruction."""
    sizes = [size(array, hbm_only=False, padded=False) for array in arrays(x.shape)]
    if x.kind in ("send", "recv"):
        sizes = [max(sizes)]  # next to its flags
    elif x.kind.endswith("-start") and x.kind != "all-reduce-start":  # operands, as many results, and flags
        sizes = sizes[len(x.operands) : 2 * len(x.operands)]
    total = sum(sizes)
    if kind == "collective-permute":
        return total
    n = _group_size(x.line)
    shares = {"all-gather": 1, "all-to-all": 1, "reduce-scatter": n, "all-reduce": 2}
    if x.kind == "send":  # which has the operand's shape, not the result's
        shares |= {"all-gather": n, "reduce-scatter": 1}
    return round(shares[kind] * total * (n - 1) / n)


def _group_size(line: str) -> int:
    if match := re.search(r'_xla_megascale_target="?\{+([^}]*)\}', line):  # "{1,2}x{0:3}", or {{1,5},{2,6}}
        return match[1].count(",") + 1
    groups = line.split("replica_groups=", 1)[1]
    if groups.startswith("mesh["):  # mesh['a'=2,'b'=4] {'b'}: the axes within a group
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", groups.split("]")[0])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", groups.split("{", 1)[1].split("}")[0]))
    if match := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(match[1])
    return groups.split("}")[0].count(",") + 1
