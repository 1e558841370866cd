"""Every model of the book against everything that uses models: see `tests/contract.py` for who takes part in what, and what fails today."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmbook
from lmbook.batches import Batch, Examples
from lmbook.cache import GenerationError, KVCache, reader_of
from lmbook.checkpoints import CheckpointError, load_weights, save_checkpoint, save_weights
from lmbook.core import LmbookError
from lmbook.generation import SamplingConfig, beam_search, generate, stream
from lmbook.perplexity import evaluate
from lmbook.pretrained import load_pretrained, save_pretrained
from lmbook.recurrent_lm import CarriedState
from lmbook.speculation import speculative, unmask
from lmbook.training import mean_loss, next_token_loss
from lmbook.transformer import Transformer
from tests import contract
from tests.contract import (
    BOS,
    CONTEXT,
    EOS,
    EQUAL,
    FILES,
    GREEDY,
    LONG,
    MASK,
    MODELS,
    PARTS,
    REASONS,
    RUNS,
    TOKENIZER,
    UNEQUAL,
    Spec,
    V,
    batches,
    consume,
    covered,
    every,
    failing,
    fit,
    ids,
    loss_of,
    losses,
    mixed,
    read,
    rectangle,
    save_and_load,
    sources,
    takes,
)  # fmt: skip
from tests.writers import slowly

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MODULES = [spec for spec in MODELS if spec.module]
TRANSFORMERS = [spec for spec in MODELS if takes(spec, "pretrained")]
CAUSAL = [spec for spec in MODELS if takes(spec, "speculative")]
WRITERS = [spec for spec in MODELS if takes(spec, "generate")]


def close(a: Any, b: Any, dtype: torch.dtype = torch.float32) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def same(a: Any, b: Any, dtype: torch.dtype = torch.float32) -> None:
    "What `consume` gave: whole numbers and texts are the same, other numbers nearly."
    if isinstance(a, float): assert a == pytest.approx(b, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    elif isinstance(a, dict): same(list(a.items()), list(b.items()), dtype)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b): same(x, y, dtype)
    else: assert a == b


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    "Models so small are slower with several."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the table itself ---
def test_every_model_of_the_book_is_in_the_table():
    "A model is what takes ids, or gives log-probabilities."
    found = set()
    for module in pkgutil.iter_modules(lmbook.__path__):
        if module.name in ("_modidx", "__main__"): continue
        for name, kind in vars(importlib.import_module(f"lmbook.{module.name}")).items():
            if not inspect.isclass(kind) or kind.__module__ != f"lmbook.{module.name}" or getattr(kind, "_is_protocol", False): continue
            takes_ids = issubclass(kind, nn.Module) and list(inspect.signature(kind.forward).parameters)[1:2] == ["ids"]
            if takes_ids or hasattr(kind, "next_log_probs") or hasattr(kind, "token_log_probs"): found.add(name)
    assert found == {type(spec.make()).__name__ for spec in MODELS} | set(PARTS)


def test_the_table_is_consistent():
    names, families = [spec.name for spec in MODELS], {spec.family for spec in MODELS}
    assert len(names) == len(set(names))
    for consumer, reasons in REASONS.items():
        assert set(reasons) <= families and all(reasons.values())
        assert set(reasons) < families, f"nobody takes part in {consumer}"
    assert {spec.tied[0] for spec in MODELS} == {"", "out.weight"}


def test_no_bug_is_listed_without_a_cell():
    assert [f"{bug.test}: {bug.models} {bug.case}" for bug in contract.BUGS if not bug.found] == []


# --- alone and in a batch, padded and not ---
SHAPES = {"equal": EQUAL, "padded": UNEQUAL}
ROW_WISE = ("evaluate", "generate", "unmask", "predict")


def _given(spec: Spec, rows: list, shape: str) -> list | None: return sources(spec, len(rows), shape == "equal") if spec.pairs else None


def _sides(spec: Spec) -> tuple[str, ...]: # Transformers are told where the padding is, others have it behind the tokens
    return ("right", "left") if takes(spec, "pretrained") else ("right",)


@every((s, shape, side, d) for s in MODELS for shape in SHAPES for side in _sides(s) for d in DTYPES
    if (shape, side) != ("equal", "left") and (s.module or d == "float32"))
def test_a_row_alone_is_read_as_in_a_batch(spec, shape, side, dtype):
    rows, model = SHAPES[shape], spec.make(DTYPES[dtype])
    given = _given(spec, rows, shape)
    with torch.no_grad():
        together = read(spec, model, rows, given, side)
        for b, row in enumerate(rows):
            [alone] = read(spec, model, [row], given and [given[b]])
            assert alone.dtype == DTYPES[dtype] and len(alone) == len(row)
            close(together[b], alone, DTYPES[dtype])


def _rows(consumer: str, spec: Spec, model: Any, rows: list, given: list | None) -> list:
    "What a consumer gives for each row."
    if consumer == "evaluate": return [nats.tolist() for nats in evaluate(model, rows).token_nats]
    if consumer == "generate": return generate(model, rows, LONG if spec.family == "decoder" else GREEDY, source=given)
    if consumer == "unmask": return unmask(model, covered(rows), MASK, forbid=[0])
    return model.predict(rows)


@every((s, shape, c) for s in MODELS for shape in SHAPES for c in ROW_WISE if takes(s, c))
def test_a_row_alone_gets_what_it_gets_in_a_batch(spec, shape, consumer):
    rows, model = SHAPES[shape], spec.make()
    if consumer == "predict": rows = [row[: 9 if shape == "equal" else 1 + b % 9] for b, row in enumerate(ids(40, 9))]  # a tag says little
    given = _given(spec, rows, shape)
    together = _rows(consumer, spec, model, rows, given)
    assert len(together) == len(rows)
    for b, row in enumerate(rows): same(_rows(consumer, spec, model, [row], given and [given[b]]), [together[b]])


def _learned(spec: Spec, model: nn.Module, loss: Any, source: Any) -> tuple[Tensor, list[Tensor], int]:
    "The sum of the losses, its gradient, and how many tokens counted."
    model.zero_grad()
    sums, counts = zip(*(loss(model, batch) for batch in source))
    sum(sums).backward()
    assert all(p.grad is not None for p in model.parameters())
    return sum(sums).detach(), [p.grad for p in model.parameters()], sum(map(int, counts))


@every((s, shape, loss) for s in MODELS for shape in SHAPES for loss in losses(s))
def test_a_batch_teaches_what_its_rows_teach(spec, shape, loss):
    rows, kind = SHAPES[shape], torch.float64
    model = spec.make(kind)
    given = _given(spec, rows, shape)
    together = _learned(spec, model, losses(spec)[loss], batches(spec, rows, len(rows), given).read())
    alone = _learned(spec, model, losses(spec)[loss], batches(spec, rows, 1, given).read())
    assert together[2] == alone[2] and together[0].dtype == kind
    torch.testing.assert_close(together[0], alone[0], rtol=TOLERANCE[kind], atol=0)
    size = max(g.abs().max().item() for g in alone[1])
    for a, b in zip(together[1], alone[1]): torch.testing.assert_close(a, b, rtol=TOLERANCE[kind], atol=TOLERANCE[kind] * size)
    mean = mean_loss(model, batches(spec, rows, 2, given), losses(spec)[loss])
    assert mean == pytest.approx(float(alone[0]) / alone[2], rel=TOLERANCE[kind])


@every((s,) for s in MODELS if takes(s, "packed"))
def test_packed_rows_teach_what_each_teaches(spec):
    model, rows = spec.make(torch.float64), [r for r in UNEQUAL if len(r) > 2]
    packed = _learned(spec, model, next_token_loss, Examples(rows, batch_size=1, length=12, pack=True, shuffle=False).read())
    alone = _learned(spec, model, next_token_loss, batches(spec, rows, 1).read())
    assert packed[2] == alone[2] and len(list(Examples(rows, batch_size=1, length=12, pack=True).read())) == 1
    close(packed[0], alone[0], torch.float64)
    for a, b in zip(packed[1], alone[1]): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- with a cache or a state, and without ---
def _full(spec: Spec, model: Any, row: list[int], given: list[int] | None) -> Tensor: # (T, V) scores after each token
    if spec.family == "table": return torch.stack([model.next_log_probs(row[: t + 1]) for t in range(len(row))])
    more = {} if given is None else {"source": torch.tensor([given])}
    return model(torch.tensor([row]), **more)[0]


@every((s, shape, d) for s in WRITERS for shape in SHAPES for d in DTYPES if s.module or d == "float32")
def test_a_reader_says_what_the_whole_text_says(spec, shape, dtype):
    "One token, several at once, back again, other rows, one row twice: at each step as if the whole text were read anew."
    kind, model = DTYPES[dtype], spec.make(DTYPES[dtype])
    texts = [list(row) for row in SHAPES[shape]]
    given = _given(spec, texts, shape)
    new = torch.tensor(ids(4, 9, 8))[:, 1:]

    def check(scores: Tensor, T: int) -> None:
        assert scores.dtype == kind
        for b, text in enumerate(texts): close(scores[b], _full(spec, model, text, given and given[b])[-T:], kind)

    def read_on(at: int, T: int) -> None:
        some = new[: len(texts), at : at + T]
        for text, row in zip(texts, some.tolist()): text.extend(row)
        check(reader.read(some), T)

    with torch.inference_mode():
        reader = reader_of(model, given)
        check(reader.start(texts)[:, None], 1)
        for at, T in ((0, 1), (1, 1), (2, 3), (5, 1)): read_on(at, T)
        before = max(map(len, texts))
        texts = [text[:-3] for text in texts]
        reader.crop(before - 3)
        for at, T in ((6, 1), (7, 1)): read_on(at, T)
        order = [len(texts) - 1, 0, 0, 1]
        texts, given = [list(texts[b]) for b in order], given and [given[b] for b in order]
        reader.select(torch.tensor(order))
        for at, T in ((0, 1), (1, 2)): read_on(at, T)
        texts = [text[:-1] for text in texts]
        reader.crop(max(map(len, texts)))
        read_on(2, 1)


@every((s, shape, d) for s in WRITERS for shape in SHAPES for d in DTYPES if s.module or d == "float32")
def test_a_reader_goes_back_after_rows_have_left(spec, shape, dtype):
    "Places are counted as they were read, also where the row that was longest is no longer there."
    kind, model, texts = DTYPES[dtype], spec.make(DTYPES[dtype]), SHAPES[shape]
    given = _given(spec, texts, shape)
    with torch.inference_mode():
        reader = reader_of(model, given)
        reader.start(texts)
        reader.select(torch.tensor([0, 2]))
        for new in (5, 6): reader.read(torch.tensor([[new], [new]]))
        reader.crop(max(map(len, texts)) + 1)
        scores = reader.read(torch.tensor([[8], [8]]))
        for found, b in zip(scores, (0, 2)): close(found, _full(spec, model, [*texts[b], 5, 8], given and given[b])[-1:], kind)


def _plainly(spec: Spec, model: Any, given: list[int] | None) -> Any:
    "The model as a mere function, which nobody knows to have a cache or a state."
    def function(x: Tensor) -> Tensor: return torch.stack([_full(spec, model, row, given) for row in x.tolist()])

    return function


@every((s,) for s in WRITERS)
def test_with_a_cache_is_written_what_is_written_without(spec):
    model = spec.make()
    given = sources(spec, 1)[0] if spec.pairs else None
    plain, prompt, more = _plainly(spec, model, given), EQUAL[0], {} if given is None else {"source": [given]}
    config = SamplingConfig(max_new_tokens=8, temperature=0)
    drawn = SamplingConfig(max_new_tokens=8, seed=3, top_k=5)
    for how in (config, drawn): assert generate(model, prompt, how, **more) == generate(plain, prompt, how)
    for a, b in zip(beam_search(model, prompt, 3, 5, **more), beam_search(plain, prompt, 3, 5)):
        assert a.ids == b.ids and a.log_prob == pytest.approx(b.log_prob, rel=1e-5)
    if takes(spec, "speculative"):
        other = spec.make(seed=2)
        draft = _plainly(spec, other, given)
        for how in (config, drawn): assert speculative(model, other, prompt, how).ids == speculative(plain, draft, prompt, how).ids
        assert speculative(model, other, prompt, config).ids == generate(model, prompt, config)[0]
    text = "" if given is None else TOKENIZER.decode(sources(spec, 1)[0][1:])
    told = _plainly(spec, model, TOKENIZER.encode(text)) if given else plain
    pieces = stream(model, TOKENIZER, "ab", config, source=text if given else None)
    assert list(pieces) == list(stream(told, TOKENIZER, "ab", config))


@every((s,) for s in MODELS if s.family == "decoder")
def test_beyond_its_context_a_decoder_goes_on_from_the_last_half(spec):
    model, prompt = spec.make(), ids(1, 20)[0]
    assert generate(model, prompt, LONG)[0] == slowly(model, prompt, LONG.max_new_tokens, CONTEXT)


@every((s,) for s in MODELS if hasattr(s.shared(), "token_log_probs"))
def test_log_probs_are_those_of_the_next_token(spec):
    "What `evaluate` asks of a model, and what it does with one that only gives scores."
    model = spec.make()
    with torch.no_grad(): given = model.token_log_probs(torch.tensor(EQUAL))
    for row, found in zip(EQUAL, given):
        with torch.no_grad(): wanted = _full(spec, model, row, None).log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        close(found, wanted)
    nats = evaluate(lambda x: torch.stack([_full(spec, model, row, None) for row in x.tolist()]), EQUAL).token_nats
    same([n.tolist() for n in nats], [n.tolist() for n in evaluate(model, EQUAL).token_nats])


@every((s, d) for s in MODELS if s.family == "seq2seq" for d in DTYPES)
def test_a_decoder_goes_on_from_its_state(spec, dtype):
    model, kind = spec.make(DTYPES[dtype]), DTYPES[dtype]
    source, there = rectangle(sources(spec, 3))
    x = torch.tensor(EQUAL)
    with torch.no_grad():
        whole, memory, state, parts = model(x, source, there), model.encode(source, there), None, []
        for part in x.split(2, 1):
            scores, state = model.decoder(part, memory, state)
            parts.append(scores)
        close(torch.cat(parts, 1), whole, kind)
        config = replace(GREEDY, max_new_tokens=6, eos_id=EOS)
        said = generate(model, [[BOS]] * 3, config, source=sources(spec, 3))
        for row, text in zip(said, sources(spec, 3)):
            alone = [BOS]
            while len(alone) < 7 and alone[-1] != EOS: alone.append(int(model(torch.tensor([alone]), torch.tensor([text]))[0, -1].argmax()))
            assert row == alone[1:]


# --- what a consumer leaves behind ---
def _drawing(consumer: str) -> SamplingConfig: return SamplingConfig(max_new_tokens=4) if consumer != "stream" else GREEDY


@every((s, c, how) for s in MODULES for c in RUNS if takes(s, c) for how in ("ends", "raises"))
def test_each_module_is_in_its_mode_again(spec, consumer, how, folder):
    "Dropout that is on in a part of the model stays on there, and there only; while a consumer works it is off."
    model = spec.make(dropout=.5)
    draft = spec.make(dropout=.5, seed=1) if consumer == "speculative" else model
    before = mixed(model), mixed(draft)
    if how == "ends": consume(consumer, spec, model, folder, draft=draft)
    else:
        with failing(model, 1 if consumer in ("unmask", "predict", "greedy_accuracy") else 2), pytest.raises(KeyError, match="of the test"):
            consume(consumer, spec, model, folder, draft=draft)
    assert ([m.training for m in model.modules()], [m.training for m in draft.modules()]) == before


@every((s, c) for s in MODULES for c in RUNS if takes(s, c) and c != "fit")
def test_dropout_is_off_while_a_consumer_works(spec, consumer, folder):
    model, quiet = spec.make(dropout=.5), spec.make(dropout=.5)
    model.train()
    assert consume(consumer, spec, model, folder, draft=model) == consume(consumer, spec, quiet, folder, draft=quiet)


@every((s, how) for s in WRITERS if s.module for how in ("closed", "dropped", "raised"))
def test_a_text_that_is_broken_off_leaves_nothing_behind(spec, how):
    model = spec.make(dropout=.5)
    before = mixed(model)
    source = "bad" if spec.pairs else None
    config = SamplingConfig(max_new_tokens=12, seed=0, eos_id=-1)
    if how == "raised":
        def stop(row: int, id: int) -> None: raise KeyError("of the caller")

        with pytest.raises(KeyError, match="of the caller"): generate(model, [BOS], config, on_token=stop, source=source and [[BOS]])
    else:
        pieces = stream(model, TOKENIZER, "ab", config, source=source)
        assert next(pieces)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if how == "closed": pieces.close()
        del pieces
    assert [m.training for m in model.modules()] == before and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@every([("two streams",)])
def test_two_texts_at_a_time_do_not_disturb_each_other(case):
    "While the one is closed, the other still rests: no dropout may come back."
    spec = next(s for s in MODELS if s.name == "decoder-2017")  # one that takes no short cut
    model, config = spec.make(dropout=.5).train(), SamplingConfig(max_new_tokens=12, seed=0, eos_id=-1)
    alone = list(stream(model, TOKENIZER, "abcd", config))
    first, second = stream(model, TOKENIZER, "ab", config), stream(model, TOKENIZER, "abcd", config)
    next(first)
    said = [next(second)]
    first.close()
    assert [*said, *second] == alone and all(m.training for m in model.modules())


@every([("generate",), ("speculative",), ("unmask",)])
def test_a_callback_runs_as_its_caller_does(case):
    "It may compute gradients: it is the caller's code."
    seen: list[tuple[bool, bool]] = []
    def look(*_: Any) -> None: seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    decoder, encoder = (next(s for s in MODELS if s.name == name).make() for name in ("decoder-gpt2", "encoder-gpt2"))
    if case == "generate": generate(decoder, [BOS], GREEDY, on_token=look)
    if case == "speculative": speculative(decoder, decoder, [BOS], GREEDY, on_token=look)
    if case == "unmask": unmask(encoder, [BOS, MASK, MASK], MASK, on_step=look)
    assert seen and set(seen) == {(True, False)}


def _dice() -> tuple: # where they stand, of Python, NumPy and PyTorch
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), name, keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


def _stands(model: nn.Module) -> list: return [(p.requires_grad, p.grad is None, p.detach().clone()) for p in model.parameters()]


@every((s, c) for s in MODELS for c in (*RUNS, *FILES) if takes(s, c))
def test_a_consumer_leaves_no_trace(spec, consumer, folder):
    """The dice of the caller, the gradients, the weights are as they were; and the model, and what was loaded, can be trained.

    Also where the caller is in inference mode, in which the results are the same.
    """
    model, draft = spec.make(dropout=.1), spec.make(seed=1) if consumer == "speculative" else None
    frozen = next(model.parameters()) if spec.module else None
    if frozen is not None: frozen.requires_grad_(False)
    before = _stands(model) if spec.module else []
    dice, files = _dice(), consumer in FILES
    first = None if files else consume(consumer, spec, model, folder, GREEDY, draft)
    if not files and consumer != "fit": consume(consumer, spec, model, folder, _drawing(consumer), draft)
    with torch.inference_mode(consumer != "fit"):  # nothing is trained without gradients
        out = consume(consumer, spec, model, folder, GREEDY, draft)
    if consumer != "fit" and not files:  # the Trainer seeds by design; and to load, the test itself makes a model
        assert _dice() == dice
        same(out, first)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if not spec.module: return
    assert all(p.grad is None for p in model.parameters())
    for (needs, _, value), p in zip(before, model.parameters()):
        assert p.requires_grad == needs and (consumer == "fit" or torch.equal(p, value))
    frozen.requires_grad_()
    for trained in [model] + [out] * files:
        _learned(spec, trained.train(), loss_of(spec), [next(batches(spec, UNEQUAL, 2).read())])


@every((s,) for s in TRANSFORMERS)
def test_saving_and_loading_throw_no_dice(spec, folder):
    model = spec.make()
    before = _dice()
    save_pretrained(model, folder / "a")
    load_pretrained(folder / "a")
    save_weights(model, folder / "w.safetensors")
    load_weights(model, folder / "w.safetensors")
    save_checkpoint(folder, 1, model, {})
    assert _dice() == before


@every((s,) for s in MODULES)
def test_within_inference_mode_a_model_says_the_same(spec):
    model = spec.make()
    with torch.inference_mode(): rows = read(spec, model, UNEQUAL)
    for a, b in zip(rows, read(spec, model, UNEQUAL)): close(a, b.detach())


# --- saved and loaded ---
@every(
    (s, how, layout, d) for s in MODELS for how in FILES if takes(s, how)
    for layout in (s.layouts if how == "pretrained" else ("",))
    for d in (["float32"] if how in ("checkpoint", "own file") or layout != "lmbook" else DTYPES)
)
def test_saved_equals_loaded(spec, how, layout, dtype, folder):
    model, kind = spec.make(DTYPES[dtype]), DTYPES[dtype]
    modes = mixed(model) if spec.module else []
    loaded = save_and_load(how, spec, model, folder, layout or "lmbook")
    if spec.module:
        assert [m.training for m in model.modules()] == modes and not (how == "pretrained" and loaded.training)
        model.eval()
    with torch.no_grad():
        for a, b in zip(read(spec, model, UNEQUAL), read(spec, loaded, UNEQUAL)): assert a.dtype == b.dtype == kind and torch.equal(a, b)
    if not spec.module:
        assert repr(loaded) == repr(model) and loaded.config == model.config
        return
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    if how == "pretrained" and layout == "lmbook": assert loaded.config == model.config
    for m in (model, loaded):
        parameters = dict(m.named_parameters(remove_duplicate=False))
        assert all(p.requires_grad and p.is_leaf for p in parameters.values())
        if spec.tied[0]: assert parameters[spec.tied[0]] is parameters[spec.tied[1]]
        assert len(parameters) - len(list(m.parameters())) == bool(spec.tied[0])


@every((s,) for s in MODELS if s.tied[0])
def test_two_matrices_do_not_become_one(spec, folder):
    "A file of a model that is not tied does not fit one that is: one of its matrices would be lost without a word."
    model, other = spec.make(), spec.make(seed=3)
    first, last = spec.tied[0].rpartition(".")[::2]
    setattr(other.get_submodule(first), last, nn.Parameter(torch.randn_like(other.get_parameter(spec.tied[0]))))
    save_weights(other, folder / "untied.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="another architecture"): load_weights(model, folder / "untied.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save_weights(model, folder / "tied.safetensors")
    with pytest.raises(CheckpointError, match="another architecture"): load_weights(other, folder / "tied.safetensors")


@every((s, how) for s in MODELS for how in FILES if takes(s, how))
def test_what_cannot_be_written_is_said(spec, how, folder):
    blocked = folder / "a file"
    blocked.write_text("")
    with pytest.raises(LmbookError, match="cannot be written"): save_and_load(how, spec, spec.make(), blocked / "folder")


# --- double precision ---
@every((s,) for s in MODULES if takes(s, "evaluate"))
def test_evaluate_keeps_double_precision(spec):
    model = spec.make(torch.float64)
    for row, nats in zip(UNEQUAL, evaluate(model, UNEQUAL).token_nats):
        with torch.no_grad(): log_p = model(torch.tensor([row]))[0, :-1].log_softmax(-1)
        wanted = -log_p.gather(1, torch.tensor(row[1:])[:, None])[:, 0].numpy()
        np.testing.assert_allclose(nats, wanted, rtol=1e-10, atol=1e-10)


@every((s,) for s in MODULES)
def test_a_model_in_double_precision_stays_so(spec):
    model = spec.make(torch.float64)
    with torch.no_grad(): wanted = sum(float(loss_of(spec)(model, batch)[0]) for batch in list(batches(spec, UNEQUAL, 2).read())[:1])
    rows = fit(spec, model, 1)
    count = next(iter(batches(spec, UNEQUAL, 2).read())).tokens
    assert rows[0]["loss"] == pytest.approx(wanted / count, rel=1e-12)
    assert {p.dtype for p in model.parameters()} == {b.dtype for b in model.buffers()} | {torch.float64}


@every([("generate",), ("beam_search",), ("speculative",), ("unmask",)])
def test_the_likeliest_is_the_likeliest_in_double_precision(case):
    "Two scores that only float64 can tell apart: all who take the likeliest take the same."
    def model(x: Tensor) -> Tensor:
        scores = torch.zeros(*x.shape, V, dtype=torch.float64)
        scores[..., 5], scores[..., 9] = 1, 1 + 1e-12
        return scores

    if case == "generate": assert generate(model, [BOS], GREEDY) == [[9] * 5]
    if case == "beam_search": assert beam_search(model, [BOS], 1, 5)[0].ids == [9] * 5
    if case == "speculative": assert speculative(model, model, [BOS], GREEDY).ids == [9] * 5
    if case == "unmask": assert unmask(model, [BOS, MASK], MASK) == [[BOS, 9]]


# --- what is wrong ---
WRONG_TENSORS = {  # the fault, and what is said
    "first id": (lambda x: x.masked_fill(torch.eye(*x.shape) > 0, V), f"The id {V} is no token: [a-z' ]*ids run from 0 to {V - 1}"),
    "last id": (lambda x: torch.cat([x, torch.full_like(x[:, :1], V)], 1), f"The id {V} is no token: [a-z' ]*ids run from 0 to {V - 1}"),
    "last id -1": (lambda x: torch.cat([x, torch.full_like(x[:, :1], -1)], 1), "The id -1 is no token"),
    "last id -100": (lambda x: torch.cat([x, torch.full_like(x[:, :1], -100)], 1), "The id -100 is no token"),
    "float": (lambda x: x.float(), "ids are whole numbers, not torch.float32"),
    "bool": (lambda x: x > 5, "ids are whole numbers, not torch.bool"),
    "uint8": (lambda x: x.to(torch.uint8), "ids are whole numbers, not torch.uint8"),
    "complex": (lambda x: x.cfloat(), "ids are whole numbers, not torch.complex64"),
    "one axis": (lambda x: x[0], r"must have the shape \(B, T\) and hold something, not \(5,\)"),
    "three axes": (lambda x: x[None], r"must have the shape \(B, T\) and hold something, not \(1, 3, 5\)"),
    "no places": (lambda x: x[:, :0], r"must have the shape \(B, T\) and hold something, not \(3, 0\)"),
    "no rows": (lambda x: x[:0], r"must have the shape \(B, T\) and hold something, not \(0, 5\)"),
}


def _ask(spec: Spec, model: Any, entry: str, x: Tensor) -> Any:
    "Give ids to a model."
    good = torch.tensor(sources(spec, 3, True))
    if entry == "token_log_probs": return model.token_log_probs(x)
    if entry == "forward": return model(x, source=good) if spec.pairs else model(x)
    if entry == "source": return model(torch.tensor(EQUAL), source=x)
    targets = torch.full_like(torch.tensor(EQUAL), 3)[: len(x)] if x.ndim == 2 else torch.tensor(EQUAL)
    if targets.shape[-1] != x.shape[-1]: targets = torch.full(x.shape, 3)
    return mean_loss(model, [Batch(x, targets, source=good if spec.pairs else None, segments=None)], loss_of(spec))


def _entries(spec: Spec) -> list[str]:
    out = ["forward", "mean_loss"] if spec.module else []
    if hasattr(spec.shared(), "token_log_probs"): out.append("token_log_probs")
    if spec.pairs: out.append("source")
    return out


@every((s, e, fault) for s in MODELS for e in _entries(s) for fault in WRONG_TENSORS)
def test_wrong_ids_give_the_same_error(spec, entry, fault):
    change, text = WRONG_TENSORS[fault]
    x = torch.tensor(sources(spec, 3, True))[:, :5] if entry == "source" else torch.tensor(EQUAL)
    if entry == "source": text = text.replace(f"to {V - 1}", f"to {spec.source_vocab - 1}")
    with pytest.raises(LmbookError, match=text): _ask(spec, spec.shared(), entry, change(x))


@every(
    (s, e, d) for s in MODELS for e in _entries(s) for d in ("int16", "int32") if e != "mean_loss"
)
def test_whole_numbers_of_another_size_are_the_same_ids_or_an_error(spec, entry, dtype):
    model = spec.make()
    x = torch.tensor(sources(spec, 3, True))[:, :5] if entry == "source" else torch.tensor(EQUAL)
    with torch.no_grad():
        wanted = _ask(spec, model, entry, x)
        try: found = _ask(spec, model, entry, x.to(getattr(torch, dtype)))
        except LmbookError as error: assert "whole numbers" in str(error) or "int64" in str(error)  # noqa: PT017
        else: assert torch.equal(found, wanted) if isinstance(found, Tensor) else found == wanted


def _write(spec: Spec, model: Any, entry: str, row: Any) -> Any:
    "Give rows to a consumer."
    n = len(row) if isinstance(row, list) and row and isinstance(row[0], list) else 1
    more = {"source": sources(spec, n)} if spec.pairs else {}
    if entry == "evaluate": return evaluate(model, [row])
    if entry == "generate": return generate(model, row, GREEDY, **more)
    if entry == "beam_search": return beam_search(model, row, 2, 3, **more)
    if entry == "speculative": return speculative(model, model, row, GREEDY)
    if entry == "unmask": return unmask(model, row, MASK)
    if entry == "predict": return model.predict([row])
    return mean_loss(model, batches(spec, [row], 1), loss_of(spec))


WRONG_ROWS: dict[str, Any] = {
    "id": [BOS, V, 5], "last id": [BOS, 5, V], "last id -1": [BOS, 5, -1], "last id -100": [BOS, 5, -100], "float": [1., 5.5],
    "bool": [True, False, True], "empty": [], "two axes": [[[BOS, 5]], [[BOS, 6]]], "no axis": torch.tensor(5), "ragged": [[BOS, 5], 6],
}  # fmt: skip


def _said(entry: str, fault: str) -> str: # a regular expression
    "What each entry says of a fault, whatever the model."
    number = {"id": V, "last id": V, "last id -1": -1, "last id -100": -100}.get(fault)
    if entry in ("generate", "beam_search", "speculative", "unmask"):
        what = "The text" if entry == "unmask" else "The prompt"
        if number is not None: return f"^The id {number} is no token: {what.lower()}'s ids run from 0 to {V - 1}"
        if fault == "empty": return f"^{what} is empty: there is nothing to go on from"
        return "ids are whole numbers" if fault in ("float", "bool") else ""
    if number is not None and number < 0 and entry == "mean_loss":  # batches are made before a model is there
        return f"The id {number} is no token: [a-z0-9' ]*ids run from 0"
    if number is not None: return f"The id {number} is no token: [a-z0-9' ]*ids run from 0 to {V - 1}"
    return "^document 0 must be one row of whole numbers, not" if entry == "evaluate" and fault in ("float", "bool", "two axes") else ""


def _row_entries(spec: Spec) -> list[str]:
    names = ("evaluate", "generate", "beam_search", "speculative", "unmask", "predict", "mean_loss")
    return [name for name in names if takes(spec, name)]


def _makes_sense(spec: Spec, entry: str, fault: str) -> bool:
    "No tags for an empty sentence are a right answer; and the tags are the test's own."
    if fault == "empty": return entry != "predict"
    if spec.family == "tagger" and entry == "mean_loss": return fault not in ("ragged", "two axes", "no axis")
    return fault != "ragged" or entry != "predict"


@every((s, e, fault) for s in MODELS for e in _row_entries(s) for fault in WRONG_ROWS if _makes_sense(s, e, fault))
def test_wrong_rows_give_the_same_error(spec, entry, fault):
    with pytest.raises(LmbookError) as caught: _write(spec, spec.shared(), entry, WRONG_ROWS[fault])
    assert re.search(_said(entry, fault), str(caught.value))


@every([("an id that is no token",)])
def test_one_fault_has_one_text(case):
    "An id outside the vocabulary, everywhere: but for what holds it, the sentence is the same."
    said = set()
    for spec in MODELS:
        for entry in _row_entries(spec):
            with pytest.raises(LmbookError) as caught: _write(spec, spec.shared(), entry, [BOS, V, 5])
            said.add(re.sub(r"[a-z0-9' ]*ids(?= run)", "...", str(caught.value)))
    assert len(said) == 1


@every((s, f) for s in MODELS if takes(s, "unmask") for f in ("forbid", "mask_id"))
def test_ids_of_settings_are_ids_too(spec, fault):
    with pytest.raises(GenerationError, match=str(V)):
        unmask(spec.make(), [BOS, MASK], *((V,) if fault == "mask_id" else (MASK,)), forbid=[V] if fault == "forbid" else [])


# --- who takes no part ---
def _refused() -> list[tuple[Spec, str]]:
    names = ("evaluate", "generate", "stream", "beam_search", "speculative", "unmask", "packed")
    return [(s, c) for s in MODELS for c in names if not takes(s, c) and (s.module or c != "packed") and (c != "packed" or not s.pairs)]


@every(((s, c) for s, c in _refused() if (s.family, c) != ("tagger", "packed")))
def test_who_takes_no_part_is_told_so(spec, consumer):
    "An error that helps, not a TypeError, and not numbers that mean nothing."
    model, small = spec.shared(), [[BOS, 2, 3], [BOS, 4]]  # all of them are also tags
    with pytest.raises(LmbookError):
        if consumer == "evaluate": evaluate(model, small)
        if consumer == "generate": generate(model, small, GREEDY)
        if consumer == "stream": list(stream(model, TOKENIZER, "ab", GREEDY))
        if consumer == "beam_search": beam_search(model, small[0], 2, 3)
        if consumer == "speculative": speculative(model, model, small[0], GREEDY)
        if consumer == "unmask": unmask(model, covered(small), MASK)
        if consumer == "packed": next_token_loss(model, next(iter(Examples(UNEQUAL, batch_size=1, length=12, pack=True))))


@every((s,) for s in MODELS if s.family == "recurrent")
def test_a_state_is_not_carried_through_packed_rows(spec):
    with pytest.raises(LmbookError, match="pack=False"):
        CarriedState()(spec.make(), next(iter(Examples(UNEQUAL, batch_size=1, length=12, pack=True))))


def test_a_cache_of_other_rows_is_not_taken():
    "What was read belongs to its rows."
    model = next(s for s in MODELS if s.name == "decoder-gpt2").make()
    assert isinstance(model, Transformer)
    cache = KVCache(2)
    model(torch.tensor(EQUAL), cache=cache)
    with pytest.raises((LmbookError, RuntimeError)): model(torch.tensor(EQUAL[:2]), cache=cache)
