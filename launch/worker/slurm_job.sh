#!/usr/bin/env bash
# The body of a Slurm job: train on all its tasks and, where that is worth it, queue the job again.
# Arguments: the Python to use, how often the job may be queued again, CONFIG, dotted flags.
set -uo pipefail
python=$1 limit=$2
shift 2
here=$(dirname "${BASH_SOURCE[0]}")
statuses=$(mktemp -d "${SLURM_SUBMIT_DIR:-$PWD}/.slurm-${SLURM_JOB_ID}-XXXXXX") || exit 1

trap : TERM # a job that is preempted: its tasks save, this waits for them
# Each task leaves its status in a file: srun tells the highest, which hides an error behind the
# SIGKILL of those that it then ends.
srun --kill-on-bad-exit=1 bash "$here/train.sh" "$statuses" "$python" "$@"
srun_status=$?

mapfile -t ended < <(cat "$statuses"/*.status 2> /dev/null)
rm -rf "$statuses"
if ((${#ended[@]} == 0)); then
  ended=("$srun_status")
fi
cd "$here/../.." || exit 1
read -r status next < <("$python" -m launch.outcomes "${ended[@]}")
if [[ $next == again ]]; then
  if ((${SLURM_RESTART_COUNT:-0} >= limit)); then
    echo "exit status $status; queued again $limit times, no more"
  else
    echo "exit status $status; queuing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
fi
exit "$status"
