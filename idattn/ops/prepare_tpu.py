"""The preparation of heads on TPUs: one pass over a projection forward, and one backward that recomputes it.

Arrays stay as the products around leave and read them, (B, T, channels), heads next to each other in the lanes. The
grid goes over rows of the batch, blocks of channels and, innermost, blocks of tokens: forward in order, backward from
the last to the first, since a token's cotangent is a sum over the tokens after it. A block is worked on in tiles of
whole heads and whole 128 lanes; between load and store a tile stays in registers, but for the rows of a convolution,
which are stored to be loaded again at the offset of each tap.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from idattn.ops.platforms import requires
from idattn.ops.prepare import FLOOR, HeadInputs, Preparation, Rule
from idattn.ops.tpu_kernels import LANES

TOKENS = 128  # of a block
HALO = 16  # rows before a block that are loaded with it, the least that bfloat16 loads
EDGE = 8  # of them, the rows that a convolution may reach
MAX_LANES = 1024  # of a block


def _tile_lanes(width: int) -> int:
    """Lanes of whole heads that are whole registers too."""
    return math.lcm(width, LANES)


class Plan(NamedTuple):
    """The sizes of a kernel, and what it does."""

    width: int  # of a head
    taps: int  # of the convolution; 0 for none
    rotate: str  # "before" or "after" the activation, or "none"
    activate: bool
    norm: tuple[float, float] | None  # heads over sqrt(norm[0] S + norm[1]), S the sum of their squares
    affine: bool  # times a scale, plus a bias
    parts: int  # bfloat16 parts of what is summed over a head
    lanes: int
    has_documents: bool

    @property
    def names(self) -> list[str]:
        """The rows of the parameters."""
        conv = [*(f"taps{i}" for i in range(self.taps)), "conv_bias"] if self.taps else []
        return conv + (["scale", "bias"] if self.affine else [])

    @property
    def tile_lanes(self) -> int:
        return _tile_lanes(self.width)

    @property
    def tiles(self):
        return [slice(i, i + self.tile_lanes) for i in range(0, self.lanes, self.tile_lanes)]

    def params(self, ref, lanes):
        return {name: ref[i : i + 1, lanes] for i, name in enumerate(self.names)}


class _Shared(NamedTuple):
    """What the tiles of a block share; None for what they do not need."""

    same_head: Any  # (L, L) bfloat16, 1 where two lanes are of one head
    cos: Any  # (n, L)
    sin: Any  # (n, L), with the signs of the rotation
    positions: Any  # (n, LANES) int32, of the tokens in their documents


def _shared(plan: Plan, rotary_ref, positions) -> _Shared:
    L, R = plan.tile_lanes, plan.width
    row, column = (jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (L, L), axis), R) for axis in (0, 1))
    same_head = jnp.where(row == column, 1.0, 0.0).astype(jnp.bfloat16)
    if rotary_ref is None:
        return _Shared(same_head, None, None, positions)
    both = rotary_ref[0]
    if 2 * R == L:
        lane = jax.lax.broadcasted_iota(jnp.int32, both.shape, 1)
        swapped = pltpu.roll(both, R, 1)
        cos, sin = jnp.where(lane < R, both, swapped), jnp.where(lane < R, swapped, both)
    else:
        cos, sin = (jnp.concatenate([x] * (L // R), axis=1) for x in (both[:, :R], both[:, R:]))
    return _Shared(same_head, cos, sin, positions)


def _columns(row):
    """A row (1, n) as equal columns (n, LANES)."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _where_seen(positions, s: int, x):
    """x (n, L), 0 where a token at `positions` (n, LANES) does not see the one s before; all where it is None."""
    if positions is None:
        return x
    return jnp.where(jnp.concatenate([positions] * (x.shape[1] // LANES), axis=1) >= s, x, 0.0)


def _head_sums(plan: Plan, shared: _Shared, x):
    """The sum over each head, in all of its lanes, by products that the systolic array does."""
    total = jnp.zeros_like(x)
    for i in range(plan.parts):
        part = x.astype(jnp.bfloat16)
        total += jnp.dot(part, shared.same_head, preferred_element_type=jnp.float32)
        if i + 1 < plan.parts:
            x = x - part.astype(jnp.float32)
    return total


def _partner(plan: Plan, x):
    """The other channel of each rotated pair."""
    half, L = plan.width // 2, x.shape[1]
    if plan.width == L:
        return pltpu.roll(x, half, 1)
    lane = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1), plan.width)
    return jnp.where(lane < half, pltpu.roll(x, L - half, 1), pltpu.roll(x, half, 1))


def _rotate(plan: Plan, shared: _Shared, x):
    return x * shared.cos + _partner(plan, x) * shared.sin


def _rotate_back(plan: Plan, shared: _Shared, d):
    return d * shared.cos - _partner(plan, d) * shared.sin


class _Kept(NamedTuple):
    """What the way back reads of the way forward."""

    shifted: list[jax.Array]  # what each tap is multiplied by, the last one first
    x: jax.Array  # before the activation
    gate: Any  # sigmoid(x)
    y: jax.Array  # normalised
    inverse: Any  # what it was multiplied by for that


def _forward(plan: Plan, shared: _Shared, refs, first, lanes):
    params = plan.params(refs["params"], lanes)
    x, shifted = refs["x"][0, :, lanes].astype(jnp.float32), []
    if plan.taps:
        before = jnp.where(first, refs["tail"][0, :, lanes], refs["before"][0, :, lanes]).astype(jnp.float32)
        rows = refs["rows"]
        rows[:EDGE, lanes] = before[HALO - EDGE :]
        rows[EDGE:, lanes] = x
        shifted = [x]
        for s in range(1, plan.taps):
            earlier = rows[EDGE - s : EDGE - s + TOKENS, lanes]
            shifted.append(_where_seen(shared.positions, s, earlier))
        x = params["conv_bias"]
        for s, z in enumerate(shifted):
            x = x + z * params[f"taps{plan.taps - 1 - s}"]
    if plan.rotate == "before":
        x = _rotate(plan, shared, x)
    gate = 0.5 + 0.5 * jnp.tanh(0.5 * x) if plan.activate else None
    y = x if gate is None else x * gate
    if plan.rotate == "after":
        y = _rotate(plan, shared, y)
    inverse = None
    if plan.norm is not None:
        inverse = jax.lax.rsqrt(_head_sums(plan, shared, y * y) * plan.norm[0] + plan.norm[1])
        y = y * inverse
    kept = _Kept(shifted, x, gate, y, inverse)
    return y * params["scale"] + params["bias"] if plan.affine else y, kept


def _split_refs(plan: Plan, refs, names) -> dict[str, Any]:
    """The refs by name; of `names` those that the plan has."""
    absent = {"before", "tail", "rows", "rows_d", "d_tail"} if not plan.taps else set()
    absent |= {"positions", "kept_positions"} if not (plan.taps and plan.has_documents) else set()
    absent |= {"rotary"} if plan.rotate == "none" else set()
    absent |= {"params", "d_params"} if not plan.names else set()
    refs = iter(refs)
    return {name: None if name in absent else next(refs) for name in names}


def forward_kernel(_, *refs, plan: Plan):
    refs = _split_refs(plan, refs, ("x", "before", "tail", "params", "rotary", "positions", "y", "rows"))
    positions = None if refs["positions"] is None else _columns(refs["positions"][0])
    shared = _shared(plan, refs["rotary"], positions)
    for lanes in plan.tiles:
        y, _ = _forward(plan, shared, refs, pl.program_id(2) == 0, lanes)
        refs["y"][0, :, lanes] = y.astype(refs["y"].dtype)


def _sum_rows(x):
    """The sums over the rows of each of the 8 sublanes."""
    return jnp.sum(x.reshape(-1, 8, x.shape[1]), axis=0)


def backward_kernel(_, *refs, plan: Plan):
    names = ("x", "before", "tail", "params", "rotary", "positions", "d_y", "d_x", "d_params", "d_tail")
    refs = _split_refs(plan, refs, (*names, "rows", "rows_d", "kept_positions"))
    step, n = pl.program_id(2), TOKENS
    first = step == pl.num_programs(2) - 1  # of the sequence: the blocks come from the last to the first
    positions = None

    @pl.when(step == 0)
    def _():
        for name in ("d_params", "rows_d", "kept_positions"):
            if refs[name] is not None:
                refs[name][...] = jnp.zeros_like(refs[name])

    if plan.taps:
        refs["rows_d"][n:] = refs["rows_d"][:EDGE]  # of the block after this one
    if refs["positions"] is not None:
        positions = _columns(refs["positions"][0])
        refs["kept_positions"][n:] = refs["kept_positions"][:EDGE]
        refs["kept_positions"][:n] = positions
    shared = _shared(plan, refs["rotary"], positions)
    for lanes in plan.tiles:
        params = plan.params(refs["params"], lanes)
        _, kept = _forward(plan, shared, refs, first, lanes)
        d, sums = refs["d_y"][0, :, lanes].astype(jnp.float32), {}
        if plan.affine:
            sums |= {"scale": d * kept.y, "bias": d}
            d = d * params["scale"]
        if plan.norm is not None:
            d = kept.inverse * (d - kept.y * (plan.norm[0] * _head_sums(plan, shared, d * kept.y)))
        if plan.rotate == "after":
            d = _rotate_back(plan, shared, d)
        if kept.gate is not None:
            d = d * (kept.gate * (1 + kept.x * (1 - kept.gate)))
        if plan.rotate == "before":
            d = _rotate_back(plan, shared, d)
        if plan.taps:
            sums["conv_bias"] = d
            sums |= {f"taps{plan.taps - 1 - s}": d * z for s, z in enumerate(kept.shifted)}
            rows = refs["rows_d"]
            rows[:n, lanes] = d
            d = d * params[f"taps{plan.taps - 1}"]
            for s in range(1, plan.taps):
                z = rows[s : s + n, lanes] * params[f"taps{plan.taps - 1 - s}"]
                later = None if positions is None else refs["kept_positions"][s : s + n]
                d += _where_seen(later, s, z)
        refs["d_x"][0, :, lanes] = d.astype(refs["d_x"].dtype)
        for i, name in enumerate(plan.names):
            refs["d_params"][0, 8 * i : 8 * i + 8, lanes] += _sum_rows(sums[name])

    if plan.taps:

        @pl.when(first)
        def _():
            for lanes in plan.tiles:
                params, edge = plan.params(refs["params"], lanes), refs["rows_d"][:EDGE, lanes]
                token = jax.lax.broadcasted_iota(jnp.int32, edge.shape, 0)
                total = jnp.zeros_like(edge)
                for s in range(1, plan.taps):  # the cotangent of token t - s, from those of t = 0 ... s - 1
                    z = jnp.where(token < s, edge * params[f"taps{plan.taps - 1 - s}"], 0.0)
                    z = _where_seen(None if positions is None else positions[:EDGE], s, z)
                    total += pltpu.roll(z, EDGE - s, 0)
                refs["d_tail"][0, :, lanes] = total


def _call(x, tail, params, rotary, positions, d_y=None, *, plan: Plan, interpret: Any = False):
    """y (B, T, C), or with `d_y` the cotangents d_x, d_params (B, 8 rows each, C), d_tail (B, EDGE, C).

    Args:
      x: (B, T, C), T a multiple of TOKENS.
      tail: (B, HALO, C), the last rows are those before token 0; None without a convolution.
      params: (rows, C) float32.
      rotary: (B, T, 2 width) float32.
      positions: (B, T) int32.
    """
    B, T, C = x.shape
    N, n, lanes = T // TOKENS, TOKENS, plan.lanes
    backward = d_y is not None

    def at(i):
        return N - 1 - i if backward else i

    def rows(count):
        shape = jax.ShapeDtypeStruct((B, count, C), jnp.float32)
        return shape, pl.BlockSpec((1, count, lanes), lambda b, c, i, _: (b, 0, c))

    block = pl.BlockSpec((1, n, lanes), lambda b, c, i, _: (b, at(i), c))
    inputs, outputs, scratch = [(x, block)], [(jax.ShapeDtypeStruct(x.shape, x.dtype), block)], []
    if plan.taps:
        before = pl.BlockSpec((1, HALO, lanes), lambda b, c, i, _: (b, jnp.maximum(at(i) * (n // HALO) - 1, 0), c))
        inputs += [(x, before), (tail, pl.BlockSpec((1, HALO, lanes), lambda b, c, i, _: (b, 0, c)))]
        scratch = [pltpu.VMEM((n + EDGE, lanes), jnp.float32)] * (1 + backward)
    if plan.names:
        inputs.append((params, pl.BlockSpec((params.shape[0], lanes), lambda b, c, i, _: (0, c))))
    if plan.rotate != "none":
        inputs.append((rotary, pl.BlockSpec((1, n, rotary.shape[2]), lambda b, c, i, _: (b, at(i), 0))))
    if plan.taps and plan.has_documents:
        inputs.append((positions.reshape(B, 1, T), pl.BlockSpec((1, 1, n), lambda b, c, i, _: (b, 0, at(i)))))
        scratch += [pltpu.VMEM((n + EDGE, LANES), jnp.int32)] * backward
    if backward:
        inputs.append((d_y, block))
        outputs += [rows(8 * len(plan.names))] * bool(plan.names) + [rows(EDGE)] * bool(plan.taps)
    kernel = backward_kernel if backward else forward_kernel
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        partial(kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, C // lanes, N),
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            scratch_shapes=scratch,
        ),
        out_shape=list(shapes),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="prepare_" + kernel.__name__.removesuffix("_kernel"),
    )(jnp.zeros(1, jnp.int32) + (0 if interpret else requires("tpu", "pallas_tpu")), *arrays)


def _plan(inputs: HeadInputs, preparation: Preparation) -> Plan:
    x, width = inputs.x, preparation.width
    rotate = "none"
    if inputs.rotary is not None:
        rotate = "before" if preparation.rotate_first else "after"
    # Of sums S of squares: xi multiplies by 1 / sqrt(S + f); RMSNorm after it by 1 / sqrt(S / (S + f) / width + eps);
    # a rotation changes no sum.
    floor, eps = FLOOR, preparation.eps
    norm = (1 / width, eps) if inputs.scale is not None else None
    if preparation.activate:
        norm = (1.0, floor) if norm is None else (1 / width + eps, eps * floor)
    tile = _tile_lanes(width)
    lanes = next((n for n in range(MAX_LANES // tile * tile, 0, -tile) if x.shape[2] % n == 0), tile)
    return Plan(
        width=width,
        taps=0 if inputs.taps is None else inputs.taps.shape[0],
        rotate=rotate,
        activate=preparation.activate,
        norm=norm,
        affine=inputs.scale is not None,
        parts=2 if x.dtype == jnp.bfloat16 else 3,
        lanes=lanes,
        has_documents=inputs.positions is not None,
    )


def _arguments(inputs: HeadInputs, plan: Plan) -> dict[str, Any]:
    """The arrays as the kernels take them, T padded to whole blocks."""
    x = inputs.x
    pad = ((0, 0), (0, -x.shape[1] % TOKENS))
    tail = None
    if plan.taps:
        tail = jnp.zeros((x.shape[0], 0, x.shape[2]), x.dtype) if inputs.tail is None else inputs.tail.astype(x.dtype)
        tail = jnp.pad(tail, ((0, 0), (HALO - tail.shape[1], 0), (0, 0)))
    rows: list[Any] = []
    if inputs.taps is not None:
        rows += [*inputs.taps, inputs.conv_bias]
    if inputs.scale is not None:
        rows += [jnp.tile(inputs.scale, x.shape[2] // plan.width), inputs.bias]
    return {
        "x": jnp.pad(x, (*pad, (0, 0))),
        "tail": tail,
        "params": jnp.stack(rows).astype(jnp.float32) if rows else None,
        "rotary": None if inputs.rotary is None else jnp.pad(inputs.rotary, (*pad, (0, 0))),
        "positions": None if inputs.positions is None else jnp.pad(inputs.positions, pad),
    }


def forward(preparation: Preparation, inputs: HeadInputs, *, interpret: Any = False) -> jax.Array:
    """See `idattn.ops.prepare.Rule`."""
    plan = _plan(inputs, preparation)
    (y,) = _call(**_arguments(inputs, plan), plan=plan, interpret=interpret)
    return y[:, : inputs.x.shape[1]]


def backward(preparation: Preparation, inputs: HeadInputs, d_y: jax.Array, *, interpret: Any = False) -> HeadInputs:
    """See `idattn.ops.prepare.Rule`."""
    plan, (B, T, C) = _plan(inputs, preparation), inputs.x.shape
    d_y = jnp.pad(d_y, ((0, 0), (0, -T % TOKENS), (0, 0)))
    d_x, *others = _call(**_arguments(inputs, plan), d_y=d_y, plan=plan, interpret=interpret)
    d_inputs = HeadInputs(d_x[:, :T])
    if plan.names:
        rows = others.pop(0).reshape(B, len(plan.names), 8, C).sum((0, 2))
        if plan.taps:
            d_inputs = d_inputs._replace(taps=rows[: plan.taps], conv_bias=rows[plan.taps])
        if plan.affine:
            d_inputs = d_inputs._replace(scale=rows[-2].reshape(-1, plan.width).sum(0), bias=rows[-1])
    if inputs.tail is not None:
        d_inputs = d_inputs._replace(tail=others.pop()[:, EDGE - inputs.tail.shape[1] :])
    differentiable = inputs._replace(rotary=None, positions=None)
    return jax.tree.map(lambda d, x: d.astype(x.dtype), d_inputs, differentiable)


def requirement(inputs: HeadInputs, preparation: Preparation) -> str | None:
    """See `idattn.ops.prepare.Rule`."""
    x, taps = inputs.x, inputs.taps
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"bfloat16 or float32, not {x.dtype}"
    if not isinstance(x.shape[1], int) or x.shape[1] < HALO:
        return f"at least {HALO} tokens, not {x.shape[1]}"
    if x.shape[2] % (tile := _tile_lanes(preparation.width)):
        return f"a multiple of {tile} channels for heads of {preparation.width}, not {x.shape[2]}"
    if taps is not None and taps.shape[0] > EDGE + 1:
        return f"a convolution of at most {EDGE + 1} taps, not {taps.shape[0]}"
    return None


RULE = Rule(forward, backward, requirement)


def interpreted(interpret: Any) -> Rule:
    """The kernels as they are interpreted on any platform: for tests."""
    return Rule(partial(forward, interpret=interpret), partial(backward, interpret=interpret), requirement)
