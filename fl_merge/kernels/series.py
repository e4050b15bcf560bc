"""Numbers by which the definitions of scores (`ops.scores`) and their passes compute alike.

Series are given from the constant term on, divided by the magnitude of their highest one, which saves a product: a
factor that all balances have changes neither their order nor their proportions.
"""

LOG2_E = 1.4426950408889634

_EXP2 = (
    1.0000000716547142,
    0.6931469670650352,
    0.2402211972371072,
    0.055507132718556444,
    0.009675541343121328,
    0.0013276472631950876,
)
EXP2 = tuple(term / _EXP2[-1] for term in _EXP2)
"""2^x for |x| <= 1/2: the smallest relative error that there is with five powers, 7.5e-8."""

_TANH = (
    1.0,
    -0.33330279650032013,
    0.13288490116006121,
    -0.05176828162198036,
    0.016906404739082184,
    -0.0031265762249965347,
)
TANH = tuple(term / -_TANH[-1] for term in _TANH)
"""tanh(x) / x for 0 <= x <= 1, in powers of x^2: the same with 1 as the constant term, 6.7e-7."""

LIFT = 64
"""The powers of 2 are kept 2^64 times too large, so that small balances are normal numbers of float32."""

ROUNDING = 1.5 * 2.0**23 + LIFT
"""Added to a float32 and subtracted again, this rounds to a whole number; what was added has that, lifted, in its last
bits."""

LOWEST = -188.0
"""Lower powers of 2 are taken as this one: with the lift it is still normal."""

LEAST = 2.0**-120
"""A smaller sum of balances counts as none: its reciprocal might not fit float32."""

MANY = 64
"""The variance over up to so many clients is found in one go."""
