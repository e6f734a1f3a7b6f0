# SPDX-License-Identifier: MIT
"""same_output.py PROGRAM PROGRAM: both print the same, and something."""
import subprocess
import sys

outputs = [subprocess.run(program, capture_output=True, text=True, check=True).stdout for program in sys.argv[1:]]
if not outputs[0] or len(set(outputs)) != 1:
    sys.exit('\n\n'.join(outputs))
