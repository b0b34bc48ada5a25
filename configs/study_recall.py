"""Associative recall (MQAR) of 8 pairs in 64 tokens by states of equal size: state size x mixer, tuned for each.

idattn study --config=study_recall --workdir=results/study_recall --jobs=2

Two layers of width 64 with one head, as in configs/study_mqar.py, evaluated also in rows of 128 tokens. All mixers but
softmax have a state of 4 M 64 numbers a layer. First come the cells `tune`, at M = 16 with seed 0, which no other cell
has: five trials for each condition, four learning rates, and one of them with another scale of C where there is a C,
else a fifth rate. The lowest validation loss has decided; TUNED holds for the other cells. At the rates that it chose
for damped corrections, Gated DeltaNet and Mamba-2, other seeds fail at some size, so that all three are also trained at
the rate that came second, AGAIN.
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

PAIRS, LENGTH, MODES, SEEDS = 8, 64, (16, 8, 4), (1, 2, 3)
TUNING = MODES[0]


class Trial(NamedTuple):
    """What is tuned."""

    peak_lr: float
    c_init_scale: float = 1 / 16


BASIS = dict(readout="hermitian", c_init="eye", a_init="uniform", delta_min=0.01, delta_max=0.01)
CONDITIONS = {  # the mixer, and the options of its state
    "softmax": ("softmax", {}),
    "interdomain": ("interdomain", {}),
    "uniform": ("interdomain", BASIS),
    "s4d": ("s4d", {}),
    "clock": ("interdomain", dict(core="clock")),
    "damped": ("interdomain", dict(write="damped", **BASIS)),
    "clock+damped": ("interdomain", dict(core="clock", write="damped", **BASIS)),
    **{name: (name, {}) for name in PEERS},
}
RATES = [Trial(rate) for rate in (5e-3, 1e-2, 2e-3, 2e-2)]
WITH_C, WITHOUT_C = [*RATES, Trial(5e-3, 1.0)], [*RATES, Trial(1e-3)]
TUNED = {  # the others keep the first trial
    **dict.fromkeys(("interdomain", "uniform", "clock"), Trial(5e-3, 1.0)),
    **dict.fromkeys(("s4d", *PEERS), Trial(1e-2)),
    "damped": Trial(2e-2),
}

OF_CONDITIONS = [WITH_C if mixer in ("interdomain", "s4d") else WITHOUT_C for mixer, _ in CONDITIONS.values()]
TRIALS = {  # the first of every condition, then the second
    f"{name}+{number}": (name, trial)
    for number, trials in enumerate(zip(*OF_CONDITIONS, strict=True))
    for name, trial in zip(CONDITIONS, trials, strict=True)
}
AGAIN = {f"{name} at 5e-3": f"{name}+0" for name in ("damped", "gated_deltanet", "mamba2")}
SIZES = {f"M={modes}": modes for modes in MODES}
STUDY = Study(
    cells=grid(["tune"], TRIALS, [0]) + grid(SIZES, (*CONDITIONS, *AGAIN), SEEDS),
    evaluate=("--tasks=mqar", f"--lengths={LENGTH},{2 * LENGTH}", f"--entries={PAIRS}"),
    is_text=False,
)


def get_config(argument: str = "M=16,damped,1"):
    """The config of one cell."""
    cell = STUDY.cell(argument)
    chosen = cell.condition, TUNED.get(cell.condition, RATES[0])
    name, trial = TRIALS.get(AGAIN.get(cell.condition, cell.condition), chosen)
    mixer, options = CONDITIONS[name]
    ssm = SSMConfig(num_modes=SIZES.get(cell.scale, TUNING), c_init_scale=trial.c_init_scale)
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
            data=DataConfig(source=f"mqar:pairs={PAIRS},rows=51200", holdout=(), seq_len=LENGTH),
            optim=OptimConfig(peak_lr=trial.peak_lr, warmup_steps=100, weight_decay=0.0),
            train=TrainConfig(steps=800, batch_size=64, eval_every=100, eval_batches=8, checkpoint_every=400),
            compute=ComputeConfig(dtype="float32", chunk_size=32),
        )
    )
