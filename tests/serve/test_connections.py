"""Who is cut off: a reader that takes nothing of what waits for it, and a connection on which nobody asks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from burnish.serve.connections import CountingTransport, Watched
from burnish.serve.settings import ServeSettings

SETTINGS = ServeSettings(slow_reader_timeout_s=20, idle_timeout_s=75)


def cut_at(*seen: tuple[int, int], asked: bool = True) -> tuple[int, str] | None:
    """The second at which a connection is cut, and why; of one that is looked at every second.

    Args:
        seen: bytes written, and how many of them wait.
    """
    watched = Watched(0)
    for second, (written, waiting) in enumerate(seen, 1):
        reason = watched.look(second, written=written, waiting=waiting, asked=asked, settings=SETTINGS)
        if reason is not None:
            return second, reason
    return None


def test_a_reader_that_takes_nothing_is_cut_whether_or_not_more_is_written() -> None:
    # At the second that is looked at first, some had been taken.
    assert cut_at(*[(9_000, 4_000)] * 40) == (22, "slow_reader")
    assert cut_at(*[(9_000 + 100 * second, 4_000 + 100 * second) for second in range(40)]) == (22, "slow_reader")


def test_a_reader_that_is_slower_than_the_answer_is_not_cut_while_it_reads() -> None:
    assert cut_at(*[(3_000 * second, 2_000 * second) for second in range(1, 200)]) is None
    one_byte = [(5_000 + second // 15, 5_000) for second in range(200)]
    assert cut_at(*one_byte) is None


def test_a_connection_without_a_request_is_cut_and_one_that_waits_for_its_answer_is_not() -> None:
    assert cut_at(*[(500, 0)] * 100, asked=False) == (76, "idle")
    assert cut_at(*[(500, 0)] * 100, asked=True) is None


def test_a_transport_counts_what_it_is_given_and_is_otherwise_itself() -> None:
    sent: list[bytes] = []
    plain: Any = SimpleNamespace(write=sent.append, get_write_buffer_size=lambda: 7)
    transport = CountingTransport(plain)
    transport.write(b"abc")
    transport.writelines([b"d", b"ef"])
    assert (b"".join(sent), transport.num_written, transport.get_write_buffer_size()) == (b"abcdef", 6, 7)
