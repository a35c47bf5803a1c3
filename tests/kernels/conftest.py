"""The kernels are tested twice: compiled (never run, there is no GPU) and interpreted (run, never compiled).

Triton decides at import which of the two a process does, so the interpreted tests live in their own folder and run in
processes of their own; ``test_interpreted.py`` starts them. Directly: ``TRITON_INTERPRET=1 pytest
tests/kernels/interpreted``.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
