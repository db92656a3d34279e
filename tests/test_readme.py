"""The README is tested: its commands are real, its file map is complete, its links lead somewhere, its numbers hold."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import bench
import run
import train
from config import TYPES, load_config
from freeze import count
from model import Wav2Vec2, Wav2Vec2Config
from report.logmel import LogMel

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands of fenced `sh` and `bash` blocks, without comments and prompts; continued lines joined."""
    blocks = "".join(body for language, body in FENCE.findall(text) if language in ("sh", "bash"))
    lines = blocks.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").split("&&")]
    return [" ".join(part.split()) for part in parts if part.strip()]


def section(word: str) -> str:
    """The section with this word in its heading, without the heading."""
    found = re.findall(
        rf"^## [^\n]*\b{word}\b[^\n]*\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE | re.IGNORECASE
    )
    assert len(found) == 1, f"expected one section about {word}"
    return found[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a section's first table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


COMMANDS = [shlex.split(command) for command in commands(README)]
OURS = [words for words in COMMANDS if words[0] == "python" and words[1].endswith(".py")]
OURS += [["python", *words[2:]] for words in COMMANDS if words[0] == "torchrun"]  # behind --nproc_per_node


# ---------------------------------------------------------------- commands


def test_the_first_screen_has_the_two_commands():
    """One that trains and one that tests, in a block of their own; the second is the one that .ci/run ends with."""
    first_screen = README.split("\n## ")[0]
    blocks = [body.splitlines() for language, body in FENCE.findall(first_screen) if language in ("sh", "bash")]
    tests = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1].strip()
    assert "pytest" in tests
    assert ["python train.py configs/lora_r8.yaml", tests] in blocks
    assert len(first_screen.splitlines()) < 60


def test_every_command_is_one_that_is_known():
    """So that a new one is checked here as well."""
    known = ("python", "torchrun", "pip", "git", "cd")
    assert [words for words in COMMANDS if words[0] not in known] == []
    assert [words for words in COMMANDS if words[0] == "python" and words not in OURS and words[1] != "-m"] == []
    for words in COMMANDS:
        if words[:3] == ["pip", "install", "-r"]:
            assert (ROOT / words[3]).is_file()


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_scripts_configs_and_keys_of_commands_exist(words):
    """`train.py CONFIG key=value`: the file is there, each key is one of `Config`, and together they are valid."""
    script, arguments = words[1], words[2:]
    assert (ROOT / script).is_file()
    source = (ROOT / script).read_text(encoding="utf-8")
    for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no {flag}"
    configs = [word for word in arguments if word.endswith(".yaml")]
    if script == "train.py":
        assert len(configs) == 1
        assert arguments[0] == configs[0]
        assert [word.partition("=")[0] for word in arguments[1:] if word.partition("=")[0] not in TYPES] == []
        load_config(ROOT / configs[0], arguments[1:])
    for path in configs:
        assert (ROOT / path).is_file()


def test_there_is_a_command_that_trains_and_one_that_predicts_from_that_run():
    """What follows on what: the run that is predicted from has the name that was trained under."""
    scripts = [words[1] for words in OURS]
    assert {"train.py", "predict.py"} <= set(scripts)
    trained = [load_config(ROOT / words[2], words[3:]) for words in OURS if words[1] == "train.py"]
    runs = {f"{config.output_dir}/{config.name}" for config in trained}
    assert {words[2] for words in OURS if words[1] == "predict.py"} <= runs


def test_keys_that_the_text_names_exist():
    """`key: value` and `key=` in running text."""
    text = FENCE.sub("", README)
    found = set(re.findall(r"`(\w+)(?:=|: )[^`]*`", text)) - {"key"}
    assert found
    assert found - TYPES.keys() == set()


# ---------------------------------------------------------------- files

APART = {"tests", ".venv", "venv", "cache", "data", "runs"}


def test_the_file_map_is_complete_and_holds_nothing_else():
    """Every source file once, and every file that it names exists."""
    named = [name for cells in rows(section("files")) for name in re.findall(r"`([^`]+)`", cells[0])]
    assert len(named) == len(set(named))
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert {name for name in named if name.endswith(".py")} == {
        str(path.relative_to(ROOT)) for path in ROOT.glob("**/[!_]*.py") if path.parts[len(ROOT.parts)] not in APART
    }


def test_the_method_table_is_that_of_the_configs():
    """Every config once, and the number of trainable parameters that it has on wav2vec2-base."""
    table = {cells[0].strip("`"): cells[-1] for cells in rows(section("methods"))}
    assert table.keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name, said in table.items():
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        backbone = LogMel()
        if config.backbone != "logmel":
            with torch.device("meta"):
                backbone = Wav2Vec2(Wav2Vec2Config())
        model = run.assemble(config, backbone, (1, 7))
        assert f"{count(model)[1] / 1e6:.2f} M" == said, name


def test_the_speed_tables_are_made_from_the_figures():
    """Word for word what `python bench.py --table docs/bench_cpu.json` prints."""
    assert bench.tables(bench.read_result(ROOT / "docs" / "bench_cpu.json")) in README


def test_relative_links_resolve():
    """Files that the text links to, and headings."""
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    local = [target for target in targets if not re.match(r"https?://", target)]
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for target in local:
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), target
        assert not anchor or path or anchor in anchors, target


def test_no_placeholder_is_left():
    """CAPITALS_LIKE_THESE outside of code wait for a figure or for what will be printed there."""
    assert re.findall(r"\b[A-Z]+_[A-Z_]+\b", re.sub(r"`[^`]*`", "", FENCE.sub("", README))) == []


def test_files_of_a_run_have_the_names_that_the_text_gives_them():
    """What a reader looks for in `runs/<name>` is what `train.py` writes."""
    source = Path(train.__file__).read_text(encoding="utf-8")
    for name in ("config.yaml", "log.jsonl", "result.json", "predictions_test.csv", "best.pt", "last.pt"):
        assert f"`{name}`" in README
        assert f'"{name}"' in source
