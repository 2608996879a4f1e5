"""Whether all that the pairs stage will ask is there, before the work that comes first."""

from __future__ import annotations

from tandem.errors import Stopped, UserError
from tandem.pairs.filters import UserCheck
from tandem.pairs.generators import choose_generator
from tandem.pairs.rankers import Ranker, choose_ranker
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.run_settings import RunSettings


def check_pairs(settings: PairsSettings, run: RunSettings) -> None:
    """Raise UserError for what cannot work once the stage begins.

    That is a key, a model or a user's check that is missing, and a server that does not answer one
    question, which it is sent.
    """
    generator = choose_generator(settings, settings.model, run)
    ranker = choose_ranker(settings.rank, run) if settings.rank is not None else None
    models = [model for model in (generator, ranker) if model is not None]
    for model in models:
        model.check()
    if settings.filters.check is not None:
        UserCheck(settings.filters.check)
    for model in models:
        model.reach()


def reach_again(ranker: Ranker, in_round: int) -> None:
    """Ask a judge before hours of generating; raise Stopped for one that earlier rounds had."""
    try:
        ranker.reach()
    except UserError as error:
        if in_round == 1:
            raise
        raise Stopped(f"{error} Round {in_round} has not begun, and nothing is lost.") from None
