"""`tandem.LoRA`: an adapter's settings, also by peft's names."""

from __future__ import annotations

import json
from os import fspath
from typing import TYPE_CHECKING, Unpack

from pydantic import ValidationError

from tandem.api.names import NOT_AS_PEFT, SAME_AS_PEFT, by_own_names
from tandem.errors import UserError
from tandem.recipe.explain_errors import explain
from tandem.recipe.lora_settings import LoraSettings

if TYPE_CHECKING:
    from tandem.api.options import LoraOptions

_START = "start"  # `from` is a word of Python's own


def LoRA(**settings: Unpack[LoraOptions]) -> LoraSettings:  # noqa: N802 - as it is written
    """Return the settings of an adapter, for `lora=` of `sft` and `dpo`.

    Args:
        settings: the keys of a recipe's `lora` section (`rank`, `alpha`, `dropout`,
            `target_modules`, `rslora`, `dora`, `init`, ...), or peft's names for them: `r`,
            `lora_alpha`, `lora_dropout`, `use_rslora`, `use_dora`. `start` is the folder of an
            adapter that training goes on with, the key `from` of a recipe.

    Raises UserError for an unknown name, with the nearest one, and for a value that cannot be.
    """
    known = {*LoraSettings.model_fields, _START} - {"from"}
    values = by_own_names("LoRA", settings, known, SAME_AS_PEFT, NOT_AS_PEFT)
    if (start := values.pop(_START, None)) is not None:
        values["from"] = fspath(start)
    try:
        # JSON is where pydantic's strict mode takes a list for a tuple, yet no text for a number.
        return LoraSettings.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, LoraSettings, lambda _: "LoRA()")) from None
    except TypeError as error:
        raise UserError(
            f"LoRA(): a value is of a kind that settings do not have: {error}"
        ) from None
