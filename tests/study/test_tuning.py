"""configs/study_cpu_tuning.py: as many trials for every mixer, each a change of what it says in half the steps."""

import dataclasses
import json
from collections import Counter

from support.runs import ROOT

from configs import study_cpu, study_cpu_tuning
from idattn.choices import CELLS
from idattn.cli.evaluate import RECORDED
from idattn.config import from_config_dict


def test_trials():
    base = from_config_dict(study_cpu.get_config())
    mixers = Counter()
    for cell in study_cpu_tuning.STUDY.cells:
        config = from_config_dict(study_cpu_tuning.get_config(str(cell)))
        mixer, trial = study_cpu_tuning.TRIALS[cell.condition]
        mixers[mixer] += 1
        assert config.train.steps == base.train.steps // 2
        assert config.seed not in {cell.seed for cell in study_cpu.STUDY.cells}
        assert config.optim.peak_lr == trial.peak_lr
        (name,), ssm = config.model.mixers, config.model.ssm
        if mixer == "damped":
            assert (name, ssm.write) == ("interdomain", "damped")
            assert trial.is_uniform == (ssm.a_init == "uniform" and ssm.c_init == "eye")
            continue
        assert (name, *trial[1:3]) == (mixer, ssm.c_init_scale, ssm.delta_min)
        assert dataclasses.replace(ssm, c_init_scale=1 / 16, delta_min=1e-3) == base.model.ssm
    assert mixers == dict.fromkeys([*CELLS, "softmax_conv", "linear", "damped", "gla", "gated_deltanet"], 5)


def test_what_is_stored_can_be_gone_on_with():
    """Another setting of evaluations would part the records to come from those that are there."""
    files = list((ROOT / "results/study_cpu_tuning/cells").glob("*.json"))
    assert files
    for file in files:
        for evaluation in json.loads(file.read_text())["evaluations"].values():
            assert evaluation["settings"].keys() == {*RECORDED, "window"}, file
