"""One rank of a training run.

Started by `python -m torch.distributed.run ... -m llava_core.train RECORD [--init CHECKPOINT] [--no-resume]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_core.record import RunRecord
from llava_core.train.engine import start
from llava_core.train.trainer import train_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--no-resume", action="store_true")
    arguments = parser.parse_args()
    start()
    train_record(RunRecord(arguments.record), arguments.init, resume=not arguments.no_resume)


if __name__ == "__main__":
    main()
