"""What another rule, or the same with other constants, would have made of a recorded run."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from benchmarks.cdat import CDATRule
from benchmarks.command_line import assignment
from benchmarks.markdown import markdown_table
from benchmarks.replaying import replay
from gen_optim.records import History
from gen_optim.rules import RULES, Rule

_RULES: dict[str, type[Rule]] = {**RULES, "cdat": CDATRule}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    parser.add_argument(
        "record", type=Path, metavar="RECORD", help="the probe steps of a run, as History.save() writes them"
    )
    parser.add_argument("--rule", choices=list(_RULES), default="relaxed", help="(default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], type=assignment, metavar="NAME=VALUE", help="an option of the rule"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="print each N-th probe step alone")


def run(options: argparse.Namespace) -> None:
    """Prints, probe step by probe step, what was chosen and what would have been."""
    if options.every < 1:
        raise SystemExit(f"--every must be at least 1, but is {options.every}")
    known = [field.name for field in fields(_RULES[options.rule])]
    unknown = [name for name, _ in options.set if name not in known]
    if unknown:
        raise SystemExit(f"--set must name options of the rule {options.rule!r}, but {unknown[0]!r} is none")
    try:
        records = list(History.load(options.record))
        rule = _RULES[options.rule](**dict(options.set))
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{options.record}: {error}") from error
    rows = [
        [
            str(record.step),
            f"{record.losses[0]:.5g}" if record.losses else "-",
            f"{record.factor:.3g}",
            f"{record.lr_after:.4g}",
            record.status.value,
            f"{decision.state.lr:.4g}",
            decision.status.value,
        ]
        for record, decision in zip(records, replay(records, rule), strict=True)
    ][:: options.every]
    print(markdown_table(["step", "loss", "factor", "learning rate", "status", "replayed", "its status"], rows))
