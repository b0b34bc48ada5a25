"""Multi-query associative recall of 8 pairs in 64 tokens, at a size where softmax attention solves it in minutes.

idattn study --config=study_mqar --workdir=results/study_mqar --jobs=2

`idattn train --config=study_mqar:0.1M,softmax,42` trains one cell. Softmax attention needs three things to learn the
two heads that recall: a loss on the answers alone, one wide head a layer, and weights that start at 1 / sqrt(width).
With a loss on all tokens, several narrow heads or a start at 0.02, its accuracy stays near that of guessing.
"""

from idattn.choices import CELLS
from idattn.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, SSMConfig, TrainConfig
from idattn.study import Study, grid

STUDY = Study(
    cells=grid(["0.1M"], CELLS, [42]), evaluate=("--tasks=mqar", "--lengths=64", "--entries=8"), is_text=False
)


def get_config(argument: str = "0.1M,softmax,42"):
    """The config of one cell."""
    return STUDY.config(
        argument,
        Config(
            model=ModelConfig(
                vocab_size=257,
                model_dim=64,
                num_layers=2,
                num_heads=1,
                mlp_dim=128,
                init_std=0.125,
                ssm=SSMConfig(num_modes=32),
            ),
            data=DataConfig(source="mqar:pairs=8,rows=96000", holdout=(), seq_len=64),
            optim=OptimConfig(peak_lr=5e-3, warmup_steps=100, weight_decay=0.0),
            train=TrainConfig(steps=1500, batch_size=64, eval_every=250, checkpoint_every=1500),
            compute=ComputeConfig(dtype="float32", chunk_size=32),
        ),
    )
