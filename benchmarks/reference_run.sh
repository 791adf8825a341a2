#!/usr/bin/env bash
# TS1 in full on the network in results/base, and what it is compared with: minutes per training on a GPU, hours on a CPU.
# Further options go to scripts 2 and 3. An interrupted run goes on with the same command.
#
#     bash benchmarks/reference_run.sh cpu                                         # to results/cpu/
#     bash benchmarks/reference_run.sh trial --epochs 1 --train-samples 1280       # a trial, without the sweep
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
results=$1
options=("${@:2}" --seed 0)

# both NAME OPTIONS: scripts 1 to 4 in a folder of their own. wanda NAME OPTIONS: without script 2 and the comparison.
wanda() {
    folder=checkpoints/$results/$1
    echo "== $1"
    "$python" test_scenarios/TS1_01_prepare_model.py --checkpoints-dir "$folder" \
        --weights results/base/resnet18-cifar10.pth --epochs 0
    "$python" test_scenarios/TS1_03_wanda_pruning.py --checkpoints-dir "$folder" "${options[@]}" "${@:2}"
    "$python" benchmarks/collect.py "$folder" "$results/$1"
}
both() {
    wanda "$@"
    "$python" test_scenarios/TS1_02_coverage_pruning.py --checkpoints-dir "$folder" "${options[@]}" "${@:2}"
    "$python" test_scenarios/TS1_04_compare_methods.py --checkpoints-dir "$folder"
    "$python" benchmarks/collect.py "$folder" "$results/$1"
}
controls() {
    "$python" benchmarks/controls.py --checkpoints-dir "checkpoints/$results/$1"
    "$python" benchmarks/collect.py "checkpoints/$results/$1" "$results/$1"
}

both minus20
both minus50 --ratio 0.5
controls minus20
controls minus50
both accept-drop --ratio auto --accept-drop 1
both speedup --speedup 1.5
both minus20-seed1 --seed 1
both minus20-seed2 --seed 2
for weight in 0.5 1.0; do
    wanda "minus20-distil$weight" --distil "$weight"
    wanda "minus50-distil$weight" --ratio 0.5 --distil "$weight"
done
wanda minus20-lr0.0003 --lr 0.0003
[ $# -eq 1 ] || exit 0
"$python" test_scenarios/TS1_05_sweep_ratios.py --checkpoints-dir "checkpoints/$results/minus20" --repair-batches 24
"$python" benchmarks/collect.py "checkpoints/$results/minus20" "$results/minus20"
