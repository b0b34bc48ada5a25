"""The cells of the paper's ablation (table 4) at toy size on the embedded novels, all with the same budget.

python -m launch.study --config=configs/cube.py --workdir=runs/cube

Any one of them: --config=configs/cube.py:s4d with `launch.train`. 0.25M parameters, 0.8M bytes of training text: a
check that every cell learns, not evidence for an ordering.
"""

import dataclasses

from idattn.choices import check_choice
from idattn.config import MIXERS, ModelConfig, OptimConfig, SSMConfig, TrainConfig, quickstart, to_config_dict


def get_config(mixer: str = "interdomain"):
    """The config of one cell."""
    check_choice("mixer", mixer, MIXERS)
    config = quickstart()
    return to_config_dict(
        dataclasses.replace(
            config,
            model=ModelConfig(
                vocab_size=257,
                model_dim=64,
                num_layers=3,
                num_heads=2,
                mlp_dim=192,
                mixers=(mixer,),
                ssm=SSMConfig(num_modes=32),
            ),
            data=dataclasses.replace(config.data, seq_len=256),
            optim=OptimConfig(peak_lr=4e-3, warmup_steps=30, final_lr=1e-4),
            train=TrainConfig(steps=300, batch_size=8, eval_every=300, eval_batches=48, checkpoint_every=300),
        )
    )
