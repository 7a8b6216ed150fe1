#!/usr/bin/env bash
# Makes .venv if it is missing, writes 1,797 real handwritten digits as an image folder, trains on
# them for a few minutes, and samples every class in one step and in two. Rerun it to resume.
# Tests set QUICKSTART_STEPS of training, the folders QUICKSTART_DATA and QUICKSTART_RUN, and
# QUICKSTART_PYTHON, whose packages are used as they are.
set -euo pipefail
trap '' PIPE  # output that nobody reads ends nothing
cd "$(dirname "$0")"
source environment.sh
choose_python "${QUICKSTART_PYTHON:-}"
data=${QUICKSTART_DATA:-data/digits}
run=${QUICKSTART_RUN:-results/quickstart}
training_steps=${QUICKSTART_STEPS:-1950}
checkpoint=$run/checkpoints/$(printf %07d "$training_steps").pt

# One process per GPU, or two on a CPU; rounded down to a power of two, which divides the batch
read -r processes threads < <(python -c 'import os, torch
count = torch.cuda.device_count() or min(2, os.cpu_count())
processes = 2 ** (count.bit_length() - 1)
print(processes, max(1, os.cpu_count() // processes))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
torchrun="torchrun --standalone --nproc_per_node=$processes"

show python examples/digits.py write "$data"
show $torchrun train.py --data-path "$data" --vae none --image-size 8 --model DiT-T/4 \
    --cfg 1 --label-drop 0 --ratio 0.5 --p-mean 0.1 --p-std 1.2 --global-batch-size 256 --lr 4e-3 \
    --ema-decay 0.997 --max-steps $training_steps --num-workers 0 --no-compile --log-every 150 \
    --sample-every 650 --run-dir "$run"
for steps in 1 2; do
    show python sample.py --ckpt "$checkpoint" --num-fid-samples 1797 \
        --num-sampling-steps $steps --per-proc-batch-size 300 --sample-dir "$run/$steps-step"
done
show python evaluate_fid.py --samples "$run/1-step.npz" --ref "$data" --image-size 8 \
    --protocol pixels --num-workers 0
show python examples/digits.py judge "$run/1-step.npz" "$run/2-step.npz"
printf 'Pictures: %s (one step), %s (two), %s (while training)\n' \
    "$run/1-step.png" "$run/2-step.png" "$run/samples/" || true
