"""Files of models: our own, and those that go to other libraries and come back."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lmbook.checkpoints import load_weights, save_weights
from lmbook.pretrained import LAYOUTS, load_pretrained, save_pretrained
from lmbook.transformer import Transformer, TransformerConfig, TransformerError
from tests.models import CASES, SIZES, VARIANTS, SlowCache, V, close, given_source, ids, make

# ---------------------------------------------------------------- files of our own


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
    model = make("encoder" if layout == "bert" else "decoder", "llama" if layout == "lmbook" else layout)
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
        "of type 'mamba'. Known are: lmbook, gpt2, bert, llama": lambda: edit(folder, model_type="mamba"),
        "of type None": lambda: edit(folder, model_type="gone"),
        "has no hidden_size, which a model of type 'llama' needs": lambda: edit(folder, hidden_size="gone"),
        "n_head=5 does not divide": lambda: edit(folder, num_attention_heads=5, num_key_value_heads=5, head_dim=None),
        "must be a whole number": lambda: edit(folder, hidden_size="wide"),
        "a field of the wrong type": lambda: edit(folder, attention_dropout="much"),
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
        "scales rotary positions by 'linear'": lambda: edit(folder, rope_scaling={"type": "linear", "factor": 2.}),
        "scales rotary positions by 'llama3'": lambda: edit(folder, rope_parameters={"rope_type": "llama3", "factor": 8.}),
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
    with pytest.raises(TransformerError, match="no layout='mistral'"): save_pretrained(make(), tmp_path, "mistral")


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
]


@pytest.mark.parametrize(("layout", "change", "field"), CANNOT)
def test_what_a_layout_cannot_hold(layout, change, field, tmp_path):
    model = make(**{"kind": "encoder" if layout == "bert" else "decoder", "variant": layout, **change})
    with pytest.raises(TransformerError, match=f"The layout '{layout}' cannot hold {field}"): save_pretrained(model, tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()


def test_every_field_is_kept_or_refused(tmp_path):
    "No field of the configuration is dropped on the way in silence: change each, and it comes back or is named."
    changes = {
        "vocab_size": 50, "d_model": 64, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "d_head": 4, "d_ff": 40, "context_length": 30,
        "kind": "encoder-decoder", "norm": "none", "norm_first": False, "activation": "geglu_tanh", "positions": "none",
        "rotary_base": 500., "window": 4, "bias": True, "mlp_bias": True, "tie": False, "dropout": .25, "norm_eps": 1e-3,
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
    assert kept == sizes | {"activation", "rotary_base", "bias", "mlp_bias", "tie", "dropout", "norm_eps"}


# ---------------------------------------------------------------- files of others


def theirs(name: str, seed: int = 0, **changes):
    "A small random model of `transformers`."
    t = pytest.importorskip("transformers")
    kinds = {
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel),
        "bert": (t.BertConfig, t.BertForMaskedLM),
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
    }
    newer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 24}
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": None, "eos_token_id": None},
        "bert": newer,
        "llama": {**newer, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None},
    }[name]
    config, model = kinds[name]
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
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(load_pretrained(tmp_path / "b")(x), model(x))
    save_pretrained(model, tmp_path / "c")  # and through our own
    assert torch.equal(load_pretrained(tmp_path / "c")(x), model(x))


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


def test_reading_works_without_transformers(tmp_path):
    save_pretrained(make("decoder", "gpt2"), tmp_path, "gpt2")
    code = ("import sys; sys.modules['transformers'] = None; from lmbook.pretrained import load_pretrained, save_pretrained; "
            f"m = load_pretrained({str(tmp_path)!r}); save_pretrained(m, {str(tmp_path)!r}, 'gpt2')")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
