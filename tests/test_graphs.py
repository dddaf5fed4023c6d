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

    def __init__(self, graphed: GraphedWan, want_flow: bool):
        self.graphed, self.want_flow = graphed, want_flow
        self.block, self.filled = graphed.cache._block, len(graphed.cache.positions)
        self.text = [[tensor.data_ptr() for tensor in pair] for pair in graphed.text]
        self.held = [graphed.cache.keys[0].data_ptr(), *(tensor.data_ptr() for tensor in graphed.inputs)]
        self.flow: Tensor | None = None

    def replay(self) -> None:
        graphed = self.graphed
        assert (graphed.cache._block, len(graphed.cache.positions)) == (self.block, self.filled)
        assert self.text == [[tensor.data_ptr() for tensor in pair] for pair in graphed.text]
        assert self.held == [graphed.cache.keys[0].data_ptr(), *(tensor.data_ptr() for tensor in graphed.inputs)]
        flow = graphed.generator.flow(*graphed.inputs, graphed.cache, graphed.text, self.want_flow)
        if self.flow is not None:
            self.flow.copy_(flow)


class Computed(GraphedWan):
    """Counts replays; `fresh` counts captures."""

    fresh = 0

    def _capture(self, want_flow: bool):
        Computed.fresh += 1
        graph = Graph(self, want_flow)
        graph.flow = torch.empty_like(self.inputs[0]) if want_flow else None
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
    assert len(session._graphed.graphs) == 2 * places  # denoising and clean passes of each
    anew = 2 if settings == {"global_sink": False} else 1
    assert Computed.fresh == anew * 2 * places
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


def test_nothing_is_captured_before_the_window_is_full_or_where_it_never_is(tiny_folder, graphed):
    assert latents(tiny_folder, "aaa", True)[0]._graphed.graphs == {}
    session, _ = latents(tiny_folder, "aaaaaaa", True, local_attn_size=-1)
    assert session._graphed is None or session._graphed.graphs == {}
