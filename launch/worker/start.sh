#!/usr/bin/env bash
# On a worker: start training so that it outlives this connection. "$@": dotted flags of the config.
set -euo pipefail
cd "$HOME/pythia_jax"
here=$HOME/pythia_jax/source/launch/worker
bash "$here/stop.sh"
rm -f train.status
printf -- '--- %s train %s\n' "$(date -u +%FT%TZ)" "$*" >> train.log
# Not a group leader itself, so setsid starts the script under this very process id.
setsid nohup bash "$here/train.sh" . .venv/bin/python source/config.yaml "$@" >> train.log 2>&1 < /dev/null &
group=$!
echo "$group" > train.pid
# Until it is there to be seen: status.sh would call it lost.
for _ in {1..100}; do
  if [[ -e train.status ]] || pgrep -g "$group" -f pythia_jax > /dev/null; then
    exit 0
  fi
  sleep 0.1
done
