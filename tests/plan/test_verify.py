"""The program that checks an accelerator: what is right is timed, what is wrong is named and is not."""

import dataclasses
import json
from functools import partial

import jax.numpy as jnp
import pytest
from support.helpers import defined_flags, run_main

from idattn.cli import verify
from idattn.ops import BACKENDS, Backend, chunkwise
from idattn.plan.op_shapes import OpShape
from idattn.plan.schedules import predict


@pytest.fixture(scope="module", autouse=True)
def verify_flags():
    with defined_flags(verify):
        yield


@pytest.fixture
def quick_cases(monkeypatch):
    """One token in the place of 1,024."""
    table = verify.cases("cpu")
    table = {name: table[name] for name in ("one-token", "heads-float32")} | {"real-size": table["one-token"]}
    monkeypatch.setattr(verify, "cases", lambda platform: table)
    return table


def test_what_is_right_holds_and_is_timed(tmp_path, quick_cases, capsys):
    run_main(verify, "--repeats=3", f"--out={tmp_path / 'new'}")
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert [(row["case"], row["backend"]) for row in report["checks"]] == [(name, "chunkwise") for name in quick_cases]
    op, heads, _ = report["checks"]
    assert op["arrays"].keys() == {"o", "state"} | {
        f"d_{name}" for name in (*"qkv", "log_delta", "a_log", "a_imag", "c_re", "c_im", "initial_state")
    }
    assert len(heads["arrays"]) == 7
    for row in (x for check in report["checks"] for x in check["arrays"].values()):
        assert row["held"] and 0 <= row["error"] <= row["tolerance"] < 1e-4
    assert [row["passes"] for row in report["times"]] == ["forward", "and gradients"]
    for row in report["times"]:
        assert 0 < row["lower"] <= row["median"] <= row["upper"] and "cpu" in row["no_prediction"]
    assert {"jax", "jaxlib", "device", "runtime", "date", "platform"} <= report.keys()
    printed = capsys.readouterr().out
    assert printed.endswith(f"\nAll 3 checks held; the report is {tmp_path / 'new' / 'report.md'}\n")
    assert (tmp_path / "new" / "report.md").read_text() == f"```text\n{printed}```\n"


def test_what_is_wrong_is_named_and_not_timed(tmp_path, quick_cases, monkeypatch, capsys):
    def wrong(*arguments):
        d_q, *others = chunkwise.backward(*arguments)
        return d_q * 1.001, *others

    backend = dataclasses.replace(chunkwise.BACKEND, rule=(chunkwise.forward, wrong))
    monkeypatch.setitem(BACKENDS, "chunkwise", backend)
    arguments = ["--case=one-token", "--case=heads-float32", "--case=real-size", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match="^FAILED: one-token with chunkwise, real-size with chunkwise; ") as raised:
        run_main(verify, *arguments)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["held"] for row in report["checks"]] == [False, True, False] and report["times"] == []
    assert [name for name, row in report["checks"][0]["arrays"].items() if not row["held"]] == ["d_q"]
    printed = capsys.readouterr().out
    assert "one-token           chunkwise   FAILED  d_q errs by 1.0e-03, tolerance 1.1e-05\n" in printed
    assert " ms" not in printed
    assert raised.value.code in (tmp_path / "report.md").read_text()


def test_backends_of_others(quick_cases):
    """Records may be passed; one that does not run, or whose results are not numbers, leaves the others as they are."""

    def refuses(*arguments, **options):
        raise NotImplementedError("no such chip\nat all")

    def not_finite(*arguments):
        o, start = chunkwise.forward(*arguments)
        return o.at[0, 0, 0, 0].set(jnp.nan), start

    backends = [
        Backend(name="refuses", interdomain=refuses),
        dataclasses.replace(chunkwise.BACKEND, name="nan", rule=(not_finite, chunkwise.backward)),
    ]
    lines = []
    refused, nan = verify.check_all(backends, {"one-token": quick_cases["one-token"]}, lines.append)
    assert not refused["held"] and "no such chip\nat all" in refused["traceback"]
    assert not nan["held"] and nan["arrays"]["o"]["error"] is None and nan["arrays"]["d_k"]["held"]
    assert lines == [
        "one-token           refuses     FAILED  NotImplementedError: no such chip",
        "one-token           nan         FAILED  o is not finite, tolerance 2.8e-06",
    ]


def test_cases_of_platforms():
    assert verify.offered("cpu") == verify.offered("gpu") == ["chunkwise"]
    assert verify.offered("tpu") == ["pallas_tpu", "chunkwise"]
    assert verify.cases("tpu").keys() > verify.cases("cpu").keys()


def test_compared_heads_of_many():
    case = verify.op_case(OpShape(8, 8, 16, 16, 4), 1, 3, "bfloat16", documents=False, heads=slice(None, None, 3))
    expected = case.judge(verify.compared(case, case.x), verify.compared(case, case.d))
    assert expected["o"].shape == (1, 3, 3, 16) and expected["d_log_delta"].shape == (3,)
    actual = {"o": jnp.zeros((1, 3, 8, 16)).at[:, :, ::3].set(expected["o"]).at[0, 0, 1].set(jnp.inf)}
    row = verify.judge(case, actual, expected)["o"]
    assert not row["held"] and row["error"] is None


@pytest.mark.parametrize(
    ("kind", "answer", "row"),
    [
        ("TPU v5p", (2e-3, 1e-3), {"predicted": 2, "predicted_kernels": 1}),
        ("TPU v6 lite", ValueError("no schedule"), {"no_prediction": "ValueError: no schedule"}),
        ("TPU v4", None, {"no_prediction": "idattn plans nothing for TPU v4"}),
    ],
)
def test_predictions(monkeypatch, kind, answer, row):
    def predict(function, arguments, topology):
        assert topology in ("v5p:2x2x1", "v6e:2x2")
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(verify, "predict", predict)
    assert verify.predicted(print, (), kind) == row


def test_prediction_of_kernels(libtpu):
    """The three kernels of both passes are found in the program by their names."""
    case = verify.op_case(OpShape(2, 2, 64, 64, 64), 1, 128, "bfloat16", documents=True)
    forward = partial(verify.attend, backend="pallas_tpu", return_state=False)
    both = partial(verify.with_cotangents, function=forward)
    seconds, kernels = predict(both, (case.x, case.fixed, {"o": case.d["o"]}), "v5e:2x2")
    assert 1e-6 < kernels < seconds < 1e-3
