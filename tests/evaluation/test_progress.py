"""Progress where stderr is no terminal: a line now and then, with the rate and the time left."""

from __future__ import annotations

import pytest

from rxdeploy.evaluation import progress


def test_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.EvaluationProgress() as show:
        for what, seconds, done in (
            ("a", 0, 200),  # of a file: they do not count for the rate
            ("a", 10, 300),
            ("a", 15, 450),
            ("a", 1, 460),
            ("a", 100, 0),  # another model of the same name begins
            ("a", 20, 40),
        ):
            now += seconds
            show(what, done, 1000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a: 200 of 1,000 images were done before",
        "a: 450 of 1,000 images, 10.0 images/s, 55 s left",
        "a: 40 of 1,000 images, 2.0 images/s, 480 s left",
    ]
