"""From a recipe and lists of values to the trials of a sweep, or to all mistakes in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.losses.registry import PREFERENCE_LOSSES
from tandem.recipe.load_recipe import load_recipe
from tandem.recipe.recipe import Recipe
from tandem.storage.hashing import text_hash

# Keys of dpo that decide which records are trained on or scored, or what DPO begins with.
_OF_THE_RECORDS = frozenset({
    "data", "validation", "max_length", "max_prompt_length", "too_long", "on_bad_record",
    "max_dropped",
})  # fmt: skip
# Keys of dpo that do not change its result.
_WITHOUT_RESULT = frozenset({
    "logging_steps", "save_steps", "save_total_limit", "gradient_checkpointing", "samples",
})  # fmt: skip
_OPENING, _CLOSING = "[{", "]}"
_LONGEST_NAME = 120
_NAME = re.compile(r"[\w.+,=-]*[\w+][\w.+,=-]*", re.ASCII)
_ONE_BY_ONE = (
    "A sweep shares everything before DPO; run the recipe once for each value, each with its own "
    "output_dir"
)


@dataclass(frozen=True)
class Trial:
    """One point of the grid."""

    name: str  # says its values: beta=0.1,loss=ipo
    values: Mapping[str, Any]  # the value of each key that varies
    recipe: Recipe
    folder: Path  # where its DPO stage writes


@dataclass(frozen=True)
class Grid:
    """The trials of a sweep, and where it writes."""

    name: str
    keys: tuple[str, ...]  # those that vary, as they were given
    shared: Recipe  # for the stages before DPO
    folder: Path
    trials: tuple[Trial, ...]

    @property
    def losses_compare(self) -> bool:
        """Whether all trials minimise the same function of log-probs."""
        options = {option for loss in PREFERENCE_LOSSES.values() for option in loss.options}
        return not {key.removeprefix("dpo.") for key in self.keys} & {"loss", *options}


def make_grid(recipe: str, overrides: Sequence[str], name: str | None = None) -> Grid:
    """Read a recipe with every combination of the listed values.

    An override with commas outside of brackets, braces and quotes lists values; any other is as in
    `tandem run`. Raises UserError for keys that a sweep does not vary, values and combinations that
    the recipe refuses, all of them at once, and repeated values.
    """
    listed, plain = _listed(overrides)
    if not listed:
        raise UserError(
            "tandem sweep: no key has several values; list them with commas, for instance "
            "dpo.beta=0.05,0.1,0.3. One run without a comparison is tandem run"
        )
    every = [
        [f"{key}={text}" for key, text in zip(listed, texts, strict=True)]
        for texts in product(*listed.values())
    ]
    recipes = _load_all(recipe, plain, every, listed)
    shared = _shared(recipe, plain, recipes[0])
    for key, texts in listed.items():
        _check_repeated(key, texts, recipes, every)
    if (kinds := {one.dpo.trains_on for one in recipes if one.dpo}) and len(kinds) > 1:
        raise UserError(
            f"dpo.loss: these losses train on different records ({' and '.join(sorted(kinds))}), "
            "so that trials could not be compared; make one sweep for each kind"
        )
    _check_held_out(recipes[0])
    folder = _folder(Path(recipes[0].output_dir), listed, name)
    trials = []
    for one in recipes:
        values = {key: _value(one, key) for key in listed}
        called = _trial_name(values)
        trials.append(Trial(called, values, one, folder / "trials" / called))
    return Grid(folder.name, tuple(listed), shared, folder, tuple(trials))


def split_values(text: str) -> list[str]:
    """Split at commas that are outside of brackets, braces and quotes."""
    parts, depth, quote, begin = [], 0, "", 0
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            # inside a word it is an apostrophe
            quote = sign if not text[begin:place].strip(" [{:,") or depth else ""
        elif sign in _OPENING:
            depth += 1
        elif sign in _CLOSING:
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]


def _listed(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The values of each key that varies, and the overrides that hold for all trials."""
    listed: dict[str, list[str]] = {}
    plain, seen = [], set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if equals and key in seen:
            raise UserError(f"tandem sweep: {key} is given twice; list its values with commas")
        seen.add(key)
        values = split_values(text) if equals else [text]
        if len(values) == 1:
            plain.append(override)
        elif "" in values:
            raise UserError(f"override {override}: a value between commas is missing")
        else:
            listed[key] = values
    return listed, plain


def _load_all(
    recipe: str, plain: Sequence[str], every: Sequence[list[str]], listed: Mapping[str, Any]
) -> list[Recipe]:
    """The recipe of each combination; raises UserError with the mistakes of all of them."""
    recipes, mistakes = [], dict[str, str]()
    for combination in every:
        try:
            recipes.append(load_recipe(recipe, [*plain, *combination]))
        except UserError as error:
            for line in str(error).splitlines():
                # an unknown key is one mistake, whatever its values
                what = line.partition(": ")[2] if ": unknown key " in line else line
                mistakes.setdefault(what, line)
    if any("." in key and key.split(".")[0] == "dpo" for key in listed):
        _check_one_dpo(recipe, plain)
    if mistakes:
        raise UserError("\n".join(mistakes.values()))
    for key in listed:
        _check_key(key)
    return recipes


def _check_one_dpo(recipe: str, plain: Sequence[str]) -> None:
    """Raise UserError for a recipe without a dpo section, or one that repeats it in rounds."""
    try:
        whole = load_recipe(recipe, plain)
    except UserError:
        return  # said of its trials, or none of them has that mistake
    if whole.dpo is None:
        raise UserError(
            f"{recipe}: the recipe has no dpo section, and a sweep varies keys of dpo. Add one, or "
            "run the recipe once for each value, each with its own output_dir"
        )
    if whole.rounds > 1:
        raise UserError(
            f"rounds: {whole.rounds} trains DPO {whole.rounds} times, and a sweep compares one DPO "
            "stage. Sweep the first round (rounds=1), then run all rounds with the best values"
        )


def _shared(recipe: str, plain: Sequence[str], first: Recipe) -> Recipe:
    """The recipe without listed values, where it is valid, which a run's folder is to keep."""
    try:
        return load_recipe(recipe, plain)
    except UserError:  # an option that only the trials' losses use
        return first


def _check_key(key: str) -> None:
    """Raise UserError for a key of the recipe that a sweep cannot vary."""
    section, _, rest = key.partition(".")
    if section != "dpo" or not rest:
        what = {
            "sft": "changes SFT",
            "pairs": "changes the pairs that DPO trains on",
            "merge": "changes the merged model",
            "evaluate": "comes after DPO, and changes none of its trials",
        }.get(section, "belongs to the whole run")
        raise UserError(f"{key} {what}, and a sweep varies keys of dpo alone. {_ONE_BY_ONE}.")
    own = rest.split(".")[0]
    if own in _OF_THE_RECORDS:
        raise UserError(
            f"{key} decides which records are trained on or scored, so that trials could not be "
            f"compared. {_ONE_BY_ONE}."
        )
    if rest == "lora.from":
        raise UserError(f"{key} changes what DPO begins with. {_ONE_BY_ONE}.")
    if own in _WITHOUT_RESULT:
        raise UserError(f"{key} does not change the result; give it one value")


def _check_repeated(
    key: str, texts: Sequence[str], recipes: Sequence[Recipe], every: Sequence[list[str]]
) -> None:
    seen: dict[str, str] = {}
    for text in texts:
        at = next(i for i, one in enumerate(every) if f"{key}={text}" in one)
        value = json.dumps(_value(recipes[at], key), sort_keys=True)
        if value in seen:
            raise UserError(
                f"{key}={','.join(texts)}: {text} repeats {seen[value]}; list each value once"
            )
        seen[value] = text


def _check_held_out(recipe: Recipe) -> None:
    assert recipe.dpo is not None
    if recipe.dpo.validation is None:
        raise UserError(
            "dpo.validation is missing: trials are compared on records that none of them has "
            "trained on. Hold out a part of the pairs with dpo.validation.fraction=0.1, or name "
            "data with dpo.validation.data=PATH"
        )


def _value(recipe: Recipe, key: str) -> Any:
    """What a key is in a recipe, as plain data."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        if isinstance(value, dict) and part not in value:  # without effect, so that it is left out
            return None
        value = value[int(part) if isinstance(value, list) else part]
    return value


def _folder(output_dir: Path, listed: Mapping[str, Any], name: str | None) -> Path:
    if name is None:
        name = "+".join(sorted(key.removeprefix("dpo.") for key in listed))
    elif not _NAME.fullmatch(name):
        raise UserError(f"--name {name}: write it in letters, digits and ._+-")
    return output_dir.expanduser() / "sweep" / name


def _trial_name(values: Mapping[str, Any]) -> str:
    """A folder's name that says the values; other values never have the same one."""
    parts = list(_in_order(values))
    name = ",".join(parts)
    if _NAME.fullmatch(name) and len(name) <= _LONGEST_NAME:
        return name
    plain = re.sub(r"[^\w.+,=-]+", "-", name, flags=re.ASCII)[:_LONGEST_NAME]
    return f"{plain}-{text_hash(name)[:8]}"


def _in_order(values: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(values):
        yield f"{key.removeprefix('dpo.')}={shown(values[key])}"


def shown(value: Any) -> str:
    """A value as short text: a mapping of weights as `sigmoid:1+sft:0.1`."""
    if isinstance(value, dict):
        return "+".join(f"{key}:{shown(one)}" for key, one in value.items())
    if isinstance(value, list):
        return "+".join(map(shown, value))
    return value if isinstance(value, str) else json.dumps(value)
