"""Inputs of any kind, by seed: for every option of the command, and for every type that a public function says it takes.

The rule. (1) An argument of the type that a signature names may have any value: a result or an LmbookError follows, whatever it is.
(2) Where a Tensor, ndarray, Any or Callable is given, others' `SOFT` errors (TypeError, ValueError, IndexError, RuntimeError) may pass.
(3) An argument of another type may end in TypeError or AttributeError: the type checker knows these before the program runs.
(4) Whoever asks for `MUCH` of something, or for several things that multiply to that, may run out of time, memory, or 64 bits.
(5) Nothing else passes.
"""

from __future__ import annotations

import collections
import collections.abc as abc
import contextlib
import functools
import importlib
import inspect
import io
import math
import os
import random
import resource
import signal
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

WORDS = (
    "", " ", "a", "the goat", "\0", "\ud800", "\ufeff", "\u202e", "é", "e\u0301", "长夜漫漫", "🎉👩‍👩‍👧", "-",
    "--", "\n\n", "a\r\nb\x85c\u2028d", "%s{}", "<bos>",
    "</s>", "\udcff\udcfe", "(a", "a{99999}", "[", "\\", "nan", "None", "0", "x" * 10_000, " " * 5_000, "a" * 300 + ".txt",
)  # fmt: skip
WHOLE = (0, 1, 2, 3, 5, 17, -1, -2, 255, 1000, 2**31, 2**63, -(2**63) - 1, 10**30)
REAL = (0.0, 1.0, 0.5, 2.0, -1.0, 0.1, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, 3)
MUCH = 10**5  # from here on a number asks for so much that time or memory may run out
SOFT = (TypeError, ValueError, IndexError, RuntimeError)  # what may pass where a signature leaves contents to a comment


def files(folder: Path) -> list[str]:
    "Names in a folder, of things of every kind that is no plain text; they are made here."
    (folder / "text.txt").write_text("One line.\n\nAnother one, with 长 and é.\n", encoding="utf-8")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"caf\xe9 \xff\xfe \x00")
    (folder / "half.json").write_bytes(b'{"text": "a')
    (folder / "list.json").write_bytes(b"[" * 3000)
    (folder / "rows.jsonl").write_bytes(b'{"text": "a goat"}\n{"text": null}\n{"other": [1]}\n')
    (folder / "table.csv").write_bytes(b"text,n\na,1\nb\n")
    (folder / "packed.gz").write_bytes(b"\x1f\x8b\x08\x00 no")
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    (folder / "inside").mkdir()
    (folder / "inside" / "a.txt").write_text("Inside.", encoding="utf-8")
    (folder / "vacant").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dead").symlink_to("nowhere")
    (folder / "link.txt").symlink_to("text.txt")
    os.mkfifo(folder / "pipe")
    (folder / "closed.txt").write_text("closed")
    (folder / "closed.txt").chmod(0)
    (folder / "shut").mkdir(mode=0)
    with contextlib.suppress(OSError): Path(os.fsdecode(bytes(folder) + b"/caf\xe9.txt")).write_text("A name of other bytes.")
    return [*sorted(p.name for p in folder.iterdir()), "absent", "absent.txt", "absent/absent.json", "text.txt/inside", "."]


class TimeIsUp(BaseException):
    "An input took longer than it may."


@contextlib.contextmanager
def bounded(seconds: float, gigabytes: float, error: type[BaseException] = TimeIsUp) -> Iterator[None]:
    "No more time than this, and no more memory."
    def stop(*_): raise error

    before = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 0
    if now: resource.setrlimit(resource.RLIMIT_AS, (now + int(gigabytes * 2**30), limits[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)  # of work, however busy the machine is; and again, should somebody swallow it
    signal.setitimer(signal.ITIMER_REAL, max(20, 5 * seconds), 0.5)  # and waiting for what never comes is no work
    try: yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL): signal.setitimer(timer, 0)
        for number, handler in before.items(): signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


# ---------------------------------------------------------------- values of a type


class CannotMake(Exception):
    "A type of which no value is known."


UNSEEN = {"torch": torch, "nn": torch.nn, "Tensor": torch.Tensor, "np": np}  # names that some modules import for the checker only
ROWS = (list, tuple, abc.Sequence, abc.Iterable, abc.Collection, abc.Iterator, set, frozenset, abc.Set)


def hints_of(thing: Any) -> dict[str, Any]:
    "The types of a call's arguments, as far as they can be looked up."
    call = thing.__init__ if inspect.isclass(thing) else thing
    if inspect.isclass(thing) and issubclass(thing, tuple): call = thing.__new__  # a NamedTuple
    names = vars(importlib.import_module(call.__module__)) if getattr(call, "__module__", "").startswith("lmbook.") else {}
    try: return get_type_hints(call, globalns={**UNSEEN, **names})
    except NameError as error: raise CannotMake(f"{error.name}, which only the type checker sees") from error


def fields_of(kind: Any) -> dict[str, tuple[Any, bool]]:
    "What a class is made of: each argument's type, and whether it must be given."
    if is_dataclass(kind):
        hints = get_type_hints(kind, localns={**UNSEEN, "Patch": NoneType})
        return {f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(kind) if f.init}
    hints = hints_of(kind)
    return {
        name: (hints.get(name, Any), p.default is p.empty) for name, p in inspect.signature(kind).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }  # fmt: skip


class Maker:
    "Values for types, most of them as the type says, and what else is to be known of those that were made."

    def __init__(self, rng: random.Random, names: list[str], known: dict[Any, Any], wrong: float = 0.0):
        self.rng, self.names, self.known, self.wrong = rng, names, known, wrong
        self.foreign = self.loose = self.tame = False
        self.size = 1.0

    @property
    def much(self) -> bool: return not self.size < MUCH

    def value(self, hint: Any, depth: int = 0) -> Any:
        rng = self.rng
        if self.wrong and rng.random() < self.wrong:
            self.foreign = True
            return rng.choice([None, object(), b"bytes", "word", 3, 2.5, [], {}, [object()], {1: 2}, print, {"a"}, 1j])
        kind, parts = get_origin(hint), get_args(hint)
        if isinstance(hint, typing.TypeVar): return self.value(hint.__bound__ or Any, depth)
        if isinstance(hint, str): raise CannotMake(hint)
        if hint in self.known:
            value = rng.choice(self.known[hint])
            return value() if inspect.isfunction(value) else value
        if kind in (Union, UnionType):
            options = list(parts)
            rng.shuffle(options)
            for option in options:
                with contextlib.suppress(CannotMake): return self.value(option, depth)
            raise CannotMake(hint)
        if kind is typing.Annotated: return self.value(parts[0], depth)
        if kind is Literal: return rng.choice(parts) if rng.random() < 0.9 else rng.choice(WORDS)
        if hint in (None, NoneType): return None
        if hint is bool: return rng.random() < 0.5
        if hint is int and self.tame and rng.random() < 0.9: return rng.choice((1, 2, 4, 8))
        if hint is float and self.tame and rng.random() < 0.9: return rng.choice((0.5, 0.1, 1.0))
        if hint is int: return self.number(rng.choice(WHOLE) if rng.random() < 0.6 else rng.randint(0, 12))
        if hint is float: return self.number(rng.choice(REAL) if rng.random() < 0.6 else rng.random())
        if hint is str: return rng.choice(WORDS) if rng.random() < 0.6 else rng.choice(self.names)
        if hint is Path or hint is os.PathLike or kind is os.PathLike:
            return Path(rng.choice([name for name in (*self.names, *WORDS) if "\0" not in name]))
        if hint is bytes: return rng.choice([b"", b"\xff\xfe", b"abc", "长夜".encode(), b"\0" * 100])
        if hint is typing.TextIO or kind is typing.IO: return io.StringIO(rng.choice(WORDS).encode(errors="replace").decode())
        if hint is typing.BinaryIO: return io.BytesIO(rng.choice([b"", b"\xff\xfe", b"abc", b"\0" * 100, b"<page>" * 9]))
        if hint is torch.Tensor:
            self.loose = True
            shape = [rng.choice([0, 1, 2, 3, 4, 8]) for _ in range(rng.choice([0, 1, 2, 2, 2, 3, 3, 4]))]
            x = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(99))) * rng.choice([1, 1, 1e4, math.nan])
            return rng.choice([x, x, (x.nan_to_num() * 3).long(), (x.nan_to_num() * 3).long().abs(), x > 0, x.bfloat16(), x.double()])
        if hint is np.ndarray or kind is np.ndarray:
            self.loose = True
            shape = [rng.choice([0, 1, 2, 3, 4, 8]) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
            return np.random.default_rng(rng.randrange(99)).normal(size=shape).astype(rng.choice(["f4", "f8", "i8", "?"]))
        if hint is Any or hint is object or hint is abc.Hashable:
            self.loose = True
            made = [None, 0, 2.5, "word", (1, 2), math.nan]
            return rng.choice(made if hint is abc.Hashable else [*made, [1, 2], {"a": 1}, torch.zeros(2, 3)])
        if kind is abc.Callable or hint in (abc.Callable, typing.Callable):
            self.loose = True
            return rng.choice([lambda *_, **__: 0.0, lambda x=None, *_: x, len, str])
        if kind is type and isinstance(parts[0], type): return rng.choice([parts[0], *parts[0].__subclasses__()][:4])
        if depth > 3: raise CannotMake(hint)
        n = rng.choice([0, 1, 1, 2, 3, 30])
        if kind is tuple and parts and parts[-1] is not Ellipsis: return tuple(self.value(part, depth + 1) for part in parts)
        if kind in ROWS or hint in ROWS:
            items = [self.value(parts[0] if parts else Any, depth + 1) for _ in range(n)]
            kind = kind or hint
            if kind is abc.Iterator: return iter(items)
            make = {list: list, tuple: tuple, set: set, frozenset: frozenset, abc.Set: set}.get(kind) or rng.choice([list, tuple])
            return make(items)
        if kind in (dict, abc.Mapping) or hint in (dict, abc.Mapping):
            of_key, of_value = parts or (str, Any)
            return {self.value(of_key, depth + 1): self.value(of_value, depth + 1) for _ in range(n)}
        if kind is collections.Counter: return collections.Counter({self.value(parts[0], depth + 1): n for n in range(n)})
        if kind and isinstance(kind, type): hint = kind  # a generic class of ours
        if isinstance(hint, type) and hint.__module__.startswith("lmbook."): return self.build(hint, depth + 1)
        raise CannotMake(hint)

    def number(self, value: Any) -> Any:
        "Notes how much is asked for: two large numbers may be multiplied."
        if not abs(value) <= 12: self.size = self.size * abs(value) if abs(value) < MUCH else math.inf
        return value

    def build(self, kind: Any, depth: int = 0) -> Any:
        "An instance of a class of ours, most of it as it comes."
        if getattr(kind, "_is_protocol", False): raise CannotMake(kind)
        given = {}
        for name, (hint, needed) in fields_of(kind).items():
            if not needed and self.rng.random() > 0.2: continue
            try: given[name] = self.value(hint, depth)
            except CannotMake:
                if needed: raise
        return kind(**given)

    def instance(self, kind: Any) -> Any:
        "One whose making succeeds, if that can be at all; values of other types are not tried here."
        wrong, self.wrong, self.tame = self.wrong, 0.0, True
        try:
            if kind in self.known: return self.value(kind)
            for _ in range(30):
                before = self.size
                try: return self.build(kind)
                except CannotMake: raise
                except Exception: self.size = before  # that it ends in an error of ours is tried where the class itself is called
            raise CannotMake(f"{kind.__name__}: no instance in 30 tries")
        finally: self.wrong, self.tame = wrong, False

    def arguments(self, function: Any) -> tuple[list[Any], dict[str, Any]]:
        "For a call. What may be left out is, half of the time, and always where no value of its type can be made."
        hints, given, rest = hints_of(function), {}, []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD: continue
            hint = hints.get(name, Any)
            if parameter.kind is parameter.VAR_POSITIONAL:
                rest += [self.value(hint) for _ in range(self.rng.choice([0, 1, 2]))]
                continue
            optional = parameter.default is not parameter.empty
            if optional and self.rng.random() < 0.5: continue
            try: value = self.value(hint)
            except CannotMake:
                if optional: continue
                raise
            if parameter.kind is parameter.POSITIONAL_ONLY: rest.append(value)
            else: given[name] = value
        kinds = {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
        if rest and inspect.Parameter.VAR_POSITIONAL in kinds.values():  # names before them go by place
            before = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
            rest = [*(given.pop(name) for name in before), *rest] if all(name in given for name in before) else []
        return rest, given


# ---------------------------------------------------------------- what is called

SPECIAL = ("__call__", "__len__", "__getitem__", "__iter__", "__contains__")


def public(name: str) -> dict[str, Any]:
    "What a module makes public and one can call: functions and classes, no types, errors and protocols."
    module = importlib.import_module(f"lmbook.{name}")
    found = {f"{name}.{each}": getattr(module, each) for each in module.__all__}
    return {
        full: thing for full, thing in found.items()
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not getattr(thing, "_is_protocol", False)
        and not (inspect.isclass(thing) and issubclass(thing, Exception))
    }  # fmt: skip


def targets(name: str) -> dict[str, tuple[Any, str]]:
    "All that a module makes public, by name: a function or class and '', or a class and the name of one of its methods or properties."
    found: dict[str, tuple[Any, str]] = {}
    for full, thing in public(name).items():
        found[full] = thing, ""
        if not inspect.isclass(thing): continue
        for base in reversed(thing.__mro__):
            if base is not thing and not (base.__name__.startswith("_") and base.__module__.startswith("lmbook.")): continue
            for method, what in vars(base).items():
                if method.startswith("_") and method not in SPECIAL: continue
                if not isinstance(what, FunctionType | classmethod | staticmethod | property | functools.cached_property): continue
                if getattr(what, "__module__", "lmbook.").startswith("lmbook."): found[f"{full}.{method}"] = thing, method
    return found


def prepare(maker: Maker, target: tuple[Any, str]) -> tuple[Callable[[], Any], Callable[[], str]]:
    "A call with values from a maker, and what it is in words."
    thing, method = target
    owner = None
    if method:
        what = inspect.getattr_static(thing, method)
        if not isinstance(what, classmethod | staticmethod): owner = maker.instance(thing)
        if isinstance(what, property | functools.cached_property): return lambda: getattr(owner, method), lambda: f" of {show(owner)}"
        thing = getattr(thing if owner is None else owner, method)
    rest, given = maker.arguments(thing)

    def said() -> str:
        of = "" if owner is None else f" of {show(owner)}"
        return f"({', '.join([*map(show, rest), *(f'{k}={show(v)}' for k, v in given.items())])[:400]})" + of

    return lambda: thing(*rest, **given), said


def show(value: Any) -> str:
    try: text = repr(value)
    except Exception as error: text = f"a {type(value).__name__} that cannot be shown, by {error!r}"
    return text if len(text) < 120 else text[:80] + "..." + text[-20:]


def settings_of_a_run() -> list[str]:
    "All that `--set` may set."
    from lmbook.training import TrainConfig
    from lmbook.transformer import TransformerConfig

    return [field.name for kind in (TransformerConfig, TrainConfig) for field in fields(kind)]
