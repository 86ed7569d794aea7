#!/usr/bin/env bash
# One task of a Slurm job: train, and leave the exit status in a file of the folder given.
# Arguments: the folder, the Python to use, CONFIG, dotted flags.
set -uo pipefail
folder=$1 python=$2
shift 2
trap : TERM # Slurm sends it to every process of the task: training saves, this waits for its status
"$python" -u -m pythia_jax train "$@" --pod &
child=$!
# A signal ends the waiting, not the child.
while true; do
  wait "$child"
  status=$?
  kill -0 "$child" 2> /dev/null || break
done
echo "$status" > "$folder/$SLURM_PROCID"
exit "$status"
