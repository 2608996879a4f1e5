"""Records that cannot fit are not tokenised whole, and come out as if they had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.data.records import Conversation, Origin, Preference, Turn
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer, Encoded, encode_conversation
from tandem.data.tokenize.template_capabilities import Refused
from tandem.data.tokenize.vocabulary import longest_token
from tandem.data.truncation.limits import Limits, TooLong
from tests.data.test_truncate import POLICIES, fit, fit_two

ORIGIN = Origin("made.jsonl", 1)


def backend(tokenizer: Any, **changes: Any) -> Any:
    """A tokenizer's backend with parts of its JSON replaced."""
    from tokenizers import Tokenizer

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for name, value in changes.items():
        parts[name] = {**parts[name], **value} if name == "model" else value
    return Tokenizer.from_str(json.dumps(parts))


def test_the_longest_token_of_each_family(
    mistral_tokenizer: Any, stories_tokenizer: Any, byte_tokenizer: Any
) -> None:
    assert longest_token(mistral_tokenizer.backend_tokenizer) == len("\u2581".encode()) * 16
    assert longest_token(stories_tokenizer.backend_tokenizer) == len("\u2581friend".encode())
    assert longest_token(byte_tokenizer.backend_tokenizer) == len("<|endoftext|>")
    composed = backend(byte_tokenizer, normalizer={"type": "NFC"})
    assert longest_token(composed) == 4 * len("<|endoftext|>")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "    "}, "content": " "}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": None},
    ],
)
def test_where_text_may_vanish_nothing_is_assumed(byte_tokenizer: Any, changes: Any) -> None:
    assert longest_token(backend(byte_tokenizer, **changes)) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_nfc_shrinks_less_than_is_assumed(text: str) -> None:
    import unicodedata

    def size(text: str) -> int:
        return len(text.encode("utf-8", "surrogatepass"))

    assert size(unicodedata.normalize("NFC", text)) * 4 >= size(text)


def test_nfc_shrinks_no_character_by_more() -> None:
    import unicodedata

    # Beyond are no characters but those for private use.
    for code in (*range(0x40000), *range(0xE0000, 0xE1000)):
        if 0xD800 <= code < 0xE000:
            continue
        whole = chr(code)
        apart = unicodedata.normalize("NFD", whole)
        composed = unicodedata.normalize("NFC", whole)
        assert max(len(whole.encode()), len(apart.encode())) <= 3 * len(composed.encode())


WORDS = st.sampled_from(
    [
        "Tim",
        " was",
        "\n",
        "aaaa",
        "\u00e9",
        " 7",
        "  ",
        " \u4e16",
        "\U0001f642",
        ". ",
        " 'a'",
        "\n\n",
    ]
)
LONG = st.builds(
    lambda some, times: "".join(some) * times,
    st.lists(WORDS, min_size=4, max_size=12),
    st.integers(1, 120),
).filter(lambda text: bool(text.strip()))


@pytest.fixture(scope="module")
def chats() -> dict[str, tuple[ChatTokenizer, int | None]]:
    """Those that were made before, each with a copy of a tokenizer, and their longest tokens."""
    return {}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["mistral", "stories", "byte"])
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(LONG, min_size=2, max_size=10),
    system=st.sampled_from(["", "Be brief."]),
    length=st.integers(50, 90),
    prompt=st.none() | st.integers(40, 49),
    text=st.booleans(),
)
def test_long_records_come_out_as_if_tokenised_whole(
    request: pytest.FixtureRequest,
    chats: dict[str, tuple[ChatTokenizer, int | None]],
    family: str,
    policy: TooLong,
    texts: Sequence[str],
    system: str,
    length: int,
    prompt: int | None,
    text: bool,
) -> None:
    if family not in chats:
        tokenizer = request.getfixturevalue(f"{family}_tokenizer")
        name = "chatml" if family == "byte" else "zephyr"
        made = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, name))
        chats[family] = made, made.codec.most_characters(1)
    chat, known = chats[family]
    assert known
    limits = Limits(length, prompt, policy)
    before = (Turn("system", system),) if system else ()
    roles = ("user", "assistant")
    turns = [Turn(roles[i % 2], t) for i, t in enumerate(texts[: len(texts) // 2 * 2])]  # type: ignore[arg-type]
    record = Conversation((*before, *turns), ORIGIN)
    pair = Preference(record.turns[:-1], (turns[-1].content, "No. " + texts[-1]), ORIGIN)
    found = []
    for longest in (known, 0):  # 0: nobody knows, so all is tokenised
        chat.codec._longest = longest  # type: ignore[attr-defined]
        fitted = fit(chat, record, limits, "text" if text else "answers")
        found.append([_result(one) for one in (fitted, fit_two(chat, pair, limits))])
    assert found[0] == found[1]


def test_only_a_part_is_tokenised(
    mistral_tokenizer: Any, stories_tokenizer: Any, byte_tokenizer: Any
) -> None:
    for tokenizer, name in (
        (mistral_tokenizer, "zephyr"),
        (stories_tokenizer, "zephyr"),
        (byte_tokenizer, "chatml"),
    ):
        chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, name))
        long = "It was a day. " * 4000
        for texts in ((long, "Yes"), ("Yes", long)):
            turns = (Turn("user", texts[0]), Turn("assistant", texts[1]))
            for loss_on in ("answers", "text"):
                record = Conversation(turns, ORIGIN)
                (one,) = encode_conversation(chat, record, 64, loss_on)  # type: ignore[arg-type]
                assert isinstance(one, Encoded)
                assert not one.whole
                assert 64 < len(one.ids) < 4000


def _result(fitted: Any) -> Any:
    """What must not depend on how much was tokenised: all but the counts in the detail."""
    if isinstance(fitted, Refused):
        return fitted.reason
    return fitted.reason, [(one.ids, one.start) for one in fitted.encoded]


SCRIPT = """
import json, re, sys
from pathlib import Path
from tandem.data.ledger import Ledger
from tandem.data.build_dataset import build_dataset
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.light_tokenizer import read_light_tokenizer
from tandem.data.truncation.limits import Limits
from tandem.recipe.data_source import DataSource
from tandem.data.tokenize.chat_template import resolve_template

tokenizer = read_light_tokenizer(Path(sys.argv[1]))
template = resolve_template(tokenizer, "neural-chat")

def most():
    # ru_maxrss would count what the parent held when it started this process.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def run(path, policy, loss_on):
    ledger = Ledger(None)
    options = EncodingOptions("conversations", Limits(512, 256, policy), "stop", loss_on)
    trees = build_dataset(
        [DataSource(path=path)], ChatTokenizer.of(tokenizer, template), options, ledger)
    return [e.outcome for e in ledger.entries], [len(t.sequence(0).input_ids) for t in trees]

run(sys.argv[3], "drop", "answers")
before = most()
told = [run(sys.argv[2], *way) for way in (("drop", "answers"), ("keep_start", "text"),
        ("keep_end", "answers"), ("drop_old_turns", "answers"), ("drop_old_turns", "text"))]
after = most()
print(json.dumps({"told": told, "mebibytes": (after - before) / 1024}))
"""


def test_a_record_of_10_mb_takes_little_memory(shared_data: Path, tmp_path: Path) -> None:
    """Tokenised whole it takes almost a quarter of a gibibyte."""
    words = "It was a day like any other, said Tim; and so it went on. " * (10_000_000 // 58)
    small = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    question = {"messages": [{"role": "user", "content": words}, small["messages"][1]]}
    answer = {"messages": [small["messages"][0], {"role": "assistant", "content": words}]}
    huge, plain = tmp_path / "huge.jsonl", tmp_path / "plain.jsonl"
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": words[:5000]} for i in range(800)]
    rows = (question, small, answer, {"messages": turns})
    huge.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text(json.dumps(small) + "\n")
    tokenizer = shared_data / "tokenizers" / "mistral_v1_32000"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tokenizer), str(huge), str(plain)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert [told[0] for told in result["told"]] == [
        ["dropped"] * 3,
        ["truncated"] * 3,
        ["truncated", "dropped", "dropped"],
        ["truncated"] * 3,
        ["truncated"] * 3,
    ]
    assert all(length <= 512 for told in result["told"] for length in told[1])
    assert result["mebibytes"] < 100, result
