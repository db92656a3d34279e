"""README and docs are tested: commands are real, tables are complete, links lead somewhere, numbers hold."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import run
import train
from config import TYPES, load_config
from freeze import count
from model import Wav2Vec2, Wav2Vec2Config
from report import speed
from report.logmel import LogMel
from tests.test_architecture import CORE

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
README = PAGES["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands of fenced `sh` blocks, without comments; continued lines joined."""
    blocks = "".join(body for language, body in FENCE.findall(text) if language == "sh")
    lines = blocks.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [" ".join(part.split()) for part in parts if part.strip()]


def section(word: str, page: str = "README.md") -> str:
    """The section with this word in its heading, without the heading."""
    pattern = rf"^##? [^\n]*\b{word}\b[^\n]*\n(.*?)(?=^## |\Z)"
    found = re.findall(pattern, PAGES[page], re.DOTALL | re.MULTILINE | re.IGNORECASE)
    assert len(found) == 1, f"expected one section about {word}"
    return found[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a section's first table, without its head."""
    table = re.search(r"(^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def script_of(words: list[str]) -> str | None:
    """The file of ours that a command runs, with `python`, `python -m` or `torchrun`."""
    if words[0] == "torchrun":
        words = ["python", *(word for word in words[1:] if not word.startswith("--nproc_per_node"))]
    if words[0] != "python":
        return None
    if words[1] == "-m":
        path = words[2].replace(".", "/") + ".py"
        return path if (ROOT / path).is_file() else None
    return words[1]


LINES = [(page, line) for page, text in PAGES.items() for line in commands(text)]
COMMANDS = [shlex.split(line) for page, line in LINES if "<" not in line]
OURS = [words for words in COMMANDS if script_of(words)]


# ---------------------------------------------------------------- commands


def test_the_first_screen_has_the_two_commands():
    """One that trains and one that tests, in a block of their own; the second is the one that .ci/run ends with."""
    first_screen = README.split("\n## ")[0]
    blocks = [body.splitlines() for language, body in FENCE.findall(first_screen) if language == "sh"]
    tests = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1].strip()
    assert "pytest" in tests
    assert ["python train.py configs/lora_r8.yaml", tests] in blocks
    assert len(first_screen.splitlines()) < 60


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 160


def test_every_command_is_one_that_is_known():
    """So that a new one is checked here as well."""
    other = ("pip", "git", "cd", ".", "ruff", "pyright", "mypy")
    assert [words for words in COMMANDS if words[0] not in ("python", "torchrun", *other)] == []
    modules = [words[2] for words in COMMANDS if words[:2] == ["python", "-m"] and words not in OURS]
    assert set(modules) <= {"pytest", "venv"}
    for words in COMMANDS:
        if words[:3] == ["pip", "install", "-r"]:
            assert (ROOT / words[3]).is_file()


@pytest.mark.parametrize("line", [line for _, line in LINES])
def test_a_shell_leaves_every_command_as_it_is(line):
    """zsh takes brackets, stars and question marks for file names unless they are quoted."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
    assert re.findall(r"[\[\]*?~{}$]", bare) == []


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_scripts_configs_and_keys_of_commands_exist(words):
    """The script is there and has the options; each key is one of `Config`, and together they are valid."""
    script, arguments = script_of(words), [word for word in words[1:] if not word.startswith("--nproc_per_node")]
    source = (ROOT / script).read_text(encoding="utf-8")
    for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no {flag}"
    configs = [word for word in arguments if word.endswith(".yaml")]
    assert [path for path in configs if not (ROOT / path).is_file()] == []
    if script in ("train.py", "corpora/check.py"):
        keys = [word for word in arguments if "=" in word and not word.startswith("--")]
        assert len(configs) == 1
        load_config(ROOT / configs[0], keys)


def test_there_is_a_command_that_trains_and_one_that_predicts_from_that_run():
    """What follows on what: the run that is predicted from has the name that was trained under."""
    assert {"train.py", "predict.py"} <= {script_of(words) for words in OURS}
    trained = [load_config(ROOT / words[2], words[3:]) for words in OURS if words[1] == "train.py"]
    runs = {f"{config.output_dir}/{config.name}" for config in trained}
    assert {words[2] for words in OURS if words[1] == "predict.py"} <= runs


@pytest.mark.parametrize("page", PAGES)
def test_keys_that_the_text_names_exist(page):
    """`key: value` and `key=` in running text."""
    found = set(re.findall(r"`(\w+)(?:=|: )[^`]*`", FENCE.sub("", PAGES[page]))) - {"key", "requires_grad"}
    assert found - TYPES.keys() == set()


# ---------------------------------------------------------------- tables


def test_the_reading_order_is_the_core():
    """Every file of the core once, and no other."""
    named = [cells[0].strip("`") for cells in rows(section("code"))]
    assert sorted(named) == sorted(name.replace(".", "/") + ".py" for name in CORE)


def test_every_folder_and_command_is_named():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/__init__.py")]:
        name = path.name if path.parent == ROOT else f"{path.parent.name}/"
        assert f"`{name}`" in README, name


def test_the_method_tables_are_those_of_the_configs():
    """Every config once in docs, some in README, with the number of trainable parameters on wav2vec2-base."""
    whole = {cells[0].strip("`"): cells[-1] for cells in rows(section("methods", "docs/methods.md"))}
    assert whole.keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name, said in whole.items():
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        backbone = LogMel()
        if config.backbone != "logmel":
            with torch.device("meta"):
                backbone = Wav2Vec2(Wav2Vec2Config())
        model = run.assemble(config, backbone, (1, 7))
        assert f"{count(model)[1] / 1e6:.2f} M" == said, name
    few = {cells[0].strip("`"): cells[-1] for cells in rows(section("method"))}
    assert few.items() <= whole.items()


def test_the_speed_tables_are_made_from_the_figures():
    """Word for word what `python bench.py --table FILE` prints, for every file that docs/speed.md names so."""
    page = PAGES["docs/speed.md"]
    named = re.findall(r"bench\.py --table (\S+)", page)
    assert named
    for path in named:
        assert speed.tables(speed.read_result(ROOT / path)) in page


# ---------------------------------------------------------------- links and words


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    """Files that the text links to, and headings."""
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)
    }
    for target in (target for target in targets if not re.match(r"https?://", target)):
        path, _, anchor = target.partition("#")
        assert not path or ((ROOT / page).parent / path).exists(), target
        assert not anchor or path or anchor in anchors, target


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page):
    """CAPITALS_LIKE_THESE outside of code wait for a figure or for what will be printed there."""
    outside = re.sub(r"`[^`]*`", "", FENCE.sub("", PAGES[page]))
    assert re.findall(r"\b[A-Z]+_[A-Z_]+\b|^RESULTS$", outside, re.MULTILINE) == []


def test_every_test_file_that_contributing_names_is_there():
    named = set(re.findall(r"test_\w+\.py", PAGES["CONTRIBUTING.md"]))
    assert {name for name in named if not (ROOT / "tests" / name).is_file()} == set()


def test_files_of_a_run_have_the_names_that_the_text_gives_them():
    """What a reader looks for in `runs/<name>` is what `train.py` writes."""
    source = Path(train.__file__).read_text(encoding="utf-8") + Path(run.__file__).read_text(encoding="utf-8")
    for name in ("config.yaml", "log.jsonl", "result.json", "predictions_test.csv", "best.pt", "last.pt"):
        assert f"`{name}`" in README
        assert f'"{name}"' in source
