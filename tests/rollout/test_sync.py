"""Weights reach a real vLLM server exactly, or the push fails on every rank and the server is not used again.

The reference is Transformers with the same weights. The models are random, so that their log-probs differ by more than
1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_chord.records import Prompt, Rollout, RolloutRequest
from megatron_chord.rollout.client import PauseMode, RolloutClient
from megatron_chord.rollout.replies import RolloutError, StaleWeights
from megatron_chord.rollout.server import RolloutServer
from megatron_chord.rollout.sync import SyncError, SyncSettings, TransportName, WeightSync
from megatron_chord.rollout.transports import FileTransport
from megatron_chord.sampling.rounds import Sampling, sample
from tests.rollout import rank_program
from tests.rollout.conftest import Servers
from tests.rollout.helpers import (
    VOCAB,
    await_sampling,
    client_of,
    expected_logprobs,
    largest_gap,
    make_model,
    num_sampled,
    requests,
    weights_of,
)
from tests.support.ranks import run_ranks

TOLERANCE = 1e-4
DEADLINE_S = 240.0
SHARED_MEMORY = Path("/dev/shm")


def make_sync(
    client: RolloutClient,
    transport: TransportName,
    folder: Path = SHARED_MEMORY,
    pause_mode: PauseMode = "wait",
) -> WeightSync:
    return WeightSync(
        [client],
        SyncSettings(
            transport=transport,
            timeout_s=DEADLINE_S,
            folder=folder,
            bucket_bytes=60_000,  # several buckets, some of which end in the middle of a layer
            pause_mode=pause_mode,
        ),
        exporters=[0],
        group=None,
        device=torch.device("cuda" if torch.cuda.is_available() and transport == "broadcast" else "cpu"),
    )


@pytest.fixture
def server(servers: Servers) -> RolloutServer:
    return servers.healthy()


@pytest.fixture
def client(server: RolloutServer) -> Iterator[RolloutClient]:
    client = client_of(server)
    yield client
    client.close()


@pytest.fixture
def pushed(client: RolloutClient) -> int:
    """Push the model with seed 0 and return its version."""
    version = 1000
    sync = make_sync(client, "file")
    sync.push(weights_of(make_model(0)), version)
    sync.close()
    return version


def test_nothing_is_sampled_by_weights_that_were_never_pushed(
    server: RolloutServer, client: RolloutClient
) -> None:
    assert client.weight_version() is None
    with pytest.raises(StaleWeights, match="default, not 0"):
        client.generate(requests(), version=0, deadline_s=DEADLINE_S)


@pytest.mark.parametrize(
    "transport",
    [
        "file",
        "gloo",
        "relay",
        pytest.param("broadcast", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="gloo")),
    ],
)
def test_logprobs_equal_those_of_transformers_after_every_push(
    client: RolloutClient, transport: TransportName
) -> None:
    with_temperature = [request for t in (1.0, 0.7, 0.0) for request in requests(3, temperature=t)]
    sync = make_sync(client, transport)
    try:
        for version in (0, 1, 10):
            for intermediate in range(max(version - 8, 0), version):
                sync.push(weights_of(make_model(100 + intermediate)), intermediate)
            model = make_model(version)
            report = sync.push(weights_of(model), version)
            assert report.num_bytes == sum(tensor.nbytes for _, tensor in weights_of(model))
            assert client.weight_version() == version
            replies = client.generate(with_temperature, version=version, deadline_s=DEADLINE_S)
            assert largest_gap(model, with_temperature, replies) < TOLERANCE
            # The bound is tight enough: other weights or another temperature give much larger gaps.
            assert largest_gap(make_model(version + 1), with_temperature, replies) > 1
            forgotten = [replace(request, temperature=1.0) for request in requests(3, temperature=0.7)]
            assert largest_gap(model, forgotten, replies[3:6]) > 0.1
    finally:
        sync.close()


def test_scores_equal_those_of_transformers(client: RolloutClient, pushed: int) -> None:
    (request,) = requests(1)
    (rollouts,) = client.generate([request], version=pushed, deadline_s=DEADLINE_S)
    ids = request.prompt_ids + rollouts[0].token_ids
    with torch.no_grad():
        logits = make_model(0)(torch.tensor([ids])).logits[0, :-1].double()
    expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    scores = torch.tensor(client.score(ids, version=pushed)).double()
    torch.testing.assert_close(scores, expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(StaleWeights):
        client.score(ids, version=pushed + 1)


def test_the_same_seeds_sample_the_same_tokens(client: RolloutClient, pushed: int) -> None:
    asked = requests()
    first = client.generate(asked, version=pushed, deadline_s=DEADLINE_S)
    assert tokens(client.generate(asked[::-1], version=pushed, deadline_s=DEADLINE_S)[::-1]) == tokens(first)
    other = [replace(request, seed=request.seed + 77) for request in asked]
    assert tokens(client.generate(other, version=pushed, deadline_s=DEADLINE_S)) != tokens(first)
    assert all(len({rollout.token_ids for rollout in rollouts}) == len(rollouts) for rollouts in first)


def tokens(replies: list[tuple[Rollout, ...]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in rollouts] for rollouts in replies]


def test_a_stop_token_ends_a_sample_and_belongs_to_it(client: RolloutClient, pushed: int) -> None:
    asked = [replace(request, stop_token_ids=tuple(range(0, 300, 10))) for request in requests()]
    rollouts = [r for reply in client.generate(asked, version=pushed, deadline_s=DEADLINE_S) for r in reply]
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert stopped
    assert all(rollout.token_ids[-1] % 10 == 0 for rollout in stopped)
    assert all(token % 10 for rollout in rollouts for token in rollout.token_ids[:-1])


def test_stale_weights_are_noticed(client: RolloutClient, pushed: int) -> None:
    with pytest.raises(StaleWeights, match=f"version {pushed}, not {pushed + 1}"):
        client.generate(requests(), version=pushed + 1, deadline_s=DEADLINE_S)


def test_an_aborted_sample_is_sampled_again(
    server: RolloutServer, client: RolloutClient, pushed: int
) -> None:
    asked = [replace(request, max_tokens=200) for request in requests()]
    undisturbed = client.generate(asked, version=pushed, deadline_s=DEADLINE_S)
    disturbed: list[list[tuple[Rollout, ...]]] = []
    thread = threading.Thread(
        target=lambda: disturbed.append(client.generate(asked, version=pushed, deadline_s=DEADLINE_S))
    )
    sampled = num_sampled(server)
    thread.start()
    await_sampling(server, since=sampled)
    client.pause(mode="abort")
    client.resume()
    thread.join()
    assert tokens(disturbed[0]) == tokens(undisturbed)


def test_requests_that_are_kept_go_on_with_the_new_weights(
    server: RolloutServer, client: RolloutClient, pushed: int
) -> None:
    """Each token has the log-prob of the weights that sampled it: the old weights first, then the new weights."""
    asked = [replace(request, num_rollouts=32, max_tokens=400, stop_token_ids=()) for request in requests(2)]
    sampled: list[list[tuple[Rollout, ...]]] = []
    begun = threading.Thread(
        target=lambda: sampled.append(
            client.generate(asked, version=pushed, deadline_s=DEADLINE_S, may_advance=True)
        )
    )
    sync = make_sync(client, "file", pause_mode="keep")
    old, new = make_model(0), make_model(1)
    sync.push(weights_of(old), pushed)  # the next push then pauses the server at once
    num_before = num_sampled(server)
    begun.start()
    await_sampling(server, since=num_before)
    sync.push(weights_of(new), pushed + 1)
    begun.join()
    sync.close()
    switched = 0
    for request, rollouts in zip(asked, sampled[0], strict=True):
        for rollout in rollouts:
            found = torch.tensor(rollout.logprobs).double()
            is_old = (found - expected_logprobs(old, request, rollout)).abs() < TOLERANCE
            is_new = (found - expected_logprobs(new, request, rollout)).abs() < TOLERANCE
            count = int(is_old.int().cumprod(0).sum())
            assert bool(is_new[count:].all()), "nothing but old ones and then new ones"
            # Requests that wait in the server's queue begin with the new weights.
            assert rollout.weight_version == pushed + (count == 0), "the oldest"
            switched += 0 < count < len(rollout.token_ids)
    assert switched > 0, "the push came when all was sampled, or before anything was"
    (after,) = client.generate(requests(1), version=pushed + 1, deadline_s=DEADLINE_S)
    assert largest_gap(new, requests(1), [after]) < TOLERANCE


def test_what_is_stopped_is_continued_by_the_next_weights(client: RolloutClient, pushed: int) -> None:
    """Two of four prompts are enough. The others keep their tokens, and requests of other clients are not stopped."""
    sampling = Sampling(num_rollouts=4, temperature=1.0, max_tokens=400, stop_token_ids=())
    generator = torch.Generator().manual_seed(5)

    def ask(index: int, given: int) -> RolloutRequest:
        ids = torch.randint(3, VOCAB, (12 + given,), generator=generator).tolist()
        prompt = Prompt(id=str(index), messages=(), truth="", token_ids=tuple(ids[:12]))
        return RolloutRequest(prompt=prompt, seed=index, prefix=tuple(ids[12:]))

    # Without stop tokens an answer reaches its limit. Each client sends a long request before its short one, so both
    # long ones have begun when both short ones end.
    asks = [ask(0, 0), ask(1, 0), ask(2, 360), ask(3, 350)]
    others = [replace(request, max_tokens=200, stop_token_ids=()) for request in requests(2)]
    undisturbed: list[list[tuple[Rollout, ...]]] = []
    beside = threading.Thread(
        target=lambda: undisturbed.append(client.generate(others, version=pushed, deadline_s=DEADLINE_S))
    )
    beside.start()
    told: list[tuple[int, tuple[Rollout, ...], int]] = []
    first = sample(
        [client, client],
        asks,
        sampling,
        version=pushed,
        deadline_s=DEADLINE_S,
        on_group=lambda *group: told.append(group),
        stop_after=2,
    )
    beside.join()
    assert [number for _, _, number in told] == [1, 2]
    assert {index: rollouts for index, rollouts, _ in told} == {2: first[2], 3: first[3]}
    assert [len(group) for group in first] == [4, 4, 4, 4]
    assert [{rollout.finish_reason for rollout in group} for group in first] == [
        {"abort"},
        {"abort"},
        {"length"},
        {"length"},
    ]
    assert all(0 < len(rollout.token_ids) < 400 for group in first[:2] for rollout in group)
    assert [len(rollout.token_ids) for group in undisturbed[0] for rollout in group] == [200] * 8

    sync = make_sync(client, "file")
    old, new = make_model(0), make_model(1)
    sync.push(weights_of(new), pushed + 1)
    sync.close()
    again = [replace(ask, partial_rollouts=group) for ask, group in zip(asks, first, strict=True)]
    second = sample([client, client], again, sampling, version=pushed + 1, deadline_s=DEADLINE_S)
    assert second[2:] == first[2:], "what was finished is not sampled again"
    for index in (0, 1):
        request = replace(requests(1)[0], prompt_ids=asks[index].prompt.token_ids)
        assert len({rollout.token_ids for rollout in second[index]}) == 4
        for begun, whole in zip(first[index], second[index], strict=True):
            count = len(begun.token_ids)
            assert whole.finish_reason == "length"
            assert len(whole.token_ids) == 400
            assert whole.token_ids[:count] == begun.token_ids
            assert whole.all_spans == ((pushed, count), (pushed + 1, 400 - count))
            assert whole.weight_version == pushed
            found = torch.tensor(whole.logprobs).double()
            by_old, by_new = (expected_logprobs(model, request, whole) for model in (old, new))
            torch.testing.assert_close(found[:count], by_old[:count], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(found[count:], by_new[count:], atol=TOLERANCE, rtol=0)
            assert (by_new - by_old).abs().max() > 1, "the bound means something"
            scores = client.score(request.prompt_ids + whole.token_ids, version=pushed + 1)
            rescored = torch.tensor(scores[len(request.prompt_ids) - 1 + count :]).double()
            torch.testing.assert_close(found[count:], rescored, atol=TOLERANCE, rtol=0)


def test_a_deadline_while_the_server_is_paused(client: RolloutClient, pushed: int) -> None:
    client.pause()
    with pytest.raises(RolloutError, match="0 of 4 requests finished within 1 s"):
        client.generate(requests(), version=pushed, deadline_s=1.0)
    client.resume()
    assert len(client.generate(requests(), version=pushed, deadline_s=DEADLINE_S)) == 4


def test_a_private_folder_is_left_empty_and_then_removed(client: RolloutClient, tmp_path: Path) -> None:
    sync = make_sync(client, "file", folder=tmp_path)
    sync.push(weights_of(make_model(0)), 5)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []
    sync.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks without a GPU")
def test_several_exporters_and_one_that_fails(servers: Servers) -> None:
    server = servers.to_be_broken()
    results = run_ranks(rank_program.main, 3, server.url, server.api_key, timeout_s=400)
    num_bytes = sum(tensor.nbytes for _, tensor in weights_of(make_model(0)))
    assert [result.num_bytes for result in results] == [num_bytes] * 3
    assert set(results[0].gaps) == {"file", "gloo", "broadcast", "relay"}
    assert all(gap < TOLERANCE for gap in results[0].gaps.values())
    for result in results:
        assert result.failure == "rank 2: ValueError: cannot export model.layers.1.mlp.up_proj.weight"
        assert result.failure_s < 120


def test_a_killed_server_is_noticed_at_once(servers: Servers) -> None:
    server = servers.running()
    begun = time.monotonic()
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(RolloutError):
        client_of(server).generate(requests(), version=0, deadline_s=DEADLINE_S)
    assert time.monotonic() - begun < DEADLINE_S / 3
    assert not server.alive()
    while server.processes() and time.monotonic() - begun < DEADLINE_S / 3:
        time.sleep(0.05)
    assert server.processes() == []


def test_a_damaged_bucket_fails_the_push_and_a_new_server_serves_again(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = servers.to_be_broken()
    sync = make_sync(client_of(old), "file")
    model = make_model(3)
    publish = FileTransport.publish

    def publish_damaged(transport, bucket, infos):
        parcel = publish(transport, bucket, infos)
        if any("layers.1.mlp.up_proj" in name for name, _ in bucket):
            _, buffer = transport._buffers[parcel.buffer % 2]
            buffer[0] ^= 4
        return parcel

    with monkeypatch.context() as patch:
        patch.setattr(FileTransport, "publish", publish_damaged)
        with pytest.raises(SyncError, match=r"1 of \d tensors arrived damaged"):
            sync.push(weights_of(model), 0)
    assert sync._private is not None
    assert list(sync._private.path.iterdir()) == []
    # Half of the layers are new now. The next push begins with a new connection and replaces all of them.
    again = client_of(old)
    sync.push(weights_of(model), 1)
    assert (
        largest_gap(model, requests(), again.generate(requests(), version=1, deadline_s=DEADLINE_S))
        < TOLERANCE
    )

    # vLLM's CPU build keeps a packed copy of a tied lm_head. The copy must be updated with the embedding.
    new = client_of(servers.healthy(tied=True))
    sync.reconnect([new])
    for version in (2, 3):
        tied = make_model(version, tied=True)
        sync.push(weights_of(tied), version)
        asked = requests()
        replies = new.generate(asked, version=version, deadline_s=DEADLINE_S)
        assert largest_gap(tied, asked, replies) < TOLERANCE
    sync.close()


def test_a_push_follows_that_of_a_killed_trainer(server: RolloutServer, client: RolloutClient) -> None:
    """The killed trainer has sent half of a layer. vLLM alone would refuse every further update until it restarts."""
    command = [sys.executable, "-m", "tests.rollout.killed_push", server.url]
    killed = subprocess.run(command, env=os.environ | {"CHORD_TEST_KEY": server.api_key}, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(RolloutError, match="while a weight update is already active"):
        client.start_weight_update(timeout_s=DEADLINE_S)

    model = make_model(11)
    sync = make_sync(client, "file")
    sync.push(weights_of(model), 11)
    sync.close()
    replies = client.generate(requests(), version=11, deadline_s=DEADLINE_S)
    assert largest_gap(model, requests(), replies) < TOLERANCE


def test_a_missing_part_of_a_fused_parameter_fails_the_push(servers: Servers) -> None:
    """vLLM alone counts qkv_proj as loaded as soon as one of its three parts is, and only logs a layer without any
    weight."""
    left_out = ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight")
    sync = make_sync(client_of(servers.healthy(tied=True)), "file")
    tensors = [item for item in weights_of(make_model(0, tied=True)) if item[0] not in left_out]
    with pytest.raises(
        SyncError, match=r"2 parameters .*: model\.layers\.1\.self_attn\.qkv_proj .*, model\.norm"
    ):
        sync.push(tensors, 0)
    sync.close()


def test_a_killed_engine_is_noticed_at_once(servers: Servers) -> None:
    server = servers.running()
    client = client_of(server)
    (engine,) = [
        pid for pid in server.processes() if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    begun = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(RolloutError):
        client.generate(requests(), version=0, deadline_s=DEADLINE_S)
    assert time.monotonic() - begun < DEADLINE_S / 3
    while server.alive() and time.monotonic() - begun < DEADLINE_S / 3:
        time.sleep(0.05)
    assert not server.alive()
