"""Work in processes: all of it comes back, and a process that dies is told of."""

import multiprocessing
import os
import signal

import pytest

from fedveil.errors import FedveilError
from fedveil.forks import in_processes

_held: list[int] = []


def _hold():
    _held.append(7)


def _times_held(number):
    return number * _held[0]


def _dies_of_two(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_everything_comes_back_from_processes_that_were_prepared():
    found = in_processes(_times_held, range(5), workers=2, prepare=_hold)
    assert sorted(found) == [0, 7, 14, 21, 28]
    assert not _held
    assert list(in_processes(_times_held, (), workers=2)) == []


def test_a_worker_that_dies_ends_the_work_in_a_sentence_and_leaves_none():
    with pytest.raises(FedveilError, match="a worker process died, perhaps for lack of memory"):
        list(in_processes(_dies_of_two, range(4), workers=2))
    assert not multiprocessing.active_children()
