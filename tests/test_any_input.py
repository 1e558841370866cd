"""Any input: whatever the command is given ends well or in one line,
and whatever a public function is given in a result or an LmbookError.

What is fair stands at the top of `tests/any_input.py`. `--hypothesis-profile=search` tries fifty times as many, others each time.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import settings

import lmbook
import lmbook.cli as cli
from lmbook.core import LmbookError, TextTokenizer
from lmbook.runs import train_run
from lmbook.transformer import Classifier, ClassifierConfig, Transformer, TransformerConfig
from tests import any_input
from tests.any_input import SOFT, WORDS, Maker, TimeIsUp, bounded
from tests.stories import CPU, SMALL, STORIES, config, write_stories

pytestmark = pytest.mark.skipif(os.name == "nt" or not Path("/proc/self/statm").exists(), reason="no such limits of time and memory")
SEARCH = settings.get_current_profile_name() == "search"
TIMES, SEED = (50, random.randrange(10**9)) if SEARCH else (1, 0)
CALLS = int(os.environ.get("CASES", 300 if SEARCH else 8))  # of each function and method


def rng(*key: object) -> random.Random: return random.Random(f"{SEED} {key}")


# ---------------------------------------------------------------- the command

NUMBERS = (
    "0", "-1", "1", "2", "1e3", "1.5", "nan", "inf", "-inf", "1e400", "1e-400",
    "", "9" * 30, "9" * 5000, "1_0", "０３", " 3 ", "0x10", "true",
)  # fmt: skip
MUCH = {"9" * 30, "1e400", "inf"}  # where there is one of these, the command may have to be stopped
SETTINGS = [f"{k}={v}" for k, v in (SMALL | CPU).items()]
VALID: dict[str, tuple[list[str], list[str]]] = {  # words by place, and options, that are quick
    "train": ([], ["--text", "mine.txt", "--by", "line", "--out", "new", "--steps", "1", "--tokenizer", "bytes", "--set", *SETTINGS]),
    "finetune": (["run"], ["--conversations", "asked.jsonl", "--out", "new", "--epochs", "1", "--device", "cpu"]),
    "clean": ([], ["--text", "mine.txt", "--out", "new", "--steps", "normalise", "empty"]),
    "quantize": (["run"], ["--out", "new", "--group-size", "8"]),
    "generate": (["run"], ["--tokens", "2"]),
    "chat": (["run"], []),
    "doctor": ([], []),
    "evaluate": (["run"], ["--text", "mine.txt", "--megabytes", "0.001"]),
    "tokenize": (["run", "a text"], []),
    "export": (["run"], ["--out", "new"]),
    "plan": ([], ["--hours", "24"]),
}
FIELDS = [f"{field}={value}" for field in any_input.settings_of_a_run() for value in (*NUMBERS, "null",
    "[1]", '{"a": 1}', "maybe", "\0", "")]


class Option(NamedTuple):
    "An option of a command, by the field of its dataclass."

    name: str
    kind: Literal["place", "flag", "one", "several"]
    number: bool = False
    choices: tuple[str, ...] = ()


def option_of(name: str, hint: Any) -> Option | None:
    marks = []
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        marks += map(str, more)
    if any("suppress" in mark.lower() for mark in marks): return None
    parts = [part for part in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)) if part is not type(None)]
    choices = [word for part in parts for word in get_args(part) if get_origin(part) is Literal]
    several = any(get_origin(part) is tuple for part in parts)
    kind = "place" if any("positional" in mark.lower() for mark in marks) else "flag" if hint is bool else "several" if several else "one"
    return Option(name, kind, bool({int, float} & {*parts}), tuple(choices))


def options_of(name: str) -> list[Option]:
    hints = get_type_hints(cli.COMMANDS[name], include_extras=True)
    return [found for f in fields(cli.COMMANDS[name]) if (found := option_of(f.name, hints[f.name]))]


def values_for(option: Option, names: list[str]) -> list[str]:
    "What may stand behind an option, by what is known of it."
    if option.number: return [*NUMBERS, "word"]
    if option.name == "set": return [*FIELDS, *WORDS, "=", "=1", "a=", "lr", "lr==1"]
    return [*names, *WORDS, *option.choices]


def called(name: str, *given: tuple[Option, list[str]]) -> list[str]:
    "The words of a command that has these options beside, or in place of, the valid ones."
    by_place = [option for option in options_of(name) if option.kind == "place"]
    first, more = list(VALID[name][0]), []
    for option, values in given:
        words = "--" + option.name.replace("_", "-")
        if option in by_place: first[by_place.index(option)] = values[0]
        elif option.kind == "flag": more.append(words)
        elif option.kind == "one": more.append(f"{words}={values[0]}")
        else: more += [words, *values]
    return [name, *first, *VALID[name][1], *more]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    train_run(config(write_stories(folder), steps=1), folder / "run")
    rows = [{"prompt": "Who?", "answer": "A cat."}] * 2
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "mine.txt").write_text("".join(story + "\n" for story in STORIES[:5]), encoding="utf-8")
    return folder


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    "The hub is where nobody answers. Its library has read the environment when it was loaded: what it read is changed."
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # so that it does not try again and again


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    "A folder with a text, a run, and things of every kind, in which one stands."
    without_network(monkeypatch)
    monkeypatch.delenv("LMBOOK_DEBUG", raising=False)
    yield tmp_path
    for shut in tmp_path.rglob("shut"): shut.chmod(0o700)


def make_place(template: Path, folder: Path) -> list[str]:
    shutil.copytree(template, folder)
    return [*any_input.files(folder), "mine.txt", "run", "run/run.json", "run/config.json"]


def run_command(words: list[str], stdin: bytes, seconds: float = 5) -> tuple[int, str, str]:
    "What a command ends with, and what it says."
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        with bounded(seconds, 2, KeyboardInterrupt): code = cli.main(words)
        return code, sys.stdout.getvalue(), sys.stderr.getvalue()
    finally: sys.stdin, sys.stdout, sys.stderr = before


def what_is_wrong(words: list[str], code: int, err: str, before: set[str], after: set[str]) -> str:
    "Empty where a command ended as it should."
    lines = err.splitlines()
    mine = [line for line in lines if line.startswith("lmbook: ")]
    if "Traceback" in err: return "a traceback"
    if code == 130 and not any(much in word for word in words for much in MUCH): return "no end"
    if code == 1 and (len(mine) != 1 or lines[-1] != mine[0]): return "more or less than one line"
    said = re.search(r"For full helptext|^lmbook: ", err, re.MULTILINE)
    if code == 2 and not said: return "nothing that says what is wrong with the words"
    if code not in (0, 1, 2, 130): return "another code"
    new = {name for name in after - before if name.split("/")[0] != "run"}
    if half := [name for name in new if Path(name).name.startswith(".")]: return f"left behind: {half}"
    if code in (1, 2) and new: return f"left behind: {sorted(new)}"
    return ""


def contents() -> set[str]: return {str(p.relative_to(".")) for p in Path().rglob("*")}


def try_commands(cases: list[list[str]], template: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    problems, at = [], None
    for n, words in enumerate(cases):
        if at is None:
            at = folder / f"case{n}"
            make_place(template, at)
        monkeypatch.chdir(at)
        stdin = rng("stdin", n).choice([b"A text.", b"", b"\xff\xfe", "\ufeff长夜".encode(), b"\0" * 100])
        before = contents()
        try: code, _, err = run_command(words, stdin)
        except Exception as error:
            code, err = -1, ""
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        else: problem = what_is_wrong(words, code, err, before, contents())
        if problem: problems.append(f"{[w[:80] for w in words]}: {problem}; {err[-300:]}")
        if contents() != before or problem: at = None
    return problems


@pytest.mark.parametrize("name", sorted(VALID))
def test_whatever_an_option_is_given_the_command_ends_well_or_in_one_line(name, template, place, monkeypatch):
    cases = []
    names = make_place(template, place / "names")
    draw, few = rng(name), TIMES * (1 if name == "train" else 5)
    options = options_of(name)
    for option in options:
        values = list(dict.fromkeys(values_for(option, names)))
        cases += [called(name, (option, [value])) for value in draw.sample(values, min(len(values), 1 if option.kind == "flag" else few))]
    for _ in range(10 * TIMES):
        drawn = draw.sample(options, min(3, len(options)))
        cases.append(called(name, *((option, draw.choices(values_for(option, names), k=draw.choice([1, 1, 2]))) for option in drawn)))
    problems = try_commands(cases, template, place, monkeypatch)
    print(f"{name}: {len(cases)} tried")
    assert not problems, "\n".join([f"{len(problems)} of {len(cases)}", *problems])


# ---------------------------------------------------------------- the library

NEEDS = {  # what cannot be called with values of its types alone, and why (* stands for any name); the list may only become shorter
    "checkpoints.sweep": "removes files", "claims.check_claim": "judges the book's own list",
    "core.seed_everything": "the state of everybody's dice", "core.set_random_state": "the state of everybody's dice",
    "corpora.python_docs": "reads the whole of the documentation",
    "corpora.load_hub": "asks a network", "corpora.read_corpus": "asks a network",
    "cli.main": "above", "cli.*": "above, by the command", "batches.Batches.*": "each kind of batches has its own",
    "dialogue.ChatLessons.*": "a kind of batches",
    "optimizers.*update": "called by `step`, with its own groups",
    "tokenization.Tokenizer": "each kind of tokenizer has its own", "runs.train_run": "above: lmbook train",
    "streaming.Job": "works on an event loop: tests of its own", "streaming.Worker.*": "works on an event loop: tests of its own",
    "streaming.write_texts": "works on an event loop: tests of its own",
    "streaming.Fields.get": "knows the types of JSON: tests of its own", "serving.serve": "listens until it is told to end",
    "grammar.expectations": "an exact sum over the whole grammar: longer than a call may take here",
    "cluster.*": "works on processes: tests of its own", "data_parallel.*": "works on ranks: tests of its own",
    "distributed.*": "works on ranks: tests of its own", "model_parallel.*": "works on ranks: tests of its own",
    "experts.expert_parallel": "works on ranks: tests of its own", "speed.measure_roofline": "fills the memory that it is told",
    "speed.Prefetch.*": "goes through batches of a kind of their own",
    "finetuning.LabelledTexts.make": "called with what its plan gave",
    "pretraining.Mixture.make": "called with what its plan gave",
    "*.__getitem__": "Python asks for an IndexError or a KeyError there",
}  # fmt: skip
# What still ends in somebody else's error, and the case that shows it; the list may only become shorter.
KNOWN: dict[str, dict[str, int]] = {
    "attention.causal_mask": {"RuntimeError": 1},
    "batches.Examples.make": {"IndexError": 0, "ValueError": 3},
    "bilstm.bio_tags": {"ValueError": 3},
    "bilstm.influence": {"AttributeError": 5},
    "cache.KVCache.extend": {"RuntimeError": 1},
    "checkpoints.Checkpoints.__call__": {"OSError": 4},
    "constraints.JsonMachine.accepts": {"ValueError": 0},
    "constraints.JsonMachine.step": {"ValueError": 0},
    "constraints.RegexMachine.accepts": {"IndexError": 0},
    "constraints.RegexMachine.step": {"IndexError": 1},
    "core.Check.shares": {"AttributeError": 0},
    "core.Drawing.arrow": {"StopIteration": 3},
    "core.Drawing.box": {"KeyError": 6},
    "core.Drawing.save": {"ValueError": 1},
    "core.Drawing.text": {"ValueError": 1},
    "corpora.Document.record": {"KeyError": 0},
    "corpora.Document.sentence_spans": {"ValueError": 0},
    "corpora.Document.separator": {"KeyError": 1},
    "corpora.Document.text": {"KeyError": 0},
    "duplicates.NearDuplicates.decide": {"ValueError": 0},
    "files.open_bytes": {"UnicodeEncodeError": 1},
    "files.open_text": {"ValueError": 0},
    "grammar.Expectations.bits_per_byte": {"KeyError": 0},
    "grammar.Grammar": {"KeyError": 1},
    "grammar.Grammar.choice": {"KeyError": 0},
    "grammar.Grammar.expand": {"KeyError": 0},
    "grammar.Grammar.pattern": {"KeyError": 0},
    "grammar.leaves": {"AttributeError": 0},
    "grammar.phrase": {"AttributeError": 0, "ValueError": 4},
    "grammar.readings": {"KeyError": 0},
    "grammar.replay": {"IndexError": 0, "StopIteration": 1},
    "grammar.sentences": {"AttributeError": 0, "IndexError": 5},
    "language_models.NGram.token_log_probs": {"TypeError": 0},
    "language_models.Vocabulary.decode": {"IndexError": 1},
    "language_models.Vocabulary.to_bytes": {"UnicodeEncodeError": 7},
    "networks.Value.draw": {"AttributeError": 0},
    "optimizers.ListOptimizer.load_state_dict": {"KeyError": 0},
    "optimizers.SGD.names": {"KeyError": 0},
    "perplexity.choice_nats": {"AttributeError": 0},
    "perplexity.floor": {"KeyError": 0},
    "recurrent_lm.CarriedState.load_state_dict": {"KeyError": 0},
    "recurrent_lm.RecurrentLM.initial_state": {"RuntimeError": 5},
    "seq2seq.reverse_task": {"ValueError": 1},
    "small_world.SmallWorld.document": {"IndexError": 0},
    "small_world.SmallWorld.documents": {"IndexError": 1},
    "small_world.SmallWorld.log_prob": {"KeyError": 0},
    "small_world.SmallWorld.sentence_log_probs": {"KeyError": 3},
    "small_world.SmallWorld.smaller_world": {"KeyError": 2},
    "small_world.SmallWorld.synonyms": {"KeyError": 1},
    "small_world.SmallWorld.texts": {"KeyError": 1, "IndexError": 6},
    "training.Trainer.load_state_dict": {"KeyError": 0},
    "training.mean_loss": {"AttributeError": 4},
    "transformer.Embed": {"RuntimeError": 7},
}
UNMADE: dict[str, str] = {  # of what no value can be made, and why; the list may only become shorter
    "bilstm.TaggedSentences.make": "TaggedSentences: no instance in 30 tries",
    "bilstm.TaggedSentences.plan": "TaggedSentences: no instance in 30 tries",
    "core.Box": "Patch, which only the type checker sees",
    "core.Check.settings": "<class 'type'>",
    "corpora.to_dataset": "datasets, which only the type checker sees",
    "optimizers.Together.load_state_dict": "Together: no instance in 30 tries",
    "optimizers.Together.step": "Together: no instance in 30 tries",
    "tokenizer_files.SentencePieceTokenizer.decode": "SentencePieceTokenizer: no instance in 30 tries",
    "tokenizer_files.SentencePieceTokenizer.id_to_token": "SentencePieceTokenizer: no instance in 30 tries",
    "tokenizer_files.SentencePieceTokenizer.to_bytes": "SentencePieceTokenizer: no instance in 30 tries",
}


@cache
def known() -> dict[Any, Any]:
    "Values of the types that are no plain data."
    import matplotlib.figure  # noqa: F401 (whoever is stopped while something is imported leaves half of it)
    import torch._dynamo  # noqa: F401

    from lmbook.batches import Batches, Examples, TokenStream
    from lmbook.constraints import ByteMachine, RegexMachine
    from lmbook.core import Box
    from lmbook.dialogue import ChatFormat, ChatLessons, Conversation, Recent, Talk, messages_of
    from lmbook.federated import FederatedConfig, Federation, SecureClient, SecureConfig, Span
    from lmbook.finetuning import CHAT_SPECIALS, LabelledTexts, LoraConfig, LoraLinear
    from lmbook.grammar import Grammar
    from lmbook.knowledge import ExtractorConfig, TripleExtractor
    from lmbook.language_models import NGram
    from lmbook.long_text import LongClassifier, LongConfig, MemoryReader
    from lmbook.markup import Readable
    from lmbook.objectives import BlankInfilling, Guesses, Marks, Masked, SpanCorruption, SpanMasked
    from lmbook.pretraining import Mixture
    from lmbook.privacy import Attack, PoissonLots, PrivacyConfig, PrivateTrainer
    from lmbook.protection import Pseudonyms, ShardedModels
    from lmbook.quantization import QuantizeConfig, QuantizedLinear, Rounded, round_weight
    from lmbook.search import Answerer, CrossEncoder, Index
    from lmbook.senses import Captioner, CaptionerConfig, Recognizer, RecognizerConfig, Recording
    from lmbook.small_world import SmallWorld
    from lmbook.tokenization import BPE, SPECIALS, ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer
    from lmbook.tokenizer_files import HuggingFaceTokenizer
    from lmbook.training import Stateful, TrainConfig, Trainer
    from lmbook.translation import PhraseTable, Summarizer, Translator, TranslatorConfig, WordAligner
    from lmbook.understanding import Encoder
    from lmbook.word_vectors import WordVectors

    torch.manual_seed(0)
    tokenizers = [ByteTokenizer(), CharTokenizer.train(["abc"]), BPE.train(STORIES, 300)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizers[2].to_json(f"{folder}/tokenizer.json")
        elsewhere = HuggingFaceTokenizer(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
    model = Transformer(TransformerConfig(ByteTokenizer().vocab_size, d_model=8, n_layer=1, n_head=2, context_length=16)).eval()
    world, examples = SmallWorld(), Examples([[1, 2, 3], [4, 5]], batch_size=2)
    vectors = WordVectors(["a", "the goat", "é"], np.eye(3, 4, dtype="f4"))
    marks = Marks(20, 10, 11, 12, sentinels=(13, 14, 15, 16))
    reader = Transformer(TransformerConfig(ByteTokenizer().vocab_size, 8, 1, 2, kind="encoder", types=2, context_length=16))
    judge = CrossEncoder(Classifier(reader, ClassifierConfig(("no", "yes"))), ByteTokenizer())
    quoted = Index.fit([{"text": "the goat", "source": 0, "start": 0, "end": 8}])
    masked = Masked(marks)
    places = [{"text": "a goat", "relations": [((0, 1), (2, 6), "r")]}]
    extractor = TripleExtractor.fit(places, ExtractorConfig(d_model=8, n_layer=1, n_head=2, context_length=16, steps=1))
    both_ways = TransformerConfig(ByteTokenizer().vocab_size, d_model=8, n_layer=1, n_head=2, context_length=32, kind="encoder")
    ear = Recognizer(RecognizerConfig(d_model=8, n_layer=1, n_head=2, n_mels=4, steps=1), "ab")
    eye = Captioner(CaptionerConfig(size=4, patch=2, d_model=8, n_layer=1, n_head=2, longest=6, steps=1), WordTokenizer.train(["a goat"]))
    sounds = [Recording(np.sin(np.arange(n) / 9), rate) for n, rate in ((900, 8000), (400, 8000), (900, 16000), (9, 8000))]
    pairs = [("红羊", "red goat"), ("羊", "goat")]
    translator = Translator.fit(pairs, TranslatorConfig(vocab_size=270, d_model=8, n_layer=1, n_head=2, steps=1, both=True))
    labelled = [{"text": word * 9, "label": word} for word in ("goat ", "cup ")]
    long_texts = LongClassifier.fit(labelled, LongConfig(size=8, overlap=2, vocab_size=260, d_model=8, n_head=2, steps=1))
    private = PrivacyConfig(noise=1.0, lot=1, seed=0), TrainConfig(steps=1, device="cpu")
    from_left = Transformer(TransformerConfig(20, 8, 1, 2, positions="rotary", context_length=16)).eval()

    words = WordTokenizer.train(["a goat"], specials=(*SPECIALS, *CHAT_SPECIALS))
    talker = Transformer(TransformerConfig(words.vocab_size, d_model=8, n_layer=1, n_head=2, context_length=64)).eval()

    def fresh() -> Transformer: return copy.deepcopy(model)  # some change what they are given

    return {
        Tokenizer: tokenizers, TextTokenizer: tokenizers, HuggingFaceTokenizer: [elsewhere], Transformer: [fresh],
        torch.nn.Module: [fresh, lambda: torch.nn.Linear(2, 3)], torch.nn.Embedding: [lambda: torch.nn.Embedding(3, 4)],
        torch.Generator: [lambda: torch.Generator().manual_seed(0)], torch.device: [torch.device("cpu")],
        torch.optim.Optimizer: [lambda: torch.optim.SGD([torch.zeros(2, requires_grad=True)])],
        np.random.Generator: [lambda: np.random.default_rng(0)], random.Random: [lambda: random.Random(0)],
        TokenStream: [TokenStream(np.arange(64) % 9, 2, 8)], Examples: [examples], NGram: [NGram.fit([[0, 1, 2], [1, 2]], 5)],
        Trainer: [lambda: Trainer(copy.deepcopy(model), examples, TrainConfig(steps=1, device="cpu"))], WordVectors: [vectors],
        TripleExtractor: [extractor], Attack: [Attack(np.arange(4.0), np.arange(4) % 2 > 0)],
        PoissonLots: [lambda: PoissonLots([[1, 2, 3], [4, 5]], 1, seed=0)],
        PrivateTrainer: [lambda: PrivateTrainer(copy.deepcopy(model), [[1, 2, 3], [4, 5]], *private[::-1])],
        Grammar: [world.grammar], SmallWorld: [world], ByteMachine: [RegexMachine("a*b")], Box: [Box(1.0, 1.0, 1.0, 1.0, None)],
        LmbookError: [LmbookError], type[LmbookError]: [LmbookError], torch.dtype: [torch.float32], re.Pattern: [re.compile("a")],
        Stateful: [lambda: copy.deepcopy(model)], LongClassifier: [long_texts], MemoryReader: [lambda: MemoryReader(from_left, 4)],
        Encoder: [Encoder(Transformer(both_ways), ByteTokenizer())],
        Marks: [marks], Masked: [masked], SpanMasked: [SpanMasked(marks)], BlankInfilling: [BlankInfilling(marks)],
        torch.nn.Linear: [lambda: torch.nn.Linear(4, 4)], LabelledTexts: [lambda: LabelledTexts([[1, 2], [3]], [0, 1], classes=2)],
        LoraLinear: [lambda: LoraLinear(torch.nn.Linear(4, 4), LoraConfig(rank=2))],
        QuantizedLinear: [lambda: QuantizedLinear(4, 4, QuantizeConfig(group_size=None))],
        Rounded: [round_weight(torch.eye(4), QuantizeConfig(3, 2))],
        Mixture: [lambda: Mixture([examples, examples], [0.5, 0.5], length=4)],
        Recognizer: [ear], Captioner: [eye], WordTokenizer: [eye.tokenizer], Recording: sounds,
        WordAligner: [WordAligner.fit(pairs)], PhraseTable: [PhraseTable.fit(pairs)], Translator: [translator],
        Summarizer: [Summarizer("lead"), Summarizer(writer=translator)],
        CrossEncoder: [judge], Answerer: [lambda: Answerer(quoted, 0.5, judge)],
        SpanCorruption: [SpanCorruption(marks)], Guesses: [lambda: Guesses(masked, examples)],
        Federation: [lambda: Federation(fresh(), {"a": copy.deepcopy(examples)}, FederatedConfig(rounds=1))],
        Batches: [examples], SecureClient: [lambda: SecureClient(1, SecureConfig().encode(torch.ones(3), 2), 2, SecureConfig())],
        Span: [Span.of(torch.eye(2, 4))], Pseudonyms: [Pseudonyms(["Ann", "Bo"])],
        ShardedModels: [lambda: ShardedModels([[1, 2], [3]], ["a", "b"], lambda texts, shard: torch.nn.Embedding(9, 9), shards=1)],
        ChatLessons: [lambda: ChatLessons([messages_of([Talk(random.Random(0)).tell()])], ChatFormat(words))],
        ChatFormat: [ChatFormat(words)], Talk: [lambda: Talk(random.Random(0))],
        Conversation: [lambda: Conversation(copy.deepcopy(talker), words, "a goat", Recent())],
        Readable: [lambda: io.BytesIO(b"<mediawiki><page>"), lambda: io.BytesIO(b"")],
    }  # fmt: skip


def use(result: object) -> None:
    "What comes late comes now: the first items of an iterator, what a context manager does."
    if hasattr(result, "__enter__"):
        with result: pass
    elif hasattr(result, "__next__"):
        for _ in zip(range(20), result): pass


def too_much(error: Exception) -> bool:
    "Whether an error says that so much cannot be counted or held."
    words = "memory|too large|[Oo]verflow|too big|dimension exceeded|out of bounds for int64|index-sized|too many|exceeds"
    return isinstance(error, OverflowError | MemoryError) or re.search(words, str(error)) is not None


def fault(target: tuple[Any, str], maker: Maker) -> tuple[str, str] | None: # the error's name, what led to it; None: it ended as it should
    try:
        with bounded(4, 1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call, said = any_input.prepare(maker, target)
    except (TimeIsUp, MemoryError) as error: return None if maker.much else (type(error).__name__, ": an argument")
    except LmbookError: return None  # a configuration that cannot be
    except any_input.CannotMake: raise
    except Exception as error:
        if maker.foreign or (maker.loose and isinstance(error, SOFT)): return None
        if maker.much and too_much(error): return None
        return type(error).__name__, f": an argument: {str(error)[:120]}"
    try:
        with bounded(0.3 if maker.much else 6, 1), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            use(call())
    except LmbookError: return None
    except (TimeIsUp, MemoryError) as error: return None if maker.much else (type(error).__name__, said())
    except Exception as error:
        if maker.loose and isinstance(error, SOFT): return None
        if maker.much and too_much(error): return None
        if maker.foreign and isinstance(error, TypeError | AttributeError): return None
        return type(error).__name__, f"{said()}: {str(error)[:150]}"
    return None


def modules() -> list[str]: return sorted(p.stem for p in Path(lmbook.__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def case(full: str, n: int, target: tuple[Any, str], names: list[str], seed: int = SEED) -> tuple[str, str] | None:
    maker = Maker(random.Random(f"{seed} {full} {n}"), names, known(), wrong=0.15 if n % 4 == 3 else 0.0)
    return fault(target, maker)


def place_of_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    monkeypatch.chdir(folder)
    without_network(monkeypatch)
    names = any_input.files(folder)
    names.remove("pipe")  # whoever opens it waits, as told
    return names


@pytest.mark.parametrize("name", modules())
def test_whatever_a_function_is_given_it_gives_a_result_or_an_error_of_ours(name, tmp_path, monkeypatch):
    names, problems, tried, unmade = place_of_files(monkeypatch, tmp_path), dict[str, str](), 0, dict[str, str]()
    for full, target in any_input.targets(name).items():
        if any(fnmatchcase(full, pattern) for pattern in NEEDS): continue
        for n in range(CALLS):
            try: problem = case(full, n, target, names)
            except any_input.CannotMake as error:
                unmade[full] = str(error)
                break
            tried += 1
            if problem and problem[0] not in KNOWN.get(full, ()): problems.setdefault(full, f"case {n}: {problem[0]}: {problem[1]}")
    print(f"{name}: {tried} tried")
    for shut in tmp_path.rglob("shut"): shut.chmod(0o700)
    assert not problems, "\n".join(f"{full}: {problem}" for full, problem in problems.items())
    listed = {full for full in UNMADE if full.split(".")[0] == name}
    assert not (more := {full: why for full, why in unmade.items() if full not in listed}), f"make values for these (`known`): {more}"
    assert not (less := listed - set(unmade)), f"of these values are made now; take them from UNMADE: {less}"


@pytest.mark.parametrize(("full", "error"), [(full, error) for full, errors in KNOWN.items() for error in errors])
def test_a_fault_that_is_listed_still_happens(full, error, tmp_path, monkeypatch):
    "Whoever mends one takes it from the list. Where only the arguments changed, another case may show it: look with CASES."
    names = place_of_files(monkeypatch, tmp_path)
    found = case(full, KNOWN[full][error], any_input.targets(full.split(".")[0])[full], names, seed=0)
    for shut in tmp_path.rglob("shut"): shut.chmod(0o700)
    assert found is not None and found[0] == error, f"{full} ends in no {error} any more ({found}): take it from KNOWN"


def test_no_list_names_what_is_not_there():
    there = [full for name in modules() for full in any_input.targets(name)]
    for full in (*KNOWN, *UNMADE): assert full in there, full
    for pattern in NEEDS: assert any(fnmatchcase(full, pattern) for full in there), pattern
