#!/usr/bin/env bash
# Creates .venv with everything that hapo_async needs on a machine without a GPU. Safe to run again: it does nothing when
# the installed set is the one that requirements/*.txt and pyproject.toml name.
#   PYTHON=python3.11 tools/install.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH_VERSION=2.13.0
VENV=.venv
STAMP=$VENV/.installed
WANTED=$(cat requirements/cpu.txt requirements/test.txt pyproject.toml tools/install.sh | sha256sum | cut -d' ' -f1)

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then
    exit 0
fi
"$PYTHON" -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), f"Python 3.11 or 3.12 is needed, this is {sys.version}"'

echo "installing into $VENV (about 1 GB, a few minutes the first time)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP="$VENV/bin/python -m pip --disable-pip-version-check -q"
$PIP install --upgrade pip "setuptools>=77,<81" wheel ninja py-cpuinfo

# The CPU build of torch: from the configured index where it has one, else from PyTorch's own.
if ! $PIP install "torch==$TORCH_VERSION+cpu" 2>/dev/null; then
    echo "the configured index has no CPU build of torch $TORCH_VERSION; taking PyTorch's CPU index"
    $PIP install "torch==$TORCH_VERSION" --index-url https://download.pytorch.org/whl/cpu
fi
$PIP install --no-deps -r requirements/cpu.txt
# DeepSpeed's source distribution imports torch while it builds, hence no isolation; its operators are never compiled here.
DS_BUILD_OPS=0 $PIP install --no-deps --no-build-isolation deepspeed==0.19.8
# What only the tests compare with, beside the environment rather than in it (requirements/test.txt says why).
rm -rf "$VENV/peers"
$PIP install --no-deps --target "$VENV/peers" -r requirements/test.txt
$PIP install --no-deps --no-build-isolation -e .
echo "$WANTED" > "$STAMP"
