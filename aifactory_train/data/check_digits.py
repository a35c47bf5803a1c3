"""Check digits of numbers that stand for people: weighted sums, Luhn, ISO 7064, Verhoeff."""

from __future__ import annotations


def weighted(digits: str, weights: tuple[int, ...]) -> int:
    """Sum of digit × weight over the shorter of the two."""
    return sum(int(d) * w for d, w in zip(digits, weights, strict=False))


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1 annex B: every second digit from the right doubled, the sum of all digits a multiple of ten."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iso7064_mod11_10(digits: str) -> bool:
    """ISO/IEC 7064 MOD 11,10 over all digits, the last one being the check digit."""
    check = 5
    for digit in digits:
        check = ((check or 10) * 2 % 11 + int(digit)) % 10
    return check == 1


_VERHOEFF_D = tuple(
    tuple(
        (i + j) % 5 + (5 if (i < 5) != (j < 5) else 0) if i < 5 else (i - j) % 5 + (5 if j < 5 else 0)
        for j in range(10)
    )
    for i in range(10)
)


_VERHOEFF_P = [tuple(range(10)), (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)]


def verhoeff(digits: str) -> bool:
    """Verhoeff's check (1969) in the dihedral group of order ten, the last digit being the check digit."""
    check = 0
    for place, digit in enumerate(reversed(digits)):
        check = _VERHOEFF_D[check][_VERHOEFF_P[place % 8][int(digit)]]
    return check == 0
