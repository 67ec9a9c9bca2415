"""What the implementations of soft top-k share."""


def eps_schedule(n_iters: int, eps: float, eps_init: float | None, eps_decay: float) -> list[float]:
    """The eps of each iteration, and one more: the gates are read off after a last decay."""
    current, schedule = max(eps if eps_init is None else eps_init, eps), []
    for _ in range(n_iters + 1):
        schedule.append(current)
        current = max(current * eps_decay, eps)
    return schedule
