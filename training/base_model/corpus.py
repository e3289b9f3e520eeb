"""Text for the base model: schemas, prose about their rows, SQL scripts with comments, lists of questions. No answers.

Questions stand in lists of their own, so the base knows how people ask and that a question follows a question; it never
sees one answered, nor the chat form.

Tables and columns are named from word lists and from invented words, values are invented names, so the only way to predict
a query is to read the schema and the comment above it. No table name, and no column name but the few that the task
shares on purpose, is one of the text-to-SQL task's own; `test_corpus` in tests/training holds that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from burnish.data.text_to_sql import domains
from burnish.data.text_to_sql.generate import question_of
from burnish.data.text_to_sql.queries import draw_draft
from burnish.data.text_to_sql.schema import Column, Database, Table, TableKind, draw_code, draw_database, parse_worlds

NOUNS = (
    "acid album alley anchor angle apple apron arch armor atlas attic badge bag ball balloon bandage banner barn barrel basin "
    "basket bath battery bead beam bean bear bed bee bell belt bench bike bird blade blanket block boat bolt bone bonus boot "
    "border bottle bowl box branch brand bread brick brush bucket bud bulb bus button cabin cabinet cable cage cake camera "
    "canal candle cannon canvas cap car card carpet cart case cave cell chain chair chapter chart cheese chef chest chip "
    "choir church cinema class clerk client cliff clock cloud club coach coal coast coat coffee coin collar colony column "
    "comb contract cookie copper cord corn corner cotton couch counter country crane crate crop cross crown cube cup curtain "
    "customer dam deck deer deposit desk device diamond dial diary dinner disk doll dollar door draft drawer dress drill "
    "drink driver drum duck dust eagle ear egg elbow employee entry envelope event fabric fan fence ferry festival field file "
    "film filter finger fire flag flame flask fleet flock floor flower fold forum fossil fountain fox frame freezer fruit "
    "fuel fund game gate gear gem gift glass glove goal gown grain graph grid guard guest guide guitar hall harvest hat "
    "helmet herb hill hinge hive hook horn horse hose house hunter image ink inspector invoice iron item jacket jar jewel job "
    "jungle jury key kite kitchen knife knot ladder lake lamp lane laser lawyer leaf lease leather lecture lemon lens lesson "
    "level lever license lid lift light line lion liquid loan lock locker loop lottery lunch maple map marker market mask match "
    "meal medal meeting member menu metal meter mill minister mission mixer model module monitor motor mouse movement mug nail "
    "nest net network node note nurse oak oil olive onion order organ oven owl owner package packet paint palace panel "
    "paper parade partner passenger path patrol payment pea peach pearl pen pencil permit phone photo piano picture pig pilot "
    "pin pipe pirate plane planet plate platform plaza plug pocket poem pole policy pond pool port post pot potato prize "
    "program project pump puppet purse puzzle queue quilt rabbit race radio rail rain ranch rack receipt recipe record region "
    "rent report rice ride ring road robot rocket roof room root rope route rug ruler sail salad salt sample sand sauce scale "
    "scarf scene score screen seal season seat sector seed sensor server session shed sheet shelf shell shield shirt shore "
    "sign signal silk sink skill skirt sled sleeve slide soap sock sofa soil soldier song soup spice spoon spring stage stair "
    "stamp star station statue step stick stool storm story stove strap straw stream string suit supplier survey sword table "
    "tag tail tailor tape target task taxi tea tent test thread ticket tide tile timber tire toast token tool tooth torch "
    "tour towel tower toy track tractor trade train trap tray treaty tree tribe trick trip trophy truck trunk tube tunnel "
    "turbine umbrella uniform union unit user valley valve van vase vault vehicle vendor village violin visitor voice volcano "
    "vote voyage wage wagon wall wallet watch wave wheel whistle wing wire witness wolf wool worker yacht yard zone"
).split()
ADJECTIVES = (
    "active actual annual average base best blue bold brief bright broad calm central cheap civil clean clear closed cold "
    "common cool daily dark dead deep direct double dry early east empty equal even exact extra fair fast final fine firm "
    "first flat formal free fresh full future general global good grand gray green gross half hard heavy high hot inner "
    "joint junior large last late left legal light local long loose loud low main major medium minor modern monthly narrow "
    "native near net new next north novel official old open outer past peak plain plus prime private proper public pure quick "
    "rare raw real red regular remote rich right rough round royal rural safe second senior sharp short simple single slow "
    "small smart smooth social soft solid south spare special standard steep strict strong tall thick thin third tight tiny "
    "top total true upper urban usual vast visible warm weak weekly west wet white whole wide winter young"
).split()
MEASURES = (
    "amount area balance bonus budget charge count credit debt degree demand density discount dose energy fee force gain grade "
    "hours income index interest intensity level limit load loss margin mass minutes number output percent period points "
    "position pressure profit quantity quota range rank rate ratio revenue score share strength supply tax temperature total "
    "toll value volume wage width yield price age weight height length speed size capacity salary cost distance duration"
).split()
ROLES = (
    "admin agent analyst assistant author boss buyer chair chief citizen client colleague contact creator critic deputy "
    "designer donor emperor expert father friend governor guardian inventor king lawyer leader maker manager mayor member "
    "mentor mother officer owner painter partner planner poet president prince queen sailor secretary seller sender sponsor "
    "student subscriber teammate tenant tester trainer translator tutor user vendor winner writer"
).split()
PLACES = "area base center city corner country depot district home hub island location origin place port province region site spot state station town village zone".split()
LABELS = "alias brand caption code field format group heading label mode model motto name option phase shape state status style symbol tag term topic type variety".split()
FIRST = (
    "Adam Alice Amir Andrea Arthur Ben Bianca Carl Chloe Daniel Diana Emil Emma Eric Eva Fred Gina Hans Hugo Ida Jack Jane "
    "Jim Karen Ken Lara Leo Lily Lucy Marco Mary Max Mia Nick Nina Omar Pam Paul Rita Robert Sam Sara Steve Tim Tom Vince"
).split()
_ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sp st str t th tr v w y z".split()
_VOWELS = "a a a e e e i i o o u ai ea ee ie oa oo ou".split()
_ENDS = "b ck d f g k l ll m n n n nd ng nt p r r rd rk rt s s ss st t t th x".split() + [""] * 12

_TASK_WORLDS = [world for text in (domains.TRAIN_WORLDS, domains.VALIDATION_WORLDS, domains.TEST_WORLDS) for world in parse_worlds(text)]
TASK_TABLES = frozenset(kind.name for world in _TASK_WORLDS for kind in world)
TASK_COLUMNS = frozenset(column.name for world in _TASK_WORLDS for kind in world for column in kind.columns) - domains.SHARED_COLUMNS
RESERVED = TASK_TABLES | TASK_COLUMNS
_SQL_WORDS = frozenset("order group table index key left right cross union set values case join on in to by as is not and or limit from where select".split())


def invented_word(rng: random.Random, *, syllables: int | None = None) -> str:
    """A pronounceable word that means nothing."""
    count = syllables or rng.choice((1, 2, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + (rng.choice(_ENDS) if rng.random() < 0.6 else "") for _ in range(count))


class InventedWords:
    """Values for the corpus: mostly invented, some English."""

    def draw(self, kind: str, rng: random.Random) -> str:
        if kind == "person":
            first = rng.choice(FIRST) if rng.random() < 0.4 else invented_word(rng).capitalize()
            return f"{first} {invented_word(rng, syllables=2).capitalize()}"
        if kind == "title":
            first = rng.choice(ADJECTIVES) if rng.random() < 0.5 else invented_word(rng)
            second = rng.choice(NOUNS) if rng.random() < 0.5 else invented_word(rng)
            return f"{first.capitalize()} {second.capitalize()}"
        if kind == "code":
            return draw_code(rng)
        word = rng.choice(NOUNS) if rng.random() < 0.15 else invented_word(rng)
        return f"{word.capitalize()} {rng.choice(NOUNS).capitalize()}" if rng.random() < 0.15 else word.capitalize()


def _word(words: list[str], rng: random.Random, *, invented: float = 0.25) -> str:
    return invented_word(rng) if rng.random() < invented else rng.choice(words)


def _identifier(draw, rng: random.Random, taken: set[str]) -> str:
    while True:
        name = draw()
        if name not in taken and name not in RESERVED and name not in _SQL_WORDS and len(name) > 2:
            taken.add(name)
            return name


def draw_column(rng: random.Random, taken: set[str]) -> Column:
    """A column with an English-looking or invented name."""
    kind = rng.choice(("person", "place", "org", "title", "code", "choice", "choice", "int", "int", "int", "int", "real", "year", "date"))
    before = lambda tail: f"{_word(NOUNS if rng.random() < 0.6 else ADJECTIVES, rng)}_{tail}"  # noqa: E731
    tails = {
        "person": lambda: rng.choice(ROLES), "place": lambda: rng.choice(PLACES), "org": lambda: rng.choice(("firm", "company", "sponsor", "agency", "vendor", "maker")),
        "title": lambda: rng.choice(("name", "title", "label", "caption", "heading")), "code": lambda: rng.choice(("code", "number", "key", "serial", "tag")),
        "choice": lambda: rng.choice(LABELS), "int": lambda: rng.choice(MEASURES), "real": lambda: rng.choice(MEASURES), "year": lambda: rng.choice(("year", "season", "start", "end")),
        "date": lambda: rng.choice(("date", "day", "deadline", "start")),
    }  # fmt: skip

    def draw() -> str:
        roll = rng.random()
        if kind == "int" and roll < 0.25:
            return _word(NOUNS, rng) + "s"
        if roll < 0.5:
            return before(tails[kind]())
        if roll < 0.7:
            return tails[kind]()
        return _word(NOUNS, rng, invented=0.4)

    name = _identifier(draw, rng, taken)
    if kind == "choice":
        return Column(name=name, kind=kind, choices=tuple(dict.fromkeys(_word(NOUNS + ADJECTIVES, rng, invented=0.4) for _ in range(rng.randint(3, 5)))))
    if kind == "year":
        return Column(name=name, kind=kind, low=rng.choice((1000, 1700, 1900, 1950)), high=2024)
    if kind == "date":
        return Column(name=name, kind=kind, low=1990, high=2024)
    low = rng.choice((0, 1, 2, 5, 10, 40, 100))
    return Column(name=name, kind=kind, low=low, high=low + rng.choice((30, 60, 90, 400, 900, 5000, 90000)))


def draw_world(rng: random.Random) -> list[TableKind]:
    """A parent table and a child."""
    names: set[str] = set()
    kinds = []
    for _ in range(2):
        draw = lambda: _word(NOUNS, rng) if rng.random() < 0.85 else f"{_word(ADJECTIVES, rng)}_{rng.choice(NOUNS)}"  # noqa: E731
        name = _identifier(draw, rng, names)
        taken: set[str] = set()
        columns = tuple(draw_column(rng, taken) for _ in range(rng.randint(3, 5)))
        kinds.append(TableKind(name=name, parent=kinds[0].name if kinds else None, columns=columns))
    return kinds


def _comment(phrase: str, rng: random.Random) -> str:
    bare = phrase.removeprefix("the ") if rng.random() < 0.4 else phrase
    text = rng.choice(("{}", "{}", "{}", "select {}", "get {}", "returns {}", "query for {}", "this gives {}")).format(bare)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text += "."
    return text


def script(database: Database, rng: random.Random) -> str:
    """A schema followed by queries, each under a comment or followed by an explanation."""
    blocks = [database.schema]
    explained = rng.random() < 0.15
    opening, closing = rng.choice((("-- ", ""), ("-- ", ""), ("/* ", " */"), ("# ", "")))
    for _ in range(rng.randint(3, 6)):
        draft = draw_draft(database, rng)
        comment = opening + _comment(draft.phrase, rng) + closing
        end = ";" if rng.random() < 0.8 else ""
        blocks.append(f"{draft.sql}{end}\n{comment}" if explained else f"{comment}\n{draft.sql}{end}")
    return rng.choice(("\n", "\n\n")).join(blocks)


def prose(database: Database, rng: random.Random) -> str:
    """A schema, some of its rows as statements, and sentences that say the same."""
    table: Table = rng.choice(database.tables)
    rows = rng.sample(list(table.rows), min(len(table.rows), rng.randint(2, 4)))
    inserts = [statement for statement, row in zip(table.insert_statements(), table.rows) if row in rows]
    sentences = []
    for row in rows:
        facts = [f"{column.phrase} {row[1 + index]}" for index, column in enumerate(table.columns)]
        name = table.name.replace("_", " ")
        form = rng.choice(("The {t} {i} has {f}.", "There is a {t} with {f}.", "{t} {i}: {f}.", "One of the {p} has {f}."))
        sentences.append(form.format(t=name, i=row[0], p=table.plural, f=", ".join(facts)))
    known = f"Every {table.name.replace('_', ' ')} has {', '.join(column.phrase_with_article for column in table.columns)}."
    parts = [table.create_statement(), known, *inserts, " ".join(sentences)]
    if rng.random() < 0.3:
        parts = [known, table.create_statement(), " ".join(sentences)]
    return "\n".join(parts)


def questions(database: Database, rng: random.Random) -> str:
    """A schema and a list of questions about it."""
    name = database.tables[0].plural
    heads = ("Questions", "Questions:", "What people ask:", f"Some questions about {name}", f"Questions about the {name}:", "")
    mark = rng.choice(("- ", "* ", "", "", "", "{}. ", "{}) "))
    asked = [question_of(draw_draft(database, rng), rng) for _ in range(rng.randint(4, 8))]
    lines = [mark.format(number) + question for number, question in enumerate(asked, start=1)]
    head = rng.choice(heads)
    gap = rng.choice(("\n", "\n\n"))
    return gap.join([database.schema, *([head] if head else []), rng.choice(("\n", "\n", "\n\n")).join(lines)])


def documents(seed: int, *, question_share: float = 0.0) -> Iterator[str]:
    """Documents without end; this share of them are lists of questions."""
    rng = random.Random(f"burnish-base/{seed}/{question_share}" if question_share else f"burnish-base/{seed}")
    words = InventedWords()
    while True:
        database = draw_database(draw_world(rng), num_tables=2 if rng.random() < 0.35 else 1, words=words, rng=rng)
        if rng.random() < question_share:
            yield questions(database, rng)
        else:
            yield script(database, rng) if rng.random() < 0.85 else prose(database, rng)
