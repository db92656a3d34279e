"""What `formats.hub` promises: a checkpoint of the hub is fetched once and whole, or the one reason why not is said."""

import errno
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_tensors
from test_emotion import assert_published
from test_weights import assert_same, shard

import run
import weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that downloads use, over `files`: {repository: {name: content}}."""

    files: dict[str, dict[str, bytes]]
    requests: list[str]
    damage = False
    gated = 0  # the status with which it refuses

    def log_message(self, *_):
        pass

    def do_HEAD(self, body: bool = False):
        owner, name, resolve, revision, file = (self.path.strip("/") + "////").split("/", 4)
        file = file.rstrip("/")
        if resolve == "resolve":  # beside these, the library asks for a list of no interest here
            self.requests.append(f"{self.command} {file}")
        repository = self.files.get(f"{owner}/{name}")
        if self.gated:
            self.send_response(self.gated)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = (repository or {}).get(file) if revision in ("main", "v1", COMMIT) else None
        self.send_response(200 if content is not None else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        if content is None:
            missing = "EntryNotFound" if revision in ("main", "v1", COMMIT) else "RevisionNotFound"
            self.send_header("X-Error-Code", "RepoNotFound" if repository is None else missing)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        large = not file.endswith(".json")  # in git-lfs, named after the SHA-256; small files after git's SHA-1
        etag = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        self.send_header("ETag", f'"{etag}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:-1] + bytes([content[-1] ^ 1]) if self.damage and large else content)

    def do_GET(self):
        self.do_HEAD(body=True)


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_checkpoint):
    """A hub on this machine with one good repository, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    good = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    handler = type("Handler", (Hub,), {"files": {"some/good": good}, "requests": [], "damage": False})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    handler.stop = lambda: (server.shutdown(), server.server_close())
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    handler.stop()
    thread.join()


def test_a_hub_id_is_downloaded_once(hub, tiny_checkpoint):
    """First from the hub, then from the cache with the hub gone; the same model as from the directory."""
    reference = weights.load_backbone(tiny_checkpoint)
    assert_same(weights.load_backbone("some/good"), reference)
    gets = [request.split()[1] for request in hub.requests if request.startswith("GET")]
    assert sorted(gets) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    hub.requests.clear()
    hub.stop()
    assert_same(weights.load_backbone("some/good"), reference)
    assert not hub.requests


@pytest.mark.parametrize("suffix", ["bin", "sharded bin", "sharded safetensors"])
def test_repositories_without_a_whole_safetensors_file_work(hub, tmp_path, tiny_checkpoint, suffix):
    """Only `pytorch_model.bin`, or shards: everything needed is fetched, and nothing twice."""
    folder = tmp_path / "repository"
    folder.mkdir()
    if suffix == "bin":
        torch.save(tiny_tensors(), folder / "pytorch_model.bin")
    else:
        shard(folder, tiny_tensors(), suffix.split()[1])
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    hub.files["some/other"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_same(weights.load_backbone("some/other"), weights.load_backbone(tiny_checkpoint))
    gets = [request.split()[1] for request in hub.requests if request.startswith("GET")]
    assert sorted(gets) == sorted(hub.files["some/other"])
    hub.stop()
    weights.load_backbone("some/other")


def test_the_published_emotion_model_is_found_by_its_hub_id(hub, published_model):
    """Through `run.load_run`, as predict.py asks for it."""
    folder, theirs = published_model
    hub.files["some/emotion"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_published(theirs, run.load_run("some/emotion"), [4000])
    with pytest.raises(FileNotFoundError, match=r"some/typo: no run here; .*is neither a path here nor a repository"):
        run.load_run("some/typo")


def test_a_download_that_was_cut_off_is_continued(hub, tmp_path, tiny_checkpoint):
    """With the index and one of two shards in the cache, the other is fetched: half a checkpoint is none."""
    folder = tmp_path / "repository"
    folder.mkdir()
    shard(folder, tiny_tensors(), "safetensors")
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    files = hub.files["some/other"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    second = files.pop("model-00002-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00002\.safetensors"):
        weights.load_backbone("some/other")
    files["model-00002-of-00002.safetensors"] = second
    assert_same(weights.load_backbone("some/other"), weights.load_backbone(tiny_checkpoint))


def test_settings_are_fetched_before_weights(hub):
    """... so that weights in the cache always have their settings beside them."""
    weights.load_backbone("some/good")
    gets = [request.split()[1] for request in hub.requests if request.startswith("GET")]
    assert gets[-1] == "model.safetensors"


def test_a_damaged_download_is_refused_and_removed(hub, tmp_path, tiny_checkpoint):
    """The SHA-256 does not fit: nothing stays in the cache, and the next attempt succeeds."""
    hub.damage = True
    with pytest.raises(ValueError, match=r"model\.safetensors arrived damaged .*run again"):
        weights.load_backbone("some/good")
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    hub.damage = False
    assert_same(weights.load_backbone("some/good"), weights.load_backbone(tiny_checkpoint))


def test_a_repository_that_is_not_there_is_one_clear_error(hub):
    """Not `UnavailableError`, which stands for the network: a mistyped name must never pass for that."""
    hub.files["some/empty"] = {"README.md": b"no weights"}
    with pytest.raises(FileNotFoundError, match=r"some/typo is neither a path here nor a repository") as error:
        weights.load_backbone("some/typo")
    assert not isinstance(error.value, weights.UnavailableError)
    with pytest.raises(FileNotFoundError, match=r"the hub's some/empty holds none of model\.safetensors, "):
        weights.load_backbone("some/empty")
    with pytest.raises(FileNotFoundError, match=r"backbone: a--b/c\.\.d is neither a path here nor a repository"):
        weights.load_backbone("a--b/c..d")


@pytest.mark.parametrize("offline", [False, True], ids=["server gone", "HF_HUB_OFFLINE"])
def test_without_a_network_the_answer_is_quick_and_quiet(hub, monkeypatch, caplog, capfd, offline):
    """One attempt, no retries, not a line of the library's: `UnavailableError` with the ways out."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    sleeps = []
    monkeypatch.setattr("time.sleep", sleeps.append)
    if offline:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub.stop()
    with pytest.raises(weights.UnavailableError, match=r"some/good is neither .*give `backbone` .*or connect") as error:
        weights.load_backbone("some/good")
    assert "\n" not in str(error.value)
    assert not sleeps and not hub.requests and not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_not_taken_for_a_missing_network(hub, monkeypatch):
    """`UnavailableError` lets the demo go on with random weights; other trouble must not."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def full(*_, **__) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        weights.load_backbone("some/good")
    assert not isinstance(error.value, weights.UnavailableError)


def half_cached(hub, tmp_path: Path, name: str = "some/good", settings: dict | None = None) -> None:
    """Leave in the cache what another program would: the weights alone, as `hf download NAME model.safetensors`."""
    from huggingface_hub import hf_hub_download

    if settings:
        hub.files[name]["preprocessor_config.json"] = json.dumps(settings).encode()
    hf_hub_download(name, "model.safetensors", cache_dir=str(tmp_path / "cache"))
    hub.requests.clear()


def test_settings_that_the_cache_lacks_are_fetched(hub, tmp_path, tiny_checkpoint, capsys):
    """... of the commit of the weights, which are not fetched again; from then on without the network."""
    half_cached(hub, tmp_path, settings={"do_normalize": False})
    expected = weights.load_backbone(tiny_checkpoint, normalize_waveform=False)
    assert_same(weights.load_backbone("some/good"), expected)
    assert [request for request in hub.requests if "model" in request] == []
    hub.stop()
    assert_same(weights.load_backbone("some/good"), expected)
    assert capsys.readouterr().err == ""


def test_without_a_network_weights_without_settings_are_read_with_a_note(hub, tmp_path, capsys):
    """What may be missing is named, and what was assumed instead."""
    half_cached(hub, tmp_path)
    hub.stop()
    assert weights.load_backbone("some/good").config.heads == 1
    said = capsys.readouterr().err
    assert (
        "note: some/good: the Hugging Face cache lacks config.json, preprocessor_config.json, processor_config" in said
    )
    assert "no settings give num_attention_heads; assumed 1" in said and "no settings give do_normalize" in said


def test_the_hubs_own_note_of_absence_is_proof(hub, tmp_path, monkeypatch):
    """A repository without a preprocessor file, once whole in the cache, asks for no network again."""
    del hub.files["some/good"]["preprocessor_config.json"]
    weights.load_backbone("some/good")
    hub.requests.clear()
    weights.load_backbone("some/good")
    assert hub.requests == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_asks_to_accept_its_terms(hub, status):
    hub.gated = status
    with pytest.raises(FileNotFoundError, match=r"some/good is gated: accept its terms on http\S+/some/good, then"):
        weights.load_backbone("some/good")


def test_a_revision_is_part_of_the_name(hub, tiny_checkpoint):
    """A branch, a tag or a commit after an @; one that is not there is named."""
    reference = weights.load_backbone(tiny_checkpoint)
    assert_same(weights.load_backbone("some/good@v1"), reference)
    assert_same(weights.load_backbone(f"some/good@{COMMIT}"), reference)
    with pytest.raises(FileNotFoundError, match=r"some/good has no revision 'v2' on the hub"):
        weights.load_backbone("some/good@v2")


def test_the_processor_file_is_fetched_too(hub):
    hub.files["some/good"].pop("preprocessor_config.json")
    hub.files["some/good"]["processor_config.json"] = json.dumps(
        {"feature_extractor": {"do_normalize": False}}
    ).encode()
    assert not weights.load_backbone("some/good").config.normalize_waveform
    assert weights.locate("some/good")[-1].name == "processor_config.json"
