"""Compile for accelerators on a machine without one: for TPUs by libtpu, for GPUs by JAX's CUDA plugin."""

import importlib.util
import os
import re

import jax
import numpy as np

from idattn.plan.gpus import gpu_devices, gpu_of, load_gpu_compiler


def load_compiler(topology: str = "", *, dump_to: str | None = None) -> None:
    """Prepare the compiler: libtpu, which reads its settings once, when it is loaded, or JAX's CUDA plugin.

    Args:
      topology: of GPUs, as h100:8, for the plugin.
      dump_to: folder to which it writes the schedules of all that it compiles, which takes longer.

    Raises:
      SystemExit: it is not installed.
    """
    if gpu_of(topology):
        return load_gpu_compiler()
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("compiling for TPUs needs libtpu, which is not installed: pip install 'idattn[compile]'")
    if dump_to:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump_to} --xla_jf_dump_llo_text=true"
    jax.config.update("jax_platforms", "cpu")
    # So that it looks for no TPU: neither in the cloud's metadata nor on this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def count_slices(topology: str) -> int:
    """The slices of a topology: 2 of 2xv5e:4x4, two of v5e:4x4 that the data-centre network joins."""
    match = re.match(r"([1-9]\d*)x", topology)
    return int(match[1]) if match else 1


def tpu_devices(topology: str) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]  # as in `make_mesh`
    """Devices to compile for, which need not be there; the compiler must be loaded."""
    from jax.experimental import topologies

    slices, name = count_slices(topology), re.sub(r"^[1-9]\d*x", "", topology)
    options = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def devices_of(topology: str) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]  # as in `make_mesh`
    """Devices of TPUs or GPUs to compile for; the compiler must be loaded."""
    return gpu_devices(topology) if gpu_of(topology) else tpu_devices(topology)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a compiler or device says that its memory does not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error)


def compile_for(topology: str, function, *arguments):
    """`function` compiled for one chip of a topology, as v5e:2x2 or h100; arguments are ShapeDtypeStructs."""
    device = devices_of(topology)[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    # Mosaic asks these two, not the arguments, which GPU it compiles for.
    with jax.default_device(device), jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()
