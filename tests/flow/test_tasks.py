"""The mask table: what each row gives, down to the edges."""

import pytest

from cosmos3_train.flow.tasks import TASKS, action_given, sound_given, video_given

GIVEN_OF_FOUR = {
    "text_to_image": 0,
    "text_to_video": 0,
    "image_to_video": 1,
    "video_to_video": 2,
    "forward_dynamics": 1,
    "inverse_dynamics": 4,
    "policy": 1,
    "text_to_video_sound": 0,
    "image_to_video_sound": 1,
    "video_to_sound": 4,
    "sound_to_video": 0,
}


def test_every_row_is_known_here():
    assert TASKS.keys() == GIVEN_OF_FOUR.keys()


@pytest.mark.parametrize("name", TASKS)
def test_leading_frames_are_given(name):
    count = GIVEN_OF_FOUR[name]
    assert video_given(TASKS[name], 4).tolist() == [True] * count + [False] * (4 - count)


@pytest.mark.parametrize("name", TASKS)
def test_a_short_clip_keeps_a_frame_to_generate_unless_all_are_given(name):
    for frames in (1, 2):
        given = video_given(TASKS[name], frames)
        assert bool(given.all()) == (GIVEN_OF_FOUR[name] == 4)


def test_actions_and_the_state_row():
    assert not action_given(TASKS["policy"], 4, False).any()
    assert action_given(TASKS["policy"], 5, True).tolist() == [True, False, False, False, False]
    assert action_given(TASKS["forward_dynamics"], 5, True).all()
    assert not action_given(TASKS["inverse_dynamics"], 4, False).any()


def test_sound():
    assert sound_given(TASKS["sound_to_video"], 3).all()
    assert not sound_given(TASKS["video_to_sound"], 3).any()
