"""The bounded queue: what may wait, and when those who may not are told to come back."""

import pytest

from app.engine.admission import Admission
from app.errors import Overloaded


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def refusal(admission, *, num_waiting=8, num_seqs=1, num_tokens=1):
    with pytest.raises(Overloaded) as refused:
        admission.check(num_waiting, num_seqs, num_tokens)
    return refused.value


def full(clock):
    """Return an admission of 8 sequences whose sequences end every 2 s."""
    admission = Admission(8, 1000, clock)
    for _ in range(50):
        admission.end(num_live=8)
        clock.now_s += 2.0
    return admission


def test_queue_is_bounded_by_sequences():
    admission = Admission(8, 1000, Clock())
    admission.check(num_waiting=6, num_seqs=2, num_tokens=1)
    refusal(admission, num_waiting=6, num_seqs=3)


def test_queue_is_bounded_by_prompt_tokens_until_their_first_output():
    admission = Admission(8, 1000, Clock())
    admission.enter(600)
    admission.check(num_waiting=1, num_seqs=1, num_tokens=400)
    refusal(admission, num_waiting=1, num_tokens=401)
    admission.leave(600)
    admission.check(num_waiting=1, num_seqs=1, num_tokens=401)


def test_prompt_over_the_bound_is_taken_when_nothing_waits():
    Admission(8, 1000, Clock()).check(num_waiting=0, num_seqs=1, num_tokens=5000)


def test_each_that_is_refused_is_told_to_come_a_place_later():
    admission = full(Clock())
    assert [refusal(admission).retry_after_s for _ in range(3)] == pytest.approx([2.0, 4.0, 6.0])


def test_free_place_starts_the_line_anew():
    admission = full(Clock())
    refusal(admission)
    admission.check(num_waiting=0, num_seqs=1, num_tokens=1)
    assert refusal(admission).retry_after_s == pytest.approx(2.0)


def test_room_is_asked_after_without_a_place_taken_or_given():
    admission = full(Clock())
    admission.check_room(num_waiting=7)
    for _ in range(2):
        with pytest.raises(Overloaded):
            admission.check_room(num_waiting=8)
        admission.check_room(num_waiting=7)  # for one: the next may want more
    assert refusal(admission, num_waiting=7, num_seqs=2).retry_after_s == pytest.approx(6.0)
    assert admission.num_refused_seqs == 3


def test_wait_is_never_less_than_a_second_nor_more_than_a_minute():
    assert refusal(Admission(8, 1000, Clock())).retry_after_s == 1.0  # nothing has ended yet
    admission = full(Clock())
    assert max(refusal(admission).retry_after_s for _ in range(100)) == 60.0


@pytest.mark.parametrize("num_at_once", [1, 16, 128])
def test_pace_is_that_of_all_ends_however_many_come_together(num_at_once):
    clock = Clock()
    admission = Admission(8, 1000, clock)
    admission.enter(1)
    for _ in range(200):
        clock.now_s += 0.1 * num_at_once
        for _ in range(num_at_once):
            admission.end(num_live=8)
    waits = [refusal(admission).retry_after_s for _ in range(100)]
    assert waits[-1] == pytest.approx(10.0)


def test_first_ends_already_tell_the_pace():
    clock = Clock()
    admission = Admission(8, 1000, clock)
    admission.enter(1)
    clock.now_s += 8.0
    for num_left in range(7, 3, -1):
        admission.end(num_live=num_left)
    assert refusal(admission).retry_after_s == pytest.approx(2.0)


def test_pace_follows_what_has_changed_of_late():
    clock = Clock()
    admission = full(clock)
    for _ in range(300):
        clock.now_s += 4.0
        admission.end(num_live=8)
    assert refusal(admission).retry_after_s == pytest.approx(4.0, rel=0.01)


def test_idle_time_does_not_slow_the_pace():
    clock = Clock()
    admission = full(clock)
    admission.end(num_live=0)
    clock.now_s += 86_400
    admission.end(num_live=8)
    assert refusal(admission).retry_after_s == pytest.approx(2.0)
