#!/usr/bin/env bash
# Everything benchmarks/gpu.sh needs on a machine without network that has torch, torchvision, pytorch-lightning,
# torchmetrics, pytest and pytest-xdist: wheels and image sets, in benchmarks/inputs. Then copy the repository there.
#
#   LIGHTNING_LOCALITY_DATA=DATA bash benchmarks/pack_for_gpu.sh [PYTHON_VERSION]     # 3.12 without it
#   HAS="scipy matplotlib" bash benchmarks/pack_for_gpu.sh     # what pip list names there, and is left out
#
# 73 MB of wheels without HAS. TRAIN and TEST are the numbers of CIFAR-10's images, 2.9 kB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
wheels=benchmarks/inputs/wheels
# and what those bring
has=" torch torchvision pytorch-lightning torchmetrics lightning-utilities filelock fsspec numpy packaging pillow pyyaml
typing-extensions ${HAS:-} "
has=" ${has//[$'\n ']/  } "
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
mapfile -t needs < <("$python" - "$has" <<'PYTHON'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for need in project["dependencies"] + project["optional-dependencies"]["digits"]:
    if re.split(r"[^\w-]", need)[0].replace("_", "-") not in sys.argv[1].split():
        print(need)
PYTHON
)
rm -rf "$wheels"
"$python" -m pip download -q --only-binary=:all: --python-version "${1:-3.12}" --implementation cp "${platforms[@]}" -d "$wheels" \
  "${needs[@]}"
for wheel in "$wheels"/*.whl; do
  name="$(basename "${wheel%%-*}" | tr '[:upper:]_.' '[:lower:]--')"
  [[ "$has" == *" $name "* ]] && rm "$wheel"
done
if [ -n "${LIGHTNING_LOCALITY_DATA:-}" ]; then
  "$python" benchmarks/pack_images.py --root "$LIGHTNING_LOCALITY_DATA" --out benchmarks/inputs/cifar10.npz \
    --train "${TRAIN:-7500}" --test "${TEST:-5500}"
fi
du -sh benchmarks/inputs
