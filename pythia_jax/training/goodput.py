"""Where the wall time of an attempt at a run goes."""


class Clock:
    """Tells the time in which the device trained from all other time of one attempt.

    Times are seconds by one clock (`time.perf_counter`), handed in by whoever reads it.

    *Goodput* is the share of this attempt's wall time, since `began`, in which the device computed
    steps that nobody had computed before. What does not count: start-up and compilation (all up
    to the dispatch of the attempt's first step), saving, evaluating, waiting for a batch with
    nothing left to compute, whatever else leaves the device idle, and steps that a killed attempt
    had done beyond the checkpoint that this one goes on from. Skipped updates do count: their
    batches are spent.
    """

    def __init__(self, began: float) -> None:
        self._began = began
        self._free: float | None = None
        self._done = began
        self._trained = 0.0

    def batch_came(self, now: float, data_wait: float) -> float:
        """When the step dispatched at `now` had its batch, after `data_wait` seconds of waiting.

        The step could not begin before. The first is compiled before it is dispatched, and
        begins at `now`.
        """
        return now if self._free is None else min(self._free + data_wait, now)

    def loop_free(self, now: float) -> None:
        """From `now` on the loop does nothing but fetch its next batch and dispatch a step."""
        self._free = now

    def step_done(self, came: float, done: float, *, redone: bool) -> float:
        """Count a step that had its batch at `came` and that the device finished at `done`.

        Steps are counted in their order. Returns the seconds that the device computed.
        """
        seconds = max(0.0, done - max(came, self._done))
        self._done = max(done, self._done)
        if not redone:
            self._trained += seconds
        return seconds

    def goodput(self, now: float) -> float:
        """Share of the attempt up to `now` that trained, 0 to 1."""
        return self._trained / max(now - self._began, 1e-9)
