"""One off-policy job in a process of its own, for test_memory.py: `python memory_probe.py FOLDER STAGE TRAINING`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from prefarena.config import DPO, Optimisation
from prefarena.training.jobs import OffPolicyJob
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, stage, training = Path(sys.argv[1]), sys.argv[2], Optimisation.model_validate_json(sys.argv[3])
    method, pairs = DPO(training=training), str(folder / "pairs")
    worker = Worker(stage)
    run_job(OffPolicyJob(stage, "probe", str(folder / "model"), 0, method, pairs, max_length=2048), worker)
    print(worker.first_memory_mib)
