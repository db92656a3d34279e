"""The shape of the code: imports in one direction, small functions, few modules, nothing that is not asked for."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDERS = ("corpora", "formats", "machine", "report", "tools")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("[!_]*.py"))])
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
LIBRARY = {  # what of ours a module may import: at its top, and inside a function where a cycle would be the price
    "config": (set(), {}),
    "metrics": (set(), {}),
    "results": ({"data", "metrics"}, {}),
    "demo": (set(), {}),
    "audio": ({"config"}, {}),
    "data": ({"audio", "config"}, {}),
    "media": ({"audio", "data"}, {}),
    "tree": ({"data"}, {}),
    **{name: ({"data", "tree"}, {}) for name in ("iemocap", "msp_improv", "msp_podcast", "muse")},
    "emotale": ({"data", "metrics", "tree"}, {}),
    "published": ({"data", "demo", "emotale", "iemocap", "msp_improv", "msp_podcast", "muse"}, {}),
    "lora": ({"model"}, {}),
    "model": (set(), {"data": "predict"}),
    "logmel": ({"model"}, {}),
    "freeze": ({"model"}, {}),
    "plots": (set(), {}),
    "weights": ({"model"}, {}),
    "adapter": ({"lora", "model", "weights"}, {}),
    "cache": (
        {"audio", "model", "writing"},
        {"run": "main", "caches": "main", "parallel": "main"},
    ),  # its small command line
    "caches": ({"cache", "writing"}, {}),
    "tier": ({"cache"}, {}),
    "card": ({"adapter"}, {}),
    "parallel": (set(), {}),
    "writing": ({"parallel"}, {}),
    "hardware": ({"freeze", "model", "parallel"}, {}),
    "frozen": ({"cache", "data", "freeze", "hardware", "model", "parallel", "tier"}, {}),
    "run": (
        {"adapter", "cache", "config", "data", "freeze", "frozen", "hardware", "logmel", "lora"}
        | {"model", "parallel", "weights", "writing"},
        {},
    ),
}
TIMED = {  # lazily: what is measured, and what draws the figures
    ("bench", "train", "ours"),
    *(("bench", "transformers", function) for function in ("peer", "peer_model", "naive_model")),
    *(("bench", "peft", function) for function in ("peer_model", "naive_model")),
    ("bench", "matplotlib", "draw"),
    ("plots", "matplotlib", None),
    ("check", "matplotlib", "draw_labels"),
}
OTHERS_FRAMEWORKS = "transformers peft fairseq lightning pytorch_lightning hydra omegaconf accelerate datasets "
OTHERS_FRAMEWORKS += "speechbrain s3prl torchaudio librosa sklearn pandas wandb tensorboard"


def names_imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    first, *rest = (node.module or "").split(".")
    if first in FOLDERS:
        return {rest[0]} if rest else {alias.name for alias in node.names}
    return {first}


def imports(name: str) -> list[tuple[str, str | None]]:
    """Every import of a module: what, and the innermost function that it stands in."""
    found = []

    def visit(node: ast.AST, function: str | None) -> None:
        for child in ast.iter_child_nodes(node):
            found.extend((imported, function) for imported in names_imported(child))
            visit(child, child.name if isinstance(child, FUNCTION) else function)

    visit(TREES[name], None)
    return found


def functions(name: str) -> list[tuple[str, ast.FunctionDef]]:
    """Every function and method of a module with its name in it."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTION | ast.ClassDef):
                if isinstance(child, FUNCTION):
                    found.append((prefix + child.name, child))
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(TREES[name], "")
    return found


def tracked_files() -> list[Path]:
    """What belongs to the repository, or would with the next commit."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a clone made with git")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_module_imports_nothing_that_sits_above_it(name):
    """The table of the design; a lazy import counts, and is allowed in one named function alone."""
    at_top, inside = LIBRARY[name]
    for imported, function in imports(name):
        if imported in TREES:
            allowed = imported in at_top if function is None else inside.get(imported) == function
            assert allowed, f"{name}.py imports {imported} in {function or 'its top'}"


def test_entry_points_are_imported_by_nobody():
    """What is no library module has a `main`, and only tests import it."""
    entry_points = TREES.keys() - LIBRARY.keys()
    assert {"train", "predict"} <= entry_points
    for name in entry_points:
        assert "main" in dict(functions(name)), f"{name}.py is neither a library module of LIBRARY nor an entry point"
    imported = {(name, of, function) for name in TREES for of, function in imports(name) if of in entry_points}
    assert imported - TIMED == set()


def test_library_functions_take_plain_values_and_never_the_configuration():
    """So that they can be copied out: only `run`, which joins them, and entry points know `Config`."""
    for name in LIBRARY.keys() - {"audio", "config", "data", "run"}:  # two take `extra` alone
        assert "config" not in {imported for imported, _ in imports(name)}


def test_matplotlib_is_loaded_only_for_a_picture():
    """All but pictures works without it: no module imports `plots` at its top."""
    assert [name for name in TREES if ("plots", None) in imports(name)] == []


@pytest.mark.parametrize("name", TREES)
def test_every_import_is_ours_pythons_or_in_the_requirements(name):
    """And none is a framework: PyTorch and a few small helpers, each with its reason in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split(r"[<>=;\s]", line)[0] for line in lines if line and not line.startswith("#")}
    required = {{"pyyaml": "yaml"}.get(package, package) for package in required}
    found = {imported for imported, function in imports(name) if (name, imported, function) not in TIMED}
    assert found - TREES.keys() - sys.stdlib_module_names - required == set()
    assert found & set(OTHERS_FRAMEWORKS.split()) == set()


# ---------------------------------------------------------------- size


def test_there_are_at_most_twelve_modules():
    """Subclasses of `nn.Module` over all files, direct or not: ten of the model, the baseline, an ONNX graph."""
    classes = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    modules: set[str] = set()
    for _ in classes:  # a base may come after what it is a base of
        for name, node in classes.items():
            bases = [ast.unparse(base) for base in node.bases]
            if any(base in modules or re.fullmatch(r"(torch\.)?nn\.(?!Parameter)\w+", base) for base in bases):
                modules.add(name)
    assert {"Wav2Vec2", "EmotionModel", "LoRALinear", "Linear", "LogMel"} <= modules
    assert len(modules) <= 12, sorted(modules)


@pytest.mark.parametrize("name", TREES)
def test_no_function_is_long(name):
    """60 lines; the training loop 120."""
    lengths = {function: node.end_lineno - node.lineno + 1 for function, node in functions(name)}
    limits = {("train", "train"): 120}
    assert {f: n for f, n in lengths.items() if n > limits.get((name, f), 60)} == {}


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("name", TREES)
def test_signatures_are_typed(name):
    """Every argument and result; `self`, `cls`, `ctx` and what a constructor returns speak for themselves."""
    untyped = []
    for function, node in functions(name):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        known = ("self", "cls", "ctx")
        untyped += [f"{function}({a.arg})" for a in arguments if a and not a.annotation and a.arg not in known]
        untyped += [function] if node.returns is None and not function.endswith("__init__") else []
    assert untyped == []


@pytest.mark.parametrize("name", TREES)
def test_modules_classes_and_public_functions_say_what_they_are(name):
    """A docstring, but where a few lines, names and types tell all of it: in `main`, and in fifteen lines at most."""
    assert ast.get_docstring(TREES[name])
    silent = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef) and not ast.get_docstring(node):
            silent.append(node.name)
    for function, node in functions(name):
        short = node.end_lineno - node.lineno < 15
        hidden = function.split(".")[-1].startswith("_") or function == "main"
        if not (ast.get_docstring(node) or short or hidden):
            silent.append(function)
    assert silent == []


def test_nothing_points_to_what_is_not_there_or_not_done():
    """No note to ourselves and no path outside the repository in any file of it."""
    words = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "share" + "d/", "/work" + "/"]
    found = []
    for path in (path for path in tracked_files() if path.suffix != ".png"):
        text = path.read_text(encoding="utf-8")
        found += [(str(path.relative_to(ROOT)), word) for word in words if re.search(rf"(?<!\w){word}", text)]
    assert found == []


# ---------------------------------------------------------------- requirements


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:2])


def test_requirements_pin_the_range_of_torch_and_give_each_reason():
    """From below and above, with this environment's inside; a reason stands behind every package."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    (torch_line,) = (line for line in packages if re.match(r"torch\W", line))
    low, high = re.match(r"torch>=([\d.]+),<([\d.]+)\s", torch_line).groups()
    assert version(low) <= version(torch.__version__) < version(high)
    assert [line for line in packages if not re.search(r"\s# ?\w", line)] == []
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
