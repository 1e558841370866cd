"""Other processors, as far as one machine can play them.

The sum of a million floats depends on the order in which they are added, and that order on the processor: how many it adds at once, which
kernels a library has for it, how many threads share the work. A trained model carries such a last bit into its first digit. The
libraries below numpy and torch read from the environment which instructions they may use, so one machine can compute as several would.

`MEASURED` are the arithmetics from which a number's tolerance is learned (tools/spread.py), `ELSEWHERE` others, which nothing is learned
from: the book's outputs must hold there too (`make elsewhere`). `python -m tools.arithmetics` shows what each changes on this machine.
On a processor that is not an x86, only the threads make a difference. What this processor cannot do is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

# The environment of every kernel, when outputs are stored and when they are compared. Not needed by readers: it makes runs alike.
KERNEL_ENV = {
    "OMP_NUM_THREADS": "1",  # two notebooks run side by side on two cores; the number of threads also changes float sums
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # the order in which a set prints
    "TQDM_DISABLE": "1",  # a progress bar is for people, not for a stored output
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",  # the book needs no network, so it must not find one by chance
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "default",
    "COLUMNS": "120",
}


@dataclass(frozen=True)
class Arithmetic:
    "A way to compute: the instructions that the libraries may use, and the number of threads."

    name: str
    settings: dict[str, str] = field(default_factory=dict)  # environment variables
    threads: int = 1
    numpy: tuple[str, ...] = ()  # numpy's own kernels that are switched off: names of features, as far as this processor has them
    needs: tuple[str, ...] = ()  # any of these features; a library that is told to use what is not there ends with an illegal instruction

    @property
    def runs_here(self) -> bool:
        "Whether this processor has the instructions."
        return not self.needs or any(f in self.needs for f in numpy_features())

    def env(self) -> dict[str, str]:
        "The environment of a kernel that computes so."
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        off = [f for f in numpy_features() if f.startswith(self.numpy)] if self.numpy else []
        if self.threads > 1:
            threads["OMP_WAIT_POLICY"] = "PASSIVE"  # beside other work, threads that wait by spinning take each other's time
        return KERNEL_ENV | threads | self.settings | ({"NPY_DISABLE_CPU_FEATURES": " ".join(off)} if off else {})


def numpy_features() -> list[str]:
    "The sets of instructions for which numpy has kernels of its own and which this processor has; naming another one is a warning."
    import numpy as np

    return np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])


AVX2 = ("X86_V3", "AVX2")  # of some ten years ago: its names in numpy's releases
NEWEST = ("X86_V4", "AVX512")  # of today

AS_STORED = Arithmetic("as stored")
MEASURED = [
    Arithmetic(
        "oldest",
        {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Prescott"},
        numpy=(*AVX2, "FMA3", *NEWEST),
    ),
    Arithmetic(
        "AVX2",
        {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"},
        needs=AVX2,
    ),
    Arithmetic("two threads", {"MKL_CBWR": "COMPATIBLE"}, threads=2),
]
ELSEWHERE = [
    Arithmetic(
        "AVX", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX", "OPENBLAS_CORETYPE": "Sandybridge"}, numpy=NEWEST
    ),
    Arithmetic("mixed", {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, needs=AVX2),
    Arithmetic("three threads", {"MKL_CBWR": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Nehalem"}, threads=3),
]
ALL = {a.name: a for a in [AS_STORED, *MEASURED, *ELSEWHERE]}


def probe() -> dict[str, str]:
    "What some operations give, as digests: equal digests are equal to the last bit."
    import numpy as np
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    a, b, q = torch.randn(130, 257), torch.randn(257, 190), torch.randn(2, 4, 64, 16)
    x = np.random.default_rng(0).standard_normal((130, 257))
    results = {
        "matrix product": a @ b,
        "matrix times vector": a @ b[:, 0],
        "sum": a.sum(),
        "exp, tanh": torch.stack([a.exp(), a.tanh()]),
        "softmax": a.softmax(-1),
        "layer norm": F.layer_norm(a, (257,)),
        "GELU": F.gelu(a),
        "attention": F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "LSTM": torch.nn.LSTM(20, 30)(torch.randn(11, 3, 20))[0],
        "convolution": F.conv1d(torch.randn(2, 8, 40), torch.randn(16, 8, 3)),
        "bfloat16": (a.bfloat16() @ b.bfloat16()).float(),
        "SVD": torch.linalg.svdvals(a),
        "numpy's product": x @ x.T,
        "numpy's SVD": np.linalg.svd(x)[1],
        "numpy's exp, log": np.stack([np.exp(x), np.log(np.abs(x))]),
    }
    return {
        name: hashlib.sha256(np.asarray(r.detach() if hasattr(r, "detach") else r).tobytes()).hexdigest() for name, r in results.items()
    }


def probed(arithmetic: Arithmetic) -> dict[str, str]:
    "`probe()` in a process that computes so."
    code = "import json, tools.arithmetics as t; print(json.dumps(t.probe()))"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | arithmetic.env(), capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    "Say what each arithmetic changes on this machine."
    stored = probed(AS_STORED)
    for group, arithmetics in {"measured": MEASURED, "elsewhere": ELSEWHERE}.items():
        for a in arithmetics:
            if not a.runs_here: print(f"{group:9}  {a.name:13}  does not run on this processor"); continue
            changed = [name for name, digest in probed(a).items() if digest != stored[name]]
            print(f"{group:9}  {a.name:13}  {', '.join(changed) or 'changes nothing here'}")


if __name__ == "__main__": main()
