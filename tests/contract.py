"""Every model of the book, what each consumer does with it, and where the two do not fit: data for `test_contract`.

A model that is new goes into MODELS; a consumer that is new into REASONS and `consume`. What the library does not keep yet stands in BUGS:
each entry is a cell that must fail (xfail, strict), so that whoever repairs it has to take it out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmbook.alignment import AttentionDecoder
from lmbook.batches import IGNORE, Batch, Batches, Examples
from lmbook.bilstm import TaggedSentences, Tagger, TaggerConfig, tag_loss
from lmbook.checkpoints import load_state, load_weights, save_checkpoint, save_weights
from lmbook.convolutions import ConvConfig, ConvLM, PooledEncoder
from lmbook.deep_networks import NeuralNGram, NeuralNGramConfig
from lmbook.experts import MoEConfig, with_experts
from lmbook.generation import SamplingConfig, beam_search, generate, stream
from lmbook.language_models import NGram, NGramConfig
from lmbook.objectives import PrefixTransformer
from lmbook.perplexity import evaluate
from lmbook.pretrained import load_pretrained, save_pretrained
from lmbook.recurrent_lm import CarriedState, RecurrentLM, RecurrentLMConfig
from lmbook.seq2seq import Seq2Seq, Seq2SeqConfig, greedy_accuracy
from lmbook.speculation import speculative, unmask
from lmbook.tokenization import CharTokenizer
from lmbook.training import TrainConfig, Trainer, mean_loss, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig
from tests import models

V, TAGS, SOURCE = models.V, 5, 29  # of the vocabulary; of a tagger's answers; of an encoder's own vocabulary
BOS, EOS, MASK = 1, 2, 3
CONTEXT = models.SIZES["context_length"]
TOKENIZER = CharTokenizer("ab cdefghijklmnopqrstuvwxyz.,!?0123456789"[: V - 4])
GREEDY = SamplingConfig(max_new_tokens=5, temperature=0)
LONG = SamplingConfig(max_new_tokens=CONTEXT + 8, temperature=0)  # beyond the context of a Transformer


TRANSFORMERS = ("decoder", "encoder", "encoder-decoder", "experts")


def endless(config: SamplingConfig) -> SamplingConfig:
    "A text that goes on beyond <eos>."
    return replace(config, eos_id=-1)


@dataclass(frozen=True)
class Spec:
    "A model of the book, small."

    name: str
    family: str  # those of one family take part in the same
    build: Callable[[float], Any]  # of the dropout
    source_vocab: int = V  # of pairs
    tied: tuple[str, str] = ("", "")  # parameters that are one, where there are such
    layouts: tuple[str, ...] = ()  # that `save_pretrained` can write

    def make(self, dtype: torch.dtype = torch.float32, dropout: float = 0., seed: int = 0) -> Any:
        "With weights so large that every part matters."
        torch.default_generator.manual_seed(seed)  # of the CPU alone, which takes no time
        model = self.build(dropout)
        if not isinstance(model, nn.Module): return model
        loud = .3 if self.family not in TRANSFORMERS else .2
        with torch.no_grad():
            for p in model.parameters(): p.normal_(0, loud) if p.ndim > 1 else p.add_(torch.randn_like(p) * .2)
        return model.to(dtype).eval()

    def shared(self) -> Any:
        "One for all, for tests that change nothing of it."
        return _shared(self)

    @property
    def pairs(self) -> bool: return self.family in ("encoder-decoder", "seq2seq")

    @property
    def module(self) -> bool: return self.family != "table"


@cache
def _shared(spec: Spec) -> Any: return spec.make()


def _ngram(smoothing: Any) -> Callable[[float], NGram]:
    rng = np.random.default_rng(0)
    texts = [[BOS, *rng.integers(4, 12, 30), EOS] for _ in range(40)]
    model = NGram.fit(texts, V, NGramConfig(3, smoothing))
    return lambda dropout: model  # nobody changes it


def _recurrent(cell: Any, tie: bool, n_layer: int = 2) -> Spec:
    def build(p: float) -> RecurrentLM:
        more = {"dropout_words": p, "dropout_in": p, "dropout_out": p, "weight_drop": p, "dropout_hidden": p if n_layer > 1 else 0.}
        return RecurrentLM(RecurrentLMConfig(V, 16, 16 if n_layer == 1 else 20, n_layer, cell, tie, **more))

    return Spec(f"{cell}-{'tied' if tie else 'untied'}", "recurrent", build, tied=("out.weight", "embed.weight") if tie else ("", ""))


def _transformer(kind: Any, variant: str, *layouts: str, **changes: Any) -> Spec:
    fields: Any = {**models.SIZES, **models.VARIANTS[variant], **changes}

    def build(p: float) -> nn.Module: return Transformer(TransformerConfig(V, kind=kind, dropout=p, **fields))

    tied = fields.get("tie", True)
    name = f"{kind}-{variant}{''.join(f'-{key}' for key in changes if key == 'source_vocab')}"
    return Spec(
        name, kind, build, changes.get("source_vocab", V), ("out.weight", "embed.tokens.weight") if tied else ("", ""),
        ("lmbook", *layouts),
    )  # fmt: skip


def _experts(top_k: int) -> Spec:
    def build(p: float) -> nn.Module:
        config = TransformerConfig(V, dropout=p, **{**models.SIZES, **models.VARIANTS["llama"]})
        return with_experts(Transformer(config), MoEConfig(4, top_k))

    return Spec(f"experts-{top_k}", "experts", build, tied=("out.weight", "embed.tokens.weight"))


def _seq2seq(name: str, looks: bool = False, pools: bool = False, **fields: Any) -> Spec:
    def build(p: float) -> Seq2Seq:
        config = Seq2SeqConfig(SOURCE, V, 12, 16, dropout=p, **fields)
        return Seq2Seq(config, AttentionDecoder(config) if looks else None, PooledEncoder(config) if pools else None)

    return Spec(f"seq2seq-{name}", "seq2seq", build, SOURCE)


def _convolution(**fields: Any) -> Callable[[float], ConvLM]:
    return lambda p: ConvLM(V, ConvConfig(16, 3, 2, dropout=p, **fields))


MODELS = (
    Spec("ngram", "table", _ngram("modified_kneser_ney")),
    Spec("ngram-add_k", "table", _ngram("add_k")),
    Spec("neural-ngram", "plain", lambda p: NeuralNGram(NeuralNGramConfig(V, 3, 8, 16, dropout=p))),
    Spec("neural-ngram-direct", "plain", lambda p: NeuralNGram(NeuralNGramConfig(V, 2, 8, 16, direct=True, dropout=p))),
    Spec("conv", "plain", _convolution()),
    Spec("conv-gated", "plain", _convolution(dilation="doubling", gated=True)),
    *(_recurrent(cell, tie) for cell in ("lstm", "gru", "rnn") for tie in (True, False)),
    _transformer("decoder", "gpt2", "gpt2"),
    _transformer("decoder", "2017"),
    _transformer("decoder", "llama", "llama"),
    _transformer("decoder", "alibi", n_head=16),  # so many that slopes are no round numbers
    _transformer("decoder", "window"),
    _transformer("decoder", "bare"),
    Spec(
        "decoder-prefix", "decoder",
        lambda p: PrefixTransformer(TransformerConfig(V, dropout=p, **{**models.SIZES, **models.VARIANTS["llama"]})),  # type: ignore[arg-type]
        tied=("out.weight", "embed.tokens.weight"), layouts=("lmbook", "llama"),
    ),
    _experts(1),
    _experts(2),
    _transformer("encoder", "gpt2"),
    _transformer("encoder", "bert", "bert"),
    _transformer("encoder", "llama"),
    _transformer("encoder", "alibi", n_head=16),
    _transformer("encoder", "window"),
    _transformer("encoder-decoder", "2017"),
    _transformer("encoder-decoder", "llama"),
    _transformer("encoder-decoder", "alibi"),
    _transformer("encoder-decoder", "gpt2", source_vocab=SOURCE),
    _seq2seq("lstm", n_layer=2),
    _seq2seq("gru", encoder="bigru", decoder="gru"),
    _seq2seq("rnn", encoder="rnn", decoder="rnn", reverse=True),
    _seq2seq("conv", pools=True),
    _seq2seq("attention", looks=True, encoder="bilstm"),
    Spec("tagger", "tagger", lambda p: Tagger(TaggerConfig(V, TAGS, 12, 10, dropout=p))),
    Spec("tagger-one-way", "tagger", lambda p: Tagger(TaggerConfig(V, TAGS, 12, 10, 2, "gru", False, dropout=p))),
)
PARTS = {  # modules that take ids, but are no models by themselves
    "Embed": "the vectors of a Transformer", "Decoder": "half of a Seq2Seq", "AttentionDecoder": "half of a Seq2Seq",
    "Classifier": "scores classes, not tokens", "SoftPrompt": "vectors before a model that it is given",
    "_Longer": "the vectors that `SoftPrompt` puts before a text",
}  # fmt: skip

_NO_NEXT, _ONE_ROW, _TAGS = "it has no next token", "`speculative` takes no source", "it scores tags, not tokens"
_NO_SOURCE = "`evaluate` hands over rows, and a pair has two"
_LEFT, _BLANKS, _COUNTED = "it reads from left to right, and no place from behind", "it has no blanks to fill", "it is counted, not trained"
REASONS: dict[str, dict[str, str]] = {  # of each consumer: the families that take no part in it, and why. (True of all others.)
    "evaluate": {"encoder": _NO_NEXT, "encoder-decoder": _NO_SOURCE, "seq2seq": _NO_SOURCE, "tagger": _TAGS},
    **{name: {"encoder": _NO_NEXT, "tagger": _TAGS} for name in ("generate", "stream", "beam_search")},
    "speculative": {"encoder": _NO_NEXT, "encoder-decoder": _ONE_ROW, "seq2seq": _ONE_ROW, "tagger": _TAGS},
    "unmask": {
        "table": _LEFT, "plain": _LEFT, "recurrent": _LEFT, "decoder": _LEFT, "experts": _LEFT, "encoder-decoder": _BLANKS,
        "seq2seq": _BLANKS, "tagger": _TAGS,
    },
    "mean_loss": {"table": _COUNTED},
    "fit": {"table": _COUNTED},
    "packed": {  # several examples in a row, told apart by segments
        "table": _COUNTED, "encoder-decoder": "pairs are not packed", "seq2seq": "pairs are not packed",
        "tagger": "TaggedSentences packs none", "plain": "its windows do not end at segments", "recurrent": "a state runs through the row",
    },
    "weights": {"table": "it has arrays, and a file of its own"},
    "checkpoint": {"table": "it has arrays, and a file of its own"},
    "pretrained": {
        name: "only a plain Transformer has a config.json"
        for name in ("table", "plain", "recurrent", "seq2seq", "tagger", "experts")
    },
    "own file": {
        name: "it is saved by save_weights"
        for name in ("plain", "recurrent", *TRANSFORMERS, "seq2seq", "tagger")
    },
    # methods of one family
    "greedy_accuracy": {f: "for a Seq2Seq" for f in ("table", "plain", "recurrent", *TRANSFORMERS, "tagger")},
    "predict": {f: "a method of Tagger" for f in ("table", "plain", "recurrent", *TRANSFORMERS, "seq2seq")},
}  # fmt: skip
RUNS = (
    "evaluate", "generate", "stream", "beam_search", "speculative", "unmask", "mean_loss", "fit",
    "greedy_accuracy", "predict",
)  # fmt: skip
FILES = ("weights", "checkpoint", "pretrained", "own file")


def takes(spec: Spec, consumer: str) -> bool:
    "Whether a model takes part."
    return spec.family not in REASONS[consumer]


def ids(B: int, T: int, seed: int = 1, top: int = V) -> list[list[int]]:
    "Rows of the same length, each beginning with <bos>; no other special token."
    rows = torch.randint(4, top, (B, T - 1), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[BOS, *row] for row in rows]


EQUAL = ids(3, 5)
UNEQUAL = [row[:n] for row, n in zip(ids(4, 7, 2), (3, 7, 2, 5))]


def sources(spec: Spec, n: int, equal: bool = False) -> list[list[int]]:
    "What pairs are written from."
    rows = ids(n, 6, 3, spec.source_vocab)
    return rows if equal else [row[: 2 + (3 * b + 1) % 5] for b, row in enumerate(rows)]


def covered(rows: Iterable[Sequence[int]]) -> list[list[int]]:
    "Rows with blanks."
    return [[MASK if i % 3 == 1 else id for i, id in enumerate(row)] for row in rows]


def rectangle(rows: Sequence[Sequence[int]], side: str = "right", fill: int = 7) -> tuple[Tensor, Tensor]:
    "Rows as a tensor, and where the tokens are. The padding is a word like others, so that whoever reads it is found out."
    longest = max(map(len, rows))
    out, there = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        out[b, where], there[b, where] = torch.tensor(row), 1
    return out, there


def read(spec: Spec, model: Any, rows: list[list[int]], given: list[list[int]] | None = None, side: str = "right") -> list[Tensor]:
    "What a model says at each token of each row, read together and padded on one side."
    x, there = rectangle(rows, side)
    told: dict[str, Tensor] = {}
    if spec.pairs:
        told["source"], told["source_segments"] = rectangle(given or sources(spec, len(rows)), side)
    if spec.family in TRANSFORMERS: told["segments"] = there
    if spec.family == "tagger": told["segments"] = there
    if spec.family == "table": out = [torch.stack([model.next_log_probs(r[: t + 1]) for t in range(len(r))]) for r in x.tolist()]
    else: out = model(x, **told)
    return [scores[mask > 0] for scores, mask in zip(out, there)]


def tags(rows: list[list[int]]) -> list[tuple[list[int], list[int]]]: return [(row, [id % TAGS for id in row]) for row in rows]


def batches(spec: Spec, rows: list[list[int]], size: int, given: list[list[int]] | None = None) -> Batches:
    "For the Trainer."
    if spec.family == "tagger": return TaggedSentences(tags(rows), size, shuffle=False, pad_id=7)
    examples: Any = list(zip(given or sources(spec, len(rows)), rows)) if spec.pairs else rows
    return Examples(examples, batch_size=size, join=not spec.pairs, shuffle=False, pad_id=7)


def told_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    "The loss for an encoder that the notebook on filling in writes for itself: it says where the padding is."
    logits = model(batch.ids, segments=batch.segments)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"), batch.tokens


def losses(spec: Spec) -> dict[str, Any]:
    "What each is trained with in the book, by name."
    if spec.family == "table": return {}
    if spec.family == "tagger": return {"tag_loss": tag_loss}
    more: dict[str, Any] = {"recurrent": {"CarriedState": CarriedState()}, "encoder": {"told_loss": told_loss}}
    return {"next_token_loss": next_token_loss, **more.get(spec.family, {})}


def loss_of(spec: Spec) -> Any: return next(iter(losses(spec).values()))


def consume(
    consumer: str,
    spec: Spec,
    model: Any,
    folder: Path,
    config: SamplingConfig = GREEDY,
    draft: Any = None,
) -> Any: # something that can be compared
    "One of RUNS or FILES at work."
    rows, given = UNEQUAL, sources(spec, len(UNEQUAL)) if spec.pairs else None
    if consumer == "evaluate": return [nats.tolist() for nats in evaluate(model, rows, batch_size=3).token_nats]
    if consumer == "generate": return generate(model, rows, config, source=given)
    if consumer == "stream": return list(stream(model, TOKENIZER, "ab c", endless(config), source="bad" if given else None))
    if consumer == "beam_search": return beam_search(model, rows[0], 3, 5, eos_id=EOS, source=None if given is None else given[0])
    if consumer == "speculative":
        return speculative(model, spec.make(seed=1) if draft is None else draft, rows[0], config).ids
    if consumer == "unmask": return unmask(model, covered(rows), MASK, config=config)
    if consumer == "mean_loss": return mean_loss(model, batches(spec, rows, 2, given), loss_of(spec))
    if consumer == "fit": return fit(spec, model, 2)
    if consumer == "greedy_accuracy": return greedy_accuracy(model, zip(given or [], rows)).tokens.tolist()
    if consumer == "predict": return model.predict(rows, batch_size=2)
    return save_and_load(consumer, spec, model, folder)


def fit(spec: Spec, model: nn.Module, steps: int) -> list[dict[str, float]]:
    "Train a little."
    config = TrainConfig(steps=steps, lr=1e-2, log_every=1, deterministic=False, eval_every=1)
    source = batches(spec, UNEQUAL, 2)
    return Trainer(model, source, config, loss=loss_of(spec), evaluate=source).fit().rows


def save_and_load(how: str, spec: Spec, model: Any, folder: Path, layout: Any = "lmbook") -> Any: # the model that was loaded
    "Write a model and read it again, into one that was made otherwise."
    if how == "own file":
        model.save(folder / "model.ngram")
        return NGram.load(folder / "model.ngram")
    dtype = next(model.parameters()).dtype
    if how == "pretrained":
        save_pretrained(model, folder / "pretrained", layout)
        return load_pretrained(folder / "pretrained", dtype)
    with torch.inference_mode(False): other = spec.make(dtype, seed=5)
    with torch.no_grad():
        for p in other.parameters(): p.add_(1)
    if how == "weights":
        save_weights(model, folder / "model.safetensors")
        load_weights(other, folder / "model.safetensors")
    if how == "checkpoint":
        path = save_checkpoint(folder / "run", 3, model, {"some": [1, torch.ones(2)]})
        load_weights(other, path)
        assert torch.equal(load_state(path)["some"][1], torch.ones(2))
    return other


def mixed(model: nn.Module) -> list[bool]:
    "Set every other module to training, and say which."
    for i, module in enumerate(model.modules()): module.training = i % 2 == 0
    return [module.training for module in model.modules()]


@contextmanager
def failing(model: nn.Module, call: int) -> Iterator[None]:
    "Inside, the model fails when word vectors are looked up for the n-th time."
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count >= call: raise KeyError("a fault of the test")

    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, nn.Embedding)]
    try: yield
    finally:
        for handle in handles: handle.remove()


# --- What is not kept yet ---
@dataclass(frozen=True)
class Bug:
    "Cells that fail today."

    test: str
    models: str  # a regular expression for the whole name
    case: str  # one for the rest of the cell's name
    reason: str
    raises: Any = AssertionError  # how it fails: another failure is another bug
    found: list[str] = field(default_factory=list, compare=False)


BUGS: tuple[Bug, ...] = ()


class Mended(Exception):
    "A cell of BUGS that holds."


class Known(Exception):
    "A cell of BUGS that fails as it is known to. (Raised in place of what was, whose traceback would take pytest a while to write.)"


def every(cases: Iterable[tuple[Any, ...]]) -> Callable[[Callable[..., None]], Any]:
    """A test of many cells, (spec, case, ...): one for all those of a model that hold, and one for those that a bug of BUGS keeps from it.

    The test is called with each cell; where it has a parameter `folder`, with a new one.
    """
    def decorate(test: Callable[..., None]) -> Any:
        groups: dict[tuple[Any, Bug | None], list[tuple[Any, ...]]] = {}
        for spec, *rest in cases:
            name, case = getattr(spec, "name", spec), "-".join(map(str, rest))
            bugs = [b for b in BUGS if b.test == test.__name__ and re.fullmatch(b.models, name) and re.fullmatch(b.case, case)]
            assert len(bugs) < 2, f"{test.__name__}[{name}-{case}] stands in BUGS twice: {[b.reason for b in bugs]}"
            for bug in bugs: bug.found.append(f"{name}-{case}")
            groups.setdefault((spec, bugs[0] if bugs else None), []).append(tuple(rest))
        params = [
            pytest.param(
                spec, some, bug, id=getattr(spec, "name", spec) + (f"-BUG {BUGS.index(bug)}" if bug else ""),
                marks=[pytest.mark.xfail(strict=True, reason=bug.reason, raises=Known)] if bug else [],
            )
            for (spec, bug), some in groups.items()
        ]  # fmt: skip
        folder = "folder" in inspect.signature(test).parameters

        def run(spec: Any, some: list[tuple[Any, ...]], bug: Bug | None, tmp_path: Path) -> None:
            for i, values in enumerate(some):
                cell, given = "-".join(map(str, values)), {}
                if folder: (tmp_path / str(i)).mkdir(); given = {"folder": tmp_path / str(i)}
                try: test(spec, *values, **given)
                except BaseException as error:
                    if bug is not None and isinstance(error, bug.raises): continue
                    error.add_note(f"the cell: {cell}")
                    raise
                if bug is not None: raise Mended(f"{cell} holds now: take it out of BUGS in tests/contract.py")
            if bug is not None: raise Known(bug.reason)

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return pytest.mark.parametrize("spec, some, bug", params)(run)

    return decorate
