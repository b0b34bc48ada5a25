#!/usr/bin/env bash
# Train on Cloud TPU: one TPU VM, a pod slice of many hosts and several slices alike.
#
#   launch/tpu.sh create --name=NAME --zone=ZONE --type=TYPE [--slices=N] [--spot] [--runtime=VERSION]
#       Queue for a slice, such as v5litepod-16, v5p-32 or v6e-8, or for N of them, and wait until all are there.
#   launch/tpu.sh setup --name=NAME --zone=ZONE
#       Copy the last commit to all its hosts and install it.
#   launch/tpu.sh train --name=NAME --zone=ZONE --config=FILE --workdir=gs://BUCKET/RUN ...
#       Start launch.train on all hosts with all further arguments, and follow the log: Ctrl-C ends only the latter.
#   launch/tpu.sh log|stop|delete --name=NAME --zone=ZONE
#       Follow the log of the first host; have the run save and exit; give the slice back.
#
# --project=PROJECT where gcloud has no default; --dry-run prints the commands and runs none. All hosts must reach the
# workdir. After a preemption: delete, create, setup and train again, which resumes the run.

set -euo pipefail

die() {
    echo "launch/tpu.sh: $*" >&2
    exit 2
}

line() { # its arguments as a line for a shell
    local word words='' quote="'\\''"
    for word; do
        case $word in
            *[!A-Za-z0-9_./:=,@%+-]* | '') words+=" '${word//\'/$quote}'" ;;
            *) words+=" $word" ;;
        esac
    done
    printf '%s\n' "${words# }"
}

on() { # a line that runs $2 on host $1 of slice $1: 0 or all
    line gcloud compute tpus queued-resources ssh "$name" "${where[@]}" "--node=$1" "--worker=$1" "--command=$2"
}

name='' type='' slices='' runtime='' dry_run='' spot=() where=() arguments=()
for argument; do
    case $argument in
        --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
        --dry-run) dry_run=yes ;;
        --name=*) name=${argument#*=} ;;
        --zone=* | --project=*) where+=("$argument") ;;
        --type=*) type=${argument#*=} ;;
        --slices=*) slices=${argument#*=} ;;
        --runtime=*) runtime=${argument#*=} ;;
        --spot) spot=("$argument") ;;
        *) arguments+=("$argument") ;;
    esac
done
verb=${1-} given=" $* "
needed=(--name --zone)
case $verb in
    create) needed+=(--type) ;;
    train) needed+=(--config --workdir) ;;
    setup | log | stop | delete) ;;
    *) die "'$verb' is none of create, setup, train, log, stop and delete; see launch/tpu.sh --help." ;;
esac
for flag in "${needed[@]}"; do
    [[ $given == *" $flag="?* ]] || die "$flag=... is missing; see launch/tpu.sh --help."
done
[ "$verb" = train ] || [ ${#arguments[@]} = 1 ] || die "$verb does not take ${arguments[*]:1}."
[ -z "$slices" ] || [ "$verb" = create ] || die "$verb does not take --slices; a run takes --config.mesh.slices=$slices."
follow="cd idattn && tail -n 100 -F --pid=\"\$(cat train.pid)\" train.log"
case $verb in
    create)
        [ "$runtime" ] || case $type in
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            v[234]-*) runtime=tpu-ubuntu2204-base ;;
            *) die "--type=$type needs a --runtime, unlike v5litepod-*, v5p-*, v6e-*, v4-* and older ones." ;;
        esac
        [[ ${slices:=1} =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices must be a whole number from 1."
        nodes=--node-count=$slices # of which the smallest is 2
        [ "$slices" -gt 1 ] || nodes=--node-id=$name
        state=$(line gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)")
        script="$state >/dev/null 2>&1 || $(line gcloud compute tpus queued-resources create "$name" "$nodes" \
            "--accelerator-type=$type" "--runtime-version=$runtime" ${spot[@]+"${spot[@]}"} "${where[@]}")
until state=\$($state); echo \"\$state\"; [[ \$state =~ ^(ACTIVE|FAILED|SUSPEND) ]]; do sleep 30; done
[ \"\$state\" = ACTIVE ] || { echo '$name cannot be used: delete it, then create it again.' >&2; false; }"
        ;;
    setup) # uv brings its own Python, since that of the runtimes is older than 3.11
        script="$(line git -C "$(cd "$(dirname "$0")/.." && pwd)" archive --format=tar.gz --output=/tmp/idattn.tar.gz HEAD)
$(line gcloud compute tpus queued-resources scp /tmp/idattn.tar.gz "$name:" "${where[@]}" --node=all --worker=all)
$(on all "mkdir -p idattn && tar -xzf idattn.tar.gz -C idattn && cd idattn && python3 -m pip install --quiet --user uv &&\
 python3 -m uv venv --quiet --allow-existing --python=3.12 .venv &&\
 python3 -m uv pip install --quiet --editable '.[tpu,gcs]'")"
        ;;
    train)
        script="$(on all "cd idattn || exit; touch train.pid; ! kill -0 \"\$(cat train.pid)\" 2>/dev/null ||\
 { echo 'A run is under way.' >&2; exit 1; }; nohup .venv/bin/python -m launch.train --distributed=auto\
 $(line "${arguments[@]:1}") >>train.log 2>&1 </dev/null & echo \$! >train.pid")
$(on 0 "$follow")"
        ;;
    log) script=$(on 0 "$follow") ;;
    stop) script=$(on all "cd idattn && kill \"\$(cat train.pid)\" && tail -f --pid=\"\$(cat train.pid)\" /dev/null") ;;
    delete) script=$(line gcloud compute tpus queued-resources delete "$name" --force --quiet "${where[@]}") ;;
esac
if [ "$dry_run" ]; then
    printf '%s\n' "$script"
else
    bash -euo pipefail -c "$script"
fi
