#!/usr/bin/env bash
# Train on the GPU nodes of a SLURM cluster, one process per GPU.
#
#   sbatch --nodes=4 launch/slurm.sh --config=FILE --workdir=FOLDER ...
#   launch/slurm.sh --dry-run --config=FILE --workdir=FOLDER ...
#
# All arguments are those of launch.train; the folder must be on a disk that all nodes share. Submit it in the root of
# the repository, with an environment active that has `pip install -e '.[cuda]'`; PYTHON names another interpreter than
# python. The nodes have 8 GPUs, or as many as you say: sbatch --gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=16.
#
# Five minutes before the time limit the run saves and exits, and the job returns to the queue, from where it resumes. It
# also resumes after a node failure or a preemption. --dry-run prints the commands of the job and runs none.

#SBATCH --job-name=idattn
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

die() {
    echo "launch/slurm.sh: $*" >&2
    exit 2
}

dry_run='' arguments=()
for argument; do
    case $argument in
        --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
        --dry-run) dry_run=yes ;;
        *) arguments+=("$argument") ;;
    esac
done
for needed in --config --workdir; do
    [[ " ${arguments[*]-} " == *" $needed"[=\ ]* ]] || die "$needed is missing; see launch/slurm.sh --help."
done
[ -f launch/train.py ] || die "$PWD has no launch/train.py; submit it in the root of the repository."

# jax gives task i of a node its i-th GPU, so each task must see all of them. srun does not take --cpus-per-task from
# the job by itself.
command=(srun "--cpus-per-task=${SLURM_CPUS_PER_TASK:-8}" --gpu-bind=none --kill-on-bad-exit=1
    "${PYTHON:-python}" -m launch.train --distributed=auto "${arguments[@]}")
if [ "$dry_run" ]; then
    printf '%q ' "${command[@]}" && echo
    echo '# at SIGUSR1: scancel --signal=TERM JOB, and when the run has saved: scontrol requeue JOB'
    exit
fi
[ "${SLURM_JOB_ID-}" ] || die "this is no SLURM job; submit it with sbatch launch/slurm.sh, or try --dry-run."

# SIGTERM is not caught: it comes from a user who cancels the job and does not want it back. scancel signals the tasks
# alone.
stopped=''
trap 'stopped=yes; trap "" USR1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
"${command[@]}" &
status=0
wait $! || status=$?
if [ "$stopped" ]; then # the signal ended the wait, not the run
    status=0
    wait $! || status=$?
    [ "$status" != 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
