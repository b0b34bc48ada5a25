"""Pallas kernels of a program for TPUs: steps of their grids, bytes, products, and bundles as libtpu schedules them."""

import math
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from idattn.chips import Chip, chip_of
from idattn.plan.compiler import compile_for, load_compiler
from idattn.plan.cycles import estimate
from idattn.plan.hlo import Instruction, kernel_call, parse


class Kernel(NamedTuple):
    """A Pallas kernel."""

    call: Any  # the equation that calls it

    @property
    def name(self) -> str:
        return self.call.params["name"]

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return math.prod(self.call.params["grid_mapping"].grid)

    @property
    def working_steps(self) -> float:
        """Those that do more than skip a block; they differ for the causal blocks of JAX's splash attention."""
        blocks = self.call.params["grid_mapping"].grid[-1]
        return self.steps * ((blocks + 1) / (2 * blocks) if self.name.startswith("splash_mha") else 1)

    @property
    def hbm_bytes(self) -> int:
        """Bytes that the grid moves, a block whenever its index changes from one step to the next."""
        return _traffic(self.call.params["grid_mapping"])

    @property
    def operands(self) -> tuple[str, ...]:
        """The shapes of its operands as HLO writes them, without layouts."""
        return tuple(_hlo_shape(x.aval) for x in self.call.invars)

    def mxu_cycles(self, chip: Chip) -> float:
        """Cycles of the grid's matrix products if every array were always busy."""
        return self.steps * _mxu_cycles(self.call.params["jaxpr"], chip)


def find_kernels(jaxpr) -> list[Kernel]:
    """The Pallas kernels that a jaxpr calls, nested programs included."""
    return [Kernel(eqn) for eqn in _equations(jaxpr) if eqn.primitive.name == "pallas_call"]


def count_bundles(kernel: Kernel, topology: str, dump: str) -> tuple[int, int]:
    """The bundles of a grid step, and how many of them are empty, from compiling the kernel alone.

    Args:
      kernel: all of its code counts, also what runs in some steps only.
      topology: as v5e:2x2.
      dump: the folder that the compiler was loaded with; it is emptied.
    """
    arguments = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in kernel.call.invars]

    def alone(*arguments):
        return kernel.call.primitive.bind(*arguments, **kernel.call.params)

    alone.__name__ = kernel.name  # which XLA names the kernel after, or the kernel's own name
    for file in Path(dump).iterdir():
        file.unlink()
    compile_for(topology, alone, *arguments)
    files = list(Path(dump).glob(f"*{kernel.name}*schedule-analysis_packed-bundles-post-ra.txt"))
    if len(files) != 1:
        raise RuntimeError(f"expected one schedule of {kernel.name} in {dump}, found {files}")
    total, empty = re.findall(r"(?:total|empty) scheduled bundles:\s+(\d+)", files[0].read_text())[:2]
    return int(total), int(empty)


def kernel_cycles(kernel: Kernel, topology: str, dump: str) -> float:
    """About the cycles of a run: bundles times steps that work, shared by the cores where an axis is parallel."""
    parallel = "parallel" in (getattr(kernel.call.params["compiler_params"], "dimension_semantics", None) or ())
    bundles, _ = count_bundles(kernel, topology, dump)
    return bundles * kernel.working_steps / (chip_of(topology).cores if parallel else 1)


def schedule_kernels(jaxpr, topology: str, dump: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """The cycles of each kernel that a jaxpr calls, by its name and the shapes of its operands."""
    kernels = {(x.name, x.operands): x for x in find_kernels(jaxpr)}
    return {key: kernel_cycles(x, topology, dump) for key, x in kernels.items()}


def scheduled_cycles(costs: dict[tuple[str, tuple[str, ...]], float]) -> Callable[[Instruction], float]:
    """The cycles of a kernel's call in a program, of the kernels that `schedule_kernels` has counted."""

    def cycles(x: Instruction) -> float:
        if (call := kernel_call(x)) not in costs:
            raise ValueError(f"no schedule of the kernel {call}; the program has those of {[*costs]}.")
        return costs[call]

    return cycles


def predict(function: Callable[..., Any], arguments: Sequence[Any], topology: str) -> tuple[float, float]:
    """Seconds of a call on one chip, and of the kernels in it, by the estimates of the TPU's compiler.

    They come from another process, since the compiler writes the schedules of all that it compiles, or none, and since
    this one may be using a TPU.

    Args:
      function: can be pickled; its kernels are in a `jax.named_scope`, which leaves them their names.
      arguments: arrays, of which the shapes and dtypes count.
      topology: as v5e:2x2.

    Raises:
      ValueError: the compiler has no estimates for the topology, or the program cannot be counted.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(arguments))
    has_kernels = any(find_kernels(jax.make_jaxpr(function)(*shapes).jaxpr))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_predict, function, shapes, topology, has_kernels).result()


def _predict(function, arguments, topology: str, has_kernels: bool) -> tuple[float, float]:
    chip = chip_of(topology)
    with tempfile.TemporaryDirectory() as dump:
        load_compiler(dump_to=dump if has_kernels else None)
        costs = schedule_kernels(jax.make_jaxpr(function)(*arguments).jaxpr, topology, dump)
        text = compile_for(topology, function, *arguments).as_text()
    assert text is not None, "the TPU's compiler has it"
    total = estimate(parse(text), chip, scheduled_cycles(costs))
    return total.cycles / chip.clock, total.parts["kernels"] / chip.clock


def _hlo_shape(aval) -> str:
    kind = {"f": "f", "i": "s", "u": "u"}.get(aval.dtype.kind, "bf")
    name = "pred" if aval.dtype == bool else f"{kind}{8 * aval.dtype.itemsize}"
    return f"{name}[{','.join(map(str, aval.shape))}]"


def _equations(jaxpr) -> Iterator[Any]:
    """All equations, also those of nested programs but for the bodies of kernels."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "pallas_call":
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _traffic(grid_mapping) -> int:
    """Bytes moved between HBM and VMEM by a walk over the grid, last axis fastest."""
    indices = [x.ravel() for x in np.indices(grid_mapping.grid)]
    total = 0
    for mapping in grid_mapping.block_mappings:
        index_map = mapping.index_map_jaxpr
        rest = [0] * (len(index_map.jaxpr.invars) - len(indices))  # prefetched scalars, which no index map here reads
        evaluate = jax.vmap(lambda *i, index_map=index_map, rest=rest: jaxpr_as_fun(index_map)(*i, *rest))
        blocks = np.stack([np.broadcast_to(x, indices[0].shape) for x in evaluate(*indices)])
        moves = 1 + int(np.count_nonzero(np.any(blocks[:, 1:] != blocks[:, :-1], axis=0)))
        size = math.prod(getattr(width, "block_size", width) for width in mapping.block_shape)
        total += moves * size * mapping.array_aval.dtype.itemsize
    return total


def _mxu_cycles(jaxpr, chip: Chip) -> float:
    """Cycles of one grid step's products, rows entering an array one a cycle.

    An array that is half filled counts as whole; float32 products in full precision are six of bfloat16.
    """
    cycles = 0
    for eqn in _equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            x, y = (v.aval for v in eqn.invars)
            depth = math.prod(x.shape[axis] for axis in contract)
            passes = 6 if x.dtype == jnp.float32 else 1
            rows, columns = x.size // depth, y.size // depth
            cycles += passes * rows * math.ceil(depth / chip.mxu_width) * math.ceil(columns / chip.mxu_width)
    return cycles / chip.mxus
