"""The last word of CI: reads JUnit reports, prints one closing line, fails when too little ran.

    verdict.py REPORT...

A test that was skipped has shown nothing, so a skip is a failure here, unless its reason begins with
"not on this machine:" (no second uid, no huge pages). Reports of engines and transports have no such
excuse: the engine, ucxx, NIXL, torch and Triton are installed, so every test of them runs.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

EXCUSE = "not on this machine:"
NO_EXCUSE = ("test-engines.xml", "test-ucx.xml", "test-ucx-network.xml", "test-nixl.xml", "test-device.xml")


@dataclass(slots=True)
class Verdict:
    """What the reports say together. ``findings`` is empty when all is well."""

    passed: int = 0
    failed: int = 0
    excused: int = 0
    findings: list[str] = field(default_factory=list)

    def read(self, report: Path) -> None:
        """Count one report in. A report that is missing, broken or empty is a finding."""
        try:
            cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        except (OSError, ElementTree.ParseError) as error:
            self.findings.append(f"{report}: no report: {error}")
            return
        if not cases:
            self.findings.append(f"{report}: no test ran")
        for case in cases:
            self._count(case, excusable=report.name not in NO_EXCUSE)

    def _count(self, case: ElementTree.Element, excusable: bool) -> None:
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            self.failed += 1
            self.findings.append(f"failed: {name}")
        elif skip is None:
            self.passed += 1
        elif excusable and EXCUSE in (skip.get("message") or ""):
            self.excused += 1
        else:
            self.failed += 1
            self.findings.append(f"skipped: {name}: {skip.get('message')}")

    def closing_line(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.excused} skipped"


def main(reports: list[str]) -> int:
    verdict = Verdict()
    for report in reports:
        verdict.read(Path(report))
    for finding in verdict.findings:
        print(finding)
    print(verdict.closing_line())
    return 1 if verdict.findings or not reports else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
