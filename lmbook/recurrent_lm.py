
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .bilstm import CELLS, Recurrent, RecurrentConfig, State, detach_state
from .training import IGNORE, Batch, evaluating


class RecurrentLMError(ValueError):
    "Something about a recurrent language model or its input that the user can mend. The message says what is wrong and what to do about it."


States = tuple[State, ...]  # what is carried, of each layer: h of shape (1, B, H), for an LSTM (h, c)


@dataclass(frozen=True)
class RecurrentLMConfig:
    "A recurrent language model. The dropouts are those of AWD-LSTM (Merity, Keskar and Socher 2018), all off by default."

    vocab_size: int  # ids run from 0 to vocab_size - 1
    d_embed: int = 64  # numbers that stand for a word
    d_hidden: int = 64  # numbers in the state of a layer; the last layer has d_embed of them where the matrix is tied
    layers: int = 1
    cell: str = "lstm"  # one of lmbook.bilstm.CELLS: "lstm", "gru" or "rnn"
    tie: bool = True  # one matrix for reading words and for predicting them
    dropout_words: float = 0.0  # share of the vocabulary that is not read at all, wherever it stands in the batch
    dropout_in: float = 0.0  # share of the numbers of the word vectors that is silenced, the same ones at all places of a row
    dropout_hidden: float = 0.0  # the same between layers
    dropout_out: float = 0.0  # the same of what the last layer puts out
    weight_drop: float = 0.0  # share of the matrices from state to state that is silenced, the same for the whole batch
    forget_bias: float | None = 1.0  # of an LSTM at the start, see RecurrentConfig

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_embed", "d_hidden", "layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1: raise RecurrentLMError(f"{name}={value!r} must be a whole number, at least 1.")
        if self.cell not in CELLS: raise RecurrentLMError(f"There is no cell {self.cell!r}. Choose one of: {', '.join(CELLS)}.")
        for name in (f.name for f in fields(self) if "drop" in f.name):
            if not 0 <= getattr(self, name) < 1: raise RecurrentLMError(f"{name}={getattr(self, name)} must be at least 0 and below 1: it is the share that is silenced.")
        if self.dropout_hidden and self.layers == 1: raise RecurrentLMError("dropout_hidden acts between layers, and with layers=1 there is no between: leave it at 0.")
        if self.tie and self.layers == 1 and self.d_hidden != self.d_embed:
            raise RecurrentLMError(f"With tie=True the last layer, here the only one, is as wide as a word vector ({self.d_embed}), so d_hidden={self.d_hidden} would be of "
                                   f"no use. Write d_hidden={self.d_embed}, or layers=2, or tie=False.")

    @property
    def widths(self) -> tuple[int, ...]: # of the state of each layer
        "How many numbers each layer puts out."
        return (self.d_hidden,) * (self.layers - 1) + (self.d_embed if self.tie else self.d_hidden,)


def same_mask(
    x: Tensor,  # (B, T, H)
    share: float,  # of the H numbers that is silenced, from 0 to below 1
    training: bool = True,  # False: nothing is
) -> Tensor: # (B, T, H)
    "Dropout with one mask for all places of a row, and another for each row (Gal and Ghahramani 2016): variational, or locked, dropout."
    if not share or not training: return x
    return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), share)


class RecurrentLM(nn.Module):
    """The next word from a state in which all earlier ones have left their trace.

    Word vectors, recurrent layers (`Recurrent`, each PyTorch's own fused kernel), and a score for every word. With `tie` the matrix of
    the scores is that of the word vectors (Press and Wolf 2017; Inan, Khosravi and Socher 2017). The vectors are drawn with a length of about 2.
    """

    def __init__(self, config: RecurrentLMConfig):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.d_embed)
        self.layers = nn.ModuleList(Recurrent(RecurrentConfig(i, o, cell=c.cell, forget_bias=c.forget_bias)) for i, o in zip((c.d_embed, *c.widths), c.widths))
        self.out = nn.Linear(c.widths[-1], c.vocab_size)
        if c.tie: self.out.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.uniform_(-1, 1).mul_(2 * (3 / c.d_embed) ** 0.5)
            self.out.bias.zero_()

    def initial_state(
        self,
        batch_size: int,
    ) -> States:
        "The state before the first word: zeros."
        def zeros(width: int) -> Tensor: return self.embed.weight.new_zeros(1, batch_size, width)

        return tuple((zeros(w), zeros(w)) if self.config.cell == "lstm" else zeros(w) for w in self.config.widths)

    def features(
        self,
        ids: Tensor,  # (B, T) whole numbers below vocab_size
        states: States | None = None,  # where each row goes on; None: zeros
    ) -> tuple[Tensor, States]: # (B, T, H) what the last layer says at each place, and the new states
        "Read, without scoring any word yet: scoring is most of the work, and often only a few places are asked."
        c = self.config
        if ids.ndim != 2 or not ids.numel(): raise RecurrentLMError(f"ids must have the shape (B, T) and hold something, not {tuple(ids.shape)}. For one text pass ids[None].")
        if ids.is_floating_point() or ids.dtype == torch.bool: raise RecurrentLMError(f"ids are whole numbers, not {ids.dtype}.")
        if ids.device.type == "cpu" and not 0 <= (low := int(ids.min())) <= (high := int(ids.max())) < c.vocab_size:
            raise RecurrentLMError(f"The id {low if low < 0 else high} is no word: they run from 0 to {c.vocab_size - 1}. Is this the model's tokenizer?")
        if states is None: states = self.initial_state(len(ids))
        if len(states) != c.layers: raise RecurrentLMError(f"The state is of {len(states)} layers, the model has {c.layers}: was it made by another model?")
        x = self.embed(ids)
        if self.training and c.dropout_words: x = x * F.dropout(x.new_ones(c.vocab_size), c.dropout_words)[ids][..., None]
        x, new = same_mask(x, c.dropout_in, self.training), []
        for i, (layer, state) in enumerate(zip(self.layers, states), 1):
            if self.training and c.weight_drop:
                dropped = {"rnn.weight_hh_l0": F.dropout(layer.rnn.weight_hh_l0, c.weight_drop)}
                x, state = functional_call(layer, dropped, (x, state))
            else: x, state = layer(x, state)
            x = same_mask(x, c.dropout_hidden if i < c.layers else c.dropout_out, self.training)
            new.append(state)
        return x, tuple(new)

    def step(
        self,
        ids: Tensor,  # (B, T)
        states: States | None = None,
    ) -> tuple[Tensor, States]: # (B, T, V) scores of the word that follows each place, and the new states
        "Go on reading where the states were left. Raises RecurrentLMError, or RecurrentError where states do not fit the batch."
        x, states = self.features(ids, states)
        return self.out(x), states

    def forward(
        self,
        ids: Tensor,  # (B, T)
    ) -> Tensor: # (B, T, V)
        "Score every word as the next one, at every place, from a state of zeros."
        return self.step(ids)[0]

    def token_log_probs(
        self,
        ids: Tensor,  # (B, T)
        piece: int = 2**22,  # at most so many scores at a time
    ) -> Tensor: # (B, T-1): log-probability (nats) of each id but the first, given all those before it
        """What `lmbook.language_models.evaluate` asks of a model. The state is carried along, so a text may be as long as it likes.

        Scores are made for a few places at a time and thrown away: the memory is that of (B, T, H), not of (B, T, V).
        """
        states, out = None, []
        for part in torch.arange(ids.shape[1] - 1).split(max(1, piece // (len(ids) * self.config.vocab_size))):
            scores, states = self.step(ids[:, part], states)
            out.append(-F.cross_entropy(scores.transpose(1, 2), ids[:, part + 1], reduction="none"))
        return torch.cat(out, 1) if out else self.embed.weight.new_zeros(len(ids), 0)

    def set_embedding(
        self,
        matrix: Any,  # (V, d_embed) a vector for each id, in the order of the model's ids: an array, a tensor, or the weight of an nn.Embedding
        freeze: bool = False,  # keep them as they are in training; with a tied matrix that holds for the scores, too
    ) -> "RecurrentLM": # itself
        "Copy word vectors that were learned elsewhere into the model. Raises RecurrentLMError where they are of another width or number."
        matrix, c = torch.as_tensor(np.asarray(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix)), self.config
        if matrix.ndim != 2 or matrix.shape[0] != c.vocab_size:
            raise RecurrentLMError(f"The vectors have the shape {tuple(matrix.shape)}; one row for each of the {c.vocab_size} ids is needed, in their order.")
        if matrix.shape[1] != c.d_embed:
            tied = ", which is also how wide the last layer is, because the matrix is tied" if c.tie else ""
            raise RecurrentLMError(f"The vectors have {matrix.shape[1]} numbers, the model was made for d_embed={c.d_embed}{tied}. Make it with d_embed={matrix.shape[1]}.")
        if not matrix.isfinite().all(): raise RecurrentLMError(f"The vector of id {int((~matrix.isfinite().all(1)).nonzero()[0])} holds a number that is not finite.")
        with torch.no_grad(): self.embed.weight.copy_(matrix)
        self.embed.weight.requires_grad_(not freeze)
        return self

    def sample(
        self,
        context: Any,  # ids to continue, at least one
        n: int,  # at most so many more
        *,
        temperature: float = 1.0,  # above 0; scores are divided by it: below 1 the likely becomes likelier
        stop_id: int | None = None,  # end with this id, if it is drawn
        generator: torch.Generator | None = None,  # on the CPU
    ) -> list[int]: # the new ids
        "Draw a continuation. Each word is read once: the state is all that is kept of the text."
        if temperature <= 0: raise RecurrentLMError(f"temperature={temperature} must be above 0; close to 0 the likeliest word is always drawn.")
        if not len(context): raise RecurrentLMError("There is nothing to continue: begin with the tokenizer's <bos>.")
        device, new = self.embed.weight.device, []
        with evaluating(self):
            scores, states = self.step(torch.as_tensor(context, device=device)[None])
            while len(new) < n and (not new or new[-1] != stop_id):
                p = (scores[0, -1].double().cpu() / temperature).softmax(0)
                new.append(int(torch.multinomial(p, 1, generator=generator)))
                if len(new) < n: scores, states = self.step(torch.tensor([new[-1:]], device=device), states)
        return new


class CarriedState:
    """A loss for the Trainer, for a `RecurrentLM`: the state goes on from batch to batch where the batch says so (`Batch.carry`).

    The numbers are carried, the gradient stops at the edge of the batch: truncated back-propagation through time. Training and evaluation
    keep a state each, so an evaluation in between disturbs nothing. The state is part of the Trainer's checkpoint. Words are scored only at places
    whose target counts. Each run needs a CarriedState of its own.
    """

    def __init__(self) -> None: self.states: dict[str, States | None] = {"train": None, "eval": None}

    def __call__(
        self,
        model: RecurrentLM,
        batch: Batch,  # of `TokenStream(contiguous=True)`, or any other: without `carry` each row begins with zeros
    ) -> tuple[Tensor, int]: # the sum of the losses in nats, and over how many tokens
        "Read a batch where the last one ended."
        if batch.positions is not None or batch.source is not None:
            raise RecurrentLMError("These rows are packed, or pairs that are kept apart. A state runs through whole rows: batch with pack=False and join=True.")
        mode = "train" if model.training else "eval"
        before = self.states[mode] if batch.carry else None
        if before is not None: before = _moved(before, batch.ids.device)
        x, after = model.features(batch.ids, before)
        self.states[mode] = tuple(map(detach_state, after))
        counts = batch.targets != IGNORE
        x, targets = (x.flatten(0, 1), batch.targets.flatten()) if batch.tokens == counts.numel() else (x[counts], batch.targets[counts])
        scores = model.out(x)
        if scores.dtype in (torch.bfloat16, torch.float16): scores = scores.float()
        return F.cross_entropy(scores, targets, reduction="sum"), batch.tokens

    def state_dict(self) -> dict[str, Any]: return {"train": self.states["train"]}

    def load_state_dict(self, state: dict[str, Any]) -> None: self.states = {"train": state["train"], "eval": None}


def _moved(states: States, device: torch.device) -> States:
    return tuple(tuple(part.to(device) for part in state) if isinstance(state, tuple) else state.to(device) for state in states)
