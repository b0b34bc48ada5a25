"""Multi-query associative recall of 8 pairs in 64 tokens, at a size where softmax attention solves it in minutes.

python -m launch.train --config=configs/mqar.py:softmax --workdir=runs/mqar/softmax
python -m launch.evaluate --checkpoint=runs/mqar/softmax --tasks=mqar --lengths=64 --entries=8 --out=runs/mqar/softmax

All mixers with this budget: python -m launch.study --config=configs/mqar.py --workdir=runs/mqar. What softmax
attention needs to find the two heads that recall: a loss on the answers alone, one wide head a layer, and weights that
start at 1 / sqrt(width). With a loss on all tokens, several narrow heads or a start at 0.02 it stays near chance.
"""

from idattn.choices import check_choice
from idattn.config import (
    MIXERS,
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    SSMConfig,
    TrainConfig,
    to_config_dict,
)


def get_config(mixer: str = "softmax"):
    """The config of one mixer."""
    check_choice("mixer", mixer, MIXERS)
    return to_config_dict(
        Config(
            model=ModelConfig(
                vocab_size=257,
                model_dim=64,
                num_layers=2,
                num_heads=1,
                mlp_dim=128,
                mixers=(mixer,),
                init_std=0.125,
                ssm=SSMConfig(num_modes=32),
            ),
            data=DataConfig(source="mqar:8,96000", holdout=(), seq_len=64),
            optim=OptimConfig(peak_lr=5e-3, warmup_steps=100, weight_decay=0.0),
            train=TrainConfig(steps=1500, batch_size=64, eval_every=250, checkpoint_every=1500),
            compute=ComputeConfig(dtype="float32", chunk_size=32),
        )
    )
