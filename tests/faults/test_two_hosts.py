"""`scripts/two_hosts.sh`: ZeRO-3 over a network of two hosts, the cable cut in the middle. It asserts by itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from launches import ROOT, environment_of_user

CANNOT_RUN_HERE = 4


@pytest.mark.timeout(600)
def test_two_hosts(tmp_path: Path) -> None:
    ended = subprocess.run(
        [ROOT / "scripts" / "two_hosts.sh", tmp_path / "runs"],
        env=environment_of_user(),
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    output = ended.stdout + ended.stderr
    if ended.returncode == CANNOT_RUN_HERE:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 0, output
    assert output.count("both ranks have ended, ") == output.count("mended and gone on to the end") == 2, output
    assert output.count("error (rank 0)") == output.count("error (rank 1)") == 2, output
    assert output.endswith("two_hosts: all runs have ended with the same adapter, byte for byte\n")
    names = ("cable", "host-a", "host-b")
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    assert not any(name in links for name in names), "something is left behind"
