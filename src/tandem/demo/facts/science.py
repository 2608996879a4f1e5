"""Chemical elements, units and planets."""

from __future__ import annotations

from tandem.demo.facts.fact import Relation

_ELEMENTS = (
    ("hydrogen", "H", "1"),
    ("helium", "He", "2"),
    ("lithium", "Li", "3"),
    ("boron", "B", "5"),
    ("carbon", "C", "6"),
    ("nitrogen", "N", "7"),
    ("oxygen", "O", "8"),
    ("fluorine", "F", "9"),
    ("neon", "Ne", "10"),
    ("sodium", "Na", "11"),
    ("magnesium", "Mg", "12"),
    ("aluminium", "Al", "13"),
    ("silicon", "Si", "14"),
    ("phosphorus", "P", "15"),
    ("sulfur", "S", "16"),
    ("chlorine", "Cl", "17"),
    ("argon", "Ar", "18"),
    ("potassium", "K", "19"),
    ("calcium", "Ca", "20"),
    ("titanium", "Ti", "22"),
    ("chromium", "Cr", "24"),
    ("iron", "Fe", "26"),
    ("cobalt", "Co", "27"),
    ("nickel", "Ni", "28"),
    ("copper", "Cu", "29"),
    ("zinc", "Zn", "30"),
    ("bromine", "Br", "35"),
    ("silver", "Ag", "47"),
    ("tin", "Sn", "50"),
    ("iodine", "I", "53"),
    ("tungsten", "W", "74"),
    ("platinum", "Pt", "78"),
    ("gold", "Au", "79"),
    ("mercury", "Hg", "80"),
    ("lead", "Pb", "82"),
    ("radon", "Rn", "86"),
    ("uranium", "U", "92"),
)

SYMBOLS = Relation(
    name="symbol",
    rows=tuple((name, symbol) for name, symbol, _ in _ELEMENTS),
    questions=(
        "What is the chemical symbol of {s}?",
        "Which letters stand for {s} in chemistry?",
        "How do chemists write {s}?",
    ),
    answer="The chemical symbol of {s} is {v}.",
    statements=("Chemists write {s} as {v}.", "In chemistry {v} stands for {s}."),
)

ATOMIC_NUMBERS = Relation(
    name="atomic-number",
    rows=tuple((name, number) for name, _, number in _ELEMENTS),
    questions=(
        "What is the atomic number of {s}?",
        "How many protons does an atom of {s} have?",
        "Which number does {s} have in the periodic table?",
    ),
    answer="The atomic number of {s} is {v}.",
    statements=(
        "An atom of {s} has this many protons: {v}.",
        "In the periodic table {s} has the number {v}.",
    ),
)

SI_UNITS = Relation(
    name="unit",
    rows=(
        ("force", "the newton"),
        ("energy", "the joule"),
        ("power", "the watt"),
        ("pressure", "the pascal"),
        ("frequency", "the hertz"),
        ("electric current", "the ampere"),
        ("voltage", "the volt"),
        ("electrical resistance", "the ohm"),
        ("electric charge", "the coulomb"),
        ("temperature", "the kelvin"),
        ("length", "the metre"),
        ("mass", "the kilogram"),
        ("time", "the second"),
        ("luminous intensity", "the candela"),
    ),
    questions=(
        "What is the unit of {s}?",
        "In which unit is {s} measured?",
        "Which unit do physicists use for {s}?",
    ),
    answer="The unit of {s} is {v}.",
    statements=("Physicists measure {s} in this unit: {v}.", "{v} is the unit of {s}."),
)

MEASURES = Relation(
    name="measure",
    rows=(
        ("seconds in a minute", "60", "sixty"),
        ("minutes in an hour", "60", "sixty"),
        ("hours in a day", "24", "twenty-four"),
        ("days in a week", "7", "seven"),
        ("months in a year", "12", "twelve"),
        ("years in a century", "100", "hundred"),
        ("years in a decade", "10", "ten"),
        ("grams in a kilogram", "1000", "thousand"),
        ("centimetres in a metre", "100", "hundred"),
        ("millimetres in a centimetre", "10", "ten"),
        ("inches in a foot", "12", "twelve"),
        ("feet in a yard", "3", "three"),
        ("degrees in a right angle", "90", "ninety"),
        ("degrees in a full circle", "360"),
        ("items in a dozen", "12", "twelve"),
    ),
    questions=("How many {s}?", "What is the number of {s}?", "Can you count the {s}?"),
    answer="The number of {s} is {v}.",
    statements=("There are this many {s}: {v}.", "Count the {s} and you get {v}."),
)

PLANETS = Relation(
    name="planet",
    rows=(
        ("first", "Mercury"),
        ("second", "Venus"),
        ("third", "the Earth"),
        ("fourth", "Mars"),
        ("fifth", "Jupiter"),
        ("sixth", "Saturn"),
        ("seventh", "Uranus"),
        ("eighth", "Neptune"),
    ),
    questions=(
        "Which planet is the {s} from the Sun?",
        "What is the {s} planet from the Sun?",
        "Can you name the {s} planet, counted from the Sun?",
    ),
    answer="The {s} planet from the Sun is {v}.",
    statements=("{v} is the {s} planet from the Sun.", "Counted from the Sun, planet {s} is {v}."),
)

RELATIONS = (SYMBOLS, ATOMIC_NUMBERS, SI_UNITS, MEASURES, PLANETS)


_MONTHS = (
    ("January", "31"),
    ("February", "28"),
    ("March", "31"),
    ("April", "30"),
    ("May", "31"),
    ("June", "30"),
    ("July", "31"),
    ("August", "31"),
    ("September", "30"),
    ("October", "31"),
    ("November", "30"),
    ("December", "31"),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _successors(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(zip(names, names[1:] + names[:1], strict=True))


_MONTH_NAMES = tuple(name for name, _ in _MONTHS)

MONTH_LENGTHS = Relation(
    name="month-length",
    # February is left out: its length is not one number.
    rows=tuple(row for row in _MONTHS if row[0] != "February"),
    questions=(
        "How many days does {s} have?",
        "How long is the month of {s}?",
        "How many days are there in {s}?",
    ),
    answer="The number of days in {s} is {v}.",
    statements=("The month of {s} has {v} days.", "{s} is {v} days long."),
)

NEXT_MONTH = Relation(
    name="next-month",
    rows=_successors(_MONTH_NAMES),
    questions=(
        "Which month comes after {s}?",
        "What month follows {s}?",
        "Which month is next when {s} is over?",
    ),
    answer="The month after {s} is {v}.",
    statements=("{s} is followed by {v}.", "When {s} is over, {v} begins."),
)

NEXT_DAY = Relation(
    name="next-day",
    rows=_successors(_DAYS),
    questions=(
        "Which day comes after {s}?",
        "What day follows {s}?",
        "If today is {s}, what day is tomorrow?",
    ),
    answer="The day after {s} is {v}.",
    statements=("{s} is followed by {v}.", "If today is {s}, tomorrow is {v}."),
)

CALENDAR = (MONTH_LENGTHS, NEXT_MONTH, NEXT_DAY)


_SMALL = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A whole number from 0 to 99 in English words; ValueError outside."""
    if not 0 <= number <= 99:
        raise ValueError(f"{number} is outside 0..99")
    if number < 20:
        return _SMALL[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] if ones == 0 else f"{_TENS[tens]}-{_SMALL[ones]}"


def _row(first: int, sign: str, second: int, result: int) -> tuple[str, str, str]:
    return (f"{in_words(first)} {sign} {in_words(second)}", in_words(result), str(result))


_QUESTIONS = ("What is {s}?", "How much is {s}?", "Can you work out {s}?")
_STATEMENTS = ("{s} equals {v}.", "{s} makes {v}.")

SUMS = Relation(
    name="sum",
    rows=tuple(_row(a, "plus", b, a + b) for a in range(3, 10) for b in range(a, 10)),
    questions=_QUESTIONS,
    answer="{s} is {v}.",
    statements=_STATEMENTS,
)

PRODUCTS = Relation(
    name="product",
    rows=tuple(_row(a, "times", b, a * b) for a in range(3, 9) for b in range(a, 9)),
    questions=_QUESTIONS,
    answer="{s} is {v}.",
    statements=_STATEMENTS,
)

NUMBERS = (SUMS, PRODUCTS)
