"""Secrets in texts that are kept or shown: addresses with a password or a token in them, and values of variables that
are secrets.
"""

from __future__ import annotations

import os
import re

#: Names of variables whose values are secrets.
NAME = re.compile(r"(TOKEN|SECRET|PASSW(OR)?D|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL)S?(_|$)", re.I)
WITHHELD = "[withheld]"
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s:@]*:[^/\s@]+@", re.I)
_QUERY = re.compile(
    r"([?&#;](?:[\w.-]*(?:token|secret|signature|password|passwd|credential|api_?key|access_?key)|sig|key|auth)=)[^&\s#;\"'<>]+",
    re.I,
)
#: Forms that publishers of keys chose so that they can be found: Hugging Face, GitHub, GitLab, AWS, OpenAI, Slack, JSON
#: Web Tokens.
_FORMS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|(AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{20,}"
    r"|xox[abpr]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)
#: A shorter value stands in ordinary texts as well.
_SHORTEST = 8


def without_secrets(text: str) -> str:
    """``text`` with the secret parts of addresses, keys of known forms, and values of this process's secret variables
    withheld.
    """
    text = _USER.sub(rf"\1{WITHHELD}@", text)
    text = _FORMS.sub(WITHHELD, _QUERY.sub(rf"\1{WITHHELD}", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and NAME.search(name) and value in text:
            text = text.replace(value, WITHHELD)
    return text


def holds_secret(text: str) -> bool:
    """Whether :func:`without_secrets` would withhold anything."""
    return without_secrets(text) != text
