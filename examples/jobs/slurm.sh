#!/bin/bash
# sbatch examples/jobs/slurm.sh: one launcher a node. With srun alone (one task a rank), see docs/tutorials/many-nodes.md.
#SBATCH --job-name=shardline
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --signal=TERM@600    # ten minutes before the time limit: the ranks save and end
#SBATCH --requeue

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER="$head:$((20000 + SLURM_JOB_ID % 20000))"

srun --kill-on-bad-exit=0 bash -c 'exec shardline run \
    --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc 8 --master "$MASTER" --grace 540 --max-restarts 3 \
    examples/jobs/train.py --stage 3 --steps 1000 --folder "runs/$SLURM_JOB_ID"'
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"    # it has saved, and goes on in its next turn
exit $code
