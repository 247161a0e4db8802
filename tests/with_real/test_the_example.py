"""The example of the front page, for one update."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "real_model.py"


def test_the_example_runs(folder, tmp_path):
    flags = ["--model", folder("smollm2"), "--algo", "grpo", "--save-to", "adapter"]
    short = ["--total-tokens", "400", "--texts", "16"]
    command = [sys.executable, str(EXAMPLE), *flags, *short]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    figures = re.findall(r"(\w+): sentiment (-?[\d.]+), (-?[\d.]+) nats", done.stdout)
    assert [title for title, *_ in figures] == ["before", "after"]
    assert float(figures[0][2]) == 0 != float(figures[1][2])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
