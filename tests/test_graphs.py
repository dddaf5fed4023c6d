"""Which passes are captured and replayed, with graphs that compute where a GPU's would only run. The real ones
are in `tests/test_gpu.py`."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pipeline.engine import Engine
from pipeline.session import Session
from scripts.benchmarking.gpu_use import blocks_until_steady
from tests.conftest import tiny_settings
from utils.config import ModelKwargs
from wan.graphs import GraphedWan


class Graph:
    """Computes again what was captured, from the memory that was captured and on the slots that were picked then."""

    def __init__(self, graphed: GraphedWan):
        self.graphed = graphed
        self.block, self.filled = graphed.cache._block, len(graphed.cache.positions)
        self.text = [[tensor.data_ptr() for tensor in pair] for pair in graphed.text]
        self.held = [graphed.cache.keys[0].data_ptr(), *(tensor.data_ptr() for tensor in graphed.inputs)]
        self.flow = torch.empty_like(graphed.inputs[0])

    def replay(self) -> None:
        graphed = self.graphed
        assert (graphed.cache._block, len(graphed.cache.positions)) == (self.block, self.filled)
        assert self.text == [[tensor.data_ptr() for tensor in pair] for pair in graphed.text]
        assert self.held == [graphed.cache.keys[0].data_ptr(), *(tensor.data_ptr() for tensor in graphed.inputs)]
        self.flow.copy_(graphed.generator.flow(*graphed.inputs, graphed.cache, graphed.text))


class Computed(GraphedWan):
    """Counts replays; `fresh` counts captures."""

    fresh = 0

    def _capture(self):
        Computed.fresh += 1
        graph = Graph(self)
        return graph, graph.flow


@pytest.fixture
def graphed(monkeypatch):
    """Sessions capture passes on the CPU too."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(Computed, "fresh", 0)
    monkeypatch.setattr("pipeline.session.GraphedWan", Computed)
    monkeypatch.setattr("pipeline.session.GRAPHS_ON", ("cpu",))


def latents(tiny_folder, prompts: str, graphs: bool, **kwargs) -> tuple[Session, Tensor]:
    config = dataclasses.replace(
        tiny_settings(tiny_folder, "unused"), cuda_graphs=graphs, global_sink=kwargs.pop("global_sink", True),
        model_kwargs=ModelKwargs(**kwargs))
    session, made = Engine.from_config(config).session(seed=0), []
    for prompt in prompts:
        session.set_prompt(prompt)
        made.append(session.step_latents().clone())
    return session, torch.cat(made, 1)


@pytest.mark.parametrize("settings", [{}, {"global_sink": False}, {"use_infinite_attention": True}, {"sink_size": 0}],
                         ids=str)
def test_replayed_passes_make_the_same_video(tiny_folder, graphed, settings):
    prompts = "a" * 11 + "b" * 8
    session, got = latents(tiny_folder, prompts, True, **settings)
    places = (12 - session.config.model_kwargs.sink_size) // 3  # of a block in the ring
    while_filling = 4 - 1  # blocks before the first one in the full ring
    again = settings == {"global_sink": False}  # the new prompt's K/V of all latents begin anew
    assert len(session._graphed.graphs) == places + (0 if again else while_filling)
    assert Computed.fresh == while_filling + places * (1 + again)
    _, expected = latents(tiny_folder, prompts, False, **settings)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("settings", [{}, {"sink_size": 0}, {"local_attn_size": 18}], ids=str)
def test_the_benchmark_waits_until_nothing_is_captured(tiny_folder, graphed, settings):
    config = dataclasses.replace(tiny_settings(tiny_folder, "unused"), model_kwargs=ModelKwargs(**settings))
    blocks = blocks_until_steady(config)
    latents(tiny_folder, "a" * blocks, True, **settings)
    captured, Computed.fresh = Computed.fresh, 0
    latents(tiny_folder, "a" * (blocks + 7), True, **settings)
    assert 0 < Computed.fresh == captured


def test_what_a_generator_has_run_is_captured_at_once_but_for_a_first_pass(tiny_folder, graphed, monkeypatch):
    engine = Engine.from_config(dataclasses.replace(tiny_settings(tiny_folder, "unused"), cuda_graphs=True))
    plain, flow = [], engine.generator.flow
    monkeypatch.setattr(engine.generator, "flow", lambda x, *rest: plain.append(x.data_ptr()) or flow(x, *rest))
    counts = []
    for _ in range(2):
        plain.clear()
        session = engine.session(seed=0)
        session.set_prompt("a")
        for _ in range(7):
            session.step_latents()
        counts.append(sum(x != session._graphed.inputs[0].data_ptr() for x in plain))
    assert counts == [6, 1]  # of four blocks that fill the window and two further places of the ring


def test_what_was_made_in_another_window_or_failed_is_not_captured_at_once(tiny_folder, graphed, monkeypatch):
    engine = Engine.from_config(dataclasses.replace(tiny_settings(tiny_folder, "unused"), cuda_graphs=True))

    def captured_in_two_blocks(window: int) -> tuple[int, int]:
        """How many passes are captured, and how many have been made by then."""
        config = dataclasses.replace(engine.config, model_kwargs=ModelKwargs(local_attn_size=window))
        session, before = engine.session(seed=0, config=config), Computed.fresh
        session.set_prompt("a")
        session.step_latents()
        session.step_latents()
        return Computed.fresh - before, len(engine._captures.made)

    assert [captured_in_two_blocks(window) for window in (12, 9, 12)] == [(2, 2), (2, 4), (2, 4)]
    flow = engine.generator.flow
    monkeypatch.setattr(engine.generator, "flow", lambda *given: 1 / 0)
    session, made = engine.session(seed=0), set(engine._captures.made)
    session.set_prompt("a")
    engine._captures.made.clear()
    with pytest.raises(ZeroDivisionError):
        session.step_latents()
    assert made and not engine._captures.made
    monkeypatch.setattr(engine.generator, "flow", flow)
    session.step_latents()
    assert engine._captures.made


def test_nothing_is_captured_where_the_window_grows(tiny_folder, graphed):
    session, _ = latents(tiny_folder, "aaaaaaa", True, local_attn_size=-1)
    assert session._graphed is None or session._graphed.graphs == {}
