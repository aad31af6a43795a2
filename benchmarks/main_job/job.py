"""The job: train, print the table, write it and the picture.

AdamW and SGD, bare over a sweep of learning rates, and wrapped from a learning rate that is far too small, a usual one
and one that is far too large: twenty runs that differ in nothing else.
"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from benchmarks.command_line import add_output, command_line
from benchmarks.determinism import single_thread
from benchmarks.main_job.report import legend, sentence, table
from benchmarks.main_job.runs import Result, Spec, train

SWEEP = {
    "AdamW": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "SGD": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2),
}
GIVEN = {base: rates[::3] for base, rates in SWEEP.items()}
"""The learning rates that wrapped optimizers are given."""
QUICK_STEPS = 40


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument(
        "--steps",
        type=_positive,
        default=600,
        metavar="N",
        help="steps of each run (default: %(default)s)",
    )
    parser.add_argument(
        "--schedule",
        choices=("linear", "constant"),
        default="linear",
        help="linear: all learning rates go to zero over the steps; constant: nothing but GeN changes them, and the "
        "files end in -constant (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=128,
        metavar="N",
        help="images in a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="decides split, initial weights and batches, alike in all runs (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"at most {QUICK_STEPS} steps a run, to see that all works; the files end in -quick",
    )
    parser.add_argument("--no-picture", action="store_true", help="only the table")


def run(options: argparse.Namespace) -> None:
    """Trains, prints the table, and writes it and the picture."""
    steps = min(options.steps, QUICK_STEPS) if options.quick else options.steps
    stem = "digits" + "-constant" * (options.schedule == "constant") + "-quick" * options.quick
    # Before the training, so that a folder that cannot be made costs no time.
    options.output.mkdir(parents=True, exist_ok=True)

    plan = specs(steps=steps, schedule=options.schedule, batch_size=options.batch_size, seed=options.seed)
    results = train_all(plan)
    print(f"\n{table(results)}\n\n{legend(plan[0])}\n")

    written = options.output / f"{stem}.md"
    written.write_text(_page(results, None if options.no_picture else f"{stem}.png"), "utf-8")
    print(f"table:   {written}")
    if not options.no_picture:
        from benchmarks.main_job.pictures import draw

        picture = options.output / f"{stem}.png"
        draw(results, picture)
        print(f"picture: {picture}")
    print(f"\n{sentence(results)}")


def specs(*, steps: int, schedule: str, batch_size: int, seed: int) -> list[Spec]:
    """Returns the twenty runs, in the order of the table.

    Args:
        steps: Steps of each run.
        schedule: "linear" or "constant".
        batch_size: Images in a batch.
        seed: The same for all.
    """
    return [
        Spec(
            base=base,
            gen=gen,
            learning_rate=learning_rate,
            steps=steps,
            schedule=schedule,
            batch_size=batch_size,
            seed=seed,
        )
        for base in SWEEP
        for gen in (False, True)
        for learning_rate in (GIVEN if gen else SWEEP)[base]
    ]


def train_all(plan: list[Spec]) -> list[Result]:
    """Trains one run after the other under one progress bar.

    Args:
        plan: The runs.
    """
    results = []
    total = sum(spec.steps for spec in plan)
    with single_thread(), tqdm(total=total, unit="step", mininterval=0.5) as bar:
        for spec in plan:
            bar.set_description(f"{spec.name} from {spec.learning_rate:g}", refresh=False)
            results.append(train(spec, on_step=bar.update))
    return results


def _page(results: list[Result], picture: str | None) -> str:
    """Returns the page: the table, and the command that makes it."""
    parts = [
        "# Digits: a sweep of learning rates, and wrapped from three of them",
        f"{command_line()}, one CPU thread",
        table(results),
        legend(results[0].spec),
    ]
    if picture is not None:
        parts.append(f"![Final loss over the initial learning rate, loss and learning rate over steps]({picture})")
    return "\n\n".join(parts) + "\n"


def _positive(text: str) -> int:
    """Reads a whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, but is {text!r}")
    return int(text)
