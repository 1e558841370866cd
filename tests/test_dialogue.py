"""Conversations: tokens as the template has them, memories that keep to their room, a cache that changes no word; bad input; faults."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lmbook.dialogue as dialogue
from lmbook.batches import IGNORE
from lmbook.core import LmbookError
from lmbook.dialogue import (
    ROLES,
    ChatFormat,
    ChatLessons,
    ChatTemplate,
    Conversation,
    DialogueError,
    Exchange,
    Recent,
    Retrieved,
    Summary,
    Talk,
    View,
    Whole,
    chat_lesson,
    messages_of,
    noted,
)  # fmt: skip
from lmbook.finetuning import CHAT_SPECIALS
from lmbook.generation import SamplingConfig
from lmbook.recurrent_lm import RecurrentLM, RecurrentLMConfig
from lmbook.tokenization import SPECIALS, ByteTokenizer, WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig
from tests.faults import planted


def some_words() -> WordTokenizer:
    dice, texts = random.Random(0), ["Stop!", "Hello.", "you", "it is", "yes", "no"]
    for _ in range(150):
        talk = Talk(dice, 6)
        texts += [text for _ in range(8) for text in talk.any()] + [f"{talk.persona} {talk.notes()}"]
    return WordTokenizer.train(texts, specials=(*SPECIALS, *CHAT_SPECIALS))


WORDS = some_words()
FORMAT = ChatFormat(WORDS)
PERSONA = "You are Anna, a baker from Ashford."


def decoder(context: int = 96, seed: int = 0, **more: Any) -> Transformer:
    torch.manual_seed(seed)
    made = Transformer(TransformerConfig(WORDS.vocab_size, 16, 2, 2, context_length=context, positions="rotary", **more))
    with torch.no_grad():
        for p in made.parameters(): p.add_(torch.randn_like(p) * 0.2)  # so that what it says hangs on what it reads
    return made.eval()


def said_by(seed: int, n: int) -> list[Exchange]:
    talk = Talk(random.Random(seed), 6)
    return [talk.any() for _ in range(n)]


def size(message: Any) -> int: return FORMAT.size(message)


# ---------------------------------------------------------------- tokens


def test_the_ids_are_those_of_the_template():
    for seed in range(20):
        messages = chat_lesson(random.Random(seed), FORMAT, 128, 6)
        text = ChatTemplate().render(messages)
        ids, said = FORMAT.encode(messages)
        assert ids == WORDS.encode(text, bos=True, specials=True) and len(said) == len(ids) <= 128
        assert WORDS.unk_id not in ids
        assert len(ids) == 1 + sum(map(size, messages))
        prompt, _ = FORMAT.encode(messages[:-1], prompt=True)
        given, wanted = ChatTemplate().example(WORDS, messages)
        assert prompt == given and prompt + wanted == ids
        spoken = [WORDS.encode(m["content"]) + [FORMAT.end_id] for m in messages if m["role"] == "assistant"]
        assert [id for id, mine in zip(ids, said) if mine] == [id for row in spoken for id in row]


OTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
FIRST = "{% for m in messages %}{{ m.role }}{% if loop.first %}!{% endif %} {{ m.content }}.{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"  # noqa: E501


def test_other_templates_and_tokenizers():
    format = ChatFormat(ByteTokenizer(), ChatTemplate(OTHER, ()))
    messages = messages_of(said_by(3, 3), "Be kind.")
    ids, said = format.encode(messages, prompt=True)
    text = ChatTemplate(OTHER, ()).render(messages, prompt=True)
    assert ByteTokenizer().decode(ids) == text and format.end_id == ByteTokenizer().encode("\n")[0]
    assert ByteTokenizer().decode([id for id, mine in zip(ids, said) if mine]).split("\n")[:-1] == [e.assistant for e in said_by(3, 3)]
    with pytest.raises(DialogueError, match="in another way among others"): ChatFormat(ByteTokenizer(), ChatTemplate(FIRST, ()))
    silent = OTHER.replace("\n{% endfor %}", "{% endfor %}")
    with pytest.raises(DialogueError, match="nothing behind an answer"): ChatFormat(ByteTokenizer(), ChatTemplate(silent, ()))
    with pytest.raises(LmbookError, match="There is no special token"): ChatFormat(ByteTokenizer())


def test_only_the_assistant_is_learned(module=dialogue):
    rows = [messages_of(said_by(seed, 2 + seed % 3), PERSONA) for seed in range(5)]
    format = module.ChatFormat(WORDS)
    lessons = module.ChatLessons(rows, format, batch_size=2, seed=3)
    assert len(lessons) == 3 and sorted(i for part in lessons.plan(0) for i in part) == list(range(5))
    assert lessons.plan(0) != lessons.plan(1)
    for part, batch in zip(lessons.plan(0), lessons.read(0)):
        assert batch.segments is not None
        for b, i in enumerate(part):
            ids, n = WORDS.encode(ChatTemplate().render(rows[i]), bos=True, specials=True), int(batch.segments[b].sum())
            assert batch.ids[b, :n].tolist() == ids[:-1] and not batch.segments[b, n:].any()
            learned = [t for t in batch.targets[b].tolist() if t != IGNORE]
            answers = [WORDS.encode(m["content"]) + [FORMAT.end_id] for m in rows[i] if m["role"] == "assistant"]
            assert learned == [id for row in answers for id in row]
            for at, target in enumerate(batch.targets[b, :n].tolist()): assert target in (IGNORE, ids[at + 1])


def test_a_small_model_learns_to_answer():
    rows = [messages_of([Exchange("Hello.", "you"), Exchange("Stop!", "it is")])] * 8
    model = decoder()
    config = TrainConfig(steps=60, lr=0.01, device="cpu")
    Trainer(model.train(), ChatLessons(rows, FORMAT, 8), config).fit()
    chat = Conversation(model.eval(), WORDS)
    assert [chat.say("Hello."), chat.say("Stop!")] == ["you", "it is"]


# ---------------------------------------------------------------- conversations whose truth is known

SAID = {  # how a fact begins, how it is noted, how it is asked for
    "I live in": ("you live in", "Where do I live?"), "I am a": ("you are a", "What do I do?"),
    "I bought a": ("you bought a", "What did I buy?"), "I keep a": ("you keep a", "What animal do I keep?"),
    "I like": ("you like", "What color do I like?"), "I was born in": ("you were born in", "Where was I born?"),
}  # fmt: skip
ASKED = {question: begin for begin, (_, question) in SAID.items()}


def test_the_answers_are_true(module=dialogue):
    "Read again by somebody who knows only what was said."
    asked = unknown = changed = 0
    for seed in range(60):
        talk, facts, sky = module.Talk(random.Random(seed), 6), dict[str, str](), None
        for _ in range(40):
            user, assistant = talk.any()
            begin, _, value = user.removeprefix("Now ").rstrip(".").rpartition(" ")
            if begin in SAID:
                assert user.startswith("Now ") == (begin in facts) and facts.get(begin) != value
                changed += begin in facts
                facts[begin] = value
                assert assistant == f"Noted: {SAID[begin][0]} {value}."
            elif user in ASKED:
                told = facts.get(ASKED[user])
                asked, unknown = asked + 1, unknown + (told is None)
                answer = f"{SAID[ASKED[user]][0]} {told}."
                assert assistant == ("You have not told me." if told is None else answer[0].upper() + answer[1:])
            elif weather := re.fullmatch(r"It is (\w+) outside\.", user):
                sky = weather[1]
                assert assistant == f"Yes, it is {sky}."
            elif "outside" in user: assert assistant == (f"It is {sky}." if sky else "You have not told me.")
            elif user.endswith("?"):
                own = f"I am {talk.name}, a {talk.job} from {talk.town}.", f"I come from {talk.town}.", f"I work as a {talk.job}."
                assert assistant in own and own[0].replace("I am", "You are") == talk.persona
            else: assert assistant == "I see."
    assert asked > 300 and changed > 150 and unknown > 50


def test_notes_say_what_was_told():
    talk = Talk(random.Random(1), 6)
    for _ in range(30): talk.tell()
    notes = talk.notes().removeprefix("Noted: ").removesuffix(".").split("; ")
    assert notes == [talk.fact(slot, value, mine=False) for slot, value in talk.facts.items()]
    assert Talk(random.Random(1)).notes() == ""


# ---------------------------------------------------------------- memories

MEMORIES: list[Any] = [Recent(), Recent(0.5), Summary(), Summary(recent=0.1), Retrieved(), Retrieved(k=1, recent=0.2)]


def a_question(seed: int, n: int) -> list[dict[str, str]]:
    exchanges = said_by(seed, n + 1)
    return [*messages_of(exchanges[:-1]), {"role": "user", "content": exchanges[-1].user}]


@pytest.mark.parametrize("number", range(len(MEMORIES)))
def test_a_memory_keeps_to_its_room(number):
    memory = MEMORIES[number]
    for seed in range(40):
        turns = a_question(seed, random.Random(seed).randint(0, 30))
        for room in (20, 47, 90, 200, 10**6):
            notes, chosen = memory.view(turns, room, size)
            assert list(chosen) == sorted(set(chosen)) and chosen[-1] == len(turns) - 1
            assert [i for i in chosen if i % 2 == 0] == [i for i in (*(j - 1 for j in chosen if j % 2), len(turns) - 1)]  # whole exchanges
            used = sum(size(turns[i]) for i in chosen) + (size({"role": "system", "content": f" {notes}"}) if notes else 0)
            assert used <= room
            if room == 10**6: assert len(chosen) == len(turns) and not notes


def test_recent_is_as_much_as_has_room(module=dialogue):
    for seed in range(60):
        turns = a_question(seed, 12)
        for room in range(20, 200, 13):
            fits = [first for first in range(0, len(turns), 2) if sum(map(size, turns[first:])) <= room]
            assert module.Recent().view(turns, room, size).turns == tuple(range(fits[0], len(turns)))


def test_a_larger_cut_is_a_rarer_one():
    for seed in range(20):
        turns, firsts = a_question(seed, 60), {}
        for keep in (1.0, 0.5):
            firsts[keep] = [Recent(keep).view(turns[: 2 * i + 1], 120, size).turns[0] for i in range(61)]
            assert firsts[keep] == sorted(firsts[keep])  # what is gone does not come back
        moves = {keep: len(set(row)) for keep, row in firsts.items()}
        assert moves[0.5] < 0.6 * moves[1.0]
        assert all(a >= b for a, b in zip(firsts[0.5], firsts[1.0]))


def test_notes_are_of_what_was_cut_and_the_newest_of_each(module=dialogue):
    for seed in range(40):
        talk = module.Talk(random.Random(seed), 6)
        exchanges = [talk.tell() if talk.rng.random() < 0.6 else talk.chat() for _ in range(25)]
        turns = [*messages_of(exchanges), {"role": "user", "content": "Who are you?"}]
        notes, chosen = module.Summary(recent=0.3).view(turns, 150, size)
        told = dict[str, str]()
        for _, assistant in exchanges[: chosen[0] // 2]:
            if assistant.startswith("Noted: "): told[" ".join(assistant.split()[1:-1])] = assistant.split()[-1].rstrip(".")
        found = dict(note.rsplit(" ", 1) for note in notes.removeprefix("Noted: ").removesuffix(".").split("; "))
        assert found.items() <= told.items() and found
        if 150 - sum(size(turns[i]) for i in chosen) > 80: assert found == told


def test_where_room_is_short_the_newest_notes_stay(module=dialogue):
    exchanges = [Exchange("x", f"Noted: thing{i} is {i}.") for i in range(10)] + [Exchange("x", "Noted: thing2 is new.")]
    turns = [*messages_of(exchanges), {"role": "user", "content": "x"}]
    long = {"role": "system", "content": " Noted: thing9 is 9; thing2 is new."}
    last = size(turns[-1])
    memory = module.Summary(recent=0.0)
    assert memory.view(turns, last + size(long), size) == View("Noted: thing9 is 9; thing2 is new.", (len(turns) - 1,))
    assert memory.view(turns, last + size(long) - 1, size).notes == "Noted: thing2 is new."
    assert memory.view(turns, last, size).notes == ""


def test_notes_of_ones_own():
    def note(user: str, assistant: str) -> dict[str, str]: return {"last": user.upper()}

    turns = a_question(2, 9)
    notes, chosen = Summary(recent=0.2, note=note, text="They said {}!").view(turns, 100, size)
    assert notes == f"They said {turns[chosen[0] - 2]['content'].upper()}!"
    assert noted("x", "I see.") == {} and noted("x", "Noted: a b; c d e.") == {"a": "a b", "c d": "c d e"}


def test_what_shares_words_is_found_and_of_equals_the_newest(module=dialogue):
    exchanges = [Exchange(f"{a} {b}", "yes") for a in "abc" for b in "xyz"] + [Exchange("a x", "yes"), Exchange("q q", "no")]
    turns = [*messages_of(exchanges), {"role": "user", "content": "a x"}]
    for k, wanted in ((1, [9]), (2, [0, 9])):
        chosen = module.Retrieved(k=k, recent=0.0).view(turns, 60, size).turns
        assert [i // 2 for i in chosen if i % 2 == 0][:-1] == wanted
    assert module.Retrieved(recent=0.0).view([{"role": "user", "content": "a"}], 60, size).turns == (0,)


def test_whole_is_whole_or_refused():
    turns = a_question(0, 6)
    room = sum(map(size, turns))
    assert Whole().view(turns, room, size).turns == tuple(range(13))
    with pytest.raises(DialogueError, match=f"takes {room} tokens, and there is room for {room - 1}"): Whole().view(turns, room - 1, size)


# ---------------------------------------------------------------- conversations


@pytest.mark.parametrize("number", range(len(MEMORIES)))
def test_the_cache_changes_no_word(number, module=dialogue):
    for seed in range(3):
        model, memory = decoder(seed=seed), MEMORIES[number]
        quick, slow = (module.Conversation(model, WORDS, PERSONA, memory, cached=cached) for cached in (True, False))
        for user, _ in said_by(seed, 12): assert quick.say(user) == slow.say(user)
        assert quick.turns == slow.turns and quick.tokens_read < slow.tokens_read


def test_a_reply_is_what_the_model_says():
    "Against a loop without any of this: everything is read anew for each token."
    model = decoder(200)
    chat = Conversation(model, WORDS, PERSONA, Whole(), SamplingConfig(max_new_tokens=7, temperature=0))
    may = [i for i in range(WORDS.vocab_size) if i not in WORDS.specials.values() or i in (FORMAT.end_id, WORDS.eos_id, WORDS.unk_id)]
    messages = [{"role": "system", "content": PERSONA}]
    for user, _ in said_by(5, 5):
        messages.append({"role": "user", "content": user})
        ids, _ = FORMAT.encode(messages, prompt=True)
        new: list[int] = []
        for _ in range(7):
            with torch.no_grad(): scores = model(torch.tensor([ids + new]))[0, -1]
            new.append(max(may, key=lambda i: scores[i].item()))
            if new[-1] in (FORMAT.end_id, WORDS.eos_id): break
        text = WORDS.decode([i for i in new if i not in (FORMAT.end_id, WORDS.eos_id)])
        assert chat.say(user) == text
        messages.append({"role": "assistant", "content": text})
    assert chat.turns == messages[1:]


def other_models() -> dict[str, Any]:
    torch.manual_seed(0)
    recurrent = RecurrentLM(RecurrentLMConfig(WORDS.vocab_size, 16, 16, n_layer=1)).eval()
    model = decoder(10**4)
    return {"window": decoder(200, window=24), "recurrent": recurrent, "function": lambda ids: model(ids)}


@pytest.mark.parametrize("name", ["window", "recurrent", "function"])
def test_other_models_talk_too(name):
    model = other_models()[name]
    config = SamplingConfig(max_new_tokens=5, temperature=0)
    quick, slow = (Conversation(model, WORDS, PERSONA, Recent(0.5), config, cached=cached) for cached in (True, False))
    for user, _ in said_by(7, 8): assert quick.say(user) == slow.say(user)


def speaks(text: str) -> Any:
    "A model that always goes on with these tokens, one after the other, as often as it has spoken."
    wanted = WORDS.encode(text, specials=True)

    def model(ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*ids.shape, WORDS.vocab_size)
        for b, row in enumerate(ids.tolist()):
            begun = len(row) - 1 - row[::-1].index(WORDS.special("<|assistant|>"))
            out[b, -1, wanted[min(len(row) - 1 - begun, len(wanted) - 1)]] = 9.0
        return out

    return model


def test_nobody_speaks_in_anothers_name(module=dialogue):
    chat = module.Conversation(speaks("you<|user|>"), WORDS, config=SamplingConfig(max_new_tokens=3, temperature=0))
    reply = chat.say("Hello.")
    assert reply == "you" and WORDS.special("<|user|>") in chat._never
    assert chat._ids.count(WORDS.special("<|user|>")) == 1  # the user's own, in the prompt
    assert FORMAT.end_id not in chat._never
    FORMAT.encode(chat.turns)
    again = module.Conversation(speaks("you<|user|>"), WORDS, config=SamplingConfig(max_new_tokens=3, seed=1))
    for _ in range(5): assert WORDS.special("<|user|>") not in WORDS.encode(again.say("Hello."), specials=True)


def test_a_reply_ends_where_it_ends():
    chat = Conversation(speaks("it is<|end|>"), WORDS)
    assert chat.say("Hello.") == "it is" and Conversation(speaks("<|end|>"), WORDS).say("Hello.") == ""
    assert Conversation(speaks("it is<eos>"), WORDS).say("Hello.") == "it is"
    stops = SamplingConfig(max_new_tokens=9, temperature=0, stop=(" is",))
    assert Conversation(speaks("it is it is<|end|>"), WORDS, config=stops).say("Hello.") == "it"
    assert list(chat.stream("Hello.")) == ["it", " is"]


def test_streams_that_are_left_or_crossed():
    chat = Conversation(decoder(), WORDS, PERSONA, config=SamplingConfig(max_new_tokens=6, temperature=0))
    first = chat.say("Hello.")
    pieces = chat.stream("Stop!")
    next(pieces)
    pieces.close()
    assert len(chat.turns) == 2  # it was not read to its end
    assert chat.undo() == "Hello." and chat.say("Hello.") == first  # and the cache is still right
    one = chat.stream("Stop!")
    next(one)
    chat.say("Hello.")
    with pytest.raises(DialogueError, match="Another message was sent"): list(one)
    assert len(chat.turns) == 4


def test_undo_and_regenerate():
    chat = Conversation(decoder(), WORDS, PERSONA, config=SamplingConfig(max_new_tokens=6, seed=3))
    replies = [chat.say("Hello."), *(chat.regenerate() for _ in range(8))]
    assert len(set(replies)) > 3 and len(chat.turns) == 2 and chat.turns[1]["content"] == replies[-1]
    same = Conversation(decoder(), WORDS, PERSONA, config=SamplingConfig(max_new_tokens=6, seed=3))
    assert same.say("Hello.") == replies[0]
    chat.say("Stop!")
    chat.undo()
    assert [turn["content"] for turn in chat.turns] == ["Hello.", replies[-1]]
    chat.undo()
    with pytest.raises(DialogueError, match="nothing to take back"): chat.undo()
    with pytest.raises(DialogueError, match="nothing to take back"): chat.regenerate()


def test_a_failure_leaves_the_conversation_as_it_was():
    class Broken:
        fails = False

        def view(self, turns: Any, room: int, size: Any) -> View:
            if self.fails: raise RuntimeError("no memory")
            return Recent().view(turns, room, size)

    chat = Conversation(decoder(), WORDS, PERSONA, Broken())
    chat.say("Hello.")
    before, chat.memory.fails = chat.turns, True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError): chat.regenerate()
    with pytest.raises(RuntimeError): chat.say("Stop!")
    assert chat.turns == before


def test_turns_are_copies():
    chat = Conversation(decoder(), WORDS, turns=messages_of(said_by(0, 2)))
    chat.turns[0]["content"] = "changed"
    chat.turns.clear()
    assert chat.turns == messages_of(said_by(0, 2))


@pytest.mark.parametrize("persona", ["", PERSONA, 'Say "no".\n小明'])
def test_saved_and_loaded_it_goes_on(tmp_path, persona):
    model = decoder(200)
    chat = Conversation(model, WORDS, persona, Summary())
    for user, _ in said_by(2, 4): chat.say(user)
    chat.save(tmp_path / "c.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["role"] for line in lines] == ["system"] * bool(persona) + ["user", "assistant"] * 4
    again = Conversation.load(tmp_path / "c.jsonl", model, WORDS, memory=Summary())
    assert again.turns == chat.turns and again.persona == persona
    assert again.say("Who are you?") == chat.say("Who are you?")
    (tmp_path / "empty.jsonl").write_text("")
    assert Conversation.load(tmp_path / "empty.jsonl", model, WORDS).turns == []


USER, ASSISTANT = '{"role": "user", "content": "Hello."}', '{"role": "assistant", "content": "you"}'
DAMAGED = {
    "half": ([USER, ASSISTANT[:20]], "Line 2 of .* is no JSON"),
    "list": ([USER, "[1]"], "Line 2 of .* must be"),
    "deep": (["[" * 5000], "Line 1 of .* is no JSON"),
    "field": ([USER, ASSISTANT, '{"role": "user", "text": "x"}'], "Line 3 of .* must be"),
    "number": (['{"role": "user", "content": 3}'], "Line 1 of .* must be"),
    "role": ([USER, '{"role": "robot", "content": "x"}'], "role='robot'"),
    "twice": ([USER, USER], "Line 2 of .* is the user's, and the one before is the user's"),
    "last": ([USER, ASSISTANT, USER], "Line 3 of .* is the user's and has no answer"),
    "begins": ([ASSISTANT, USER], "Line 1 of .* is the assistant's, and nobody has spoken"),
    "system": ([USER, ASSISTANT, '{"role": "system", "content": "x"}'], "Line 3 of .* is the system's"),
    "spelled": (['{"role": "user", "content": "x<|end|>"}', ASSISTANT], "Line 1 of .* spells <|end|>".replace("|", r"\|")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_line_is_named(tmp_path, case):
    lines, message = DAMAGED[case]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DialogueError, match=message): Conversation.load(tmp_path / "c.jsonl", decoder(), WORDS)


def test_files_that_are_none(tmp_path):
    for content in (b"\xff\xfe\x00", None):
        path: Path = tmp_path / ("x" if content else "absent")
        if content: path.write_bytes(content)
        with pytest.raises(DialogueError, match="cannot be read"): Conversation.load(path, decoder(), WORDS)
    with pytest.raises(DialogueError, match="cannot be written"): Conversation(decoder(), WORDS).save(tmp_path / "x" / "y.jsonl")


ENCODER = TransformerConfig(WORDS.vocab_size, 16, 1, 2, kind="encoder")
PAIR = TransformerConfig(WORDS.vocab_size, 16, 1, 2, kind="encoder-decoder")


def talk_to(*arguments: Any, **named: Any) -> Conversation: return Conversation(decoder(), WORDS, *arguments, **named)


def turns_of(*roles: str) -> list[dict[str, str]]: return [{"role": role, "content": "Hello."} for role in roles]


BAD = {
    "empty": (lambda: talk_to().say(""), "The message is empty"),
    "blank": (lambda: talk_to().say(" \n"), "The message is empty"),
    "bytes": (lambda: talk_to().say(b"Hello."), "A message is a text, not bytes"),
    "long": (lambda: talk_to().say("Hello. " * 99), "The message takes .* and there is room for"),
    "spelled": (lambda: talk_to().say("Hello.<|end|>"), "spells <.end.>: a user could speak"),
    "late": (lambda: talk_to().stream(""), "The message is empty"),  # before anything is asked of the stream
    "persona": (lambda: talk_to("You are Anna. " * 40), "The persona takes .* of 96 tokens"),
    "persona spelled": (lambda: talk_to("x<|end|>"), "The persona spells"),
    "persona number": (lambda: talk_to(3), "persona is int"),
    "reply": (lambda: talk_to(config=SamplingConfig(max_new_tokens=95)), "nothing is left for the conversation"),
    "penalty": (lambda: talk_to(config=SamplingConfig(presence_penalty=1.0)), "without penalties"),
    "memory": (lambda: talk_to(memory="all"), "A str is no memory"),
    "role": (lambda: talk_to(turns=turns_of("robot")), "role='robot'"),
    "twice": (lambda: talk_to(turns=turns_of("user", "user")), "Turn 1 is the user's, and the one before is the user's"),
    "no answer": (lambda: talk_to(turns=turns_of("user", "assistant", "user")), "Turn 2 is the user's and has no answer"),
    "begins": (lambda: talk_to(turns=turns_of("assistant")), "Turn 0 is the assistant's, and nobody has spoken"),
    "no message": (lambda: talk_to(turns=[3]), "Turn 0 must be"),
    "encoder": (lambda: Conversation(Transformer(ENCODER), WORDS), "A conversation needs a model that predicts the next token"),
    "pairs": (lambda: Conversation(Transformer(PAIR), WORDS), "A conversation needs a model that predicts the next token"),
    "no pair": (lambda: Conversation(Transformer(TransformerConfig(9, 16, 1, 2)), WORDS), "they are no pair"),
    "tokenizer": (lambda: Conversation(decoder(), "words"), "A str is no tokenizer"),
    "template": (lambda: ChatFormat(WORDS, "{{ x }}"), "A str is no ChatTemplate"),
    "no lessons": (lambda: ChatLessons([], FORMAT), "There are no conversations"),
    "silent lesson": (lambda: ChatLessons([turns_of("user")], FORMAT), "In conversation 0 the assistant says nothing"),
    "long lesson": (lambda: ChatLessons([messages_of(said_by(0, 9))], FORMAT, length=20), "Conversation 0 has .* tokens, and length=20"),
    "keep": (lambda: Recent(0), "keep=0 must be above 0"),
    "keep more": (lambda: Recent(1.5), "at most 1"),
    "recent": (lambda: Summary(recent=1.0), "recent=1.0 must be at least 0 and below 1"),
    "note": (lambda: Summary(note="x"), "note= is a function"),
    "text": (lambda: Summary(text="Noted."), "text= has one {}"),
    "k": (lambda: Retrieved(k=0), "k=0 must be"),
    "nothing": (lambda: Recent().view([], 9, size), "There is no message"),
    "no turn": (lambda: Summary().view([{"role": "user"}], 9, size), "Turn 0 is no message"),
    "slot": (lambda: Talk(random.Random(0)).ask("cousin"), "There is no slot='cousin'"),
    "names": (lambda: Talk(random.Random(0), 1), "names=1 must be"),
    "many names": (lambda: Talk(random.Random(0), 17), "names=17 must be at most 16"),
    "what": (lambda: Talk(random.Random(0)).ask_persona("age"), "what='age'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case):
    function, message = BAD[case]
    with pytest.raises(DialogueError, match=message): function()


def test_there_are_three_roles(): assert ROLES == ("system", "user", "assistant")


# ---------------------------------------------------------------- planted faults


learns, finds = test_only_the_assistant_is_learned, test_what_shares_words_is_found_and_of_equals_the_newest


def cached(module: ModuleType) -> None: test_the_cache_changes_no_word(0, module)


FAULTS = {
    "the user is learned, too": ('speaks = message["role"] == "assistant"', 'speaks = message["role"] != "system"', learns),
    "one place further": ("np.where(said[1:], row[1:], IGNORE)", "np.where(said[:-1], row[1:], IGNORE)", learns),
    "the old fact is told": ("_SLOTS[slot][2], _NOT_TOLD if value is None else", "_SLOTS[slot][2], _NOT_TOLD if value else",
                             test_the_answers_are_true),
    "half an exchange": ("                first += 2\n", "                first += 1\n", test_recent_is_as_much_as_has_room),
    "cut too late": ("        if used > room:\n", "        if used > room + 9:\n", test_recent_is_as_much_as_has_room),
    "the first note stays": ("                facts.pop(about, None)\n                facts[about] = note",
                             "                facts.setdefault(about, note)", test_notes_are_of_what_was_cut_and_the_newest_of_each),
    "old notes stay": ("found.pop(0)", "found.pop()", test_where_room_is_short_the_newest_notes_stay),
    "notes of all": ("for i in range(0, first, 2):\n            for about", "for i in range(0, len(turns) - 1, 2):\n            for about",
                     test_notes_are_of_what_was_cut_and_the_newest_of_each),
    "the oldest first": ("list(range(0, first, 2))[::-1]", "list(range(0, first, 2))", finds),
    "the cache is not cut": ("self._reader.crop(same)\n", "pass\n", cached),
    "all begins alike": ("if a != b)", "if a < 0)", cached),
    "any mark may be said": ("id not in may]", "id in may]", test_nobody_speaks_in_anothers_name),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    old, new, check = FAULTS[fault]
    faulty = planted(dialogue, old, new, monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError, LmbookError)): check(module=faulty)
