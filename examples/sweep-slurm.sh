#!/bin/bash
# sbatch --array=1-$(forgetless sweep grid.yaml --list | wc -l) examples/sweep-slurm.sh grid.yaml
# A task of the array a run, trials among them: the sweep's folder must be shared by the machines. Given again, it makes
# what is left.
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# Every task keeps the list as the first of them found it, so that numbers mean the same run while others finish.
commands="sweep-${SLURM_ARRAY_JOB_ID}.commands"
(
  flock 9
  [ -s "$commands" ] || forgetless sweep "$1" --list >"$commands"
) 9>"$commands.lock"

command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$commands")
[ -z "$command" ] && echo "no run of this number is left" && exit 0
eval "$command"
