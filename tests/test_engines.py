"""Our models run by programs that are not ours: ONNX Runtime, CTranslate2, transformers' reader of GGUF, and llama.cpp where it is there.

Scores and texts are held against ours; then what a format does not know, damaged files, and planted faults.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import lmbook.engines as engines
from lmbook.core import LmbookError
from lmbook.engines import STORED, EngineError, export_model, load_gguf, onnx_model
from lmbook.finetuning import ChatTemplate
from lmbook.generation import SamplingConfig, generate
from lmbook.gguf import BLOCKS, GGUFError, read_gguf, write_gguf
from lmbook.pretrained import save_pretrained
from lmbook.tokenization import BPE, ByteTokenizer, CharTokenizer, WordTokenizer
from lmbook.tokenizer_files import HuggingFaceTokenizer, SentencePieceTokenizer
from lmbook.transformer import Transformer, TransformerConfig
from tests.faults import planted
from tests.stories import STORIES

ort, ctranslate2, gguf = (pytest.importorskip(name) for name in ("onnxruntime", "ctranslate2", "gguf"))
TEXT = "The goat has it. "
BPES = BPE.train(STORIES, 400)
LLAMA = TransformerConfig(
    BPES.vocab_size, 64, 2, 4, n_kv_head=2, d_ff=96, context_length=64, norm="rms", activation="swiglu", positions="rotary", bias=False,
    init="xavier_uniform",
)  # fmt: skip
LIKE_LLAMA = {  # models that all formats know
    "grouped": {}, "each its own": {"n_kv_head": 4}, "one for all": {"n_kv_head": 1}, "untied": {"tie": False},
    "wide heads": {"d_head": 32},
    "another base": {"rotary_base": 500.0}, "stretched": {"rotary_scaling": (4.0,)}, "another epsilon": {"norm_eps": 0.01},
    "dropout": {"dropout": 0.3},
}  # fmt: skip
DECODERS = {  # what only a graph can hold
    "GPT-2": {"norm": "layer", "activation": "gelu_tanh", "positions": "learned", "bias": True, "n_kv_head": 4, "d_ff": None},
    "of 2017": {"norm": "layer", "norm_first": False, "activation": "relu", "positions": "sinusoidal", "bias": True},
    "ALiBi": {"positions": "alibi", "activation": "geglu"}, "window": {"window": 5}, "no positions": {"positions": "none", "norm": "none"},
    "biases": {"bias": True, "activation": "geglu_tanh", "mlp_bias": False}, "norm at the door": {"embed_norm": True, "activation": "silu"},
    "LayerNorm without bias": {"norm": "layer", "activation": "tanh"}, "sigmoid": {"activation": "sigmoid", "tie": False},
    "identity": {"activation": "identity"}, "llama3": {"rotary_scaling": (8.0, 1.0, 4.0, 16.0)},
}  # fmt: skip


def make(seed: int = 0, **changes: Any) -> Transformer:
    "A model whose scores are far apart, as those of a trained one."
    torch.manual_seed(seed)
    model = Transformer(replace(LLAMA, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3) if p.ndim > 1 else p.add_(0.2 * torch.randn(p.shape))
    return model


def some_ids(rows: int = 2, length: int = 14) -> torch.Tensor:
    return torch.randint(0, LLAMA.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def close(found: Any, wanted: Any, tolerance: float = 2e-4) -> None:
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)


def scores(model: Transformer, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad(): return model(ids).numpy()


START = BPES.encode(TEXT, bos=True)


def greedy(model: Transformer, n: int = 24) -> list[int]:
    return generate(model, START, SamplingConfig(temperature=0, max_new_tokens=n))[0]


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_a_gguf_file_comes_back_as_the_same_model(name: str, tmp_path: Path, module: ModuleType = engines):
    model = make(**LIKE_LLAMA[name])
    done = module.export_model(model, tmp_path / "m.gguf", tokenizer=BPES)
    back = module.load_gguf(done.path)
    assert done.bytes == done.path.stat().st_size and done.notes == () and not back.training
    unsaid = {name: getattr(model.config, name) for name in ("n_kv_head", "d_head", "dropout", "init")}
    assert replace(back.config, **unsaid) == model.config
    for key, x in model.state_dict().items(): assert torch.equal(back.state_dict()[key], x), key
    assert np.array_equal(scores(back, some_ids()), scores(model, some_ids()))
    assert (back.out.weight is back.embed.tokens.weight) == model.config.tie
    loss = back.train()(some_ids()).sum()
    loss.backward()  # a model like any other


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_gguf_file_is_read_by_the_package(kind: str, tmp_path: Path):
    model = make(d_model=256, d_ff=96, d_head=64)  # rows of 256, and in one matrix of 96
    done = export_model(model, tmp_path / "m.gguf", quantize=kind, tokenizer=BPES)
    theirs, back = gguf.GGUFReader(done.path), load_gguf(done.path)
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in theirs.tensors}
    for i in range(2):
        for name, own in (("attn_v", "attention.value"), ("attn_output", "attention.out"), ("ffn_down", "mlp.down"), ("ffn_up", "mlp.up")):
            assert np.array_equal(found[f"blk.{i}.{name}.weight"], back.state_dict()[f"decoder.blocks.{i}.{own}.weight"].numpy())
    stored = {t.name: t.tensor_type.name.lower() for t in theirs.tensors}
    assert {stored[n] for n in stored if "norm" in n} == {"f32"} and stored["token_embd.weight"] == kind
    instead = {"q4_k": "q5_0", "q6_k": "q8_0"}.get(kind, kind)
    assert stored["blk.0.ffn_down.weight"] == instead and len(done.notes) == (instead != kind)
    if done.notes: assert done.notes[0] == f"2 matrices are stored as {instead}: rows of 96 numbers are no multiple of 256"
    lost = np.abs(scores(back, some_ids()) - scores(model, some_ids())).max() / np.abs(scores(model, some_ids())).max()
    assert lost < {"f32": 1e-7, "f16": 0.05, "q8_0": 0.5, "q6_k": 0.8}.get(kind, 2)


def test_rows_that_fit_no_block_at_all(tmp_path: Path):
    done = export_model(make(d_model=60, n_head=2, n_kv_head=2, d_ff=44), tmp_path / "m.gguf", quantize="q4_0", tokenizer=BPES)
    assert done.notes == ("15 matrices are stored as f16: rows of 44 and 60 numbers are no multiple of 32",)
    load_gguf(done.path)


@pytest.mark.parametrize("name", ["grouped", "each its own", "untied", "another base", "another epsilon"])
def test_transformers_reads_it_and_writes_the_same_text(name: str, tmp_path: Path, module: ModuleType = engines):
    transformers = pytest.importorskip("transformers")
    model = make(**LIKE_LLAMA[name])
    module.export_model(model, tmp_path / "m.gguf", tokenizer=BPES)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    with torch.no_grad(): close(theirs(some_ids()).logits, scores(model, some_ids()))
    with torch.no_grad(): written = theirs.generate(torch.tensor([START]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert written[0, len(START) :].tolist() == greedy(model)


def test_transformers_reads_the_tokenizer(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    export_model(make(), tmp_path / "m.gguf", tokenizer=BPES)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in (*STORIES[:10], "It's 山羊, they'll say."): assert theirs.encode(text, add_special_tokens=False) == BPES.encode(text)


# ---------------------------------------------------------------- tokenizers in GGUF


def token_fields(tokenizer: Any, size: int | None = None, **more: Any) -> tuple[dict[str, Any], list[str]]:
    fields, notes = engines._token_fields(tokenizer, size or tokenizer.vocab_size, more.get("chat_template", ""))
    return {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}, notes


def test_byte_level_bpe():
    fields, notes = token_fields(BPES, BPES.vocab_size + 3)
    assert (fields["model"], fields["pre"], notes) == ("gpt2", "gpt-2", [])
    assert fields["tokens"][:4] == ["<pad>", "<bos>", "<eos>", "<unk>"] and fields["token_type"][:5] == [3, 3, 3, 2, 1]
    assert fields["tokens"][-3:] == [f"[PAD{BPES.vocab_size + i}]" for i in range(3)] and fields["token_type"][-3:] == [5, 5, 5]
    assert len(fields["merges"]) == len(BPES.merges) and all(len(pair.split(" ")) == 2 for pair in fields["merges"])
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["add_bos_token"], fields["add_eos_token"]) == (1, 2, True, False)
    assert token_fields(ByteTokenizer())[0]["merges"] == []


def test_numbers_that_are_cut_otherwise_are_noted(tmp_path: Path):
    digits = BPE.train(["1234 5678 1234 12 34 56 78 " * 9], 266)
    assert "more than three digits" in token_fields(digits)[1][0]
    done = export_model(make(vocab_size=266), tmp_path / "m.gguf", tokenizer=digits)
    assert "more than three digits" in done.notes[0]


def test_bpe_of_sentencepiece():
    pieces = SentencePieceTokenizer.train(STORIES, 420, model_type="bpe")
    fields, notes = token_fields(pieces)
    assert fields["model"] == "llama" and notes == [] and "merges" not in fields and fields["add_space_prefix"] is False
    assert fields["token_type"].count(6) == 256 and fields["tokens"][fields["token_type"].index(6)] == "<0x00>"
    assert len(fields["scores"]) == 420 and fields["scores"][-1] < 0 and any("▁" in token for token in fields["tokens"])


def in_library(**changes: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(BPES._json() | changes))


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_tokenizers_from_elsewhere():
    assert token_fields(in_library(pre_tokenizer=LEVEL))[0]["pre"] == "gpt-2"
    assert token_fields(in_library())[0] == token_fields(BPES)[0]
    split = {"type": "Split", "pattern": {"Regex": engines._LLAMA_3}, "behavior": "Isolated", "invert": False}
    two = {"type": "Sequence", "pretokenizers": [split, {**LEVEL, "use_regex": False}]}
    assert token_fields(in_library(pre_tokenizer=two))[0]["pre"] == "llama-bpe"


@pytest.mark.parametrize(("tokenizer", "why"), [
    (WordTokenizer.train(STORIES, 400), "cannot hold a WordTokenizer"), (CharTokenizer.train(STORIES), "cannot hold a CharTokenizer"),
    (SentencePieceTokenizer.train(STORIES, 400), "this is unigram"), (BPE.train(STORIES, 400, pattern=r"\w+|\W"), "no name for the way"),
    (in_library(pre_tokenizer={**LEVEL, "add_prefix_space": True}), "no name for the way"),
    (in_library(pre_tokenizer=None), "no name for the way"), (in_library(pre_tokenizer=LEVEL, normalizer={"type": "NFC"}), "no name"),
])  # fmt: skip
def test_tokenizers_that_llama_cpp_could_not_be(tokenizer: Any, why: str, tmp_path: Path):
    model = make(vocab_size=max(400, tokenizer.vocab_size))
    with pytest.raises(EngineError, match=why): export_model(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_chat_template_goes_along(tmp_path: Path):
    export_model(make(), tmp_path / "m.gguf", tokenizer=BPES, chat_template=ChatTemplate().template)
    assert read_gguf(tmp_path / "m.gguf").fields["tokenizer.chat_template"] == ChatTemplate().template


def test_without_a_tokenizer_the_file_takes_ids(tmp_path: Path):
    export_model(make(), tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf").fields["tokenizer.ggml.model"] == "no_vocab"
    load_gguf(tmp_path / "m.gguf")


# ---------------------------------------------------------------- llama.cpp itself

LLAMA_CPP = importlib.util.find_spec("xllamacpp") is not None  # Python bindings of llama.cpp: no part of any extra


def llama_cpp(path: Path) -> Any:
    "A function that asks llama.cpp, with this file: its path, and what it is told."
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(path), 64, 1, False, -1
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def ask(what: str, **told: Any) -> Any:
        address, kind = f"{server.listening_address}/{what}", {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(told).encode(), kind)
        with urllib.request.urlopen(request) as answer: return json.loads(answer.read())

    return ask


ODD = (*STORIES[:5], "the  cup\n\n  it's '羊' \"goat\" they'll", "\n", "a\tb", " ", "café, 茶!", "1 22 333")


@pytest.mark.skipif(not LLAMA_CPP, reason="llama.cpp (xllamacpp) is not installed")
@pytest.mark.parametrize("name", ["bpe", "bytes", "sentencepiece"])
def test_llama_cpp_cuts_texts_as_we_do(name: str, tmp_path: Path):
    pieces = SentencePieceTokenizer.train(STORIES, 420, model_type="bpe")
    tokenizer = {"bpe": BPES, "bytes": ByteTokenizer(), "sentencepiece": pieces}[name]
    export_model(make(vocab_size=tokenizer.vocab_size + 2), tmp_path / "m.gguf", tokenizer=tokenizer)
    ask = llama_cpp(tmp_path / "m.gguf")
    for text in ODD: assert ask("tokenize", content=text, add_special=True)["tokens"] == tokenizer.encode(text, bos=True), text


@pytest.mark.skipif(not LLAMA_CPP, reason="llama.cpp (xllamacpp) is not installed")
@pytest.mark.parametrize("name", [name for name in LIKE_LLAMA if name != "wide heads"])
def test_llama_cpp_writes_the_same_text(name: str, tmp_path: Path, module: ModuleType = engines):
    model = make(**LIKE_LLAMA[name])
    module.export_model(model, tmp_path / "m.gguf", tokenizer=BPES)
    ask = llama_cpp(tmp_path / "m.gguf")
    said = ask("completion", prompt=START, temperature=0, n_predict=24, return_tokens=True, n_probs=5, cache_prompt=False)
    wanted = generate(model, START, SamplingConfig(temperature=0, max_new_tokens=24, eos_id=BPES.eos_id))[0]
    assert [id for id in said["tokens"] if id != BPES.eos_id] == [id for id in wanted if id != BPES.eos_id]
    mine, at = torch.from_numpy(scores(model, torch.tensor([START + said["tokens"]]))[0, len(START) - 1 :]).log_softmax(-1), -1
    for row in said["completion_probabilities"]:
        at = said["tokens"].index(row["id"], at + 1)  # there is no row for a token that is half a character
        for one in row["top_logprobs"]: assert abs(mine[at, one["id"]].item() - one["logprob"]) < 0.02
    assert at > 5


@pytest.mark.skipif(not LLAMA_CPP, reason="llama.cpp (xllamacpp) is not installed")
@pytest.mark.parametrize("kind", BLOCKS)
def test_llama_cpp_has_the_numbers_of_our_blocks(kind: str, tmp_path: Path):
    done = export_model(make(d_model=256, d_ff=256), tmp_path / "m.gguf", quantize=kind, tokenizer=BPES)
    said = llama_cpp(done.path)("completion", prompt=START, temperature=0, n_predict=1, n_probs=5, cache_prompt=False)
    mine = torch.from_numpy(scores(load_gguf(done.path), torch.tensor([START]))[0, -1]).log_softmax(-1)
    for row in said["completion_probabilities"][0]["top_logprobs"]:
        assert abs(mine[row["id"]].item() - row["logprob"]) < (0.02 if kind == "f32" else 0.5)  # it rounds what goes into a product, too


# ---------------------------------------------------------------- ONNX


class Onnx:
    "A graph, run by ONNX Runtime."

    def __init__(self, data: bytes, config: TransformerConfig):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session, self.config = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]), config
        self.names = [one.name for one in self.session.get_inputs()][1:]

    def __call__(self, ids: Any, past: Any = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        ids = np.asarray(ids)
        empty = np.zeros((len(ids), self.config.attention.n_kv, 0, self.config.attention.size), np.float32)
        logits, *kept = self.session.run(None, {"ids": ids, **(past or dict.fromkeys(self.names, empty))})
        return logits, dict(zip(self.names, kept))


@pytest.mark.parametrize("name", [*LIKE_LLAMA, *DECODERS])
def test_a_graph_gives_our_scores_with_a_cache_and_without(name: str, module: ModuleType = engines):
    model = make(**(LIKE_LLAMA | DECODERS)[name])
    run = Onnx(module.onnx_model(model).SerializeToString(), model.config)
    wanted, ids = scores(model, some_ids()), some_ids().numpy()
    logits, kept = run(ids)
    close(logits, wanted)
    assert all(x.shape[2] == ids.shape[1] for x in kept.values())
    found, past = [], None
    for a, b in ((0, 6), (6, 7), (7, 14)):
        part, past = run(ids[:, a:b], past)
        found.append(part)
    close(np.concatenate(found, 1), wanted)


@pytest.mark.parametrize("name", ["grouped", "GPT-2"])
def test_a_graph_writes_the_same_text(name: str):
    model, ids = make(**(LIKE_LLAMA | DECODERS)[name]), list[int]()
    run = Onnx(onnx_model(model).SerializeToString(), model.config)
    logits, past = run([START])
    for _ in range(24):
        ids.append(int(logits[0, -1].argmax()))
        logits, past = run([ids[-1:]], past)
    wanted = generate(model, START, SamplingConfig(temperature=0, max_new_tokens=24, eos_id=-1))[0]
    assert ids == wanted


@pytest.mark.parametrize("name", ["grouped", "untied", "GPT-2"])
def test_eight_bits_in_a_graph_are_the_numbers_that_we_think(name: str):
    model = make(**(LIKE_LLAMA | DECODERS)[name])
    data = onnx_model(model, int8=True).SerializeToString()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim < 2 or "positions" in key: continue
            scale = p.abs().amax(1, keepdim=True) / 127
            p.copy_((p / scale).round() * scale)
    close(Onnx(data, model.config)(some_ids())[0], scores(model, some_ids()))
    assert len(data) < 0.4 * len(onnx_model(model).SerializeToString())


# ---------------------------------------------------------------- CTranslate2


def translator(path: Path, compute: str = "float32") -> Any:
    return ctranslate2.Generator(str(path), compute_type=compute, intra_threads=1)


@pytest.mark.parametrize("name", [*LIKE_LLAMA, "geglu", "geglu_tanh"])
def test_ctranslate2_gives_our_scores_and_our_text(name: str, tmp_path: Path, module: ModuleType = engines):
    model = make(**LIKE_LLAMA.get(name, {"activation": name}))
    done = module.export_model(model, tmp_path / "m", "ctranslate2", tokenizer=BPES)
    assert done.bytes == sum(p.stat().st_size for p in done.path.iterdir())
    engine = translator(done.path)
    close(engine.forward_batch(some_ids().tolist()), scores(model, some_ids()))
    start = [BPES.id_to_token(id) for id in START]
    said = engine.generate_batch([start], max_length=24, sampling_topk=1, include_prompt_in_result=False, end_token=[])[0].sequences_ids[0]
    assert said == generate(model, START, SamplingConfig(temperature=0, max_new_tokens=24, eos_id=-1))[0][: len(said)] and len(said) > 5


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.03), ("int8", 0.3)])
def test_ctranslate2_in_fewer_bits(kind: str, tolerance: float, tmp_path: Path):
    model = make()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    whole = export_model(model, tmp_path / "whole", "ctranslate2", tokenizer=BPES)
    done = export_model(model, tmp_path / kind, "ctranslate2", kind, tokenizer=BPES)
    assert done.bytes < (0.6 if kind == "f16" else 0.4) * whole.bytes
    close(translator(done.path).forward_batch(some_ids().tolist()), scores(model, some_ids()), tolerance)
    for name, x in model.state_dict().items(): assert torch.equal(x, before[name]), "the export has changed the model"


def test_ctranslate2_without_a_tokenizer(tmp_path: Path):
    model = make(vocab_size=20)
    done = export_model(model, tmp_path / "m", "ctranslate2")
    close(translator(done.path).forward_batch([[3, 4, 5]]), scores(model, torch.tensor([[3, 4, 5]])))


# ---------------------------------------------------------------- from a folder


def test_from_a_folder(tmp_path: Path):
    model = make()
    save_pretrained(model, tmp_path / "run", tokenizer=BPES)
    BPES.save(tmp_path / "run" / "tokenizer.json")
    done = export_model(tmp_path / "run", tmp_path / "deep" / "m.gguf")
    file = read_gguf(done.path)
    assert file.fields["general.name"] == "run" and file.fields["tokenizer.ggml.tokens"][1] == "<bos>"
    assert np.array_equal(scores(load_gguf(done.path), some_ids()), scores(model, some_ids()))
    for engine in STORED:
        with pytest.raises(LmbookError, match="There is no folder"): export_model(tmp_path / "none", tmp_path / f"x.{engine}", engine)


@pytest.mark.parametrize("stored", STORED["transformers"])
def test_a_folder_for_transformers_and_vllm(stored: Any, tmp_path: Path):
    "What vLLM and others read of a folder: the class, the sizes, the type of the numbers, the tokenizer, where a text ends, the template."
    transformers = pytest.importorskip("transformers")
    model, template = make(), ChatTemplate()
    done = export_model(model, tmp_path / "hf", "transformers", stored, tokenizer=BPES, chat_template=template.template)
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLM"] and told["model_type"] == "llama" and told["vocab_size"] == model.config.vocab_size
    assert told["torch_dtype"] == {"f32": "float32", "f16": "float16"}[stored] and told["eos_token_id"] == BPES.eos_id
    assert told["max_position_embeddings"] == model.config.context_length
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in done.path.iterdir()} == names and done.bytes > 1000
    theirs = transformers.AutoModelForCausalLM.from_pretrained(done.path).float()
    close(theirs(some_ids()).logits.detach(), scores(model, some_ids()), 1e-4 if stored == "f32" else 0.02)
    tokens = transformers.AutoTokenizer.from_pretrained(done.path)
    assert tokens("The cat", add_special_tokens=False)["input_ids"] == BPES.encode("The cat")
    talk = [{"role": "user", "content": "Who?"}]
    assert tokens.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == template.render(talk, prompt=True)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in make().parameters())  # the model stays as it is
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(dtype: torch.dtype, tmp_path: Path):
    model = make()
    export_model(make().to(dtype), tmp_path / "m.gguf")
    close(scores(load_gguf(tmp_path / "m.gguf"), some_ids()), scores(model, some_ids()), 0.05)


# ---------------------------------------------------------------- what cannot be


NOT_LLAMA = {
    "norm": {"norm": "layer"}, "norm_first": {"norm_first": False}, "activation": {"activation": "gelu"},
    "positions": {"positions": "learned"},
    "bias": {"bias": True}, "mlp_bias": {"mlp_bias": True}, "window": {"window": 8}, "embed_norm": {"embed_norm": True},
    "residual": {"residual": False}, "kind": {"kind": "encoder"}, "types": {"types": 2}, "head": {"head": "bert"},
    "rotary_scaling": {"rotary_scaling": (8.0, 1.0, 4.0, 16.0)},
}  # fmt: skip


@pytest.mark.parametrize("setting", NOT_LLAMA)
@pytest.mark.parametrize("engine", STORED)
def test_a_setting_that_a_format_does_not_know_is_named(setting: str, engine: Any, tmp_path: Path):
    model, path = make(**NOT_LLAMA[setting]), tmp_path / "a" / "m"
    fits = {"onnx": setting not in ("kind", "types", "head", "residual"), "transformers": setting == "rotary_scaling"}
    if fits.get(engine):
        export_model(model, path, engine)
        return
    with pytest.raises(EngineError, match=rf"\b{setting}="): export_model(model, path, engine, tokenizer=BPES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", STORED)
def test_what_cannot_be_exported(engine: Any, tmp_path: Path):
    model, free = make(), tmp_path / "m"
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "dead").symlink_to("nowhere")
    for taken in (there, tmp_path / "dead"):
        with pytest.raises(EngineError, match="exists, and is not replaced"): export_model(model, taken, engine, tokenizer=BPES)
    with pytest.raises(EngineError, match="has no quantize='q3_k'. It has: "): export_model(model, free, engine, "q3_k")
    with pytest.raises(EngineError, match="do not belong together"): export_model(make(vocab_size=300), free, engine, tokenizer=BPES)
    with pytest.raises(EngineError, match="A Linear is no Transformer"): export_model(torch.nn.Linear(2, 2), free, engine)
    broken = make()
    with torch.no_grad(): broken.decoder.blocks[1].mlp.up.weight[3, 3] = float("nan")
    with pytest.raises(EngineError, match="decoder.blocks.1.mlp.up.weight holds a NaN"): export_model(broken, free, engine, tokenizer=BPES)
    more = make()
    more.decoder.blocks[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(EngineError, match="no plain Transformer"): export_model(more, free, engine, tokenizer=BPES)
    for odd in ("a\0b", "x" * 300, "\ud800"):
        with pytest.raises(LmbookError): export_model(model, tmp_path / odd, engine, tokenizer=BPES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dead", "there"]


def test_an_engine_that_there_is_not(tmp_path: Path):
    with pytest.raises(EngineError, match="There is no to='ggfu'. .* Did you mean 'gguf'?"): export_model(make(), tmp_path / "m", "ggfu")


@pytest.mark.parametrize(("engine", "package"), [("onnx", "onnx"), ("ctranslate2", "ctranslate2")])
def test_a_missing_package_is_named(engine: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == package: raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(EngineError, match=rf"package {package}, .*lmbook\[engines\]"): export_model(make(), tmp_path / "m", engine)
    assert not list(tmp_path.iterdir())
    export_model(make(), tmp_path / "m.gguf")  # which needs none


def test_the_module_needs_no_engine(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if not level and name.partition(".")[0] in ("gguf", "onnx", "onnxruntime", "ctranslate2"): raise ModuleNotFoundError(name)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("gguf", "engines"):
        spec = importlib.util.find_spec(f"lmbook.{name}")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(("change", "why"), [
    ({"general.architecture": "gpt2"}, "architecture 'gpt2'"), ({"llama.block_count": 3}, "has no blk.2"),
    ({"llama.block_count": 1}, "no place for: blk.1"), ({"llama.block_count": 10**6}, "1,000,000 layers"),
    ({"llama.block_count": -1}, "above 0"),
    ({"llama.embedding_length": 65}, "is"), ({"llama.attention.head_count": 3}, "."), ({"llama.feed_forward_length": 95}, "by its fields"),
    ({"llama.attention.head_count": "many"}, "'many'"), ({"llama.context_length": None}, "None"),
    ({"llama.rope.dimension_count": 8}, "are not read"),
    ({"llama.rope.scaling.type": "yarn"}, "yarn"), ({"llama.attention.key_length": 15}, "."),
    ({"llama.attention.head_count_kv": True}, "True"),
])  # fmt: skip
def test_fields_that_fit_no_model(change: dict[str, Any], why: str, tmp_path: Path):
    path = tmp_path / "m.gguf"
    export_model(make(), path, tokenizer=BPES)
    file = read_gguf(path)
    tensors = {name: tensor._replace(data=np.array(tensor.data)) for name, tensor in file.tensors.items()}
    write_gguf(path, {k: v for k, v in (file.fields | change).items() if v is not None}, tensors)
    with pytest.raises(EngineError) as error: load_gguf(path)
    assert why in str(error.value)


def test_tensors_that_fit_no_model(tmp_path: Path):
    path = tmp_path / "m.gguf"
    export_model(make(), path)
    file = read_gguf(path)
    tensors = {name: tensor._replace(data=np.array(tensor.data)) for name, tensor in file.tensors.items()}
    for change, why in ((tensors | {"more": tensors["output_norm.weight"]}, "no place for: more"),
                        ({k: v for k, v in tensors.items() if k != "token_embd.weight"}, "no vocabulary"),
                        ({k: v for k, v in tensors.items() if k != "output_norm.weight"}, "has no output_norm.weight")):
        write_gguf(path, file.fields, change)
        with pytest.raises(EngineError, match=why): load_gguf(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(GGUFError, match="cut short"): load_gguf(path)


# ---------------------------------------------------------------- planted


def transformers_reads(name: str) -> Any: return lambda m, p: test_transformers_reads_it_and_writes_the_same_text(name, p, m)
def onnx_gives(name: str) -> Any: return lambda m, p: test_a_graph_gives_our_scores_with_a_cache_and_without(name, m)
def ctranslate2_gives(name: str) -> Any: return lambda m, p: test_ctranslate2_gives_our_scores_and_our_text(name, p, m)
def comes_back(m: ModuleType, p: Path) -> None: test_a_gguf_file_comes_back_as_the_same_model("grouped", p, m)


QUERIES = ("g.ints(0, 0, a.n_kv, a.n_head // a.n_kv, a.size)), perm=[0, 2, 3, 1, 4]",
           "g.ints(0, 0, a.n_head // a.n_kv, a.n_kv, a.size)), perm=[0, 3, 2, 1, 4]")  # heads dealt out otherwise


@pytest.mark.parametrize(("old", "new", "check"), [
    ("x = _pair_rows(state[ours], heads) if heads else state[ours]", "x = state[ours]",
     transformers_reads("grouped")),
    ('("k", "key", config.attention.n_kv)', '("k", "key", config.n_head)', transformers_reads("grouped")),
    ('f"{rope}.freq_base": float(c.rotary_base)', 'f"{rope}.freq_base": 10000.0', transformers_reads("another base")),
    ('yield "output.weight", "out.weight", 0', 'yield "output.weight", "embed.tokens.weight", 0',
     transformers_reads("untied")),
    ('one = self("Sub", self("Mul", a, cos), self("Mul", b, sin))', 'one = self("Add", self("Mul", a, cos), self("Mul", b, sin))',
     onnx_gives("grouped")),
    ('seen = g("GreaterOrEqual", back, zero)', 'seen = g("GreaterOrEqual", g("Add", back, one), zero)',
     onnx_gives("GPT-2")),
    (*QUERIES, onnx_gives("grouped")),
    ("g.number(a.size**-.5)", "g.number(1.0)", onnx_gives("grouped")),
    ("rotary_interleave=False", "rotary_interleave=True", ctranslate2_gives("grouped")),
    ("spec.config.layer_norm_epsilon = c.norm_eps", "pass", ctranslate2_gives("another epsilon")),
    ("torch.from_numpy((_unpair_rows(x, heads) if heads else x).copy())", "torch.from_numpy(x.copy())",
     comes_back),
])  # fmt: skip
def test_a_fault_is_noticed(old, new, check, tmp_path, monkeypatch):
    with pytest.raises((AssertionError, ValueError)): check(planted(engines, old, new, monkeypatch), tmp_path)
