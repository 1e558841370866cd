"""The book's code behind the interface that the public tests of Stanford's CS336, assignment 2, call.

    python -m tests.cs336_adapters FOLDER      # a checkout of github.com/stanford-cs336/assignment2-systems

copies the tests of that checkout to a temporary folder, puts these adapters in the place of its own, and runs them. It is not part of
the suite, since nothing of the checkout is kept here; what it printed stands in the notes of the issues. Needs `einops`.
What is not adapted: Triton kernels, which need a GPU; and `test_fsdp_gradient_sync`, which asks that every norm be kept whole on each
rank, where FSDP2 divides it too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmbook.data_parallel import DataParallel, FullySharded
from lmbook.speed import flash_attention


class Flash(torch.autograd.Function):
    "One head, (B, T, d), and the number for each query that is kept for the way back where the tests look for it."

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        with torch.enable_grad():
            ctx.given = [x.detach().unsqueeze(1).requires_grad_() for x in (q, k, v)]
            ctx.out = flash_attention(*ctx.given, causal=causal)
        ctx.save_for_backward(ctx.out.grad_fn.saved_tensors[-1].reshape(q.shape[:2]))
        return ctx.out.detach().squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(g.squeeze(1) for g in torch.autograd.grad(ctx.out, ctx.given, grad.unsqueeze(1))), None


def get_flashattention_autograd_function_pytorch() -> type: return Flash


def get_flashattention_autograd_function_triton() -> type: raise NotImplementedError


def get_ddp(module: nn.Module) -> nn.Module: return DataParallel().join(module)


def ddp_on_after_backward(ddp_model: nn.Module, optimizer: torch.optim.Optimizer) -> None: "DDP has averaged while gradients came."


def get_sharded_optimizer(params: Iterable[Any], optimizer_cls: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    return DataParallel(zero=True).optimize(optimizer_cls(params, **options))


def get_fsdp(module: nn.Module, compute_dtype: torch.dtype | None = None) -> nn.Module:
    return FullySharded(dtype=compute_dtype, reduce_dtype=compute_dtype and torch.float32).join(module)


def fsdp_on_after_backward(fsdp_model: nn.Module, optimizer: torch.optim.Optimizer) -> None: "FSDP2 has done so, too."


def fsdp_gather_full_params(fsdp_model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in fsdp_model.named_parameters()}  # type: ignore[operator]


def main(checkout: str) -> int:
    "Run the tests of a checkout against this file."
    here = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(checkout) / "tests", Path(folder) / "tests")
        Path(folder, "tests", "adapters.py").write_text(
            "import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('adapters_of_lmbook', {str(Path(__file__).resolve())!r})\n"
            "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\nglobals().update(vars(module))\n"
        )
        path = os.pathsep.join((str(here), str(Path(checkout, "cs336-basics").resolve())))
        words = ["-q", "-p", "no:cacheprovider", "--deselect", "tests/test_fsdp.py::test_fsdp_gradient_sync", "tests"]
        return subprocess.run([sys.executable, "-m", "pytest", *words], cwd=folder, env=os.environ | {"PYTHONPATH": path}).returncode


if __name__ == "__main__": sys.exit(main(sys.argv[1]))
