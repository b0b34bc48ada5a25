"""The paper's study: the seven cells at 125M, and softmax, interdomain and s4d at 350M, 760M and 1.3B.

idattn study --config=study_paper --workdir=DIR --dry_run

This command prints the commands of all cells, for launch/tpu.sh or launch/slurm.sh; add --config.mesh and
--config.compute.remat as `idattn plan` finds them. On one machine that is large enough, leave --dry_run out.
configs/paper.py has the recipe and the results to expect. The corpora of the length panel (tables 2 and 8) are yours to
prepare, for --corpora of `idattn evaluate`.
"""

from idattn.choices import CELLS
from idattn.config_files import load_module
from idattn.study import Study, grid

paper = load_module("paper")

SEEDS = [42]

STUDY = Study(
    cells=grid(["125M"], CELLS, SEEDS) + grid(["350M", "760M", "1.3B"], ["softmax", "interdomain", "s4d"], SEEDS),
    prepare=(
        "--source=hf:HuggingFaceFW/fineweb-edu,sample-100BT", "--tokenizer=meta-llama/Llama-2-7b-hf",
        f"--out={paper.FOLDER}",
    ),
    evaluate=(
        "--tasks=perplexity,length,passkey,phonebook,commonsense,wikitext,based_recall,longbench14",
        "--lengths=1024,2048,4096,8192,14336",
    ),
)  # fmt: skip


def get_config(argument: str = "125M,interdomain,42"):
    """The config of one cell."""
    cell = STUDY.cell(argument)
    config = paper.get_config(f"{cell.scale},{cell.condition}")
    config.seed = cell.seed
    return config
