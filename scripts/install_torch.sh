#!/usr/bin/env bash
# Install torch into the environment of the given interpreter: the CUDA build where an NVIDIA GPU is visible,
# the CPU build elsewhere (the default build for Linux carries gigabytes of CUDA libraries).
#
# Usage: scripts/install_torch.sh path/to/python
set -euo pipefail

python=${1:?usage: install_torch.sh path/to/python}
version=2.13.0

if "$python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$version')" \
    2>/dev/null; then
    echo "torch $version is already installed"
elif nvidia-smi -L >/dev/null 2>&1; then
    "$python" -m pip install "torch==$version"
elif "$python" -m pip install "torch==$version+cpu"; then
    :
else
    echo "No torch $version+cpu among pip's packages: asking uv, which knows where PyTorch keeps its CPU builds."
    "$python" -m pip install uv
    "$python" -m uv pip install --python "$python" --torch-backend=cpu "torch==$version"
fi
