"""Side-by-side measurements: `python -m benchmarks` lists them, `python -m benchmarks.NAME --help` says what each can do."""

import os
import sys

# Python runs this before the program. numpy, PyTorch, tqdm and others read it when they are imported: one thread, no progress bars, and
# no chatter. Who imports a benchmark from elsewhere (a test) keeps the environment as it is: only with `python -m` is argv[0] "-m" here.
if sys.argv[0] == "-m":
    for name, value in (("OMP_NUM_THREADS", "1"), ("RAYON_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("TQDM_DISABLE", "1"),
                        ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
