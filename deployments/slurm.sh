#!/bin/bash
# One run as a Slurm job:  sbatch deployments/slurm.sh configs/quickstart.yaml
# Slurm warns before the time limit; the run saves its state, ends with 75, and the job queues itself again.
#SBATCH --job-name=regrow
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -u
recipe=${1:?the recipe, e.g. configs/quickstart.yaml}
export REGROW_STORE=${REGROW_STORE:-$HOME/regrow-store}
export REGROW_GRACE_SECONDS=${REGROW_GRACE_SECONDS:-270}  # of the 300 s that --signal gives

# The warning goes to this script alone, which passes it on; one that comes before the run is there is passed on later.
run= warned=
trap 'warned=yes; ${run:+kill -TERM "$run"}' TERM
regrow run "$recipe" &
early=$warned run=$!
if [ -n "$early" ]; then
    kill -TERM "$run"
fi
wait "$run"
code=$?
# The trap ends the first wait early; the run is still saving then.
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    code=$?
done
# 75: the run is suspended. 143: the warning came before it had begun.
if [ "$code" -eq 75 ] || [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
