from __future__ import annotations

from pathlib import Path

from companion.data_tools.folders import generated_folder
from llava_core.runtime import ROOT


def test_downloaded_data_set_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "LLaVA-Instruct"
    assert generated_folder(folder, "chat.json", "report.json") == folder
    folder.mkdir()
    (folder / "chat.json").write_text("[]")
    assert generated_folder(folder, "chat.json", "report.json") == ROOT / "runs" / "generated" / folder.name
    (folder / "report.json").write_text("{}")
    assert generated_folder(folder, "chat.json", "report.json") == folder
