"""The colours of all figures."""

# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is left out, as it fades on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
