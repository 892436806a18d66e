"""The timings of what surrounds layers run anywhere."""

import gpu_steps
import torch


def test_a_quick_run_prints_its_lines(monkeypatch, capsys, seeded):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_steps.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all(" ms eager" in line for line in lines[1:])
    assert all(line.endswith(" operations") for line in lines[-2:])
