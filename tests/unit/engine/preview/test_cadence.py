"""The preview schedule: all options hold at once, and the last step is always shown."""

from hypothesis import given
from hypothesis import strategies as st

from calotype_server.engine.preview.cadence import PreviewSchedule
from calotype_server.types import PreviewOptions

OPTIONS = st.builds(
    PreviewOptions, every_steps=st.integers(1, 7), min_interval=st.one_of(st.just(0.0), st.floats(0.001, 10))
)


def walk(options, seconds, strides):
    """Offers one step after another; returns (step, time, stride, shown) for each."""
    now = 0.0
    cadence = PreviewSchedule(options, lambda: now)
    offered = []
    for number, (passed, stride) in enumerate(zip(seconds, strides, strict=True), 1):
        now += passed
        offered.append((number, now, stride, cadence.due(number, len(seconds), stride)))
    return offered


@given(OPTIONS, st.data())
def test_all_options_hold_at_once(options, data):
    """Shown steps keep `every_steps`, stride and interval; every step that is not shown violates one of them."""
    total = data.draw(st.integers(1, 40))
    seconds = data.draw(st.lists(st.floats(0, 5), min_size=total, max_size=total))
    strides = data.draw(st.lists(st.integers(1, 6), min_size=total, max_size=total))
    last_step = last_time = None
    for step, now, stride, shown in walk(options, seconds, strides):
        multiple = step % options.every_steps == 0
        far_enough = last_step is None or step - last_step >= stride
        late_enough = last_time is None or now - last_time >= options.min_interval
        assert shown == (step == total or (multiple and far_enough and late_enough))
        if shown:
            last_step, last_time = step, now
    assert last_step == total


def test_defaults_show_every_step():
    """By default every step is shown."""
    assert all(shown for *_, shown in walk(PreviewOptions(), [0.0] * 20, [1] * 20))


def test_every_nth_step_and_the_last():
    """With every third of ten steps, steps 3, 6, 9 and 10 are shown."""
    offered = walk(PreviewOptions(every_steps=3), [1.0] * 10, [1] * 10)
    assert [step for step, *_, shown in offered if shown] == [3, 6, 9, 10]


def test_more_than_all_steps_leaves_the_last():
    """With every thousandth of ten steps, only the last is shown."""
    offered = walk(PreviewOptions(every_steps=1000), [1.0] * 10, [1] * 10)
    assert [step for step, *_, shown in offered if shown] == [10]


def test_an_interval_is_kept_by_the_clock():
    """With steps of 0.25 s and previews 1 s apart, the first, every fourth after it, and the last are shown."""
    offered = walk(PreviewOptions(min_interval=1.0), [0.25] * 11, [1] * 11)
    assert [step for step, *_, shown in offered if shown] == [1, 5, 9, 11]


def test_stride_and_every_steps_combine():
    """With every second step and a stride of five, even steps at least five apart are shown."""
    offered = walk(PreviewOptions(every_steps=2), [1.0] * 20, [5] * 20)
    assert [step for step, *_, shown in offered if shown] == [2, 8, 14, 20]
