"""Small made-up data sets for dry runs: text of Small World under the names and in the formats of the real files."""

from __future__ import annotations

import bz2
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lmbook.grammar import WORD
from lmbook.small_world import SmallWorld, SmallWorldConfig

Write = Callable[[Path], None]


def stories(n: int, lang: str = "en", split: str = "train", limit: int | None = 3) -> list[str]:
    return list(SmallWorld(SmallWorldConfig(limit=limit)).texts(split, lang, n=n))


def words(text: str) -> list[str]: return WORD.findall(text)


def write(path: Path, text: str) -> None: path.write_text(text, encoding="utf-8", newline="\n")


def tinyshakespeare(folder: Path) -> None: write(folder / "input.txt", "\n".join(stories(60, limit=None)))


def wikitext2(folder: Path) -> None:
    for split, n in (("train", 60), ("valid", 12), ("test", 12)):
        write(folder / f"{split}.txt", "".join(" ".join(words(text)) + "\n" for text in stories(n, split=split)))


def enwiki_dump(folder: Path) -> None:
    "Twelve articles of a long paragraph each, and a page that is none."
    texts = stories(60)
    articles = {f"Article {i}": " ".join(texts[5 * i : 5 * i + 5]) for i in range(12)}
    page = "<page><title>{}</title><ns>{}</ns><id>{}</id><revision><id>1</id><text>{}</text></revision></page>"
    pages = [page.format(title, 0, i, text) for i, (title, text) in enumerate(articles.items(), 1)]
    pages.append(page.format("Talk:Article 1", 1, 99, "Well."))
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="en">{"".join(pages)}</mediawiki>'
    (folder / "made-up.xml.bz2").write_bytes(bz2.compress(xml.encode()))
    write(folder / "enwiki96.txt", "".join(f"= {title} =\n\n{text}\n\n" for title, text in articles.items()))


def squad(folder: Path) -> None:
    def answers(text: str) -> list[dict]: return [{"text": " ".join(text.split()[:k])} for k in (1, 2)]

    paragraphs = [{"context": t, "qas": [{"question": "Who is it about?", "answers": answers(t)}]} for t in stories(20, split="valid")]
    write(folder / "made-up.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))


def sts(folder: Path) -> None:
    "Stories, each beside one that begins like it, and how much they share."
    texts = stories(40)
    begun = [" ".join(a.split()[: 2 * (i % 6)] + b.split()[:4]) for i, (a, b) in enumerate(zip(texts, texts[1:]))]
    rows = [f"{i % 6}.0\t{a}\t{b}\n" for i, (a, b) in enumerate(zip(texts, begun))]
    for name in ("2012_MSRpar", "2012_OnWN", "2013_headlines", "2014_headlines", "2014_images"):
        write(folder / f"{name}.tsv", "".join(rows))


def zhwiki(folder: Path) -> None: write(folder / "zhwiki_contexts.txt", "\n".join(stories(80, "zh")) + "\n")


def chinese_poetry(folder: Path) -> None:
    write(folder / "tang_shi_10k.txt", "".join(f"Poem {i}\nNobody\n{text}\n\n" for i, text in enumerate(stories(12, "zh"))))


def tatoeba_en_zh(folder: Path) -> None:
    "Sentences of Small World, and two pairs with the words for love and like."
    world = SmallWorld(SmallWorldConfig(limit=3))
    pairs = dict(pair for document in world.documents("train", 60) for pair in document.sentences)
    pairs |= {"He loves cats.": "他爱猫。", "I like it.": "我喜欢它。"}
    write(folder / "made-up.tsv", "".join(f"{english}\t{chinese}\tmade up\n" for english, chinese in pairs.items()))


def scitldr(folder: Path) -> None:
    "Stories as abstracts, each with two summaries."
    for split in ("dev", "test"):
        rows = [{"source": [en for en, _ in story.sentences], "target": [story.summary["en"], story.title["en"]], "paper_id": story.id}
                for story in SmallWorld(SmallWorldConfig(limit=3)).documents("valid" if split == "dev" else "test", 8)]
        write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def sib200(folder: Path) -> None:
    for lang, name in (("en", "eng_Latn"), ("zh", "zho_Hans")):
        (folder / name).mkdir()
        for split, n in (("train", 30), ("dev", 12), ("test", 12)):
            rows = zip(itertools.cycle(("sports", "travel", "health")), stories(n, lang, {"dev": "valid"}.get(split, split)))
            write(folder / name / f"{split}.tsv",
                  "index_id\tcategory\ttext\n" + "".join(f"{i}\t{label}\t{text}\n" for i, (label, text) in enumerate(rows)))


def word_similarity(folder: Path) -> None:
    "Pairs and analogies of the most frequent words. The numbers mean nothing."
    counts = Counter(word.lower() for text in stories(60) for word in words(text) if word.isalpha())
    top = [word for word, _ in counts.most_common(16)]
    rows = "".join(f"{a}\t{b}\t{n % 7}\n" for n, (a, b) in enumerate(itertools.combinations(top, 2)))
    for file in ("wordsim353.tsv", "simlex999.txt"): write(folder / file, "# Word 1\tWord 2\tmean\n" + rows)
    write(folder / "questions-words.txt", ": made-up\n" + "".join(" ".join(top[i : i + 4]) + "\n" for i in range(12)))


def wnut17(folder: Path) -> None:
    "Each word with a capital letter is the name of a person."
    for split, n, file in (("train", 20, "wnut17train.conll"), ("valid", 5, "emerging.dev.conll"), ("test", 5, "emerging.test.annotated")):
        lines = []
        for text in stories(n, split=split): lines += [f"{word}\t{'B-person' if word.istitle() else 'O'}" for word in words(text)] + [""]
        write(folder / file, "\n".join(lines) + "\n")


def sst2(folder: Path) -> None:
    "Endings of stories, good or bad."
    for split, n, name in (("train", 60, "train"), ("valid", 12, "dev"), ("test", 12, "test")):
        rows = [(story.sentences[-1][0], int(story.sentiment == "positive")) for story in SmallWorld().documents(split, n)]  # type: ignore[arg-type]
        write(folder / f"{name}.tsv", "".join(f"{text}\t{label}\n" for text, label in rows))


def blimp(folder: Path) -> None:
    "A verb that agrees with its subject, and one that does not."
    rows = [{"sentence_good": f"The {noun}s are {word}.", "sentence_bad": f"The {noun}s is {word}.", "UID": "made_up_agreement"}
            for noun in ("cat", "goat") for word in ("here", "small")]
    write(folder / "made_up_agreement.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def winogender(folder: Path) -> None:
    "Three occupations, one sentence each, in three versions."
    jobs = ("cat", "mat", "rose")  # words that the made-up encoder knows
    write(folder / "occupations-stats.tsv", "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\n"
          + "".join(f"{job}\t{30 * i}\t{20 + 30 * i}\t2015\n" for i, job in enumerate(jobs)))
    rows = [(f"{job}.customer.1.{gender}.txt", f"the {job} sits on a {word} .")
            for job in jobs for gender, word in (("male", "cat"), ("female", "mat"), ("neutral", "rose"))]
    write(folder / "all_sentences.tsv", "sentid\tsentence\n" + "".join(f"{name}\t{text}\n" for name, text in rows))


def all_MiniLM_L6_v2(folder: Path) -> None: # noqa: N802 (the name of the model)
    "A random encoder of BERT's layout and a tokenizer of whole words, as sentence encoders are stored."
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    from lmbook.pretrained import save_pretrained
    from lmbook.transformer import Transformer, TransformerConfig

    torch.manual_seed(0)
    bert = {"kind": "encoder", "norm_first": False, "types": 2, "embed_norm": True, "head": "bert"}
    model = Transformer(TransformerConfig(60, 16, 1, 2, context_length=24, **bert))
    model.drop_scores()
    save_pretrained(model, folder, "bert")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"the cat sits on mat a yes rose again . ,".split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    tokenizer.save(str(folder / "tokenizer.json"))


def spoken_digits(folder: Path) -> None:
    "A tone for each digit, by two voices, twice."
    import numpy as np

    from lmbook.senses import Recording, write_wav

    rng = np.random.default_rng(0)
    for digit in range(10):
        for voice, pitch in (("high", 1.2), ("low", 1.0)):
            for n in range(2):
                tone = np.sin(2 * np.pi * pitch * (300 + 200 * digit) * np.arange(1500 + 100 * n) / 8000)
                write_wav(folder / f"{digit}_{voice}_{n}.wav", Recording(0.5 * tone + 0.01 * rng.normal(size=len(tone)), 8000))


SETS: dict[str, Write] = {
    make.__name__: make
    for make in (
        tinyshakespeare, wikitext2, enwiki_dump, squad, zhwiki, chinese_poetry, tatoeba_en_zh, sib200, word_similarity, wnut17,
        sst2, winogender, all_MiniLM_L6_v2, sts, blimp, spoken_digits, scitldr,
    )  # fmt: skip
}


def make(name: str, folder: Path) -> None:
    "Write the made-up version of a data set into a new folder."
    folder.mkdir()
    SETS[name](folder)
