"""What is tuned for each mixer of configs/study_cpu.py, its controls and peers: five trials each, in half its steps.

idattn study --config=study_cpu_tuning --workdir=results/study_cpu_tuning --jobs=2

Every mixer tries three learning rates. Those with the paper's state then try, at the middle rate, a smaller C, and
steps Delta of at least 4 / T, which is what the paper's least Delta is at its own T; "damped", which is tried on the
uniform basis of configs/study_recall.py, the paper's basis at two rates; the others two more rates. The seed is none of
the study's. What has the lowest validation loss is a mixer's choice.
"""

import dataclasses
from typing import NamedTuple

from idattn.choices import CELLS
from idattn.config import from_config_dict, to_config_dict
from idattn.config_files import load_module
from idattn.study import Study, grid

study_cpu, study_recall = load_module("study_cpu"), load_module("study_recall")


class Trial(NamedTuple):
    """What is tuned."""

    peak_lr: float
    c_init_scale: float = 1 / 16
    delta_min: float = 1e-3
    is_uniform: bool = False


RATES = {"lr=0.008": Trial(8e-3), "lr=0.016": Trial(1.6e-2), "lr=0.004": Trial(4e-3)}
WITH_MODES = RATES | {"c=2^-8": Trial(8e-3, c_init_scale=1 / 256), "delta=0.008": Trial(8e-3, delta_min=8e-3)}
WITHOUT = RATES | {"lr=0.002": Trial(2e-3), "lr=0.032": Trial(3.2e-2)}
DAMPED = {name: trial._replace(is_uniform=True) for name, trial in RATES.items()} | {
    "paper+lr=0.008": Trial(8e-3), "paper+lr=0.016": Trial(1.6e-2),
}  # fmt: skip
MIXERS = dict.fromkeys(CELLS, WITH_MODES) | dict.fromkeys(("softmax", "softmax_conv", "linear"), WITHOUT)
MIXERS |= {"damped": DAMPED, "gla": WITHOUT, "gated_deltanet": WITHOUT}
TRIALS = {  # the first of every mixer, then the second
    f"{mixer}+{name}": (mixer, trial)
    for trials in zip(*(trials.items() for trials in MIXERS.values()), strict=True)
    for mixer, (name, trial) in zip(MIXERS, trials, strict=True)
}
STUDY = Study(cells=grid(["0.8M"], TRIALS, [42]), prepare=study_cpu.STUDY.prepare, evaluate=("--tasks=perplexity",))


def get_config(argument: str = "0.8M,interdomain+lr=0.008,42"):
    """The config of one cell."""
    cell = STUDY.cell(argument)
    mixer, trial = TRIALS[cell.condition]
    config = tuned(from_config_dict(study_cpu.get_config()), mixer, trial)
    train = dataclasses.replace(config.train, steps=config.train.steps // 2)
    return to_config_dict(dataclasses.replace(config, seed=cell.seed, train=train))


def tuned(config, mixer: str, trial: Trial):
    """The config with a mixer of MIXERS as a trial has it."""
    options = dict(c_init_scale=trial.c_init_scale, delta_min=trial.delta_min)
    if mixer == "damped":
        mixer = "interdomain"
        options |= dict(write="damped", readout="hermitian") | (study_recall.BASIS if trial.is_uniform else {})
    ssm = dataclasses.replace(config.model.ssm, **options)
    model = dataclasses.replace(config.model, ssm=ssm, mixers=(mixer,))
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, peak_lr=trial.peak_lr))
