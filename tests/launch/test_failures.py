"""A rank fails, hangs or is killed (trap 22): all end soon, the first one's error is shown, all
leave their stacks."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torch.distributed import PrefixStore

from distaccum.launch import peers
from distaccum.launch.grace import GRACE
from distaccum.launch.ranks import Place

from .programs import (
    alive,
    by_hand,
    free_port,
    seen,
    stacks,
    wait_for_ranks,
    wait_until,
    wait_until_gone,
)


def ways(start, folder, num_ranks, *args):
    """The same job by torchrun, by our own ranks, and by ranks without an agent, each in a folder
    of its own."""
    folders = [folder / name for name in ("torchrun", "own", "by_hand")]
    for each in folders:
        each.mkdir()
    return {
        "torchrun": [start(*args, torchrun=num_ranks, folder=folders[0])],
        "own": [start(*args, f"launch.nproc_per_node={num_ranks}", folder=folders[1])],
        "by_hand": by_hand(start, num_ranks, *args, folder=folders[2]),
    }


def ends_within(programs, ranks, folder, limit_s):
    """Wait until all ranks were at work and all have gone; what the ranks wrote."""
    found = wait_for_ranks(folder, ranks)
    for each in programs.values():
        for program in each:
            program.wait(limit_s)
    wait_until_gone([rank["pid"] for rank in found])
    return found


def test_raising_rank_takes_the_others_down(start, tmp_path):
    """Also one that does not notice: with "desert" nobody is in a collective."""
    for kind in ("raise", "desert"):
        folder = tmp_path / kind
        folder.mkdir()
        programs = ways(start, folder, 3, f"fault.kind={kind}", "fault.rank=1")
        ends_within(programs, 9, folder, 20)
        assert [program.code for each in programs.values() for program in each] == [1] * 5
        for way, each in programs.items():
            output = "\n".join(program.output for program in each)
            shown = (
                output.split("Traceback (most recent call last):\n  File")[0]
                if way == "torchrun"
                else output
            )
            assert shown.count("[rank 1] Traceback (most recent call last):") == 1, output
            assert shown.count("[rank 1] ArithmeticError: the culprit's own error") == 1, output
            assert "[rank 0] Traceback" not in output
            found = stacks(each[0].folder)
            assert sorted(found) == [0, 1, 2], output
            assert "ArithmeticError: the culprit's own error" in found[1]
            for rank in (0, 2):
                assert f"rank {rank} when it learned that rank 1 failed first" in found[rank]
                assert "in misbehave" in found[rank]


def test_killed_rank_is_noticed(start, tmp_path):
    """Nobody is left to tell it; those in a collective lose their connection."""
    programs = ways(start, tmp_path, 2, "fault.kind=kill", "fault.rank=1")
    ends_within(programs, 6, tmp_path, 15)
    (torchrun,), (own,), hands = programs.values()
    assert (torchrun.code, own.code, *(program.code for program in hands)) == (
        1,
        1,
        1,
        -signal.SIGKILL,
    )
    # torchrun ends the others at once; its summary says why
    assert len(torchrun.own_output()) <= 1, torchrun.output
    assert "Signal 9 (SIGKILL)" in torchrun.output
    assert "[rank 1] was ended by SIGKILL" in own.output
    assert "Traceback" not in own.output
    assert hands[0].output.startswith("[rank 0] another rank is gone")
    assert len(hands[0].output.splitlines()) == 1
    assert list(stacks(hands[0].folder)) == [0]


def test_host_of_the_store_is_killed(start, tmp_path):
    """Ranks without an agent: rank 0 takes the store with it."""
    programs = by_hand(start, 3, "fault.kind=kill", "fault.rank=0")
    ends_within({"": programs}, 3, tmp_path, 15)
    assert [program.code for program in programs] == [-signal.SIGKILL, 1, 1]
    for rank in (1, 2):
        assert f"[rank {rank}] another rank is gone" in programs[rank].output
    found = stacks(tmp_path)
    assert sorted(found) == [1, 2]
    assert all("the store of the job is gone" in text for text in found.values())


def test_hanging_rank_is_named_and_leaves(start, tmp_path):
    """It sleeps in Python and ignores SIGTERM; torchrun would kill it after 30 s. The limit is the
    start's, too."""
    programs = ways(start, tmp_path, 3, "fault.kind=hang", "fault.rank=1", "timeout_s=8")
    ends_within(programs, 9, tmp_path, 8 + 15)
    assert [program.code for each in programs.values() for program in each] == [1] * 5
    for way, each in programs.items():
        output = "\n".join(program.output for program in each)
        (folder,) = each[0].folder.rglob("stacks")
        words = (
            "] a collective took longer than train.timeout_s=8: rank 1 did not join it; its stack "
            f"is in {folder}/rank-1.txt"
        )
        lines = [line for line in output.splitlines() if words in line]
        assert len(lines) == 1, output
        assert lines[0].startswith(("[rank 0", "[rank 2"))
        if way == "torchrun":
            assert f"traceback : {lines[0].partition('] ')[2]}" in output  # its summary
        assert f"[rank 1] exits because rank {lines[0][6]} failed first" in output
        found = stacks(each[0].folder)
        assert sorted(found) == [0, 1, 2]
        assert "time.sleep" not in found[0]
        assert "in misbehave" in found[1]


def test_a_rank_that_never_comes_is_named(start, tmp_path):
    """By rank 0, and where it is rank 0 by all others. Nobody waits longer than train.timeout_s."""
    zero, two = by_hand(start, 4, "train.timeout_s=3", ranks=(0, 2))
    lost, late = by_hand(start, 3, "train.timeout_s=3", ranks=(1, 2))
    programs = (zero, two, lost, late)
    assert [program.wait(20).code for program in programs] == [1, 1, 1, 1]
    assert zero.output.startswith(
        "error: After 3 s (train.timeout_s) only 2 of 4 ranks have connected (0, 2); missing: 1, "
        "3. "
    )
    assert "WORLD_SIZE=4 means 4 processes with RANK 0 to 3" in zero.output
    assert two.output == ""  # what there is to say stands once
    for rank, program in ((1, lost), (2, late)):
        assert program.output.startswith(
            f"error: Rank {rank} of 3 could not reach rank 0 at MASTER_ADDR=127.0.0.1"
        )
        assert (
            " within 3 s (train.timeout_s): nothing listens there (connection refused)"
            in program.output
        )
    assert all(len(program.output.splitlines()) <= 1 for program in programs)
    assert seen(tmp_path) == []


def test_a_port_that_is_taken_is_a_letter(start):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = {
            "WORLD_SIZE": "2",
            "RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        program = start(environment=place).wait(20)
    assert program.code == 1
    assert "error: Rank 0 cannot listen on MASTER_ADDR=127.0.0.1" in program.output
    assert "Traceback" not in program.output


def test_no_wait_ends_a_run(monkeypatch):
    """20 days are over again and again; only a store that is gone ends the watch, and with it the
    rank."""
    waits = []
    monkeypatch.setattr(peers, "_LONGEST_WAIT", timedelta(milliseconds=20))
    monkeypatch.setattr(
        PrefixStore, "wait", lambda *args, wait=PrefixStore.wait: (waits.append(args), wait(*args))
    )
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    place = Place("environment", rank=0, world_size=2, local_rank=0, local_world_size=2)
    host = peers.Peers(place, GRACE)
    with ThreadPoolExecutor() as threads:
        watching = threads.submit(host.wait_until_over)
        wait_until(lambda: len(waits) > 3 or watching.done())
        assert not watching.done()
        assert host.claim(3, patience_s=0.0) == (0, 3)
        assert watching.result(10) == (0, 3)


def test_killed_launcher_leaves_no_orphan(start, tmp_path):
    programs = [
        start("fault.kind=sleep", torchrun=2),
        start("fault.kind=sleep", "launch.nproc_per_node=2"),
    ]
    ranks = wait_for_ranks(tmp_path, 4)
    assert {rank["parent"] for rank in ranks} == {program.pid for program in programs}
    assert all(alive(rank["pid"]) for rank in ranks)
    for program in programs:
        program.kill()
    wait_until_gone([rank["pid"] for rank in ranks], timeout_s=5)


def test_stale_stacks_are_removed(start, tmp_path):
    run = tmp_path / "mine"
    (run / "stacks").mkdir(parents=True)
    (run / "stacks" / "rank-7.txt").write_text("of an earlier start")
    for arguments in ({"torchrun": 2}, {}):
        own = () if arguments else ("launch.nproc_per_node=2",)
        assert start("fault.kind=raise", f"run_dir={run}", *own, **arguments).wait().code == 1
        assert sorted(stacks(tmp_path)) == [0, 1]
        (run / "stacks" / "rank-7.txt").write_text("of an earlier start")
        assert start(f"run_dir={run}", *own, **arguments).wait().code == 0
        assert not (run / "stacks").exists()
        (run / "stacks").mkdir()
        (run / "stacks" / "rank-7.txt").write_text("of an earlier start")
