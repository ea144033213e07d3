#!/usr/bin/env bash
# Teach the toy SD3 a robot: install what is missing, and run both scripts; the second says where the picture is.
# A second start installs nothing and goes on where the first one ended. Flags are handed on to the trainer.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/bin/activate ] || python3 -m venv .venv
    . .venv/bin/activate
fi
command -v uv > /dev/null || pip install uv
# uv chooses torch's build by the GPU's driver, from an index that a network with a mirror of PyPI may not reach.
uv pip install --torch-backend=auto -r requirements.txt || {
    echo "uv failed: installing with pip, which takes minutes"
    pip install --quiet -r requirements.txt
}

python compute_embeddings.py @tests/toy/embeddings.txt
python train_dreambooth_sd3_lora_miniature.py @tests/toy/train.txt --resume_from_checkpoint latest "$@"
