"""Compares the paper's claim with the results, as sentences: by rules, from the numbers and their uncertainty."""

from collections.abc import Sequence

from vit_tucker.report.matched import OURS, Factor, Headline, Match, MethodComparison
from vit_tucker.report.settings import Setting
from vit_tucker.report.stats import CONFIDENCE
from vit_tucker.report.tables import brief
from vit_tucker.show.methods import SHIPPED

CLAIM = (
    "Klein, Kusch, Sager, Schnake and Schotthöfer, *Tucker Attention* (arXiv 2603.30033, Sec 4.1 and Fig 3): validation accuracy "
    "over attention parameters of pretrained ViT-L/32 and ViT-G/14, fine-tuned on ImageNet-1k. The claim: Tucker Attention needs "
    "**almost an order of magnitude fewer attention parameters than GQA and MLA at equal accuracy**."
)
ALMOST_AN_ORDER = 5.0
"""The factor from which on 'almost an order of magnitude' counts as met."""
HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "inconclusive"
WORDS = {"more": HOLDS, "fewer": FAILS, "unclear": UNCLEAR}
RULES = (
    f"A factor is the other method's attention parameters over Tucker's. *Fewer parameters* {HOLDS} where the whole "
    f"{CONFIDENCE:.0%} interval of the factor is above 1, {FAILS} where it is below, and it is {UNCLEAR} where it includes 1 or "
    f"where there is only one seed. *Almost an order of magnitude* is judged in the same way against a factor of "
    f"{ALMOST_AN_ORDER:g}."
)


def word(factor: Factor | None, threshold: float = 1.0) -> str:
    """Returns whether a factor is above a threshold: 'holds', 'does not hold' or 'inconclusive'."""
    return UNCLEAR if factor is None else WORDS[factor.against(threshold)]


def verdicts(comparison: MethodComparison) -> list[str]:
    """Returns sentences on each other method: at equal accuracy, as an order of magnitude, and at dense accuracy."""
    matches = [match for match in comparison.matches if match.on_front]
    return [
        sentence
        for headline in comparison.headlines
        for sentence in (*at_equal_accuracy(headline, matches), order_of_magnitude(headline), at_dense(headline))
    ]


def at_equal_accuracy(headline: Headline, matches: Sequence[Match]) -> list[str]:
    """Returns a sentence for each verdict that some setting of Tucker's Pareto front has."""
    method, name, sentences = headline.method, headline.name, []
    for verdict, need in ((HOLDS, "needs more"), (FAILS, "needs fewer"), (UNCLEAR, "may need more or fewer")):
        chosen = [m for m in matches if word(m.factors[method]) == verdict]
        if chosen:
            ends = [end(chosen, key=lambda m: m.factors[method].value) for end in (min, max)]
            places = " to ".join(dict.fromkeys(f"{m.factors[method]} at {place(m.setting)}" for m in ends))
            sentences.append(
                f"**Fewer parameters than {name}: {verdict}** at {len(chosen)} of {len(matches)} accuracies of "
                f"Tucker's Pareto front, where {name} {need} attention parameters: {places}."
            )
    return sentences


def place(setting: Setting) -> str:
    """Returns 'the 94.06% of ranks=4,8,8, HOSVD (20k)'."""
    return f"the {setting.score:.2f}% of {brief(setting)}"


def order_of_magnitude(headline: Headline) -> str:
    """Returns the sentence on the largest and the median factor against that of the claim."""
    median, largest = (word(factor, ALMOST_AN_ORDER) for factor in (headline.median, headline.largest))
    return (
        f"**Almost an order of magnitude fewer than {headline.name}: {median}** for the median factor, {headline.median}; for "
        f"the largest one, {headline.largest}: {largest}."
    )


def at_dense(headline: Headline) -> str:
    """Returns the sentence on the smallest settings that are as good as the dense model."""
    name, factor = headline.name, headline.at_dense
    if factor is None:
        return f"**At dense accuracy, fewer than {name}: {UNCLEAR}**: {headline.why_not}."
    smallest = [
        f"the smallest {who} is {brief(setting)}, {setting.share:.1%} of dense" if setting else f"no {who} setting is"
        for who, setting in ((SHIPPED[OURS].name, headline.ours), (name, headline.theirs))
    ]
    return (
        f"**At dense accuracy, fewer than {name}: {word(factor)}**: within the seeds' noise of dense {smallest[0]}; "
        f"{smallest[1]}: {factor}."
    )
