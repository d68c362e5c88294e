"""Random numbers as a function of (seed, choice, position): no state, so any order gives the same.

Each number is the splitmix64 finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014) over the three counters in turn.
"""

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """64 well-mixed bits of 64 bits."""
    x = (x + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 bits."""
    return (mix(mix(mix(seed & MASK) ^ (choice & MASK)) ^ (position & MASK)) >> 11) * 2.0**-53
