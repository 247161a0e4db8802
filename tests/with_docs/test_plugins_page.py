"""docs/plugins.md runs as it stands. It is here, not in `tests/cli`, because its commands start more
than a dozen processes: more than a minute of one core."""

import re
import sys
from pathlib import Path

from shells import FLAGS, TOKENENV, flat, shell

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```", re.M | re.S)


def blocks():
    return [match.groups() for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]


def test_the_page_runs_as_it_stands(tmp_path):
    """Its files are written, its commands run, in the order of the page; nothing else is needed."""
    commands = []
    for language, title, text in blocks():
        if title:
            commands.append(f"mkdir -p $(dirname {title}); cat > {title} <<'END'\n{text}END\n")
        elif language == "bash":
            commands.append(text)
    assert len(commands) > 8
    tools = f"""
        tokenenv() {{ {TOKENENV} "$@"; }}
        pip() {{ {sys.executable} -m pip "$@" {" ".join(FLAGS)} --target site; }}
        export PYTHONPATH=site
    """
    done = shell(tools + "".join(commands), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = flat(done.stdout)
    assert (
        "mine/ShortReviews-v1 Write a positive review, in few words. (plugin my-plugin 1.0)"
        in printed
    )
    assert "Takes away a tenth for each word (plugin my-plugin 1.0)" in printed
    assert "--agent.baseline FLOAT Share of the mean return that is subtracted." in printed
    assert printed.count("distinct bigrams") == 2
