#!/bin/bash
# sbatch examples/jobs/slurm.sh: torchrun once a node. With srun alone (one task a rank), see docs/tutorials/many-nodes.md.
#SBATCH --job-name=shardline
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --signal=TERM@600    # ten minutes before the time limit: the ranks save and end
#SBATCH --requeue

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR="$head" MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 bash -c 'exec torchrun \
    --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node 8 \
    --rdzv-backend static --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    examples/jobs/train.py --stage 3 --steps 1000 --folder "runs/$SLURM_JOB_ID"'
