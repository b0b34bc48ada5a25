r"""The paper's language models and training recipe (arXiv 2605.24330, section 4, A.2, B.1), at four scales.

idattn prepare-data --source=hf:HuggingFaceFW/fineweb-edu,sample-100BT --out=data/fineweb-edu \
    --tokenizer=meta-llama/Llama-2-7b-hf
idattn train --config=paper:125M,interdomain --workdir=DIR
idattn describe --config=paper:1.3B,interdomain

Scales 125M, 350M, 760M, 1.3B; mixers of `idattn.choices.MIXERS`. The paper trains on FineWeb-Edu with the Llama 2
tokenizer (32,000 pieces), which the first command prepares for all runs (sample-10BT is enough for 125M and 350M); for
a folder elsewhere set config.data.source, and config.data.tokenizer to the file in it. Validation perplexity to expect
at 125M after 2.5e9 tokens: interdomain 16.48, interdomain_norope 16.51, softmax 16.65, single_query 16.94, s4d 19.22,
s4d_rope 19.77, dual_linear 20.18; at 1.3B after 26e9 tokens: interdomain 7.98, softmax 8.63.
"""

from typing import NamedTuple

from idattn.choices import MIXERS, check_choice
from idattn.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, to_config_dict

FOLDER = "data/fineweb-edu"
SEQ_LEN = 4096
TOKENS_PER_STEP = 524_288
WARMUP_TOKENS = 375e6


class Scale(NamedTuple):
    model_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    peak_lr: float
    tokens: float


SCALES = {
    "125M": Scale(768, 12, 12, 2048, 3e-3, 2.5e9),
    "350M": Scale(1024, 24, 16, 2816, 1.5e-3, 7e9),
    "760M": Scale(1536, 24, 16, 4096, 1e-3, 15e9),
    "1.3B": Scale(2048, 24, 32, 5504, 1e-3, 26e9),
    "7B": Scale(4096, 32, 64, 11008, 3e-4, 140e9),  # ours, to plan with: the paper stops at 1.3B
}


def get_config(argument: str = "125M,interdomain"):
    """The config of SCALE,MIXER."""
    parts = argument.split(",")
    if len(parts) != 2:
        raise ValueError(f"{argument!r} must be SCALE,MIXER, such as 125M,interdomain.")
    check_choice("scale", parts[0], SCALES)
    check_choice("mixer", parts[1], MIXERS)
    scale, mixer = SCALES[parts[0]], parts[1]
    return to_config_dict(
        Config(
            model=ModelConfig(
                vocab_size=32_000,
                model_dim=scale.model_dim,
                num_layers=scale.num_layers,
                num_heads=scale.num_heads,
                mlp_dim=scale.mlp_dim,
                mixers=(mixer,),
            ),
            data=DataConfig(source=FOLDER, holdout=(), tokenizer=f"{FOLDER}/tokenizer.model", seq_len=SEQ_LEN),
            optim=OptimConfig(peak_lr=scale.peak_lr, warmup_steps=round(WARMUP_TOKENS / TOKENS_PER_STEP)),
            train=TrainConfig(
                steps=round(scale.tokens / TOKENS_PER_STEP),
                batch_size=TOKENS_PER_STEP // SEQ_LEN,
                eval_every=500,
                checkpoint_every=500,
            ),
        )
    )
