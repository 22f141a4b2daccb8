"""Which ranks can work together, and the tables that say how they differ."""

from msgspec.structs import replace

from tpserve.coordinator.config_check import all_facts, mismatch, optional_mismatches, required_mismatches
from tpserve.observe.table import of_ranks
from tpserve.types.messages import Hello, NodeInfo


def hello(rank: int, host: str, settings: dict[str, str] | None = None, driver: str = "570.1", **facts: str) -> Hello:
    node = NodeInfo(rank // 2, f"10.0.0.{rank // 2}", host, settings or {})
    return Hello(rank, 1, 100 + rank, host, {}, {"tpserve": "1", **facts}, node, {"driver": driver})


SAME = [hello(0, "a", torch="2.13"), hello(1, "a", torch="2.13")]


def test_ranks_that_agree_have_no_table() -> None:
    assert required_mismatches(SAME) == optional_mismatches(SAME) == required_mismatches([]) == []
    assert mismatch(SAME[:1], SAME[1]) == ""
    assert all_facts(SAME) == ["         ranks 0-1 on a", "tpserve  1", "torch    2.13", "driver   570.1"]


def test_who_has_what_of_all_that_must_agree() -> None:
    other = [hello(2, "b", torch="2.11", tpserve="2", NCCL="2.27"), hello(3, "b", torch="2.11", tpserve="2", NCCL="2.27")]
    assert required_mismatches([*SAME, *other]) == [
        "         ranks 0-1 on a  ranks 2-3 on b",
        "tpserve  1               2",
        "torch    2.13            2.11",
        "NCCL     none            2.27",
    ]
    assert mismatch(SAME, other[0]).startswith("rank 0 on a has NCCL none, rank 2 on b has NCCL 2.27: start every node with")


def test_other_weights_are_told_by_a_file() -> None:
    a, b = ({f"weights {i}.safetensors": f"{host}{i}" for i in range(9)} for host in "ab")
    hellos = [hello(0, "a", **a), hello(1, "b", **b)]
    said = mismatch(hellos[:1], hellos[1])
    assert said == (
        "rank 0 on a has weights 0.safetensors a0, rank 1 on b has weights 0.safetensors b0: put the same files on every node"
    )
    assert len(required_mismatches(hellos)) == 5 and len(all_facts(hellos)) == 7, "a few of many files"


def test_what_may_differ_is_no_reason_to_refuse() -> None:
    other = hello(2, "b", {"NCCL_IB_HCA": "mlx5"}, driver="560.2", torch="2.13")
    assert mismatch(SAME, other) == "" and required_mismatches([*SAME, other]) == []
    assert optional_mismatches([*SAME, other]) == [
        "             ranks 0-1 on a  rank 2 on b",
        "driver       570.1           560.2",
        "NCCL_IB_HCA  none            mlx5",
    ]


def test_ranks_that_are_alike_share_a_column_wherever_they_are() -> None:
    mixed = [hello(0, "a", torch="1"), hello(1, "a", torch="2"), hello(2, "b", torch="1"), hello(3, "b", torch="1")]
    assert required_mismatches(mixed)[0] == "       ranks 0, 2-3 on a, b  rank 1 on a"
    assert of_ranks([7]) == "rank 7"


def seated(rank: int, stage: int, cpu: str, **facts: str) -> Hello:
    return replace(hello(rank, "ab"[rank // 2], **facts), stage=stage, processor={"CPU": cpu, "CPU operators": cpu[-4:]})


def test_unlike_processors_are_for_different_stages() -> None:
    mixed = [seated(0, 0, "AVX512 AMX"), seated(1, 0, "AVX512 AMX"), seated(2, 1, "AVX2"), seated(3, 1, "AVX2")]
    assert all(mismatch(mixed[:i], mixed[i]) == "" for i in range(4)) and required_mismatches(mixed) == []
    assert optional_mismatches(mixed) == [
        "               ranks 0-1 on a  ranks 2-3 on b",
        "CPU            AVX512 AMX      AVX2",
        "CPU operators   AMX            AVX2",
    ]


def test_unlike_processors_in_a_stage_are_refused() -> None:
    mixed = [seated(0, 0, "AVX2"), seated(1, 1, "AVX512"), seated(2, 0, "AVX2"), seated(3, 1, "AVX2")]
    why = mismatch(mixed[:3], mixed[3])
    assert why.startswith("rank 1 on a has CPU AVX512, rank 3 on b has CPU AVX2: tensor parallel ranks must compute alike")
    assert "--pipeline-parallel-size" in why
    assert required_mismatches(mixed) == [
        "               ranks 0, 2-3 on a, b  rank 1 on a",
        "CPU            AVX2                  AVX512",
        "CPU operators  AVX2                  X512",
    ]
    other = seated(3, 1, "AVX512", torch="2.11")
    assert mismatch(mixed[:3], other).startswith("rank 0 on a has torch none"), "what all must have comes first"
