"""What blocks of mixtures of experts and of hybrids have beside attention and a dense MLP: routed experts behind a
router, and recurrences in attention's place (gated delta net, Mamba-2, lightning attention, short convolutions)."""

from __future__ import annotations

from dataclasses import dataclass

Tensors = list[tuple[int, int]]


@dataclass(frozen=True)
class Experts:
    """Routed experts of one block. Each is a gated MLP of width ``ffn``; a token takes ``chosen`` of ``count``.

    transformers keeps the experts' weights stacked: one tensor for the halves of all gates, one for all that lead back.
    Engines shard along its first dimension, which is the expert.
    """

    count: int
    chosen: int
    ffn: int
    bias: bool = False  # of both products
    router_bias: bool = False
    #: Which take adapters: ``all``, those that ``adapter.targets`` names (and all of ``all-linear``), or ``none``.
    adapters: str = "named"
    router_adapted: bool = False  # by itself it stays frozen beside adapters

    def weights(self, hidden: int) -> int:
        """Weights of the products of one expert."""
        return 3 * hidden * self.ffn

    def products(self, hidden: int) -> dict[str, tuple[int, int, int]]:
        """name -> (inputs, outputs, times that a token goes through it)."""
        return {
            "router": (hidden, self.count, 1),
            "experts_gate_up": (hidden, 2 * self.ffn, self.chosen),
            "experts_down": (self.ffn, hidden, self.chosen),
        }

    def tensors(self, hidden: int) -> Tensors:
        """Shapes (rows, columns) of the parameters; what lies behind the first dimension counts as columns."""
        found = [(self.count, hidden), (self.count, 2 * self.ffn * hidden), (self.count, hidden * self.ffn)]
        if self.bias:
            found += [(self.count, 2 * self.ffn), (self.count, hidden)]
        return [*found, (self.count, 1)] if self.router_bias else found

    def adapted(self, targets: str | list[str]) -> set[str]:
        """Which of :meth:`products` carry adapters (:mod:`aifactory_train.model.expert_targets` puts them there). The
        halves of the gate are one tensor, which the old names of both name, too."""
        found = {"router"} if self.router_adapted else set()
        if self.adapters == "none":
            return found
        wanted = {targets} if isinstance(targets, str) else set(targets)
        every = targets == "all-linear" or self.adapters == "all"
        if every or "gate_up_proj" in wanted or wanted >= {"w1", "w3"} or wanted >= {"gate_proj", "up_proj"}:
            found.add("experts_gate_up")
        if every or wanted & {"w2", "down_proj"}:
            found.add("experts_down")
        return found

    def adapter_tensors(self, hidden: int, rank: int, targets: str | list[str]) -> Tensors:
        """Shapes of the adapters: those of all experts are stacked, so that no expert's lies apart."""
        found: Tensors = []
        for name in sorted(self.adapted(targets)):
            inside, outside, _ = self.products(hidden)[name]
            many = 1 if name == "router" else self.count
            width = many * rank
            found += [(width, inside), (outside, width)]
        return found


@dataclass(frozen=True)
class Recurrence:
    """A layer whose memory is a state per head (``key`` x ``value`` numbers) that runs along the document, or no
    state but a convolution over a few tokens (``heads`` 0).

    kind: ``delta`` (gated delta net), ``mamba2``, ``lightning`` (linear attention with decay), ``conv``.
    """

    kind: str
    linears: tuple[tuple[str, int, int], ...]  # name, inputs, outputs; those that read the block's input come first
    heads: int = 0
    key: int = 0
    value: int = 0
    key_heads: int = 0  # heads that share keys and queries
    channels: int = 0  # of the convolution
    taps: int = 0
    chunk: int = 64  # tokens that kernels compute with products, between which they carry the state
    vectors: tuple[int, ...] = ()  # sizes of its other parameters with one dimension
    #: further tensors that backward reads per token, beside convolution, state and linear layers: elements of the
    #: hidden type
    gates: int = 0

    def tensors(self) -> Tensors:
        """Shapes (rows, columns) of the parameters."""
        found = [(outside, inside) for _, inside, outside in self.linears]
        found += [(self.channels, self.taps)] if self.channels else []
        return found + [(size, 1) for size in self.vectors]

    @property
    def flops(self) -> float:
        """Forward FLOPs per token that the mathematics needs: the state's update and its reading token by token, and
        the convolution."""
        passes = {"delta": 6.0, "mamba2": 4.0, "lightning": 4.0, "conv": 0.0}[self.kind]
        return passes * self.heads * self.key * self.value + 2.0 * self.channels * self.taps

    @property
    def executed_flops(self) -> float:
        """Forward FLOPs per token as chunked kernels run it: products inside a chunk, the state between chunks."""
        states = 4.0 * self.heads * self.key * self.value
        across = 2.0 * self.chunk  # each token meets those of its chunk
        if self.kind == "delta":
            inside = across * self.heads * (2 * self.key + self.value)
            solved = self.chunk * self.heads * (self.key + self.value)  # a triangular system for values and keys
            states += inside + solved + 2.0 * self.heads * self.key * self.value
        elif self.kind in ("mamba2", "lightning"):
            states += across * (self.key_heads * self.key + self.heads * self.value)
        return states + 2.0 * self.channels * self.taps

    @property
    def kept(self) -> float:
        """Elements per token that backward reads, the inputs of linear layers left out: both sides of the
        convolution, what the scan read and gave, the gates. As the kernels of flash-linear-attention and mamba-ssm
        keep them; states between chunks are made again in backward."""
        kept = 2.0 * self.channels + self.gates
        if self.kind == "delta":
            kept += 2 * self.key_heads * self.key  # queries and keys, normalised
            kept += self.heads * (self.value + self.chunk)  # what comes out, and each chunk's inverse
        elif self.kind in ("mamba2", "lightning"):
            kept += self.heads * self.value
        return kept

    @property
    def widest(self) -> int:
        """The widest tensor between its linear layers."""
        return max(self.channels, self.heads * self.value, *(outside for _, _, outside in self.linears))
