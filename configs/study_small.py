"""The seven cells of the paper's ablation (table 4) for one accelerator and a few hours.

idattn study --config=study_small --workdir=results/study_small

20M parameters, 105M tokens a cell, BPE of 8,192 pieces, context 2,048, three seeds, the same budget and learning rate
for all. The text is WikiText-103, from the Hugging Face hub; for other text change `prepare`. It has not been run yet,
for want of an accelerator.
"""

from idattn.choices import CELLS
from idattn.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from idattn.study import Study, grid

FOLDER = "data/small-8192"

STUDY = Study(
    cells=grid(["20M"], CELLS, [1, 2, 3]),
    prepare=(
        "--source=hf:Salesforce/wikitext,wikitext-103-raw-v1", "--train_vocab=8192", f"--out={FOLDER}",
    ),
    evaluate=(
        "--tasks=perplexity,length,passkey,phonebook,mqar", "--lengths=512,1024,2048,4096,7168", "--entries=4,16,64",
    ),
)  # fmt: skip


def get_config(argument: str = "20M,interdomain,1"):
    """The config of one cell."""
    return STUDY.config(
        argument,
        Config(
            model=ModelConfig(vocab_size=8192, model_dim=384, num_layers=8, num_heads=6, mlp_dim=1024),
            data=DataConfig(source=FOLDER, holdout=(), tokenizer=f"{FOLDER}/tokenizer.model", seq_len=2048),
            optim=OptimConfig(peak_lr=3e-3, warmup_steps=100),
            train=TrainConfig(steps=1600, batch_size=32, eval_every=200, checkpoint_every=200),
        ),
    )
