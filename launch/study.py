"""Train every mixer with one config and compare their losses; a study that was stopped goes on where it was.

python -m launch.study --config=configs/cube.py --workdir=runs/cube

The mixer of --config is replaced by each of --mixers in turn. Writes WORKDIR/MIXER/ for each, and WORKDIR/study.md.
"""

import dataclasses
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from idattn.config import MIXERS, from_config_dict
from idattn.train import train

CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE[:ARGUMENTS] of the budget that all cells share.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.", required=True)
CELLS = flags.DEFINE_list("mixers", list(MIXERS), "Mixers to compare.")
flags.mark_flag_as_required("config")


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = from_config_dict(CONFIG.value)
    cells = {
        name: dataclasses.replace(config, model=dataclasses.replace(config.model, mixers=(name,)))
        for name in CELLS.value
    }
    results = {name: train(cell, Path(WORKDIR.value) / name) for name, cell in cells.items()}
    rows = ["| mixer | parameters | validation loss, nats per token | best |", "| --- | ---: | ---: | ---: |"]
    rows += [
        f"| {name} | {r['parameters']:,} | {r['val_loss']:.4f} | {r['best_val_loss']:.4f} |"
        for name, r in results.items()
    ]
    table = "\n".join(rows)
    (Path(WORKDIR.value) / "study.md").write_text(table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    app.run(main)
