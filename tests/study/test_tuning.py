"""configs/study_cpu_tuning.py: as many trials for every mixer, each a change of what it says in half the steps."""

import dataclasses
from collections import Counter

from configs import study_cpu, study_cpu_tuning
from idattn.choices import CELLS
from idattn.config import from_config_dict


def test_trials():
    base = from_config_dict(study_cpu.get_config())
    mixers = Counter()
    for cell in study_cpu_tuning.STUDY.cells:
        config = from_config_dict(study_cpu_tuning.get_config(str(cell)))
        mixer, trial = study_cpu_tuning.TRIALS[cell.condition]
        mixers[mixer] += 1
        assert config.model.mixers == (mixer,)
        assert config.train.steps == base.train.steps // 2
        assert config.seed not in {cell.seed for cell in study_cpu.STUDY.cells}
        ssm = config.model.ssm
        assert trial == (config.optim.peak_lr, ssm.c_init_scale, ssm.delta_min)
        assert dataclasses.replace(ssm, c_init_scale=1 / 16, delta_min=1e-3) == base.model.ssm
    assert mixers == dict.fromkeys([*CELLS, "softmax_conv", "linear"], 5)
