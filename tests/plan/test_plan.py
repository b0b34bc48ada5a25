"""The program that plans a run, with a compiler that finds room for one of the plans."""

import json

import pytest
from support.helpers import defined_flags, run_main

from idattn.cli import plan
from idattn.plan import search
from idattn.plan.cycles import PARTS


@pytest.fixture
def tried(monkeypatch):
    """What the stand-in of the compiler was asked for: it finds room for dots and, slower, mixer in two parts."""
    asked = []

    def compile_step(config, topology):
        asked.append((config.model.mixers[0], config.compute.remat, config.train.accumulation))
        mesh = {"data": 1, "fsdp": config.mesh.fsdp, "sequence": config.mesh.sequence, "tensor": 1}
        figures = {"topology": topology, "chips": 16, "mesh": mesh, "hbm_gib": 16}
        if asked[-1][1:] not in [("dots", 2), ("mixer", 2)]:
            return figures | {"fits": False, "needed_gib": 20.0, "usable_gib": 15.75}
        cycles = (1e9 if config.model.mixers[0] == "softmax" else 2e9) + 1e8 * (config.compute.remat == "mixer")
        predicted = {"seconds": cycles / 1.5e9, "mfu": 0.3, "cycles": cycles, "uncounted": 3, "uncounted_bytes": 1e9}
        predicted["parts"] = dict.fromkeys(PARTS, 0.0) | {"products": cycles}
        figures |= {
            "fits": True,
            "peak_gib": 12.0,
            "sent_bytes": {},
            "dcn_bytes": {},
            "flops": 1e12,
            "recomputed_flops": 0.0,
        }
        return figures | {"seconds": {"products": 0.5}, "bound": "products", "mfu_at_most": 0.9, "predicted": predicted}

    for module in (search, plan):
        monkeypatch.setattr(module, "compile_step", compile_step)
    monkeypatch.setattr(plan, "load_compiler", lambda topology: None)
    monkeypatch.setattr(plan, "devices_of", lambda topology: range(16))
    return asked


def run(monkeypatch, *arguments):
    arguments = ["--config=paper:125M,interdomain", "--topology=v5e:4x4", *arguments]
    monkeypatch.setattr("sys.argv", ["plan", *arguments])  # where config flags look for the settings that they override
    with defined_flags(plan):
        run_main(plan, *arguments)


def test_without_a_mesh_the_fastest_plan_that_fits_is_taken(tried, monkeypatch, capsys):
    run(monkeypatch, "--config.train.batch_size=32")
    assert [case[1:] for case in tried] == [
        ("none", 1),
        ("none", 2),
        ("dots", 1),
        ("dots", 2),
        ("mixer", 1),
        ("mixer", 2),
    ]
    flags = "--config.mesh.fsdp=16 --config.compute.remat=dots --config.train.accumulation=2"
    shown = capsys.readouterr()
    assert f"flags: {flags}\n" in shown.out
    # Every compilation, which may take a minute, is announced.
    assert len(shown.err.splitlines()) == 6 and f"compiling for v5e:4x4: {flags}\n" in shown.err


def test_slices_split_the_rows_first(tried, monkeypatch, capsys):
    run(monkeypatch, "--config.train.batch_size=32", "--topology=2xv5e:2x4")
    flags = "--config.mesh.data=2 --config.mesh.fsdp=8 --config.mesh.slices=2"
    assert f"flags: {flags} --config.compute.remat=dots" in capsys.readouterr().out


def test_rows_are_split_before_tokens_and_parts_divide_them(tried, monkeypatch, capsys):
    """24 rows over 16 chips: eight ways by rows, two by tokens, and three rows a chip in one part or in three."""
    run(monkeypatch, "--config.train.batch_size=24")
    assert tried == [("interdomain", remat, parts) for remat in ("none", "dots", "mixer", "block") for parts in (1, 3)]
    assert "16 chips (fsdp 8, sequence 2), each:\nDOES NOT FIT" in capsys.readouterr().out


def test_a_mesh_is_taken_as_it_is(tried, monkeypatch, capsys):
    run(monkeypatch, "--config.mesh.fsdp=16", "--config.compute.remat=mixer")
    assert tried == [("interdomain", "mixer", 1)]
    shown = capsys.readouterr()
    assert "flags:" not in shown.out and shown.err.startswith("compiling for v5e:4x4: --config.mesh.fsdp=16 ")


def test_two_models_are_compared_by_part(tried, monkeypatch, capsys, tmp_path):
    options = ["--config.mesh.fsdp=16", "--config.compute.remat=dots", "--config.train.accumulation=2"]
    run(monkeypatch, *options, "--compare=paper:125M,softmax", f"--json={tmp_path / 'new' / 'plans.json'}")
    assert tried == [("interdomain", "dots", 2), ("softmax", "dots", 2)]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["step", "2,000.0", "1,000.0", "0.50"]
    figures = json.loads((tmp_path / "new" / "plans.json").read_text())
    assert [figures[name]["predicted"]["cycles"] for name in ("config", "compare")] == [2e9, 1e9]
