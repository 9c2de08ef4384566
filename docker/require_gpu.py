"""Ends with an error if there is no GPU: a worker for runs on a GPU would take them, and be a hundred times slower."""

import sys

import torch

if not torch.cuda.is_available():
    sys.exit(
        "softlabel: this worker is for runs on a GPU, and it sees none\n"
        "  expected:    an NVIDIA GPU that this container may use, with its driver and the NVIDIA container toolkit\n"
        f"  found:       torch {torch.__version__}, no CUDA device\n"
        "  what to do:  run nvidia-smi on the machine and in the container, and check GPU in .env; without a GPU, use\n"
        "               the image cpu-worker (COMPOSE_PROFILES=no-gpu)"
    )
