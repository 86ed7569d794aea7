#!/usr/bin/env bash
# Train, and leave the exit status in a file: train.status, or N.status for task N of a Slurm job.
# Arguments: the folder for that file, the Python to use, CONFIG, dotted flags.
set -uo pipefail
file=$1/${SLURM_PROCID:-train}.status python=$2
shift 2
trap : TERM # sent to every process of the group or task: training saves, this waits for its status
"$python" -u -m pythia_jax train "$@" --pod &
child=$!
# A signal ends the waiting, not the child.
while true; do
  wait "$child"
  status=$?
  kill -0 "$child" 2> /dev/null || break
done
echo "$status" > "$file.new"
mv "$file.new" "$file"
exit "$status"
