"""The table of plans, with a compiler that finds room for one of them."""

import dataclasses

import pytest
from support.helpers import defined_flags, run_main

from idattn.cli import scaling
from idattn.config import MeshConfig
from idattn.plan import search


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models=125M"], "--models='125M' .*1.3B, 7B"),
        (["--slices=v5e:2x2,v5e:4x8"], "--slices='v5e:4x8' "),
        (["--contexts=8192"], "--contexts='8192' "),
        (["--slices=v5e:2x2", "--contexts=32768"], "no model is planned on --slices=v5e:2x2 .* v5e:16x16, v5p:4x4x4"),
    ],
)
def test_what_no_plan_is_of_is_refused(flags, message, tmp_path):
    with defined_flags(scaling), pytest.raises(ValueError, match=message):
        run_main(scaling, *flags, f"--out={tmp_path / 'plans'}")


def test_scaling_takes_the_fastest_plan_that_fits(monkeypatch, tmp_path, capsys):
    """Tables and plots of plans on a compiler that finds room for dots in four parts; what is known is not redone."""
    tried = []

    def compile_step(config, name):
        tried.append((name, config.data.seq_len, config.compute.remat, config.train.accumulation, config.mesh))
        figures = {"mesh": dataclasses.asdict(config.mesh), "chips": scaling.SLICES[name], "hbm_gib": 16}
        if name == "v5e:2x2" or (config.compute.remat, config.train.accumulation) != ("dots", 4):
            return figures | {"fits": False, "needed_gib": 56.0, "usable_gib": 15.75}
        return (
            figures
            | {"fits": True, "peak_gib": 12.3, "sent_bytes": {"all-gather": 4.2e9}, "mfu_at_most": 0.98}
            | {"seconds": {"products": 1.5}, "predicted": {"seconds": 4.5, "mfu": 0.3266}}
        )

    monkeypatch.setattr(search, "compile_step", compile_step)
    monkeypatch.setattr(scaling, "load_compiler", lambda: None)
    with defined_flags(scaling):
        arguments = ["--models=1.3B", "--slices=v5e:2x2,v5e:4x4", "--contexts=4096", f"--out={tmp_path / 'plans'}"]
        run_main(scaling, *arguments)
        seen = len(tried)
        run_main(scaling, *arguments)
        (tmp_path / "plans.json").write_text("")
        with pytest.raises(ValueError, match=r"plans\.json is damaged \(empty.*Delete it to plan anew"):
            run_main(scaling, *arguments)
    assert len(tried) == seen
    mesh = MeshConfig(data=1, fsdp=16)
    plans = [(remat, parts, mesh) for remat in ("none", "dots", "mixer") for parts in (1, 4)]
    assert [t[2:] for t in tried if t[0] == "v5e:4x4"] == plans
    assert [t[2:4] for t in tried if t[0] == "v5e:2x2"][-2:] == [("block", 4), ("block", 16)]
    table = (tmp_path / "plans.md").read_text()
    assert "| 1.3B | v5e:2x2 | 4,096 | fsdp 4 | block | 16 | **56 of 16: does not fit** |" in table
    assert "| 1.3B | v5e:4x4 | 4,096 | fsdp 16 | dots | 4 | 12.3 of 16 | 4.2 | 4,500 | 33% | 1,500 | 98% |" in table
    assert (tmp_path / "plans.png").stat().st_size > 10_000
