# SPDX-License-Identifier: Apache-2.0
"""Chats in which facts stand far above the questions about them.

A chat is planned for its length: facts and questions first, then as much prose between them as fits.
"""

from collections.abc import Callable
from random import Random

from modelopt_dms.data.mix.content import PHRASES
from modelopt_dms.data.mix.facts import Fact, Question, hops, plain, several
from modelopt_dms.data.mix.tables import table, word_list
from modelopt_dms.data.mix.writing import Asked, Document, Turn, Writer, join

Maker = Callable[[Random, set[str]], list[Fact]]

_MAKERS: tuple[Maker, ...] = (plain, table, word_list, hops, several)
_WEIGHTS = (10, 2, 1, 2, 1)
# Tokens of context for each fact, so that a long chat has more of them.
_TOKENS_A_FACT = 55
# Facts are less than half of the text, else there is no distance between them and the questions.
_FACTS_SHARE = 0.35
# Tokens between facts and the first question, where the length allows for it, and how often.
_FAR, _FAR_SHARE = 330, 0.85
_TOKENS_A_QUESTION = 130
_MOST_QUESTIONS = 12


def chat(writer: Writer) -> Document:
    """A chat with several questions about what stands far above."""
    rng = writer.rng
    groups = _draw_facts(writer)
    most = max(1, min(_MOST_QUESTIONS, writer.length // _TOKENS_A_QUESTION))
    questions = _choose(rng, groups, rng.randrange((most + 1) // 2, most + 1))
    while True:
        turns = _turns(rng, questions)
        frame = _frame(rng)
        facts = sum(writer.size(fact.text) + 2 for group in groups for fact in group)
        free = writer.length - writer.size(writer.chat(frame("", turns))) - facts
        # Where not even one fact and question fit, the end is cut.
        if free >= 0 or (len(questions) == 1 and len(groups) == 1):
            break
        questions = questions[:-1] or questions
        needed = [x for x in groups if any(q in f.questions for f in x for q in questions)]
        groups = needed if len(questions) == 1 else groups
    prose = writer.pick(writer.prose(), free)
    far = min(_FAR, free * 4 // 5) if rng.random() < _FAR_SHARE else 0
    placed = [
        (depth, fact)
        for group in groups
        for depth, fact in zip(sorted(rng.random() for _ in group), group, strict=True)
    ]
    while True:
        text = writer.chat(frame(_scatter(writer, prose, placed, far), turns))
        if not prose or len(writer.encode(text)) <= writer.length:
            return writer.cut(text, "chat", tuple(Asked(x.text, x.values) for x in questions))
        prose.pop()


def _draw_facts(writer: Writer) -> list[list[Fact]]:
    """Groups of facts that belong together, as many as the length has room for; at least one has a question."""
    rng = writer.rng
    wanted = max(1, round(writer.length / _TOKENS_A_FACT * rng.uniform(0.5, 1.3)))
    room = writer.length * _FACTS_SHARE
    groups: list[list[Fact]] = []
    if writer.length >= 600 and rng.random() < 0.3:
        groups.append([_paragraph(writer)])
    while sum(map(len, groups)) < wanted:
        group = rng.choices(_MAKERS, _WEIGHTS)[0](rng, writer.taken)
        room -= sum(writer.size(x.text) for x in group)
        if room < 0 and groups:
            break
        groups.append(group)
    return groups


def _paragraph(writer: Writer) -> Fact:
    """A paragraph of prose that is asked back word for word."""
    pieces: list[str] = []
    for piece in writer.prose():
        if piece.startswith("\n") and 40 <= writer.size(join(pieces)) <= 130:
            break
        pieces = [piece] if piece.startswith("\n") else [*pieces, piece]
    text = join(pieces)
    beginning = " ".join(text.split()[:6])
    ask = writer.rng.choice(PHRASES["ask_for_paragraph"])
    return Fact(text, (Question(ask.format(beginning), text, (text,)),), block=True)


def _choose(rng: Random, groups: list[list[Fact]], count: int) -> list[Question]:
    """Questions about different facts as far as possible, in an order of their own."""
    facts = [x for group in groups for x in group if x.questions]
    rng.shuffle(facts)
    first = [rng.choice(x.questions) for x in facts]
    more = [q for x in facts for q in x.questions if q not in first]
    rng.shuffle(more)
    return [*first, *more][:count]


def _turns(rng: Random, questions: list[Question]) -> list[Turn]:
    turns: list[Turn] = []
    for question in questions:
        bare = question.answer.rstrip(".") in question.values
        text = (
            rng.choice(PHRASES["question_leads"])
            + question.text
            + rng.choice(PHRASES["after_question" if bare else "after_any_question"])
        )
        turns += [("user", text), ("assistant", question.answer)]
    if len(questions) > 2 and rng.random() < 0.4:
        turns += _follow_up(rng, questions)
    return turns


def _follow_up(rng: Random, questions: list[Question]) -> list[Turn]:
    """A question about the conversation itself."""
    earlier = rng.choice(questions[:-1])
    asked, answer = rng.choice(
        (
            (f"Earlier I asked you: {earlier.text} What was your answer?", earlier.answer),
            ("What was the first thing that I asked about the text?", questions[0].text),
            ("Please repeat your first answer.", questions[0].answer),
            ("How many questions did you answer so far?", str(len(questions))),
        )
    )
    return [("user", asked), ("assistant", answer)]


def _frame(rng: Random) -> Callable[[str, list[Turn]], list[Turn]]:
    """The text as system prompt, as a message of its own, as several, or in front of the first question."""
    opening, system = rng.choice(PHRASES["chat_openings"]), rng.choice(PHRASES["chat_systems"])
    parts = rng.choice((1, 1, 2, 3))
    more = [rng.choice(PHRASES["chat_more"]) for _ in range(parts - 1)]
    acknowledged = rng.sample(PHRASES["chat_acknowledged"], parts)

    def in_system(text: str, turns: list[Turn]) -> list[Turn]:
        return [("system", f"{system}\n\n{text}"), *turns]

    def before_question(text: str, turns: list[Turn]) -> list[Turn]:
        (role, question), *rest = turns
        return [(role, f"{opening}\n\n{text}\n\n{question}".strip()), *rest]

    def in_messages(text: str, turns: list[Turn]) -> list[Turn]:
        before: list[Turn] = []
        for head, part, answer in zip(
            [opening, *more], _parts(text, parts), acknowledged, strict=True
        ):
            before += [("user", f"{head}\n\n{part}".strip()), ("assistant", answer)]
        return [*before, *turns]

    return rng.choice((in_system, before_question, in_messages, in_messages))


def _parts(text: str, count: int) -> list[str]:
    """A text cut into parts of about the same number of paragraphs."""
    paragraphs = text.split("\n\n")
    borders = [len(paragraphs) * i // count for i in range(count + 1)]
    return ["\n\n".join(paragraphs[a:b]) for a, b in zip(borders, borders[1:], strict=False)]


def _scatter(writer: Writer, prose: list[str], placed: list[tuple[float, Fact]], far: int) -> str:
    """Facts at their depths among sentences, 0 to 1, where 1 is `far` tokens or more before the end."""
    last = len(prose)
    while last > 0 and far > 0:
        last -= 1
        far -= writer.size(prose[last])
    pieces = list(prose)
    for depth, fact in reversed(sorted(placed, key=lambda x: x[0])):
        place = int(depth * (last + 1))
        alone = fact.block or not fact.text.endswith((".", "!")) or fact.text.endswith("...")
        # A block does not stand within a paragraph.
        while alone and 0 < place < len(prose) and not prose[place].startswith("\n"):
            place -= 1
        pieces.insert(place, f"\n\n{fact.text}\n\n" if alone else fact.text)
    return join(pieces)
