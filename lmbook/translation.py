import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lmbook.batches import Examples
from lmbook.core import Check, LmbookError, evaluating, usable_path, whole_folder, write_whole
from lmbook.evaluation import Score
from lmbook.generation import SamplingConfig, beam_search, generate
from lmbook.pretrained import load_pretrained, save_pretrained
from lmbook.text_metrics import References, bleu, chrf, rouge
from lmbook.tokenization import BPE, SPECIALS, Tokenizer, learn_merges, split_words, utf8
from lmbook.tokenizer_files import load_tokenizer
from lmbook.training import History, TrainConfig, Trainer
from lmbook.transformer import Transformer, preset

class TranslationError(LmbookError):
    "Pairs that teach nothing, a text that cannot be translated or shortened, a file that is none of ours. The message says what to change."

_check = Check(TranslationError)
_IDEOGRAPH = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_LETTER = f"[^\\W{_IDEOGRAPH}]"  # of words that are written with spaces
_UNIT = re.compile(f"[{_IDEOGRAPH}]|{_LETTER}+(?:['’-]{_LETTER}+)*|[^\\w\\s]")
_WIDE = re.compile(f"[{_IDEOGRAPH}\u2e80-\u33ff\uff00-\uffef·“”‘’…—]")
_CLOSING, _OPENING = frozenset(".,!?;:)]}%"), frozenset("([{$")

def split_units(text: str) -> list[str]:
    "The words, numbers and marks of a text; each Chinese character is one by itself."
    [text] = _texts([text])
    return _UNIT.findall(text)

def join_units(units: Iterable[str]) -> str:
    "A text of units: spaces between words, none beside Chinese and none before marks."
    out, glued, quoted = "", True, False
    for unit in _texts(units, "units"):
        wide, quote = bool(_WIDE.match(unit)), unit == '"'
        out += ("" if glued or wide or unit in _CLOSING or (quote and quoted) else " ") + unit
        quoted = quoted != quote
        glued = wide or unit in _OPENING or (quote and quoted)
    return out

def _texts(texts: Any, what: str = "texts") -> list[str]:
    "A list of texts, and not one text by mistake."
    if isinstance(texts, str): raise TranslationError(f"{what} is one text. Give a list of them: [{texts[:20]!r}].")
    try: found = list(texts)
    except TypeError as why: raise TranslationError(f"{what} is {type(texts).__name__}: give a list of texts.") from why
    for i, text in enumerate(found):
        if not isinstance(text, str): raise TranslationError(f"Number {i} of {what} is {type(text).__name__}, not a text.")
    return found

def _columns(records: Any, *names: str) -> list[list[Any]]:
    "Columns of records, each of which is a dict with these names, or holds one value for each in this order. There is one at least."
    if isinstance(records, str | Mapping): raise TranslationError(f"A list of pairs is wanted, or of records with {' and '.join(names)}.")
    try: rows = list(records)
    except TypeError as why: raise TranslationError(f"{type(records).__name__} is no list of pairs or records.") from why
    found = []
    for i, row in enumerate(rows):
        values = [row.get(name) for name in names] if isinstance(row, Mapping) else row
        good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == len(names) and isinstance(values[0], str)
        if not good: raise TranslationError(f"Number {i} is no pair ({', '.join(names)}), and no record with these.")
        found.append(values)
    if not found: raise TranslationError(f"There is nothing to learn from: no pair of {' and '.join(names)}.")
    return [[row[k] for row in found] for k in range(len(names))]

def _pairs(pairs: Any, *names: str) -> list[tuple[str, str]]:
    "Pairs of texts, neither of them empty."
    names = names or ("source", "target")
    rows = [(a, b) for a, b in zip(*_columns(pairs, *names))]
    for i, row in enumerate(rows):
        for name, text in zip(names, row):
            if not isinstance(text, str): raise TranslationError(f"The {name} of pair {i} is {type(text).__name__}, not a text.")
            if not text.strip(): raise TranslationError(f"The {name} of pair {i} is empty: leave the pair out.")
    return rows

Link = tuple[int, int]  # a unit of the source and a unit of the target, from 0

class _Table:
    "t(b | a): how likely a word a of one side, or the empty word, has b for its translation. Only what occurs in a pair is kept."

    def __init__(self, pairs: Sequence[tuple[Sequence[str], Sequence[str]]], rounds: int):
        self.a: dict[str | None, int] = {None: 0}
        self.b: dict[str, int] = {}
        keys, owners, many = list[np.ndarray](), list[np.ndarray](), 0
        rows = []
        for left, right in pairs:
            i = np.array([0, *(self.a.setdefault(word, len(self.a)) for word in left)], dtype=np.int64)
            rows.append((i, np.array([self.b.setdefault(word, len(self.b)) for word in right], dtype=np.int64)))
        self.size = max(len(self.b), 1)
        for i, j in rows:
            keys.append((i[:, None] * self.size + j).ravel())
            owners.append(np.tile(np.arange(many, many + len(j)), len(i)))
            many += len(j)
        self.cells, which = np.unique(np.concatenate(keys), return_inverse=True)
        owner, source = np.concatenate(owners), self.cells // self.size
        empty = sum(len(j) * math.log(len(i)) for i, j in rows)  # where a word comes from is anybody's guess
        self.p, self.nats = np.full(len(self.cells), 1 / self.size), list[float]()  # of a word, before each round
        for _ in range(rounds):
            share = self.p[which]
            total = np.bincount(owner, share)
            self.nats.append(float(empty - np.log(total).sum()) / max(many, 1))
            counts = np.bincount(which, share / total[owner])
            self.p = counts / np.maximum(np.bincount(source, counts), 1e-300)[source]

    def __call__(self, left: Sequence[str], right: Sequence[str]) -> np.ndarray: # (I + 1, J), the empty word first
        i, j = np.array([0, *(self.a.get(word, -1) for word in left)]), np.array([self.b.get(word, -1) for word in right], dtype=np.int64)
        keys = i[:, None] * self.size + j
        at = np.searchsorted(self.cells, keys).clip(0, len(self.cells) - 1)
        return np.where((self.cells[at] == keys) & (i >= 0)[:, None] & (j >= 0), self.p[at], 0.0)

    def best(self, word: str, k: int) -> list[tuple[str, float]]:
        number, names = self.a.get(word, -1), list(self.b)
        if number < 0: return []
        low, high = np.searchsorted(self.cells, [number * self.size, (number + 1) * self.size])
        order = np.argsort(-self.p[low:high], kind="stable")[:k]
        return [(names[int(self.cells[low + i] % self.size)], float(self.p[low + i])) for i in order]

class WordAligner:
    "Which word stands for which, learned from pairs of sentences alone: IBM model 1 (Brown et al. 1993), one for each direction."

    def __init__(self, there: _Table, back: _Table): # tables of the two directions; `fit` makes them
        self.there, self.back = there, back

    @classmethod
    def fit(
        cls,
        pairs: Iterable[Any],  # (source, target), or records with these; at least one, and none of them empty
        rounds: int = 10,  # of expectation and maximisation
    ) -> "WordAligner":
        "Learn from pairs. Raises TranslationError where there are none."
        _check.count("rounds", rounds)
        rows = [(split_units(a), split_units(b)) for a, b in _pairs(pairs)]
        return cls(_Table(rows, rounds), _Table([(b, a) for a, b in rows], rounds))

    def translations(self, word: str, k: int = 3) -> list[tuple[str, float]]: # with their probabilities; none for an unknown word
        "The k likeliest translations of a word of the source."
        _check.count("k", k)
        [word] = _texts([word], "words")
        return self.there.best(word, k)

    def matrix(self, pair: tuple[str, str]) -> np.ndarray: # (I, J) from 0 to 1: how likely unit j of the target comes from unit i
        "The shares of an expectation. A column may sum to less than 1: the rest comes from the empty word."
        [(a, b)] = _pairs([pair])
        return self._shares(self.there, split_units(a), split_units(b))[1:]

    @staticmethod
    def _shares(table: _Table, left: list[str], right: list[str]) -> np.ndarray: # (I + 1, J)
        p = table(left, right)
        return p / np.maximum(p.sum(0), 1e-300)

    def align(self, pair: tuple[str, str]) -> list[Link]: # sorted
        """The units that belong together: the links that both directions choose, and those of one of them beside such a link, as long
        as one of the two words has none yet (the diagonal growth of Koehn, Och and Marcu 2003)."""
        [(a, b)] = _pairs([pair])
        left, right = split_units(a), split_units(b)
        there, back = self._shares(self.there, left, right), self._shares(self.back, right, left)
        one = {(int(i) - 1, j) for j, i in enumerate(there.argmax(0)) if i > 0}
        two = {(i, int(j) - 1) for i, j in enumerate(back.argmax(0)) if j > 0}
        links, more = one & two, True
        while more:
            more = False
            for i, j in sorted((one | two) - links):
                near = any((i + x, j + y) in links for x in (-1, 0, 1) for y in (-1, 0, 1))
                if near and not (any(i == k for k, _ in links) and any(j == k for _, k in links)):
                    links.add((i, j))
                    more = True
        return sorted(links)

    def predict(self, texts: Sequence[str]) -> list[str]:
        "Word by word: the likeliest translation of each, once where it would stand twice in a row. Words never seen are copied."
        out = []
        for text in _texts(texts):
            said = [(self.there.best(unit, 1) or [(unit, 1.0)])[0][0] for unit in split_units(text)]
            out.append(join_units(unit for unit, before in zip(said, ["", *said]) if unit != before))
        return out

def phrase_pairs(
    left: Sequence[str],  # units of the source
    right: Sequence[str],  # and of the target
    links: Iterable[Link],  # which of them belong together
    longest: int = 7,  # units of the source in a phrase
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    "Pieces of both sides with links between them and none to anything else (Koehn, Och and Marcu 2003)."
    _check.count("longest", longest)
    of: list[list[int]] = [[] for _ in left]
    first, last = [len(left)] * len(right), [-1] * len(right)
    for i, j in links:
        _check.that(0 <= i < len(left) and 0 <= j < len(right), f"The link {i, j} is to no unit of {len(left)} and {len(right)}.")
        of[i].append(j)
        first[j], last[j] = min(first[j], i), max(last[j], i)
    for start in range(len(left)):
        low, high = len(right), -1
        for stop in range(start + 1, min(start + longest, len(left)) + 1):
            for j in of[stop - 1]: low, high = min(low, j), max(high, j)
            if high >= 0 and min(first[low : high + 1]) >= start and max(last[low : high + 1]) < stop:
                yield tuple(left[start:stop]), tuple(right[low : high + 1])

class PhraseTable:
    """Translates by pieces that were seen aligned, as few of them as possible and the likeliest, in the order of the source.

    A word that training never showed is copied; one that never had a link is left out.
    """

    def __init__(self, table: Mapping[tuple[str, ...], tuple[tuple[str, ...], float]], known: Iterable[str] = ()):
        "From pieces of the source to their likeliest translation and its probability; and the words of the source that are known."
        for source, (_, p) in table.items():
            _check.that(len(source) > 0 and 0 < p <= 1, f"The piece {source!r} has p={p!r}: a piece is not empty, and p lies in (0, 1].")
        self.table, self.known, self.longest = dict(table), frozenset(known), max(map(len, table), default=1)

    @classmethod
    def fit(
        cls,
        pairs: Iterable[Any],  # as for `WordAligner.fit`
        aligner: WordAligner | None = None,  # None: one is made
        longest: int = 7,  # units of the source in a piece
    ) -> "PhraseTable":
        "Align all pairs, and count their pieces."
        rows, counts = _pairs(pairs), dict[tuple[str, ...], Counter[tuple[str, ...]]]()
        aligner, known = aligner or WordAligner.fit(rows), set[str]()
        for a, b in rows:
            left = split_units(a)
            known.update(left)
            for source, target in phrase_pairs(left, split_units(b), aligner.align((a, b)), longest):
                counts.setdefault(source, Counter())[target] += 1
        best = {source: (target, count[target] / count.total()) for source, count in counts.items() for target in [_likeliest(count)]}
        return cls(best, known)

    def predict(self, texts: Sequence[str]) -> list[str]: return [join_units(self._say(split_units(text))) for text in _texts(texts)]

    def _say(self, units: list[str]) -> list[str]:
        best: list[tuple[int, float, int, tuple[str, ...]]] = [(0, 0.0, 0, ())]  # up to each place: pieces, nats, where the last begins, it
        for stop in range(1, len(units) + 1):
            alone = () if units[stop - 1] in self.known else (units[stop - 1],)
            ways = [(best[stop - 1][0] + 2, best[stop - 1][1], stop - 1, alone)]
            for start in range(max(0, stop - self.longest), stop):
                found = self.table.get(tuple(units[start:stop]))
                if found: ways.append((best[start][0] + 1, best[start][1] - math.log(found[1]), start, found[0]))
            best.append(min(ways))
        out, at = list[str](), len(units)
        while at:
            out = [*best[at][3], *out]
            at = best[at][2]
        return out

def _likeliest(count: Counter[tuple[str, ...]]) -> tuple[str, ...]: return min(count, key=lambda target: (-count[target], target))

def score_translations(predictions: Sequence[str], references: References) -> dict[str, Score]: # one reference or several each
    "BLEU and chrF, from 0 to 100. Chinese is cut into characters (sacrebleu's `zh`), all else by its usual rules (`13a`)."
    chinese = any(_WIDE.search(text) for row in references for text in ([row] if isinstance(row, str) else row))
    return {"BLEU": bleu(predictions, references, tokenize="zh" if chinese else "13a"), "chrF": chrf(predictions, references)}

TranslatorKind = Literal["encoder-decoder", "decoder"]
_THERE, _BACK = "<there>", "<back>"
_NAMES = tuple(f"<name{i}>" for i in range(1, 9))

@dataclass(frozen=True)
class TranslatorConfig:
    "A small Transformer that writes one text from another, and how it is trained."

    kind: TranslatorKind = "encoder-decoder"  # or a decoder that reads the source as a prompt
    both: bool = False  # learn each pair in both directions; a mark before the source says which
    vocab_size: int = 2000  # of a byte-level BPE over both sides, at most
    d_model: int = 96  # numbers at each position
    n_layer: int = 2  # of the encoder and of the decoder, each
    n_head: int = 4
    context_length: int = 64  # tokens of a source, and of a target; of a decoder both together
    dropout: float = 0.0
    steps: int = 400
    batch_size: int = 48  # pairs
    lr: float = 3e-3  # the largest learning rate
    seed: int = 0

    def __post_init__(self) -> None:
        _check.counts(self, "d_model", "n_layer", "n_head", "steps", "batch_size")
        _check.counts(self, "context_length", least=8)
        _check.counts(self, "vocab_size", least=len(SPECIALS) + 2 + len(_NAMES) + 256)
        _check.shares(self, "dropout")
        _check.positive(self, "lr")
        _check.choices(self)

class Translator:
    "A Transformer that writes one text from another: a translation, or whatever else its pairs have shown."

    history: History | None = None  # of the training, where it was trained here

    def __init__(self, model: Transformer, tokenizer: Tokenizer, both: bool = False): # a model that writes, and its own tokenizer
        if model.config.kind == "encoder": raise TranslationError("An encoder reads and does not write: give it a decoder to write with.")
        missing = [name for name in (*SPECIALS, _THERE, _BACK, *_NAMES) if name not in tokenizer.specials]
        if missing: raise TranslationError(f"The tokenizer has no {', '.join(missing[:3])}: it was not made for a Translator.")
        if tokenizer.vocab_size > model.config.vocab_size: raise TranslationError("The tokenizer has more ids than the model: no pair.")
        self.model, self.tokenizer, self.both = model.eval(), tokenizer, both
        self._bos, self._eos = tokenizer.special("<bos>"), tokenizer.special("<eos>")
        self._names = [tokenizer.special(name) for name in _NAMES]

    @classmethod
    def fit(
        cls,
        pairs: Iterable[Any],  # (source, target), or records with these; at least one, and none of them empty
        config: TranslatorConfig = TranslatorConfig(),
        names: Mapping[str, str] | None = None,  # names of the source and how the target has them: pairs with such names are
        # learned a second time, with marks in their place, so that `predict` can be told of other names
    ) -> "Translator":
        "Train from nothing. Raises TranslationError for pairs that are none, or too long for `context_length`."
        rows, known = _pairs(pairs), _glossary(names)
        tokenizer = _tokenizer((text for row in rows for text in row), config.vocab_size)
        torch.manual_seed(config.seed)
        parts = {name: getattr(config, name) for name in ("kind", "d_model", "n_layer", "n_head", "context_length", "dropout")}
        made = cls(Transformer(preset("tiny", tokenizer.vocab_size, positions="learned", **parts)), tokenizer, config.both)
        examples = []
        for i, (a, b) in enumerate(rows):
            found = [name for name in _found(a, known) if _found(b, [known[name]])][: len(_NAMES)]
            for here in ([], found) if found else ([],):
                there = [known[name] for name in here]
                examples.append(made._example(a, b, False, here, there, i))
                if config.both: examples.append(made._example(b, a, True, there, here, i))
        random.Random(config.seed).shuffle(examples)
        batches = Examples(examples, batch_size=min(config.batch_size, len(examples)), join=made._joined, sort=8, seed=config.seed)
        how = TrainConfig(steps=config.steps, lr=config.lr, warmup=config.steps // 10, seed=config.seed, device="cpu")
        try: made.history = Trainer(made.model.train(), batches, how).fit()
        finally: made.model.eval()
        return made

    @property
    def _joined(self) -> bool: return self.model.config.kind == "decoder"

    def _encode(self, text: str, names: Sequence[str]) -> list[int]:
        "Tokens, with marks in the place of names."
        if not names: return self.tokenizer.encode(text)
        number = {name: i for i, name in enumerate(names)}
        ids, at = list[int](), 0
        for match in _pattern(names).finditer(text):
            ids += [*self.tokenizer.encode(text[at : match.start()]), self._names[number[match[0]]]]
            at = match.end()
        return ids + self.tokenizer.encode(text[at:])

    def _source(self, text: str, back: bool, names: Sequence[str], number: int) -> list[int]:
        mark = [self.tokenizer.special(_BACK if back else _THERE)] if self.both else []
        row, most = [*mark, *self._encode(text, names), self._eos], self.model.config.context_length
        if len(row) + self._joined > most:
            raise TranslationError(f"Text {number} has {len(row)} tokens and the model reads {most - self._joined}: give its sentences "
                                   "one by one, or train with a larger context_length.")
        return row

    def _example(self, a: str, b: str, back: bool, here: Sequence[str], there: Sequence[str], number: int) -> tuple[list[int], list[int]]:
        source, target = self._source(a, back, here, number), [*self._encode(b, there), self._eos]
        given, wanted = ([*source, self._bos], target) if self._joined else (source, [self._bos, *target])
        if (most := self.model.config.context_length) < len(target) + (len(source) if self._joined else 0):
            raise TranslationError(f"The target of pair {number} is too long for context_length={most}: make it larger, or leave it out.")
        return given, wanted

    def predict(
        self,
        texts: Sequence[str],
        beams: int = 1,  # texts that are followed at the same time; 1: always the likeliest token
        length_penalty: float = 1.0,  # of beams: 0 the most probable text, 1 the most probable per token
        back: bool = False,  # from target to source, for a translator that has learned both
        names: Mapping[str, str] | None = None,  # names in the texts, and what is to stand in their place; at most 8 in a text
        batch_size: int = 64,  # texts that are written together, without beams
    ) -> list[str]: # of an empty text an empty one
        "Write. What it writes for a text of another kind, or in a third language, means nothing, and nothing says so."
        _check.count("beams", beams)
        _check.count("batch_size", batch_size)
        _check.that(beams <= 100, f"beams={beams}: a hundred find what a thousand find. Give fewer.")
        _check.that(-10 <= length_penalty <= 10, f"length_penalty={length_penalty!r} must be from -10 to 10; 0 is none, 1 is usual.")
        if back and not self.both: raise TranslationError("This translator has learned one direction only: fit it with both=True.")
        known, sources, inside = _glossary(names), dict[int, list[int]](), dict[int, list[str]]()
        found = _texts(texts)
        for i, text in enumerate(found):
            if not text.strip(): continue
            inside[i] = _found(text, known)
            _check.that(len(inside[i]) <= len(_NAMES), f"Text {i} has {len(inside[i])} names, and there are marks for {len(_NAMES)}.")
            sources[i] = self._source(text, back, inside[i], i)
        out, order = [""] * len(found), sorted(sources, key=lambda i: len(sources[i]))
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            for i, ids in zip(part, self._write([sources[i] for i in part], beams, length_penalty)):
                out[i] = self._decode(ids, [known[name] for name in inside[i]])
        return out

    def _write(self, rows: list[list[int]], beams: int, length_penalty: float) -> list[list[int]]:
        whole, longest = self.model.config.context_length, max(map(len, rows))
        room = max(1, whole - longest - 1) if self._joined else whole - 1
        most = min(room, 3 * longest + 16)
        prompts = [[*row, self._bos] for row in rows] if self._joined else [[self._bos]] * len(rows)
        given = None if self._joined else rows
        if beams == 1:
            how = SamplingConfig(max_new_tokens=most, temperature=0, eos_id=self._eos, on_full="stop")
            return generate(self.model, prompts, how, source=given)
        return [beam_search(self.model, prompt, beams, most, length_penalty, self._eos, source=None if given is None else row)[0].ids
                for prompt, row in zip(prompts, rows)]

    def _decode(self, ids: Sequence[int], names: Sequence[str]) -> str:
        out, run = "", list[int]()
        for id in [*ids, self._eos]:
            if id not in self._names and id != self._eos:
                run.append(id)
                continue
            out, run = out + self.tokenizer.decode(run), []
            if id in self._names and (k := self._names.index(id)) < len(names): out += names[k]
        return out.strip()

    @torch.no_grad()
    def attention(self, source: str, target: str, back: bool = False) -> np.ndarray: # (I, J): a column sums to 1 at most
        "How much each unit of the target looked at each unit of the source: the last layer's cross-attention, mean of its heads."
        if self._joined: raise TranslationError("A decoder has no cross-attention: its target looks at the source as at its own words.")
        [(source, target)] = _pairs([(source, target)])
        rows = self._source(source, back, (), 0), [self._bos, *self.tokenizer.encode(target)]
        seen: list[tuple[Tensor, ...]] = []
        layer = self.model.decoder.blocks[-1].cross  # type: ignore[union-attr]
        hook = layer.register_forward_pre_hook(lambda module, given: seen.append(given))
        try:
            with evaluating(self.model): self.model(torch.tensor([rows[1]]), source=torch.tensor([rows[0]]))
        finally: hook.remove()
        weights = layer.weights(*seen[0])[0].mean(0).T.numpy()  # (S, T): what is asked at a token decides on the next
        first = self.both  # the mark before the source
        read, wrote = self._spread(source), self._spread(target)
        return read @ weights[first : first + read.shape[1], : wrote.shape[1]] @ (wrote / np.maximum(wrote.sum(1, keepdims=True), 1e-9)).T

    def _spread(self, text: str) -> np.ndarray: # (I, S): the share of each token that each unit has
        units, tokens = [m.span() for m in _UNIT.finditer(text)], self.tokenizer.offsets(text)
        shared = np.array([[max(0, min(b, d) - max(a, c)) for c, d in tokens] for a, b in units], dtype=float).reshape(len(units), -1)
        return shared / np.maximum(shared.sum(0), 1)

    def evaluate(
        self,
        records: Iterable[Any],  # each with a "source" and a "target": a text, or several that are equally right
        beams: int = 1,
        length_penalty: float = 1.0,
        back: bool = False,
    ) -> dict[str, Score]: # "BLEU" and "chrF"
        "Translate, and compare with what is right."
        sources, targets = _columns(records, "source", "target")
        return score_translations(self.predict(sources, beams, length_penalty, back), targets)

    def save(self, folder: str | Path) -> None:
        "Write model and tokenizer; a folder of that name is replaced. Raises TranslationError where that cannot be."
        with whole_folder(folder, TranslationError) as scratch:
            save_pretrained(self.model, scratch, tokenizer=self.tokenizer)
            write_whole(scratch / "translator.json", json.dumps({"both": self.both}), TranslationError)

    @classmethod
    def load(cls, folder: str | Path) -> "Translator":
        "Read what `save` wrote. Raises TranslationError, or the error of the file in question."
        folder = usable_path(folder, TranslationError)
        about, tokenizer = _read_json(folder / "translator.json", "translator"), load_tokenizer(folder)
        if not isinstance(tokenizer, Tokenizer): raise TranslationError(f"{folder} has a tokenizer of another kind.")
        return cls(load_pretrained(folder), tokenizer, bool(about.get("both", False)))

def _read_json(path: Path, what: str) -> dict[str, Any]:
    try: content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as why:
        raise TranslationError(f"There is no {what} in {path.parent}: {path.name} cannot be read ({why}).") from why
    if not isinstance(content, dict): raise TranslationError(f"{path} holds no settings. Save the {what} again.")
    return content

def _tokenizer(texts: Iterable[str], vocab_size: int) -> BPE:
    specials, words = (*SPECIALS, _THERE, _BACK, *_NAMES), Counter[bytes]()
    for text in texts: words.update(utf8(word) for word in split_words(text))
    return BPE(learn_merges(words, vocab_size - len(specials) - 256, 2, [name.encode() for name in specials]), specials=specials)

def _glossary(names: Mapping[str, str] | None) -> dict[str, str]:
    if names is None: return {}
    if not isinstance(names, Mapping): raise TranslationError("names is a dict: from names in the source to names in the target.")
    for a, b in names.items():
        good = isinstance(a, str) and isinstance(b, str) and a.strip() and b.strip()
        _check.that(bool(good), f"names has {a!r}: {b!r}; both are texts, and not empty.")
    return dict(names)

def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    "Any of some names, the longest first; not within a word that is written with letters."
    def whole(name: str) -> str:
        before, after = (f"(?{sign}{_LETTER})" if re.match(_LETTER, end) else "" for sign, end in (("<!", name[0]), ("!", name[-1])))
        return before + re.escape(name) + after
    return re.compile("|".join(whole(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")

def _found(text: str, names: Iterable[str]) -> list[str]: return list(dict.fromkeys(_pattern(names).findall(text)))

_SENTENCE = re.compile(r"[^.!?。！？\n]+(?:[.!?。！？]+[\"'”’」』)\]]*|$|\n)|[.!?。！？]+")

def split_sentences(text: str) -> list[str]:
    "The sentences of a text: each ends at . ! ? or their Chinese forms, or with its line."
    [text] = _texts([text])
    return [found.strip() for found in _SENTENCE.findall(text) if found.strip()]

def sentence_overlap(
    sentences: Sequence[str],
) -> np.ndarray: # (N, N), symmetric, 0 on the diagonal
    "Words that two sentences share, over the sum of the logarithms of their lengths (Mihalcea and Tarau 2004); here of all words."
    bags = [{unit.lower() for unit in split_units(text) if re.match(r"\w", unit)} for text in _texts(sentences, "sentences")]
    out = np.zeros((len(bags), len(bags)))
    for i, a in enumerate(bags):
        for j, b in enumerate(bags[:i]):
            if a & b: out[i, j] = out[j, i] = len(a & b) / max(math.log(len(a)) + math.log(len(b)), math.log(2))
    return out

def pagerank(
    weights: np.ndarray,  # (N, N), at least 0: row i says how i's vote is divided
    damping: float = 0.85,  # from 0 to below 1: how often the reader follows a link, and does not begin anew anywhere
    rounds: int = 1000,  # at most
) -> np.ndarray: # (N,) from 0 to 1; they sum to 1
    "Where a random reader is found (Brin and Page 1998), by power iteration. Who has nobody to vote for votes for all alike."
    try: w = np.asarray(weights, dtype=float)
    except (TypeError, ValueError) as why: raise TranslationError(f"weights are no rows of numbers: {why}.") from why
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not np.isfinite(w).all() or (w < 0).any():
        raise TranslationError(f"weights are finite numbers, at least 0, of the shape (N, N), not {w.shape}.")
    _check.share("damping", damping)
    _check.count("rounds", rounds)
    n = len(w)
    if not n: return np.zeros(0)
    largest = max(float(w.max()), 1e-300)
    w = w / largest
    sums = w.sum(1, keepdims=True)
    steps = np.where(sums > 0, w / np.where(sums > 0, sums, 1), 1 / n)
    rank = np.full(n, 1 / n)
    for _ in range(rounds):
        before, rank = rank, (1 - damping) / n + damping * rank @ steps
        if np.abs(rank - before).sum() < 1e-12: break
    return rank / rank.sum()

def textrank(sentences: Sequence[str], damping: float = 0.85) -> np.ndarray: # (N,) they sum to 1
    "How central each sentence is: PageRank over what sentences share (Mihalcea and Tarau 2004)."
    return pagerank(sentence_overlap(sentences), damping)

def lead(sentences: Sequence[str]) -> np.ndarray: # (N,) they sum to 1
    "The earlier a sentence stands, the higher: the first is the summary."
    weights = 1 / np.arange(1.0, len(_texts(sentences, "sentences")) + 1)
    return weights / max(weights.sum(), 1e-300)

def best_sentence(sentences: Sequence[str], references: Sequence[str]) -> str:
    "The oracle: the sentence with the highest ROUGE-1 against one of the reference summaries. No system may look at these."
    found = _texts(sentences, "sentences")
    if not found: raise TranslationError("There is no sentence to choose.")
    scores = rouge(found, [_texts(references, "references")] * len(found), "rouge1", chinese=True).items
    return found[int(np.argmax(scores.round(9)))]

Extract = Literal["lead", "textrank"]

class Summarizer:
    "Makes texts shorter: by some of their own sentences, or, with a `Translator` that has learned it, in words of its own."

    def __init__(self, how: Extract = "textrank", sentences: int = 1, writer: Translator | None = None):
        "Which sentences are chosen, and how many of a text; with a writer none are."
        _check.choice("how", how, get_args(Extract))
        _check.count("sentences", sentences)
        self.how, self.sentences, self.writer = how, sentences, writer

    @classmethod
    def fit(
        cls,
        records: Iterable[Any],  # each with a "text" and its "summary"
        config: TranslatorConfig = TranslatorConfig(context_length=256),
        names: Mapping[str, str] | None = None,  # as for `Translator.fit`; a name that is to stay as it is stands for itself
    ) -> "Summarizer":
        "Train one that writes. (Those that choose sentences need no training: Summarizer('lead').)"
        return cls(writer=Translator.fit(_pairs(records, "text", "summary"), config, names))

    def predict(self, texts: Sequence[str], names: Mapping[str, str] | None = None) -> list[str]: # of an empty text an empty one
        "A summary of each text. Sentences that are chosen keep their order."
        found = _texts(texts)
        if self.writer is not None: return self.writer.predict(found, names=names)
        return [self._chosen(split_sentences(text)) for text in found]

    def _chosen(self, sentences: list[str]) -> str:
        scores = (lead if self.how == "lead" else textrank)(sentences)
        order = np.argsort(-scores.round(9), kind="stable")[: self.sentences]  # of equal ones the first
        parts = [sentences[i] for i in sorted(order.tolist())]
        return ("" if any(_WIDE.search(part) for part in parts) else " ").join(parts)

    def evaluate(self, records: Iterable[Any]) -> dict[str, Score]: # "ROUGE-1", "ROUGE-2", "ROUGE-L", from 0 to 1
        "Summarise, and compare. Records have a \"text\" and a \"summary\": a text, or several; of these the nearest counts."
        texts, wanted = _columns(records, "text", "summary")
        return score_summaries(self.predict(texts), wanted)

    def save(self, folder: str | Path) -> None:
        "Write settings and writer; a folder of that name is replaced. Raises TranslationError where that cannot be."
        with whole_folder(folder, TranslationError) as scratch:
            about = {"how": self.how, "sentences": self.sentences, "writer": self.writer is not None}
            write_whole(scratch / "summarizer.json", json.dumps(about), TranslationError)
            if self.writer is not None: self.writer.save(scratch / "writer")

    @classmethod
    def load(cls, folder: str | Path) -> "Summarizer":
        "Read what `save` wrote. Raises TranslationError, or the error of the file in question."
        folder = usable_path(folder, TranslationError)
        about = _read_json(folder / "summarizer.json", "summarizer")
        writer = Translator.load(folder / "writer") if about.get("writer") else None
        return cls(about.get("how", ""), about.get("sentences", 0), writer)

def score_summaries(predictions: Sequence[str], references: References) -> dict[str, Score]:
    "ROUGE-1, ROUGE-2 and ROUGE-L (F1, from 0 to 1; no stemming), Chinese by characters."
    return {score.name: score for score in (rouge(predictions, references, kind, chinese=True) for kind in ("rouge1", "rouge2", "rougeL"))}
