"""A rank fails, hangs or is killed (trap 22): all end soon, the first one's error is shown, all leave their stacks."""

import signal

from .programs import alive, by_hand, stacks, wait_for_ranks, wait_until_gone


def ways(start, folder, num_ranks, *args):
    """The same job by torchrun, by our own ranks, and by ranks without an agent, each in a folder of its own."""
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
            shown = output.split("Traceback (most recent call last):\n  File")[0] if way == "torchrun" else output
            assert shown.count("[rank 1] Traceback (most recent call last):") == 1, output
            assert shown.count("[rank 1] ArithmeticError: the culprit's own error") == 1, output
            assert "[rank 0] Traceback" not in output
            found = stacks(each[0].folder)
            assert sorted(found) == [0, 1, 2], output
            assert "ArithmeticError: the culprit's own error" in found[1]
            for rank in (0, 2):
                assert f"rank {rank} when it learnt that rank 1 failed first" in found[rank]
                assert "in misbehave" in found[rank]


def test_killed_rank_is_noticed(start, tmp_path):
    """Nobody is left to tell it; those in a collective lose their connection."""
    programs = ways(start, tmp_path, 2, "fault.kind=kill", "fault.rank=1")
    ends_within(programs, 6, tmp_path, 15)
    (torchrun,), (own,), hands = programs.values()
    assert (torchrun.code, own.code, *(program.code for program in hands)) == (1, 1, 1, -signal.SIGKILL)
    assert len(torchrun.own_output()) <= 1, torchrun.output  # torchrun ends the others at once; its summary says why
    assert "Signal 9 (SIGKILL)" in torchrun.output
    assert "[rank 1] was ended by SIGKILL" in own.output
    assert "Traceback" not in own.output
    assert hands[0].output.startswith("[rank 0] another rank has gone away")
    assert len(hands[0].output.splitlines()) == 1
    assert list(stacks(hands[0].folder)) == [0]


def test_host_of_the_store_is_killed(start, tmp_path):
    """Ranks without an agent: rank 0 takes the store with it."""
    programs = by_hand(start, 3, "fault.kind=kill", "fault.rank=0")
    ends_within({"": programs}, 3, tmp_path, 15)
    assert [program.code for program in programs] == [-signal.SIGKILL, 1, 1]
    for rank in (1, 2):
        assert f"[rank {rank}] another rank has gone away" in programs[rank].output
    found = stacks(tmp_path)
    assert sorted(found) == [1, 2]
    assert all("the store of the job is gone" in text for text in found.values())


def test_hanging_rank_is_named_and_leaves(start, tmp_path):
    """It sleeps in Python and ignores SIGTERM; torchrun would kill it only after 30 s."""
    programs = ways(start, tmp_path, 3, "fault.kind=hang", "fault.rank=1", "timeout_s=2")
    ends_within(programs, 9, tmp_path, 2 + 15)
    assert [program.code for each in programs.values() for program in each] == [1] * 5
    for way, each in programs.items():
        output = "\n".join(program.output for program in each)
        (folder,) = each[0].folder.rglob("stacks")
        words = (
            "] a collective took longer than train.timeout_s=2: rank 1 has not come; its stack is in "
            f"{folder}/rank-1.txt"
        )
        lines = [line for line in output.splitlines() if words in line]
        assert len(lines) == 1, output
        assert lines[0].startswith(("[rank 0", "[rank 2"))
        if way == "torchrun":
            assert f"traceback : {lines[0].partition('] ')[2]}" in output  # its summary
        assert f"[rank 1] leaves, because rank {lines[0][6]} failed first" in output
        found = stacks(each[0].folder)
        assert sorted(found) == [0, 1, 2]
        assert "time.sleep" not in found[0]
        assert "in misbehave" in found[1]


def test_killed_launcher_leaves_no_orphan(start, tmp_path):
    programs = [start("fault.kind=sleep", torchrun=2), start("fault.kind=sleep", "launch.nproc_per_node=2")]
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
