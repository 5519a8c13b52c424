"""The command line. One verb = parse, call one function, print where the files are.

Exit codes: 0 done; 1 an error, usage errors too; 130 and 143 stopped by SIGINT and SIGTERM. An audit: 0 pass or no
budget, 2 regression, 3 insufficient evidence. `check`: 2 where a clause fails. `doctor`: 2 a problem was found.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module

VERBS: dict[str, str] = {
    "audit": "what did a fine-tune make a model forget? any trainer's models against an earlier one",
    "blend": "between two models, the one that learns most and keeps what must not be forgotten",
    "merge": "merge an adapter into its base, or several into one; says what it cost",
    "overlap": "do adapters change the same weights, write to the same outputs, read the same inputs?",
    "interpolate": "loss and score between two models: line, curve, plane; barrier, distance, CKA",
    "learn": "learn a stream of tasks, score every task after each",
    "sweep": "a grid of runs: methods x orders x seeds x options, on equal terms; here, in a queue or on Ray",
    "demo": "see a model forget, and forget less: two methods on three small tasks",
    "doctor": "is it whole, whose is it, of use? an environment, a run folder, an adapter, a model",
    "forget-rows": "delete a task's rows from a run's replay memory, with a record",
    "report": "draw the report of one or several run folders again",
    "compare": "methods over seeds and orders: intervals, paired tests, learning against forgetting, cost",
    "forecast": "how much will be forgotten at a rank and a number of steps, and how far a budget goes",
    "methods": "list the methods",
    "check": "does a method, yours too, keep the contract? on a tiny random model",
    "streams": "list the streams by name: source, licence, hashes, rows, scorer, and how to get them",
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `forgetless` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    from forgetless.errors import ForgetlessError, Stopped, UsageError, nearest
    from forgetless.learning.signals import Signals
    from forgetless.progress import console

    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            return _help()
        if arguments[0] == "--version":
            return _version()
        if arguments[0] not in VERBS:
            raise UsageError(f"no command {arguments[0]!r}{nearest(arguments[0], VERBS)}")
        with Signals(told="", numbers=(signal.SIGTERM,)):  # as Ctrl-C does, whatever a command is at
            verb = import_module(f"forgetless.cli.{arguments[0].replace('-', '_')}")
            return verb.run(arguments[1:])
    except ForgetlessError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        return 1
    except KeyboardInterrupt as stop:
        what = {"learn": "tasks", "interpolate": "points", "blend": "points", "sweep": "runs"}.get(arguments[0])
        kept = f"Finished {what} are kept: the same command goes on after the last of them." if what else ""
        console.print(f"stopped. {str(stop) or kept}".strip(), markup=False, soft_wrap=True)
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def _help() -> int:
    print("forgetless: what did each fine-tune make a language model forget, and how to keep it\n")
    print("usage: forgetless COMMAND [options]        forgetless COMMAND --help\n")
    for verb, meaning in VERBS.items():
        print(f"  {verb:12}{meaning}")
    return 0


def _version() -> int:
    from importlib.metadata import version

    print(version("forgetless"))
    return 0
