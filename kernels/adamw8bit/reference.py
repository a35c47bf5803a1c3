"""8-bit AdamW in plain torch: the oracle of the tests (fp64-capable) and the CPU path.

Moments are stored in blocks of 256 with one fp32 scale (the block's largest magnitude) and companded codes, so that
small values keep relative precision: m = sign(c) (c/127)^2 scale with int8 c, v = (c/255)^4 scale with uint8 c. A
positive v never gets code 0, because a zero second moment would blow the update up. Only square roots are needed, which
every device computes exactly.
"""

import torch

BLOCK = 256


def blocks(numel: int) -> int:
    """Number of scales for ``numel`` elements."""
    return -(-numel // BLOCK)


def new_state(param: torch.Tensor) -> dict[str, torch.Tensor]:
    """Zero moments of a parameter: codes in its shape (int8 and uint8), one fp32 scale each per 256 elements."""
    scales = blocks(param.numel())
    return {
        "m": torch.zeros_like(param, dtype=torch.int8, memory_format=torch.contiguous_format),
        "v": torch.zeros_like(param, dtype=torch.uint8, memory_format=torch.contiguous_format),
        "m_scale": param.new_zeros(scales, dtype=torch.float32),
        "v_scale": param.new_zeros(scales, dtype=torch.float32),
    }


def _blocked(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, blocks(flat.numel()) * BLOCK - flat.numel())).view(-1, BLOCK)


def decode(m: torch.Tensor, v: torch.Tensor, m_scale: torch.Tensor, v_scale: torch.Tensor, dtype=torch.float32):
    """First and second moment [blocks, 256] from their codes."""
    cm, cv = _blocked(m).to(dtype), _blocked(v).to(dtype)
    first = torch.sign(cm) * (cm / 127).square() * m_scale.to(dtype)[:, None]
    return first, (cv / 255).square().square() * v_scale.to(dtype)[:, None]


def encode(first: torch.Tensor, second: torch.Tensor):
    """Codes and scales of moments [blocks, 256]."""
    m_scale, v_scale = first.abs().amax(1), second.amax(1)
    unit = torch.where(m_scale > 0, 1 / m_scale, 0.0)[:, None]
    cm = torch.sign(first) * torch.floor(127 * torch.sqrt(first.abs() * unit) + 0.5)
    unit = torch.where(v_scale > 0, 1 / v_scale, 0.0)[:, None]
    cv = torch.floor(255 * torch.sqrt(torch.sqrt(second * unit)) + 0.5)
    cv = torch.where(second > 0, cv.clamp(min=1), 0.0)
    return cm.to(torch.int8), cv.to(torch.uint8), m_scale.float(), v_scale.float()


def update(param, grad, first, second, lr, beta1, beta2, eps, weight_decay, bias1, bias2):
    """One AdamW step (Loshchilov & Hutter, arXiv 1711.05101): new (param, first, second); ``bias`` = 1 - beta^step."""
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad.square()
    param = param * (1 - lr * weight_decay) - lr * (first / bias1) / (torch.sqrt(second / bias2) + eps)
    return param, first, second


def step(param, grad, m, v, m_scale, v_scale, lr, beta1, beta2, eps, weight_decay, bias1, bias2):
    """In-place step on parameter and 8-bit state, computed in at least fp32."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    n = param.numel()
    first, second = decode(m, v, m_scale, v_scale, dtype)
    p, g = _blocked(param).to(dtype), _blocked(grad).to(dtype)
    new, first, second = update(p, g, first, second, lr, beta1, beta2, eps, weight_decay, bias1, bias2)
    cm, cv, sm, sv = encode(first, second)
    param.copy_(new.reshape(-1)[:n].view(param.shape))
    m.copy_(cm.reshape(-1)[:n].view(m.shape))
    v.copy_(cv.reshape(-1)[:n].view(v.shape))
    m_scale.copy_(sm)
    v_scale.copy_(sv)


_step = step  # its name below, where `step` is the number of the step


def adamw8bit(param, grad, state, *, step: int, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01) -> None:
    """The operator of that name, without stochastic rounding."""
    bias1, bias2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    m, v, m_scale, v_scale = state.values()
    _step(param, grad, m, v, m_scale, v_scale, lr, betas[0], betas[1], eps, weight_decay, bias1, bias2)
