"""`rlamort bench gpu`: its lines, here with tiny sizes on the CPU, and what becomes of those that crash, hang or are late."""

import json
import warnings

import pytest
import torch

from rlamort.cli import main
from rlamort.errors import UserError
from rlamort.measure import gpu as module
from rlamort.measure.gpu import Worker, gpu
from rlamort.measure.gpu_worker import LINES, measure


@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("same") or line == "same td3"])
def test_every_line_gives_its_figures(line):
    found = measure(line, "cpu")
    assert not [key for key in found if "skipped" in key or "warning" in key]
    assert found
    assert all(isinstance(value, str) or value >= 0 for value in found.values())
    if line in ("same td3", "resume"):  # on a CPU, uncompiled: bit for bit
        assert [value for key, value in found.items() if " from " in key] == [0.0]
    json.dumps(found)


def test_lines_that_crash_hang_or_come_too_late_cost_themselves_alone(monkeypatch, tmp_path):
    assert Worker("sac", "cpu").result(0.01)["sac, failed"].startswith("it took more than 0 s")  # it was never ready
    late = Worker("sb3 td3", "cpu")
    late.prepare(60.0)
    assert late.result(0.001)["sb3 td3, failed"].startswith("it took more than")
    monkeypatch.setitem(LINES, "no such line", lambda bench: {})  # which the worker's process does not know
    keep = tmp_path / "gpu.json"
    report = gpu("cpu", keep, ["no such line", "answers"])
    kept = json.loads(keep.read_text())
    assert kept["figures"]["no such line, failed"] == "KeyError: 'no such line'"
    assert kept["figures"]["certified"] == "10 of 10"
    assert kept == json.loads(json.dumps(report.data))
    assert any("10 of 10" in line for line in report.lines)
    monkeypatch.setattr(module, "ALL", 0.0)
    assert gpu("cpu", None, ["sb3 td3"]).data["figures"] == {"sb3 td3, skipped": "0 s are over"}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on machines without one
    with pytest.raises(UserError, match=r"device=cuda: this torch .* sees no CUDA device"):
        gpu()
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command line sets
    assert main(["bench", "gpu", "--device", "cuda:1"]) == 2
    assert "device=cuda:1: this torch" in capsys.readouterr().err
