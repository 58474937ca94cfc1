"""Servers for tiny models."""

import contextlib

import pytest
from serving_double import Server

from otter_hf.serving.media import MediaLimits


@pytest.fixture
def serve():
    """Starts servers and ends them after the test."""
    with contextlib.ExitStack() as stack:

        def start(*names, **settings) -> Server:
            server = Server(names, **settings)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="module")
def shared_server(folders):
    """A server with small limits that many bad requests must not bring down."""
    limits = MediaLimits(image_pixels=10_000_000, pictures=16, total_pixels=30_000_000)
    server = Server([folders["otter"]], body_bytes=1 << 20, media=limits)
    yield server
    server.stop()
