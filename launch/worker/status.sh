#!/usr/bin/env bash
# On a worker: one line on how training stands: an exit status, running, lost (it ended and left no
# status, as when the machine was started anew) or absent. With a number N, the last N lines of the
# log too, unless all went well.
set -euo pipefail
lines=${1:-0}
state=absent
if cd "$HOME/pythia_jax" 2> /dev/null; then
  if [[ -e train.pid ]]; then
    state=lost
    if pgrep -g "$(< train.pid)" -f pythia_jax > /dev/null; then
      state=running
    fi
  fi
  # Asked last: training may have ended since, and has then left this.
  if [[ -e train.status ]]; then
    state=$(< train.status)
  fi
fi
echo "pythia_jax: $HOSTNAME $state"
if ((lines > 0)) && [[ $state != 0 && -e train.log ]]; then
  tail -n "$lines" train.log | sed "s/^/pythia_jax| $HOSTNAME /"
fi
