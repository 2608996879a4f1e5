"""Animals, colours of things, shapes."""

from __future__ import annotations

from tandem.demo.facts.fact import Relation

YOUNG = Relation(
    name="young",
    rows=(
        ("dog", "a puppy"),
        ("cat", "a kitten"),
        ("cow", "a calf"),
        ("horse", "a foal"),
        ("sheep", "a lamb"),
        ("goat", "a kid"),
        ("pig", "a piglet"),
        ("hen", "a chick"),
        ("duck", "a duckling"),
        ("goose", "a gosling"),
        ("swan", "a cygnet"),
        ("owl", "an owlet"),
        ("eagle", "an eaglet"),
        ("lion", "a cub"),
        ("frog", "a tadpole"),
        ("deer", "a fawn"),
        ("kangaroo", "a joey"),
        ("hare", "a leveret"),
        ("butterfly", "a caterpillar"),
        ("seal", "a pup"),
    ),
    questions=(
        "What is a young {s} called?",
        "What do you call a young {s}?",
        "Which word is used for a young {s}?",
    ),
    answer="A young {s} is called {v}.",
    statements=("The young of {a_s} is {v}.", "The word for a young {s} is {v}."),
)

SOUNDS = Relation(
    name="sound",
    rows=(
        ("dog", "barks"),
        ("cat", "meows"),
        ("cow", "moos"),
        ("horse", "neighs"),
        ("sheep", "bleats"),
        ("pig", "grunts"),
        ("duck", "quacks"),
        ("lion", "roars"),
        ("wolf", "howls"),
        ("frog", "croaks"),
        ("bee", "buzzes"),
        ("snake", "hisses"),
        ("owl", "hoots"),
        ("donkey", "brays"),
        ("mouse", "squeaks"),
        ("elephant", "trumpets"),
    ),
    questions=(
        "What sound does {a_s} make?",
        "How does {a_s} sound?",
        "Which sound comes from {a_s}?",
    ),
    answer="With its voice {a_s} {v}.",
    statements=("Listen, {a_s} {v}.", "Every farmer knows that {a_s} {v}."),
)

HOMES = Relation(
    name="home",
    rows=(
        ("bee", "a hive"),
        ("bird", "a nest"),
        ("spider", "a web"),
        ("rabbit", "a burrow"),
        ("lion", "a den"),
        ("horse", "a stable"),
        ("dog", "a kennel"),
        ("beaver", "a lodge"),
        ("pig", "a sty"),
        ("badger", "a sett"),
        ("hen", "a coop"),
    ),
    questions=(
        "Where does {a_s} live?",
        "What is the home of {a_s} called?",
        "Which word names the home of {a_s}?",
    ),
    answer="The home of {a_s} is called {v}.",
    statements=("{a_s} lives in {v}.", "The word for the home of {a_s} is {v}."),
)

COLOURS = Relation(
    name="colour",
    rows=(
        ("grass", "green"),
        ("snow", "white"),
        ("coal", "black"),
        ("blood", "red"),
        ("a lemon", "yellow"),
        ("a clear sky", "blue"),
        ("an emerald", "green"),
        ("a ruby", "red"),
        ("a sapphire", "blue"),
        ("milk", "white"),
        ("a carrot", "orange"),
        ("chocolate", "brown"),
        ("an elephant", "grey", "gray"),
        ("a flamingo", "pink"),
        ("a raven", "black"),
        ("a sunflower", "yellow"),
    ),
    questions=("What colour is {s}?", "Which colour does {s} have?", "What is the colour of {s}?"),
    answer="The colour of {s} is {v}.",
    statements=("The colour {v} is what {s} shows.", "Painters give {s} the colour {v}."),
)

MIXTURES = Relation(
    name="mixture",
    rows=(
        ("blue and yellow", "green"),
        ("red and yellow", "orange"),
        ("red and blue", "purple", "violet"),
        ("red and white", "pink"),
        ("black and white", "grey", "gray"),
    ),
    questions=(
        "Which paint do you get from {s}?",
        "What does a mixture of {s} paint give?",
        "What colour do {s} paint make together?",
    ),
    answer="Mixing {s} paint gives {v}.",
    statements=("A mixture of {s} paint is {v}.", "Paint of {s} together makes {v}."),
)

SHAPES = Relation(
    name="shape",
    rows=(
        ("triangle", "three", "3"),
        ("square", "four", "4"),
        ("pentagon", "five", "5"),
        ("hexagon", "six", "6"),
        ("heptagon", "seven", "7"),
        ("octagon", "eight", "8"),
        ("nonagon", "nine", "9"),
        ("decagon", "ten", "10"),
    ),
    questions=(
        "How many sides does {a_s} have?",
        "What is the number of sides of {a_s}?",
        "How many corners does {a_s} have?",
    ),
    answer="The number of sides of {a_s} is {v}.",
    statements=("{a_s} has {v} sides.", "Count the corners of {a_s} and you get {v}."),
)

LEGS = Relation(
    name="legs",
    rows=(
        ("spider", "eight", "8"),
        ("ant", "six", "6"),
        ("dog", "four", "4"),
        ("hen", "two", "2"),
        ("bee", "six", "6"),
        ("horse", "four", "4"),
        ("scorpion", "eight", "8"),
        ("snake", "zero", "0", "no"),
    ),
    questions=(
        "How many legs does {a_s} have?",
        "What is the number of legs of {a_s}?",
        "On how many legs does {a_s} walk?",
    ),
    answer="The number of legs of {a_s} is {v}.",
    statements=("Count the legs of {a_s} and you get {v}.", "{a_s} has {v} legs."),
)

RELATIONS = (YOUNG, SOUNDS, HOMES, COLOURS, MIXTURES, SHAPES, LEGS)
