"""Running totals of experts become counters that only grow, over epochs that start from nothing."""

from array import array

from tpserve.observe.metrics import Metrics


def test_totals_of_an_epoch_and_of_the_next() -> None:
    metrics = Metrics("m")

    def shown() -> dict[tuple[str, str], float]:
        samples = [s for family in metrics.registry.collect() for s in family.samples if s.name == "tpserve:expert_tokens_total"]
        return {(s.labels["layer"], s.labels["expert"]): s.value for s in samples}

    assert shown() == {}, "a dense model has no such series"
    metrics.experts((1, 3), array("q", [5, 0, 2, 2**40]).tobytes())
    metrics.experts((0,), array("q", [1, 1]).tobytes())
    first = {("1", "0"): 5, ("1", "1"): 0, ("3", "0"): 2, ("3", "1"): 2**40, ("0", "0"): 1, ("0", "1"): 1}
    assert shown() == first
    metrics.experts((1, 3), array("q", [6, 0, 1, 3]).tobytes())
    assert shown() == first | {("1", "0"): 6, ("3", "0"): 3, ("3", "1"): 2**40 + 3}
