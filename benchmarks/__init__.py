"""Side-by-side measurements: `python -m benchmarks` lists them, `python -m benchmarks.NAME --help` says what each can do."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy and PyTorch read it when they are imported
