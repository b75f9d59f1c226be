"""How much a node may push."""

from fedveil.deployment.admission import Allowance

_LEAST = 256 * 2**20


def test_a_model_leaves_room_for_an_answer_four_times_as_long():
    allowance = Allowance()
    allowance.asked()
    allowance.handed("model", 2**30)
    assert allowance.spend(4 * 2**30)


def test_what_was_not_used_does_not_pile_up():
    allowance = Allowance()
    for number in range(100):
        allowance.asked()
        allowance.handed(f"model {number}", 10)
    assert not allowance.spend(3 * _LEAST)


def test_a_node_that_was_asked_nothing_is_cut_off():
    allowance = Allowance()
    assert allowance.spend(_LEAST)
    assert not allowance.spend(1)
    allowance.asked()
    assert allowance.spend(1)


def test_an_object_that_is_pulled_again_and_again_counts_once():
    """Or a node could pull its way to any room it likes."""
    allowance = Allowance()
    allowance.asked()
    for _ in range(1000):
        allowance.handed("model", 2**20)
    assert not allowance.spend(2 * _LEAST + 8 * 2**20)
