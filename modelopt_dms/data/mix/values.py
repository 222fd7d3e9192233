# SPDX-License-Identifier: Apache-2.0
"""Random values for facts: names, numbers, codes, dates, words. Knows no texts."""

import random
import re
import string
from collections.abc import Callable
from typing import Any

_POOLS = {
    "first": """
        Amira Anders Anika Arjun Astrid Bao Bela Bruno Camila Chidi Clara Dalia Darius Elena Emeka Esther Fatima Felix
        Freya Gideon Greta Hana Hassan Helga Ibrahim Imani Ines Ivan Jamal Jana Joaquin Jonas Kaito Keisha Kofi Lars
        Leila Lucia Magnus Malik Marta Mei Milo Nadia Naveen Nora Olga Omar Oscar Paloma Pavel Petra Priya Quentin
        Rashid Renata Rosa Ruben Saskia Sergei Simone Sofia Tariq Tessa Tomas Uma Valentin Vera Viktor Wanda Wei Xenia
        Yara Yusuf Zane Zofia""",
    "last": """
        Abara Achterberg Adeyemi Andersson Banerjee Becker Brennan Castillo Chandra Chowdhury Costa Demir Dubois
        Eriksen Fairchild Farouk Ferreira Fischer Gallo Garrido Grant Haddad Hartmann Hoffman Ibarra Ivanov Jansen
        Kapoor Keller Kimura Kowalski Larsen Lindqvist Lombardi Mahmoud Marlowe Mbeki Meyer Moreau Nakamura Novak
        Nwosu Okafor Oliveira Ortega Petrov Popescu Quispe Reyes Rossi Sandoval Schmidt Silva Sokolov Suzuki Takeda
        Tanaka Thorne Torres Ueda Vargas Vogel Walsh Weber Whitfield Yamada Yilmaz Zhang Zimmer""",
    "city": """
        Aarhus Accra Adelaide Antwerp Bergen Bogota Bologna Brno Calgary Cardiff Chennai Cork Cusco Dakar Dresden
        Durban Galway Gdansk Geneva Ghent Hanoi Havana Izmir Jaipur Kampala Krakow Kyoto Lagos Leeds Lima Lisbon
        Lusaka Malaga Medan Mombasa Montreal Nantes Odense Osaka Oslo Palermo Perth Porto Quito Riga Rotterdam Salta
        Seville Sofia Split Tampere Tbilisi Toledo Tunis Turin Utrecht Valencia Vilnius Windhoek Zagreb""",
    "animal": """
        badger beaver camel chameleon cheetah cormorant coyote donkey dolphin eagle elephant ferret gecko giraffe
        gorilla hedgehog heron ibis iguana jackal kangaroo koala lemur leopard lizard llama lobster marten meerkat
        octopus ostrich otter panther parrot pelican penguin porcupine puffin rabbit raccoon salamander scorpion
        squirrel stork swallow tiger tortoise toucan vulture walrus weasel wombat woodpecker""",
    "thing": """
        accordion armchair backpack barometer bicycle binoculars blanket bookcase bracelet briefcase bucket camera
        canoe carpet cello chandelier chessboard compass dictionary drill easel fountain globe gramophone harmonica
        helmet ladder lantern mandolin microscope mirror necklace notebook painting parasol piano printer projector
        radio rucksack scooter screwdriver shovel sofa spanner stapler suitcase tapestry telescope thermos toaster
        tripod trombone typewriter vacuum wardrobe wheelbarrow whistle""",
    "food": """
        almonds apricots asparagus aubergines barley basil beetroot blueberries broccoli cabbage cardamom carrots
        cashews celery chickpeas chives cinnamon coconut coriander cranberries cucumbers cumin dates dill fennel figs
        flour garlic ginger hazelnuts honey kale leeks lentils mangoes millet mushrooms mustard oats olives onions
        oregano papayas paprika parsley parsnips peaches pears pistachios plums potatoes pumpkin quinoa radishes
        raisins rhubarb rice rosemary saffron sage sesame spinach sugar thyme tofu tomatoes turmeric vanilla vinegar
        yogurt""",
    "colour": """
        amber azure beige black bronze brown burgundy charcoal coral cream crimson cyan emerald golden grey indigo
        ivory khaki lavender lilac magenta maroon mauve navy ochre olive orange pink purple red rust scarlet silver
        teal turquoise violet white yellow""",
    "material": """
        aluminium bamboo brass canvas cedar ceramic cork cotton felt flax glass granite leather linen marble nylon
        oak pine plaster plywood porcelain rubber sandstone silk slate steel suede teak tin titanium velvet walnut
        wax wicker wool zinc""",
    "job": """
        accountant anaesthetist archivist baker beekeeper bookbinder carpenter cartographer chemist choreographer
        conductor curator dentist draughtsman electrician farmer florist geologist glazier gardener interpreter
        jeweller journalist librarian locksmith machinist midwife musician notary nurse optician pharmacist plumber
        potter radiologist sculptor surveyor tailor translator veterinarian watchmaker welder""",
    "subject": """
        acoustics algebra anatomy archaeology astronomy botany calligraphy ceramics climatology cryptography ecology
        economics epidemiology ethics genetics geometry grammar history hydrology immunology linguistics logic
        mechanics meteorology mineralogy navigation optics painting philosophy phonetics robotics sociology
        statistics thermodynamics topology toxicology zoology""",
    "team": """
        accounting archives billing catering compliance design dispatch drainage engineering events forestry
        fundraising heritage housing inspection insurance irrigation kitchen legal logistics maintenance marketing
        outreach packaging payroll planning procurement publishing recruitment research roads safety sales security
        shipping support training transport warehouse""",
    "key": """
        archive_depth backlog_limit batch_rows burst_quota cache_slots chunk_bytes cluster_name crawl_delay
        default_locale disk_reserve drain_period flush_every frame_rate grace_hours heap_ceiling idle_cutoff
        index_shards join_limit keepalive_gap lease_days log_prefix max_retries mirror_host node_label packet_size
        poll_interval pool_width probe_port purge_after queue_depth read_ahead region_tag relay_port replica_count
        retry_delay sample_every scan_window seed_value session_ttl shard_key spool_folder stale_after sync_token
        thread_cap trace_level upload_cap vault_path wait_budget warmup_steps worker_count""",
    "variable": """
        alpha bound bucket budget cursor delta depth epoch factor flag gain gap height index kappa label lambda_ level
        limit margin mass mode offset omega phase pivot quota radius rank ratio root score shift sigma slope span step
        theta token total unit velocity weight width zeta""",
    "verb": """
        adjust align append archive assemble blend bundle clamp classify collect compare compose convert decode derive
        dispatch encode estimate expand extract fetch filter flatten group insert inspect label locate measure merge
        normalize partition predict project prune rebuild reduce register render resolve restore rotate sample scale
        schedule shuffle split summarize translate trim update validate verify""",
    "noun": """
        account address archive bundle calendar catalog channel cluster column contract counter customer digest
        document edge entry event field forecast grid header image invoice journal ledger matrix message node order
        packet page payload pixel profile quota record region report request route sample schema segment session
        signal snapshot station stream summary ticket token tree vector voucher window""",
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
}
POOLS: dict[str, tuple[str, ...]] = {name: tuple(words.split()) for name, words in _POOLS.items()}
_SYLLABLES = """
b br c cl d dr f fl g gr h j k kr l m n p pr qu r s sk st t tr v w z
a ai au e ea ee i ia o oa ou u
ck d ft l ld lm m n nd ng nt p r rd rk rn rt s sk ss st th x
"""
_STARTS, _MIDDLES, _ENDS = (x.split() for x in _SYLLABLES.strip().splitlines())
_TAILS = ("", "", "", "ia", "ton", "by", "dale", "holm", "ara", "ix", "wick", "more", "o", "et")


def digits(rng: random.Random, count: int) -> str:
    """A number of so many digits that does not begin with 0."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def name(rng: random.Random) -> str:
    """A word that does not exist, "Krauldton"."""
    syllables = rng.choice((1, 2, 2))
    word = "".join(rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(syllables))
    return (word + rng.choice(_ENDS) + rng.choice(_TAILS)).capitalize()


def _letters(rng: random.Random, count: int, letters: str = string.ascii_uppercase) -> str:
    return "".join(rng.choice(letters) for _ in range(count))


def _code(rng: random.Random) -> str:
    """A code of one of the many forms that people give to codes."""
    forms: list[Callable[[], str]] = [
        lambda: f"{_letters(rng, 2)}-{digits(rng, 4)}",
        lambda: f"{_letters(rng, 3)}{digits(rng, 3)}",
        lambda: f"{digits(rng, 3)}-{digits(rng, 3)}-{_letters(rng, 1)}",
        lambda: f"{_letters(rng, 1)}{digits(rng, 2)}/{digits(rng, 3)}",
        lambda: _letters(rng, 6, string.ascii_uppercase + string.digits),
        lambda: _letters(rng, 8, "0123456789abcdef"),
        lambda: f"{rng.choice(POOLS['animal'])}-{rng.choice(POOLS['thing'])}-{digits(rng, 2)}",
        lambda: f"#{digits(rng, 5)}",
    ]
    return rng.choice(forms)()


def _date(rng: random.Random) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(POOLS['month'])}"


def _phrase(rng: random.Random) -> str:
    picked = [rng.choice(POOLS[x]) for x in ("colour", "animal", "material", "thing")]
    return " ".join(picked[: rng.choice((2, 3, 4))])


# What is not a word of a pool.
_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "person": lambda r: f"{r.choice(POOLS['first'])} {r.choice(POOLS['last'])}",
    "name": name,
    "company": lambda r: (
        f"{name(r)} {r.choice(('Ltd', 'Group', 'Partners', 'Works', 'Foods', 'Systems'))}"
    ),
    "street": lambda r: (
        f"{r.randrange(1, 240)} {name(r)} {r.choice(('Street', 'Road', 'Lane', 'Avenue', 'Square'))}"
    ),
    "code": _code,
    "phrase": _phrase,
    "date": _date,
    "year": lambda r: str(r.randrange(1780, 2025)),
    "time": lambda r: f"{r.randrange(24):02}:{r.randrange(60):02}",
    "price": lambda r: f"${r.randrange(2, 900)}.{r.randrange(100):02}",
    "phone": lambda r: f"{digits(r, 3)}-{digits(r, 3)}-{digits(r, 4)}",
    "ip": lambda r: ".".join(str(r.randrange(1, 255)) for _ in range(4)),
    "port": lambda r: str(r.randrange(1024, 65000)),
    "small": lambda r: str(r.randrange(3, 30)),
    "two": lambda r: digits(r, 2),
    "three": lambda r: digits(r, 3),
    "four": lambda r: digits(r, 4),
    "five": lambda r: digits(r, 5),
    "number": lambda r: digits(r, r.randrange(2, 9)),
    "decimal": lambda r: f"{r.randrange(1, 100)}.{r.randrange(10, 100)}",
    "email": lambda r: (
        f"{r.choice(POOLS['first']).lower()}.{r.choice(POOLS['last']).lower()}@{name(r).lower()}.org"
    ),
    "path": lambda r: (
        f"/{r.choice(('srv', 'opt', 'var', 'home', 'mnt'))}/{name(r).lower()}/{r.choice(POOLS['noun'])}"
    ),
    "version": lambda r: f"{r.randrange(1, 12)}.{r.randrange(20)}.{r.randrange(40)}",
    "room": lambda r: f"{r.choice('ABCDEFG')}{digits(r, 3)}",
    "value": lambda r: r.choice((digits, _worded))(r, r.randrange(2, 6)),
    "function": lambda r: f"{r.choice(POOLS['verb'])}_{r.choice(POOLS['noun'])}",
}


def _worded(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(POOLS["noun"]) for _ in range(1 + count % 3))


class Draw(dict[str, Any]):
    """Values by the name of a slot, {city} or {city2}, drawn when first asked for and kept.

    No value of any slot is drawn twice as long as `taken` is shared, so that a question has one answer.
    """

    def __init__(self, rng: random.Random, taken: set[str]) -> None:
        """Draw from `rng`, and nothing that is in `taken`."""
        super().__init__()
        self.rng, self.taken = rng, taken

    def __missing__(self, slot: str) -> str:
        """A new value for a slot."""
        kind = slot.rstrip("0123456789")
        for _ in range(200):
            value = self.rng.choice(POOLS[kind]) if kind in POOLS else _MAKERS[kind](self.rng)
            if value.casefold() not in self.taken:
                break
        self.taken.add(value.casefold())
        self[slot] = value
        return value

    def fill(self, template: str) -> str:
        """A template with its slots filled, and "an" where it belongs."""
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format_map(self))
