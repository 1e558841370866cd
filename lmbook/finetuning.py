import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmbook.batches import Batches
from lmbook.core import Check, LmbookError, Task, evaluating, whole_file, write_whole
from lmbook.pretrained import LAYOUTS, Layout
from lmbook.tokenization import Tokenizer
from lmbook.transformer import Classifier, Transformer


class FinetuningError(LmbookError):
    "A way of fine-tuning that does not fit the model, or a file of an adapter. The message says what to change."


_check = Check(FinetuningError)
_HEAD = ("score", "pooler")  # what a Classifier has beside its body


def freeze(
    model: nn.Module,
    train: Sequence[str] = (),  # what is trained all the same: parts of parameters' names, such as "score" or "blocks.1."; none: nothing
) -> int: # how many numbers are trained
    "Train only some of the parameters. Raises FinetuningError for a part that no parameter's name has."
    if isinstance(train, str): raise FinetuningError(f"train={train!r} is one text: give a list of parts of names.")
    names = [name for name, _ in model.named_parameters()]
    for part in train:
        if not any(part in name for name in names):
            raise FinetuningError(f"No parameter has {part!r} in its name. There are, for example: {_some(names)}.")
    for name, p in model.named_parameters(): p.requires_grad_(any(part in name for part in train))
    return trained(model)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def trained(model: nn.Module) -> int:
    "How many numbers are trained."
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def training_bytes(
    model: nn.Module,
    moments: int = 2,  # numbers that the optimizer keeps for each parameter: 2 for Adam, 1 for momentum, 0 for plain SGD
) -> int:
    "Memory of weights, gradients and the optimizer's state: all weights once, and for each that is trained a gradient and the moments."
    _check.count("moments", moments, 0)
    return sum(p.numel() * p.element_size() * (1 + (1 + moments) * p.requires_grad) for p in model.parameters())


@dataclass
class Labelled:
    "Texts with a label each, as a rectangle."

    ids: Tensor  # (B, T)
    segments: Tensor  # (B, T): 1 at a token, 0 at padding
    labels: Tensor  # (B,): numbers from 0

    def to(self, device: torch.device | str) -> "Labelled":
        "The same on another device."
        return Labelled(self.ids.to(device), self.segments.to(device), self.labels.to(device))


class LabelledTexts(Batches):
    "A source of batches for a `Classifier`."

    def __init__(
        self,
        rows: Sequence[Sequence[int]],  # N texts as ids
        labels: Sequence[int],  # N numbers from 0
        *,
        classes: int,  # labels run from 0 to classes - 1
        batch_size: int = 16,
        shuffle: bool = True,
        seed: int = 0,
    ):
        _check.count("batch_size", batch_size)
        _check.count("classes", classes)
        _check.that(len(rows) == len(labels), f"{len(rows)} texts and {len(labels)} labels: each text has one.")
        whole = bool(len(rows)) and all(len(row) for row in rows)
        _check.that(whole, "There is no text, or an empty one: mark where it begins, with <bos>.")
        for i, label in enumerate(labels):
            if not isinstance(label, int | np.integer) or not 0 <= label < classes:
                raise FinetuningError(f"The label of text {i} is {label!r}; with {classes} classes they run from 0 to {classes - 1}.")
        self.rows, self.labels, self.batch_size, self.shuffle, self.seed = list(rows), list(labels), batch_size, shuffle, seed

    def plan(self, epoch: int) -> Sequence[list[int]]:
        n = len(self.rows)
        order = np.random.default_rng([self.seed, epoch]).permutation(n).tolist() if self.shuffle else list(range(n))
        return [order[i : i + self.batch_size] for i in range(0, n, self.batch_size)]

    def make(self, item: list[int]) -> Labelled:
        longest = max(len(self.rows[i]) for i in item)
        ids, segments = torch.zeros(len(item), longest, dtype=torch.long), torch.zeros(len(item), longest, dtype=torch.long)
        for b, i in enumerate(item):
            ids[b, : len(self.rows[i])] = torch.as_tensor(self.rows[i])
            segments[b, : len(self.rows[i])] = 1
        return Labelled(ids, segments, torch.tensor([self.labels[i] for i in item]))


def label_loss(
    model: nn.Module,  # a `Classifier` of texts, or one behind a soft prompt
    batch: Labelled,
) -> tuple[Tensor, int]: # the sum of the losses in nats, and over how many texts
    "Cross-entropy of the labels, for a `Trainer`."
    return F.cross_entropy(model(batch.ids, segments=batch.segments), batch.labels, reduction="sum"), len(batch.labels)


def label_scores(
    model: nn.Module,  # as for `label_loss`
    rows: Sequence[Sequence[int]],  # N texts as ids
    batch_size: int = 64,
) -> Tensor: # (N, L): a score for each label
    "What a classifier says of texts. Its modes stay as they are."
    some = LabelledTexts(rows, [0] * len(rows), classes=1, batch_size=batch_size, shuffle=False)
    device = next(model.parameters()).device
    with evaluating(model): return torch.cat([model(b.ids.to(device), segments=b.segments.to(device)).cpu() for b in some.read()])


@dataclass(frozen=True)
class LoraConfig:
    "Which layers get a low-rank product, and of what size."

    rank: int = 8  # of the product: at most the smaller side of each matrix
    alpha: float = 16.0  # the product is multiplied by alpha / rank
    targets: tuple[str, ...] = ("query", "value")  # names of linear layers within the blocks, or whole names of single ones
    dropout: float = 0.0  # on what enters the product, while training

    def __post_init__(self) -> None:
        _check.count("rank", self.rank)
        _check.positive(self, "alpha")
        _check.share("dropout", self.dropout)
        _check.that(not isinstance(self.targets, str), f"targets={self.targets!r} is one text: give a tuple of names.")
        object.__setattr__(self, "targets", tuple(self.targets))
        _check.that(bool(self.targets), "targets is empty: name at least one layer.")


class LoraLinear(nn.Module):
    "A frozen linear layer, and beside it a thin product that is trained: W x + (alpha / rank) B A x (Hu et al. 2021, eq. 3)."

    def __init__(self, base: nn.Linear, config: LoraConfig):
        super().__init__()
        out, wide = base.weight.shape
        if config.rank > min(out, wide):
            raise FinetuningError(f"rank={config.rank} is above the smaller side of a matrix {out, wide}: take at most {min(out, wide)}.")
        self.base, self.scale, self.dropout = base, config.alpha / config.rank, nn.Dropout(config.dropout)
        where: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.a, self.b = nn.Linear(wide, config.rank, bias=False, **where), nn.Linear(config.rank, out, bias=False, **where)
        nn.init.zeros_(self.b.weight)  # so that at first nothing changes
        self.merged, self.active = False, True
        base.requires_grad_(False)

    @property
    def in_features(self) -> int: return self.base.in_features

    @property
    def out_features(self) -> int: return self.base.out_features

    @property
    def delta(self) -> Tensor: # (out, in), as the weight
        "What is added to the matrix."
        return self.scale * self.b.weight @ self.a.weight

    def forward(self, x: Tensor) -> Tensor: # (..., in) to (..., out)
        y = self.base(x)
        return y + self.scale * self.b(self.a(self.dropout(x))) if self.active and not self.merged else y


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    "The linear layers of the blocks. Those that score words or labels are none of them."
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"(^|\.)blocks\.", name)}


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def _chosen(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    "The layers that are meant. Raises FinetuningError where there is none of that name, or where something is in its place already."
    if any(isinstance(m, LoraLinear | Bottleneck) for m in model.modules()):
        raise FinetuningError("This model has LoRA or adapters already. Take them away: `merge_lora(model)`, or load the model anew.")
    found = _linears(model)
    kinds = sorted({name.rpartition(".")[2] for name in found})
    chosen: dict[str, nn.Linear] = {}
    for target in targets:
        mine = {name: layer for name, layer in found.items() if name == target or name.endswith(f".{target}")}
        if not mine:
            there = ", ".join(kinds) or "none"
            raise FinetuningError(f"There is no linear layer {target!r} in the blocks of this model. There are: {there}.")
        chosen |= mine
    return chosen


def apply_lora(
    model: nn.Module,  # a `Transformer`, or a `Classifier`: changed in place
    config: LoraConfig = LoraConfig(),
) -> int: # how many numbers are trained
    """Freeze a model and put a low-rank product beside its target layers. The head of a `Classifier` is trained with them.

    Raises FinetuningError where a target is not there (the message lists those that are) or smaller than the rank, and where the model has
    LoRA or adapters already. Nothing is changed then.
    """
    made = {name: LoraLinear(layer, config) for name, layer in _chosen(model, config.targets).items()}
    model.requires_grad_(False)
    for name, layer in made.items():
        _replace(model, name, layer)
        for part in (layer.a, layer.b): part.requires_grad_(True)
    _train_head(model)
    return trained(model)


def _train_head(model: nn.Module) -> None:
    for name in _HEAD:
        if isinstance(model, Classifier) and (part := getattr(model, name)) is not None: part.requires_grad_(True)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    "The layers with a low-rank product, by name. Raises FinetuningError where there is none."
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    if not found: raise FinetuningError("This model has no LoRA: call `apply_lora(model)` first, or it was merged and taken away.")
    return found


def _apart(layers: Iterable[LoraLinear]) -> None:
    merged = any(layer.merged for layer in layers)
    _check.that(not merged, "The products are merged into the matrices: call `unmerge(model)` first.")


@torch.no_grad()
def merge(model: nn.Module) -> None:
    "Add each product to its matrix: the same outputs, at the price of the plain model. Raises FinetuningError where that was done."
    for name, layer in lora_layers(model).items():
        if layer.merged: raise FinetuningError(f"{name} is merged already: its product would be added twice. `unmerge` takes it out.")
    for layer in lora_layers(model).values():
        layer.base.weight += layer.delta
        layer.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    "Take the products out of the matrices again (to rounding). Raises FinetuningError where they are not in them."
    for name, layer in lora_layers(model).items():
        if not layer.merged: raise FinetuningError(f"{name} is not merged, so there is nothing to take out.")
    for layer in lora_layers(model).values():
        layer.base.weight -= layer.delta
        layer.merged = False


def merge_lora(model: nn.Module) -> None:
    "Merge, and leave plain linear layers: a model as it was before `apply_lora`, with other weights. All of it can be trained again."
    layers = lora_layers(model)
    if not any(layer.merged for layer in layers.values()): merge(model)
    for name, layer in layers.items(): _replace(model, name, layer.base)
    model.requires_grad_(True)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    "Within it the model is the one that was pre-trained. Raises FinetuningError where the products are merged."
    layers = list(lora_layers(model).values())
    _apart(layers)
    before = [layer.active for layer in layers]
    try:
        for layer in layers: layer.active = False
        yield
    finally:
        for layer, was in zip(layers, before): layer.active = was


class Bottleneck(nn.Module):
    "A frozen linear layer, and behind it a small network that is trained, added to what it gets (Houlsby et al. 2019, figure 2)."

    def __init__(
        self,
        base: nn.Linear,
        width: int,  # units in the middle
    ):
        super().__init__()
        out = base.out_features
        where: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base, self.down, self.up = base, nn.Linear(out, width, **where), nn.Linear(width, out, **where)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        base.requires_grad_(False)

    @property
    def in_features(self) -> int: return self.base.in_features

    @property
    def out_features(self) -> int: return self.base.out_features

    def forward(self, x: Tensor) -> Tensor: # (..., in) to (..., out)
        y = self.base(x)
        return y + self.up(F.gelu(self.down(y)))


def apply_adapters(
    model: nn.Module,  # a `Transformer`, or a `Classifier`: changed in place
    width: int = 8,  # units of each adapter
    targets: Sequence[str] = ("out", "down"),  # the layers that end the branches of a block: attention, and the MLP
) -> int: # how many numbers are trained
    "Freeze a model and put a small network behind each branch. Raises FinetuningError as `apply_lora` does."
    _check.count("width", width)
    chosen = _chosen(model, targets)
    model.requires_grad_(False)
    for name, layer in chosen.items(): _replace(model, name, Bottleneck(layer, width))
    for module in model.modules():
        if isinstance(module, Bottleneck): module.down.requires_grad_(True), module.up.requires_grad_(True)
    _train_head(model)
    return trained(model)


class _Longer(nn.Module):
    "A table of vectors with some more behind its end. Only these are trained."

    def __init__(self, table: nn.Embedding, more: Tensor):
        super().__init__()
        self.table, self.more, self.num_embeddings = table, nn.Parameter(more), table.num_embeddings
        self.embedding_dim = table.embedding_dim

    @property
    def weight(self) -> Tensor: return self.table.weight

    def forward(self, ids: Tensor) -> Tensor: # (B, T) to (B, T, C)
        new = ids - self.num_embeddings
        if bool((new >= len(self.more)).any()): raise IndexError
        return torch.where((new >= 0)[..., None], self.more[new.clamp(min=0)], self.table(torch.where(new >= 0, 0, ids)))


class SoftPrompt(nn.Module):
    """A frozen model, and before each text some vectors that are no words and are learned (Lester, Al-Rfou and Constant 2021).

    Called as the model is; scores of words are given for the text only.
    """

    def __init__(
        self,
        model: Transformer | Classifier,  # a decoder: changed in place
        n: int = 8,  # vectors before the text; the context is shorter by so many
        start: Sequence[int] | None = None,  # ids of n words whose vectors they are at first; None: drawn from the table's own spread
    ):
        super().__init__()
        _check.count("n", n)
        body = model.body if isinstance(model, Classifier) else model
        kind = body.config.kind
        if kind != "decoder": raise FinetuningError(f"A soft prompt stands before what a decoder reads; this is an {kind}.")
        if n >= body.config.context_length:
            raise FinetuningError(f"n={n} vectors leave no room for a text: the model reads {body.config.context_length} positions.")
        table = body.embed.tokens
        if isinstance(table, _Longer): raise FinetuningError("This model has a soft prompt already.")
        if start is not None and len(start) != n: raise FinetuningError(f"start names {len(start)} words for n={n} vectors.")
        with torch.no_grad():
            drawn = torch.randn(n, table.embedding_dim) * table.weight.std().cpu() if start is None else table.weight[list(start)].clone()
        model.requires_grad_(False)
        body.embed.tokens = _Longer(table, drawn.to(table.weight))  # type: ignore[assignment]
        _train_head(model)
        self.model, self.n, self.body = model, n, body

    @property
    def config(self) -> Any: return self.model.config

    @property
    def task(self) -> Task: return self.body.task

    @property
    def vocab_size(self) -> int: return self.body.vocab_size

    @property
    def takes_segments(self) -> bool: return False  # one text a row: each would need a prompt of its own

    def forward(
        self,
        ids: Tensor,  # (B, T)
        *,
        segments: Tensor | None = None,  # (B, T): 1 at a token, 0 at padding on the right
    ) -> Tensor: # as the model
        if segments is not None and segments.device.type == "cpu" and int(segments.max()) > 1:
            raise FinetuningError("Several texts in a row cannot share a soft prompt: give one text a row.")
        marks = torch.arange(self.n, device=ids.device) + self.body.config.vocab_size
        ids = torch.cat([marks.expand(len(ids), -1), ids], 1)
        if segments is not None: segments = F.pad(segments, (self.n, 0), value=1)
        out = self.model(ids, segments=segments)
        return out if isinstance(self.model, Classifier) else out[:, self.n :]


_END = (".lora_A.weight", ".lora_B.weight")
_THEIR_HEADS = {"bert": {"score": "classifier", "pooler": "bert.pooler.dense"}}  # elsewhere as ours


def _their_names(model: Transformer | Classifier, layout: Layout) -> dict[str, str]:
    "The names of linear layers, ours to theirs. Raises FinetuningError for layers that another library keeps in one."
    _check.choice("layout", layout, LAYOUTS)
    if layout == "lmbook": return {name: name for name, m in model.named_modules() if isinstance(m, nn.Linear | LoraLinear)}
    body, front = (model.body, "body.") if isinstance(model, Classifier) else (model, "")
    heads = {name: _THEIR_HEADS.get(layout, {}).get(name, name) for name in _HEAD if isinstance(model, Classifier)}
    stem = LAYOUTS[layout].prefix
    names: dict[str, str] = {}
    for theirs, ours, _ in LAYOUTS[layout].names(body.config):
        if not theirs.endswith(".weight"): continue
        full = theirs.removesuffix(".weight")
        full = full.removeprefix(stem) if not isinstance(model, Classifier) and not body.has_scores else full
        for name in ours: names[front + name.removesuffix(".weight")] = "" if len(ours) > 1 else full
    return names | heads


def save_adapter(
    model: Transformer | Classifier,  # with LoRA, not merged
    folder: str | Path,  # made where it is missing
    layout: Layout = "lmbook",  # the names: those of this book, or as `peft` finds them in a model that `save_pretrained` wrote so
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as `peft` does: the products only, and the head of a classifier.

    Raises FinetuningError, and writes nothing, where the layout keeps a target in one matrix with others.
    """
    from safetensors.torch import save_file

    layers, names = lora_layers(model), _their_names(model, layout)
    _apart(layers.values())
    for name in layers:
        if not names.get(name):
            raise FinetuningError(f"The layout {layout!r} has no layer of its own for {name}: it keeps it in one matrix with others.")
    tensors = {}
    for name, layer in layers.items():
        for end, part in zip(_END, (layer.a, layer.b)): tensors[f"base_model.model.{names[name]}{end}"] = part.weight
    heads = [name for name in _HEAD if isinstance(model, Classifier) and getattr(model, name) is not None]
    for name in heads:
        for own, p in getattr(model, name).named_parameters(): tensors[f"base_model.model.{names[name]}.{own}"] = p
    one = next(iter(layers.values()))
    tasks = {"text": "SEQ_CLS", "token": "TOKEN_CLS"}
    described = {
        "peft_type": "LORA", "task_type": tasks[model.config.level] if isinstance(model, Classifier) else "CAUSAL_LM",
        "r": one.a.out_features, "lora_alpha": one.scale * one.a.out_features, "lora_dropout": one.dropout.p,
        "target_modules": _short([names[name] for name in layers], list(filter(None, names.values()))),
        "modules_to_save": [names[name] for name in heads] or None, "bias": "none", "fan_in_fan_out": layout == "gpt2",
        "init_lora_weights": True, "inference_mode": True, "use_rslora": False, "use_dora": False, "base_model_name_or_path": None,
    }  # fmt: skip
    if described["task_type"] == "CAUSAL_LM" and model.config.kind != "decoder": described["task_type"] = None  # type: ignore[union-attr]
    stored, folder = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, Path(folder)
    with whole_file(folder / "adapter_model.safetensors", FinetuningError) as scratch: save_file(stored, scratch, metadata={"format": "pt"})
    write_whole(folder / "adapter_config.json", json.dumps(described, indent=2) + "\n", FinetuningError)


def _short(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    "Last parts of names, where they mean no other layer; else the whole names."
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    return ends if {n for n in names if n.rpartition(".")[2] in ends} == set(chosen) else sorted(chosen)


def load_adapter(
    model: Transformer | Classifier,  # that the adapter was made for; changed in place
    folder: str | Path,  # as `save_adapter` or `peft` wrote it
    layout: Layout = "lmbook",
) -> None:
    """Put a saved LoRA into a model, and train nothing else.

    Raises FinetuningError where a file is missing or torn, where it is of another method or of a kind of LoRA that is not known here,
    and where its layers are not the model's, by name or by shape. Nothing is changed then.
    """
    described, found = _adapter(Path(folder))
    ours = {theirs: name for name, theirs in _their_names(model, layout).items() if theirs}
    heads = {theirs: name for theirs, name in ours.items() if name in _HEAD}
    parts: dict[str, dict[str, Tensor]] = {}
    for full, tensor in found.items():
        name = full.removeprefix("base_model.model.")
        layer, _, end = name.rpartition(".")
        for product in _END:
            if name.endswith(product): layer, end = name.removesuffix(product), product
        if layer not in ours:
            raise FinetuningError(f"The adapter has {layer}, and this model does not. Is the layout {layout!r} the right one?")
        parts.setdefault(ours[layer], {})[end] = tensor
    inside = {name: tensors for name, tensors in parts.items() if name not in heads.values()}
    config = LoraConfig(described["r"], described["lora_alpha"], tuple(inside), described.get("lora_dropout") or 0.0)
    chosen = _chosen(model, config.targets)
    for name, layer in chosen.items():
        (out, wide), r = layer.weight.shape, config.rank
        for end, shape in zip(_END, ((r, wide), (out, r))):
            there = inside[name].get(end)
            if there is None: raise FinetuningError(f"The adapter has no {name}{end}: the file is not whole.")
            if there.shape != shape:
                raise FinetuningError(f"{name}{end} is {tuple(there.shape)}, this model needs {shape}: it was made for another one.")
    for name, tensors in parts.items():
        if name in inside: continue
        wanted = {own: tuple(p.shape) for own, p in getattr(model, name).named_parameters()}
        given = {own: tuple(t.shape) for own, t in tensors.items()}
        if wanted != given: raise FinetuningError(f"The adapter's {name} is {given}, this model's is {wanted}: other labels?")
    apply_lora(model, config)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for end, part in zip(_END, (layer.a, layer.b)): part.weight.copy_(inside[name][end])
        for name in parts.keys() - inside.keys():
            for own, p in getattr(model, name).named_parameters(): p.copy_(parts[name][own])


def _adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    "The two files, and nothing in them that would be read wrongly."
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (path, weights):
        if not needed.is_file(): raise FinetuningError(f"{folder} has no {needed.name}: it is no adapter in peft's format.")
    try: described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as why: raise FinetuningError(f"{path} cannot be read as JSON: {why}.") from why
    method = described.get("peft_type") if isinstance(described, dict) else None
    if method != "LORA": raise FinetuningError(f"{path} is of the method {method!r}, not 'LORA'.")
    for name in ("r", "lora_alpha"):
        if isinstance(described.get(name), bool) or not isinstance(described.get(name), int | float):
            raise FinetuningError(f"{path} has no number {name}.")
    plain = {"bias": "none", "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}
    for name, known in plain.items():
        if described.get(name) not in (None, known):
            raise FinetuningError(f"{path} says {name}={described[name]!r}, a kind of LoRA that is not known here.")
    try: return described, load_file(weights)
    except (OSError, SafetensorError) as why: raise FinetuningError(f"{weights} is torn, or no safetensors file: {why}.") from why


Message = Mapping[str, str]  # {"role": ..., "content": ...}
ROLES = ("system", "user", "assistant")
CHAT_SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_CHAT = """
{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""


@dataclass(frozen=True)
class ChatTemplate:
    "How messages become one text: a template of Jinja, the field `chat_template` of `transformers`."

    template: str = _CHAT
    specials: tuple[str, ...] = CHAT_SPECIALS  # tokens that stand for themselves; no message may spell one

    def __post_init__(self) -> None:
        said = [self._render([{"role": role, "content": "x"}], False) for role in ROLES]
        for role, text in zip(ROLES, said):
            if said.count(text) > 1 or "x" not in text:
                raise FinetuningError(f"The template does not tell the role {role!r} from others, or leaves out what was said: {text!r}.")
        ask = [{"role": "user", "content": "x"}]
        if self._render(ask, True) == self._render(ask, False):
            raise FinetuningError("The template does not know add_generation_prompt: nothing says that it is the assistant's turn.")

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        box = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as `transformers` has it
        try: return box.from_string(self.template).render(messages=messages, add_generation_prompt=prompt)
        except TemplateError as why: raise FinetuningError(f"The template cannot be rendered: {why}.") from why

    def render(
        self,
        messages: Sequence[Message],
        prompt: bool = False,  # end where the assistant begins to speak
    ) -> str:
        "One text. Raises FinetuningError for an unknown role, and for a message that spells a special token."
        _check.that(bool(messages), "There is no message.")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise FinetuningError(f'Message {i} must be {{"role": ..., "content": ...}}.')
            _check.choice("role", message["role"], ROLES)
            for name in self.specials:
                if name in message["content"]:
                    raise FinetuningError(f"Message {i} spells {name}: a user could speak in another's name. Take it out.")
        return self._render(messages, prompt)

    def example(
        self,
        tokenizer: Tokenizer,  # with `specials` among its special tokens
        messages: Sequence[Message],  # the last one is the assistant's: the answer, and the only one that is learned
    ) -> tuple[list[int], list[int]]: # what is given, and what is wanted: a pair for `lmbook.batches.Examples`
        "A conversation as ids. Raises FinetuningError where the last message is not the assistant's."
        last = messages[-1].get("role") if messages else None
        _check.that(last == "assistant", "The last message must be the assistant's: it is what is learned.")
        given, whole = self.render(messages[:-1], prompt=True), self.render(messages)
        _check.that(whole.startswith(given), "The template writes an answer in another way once it is there, so it cannot be cut out.")
        for name in self.specials: tokenizer.special(name)
        before = tokenizer.encode(given, bos=tokenizer.bos_id is not None, specials=True)
        return before, tokenizer.encode(whole[len(given) :], specials=True)
