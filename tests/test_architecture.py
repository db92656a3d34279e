"""The house: what stands where, imports in one direction, small rooms, nothing that nobody asked for."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CORE = ["train", "run", "model", "data", "freeze", "lora", "cache", "weights", "metrics", "config"]
CORE += ["machine.hardware", "machine.fast", "machine.audio"]
COMMANDS = {"train", "predict", "compare", "export", "bench", "corpora.check", "tools.caches", "tools.layers"}
FOLDERS = {  # and what of ours the modules of each may import, beside their own folder
    "machine": {"config"},  # the ground on which all stands
    "corpora": {"machine", "report", "core"},
    "formats": {"machine", "core"},
    "report": {"machine", "core"},
    "tools": {"machine", "corpora", "formats", "report", "core"},
}
PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PATHS)
}
FILES = {name: path for name, path in zip(TREES, sorted(PATHS), strict=True)}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
OPTIONAL = {"transformers", "peft", "matplotlib", "onnx", "onnxscript", "onnxruntime"}  # loaded inside functions
OTHERS_FRAMEWORKS = "fairseq lightning pytorch_lightning hydra omegaconf accelerate datasets "
OTHERS_FRAMEWORKS += "speechbrain s3prl torchaudio librosa sklearn pandas wandb tensorboard"


def names_imported(node: ast.AST) -> set[str]:
    """Modules that a statement imports, ours with their folder."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        inside = {f"{node.module}.{alias.name}" for alias in node.names} & TREES.keys()
        return inside or {node.module}
    return set()


def imports(name: str) -> list[tuple[str, str | None]]:
    """Every import of a module: what, and the innermost function that it stands in."""
    found = []

    def visit(node: ast.AST, function: str | None) -> None:
        for child in ast.iter_child_nodes(node):
            found.extend((imported, function) for imported in names_imported(child))
            visit(child, child.name if isinstance(child, FUNCTION) else function)

    visit(TREES[name], None)
    return found


def ours(name: str) -> set[str]:
    """The modules of this repository that a module imports, anywhere."""
    return {imported for imported, _ in imports(name)} & TREES.keys() - {name}


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


def code_lines(name: str) -> int:
    """Lines that are not blank."""
    return sum(1 for line in FILES[name].read_text(encoding="utf-8").splitlines() if line.strip())


def tracked_files() -> list[Path]:
    """What belongs to the repository, or would with the next commit."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a clone made with git")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


# ---------------------------------------------------------------- rooms


def test_the_top_level_holds_the_core_and_the_commands():
    """At most fourteen files, and each is one or the other."""
    top = {name for name in TREES if "." not in name}
    assert top == {name for name in {*CORE, *COMMANDS} if "." not in name}
    assert len(top) <= 14


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_in_one_sentence_what_belongs_there(folder):
    said = ast.get_docstring(TREES[f"{folder}.__init__"])
    assert said.endswith(".") and "\n" not in said
    assert len(TREES[f"{folder}.__init__"].body) == 1  # and does nothing else


def test_no_python_file_lies_outside_the_house():
    known = {*FILES.values(), *(ROOT / "tests").rglob("*.py"), ROOT / "small" / "distil.py"}
    assert [path for path in tracked_files() if path.suffix == ".py" and path not in known] == []


# ---------------------------------------------------------------- imports


def test_imports_form_no_circle():
    """Those inside functions count."""
    finished: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for other in sorted(ours(name)):
                visit(other, (*path, name))
            finished.append(name)

    for name in TREES:
        visit(name, ())


@pytest.mark.parametrize("name", TREES)
def test_imports_point_inwards(name):
    """The core knows only itself and two files of `machine`; a folder only what FOLDERS allows."""
    folder = name.partition(".")[0]
    for other in ours(name):
        if name in CORE:
            assert other in CORE, f"{name} is core and imports {other}"
        elif folder in FOLDERS and "." in name:
            allowed = FOLDERS[folder] | {folder}
            place = other.partition(".")[0] if "." in other else "core" if "core" in allowed else other
            assert place in allowed, f"{name} imports {other}"


def test_commands_are_imported_by_nobody():
    """A command is what has a `main`; libraries are no commands."""
    with_main = {name for name in TREES if "main" in dict(functions(name))}
    assert with_main == COMMANDS
    assert {(name, other) for name in TREES for other in ours(name) & COMMANDS} == set()


def test_library_functions_take_plain_values_and_never_the_configuration():
    """So that they can be copied out: only `run`, which joins them, and commands know `Config`."""
    knowing = {
        name
        for name in TREES
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and node.module == "config" and "Config" in {a.name for a in node.names}
    }
    assert knowing - COMMANDS == {"run"}


def test_matplotlib_is_loaded_only_for_a_picture():
    """Everything but pictures works without it: only `report.plots` imports it at its top, and nobody that one."""
    at_top = {name for name in TREES if ("matplotlib", None) in [(i.partition(".")[0], f) for i, f in imports(name)]}
    assert at_top <= {"report.plots"}
    assert [name for name in TREES if ("report.plots", None) in imports(name)] == []


@pytest.mark.parametrize("name", TREES)
def test_every_import_is_ours_pythons_or_in_the_requirements(name):
    """And none is a framework: PyTorch and a few small helpers, each with its reason in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split(r"[<>=;\s]", line)[0] for line in lines if line and not line.startswith("#")}
    required = {{"pyyaml": "yaml"}.get(package, package) for package in required}
    found = {imported.partition(".")[0] for imported, function in imports(name)}
    lazy = {imported.partition(".")[0] for imported, function in imports(name) if function}
    lazy |= {"matplotlib"} if name == "report.plots" else set()
    house = {module.partition(".")[0] for module in TREES}
    assert found - house - sys.stdlib_module_names - required - (OPTIONAL & lazy) == set()
    assert found & set(OTHERS_FRAMEWORKS.split()) == set()


# ---------------------------------------------------------------- size


def test_the_core_is_small():
    assert len(CORE) <= 13
    assert sum(map(code_lines, CORE)) <= 3000


def test_the_whole_is_not_large():
    """Lines that are not blank, without tests: it grows only on purpose."""
    assert sum(map(code_lines, TREES)) <= 6780


@pytest.mark.parametrize("name", TREES)
def test_no_file_is_long(name):
    limit = {"train": 300, "model": 420}.get(name, 450)
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("name", TREES)
def test_no_function_is_long(name):
    """60 lines; the training loop 100."""
    lengths = {function: node.end_lineno - node.lineno + 1 for function, node in functions(name)}
    limits = {("train", "train"): 100}
    assert {f: n for f, n in lengths.items() if n > limits.get((name, f), 60)} == {}


def test_private_operators_of_pytorch_stand_in_one_file():
    private = re.compile(r"torch\.ops\.|torch\._C|mkldnn\._|torch\._[a-z]")
    assert {name for name in TREES if private.search(FILES[name].read_text(encoding="utf-8"))} <= {"machine.fast"}


def test_there_are_at_most_fourteen_modules():
    """Subclasses of `nn.Module` over all files: ten of the model, two of WavLM, the baseline, an ONNX graph."""
    classes = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    modules: set[str] = set()
    for _ in classes:  # a base may come after what it is a base of
        for name, node in classes.items():
            bases = [ast.unparse(base) for base in node.bases]
            if any(base in modules or re.fullmatch(r"(torch\.)?nn\.(?!Parameter)\w+", base) for base in bases):
                modules.add(name)
    assert {"Wav2Vec2", "EmotionModel", "LoRALinear", "LogMel"} <= modules
    assert len(modules) <= 14, sorted(modules)


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
    for path in (path for path in tracked_files() if path.suffix not in (".png", ".safetensors", ".pt")):
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
