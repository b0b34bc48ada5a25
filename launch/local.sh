#!/usr/bin/env bash
# Train with several processes on this machine, each with several simulated CPU devices.
#
#   launch/local.sh [--processes=2] [--devices=2] [--dry-run] --config=FILE --workdir=FOLDER ...
#
# All further arguments are those of launch.train. Lines of every process but the first begin with its number. Ctrl-C and
# SIGTERM are passed on to all processes, which save and exit; a second one kills them. The exit status is the largest of
# theirs. PYTHON names another interpreter than python; --dry-run prints the commands and runs none.

set -euo pipefail

die() {
    echo "launch/local.sh: $*" >&2
    exit 2
}

processes=2 devices=2 dry_run='' arguments=()
for argument; do
    case $argument in
        --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
        --dry-run) dry_run=yes ;;
        --processes=*) processes=${argument#*=} ;;
        --devices=*) devices=${argument#*=} ;;
        *) arguments+=("$argument") ;;
    esac
done
case $processes$devices in
    0* | *[!0-9]* | '') die "--processes=$processes and --devices=$devices must be whole numbers from 1." ;;
esac
for needed in --config --workdir; do
    [[ " ${arguments[*]-} " == *" $needed"[=\ ]* ]] || die "$needed is missing; see launch/local.sh --help."
done
[ -f launch/train.py ] || die "$PWD has no launch/train.py; start it in the root of the repository."

python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')

run() { # the number of the process
    local command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "$python" -m launch.train
        "--distributed=localhost:$port,$processes,$1" "${arguments[@]}")
    if [ "$dry_run" ]; then
        printf '%q ' "${command[@]}" && echo '&'
    elif [ "$1" = 0 ]; then # straight to the terminal, where it shows its progress
        "${command[@]}" &
    else
        "${command[@]}" > >(sed "s/^/$1: /") 2>&1 &
    fi
}

pids=() signal=TERM
trap 'stopped=yes; kill -"$signal" "${pids[@]}" 2>/dev/null || true; signal=KILL' INT TERM
for ((i = 0; i < processes; i++)); do
    run "$i"
    pids+=("${!-}")
done
if [ "$dry_run" ]; then
    echo wait
    exit
fi
worst=0
for pid in "${pids[@]}"; do
    while :; do # a signal ends the wait, not the process
        stopped='' status=0
        wait "$pid" || status=$?
        [ "$stopped" ] || break
    done
    ((status <= worst)) || worst=$status
done
exit "$worst"
