"""Fine-tuning: LoRA equal to peft's, in memory and in files; frozen parts that stay; chats that `transformers` renders alike; bad input."""

import copy
import json

import pytest
import torch
from torch import nn

from lmbook import finetuning
from lmbook.batches import Examples
from lmbook.finetuning import (
    CHAT_SPECIALS,
    Bottleneck,
    ChatTemplate,
    FinetuningError,
    LabelledTexts,
    LoraConfig,
    LoraLinear,
    SoftPrompt,
    apply_adapters,
    apply_lora,
    freeze,
    label_loss,
    label_scores,
    load_adapter,
    lora_layers,
    merge,
    merge_lora,
    save_adapter,
    trained,
    training_bytes,
    unmerge,
    without_lora,
)
from lmbook.pretrained import save_pretrained
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer, next_token_loss
from lmbook.transformer import Classifier, ClassifierConfig, Transformer
from tests.faults import planted
from tests.models import V, close, ids, make

LABELS = ClassifierConfig(("bad", "neither", "good"))


def loud(model: nn.Module, seed: int = 3) -> nn.Module:
    "With products that matter: the second matrix of LoRA begins as zeros."
    torch.manual_seed(seed)
    for layer in lora_layers(model).values(): nn.init.normal_(layer.b.weight, std=0.3)
    return model


def judge(variant: str = "llama", kind: str = "decoder", **changes) -> Classifier:
    torch.manual_seed(5)
    head = ClassifierConfig(LABELS.labels, bias=variant == "bert", pooler=variant == "bert")
    found = Classifier(make(kind, variant, **changes), head).eval()
    nn.init.normal_(found.score.weight)
    return found


def train(model: nn.Module, steps: int = 3) -> None:
    rows = [row.tolist() for row in ids(12, 7)]
    batches = LabelledTexts(rows, [i % 3 for i in range(12)], classes=3, batch_size=4)
    Trainer(model, batches, TrainConfig(steps=steps, lr=1e-2, device="cpu"), loss=label_loss).fit()


def state(model: nn.Module) -> dict[str, torch.Tensor]: return {name: t.clone() for name, t in model.state_dict().items()}


# ---------------------------------------------------------------- LoRA


ALL = ("query", "key", "value", "out", "gate", "up", "down")


@pytest.mark.parametrize("targets", [("query", "value"), ALL, ("decoder.blocks.1.mlp.up",)])
@torch.no_grad()
def test_lora_begins_as_nothing_merges_and_comes_out_again(targets):
    plain, model = make(), make()
    apply_lora(model, LoraConfig(3, 5.0, targets))
    assert torch.equal(model(ids(2, 9)), plain(ids(2, 9)))
    loud(model)
    with_it = model(ids(2, 9))
    assert (with_it - plain(ids(2, 9))).abs().max() > 0.1
    with without_lora(model): assert torch.equal(model(ids(2, 9)), plain(ids(2, 9)))
    assert torch.equal(model(ids(2, 9)), with_it)
    merge(model)
    close(model(ids(2, 9)), with_it)
    unmerge(model)
    close(model(ids(2, 9)), with_it)
    merge_lora(model)
    close(model(ids(2, 9)), with_it)
    assert model.state_dict().keys() == plain.state_dict().keys() and all(p.requires_grad for p in model.parameters())
    apply_lora(model)  # and once more


def test_only_the_products_and_the_head_are_trained_and_all_of_them():
    model = judge()
    before = state(model)
    n = apply_lora(model, LoraConfig(2, 4.0, dropout=0.1))
    c = model.body.config
    kv = c.attention.n_kv * c.attention.size
    assert n == trained(model) == 2 * (2 * (32 + 32) + 2 * (32 + kv)) + 3 * 32 + (model.score.bias is not None) * 3
    train(model)
    after = state(model)
    for name, old in before.items():
        new = after[name.replace(".weight", ".base.weight") if name.endswith(("query.weight", "value.weight")) else name]
        assert torch.equal(old, new) != name.startswith("score."), name
    assert all(layer.a.weight.grad is None and layer.b.weight.abs().sum() > 0 for layer in lora_layers(model).values())


def test_parameters_of_lora_are_what_the_formula_says():
    model = make(n_kv_head=4)
    assert apply_lora(model, LoraConfig(4, targets=("query", "value"))) == 2 * 2 * 4 * (32 + 32)
    assert training_bytes(model) == 4 * (sum(p.numel() for p in model.parameters()) + 3 * trained(model))
    assert training_bytes(model, moments=0) < training_bytes(model)


def test_dropout_is_on_what_enters_the_product_and_only_while_training():
    model = loud_after(LoraConfig(2, 2.0, dropout=0.5))
    assert not torch.equal(model.train()(ids(1, 5)), model(ids(1, 5)))
    assert torch.equal(model.eval()(ids(1, 5)), model(ids(1, 5)))


def loud_after(config: LoraConfig) -> Transformer:
    model = make()
    apply_lora(model, config)
    loud(model)
    return model


FAULTS = {
    "no scale": ("return self.scale * self.b.weight @ self.a.weight", "return self.b.weight @ self.a.weight"),
    "merged, and added again": ("if self.active and not self.merged else y", "if self.active else y"),
    "not frozen": ("    model.requires_grad_(False)\n    for name, layer in made.items():", "    for name, layer in made.items():"),
    "not zero at first": ("nn.init.zeros_(self.b.weight)", "nn.init.ones_(self.b.weight)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    def check(module) -> None:
        model, plain = make(), make()
        module.apply_lora(model, module.LoraConfig(2, 6.0))
        assert torch.equal(model(ids(1, 6)), plain(ids(1, 6)))
        assert {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"a", "b"}
        for layer in module.lora_layers(model).values(): nn.init.normal_(layer.b.weight)
        before = model(ids(1, 6))
        module.merge(model)
        torch.testing.assert_close(model(ids(1, 6)), before, atol=1e-4, rtol=1e-4)

    check(finetuning)
    with pytest.raises(AssertionError): check(planted(finetuning, *FAULTS[fault], monkeypatch))


# ---------------------------------------------------------------- equal to peft

LAYOUTS = {"llama": ("query", "value"), "mistral": ("query", "key", "up"), "qwen2": ("query", "value", "down"), "gpt2": ("up", "out")}
CHANGES = {
    "mistral": {"variant": "llama", "window": 5}, "gpt2": {"variant": "gpt2"},
    "qwen2": {"variant": "llama", "bias": True, "mlp_bias": False},
}  # fmt: skip


def given(layout: str) -> Transformer:
    model = make(**CHANGES.get(layout, {}))
    if layout == "qwen2":
        for name, p in model.named_parameters():
            if name.endswith("attention.out.bias"): nn.init.zeros_(p)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_ours_is_read_by_peft_and_one_of_peft_by_us(layout, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = given(layout)
    save_pretrained(model, tmp_path / "base", layout)
    apply_lora(model, LoraConfig(3, 5.0, LAYOUTS[layout]))
    loud(model)
    save_adapter(model, tmp_path / "ours", layout)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad(): close(model(ids(2, 9)), theirs(ids(2, 9)).logits)

    for name, p in theirs.named_parameters():
        if "lora_" in name: nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    again = given(layout)
    load_adapter(again, tmp_path / "theirs", layout)
    with torch.no_grad(): close(again(ids(2, 9)), theirs(ids(2, 9)).logits)
    merge(again)
    merged = theirs.merge_and_unload()
    with torch.no_grad(): close(again(ids(2, 9)), merged(ids(2, 9)).logits, tol=1e-4)
    save_pretrained(merged_here(again), tmp_path / "merged", layout)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in merged.state_dict().items(): close(whole[name], tensor)


def merged_here(model: Transformer) -> Transformer:
    merge_lora(model)
    return model


@pytest.mark.parametrize("layout", ["llama", "bert"])
def test_a_classifier_s_head_travels_with_its_adapter(layout, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    kind = "encoder" if layout == "bert" else "decoder"
    model = judge(layout, kind)
    save_pretrained(model, tmp_path / "base", layout)
    apply_lora(model, LoraConfig(2, 4.0, ("query", "out")))
    loud(model)
    nn.init.normal_(model.score.weight)
    if model.pooler is not None: nn.init.normal_(model.pooler.weight, std=0.3)
    save_adapter(model, tmp_path / "ours", layout)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    base.config.pad_token_id = 0
    x = ids(3, 8).clamp(min=1)
    with torch.no_grad(): close(model(x), theirs(x).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = judge(layout, kind)
    load_adapter(again, tmp_path / "theirs", layout)
    with torch.no_grad(): close(again(x), model(x))


def test_peft_on_our_own_module_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "down"]), make())
    for name, p in theirs.named_parameters():
        if "lora_B" in name: nn.init.normal_(p, std=0.3)
    ours = make()
    apply_lora(ours, LoraConfig(3, 5.0, ("query", "down")))
    found = dict(theirs.named_modules())
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            layer.a.weight.copy_(found[name].lora_A["default"].weight)
            layer.b.weight.copy_(found[name].lora_B["default"].weight)
            close(layer.delta, found[name].get_delta_weight("default"))
        close(ours(ids(2, 7)), theirs(ids(2, 7)))
    assert trained(ours) == trained(theirs)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "alibi"])
def test_an_adapter_under_our_own_names_goes_out_and_in(variant, tmp_path):
    model = Classifier(make(variant=variant), LABELS)
    apply_lora(model, LoraConfig(2, 3.0, ("key", "up")))
    loud(model)
    save_adapter(model, tmp_path)
    again = Classifier(make(variant=variant), LABELS)
    load_adapter(again, tmp_path)
    rows = [row.tolist() for row in ids(5, 6)]
    assert torch.equal(label_scores(again, rows), label_scores(model, rows))
    assert trained(again) == trained(model)


# ---------------------------------------------------------------- the relatives


@torch.no_grad()
def test_adapters_begin_as_nothing_and_stand_behind_both_branches():
    plain, model = make(), make()
    n = apply_adapters(model, 3)
    assert n == 2 * 2 * (32 * 3 + 3 + 3 * 32 + 32) and torch.equal(model(ids(2, 6)), plain(ids(2, 6)))
    places = [name for name, m in model.named_modules() if isinstance(m, Bottleneck)]
    assert places == [f"decoder.blocks.{i}.{end}" for i in range(2) for end in ("attention.out", "mlp.down")]


@torch.no_grad()
def test_a_soft_prompt_of_words_is_the_prompt():
    plain, words = make(), [4, 9, 2]
    soft = SoftPrompt(make(), 3, start=words)
    text = ids(2, 5)
    close(soft(text), plain(torch.cat([torch.tensor([words] * 2), text], 1))[:, 3:])
    assert trained(soft) == 3 * 32 and soft.vocab_size == V and soft.task == "next"


def test_a_soft_prompt_learns_and_nothing_else_does():
    inner = judge()
    before = state(inner)
    soft = SoftPrompt(inner, 2)
    drawn = soft.body.embed.tokens.more.detach().clone()
    train(soft)
    assert (soft.body.embed.tokens.more - drawn).abs().max() > 0
    after = state(inner)
    for name, old in before.items():
        new = after[name.replace("embed.tokens.weight", "embed.tokens.table.weight")]
        assert torch.equal(old, new) != name.startswith("score."), name


@torch.no_grad()
def test_padding_behind_a_soft_prompt_does_not_matter():
    soft = SoftPrompt(judge(), 2)
    rows = [ids(1, n, seed=n)[0].tolist() for n in (3, 8)]
    together = label_scores(soft, rows)
    alone = torch.cat([label_scores(soft, [row]) for row in rows])
    close(together, alone)


def test_freeze_by_parts_of_names():
    model = judge()
    assert freeze(model) == 0 and freeze(model, ["score"]) == sum(p.numel() for p in model.score.parameters())
    before = state(model)
    freeze(model, ["score", "blocks.1."])
    train(model)
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name in before if name.startswith("score.") or ".blocks.1." in name}


def test_labelled_texts_are_each_read_once_and_padded():
    rows = [[1] * n for n in (1, 2, 3, 4, 5)]
    source = LabelledTexts(rows, [0, 1, 0, 1, 0], classes=2, batch_size=2)
    seen = sorted(int(b.segments[i].sum()) for b in source.read() for i in range(len(b.labels)))
    assert seen == [1, 2, 3, 4, 5]
    assert [b.labels.tolist() for b in source.read(0)] != [b.labels.tolist() for b in source.read(3)] or len(rows) < 2


# ---------------------------------------------------------------- chats

TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "Anna."}, {"role": "user", "content": "And who else?"}, {"role": "assistant", "content": "Nobody."},
]  # fmt: skip
OTHER = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def words() -> WordTokenizer:
    return WordTokenizer.train([m["content"] for m in TALK], specials=("<pad>", "<bos>", "<eos>", "<unk>", *CHAT_SPECIALS))


@pytest.mark.parametrize("template", [ChatTemplate(), ChatTemplate(OTHER, ())])
@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_renders_the_same(template, n, prompt, tmp_path):
    transformers = pytest.importorskip("transformers")
    words().to_json(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    said = theirs.apply_chat_template(TALK[:n], chat_template=template.template, tokenize=False, add_generation_prompt=prompt)
    assert template.render(TALK[:n], prompt) == said


def test_only_the_last_answer_is_learned():
    tokenizer, template = words(), ChatTemplate()
    given, wanted = template.example(tokenizer, TALK)
    assert wanted[-1] == tokenizer.special("<|end|>")
    assert tokenizer.decode(wanted) == "Nobody." and given[0] == tokenizer.bos_id and given[-1] == tokenizer.special("<|assistant|>")
    [batch] = Examples([(given, wanted)], batch_size=1).read()
    assert batch.tokens == len(wanted)


@torch.no_grad()
def test_packed_conversations_do_not_see_each_other():
    tokenizer, template = words(), ChatTemplate()
    pairs = [template.example(tokenizer, TALK[:3]), template.example(tokenizer, TALK[:5])]
    torch.manual_seed(0)
    model = make(context_length=64)
    model = Transformer(model.config.from_dict({**model.config.to_dict(), "vocab_size": tokenizer.vocab_size})).eval()
    for p in model.parameters(): nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    [packed] = Examples(pairs, batch_size=1, length=60, pack=True, shuffle=False).read()
    alone = sum(next_token_loss(model, b)[0] for b in Examples(pairs, batch_size=1, shuffle=False).read())
    close(next_token_loss(model, packed)[0], alone, tol=1e-4)
    packed.segments = packed.positions = None
    assert (next_token_loss(model, packed)[0] - alone).abs() > 1e-3


# ---------------------------------------------------------------- bad input


def changed(folder, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def saved(tmp_path):
    save_adapter(loud_after(LoraConfig(2, 4.0)), tmp_path)
    return tmp_path


BAD = {
    "no such layer": (lambda: apply_lora(make(), LoraConfig(targets=("q_proj",))), "'q_proj'.*down, gate, key, out, query, up, value"),
    "one text": (lambda: LoraConfig(targets="query"), "is one text"),
    "none": (lambda: LoraConfig(targets=()), "name at least one"),
    "rank 0": (lambda: LoraConfig(rank=0), "rank=0 must be a whole number, at least 1"),
    "rank above": (lambda: apply_lora(make(), LoraConfig(33)), "rank=33 is above the smaller side.*32"),
    "alpha": (lambda: LoraConfig(alpha=0), "alpha=0 must be above 0"),
    "dropout": (lambda: LoraConfig(dropout=1.0), "dropout=1.0"),
    "twice": (lambda: apply_lora(loud_after(LoraConfig(2))), "has LoRA or adapters already"),
    "adapters on LoRA": (lambda: apply_adapters(loud_after(LoraConfig(2))), "has LoRA or adapters already"),
    "merged twice": (lambda: [merge(m) for m in [loud_after(LoraConfig(2))] * 2], "is merged already"),
    "not merged": (lambda: unmerge(loud_after(LoraConfig(2))), "is not merged"),
    "no LoRA": (lambda: merge(make()), "has no LoRA"),
    "no such part": (lambda: freeze(make(), ["blocks.7"]), "No parameter has 'blocks.7'"),
    "part as text": (lambda: freeze(make(), "score"), "is one text"),
    "label": (lambda: LabelledTexts([[1], [2]], [0, 2], classes=2), "label of text 1 is 2; with 2 classes they run from 0 to 1"),
    "labels": (lambda: LabelledTexts([[1], [2]], [0], classes=2), "2 texts and 1 labels"),
    "empty text": (lambda: LabelledTexts([[1], []], [0, 1], classes=2), "an empty one"),
    "soft prompt": (lambda: SoftPrompt(make(), 24), "leave no room"),
    "an encoder": (lambda: SoftPrompt(make("encoder"), 2), "this is an encoder"),
    "two prompts": (lambda: SoftPrompt(SoftPrompt(make(), 2).model, 2), "already"),
    "start": (lambda: SoftPrompt(make(), 2, start=[1]), "names 1 words for n=2"),
    "roles": (lambda: ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"), "does not tell the role 'system' from others"),
    "no turn": (lambda: ChatTemplate("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"), "add_generation_prompt"),
    "no Jinja": (lambda: ChatTemplate("{% for %}"), "cannot be rendered"),
    "role": (lambda: ChatTemplate().render([{"role": "robot", "content": "x"}]), "role='robot'"),
    "no message": (lambda: ChatTemplate().render([]), "There is no message"),
    "spelled": (lambda: ChatTemplate().render([{"role": "user", "content": "a<|end|>"}]), "Message 0 spells"),
    "last": (lambda: ChatTemplate().example(words(), TALK[:2]), "must be the assistant's"),
    "fields": (lambda: ChatTemplate().render([{"text": "x"}]), "Message 0 must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_said(case):
    act, message = BAD[case]
    with pytest.raises(FinetuningError, match=message): act()


def test_a_refused_model_is_as_it_was():
    model = make()
    names = list(model.state_dict())
    with pytest.raises(FinetuningError): apply_lora(model, LoraConfig(targets=("query", "nothing")))
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


FILES = {
    "another shape": (lambda f: None, lambda: make(d_model=16), "it was made for another one"),
    "another model": (lambda f: None, lambda: make(n_layer=1), "and this model does not"),
    "another kind": (lambda f: None, lambda: make("encoder"), "and this model does not"),
    "DoRA": (lambda f: changed(f, use_dora=True), make, "use_dora=True"),
    "ranks": (lambda f: changed(f, rank_pattern={"query": 4}), make, "rank_pattern"),
    "method": (lambda f: changed(f, peft_type="IA3"), make, "of the method 'IA3'"),
    "no rank": (lambda f: changed(f, r=None), make, "has no number r"),
    "rank 0": (lambda f: changed(f, r=0), make, "rank=0"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), make, "cannot be read as JSON"),
    "torn": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 9), make, "is torn"),
    "missing": (lambda f: (f / "adapter_model.safetensors").unlink(), make, "has no adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(case, saved):
    spoil, other, message = FILES[case]
    spoil(saved)
    model = other()
    names = list(model.state_dict())
    with pytest.raises(FinetuningError, match=message): load_adapter(model, saved)
    assert list(model.state_dict()) == names


def test_half_an_adapter_is_refused(saved):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(FinetuningError, match="is not whole"): load_adapter(make(), saved)


def test_a_layout_that_joins_the_three_is_refused_and_nothing_is_written(tmp_path):
    model = make(variant="gpt2")
    apply_lora(model, LoraConfig(2))
    with pytest.raises(FinetuningError, match="'gpt2' has no layer of its own for decoder.blocks.0.attention.query"):
        save_adapter(model, tmp_path / "new", "gpt2")
    assert not (tmp_path / "new").exists()


def test_what_is_merged_is_not_saved_as_an_adapter(tmp_path):
    model = loud_after(LoraConfig(2))
    merge(model)
    with pytest.raises(FinetuningError, match="call `unmerge"): save_adapter(model, tmp_path)
    with pytest.raises(FinetuningError, match="call `unmerge"), without_lora(model): pass


def test_copies_are_apart():
    model = loud_after(LoraConfig(2))
    other = copy.deepcopy(model)
    merge(other)
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert isinstance(other.decoder.blocks[0].attention.query, LoraLinear)
