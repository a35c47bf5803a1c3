"""Engines: how one model is trained by many ranks.

One small file an engine, all behind :class:`Engine`. The loop decides *what* a step computes (which documents, the
global number of supervised tokens); an engine only decides where parameters, gradients and optimizer state live. The
contract that keeps every engine on the same curve: gradients of the ranks are **summed**, never averaged, and nothing
is divided by the world size or by the number of micro-batches.
"""
