"""How long a call takes, on a machine that does other work too."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median processor time of a call, the first of which does not count."""
    work()
    spent = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        spent.append(time.process_time() - begin)
    return statistics.median(spent)
