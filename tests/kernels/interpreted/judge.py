"""The acceptance rule: at most twice the error of torch in the same dtype, against fp64."""

import torch


def judge(label, ours, torchs, exact):
    """max |ours - exact| <= 2 max |torch - exact| + 1e-6 max |exact|, and the same for the relative L2 norm."""
    assert ours.shape == exact.shape, (label, ours.shape, exact.shape)
    if exact.numel() == 0:
        return
    ours, torchs, exact = ours.double(), torchs.double(), exact.double()
    assert torch.isfinite(ours).all(), f"{label}: not finite"
    scale = exact.abs().max().item()
    worst, theirs = ((t - exact).abs().max().item() for t in (ours, torchs))
    assert worst <= 2 * theirs + 1e-6 * scale, f"{label}: error {worst:.3g}, torch {theirs:.3g}, scale {scale:.3g}"
    norm = exact.norm().item()
    worst, theirs = ((t - exact).norm().item() for t in (ours, torchs))
    assert worst <= 2 * theirs + 1e-6 * norm, f"{label}: L2 {worst:.3g}, torch {theirs:.3g}, norm {norm:.3g}"


def compare(label, ours, reference, inputs, wanted, seed=1):
    """Run ``ours`` and ``reference`` on the same inputs forward and backward, and judge every output and every
    gradient.

    ``inputs`` are tensors or plain values; ``wanted`` marks the ones to differentiate. Floating-point tensors become
    fp64 for the exact run.
    """

    def run(function, convert):
        args = [
            convert(t).requires_grad_(w) if isinstance(t, torch.Tensor) else t
            for t, w in zip(inputs, wanted, strict=True)
        ]
        out = function(*args)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(seed)
        leaves = [a for a, w in zip(args, wanted, strict=True) if w]
        if not leaves:
            return out, ()
        asked = [o for o in out if o.requires_grad]  # rewards and the like are detached
        grads = [torch.randn(o.shape, generator=generator).to(inputs[0].dtype).to(o.dtype) for o in asked]
        return out, torch.autograd.grad(asked, leaves, grads, allow_unused=True)

    def same(t):
        return t.detach()  # keeps strides: a strided input stays strided

    def exact(t):
        return t.detach().double() if t.is_floating_point() else t

    mine, theirs, truth = run(ours, same), run(reference, same), run(reference, exact)
    for kind, group in (("output", 0), ("gradient", 1)):
        for i, (a, b, c) in enumerate(zip(mine[group], theirs[group], truth[group], strict=True)):
            judge(f"{label} {kind} {i}", a.detach(), b.detach(), c.detach())
