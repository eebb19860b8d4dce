"""The table and the plots of any folder of results.

    python -m report results/digits
    python -m report studies/cifar100-20 --claims

Writes RESULTS.md, results.csv, top1.png and curves.png beside the runs' JSONs, whichever script made these.
"""

import argparse
from pathlib import Path
from typing import NoReturn

import report
from util.runtime import UserError, is_out_of_memory, lasting_output, say


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {' '.join(message.split())}")
        self.exit(2)


def main() -> None:
    """Write them, and say what was written; exits with 2 after one line where that can't be."""
    parser = Parser(prog="report", description="A folder of results as a table, a CSV and plots.", allow_abbrev=False)
    parser.add_argument("results_dir", help="the folder of the runs' JSONs")
    parser.add_argument("--claims", action="store_true", help="add what the runs say of the reference's claims")
    with lasting_output():
        args = parser.parse_args()
        try:
            for path in report.write(_path(args.results_dir), args.claims):
                say(f"wrote {path}")
        except UserError as error:
            parser.error(str(error))
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            parser.error(f"out of memory ({error}); the folder holds too many runs, or too large ones")


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~ of nobody
        raise UserError(f"{text}: there is no such home folder") from None


if __name__ == "__main__":
    main()
