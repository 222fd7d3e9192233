# SPDX-License-Identifier: Apache-2.0
"""Chats in which facts stand far above the questions about them. Knows no files.

A chat is planned for its length: facts and questions first, then as much prose between them as fits.
"""

from collections.abc import Callable
from random import Random

from modelopt_dms.data.mix.facts import Fact, Question, hops, plain, several
from modelopt_dms.data.mix.tables import table, word_list
from modelopt_dms.data.mix.writing import Asked, Document, Turn, Writer

_MAKERS: tuple[tuple[Callable[[Random, set[str]], list[Fact]], float], ...] = (
    (plain, 10),
    (table, 2),
    (word_list, 1),
    (hops, 2),
    (several, 1),
)
# Tokens of context for each fact, so that a long chat has more of them.
_TOKENS_A_FACT = 55
# Tokens between a fact and what is asked about it, where the length allows for it.
_FAR = 320

_OPENINGS = (
    "Please read the following notes. I will ask you about them afterwards.",
    "Here is a document. Keep it in mind, I have questions later.",
    "I collected the following from several places:",
    "Read this carefully.",
    "Below is everything I have on the matter.",
    "This is the text we talked about.",
    "",
    "Here are my notes of this week, unsorted.",
    "I am going to paste a long text now. Some details in it will matter.",
)
_SYSTEMS = (
    "You answer questions about the material below. Answer briefly and use its own words.",
    "You are an assistant of a small office. This is what you know:",
    "Use only the following information to answer.",
    "Background material for this conversation follows. Give short answers.",
    "You are a careful librarian. Remember the following.",
)
_BRIEF = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You answer in as few words as possible.",
)
_ACKNOWLEDGED = (
    "I have read it. What would you like to know?",
    "Understood. Ask me anything about it.",
    "Thank you, I will keep it in mind.",
    "All right.",
    "Noted. Please go on.",
)
_LEADS = (
    *[""] * 12,
    "Question: ",
    "One more thing: ",
    "From the text above: ",
    "Please answer from the notes. ",
    "I forgot, ",
    "Next question. ",
    "Thanks! And ",
    "Without guessing: ",
)
_AFTER = (*[""] * 5, " Answer briefly.", " Only the answer, please.", " Look it up above.")


def chat(writer: Writer) -> Document:
    """A chat with several questions about what stands far above."""
    rng = writer.rng
    taken: set[str] = set()
    wanted = max(1, round(writer.length / _TOKENS_A_FACT * rng.uniform(0.5, 1.3)))
    facts: list[Fact] = []
    # Facts are less than half of the text, else there is no distance between them and the questions.
    room = writer.length * 0.4
    while len(facts) < wanted:
        make = rng.choices([x for x, _ in _MAKERS], [x for _, x in _MAKERS])[0]
        made = make(rng, taken)
        room -= sum(writer.size(x.text) for x in made)
        if room < 0 and facts:
            break
        facts += made
    questions = _choose(rng, facts, max(1, min(8, writer.length // 150)))
    while True:
        document = _write(writer, facts, questions)
        if document is not None:
            return document
        if len(questions) > 1:
            questions = questions[:-1]
        elif len(facts) > 1:
            kept = [x for x in facts if questions[0] in x.questions]
            facts = kept if kept != facts else facts[:1]
        else:
            # So short that not even one fact fits: cut.
            return _write(writer, facts, questions, always=True)  # type: ignore[return-value]


def _choose(rng: Random, facts: list[Fact], count: int) -> list[Question]:
    """Different questions of different facts as far as possible, in an order of their own."""
    first = [rng.choice(x.questions) for x in facts if x.questions]
    rng.shuffle(first)
    texts = {x.text for x in first}
    more = [q for x in facts for q in x.questions if q.text not in texts]
    rng.shuffle(more)
    return [*first, *more][: rng.randrange(max(1, count // 2), count + 1)]


def _write(
    writer: Writer, facts: list[Fact], questions: list[Question], *, always: bool = False
) -> Document | None:
    """The chat, with prose up to the length; None if it is too long without any."""
    rng = writer.rng
    turns = _turns(rng, questions)
    scattered = sum(writer.size(x.text) + 2 for x in facts)
    # The opening, the acknowledgement and the template's own words and marks.
    free = writer.length - writer.size(writer.chat(_frame(rng.choice, "", turns))) - scattered - 48
    if free < 0 and not always:
        return None
    far = min(_FAR, free * 2 // 3) if rng.random() < 0.85 else 0
    before = _sentences(writer, free - far)
    after = _sentences(writer, far)
    text = "\n\n".join(filter(None, (_scatter(rng, before, facts), _join(after))))
    framed = writer.chat(_frame(rng.choice, text, turns))
    asked = tuple(Asked(x.text, x.values) for x in questions)
    return writer.cut(framed, "chat", asked)


def _turns(rng: Random, questions: list[Question]) -> list[Turn]:
    turns: list[Turn] = []
    for question in questions:
        text = question.text
        lead = rng.choice(_LEADS)
        turns += [("user", lead + text + rng.choice(_AFTER)), ("assistant", question.answer)]
    if len(questions) > 2 and rng.random() < 0.4:
        earlier = rng.choice(questions[:-1])
        turns += [
            ("user", f'Earlier I asked: "{earlier.text}" What was your answer?'),
            ("assistant", earlier.answer),
        ]
    return turns


def _frame(choose: Callable[..., str], text: str, turns: list[Turn]) -> list[Turn]:
    """The text as system prompt, as a message of its own, or in front of the first question."""
    form = choose(("system", "message", "message", "first"))
    if form == "system":
        return [("system", f"{choose(_SYSTEMS)}\n\n{text}"), *turns]
    opened = f"{choose(_OPENINGS)}\n\n{text}".strip()
    if form == "message":
        return [("user", opened), ("assistant", choose(_ACKNOWLEDGED)), *turns]
    (role, question), *rest = turns
    return [(role, f"{opened}\n\n{question}"), *rest]


def _sentences(writer: Writer, tokens: int) -> list[str]:
    found = []
    for sentence in writer.prose():
        tokens -= writer.size(sentence) + 1
        if tokens < 0:
            break
        found.append(sentence)
    return found


def _scatter(rng: Random, sentences: list[str], facts: list[Fact]) -> str:
    """Facts in their order at random places among sentences: blocks and lines by themselves, sentences within."""
    text = list(sentences)
    places = sorted(rng.randrange(len(text) + 1) for _ in facts)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        line = fact.block or not fact.text.endswith(".")
        text.insert(place, f"\n{fact.text}\n" if line else fact.text)
    return _join(text)


def _join(sentences: list[str]) -> str:
    """Sentences with spaces between them, and an empty line where one begins or ends with a newline."""
    return "\n\n".join(
        x.strip("\n ")
        for x in " ".join(sentences).replace(" \n", "\n").replace("\n ", "\n").split("\n\n\n")
    )
