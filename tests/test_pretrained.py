"""Files of models: our own, and those that go to other libraries and come back."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lmbook.checkpoints import load_weights, save_weights
from lmbook.pretrained import LAYOUTS, Layout, load_classifier, load_pretrained, save_pretrained
from lmbook.tokenization import CharTokenizer
from lmbook.tokenizer_files import load_tokenizer
from lmbook.transformer import Classifier, ClassifierConfig, Transformer, TransformerConfig, TransformerError
from tests.models import CASES, SIZES, VARIANTS, SlowCache, V, close, given_source, ids, make

# ---------------------------------------------------------------- files of our own


def test_no_layout_is_forgotten(): assert get_args(Layout) == tuple(LAYOUTS)


@pytest.mark.parametrize(("kind", "variant"), CASES)
@torch.no_grad()
def test_own_files_go_out_and_in(kind, variant, tmp_path):
    model = make(kind, variant)
    save_pretrained(model, tmp_path / "new" / "folder")
    again = load_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and not again.training
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(again(ids(2, 9), **given_source(model, 2)), model(ids(2, 9), **given_source(model, 2)))
    assert (again.out.weight is again.embed.tokens.weight) == model.config.tie and all(p.requires_grad for p in again.parameters())
    with torch.enable_grad(): again.train()(ids(2, 9), **given_source(model, 2)).sum().backward()
    again.load_state_dict(model.state_dict())


def test_weights_of_a_checkpoint_are_the_same_file(tmp_path):
    model, other = make(), make(seed=9)
    save_pretrained(model, tmp_path)
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(other(ids(1, 5)), model(ids(1, 5)))
    save_weights(make(seed=3), tmp_path / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path)(ids(1, 5)), make(seed=3)(ids(1, 5)))


def test_reading_draws_no_random_numbers_and_saving_over_what_was_read_works(tmp_path):
    save_pretrained(make(variant="alibi"), tmp_path)
    before = torch.random.get_rng_state()
    model = load_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad(): model.out.weight.mul_(2)
    save_pretrained(model, tmp_path)
    assert torch.equal(load_pretrained(tmp_path).out.weight, model.out.weight)


def test_a_failure_leaves_what_was_there(tmp_path):
    save_pretrained(make(), tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()  # nothing can be renamed onto a folder
    with pytest.raises(TransformerError, match="config.json cannot be written") as error: save_pretrained(make(seed=2), tmp_path)
    assert isinstance(error.value.__cause__, OSError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "other").mkdir()
    with pytest.raises(TransformerError): save_pretrained(make("encoder-decoder"), tmp_path / "other", "gpt2")
    assert not list((tmp_path / "other").iterdir())


def test_a_matrix_that_is_no_longer_tied_is_not_lost(tmp_path):
    model = make()
    model.out.weight = nn.Parameter(model.out.weight.detach() * 2)
    with pytest.raises(TransformerError, match="two matrices"): save_pretrained(model, tmp_path / "x")
    model.config = replace(model.config, tie=False)
    save_pretrained(model, tmp_path / "x", "llama")
    assert torch.equal(load_pretrained(tmp_path / "x")(ids(1, 5)), model(ids(1, 5)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_saved_as_itself(tmp_path):
    model = make()
    save_pretrained(torch.compile(model, backend="eager"), tmp_path)  # never called, so nothing is compiled
    assert torch.equal(load_pretrained(tmp_path)(ids(1, 5)), model(ids(1, 5)))


def test_precision_of_files(tmp_path):
    model = make().bfloat16()
    save_pretrained(model, tmp_path, "llama")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    wide, low = load_pretrained(tmp_path), load_pretrained(tmp_path, torch.bfloat16)
    assert wide.out.weight.dtype == torch.float32 and low.out.weight.dtype == torch.bfloat16
    assert torch.equal(wide.out.weight, model.out.weight.float())


@torch.no_grad()
def test_a_file_is_read_into_float64(tmp_path):
    model = make(variant="alibi").double()
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path, torch.float64)
    assert again(ids(2, 9)).dtype == torch.float64 and torch.equal(again(ids(2, 9)), model(ids(2, 9)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards(layout, tmp_path):
    variant = "llama" if layout in ("lmbook", "mistral", "qwen2") else layout
    kind, biased = "encoder" if layout == "bert" else "decoder", layout not in ("lmbook", "mistral", "llama")
    model = make(kind, variant, bias=biased, mlp_bias=variant != "llama")
    if layout == "qwen2":
        for block in model.decoder.blocks: nn.init.zeros_(block.attention.out.bias)
    save_pretrained(model, tmp_path, layout)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for part, some in shards.items(): save_file({name: tensors[name] for name in some}, tmp_path / part)
    (tmp_path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: part for part, some in shards.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_pretrained(tmp_path)(ids(1, 9)), model(ids(1, 9)))
    save_file({}, tmp_path / "model-2-of-2.safetensors")
    with pytest.raises(TransformerError, match="Do they belong together"): load_pretrained(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(TransformerError, match="Fetch it, too"): load_pretrained(tmp_path)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TransformerError, match="no weight_map"): load_pretrained(tmp_path)


def edit(folder, **changes) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v != "gone"}))


LLAMA3 = {
    "rope_type": "llama3", "factor": 8., "low_freq_factor": 1., "high_freq_factor": 4., "original_max_position_embeddings": 12,
}  # fmt: skip


def broken(folder, tensors) -> dict[str, object]:
    weights = folder / "model.safetensors"
    bias = "model.layers.0.self_attn.q_proj.bias"
    pickle = b"cos\nsystem\n(S'false'\ntR."
    name = "model.layers.1.self_attn.k_proj.weight"
    return {
        "has no config.json": lambda: (folder / "config.json").unlink(),
        "cannot be read as JSON": lambda: (folder / "config.json").write_text("{"),
        "cannot be read as JSON: 'utf-8'": lambda: (folder / "config.json").write_bytes(b"\xff\xfe"),
        "holds list, not an object": lambda: (folder / "config.json").write_text("[]"),
        "of type 'mamba'. Known are: lmbook, gpt2, bert, llama, mistral, qwen2": lambda: edit(folder, model_type="mamba"),
        "of type None": lambda: edit(folder, model_type="gone"),
        "has no hidden_size, which a model of type 'llama' needs": lambda: edit(folder, hidden_size="gone"),
        "n_head=5 does not divide": lambda: edit(folder, num_attention_heads=5, num_key_value_heads=5, head_dim=None),
        "must be a whole number": lambda: edit(folder, hidden_size="wide"),
        "dropout='much' must be at least 0": lambda: edit(folder, attention_dropout="much"),
        "a field of the wrong type: unsupported operand": lambda: edit(folder, rope_scaling="linear"),
        "a field of the wrong type: could not convert": lambda: edit(folder, rope_parameters={"rope_theta": "far"}),
        "is torn, or no safetensors file": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "torn, or no safetensors": lambda: weights.write_bytes(b"nothing"),
        "has no model.safetensors": weights.unlink,
        "in pytorch_model.bin, a pickle": lambda: (weights.unlink(), (folder / "pytorch_model.bin").write_bytes(pickle)),
        f"of another shape: {name} (16, 31), by config.json (16, 32)": lambda: save_file({**tensors, name: torch.zeros(16, 31)}, weights),
        f"missing: {name}": lambda: save_file({k: v for k, v in tensors.items() if k != name}, weights),
        f"not of this model: {bias}": lambda: save_file({**tensors, bias: torch.zeros(32)}, weights),
        "and 5 more": lambda: edit(folder, num_hidden_layers=3),
        "is not the matrix of the word vectors": lambda: save_file({**tensors, "lm_head.weight": torch.zeros(V, 32)}, weights),
        "scales rotary positions by 'yarn'": lambda: edit(folder, rope_scaling={"type": "yarn", "factor": 2.}),
        "scales rotary positions by 'dynamic'": lambda: edit(folder, rope_scaling={"type": "dynamic", "factor": 2.}),
        "has no low_freq_factor": lambda: edit(folder, rope_parameters={"rope_type": "llama3", "factor": 8.}),
        "scaling=-2.0 must be above 0": lambda: edit(folder, rope_scaling={"type": "linear", "factor": -2.}),
        "with low < high": lambda: edit(folder, rope_scaling=dict(LLAMA3, low_freq_factor=5.)),
        "of type []": lambda: edit(folder, model_type=[]),
        "of type {}": lambda: edit(folder, model_type={}),
        "layers of the type 'sliding_attention'": lambda: edit(folder, layer_types=["sliding_attention", "full_attention"]),
        "part of each head only": lambda: edit(folder, partial_rotary_factor=.5),
        "pretraining_tp=2": lambda: edit(folder, pretraining_tp=2),
        "the gate 'relu'": lambda: edit(folder, hidden_act="relu"),
        "the activation 'quick_gelu'": lambda: edit(folder, hidden_act="quick_gelu"),
    }


@pytest.mark.parametrize("says", broken(Path("x"), {}))
def test_broken_folders(says, tmp_path):
    save_pretrained(make(), tmp_path, "llama")
    broken(tmp_path, load_file(tmp_path / "model.safetensors"))[says]()
    with pytest.raises(TransformerError) as error: load_pretrained(tmp_path)
    assert says in str(error.value)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(TransformerError, match="no folder"): load_pretrained(tmp_path / "x")
    with pytest.raises(TransformerError, match="no layout='mamba'"): save_pretrained(make(), tmp_path, "mamba")


CANNOT = [
    ("gpt2", {"kind": "encoder-decoder"}, "kind="),
    ("gpt2", {"norm": "rms"}, "norm="),
    ("gpt2", {"activation": "swiglu", "d_ff": 40}, "activation="),
    ("gpt2", {"norm_first": False}, "norm_first="),
    ("gpt2", {"positions": "rotary"}, "positions="),
    ("gpt2", {"n_kv_head": 2}, "n_kv_head="),
    ("gpt2", {"d_head": 4}, "d_head="),
    ("gpt2", {"bias": False}, "bias="),
    ("gpt2", {"mlp_bias": False}, "mlp_bias="),
    ("gpt2", {"window": 3}, "window="),
    ("gpt2", {"types": 1}, "types="),
    ("gpt2", {"embed_norm": True}, "embed_norm="),
    ("gpt2", {"head": "bert"}, "head="),
    ("gpt2", {"residual": False}, "residual="),
    ("bert", {"kind": "decoder"}, "kind="),
    ("bert", {"norm_first": True}, "norm_first="),
    ("bert", {"types": 0}, "types="),
    ("bert", {"head": "linear"}, "head="),
    ("bert", {"embed_norm": False}, "embed_norm="),
    ("bert", {"positions": "alibi"}, "positions="),
    ("llama", {"positions": "learned"}, "positions="),
    ("llama", {"activation": "gelu"}, "activation="),
    ("llama", {"norm": "layer"}, "norm="),
    ("llama", {"kind": "encoder"}, "kind="),
    ("llama", {"window": 5}, "window="),
    ("gpt2", {"positions": "rotary", "rotary_scaling": (2.,)}, "positions="),
    ("mistral", {"bias": True, "mlp_bias": False}, "bias="),
    ("mistral", {"mlp_bias": True}, "mlp_bias="),
    ("qwen2", {"mlp_bias": False}, "bias="),
    ("qwen2", {"bias": True, "mlp_bias": False, "window": 4}, "window="),
]


@pytest.mark.parametrize(("layout", "change", "field"), CANNOT)
def test_what_a_layout_cannot_hold(layout, change, field, tmp_path):
    variant = "llama" if layout in ("mistral", "qwen2") else layout
    model = make(**{"kind": "encoder" if layout == "bert" else "decoder", "variant": variant, **change})
    with pytest.raises(TransformerError, match=f"The layout '{layout}' cannot hold {field}"): save_pretrained(model, tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()


def test_every_field_is_kept_or_refused(tmp_path):
    "No field of the configuration is dropped on the way in silence: change each, and it comes back or is named."
    changes = {
        "vocab_size": 50, "d_model": 64, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "d_head": 4, "d_ff": 40, "context_length": 30,
        "kind": "encoder-decoder", "norm": "none", "norm_first": False, "activation": "geglu_tanh", "positions": "none",
        "rotary_base": 500., "rotary_scaling": (2.,), "window": 4,
        "bias": True, "mlp_bias": True, "tie": False, "dropout": .25, "norm_eps": 1e-3,
        "source_vocab": 9, "types": 3, "embed_norm": True, "head": "bert", "residual": False, "init": "xavier",
    }  # fmt: skip
    assert set(changes) == {f.name for f in fields(TransformerConfig)}
    kept = set()
    for name, value in changes.items():
        more = {"kind": "encoder-decoder"} if name == "source_vocab" else {}
        model = Transformer(TransformerConfig(**{"vocab_size": V, **SIZES, **VARIANTS["llama"], **more, name: value}))
        try: save_pretrained(model, tmp_path / name, "llama")
        except TransformerError as error: assert name in str(error) or more; continue
        if getattr(load_pretrained(tmp_path / name).config, name) == value: kept.add(name)
        else: assert name == "init", name  # how weights were drawn is past
    sizes = {"vocab_size", "d_model", "n_layer", "n_head", "n_kv_head", "d_head", "d_ff", "context_length"}
    assert kept == sizes | {"activation", "rotary_base", "rotary_scaling", "bias", "mlp_bias", "tie", "dropout", "norm_eps"}


# ---------------------------------------------------------------- files of others


def theirs(name: str, seed: int = 0, body: bool = False, end: str = "", **changes):
    "A small random model of `transformers`."
    t = pytest.importorskip("transformers")
    kinds = {
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel),
        "bert": (t.BertConfig, t.BertForMaskedLM),
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
        "mistral": (t.MistralConfig, t.MistralForCausalLM),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
    }
    newer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 24}
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": None, "eos_token_id": None},
        "bert": newer,
    }.get(name, {**newer, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None})
    config, model = kinds[name]
    bodies = {"gpt2": t.GPT2Model, "bert": t.BertModel, "llama": t.LlamaModel, "mistral": t.MistralModel, "qwen2": t.Qwen2Model}
    if body: model = bodies[name]
    if end: model = getattr(t, bodies[name].__name__.removesuffix("Model") + end)
    torch.manual_seed(seed)
    made = model(config(vocab_size=V, **{**sizes, **changes}))
    with torch.no_grad():
        for p in made.parameters(): p.normal_(0, .2) if p.ndim > 1 else p.add_(torch.randn_like(p) * .2)
    made.tie_weights()
    return made.eval()


OTHERS = [
    ("gpt2", {}),
    ("gpt2", {"n_inner": 40, "activation_function": "relu", "n_head": 2, "layer_norm_epsilon": 1e-3}),
    ("gpt2", {"tie_word_embeddings": False, "n_layer": 3, "activation_function": "gelu"}),
    ("bert", {}),
    ("bert", {"type_vocab_size": 3, "hidden_act": "relu", "num_hidden_layers": 1, "layer_norm_eps": 1e-3}),
    ("bert", {"hidden_act": "gelu_new", "num_attention_heads": 2}),
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "mlp_bias": True, "head_dim": 12}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.}, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3., "rope_theta": 500.}}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.}}),
    ("bert", {"tie_word_embeddings": False}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 4, "head_dim": 12, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
]
OTHER_NAMES = [f"{name} {' '.join(change)}".strip() for name, change in OTHERS]


@pytest.mark.parametrize(("name", "change"), OTHERS, ids=OTHER_NAMES)
@pytest.mark.parametrize("seed", (0, 1))
@torch.no_grad()
def test_parity_with_transformers(name, change, seed, tmp_path):
    other = theirs(name, seed, **change)
    other.save_pretrained(tmp_path / "a")
    model = load_pretrained(tmp_path / "a")
    x, there = ids(3, 9, seed), torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 8 + [0]])
    close(model(x), other(x).logits, 1e-4)
    close(model(x, segments=there)[there > 0], other(x, attention_mask=there).logits[there > 0], 1e-4)
    if name == "bert": close(model(x, types=x % 2), other(x, token_type_ids=x % 2).logits, 1e-4)
    save_pretrained(model, tmp_path / "b", name)  # and back
    back = type(other).from_pretrained(tmp_path / "b").eval()
    close(back(x).logits, other(x).logits, 1e-4)
    before, after = other.state_dict(), back.state_dict()
    if name == "bert" and not model.config.tie: before.pop("cls.predictions.bias"), after.pop("cls.predictions.bias")  # which nothing reads
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(load_pretrained(tmp_path / "b")(x), model(x))
    save_pretrained(model, tmp_path / "c")  # and through our own
    assert torch.equal(load_pretrained(tmp_path / "c")(x), model(x))


BODIES = [
    ("bert", {}), ("bert", {"type_vocab_size": 3, "hidden_act": "relu"}), ("bert", {"tie_word_embeddings": False}), ("llama", {}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.}}), ("mistral", {"sliding_window": 4}), ("qwen2", {}),
    ("gpt2", {"tie_word_embeddings": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), BODIES, ids=map(str, BODIES))
@torch.no_grad()
def test_a_body_without_a_head(name, change, tmp_path):
    "What most files of BERT are: the vectors of `transformers`, padding or not; scores are refused in words."
    other = theirs(name, body=True, **change)
    x, there = ids(3, 9), torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 8 + [0]])
    want, padded = other(x).last_hidden_state, other(x, attention_mask=there).last_hidden_state[there > 0]
    other.save_pretrained(tmp_path / "a")
    load_pretrained(tmp_path / "a")
    for folder, layout in (("b", name), ("c", "lmbook")):
        model = load_pretrained(tmp_path / "a")
        save_pretrained(model, tmp_path / folder, layout)
        for one in (model, load_pretrained(tmp_path / folder)):
            close(one.hidden(x), want, 1e-4)
            close(one.hidden(x, segments=there)[there > 0], padded, 1e-4)
            with pytest.raises(TransformerError, match="without a language model's head"): one(x)
            with pytest.raises(TransformerError, match="without a language model's head"): one.out.weight  # noqa: B018
    back, info = type(other).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["unexpected_keys"] and not [k for k in info["missing_keys"] if "pooler" not in k]
    close(back.eval()(x).last_hidden_state, want, 1e-4)


@torch.no_grad()
def test_an_untied_bert_has_one_bias_of_its_scores(tmp_path):
    "The decoder's own, as `transformers` reads it, whichever of the two a file has; where a tied file has two, they must agree."
    other = theirs("bert", tie_word_embeddings=False)
    other.save_pretrained(tmp_path)
    weights, want = load_file(tmp_path / "model.safetensors"), other(ids(2, 5)).logits
    one, counts = "cls.predictions.bias", "cls.predictions.decoder.bias"
    assert not torch.equal(weights[one], weights[counts])
    close(load_pretrained(tmp_path)(ids(2, 5)), want, 1e-4)
    save_file({k: v for k, v in weights.items() if k != one}, tmp_path / "model.safetensors")
    close(load_pretrained(tmp_path)(ids(2, 5)), want, 1e-4)
    save_file({k: v for k, v in weights.items() if k != counts} | {one: weights[counts]}, tmp_path / "model.safetensors")
    close(load_pretrained(tmp_path)(ids(2, 5)), want, 1e-4)
    save_pretrained(make("encoder", "bert"), tmp_path, "bert")
    tied = load_file(tmp_path / "model.safetensors")
    save_file({**tied, counts: tied[one] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(TransformerError, match="differ"): load_pretrained(tmp_path)


def test_qwens_missing_bias_must_be_none(tmp_path):
    with pytest.raises(TransformerError, match="not all 0"): save_pretrained(make(bias=True, mlp_bias=False), tmp_path / "x", "qwen2")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("layout", ("gpt2", "llama", "lmbook"))
def test_a_folder_with_its_tokenizer_works_elsewhere_as_it_is(layout, tmp_path):
    t = pytest.importorskip("transformers")
    tokenizer = CharTokenizer("ab cdefghijklmnopqrstuvwxyz.,!?")
    model = make("decoder", "llama" if layout == "lmbook" else layout)
    save_pretrained(model, tmp_path, layout, tokenizer)
    assert load_tokenizer(tmp_path).to_bytes() == tokenizer.to_bytes()
    close(load_pretrained(tmp_path)(ids(1, 5)), model(ids(1, 5)))
    with pytest.raises(TransformerError, match="do not belong together"):
        save_pretrained(model, tmp_path / "x", layout, CharTokenizer([chr(i) for i in range(40, 90)]))
    assert not (tmp_path / "x").exists()
    if layout == "lmbook": return
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    theirs_tokenizer, other = t.AutoTokenizer.from_pretrained(tmp_path), t.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs_tokenizer("a tea, b!", add_special_tokens=False)["input_ids"] == tokenizer.encode("a tea, b!")
    assert (theirs_tokenizer.eos_token, theirs_tokenizer.bos_token, theirs_tokenizer.pad_token) == ("<eos>", "<bos>", "<pad>")
    assert other.generation_config.eos_token_id == 2 and other.generation_config.bos_token_id == 1
    with torch.no_grad():
        always = nn.Linear(32, V)  # <eos>, whatever comes
        always.weight.zero_(), always.bias.zero_()
        always.bias[2] = 1
        other.set_output_embeddings(always)
    assert other.generate(ids(1, 3), max_new_tokens=9, do_sample=False).shape[1] == 4


BAD_VALUES = (1e30, -1e30, 10**30, -1, 0, 2.5, "x", "", [], [1], {}, {"a": 1}, True, False, None, float("nan"), float("inf"), 10**400)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_no_value_of_a_field_ends_in_an_error_of_another_kind(layout, tmp_path):
    "Each field of config.json with values that it cannot have: a TransformerError, or a model that computes."
    variant = "llama" if layout in ("lmbook", "mistral", "qwen2") else layout
    more = {"bias": True, "mlp_bias": False} if layout == "qwen2" else {}
    model = make("encoder" if layout == "bert" else "decoder", variant, **more)
    if layout == "qwen2":
        for block in model.decoder.blocks: nn.init.zeros_(block.attention.out.bias)
    save_pretrained(model, tmp_path, layout)
    whole = (tmp_path / "config.json").read_text()
    said = ("attention_bias", "mlp_bias", "tie_word_embeddings", "bias", "tie", "norm_first", "residual", "embed_norm")
    for field in {**json.loads(whole), "rope_scaling": None, "layer_types": None}:
        for value in BAD_VALUES:
            edit(tmp_path, **{field: value})
            try: load_pretrained(tmp_path)(ids(1, 4))
            except TransformerError: pass
            else: assert field not in said or isinstance(value, bool) or value is None, (field, value)
            (tmp_path / "config.json").write_text(whole)


def test_weights_of_whole_numbers_are_refused(tmp_path):
    save_pretrained(make(), tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        save_file({**tensors, name: tensors[name].to(torch.int32)}, tmp_path / "model.safetensors")
        with pytest.raises(TransformerError, match=f"of another type: {name} holds int32"): load_pretrained(tmp_path)


def test_hostile_folders_are_refused_at_once(tmp_path):
    def refused(says: str) -> None:
        with pytest.raises(TransformerError, match=says): load_pretrained(tmp_path)

    save_pretrained(make(), tmp_path, "llama")
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = config.read_text()
    edit(tmp_path, num_hidden_layers=10**6)
    refused("1,000,000 layers")
    config.write_text('{"model_type":' + "[" * 200_000)
    refused("cannot be read as JSON")
    with open(config, "wb") as file: file.truncate(3 << 30)  # which takes no room
    refused("which no such file has")
    config.write_text(whole)
    weights.unlink()
    index = tmp_path / "model.safetensors.index.json"
    for place in ("x" * 300, "a\0b", "", "..", 7):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        refused("no weight_map|is missing")
    index.write_text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(100_000)}}))
    refused("0.safetensors is missing")


WRITERS = [pytest.param(*other, id=name) for other, name in zip(OTHERS, OTHER_NAMES) if other[0] != "bert"]


@pytest.mark.parametrize(("name", "change"), WRITERS)
@torch.no_grad()
def test_the_same_text_is_written(name, change, tmp_path):
    other = theirs(name, **change)
    other.save_pretrained(tmp_path)
    model, start = load_pretrained(tmp_path), ids(2, 4)
    wanted = other.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=20, do_sample=False, pad_token_id=0)
    plain, x, cache = start, start, SlowCache(model.config.n_layer)
    while plain.shape[1] < 24:
        plain = torch.cat([plain, model(plain)[:, -1:].argmax(-1)], 1)
        x = torch.cat([x, model(x if x.shape[1] == 4 else x[:, -1:], cache=cache)[:, -1:].argmax(-1)], 1)
    assert plain.tolist() == x.tolist() == wanted.tolist() and len(set(wanted[0].tolist())) > 3


@pytest.mark.parametrize("name", ("gpt2", "bert", "llama"))
@torch.no_grad()
def test_our_models_are_theirs(name, tmp_path):
    "The other way: made here, read there."
    t = pytest.importorskip("transformers")
    model = make("encoder" if name == "bert" else "decoder", name)
    save_pretrained(model, tmp_path, name)
    auto = t.AutoModelForMaskedLM if name == "bert" else t.AutoModelForCausalLM
    other, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(other.eval()(ids(2, 9)).logits, model(ids(2, 9)), 1e-4)
    if name == "llama":  # older readers look in one place for the base of the rotation, newer ones in another
        described = json.loads((tmp_path / "config.json").read_text())
        assert described["rope_theta"] == described["rope_parameters"]["rope_theta"] == model.config.rotary_base


@torch.no_grad()
def test_old_files(tmp_path):
    "What lies on people's disks: without prefixes, with buffers, with gamma and beta, with the base of the rotation in the old place."
    buffers = {
        "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 24, 24), "h.1.attn.masked_bias": torch.tensor(-1e4)},
        "bert": {
            "bert.pooler.dense.weight": torch.ones(32, 32),
            "cls.seq_relationship.bias": torch.ones(2),
            "bert.embeddings.position_ids": torch.arange(24)[None],
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    }
    older = {"rope_parameters": "gone", "rope_theta": 77., "head_dim": "gone"}
    twice = {"gpt2": "lm_head.weight", "bert": "cls.predictions.decoder.weight", "llama": "lm_head.weight"}  # written once more, as some do
    for name, rename, config in (
        ("gpt2", lambda k: k.removeprefix("transformer."), {}),
        ("bert", lambda k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"), {}),
        ("llama", lambda k: k, older),
    ):
        model = make("encoder" if name == "bert" else "decoder", name, **({"rotary_base": 77.} if name == "llama" else {}))
        save_pretrained(model, tmp_path / name, name)
        tensors = {rename(k): v for k, v in load_file(tmp_path / name / "model.safetensors").items()}
        save_file({**tensors, **buffers[name]}, tmp_path / name / "model.safetensors")
        edit(tmp_path / name, **config)
        assert torch.equal(load_pretrained(tmp_path / name)(ids(2, 9)), model(ids(2, 9))), name
        save_file({**tensors, twice[name]: model.out.weight.detach().clone()}, tmp_path / name / "model.safetensors")
        assert torch.equal(load_pretrained(tmp_path / name)(ids(2, 9)), model(ids(2, 9))), name


UNREADABLE = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("bert", {"is_decoder": True}),
    ("bert", {"position_embedding_type": "relative_key"}),
]


@pytest.mark.parametrize(("name", "change"), UNREADABLE)
def test_what_cannot_be_read_is_named(name, change, tmp_path):
    save_pretrained(make("encoder" if name == "bert" else "decoder", name), tmp_path, name)
    edit(tmp_path, **change)
    with pytest.raises(TransformerError, match=f"config.json says {next(iter(change))}="): load_pretrained(tmp_path)


# ---------------------------------------------------------------- classifiers

ENDS = {"text": "ForSequenceClassification", "token": "ForTokenClassification"}
FAMILIES = ("gpt2", "bert", "llama", "mistral", "qwen2")


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    "Texts that end in padding of 0, which stands nowhere else."
    x, there = ids(3, 9).clamp(min=1), torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 8 + [0]])
    return x * there, there


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("level", ENDS)
@torch.no_grad()
def test_classifiers_are_those_of_transformers(name, level, tmp_path):
    labels = {0: "no", 1: "perhaps", 2: "yes"}
    other = theirs(name, end=ENDS[level], pad_token_id=0, id2label=labels, label2id={v: k for k, v in labels.items()})
    other.save_pretrained(tmp_path / "a")
    x, there = padded()
    model, full = load_classifier(tmp_path / "a"), ids(2, 9).clamp(min=1)
    assert model.config.labels == ("no", "perhaps", "yes") and model.config.level == level and not model.training
    close(model(full), other(full).logits, 1e-4)
    want, got = other(x, attention_mask=there).logits, model(x, segments=there)
    rows = slice(None) if level == "text" else there > 0
    close(got[rows], want[rows], 1e-4)
    if name == "bert": close(model(full, types=full % 2), other(full, token_type_ids=full % 2).logits, 1e-4)
    left, seen = torch.stack([row.roll(9 - int(n)) for row, n in zip(x, there.sum(1))]), there.flip(1)
    if level == "text": close(model(left, segments=seen), got, 1e-4)

    save_pretrained(model, tmp_path / "b", name)  # and back
    back, info = type(other).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")) and back.config.id2label == labels
    before, after = other.state_dict(), back.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    back.config.pad_token_id = 0
    close(back.eval()(x, attention_mask=there).logits[rows], want[rows], 1e-4)
    save_pretrained(model, tmp_path / "c")  # and through our own
    for folder in "bc":
        again = load_classifier(tmp_path / folder)
        assert again.config == model.config and torch.equal(again(x, segments=there), got)


@torch.no_grad()
def test_what_classifiers_leave_out_or_carry_too_much(tmp_path):
    "Two labels have no id2label in their file; old classifiers of tokens have a pooler that nothing reads."
    other = theirs("bert", end=ENDS["token"])
    other.save_pretrained(tmp_path)
    want, weights = other(ids(2, 5)).logits, load_file(tmp_path / "model.safetensors")
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    save_file({**weights, **pooler}, tmp_path / "model.safetensors")
    edit(tmp_path, id2label="gone", label2id="gone")
    model = load_classifier(tmp_path)
    close(model(ids(2, 5)), want, 1e-4)
    assert model.config.labels == ("LABEL_0", "LABEL_1") and model.config.dropout == 0.1
    edit(tmp_path, classifier_dropout=0.3)
    assert load_classifier(tmp_path).config.dropout == 0.3
    model.train()
    assert not torch.equal(model(ids(2, 5)), model(ids(2, 5)))


@torch.no_grad()
def test_heads_of_another_kind_are_refused_in_one_sentence(tmp_path):
    for end in ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction"):
        theirs("bert", end=end).save_pretrained(tmp_path / end)
        with pytest.raises(TransformerError, match=f"architecture 'Bert{end}', which is no classifier"): load_classifier(tmp_path / end)
    theirs("bert").save_pretrained(tmp_path / "lm")
    with pytest.raises(TransformerError, match="BertForMaskedLM.*no classifier.*load_pretrained"): load_classifier(tmp_path / "lm")
    save_pretrained(make(), tmp_path / "own")
    with pytest.raises(TransformerError, match="no classification head: read it with load_pretrained"): load_classifier(tmp_path / "own")
    theirs("bert", end=ENDS["text"]).save_pretrained(tmp_path / "text")
    with pytest.raises(TransformerError, match="Read it with load_classifier"): load_pretrained(tmp_path / "text")
    weights = load_file(tmp_path / "text" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, tmp_path / "text" / "model.safetensors")
    with pytest.raises(TransformerError, match="missing: bert.pooler.dense.weight, bert"): load_classifier(tmp_path / "text")


CANNOT_JUDGE = [
    ("bert", {"pooler": False}, "pooler=False"), ("bert", {"level": "token", "pooler": True}, "pooler=True"),
    ("bert", {"bias": False}, "bias=False"), ("llama", {}, "bias=True"), ("llama", {"bias": False, "dropout": 0.1}, "dropout=0.1"),
    ("gpt2", {"bias": False, "pooler": True}, "pooler=True"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "says"), CANNOT_JUDGE)
def test_a_head_that_a_layout_cannot_hold(layout, change, says, tmp_path):
    config = ClassifierConfig(**{"labels": ("a", "b"), "pooler": layout == "bert", **change})
    judge = Classifier(make("encoder" if layout == "bert" else "decoder", layout), config)
    with pytest.raises(TransformerError, match=says): save_pretrained(judge, tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()
    save_pretrained(judge, tmp_path / "own")
    assert load_classifier(tmp_path / "own").config == config


@pytest.mark.parametrize(("level", "change", "says"), [
    ("text", {"segments": torch.tensor([[1, 1, 2, 2]])}, "one text a row"),
    ("text", {"segments": torch.zeros(1, 4)}, "nothing but padding"),
    ("token", {"segments": torch.ones(1, 5)}, "shape of the ids"), ("text", {"types": torch.ones(1, 4)}, "marks no kinds"),
])  # fmt: skip
def test_texts_that_cannot_be_judged(level, change, says):
    judge = Classifier(make(), ClassifierConfig(("a", "b"), level))
    with pytest.raises(TransformerError, match=says): judge(ids(1, 4), **change)
    with pytest.raises(TransformerError, match="encoder-decoder"): Classifier(make("encoder-decoder"), ClassifierConfig(("a",)))
    for wrong in ({"labels": ()}, {"labels": (1, 2)}, {"labels": ("a",), "level": "word"}, {"labels": ("a",), "dropout": 1.5}):
        with pytest.raises(TransformerError): ClassifierConfig(**wrong)


@pytest.mark.parametrize("layout", ("bert", "llama", "lmbook"))
@torch.no_grad()
def test_no_value_of_a_heads_field_ends_in_an_error_of_another_kind(layout, tmp_path):
    judge = Classifier(make("encoder" if layout == "bert" else "decoder", "llama" if layout == "lmbook" else layout),
                       ClassifierConfig(("a", "b"), pooler=layout == "bert", bias=layout != "llama"))  # fmt: skip
    save_pretrained(judge, tmp_path, layout)
    whole = (tmp_path / "config.json").read_text()
    odd = (*BAD_VALUES, ["BertModel", "x"], ["BertForSequenceClassification"], {"0": "a", "2": "b"}, {"0": 1, "1": 2}, {"x": "y"}, [["a"]])
    own = [{"classifier": {**json.loads(whole).get("classifier", {}), name: value}}
           for name in ("labels", "level", "pooler", "bias", "dropout", "more") for value in odd]  # fmt: skip
    fields = ("id2label", "num_labels", "architectures", "classifier_dropout", "classifier")
    changes = [{name: value} for name in fields for value in odd] + own
    for change in changes:
        edit(tmp_path, **change)
        try: load_classifier(tmp_path)(ids(1, 4))
        except TransformerError: pass
        (tmp_path / "config.json").write_text(whole)
    load_classifier(tmp_path)


def test_reading_works_without_transformers(tmp_path):
    save_pretrained(make("decoder", "gpt2"), tmp_path, "gpt2")
    code = ("import sys; sys.modules['transformers'] = None; from lmbook.pretrained import load_pretrained, save_pretrained; "
            f"m = load_pretrained({str(tmp_path)!r}); save_pretrained(m, {str(tmp_path)!r}, 'gpt2')")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
