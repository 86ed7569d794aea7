#!/usr/bin/env bash
# On a worker: train, and leave the exit status in train.status.
set -uo pipefail
cd "$HOME/pythia_jax" || exit 1
trap : TERM # sent to the whole group: training saves and ends, this waits for its status
.venv/bin/python -u -m pythia_jax train source/config.yaml "$@" --pod &
child=$!
# A signal ends the waiting, not the child.
while true; do
  wait "$child"
  status=$?
  kill -0 "$child" 2> /dev/null || break
done
echo "$status" > train.status.new
mv train.status.new train.status
