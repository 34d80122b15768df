"""Processes that decide something together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_all_get_the_decision_of_the_primary_or_the_name_of_who_is_missing() -> None:
    script = Path(__file__).with_name("agree_in_threads.py")
    told = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    together, without_1, without_0 = json.loads(told.splitlines()[-1])
    assert together == [[4, 3]] * 3  # what all have, in the order of the primary
    assert without_1 == ["process 1 of 3 has not come within 1 s"] * 2
    assert without_0 == ["process 0 of 3 has not come within 1 s"] * 2
