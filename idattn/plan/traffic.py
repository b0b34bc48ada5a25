"""Bytes that a compiled program of a TPU or GPU moves to and from HBM.

An instruction reads its operands and writes its result, unless they lie in on-chip memory (memory space 1 and above in
their layouts). A fusion reads of an operand only what it slices, and of an array that it updates in place it writes
only the part. Loops are multiplied out; a conditional counts as its longest branch. Scratch memory of CUDA's libraries
does not count.
"""

from idattn.plan.hlo import (
    Computation,
    Instruction,
    Module,
    arrays,
    branches,
    called,
    loops,
    parse,
    shape_of,
    size,
    trip_count,
)

_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all", "partition-id"}


def moved_bytes(module: Module, computation: str) -> int:
    """Bytes that one run of a computation moves.

    Raises:
      ValueError: a loop does not say how often it runs.
    """
    return sum(instruction_bytes(module, computation, x) for x in module[computation].values())


def decode_traffic(text: str, block_size: int) -> tuple[float, float]:
    """Bytes that a token moves in the compiled program of `Decoder.decode`, and its share of what a block moves once.

    Args:
      text: of the program's HLO.
      block_size: tokens of a block.

    Raises:
      ValueError: the program is not one loop over tokens around loops over layers.
    """
    module = parse(text)
    over_tokens = [loop for loop in loops(module["ENTRY"]) if any(loops(module[called("body", loop)]))]
    if len(over_tokens) != 1:
        raise ValueError(
            f"{len(over_tokens)} loops of the program hold loops; the one over tokens must be the only one."
        )
    once = sum(instruction_bytes(module, "ENTRY", x) for x in module["ENTRY"].values() if x.name != over_tokens[0].name)
    return moved_bytes(module, called("body", over_tokens[0])), once / block_size


def instruction_bytes(module: Module, computation: str, x: Instruction) -> int:
    """Bytes that one run of an instruction of a computation moves."""
    shapes = [shape_of(module[computation], name) for name in x.operands]
    if x.kind in _FREE or x.kind.endswith("-done"):
        return 0
    if x.kind == "while":
        return trip_count(module, computation, x) * moved_bytes(module, called("body", x))
    if x.kind == "conditional":
        return max(moved_bytes(module, name) for name in branches(x))
    if x.kind == "fusion":
        return _fusion(module, x, shapes)
    if x.kind == "copy-start":  # the shapes of destination, source and a flag
        return sum(map(size, arrays(x.shape)[:2]))
    if x.kind == "slice-start":  # the shapes of the source, of the slice and a flag
        part = arrays(x.shape)[1]
        return size(part, hbm_only=False) + size(part)
    if x.kind == "dynamic-update-slice":
        return 2 * size(shapes[1])
    if x.kind == "dynamic-slice":
        return size(x.shape) + (size(x.shape, hbm_only=False) if size(shapes[0]) else 0)
    if 'custom_call_target="__cub' in x.line:  # CUDA's libraries return their scratch memory, as bytes
        return sum(size(y) for y in arrays(x.shape) if not y.startswith(("s8[", "u8["))) + sum(map(size, shapes))
    return size(x.shape) + sum(map(size, shapes))


def _fusion(module: Module, x: Instruction, shapes: list[str]) -> int:
    """What a fusion reads of its operands and writes."""
    fused = module[called("calls", x)]
    total = sum(min(_read(module, fused, _parameter(fused, i)), size(shape)) for i, shape in enumerate(shapes))
    written = size(x.shape)
    for update in (inner for inner in fused.values() if inner.kind == "dynamic-update-slice"):
        whole = size(update.shape, hbm_only=False)
        if written >= whole:  # in place
            written += size(fused[update.operands[1]].shape, hbm_only=False) - whole
    return total + written


def _read(module: Module, fused: Computation, name: str) -> int:
    """Bytes of an array that a fused computation needs."""
    total = 0
    for user in (inner for inner in fused.values() if name in inner.operands):
        at = user.operands.index(name)
        if user.kind == "bitcast":
            total += _read(module, fused, user.name)
        elif user.kind == "fusion":
            inner = module[called("calls", user)]
            total += _read(module, inner, _parameter(inner, at))
        elif user.kind in ("dynamic-slice", "slice", "gather") and at == 0:
            total += size(user.shape, hbm_only=False)
        elif user.kind != "dynamic-update-slice" or at > 0:
            total += size(fused[name].shape, hbm_only=False)
    return total


def _parameter(fused: Computation, index: int) -> str:
    return next(x.name for x in fused.values() if x.kind == "parameter" and f"parameter({index})" in x.line)
