"""Settings of the pairs stage that cannot act together are refused, not passed over."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tandem.recipe.making_pairs import Pairs

SERVER = {"base_url": "http://localhost:8000/v1", "model": "m"}
RANK = {"judge": SERVER}


def pairs(**settings: Any) -> Pairs:
    return Pairs.model_validate({"prompts": ({"path": "a.jsonl"},), **settings})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"server": SERVER, "vllm": {}}, "server and vllm are both set"),
        ({"server": SERVER, "model": "m"}, "server and model are both set"),
        ({"server": SERVER, "top_k": 3}, "top_k is not among"),
        ({"temperature": 0, "samples": 2}, "temperature 0 draws the same answer"),
        ({"temperature": 0, "top_p": 0.5}, "cannot act at temperature 0"),
        ({"rank": RANK}, "rank chooses among answers"),
        ({"rank": RANK, "samples": 2, "keep": "wrong"}, "keep: wrong is about the set's answers"),
        (
            {"rank": RANK, "samples": 2, "filters": {"language": "same"}},
            "filters.language: same is about the set's answers",
        ),
    ],
)
def test_what_cannot_act_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        pairs(**settings)


def test_what_can_act_is_taken() -> None:
    pairs(filters={"language": "same"})
    pairs(rank=RANK, samples=2, filters={"language": "de"})
    pairs(server=SERVER, temperature=0, samples=2)
