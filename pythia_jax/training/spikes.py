"""Losses that jump."""

import logging
import statistics
from collections import deque

log = logging.getLogger(__name__)


class SpikeWatch:
    """Warns once when the loss jumps, and again only after it has come back.

    A loss is a spike if it lies more than 6 standard deviations above the mean of the last 100
    that are not, once there are 50. Of normally distributed losses one in 10^9 would.
    """

    DEVIATIONS, LAST, FIRST = 6.0, 100, 50

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.LAST)
        self._spiking = False

    def look(self, step: int, loss: float) -> None:
        if len(self._losses) >= self.FIRST:
            mean = statistics.fmean(self._losses)
            limit = mean + self.DEVIATIONS * statistics.stdev(self._losses)
            if loss > limit:
                if not self._spiking:
                    log.warning(
                        "step %d: loss spike: %.3f, where the last %d steps had %.3f on average "
                        "and more than %.3f counts as a spike",
                        *(step, loss, len(self._losses), mean, limit),
                    )
                self._spiking = True
                return
        self._spiking = False
        self._losses.append(loss)
