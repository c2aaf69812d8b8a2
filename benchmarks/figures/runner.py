"""Run a figure with some seeds, and draw committed results again.

run("fig2", "full", seeds=3, directory="mnist", out=Path("out"))      # out/fig2.json, out/fig2.png
redraw(Path("benchmarks/results"), Path("docs"))                     # docs/fig2.png, a table in docs/benchmarks.md
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sklearn.utils.parallel import Parallel, delayed
from tqdm.auto import tqdm

from benchmarks import report
from benchmarks.figures import FIGURES
from benchmarks.figures.rows import Row


def run(name: str, budget: str, seeds: int, directory: str | None, out: Path, jobs: int = 1) -> list[Row]:
    """Run the cells of every seed, write ``out/NAME.json`` and ``out/NAME.png``, and print the table.

    Parameters
    ----------
    name : str
        Of :data:`benchmarks.figures.FIGURES`.
    budget : {"smoke", "full"}
    seeds : int
        Number of seeds, from 0.
    directory : str or None
        Folder of MNIST's files.
    out : Path
        Made if it is not there.
    jobs : int, default=1
        Seeds that run at the same time, each with its share of the threads.
    """
    start = time.perf_counter()
    cells = (delayed(_cells)(name, seed, budget, directory) for seed in range(seeds))
    done = Parallel(n_jobs=jobs, return_as="generator")(cells)
    rows = [row for found in tqdm(done, total=seeds, unit="seed", desc=name) for row in found]
    seconds = round(time.perf_counter() - start, 1)
    out.mkdir(parents=True, exist_ok=True)
    environment = report.environment() | {"jobs": jobs, "seconds": seconds}
    _write(out / f"{name}.json", {"environment": environment, "budget": budget}, rows)
    _draw(name, rows, out / f"{name}.png")
    print(f"{FIGURES[name].TITLE}\n\n{FIGURES[name].table(rows)}\n\nWritten: {out / name}.json and .png ({seconds} s)")
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a result, each with the versions and threads that are written once for all of them."""
    result = json.loads(path.read_text())
    stamp = {field: result["environment"][field] for field in ("versions", "threads")}
    return [row | stamp for row in result["rows"]]


def redraw(results: Path, docs: Path) -> list[str]:
    """Draw every committed result, and put its table into the page, without rerunning anything.

    Parameters
    ----------
    results : Path
        Folder of ``NAME.json``.
    docs : Path
        Gets ``NAME.png``; in its ``benchmarks.md`` what stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` is replaced.

    Returns
    -------
    list of str
        The names that were drawn.

    Raises
    ------
    ValueError
        If the page has no place for a result.
    """
    page, drawn = docs / "benchmarks.md", []
    text = page.read_text()
    for name in (name for name in FIGURES if (results / f"{name}.json").exists()):
        rows = read(results / f"{name}.json")
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not between.search(text):
            raise ValueError(f"{page} has no lines <!-- {name} --> and <!-- end {name} --> to put the table between.")
        table = FIGURES[name].table(rows)
        text = between.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)  # type: ignore[misc]
        _draw(name, rows, docs / f"{name}.png")
        drawn.append(name)
    page.write_text(text)
    return drawn


def _cells(name: str, seed: int, budget: str, directory: str | None) -> list[Row]:
    return [{"problem": name, "seed": seed} | row for row in FIGURES[name].cells(seed, budget, directory)]


def _write(path: Path, header: dict[str, Any], rows: list[Row]) -> None:
    """JSON with a row on each line, so that a difference between two results can be read."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(header)[:-1]}, "rows": [\n{lines}\n]}}\n')


def _draw(name: str, rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FIGURES[name].plot(rows, figure)
    figure.savefig(path, dpi=110)
