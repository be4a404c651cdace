#!/usr/bin/env bash
# Run the tests in a fresh environment with the oldest or the newest versions that pyproject.toml admits:
#
#   .ci/versions.sh oldest|newest [PYTHON [OPTION_OF_PYTEST ...]]
#
# PYTHON is the interpreter (default: python3). uv resolves the versions: oldest are the lower bounds of what
# pyproject.toml names itself, with the newest of what these need. UV_TORCH_BACKEND=cpu takes torch from PyTorch's own
# index, which is a tenth of the download; without it torch comes from PyPI with CUDA (3 GB, 7 GB on disk).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  oldest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *) echo "usage: .ci/versions.sh oldest|newest [PYTHON [OPTION_OF_PYTEST ...]]" >&2; exit 2 ;;
esac
python="${2:-python3}"
environment="$(mktemp -d)"
trap 'rm -rf "$environment"' EXIT
"$python" -m venv "$environment"
"$environment/bin/python" -m pip install -q uv
VIRTUAL_ENV="$environment" "$environment/bin/uv" pip install -q --compile-bytecode --resolution "$resolution" -e '.[dev]'
"$environment/bin/python" -VV
VIRTUAL_ENV="$environment" "$environment/bin/uv" pip list
"$environment/bin/python" -m pytest -q "${@:3}"
