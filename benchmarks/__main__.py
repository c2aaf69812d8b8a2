"""``python -m benchmarks NAME``: see ``python -m benchmarks list``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from benchmarks.arena import fight, redraw
from benchmarks.band import measure_band
from benchmarks.comparison import compare
from benchmarks.cost import measure_cost
from benchmarks.figures import FIGURES, runner
from benchmarks.hypergradients import measure_hypergradients
from benchmarks.peers import measure_peers
from benchmarks.problems import ARENA, RATES, SIZES, SKORCH, digits, mnist_conv, mnist_mlp
from benchmarks.relevance import measure_relevance
from benchmarks.robustness import measure_robustness
from benchmarks.scaling import measure_scaling
from benchmarks.solvers import OF_RATES, SOLVERS
from benchmarks.stress import CASES, measure_stress

NAMES = {
    "arena": "every solver on every problem in the seconds that our search takes; resumes where it was (hours; --problems, --solvers, --patience, --jobs)",
    "digits": "the main job: MLP 64-64 on digits, 5 hyperparameters, 3 folds, against TPE and random search (a minute a seed)",
    "mnist-mlp": "784-256-256-10 on 5,000 MNIST images, 6 hyperparameters, against TPE's best of 30 (4 minutes a seed)",
    "mnist-conv": "a small ConvNet with BatchNorm on 5,000 MNIST images, 8 hyperparameters, 4 of them weight decays of single layers (3 minutes a seed)",
    "per-feature": "one weight decay per feature against one for all, nested cross-validation on two tables (3 minutes a seed)",
    "bad-seeds": "our worst seed against random search's median seed on the same data and folds, three tables (10 seconds a seed; --jobs)",
    "band": "how many retrained settings lie inside the 90% band of a validation curve (15 seconds a seed and problem; --jobs)",
    "stress": "odd estimators, modules, folds and data, against the untouched estimator and ten random settings (4 minutes a seed; --jobs, --cases)",
    "hypergradients": "every algorithm's hypergradient against the exact one, on four problems (minutes)",
    "peers": "seconds to a validation loss with 20 weight decays: ours, and other bilevel libraries that are installed (minutes)",
    "scaling": "seconds of a search step and memory against 1 to 1,000,000 hyperparameters (minutes)",
    "cost": "a hyper-training over one plain training, five shared folds over one, memory in copies of the model (2 minutes)",
    **{name: figure.TITLE for name, figure in FIGURES.items()},
    "report": "draw the arena, the paper's figures and their tables in docs/benchmarks.md again, from the committed results",
}
_HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "list"], metavar="NAME", help=f"one of {', '.join(NAMES)}; or list")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    parser.add_argument("--mnist", metavar="DIR", default=None, help="folder of MNIST's IDX files")
    parser.add_argument("--out", metavar="DIR", type=Path, default=_HERE / "out", help="where results go")
    parser.add_argument(
        "--problems", nargs="+", choices=[*ARENA, *RATES, *SIZES, *SKORCH], default=list(ARENA), metavar="PROBLEM"
    )
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help="of stress"
    )
    parser.add_argument("--solvers", nargs="+", choices=[*SOLVERS, *OF_RATES], default=list(SOLVERS), metavar="SOLVER")
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        help="of arena: let the others go on for so many times our seconds, to match our validation loss",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="cells of arena, band and stress, or bad seeds, run at the same time (default 1)",
    )
    parser.add_argument("--first-seed", type=int, default=0, help="of arena, band and stress (default 0)")
    parser.add_argument("--scoring", default=None, help="of arena: accuracy, roc_auc_ovr, ... instead of the log-loss")
    parser.add_argument("--device", default="cpu", help="torch device, of cost (default cpu)")
    parser.add_argument("--budget", choices=["smoke", "full"], default="smoke", help="of the paper's figures")
    arguments = parser.parse_args(argv)
    if arguments.name == "list":
        for name, line in NAMES.items():
            print(f"{name:<16}{line}")
    elif arguments.name in FIGURES:
        runner.run(arguments.name, arguments.budget, arguments.seeds, arguments.mnist, arguments.out, arguments.jobs)
    elif arguments.name == "report":
        results, docs = _HERE / "results", _HERE.parent / "docs"
        redraw(results, docs)
        print(f"Drawn: arena, {', '.join(runner.redraw(results, docs))}")
    elif arguments.name == "arena":
        fight(
            arguments.problems,
            arguments.solvers,
            arguments.seeds,
            arguments.out,
            arguments.mnist,
            arguments.patience,
            arguments.jobs,
            arguments.first_seed,
            arguments.scoring,
        )
    elif arguments.name == "digits":
        compare(digits, arguments.seeds, arguments.out)
    elif arguments.name == "mnist-mlp":
        compare(partial(mnist_mlp, directory=arguments.mnist), arguments.seeds, arguments.out, tpe_trials=30)
    elif arguments.name == "mnist-conv":
        compare(partial(mnist_conv, directory=arguments.mnist), arguments.seeds, arguments.out)
    elif arguments.name == "per-feature":
        measure_relevance(arguments.seeds)
    elif arguments.name == "bad-seeds":
        measure_robustness(arguments.seeds, arguments.jobs)
    elif arguments.name == "band":
        measure_band(arguments.seeds, arguments.jobs, arguments.first_seed)
    elif arguments.name == "stress":
        measure_stress(arguments.seeds, arguments.jobs, arguments.first_seed, arguments.cases)
    elif arguments.name == "hypergradients":
        measure_hypergradients(arguments.out, arguments.mnist)
    elif arguments.name == "peers":
        measure_peers(arguments.out)
    elif arguments.name == "scaling":
        measure_scaling(arguments.out)
    else:
        measure_cost(device=arguments.device)


if __name__ == "__main__":
    main()
