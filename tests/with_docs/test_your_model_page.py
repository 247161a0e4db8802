"""The command line of docs/your-model.md runs as it stands, on a bundled model in the place of
`path/to/model`. It is here because its commands start three processes; the page's other blocks run
in `tests/docs`."""

import re
from importlib.resources import files
from pathlib import Path

from shells import TOKENENV, flat, shell

PAGE = Path(__file__).parents[2] / "docs" / "your-model.md"
TITLED = re.compile(r"^```python title=\"(.+?)\"\n(.*?)^```", re.M | re.S)
BASH = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)


def test_the_commands_run(tmp_path):
    """A function of the user's own file is the reward, another file's prompts are evaluated."""
    page = PAGE.read_text(encoding="utf-8")
    for name, text in TITLED.findall(page):
        (tmp_path / name).write_text(text)
    (tmp_path / "train.txt").write_text("the soup was\nthe room was\n")
    (tmp_path / "held_out.txt").write_text("the garden was\n")
    model = files("tokenenv.envs") / "assets" / "reviews-lm"
    commands = "\n".join(BASH.findall(page)).replace("path/to/model", str(model))
    assert commands.count("tokenenv ") == 3
    done = shell(f'tokenenv() {{ {TOKENENV} "$@"; }}\n{commands}', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "happy" / "episodes.html").is_file()
    assert "the garden was" in flat(done.stdout)
    assert "the soup was" not in flat(done.stdout)
