"""The benchmark of the op: rows for all that is right, none for what is wrong."""

import dataclasses
import json

import jax
import pytest
from support.helpers import defined_flags, run_main

from idattn.cli import bench_ops
from idattn.ops import BACKENDS, chunkwise


@pytest.fixture(scope="module", autouse=True)
def bench_flags():
    with defined_flags(bench_ops):
        yield


def run_bench(tmp_path, *arguments):
    file = tmp_path / "new" / "table.json"
    run_main(bench_ops, "--seq_len=32", "--repeats=1", f"--json={file}", *arguments)
    return json.loads(file.read_text())


def test_the_benchmark_times_every_backend(tmp_path, capsys):
    rows = run_bench(tmp_path, "--backend=chunkwise", "--backend=associative", "--chunk_size=16")
    names = [row["backend"] for row in rows]
    assert names == ["softmax, written out", "softmax, fused", "chunkwise, K = 16", "associative, K = 16"]
    assert all(row["forward"] > 0 and row["both"] > 0 and row["temp_bytes"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\ncpu 32") == 4


def test_what_is_out_of_memory_is_left_out(tmp_path, capsys, monkeypatch):
    """And the rows so far are stored, should something else end the benchmark."""

    def exhausted(q, k, v, platform):
        raise jax.errors.JaxRuntimeError(f"{message}: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(bench_ops, "fused", exhausted)
    message = "RESOURCE_EXHAUSTED"
    rows = run_bench(tmp_path, "--chunk_size=16")
    assert [row["backend"] for row in rows] == ["softmax, written out", "chunkwise, K = 16"]
    assert f"cpu 32        {'softmax, fused':<24}out of memory\n" in capsys.readouterr().out
    (tmp_path / "new" / "table.json").unlink()
    message = "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run_bench(tmp_path, "--chunk_size=16")
    assert len(json.loads((tmp_path / "new" / "table.json").read_text())) == 1


def test_the_benchmark_prints_nothing_for_what_is_wrong(tmp_path, capsys, monkeypatch):
    def wrong(*arguments):
        o, start = chunkwise.forward(*arguments)
        return o * 1.001, start

    backend = dataclasses.replace(chunkwise.BACKEND, rule=(wrong, chunkwise.backward))
    monkeypatch.setitem(BACKENDS, "chunkwise", backend)
    with pytest.raises(SystemExit, match="chunkwise, K = 16: relative error .* exceeds"):
        run_bench(tmp_path, "--chunk_size=16")
    assert "chunkwise" not in capsys.readouterr().out
