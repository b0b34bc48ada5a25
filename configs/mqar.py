"""Multi-query associative recall of 8 pairs in 64 tokens, at a size where softmax attention solves it in minutes.

python -m launch.train --config=configs/mqar.py:softmax --workdir=runs/mqar/softmax
python -m launch.evaluate --checkpoint=runs/mqar/softmax --tasks=mqar --lengths=64 --entries=8 --out=runs/mqar/softmax

Two minutes of a CPU core for softmax, five for the others; all of them: python -m launch.study
--config=configs/mqar.py --workdir=runs/mqar. Accuracy to expect: softmax 1.00, interdomain 0.35, s4d_rope 0.32,
single_query 0.26, dual_linear 0.25, s4d 0.21, interdomain_norope 0.13; 0.125 is one of the row's values at random.

What softmax attention needs to find the two heads that recall, as seen with 8 pairs in 33 tokens: a loss on the answers
alone (on all tokens 0.35 after 2,000 steps), weights that start at 1 / sqrt(width) (at 0.02: 0.16 after 1,500), and one
wide head a layer (solved in 400 steps; with two heads 0.79 after 2,000).
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
