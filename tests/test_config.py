"""What `config` promises: no key is misspelt, mistyped or without effect, and no value is taken for another."""

import ast
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml

import run
from config import Config, load_config, make_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
KEYS = [field.name for field in fields(Config)]


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


# ---------------------------------------------------------------- the configs that come with the repository


def test_the_nine_published_configs_are_there():
    """Other programs and the README name them."""
    published = "full full_amp full_checkpointing partial3 partial3_amp partial3_cached heads_only lora_r8"
    assert {*published.split(), "lora_last3_cached"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_published_config_loads_and_says_nothing_twice(path):
    """Its name is the file's, each key is a field, and none repeats the default."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = load_config(path)
    assert config.name == path.stem
    assert set(values) <= set(KEYS)
    assert [key for key in values if getattr(config, key) == getattr(Config(), key) and key != "trainable_layers"] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_resolved_config_reads_back_as_itself(path):
    """`config.yaml` of a run's directory, with every key written out, is the same experiment."""
    config = load_config(path)
    plain = {key: list(value) if isinstance(value := getattr(config, key), tuple) else value for key in KEYS}
    again = make_config(yaml.safe_load(yaml.safe_dump(plain)), "config.yaml")
    assert {key: list(v) if isinstance(v := getattr(again, key), tuple) else v for key in KEYS} == plain


def attributes_read(path: Path, of: tuple[str, ...]) -> set[str]:
    """Names read as `config.name` (or of another of these variables) in a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
    return {node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id in of}


def test_every_key_is_read_by_the_code():
    """A key that nothing reads has no effect; regularisation goes to the model's own config by name."""
    modules = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")] if path.name != "config.py"]
    read = set().union(*(attributes_read(path, ("config",)) for path in modules)) | run.corpus_keys(Config()).keys()
    in_model = attributes_read(ROOT / "model.py", ("config", "c"))
    unread = {key for key in KEYS if key not in read and not (key in run.REGULARISATION and key in in_model)}
    assert unread == set()


# ---------------------------------------------------------------- keys and overrides


@pytest.mark.parametrize(
    ("key", "nearest"), [("learning_rates", None), ("lora_rnk", "lora_rank"), ("epoch", "epochs"), ("LR", None)]
)
def test_an_unknown_key_is_an_error_that_suggests_the_nearest(tmp_path, key, nearest):
    """In the file and in an override alike; nothing is suggested where nothing is near."""
    message = rf"experiment\.yaml: unknown key '{key}'" + (rf", did you mean '{nearest}'\?$" if nearest else "$")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, f"{key}: 1\n")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "", f"{key}=1")


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path):
    """They are YAML too: lists, null and numbers mean what they mean in the file."""
    config = load(tmp_path, "seed: 1\nepochs: 3\n", "seed=2", "targets=[valence]", "micro_batch_size=null", "seed=3")
    assert (config.seed, config.epochs, config.targets, config.micro_batch_size) == (3, 3, ["valence"], None)
    assert load(tmp_path, "name: mine\n").name == "mine"
    assert load(tmp_path, "", "data_root=a=b").data_root == "a=b"


@pytest.mark.parametrize("override", ["seed", "--seed", ""])
def test_an_override_without_a_value_is_an_error(tmp_path, override):
    """It is not taken for a path or a flag."""
    with pytest.raises(ValueError, match=rf"^{override}: expected key=value, as in seed=1$"):
        load(tmp_path, "", override)


def test_an_empty_file_is_the_default_experiment(tmp_path):
    """Comments alone are empty too; only the name comes from the file."""
    for text in ("", "# nothing\n"):
        assert load(tmp_path, text) == Config(name="experiment")


def test_a_config_cannot_be_changed():
    """What was checked stays so."""
    with pytest.raises(FrozenInstanceError):
        Config().seed = 1


# ---------------------------------------------------------------- files that are no configs


@pytest.mark.parametrize(("text", "found"), [("- seed\n- 1\n", "list"), ("seed\n", "str"), ("0\n", "int")])
def test_a_file_without_keys_is_an_error(tmp_path, text, found):
    """Also where its content is false in Python's sense, as 0 is."""
    with pytest.raises(ValueError, match=rf"experiment\.yaml: expected `key: value` lines, found a {found}$"):
        load(tmp_path, text)


@pytest.mark.parametrize("text", ["seed: [1\n", "seed: 1\n\tepochs: 2\n", "a: b: c\n", "seed: 2020-13-45\n"])
def test_text_that_is_not_yaml_is_one_clear_error(tmp_path, text):
    """The message is one line and names the file, also for a date that is none."""
    with pytest.raises(ValueError, match=r"experiment\.yaml: is not YAML \(.+\)$") as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_one_clear_error(tmp_path):
    """A byte order mark, as Windows editors write it, is none of them."""
    path = tmp_path / "a.yaml"
    path.write_bytes("name: Zürich\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.yaml: is not UTF-8 \(.+\); save it as UTF-8$"):
        load_config(path)
    path.write_bytes("name: Zürich\n".encode("utf-8-sig"))
    assert load_config(path).name == "Zürich"


@pytest.mark.parametrize("where", ["file", "override"])
def test_a_yaml_tag_runs_no_code(tmp_path, where):
    """A config of a stranger can be loaded without harm."""
    witness = tmp_path / "witness"
    attack = f"!!python/object/apply:os.mkdir ['{witness}']"
    with pytest.raises(ValueError, match=r"is not YAML .*could not determine a constructor for the tag"):
        load(tmp_path, *([f"seed: {attack}\n"] if where == "file" else ["", f"seed={attack}"]))
    assert not witness.exists()


def test_a_missing_file_is_an_error_that_lists_what_is_there(tmp_path):
    """A folder that does not exist either, and a folder given as file, are no worse."""
    (tmp_path / "b.yaml").touch()
    (tmp_path / "a.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"c\.yaml: no such config; .* holds a\.yaml, b\.yaml$"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match=r"no such config$"):
        load_config(tmp_path / "nowhere" / "c.yaml")
    with pytest.raises(FileNotFoundError, match="no such config"):
        load_config(tmp_path)


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("override", "expected", "found"),
    [
        ("seed=1.5", "int", "1.5"),
        ("seed=true", "int", "True"),
        ("seed=1e3", "int", "'1e3'"),
        ("seed=null", "int", "None"),
        ("cache=1", "bool", "1"),
        ("cache='true'", "bool", "'true'"),
        ("lr=fast", "a finite float", "'fast'"),
        ("lr=true", "a finite float", "True"),
        ("lr=[1e-4]", "a finite float", r"\['1e-4'\]"),
        ("fold=one", "int or null", "'one'"),
        ("targets=valence", "list of str", "'valence'"),
        ("targets=[1]", "str", "1; put it in quotes"),
        ("label_range=[low, high]", "list of a finite float or null", r"\['low', 'high'\]"),
        ("precision=fp8", "auto or fp32 or bf16 or fp16", "'fp8'"),
        ("precision=[fp32]", "auto or fp32 or bf16 or fp16", r"\['fp32'\]"),
        ("trainable_layers=last", "int or list of int or all", "'last'"),
        ("trainable_layers=true", "int or list of int or all", "True"),
        ("trainable_layers=[1.5]", "int or list of int or all", r"\[1.5\]"),
        ("lora_layers={a: 1}", "int or list of int or all or null", r"{'a': 1}"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_in_the_readers_words(tmp_path, override, expected, found):
    """The message names the key, what the key takes and what was found."""
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"experiment\.yaml: {key}: expected {expected}, found {found}$"):
        load(tmp_path, "", override)


def test_every_kind_of_number_that_is_written_for_a_float_is_one(tmp_path):
    """YAML 1.1 takes `1e-4` for text; an integer loses nothing."""
    for text, value in (("1e-4", 1e-4), ("1.0e-4", 1e-4), ("1", 1.0), ("'0.5'", 0.5), ("2E0", 2.0)):
        read = load(tmp_path, f"lr: {text}\n").lr
        assert read == value
        assert type(read) is float


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "nan", "inf", "-Infinity", "1e999", "1" + 400 * "0"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, text):
    """In YAML's spelling and in Python's; an integer too large for a float is one of them."""
    with pytest.raises(ValueError, match=r"lr: expected a finite float, found "):
        load(tmp_path, f"lr: {text}\n")


def test_each_form_of_layers_is_taken(tmp_path):
    """A count, a list, all, and for LoRA null."""
    assert load(tmp_path, "trainable_layers: 3\n").trainable_layers == 3
    assert load(tmp_path, "trainable_layers: [0, 2]\n").trainable_layers == [0, 2]
    assert load(tmp_path, "trainable_layers: all\n").trainable_layers == "all"
    assert load(tmp_path, "lora_rank: 8\nlora_layers: null\n").lora_layers is None


# ---------------------------------------------------------------- ranges and effects


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=1", "batch_size: expected at least 2: the CCC of one utterance is 0/0, found 1"),
        ("epochs=0", "epochs: expected at least 1, found 0"),
        ("patience=0", "patience: expected at least 1, found 0"),
        ("head_width=-1", "head_width: expected at least 0"),
        ("pooling=max", "pooling: expected mean or mean_std or attentive or layers, found 'max'"),
        ("micro_batch_size=0", "micro_batch_size: expected at least 1 or null, found 0"),
        ("lora_rank=-1", "lora_rank: expected at least 0, found -1"),
        ("warmup=-1", "warmup: expected at least 0"),
        ("seed=-1", "seed: expected at least 0"),
        ("seed=9223372036854775808", r"seed: expected below 2\^63"),
        ("weight_decay=-0.1", "weight_decay: expected at least 0"),
        ("lr=0", "lr: expected a number above 0, found 0.0"),
        ("head_lr=-1", "head_lr: expected a number above 0"),
        ("clip=0", "clip: expected a number above 0"),
        ("hidden_dropout=1", "hidden_dropout: expected a number from 0 to below 1, found 1.0"),
        ("head_dropout=-0.1", "head_dropout: expected a number from 0 to below 1"),
        ("layer_drop=1", "layer_drop: expected a number from 0 to below 1"),
        ("mask_time_prob=1.5", "mask_time_prob: expected a number from 0 to below 1"),
        ("targets=[]", "targets: expected different names, at least one"),
        ("targets=[valence, valence]", "targets: expected different names, at least one"),
        ("label_range=[]", r"label_range: expected \[low, high\], found \[\]"),
        ("label_range=[7, 1]", r"label_range: expected \[low, high\]"),
        ("label_range=[1, 2, 3]", r"label_range: expected \[low, high\]"),
        ("backbone=''", "backbone: expected a directory, a file or a name on the hub"),
    ],
)
def test_a_value_outside_its_range_is_an_error(tmp_path, override, message):
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "", override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head_width=0", "head_dropout=0.1"], "head_dropout: expected 0.0, as head_width is 0"),
        (["trainable_layers=3", "pooling=layers"], "pooling: expected mean, mean_std or attentive, since layers train"),
        (["lora_rank=8", "pooling=layers"], "pooling: expected mean, mean_std or attentive, since layers train"),
        (["lora_rank=8", "backbone=logmel"], "backbone: expected one with layers, since some shall train"),
        (["trainable_layers=3", "mask_time_prob=0.1"], "mask_time_prob: expected 0.0, as it acts below layer 0"),
        (["trainable_layers=[0]", "mask_feature_prob=0.1"], "mask_feature_prob: expected 0.0, as it acts below"),
        (["lora_rank=8", "projection_dropout=0.1"], "projection_dropout: expected 0.0, as it acts below layer 0"),
        (["trainable_layers=all", "mask_time_length=5"], "mask_time_length: expected 10, as mask_time_prob is 0"),
        (["trainable_layers=all", "mask_feature_length=5"], "mask_feature_length: expected 64, as mask_feature_prob"),
        (["lora_layers=3"], "lora_layers: expected None, as lora_rank is 0, found 3"),
        (["lora_alpha=32"], "lora_alpha: expected 16.0, as lora_rank is 0"),
        (["lora_targets=[q]"], r"lora_targets: expected \('q', 'v'\), as lora_rank is 0, found \['q'\]"),
        (["lora_dropout=0.1"], "lora_dropout: expected 0.0, as lora_rank is 0"),
        (["trainable_layers=all", "lora_rank=8"], "lora_rank: expected 0, since trainable_layers: all"),
        (["layer_drop=0.1"], "layer_drop: expected 0.0, as it acts in layers that train, and none does"),
        (["attention_dropout=0.1"], "attention_dropout: expected 0.0, as it acts in layers that train"),
        (["trainable_layers=[]", "activation_dropout=0.1"], "activation_dropout: expected 0.0, as it acts in layers"),
        (
            ["cache_dtype=int8"],
            "cache_dtype: expected float16, as no layer trains: of a few rows each, int8 would be larger",
        ),
        (["gradient_checkpointing=true"], "gradient_checkpointing: expected False, as it acts in layers that train"),
    ],
)
def test_a_key_that_would_do_nothing_is_an_error(tmp_path, overrides, message):
    """Whoever set it believes that it acts. What makes it act is named."""
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "", *overrides)


def test_the_same_keys_are_taken_where_they_act(tmp_path):
    """The rule refuses no experiment that makes sense, nor a default written out."""
    masking = ["mask_time_prob=0.1", "mask_time_length=5", "mask_feature_prob=0.1", "mask_feature_length=8"]
    assert load(tmp_path, "trainable_layers: all\n", *masking, "projection_dropout=0.1").mask_time_length == 5
    lora = ["lora_layers=3", "lora_alpha=32", "lora_targets=[q]", "lora_dropout=0.1", "layer_drop=0.1"]
    assert load(tmp_path, "lora_rank: 4\n", *lora, "gradient_checkpointing=true").lora_layers == 3
    assert load(tmp_path, "trainable_layers: 1\nattention_dropout: 0.1\nlora_targets: [q, v]\n").lora_rank == 0


@pytest.mark.parametrize(
    "word", ["no", "2024", "2024-11-26", "12:30", "0x1f", "a #3", "@x", "&x y", "[old]/x", "a: b.csv"]
)
def test_a_key_that_takes_text_takes_the_words_as_they_stand(tmp_path, word):
    """YAML would make a boolean, a number, a date, a comment or an error of them."""
    path = tmp_path / "a.yaml"
    path.write_text("")
    config = load_config(path, [f"name={word}", f"output_dir={word}", f"manifest={word}"])
    assert config.name == config.output_dir == config.manifest == word
    assert load_config(path, ["manifest=null"]).manifest is None
    assert load_config(path, ['name="b c"']).name == "b c"


def test_a_number_with_a_leading_zero_is_not_octal(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("")
    with pytest.raises(ValueError, match="seed=010: YAML reads a number with a leading zero as octal; write 10"):
        load_config(path, ["seed=010"])


def test_home_and_variables_are_expanded_in_every_path(tmp_path, monkeypatch):
    """In a file and on the command line, also where no shell has done so."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    path = tmp_path / "a.yaml"
    path.write_text("data_root: $DISK/corpus\ncache_dir: ~/cache\n")
    config = load_config(path, ["backbone=~/model", "output_dir=$DISK/runs"])
    home = str(tmp_path)
    assert (config.data_root, config.cache_dir) == (f"{home}/disk/corpus", f"{home}/cache")
    assert (config.backbone, config.output_dir) == (f"{home}/model", f"{home}/disk/runs")


@pytest.mark.parametrize("value", ["2024", "no", "2024-11-26", "1.5"])
def test_a_text_that_yaml_takes_for_something_else_wants_quotes_in_a_file(tmp_path, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"name: {value}\n")
    with pytest.raises(ValueError, match=r"name: expected str, found .*; put it in quotes"):
        load_config(path)
    path.write_text(f'name: "{value}"\n')
    assert load_config(path).name == value
