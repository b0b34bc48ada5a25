"""What the paper leaves open, one choice at a time, in half the steps of configs/study_cpu.py.

idattn study --config=study_choices --workdir=results/study_choices --jobs=2

The choices are the scale of C at the start, for interdomain and s4d alike (the same tuning budget), the readout, the
form of C, RoPE before or after the feature map, the range of Delta and the start of the norms' biases. A mixer's name
alone stands for the defaults.
"""

import dataclasses

from idattn.config import from_config_dict, to_config_dict
from idattn.config_files import load_module
from idattn.study import Study, grid

study_cpu = load_module("study_cpu")

CHOICES = {
    "interdomain": {},
    "interdomain+c_init_scale=1": dict(c_init_scale=1.0),
    "interdomain+c_init_scale=2^-8": dict(c_init_scale=1 / 256),
    "interdomain+readout=hermitian": dict(readout="hermitian"),
    "interdomain+readout=hermitian+c_init=eye": dict(readout="hermitian", c_init="eye"),
    "interdomain+readout=real": dict(readout="real"),
    "interdomain+c=diagonal": dict(c="diagonal"),
    "interdomain+c=identity": dict(c="identity"),
    "interdomain+rope_position=after": dict(rope_position="after"),
    "interdomain+delta_min=1e-4": dict(delta_min=1e-4),
    "interdomain+delta_max=1": dict(delta_max=1.0),
    "interdomain+norm_bias_init=1": dict(norm_bias_init=1.0),
    "s4d": {},
    "s4d+c_init_scale=1": dict(c_init_scale=1.0),
    "s4d+c_init_scale=2^-8": dict(c_init_scale=1 / 256),
}

STUDY = Study(
    cells=grid(["0.8M"], CHOICES, [1, 2, 3]),
    prepare=study_cpu.STUDY.prepare,
    evaluate=("--tasks=perplexity",),
)


def get_config(argument: str = "0.8M,interdomain,1"):
    """The config of one cell."""
    cell = STUDY.cell(argument)
    mixer = cell.condition.partition("+")[0]
    config = from_config_dict(study_cpu.get_config(f"{cell.scale},{mixer},{cell.seed}"))
    ssm = dataclasses.replace(config.model.ssm, **CHOICES[cell.condition])
    model, train = dataclasses.replace(config.model, ssm=ssm), dataclasses.replace(config.train, steps=200)
    return to_config_dict(dataclasses.replace(config, model=model, train=train))
