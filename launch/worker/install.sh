#!/usr/bin/env bash
# On a worker: install what lies in source/ into .venv, unless just that is there already.
# uv brings the Python that TPU images lack (theirs is 3.10) and writes nothing outside $HOME.
set -euo pipefail
extra=$1
cd "$HOME/pythia_jax"
digest=$(sha256sum source.tar.gz | cut -d ' ' -f 1)
if [[ -e .venv/$digest ]]; then
  exit 0
fi
export PATH="$HOME/.local/bin:$PATH"
if ! command -v uv > /dev/null; then
  curl -LsSf https://astral.sh/uv/install.sh | sh
fi
rm -rf .venv
uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python \
  --constraint source/constraints.txt "./source[$extra]"
touch ".venv/$digest"
