"""Ports for processes that are about to start."""

from __future__ import annotations

import socket

import pytest

import fixtures.ports
from qwen_vl_sft.distributed.ports import UNASSIGNED, free_port


def test_a_port_in_use_is_not_given():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        used = server.getsockname()[1]
        free = fixtures.ports.free_port()
        assert {free_port([used, free]) for _ in range(8)} == {free}
        with pytest.raises(OSError, match="no port is free"):
            free_port([used])


def test_no_port_is_given_to_two_workers(monkeypatch):
    def ports_of(worker):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        return {fixtures.ports.free_port() for _ in range(64)}

    assert not ports_of("gw0") & ports_of("gw1")
    assert {port % fixtures.ports.WORKERS for port in ports_of("gw3")} == {
        (UNASSIGNED.start + 3) % fixtures.ports.WORKERS
    }
