"""Associative recall (MQAR) of more pairs in longer rows, at the largest state of configs/study_recall.py.

idattn study --config=study_recall_long --workdir=results/study_recall_long --jobs=2

Widths and steps are those of that study, and rates too, the ones that came second where it has them. Rows of twice and
four times the length have as many more pairs. Evaluation takes rows of 130 and 260 tokens, which have room for 32.
"""

import dataclasses

from idattn.config import from_config_dict, to_config_dict
from idattn.config_files import load_module
from idattn.study import Study, grid

study_recall = load_module("study_recall")

SIZES = {"16 pairs": 2, "32 pairs": 4}  # by how much pairs and lengths are multiplied
CONDITIONS = (*study_recall.AGAIN, "gla", "interdomain", "softmax")
STUDY = Study(
    cells=grid(SIZES, CONDITIONS, study_recall.SEEDS),
    evaluate=("--tasks=mqar", "--lengths=130,260", "--entries=16,32"),
    is_text=False,
)


def get_config(argument: str = "16 pairs,gla,1"):
    """The config of one cell."""
    cell = STUDY.cell(argument)
    largest, times = max(study_recall.MODES), SIZES[cell.scale]
    config = from_config_dict(study_recall.get_config(str(cell._replace(scale=f"M={largest}"))))
    data = dataclasses.replace(
        config.data,
        source=f"mqar:pairs={times * study_recall.PAIRS},rows=51200",
        seq_len=times * study_recall.LENGTH,
    )
    return to_config_dict(dataclasses.replace(config, data=data))
