"""One rank of a training run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llava_core.record import RunRecord
from llava_core.runtime import printable_stderr
from llava_core.train.processes import die_with_parent, end_with_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--no-resume", action="store_true")
    arguments = parser.parse_args()
    die_with_parent()
    record = RunRecord(arguments.record)
    with printable_stderr():
        try:
            from llava_core.train.trainer import train_record  # here: a failing import is also left for the launcher

            train_record(record, arguments.init, not arguments.no_resume)
        except BaseException as error:
            end_with_error(record, f"rank{os.environ['RANK']}", error)


if __name__ == "__main__":
    main()
