# SPDX-License-Identifier: Apache-2.0
"""The closed vocabulary of the tasks.

A tokenizer trained for the tasks holds every word, with its leading space, as one token. No word
is a Python name that is common in source, so that a record differs from the text around it.
"""

_KEYS = """
ant ape arm axe bag bat bay bed bee bell belt bike bird boat bone book boot bowl box bug bus cab
cage cake calf camp cane cap car cart cat cave chin clam claw clay club coal coat cow crab crow
crew cup deer desk dish dog doll door dove drum duck ear eel egg elk elm eye fan farm fawn fig fin
fish flag flea flute foot fox frog fur gate goat goose gull gum hand hare harp hat hawk hen hill
hive hoof horn hut ink jar jay jet jug kite knee lake lamb lamp leaf leg lion lock log lynx mask
mast mice mole moon moose moth mud mug mule nail nest newt nose nut oak oar owl pan paw pea pear
peg pen pig pine pony pond pot pump quail rat raven robe rock roof rope rose rug sail seal shed
sheep ship shoe sock sofa star swan tent toad toy tree tub tuna vase vine wasp well wing wolf worm
wren yak
"""
_VALUES = """
amber beige black blue bronze brown coral cream cyan gold green grey indigo ivory jade khaki lemon
lilac lime mint navy olive orange peach pink plum purple red ruby rust silver tan teal violet
white yellow
"""

KEYS: tuple[str, ...] = tuple(_KEYS.split())
VALUES: tuple[str, ...] = tuple(_VALUES.split())
DIGITS: tuple[str, ...] = tuple("0123456789")
# The first word of a line, without a leading space: fact, decoy, and the three questions.
MARKERS: tuple[str, ...] = ("keep", "skip", "ask", "trace", "add")
