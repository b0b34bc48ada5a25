"""One mesh for every kind of parallelism, and the table that says which of its axes split which dimension.

    data      rows of the batch; parameters are copies
    fsdp      rows of the batch; parameters, gradients and optimiser state are split and gathered layer by layer
    sequence  tokens; what crosses is the state of fixed size (softmax: all keys and values); parameters as in fsdp
    tensor    heads, channels of the MLP, vocabulary

Over several slices of TPUs, which only the slow data-centre network joins, goes `data` alone: of a step little but the
sums of gradients crosses it.

Parameters name their dimensions where they are made (`dims`), activations where they are constrained. The mesh is
the one of `jax.set_mesh`; without one, or with one device, everything here changes nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from idattn.config import Config, MeshConfig

AXES = ("data", "fsdp", "sequence", "tensor")
# Dimensions as in `idattn.shapes`; "D" is that of parameters, activations keep theirs whole. Others are not split.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "T": ("sequence",),
    "D": ("fsdp", "sequence"),
    "H": ("tensor",),
    "G": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # no stub says it is a class
) -> Mesh:
    """The mesh of a run over all devices, or those given; axes that exchange the most join the nearest devices.

    Of several slices, the first of `data` are the first slice, and so on. Devices that know of no slices, as simulated
    ones, are taken in their order.

    Raises:
      ValueError: the axes do not multiply to the number of devices, `slices` does not divide `data`, or is not the
        number of slices that the devices lie in.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        shape = ", ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise ValueError(f"the mesh {shape} must multiply to the {len(devices)} devices (-1: what remains).")
    slices = config.slices
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.slices={slices} must divide mesh.data={sizes[0]}, the axis over slices: the others can have at most "
            f"the {len(devices) // slices} devices of a slice."
        )
    known = hasattr(devices[0], "slice_index")
    found = len({device.slice_index for device in devices}) if known else slices
    # GPUs have slices too, one a host, but any axis may go over those.
    if found != slices and (slices > 1 or devices[0].platform == "tpu"):
        raise ValueError(
            f"mesh.slices={slices} must be {found}, the slices of these devices: --config.mesh.slices={found}."
        )
    if known and slices > 1:
        within, over = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1]
        grid = mesh_utils.create_hybrid_device_mesh(within, over, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_divides(config: Config, mesh: Mesh) -> None:
    """Refuse a mesh that does not divide what it splits.

    Raises:
      ValueError: with both numbers.
    """
    model, part = config.model, config.train.batch_size // config.train.accumulation
    for name, size, dim in (
        ("train.batch_size / accumulation", part, "B"),
        ("data.seq_len", config.data.seq_len, "T"),
        ("model.model_dim", model.model_dim, "D"),
        ("model.num_heads", model.num_heads, "H"),
        ("the number of states, model.num_heads / ssm.heads_per_kv,", model.num_kv_heads, "G"),
        ("model.mlp_dim", model.mlp_dim, "F"),
        ("model.vocab_size", model.vocab_size, "V"),
    ):
        ways = math.prod(mesh.shape[axis] for axis in RULES[dim])
        if size % ways:
            product = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in RULES[dim])
            raise ValueError(f"{product} must divide {name}={size}.")
    tokens, before = config.data.seq_len // mesh.shape["sequence"], model.ssm.conv_width - 1
    if tokens < before:
        raise ValueError(
            f"mesh.sequence={mesh.shape['sequence']} leaves {tokens} of data.seq_len={config.data.seq_len} tokens to a "
            f"device; the convolution looks back {before}."
        )


def spec(*dims: str | None) -> Any:
    """The PartitionSpec of an array with these dimensions; None and names without a rule are whole.

    Any, since it takes the place of the array in records whose fields are arrays.
    """
    return PartitionSpec(*(RULES.get(dim or "") or None for dim in dims))


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """x, split as these dimensions are."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, spec(*dims))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(weight: jax.Array, dims: tuple[str | None, ...]) -> jax.Array:
    """A weight, split as `dims` say, with its "D" whole; a reduce-scatter sums its gradient into the same parts.

    Left to itself the partitioner sums the gradient on every device, which moves twice as much.
    """
    return constrain(weight, *(None if dim == "D" else dim for dim in dims))


gathered.defvjp(
    lambda weight, dims: (gathered(weight, dims), None), lambda dims, _, gradient: (constrain(gradient, *dims),)
)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
    """All devices' parts of a parameter, one after another on `axis`."""
    return jax.lax.all_gather(shard, names, axis=axis, tiled=True)


def _scatter(axis: int, names: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Every device's part of the sum, by two reduce-scatters, within rows of devices and then within columns.

    TPUs have none over both dimensions of a torus: one of that kind becomes an all-reduce, of twice the bytes.
    """
    for name in names:
        size = jax.lax.axis_size(name)
        columns = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
        rows = size // columns
        by_column = [[row * columns + column for row in range(rows)] for column in range(columns)]
        by_row = [[row * columns + column for column in range(columns)] for row in range(rows)]
        for groups in (by_column, by_row) if columns > 1 else (by_column,):
            gradient = jax.lax.psum_scatter(
                gradient, name, scatter_dimension=axis, axis_index_groups=groups, tiled=True
            )
    return (gradient,)


_gather.defvjp(lambda shard, axis, names: (_gather(shard, axis, names), None), _scatter)


def product(x: jax.Array, weight: jax.Array, dims: tuple[str | None, str | None]) -> jax.Array:
    """x W of activations (B, T, num_in) and a weight whose axes `dims` name, at most one of them "D".

    Every device gathers the weight, and sums the gradient to where it lies. Left to itself the partitioner cuts the
    products into as many small ones as there are devices.
    """
    mesh = current_mesh()
    if mesh is None:
        return x @ weight

    def split(dim: str | None) -> tuple[str, ...]:
        return tuple(axis for axis in RULES.get(dim or "", ()) if mesh.shape[axis] > 1)

    def on_shard(x, weight):
        # Varying over the copies too, so that their gradients are summed where they are split.
        weight = jax.lax.pcast(weight, "data", to="varying") if "data" in split("B") else weight
        if "D" in dims and split("D"):
            weight = _gather(weight, dims.index("D"), split("D"))
        y = x @ weight
        return y if dims[0] == "D" or not split(dims[0]) else jax.lax.psum(y, split(dims[0]))

    # Without axes of one device, over which XLA for CPUs exchanges too. The check of what varies stays on, unlike in
    # `on_shards`: by it the gradient of a weight is summed over the devices that hold copies.
    weights = PartitionSpec(*(split(dim) for dim in dims))
    inputs, outputs = (PartitionSpec(split("B"), split("T"), () if dim == "D" else split(dim)) for dim in dims)
    return jax.shard_map(on_shard, in_specs=(inputs, weights), out_specs=outputs)(x, weight)


def current_mesh() -> Any:
    """The mesh that is compiled for, or None where there is nothing to split."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) and mesh.size > 1 else None


def is_split(dim: str) -> bool:
    """Whether the current mesh splits a dimension."""
    mesh = current_mesh()
    return mesh is not None and math.prod(mesh.shape[axis] for axis in RULES[dim]) > 1


def sequence_axis() -> str | None:
    """The axis of the current mesh over which the tokens of a row are split, or None."""
    return "sequence" if is_split("T") else None


def on_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` run by every device on its shards of the arguments, or itself where there is one device."""
    if current_mesh() is None:
        return function
    # The check would have every zero that a loop starts from cast to varying, all over the ops.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def param_specs(variables: nnx.State, *, stacked: bool = False) -> Any:
    """The specs of a module's variables, in their structure; `stacked` ones have a leading axis of layers.

    Raises:
      ValueError: a parameter does not name its axes.
    """
    lead = ("L",) if stacked else ()

    def spec_of(path, variable):
        dims = variable.get_metadata().get("dims")
        if dims is None:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"parameter {name} must name its axes for sharding: make it by idattn.nn.param.")
        return spec(*lead, *dims)

    return jax.tree.map_with_path(spec_of, variables, is_leaf=lambda v: isinstance(v, nnx.Variable))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """The rows of a batch of `rows` that devices of this process hold."""
    slices = NamedSharding(mesh, spec("B")).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in slices if index is not None for row in range(rows)[index[0]]})


def place(mesh: Mesh, batch: Mapping[str, np.ndarray], rows: list[int], count: int) -> dict[str, jax.Array]:
    """A batch of `count` rows on the mesh, from those `rows` of it (ascending) that this process has."""
    sharding = NamedSharding(mesh, spec("B", "T"))

    def array(x):
        def part(index):
            wanted = range(count)[index[0]]
            return x[rows.index(wanted[0]) : rows.index(wanted[-1]) + 1, index[1]]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, part)

    return {name: array(x) for name, x in batch.items()}


def on_mesh(mesh: Mesh, specs: Any) -> Any:
    """The shardings of specs on a mesh."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
