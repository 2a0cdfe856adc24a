"""Ranks that start again under one agent: they never meet what an earlier start left in the agent's store."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from slicetune.engine.common import distributed
from slicetune.engine.common.errors import UserError


def start(store: dist.Store, world: int, late: int) -> list[str]:
    """The names that `world` ranks agree on; rank `late` comes after the others."""
    names: list[str] = [""] * world
    server = store

    def join(rank: int) -> None:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        time.sleep(0.1 * (rank == late))
        names[rank] = distributed.agree_on_start(client, rank, world, 20)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_start_has_a_name_of_its_own_whoever_comes_last():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    seen = set()
    for late in (0, 1, 2, 0):
        names = start(server, 3, late)
        assert len(set(names)) == 1
        seen.add(names[0])
    assert len(seen) == 4


def test_a_rank_that_never_comes_is_an_error():
    """What an earlier start left does not stand for it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start(server, 2, 0)
    for alone in (0, 1):
        with pytest.raises(RuntimeError, match="all 2 ranks"):
            distributed.agree_on_start(server, alone, 2, 0.2)


def test_a_port_in_use_is_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"MASTER_PORT {port}: the port is in use"):
            distributed.start()
    assert not dist.is_initialized()
    assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def test_all_groups_give_up_after_the_same_time(pool, tmp_path):
    """DeepSpeed's own groups too, whose time-out would be torch's 30 minutes: the pool's is three."""
    for found in pool.run("group_timeouts", str(tmp_path)):
        assert len(found) > 1
        assert set(found) == {180.0}
