"""Answers of a result's model. The model that answered last is kept, until something else runs."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.data.records import Turn
from tandem.errors import UserError
from tandem.recipe.choices import Role

if TYPE_CHECKING:
    from tandem.runtime.device import Device

Messages = Sequence[Mapping[str, str]]
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class _Answerer:
    """A loaded model with all that it takes to ask it."""

    path: str
    device: str  # as it was asked for
    place: Device
    model: Any
    tokenizer: Any
    template: Any
    stop: Sequence[int]


_loaded: list[_Answerer] = []


def forget_model() -> None:
    """Let go of the model that answered last, so that its memory is free."""
    if _loaded:
        place = _loaded.pop().place
        gc.collect()
        place.release_memory()


def answers(
    path: str, device: str, asked: Sequence[str | Messages], sampling: Mapping[str, Any]
) -> list[str]:
    """Answer each of several questions or conversations, in their order.

    Args:
        path: a model's or an adapter's folder.
        device: as a recipe names it.
        asked: texts, or turns with `role` and `content`.
        sampling: the fields of `Sampling`.

    Raises UserError for turns that are none, and what does not fit the model's context.
    """
    from tandem.data.tokenize.chat_template import prompt_ids
    from tandem.data.tokenize.template_omissions import omissions_of
    from tandem.data.tokenize.vocabulary import require_rows
    from tandem.model.added_tokens import rows_of
    from tandem.model.generate import Sampling, generate_answers
    from tandem.model.model_folder import context_length

    turns = [_turns(one) for one in asked]
    here = _answerer(path, device)
    omissions = omissions_of(here.tokenizer, here.template)
    context, rows = context_length(here.model.config), rows_of(here.model)
    prompts = []
    for number, one in enumerate(turns):
        if reason := omissions.of_prompt(one):
            raise UserError(f"generate(): the model would not be asked all of this: {reason}")
        ids = prompt_ids(here.tokenizer, here.template, one)
        require_rows(ids, rows, here.tokenizer.decode)
        if context is not None and len(ids) + sampling["max_new_tokens"] > context:
            raise UserError(
                f"generate(): question {number} has {len(ids)} tokens; with max_new_tokens "
                f"{sampling['max_new_tokens']} that is more than the model's context of {context}"
            )
        prompts.append(ids)
    answered = generate_answers(
        here.model, prompts, stop_ids=here.stop, sampling=Sampling(**sampling)
    )
    texts: list[str] = here.tokenizer.batch_decode(
        [list(one.ids) for one in answered], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def _turns(asked: str | Messages) -> list[Turn]:
    if isinstance(asked, str):
        return [Turn("user", asked)]
    turns = []
    for number, one in enumerate(asked):
        content = one.get("content")
        role = next((name for name in _ROLES if name == one.get("role")), None)
        if role is None or not isinstance(content, str):
            raise UserError(
                f"generate(): message {number} is no turn; write it as {{'role': 'user', "
                f"'content': 'text'}}, its role one of {', '.join(_ROLES)}"
            )
        turns.append(Turn(role, content))
    if not turns or turns[-1].role != "user":
        raise UserError("generate(): the last message must be the user's, which is answered")
    return turns


def _answerer(path: str, device: str) -> _Answerer:
    """The loaded model, or the one that answered last."""
    if _loaded and (_loaded[0].path, _loaded[0].device) == (path, device):
        return _loaded[0]
    forget_model()
    from tandem.chat.stream_answer import model_stop_ids
    from tandem.data.tokenize.chat_template import resolve_template, stop_ids
    from tandem.integrations.choose import choose_device
    from tandem.model.load_model import load_for_inference

    place = choose_device(device, "auto")
    model, tokenizer = load_for_inference(path, str(place.torch_device))
    model.eval()
    template = resolve_template(tokenizer, None)
    stop = list(dict.fromkeys([*stop_ids(tokenizer, template), *model_stop_ids(model)]))
    _loaded.append(_Answerer(path, device, place, model, tokenizer, template, stop))
    return _loaded[0]
