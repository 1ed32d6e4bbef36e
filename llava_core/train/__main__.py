"""One rank of a training run, or with `--launch` the process that a notebook leaves a whole run to."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llava_core.config import RunConfig
from llava_core.record import RunRecord
from llava_core.train.processes import LAUNCHED, die_with_parent, end_with_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--no-resume", action="store_true")
    parser.add_argument("--launch", action="store_true")
    arguments = parser.parse_args()
    record, resume = RunRecord(arguments.record), not arguments.no_resume
    if not arguments.launch:
        die_with_parent()
    name = "launch" if arguments.launch else f"rank{os.environ['RANK']}"
    try:
        if arguments.launch:
            from llava_core.train.launch import launch

            launch(RunConfig.read(record.path / LAUNCHED), resume)
        else:
            from llava_core.train.trainer import train_record

            train_record(record, arguments.init, resume)
    except BaseException as error:
        end_with_error(record, name, error)


if __name__ == "__main__":
    main()
