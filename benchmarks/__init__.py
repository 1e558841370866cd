"""Side-by-side measurements: `python -m benchmarks` lists them, `python -m benchmarks.NAME --help` says what each can do."""

import os

# Before numpy, PyTorch, tqdm and the others are imported, which read it then: one thread, no progress bars, no chatter.
for name, value in (("OMP_NUM_THREADS", "1"), ("RAYON_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("TQDM_DISABLE", "1"),
                    ("TRANSFORMERS_VERBOSITY", "error")):
    os.environ.setdefault(name, value)
