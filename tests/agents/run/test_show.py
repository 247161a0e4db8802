"""`tokenenv show`: the page holds the run's numbers, hostile texts stay text, and what is missing
is said."""

import json
import re

import pytest
from runs import episode, write

from tokenenv.agents.run.show import choose, curve, evenly, page, read_episodes, write_page
from tokenenv.cli import main
from tokenenv.errors import InvalidArgument


def data_of(path):
    """What the page's script reads, as a browser finds it: up to the first end of a script
    element."""
    return json.loads(
        re.search(
            r'<script id="data"[^>]*>(.*?)</script', path.read_text(encoding="utf-8"), re.S
        ).group(1)
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder that `tokenenv train` made."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    flags = [
        "--num-envs",
        "8",
        "--total-tokens",
        "600",
        "--agent.batch-tokens",
        "200",
        "--options",
        "max_new_tokens",
        "8",
    ]
    main(["train", *flags, "--run-dir", str(folder)])
    return folder


def test_the_command_writes_the_page_of_a_run(run_dir, capsys):
    main(["show", str(run_dir)])
    assert "episodes.html" in capsys.readouterr().out
    data, (lines, skipped) = data_of(run_dir / "episodes.html"), read_episodes(run_dir)
    assert skipped == data["skipped"] == 0
    assert data["total"] == len(lines)
    assert data["run"] == {"env": "tokenenv/Reviews-v0", "algo": "ppo"}
    detailed = [line for line in lines if "tokens" in line]
    assert data["episodes"] == detailed
    for e in detailed:
        assert (
            len(e["tokens"])
            == len(e["token_rewards"])
            == len(e["token_advantages"])
            == len(e["token_values"])
            == e["length"]
        )
        assert sum(e["token_rewards"]) == pytest.approx(e["reward"], abs=0.01)
        assert sum(e["token_kl"]) == pytest.approx(e["kl"], abs=0.01)
        assert {n: sum(v) for n, v in e["token_terms"].items()} == pytest.approx(
            e["terms"], abs=0.01
        )
        for t in range(e["length"]):
            assert sum(column[t] for column in e["token_terms"].values()) == pytest.approx(
                e["token_rewards"][t], abs=2e-3
            )
        assert "".join(e["tokens"]).strip() == e["response"].strip()


def test_watched_numbers_are_columns(tmp_path):
    watched = {"surprise": [0.25, None]}
    data = data_of(write_page(write(tmp_path / "x", [episode(token_watched=watched), episode(1)])))
    assert data["columns"]["token_watched"]["label"] == "watch"
    assert [e.get("token_watched") for e in data["episodes"]] == [watched, None]


def test_hostile_tokens_stay_data(tmp_path):
    evil = [
        "</script><script>alert(1)</script>",
        "<!--",
        "<img src=x onerror=alert(2)>",
        "\u2028",
        '"',
        "\\",
        "__DATA__",
        "\n",
    ]
    path = write_page(write(tmp_path / "x", [episode(tokens=evil)]))
    assert data_of(path)["episodes"][0]["tokens"] == evil
    html = path.read_text(encoding="utf-8")
    assert html.count("</script") == 2
    assert "<img" not in html


def test_the_page_needs_no_network(tmp_path):
    html = write_page(write(tmp_path / "x", [episode()])).read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = write(tmp_path / "x", [episode(0), episode(1)], tail='{"tokens_seen": 300, "pro')
    episodes, skipped = read_episodes(folder)
    assert [e["score"] for e in episodes] == [0.0, 1.0]
    assert skipped == 0
    assert (
        read_episodes(write(tmp_path / "x", [episode(0)], tail=json.dumps(episode(1))))[0][-1][
            "score"
        ]
        == 1.0
    )


BAD_LINES = {
    "no JSON": '{"half',
    "no mapping": "[1, 2]",
    "no numbers": json.dumps({"tokens_seen": 3}),
    "deep": "[" * 100_000,
    "a number of too many digits": json.dumps(episode()).replace("100", "1" * 5000),
    "text for a number": json.dumps(episode(score="high")),
    "not a number": json.dumps(episode(score=float("nan"))),
    "an infinite reward": json.dumps(episode(token_rewards=[float("inf"), 0.0])),
    "a column too short": json.dumps(episode(token_rewards=[0.0])),
    "a watched column too short": json.dumps(episode(token_watched={"a": [0.0]})),
    "watched numbers that are none": json.dumps(episode(token_watched=["high", 0.0])),
    "tokens that are none": json.dumps(episode() | {"tokens": [1, 2]}),
    "no texts": json.dumps(episode(prompt={})),
    "a message that is no text": json.dumps(episode(message=3)),
    "a group that is no number": json.dumps(episode(group="a")),
    "special places that are none": json.dumps(episode(special=["a"])),
    "sums that are none": json.dumps(episode(terms={"a": "high"})),
    "columns that are none": json.dumps(episode(columns=["a"])),
    "segments that are none": json.dumps(episode(segments=[{"own": 1, "length": 2, "text": "a"}])),
    "segments without a text": json.dumps(episode(segments=[{"own": True, "length": 2}])),
    "segments of other tokens": json.dumps(
        episode(segments=[{"own": True, "length": 3, "text": "a"}])
    ),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_episode_is_left_out_and_counted(line, tmp_path):
    folder = write(tmp_path / "x", [episode(0)], tail=f"{line}\n{json.dumps(episode(1))}\n")
    data = data_of(write_page(folder))
    assert [e["score"] for e in data["episodes"]] == [0.0, 1.0]
    assert data["skipped"] == 1


def test_the_header_names_the_model_without_its_folder(tmp_path):
    folder = write(tmp_path / "x", [episode(0)])
    for options in ("{model: /home/me/smollm2/}", "{model: me/smollm2}", "{model: [1]}", "[1]"):
        (folder / "config.yaml").write_text(f"env: a\nreward: null\noptions: {options}\n")
        expected = {"env": "a"} | ({"model": "smollm2"} if "smollm2" in options else {})
        assert data_of(write_page(folder))["run"] == expected


@pytest.mark.parametrize(
    "config", ["env: [", "- a", "a: &x 1\nb: *x", "\x00"], ids=["cut", "list", "alias", "nul"]
)
def test_a_broken_config_is_named(config, tmp_path):
    folder = write(tmp_path / "x", [episode(0)])
    (folder / "config.yaml").write_text(config)
    with pytest.raises(InvalidArgument, match=r"config\.yaml"):
        write_page(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "has no episodes.jsonl; `tokenenv train` makes run folders"),
        (lambda folder: write(folder, []), "holds no finished episode yet"),
        (lambda folder: write(folder, [], tail='{"half'), "holds no finished episode yet"),
        (
            lambda folder: write(folder, [{k: v for k, v in episode().items() if k != "tokens"}]),
            "has no token columns; train again",
        ),
        (
            lambda folder: write(folder, [], tail='{"half\n[1, 2]\n'),
            "holds no finished episode yet, but 2 lines that are none",
        ),
    ],
    ids=["no-folder", "empty", "half-a-line", "old", "broken"],
)
def test_what_is_missing_is_said(tmp_path, make, message, capsys):
    make(tmp_path / "x")
    with pytest.raises(SystemExit) as stop:
        main(["show", str(tmp_path / "x")])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("*.html"))


def test_episodes_are_chosen_evenly_and_the_last_is_there(tmp_path):
    assert evenly(range(10), 5) == [1, 3, 5, 7, 9]
    assert evenly(range(3), 5) == [0, 1, 2]
    folder = write(tmp_path / "x", [episode(i) for i in range(50)])
    chosen = data_of(write_page(folder, tmp_path / "deep" / "page.html", max_episodes=7))[
        "episodes"
    ]
    assert len(chosen) == 7
    assert chosen[-1]["score"] == 49.0
    with pytest.raises(InvalidArgument, match="max_episodes=0"):
        write_page(folder, max_episodes=0)


def test_groups_are_chosen_whole():
    lines = [
        {"tokens_seen": 10 * u, "group": g} for u in range(3) for g in (0, 1) for _ in range(4)
    ]
    assert choose(lines, 24) == lines
    assert choose(lines, 9) == lines[8:12] + lines[20:]
    assert choose(lines, 3) == lines[21:]
    alone = [{"tokens_seen": 5, "score": i} for i in range(9)]
    assert choose(alone, 4) == evenly(alone, 4)


TEMPLATES = {
    "ChatML": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Gemma": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "Llama": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_last_message_is_found_in_a_templates_text(template, tmp_path):
    def messages(*lines):
        found = data_of(write_page(write(tmp_path / "x", lines)))["episodes"]
        return [line.get("message") for line in found]

    prompt = template.format("two\nlines <b>")
    assert messages(
        episode(prompt=prompt),
        episode(prompt=prompt, message="kept"),
        episode(prompt=prompt + "It begins"),  # a prefix, which is not to be hidden
        episode(prompt="plain"),
        episode(prompt=[1, 2]),
    ) == ["two\nlines <b>", "kept", None, None, None]


def test_the_curve_is_the_mean_score_of_each_update_or_what_was_earned():
    lines = [
        {"tokens_seen": 5, "score": 1.0},
        {"tokens_seen": 5, "score": 2.0},
        {"tokens_seen": 9, "score": None},
    ]
    assert curve(lines) == {"label": "score", "points": [(5, 1.5)]}
    lines = [
        {"tokens_seen": 5, "score": None, "terms": {"a": 1.0, "kl": -9.0}},
        {"tokens_seen": 5, "score": None},
        {"tokens_seen": 9, "score": None, "terms": {"a": 3.0, "kl": -9.0}},
    ]
    assert curve(lines) == {"label": "a", "points": [(5, 1.0), (9, 3.0)]}
    lines[2]["terms"]["b"] = 2.0
    assert curve(lines) == {"label": "reward without KL", "points": [(5, 1.0), (9, 5.0)]}
    assert curve(lines[1:2])["points"] == []


def test_the_page_is_what_is_read():
    assert json.loads(re.search(r'json">(.*?)</script', page({"a": "<b>"})).group(1)) == {
        "a": "<b>"
    }
