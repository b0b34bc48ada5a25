"""GPUs to compile for on a machine without one, by JAX's CUDA plugin: what the compiler must know of each."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax

from idattn.chips import CHIPS


class GPU(NamedTuple):
    """What XLA asks of a GPU, from NVIDIA's tuning guides and white papers of the architecture."""

    capability: tuple[int, int]  # compute capability
    multiprocessors: int
    clock_ghz: float  # boost
    shared_bytes: int  # of a multiprocessor
    l2_bytes: int
    threads: int = 2048  # a multiprocessor holds
    lanes: int = 128  # float32 units of a multiprocessor


GPUS = {  # by name in `idattn.chips.CHIPS`
    "H100": GPU((9, 0), 132, 1.98, 228 * 1024, 50 * 2**20),
    "A100": GPU((8, 0), 108, 1.41, 164 * 1024, 40 * 2**20, lanes=64),
    "L4": GPU((8, 9), 58, 2.04, 100 * 1024, 48 * 2**20, threads=1536),
    "T4": GPU((7, 5), 40, 1.59, 64 * 1024, 4 * 2**20, threads=1024, lanes=64),
}


def find_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def load_gpu_compiler() -> None:
    """Prepare JAX's CUDA plugin, which then looks for no GPU; before JAX's first computation.

    Raises:
      SystemExit: it is not installed.
    """
    if not find_plugin():
        raise SystemExit(
            "compiling for GPUs needs JAX's CUDA plugin, which is not installed: pip install 'idattn[compile-gpu]'"
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")


def pool_fraction() -> float:
    """The share of a GPU's memory that JAX takes, of which a program gets all that it needs."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jaxlib reads both
    return float(next(filter(None, map(os.environ.get, names)), 0.75))


def gpu_of(topology: str) -> str | None:
    """The name of a topology's GPU in `GPUS`: H100 of h100:8; None for one of TPUs."""
    name = re.sub(r"^[1-9]\d*x", "", topology).split(":")[0].upper()
    return name if name in GPUS else None


def gpu_devices(topology: str) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]  # as in `make_mesh`
    """Devices of one host to compile for, which need not be there: 8 of h100:8, one of h100.

    Raises:
      ValueError: the topology is of no such form.
    """
    from jax.experimental import topologies

    match = re.fullmatch(r"[A-Za-z]\w*(?::([1-9]\d*))?", topology)
    name = gpu_of(topology)
    if not match or name is None:
        raise ValueError(f"{topology=} must be as h100:8, with one of {', '.join(GPUS).lower()}.")
    shape = f"1x1x{match[1] or 1}"
    return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=_target(name)).devices


def _target(name: str) -> str:
    """The text of XLA's GpuTargetConfigProto."""
    gpu, chip = GPUS[name], CHIPS[name]
    major, minor = gpu.capability
    # A block can have all of a multiprocessor's shared memory but 1 KiB; up to 7.5 all of it.
    block = gpu.shared_bytes - (1024 if gpu.capability >= (8, 0) else 0)
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {block} shared_memory_per_core: {gpu.shared_bytes}
      core_count: {gpu.multiprocessors} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock_ghz}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {chip.hbm_bytes:.0f} l2_cache_size: {gpu.l2_bytes}
      device_memory_size: {chip.hbm_gib * 2**30:.0f}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
    device_description_str: "{chip.kinds[0]}" """
