"""Near duplicates, repeated passages and contamination: against the definitions, against datasketch, and on real text."""

from __future__ import annotations

import random
import re

import datasketch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbook.cleaning import CleaningError
from lmbook.duplicates import (
    Contaminated,
    MinHash,
    NearDuplicates,
    bands_for,
    candidate_pairs,
    collision,
    cut_passages,
    cut_repetition,
    fit_contaminated,
    near_duplicates,
    overlap,
    repeated_passages,
    similarity,
)
from lmbook.shards import clean, read_shards
from lmbook.small_world import SmallWorld

TOKEN = re.compile(r"[^\W_\u3400-\u9fff]+|[\u3400-\u9fff]")
TEXTS = st.lists(st.text(alphabet="ab ,茶", max_size=25), max_size=8)


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = TOKEN.findall(text.lower())
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, bool(words)))}


def jaccard(a: set, b: set) -> float: return len(a & b) / len(a | b)


# ----------------------------------------------------------------------------------------------------------------------- signatures


@given(TEXTS, st.integers(1, 4), st.sampled_from(["token", "char"]))
def test_signatures_do_not_depend_on_the_company(texts, n, unit):
    minhash = MinHash(permutations=16, n=n, unit=unit)
    together = minhash.signatures(texts)
    assert together.shape == (len(texts), 16)
    for row, text in enumerate(texts): assert (minhash.signatures([text])[0] == together[row]).all()


def test_blocks_do_not_show():
    "Texts longer and shorter than a block, empty ones among them and at the ends."
    rng = random.Random(0)
    texts = ["", *(" ".join(f"w{rng.randrange(5000)}" for _ in range(n)) for n in (1, 3, 30_000, 5, 0, 70_000, 2)), "", "  "]
    minhash = MinHash(permutations=8)
    together = minhash.signatures(texts)
    assert all((minhash.signatures([t])[0] == row).all() for t, row in zip(texts, together))
    assert (together[[0, -1, -2]] == 2**32 - 1).all() and together[1].max() < 2**32 - 1


def test_a_signature_is_the_minimum_over_the_definition():
    minhash = MinHash(permutations=5, n=2)
    x, bounds = minhash.shingles(["one two three four"])
    a = np.random.Generator(np.random.PCG64(0)).integers(0, 2**32, 5, dtype=np.uint32) | np.uint32(1)
    assert minhash.signatures(["one two three four"])[0].tolist() == [min(int(k) * int(h) % 2**32 for h in x) for k in a]


def test_order_and_repetition_of_shingles_do_not_count():
    minhash = MinHash(n=1)
    assert (minhash.signatures(["a b c"]) == minhash.signatures(["C, b! a a a b"])).all()
    assert similarity(minhash.signatures(["a b c", "d e f"]), np.array([[0, 1]]))[0] < .1


def test_estimates_are_as_good_as_datasketchs():
    "Over many pairs of real sentences with words in common, mean error and scatter of both estimates around the truth."
    rng, world = random.Random(0), list(SmallWorld().texts(n=150))
    texts = [t for text in world for t in (text, " ".join(w for w in text.split() if rng.random() > .05))]
    true = np.array([jaccard(shingles(a, 3), shingles(b, 3)) for a, b in zip(texts[::2], texts[1::2])])
    ours = similarity(MinHash(n=3).signatures(texts), np.arange(len(texts)).reshape(-1, 2))
    made = datasketch.MinHash.bulk([[" ".join(s).encode() for s in shingles(t, 3)] for t in texts], num_perm=128)
    theirs = np.array([a.jaccard(b) for a, b in zip(made[::2], made[1::2])])
    expected = float(np.sqrt((true * (1 - true) / 128).mean()))
    for estimate in (ours, theirs):
        assert abs((estimate - true).mean()) < 4 * expected / len(true) ** .5
        assert .8 < np.sqrt(((estimate - true) ** 2).mean()) / expected < 1.2


def test_errors_of_different_permutations_are_independent():
    "The cheap family: over many seeds, the scatter of the estimate must not exceed that of independent throws."
    texts = [" ".join(f"a{k}" for k in range(60)), " ".join(f"a{k}" for k in range(20, 80))]  # J = 40/80
    found = [similarity(MinHash(n=1, seed=seed).signatures(texts), np.array([[0, 1]]))[0] for seed in range(400)]
    mixed = []
    for k in range(400):
        shifted = [" ".join(f"{w}x{k}" for w in t.split()) for t in texts]
        mixed.append(similarity(MinHash(n=1).signatures(shifted), np.array([[0, 1]]))[0])
    for sample in (found, mixed): assert abs(np.mean(sample) - .5) < .015 and .035 < np.std(sample) < .055


@pytest.mark.parametrize("settings_, message", [
    ({"permutations": 0}, "permutations=0 must be.*at least 1"), ({"n": 0}, "n=0 must be.*at least 1"),
    ({"unit": "word"}, "no unit='word'.*token, char"),
])
def test_settings_that_make_no_sense(settings_, message):
    with pytest.raises(CleaningError, match=message): MinHash(**settings_)


# --------------------------------------------------------------------------------------------------------------------------- banding


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=50)
def test_candidates_are_the_pairs_that_agree_in_a_band(seed, bands, rows):
    signatures = np.random.default_rng(seed).integers(0, 3, (14, bands * rows)).astype(np.uint32)
    cut = signatures.reshape(14, bands, rows)
    slow = {(i, j) for j in range(14) for i in range(j) if (cut[i] == cut[j]).all(axis=1).any()}
    pairs = candidate_pairs(signatures, bands, rows)
    assert set(map(tuple, pairs.tolist())) == slow and len(pairs) == len(slow)
    assert pairs.tolist() == sorted(pairs.tolist(), key=lambda p: (p[1], p[0]))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_texts(n):
    signatures = MinHash().signatures(["tea is ready, drink it"] * n)
    assert candidate_pairs(signatures, 4, 2).shape == (max(n - 1, 0), 2) and near_duplicates(signatures).tolist() == [-1, 0][:n]


def test_thousands_of_equal_texts_take_linear_room():
    signatures = MinHash().signatures(["the same tea again and again, all over the web"] * 4000)
    assert len(candidate_pairs(signatures, *bands_for(.8))) < 4000 * 18
    assert (near_duplicates(signatures) == 0).sum() == 3999


@pytest.mark.parametrize("threshold", [.3, .5, .7, .8, .9, 1.0])
def test_bands_find_what_they_promise(threshold):
    bands, rows = bands_for(threshold)
    assert bands * rows <= 128 and collision(threshold, bands, rows) >= .99


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(CleaningError, match="above 0 and up to 1"): bands_for(threshold)
    with pytest.raises(CleaningError, match="above 0 and up to 1"): NearDuplicates(threshold)


def test_bands_need_numbers():
    with pytest.raises(CleaningError, match="need 20 numbers"): candidate_pairs(np.zeros((2, 16), np.uint32), 5, 4)


# ------------------------------------------------------------------------------------------------------------------------- who goes


@given(st.integers(0, 10**6), st.floats(.5, .95))
@settings(max_examples=30)
def test_whoever_goes_has_a_living_earlier_twin(seed, threshold):
    rng = np.random.default_rng(seed)
    words = [f"w{k}" for k in range(60)]
    texts = [" ".join(words[at : at + 40]) for at in rng.integers(0, 20, 30)]
    signatures = MinHash(n=1).signatures(texts)
    twin = near_duplicates(signatures, threshold)
    gone = np.flatnonzero(twin >= 0)
    assert (twin[gone] < gone).all() and (twin[twin[gone]] == -1).all()
    assert not len(gone) or (similarity(signatures, np.stack([twin[gone], gone], 1)) >= threshold).all()
    assert twin[0] == -1


def test_as_steps_of_a_run(tmp_path):
    world = list(SmallWorld().texts(n=40))
    edited = [text.replace("morning", "evening", 1) + " So it was." for text in world[:10]]
    records = [{"text": t, "id": k} for k, t in enumerate([*world, *edited, "", world[0]])]
    manifest = clean(records, [NearDuplicates(.7)], tmp_path / "out", shard_size=15)
    assert [r["id"] for r in read_shards(tmp_path / "out")] == [*range(40), 50]  # an empty text has no shingles and no twin
    assert manifest["dropped"] == [{"step": "NearDuplicates", "reasons": {"near duplicate": 11}}]


def test_dropped_rows_get_no_key():
    keys = NearDuplicates()({"text": ["tea is ready", "tea is ready", ""], "dropped": ["x", None, None]})["minhash"]
    assert keys[0] is None and len(keys[1]) == 512 and keys[2] is None and NearDuplicates().decide(keys) == [None, None, None]
    assert NearDuplicates().decide([]) == []


# ------------------------------------------------------------------------------------------------------------------------- passages


@given(TEXTS, st.integers(1, 5))
def test_passages_are_those_of_the_definition(texts, n):
    seen, slow = set(), []
    for text in texts:
        words, mark = list(TOKEN.finditer(text)), []
        for i in range(len(words) - n + 1):
            gram = tuple(w[0] for w in words[i : i + n])
            if gram in seen: mark += range(i, i + n)
            seen.add(gram)
        slow.append({words[i].span() for i in mark})
    found = repeated_passages(texts, n)
    for text, spans, wanted in zip(texts, found, slow):
        assert {w.span() for w in TOKEN.finditer(text) if any(a <= w.start() < b for a, b in spans)} == wanted
        assert all(a < b for a, b in spans) and all(x[1] <= y[0] for x, y in zip(spans, spans[1:]))


@pytest.mark.parametrize("text, kept", [
    ("a a a a", "a a a"), ("b a a a a a", "b a a a"), ("a b a b a b c", "a b a b c"), ("a b c a b c d", "a b c d"),
])
def test_a_repetition_that_overlaps_its_first_occurrence_leaves_it_whole(text, kept): assert cut_repetition(text, 3) == kept


@given(st.text(alphabet="ab ", max_size=60))
def test_cutting_keeps_the_first_occurrence(text):
    kept = cut_repetition(text, 3)
    grams = lambda t: {tuple(TOKEN.findall(t)[i : i + 3]) for i in range(len(TOKEN.findall(t)) - 2)}  # noqa: E731
    assert kept == text.rstrip() or len(kept) < len(text)
    assert TOKEN.findall(text)[:3] == TOKEN.findall(kept)[:3] and (grams(text) or kept == text.rstrip())


def test_a_licence_in_many_texts_is_cut_from_all_but_one():
    licence = " ".join(f"clause{k}" for k in range(60))
    stories = [" ".join(f"story{k}word{n}" for n in range(9)) + "." for k in range(5)]
    texts = [f"{story} {licence}." for story in stories]
    spans = repeated_passages(texts)
    assert spans[0] == [] and [cut_passages(t, s) for t, s in zip(texts, spans)][1:] == stories[1:]


def test_no_texts(): assert repeated_passages([]) == [] and repeated_passages(["", "tea"]) == [[], []] and cut_repetition("") == ""


# --------------------------------------------------------------------------------------------------------------------- contamination


def test_contamination_needs_n_tokens_in_a_row():
    test = " ".join(f"t{k}" for k in range(13))
    step = fit_contaminated([test])
    assert isinstance(step, Contaminated)
    rows = [f"before {test} after", test.replace("t6", "x"), test.upper(), test[: test.index("t12")], "", "茶"]
    assert step({"text": rows})["dropped"] == ["test set", None, "test set", None, None, None]
    assert step({"text": rows, "dropped": ["x"] * 6})["dropped"] == ["x"] * 6


def test_overlap_counts_shares_over_batches():
    tests = [" ".join(f"t{k}" for k in range(20)), "too short", " ".join(f"u{k}" for k in range(13))]
    share = overlap(tests, [["nothing here"], [" ".join(f"t{k}" for k in range(14))], []])
    assert share[0] == 2 / 8 and np.isnan(share[1]) and share[2] == 0


def test_tests_too_short_to_be_found():
    with pytest.raises(CleaningError, match="None of the 2 test texts has 13 tokens"): fit_contaminated(["short", "shorter"])


# ------------------------------------------------------------------------------------------------------------------------- real text


@pytest.mark.parametrize("name, n", [("poems", 3), ("zhwiki", 5), ("wikitext", 5)])
def test_planted_copies_in_real_text_are_found(data_dir, name, n):
    if name == "poems": texts = (data_dir / "chinese_poetry/tang_shi_10k.txt").read_text(encoding="utf-8").split("\n\n")[:3000]
    elif name == "zhwiki": texts = (data_dir / "zhwiki/zhwiki_contexts.txt").read_text(encoding="utf-8").splitlines()
    else: texts = [t for t in (data_dir / "wikitext2/train.txt").read_text(encoding="utf-8").splitlines() if len(t) > 200]
    rng, first = random.Random(0), len(texts)
    originals = rng.sample([k for k, t in enumerate(texts) if len(TOKEN.findall(t)) > 40], 150)
    for k, at in enumerate(originals):
        parts = texts[at].split(" ") if name == "wikitext" else list(texts[at])
        for place in rng.sample(range(len(parts)), max(1, len(parts) // (300, 12)[k % 2])): parts[place] = rng.choice(parts)
        texts.append((" " if name == "wikitext" else "").join(parts))
    twin = near_duplicates(MinHash(n=n).signatures(texts))
    true = np.array([jaccard(shingles(texts[at], n), shingles(texts[first + k], n)) for k, at in enumerate(originals)])
    hit = twin[first:] >= 0
    assert hit[true > .9].mean() > .97 and hit[true < .65].mean() < .1
    judged = [jaccard(shingles(texts[i], n), shingles(texts[twin[i]], n)) for i in np.flatnonzero(twin >= 0)]
    assert np.mean(np.array(judged) > .8 - .0707) > .97


# ---------------------------------------------------------------------------------------------------------- nothing wrong in silence


def test_texts_without_shingles_are_nobodys_twins():
    signatures = MinHash().signatures(["!!!", "🎉🎉", "", "the tea is ready now", "the tea is ready now"])
    assert near_duplicates(signatures).tolist() == [-1, -1, -1, -1, 3]


def contains(text: list[str], part: list[str]) -> int: return sum(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def test_a_passage_that_two_texts_share_out_is_not_said_to_be_one():
    texts = ["one two three four five", "x three four five six seven y", "one two three four five six seven"]
    assert [texts[2][a:b].strip() for a, b in repeated_passages(texts, 3)[2]] == ["one two three four five", "six seven"]


@given(TEXTS, st.integers(1, 4), st.booleans())
@settings(max_examples=300)
def test_each_passage_occurred_as_a_whole(texts, n, keep_first):
    found = repeated_passages(texts, n, keep_first)
    for k, (text, spans) in enumerate(zip(texts, found)):
        for start, end in spans:
            part = TOKEN.findall(text[start:end])
            before = sum(contains(TOKEN.findall(t), part) for t in texts[:k])
            assert before + contains(TOKEN.findall(text[:end]), part) > 1 or before, (text, text[start:end])


# ------------------------------------------------------------------------------------------------------------------------ whatever comes

SOME = st.lists(st.sampled_from(["a", "b", "c ", " ", "茶", "\ud800", "!", "", "\0", "one two ", "🎉"]), max_size=25).map("".join)


@settings(max_examples=200)
@given(st.lists(SOME, max_size=6), st.integers(1, 4), st.booleans())
def test_any_texts_have_their_duplicates(texts, n, keep_first):
    spans = repeated_passages(texts, n, keep_first)
    assert len(spans) == len(texts)
    for text, found in zip(texts, spans):
        assert all(0 <= start < end <= len(text) for start, end in found) and found == sorted(found)
        assert cut_repetition(cut_repetition(text, n), n) is not None
    hasher = MinHash(permutations=8, n=n)
    twins = near_duplicates(hasher.signatures(texts), 0.5)
    assert all(twin < row and (twin < 0 or twins[twin] < 0) for row, twin in enumerate(twins.tolist()))
    step = NearDuplicates(0.5, hasher)
    assert len(step.decide(step({"text": texts})["minhash"] if texts else [])) == len(texts)
    shares = overlap(texts, [texts, []], n)
    assert len(shares) == len(texts) and all(share == 1 or np.isnan(share) for share in shares)
    try: fit_contaminated(texts, n)
    except CleaningError as error: assert "could be found" in str(error)


@pytest.mark.parametrize("texts", [["a " * 300_000], ["a"] * 15_000, [""] * 15_000, ["a b c d e f " * 50_000], ["茶" * 300_000],
    [f"{n} a b c d" for n in range(30_000)]])
def test_no_corpus_is_quadratic(texts):
    "Texts and tokens by ten and hundred thousands that are all alike: comparing each with each would take hours."
    repeated_passages(texts, 5)
    near_duplicates(MinHash(permutations=8, n=2).signatures(texts), 0.5)
    overlap(texts[:2], [texts], 5)


@pytest.mark.parametrize("call", [
    lambda: bands_for(float("nan")), lambda: bands_for(0.0), lambda: bands_for(2.0), lambda: MinHash(permutations=0), lambda: MinHash(n=-1),
    lambda: MinHash(unit="word"), lambda: repeated_passages(["a"], 0), lambda: overlap(["a"], [], 0), lambda: fit_contaminated([]),
    lambda: NearDuplicates(-1), lambda: candidate_pairs(np.zeros((2, 4), np.uint32), 3, 2), lambda: bands_for(0.5, 0),
    lambda: candidate_pairs(np.zeros((2, 4), np.uint32), 0, 2), lambda: candidate_pairs(np.zeros((2, 4), np.uint32), 2, 2, reach=-1),
])
def test_numbers_that_are_none_are_refused(call):
    with pytest.raises(CleaningError): call()
