"""A seeded fuzzer: sound inputs are damaged, and the command line must refuse each in one line that names the file."""

import sys
from pathlib import Path

from llava_core.runtime import set_offline

set_offline()  # damaged names of models would be asked of the hub
sys.path.append(str(Path(__file__).resolve().parents[1]))  # the folder of the tests' helpers, as pytest has it
