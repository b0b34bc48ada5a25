"""Published figures of the accelerators that runs are planned for and measured on: one row a chip."""

import re
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Figures of one jax device: a whole chip, but for TPU v3 and TPU7x, where it is one of the chip's two TensorCores.

    Those that only a planner needs are 0 for chips that nothing is planned for.
    """

    kinds: tuple[str, ...]  # jax.Device.device_kind
    flops: float  # a second, dense, bfloat16; float16 for T4 and V100, which have no bfloat16
    hbm_gib: float = 0
    hbm_bytes: float = 0  # a second
    link_bytes: float = 0  # a second, one way, all links together
    dcn_bytes: float = (
        0  # a second, one way, to other slices over the data-centre network: a chip's share of its host's
    )
    clock: float = 0  # cycles a second; of GPUs, whose programs carry none, nanoseconds
    float32_flops: float = 0  # a second, of GPUs, in full precision, for which tensor cores have no products
    cores: int = 0  # TensorCores that work on one program
    mxus: int = 0  # arrays of a core
    mxu_width: int = 0

    def peak(self, dtype: str) -> float:
        """FLOP/s of products of a dtype."""
        return self.float32_flops if dtype == "float32" and self.float32_flops else self.flops


# Sources: for TPUs docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}, which state the bandwidth of the links in
# both directions together, and that of the data-centre network in bits: 50 Gbit/s of a v5p, 6.4 and 25.6 Tbit/s of
# 256 v5e and v6e; for GPUs NVIDIA's datasheets of each, "NVIDIA T4 Tensor Core GPU Datasheet" and so on. Where a row
# has a comment, the datasheet states that many TFLOP/s: for sparse matrices, which is twice as much. The links of a GPU
# are NVLink, which the datasheets too state in both directions together, of L4 and T4 PCIe. Its memory is what the
# driver leaves to programs of that of the first name: of H100 and A100 as the specs of XLA's gpu/target_config have it,
# of L4 and T4 as CUDA reports it. Its `float32_flops` are the datasheet's FP32, without TF32.
# JAX's pallas/mosaic/tpu_info.py lists the names of TPUs; those of GPUs are what the driver calls them. Clocks are what
# the peaks need: cores x mxus x width^2 x 2 x clock = flops. A v6e has two arrays, each of which takes two rows a cycle
# by the compiler's own count of cycles: they stand here as four.
CHIPS = {
    "v3": Chip(("TPU v3",), 123e12 / 2),
    "v4": Chip(("TPU v4",), 275e12),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16, 819e9, 200e9, 3.125e9, 1.5e9, cores=1, mxus=4, mxu_width=128),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95, 2765e9, 600e9, 6.25e9, 1.75e9, cores=2, mxus=4, mxu_width=128),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32, 1638e9, 400e9, 12.5e9, 1.75e9, cores=1, mxus=4, mxu_width=256),
    "tpu7x": Chip(("TPU7x",), 2307e12 / 2),
    "A100": Chip(
        (
            "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe",
        ),
        312e12, 39.4, 1555e9, 300e9, clock=1e9, float32_flops=19.5e12,
    ),
    "H100": Chip(
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"),
        989.5e12, 79.1, 3350e9, 450e9, clock=1e9, float32_flops=67e12,  # 1,979
    ),
    "H100 PCIe": Chip(("NVIDIA H100 PCIe",), 756.5e12),  # 1,513
    "A10G": Chip(("NVIDIA A10G",), 70e12),  # 140; the A10, another card, has 125 dense
    "L4": Chip(("NVIDIA L4",), 121e12, 22.1, 300e9, 32e9, clock=1e9, float32_flops=30.3e12),  # 242
    "T4": Chip(("Tesla T4",), 65e12, 14.7, 320e9, 16e9, clock=1e9, float32_flops=8.1e12),
    "V100": Chip(("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"), 125e12),
    "V100 PCIe": Chip(("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"), 112e12),
    "RTX 6000 Ada": Chip(("NVIDIA RTX 6000 Ada Generation",), 364.25e12),  # 1,457 in FP8, twice again
}  # fmt: skip


def chip_of(topology: str) -> Chip:
    """The chip of a topology, as v5e:2x2, or 2xv5e:2x2 for two slices of TPUs, or h100:8.

    Raises:
      ValueError: nothing is planned for such chips.
    """
    planned = {name.lower(): chip for name, chip in CHIPS.items() if chip.clock}
    name = re.sub(r"^[1-9]\d*x", "", topology).split(":")[0]
    if name not in planned:
        raise ValueError(f"{topology=} must start with one of {', '.join(planned)}.")
    return planned[name]


def compute_dtype(device: Any) -> str:
    """The dtype to compute in on a device, for `idattn.config.ComputeConfig.dtype`: bfloat16 where it has units for it.

    GPUs before Ampere, such as T4, have units for float16 only, which this layer cannot use. The products of two steps
    (1e-3 each at the start) that weigh keys and values, powers of decays, and gradients lie below 6e-5, where float16
    loses digits, and sums may exceed 65,504, its largest number. So these GPUs compute in float32, as CPUs do.

    Args:
      device: a `jax.Device`.
    """
    capability = str(getattr(device, "compute_capability", ""))  # as 7.5, of ROCm as gfx90a
    return "float32" if device.platform == "cpu" or re.match(r"[1-7]\.", capability) else "bfloat16"


def device_peak_flops(device_kind: str) -> float | None:
    """The published dense FLOP/s of one jax device in bfloat16, of T4 and V100 in float16.

    Args:
      device_kind: `jax.Device.device_kind`.

    Returns:
      FLOP/s, or None for a device that is not in the table, such as a CPU or a slice of a GPU.
    """
    return next((chip.flops for chip in CHIPS.values() if device_kind in chip.kinds), None)
