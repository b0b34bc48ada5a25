"""Associative recall (MQAR) by states of equal size: pairs x state size x mixer, each with its own rates.

idattn study --config=study_recall --workdir=results/study_recall --jobs=2

Two layers of width 64 with one head, as in configs/study_mqar.py; rows of 136 tokens, evaluated also at 272. All mixers
but softmax have a state of 4 M 64 numbers a layer. First come the cells `tune`, at 8 pairs and M = 16 with seed 1: six
trials for each condition, three learning rates times two scales of C where there is a C, else six rates. The best
trial's accuracy on 8 pairs in 136 tokens decides; it is then written into TUNED for the other cells, whose records
depend on it. The study has not been run: TUNED is empty, and START stands for all conditions. Its 216 cells would take
two cores about a day, by the speed of single cells.
"""

import dataclasses
from typing import NamedTuple

from idattn.choices import PEERS
from idattn.config import (
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    SSMConfig,
    TrainConfig,
    to_config_dict,
)
from idattn.study import Study, grid

PAIRS, MODES, SEEDS, LENGTH = (8, 32), (8, 16, 32), (1, 2, 3), 136
TUNING = (8, 16)  # pairs and modes


class Trial(NamedTuple):
    """What is tuned."""

    peak_lr: float
    c_init_scale: float = 1 / 16


BASIS = dict(readout="hermitian", c_init="eye", a_init="uniform", delta_min=0.01, delta_max=0.01)
CONDITIONS = {  # the mixer, and the options of its state
    "softmax": ("softmax", {}),
    "interdomain": ("interdomain", {}),
    "s4d": ("s4d", {}),
    "clock": ("interdomain", dict(core="clock")),
    "damped": ("interdomain", dict(write="damped", **BASIS)),
    "clock+damped": ("interdomain", dict(core="clock", write="damped", **BASIS)),
    **{name: (name, {}) for name in PEERS},
}
START = Trial(5e-3)
WITH_C = [Trial(rate, scale) for rate in (2e-3, 5e-3, 1e-2) for scale in (1 / 16, 1.0)]
WITHOUT_C = [Trial(rate) for rate in (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)]
TUNED: dict[str, Trial] = {}

TRIALS = {
    f"{name}+{number}": (name, trial)
    for name, (mixer, _) in CONDITIONS.items()
    for number, trial in enumerate(WITH_C if mixer in ("interdomain", "s4d") else WITHOUT_C)
}
SIZES = {f"{pairs} pairs M={modes}": (pairs, modes) for pairs in PAIRS for modes in MODES}
STUDY = Study(
    cells=grid(["tune"], TRIALS, SEEDS[:1]) + grid(SIZES, CONDITIONS, SEEDS),
    evaluate=("--tasks=mqar", f"--lengths={LENGTH},{2 * LENGTH}", f"--entries={','.join(map(str, PAIRS))}"),
    is_text=False,
)


def get_config(argument: str = "8 pairs M=16,damped,1"):
    """The config of one cell."""
    cell = STUDY.cell(argument)
    name, trial = TRIALS.get(cell.condition) or (cell.condition, TUNED.get(cell.condition, START))
    (pairs, modes), (mixer, options) = SIZES.get(cell.scale, TUNING), CONDITIONS[name]
    ssm = SSMConfig(num_modes=modes, c_init_scale=trial.c_init_scale)
    return to_config_dict(
        Config(
            seed=cell.seed,
            model=ModelConfig(
                vocab_size=257,
                model_dim=64,
                num_layers=2,
                num_heads=1,
                mlp_dim=128,
                mixers=(mixer,),
                init_std=0.125,
                ssm=dataclasses.replace(ssm, **options),
            ),
            data=DataConfig(source=f"mqar:pairs={pairs},rows=38400", holdout=(), seq_len=LENGTH),
            optim=OptimConfig(peak_lr=trial.peak_lr, warmup_steps=100, weight_decay=0.0),
            train=TrainConfig(steps=600, batch_size=64, eval_every=100, eval_batches=8, checkpoint_every=300),
            compute=ComputeConfig(dtype="float32", chunk_size=32),
        )
    )
