"""The script for a real card, on a CPU: its whole flow at a tiny size, what it refuses, and what it does not time."""

import dataclasses
import json
import re

import pytest
from support.gpu import InterpretGPUParams
from support.helpers import defined_flags, run_main

from idattn.ops import BACKENDS, chunkwise, pallas_gpu
from launch import gpu_check


@pytest.fixture(scope="module", autouse=True)
def gpu_check_flags():
    with defined_flags(gpu_check):
        yield


def run(folder, *arguments):
    try:
        run_main(gpu_check, f"--out={folder}", *arguments)
    finally:
        report = json.loads((folder / "gpu_check.json").read_text())
    return report


def test_a_machine_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="^launch.gpu_check needs a GPU, JAX finds cpu; --tiny [^\n]*$"):
        run_main(gpu_check, f"--out={tmp_path}")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_flow(tmp_path, capsys):
    report = run(tmp_path / "new", "--tiny")
    assert len(report["checks"]) == 2 and all(row["held"] for row in report["checks"])
    assert [row["what"] for row in report["op"]] == ["JAX's attention", "chunkwise"]
    (step,), (token,) = report["training"], report["decoding"]
    assert step["tokens_per_second"] == pytest.approx(4 * 8 / step["median"] * 1e3)
    assert token["median"] > 0 and token["copy_gb_per_second"] > 0
    assert report["left_out"] == report["failed"] == []
    assert report["auto"].startswith("auto ") and {"driver", "device", "jax", "date"} <= report.keys()
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / "gpu_check.md").read_text() == f"```text\n{printed}```\n"


def test_kernels_are_checked_in_what_they_take_and_timed(tmp_path, monkeypatch):
    """Interpreted; what else is timed is left out."""
    kernels = pallas_gpu.interpreted(InterpretGPUParams())
    kernels = dataclasses.replace(kernels, requirement=BACKENDS["pallas_gpu"].requirement)
    monkeypatch.setattr(gpu_check, "candidates", lambda tiny: [kernels])
    for name in ("time_training", "time_decoding"):
        monkeypatch.setattr(gpu_check, name, lambda *arguments: [])
    report = run(tmp_path, "--tiny")
    wide, narrow = report["checks"]
    assert wide["case"] == "documents-float32" and "bfloat16" in wide["needs"]
    assert narrow["case"] == "documents-bfloat16" and narrow["held"]
    attention, op = report["op"]
    assert (attention["what"], op["what"]) == ("JAX's attention", "pallas_gpu")
    assert report["auto"] == "auto keeps chunkwise: the two were not timed next to one another"
    assert 0 < op["lower"] <= op["median"] <= op["upper"] and op["ratio"] == attention["median"] / op["median"]


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    def wrong(*arguments):
        d_q, *others = chunkwise.backward(*arguments)
        return d_q * 1.01, *others

    record = dataclasses.replace(chunkwise.BACKEND, rule=(chunkwise.forward, wrong))
    monkeypatch.setattr(gpu_check, "candidates", lambda tiny: [record])
    with pytest.raises(SystemExit, match="^FAILED: documents-float32 with chunkwise; what did not hold is not timed$"):
        run(tmp_path, "--tiny")
    assert " ms" not in capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["op"] == report["training"] == report["decoding"] == []


def test_what_the_time_does_not_suffice_for_is_named(tmp_path, monkeypatch):
    """Nor is anything timed where a case was left out."""
    monkeypatch.setattr(gpu_check, "cases", lambda tiny: {"long": None})
    slow = gpu_check.Item("checks", "case long", 99, lambda: pytest.fail("there is no time for it"))
    monkeypatch.setattr(gpu_check, "Item", lambda *arguments: slow)
    with pytest.raises(SystemExit, match="^FAILED: not all cases were tried;"):
        run(tmp_path, "--tiny", "--seconds=50")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["name"] for row in report["left_out"]] == ["case long"] and report["op"] == []


def test_other_items_go_on_after_one_that_fails_or_lacks_a_package(tmp_path, monkeypatch):
    def lacks(*arguments):
        raise ModuleNotFoundError("No module named 'grain'")

    def fails(*arguments):
        raise ValueError("the loss of the first step is 9.000\nand more")

    monkeypatch.setattr(gpu_check, "candidates", lambda tiny: [BACKENDS["chunkwise"]])
    monkeypatch.setattr(gpu_check, "time_op", lacks)
    monkeypatch.setattr(gpu_check, "time_training", fails)
    monkeypatch.setattr(gpu_check, "time_decoding", lambda *arguments: [dict(what="tokens", median=1.0)])
    with pytest.raises(SystemExit, match="^FAILED: training step of 125M;"):
        run(tmp_path, "--tiny")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["left_out"] == [dict(name="op at T = 16", why="No module named 'grain'; install it")]
    assert report["failed"][0]["why"] == "ValueError: the loss of the first step is 9.000"
    assert len(report["decoding"]) == 1


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ({1024: (3, 1), 4096: (3, 2)}, "could take pallas_gpu"),
        ({1024: (3, 1), 4096: (2, 2)}, r"not faster at T = \[4096\]"),
        ({}, "not timed next to one another"),
    ],
)
def test_what_auto_would_need(times, verdict):
    rows = [
        dict(T=T, what=name, median=ms)
        for T, pair in times.items()
        for name, ms in zip(("chunkwise", "pallas_gpu"), pair, strict=True)
    ]
    assert re.search(verdict, gpu_check.verdict_on_auto(dict(op=rows), [BACKENDS["chunkwise"], BACKENDS["pallas_gpu"]]))
    assert "keeps chunkwise" in gpu_check.verdict_on_auto(dict(op=rows), [BACKENDS["chunkwise"]])
