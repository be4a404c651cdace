#!/usr/bin/env bash
# Everything benchmarks/gpu.sh needs on a machine without network that has torch, torchvision, pytorch-lightning,
# torchmetrics, pytest and pytest-xdist: wheels and image sets, in benchmarks/inputs. Then copy the repository there.
#
#   LIGHTNING_LOCALITY_DATA=DATA bash benchmarks/pack_for_gpu.sh [PYTHON_VERSION]     # 3.12 without it
#
# TRAIN and TEST are the numbers of CIFAR-10's images; 7,500 and 5,500 keep the whole under 64 MiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
rm -rf benchmarks/inputs/wheels
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${1:-3.12}" --implementation cp \
  "${platforms[@]}" -d benchmarks/inputs/wheels \
  'pandas>=3.1' 'seaborn>=0.13.2' 'joblib>=1.4' 'filelock>=3.12' 'lazy_loader>=0.4' 'jsonargparse>=4.39,<5' docstring_parser \
  typeshed_client 'submitit>=1.5' 'tensorly>=0.9' 'rich>=13'
if [ -n "${LIGHTNING_LOCALITY_DATA:-}" ]; then
  "$python" benchmarks/pack_images.py --root "$LIGHTNING_LOCALITY_DATA" --out benchmarks/inputs/cifar10.npz \
    --train "${TRAIN:-7500}" --test "${TEST:-5500}"
fi
du -sh benchmarks/inputs
