#!/usr/bin/env bash
# What needs a GPU, most valuable first. Does as much as fits into a time slot and continues where it stopped:
#
#   bash benchmarks/gpu.sh             # 9 minutes of it; call again until it says that all is done
#   bash benchmarks/gpu.sh --list      # what is done and what is pending
#   SECONDS_PER_CALL=3600 bash benchmarks/gpu.sh
#
# A finished item leaves benchmarks/results/gpu/ITEM.json (and .csv for a training run, a figure for rank_speed), a training
# run that is not finished ITEM.unfinished.csv, its curves so far: commit those. Runs and their checkpoints live in
# runs/gpu; another machine goes on from them if it gets that folder. One run at a time: a captured step keeps the GPU
# busy to 97 %, so that two would only take turns; Pathfinder's pictures are drawn meanwhile.
#
# For a machine that cannot reach a package index, and for the image sets, pack both first (benchmarks/pack_for_gpu.sh).
# Images come from $LIGHTNING_LOCALITY_DATA or benchmarks/inputs/{cifar10,mnist,fashion_mnist}.npz; items whose images are
# in neither are left out. ONLY=REGEX does the items whose names match. DEVICE=cpu TOY=1 runs at toy size, to test this.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
device="${DEVICE:-cuda}"
slot="${SECONDS_PER_CALL:-530}"
results="${RESULTS:-benchmarks/results/gpu}"
runs="${RUNS:-runs/gpu}"
packed="benchmarks/inputs/cifar10.npz"
mkdir -p "$results" "$runs"
if [ "${1:-}" != --list ] && [ -d benchmarks/inputs/wheels ] &&
  ! "$python" -c "import jsonargparse, matplotlib, pandas, scipy, seaborn, submitit, tensorly" 2>/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$runs/site" benchmarks/inputs/wheels/*.whl || exit 1
  export PYTHONPATH="$PWD/$runs/site:$PWD"
fi

toy_run=() toy_test=() toy_step=() toy_speed=() toy_ranks=() toy_binary=()
if [ "${TOY:-0}" = 1 ]; then
  toy_run=(--trainer.max_epochs=2 --data.train=8 --data.validation=4 --data.test=4 --data.batch_size=4
    --model.network=SmallResNet)
  toy_test=(tests/test_networks.py)
  toy_step=(--batch 2 --repeats 1)
  toy_speed=(--toy --steps-check 20 --seconds 0.01 --repeats 2)
  toy_ranks=(--toy --methods qr)
  # 8x8 digits, of which 60
  toy_binary=(--data.train=60 --data.test=20 --model.batch_size=20 --model.max_iterations=24 --model.steps=6
    --model.measure_every=6 --data.epoch_length=2)
fi
gpu=(--trainer.accelerator=gpu --trainer.devices=1)
[ "$device" = cpu ] && gpu=(--trainer.accelerator=cpu)
overlay=(--config configs/overlays/gpu.yaml --model.channels_last=true)
[ "$device" = cpu ] && overlay=()

pairs=(--config configs/same_class.yaml)
if [ "${TOY:-0}" = 1 ]; then
  pairs+=(--data.source=digits)
elif [ -f "$packed" ]; then
  pairs+=("--data.source=file:$packed")
elif [ -n "${LIGHTNING_LOCALITY_DATA:-}" ]; then
  pairs+=("--data.root=$LIGHTNING_LOCALITY_DATA" --data.download=false)
else
  pairs=()
fi

# what a run may train for, with a reserve for start, last epoch, test and files
slice() {
  local rest=$(($(left) - ${RESERVE:-60}))
  if [ "$rest" -ge 1 ]; then echo "$rest"; else echo 0.001; fi
}
left() { echo $((slot - SECONDS)); }

# once ITEM COMMAND...: run it unless its result is there; it has to write the result itself
once() {
  local item="$1"; shift
  local result="$results/$item.json"
  [[ "$item" =~ ${ONLY:-.} ]] || return 0
  if [ -s "$result" ]; then echo "done     $item"; return; fi
  if [ "$list" = 1 ] || [ "$(left)" -lt 60 ]; then echo "pending  $item"; pending=1; return; fi
  echo "running  $item"
  RESULT="$result" "$@" || { echo "FAILED   $item (status $?)"; pending=1; }
}

# numerics on the device, 12 processes, under a minute; each failure is written down as it happens
tests() {
  local log="$runs/tests.log" status=0
  rm -f "$runs/failed.txt"
  FAILED_TESTS="$runs/failed.txt" timeout "$(left)" "$python" -m pytest -q --device "$device" -m "cuda and not slow" \
    -n "${PROCESSES:-12}" --dist worksteal --durations=15 -p no:cacheprovider -p no:benchmark "${toy_test[@]}" >"$log" 2>&1 || status=$?
  tail -n 35 "$log"
  "$python" - "$RESULT" "$status" "$log" "$runs/failed.txt" <<'PYTHON'
import json, pathlib, sys, torch
lines = open(sys.argv[3]).read().splitlines()
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
log = pathlib.Path(sys.argv[4])
failed = log.read_text().splitlines() if log.exists() else []
content = {"status": int(sys.argv[2]), "summary": lines[-1], "failed": failed, "device": name, "torch": torch.__version__}
open(sys.argv[1], "w").write(json.dumps(content, indent=2) + "\n")
PYTHON
}

# plain, published way, ours, captured, one-sided: both sizes in both types, in one file
steps() {
  local shapes=("1 150 150" "3 224 224") shape
  [ "${TOY:-0}" = 1 ] && shapes=("1 32 32")
  rm -f "$RESULT.partial"
  for options in "--dtype bfloat16 --channels-last" "--dtype float32"; do
    for shape in "${shapes[@]}"; do
      # shellcheck disable=SC2086
      timeout "$(left)" "$python" benchmarks/regularized_step.py --device "$device" --no-check --repeats 5 \
        --out "$RESULT.partial" --append --shape $shape $options "${toy_step[@]}" || return 1
    done
  done
  mv "$RESULT.partial" "$RESULT"
}

# what was written before the time was up is kept, but not taken for the result
unfinished() {
  [ -s "$RESULT" ] && mv "$RESULT" "$RESULT.partial"
  return 1
}

speed() {
  timeout "$(left)" "$python" benchmarks/recovery_speed.py --device "$device" --out "$RESULT" --seconds 1 "$@" "${toy_speed[@]}" ||
    unfinished
}

ranks() {
  timeout "$(left)" "$python" benchmarks/rank_speed.py --device "$device" --out "$RESULT" "$@" "${toy_ranks[@]}" ||
    unfinished
}

# the rules that need no knowledge of the task: RULE SIZE; default is the term of configs/overlays/far.yaml
rule() {
  case "$1" in
    default) echo "--config configs/overlays/far.yaml" ;;
    content) echo "--model.penalty.donor=permutation --model.penalty.patches=ContentPatches --model.penalty.patches.size=$2" ;;
    far) echo "--model.penalty.donor=permutation --model.penalty.patches=FarField --model.penalty.patches.size=$2" ;;
  esac
}

# train ITEM OPTIONS...: one run, continued over as many calls as it takes
train() {
  local item="$1"; shift
  local folder="$runs/$item" resume=()
  [ -f "$folder/last.ckpt" ] && resume=(--ckpt_path "$folder/last.ckpt")
  timeout "$(left)" "$python" -m lightning_locality fit "$@" "${overlay[@]}" --run_dir "$folder" "${resume[@]}" "${toy_run[@]}" \
    --trainer.callbacks+=StopAfter "--trainer.callbacks.seconds=$(slice)"
  local status=$?
  # also of a run that was killed
  [ -s "$folder/metrics.csv" ] && cp "$folder/metrics.csv" "$results/$item.unfinished.csv"
  [ "$status" = 0 ] || return "$status"
  [ -s "$folder/summary.json" ] || { echo "out of time, to be continued: $item"; pending=1; return 0; }
  mv "$results/$item.unfinished.csv" "$results/$item.csv" && cp "$folder/summary.json" "$RESULT"
}

pathfinder() { # LENGTH WEIGHT SEED [RULE]
  local item="pathfinder_length_$1_weight_$2_seed_$3${4:+_$4}" term=()
  [ "$2" != 0 ] && term=(--config configs/overlays/anti_locality_pathfinder.yaml $(rule "${4:-}" 2) "--model.weight=$2")
  once "$item" train "$item" --config configs/pathfinder.yaml "${term[@]}" "--data.path_length=$1" \
    "--seed_everything=$3" "--data.seed=$3" "--data.root=$runs/data"
}

# 14 dashes, new pictures in every epoch, about nine minutes each
pathfinder_long() { # WEIGHT [RULE]
  local item="pathfinder_long_weight_$1${2:+_$2}" term=() toy=("${toy_run[@]/#--data.train=/--data.epoch_size=}")
  local toy_run=("${toy[@]}")
  [ "$1" != 0 ] && term=(--config configs/overlays/anti_locality_pathfinder.yaml $(rule "${2:-}" 2) "--model.weight=$1")
  once "$item" train "$item" --config configs/pathfinder_long.yaml "${term[@]}" "--data.root=$runs/data"
}

same_class() { # DISTANCE WEIGHT SEED [RULE]
  [ "${#pairs[@]}" = 0 ] && return
  local item="same_class_distance_$1_weight_$2_seed_$3${4:+_$4}" term=()
  [ "$2" != 0 ] && term=(--config configs/overlays/anti_locality.yaml $(rule "${4:-}" 32) "--model.weight=$2")
  once "$item" train "$item" "${pairs[@]}" "${term[@]}" "--data.distance=$1" \
    "--seed_everything=$3" "--data.seed=$3"
}

# rank of binarised images (Razin, Maman and Cohen, 2021): error against the number of components
binary_images() { # SOURCE VARIANT RANK
  local item="binary_$1_$2_rank_$3" overlay=("${gpu[@]}") toy_run=("${toy_binary[@]}") images=()
  if [ "${TOY:-0}" = 1 ]; then
    images=(--data.source=digits --model.model.order=64)
  elif [ -f "benchmarks/inputs/$1.npz" ]; then
    images=("--data.source=file:benchmarks/inputs/$1.npz")
  elif [ -n "${LIGHTNING_LOCALITY_DATA:-}" ]; then
    images=("--data.source=$1" "--data.root=$LIGHTNING_LOCALITY_DATA" --data.download=false)
  else
    return
  fi
  once "$item" train "$item" --config configs/recovery/binary_images.yaml "${images[@]}" "--data.variant=$2" \
    "--model.model.rank=$3"
}

list=0; [ "${1:-}" = --list ] && list=1
pending=0
if [ "$list" = 0 ] && [ "${TOY:-0}" = 0 ] && [[ pathfinder_length_9_weight_9_seed_0 =~ ${ONLY:-.} ]]; then
  # while the tests run
  "$python" -c "from lightning_locality import Pathfinder; Pathfinder(path_length=9, root='$runs/data', workers=None).prepare_data()" \
    >"$runs/drawing.log" 2>&1 &
fi
once cuda_tests tests
once steps_resnet18 steps
pathfinder 9 9 0
pathfinder 9 0 0
same_class 160 1 0
same_class 160 0 0
for weight in 1 9; do pathfinder 9 "$weight" 0 default; done
pathfinder 14 1 0 default
pathfinder_long 9
pathfinder_long 0
pathfinder_long 1 default
for distance in 160 0; do same_class "$distance" 1 0 default; done
for name in content far; do
  pathfinder 9 3 0 "$name"
  same_class 160 1 0 "$name"
done
# ranks on the GPU beside one core, and of a ResNet-18 with images of 224 pixels
once rank_speed ranks --tables factored --orders 16 256 1024 4096 --dense-orders 8 10 --repeats 3
once rank_networks ranks --tables networks
once recovery_speed speed --tables cases
[ "$device" = cpu ] || once recovery_sizes speed --tables sizes --repeats 3 --threads "$(( $(nproc) < 8 ? $(nproc) : 8 ))"
for length in 7 5 3; do for weight in 9 0; do pathfinder "$length" "$weight" 0; done; done
for distance in 120 80 40 0; do for weight in 1 0; do same_class "$distance" "$weight" 0; done; done
for length in 9 7 5 3; do pathfinder "$length" 3 0; done
for distance in 160 120 80 40 0; do same_class "$distance" 0.1 0; done
for seed in 1 2; do
  for weight in 9 0; do pathfinder 9 "$weight" "$seed"; done
  for weight in 1 0; do same_class 160 "$weight" "$seed"; done
done
# the ranks of which the published errors are known come first
for rank in 1 5 10 15 2 3 4 6 7 8 9 11 12 13 14; do
  for source in mnist fashion_mnist; do
    for variant in original random_images random_labels; do binary_images "$source" "$variant" "$rank"; done
  done
done
[ "$pending" = 0 ] && echo "all done" || echo "call again to continue"
