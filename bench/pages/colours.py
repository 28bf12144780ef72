"""The colours of all figures, a family of bounds having the same one everywhere, and what stands out in them."""

# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is left out, as it fades on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#999999"  # ablations, and families without a colour of their own
FAMILIES = {
    "yudin2025": "#D55E00",
    "sharp": "#0072B2",
    "sharp_fast": "#56B4E9",
    "sharp_cheap": "#009E73",
    "covariance": "#CC79A7",
    "centred": "#E69F00",
}
THE_PAPER = "yudin2025.biased"  # the bound of the paper for real models; every figure names it as such
BOLD = (THE_PAPER, "yudin2025.theorem3", "sharp")


def family_colour(name: str) -> str:
    """The colour of the family of a bound.

    Args:
        name: of the bound, such as `yudin2025.biased`.
    """
    return FAMILIES.get(name.split(".")[0].removesuffix("_ball"), GREY)
