"""The page of losses: `python -m tandem.losses.docs_page > docs/guide/losses.md`."""

from __future__ import annotations

from collections.abc import Iterator

from tandem.losses.known import LOSS_MODULES
from tandem.losses.registry import PREFERENCE_LOSSES, Compared, PreferenceLoss

_INTRODUCTION = """\
# Losses

<!-- Made by `python -m tandem.losses.docs_page > docs/guide/losses.md`; do not edit. -->

`dpo.loss` in a recipe, or `--loss`, is the name of a loss, or several names with their weights:

```
tandem run my-recipe.yaml dpo.loss=ipo
tandem run my-recipe.yaml dpo.loss='{sigmoid: 1, sft: 0.1}'
tandem run my-recipe.yaml dpo.loss=simpo dpo.beta=2 dpo.simpo_gamma=1
```

`tandem` computes each loss over the whole optimizer step, so that it does not depend on
micro-batches, packing or the number of processes. That holds for losses that couple records as
well (`aot`, `kto`). A loss without a reference causes no reference pass. A setting that the
loss does not use is an error. A loss of your own is a function of pairs, named
`module:function`; see [Python](python.md#a-loss-of-your-own).

In the tables y_w is the chosen answer and y_l the rejected one, n their trained tokens, r = log
π(y|x) - log π_ref(y|x), Δ = r_w - r_l, σ the logistic function, β `beta`, ε `label_smoothing`,
and s a score. "Equal to" says what value and gradients were compared with in a test; every loss
also has values derived by hand.
"""
_SECTIONS: dict[Compared, str] = {
    "pairs": """\
## Of pairs

Any data with a chosen and a rejected answer. With `completions: all_pairs` or `best_vs_all`, a
row with several scored answers is one record: its prompt is computed once for all its pairs.

Three settings go with many of these losses. `f_divergence_type` holds the policy to the
reference by another divergence than the reverse KL (arXiv 2309.16240), and replaces r by 1 -
exp(-r) (`forward_kl`), log 2 + log σ(r) (`js_divergence`) or (exp((α - 1) r) - 1) / (α - 1)
(`alpha_divergence`). `ld_alpha` gives tokens beyond the shorter answer's length a smaller
weight (LD-DPO, arXiv 2409.06411), which keeps answers from growing longer.
""",
    "rows": """\
## Of whole rows

Data with several scored answers to a prompt, and `completions: ranked`. The prompt is computed
once.
""",
    "answers": """\
## Of single answers

Data whose rows have one answer and a label, true for a good one; pairs count as a good and a
bad answer. For `kto` the divergence is estimated in each step from every prompt of the step
with another record's answer. These cost one forward without gradients.
""",
}
_SUPERVISED = """\
## Of supervised fine-tuning

`sft.loss` in a recipe, or `--loss` of `tandem sft`. Both are sums over the trained tokens of the
step, divided by their number; p is the probability of a token.

| loss | formula | when to use it | source | equal to |
| --- | --- | --- | --- | --- |
| `nll` | -log p | Always, unless there is a reason for another one. | Negative log-likelihood. | \
transformers |
| `dft` | -p log p, of which the first p is a constant | Where SFT generalises badly: tokens that \
the model finds unlikely count less. The held-out loss remains `nll`. | DFT (arXiv 2508.05629). | \
TRL |
"""


def losses_page() -> str:
    """Write the Markdown page: for each loss its formula, when to use it, source and peers."""
    of_preferences = ("\n".join(_section(kind)) for kind in _SECTIONS)
    return "\n".join([_INTRODUCTION, *of_preferences, _SUPERVISED])


def _section(compared: Compared) -> Iterator[str]:
    yield _SECTIONS[compared]
    yield "| loss | formula | when to use it | settings | source | equal to |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for loss in shipped():
        if loss.compared == compared and loss.about is not None:
            about = loss.about
            name = f"`{loss.name}`" + ("" if loss.reference else ", no reference")
            yield (
                f"| {name} | {_escaped(about.formula)} | {about.use} | {_settings(loss)} | "
                f"{_escaped(loss.source)} | {about.equal} |"
            )
    yield ""


def shipped() -> list[PreferenceLoss]:
    """The losses of this package, file by file."""
    homes = [module.__name__ for module in LOSS_MODULES]
    ours = (one for one in PREFERENCE_LOSSES.values() if one.compute.__module__ in homes)
    return sorted(ours, key=lambda one: homes.index(one.compute.__module__))


def _settings(loss: PreferenceLoss) -> str:
    about = loss.about
    names = []
    for option in loss.options:
        named = f"`{option}`"
        if option == "beta" and about is not None and about.usual_beta is not None:
            low, high = about.usual_beta
            named += f" ({low:g} to {high:g})"
        if option in loss.required:
            named += f" ({loss.required[option]} is usual)"
        if option not in ("f_alpha_divergence_coef", "ld_alpha"):
            names.append(named)
    return ", ".join(names)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(losses_page(), end="")
