from types import SimpleNamespace

import pytest

from idattn.chips import CHIPS, compute_dtype, device_peak_flops
from idattn.config import ComputeConfig


def test_device_peak_flops():
    assert device_peak_flops("TPU v5 lite") == device_peak_flops("TPU v5e") == 197e12
    assert device_peak_flops("TPU v5") == 459e12
    assert device_peak_flops("TPU v3") == 61.5e12
    assert device_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert (device_peak_flops("Tesla T4"), device_peak_flops("NVIDIA A10G"), device_peak_flops("NVIDIA L4")) == (
        65e12, 70e12, 121e12,
    )  # fmt: skip
    assert device_peak_flops("Tesla V100-PCIE-16GB") == 112e12 < device_peak_flops("Tesla V100-SXM2-16GB") == 125e12
    # Datasheets of H100 SXM and H200 state 1,979 TFLOP/s, for sparse matrices.
    assert device_peak_flops("NVIDIA H200") == device_peak_flops("NVIDIA H100 80GB HBM3") == 1979e12 / 2
    assert device_peak_flops("NVIDIA H100 PCIe") == 1513e12 / 2
    assert (device_peak_flops("TPU v4"), device_peak_flops("TPU v5p")) == (275e12, 459e12)
    assert (device_peak_flops("TPU v6 lite"), device_peak_flops("TPU7x")) == (918e12, 2307e12 / 2)
    assert device_peak_flops("NVIDIA H100 PCIe") < device_peak_flops("NVIDIA H100 80GB HBM3")
    for unknown in ("cpu", "NVIDIA L40S", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert device_peak_flops(unknown) is None


@pytest.mark.parametrize(
    ("dtype", "platform", "capabilities"),
    [
        ("float32", "cpu", [None]),
        ("float32", "gpu", ["6.0", "7.0", "7.5"]),  # P100, V100, T4
        ("bfloat16", "gpu", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "gfx90a"]),  # A100, A10G, L4, H100, B200
        ("bfloat16", "tpu", [None]),
    ],
)
def test_compute_dtype(dtype, platform, capabilities):
    for capability in capabilities:
        attributes = {} if capability is None else {"compute_capability": capability}
        assert compute_dtype(SimpleNamespace(platform=platform, **attributes)) == dtype
    ComputeConfig(dtype=dtype)


def test_peaks_by_dtype():
    assert (CHIPS["T4"].peak("bfloat16"), CHIPS["T4"].peak("float32")) == (65e12, 8.1e12)
    assert CHIPS["v5e"].peak("float32") == CHIPS["v5e"].peak("bfloat16") == 197e12


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.cores])
def test_clocks_are_those_of_the_peaks(name):
    chip = CHIPS[name]
    assert chip.cores * chip.mxus * chip.mxu_width**2 * 2 * chip.clock == pytest.approx(chip.flops, rel=3e-3)


def test_no_device_stands_in_two_rows():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len({*kinds})
