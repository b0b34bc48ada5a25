"""What is tuned for each mixer of configs/study_cpu.py and its controls: five trials each, in half its steps.

idattn study --config=study_cpu_tuning --workdir=results/study_cpu_tuning --jobs=2

Every mixer tries three learning rates. Those with a state of modes then try, at the middle rate, a smaller C, and steps
Delta of at least 4 / T, which is what the paper's least Delta is at its own T; the others try two more rates. The seed
is none of the study's. What has the lowest validation loss is to be a mixer's row of TUNED in configs/study_cpu.py.
"""

import dataclasses
from typing import NamedTuple

from idattn.choices import CELLS
from idattn.config import from_config_dict, to_config_dict
from idattn.config_files import load_module
from idattn.study import Study, grid

study_cpu = load_module("study_cpu")


class Trial(NamedTuple):
    """What is tuned."""

    peak_lr: float
    c_init_scale: float = 1 / 16
    delta_min: float = 1e-3


RATES = {"lr=0.008": Trial(8e-3), "lr=0.016": Trial(1.6e-2), "lr=0.004": Trial(4e-3)}
WITH_MODES = RATES | {"c=2^-8": Trial(8e-3, c_init_scale=1 / 256), "delta=0.008": Trial(8e-3, delta_min=8e-3)}
WITHOUT = RATES | {"lr=0.002": Trial(2e-3), "lr=0.032": Trial(3.2e-2)}
MIXERS = (*CELLS, "softmax_conv", "linear")
OF_MIXERS = [(WITHOUT if mixer in ("softmax", "softmax_conv", "linear") else WITH_MODES).items() for mixer in MIXERS]
TRIALS = {  # the first of every mixer, then the second
    f"{mixer}+{name}": (mixer, trial)
    for trials in zip(*OF_MIXERS, strict=True)
    for mixer, (name, trial) in zip(MIXERS, trials, strict=True)
}
STUDY = Study(cells=grid(["0.8M"], TRIALS, [42]), prepare=study_cpu.STUDY.prepare, evaluate=("--tasks=perplexity",))


def get_config(argument: str = "0.8M,interdomain+lr=0.008,42"):
    """The config of one cell."""
    cell = STUDY.cell(argument)
    mixer, trial = TRIALS[cell.condition]
    config = from_config_dict(study_cpu.get_config())
    ssm = dataclasses.replace(config.model.ssm, c_init_scale=trial.c_init_scale, delta_min=trial.delta_min)
    return to_config_dict(
        dataclasses.replace(
            config,
            seed=cell.seed,
            model=dataclasses.replace(config.model, ssm=ssm, mixers=(mixer,)),
            optim=dataclasses.replace(config.optim, peak_lr=trial.peak_lr),
            train=dataclasses.replace(config.train, steps=200),
        )
    )
