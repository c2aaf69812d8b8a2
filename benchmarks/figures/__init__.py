"""The paper, figure by figure: Lorraine & Duvenaud (2018), *Stochastic Hyperparameter Optimization through Hypernetworks*.

    python -m benchmarks fig2 --budget full --seeds 3 --mnist DIR

One file for each figure, with the interface of :class:`benchmarks.figures.rows.FigureModule`. Its docstring says what the
paper shows, where every constant is from, and how the figure deviates from the paper's.
"""

from benchmarks.figures import (
    algorithms,
    fig2,
    fig3,
    fig4,
    fig5_layers,
    fig5_unrolled,
    fig6,
    fig7_bayes,
    fig7_random,
    theorem,
)
from benchmarks.figures.rows import FigureModule

FIGURES: dict[str, FigureModule] = {
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fig4,
    "fig5-unrolled": fig5_unrolled,
    "fig5-layers": fig5_layers,
    "fig6": fig6,
    "fig7-random": fig7_random,
    "fig7-bayes": fig7_bayes,
    "theorem": theorem,
    "algorithms": algorithms,
}
