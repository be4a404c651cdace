#!/usr/bin/env bash
# Run the tests in a fresh environment with the oldest or the newest versions that pyproject.toml admits:
#
#   .ci/versions.sh oldest|newest|oldest-but-torch [PYTHON [OPTION_OF_PYTEST ...]]
#
# PYTHON is the interpreter (default: python3). uv resolves the versions: oldest are the lower bounds of what
# pyproject.toml names itself, with the newest of what these need. UV_TORCH_BACKEND=cpu takes torch from PyTorch's own
# index, which is a tenth of the download; without it torch comes from PyPI with CUDA (3 GB, 7 GB on disk).
#
# oldest-but-torch takes torch and torchvision from the environment of PYTHON: half a minute instead of 3 GB, for
# .ci/run. It does not tell whether the oldest torch works, nor the parts that the given tests leave out.
#
# What has been run, on two cores. Oldest, Python 3.11.7 (torch 2.11.0, Lightning 2.6.1, numpy 2.0.2): 3,594 passed; 12
# failures led to the bounds of jsonargparse and pillow and to changes of three tests, after which their files passed
# (462 tests).
# Newest, Python 3.13.0 (torch 2.15.0, Triton 3.9, numpy 2.5.5): 3,607 passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: .ci/versions.sh oldest|newest|oldest-but-torch [PYTHON [OPTION_OF_PYTEST ...]]"
which="${1:?$usage}"
python="${2:-python3}"
environment="$(mktemp -d)"
trap 'rm -rf "$environment"' EXIT
"$python" -m venv "$environment"
"$environment/bin/python" -m pip install -q uv
export VIRTUAL_ENV="$environment"
# compiled as pip does it: warnings of the compiler would fail tests
install=("$environment/bin/uv" pip install -q --compile-bytecode)
case "$which" in
  oldest) "${install[@]}" --resolution lowest-direct -e '.[dev]' ;;
  newest) "${install[@]}" -e '.[dev]' ;;
  oldest-but-torch)
    "$environment/bin/uv" pip compile -q --no-annotate --resolution lowest-direct --extra dev pyproject.toml |
      grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' > "$environment/pins.txt"
    "${install[@]}" --no-deps -r "$environment/pins.txt"
    # at the end of the path
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$python" -c "$purelib" > "$("$environment/bin/python" -c "$purelib")/torch.pth"
    export PYTHONPATH="$PWD"
    ;;
  *) echo "$usage" >&2; exit 2 ;;
esac
"$environment/bin/python" -VV
"$environment/bin/uv" pip list
"$environment/bin/python" -m pytest -q "${@:3}"
