# SPDX-License-Identifier: Apache-2.0
"""Documents without facts: prose, code, and passages that are repeated after other text."""

from modelopt_dms.data.mix.content import PHRASES
from modelopt_dms.data.mix.writing import Asked, Document, Writer, join


def prose(writer: Writer) -> Document:
    """Paragraphs of English up to the length."""
    return writer.cut(join(writer.pick(writer.prose(), writer.length + 200)), "prose", special=True)


def code(writer: Writer) -> Document:
    """Python source that begins with a definition, up to the length."""
    text = ""
    for piece in writer.code():
        text += piece
        if len(text) > writer.length * 8:
            break
    return writer.cut(text[: writer.length * 8], "code", special=True)


def repeat(writer: Writer) -> Document:
    """A passage of 150 to 400 tokens, other text, and the passage again; shorter ones where the length is short."""
    rng = writer.rng
    room = writer.length - 110
    size = max(16, min(rng.randrange(150, 401), room * 2 // 5))
    passage = writer.passage(size)
    while not passage:
        passage = writer.passage(size)
    between = join(writer.pick(writer.prose(), room - 2 * writer.size(passage)))
    remember, ask = rng.choice(PHRASES["passage_remember"]), rng.choice(PHRASES["passage_ask"])
    turns = [
        ("user", f"{remember}\n\n{passage}"),
        ("assistant", rng.choice(PHRASES["passage_stored"])),
    ]
    if between:
        turns += [
            ("user", f"{rng.choice(PHRASES['passage_other'])}\n\n{between}"),
            ("assistant", rng.choice(PHRASES["passage_seen"])),
        ]
    turns += [("user", ask), ("assistant", passage)]
    return writer.cut(writer.chat(turns), "repeat", (Asked(ask, (passage,)),))
