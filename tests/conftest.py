"""Fixtures of all rooms. Tests run offline and with one thread; anything cached goes to a folder of this session."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported by anyone
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))  # "import helpers" from every folder of tests

import helpers
import pytest
from hypothesis import settings

# A change is judged by the same examples every time; AIFACTORY_FUZZ=1 (`make test-all`) draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("new", deadline=None)
settings.load_profile("new" if os.environ.get("AIFACTORY_FUZZ") else "same")


@pytest.fixture(scope="session")
def real_cache() -> Path:
    """The user's own cache, for tests that use the fetched 135M model."""
    return Path(os.environ["AIFACTORY_REAL_CACHE"])


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache unless it asks for ``real_cache``."""
    from aifactory_train.config.loading import cache_dir

    patch = pytest.MonkeyPatch()
    patch.setenv("AIFACTORY_REAL_CACHE", str(cache_dir()))
    patch.setenv("AIFACTORY_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _unprotected_again() -> Iterator[None]:
    """What a run under a privacy profile withholds in its process is shown to the next test."""
    yield
    redact = sys.modules.get("aifactory_train.private.redact")
    if redact is not None and redact.is_active():
        redact.deactivate()


@pytest.fixture(autouse=True)
def _no_ranks_left() -> Iterator[None]:
    """A world that a test joined is not the next test's: other libraries take RANK there for a launcher's."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def csv_limit() -> Iterator[None]:
    """The csv module's own limit of a cell, which reading rows raises for the whole process."""
    before = csv.field_size_limit(131_072)
    yield
    csv.field_size_limit(before)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with tied embeddings and a ChatML tokenizer, as a local model folder."""
    return helpers.write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir, local_files_only=True)


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """Factory: ``make_recipe(rows=48, eval_rows=12, model=DIR, settings={"train.max_steps": 2})`` -> path of the
    YAML.
    """

    def make(*, model: Path | None = None, folder: Path | None = None, **more: Any) -> Path:
        return helpers.write_recipe(folder or tmp_path, model or tiny_model_dir, **more)

    return make


@pytest.fixture
def tiny_recipe(make_recipe: Callable[..., Path]) -> Path:
    """``recipe.yaml`` with 48 training and 12 held-out chat rows beside it: four LoRA steps on the tiny Llama."""
    return make_recipe()
