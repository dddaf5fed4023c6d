import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.timeline import Segment, Timeline
from utils.config import Config
from utils.errors import UserError
from utils.prompts import Story
from wan.geometry import first_frame, frames_of, latents_for, whole_blocks

COUNTS = st.integers(1, 10**6)
BLOCKS = st.integers(1, 6)


@given(COUNTS)
def test_latents_and_frames_convert_back(count):
    assert frames_of(count) == 4 * count - 3
    assert latents_for(frames_of(count)) == count
    assert latents_for(frames_of(count) + 1) == count + 1
    assert frames_of(latents_for(count) - 1) < count <= frames_of(latents_for(count))


@given(st.integers(0, 10**6))
def test_each_latent_begins_where_those_before_it_end(latent):
    assert first_frame(latent) == frames_of(latent)
    assert first_frame(0) == 0


@given(COUNTS, BLOCKS)
def test_whole_blocks_round_up(latents, block):
    rounded = whole_blocks(latents, block)
    assert rounded % block == 0 and latents <= rounded < latents + block


@st.composite
def timelines(draw) -> tuple[list[str], list[int], int, int]:
    """prompts, switches, block, frames that fit together."""
    frames = draw(st.integers(5, 400))
    latents = latents_for(frames)
    switches = sorted(draw(st.sets(st.integers(1, latents - 1), max_size=8)))
    return [f"prompt {i}" for i in range(len(switches) + 1)], switches, draw(BLOCKS), frames


@given(timelines())
def test_each_block_has_the_last_prompt_asked_for_by_its_start(given_timeline):
    prompts, switches, block, frames = given_timeline
    timeline = Timeline.build(prompts, switches, block=block, frames=frames)
    starts = range(0, latents_for(frames), block)
    assert list(timeline) == [prompts[sum(switch <= start for switch in switches)] for start in starts]
    assert len(timeline) == len(starts)
    assert timeline.frames == frames <= frames_of(timeline.latents)


@given(timelines())
def test_switches_are_rounded_up_to_blocks_and_none_is_lost_silently(given_timeline):
    prompts, switches, block, frames = given_timeline
    timeline = Timeline.build(prompts, switches, block=block, frames=frames)
    everything = sorted(timeline.segments + timeline.dropped, key=lambda segment: segment.asked)
    assert [(s.prompt, s.asked) for s in everything] == list(zip(prompts, [0, *switches], strict=True))
    for segment in everything:
        assert segment.latent % block == 0 and segment.asked <= segment.latent < segment.asked + block
    assert [s.latent for s in timeline.segments] == sorted({s.latent for s in everything} - {timeline.latents})
    shown = list(dict.fromkeys(timeline))
    assert shown == [segment.prompt for segment in timeline.segments]


def test_last_of_two_switches_in_one_block_wins():
    timeline = Timeline.build(["a", "b", "c", "d"], [4, 5, 7], block=3, frames=frames_of(12))
    assert list(timeline) == ["a", "a", "c", "d"]
    assert timeline.segments == (Segment("a", 0, 0), Segment("c", 5, 6), Segment("d", 7, 9))
    assert timeline.dropped == (Segment("b", 4, 6),)


def test_switch_after_the_last_block_begins_is_dropped():
    timeline = Timeline.build(["a", "b"], [4], block=3, frames=frames_of(6))
    assert list(timeline) == ["a", "a"]
    assert timeline.dropped == (Segment("b", 4, 6),)


def test_plan_tells_latent_frame_and_second():
    timeline = Timeline.build(["a", "b"], [7], block=3, frames=frames_of(12))
    assert timeline.plan(fps=16) == [
        {"prompt": "a", "latent": 0, "frame": 0, "second": 0.0, "asked_latent": 0},
        {"prompt": "b", "latent": 9, "frame": 33, "second": 2.062, "asked_latent": 7},
    ]


@given(st.integers(1, 40), st.integers(1, 40), BLOCKS, st.integers(0, 3))
def test_even_split(prompts, blocks, block, more_frames):
    assume(prompts <= blocks)
    frames = frames_of(block * (blocks - 1)) + 1 + min(more_frames, 4 * block - 4)  # inside the last block
    names = [f"prompt {i}" for i in range(prompts)]
    timeline = Timeline.evenly(names, block=block, frames=frames)
    runs = [(prompt, len(list(same))) for prompt, same in itertools.groupby(timeline)]
    assert [prompt for prompt, _ in runs] == names and timeline.dropped == ()
    counts = [count for _, count in runs]
    assert sum(counts) == blocks and max(counts) - min(counts) <= 1
    assert timeline.frames == frames


def test_more_prompts_than_blocks_can_not_be_split():
    with pytest.raises(ValueError, match=r"4 prompts.*the video has 3; give it at least 12 latents or fewer prompts"):
        Timeline.evenly(["a", "b", "c", "d"], block=3, frames=frames_of(9))


@pytest.mark.parametrize(("switches", "message"), [
    ([], "3 prompts need 2 switch indices, got 0"),
    ([3], "3 prompts need 2 switch indices, got 1"),
    ([3, 6, 9], "3 prompts need 2 switch indices, got 3"),
    ([6, 3], r"must rise from above 0, got \[6, 3\]"),
    ([3, 3], r"must rise from above 0, got \[3, 3\]"),
    ([0, 3], r"must rise from above 0, got \[0, 3\]"),
    ([-3, 3], r"must rise from above 0, got \[-3, 3\]"),
    ([3, 12], r"switch index 12 is outside the video, which has 12 latents \(0 to 11\)"),
])
def test_switches_that_do_not_fit_are_refused(switches, message):
    with pytest.raises(ValueError, match=message):
        Timeline.build(["a", "b", "c"], switches, block=3, frames=frames_of(12))
    with pytest.raises(UserError, match=f"stories.jsonl, line 4: .*{message}"):
        Story(["a", "b", "c"], switch_frame_indices=switches, where="stories.jsonl, line 4").timeline(
            Config(), frames_of(12))


CONFIG = Config(num_frame_per_block=3, fps=16)


@given(st.lists(st.integers(1, 100).map(lambda tenths: tenths / 10 + 0.3), min_size=1, max_size=6))
def test_durations_keep_exact_frames(durations):
    prompts = [f"prompt {i}" for i in range(len(durations))]
    timeline = Story(prompts, durations=durations).timeline(CONFIG, frames=1)
    assert timeline.frames == round(sum(durations) * 16)
    ends = [round(sum(durations[: i + 1]) * 16) for i in range(len(durations) - 1)]
    for segment in timeline.segments + timeline.dropped:
        asked_frame = ([0, *ends])[prompts.index(segment.prompt)]
        begins = first_frame(segment.asked)
        assert begins <= asked_frame < begins + 4  # the latent that shows the frame at which the prompt was asked


@pytest.mark.parametrize(("durations", "number"), [([0.02, 1], 1), ([0.1, 0.1, 1], 2), ([1, 0.01, 1], 2)])
def test_duration_too_short_to_show_is_refused_in_its_own_words(durations, number):
    story = Story(["a", "b", "c"][: len(durations)], durations=durations, where="stories.jsonl, line 4")
    with pytest.raises(UserError, match=rf"line 4: prompt {number} lasts {durations[number - 1]} s.*at least 0.75 s "
                                        r"\(one block\)"):
        story.timeline(CONFIG, frames=1)


def test_durations_in_whole_blocks_switch_there():
    timeline = Story(["a", "b"], durations=[9 / 16, 12 / 16]).timeline(CONFIG, frames=1)
    assert list(timeline) == ["a", "b"] and timeline.frames == 21
    assert Story(["a", "b"], durations=[10 / 16, 11 / 16]).timeline(CONFIG, frames=1).plan(16)[1]["asked_latent"] == 3


def test_length_of_the_story_goes_before_the_length_asked_for():
    assert Story(["a"], num_output_frames=9).timeline(CONFIG, frames=5).frames == 33
    assert Story(["a"]).timeline(CONFIG, frames=5).frames == 5


@pytest.mark.parametrize("story", [Story(["a"], num_output_frames=9), Story(["a", "b"], durations=[6, 3])])
def test_length_that_overrules_goes_before_that_of_the_story(story):
    assert story.timeline(CONFIG, 48, overrule=True).frames == 48
    own = story.timeline(CONFIG, 48)
    assert own.frames != 48 and story.timeline(CONFIG, own.frames, overrule=True) == own


def test_durations_keep_their_proportions():
    story = Story(["a", "b", "c"], durations=[12, 6, 6])
    timeline = story.timeline(CONFIG, 96, overrule=True)
    assert [part["asked_latent"] for part in timeline.plan(16)] == [0, 12, 18]
    assert timeline == Story(["a", "b", "c"], durations=[3, 1.5, 1.5]).timeline(CONFIG, 1)
    with pytest.raises(UserError, match=r"prompt 1 lasts 0.0312 s, too short"):
        Story(["a", "b"], durations=[1, 31]).timeline(CONFIG, 16, overrule=True)


def test_switches_of_the_config_count_where_they_fit():
    config = Config(switch_frame_indices=[3, 9], num_output_frames=12)
    frames = frames_of(12)
    assert list(Story(["a", "b", "c"]).timeline(config, frames)) == ["a", "b", "b", "c"]
    assert list(Story(["a", "b"]).timeline(config, frames)) == ["a", "a", "b", "b"]  # one switch too many: even
    assert list(Story(["a", "b", "c"]).timeline(config, frames_of(9))) == ["a", "b", "c"]  # 9 is past its end: even
    own = Story(["a", "b", "c"], switch_frame_indices=[3, 6])
    assert list(own.timeline(config, frames)) == ["a", "b", "c", "c"]


@given(st.floats(0.4, 100))
def test_seconds_and_frames_agree(seconds):
    timeline = Story(["a"], durations=[seconds]).timeline(CONFIG, frames=1)
    assert abs(timeline.frames / 16 - seconds) <= 1 / 32
    assert timeline.latents == math.ceil(latents_for(timeline.frames) / 3) * 3
