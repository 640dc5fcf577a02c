"""Gathers how long the ranks of a start wait for each other when one of them fails."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grace:
    """Holds the seconds that ranks give each other at the end. They depend on one another."""

    # A rank that timed out lets the others time out, so that the one that is missing is known.
    timeout_s: float = 1.5
    # A rank that lost a connection lets the rank whose failure broke it report first. Longer than
    # `timeout_s`: a rank that timed out breaks the others' connections.
    lost_peer_s: float = 3.0
    # The first rank that failed lets the others write their stacks: a launcher ends them next.
    stacks_s: float = 1.0
    # No answer from the store's host, which may be cut off. Longer than all of these together.
    store_s: float = 9.0
    # The other ranks let the launcher see the first one's exit first.
    first_s: float = 2.0
    # A rank that works lets its main thread exit by an error of its own, such as a lost connection.
    own_error_s: float = 5.0
    # The process of a rank that has written its stack ends, whatever it does.
    process_s: float = 20.0
    # The ranks that only waited let the launcher see rank 0's exit first.
    rank_0_s: float = 0.5
    # Rank 0, which may host the store, lets the others fetch the last word from it.
    last_word_s: float = 10.0


GRACE = Grace()
