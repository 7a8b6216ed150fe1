#!/usr/bin/env bash
# Reproduces a row of docs/reproduce.md on the GPUs of this machine: encodes ImageNet, once for all
# rows, trains, makes 50,000 samples, measures them by ADM's protocol, and prints the row.
#   bash reproduce.sh imagenet/train B/4 [VIRTUAL_imagenet256_labeled.npz]
# All is written to results/reproduce. Rerun it to resume. Tests set another folder, REPRODUCE_OUT,
# last options of the parts, REPRODUCE_ENCODE, REPRODUCE_TRAIN and REPRODUCE_SAMPLE, and
# REPRODUCE_PYTHON, whose packages are used as they are.
set -euo pipefail
trap '' PIPE  # output that nobody reads ends nothing
data=$(realpath -ms -- "${1:-.}")  # as it is named from here
reference=$(realpath -ms -- "${3:-VIRTUAL_imagenet256_labeled.npz}")
cd "$(dirname "$0")"

refuse() {
    echo "reproduce.sh: error: $*" >&2
    exit 2
}

# The tables of the page: | row | paper | ours | options of train.py | options of sample.py |
page=docs/reproduce.md
rows=$(awk -F ' *[|] *' '$5 ~ /--model/ { print $2 }' $page)
options() {  # options NAME COLUMN: of a row, after those of every row of its table
    awk -F ' *[|] *' -v name="$1" -v column="$2" '$2 == "every row" { every = $column }
        $2 == name { gsub("`", "", every); gsub("`", "", $column); print every, $column }' $page
}

[ $# -ge 2 ] || refuse "usage: bash reproduce.sh IMAGENET_TRAIN ROW [REFERENCE.npz]; rows:" $rows
grep -qxF -- "$2" <<< "$rows" ||
    refuse "ROW must be one of $(echo $rows), got $2; choose another"
row=$2
source environment.sh
choose_python "${REPRODUCE_PYTHON:-}"

out=${REPRODUCE_OUT:-results/reproduce}
folder=$out/${row//\//-}
training=${folder%-2-steps}/training  # a row NAME-2-steps samples from the training of row NAME
encode=(--data-path "$data" --out-path "$out/latents-256" --vae mse ${REPRODUCE_ENCODE:-})
train=(--encoded-data --data-path "$out/latents-256" --vae mse --run-dir "$training"
       $(options "$row" 5) ${REPRODUCE_TRAIN:-})
sample=(--sample-dir "$folder/samples" --fid-ref "$reference" --protocol adm
        $(options "$row" 6) ${REPRODUCE_SAMPLE:-})
found=$(python examples/paper_runs.py check "${encode[*]@Q}" "${train[*]@Q}" "${sample[*]@Q}")
read -r processes precision <<< "$found"
launch=python
[ "$processes" = 1 ] || launch="torchrun --standalone --nproc_per_node=$processes"

train() {  # in the fewest micro-batches that fit the memory, which change the result by rounding
    local parts before code
    mkdir -p "$training"
    touch "$training/log.txt"
    for parts in 1 2 4 8 16 32 64 128 256; do
        before=$(wc -l < "$training/log.txt")
        show $launch train.py --grad-accum-steps $parts "${train[@]}" $precision >&2 && return
        code=$?
        tail -n +$((before + 1)) "$training/log.txt" |
            grep "ended by OutOfMemoryError" > /dev/null || return $code
    done
    return $code
}

show $launch encode_imagenet.py "${encode[@]}" >&2
train
checkpoint=$training/checkpoints/$(python -c 'import json, sys
print("%07d" % json.load(open(sys.argv[1]))["total_steps"])' "$training/config.json").pt
if [ ! -e "$checkpoint" ]; then
    echo "The training was interrupted: repeat the command to resume it" >&2
    exit 1
fi
mkdir -p "$folder"
show $launch sample.py --ckpt "$checkpoint" "${sample[@]}" > "$folder/evaluation.jsonl"
python examples/paper_runs.py report "$(grep -F -m 1 "| $row |" $page)" "$training" \
    "$folder/evaluation.jsonl"
