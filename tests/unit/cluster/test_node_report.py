"""The comparison of the nodes' reports finds each fault and each difference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_chord.cluster.job import Job, Node
from megatron_chord.cluster.node_report import Report, faults, push_problems, room_problems
from megatron_chord.config import CheckpointConfig, EvaluationConfig, ParallelConfig, TimeoutsConfig
from megatron_chord.config_methods import SelfDistillationConfig
from tests.support.tiny import tiny_run

GOOD = Report(
    node="a1", gpus=("H100",) * 8, versions={"torch": "2.13.0", "source": "1234"}, problems=(), clock=1000.0
)


def nodes(*changed: Report) -> list[Report]:
    return [GOOD, replace(GOOD, node="a2", clock=1000.1), *changed]


def test_equal_nodes_are_fit() -> None:
    assert faults([GOOD]) == []
    assert faults(nodes(replace(GOOD, node="a3", clock=1001.5))) == []


def test_a_node_knows_its_own_problem() -> None:
    found = faults(nodes(replace(GOOD, node="a3", problems=("no space left",))))
    assert found == ["a3: no space left"]


def test_other_versions_and_missing_packages() -> None:
    other = replace(GOOD, node="a3", versions={"torch": "2.14.0", "source": "1234", "vllm": "0.32.0"})
    assert faults(nodes(other)) == [
        "a3 has torch 2.14.0, a1 has 2.13.0",
        "a3 has vllm 0.32.0, a1 has none",
    ]


def test_a_lost_gpu() -> None:
    assert faults(nodes(replace(GOOD, node="a3", gpus=("H100",) * 7))) == ["a3 has 7 x H100, a1 has 8 x H100"]


def test_nodes_that_only_sample_may_have_other_gpus_but_as_many() -> None:
    ours = {"torch": "2.13.0", "source": "1234", "driver": "570.1"}
    sampling = replace(GOOD, node="b1", trains=False, gpus=("L40S",) * 8, versions=ours)
    trainer = replace(GOOD, versions=ours | {"driver": "580.1"})
    assert faults([trainer, sampling, replace(sampling, node="b2")]) == []
    other = replace(sampling, node="b2", gpus=("A100",) * 8)
    assert faults([trainer, sampling, other]) == ["b2 has 8 x A100, b1 has 8 x L40S"]
    fewer = replace(sampling, gpus=("L40S",) * 4)
    assert faults([trainer, fewer]) == ["b1 has 4 x L40S, a1 has 8 x H100"]
    assert faults([trainer, replace(trainer, node="a2", gpus=("L40S",) * 8)]) == [
        "a2 has 8 x L40S, a1 has 8 x H100"
    ]


def test_a_clock_that_is_off() -> None:
    found = faults(nodes(replace(GOOD, node="a3", clock=997.0), replace(GOOD, node="a4")))
    assert found == ["a3: its clock is -3.0 s off the others' (limit 2 s)"]


def test_what_one_node_alone_refuses() -> None:
    found = faults(nodes(replace(GOOD, node="a3", refusal="model.path: /shared/m does not exist")))
    assert found == ["a3: model.path: /shared/m does not exist"]


def test_a_disk_without_room_for_all_checkpoints(tmp_path: Path) -> None:
    """1,000 parameters in bf16: a checkpoint has 14,000 bytes, the policy 2,000."""
    run = replace(tiny_run(tmp_path / "model"), output=tmp_path / "out")
    run = replace(run, model=replace(run.model, dtype="bf16"), checkpoint=CheckpointConfig(keep=2))
    assert list(room_problems(run, 1000, free=3 * 14_000 + 2000)) == []
    (found,) = room_problems(run, 1000, free=3 * 14_000 + 1999)
    assert "3 checkpoints" in found
    assert "checkpoint.keep 2, and the one that is written) and the policy" in found
    # What a resumed run has already is room: it will be deleted.
    (tmp_path / "out" / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "step-000001" / "data").write_bytes(b"x" * 14_000)
    assert list(room_problems(run, 1000, free=2 * 14_000 + 2000)) == []
    best = replace(
        run,
        data=replace(run.data, evaluation=run.data.prompts),
        evaluation=EvaluationConfig(every=1),
        checkpoint=CheckpointConfig(keep=2, keep_best="accuracy"),
    )
    (found,) = room_problems(best, 1000, free=2 * 14_000 + 2000)
    assert "4 checkpoints" in found
    assert "and the best" in found
    wide = replace(run, model=replace(run.model, dtype="fp32"), checkpoint=CheckpointConfig(keep=1))
    assert list(room_problems(wide, 1000, free=2 * 16_000 + 4000 - 14_000)) == []
    assert len(list(room_problems(wide, 1000, free=2 * 16_000 + 3999 - 14_000))) == 1
    averaged = replace(
        run,
        method=SelfDistillationConfig(teacher="averaged"),
        batch=replace(run.batch, demonstrations=0),
        data=replace(run.data, demonstrations=None),
    )
    assert list(room_problems(averaged, 1000, free=3 * 26_000 + 2000 - 14_000)) == []
    assert len(list(room_problems(averaged, 1000, free=3 * 26_000 + 1999 - 14_000))) == 1


def test_a_push_that_cannot_meet_its_deadline(tmp_path: Path) -> None:
    """70.6 billion parameters in bf16 to 8 GPUs a node: over gloo 2 s + 8 x 141.2 GB / (0.72 GB/s) = 1,571 s, by the
    relay 4.34 s + 141.2 GB / (13.9 GB/s) = 14 s."""
    relayed = tiny_run(tmp_path)
    relayed = replace(relayed, model=replace(relayed.model, dtype="bf16"))
    run = replace(relayed, rollout=replace(relayed.rollout, transport="gloo"))

    def job(num_nodes: int, num_rollout_nodes: int = 0) -> Job:
        nodes = tuple(Node(name=f"n{i}", address="127.0.0.1") for i in range(num_nodes))
        return Job(
            folder=tmp_path,
            nodes=nodes,
            index=0,
            port=0,
            num_rollout_nodes=num_rollout_nodes,
            ranks_per_node=8,
            gpus=tuple("01234567"),
            servers_per_node=None,
        )

    (found,) = push_problems(run, job(8), 70_600_000_000)
    assert "141 GB of weights by the transport gloo takes about 1571 s" in found
    assert "Leave rollout.transport out, or set timeouts.weight_push_s to 3142" in found
    staged = replace(run, parallel=ParallelConfig(pipeline=2, tensor=4))
    (found,) = push_problems(staged, job(8), 70_600_000_000)
    assert "set timeouts.weight_push_s and timeouts.collective_s to 3142" in found
    patient = replace(staged, timeouts=TimeoutsConfig(weight_push_s=3142, collective_s=3142))
    assert list(push_problems(patient, job(8), 70_600_000_000)) == []
    assert list(push_problems(relayed, job(8), 70_600_000_000)) == []
    hurried = replace(relayed, timeouts=TimeoutsConfig(weight_push_s=14))
    (found,) = push_problems(hurried, job(8), 70_600_000_000)
    assert "by the transport relay takes about 14 s" in found
    assert "Set timeouts.weight_push_s to 29" in found
    assert list(push_problems(hurried, job(8, num_rollout_nodes=2), 70_600_000_000)) == []
    astray = replace(run, rollout=replace(run.rollout, transport="relay"))
    (found,) = push_problems(astray, job(8, num_rollout_nodes=2), 7_600_000_000)
    assert "relay needs servers beside the ranks, and 2 nodes of this job only sample" in found
    near = replace(run, rollout=replace(run.rollout, transport="ipc"))
    (found,) = push_problems(near, job(8), 7_600_000_000)
    assert "rollout.transport ipc works within one node, and this job has 8" in found
    assert list(push_problems(run, job(8), 7_600_000_000)) == []
    patient = replace(run, timeouts=TimeoutsConfig(weight_push_s=3142))
    assert list(push_problems(patient, job(8), 70_600_000_000)) == []
