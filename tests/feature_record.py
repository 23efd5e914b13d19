"""Which features of PEFT the tests showed: collects the markers `peft_feature` of the tests that passed.

    python -m pytest --features=results/peft_features.json

writes the file from which docs/peft-features.md is made. A feature counts as working if every test that carries its
name passed, and as refused if a test showed the refusal and none that it works.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FEATURES = "peft_features"


def tell_features(item: pytest.Item) -> None:
    """Write down with a test what its report will say: the tests may run in another process than the record."""
    method = item.callspec.params.get("method") if hasattr(item, "callspec") else None
    found = [(name, why_not, test_name(item), method and str(method)) for name, why_not in features_of(item)]
    if found:
        item.user_properties.append((FEATURES, found))


class FeatureRecord:
    """Gathers outcomes while the tests run, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.features: dict[str, dict[str, Any]] = {}
        self.broken: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, why_not, test, method in dict(report.user_properties).get(FEATURES, []):
            if report.failed:
                self.broken.add(name)
            if report.when == "call" and report.passed:
                self._add(name, why_not, test, method)

    def _add(self, name: str, why_not: str | None, test: str, method: str | None) -> None:
        feature = self.features.setdefault(name, {"name": name, "tests": set(), "methods": set(), "refusals": {}})
        if why_not is None:
            feature["tests"].add(test)
            feature["methods"] |= {method} if method is not None else set()
        else:
            feature["refusals"].setdefault(why_not, set()).add(test)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.broken:
            return
        rows = [
            {
                "name": feature["name"],
                "works": bool(feature["tests"]),
                "tests": sorted(feature["tests"]),
                "methods": sorted(feature["methods"]),
                "refusals": {why: sorted(tests) for why, tests in sorted(feature["refusals"].items())},
            }
            for feature in self.features.values()
        ]
        rows.sort(key=lambda row: row["name"].strip("`").lower())
        self.path.write_text(json.dumps({"features": rows}, indent=2) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.broken:
            terminalreporter.write_line(f"{self.path} was not written: {', '.join(sorted(self.broken))} failed")
        else:
            terminalreporter.write_line(f"{len(self.features)} features of PEFT written to {self.path}")


def features_of(item: pytest.Item) -> list[tuple[str, str | None]]:
    """Names of the features that a test shows, each with the reason if it shows a refusal."""
    return [(mark.args[0], mark.kwargs.get("no")) for mark in item.iter_markers("peft_feature")]


def test_name(item: pytest.Item) -> str:
    """File and function of a test, or file and law."""
    law = item.callspec.params.get("law") if hasattr(item, "callspec") else None
    return f"{item.path.name}::{law.__name__ if law is not None else item.originalname}"


test_name.__test__ = False  # not a test itself
