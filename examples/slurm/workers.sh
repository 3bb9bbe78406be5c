#!/bin/bash
# Workers of a study as a job array:  STUDY=digits sbatch examples/slurm/workers.sh
#
# ~/.config/hpo/env exports where the study is (docs/deployment.md); it is yours alone (chmod 600):
#   HPO_STORAGE, MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD. The database's password is
#   in ~/.pgpass.
#
# Eight jobs, each of which is a worker; they start when there is room, and leave when the study is done.
#SBATCH --job-name=hpo
#SBATCH --array=1-8
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:1
#SBATCH --mem=16G
#SBATCH --time=04:00:00
# Two minutes before the time is up this script is told: long enough for an epoch.
#SBATCH --signal=B:USR1@120
# A job that is preempted, or whose node fails, is queued again.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hpo-%A_%a.log
set -u

# shellcheck source=/dev/null
. "${HPO_ENV:-$HOME/.config/hpo/env}"

# SIGTERM ends the running epoch, keeps its checkpoint and puts the trial back into the queue.
out_of_time=
trap 'out_of_time=yes; kill -TERM "$(jobs -p)"' USR1

# A home of its own for each, and the same one after a requeue: its checkpoints are in it.
hpo worker "${STUDY:?name the study: STUDY=digits sbatch ...}" \
    --workers 1 --home "${SCRATCH:-$HOME}/hpo/$STUDY/$SLURM_ARRAY_TASK_ID" &
wait "$!"
code=$?
if [ -n "$out_of_time" ]; then
    wait  # the first one ended with the signal
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit 0
fi
exit "$code"
