"""Settings of the pairs stage: what cannot act together, and servers that are none, is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tandem.recipe.pairs_settings import PairsSettings, ServerSettings

SERVER = {"base_url": "http://localhost:8000/v1", "model": "m"}
RANK = {"judge": SERVER}
KEY = "sk-not-to-be-seen"


def pairs(**settings: Any) -> PairsSettings:
    return PairsSettings.model_validate({"prompts": ({"path": "a.jsonl"},), **settings})


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


@pytest.mark.parametrize(
    ("url", "variable", "said"),
    [
        ("localhost:8000", None, "no address of a server"),
        ("ftp://a/v1", None, "no address of a server"),
        ("http://", None, "no address of a server"),
        ("http://a:b/v1", None, "no address of a server"),
        (f"http://me:{KEY}@a/v1", None, "a name, a password or a query"),
        (f"http://a/v1?api_key={KEY}", None, "a name, a password or a query"),
        ("http://a/v1", KEY, "no name of an environment variable"),
    ],
)
def test_an_address_or_a_variable_that_is_none(url: str, variable: str | None, said: str) -> None:
    with pytest.raises(ValidationError) as error:
        ServerSettings(base_url=url, model="m", key_variable=variable)
    (found,) = error.value.errors()
    assert said in found["msg"]
    assert KEY not in found["msg"]
