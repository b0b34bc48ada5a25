"""Train and evaluate every cell of a study and report on them; the same command resumes where it was stopped.

idattn study --config=study_cpu --workdir=results/study_cpu --jobs=2

A study is a file with STUDY (`idattn.study.Study`) and a get_config that takes SCALE,CONDITION,SEED. In WORKDIR,
runs/CELL is the run of a cell, runs/CELL.log what it printed, cells/CELL.json its record, and report.md, report.json
and figures show what the records say; --report only writes these. Records and report can be stored without the runs.

A cell that fails is reported, and tried again by the next call. Several machines that share WORKDIR may run the same
command: each takes cells that no other works on. Where a cell takes several hosts, --dry_run prints the commands that
are missing, for launch/tpu.sh or launch/slurm.sh; this command then records cells that are trained and evaluated.
"""

import shlex
import signal
from concurrent.futures import ThreadPoolExecutor

from absl import flags
from tqdm import tqdm

from idattn.files import disk_path
from idattn.study import read_records, write_report
from idattn.study.runner import Runner

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "The study: its file, or the name of one that ships.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of the study, on a disk.", required=True)
    flags.DEFINE_integer("jobs", 1, "Cells at a time on this machine; 1 for an accelerator.", lower_bound=1)
    flags.DEFINE_bool("report", False, "Only report what the records say.")
    flags.DEFINE_bool("dry_run", False, "Only print the commands of what is missing.")


def finish_all(runner: Runner) -> None:
    """Finish the cells, --jobs at a time, and print the outcome of each."""
    cells = runner.study.cells
    with ThreadPoolExecutor(FLAGS.jobs) as pool, tqdm(total=len(cells), unit="cell", dynamic_ncols=True) as bar:
        futures = {cell: pool.submit(runner.finish, cell) for cell in cells}
        for cell, future in futures.items():
            tqdm.write(f"{cell}  {future.result()}")
            bar.update()


def main(_):
    workdir = disk_path(FLAGS.workdir)
    runner = Runner(FLAGS.config, workdir)
    if FLAGS.dry_run:
        for cell in runner.study.cells:
            for name, arguments in () if runner.is_done(cell) else runner.missing(cell):
                print(shlex.join(["idattn", name, *arguments]))
        return
    if not FLAGS.report:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, runner.stop)
        runner.prepare()
        if not runner.stopped.is_set():
            finish_all(runner)
        if runner.stopped.is_set():
            print("stopped; the same command resumes.")
            return
    records = read_records(workdir / "cells", runner.configs)
    study = runner.study
    print(write_report(workdir, runner.configs, records, is_text=study.is_text, comparisons=study.comparisons))
