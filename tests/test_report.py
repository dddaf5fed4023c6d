"""The table at the end of a run."""

from utils.report import RankReport, VideoTimes, table, to_json


def report(wall: float, load: float) -> RankReport:
    video = VideoTimes("a", frames=160, latents=40, wall=wall, stages={"denoise": [1.0, 2.0], "decode": [wall - 3.0]})
    return RankReport([video], load=load, text=0.5)


def test_one_process_says_its_wall_clock():
    lines = table([report(8.0, 1.0)], fps=16).splitlines()
    assert [line.split()[:2] for line in lines[1:6]] == [["load", "1.00"], ["text", "0.50"], ["denoise", "3.00"],
                                                         ["decode", "5.00"], ["total", "8.00"]]
    assert lines[5].endswith("(wall clock, without load and text)")
    assert lines[6] == "1 video, 40 latents, 160 frames, 10.0 s of video; 20.0 frames/s end to end, 1.25x real time"


def test_stages_of_several_processes_add_up_to_the_total():
    """Speed is that of the whole run all the same: while one process works so do the others."""
    reports = [report(8.0, 1.0), report(10.0, 2.0)]
    lines = table(reports, fps=16).splitlines()
    assert [line.split()[:2] for line in lines[1:6]] == [["load", "3.00"], ["text", "1.00"], ["denoise", "6.00"],
                                                         ["decode", "12.00"], ["total", "18.00"]]
    assert "seconds of 2 processes added up" in lines[5]
    assert lines[6].split()[:3] == ["wall", "clock", "10.00"] and "took longest" in lines[6]
    assert lines[7].startswith("2 videos, 80 latents, 320 frames, 20.0 s of video; 32.0 frames/s")
    assert lines[8].startswith("peak memory of one process at the most: ")
    totals = to_json(reports)["totals"]
    assert totals["total_seconds"] == 18 and totals["wall_seconds"] == 10 and totals["processes"] == 2
