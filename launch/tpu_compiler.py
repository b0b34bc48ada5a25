"""Compile for TPUs on a machine without one, by libtpu."""

import glob
import importlib.util
import os
import tempfile

import jax

DUMP = tempfile.mkdtemp(prefix="tpu_schedule_")


def load_compiler(*, dump: bool) -> None:
    """Prepare libtpu, which reads its settings once, when it is loaded.

    Args:
      dump: whether it writes the schedules of what it compiles, which takes longer.

    Raises:
      SystemExit: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("compiling for TPUs needs libtpu, which is not installed: pip install 'idattn[compile]'")
    if dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"
    jax.config.update("jax_platforms", "cpu")
    # So that it looks for no TPU: neither in the cloud's metadata nor on this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def compile_for(topology: str, function, *arguments):
    """`function` compiled for one chip of a topology; arguments are ShapeDtypeStructs."""
    from jax.experimental import topologies

    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    sharding = jax.sharding.SingleDeviceSharding(description.devices[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    for file in glob.glob(f"{DUMP}/*"):
        os.remove(file)
    return jax.jit(function).lower(*arguments).compile()
