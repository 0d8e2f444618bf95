"""A project: which photos it has, and what it says of those that it cannot have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyEngine, class_folders, tiny_backbone

from featx.extraction.run import extract_features
from featx.studio.project import Project


def test_a_folder_that_may_not_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = class_folders(tmp_path / "photos", each=3)
    (source / "bees" / "locked.jpg").mkdir()
    scandir = os.scandir

    def closed(path: Path) -> object:
        if Path(path).name == "locked.jpg":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may read what is forbidden to others
    project = Project(source)
    try:
        assert [photo.name for photo in project.photos[-2:]] == ["bees/005.png", "bees/locked.jpg/"]
        options: dict[str, Any] = {"engine": TinyEngine(), "workers": 1, "max_bad": 1.0}
        summary = extract_features(project.images(), tiny_backbone(), project.store, **options)
        assert summary.embedded == 6
        assert [(item.id, item.message) for item in summary.refused] == [
            ("../photos/bees/locked.jpg/", "this folder cannot be read")
        ]
    finally:
        project.close()
