"""Who wrote what, who is known for which discovery, and trades."""

from __future__ import annotations

from tandem.demo.facts.fact import Relation

AUTHORS = Relation(
    name="author",
    rows=(
        ("Hamlet", "Shakespeare"),
        ("Faust", "Goethe"),
        ("Don Quixote", "Cervantes"),
        ("War and Peace", "Tolstoy"),
        ("Crime and Punishment", "Dostoevsky"),
        ("Oliver Twist", "Dickens"),
        ("Pride and Prejudice", "Austen"),
        ("Frankenstein", "Shelley"),
        ("Dracula", "Stoker"),
        ("Moby Dick", "Melville"),
        ("The Odyssey", "Homer"),
        ("The Divine Comedy", "Dante"),
        ("The Trial", "Kafka"),
        ("Jane Eyre", "Bronte"),
        ("Gulliver's Travels", "Swift"),
        ("Robinson Crusoe", "Defoe"),
    ),
    questions=(
        "Who wrote {s}?",
        "Who is the author of {s}?",
        "Which author gave us {s}?",
    ),
    answer="The author of {s} is {v}.",
    statements=("{s} was written by {v}.", "{v} is the author of {s}."),
)

PIONEERS = Relation(
    name="pioneer",
    rows=(
        ("penicillin", "Fleming"),
        ("radium", "Curie"),
        ("the telephone", "Bell"),
        ("dynamite", "Nobel"),
        ("the law of gravity", "Newton"),
        ("the theory of relativity", "Einstein"),
        ("the theory of evolution", "Darwin"),
        ("the periodic table", "Mendeleev"),
        ("X-rays", "Rontgen"),
        ("the printing press", "Gutenberg"),
        ("the electric battery", "Volta"),
    ),
    questions=(
        "Who gave the world {s}?",
        "Whose name stands for {s}?",
        "Which pioneer is known for {s}?",
    ),
    answer="The pioneer known for {s} is {v}.",
    statements=("{v} is known for {s}.", "The world owes {s} to {v}."),
)

TRADES = Relation(
    name="trade",
    rows=(
        ("bread", "a baker"),
        ("meat", "a butcher"),
        ("teeth", "a dentist"),
        ("shoes", "a cobbler"),
        ("clothes", "a tailor"),
        ("wooden furniture", "a carpenter"),
        ("water pipes", "a plumber"),
        ("aeroplanes", "a pilot"),
        ("flowers", "a florist"),
        ("sick animals", "a vet"),
        ("horseshoes", "a blacksmith"),
        ("eyeglasses", "an optician"),
    ),
    questions=(
        "Who works with {s}?",
        "Which trade has to do with {s}?",
        "Whose work is about {s}?",
    ),
    answer="Somebody who works with {s} is {v}.",
    statements=("The trade that has to do with {s}: {v}.", "With {s} you need {v}."),
)

RELATIONS = (AUTHORS, PIONEERS, TRADES)
