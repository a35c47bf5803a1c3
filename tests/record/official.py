"""Runs the official validators on a run folder; started with the Python that has them (see ``make validators``).

``python official.py croissant|crate RUN`` prints ``ok`` or the faults, exit 0 or 1. The RO-Crate context is taken from
the ro-crate-py package instead of w3id.org, so that nothing is fetched: its version 1.3 contains the terms of 1.1.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path


def croissant(run: Path) -> list[str]:
    import mlcroissant

    dataset = mlcroissant.Dataset(str(run / "evidence" / "croissant.json"))
    issues = dataset.metadata.ctx.issues
    assert dataset.metadata.name, "the data set has no name"
    return sorted(issues.errors)


def crate(run: Path) -> list[str]:
    import requests
    import rocrate
    import urllib3
    from rocrate_validator import models, services

    context = (Path(rocrate.__file__).parent / "data" / "ro-crate.jsonld").read_bytes()

    def answer(adapter, request, **kwargs):
        """In place of the network: the crate context that a package ships, and nothing else."""
        if not request.url.startswith("https://w3id.org/ro/crate/"):
            raise requests.ConnectionError(f"the validator wants {request.url} from the network")
        headers = {"Content-Type": "application/ld+json"}
        raw = urllib3.HTTPResponse(io.BytesIO(context), headers=headers, status=200, preload_content=False)
        return adapter.build_response(request, raw)

    requests.adapters.HTTPAdapter.send = answer
    settings = services.ValidationSettings(
        rocrate_uri=str(run),
        profile_identifier="process-run-crate-0.5",
        requirement_severity=models.Severity.REQUIRED,
        disable_remote_crate_download=True,
    )
    result = services.validate(settings)
    return [f"{issue.check.identifier}: {issue.message}" for issue in result.get_issues()]


if __name__ == "__main__":
    found = {"croissant": croissant, "crate": crate}[sys.argv[1]](Path(sys.argv[2]))
    print("\n".join(found) if found else "ok")
    sys.exit(1 if found else 0)
