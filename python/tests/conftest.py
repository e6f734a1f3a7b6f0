# SPDX-License-Identifier: MIT
import os
import pathlib

# Before colt5 is imported. What is compiled stays there for the next run.
os.environ.setdefault('COLT5_CACHE', str(pathlib.Path(__file__).resolve().parents[2] / 'build' / 'python-cache'))
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import torch

torch.set_num_threads(2)
