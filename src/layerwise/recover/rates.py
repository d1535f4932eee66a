"""Learning rates over a run, as a factor on the highest: by how much of it is over, 0 to 1."""

import math

SCHEDULES = ("cosine", "wsd")


def cosine(done: float, warm: float = 0.05, floor: float = 0.1) -> float:
    """Linear up to 1 at `warm`, then half a cosine down to `floor`."""
    if done < warm:
        return done / warm
    return floor + (1 - floor) * (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2


def wsd(done: float, warm: float = 0.05, decay: float = 0.1, floor: float = 0.1) -> float:
    """Warm-up, stable, decay: linear up to 1 at `warm`, constant, and over the last `decay` linear down to `floor`."""
    if done < warm:
        return done / warm
    return 1 - (1 - floor) * max(0.0, (done - (1 - decay)) / decay)


def slices(count: int, stages: int) -> list[int]:
    """Adapt-Accel's data: stage t of T gets floor(2 t / (T (T + 1))) of it, the last the rest; later, smaller models see more."""
    shares = [count * 2 * t // (stages * (stages + 1)) for t in range(1, stages)]
    return [*shares, count - sum(shares)]
