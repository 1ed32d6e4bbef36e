"""Texts that chat models are asked with: the judge, the reference answers and the ScienceQA ensemble."""

from __future__ import annotations

from pathlib import Path

import yaml

PROMPTS: dict[str, str] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
