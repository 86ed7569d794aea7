#!/usr/bin/env bash
# On a worker: end what trains here, if anything does; after 30 seconds by force.
set -euo pipefail
cd "$HOME/pythia_jax"
if [[ ! -e train.pid ]]; then
  exit 0
fi
group=$(< train.pid)
# By name too: after a reboot the number may be another's.
trains() { pgrep -g "$group" -f pythia_jax > /dev/null; }
if trains; then
  kill -TERM -- "-$group" || true
  for _ in {1..300}; do
    trains || exit 0
    sleep 0.1
  done
  kill -KILL -- "-$group" || true
fi
