"""Many texts at a time: each is what it would be alone, whatever runs beside it, however little memory there is, and whoever leaves."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest
import torch

import lmbook.batching as batching
from lmbook.batching import BatchingError, Blocks, Engine, EngineConfig, Event, OneAtATime, PagedCache, QueueFull, Request
from lmbook.constraints import regex_constraint
from lmbook.generation import SamplingConfig, generate
from lmbook.language_models import NGram, NGramConfig
from lmbook.pretrained import save_pretrained
from lmbook.tokenization import ByteTokenizer
from lmbook.transformer import Transformer, TransformerConfig
from tests.faults import planted
from tests.models import VARIANTS, V, close, make

CONFIGS = {
    "roomy": EngineConfig(),
    "few blocks": EngineConfig(max_batch=3, n_blocks=18, block_size=4),
    "small pieces": EngineConfig(max_batch=5, block_size=4, n_blocks=17, prefill_tokens=5),
    "nothing shared": EngineConfig(share_prefixes=False, prefill_tokens=7, block_size=8, packed=False),
    "blocks of one": EngineConfig(max_batch=4, block_size=1, n_blocks=70),
    "one row": EngineConfig(max_batch=1),
}


def greedy(n: int, **changes) -> SamplingConfig: return SamplingConfig(max_new_tokens=n, temperature=0, **changes)


def mixed(n: int, seed: int) -> list[Request]:
    "Requests of every kind, many of which begin with the same tokens."
    dice = random.Random(seed)
    common, out = [dice.randrange(V) for _ in range(20)], []
    for i in range(n):
        prompt = common[: dice.randrange(21)] if dice.random() < .6 else []
        prompt = prompt + [dice.randrange(V) for _ in range(dice.randrange(1, 25))]
        out.append(Request(tuple(prompt), SamplingConfig(
            max_new_tokens=dice.randrange(1, 40), temperature=dice.choice([0, 1, .7]), top_k=dice.choice([None, 5]),
            top_p=dice.choice([None, .9]), min_p=dice.choice([None, .05]), typical_p=dice.choice([None, None, .9]), seed=i,
            eos_id=dice.choice([None, 3, (4, 5)]), min_new_tokens=dice.choice([0, 6]), repetition_penalty=dice.choice([1, 1.3]),
            presence_penalty=dice.choice([0, .5]), no_repeat_ngram=dice.choice([None, 2]), on_full="stop")))  # fmt: skip
    return out


def tokens(events: list[Event]) -> list[int | None]: return [event.token for event in events]


def answers(engine: Engine | OneAtATime, requests: list[Request]) -> list[list[int | None]]: return list(map(tokens, engine.run(requests)))


def alone(model: Transformer, requests: list[Request]) -> list[list[int]]:
    return [generate(model, list(r.ids), r.sampling, constraint=r.constraint)[0] for r in requests]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_answer_is_that_of_the_same_request_alone(variant):
    model, seed = make("decoder", variant, context_length=64), list(VARIANTS).index(variant)
    for i, config in enumerate(CONFIGS.values()):
        requests = mixed(8, 10 * seed + i)
        wanted = alone(model, requests)
        engine = Engine(model, config)
        assert answers(engine, requests) == wanted
        assert answers(OneAtATime(model), requests) == wanted
        stats = engine.stats()
        assert stats.used == stats.running == stats.waiting == 0 and stats.free + stats.shared == stats.blocks
        assert stats.tokens_written == sum(map(len, wanted)) and stats.finished == 8
        assert stats.tokens_read <= stats.positions and all(users == 0 for users in engine.blocks.users)


@pytest.mark.parametrize("seed", range(4))
def test_a_wild_hour(seed):
    "Requests come and are called off at any moment; those that stay get their texts, and those that go, beginnings of them."
    model, dice = make("decoder", "gpt2" if seed == 1 else "llama", context_length=64), random.Random(seed)
    requests = mixed(24, 100 + seed)
    wanted = alone(model, requests)
    engine = Engine(model, EngineConfig(max_batch=4, n_blocks=20, block_size=4, prefill_tokens=9, max_waiting=5))
    got: dict[int, list[Event]] = {}
    number_of: dict[int, int] = {}
    todo = list(range(24))
    while todo or engine.busy():
        while todo and dice.random() < .5:
            try: number = engine.submit(requests[todo[0]])
            except QueueFull as full:
                assert full.retry_after > 0
                break
            number_of[number], got[number] = todo.pop(0), []
        if got and dice.random() < .1: engine.cancel(dice.choice(list(got)))
        for event in engine.step(): got[event.request].append(event)
        stats = engine.stats()
        assert stats.used + stats.free + stats.shared == stats.blocks == 20 and stats.running <= 4
    for number, events in got.items():
        assert all(event.finish is None for event in events[:-1]) and events[-1].finish in ("stop", "length", "cancelled")
        text = [event.token for event in events if event.token is not None]
        whole = wanted[number_of[number]]
        assert text == whole[: len(text)] and (len(text) == len(whole) or events[-1].finish == "cancelled")
    assert engine.stats().preemptions and any(events[-1].finish == "cancelled" for events in got.values())


FAULTS = {
    "a block is free as soon as one of its users goes": ("            if self.users[block]: continue\n", ""),
    "a name stands for a block's own tokens alone": ("hashlib.sha256(before + tokens)", "hashlib.sha256(tokens)"),
    "padding is written down": ("new if cache.kept is None else new[:, :, cache.kept]", "new[:, :, : len(cache.to)]"),
    "a copy begins at the block's beginning": ("size + offset if near else offset", "size + offset if near else 0"),
    "all blocks are thought to be neighbours": ("near = own == list(range(own[0], own[0] + len(own)))", "near = True"),
    "who is preempted keeps what was read": ("work.blocks, work.read, work.slot = [], 0, -1", "work.blocks, work.slot = [], -1"),
    "others' blocks come at the wrong end": (
        "work.blocks.append(block)\n            work.read +=", "work.blocks.insert(0, block)\n            work.read +="),  # fmt: skip
    "common dice": ("exponential_(generator=choice.chooser.generator)", "exponential_(generator=choices[0].chooser.generator)"),
    "a block that is known can be written on": ("            del self.known[self.digests.pop(block)]\n", ""),
}
VARIANT_OF = {  # where distances count, or where the first position seen stands within a block
    "a copy begins at the block's beginning": "window", "others' blocks come at the wrong end": "alibi",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, monkeypatch):
    "What the tests above would say if something were wrong."
    faulty = planted(batching, *FAULTS[fault], monkeypatch)
    model = make("decoder", VARIANT_OF.get(fault, "llama"), context_length=64)
    for seed in range(6):
        requests = mixed(14, seed)
        wanted = alone(model, requests)
        for config in CONFIGS.values():
            engine = faulty.Engine(model, faulty.EngineConfig(**vars(config)))
            theirs = [faulty.Request(r.ids, r.sampling) for r in requests]
            try: found = [tokens(events) for events in engine.run(theirs)]
            except Exception: return
            if found != wanted: return
    raise AssertionError(f"nobody notices that {fault}")


def test_prefixes_are_read_once():
    model = make("decoder", "llama", context_length=64)
    requests = [Request((*range(20), i), greedy(8)) for i in range(20, 28)]
    wanted = alone(model, requests)
    for share, read in ((True, 21 + 7 * 1 + 8 * 7), (False, 8 * 21 + 8 * 7)):
        engine = Engine(model, EngineConfig(block_size=4, share_prefixes=share))
        assert answers(engine, requests) == wanted
        assert engine.stats().tokens_read == read and engine.stats().tokens_reused == (35 * 4 if share else 0)
    engine = Engine(model, EngineConfig(block_size=4))
    answers(engine, requests[:1])
    before = engine.stats()
    assert before.shared == 28 // 4 and before.used == 0
    assert answers(engine, requests[:1]) == wanted[:1] and engine.stats().tokens_reused == 20  # 21 tokens; one at least is read
    even = Request(tuple(range(20)), greedy(3))  # all of its blocks are known, and the last is read all the same
    assert answers(engine, [even, even]) == alone(model, [even, even]) and engine.stats().tokens_reused == 20 + 16 + 16
    follow = Request((*requests[0].ids, *wanted[0], 5), greedy(4))  # the answer is part of the next prompt, as in a conversation
    assert answers(engine, [follow]) == alone(model, [follow])
    assert engine.stats().tokens_reused == 52 + 28


def test_blocks_that_nobody_needs_are_forgotten_in_order():
    blocks = Blocks(3)
    taken = [blocks.take(), blocks.take(1), blocks.take(2)]
    assert taken == [1, 2, 3] and blocks.take() is None
    for block, name in zip(taken, (b"a", b"b", b"c")): blocks.register(block, name)
    blocks.register(2, b"a")  # another block is known by this name already
    blocks.release([1, 2])
    assert blocks.find(b"a") == 1 and blocks.available == 1
    blocks.release([1, 3])  # the end of a text goes first
    assert [blocks.take(), blocks.take()] == [2, 3] and blocks.find(b"c") is None and blocks.find(b"a") == 1
    with pytest.raises(BatchingError, match="released twice"): blocks.release([1, 1])
    for wrong in (0, 4, -1):
        with pytest.raises(BatchingError, match="no user"): blocks.release([wrong])
    with pytest.raises(BatchingError, match="no user"): Blocks(2).register(1, b"a")


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_call_for_rows_of_every_length(variant):
    model = make("decoder", variant, context_length=32)
    cache = PagedCache(2, 3, 24, 4, model.config.window)
    order = (torch.randperm(24, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    cache.tables[:] = order[:8], list(range(1, 9)), order[8:16]
    cache.tables[1] = sorted(set(range(1, 25)) - set(order[:8]) - set(order[8:16]))
    texts = torch.randint(0, V, (3, 32), generator=torch.Generator().manual_seed(1))
    read = [0, 0, 0]
    with torch.inference_mode():
        for counts in ((5, 2, 5), (1, 7, 3), (1, 1, 1), (4, 0, 4), (1, 1, 2)):
            rows = [b for b in range(3) if counts[b]]
            T = max(counts)
            ids = torch.stack([texts[b, read[b] + counts[b] - T :][:T] if read[b] + counts[b] >= T else
                               torch.cat([texts[b, :1].expand(T - read[b] - counts[b]), texts[b, : read[b] + counts[b]]]) for b in rows])
            cache.plan(rows, [read[b] for b in rows], [counts[b] for b in rows])
            last = model(ids, cache=cache)[:, -1]
            for row, b in zip(last, rows):
                read[b] += counts[b]
                close(row, model(texts[b : b + 1, : read[b]])[0, -1], 1e-4)
    assert cache.nbytes == 2 * 25 * 4 * 2 * model.config.attention.n_kv * model.config.attention.size * 4


def test_what_a_cache_refuses():
    cache = PagedCache(1, 2, 4, 4)
    cache.tables[0] = [1, 2, 3, 4]
    with pytest.raises(BatchingError, match="plan"): cache.extend(1, 1)
    for rows, starts, counts in (([], [], []), ([0], [0], [0]), ([2], [0], [1]), ([0], [-1], [1]), ([0], [16], [1]), ([0, 1], [0], [1])):
        with pytest.raises(BatchingError, match="plan"): cache.plan(rows, starts, counts)
    cache.plan([0], [0], [3])
    with pytest.raises(BatchingError, match="plan"): cache.extend(1, 2)
    with pytest.raises(BatchingError): PagedCache(0, 1, 1)


def test_behind_the_window_blocks_are_free_again():
    model = make("decoder", "window", context_length=64)
    engine = Engine(model, EngineConfig(block_size=2, share_prefixes=False))
    engine.submit(Request((1, 2, 3), greedy(50)))
    while engine.busy():
        engine.step()
        assert engine.stats().used <= 3


def test_log_probabilities():
    model = make()
    request = Request((1, 2, 3), SamplingConfig(max_new_tokens=6, temperature=.5, top_k=3, seed=0), logprobs=4)
    [events] = Engine(model).run([request])
    for i, event in enumerate(events):
        scores = model(torch.tensor([[1, 2, 3, *tokens(events)[:i]]]))[0, -1].log_softmax(-1)
        close(torch.tensor(event.logprob), scores[event.token])
        best = scores.topk(4)
        assert [id for id, _ in event.top] == best.indices.tolist()
        close(torch.tensor([p for _, p in event.top]), best.values)
    [plain] = Engine(model).run([replace(request, logprobs=None)])
    assert all(event.logprob is None and event.top == () for event in plain) and tokens(plain) == tokens(events)
    [few] = Engine(model).run([replace(request, logprobs=0)])
    assert all(event.logprob is not None and event.top == () for event in few)
    [all_of_them] = Engine(model).run([replace(request, logprobs=10**6)])
    assert len(all_of_them[0].top) == V


def test_constraints_row_by_row():
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(tokenizer.vocab_size + 5, d_model=32, n_layer=2, n_head=4, context_length=32)).eval()
    patterns = [r"[0-9]{2}\.", "yes|no", "a*b"]
    requests = [Request((65 + i,), SamplingConfig(max_new_tokens=12, temperature=t, seed=i), regex_constraint(pattern, tokenizer))
                for i, pattern in enumerate(patterns) for t in (0, 1)]  # fmt: skip
    requests.insert(2, Request((70,), greedy(12)))
    found = Engine(model).run(requests)
    assert list(map(tokens, found)) == alone(model, requests)
    for request, events in zip(requests, found):
        if request.constraint is not None and len(events) < 12: assert events[-1].finish == "stop"

    class Faulty:
        start = 0

        def allowed(self, state):
            if state > 1: raise KeyError("lost")
            return torch.ones(20, dtype=torch.bool)

        def advance(self, state, id): return state + 1

        def complete(self, state): return False

    class Nothing(Faulty):
        def allowed(self, state): return torch.zeros(20, dtype=torch.bool)

    good, bad, none = Engine(model).run([Request((1,), greedy(5)), Request((1,), greedy(5), Faulty()), Request((2,), greedy(5), Nothing())])
    assert tokens(good) == generate(model, [1], greedy(5))[0]
    assert len(bad) == 3 and bad[-1].finish == "error" and "KeyError" in bad[-1].message
    assert [event.finish for event in none] == ["error"] and "no token" in none[0].message


def test_ids_that_the_tokenizer_does_not_have_are_not_written():
    model = make()
    wanted = [int(model(torch.tensor([[5]]))[0, -1, :9].argmax())]
    assert answers(Engine(model, EngineConfig(vocab_size=9)), [Request((5,), greedy(1))]) == [wanted]
    [events] = Engine(model, EngineConfig(vocab_size=2)).run([Request((5,), SamplingConfig(max_new_tokens=20, seed=0))])
    assert set(tokens(events)) <= {0, 1}


def test_a_full_context_ends_a_text():
    model = make(context_length=24)
    for length in (20, 23, 24):
        request = Request(tuple(range(length)), greedy(100))
        [events] = Engine(model, EngineConfig(block_size=5)).run([request])
        assert tokens(events) == generate(model, list(request.ids), greedy(100, on_full="stop"))[0]
        assert len(events) == 25 - length and events[-1].finish == "length"


def test_ends():
    model = make()
    [first] = generate(model, [1, 2], greedy(10))
    [events] = Engine(model).run([Request((1, 2), greedy(10, eos_id=first[4]))])
    assert tokens(events) == first[: first.index(first[4]) + 1] and events[-1].finish == "stop"
    for engine in (Engine(model, EngineConfig(max_batch=1)), OneAtATime(model)):
        now = time.monotonic()
        running, waiting = engine.submit(Request((1,), greedy(15))), engine.submit(Request((2,), greedy(15)))
        assert [event.request for event in engine.step()] == [running]
        late = engine.submit(Request((3,), greedy(15), deadline=now))
        engine.cancel(running)
        engine.cancel(999)
        events = engine.step()
        assert {(e.request, e.finish) for e in events if e.finish} == {(running, "cancelled"), (late, "deadline")}
        assert [e.request for e in events if e.token is not None] == [waiting]
        engine.cancel(running)  # it has ended
        engine.cancel(waiting)
        assert [(e.request, e.finish) for e in engine.step()] == [(waiting, "cancelled")]
        assert not engine.busy() and engine.step() == [] and engine.stats().running == 0


def test_a_sick_model_ends_its_texts():
    model = make()
    with torch.no_grad(): model.out.weight.fill_(float("nan"))
    for settings in (greedy(5), SamplingConfig(max_new_tokens=5, seed=0)):
        [events] = Engine(model).run([Request((1,), settings)])
        assert [event.finish for event in events] == ["error"] and "NaN" in events[0].message


def test_the_first_come_first():
    model = make()
    engine = Engine(model, EngineConfig(max_batch=2))
    numbers = [engine.submit(Request((i,), greedy(4))) for i in range(6)]
    firsts = []
    while engine.busy(): firsts += [event.request for event in engine.step() if event.request not in firsts]
    assert firsts == numbers


def test_a_long_prompt_stops_nobody():
    model = make(context_length=64)
    engine = Engine(model, EngineConfig(prefill_tokens=6))
    quick = engine.submit(Request((1,), greedy(30)))
    engine.step()
    slow = engine.submit(Request(tuple(range(40)), greedy(3)))
    seen = []
    for _ in range(7):
        before = engine.stats().positions
        events = engine.step()
        assert quick in {event.request for event in events} and engine.stats().positions - before <= 7
        seen.append(slow in {event.request for event in events})
    assert seen == [False] * 6 + [True]


def test_others_submit_while_one_steps():
    model = make(context_length=64)
    requests = mixed(24, 7)
    wanted = alone(model, requests)
    engine, got, lock = Engine(model, EngineConfig(max_batch=4, max_waiting=3)), {}, threading.Lock()

    def customer(mine: list[int]) -> None:
        for i in mine:
            while True:
                with lock:
                    try: got[engine.submit(requests[i])] = (i, [])
                    except QueueFull: pass
                    else: break
                time.sleep(.001)

    threads = [threading.Thread(target=customer, args=(list(range(k, 24, 4)),)) for k in range(4)]
    for thread in threads: thread.start()
    while any(thread.is_alive() for thread in threads) or engine.busy():
        events = engine.step()
        with lock:
            for event in events: got[event.request][1].append(event.token)
    assert all(text == wanted[i] for i, text in got.values()) and len(got) == 24


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = make(context_length=64).to(dtype)
    requests = [Request((i, i + 1), greedy(12)) for i in range(5)]
    found = answers(Engine(model), requests)
    if dtype == torch.float64: assert found == alone(model, requests)
    else: assert all(len(text) == 12 for text in found)  # rounded so much that order decides


def test_the_model_is_left_as_it_is():
    model = make()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    answers(Engine(model), [Request((1, 2), greedy(5))])
    assert [type(module) for module in model.modules()] == kinds and not model.training
    for name, x in model.state_dict().items(): assert torch.equal(x, before[name])
    seen = []
    model.decoder.blocks[0].mlp.down.register_forward_hook(lambda *_: seen.append(1))
    answers(Engine(model), [Request((1, 2), greedy(5))])
    assert len(seen) == 5  # a hook on a linear map is called all the same


def test_transformers_writes_the_same(tmp_path):
    LlamaForCausalLM = pytest.importorskip("transformers").LlamaForCausalLM
    model = make(context_length=64)
    save_pretrained(model, tmp_path / "llama", layout="llama")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    theirs.generation_config.pad_token_id, theirs.generation_config.eos_token_id = 0, None
    requests = [Request(tuple((5 * i + j) % V for j in range(3 + 4 * i)), greedy(16)) for i in range(6)]
    for request, text in zip(requests, answers(Engine(model, EngineConfig(max_batch=3, block_size=4)), requests)):
        ids = torch.tensor([request.ids])
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert found[0, len(request.ids) :].tolist() == text


REFUSED = {
    "empty": (Request(()), "empty"), "outside": (Request((1, V)), "no token"), "negative": (Request((-1,)), "no token"),
    "long": (Request(tuple(range(25))), "reads 24"), "stop strings": (Request((1,), SamplingConfig(stop="end")), "stop strings"),
    "too much": (Request((1, 2), greedy(15)), "raise n_blocks"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_are_refused(case):
    request, says = REFUSED[case]
    engine = Engine(make(), EngineConfig(n_blocks=3, block_size=5))
    with pytest.raises(BatchingError, match=says): engine.submit(request)
    assert not engine.busy() and answers(engine, [Request((1, 2), greedy(14))]) == alone(make(), [Request((1, 2), greedy(14))])


def test_what_else_is_refused():
    for kind in ("encoder", "encoder-decoder"):
        with pytest.raises(BatchingError): Engine(make(kind))
        with pytest.raises(BatchingError): OneAtATime(make(kind))
    table = NGram.train([[1, 2, 3]], NGramConfig(order=2), vocab_size=5) if hasattr(NGram, "train") else object()
    for other in (table, torch.nn.Linear(2, 2), lambda ids: ids):
        with pytest.raises(BatchingError, match="decoder"): Engine(other)
    for name in ("max_batch", "block_size", "n_blocks", "max_waiting", "prefill_tokens", "vocab_size"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(BatchingError, match=name): EngineConfig(**{name: value})
    for ids in ("text", [1.5], [[1]], [True]):
        with pytest.raises(BatchingError, match="prompt"): Request(ids)
    with pytest.raises(BatchingError, match="logprobs"): Request((1,), logprobs=-1)
    with pytest.raises(BatchingError, match="SamplingConfig"): Request((1,), {"temperature": 0})
    engine = Engine(make(), EngineConfig(max_waiting=1))
    engine.submit(Request((1,)))
    with pytest.raises(QueueFull, match="1 requests wait") as full: engine.submit(Request((1,)))
    assert full.value.retry_after > 0
