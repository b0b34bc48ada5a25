"""The seven cells of the paper's ablation (table 4) on the embedded novels, for two CPU cores and a few hours.

idattn study --config=study_cpu --workdir=results/study_cpu --jobs=2

0.8M parameters, 1.6M tokens a cell (twice the training text; BPE of 4,096 pieces, Emma held out), three seeds, the same
budget and learning rate for all. The records in results/study_cpu are of this command. With them it only writes the
report again; with another --workdir it trains everything anew. This trains one cell:

idattn train --config=study_cpu:0.8M,softmax,1 --workdir=DIR
"""

from idattn.choices import CELLS
from idattn.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, SSMConfig, TrainConfig
from idattn.study import Study, grid

FOLDER = "data/austen-4096"

STUDY = Study(
    cells=grid(["0.8M"], CELLS, [1, 2, 3]),
    prepare=("--source=austen", "--train_vocab=4096", "--validation=0.3", f"--out={FOLDER}"),
    evaluate=(
        "--tasks=length,passkey,phonebook,mqar", "--lengths=512,1024,1792", "--entries=4,8", "--limit=20",
        "--max_tokens=65536",
    ),
)  # fmt: skip


def get_config(argument: str = "0.8M,interdomain,1"):
    """The config of one cell."""
    return STUDY.config(
        argument,
        Config(
            model=ModelConfig(
                vocab_size=4096, model_dim=64, num_layers=4, num_heads=2, mlp_dim=256, ssm=SSMConfig(num_modes=32)
            ),
            data=DataConfig(source=FOLDER, holdout=(), tokenizer=f"{FOLDER}/tokenizer.model", seq_len=512),
            optim=OptimConfig(peak_lr=4e-3, warmup_steps=40),
            train=TrainConfig(steps=400, batch_size=8, eval_every=100, eval_batches=16, checkpoint_every=100),
            compute=ComputeConfig(dtype="float32"),
        ),
    )
